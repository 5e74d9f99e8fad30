"""Who is asked what, so that a text by itself says nothing about its label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

TRIES = 300  # places that are tried for what cannot stay where it is
ROUNDS = 20


class TooFew(ValueError):
    """A task finds nothing to ask about the images there are; about more of them it may."""


def dealt(n: int, clashes: Callable[[int, int], bool], rng: np.random.Generator, order: np.ndarray | None = None
          ) -> np.ndarray:
    """A permutation (n,) in which no place i gets a j that clashes with it.

    Parameters
    ----------
    order : begin with this one, and change only what clashes; at random without

    Raises
    ------
    TooFew
        None could be found.
    """
    order, wrong = mixed(n, clashes, rng, order)
    if wrong:
        raise TooFew(f"nothing wrong could be found for {len(wrong)} of {n} images: take more images, or other "
                     "ones")
    return order


def mixed(n: int, clashes: Callable[[int, int], bool], rng: np.random.Generator, order: np.ndarray | None = None,
          rounds: int = ROUNDS) -> tuple[np.ndarray, list[int]]:
    """As :func:`dealt`, and the places at which something still clashes after so many rounds."""
    order, moved = rng.permutation(n) if order is None else order.copy(), set(range(n))
    for _ in range(rounds):
        wrong = [i for i in sorted(moved) if clashes(i, order[i])]
        if not wrong:
            return order, []
        moved = set(wrong)
        for i in wrong:
            tried = rng.integers(n, size=TRIES).tolist()
            j = next((j for j in tried if not clashes(i, order[j]) and not clashes(j, order[i])), tried[0])
            order[i], order[j] = order[j], order[i]
            moved.add(j)
    return order, [i for i in sorted(moved) if clashes(i, order[i])]


def without(order: np.ndarray, wrong: Sequence[int], clashes: Callable[[int, int], bool]) -> np.ndarray:
    """A permutation (n,) without the places at which something clashes: -1 there, and nobody gets what was theirs.

    Who would have got that gets what they had; where it clashes, one of the two is left out as well, by turns.
    """
    order, giver = order.copy(), np.argsort(order)  # order[giver[j]] == j
    for i in wrong:
        turn = 0
        while order[i] >= 0:
            before, after = giver[i], order[i]
            order[i] = -1
            if before == i:
                break
            order[before], giver[after] = after, before
            if before == after or clashes(before, after):
                i, turn = (after, before)[turn], 1 - turn
    return order


def completed(given: np.ndarray, own: np.ndarray, allowed_nc: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give the kinds of things that are left to those who have none, so that as few as possible are left out.

    Everybody brings one kind and gets another. Who is left out takes back their own, so that of those who take part
    each kind is brought as often as it is given. That is a flow of least cost, where leaving one out costs 1: one
    after the other is given a kind along the shortest path of exchanges that ends at a kind of which some are left.

    Parameters
    ----------
    given : (n,) kinds that have been given, each at most as often as it is brought, and -1
    own : (n,) kinds that are brought
    allowed_nc : (n, c) who may get which kind; nobody may get their own

    Returns
    -------
    (n,) kinds, -1 for those who are left out
    """
    given, c = given.copy(), allowed_nc.shape[1]
    left_c = np.bincount(own, minlength=c) - np.bincount(given[given >= 0], minlength=c)
    cost_nc = np.where(allowed_nc, 0.0, np.inf)
    cost_nc[np.arange(len(own)), own] = 1
    paid_n, step_cc = np.zeros(len(own)), np.full((c, c), np.inf)

    def extra(kind: int) -> tuple[np.ndarray, np.ndarray]:
        """Who has this kind, and what each other one would cost them more."""
        held = np.flatnonzero(given == kind)
        return held, cost_nc[held] - paid_n[held, None]

    changed = list(range(c))
    for i in rng.permutation(np.flatnonzero(given < 0)):
        for kind in changed:
            step_cc[kind] = extra(kind)[1].min(0, initial=np.inf)
        cost_c, came_c = _shortest(cost_nc[i], step_cc)
        kind, changed = int(np.where(left_c > 0, cost_c, np.inf).argmin()), []
        left_c[kind] -= 1
        while kind >= 0:
            source, who = came_c[kind], i
            if source >= 0:
                held, more = extra(source)
                who = held[more[:, kind].argmin()]
            given[who], paid_n[who] = kind, cost_nc[who, kind]
            changed.append(kind)
            kind = source
    return np.where(paid_n > 0, -1, given)


def _shortest(start_c: np.ndarray, step_cc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Costs (c,) of the cheapest paths to each kind, and the kinds (c,) before it on them, -1 at a start."""
    cost_c, came_c = start_c.copy(), np.full(len(start_c), -1)
    while True:
        through = cost_c[:, None] + step_cc
        better = through.min(0) < cost_c
        if not better.any():
            return cost_c, came_c
        came_c[better] = through.argmin(0)[better]
        cost_c = np.minimum(cost_c, through.min(0))


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
