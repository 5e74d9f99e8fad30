import pytest
import torch

from probekit.models.pooling import POOLINGS, Pooler, Prefix

LENGTHS = (3, 7, 5)
ALL = ("mean", "max", "cls", "last", "token:2", "token:-2")


def pool(hidden, mask, name):
    return Pooler([name], mask).pool(hidden)[name]


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


def test_a_prefix_run_on_its_own_pools_like_the_whole_sequence():
    torch.manual_seed(1)
    image = torch.tensor([[False, True, True, False]] * 2)
    owner = torch.tensor([1, 0, 1])
    prefixes, own = torch.randn(2, 4, 5), torch.randn(3, 6, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    names = [*POOLINGS[:6], "token:0", "token:3", "token:5", "token:-2", "token:-6"]
    split = Pooler(names, mask, None, Prefix(image, owner))
    found = split.pool(own, split.prefix_part(prefixes))
    whole = torch.cat([prefixes[owner], own], 1)
    shown = torch.cat([image[owner], torch.zeros(3, 6, dtype=torch.bool)], 1)
    expected = Pooler(names, torch.cat([torch.ones(3, 4), mask], 1), shown).pool(whole)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], msg=name)
    torch.testing.assert_close(expected["image_mean"], prefixes[owner][:, 1:3].mean(1))
    torch.testing.assert_close(expected["text_mean"][2], whole[2, [0, 3, 4, 5]].mean(0))


def test_a_mean_over_tokens_that_are_not_there_is_an_error():
    with pytest.raises(ValueError, match="no such tokens"):
        Pooler(["image_mean"], torch.ones(1, 2))


@pytest.mark.parametrize("name", ["median", "token:", "token:x", "mean "])
def test_unknown_poolings_are_refused(name):
    with pytest.raises(ValueError, match="take one of"):
        pool(torch.zeros(1, 2, 2), torch.ones(1, 2), name)


@pytest.mark.parametrize("name", ["token:3", "token:-4"])
def test_a_token_that_an_example_lacks_is_an_error(name):
    hidden, mask, _ = padded("left")
    with pytest.raises(ValueError, match="shortest example has"):
        pool(hidden, mask, name)
