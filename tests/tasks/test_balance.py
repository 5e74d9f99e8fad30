from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from probekit.tasks.balance import (
    TooFewImages,
    balanced_assignment,
    pair_opposites,
    random_assignment,
    random_chunks,
)


def test_nobody_receives_what_clashes():
    rng = np.random.default_rng(0)
    kind_n = rng.integers(3, size=300)

    def clashes(i, j):
        return kind_n[i] == kind_n[j]

    order = random_assignment(300, clashes, rng=rng)
    assert sorted(order) == list(range(300))
    assert (kind_n[order] != kind_n).all()


def test_where_everything_clashes_the_images_are_counted():
    def clashes(i, j):
        return True

    with pytest.raises(TooFewImages, match="3 of 3 images"):
        random_assignment(3, clashes, rng=np.random.default_rng(0))


@pytest.mark.parametrize("seed", range(20))
def test_as_few_as_possible_are_left_out_and_the_others_cost_least(seed):
    rng = np.random.default_rng(seed)
    n = 6
    cost_nn = rng.random((n, n))
    cost_nn[rng.random((n, n)) < rng.uniform(0.2, 0.9)] = np.inf
    before_nn = cost_nn.copy()

    def judge(order):
        """How many are left out, and what the others cost."""
        taking_part = [i for i in range(n) if order[i] != i]
        return n - len(taking_part), sum(before_nn[i, order[i]] for i in taking_part)

    best = min(judge(order) for order in permutations(range(n)) if np.isfinite(judge(order)[1]))
    assigned = balanced_assignment(cost_nn)
    kept = np.flatnonzero(assigned >= 0)
    assert sorted(assigned[kept]) == kept.tolist()
    assert np.isfinite(before_nn[kept, assigned[kept]]).all()
    left_out, cost = judge(np.where(assigned < 0, np.arange(n), assigned))
    assert left_out == best[0]
    assert cost == pytest.approx(best[1])
    np.testing.assert_array_equal(cost_nn, before_nn)


def test_leaving_one_out_costs_more_than_everything_else():
    """All but the last image can exchange for nothing; with it, everybody pays the most."""
    n = 400
    numbers = np.arange(n)
    cost_nn = np.full((n, n), np.inf)
    cost_nn[numbers, (numbers + 2) % n] = 1
    cost_nn[numbers[:-1], (numbers[:-1] + 1) % (n - 1)] = 0
    assert balanced_assignment(cost_nn).tolist() == ((numbers + 2) % n).tolist()
    cost_nn[:, -1] = np.inf  # nobody may receive the item of the last image
    assert balanced_assignment(cost_nn).tolist() == [*range(1, n - 1), 0, -1]


def test_chunks_are_small_and_hold_each_number_once():
    numbers = np.arange(100, 1350)
    chunks = random_chunks(numbers, np.random.default_rng(0), size=500)
    assert [len(chunk) for chunk in chunks] == [417, 417, 416]
    assert sorted(np.concatenate(chunks)) == numbers.tolist()
    assert not (np.concatenate(chunks) == numbers).all()
    assert random_chunks([], np.random.default_rng(0)) == []


def test_pairs_have_one_key_two_answers_and_two_images():
    rng = np.random.default_rng(0)
    candidates = {}
    for image, key, answer in zip(
        rng.integers(700, size=2000).tolist(),
        rng.integers(12, size=2000).tolist(),
        rng.integers(3, size=2000).tolist(),
        strict=True,
    ):
        candidates[image, key] = answer
    images = [image for image, _ in candidates]
    keys = [key for _, key in candidates]
    answers = list(candidates.values())
    pairs = pair_opposites(images, keys, answers=answers, rng=rng)
    image_counts = Counter(images[number] for pair in pairs for number in pair)
    assert len(pairs) > 300
    assert max(image_counts.values()) == 1
    for a, b in pairs:
        assert keys[a] == keys[b]
        assert answers[a] != answers[b]


@pytest.mark.parametrize(
    ("answers", "pair_count"),
    [
        (["one"] * 6 + ["two"] * 3 + ["three"] * 2, 5),
        (["one"] * 6 + ["two"] * 2, 2),
        (["one"] * 6, 0),
        ([], 0),
    ],
)
def test_there_are_as_many_pairs_as_the_answers_allow(answers, pair_count):
    images = range(len(answers))
    keys = ["key"] * len(answers)
    pairs = pair_opposites(images, keys, answers=answers, rng=np.random.default_rng(0))
    assert len(pairs) == pair_count
