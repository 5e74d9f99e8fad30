"""Every layer is read, whichever way a model goes, and nothing else changes the states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from probekit.models.batches import input_shape, patch_mask
from probekit.models.forward import run_pooled
from probekit.models.load import load_vlm
from probekit.models.pooling import NAMED_POOLINGS, TEXT_POOLINGS
from probekit.models.processor import PreparedImage

POOLINGS = (*NAMED_POOLINGS, "token:2", "token:-3")
STAGES = ("lm", "vision", "projector")


def assert_close(states, expected, *, tolerance):
    assert states.keys() == expected.keys()
    for key, values in expected.items():
        assert (states[key] - values).abs().max() <= tolerance * values.abs().max(), key


@pytest.mark.slow
def test_hooks_read_what_transformers_returns(vlm, prepared):
    pooled = run_pooled(vlm, prepared, poolings=POOLINGS)
    row = 0
    for image in prepared:
        for tokens, image_mask in zip(image.tokens, image.image_masks, strict=True):
            inputs = {name: torch.from_numpy(value)[None] for name, value in tokens.items()}
            with torch.inference_mode():
                output = vlm.model(
                    **inputs, **image.image_inputs, output_hidden_states=True, use_cache=False
                )
            assert len(output.hidden_states) == len(vlm.layers)
            image_t = torch.from_numpy(image_mask)
            for layer, hidden_1td in zip(vlm.layers, output.hidden_states, strict=True):
                hidden_td = hidden_1td[0]
                expected = {
                    "mean": hidden_td.mean(0),
                    "max": hidden_td.max(0).values,
                    "image_mean": hidden_td[image_t].mean(0),
                    "text_mean": hidden_td[~image_t].mean(0),
                    "suffix_mean": hidden_td[int(image_t.nonzero()[-1]) + 1 :].mean(0),
                    "cls": hidden_td[0],
                    "last": hidden_td[-1],
                    "token:2": hidden_td[2],
                    "token:-3": hidden_td[-3],
                }
                for pooling in POOLINGS:
                    values = pooled[f"{layer}/{pooling}"][row]
                    torch.testing.assert_close(values, expected[pooling], rtol=2e-4, atol=2e-5)
            row += 1
    assert row == 5


@pytest.mark.slow
def test_a_batch_changes_nothing(vlm, prepared):
    each = []
    for image in prepared:
        for k in range(len(image.tokens)):
            each.append(run_pooled(vlm, [image.with_prompt(k)], poolings=POOLINGS))
    expected = {key: torch.cat([states[key] for states in each]) for key in each[0]}
    together = run_pooled(vlm, prepared, poolings=POOLINGS)
    assert_close(together, expected, tolerance=1e-4)
    alone = run_pooled(vlm, prepared, poolings=POOLINGS, way="alone")
    assert_close(alone, expected, tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shared", "encoded"])
def test_the_cheaper_ways_change_nothing(vlm, prepared, way):
    poolings = [name for name in POOLINGS if name not in TEXT_POOLINGS]
    cheap = run_pooled(vlm, prepared, poolings=poolings, stages=STAGES, way=way)
    plain = run_pooled(vlm, prepared, poolings=poolings, stages=STAGES)
    assert_close(cheap, plain, tolerance=1e-5)
    cheap = run_pooled(vlm, prepared, poolings=TEXT_POOLINGS, way=way)
    plain = run_pooled(vlm, prepared, poolings=TEXT_POOLINGS)
    assert_close(cheap, plain, tolerance=1e-5)


def test_the_order_and_the_number_of_prompts_change_nothing(vlm, prepared):
    expected = run_pooled(vlm, prepared, poolings=POOLINGS, way="shared")
    turned = run_pooled(vlm, prepared[::-1], poolings=POOLINGS, way="shared")
    turned_back = {key: values[[2, 3, 4, 0, 1]] for key, values in turned.items()}
    assert_close(turned_back, expected, tolerance=1e-5)
    second = run_pooled(vlm, [prepared[0].with_prompt(1)], poolings=POOLINGS, way="shared")
    expected_second = {key: values[1:2] for key, values in expected.items()}
    assert_close(second, expected_second, tolerance=1e-5)


def test_the_first_token_and_the_image_never_see_the_prompt(vlm, prepared):
    pooled = run_pooled(vlm, prepared[:1], poolings=POOLINGS, way="shared")
    last_layer = vlm.layers[-1]
    for pooling in ("cls", "image_mean"):
        assert pooled[f"{last_layer}/{pooling}"].std(0).max() == 0
    assert pooled[f"{last_layer}/mean"].std(0).max() > 1e-3


def test_the_image_encoder_is_read_over_patches(vlm, prepared):
    poolings = ["mean", "image_mean", "max"]
    states = run_pooled(vlm, prepared, poolings=poolings, stages=("vision", "projector"))
    assert not any(key.startswith("lm.") for key in states)
    assert len(states["projector/mean"]) == 2
    assert torch.equal(states["projector/mean"], states["projector/image_mean"])
    embedded = run_pooled(vlm, prepared, poolings=["image_mean"])["lm.00/image_mean"]
    first_prompts = embedded[[0, 3]]
    torch.testing.assert_close(states["projector/mean"], first_prompts, rtol=1e-5, atol=1e-6)
    if vlm.vision is None:
        assert vlm.layers_of_stage["vision"] == ()
        return
    with torch.inference_mode():
        output = vlm.model.get_image_features(
            **prepared[1].image_inputs, output_hidden_states=True, return_dict=True
        )
    hidden_states = output.hidden_states[: len(vlm.vision_layers)]
    for layer, hidden in zip(vlm.vision_layers, hidden_states, strict=True):
        patches = hidden.reshape(-1, hidden.shape[-1])
        values = states[f"{layer}/mean"][1]
        torch.testing.assert_close(values, patches.mean(0), rtol=1e-5, atol=1e-6)


def test_images_of_other_shapes_do_not_fit_into_one_batch():
    vlm = load_vlm("tiny-qwen2-vl", device="cpu")
    size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    vlm.processor.image_processor.size = size
    noise = np.random.default_rng(0).integers(0, 255, (300, 500, 3), np.uint8)
    wide, flat, mirrored = [
        vlm.prompt_processor.prepare(Image.fromarray(pixels), ["a", "another one"])
        for pixels in (noise, noise[:60], noise[:, ::-1].copy())
    ]
    assert input_shape(wide) == input_shape(mirrored)
    assert input_shape(wide) != input_shape(flat)
    batch = [wide, mirrored]
    shared = run_pooled(vlm, batch, poolings=["max"], way="shared")
    assert_close(shared, run_pooled(vlm, batch, poolings=["max"]), tolerance=1e-5)


def test_image_vectors_are_counted_against_image_tokens(vlm, prepared, monkeypatch):
    model_class = type(vlm.model)
    original = model_class.get_image_features

    def lose_one(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.pooler_output = [part[:-1] for part in output.pooler_output]
        return output

    monkeypatch.setattr(model_class, "get_image_features", lose_one)
    with pytest.raises(ValueError, match=r"announced \d+ image tokens but got \d+ image vectors"):
        run_pooled(vlm, prepared, poolings=["mean"])


def image_with_mask(**masks) -> PreparedImage:
    return PreparedImage({"pixel_values": torch.zeros(1, 3, 8, 12), **masks}, [], [])


def test_padding_patches_are_left_out():
    of_patches = torch.ones(1, 2, 3)
    of_patches[0, 1, 2] = 0
    of_pixels = torch.zeros(1, 8, 12)  # six patches of 4 x 4 pixels
    of_pixels[:, :5, :8] = 1
    images = [
        image_with_mask(image_attention_mask=of_patches),
        image_with_mask(pixel_mask=of_pixels),
    ]
    expected = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 0]]).bool()
    assert torch.equal(patch_mask(images, 6), expected)
    nothing_padded = image_with_mask(pixel_mask=torch.ones(1, 8, 12))
    assert patch_mask([nothing_padded], 5).all()
    with pytest.raises(ValueError, match="pixel_mask pads the image, but not patch by patch"):
        patch_mask([image_with_mask(pixel_mask=of_pixels)], 5)
