"""Which way a model goes is found out, and it must be one that is exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from probekit.extraction.extracting import extract_tables
from probekit.extraction.settings import ExtractionSettings
from probekit.images import load_rgb
from probekit.models.devices import is_out_of_memory
from probekit.models.forward import run_pooled
from probekit.models.load import load_vlm
from probekit.models.processor import PreparedImage
from probekit.models.sharing import choose_way, take_few
from tests.models.test_architectures import PROMPTS
from tests.support.planted_faults import FAULTS, OUTLIERS, plant_fault, plant_outlier


@pytest.mark.slow
@pytest.mark.parametrize("poolings", [("max",), ("last", "image_mean")])
def test_the_states_that_come_with_the_verdict_are_those_of_the_batch(vlm, prepared, poolings):
    verdict, states = choose_way(
        vlm, prepared, poolings=poolings, stages=("lm",), ways=["shared", "plain"]
    )
    assert verdict.way == "shared"
    assert "largest difference to plain passes" in verdict.reason
    for key, values in run_pooled(vlm, prepared, poolings=poolings, way="plain").items():
        assert (states[key] - values).abs().max() <= 1e-5 * values.abs().max()


def test_an_error_in_the_last_prompt_of_the_image_with_the_most_is_noticed(
    vlm, prepared, monkeypatch
):
    def spoil_one_row(vlm, prepared, **options):
        states = run_pooled(vlm, prepared, **options)
        if options.get("way") == "shared":
            values = states["lm.02/last"].clone()
            values[2] *= 1.01  # the last of the first image's three prompts
            states["lm.02/last"] = values
        return states

    monkeypatch.setattr("probekit.models.sharing.run_pooled", spoil_one_row)
    verdict, _ = choose_way(
        vlm, prepared, poolings=("mean",), stages=("lm",), ways=["shared", "plain"]
    )
    assert verdict.way == "plain"
    assert "not shared: differs by" in verdict.reason
    assert "lm.02/last" in verdict.reason


@pytest.fixture(scope="module")
def three_images(checkpoint):
    """A tiny model by floating type, with three images and seven prompts."""
    vlms = {
        dtype: load_vlm(str(checkpoint("qwen2_vl")), device="cpu", dtype=dtype)
        for dtype in ("float32", "bfloat16")
    }
    rng = np.random.default_rng(0)
    prepared = []
    for prompts in (*PROMPTS, ("Is there a bird in it?", "Nothing at all")):
        image = Image.fromarray(rng.integers(0, 255, (100, 120, 3), np.uint8))
        prepared.append(vlms["float32"].prompt_processor.prepare(image, prompts))
    return vlms, prepared


@pytest.mark.slow
@pytest.mark.parametrize("outlier", OUTLIERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planted_faults_are_noticed_and_nothing_else(three_images, dtype, outlier):
    vlms, prepared = three_images
    vlm = vlms[dtype]
    for fault in (None, *FAULTS):
        with plant_outlier(outlier), plant_fault(vlm, fault):
            verdict, _ = choose_way(
                vlm, prepared, poolings=("mean",), stages=("lm",), ways=("shared",)
            )
        assert verdict.way == ("shared" if fault is None else "alone"), (fault, verdict.reason)


@pytest.mark.slow
def test_a_batch_that_changes_its_examples_is_not_taken(three_images, monkeypatch):
    """A batch is measured by passes alone, not by itself."""
    vlms, prepared = three_images

    def pad_wrongly(vlm, prepared, **options):
        states = run_pooled(vlm, prepared, **options)
        if len(prepared) > 1:
            return {key: values + values.std(0) for key, values in states.items()}
        return states

    monkeypatch.setattr("probekit.models.sharing.run_pooled", pad_wrongly)
    for vlm in vlms.values():
        verdict, _ = choose_way(
            vlm, prepared, poolings=("mean",), stages=("lm",), ways=("shared", "plain")
        )
        assert verdict.way == "alone", verdict.reason


def test_prompts_may_differ_right_after_the_image(checkpoint, noise_images):
    """The positions of several axes, which differ at image tokens, go on after the largest."""
    vlm = load_vlm(str(checkpoint("qwen2_vl")), device="cpu")
    prepared = [
        vlm.prompt_processor.prepare(image, ["A dog?", "No cat?"]) for image in noise_images
    ]
    verdict, _ = choose_way(vlm, prepared, poolings=("mean",), stages=("lm",), ways=["shared"])
    assert verdict.way == "shared", verdict.reason


def test_a_way_that_fails_is_named_and_the_next_one_taken(vlm, prepared, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("no cache here")

    monkeypatch.setattr("transformers.DynamicCache", fail)
    verdict, _ = choose_way(
        vlm, prepared, poolings=("mean",), stages=("lm",), ways=["shared", "plain"]
    )
    assert verdict.way == "plain"
    assert verdict.reason.endswith("; not shared: KeyError ('no cache here')")


def test_a_full_memory_is_no_verdict(vlm, prepared, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB")

    monkeypatch.setattr("transformers.DynamicCache", fail)
    with pytest.raises(RuntimeError, match="can't allocate") as caught:
        choose_way(vlm, prepared, poolings=("mean",), stages=("lm",), ways=["shared", "plain"])
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize(
    "words",
    [
        "Invalid buffer size: 12.20 GB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 17 GB)",
    ],
)
def test_the_words_of_devices_for_a_full_memory(words):
    assert is_out_of_memory(RuntimeError(words))


def test_half_precision_stays_within_its_tolerance(examples):
    half = load_vlm("tiny-qwen2-vl", device="cpu", dtype="bfloat16")
    single = load_vlm("tiny-qwen2-vl", device="cpu", dtype="float32")
    rows = examples[examples.image_id == examples.image_id.iloc[0]]
    image = load_rgb(rows.file.iloc[0])
    prepared = [single.prompt_processor.prepare(image, rows.prompt.tolist())]
    verdict, states = choose_way(half, prepared, poolings=["mean"], stages=("lm",), ways=["shared"])
    assert verdict.way == "shared"
    for key, values in run_pooled(single, prepared, poolings=["mean"]).items():
        assert (states[key] - values).abs().max() <= 0.05 * values.abs().max(), key


@pytest.mark.slow
def test_one_prompt_per_image_does_not_settle_how_several_are_run(
    checkpoint, noise_images, tmp_path, data
):
    """An image encoder that reads the prompt cannot be shared; with one prompt it seems to be."""
    settings = ExtractionSettings(str(checkpoint("instructblip")))
    vlm = load_vlm(settings.model, device="cpu")
    prepared = [
        vlm.prompt_processor.prepare(noise_images[0], PROMPTS[0]),
        vlm.prompt_processor.prepare(noise_images[1], PROMPTS[1][:1]),
    ]
    verdict, _ = choose_way(
        vlm, prepared, poolings=("mean",), stages=("lm",), ways=("shared", "plain")
    )
    assert verdict.way == "plain"

    rows = []
    for i, (image, prompts) in enumerate(zip(noise_images, PROMPTS, strict=True)):
        file = str(tmp_path / f"{i}.png")
        image.save(file)
        rows += [{"file": file, "prompt": prompt} for prompt in prompts]
    several = pd.DataFrame(rows)
    one_each = several.groupby("file").head(1).reset_index(drop=True)
    extract_tables(settings, {"none": one_each}, device="cpu")
    activations = extract_tables(settings, {"none": several}, device="cpu")
    assert activations.meta["sharing"]["cpu float32"]["way"] == "plain"
    expected = extract_tables(replace(settings, sharing="off"), {"none": several}, device="cpu")
    for layer in activations.layers:
        values = expected[layer, "mean"]
        difference = np.abs(activations[layer, "mean"] - values).max()
        assert difference < 1e-4 * np.abs(values).max()


def image_with_prompts(*lengths: int, side: int = 4) -> PreparedImage:
    """An image whose prompts have so many tokens."""
    return PreparedImage(
        {"pixel_values": torch.zeros(1, 3, side, side)},
        [{"input_ids": np.arange(length)} for length in lengths],
        [np.arange(length) < 2 for length in lengths],
    )


def test_ways_are_tried_on_the_shortest_and_longest_prompts_of_a_few_images_of_one_shape():
    taken = iter(
        [
            image_with_prompts(9, 7, 8, 12, 7, 12),
            image_with_prompts(5, 5, side=8),  # of another shape
            image_with_prompts(6),
            image_with_prompts(10, 11, 10),
            image_with_prompts(5, 6),
        ]
    )
    tried = take_few(taken, dtype="float32")
    lengths = [[len(tokens["input_ids"]) for tokens in image.tokens] for image in tried]
    assert lengths == [[7, 12], [6], [10, 11]]
    assert len(list(taken)) == 1  # what is not needed is not prepared


def test_where_no_two_images_have_one_shape_one_is_tried():
    images = [image_with_prompts(5, 7, side=side) for side in range(4, 40)]
    assert len(take_few(images, dtype="bfloat16")) == 1
