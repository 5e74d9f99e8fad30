"""Batches that do not fit the memory run in parts, and later ones are as large as what fitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probekit.models.budget import TokenBudget
from probekit.models.processor import PreparedImage


def make_image(prompts: int, tokens: int = 17) -> PreparedImage:
    mask = np.zeros(tokens, bool)
    mask[:5] = True
    return PreparedImage({}, [{"input_ids": np.arange(tokens)}] * prompts, [mask] * prompts)


class Device:
    """Holds so many tokens, and notes how many it was given."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.given: list[int] = []

    def run(self, prepared) -> list[int]:
        tokens = sum(len(row["input_ids"]) for image in prepared for row in image.tokens)
        self.given.append(tokens)
        if tokens > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [tokens]


def run(budget: TokenBudget, device: Device, prepared) -> list[int]:
    return budget.run(
        prepared, device.run, way="plain", join=lambda first, second, _: [*first, *second]
    )


@pytest.fixture
def budget() -> TokenBudget:
    return TokenBudget(8192, model="a model", device="cuda", fix="take a smaller longest_side")


def test_the_budget_becomes_what_fitted_and_not_less(budget):
    device = Device(room=350)
    assert run(budget, device, [make_image(prompts=40)]) == [340, 340]
    assert budget.tokens == 340
    # What is known not to fit is not tried again.
    assert run(budget, device, [make_image(prompts=40)]) == [340, 340]
    assert device.given == [680, 340, 340, 340, 340]


def test_images_are_split_before_prompts(budget):
    device = Device(room=100)
    images = [make_image(prompts=3), make_image(prompts=3), make_image(prompts=3)]
    assert run(budget, device, images) == [51, 51, 51]
    assert budget.tokens == 51


def test_what_fitted_before_is_not_forgotten(budget):
    device = Device(room=350)
    run(budget, device, [make_image(prompts=19)])
    assert run(budget, device, [make_image(prompts=21)]) == [10 * 17, 11 * 17]
    assert budget.tokens == 19 * 17


def test_a_budget_does_not_grow_past_what_is_wanted():
    budget = TokenBudget(100, model="a model", device="cuda", fix="")
    device = Device(room=1000)
    run(budget, device, [make_image(prompts=40)])
    assert budget.tokens == 100


def test_other_errors_are_passed_on(budget):
    def fail(prepared):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        budget.run([make_image(3)], fail, way="plain", join=lambda *_: None)


@pytest.mark.slow
def test_one_prompt_that_does_not_fit_names_the_fix(budget):
    message = "one prompt with its image, 17 tokens.* cuda: take a smaller longest_side"
    with pytest.raises(MemoryError, match=message):
        run(budget, Device(room=10), [make_image(prompts=4)])
