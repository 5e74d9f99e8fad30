"""Who is asked what, so that a text by itself says nothing about its label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

TRIES = 300  # places that are tried for what cannot stay where it is
ROUNDS = 20


def dealt(n: int, clashes: Callable[[int, int], bool], rng: np.random.Generator, order: np.ndarray | None = None
          ) -> np.ndarray:
    """A permutation (n,) in which no place i gets a j that clashes with it.

    Parameters
    ----------
    order : begin with this one, and change only what clashes; at random without

    Raises
    ------
    ValueError
        None could be found.
    """
    order, moved = rng.permutation(n) if order is None else order.copy(), set(range(n))
    for _ in range(ROUNDS):
        wrong = [i for i in sorted(moved) if clashes(i, order[i])]
        if not wrong:
            return order
        moved = set(wrong)
        for i in wrong:
            tried = rng.integers(n, size=TRIES).tolist()
            j = next((j for j in tried if not clashes(i, order[j]) and not clashes(j, order[i])), tried[0])
            order[i], order[j] = order[j], order[i]
            moved.add(j)
    raise ValueError(f"nothing wrong could be found for {len(wrong)} of {n} images: take more images, or other ones")


def paired(images: Sequence[Hashable], keys: Sequence[Hashable], states: Sequence[Hashable], rng: np.random.Generator
           ) -> list[tuple[int, int]]:
    """Pairs of candidates from two images that have the same key and different states.

    Asked what is true of itself and what is true of the other, each pair gives every text once a "yes" and once a "no".
    Keys that few images have come first; an image is in one pair at most; there are as many pairs of a key as its
    states allow.

    Parameters
    ----------
    images, keys, states : (m,) of each candidate; one candidate at most for each image and key

    Returns
    -------
    list of (a, b), numbers of candidates
    """
    groups: dict[Hashable, dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
    for k in rng.permutation(len(keys)).tolist():
        groups[keys[k]][states[k]].append(k)
    used, pairs = set(), []
    for group in sorted(groups.values(), key=lambda group: sum(map(len, group.values()))):
        left = [free for found in group.values() if (free := [k for k in found if images[k] not in used])]
        while len(left := sorted(filter(None, left), key=len)) > 1:
            a, b = left[-1].pop(), left[-2].pop()
            used |= {images[a], images[b]}
            pairs.append((a, b))
    return pairs
