"""Local semantics: which objects to ask about, so that an object's name does not give the answer away."""

from __future__ import annotations

import numpy as np
import pandas as pd

from probekit.captions import dealt
from probekit.chosen import Chosen

PROMPT = "This image contains the following types of object:"
LIST_PROMPT = PROMPT + " {categories}"
QUERY_PROMPT = "Objects: {categories}.\nIs there a {category} in this image?"
ASKED = 3  # categories that an image is asked for, as in the study
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


# ------------------------------------------------------------------------------------------------------------ the tasks


def _category_rows(chosen: Chosen) -> pd.DataFrame:
    """Labels and masks, the same for all category tasks; images that show none of the categories are left out."""
    rng = np.random.default_rng([chosen.seed, 1])
    shows = chosen.shows_nc.loc[chosen.images.index]
    images = chosen.images[shows.any(axis=1).to_numpy()]
    masks = np.zeros((len(images), shows.shape[1]), dtype=int)
    labels = shows.loc[images.index].to_numpy(dtype=int)
    for split in images.split.unique():
        rows = np.flatnonzero((images.split == split).to_numpy())
        masks[rows] = balanced_mask(labels[rows], rng)
    return images.assign(labels=labels.tolist(), mask=masks.tolist())


def balanced_mask(labels_nc: np.ndarray, rng: np.random.Generator, count: int = ASKED) -> np.ndarray:
    """Choose which categories each image is asked for: one or two that it shows, the rest absent ones.

    Present ones are drawn with a chance inverse to how often a category occurs; absent ones go where a category
    has been asked as present more often than as absent, so that its name does not give its label away.

    Parameters
    ----------
    labels_nc : (n, c) of 0 and 1, at least one 1 a row

    Returns
    -------
    (n, c) of 0 and 1, `count` ones a row (fewer only where there are fewer categories)
    """
    n, c = labels_nc.shape
    mask_nc = np.zeros((n, c), dtype=int)
    rarity = 1 / np.maximum(labels_nc.sum(0), 1)
    several = rng.permutation(np.flatnonzero(labels_nc.sum(1) > 1))
    takes_two = np.isin(np.arange(n), several[: n // 2])
    for row in range(n):
        present = np.flatnonzero(labels_nc[row])
        weight = rarity[present] / rarity[present].sum()
        mask_nc[row, rng.choice(present, size=1 + takes_two[row], replace=False, p=weight)] = 1
    owed = mask_nc.sum(0).astype(float)
    for row in rng.permutation(n):
        absent = np.flatnonzero(labels_nc[row] == 0)
        order = absent[np.argsort(-(owed[absent] + rng.random(len(absent))), kind="stable")]
        pick = order[: count - mask_nc[row].sum()]
        mask_nc[row, pick] = 1
        owed[pick] -= 1
    return mask_nc


def category_task(chosen: Chosen, rng: np.random.Generator) -> pd.DataFrame:
    """Which categories are there? The prompt does not name them."""
    return _category_rows(chosen).assign(prompt=PROMPT)


def category_list_task(chosen: Chosen, rng: np.random.Generator) -> pd.DataFrame:
    """Which categories are there? The prompt lists all of them, shuffled anew for each image."""
    rows = _category_rows(chosen)
    names = list(chosen.shows_nc.columns)
    lists = [", ".join(rng.permutation(names)) for _ in range(len(rows))]
    return rows.assign(prompt=[LIST_PROMPT.format(categories=text) for text in lists])


def category_dense_task(chosen: Chosen, rng: np.random.Generator) -> pd.DataFrame:
    """Which categories are there? Every category of every image counts; most are absent."""
    shows = chosen.shows_nc.loc[chosen.images.index].to_numpy(dtype=int)
    return chosen.images.assign(labels=shows.tolist(), mask=np.ones_like(shows).tolist(), prompt=PROMPT)


def object_task(chosen: Chosen, rng: np.random.Generator, absent: str = "random") -> pd.DataFrame:
    """Is this object there? Each image is asked for one that is and one that is not, all listed before, shuffled.

    Parameters
    ----------
    absent : which ones, see :func:`asked`; images that show none or all are left out
    """
    names, parts = np.array(chosen.shows_nc.columns), []
    for _, images in chosen.images.groupby("split", sort=False):
        shows = chosen.shows_nc.loc[images.index].to_numpy()
        kept = shows.any(1) & ~shows.all(1)
        images, shows = images[kept], shows[kept]
        lists = [", ".join(rng.permutation(names)) for _ in range(len(images))]
        for label, places in zip((1, 0), asked(shows, absent, rng), strict=True):
            prompts = [QUERY_PROMPT.format(categories=text, category=name)
                       for text, name in zip(lists, names[places], strict=True)]
            parts.append(images.assign(prompt=prompts, labels=[[label]] * len(images), mask=[[1]] * len(images)))
    return pd.concat(parts)
