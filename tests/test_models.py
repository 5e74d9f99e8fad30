import gc
import weakref

import pytest
import torch
from conftest import DEMO_MODELS

from probekit import presets
from probekit.models import load_vlm


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
