import pytest
import torch

from probekit.pool import pool

LENGTHS = (3, 7, 5)
ALL = ("mean", "max", "cls", "last", "token:2", "token:-2")


def padded(side):
    torch.manual_seed(0)
    hidden, mask = torch.full((3, 7, 4), 1e4), torch.zeros(3, 7, dtype=torch.long)
    real = [torch.randn(length, 4) for length in LENGTHS]
    for i, states in enumerate(real):
        where = slice(0, len(states)) if side == "right" else slice(7 - len(states), 7)
        hidden[i, where], mask[i, where] = states, 1
    return hidden, mask, real


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_pooling_sees_the_real_tokens_alone(side):
    hidden, mask, real = padded(side)
    wanted = {"mean": lambda s: s.mean(0), "max": lambda s: s.max(0).values, "cls": lambda s: s[0],
              "last": lambda s: s[-1], "token:2": lambda s: s[2], "token:-2": lambda s: s[-2]}
    for name in ALL:
        expected = torch.stack([wanted[name](states) for states in real])
        torch.testing.assert_close(pool(hidden, mask, name), expected)


def test_half_precision_is_summed_in_float32():
    states = torch.full((1, 4096, 2), 1.001, dtype=torch.bfloat16)
    assert pool(states, torch.ones(1, 4096), "mean").dtype == torch.float32
    torch.testing.assert_close(pool(states, torch.ones(1, 4096), "mean"), states[:, 0].float())


@pytest.mark.parametrize("name", ["median", "token:", "token:x", "mean "])
def test_unknown_poolings_are_refused(name):
    with pytest.raises(ValueError, match="take one of"):
        pool(torch.zeros(1, 2, 2), torch.ones(1, 2), name)


@pytest.mark.parametrize("name", ["token:3", "token:-4"])
def test_a_token_that_an_example_lacks_is_an_error(name):
    hidden, mask, _ = padded("left")
    with pytest.raises(ValueError, match="shortest example has"):
        pool(hidden, mask, name)
