"""With each control of the inputs, each way has the states of transformers alone, or is not taken.

What is compared shares no code with the package: one prompt at a time goes through the processor
and the whole model, and its hidden states are what transformers returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from probekit.models.forward import WAYS, States, run_pooled
from probekit.models.load import Vlm, load_vlm
from probekit.models.processor import PreparedImage
from probekit.models.sharing import choose_way
from tests.models.test_architectures import PROMPTS, WITHOUT_FINAL_NORM
from tests.support.architectures import RECIPES
from tests.support.transformers_alone import TransformersAlone, pool

POOLINGS = ("mean", "max", "last")
EXACT = 5e-5  # relative to the largest value of a layer

Inputs = list[tuple[Image.Image | None, Sequence[str]]]


def list_controls(images: Sequence[Image.Image]) -> dict[str, Inputs]:
    """What the model is given for the examples themselves and for each control."""
    first, second = images
    return {
        "none": [(first, PROMPTS[0]), (second, PROMPTS[1])],
        "wrong_image": [(second, PROMPTS[0]), (first, PROMPTS[1])],
        "no_image": [(None, [prompt]) for prompts in PROMPTS for prompt in prompts],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_way_is_that_of_transformers_alone_or_is_not_taken(name, checkpoint, noise_images):
    vlm = load_vlm(str(checkpoint(name)), device="cpu", dtype="float32")
    reference = TransformersAlone(checkpoint(name))
    for control, inputs in list_controls(noise_images).items():
        prepared = [vlm.prompt_processor.prepare(image, prompts) for image, prompts in inputs]
        expected = compute_expected(vlm, reference, inputs, prepared)
        if name in WITHOUT_FINAL_NORM:
            expected = {k: v for k, v in expected.items() if not k.startswith(vlm.layers[-1])}
        exact_ways = [way for way in WAYS if is_exact(vlm, prepared, way, expected)]
        assert "alone" in exact_ways, (control, exact_ways)
        verdict, states = choose_way(
            vlm, prepared, poolings=POOLINGS, stages=("lm",), ways=tuple(WAYS)[:-1]
        )
        assert verdict.way == exact_ways[0], (control, exact_ways, verdict.reason)
        assert largest_difference(states, expected) < EXACT


def compute_expected(
    vlm: Vlm, reference: TransformersAlone, inputs: Inputs, prepared: Sequence[PreparedImage]
) -> States:
    """Pooled states by transformers alone, with the keys of the package's."""
    rows: dict[str, list[np.ndarray]] = {}
    for (image, prompts), one in zip(inputs, prepared, strict=True):
        for prompt, row in zip(prompts, one.tokens, strict=True):
            token_ids, layers_td = reference.run(image, prompt)
            assert row["input_ids"].tolist() == token_ids
            assert len(layers_td) == len(vlm.layers)
            for layer, hidden_td in zip(vlm.layers, layers_td, strict=True):
                for pooling, values_d in pool(hidden_td).items():
                    rows.setdefault(f"{layer}/{pooling}", []).append(values_d)
    return {key: torch.from_numpy(np.stack(values)) for key, values in rows.items()}


def is_exact(vlm: Vlm, prepared: Sequence[PreparedImage], way: str, expected: States) -> bool:
    try:
        states = run_pooled(vlm, prepared, poolings=POOLINGS, way=way)
    except (ValueError, TypeError):  # the model cannot go this way
        return False
    return largest_difference(states, expected) < EXACT


def largest_difference(states: States, expected: States) -> float:
    assert states.keys() >= expected.keys()
    differences = [
        float((states[key] - values).abs().max() / values.abs().max())
        for key, values in expected.items()
    ]
    return float(np.max(differences))
