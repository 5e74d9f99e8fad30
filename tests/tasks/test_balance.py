from collections import Counter

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from probekit.tasks.balance import completed, dealt, mixed, paired, without


def test_nobody_gets_what_clashes():
    rng = np.random.default_rng(0)
    kind = rng.integers(3, size=300)
    order = dealt(300, lambda i, j: kind[i] == kind[j], rng)
    assert sorted(order) == list(range(300)) and (kind[order] != kind).all()


def test_what_cannot_be_dealt_out_is_said_soon():
    with pytest.raises(ValueError, match="3 of 3 images"):
        dealt(3, lambda i, j: True, np.random.default_rng(0))


def test_what_clashes_is_left_out_and_its_own_with_it():
    rng = np.random.default_rng(0)
    kind = np.array([0] * 60 + [1] * 20 + [2] * 20)

    def clashes(i, j):
        return kind[i] == kind[j]

    order, wrong = mixed(100, clashes, rng, rounds=3)
    assert len(wrong) >= 10  # 60 of a kind have 40 others
    left = without(order, wrong, clashes)
    kept = np.flatnonzero(left >= 0)
    assert sorted(left[kept]) == kept.tolist() and (kind[left[kept]] != kind[kept]).all() and len(kept) >= 60
    assert (without(order, [], clashes) == order).all()
    assert (without(np.arange(3), [0, 1, 2], lambda i, j: True) == -1).all()
    assert without(np.array([1, 0, 3, 4, 2]), [0], lambda i, j: i == j).tolist() == [-1, -1, 3, 4, 2]
    nobody = without(np.roll(np.arange(50), -1), [8], lambda i, j: j == 9)  # 9 suits nobody: it goes, not all before it
    assert np.flatnonzero(nobody < 0).tolist() == [8, 9]


@pytest.mark.parametrize("seed", range(20))
def test_as_few_as_possible_are_left_out(seed):
    rng = np.random.default_rng(seed)
    n, c = 40, int(rng.integers(2, 7))
    allowed = rng.random((n, c)) < rng.uniform(0.1, 0.6)
    own = rng.integers(c, size=n)
    allowed[np.arange(n), own] = False
    cost = np.where(allowed[:, own], 0.0, 1e6)
    cost[own[:, None] == own] = 1
    fewest = cost[linear_sum_assignment(cost)].sum()
    order = rng.permutation(own)
    start = np.where(allowed[np.arange(n), order], order, -1)
    for given in (start, np.full(n, -1)):
        done = completed(given, own, allowed, rng)
        kept = done >= 0
        assert (~kept).sum() == fewest and allowed[kept, done[kept]].all()
        assert Counter(done[kept].tolist()) == Counter(own[kept].tolist())
    assert (completed(order, own, allowed, rng) == order).all()  # nothing is left to be given


def test_pairs_have_one_key_two_states_and_two_images():
    rng = np.random.default_rng(0)
    images, keys, states = (rng.integers(high, size=2000).tolist() for high in (700, 12, 3))
    once = list({(image, key): k for k, (image, key) in enumerate(zip(images, keys, strict=True))}.values())
    images, keys, states = ([column[k] for k in once] for column in (images, keys, states))
    pairs = paired(images, keys, states, rng)
    used = Counter(images[k] for pair in pairs for k in pair)
    assert len(pairs) > 300 and max(used.values()) == 1
    assert all(keys[a] == keys[b] and states[a] != states[b] for a, b in pairs)


def test_as_many_pairs_as_the_states_allow():
    states = ["one"] * 6 + ["two"] * 3 + ["three"] * 2
    assert len(paired(range(11), ["key"] * 11, states, np.random.default_rng(0))) == 5
    assert not paired(range(6), ["key"] * 6, ["one"] * 6, np.random.default_rng(0))
    assert not paired([], [], [], np.random.default_rng(0))
