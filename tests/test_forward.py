import numpy as np
import pytest
import torch
from PIL import Image

from probekit import coco, forward, paths
from probekit.pool import NAMES

POOLINGS = (*NAMES[:6], "token:2", "token:-3")


@pytest.fixture(scope="module")
def ragged(examples):
    """Five examples on two images, with prompts of very different lengths."""
    rows = examples[examples.image_id.isin(examples.image_id.unique()[:2])].groupby("image_id").head(4).head(7)
    rows = rows.iloc[[0, 1, 2, 4, 5]] if len(rows) > 5 else rows
    files, owner = np.unique(rows.file, return_inverse=True)
    return [coco.load_rgb(paths.resolve(file)) for file in files], rows.prompt.tolist(), owner.tolist()


def plain(vlm, images, prompts, owner, poolings=POOLINGS):
    return forward.plain(vlm, [images[i] for i in owner], prompts, poolings)


def shared(vlm, images, prompts, owner, poolings=POOLINGS):
    return forward.shared(vlm, [vlm.prepare_image(i) for i in images], vlm.tokens_after_image(prompts), owner, poolings)


def close(ours, reference, tolerance):
    assert ours.keys() == reference.keys()
    for key, values in reference.items():
        assert (ours[key] - values).abs().max() <= tolerance * values.abs().max(), key


def test_hooks_read_what_transformers_returns(vlm, ragged):
    images, prompts, owner = ragged
    pooled = plain(vlm, *ragged)
    inputs = vlm.prepare([images[i] for i in owner], prompts)
    with torch.inference_mode():
        states = vlm.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == len(vlm.layers)
    for layer, hidden_ntd in zip(vlm.layers, states, strict=True):
        for i, mask in enumerate(inputs["attention_mask"].bool()):
            real, image = hidden_ntd[i][mask], vlm.shows_image(inputs["input_ids"])[i][mask]
            wanted = {"mean": real.mean(0), "last": real[-1], "cls": real[0], "max": real.max(0).values,
                      "image_mean": real[image].mean(0), "text_mean": real[~image].mean(0)}
            for pooling, expected in wanted.items():
                torch.testing.assert_close(pooled[f"{layer}/{pooling}"][i], expected, rtol=2e-4, atol=2e-5)


def test_a_batch_changes_nothing(vlm, ragged):
    images, prompts, owner = ragged
    alone = [plain(vlm, images, [p], [i]) for p, i in zip(prompts, owner, strict=True)]
    close(plain(vlm, *ragged), {key: torch.cat([one[key] for one in alone]) for key in alone[0]}, 1e-4)


def test_sharing_the_image_changes_nothing(vlm, ragged):
    close(shared(vlm, *ragged), plain(vlm, *ragged), 1e-5)


def test_the_order_and_the_number_of_prompts_change_nothing(vlm, ragged):
    images, prompts, owner = ragged
    turned = shared(vlm, images, prompts[::-1], owner[::-1])
    close({key: values.flip(0) for key, values in turned.items()}, shared(vlm, *ragged), 1e-5)
    one = shared(vlm, images[:1], prompts[:1], [0])
    close(one, {key: values[:1] for key, values in plain(vlm, *ragged).items()}, 1e-5)


def test_the_first_token_and_the_image_never_see_the_prompt(vlm, ragged):
    images, prompts, _ = ragged
    pooled = shared(vlm, images[:1], prompts[:3], [0, 0, 0])
    last = vlm.layers[-1]
    for pooling in ("cls", "image_mean"):
        assert pooled[f"{last}/{pooling}"].std(0).max() == 0
    assert pooled[f"{last}/mean"].std(0).max() > 1e-3


def test_images_of_other_shapes_make_other_numbers_of_tokens():
    from probekit.models import load_vlm

    vlm = load_vlm("tiny-qwen2-vl", device="cpu")
    noise = np.random.default_rng(0).integers(0, 255, (300, 500, 3), np.uint8)
    images = [Image.fromarray(noise), Image.fromarray(noise[:, :200]), Image.fromarray(noise[:100])]
    ready = [vlm.prepare_image(image) for image in images]
    assert len({r["input_ids"].shape[1] for r in ready}) > 1 and len({forward.shape_of(r) for r in ready}) > 1
    prompts, owner = ["a", "a longer one", "b", "c", "some more words"], [0, 0, 1, 2, 2]
    found = forward.try_sharing(vlm, images, prompts, owner)
    assert found.used, found.words


def test_half_precision_stays_within_its_tolerance(ragged):
    from probekit.models import load_vlm

    vlm = load_vlm("tiny-qwen2-vl", device="cpu", dtype="bfloat16")
    assert forward.try_sharing(vlm, *ragged).used
    exact = plain(load_vlm("tiny-qwen2-vl", device="cpu", dtype="float32"), *ragged, poolings=["mean"])
    close(plain(vlm, *ragged, poolings=["mean"]), exact, 0.05)
