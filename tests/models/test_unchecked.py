"""A type that nobody has checked is read as transformers reads it, or not at all."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from probekit.extraction.extracting import extract_tables
from probekit.extraction.settings import ExtractionSettings
from probekit.models import forward, presets, unchecked
from probekit.models.load import load_vlm


@pytest.fixture
def nothing_is_checked(monkeypatch):
    """No type is a checked one."""
    table = presets.read_checked_architectures().iloc[:0]
    monkeypatch.setattr(unchecked, "read_checked_architectures", lambda: table)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "florence2", "lfm2_vl"])
def test_layers_that_are_those_of_transformers_pass(
    nothing_is_checked, checkpoint, noise_images, name
):
    vlm = load_vlm(str(checkpoint(name)), device="cpu")
    prepared = vlm.prompt_processor.prepare(noise_images[0], ["Is there a dog?"])
    unchecked.check_layers(vlm, prepared)


def test_layers_that_are_read_one_block_too_late_stop_the_extraction(
    nothing_is_checked, data, examples, monkeypatch
):
    original = forward.tap_decoder

    @contextmanager
    def tap_later(vlm, take):
        shifted = dict(zip(vlm.layers, [*vlm.layers[1:], vlm.layers[0]], strict=True))
        with original(vlm, lambda layer, hidden: take(shifted[layer], hidden)):
            yield

    monkeypatch.setattr(forward, "tap_decoder", tap_later)
    table = examples.head(4)
    with pytest.raises(ValueError, match=r"qwen2_vl, which .* read at lm.00 differs"):
        extract_tables(ExtractionSettings("tiny-qwen2-vl"), {"none": table}, device="cpu")


@pytest.mark.parametrize(
    "output, reason",
    [
        (SimpleNamespace(), "transformers returns no hidden states"),
        (SimpleNamespace(hidden_states=()), "transformers returns 0 layers, and 9 are found"),
    ],
)
def test_a_model_that_returns_no_hidden_states_is_refused(
    nothing_is_checked, vlm, prepared, monkeypatch, output, reason
):
    monkeypatch.setattr(unchecked, "read_layers", lambda *_, **__: output)
    with pytest.raises(ValueError, match=reason):
        unchecked.check_layers(vlm, prepared[0].with_prompt(0))


def test_a_checked_type_needs_no_pass(vlm, prepared, monkeypatch):
    monkeypatch.setattr(unchecked, "read_layers", None)
    unchecked.check_layers(vlm, prepared[0].with_prompt(0))
