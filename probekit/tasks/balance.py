"""Balanced assignment: which image is asked about which text, so that no text tells its label.

Each image has an item that is true of it, such as a caption or an object, and is also asked about
the item of another image. So each item occurs as often with the label 1 as with the label 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

ROUNDS = 20
TRIED_PARTNERS = 300
CHUNK = 1_000
# Captions that are exchanged among themselves where each pair of them is judged.
CAPTION_CHUNK = 500


class TooFewImages(ValueError):
    """A task finds nothing to ask about the images; about more images it may."""


def random_assignment(
    n: int, clashes: Callable[[int, int], bool], *, rng: np.random.Generator
) -> np.ndarray:
    """Assign the items of n images to each other at random, so that nothing clashes.

    A random permutation is repaired: where something clashes, it is exchanged with a randomly drawn
    partner for whom the exchange does not clash either. Nobody is left out. Time and memory grow in
    proportion to n.

    Parameters
    ----------
    n : int
        Number of images, and of items.
    clashes : callable
        ``clashes(i, j)`` says whether image i must not receive the item of image j.
    rng : Generator
        Source of the random numbers.

    Returns
    -------
    ndarray of int
        Shape (n,): a permutation; each image receives the item of the image with this number.

    Raises
    ------
    TooFewImages
        No such permutation was found.
    """
    order = rng.permutation(n)
    clashing = [i for i in range(n) if clashes(i, order[i])]
    for _ in range(ROUNDS):
        changed = set(clashing)
        for i in clashing:
            j = _draw_partner(order, i, clashes=clashes, rng=rng)
            order[[i, j]] = order[[j, i]]
            changed.add(j)
        clashing = [i for i in sorted(changed) if clashes(i, order[i])]
    if clashing:
        raise TooFewImages(
            f"no text of another image fits {len(clashing)} of {n} images: take more images, or "
            "different ones"
        )
    return order


def _draw_partner(
    order: np.ndarray, i: int, *, clashes: Callable[[int, int], bool], rng: np.random.Generator
) -> int:
    """Return an image with which image i can exchange, or any where none of those drawn can."""
    partners = rng.integers(len(order), size=TRIED_PARTNERS).tolist()
    for j in partners:
        if not clashes(i, order[j]) and not clashes(j, order[i]):
            return j
    return partners[0]


def balanced_assignment(cost_nn: np.ndarray) -> np.ndarray:
    """Assign the items of n images to each other, and leave out as few images as possible.

    An image is left out together with its item. So each item that is asked about is received by
    exactly one image.

    Parameters
    ----------
    cost_nn : ndarray
        Shape (n, n): the cost, from 0 to 1, of assigning to the image of the row the item of the
        image of the column; infinity forbids it. The diagonal is not read.

    Returns
    -------
    ndarray of int
        Shape (n,): each image receives the item of the image with this number, -1 where it is left
        out. Of the assignments that leave out the fewest images it is the one that costs least.

    Notes
    -----
    An image that is left out keeps its item. This costs 1, and the other costs are scaled so that
    all of them together stay below 1; what remains is a linear assignment problem. Memory grows
    with the square of n, and time up to its cube: :func:`random_chunks` keeps n small.
    """
    from scipy.optimize import linear_sum_assignment  # takes a second

    n = len(cost_nn)
    scaled_cost_nn = cost_nn / (n + 1)
    np.fill_diagonal(scaled_cost_nn, 1)
    _, order = linear_sum_assignment(scaled_cost_nn)
    return np.where(order == np.arange(n), -1, order)


def random_chunks(
    numbers: Sequence[int] | np.ndarray, rng: np.random.Generator, *, size: int = CHUNK
) -> list[np.ndarray]:
    """Split images at random into chunks that are assigned among themselves.

    Parameters
    ----------
    numbers : sequence of int
        The numbers of the images.
    rng : Generator
        Source of the random numbers.
    size : int
        Largest length of a chunk. At the default of 1,000, the matrix of costs takes 8 MB.

    Returns
    -------
    list of ndarray
        Chunks of nearly the same length.
    """
    return ordered_chunks(rng.permutation(numbers), size=size)


def ordered_chunks(numbers: Sequence[int] | np.ndarray, *, size: int) -> list[np.ndarray]:
    """Split numbers, in their order, into chunks of nearly the same length, `size` at most."""
    if len(numbers) == 0:
        return []
    return np.array_split(np.asarray(numbers), -(-len(numbers) // size))


def pair_opposites(
    images: Sequence[Hashable],
    keys: Sequence[Hashable],
    *,
    answers: Sequence[Hashable],
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    """Pair candidates of two images that have the same key and different answers.

    Where both images of a pair are asked the question of their key, once with the answer of the one
    and once with that of the other, each text is asked as often with "yes" as with "no".

    Parameters
    ----------
    images, keys, answers : sequence
        The image, the key and the answer of each candidate; at most one candidate for each image
        and key.
    rng : Generator
        Source of the random numbers.

    Returns
    -------
    list of (int, int)
        Numbers of candidates. An image is in one pair at most. Keys that few candidates have come
        first, and each key has as many pairs as its answers allow.
    """
    candidates: dict[Hashable, dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in rng.permutation(len(keys)).tolist():
        candidates[keys[number]][answers[number]].append(number)
    paired_images: set[Hashable] = set()
    pairs = []
    for by_answer in sorted(candidates.values(), key=_count_candidates):
        unpaired = [
            [number for number in numbers if images[number] not in paired_images]
            for numbers in by_answer.values()
        ]
        for a, b in _pair_largest(unpaired):
            paired_images.update((images[a], images[b]))
            pairs.append((a, b))
    return pairs


def _count_candidates(by_answer: dict[Hashable, list[int]]) -> int:
    return sum(len(numbers) for numbers in by_answer.values())


def _pair_largest(groups: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Take one from each of the two largest groups until a single group is left."""
    while True:
        groups = sorted((group for group in groups if group), key=len)
        if len(groups) < 2:
            return
        yield groups[-1].pop(), groups[-2].pop()
