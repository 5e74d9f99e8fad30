"""Pooling counts real tokens alone, with or without a prefix."""

from __future__ import annotations

import pytest
import torch

from probekit.models.pooling import NAMED_POOLINGS, Pooler, Prefix

LENGTHS = (3, 7, 5)


def pool(hidden, mask, name):
    return Pooler([name], mask).pool(hidden)[name]


def pad_states(side):
    """Hidden states of three examples with large values for padding, their mask, the real ones."""
    torch.manual_seed(0)
    hidden = torch.full((3, 7, 4), 1e4)
    mask = torch.zeros(3, 7, dtype=torch.long)
    real = [torch.randn(length, 4) for length in LENGTHS]
    for i, states in enumerate(real):
        start = 0 if side == "right" else 7 - len(states)
        hidden[i, start : start + len(states)] = states
        mask[i, start : start + len(states)] = 1
    return hidden, mask, real


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_pooling_sees_the_real_tokens_alone(side):
    hidden, mask, real = pad_states(side)
    expected = {
        "mean": [states.mean(0) for states in real],
        "max": [states.max(0).values for states in real],
        "cls": [states[0] for states in real],
        "last": [states[-1] for states in real],
        "token:2": [states[2] for states in real],
        "token:-2": [states[-2] for states in real],
    }
    for name, vectors in expected.items():
        torch.testing.assert_close(pool(hidden, mask, name), torch.stack(vectors))


@pytest.mark.parametrize("padding", [torch.inf, -torch.inf, torch.nan])
def test_padding_may_hold_anything(padding):
    hidden, mask, real = pad_states("right")
    hidden[mask == 0] = padding
    image = torch.zeros(3, 7, dtype=torch.bool)
    image[:, 0] = True
    hidden_prefix = torch.randn(3, 2, 4)
    prefix = Prefix(torch.tensor([[False, True]] * 3), torch.arange(3))
    for name in NAMED_POOLINGS:
        pooled = Pooler([name], mask, image_nt=image).pool(hidden)[name]
        assert pooled.isfinite().all(), name
        pooler = Pooler([name], mask, prefix=prefix)
        assert pooler.pool(hidden, pooler.pool_prefix(hidden_prefix))[name].isfinite().all(), name
    text = torch.stack([states[1:].mean(0) for states in real])
    pooled = Pooler(["text_mean"], mask, image_nt=image).pool(hidden)["text_mean"]
    torch.testing.assert_close(pooled, text)


def test_half_precision_is_summed_in_float32():
    hidden = torch.full((1, 4096, 2), 1.001, dtype=torch.bfloat16)
    pooled = pool(hidden, torch.ones(1, 4096), "mean")
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, hidden[:, 0].float())


def test_a_prefix_run_before_pools_like_the_whole_sequence():
    torch.manual_seed(1)
    image = torch.tensor([[False, True, True, False]] * 2)
    owner = torch.tensor([1, 0, 1])
    prefixes = torch.randn(2, 4, 5)
    suffixes = torch.randn(3, 6, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    names = [*NAMED_POOLINGS, "token:0", "token:3", "token:5", "token:-2", "token:-6"]

    split = Pooler(names, mask, prefix=Prefix(image, owner))
    pooled = split.pool(suffixes, split.pool_prefix(prefixes))

    whole = torch.cat([prefixes[owner], suffixes], 1)
    whole_mask = torch.cat([torch.ones(3, 4), mask], 1)
    whole_image = torch.cat([image[owner], torch.zeros(3, 6, dtype=torch.bool)], 1)
    expected = Pooler(names, whole_mask, image_nt=whole_image).pool(whole)
    for name in names:
        torch.testing.assert_close(pooled[name], expected[name], msg=name)
    torch.testing.assert_close(expected["image_mean"], prefixes[owner][:, 1:3].mean(1))
    torch.testing.assert_close(expected["text_mean"][2], whole[2, [0, 3, 4, 5]].mean(0))


def test_a_mean_over_tokens_that_an_example_lacks_is_an_error():
    with pytest.raises(ValueError, match="no such tokens"):
        Pooler(["image_mean"], torch.ones(1, 2))


@pytest.mark.parametrize("name", ["median", "token:", "token:x", "mean "])
def test_unknown_poolings_are_refused(name):
    with pytest.raises(ValueError, match="take one of"):
        pool(torch.zeros(1, 2, 2), torch.ones(1, 2), name)


@pytest.mark.parametrize("name", ["token:3", "token:-4"])
def test_a_token_that_an_example_lacks_is_an_error(name):
    hidden, mask, _ = pad_states("left")
    with pytest.raises(ValueError, match="shortest example has"):
        pool(hidden, mask, name)
