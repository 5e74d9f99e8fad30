"""Models are loaded frozen, from safetensors, and leave nothing behind."""

from __future__ import annotations

import gc
import re
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from probekit import paths
from probekit.models.load import load_vlm
from tests.conftest import DEMO_MODELS, REPOSITORY


@pytest.fixture
def copied_checkpoint(tmp_path):
    """A demo model that a test may change."""
    source = REPOSITORY / "data" / "models" / "tiny-qwen2-vl"
    return shutil.copytree(source, tmp_path / "copied")


def test_the_model_is_frozen_and_its_layers_are_named(vlm):
    assert not vlm.model.training
    assert not any(parameter.requires_grad for parameter in vlm.model.parameters())
    assert not hasattr(vlm.model, "lm_head")
    assert vlm.layers[0] == "lm.00"
    assert len(vlm.layers) == len(vlm.blocks) + 1


def test_the_tokenizer_can_read_any_caption(vlm):
    tokenizer = vlm.processor.tokenizer
    text = "Ein Mädchen eats naïve jalapeños — 寿司 🍣 at 7:45pm"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_untrained_weights_follow_the_seed(name):
    def first_weights(**options):
        return next(load_vlm(name, device="cpu", **options).blocks.parameters())

    weights = first_weights(untrained=True, seed=0)
    assert torch.equal(weights, first_weights(untrained=True, seed=0))
    assert not torch.equal(weights, first_weights(untrained=True, seed=1))
    assert not torch.equal(weights, first_weights())


def test_loading_does_not_touch_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_vlm("tiny-qwen2-vl", device="cpu", untrained=True)
    assert torch.equal(torch.rand(3), expected)


def test_released_memory_is_given_back():
    vlm = load_vlm("tiny-qwen2-vl", device="cpu")
    weights = [weakref.ref(parameter) for parameter in vlm.model.parameters()]
    vlm.release()
    gc.collect()
    assert not any(reference() is not None for reference in weights)


def test_pickled_weights_are_refused(copied_checkpoint):
    safe_file = copied_checkpoint / "model.safetensors"
    torch.save(load_file(safe_file), copied_checkpoint / "pytorch_model.bin")
    safe_file.unlink()
    message = r"no weights in safetensors, .* take a revision that has them"
    with pytest.raises(OSError, match=message):
        load_vlm(str(copied_checkpoint), device="cpu")
    load_vlm(str(copied_checkpoint), device="cpu", untrained=True)


def test_code_of_a_checkpoint_is_not_run_unasked(copied_checkpoint):
    config_file = copied_checkpoint / "config.json"
    changes = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    paths.write_json(config_file, paths.read_json(config_file) | changes)
    proof = copied_checkpoint / "ran"
    code = f"open({str(proof)!r}, 'w').close()\nraise ImportError('as far as this')\n"
    (copied_checkpoint / "own.py").write_text(code, encoding="utf-8")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_vlm(str(copied_checkpoint), device="cpu")
    assert not proof.exists()
    with pytest.raises(ImportError, match="as far as this"):
        load_vlm(str(copied_checkpoint), device="cpu", trust_remote_code=True)
    assert proof.exists()


def test_nothing_is_pickled():
    unsafe = re.compile(r"pickle|joblib|torch\.load|torch\.save|shelve|marshal")
    lines = []
    for file in (REPOSITORY / "probekit").rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if unsafe.search(line):
                lines.append(f"{file.name}: {line}")
    assert lines == []
