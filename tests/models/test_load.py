import gc
import re
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from probekit import paths
from probekit.models import presets
from probekit.models.load import load_vlm
from tests.conftest import DEMO_MODELS, REPOSITORY


def test_the_model_is_frozen_and_its_layers_are_named(vlm):
    assert not vlm.model.training
    assert not any(p.requires_grad for p in vlm.model.parameters())
    assert not hasattr(vlm.model, "lm_head")
    assert vlm.layers[0] == "lm.00" and len(vlm.layers) == len(vlm.blocks) + 1


def test_the_tokenizer_can_read_any_caption(vlm):
    tokenizer = vlm.processor.tokenizer
    text = "Ein Mädchen eats naïve jalapeños — 寿司 🍣 at 7:45pm"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_untrained_weights_follow_the_seed(name):
    one, same, other = (next(load_vlm(name, device="cpu", untrained=True, seed=s).blocks.parameters())
                        for s in (0, 0, 1))
    trained = next(load_vlm(name, device="cpu").blocks.parameters())
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, trained)


def test_loading_does_not_touch_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_vlm("tiny-qwen2-vl", device="cpu", untrained=True)
    assert torch.equal(torch.rand(3), expected)


def test_released_memory_is_given_back():
    vlm = load_vlm("tiny-qwen2-vl", device="cpu")
    weights = [weakref.ref(p) for p in vlm.model.parameters()]
    vlm.release()
    gc.collect()
    assert not any(ref() is not None for ref in weights)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_vlm(str(tmp_path))


def test_names_that_are_no_folder_go_to_the_hub():
    assert presets.locate("qwen2-vl-2b") == "Qwen/Qwen2-VL-2B-Instruct"
    assert presets.locate("org/model") == "org/model"


def test_pickled_weights_are_refused(tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(paths.Home.find().data / "models" / "tiny-qwen2-vl", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no weights in safetensors, .* take a revision that has them"):
        load_vlm(str(folder), device="cpu")
    load_vlm(str(folder), device="cpu", untrained=True)


def test_code_of_a_checkpoint_is_not_run_unasked(tmp_path):
    folder = tmp_path / "own-code"
    shutil.copytree(paths.Home.find().data / "models" / "tiny-qwen2-vl", folder)
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    paths.write_json(folder / "config.json", paths.read_json(folder / "config.json") | own)
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise ImportError('as far as this')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_vlm(str(folder), device="cpu")
    assert not ran.exists()
    with pytest.raises(ImportError, match="as far as this"):
        load_vlm(str(folder), device="cpu", trust_remote_code=True)
    assert ran.exists()


def test_nothing_is_pickled():
    words = re.compile(r"pickle|joblib|torch\.load|torch\.save|shelve|marshal")
    found = [f"{file.name}: {line}" for file in (REPOSITORY / "probekit").rglob("*.py")
             for line in file.read_text().splitlines() if words.search(line)]
    assert not found


def test_a_revision_stands_behind_an_id(tmp_path):
    assert presets.locate("org/model@abc") == "org/model" and presets.pinned_revision("org/model@abc", None) == "abc"
    assert presets.locate("qwen2-vl-2b@main") == "Qwen/Qwen2-VL-2B-Instruct"
    assert presets.pinned_revision("qwen2-vl-2b@main", None) == "main"
    assert len(presets.pinned_revision("qwen2-vl-2b", None)) == 40
    assert [presets.short_name(name) for name in ("org/model@refs/pr/1", "org/model")] == ["model@refs-pr-1", "model"]
    (tmp_path / "a@b").mkdir()
    (tmp_path / "a@b" / "config.json").touch()
    assert presets.locate(str(tmp_path / "a@b")) == str(tmp_path / "a@b")
