"""Images and prompts are prepared in order and put into full batches."""

from __future__ import annotations

import time
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import reduce_tensor

from probekit.extraction.loading import copy_pixels, fill_batches, look_ahead, prepare_images
from probekit.extraction.shards import model_inputs
from probekit.images import load_rgb
from probekit.paths import Home


@pytest.fixture
def rows(examples):
    return model_inputs(examples, Home.find())


def prepare(vlm, rows, workers, dtype="float32"):
    return prepare_images(
        vlm.prompt_processor,
        [rows],
        longest_side=None,
        home=Home.find(),
        dtype=dtype,
        workers=workers,
    )


@pytest.mark.slow
def test_batches_fill_their_budget_and_hold_whole_images(rows, vlm):
    items = list(prepare(vlm, rows, workers=2))
    assert [item.image for item in items] == list(range(60))
    np.testing.assert_array_equal(
        np.concatenate([item.rows for item in items]), np.arange(len(rows))
    )
    for way in ("shared", "plain"):
        batches = list(fill_batches(items, token_budget=lambda: 3000, way=lambda fixed=way: fixed))
        sizes = [sum(item.count_tokens(way) for item in batch) for batch in batches]
        assert max(sizes) <= 3000
        assert len(sizes) > 2
        assert min(sizes[:-1]) > 1500


def test_an_image_that_a_worker_cannot_read_is_named(rows, vlm, tmp_path):
    rows = rows.head(40).copy()
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    is_last = rows.file == rows.file.iloc[-1]
    rows.loc[is_last, ["file", "size"]] = str(tmp_path / "broken.jpg"), 10
    with pytest.raises(OSError, match=r"broken\.jpg") as caught:
        list(prepare(vlm, rows, workers=1))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_workers_use_no_shared_memory(rows, vlm, tmp_path, monkeypatch, dtype):
    """Where it is full, as in small containers, items would be lost and waited for."""
    marker = tmp_path / "shared"

    def share(tensor):
        marker.touch()
        return reduce_tensor(tensor)

    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, share)
    items = list(prepare(vlm, rows.head(60), workers=1, dtype=dtype))
    expected = list(prepare(vlm, rows.head(60), workers=0))
    assert len(items) == len(expected)
    for item, one in zip(items, expected, strict=True):
        for name, values in one.prepared.image_inputs.items():
            received = item.prepared.image_inputs[name]
            assert received.dtype == (
                getattr(torch, dtype) if values.is_floating_point() else values.dtype
            )
            assert torch.equal(received, values.to(received.dtype))
    assert not marker.exists()


def test_pixels_are_copied_and_masks_stay(rows, vlm, monkeypatch):
    (item,) = prepare(vlm, rows.head(1), workers=0)
    mask = torch.ones(1, 4)
    inputs = item.prepared.image_inputs | {"image_attention_mask": mask}
    item = replace(item, prepared=replace(item.prepared, image_inputs=inputs))
    copied = []

    def copy(device, values):
        copied.append(values)
        return values

    monkeypatch.setattr("probekit.extraction.loading.copy_to", copy)
    copy_pixels([item], "cuda")
    assert len(copied) == 1
    assert copied[0] is inputs["pixel_values"]


def test_an_error_of_the_processor_is_not_blamed_on_the_image(rows, vlm, monkeypatch):
    rows = rows.head(1)

    def fail(image, prompts):
        raise KeyError("patch_size")

    monkeypatch.setattr(type(vlm.prompt_processor), "prepare", lambda self, *given: fail(*given))
    with pytest.raises(ValueError, match=r"patch_size.*it is not the image"):
        list(prepare(vlm, rows, workers=0))

    def fail_on_photographs(image, prompts):
        if np.array(image).std() > 0:
            raise ValueError("odd shape")

    monkeypatch.setattr(
        type(vlm.prompt_processor), "prepare", lambda self, *given: fail_on_photographs(*given)
    )
    with pytest.raises(ValueError, match=r"odd shape.*it is the image, .*: take it out"):
        list(prepare(vlm, rows, workers=0))


def test_an_image_that_changed_since_the_plan_is_refused(rows, vlm, tmp_path):
    rows = rows.head(2).copy()
    (tmp_path / "changed.jpg").write_bytes(b"0123456789")
    rows[["file", "size"]] = str(tmp_path / "changed.jpg"), 9
    with pytest.raises(
        ValueError, match=r"changed\.jpg is gone or has changed since this extraction was plan"
    ):
        list(prepare(vlm, rows, workers=0))


class FailingProcessor:
    """Fails for every image, or for those of a size."""

    def __init__(self, processor, size=None):
        self.processor = processor
        self.size = size

    def prepare(self, image, prompts):
        if self.size in (None, image.size):
            raise RuntimeError("cannot take it")
        return self.processor.prepare(image, prompts)


def test_an_error_of_the_processor_is_blamed_on_what_causes_it(rows, vlm):
    rows = rows.head(2)
    size = load_rgb(Home.find().resolve(rows.file.iloc[0]), None).size
    for processor, blamed in (
        (FailingProcessor(vlm.prompt_processor), "not the image, a plain grey one fails too"),
        (FailingProcessor(vlm.prompt_processor, size), "it is the image, a plain grey one goes"),
    ):
        with pytest.raises(ValueError, match=blamed):
            list(prepare_images(processor, [rows], longest_side=None, home=Home.find()))


def test_looking_ahead_changes_nothing_and_makes_one_item_more_than_is_worked_on():
    made = []

    def make():
        for k in range(5):
            made.append(k)
            yield k

    found = []
    for item in look_ahead(make()):
        deadline = time.monotonic() + 60
        while len(made) < min(5, item + 2):  # the next one is made meanwhile
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert len(made) == min(5, item + 2)
        found.append(item)
    assert found == list(range(5))
    assert list(look_ahead([])) == []


def test_an_error_ahead_is_raised_after_what_came_before():
    def make():
        yield 1
        yield 2
        raise ValueError("broken.jpg")

    found = []
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        for item in look_ahead(make()):
            found.append(item)  # what was found before the error counts
    assert found == [1, 2]


def test_pixels_that_do_not_fit_ahead_stay_where_they_are(rows, vlm, monkeypatch):
    batch = list(prepare(vlm, rows.head(4), workers=0))

    def fail(device, values):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("probekit.extraction.loading.copy_to", fail)
    assert copy_pixels(batch, "cuda") is batch
