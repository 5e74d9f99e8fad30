import numpy as np
import pytest
import torch
from PIL import Image

from probekit import paths
from probekit.images import load_rgb
from probekit.models import batches, sharing
from probekit.models.forward import run_pooled
from probekit.models.pooling import POOLINGS
from probekit.models.processor import PreparedImage

POOLINGS = (*POOLINGS[:6], "token:2", "token:-3")
STAGES = ("lm", "vision", "projector")


@pytest.fixture(scope="module")
def ragged(examples, vlm):
    """Two images with three and two prompts of very different lengths."""
    groups = list(examples.groupby("image_id"))[:2]
    return [vlm.prompt_processor.prepare(load_rgb(paths.Home.find().resolve(rows.file.iloc[0])), rows.prompt.tolist()[:k])
            for (_, rows), k in zip(groups, (3, 2), strict=True)]


def close(ours, reference, tolerance):
    assert ours.keys() == reference.keys()
    for key, values in reference.items():
        assert (ours[key] - values).abs().max() <= tolerance * values.abs().max(), key


def test_hooks_read_what_transformers_returns(vlm, ragged):
    pooled = run_pooled(vlm, ragged, POOLINGS)
    prompts = [(one, k) for one in ragged for k in range(len(one.tokens))]
    for i, (one, k) in enumerate(prompts):
        with torch.inference_mode():
            tokens = {key: torch.from_numpy(value)[None] for key, value in one.tokens[k].items()}
            states = vlm.model(**tokens, **one.image_inputs, output_hidden_states=True, use_cache=False).hidden_states
        assert len(states) == len(vlm.layers)
        image = torch.from_numpy(one.image_masks[k])
        for layer, hidden_1td in zip(vlm.layers, states, strict=True):
            real = hidden_1td[0]
            wanted = {"mean": real.mean(0), "last": real[-1], "cls": real[0], "max": real.max(0).values,
                      "image_mean": real[image].mean(0), "text_mean": real[~image].mean(0)}
            for pooling, expected in wanted.items():
                torch.testing.assert_close(pooled[f"{layer}/{pooling}"][i], expected, rtol=2e-4, atol=2e-5)


def test_a_batch_changes_nothing(vlm, ragged):
    alone = [run_pooled(vlm, [one.with_prompt(k)], POOLINGS) for one in ragged for k in range(len(one.tokens))]
    close(run_pooled(vlm, ragged, POOLINGS), {key: torch.cat([one[key] for one in alone]) for key in alone[0]}, 1e-4)


@pytest.mark.parametrize("way", ["shared", "encoded"])
def test_the_cheaper_ways_change_nothing(vlm, ragged, way):
    poolings = [name for name in POOLINGS if name != "text_mean"]
    close(run_pooled(vlm, ragged, poolings, STAGES, way), run_pooled(vlm, ragged, poolings, STAGES), 1e-5)
    close(run_pooled(vlm, ragged, POOLINGS, ("lm",), way), run_pooled(vlm, ragged, POOLINGS), 1e-5)


def test_the_order_and_the_number_of_prompts_change_nothing(vlm, ragged):
    whole = run_pooled(vlm, ragged, POOLINGS, way="shared")
    turned = run_pooled(vlm, ragged[::-1], POOLINGS, way="shared")
    close({key: values[[2, 3, 4, 0, 1]] for key, values in turned.items()}, whole, 1e-5)
    close(run_pooled(vlm, [ragged[0].with_prompt(1)], POOLINGS, way="shared"), {key: v[1:2] for key, v in whole.items()}, 1e-5)


def test_the_first_token_and_the_image_never_see_the_prompt(vlm, ragged):
    pooled, last = run_pooled(vlm, ragged[:1], POOLINGS, way="shared"), vlm.layers[-1]
    for pooling in ("cls", "image_mean"):
        assert pooled[f"{last}/{pooling}"].std(0).max() == 0
    assert pooled[f"{last}/mean"].std(0).max() > 1e-3


def test_the_image_encoder_is_read_over_patches(vlm, ragged):
    found = run_pooled(vlm, ragged, ["mean", "image_mean", "max"], ("vision", "projector"))
    assert not any(key.startswith("lm.") for key in found)
    assert torch.equal(found["projector/mean"], found["projector/image_mean"]) and len(found["projector/mean"]) == 2
    into_decoder = run_pooled(vlm, ragged, ["image_mean"])["lm.00/image_mean"]  # what the decoder gets at the image's tokens
    torch.testing.assert_close(found["projector/mean"], into_decoder[[0, 3]], rtol=1e-5, atol=1e-6)
    if not vlm.vision:
        assert vlm.layers_of_stage["vision"] == ()
        return
    with torch.inference_mode():
        one = ragged[1]
        states = vlm.model.get_image_features(**one.image_inputs, output_hidden_states=True, return_dict=True).hidden_states
    for k, hidden in enumerate(states[: len(vlm.vision_layers)]):
        patches = hidden.reshape(-1, hidden.shape[-1])
        torch.testing.assert_close(found[f"vision.{k:02d}/mean"][1], patches.mean(0), rtol=1e-5, atol=1e-6)


def test_images_of_other_shapes_do_not_fit_into_one_batch():
    from probekit.models.load import load_vlm

    vlm = load_vlm("tiny-qwen2-vl", device="cpu")
    vlm.processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    noise = np.random.default_rng(0).integers(0, 255, (300, 500, 3), np.uint8)
    ready = [vlm.prompt_processor.prepare(Image.fromarray(part), ["a", "another one"])
             for part in (noise, noise[:60], noise[:, ::-1].copy())]
    shapes = [batches.input_shape(one) for one in ready]
    assert shapes[0] == shapes[2] != shapes[1]
    batch = [ready[0], ready[2]]
    choice, states = sharing.choose_way(vlm, batch, ["max"], ("lm",), ["shared"])
    close({"lm.02/max": states["lm.02/max"]}, {"lm.02/max": run_pooled(vlm, batch, ["max"])["lm.02/max"]}, 1e-5)
    assert choice.way == "shared" and "largest difference" in choice.reason


def test_image_vectors_are_counted_against_image_tokens(ragged, vlm, monkeypatch):
    honest = vlm.model.get_image_features

    def one_less(*arguments, **options):
        output = honest(*arguments, **options)
        output.pooler_output = [part[:-1] for part in output.pooler_output]
        return output

    monkeypatch.setattr(type(vlm.model), "get_image_features", lambda self, *a, **k: one_less(*a, **k))
    with pytest.raises(ValueError, match=r"announced \d+ image tokens but got \d+ image vectors"):
        run_pooled(vlm, ragged, ["mean"])


def test_padding_patches_are_left_out():
    def one(**masks):
        return PreparedImage({"pixel_values": torch.zeros(1, 3, 8, 12), **masks}, [], [])

    patches, pixels = torch.ones(1, 2, 3), torch.zeros(1, 8, 12)
    patches[0, 1, 2], pixels[:, :5, :8] = 0, 1  # patches of 4 x 4 pixels
    by_patch, by_pixel = one(image_attention_mask=patches), one(pixel_mask=pixels)
    expected = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 0]]).bool()
    assert torch.equal(batches.patch_mask([by_patch, by_pixel], 6), expected)
    assert batches.patch_mask([one(pixel_mask=torch.ones(1, 8, 12))], 5).all()
    with pytest.raises(ValueError, match="pixel_mask pads the image, but not patch by patch"):
        batches.patch_mask([by_pixel], 5)


def test_half_precision_stays_within_its_tolerance(examples):
    from probekit.models.load import load_vlm

    half, exact = (load_vlm("tiny-qwen2-vl", device="cpu", dtype=dtype) for dtype in ("bfloat16", "float32"))
    rows = examples[examples.image_id == examples.image_id.iloc[0]]
    ready = [exact.prompt_processor.prepare(load_rgb(paths.Home.find().resolve(rows.file.iloc[0])), rows.prompt.tolist())]
    assert sharing.choose_way(half, ready, ["mean"], ("lm",), ["shared"])[0].way == "shared"
    close(run_pooled(half, ready, ["mean"]), run_pooled(exact, ready, ["mean"]), 0.05)
