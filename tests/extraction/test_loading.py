"""Images and prompts are prepared in order and put into full batches."""

from __future__ import annotations

import numpy as np
import pytest

from probekit.extraction.loading import fill_batches, prepare_images
from probekit.extraction.shards import model_inputs
from probekit.paths import Home


@pytest.fixture
def rows(examples):
    return model_inputs(examples, Home.find())


def prepare(vlm, rows, workers):
    processor = vlm.prompt_processor
    return prepare_images(processor, [rows], longest_side=None, home=Home.find(), workers=workers)


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


def test_an_image_that_changed_since_the_plan_is_refused(rows, vlm, tmp_path):
    rows = rows.head(2).copy()
    (tmp_path / "changed.jpg").write_bytes(b"0123456789")
    rows[["file", "size"]] = str(tmp_path / "changed.jpg"), 9
    with pytest.raises(
        ValueError, match=r"changed\.jpg has changed since this extraction was plan"
    ):
        list(prepare(vlm, rows, workers=0))
