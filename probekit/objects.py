"""Which objects to ask about: dealt out so that an object's name does not give the answer away."""

from __future__ import annotations

import numpy as np

from probekit.captions import dealt

SAMPLINGS = ("random", "popular", "adversarial")


def asked(shows_nc: np.ndarray, absent: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One object that each image shows, and one that it does not.

    The absent objects are the present ones, dealt out anew: each is asked equally often with both answers. The names
    are those of POPE (Li et al., 2023, section 5.1):

    random
        objects in all frequencies: present ones are drawn with a chance inverse to how often they occur
    popular
        frequent objects: present ones are drawn as they occur
    adversarial
        as popular, and each image is asked about the absent object that goes most often with those it shows

    Parameters
    ----------
    shows_nc : (n, c) which image shows which object; at least one a row, and not all

    Returns
    -------
    present, absent : (n,) numbers of objects

    Raises
    ------
    ValueError
        Unknown sampling, or images that show too much alike to be asked about each other's objects.
    """
    if absent not in SAMPLINGS:
        raise ValueError(f"unknown sampling {absent!r}: take one of {', '.join(SAMPLINGS)}")
    shows = shows_nc.astype(bool)
    weight = shows / np.maximum(shows.sum(0), 1) if absent == "random" else shows.astype(float)
    chance = (weight / weight.sum(1, keepdims=True)).cumsum(1)
    present = (rng.random((len(shows), 1)) >= chance).sum(1).clip(max=shows.shape[1] - 1)
    start = _adversarial(shows, present, rng) if absent == "adversarial" else None
    order = dealt(len(shows), lambda i, j: bool(shows[i, present[j]]), rng, start)
    return present, present[order]


def _adversarial(shows: np.ndarray, present: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation (n,) that deals the objects to the images with whose own they go most often, the closest first."""
    together = shows.T.astype(float) @ shows / np.maximum(shows.sum(0), 1)  # given one, the share with another
    goes = np.where(shows, -np.inf, shows @ together.T + 1e-9 * rng.random(shows.shape))
    left = [list(rng.permutation(np.flatnonzero(present == c))) for c in range(shows.shape[1])]
    given = np.full(len(shows), -1)
    for place in np.argsort(-goes, axis=None, kind="stable"):
        i, c = divmod(int(place), shows.shape[1])
        if given[i] < 0 and left[c] and not shows[i, c]:
            given[i] = left[c].pop()
    given[given < 0] = [j for rest in left for j in rest]
    return given
