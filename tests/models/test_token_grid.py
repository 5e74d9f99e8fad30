"""Where in the image the image tokens lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from probekit.models.forward import read_layers
from probekit.models.token_grid import NoTokenGrid, TokenGrid, box_coverage, check_token_grid

PROMPT = "Which?"


def draw_blocks(width=160, height=120) -> Image.Image:
    blocks = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def embed_image(vlm, image) -> torch.Tensor:
    """(t, d) what enters the decoder at the image tokens."""
    prepared = vlm.prompt_processor.prepare(image, [PROMPT])
    hidden = {}
    read_layers(vlm, [prepared], lambda layer, hidden_ntd: hidden.update({layer: hidden_ntd[0]}))
    return hidden["lm.00"][torch.from_numpy(prepared.image_masks[0])]


@pytest.mark.slow
def test_tokens_lie_where_the_image_is(vlm):
    prepared = vlm.prompt_processor.prepare(draw_blocks(), [PROMPT])
    cells = TokenGrid(vlm)(prepared, (160, 120))
    assert len(cells) == prepared.image_masks[0].sum()
    areas = (cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1])
    assert areas.sum() == pytest.approx(1, abs=0.02)  # both models see the whole image
    check_token_grid(vlm, [draw_blocks()], prompt=PROMPT)


def test_a_patch_that_changes_changes_its_token(vlm):
    image = draw_blocks()
    cells = TokenGrid(vlm)(vlm.prompt_processor.prepare(image, [PROMPT]), image.size)
    before = embed_image(vlm, image)
    for k in (0, len(cells) // 2, len(cells) - 1):
        corners = np.round(cells[k] * [160, 120, 160, 120])
        left, top, right, bottom = corners.astype(int).clip(0)
        pixels = np.array(image)
        pixels[top:bottom, left:right] = 255 - pixels[top:bottom, left:right]
        change = (embed_image(vlm, Image.fromarray(pixels)) - before).norm(dim=1)
        assert int(change.argmax()) == k


def test_a_wrong_grid_is_noticed(vlm, monkeypatch):
    original = TokenGrid.__call__

    def turn_around(self, prepared, size):
        return original(self, prepared, size)[::-1]

    monkeypatch.setattr(TokenGrid, "__call__", turn_around)
    with pytest.raises(NoTokenGrid, match="do not lie where its image processor suggests"):
        check_token_grid(vlm, [draw_blocks(), draw_blocks(200, 100)], prompt=PROMPT)


def test_coverage_counts_what_lies_in_any_box():
    boxes = np.array([[0.0, 0, 0.25, 1], [0.0, 0, 0.5, 0.5]])
    halves = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1.0]])
    np.testing.assert_allclose(box_coverage(halves, boxes), [0.75, 0])
    outside_and_half_outside = np.array([[-1.0, 0, 0, 1], [-0.5, 0, 0.5, 1]])
    coverage = box_coverage(outside_and_half_outside, boxes)
    np.testing.assert_allclose(coverage, [np.nan, 0.75])
