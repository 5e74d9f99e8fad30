"""Local semantics: which objects to ask about, so that an object's name does not give the answer away.

A category is there where one of its instances covers at least a share `smallest` of the image, crowds included (they
say that there are many of it). Where there are none but smaller ones, it is neither there nor not, and never asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from probekit.tasks.balance import completed, mixed
from probekit.tasks.base import Selection, example_rows

PROMPT = "This image contains the following types of object:"
LIST_PROMPT = PROMPT + " {categories}"
QUERY_PROMPT = "Objects: {categories}.\nIs there a {category} in this image?"
ASKED = 3  # categories that an image is asked for, as in the study
SAMPLINGS = ("random", "popular", "adversarial")
PLURALS = (("y", "ies"), ("fe", "ves"), ("person", "people"), ("mouse", "mice"))


# ------------------------------------------------------------------------------------------------------- what is there


def shown(instances: pd.DataFrame, images: pd.Index, names: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Which image shows which category, and of which it shows but tiny instances.

    Parameters
    ----------
    instances : `image_id`, `category`, and `tiny`: is it too small to be asked about?

    Returns
    -------
    shows_nc, unclear_nc : DataFrames of booleans, images by names
    """
    def table(rows: pd.DataFrame) -> pd.DataFrame:
        counts = pd.crosstab(rows.image_id, rows.category).reindex(index=images, columns=list(names), fill_value=0)
        return pd.DataFrame(counts.to_numpy() > 0, images, list(names), dtype=bool)

    shows = table(instances[~instances.tiny])
    return shows, table(instances[instances.tiny]) & ~shows


def said(captions: pd.Series, images: pd.Index, names: Sequence[str], first: bool = True) -> pd.DataFrame:
    """Which image's captions name which category, or its plural, word for word: the published study's labels.

    Parameters
    ----------
    captions : lists of captions, by image
    first : look at the first one alone, as the study did; else at all

    Returns
    -------
    DataFrame of booleans, images by names
    """
    texts = [" . ".join(captions.get(i, [])[: 1 if first else None]).lower() for i in images]
    found = {name: [bool(re.search(_named(name), text)) for text in texts] for name in names}
    return pd.DataFrame(found, index=images, columns=list(names), dtype=bool)


def _named(name: str) -> str:
    low = name.lower()
    forms = {low, low + "s", low + "es", *(low.removesuffix(end) + more for end, more in PLURALS if low.endswith(end))}
    return rf"\b(?:{'|'.join(sorted(map(re.escape, forms)))})\b"


def agreement(said_nc: pd.DataFrame, shows_nc: pd.DataFrame, unclear_nc: pd.DataFrame) -> pd.DataFrame:
    """How far labels from captions agree with those from instances, over all images, by category and for all.

    Returns
    -------
    DataFrame
        Indexed by category, "all" first: `images` (that show it), `precision` (of those whose caption names it, the
        share that shows it), `recall` (of those that show it, the share whose caption names it). NaN of nothing.
    """
    told, there = (table.to_numpy(bool) & ~unclear_nc.to_numpy(bool) for table in (said_nc, shows_nc))
    both, told, there = ((told & there).sum(0), told.sum(0), there.sum(0))
    both, told, there = (np.concatenate([[count.sum()], count]) for count in (both, told, there))
    with np.errstate(invalid="ignore"):
        return pd.DataFrame({"images": there, "precision": both / told, "recall": both / there},
                            index=pd.Index(["all", *shows_nc.columns], name="category"))


# ------------------------------------------------------------------------------------------------------------ sampling


def asked(shows_nc: np.ndarray, absent: str, rng: np.random.Generator, unclear_nc: np.ndarray | None = None
          ) -> tuple[np.ndarray, np.ndarray]:
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
    unclear_nc : (n, c) what is neither there nor not, and not asked

    Returns
    -------
    present, absent : (n,) numbers of objects; absent is -1 for images that had to be left out, as few as possible

    Raises
    ------
    ValueError
        Unknown sampling.
    """
    if absent not in SAMPLINGS:
        raise ValueError(f"unknown sampling {absent!r}: take one of {', '.join(SAMPLINGS)}")
    shows = shows_nc.astype(bool)
    weight = shows / np.maximum(shows.sum(0), 1) if absent == "random" else shows.astype(float)
    chance = (weight / weight.sum(1, keepdims=True)).cumsum(1)
    present = (rng.random((len(shows), 1)) >= chance).sum(1).clip(max=shows.shape[1] - 1)
    barred = shows if unclear_nc is None else shows | unclear_nc.astype(bool)
    present = _bounded(present, shows, (~barred).sum(0), rng)
    start = _adversarial(shows, barred, present, rng) if absent == "adversarial" else None
    order, wrong = mixed(len(shows), lambda i, j: bool(barred[i, present[j]]), rng, start, rounds=3)
    given = present[order]
    given[wrong] = -1
    return present, completed(given, present, ~barred, rng)


def _bounded(present: np.ndarray, shows: np.ndarray, lacking: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Present objects (n,), where others are shown none of them more often than there are images that lack it."""
    present, room = present.copy(), lacking - np.bincount(present, minlength=shows.shape[1])
    for c in np.flatnonzero(room < 0):
        for i in rng.permutation(np.flatnonzero((present == c) & (shows.sum(1) > 1))):
            other = np.where(shows[i], room, 0).argmax()
            if room[c] < 0 < room[other]:
                present[i] = other
                room[[c, other]] += 1, -1
    return present


def _adversarial(shows: np.ndarray, barred: np.ndarray, present: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation (n,) that deals the objects to the images with whose own they go most often, the closest first."""
    together = shows.T.astype(float) @ shows / np.maximum(shows.sum(0), 1)  # given one, the share with another
    goes = np.where(barred, -np.inf, shows @ together.T + 1e-9 * rng.random(shows.shape))
    left = [list(rng.permutation(np.flatnonzero(present == c))) for c in range(shows.shape[1])]
    given = np.full(len(shows), -1)
    for place in np.argsort(-goes, axis=None, kind="stable"):
        i, c = divmod(int(place), shows.shape[1])
        if given[i] < 0 and left[c] and not barred[i, c]:
            given[i] = left[c].pop()
    given[given < 0] = [j for rest in left for j in rest]
    return given


# ------------------------------------------------------------------------------------------------------------ the tasks


def _category_rows(chosen: Selection) -> pd.DataFrame:
    """Labels and masks, the same for all category tasks; images that are asked for nothing are left out."""
    rng, parts = np.random.default_rng([chosen.build.seed, 1]), []
    for images in chosen.of_each_split():
        shows, unclear = _there(chosen, images)
        mask = balanced_mask(shows.astype(int), rng, ASKED, unclear)
        images, shows, mask = (table[mask.any(1)] for table in (images, shows, mask))
        parts.append(example_rows(images, [PROMPT] * len(images), shows, mask))
    return pd.concat(parts)


def _there(chosen: Selection, images: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return chosen.shows_nc.loc[images.index].to_numpy(), chosen.unclear_nc.loc[images.index].to_numpy()


def balanced_mask(labels_nc: np.ndarray, rng: np.random.Generator, count: int = ASKED,
                  unclear_nc: np.ndarray | None = None) -> np.ndarray:
    """Choose which categories each image is asked for: one or two that it shows, the rest absent ones.

    Each category is asked as often with the one answer as with the other, so that its name says nothing about its
    label. Present ones are drawn with a chance inverse to how often a category occurs; absent ones go where a category
    has been asked as present more often than as absent, to images that show nothing only where others do not suffice;
    what cannot be made up for is not asked.

    Parameters
    ----------
    labels_nc : (n, c) of 0 and 1
    unclear_nc : (n, c) what is neither there nor not, and not asked

    Returns
    -------
    (n, c) of 0 and 1: `count` ones a row, or fewer where few categories, or few images that lack them, are at hand
    """
    mask_nc, shown = np.zeros(labels_nc.shape, dtype=int), labels_nc.any(1)
    rarity = 1 / np.maximum(labels_nc.sum(0), 1)
    several = rng.permutation(np.flatnonzero(labels_nc.sum(1) > 1))
    takes_two = np.isin(np.arange(len(shown)), several[: shown.sum() // 2])
    for row in np.flatnonzero(shown):
        present = np.flatnonzero(labels_nc[row])
        weight = rarity[present] / rarity[present].sum()
        mask_nc[row, rng.choice(present, size=1 + takes_two[row], replace=False, p=weight)] = 1
    owed = mask_nc.sum(0)
    barred_nc = labels_nc > 0 if unclear_nc is None else (labels_nc > 0) | unclear_nc.astype(bool)
    for rows_n in (np.flatnonzero(shown), np.flatnonzero(~shown)):
        for row in rng.permutation(rows_n) if owed.any() else ():
            absent = np.flatnonzero(~barred_nc[row])
            order = absent[np.argsort(-(owed[absent] + rng.random(len(absent))), kind="stable")]
            pick = order[: count - mask_nc[row].sum()]
            pick = pick[owed[pick] > 0]
            mask_nc[row, pick] = 1
            owed[pick] -= 1
    fewer = rng.spawn(1)[0]  # what is drawn after does not hang on how many are left out
    for c in np.flatnonzero(owed):
        mask_nc[fewer.permutation(np.flatnonzero(mask_nc[:, c] * labels_nc[:, c]))[: owed[c]], c] = 0
    return mask_nc


def category_task(chosen: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """Which categories are there? The prompt does not name them."""
    return _category_rows(chosen)


def category_list_task(chosen: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """Which categories are there? The prompt lists all of them, shuffled anew for each image."""
    found, names = _category_rows(chosen), list(chosen.shows_nc.columns)
    lists = [", ".join(rng.permutation(names)) for _ in range(len(found))]
    return found.assign(prompt=[LIST_PROMPT.format(categories=text) for text in lists])


def category_dense_task(chosen: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """Which categories are there? Every category of every image counts; most are absent."""
    shows, unclear = _there(chosen, chosen.images)
    return example_rows(chosen.images, [PROMPT] * len(shows), shows, ~unclear)


def object_task(chosen: Selection, rng: np.random.Generator, absent: str = "random") -> pd.DataFrame:
    """Is this object there? Each image is asked for one that is and one that is not, all listed before, shuffled.

    Parameters
    ----------
    absent : which ones, see :func:`asked`; images that show none or all are left out, and those for which no object
        is left that they lack (where few categories are asked about)
    """
    names, parts = np.array(chosen.shows_nc.columns), []
    for images in chosen.of_each_split():
        shows, unclear = _there(chosen, images)
        kept = shows.any(1) & ~(shows | unclear).all(1)
        images, shows, unclear = images[kept], shows[kept], unclear[kept]
        lists = [", ".join(rng.permutation(names)) for _ in range(len(images))]
        numbers = np.stack(asked(shows, absent, rng, unclear))
        left = np.flatnonzero(numbers[1] >= 0)
        for label in (1, 0):
            prompts = [QUERY_PROMPT.format(categories=lists[i], category=names[numbers[1 - label, i]]) for i in left]
            parts.append(example_rows(images.iloc[left], prompts, [label] * len(left)))
    return pd.concat(parts)
