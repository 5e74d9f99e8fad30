"""What the boxes of instances know besides categories: where things are, how many, how large, and of which colour.

Every question is asked of two images that have the same things and different answers, so that its text says nothing
about the answer. Things must be told apart by their names: but for counting, an image is asked about categories
of which it shows exactly one instance, no crowd, and none that is too small to be asked about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from itertools import combinations

import numpy as np
import pandas as pd

from probekit.tasks.balance import paired
from probekit.tasks.base import Selection, example_rows

COMPARED_PROMPT = "Is the {a} {how} the {b} in this image?"
COUNT_PROMPT = "Number of objects of the type {category} in this image:"
COLOUR_PROMPT = "Colour of the {category} in this image:"
COUNTS = ("1", "2", "3", "4 or more")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")  # of drawn scenes
WAYS = {"across": ("to the left of", "to the right of"), "along": ("above", "below"),
        "size": ("larger than", "smaller than")}
CLEAR = 1.5  # times as far along the one axis as along the other, as in the captions of drawn scenes
LARGER = 1.3  # times the area


def alone(instances: pd.DataFrame) -> pd.DataFrame:
    """Instances that are the only one of their category in their image; neither crowds nor tiny ones are."""
    one = instances.groupby(["image_id", "category"]).category.transform("size") == 1
    return instances[one & (instances.iscrowd == 0) & ~instances.tiny]


def relation(a, b) -> tuple[str, int] | None:
    """The axis on which two boxes lie apart, and which is first on it (0: `a` is left of `b`, or above; 1: `b` is).

    None where that is ambiguous: they overlap on the axis, or their centres are not :data:`CLEAR` times as far apart on
    it as on the other one.

    Parameters
    ----------
    a, b : anything with `x, y, w, h` in pixels (the top left corner, and the size)
    """
    dx, dy = (b.x + b.w / 2) - (a.x + a.w / 2), (b.y + b.h / 2) - (a.y + a.h / 2)
    if abs(dx) > CLEAR * abs(dy) and (a.x + a.w <= b.x or b.x + b.w <= a.x):
        return "across", int(dx < 0)
    if abs(dy) > CLEAR * abs(dx) and (a.y + a.h <= b.y or b.y + b.h <= a.y):
        return "along", int(dy < 0)
    return None


def larger(a, b) -> tuple[str, int] | None:
    """0 where `a` has :data:`LARGER` times the area of `b`, 1 where `b` has; None in between."""
    if max(a.area, b.area) < LARGER * min(a.area, b.area):
        return None
    return "size", int(b.area > a.area)


def _pairs(chosen: Selection, images: pd.DataFrame, judge: Callable) -> list[tuple[Hashable, Hashable, int]]:
    """Image, key (two categories in alphabetical order, and the kind of answer) and answer, of all pairs of things."""
    found = alone(chosen.instances)
    found = found[found.image_id.isin(images.index) & found.category.isin(chosen.shows_nc.columns)]
    out = []
    for image, things in found.sort_values("category").groupby("image_id"):
        for a, b in combinations(things.itertuples(), 2):
            if (answer := judge(a, b)) is not None:
                out.append((image, (a.category, b.category, answer[0]), answer[1]))
    return out


def _asked_both_ways(chosen: Selection, rng: np.random.Generator, judge: Callable) -> pd.DataFrame:
    """Two rows an image: a question about two things, and the same with the things exchanged."""
    parts = []
    for images in chosen.of_each_split():
        found = _pairs(chosen, images, judge)
        asked, prompts, labels = [], [], []
        for two in paired(*_columns(found), rng):
            turn = int(rng.integers(2))
            for image, (a, b, kind), state in (found[k] for k in two):
                for order, (one, other) in enumerate(((a, b), (b, a))):
                    asked.append(image)
                    prompts.append(COMPARED_PROMPT.format(a=one, b=other, how=WAYS[kind][turn]))
                    labels.append(int(state ^ order ^ turn == 0))
        parts.append(example_rows(images.loc[asked], prompts, labels))
    return pd.concat(parts)


def _columns(found: list[tuple]) -> tuple[list, list, list]:
    return tuple(map(list, zip(*found, strict=True))) if found else ([], [], [])


def relation_task(chosen: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """Is the one left of, right of, above, below the other? Asked in both orders; see :func:`relation`."""
    return _asked_both_ways(chosen, rng, relation)


def size_task(chosen: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """Is the one larger, or smaller, in the image than the other? Asked in both orders; see :func:`larger`."""
    return _asked_both_ways(chosen, rng, larger)


def _one_of(chosen: Selection, rng: np.random.Generator, answers: dict[Hashable, dict[str, int]], prompt: str,
            classes: int) -> pd.DataFrame:
    """One row an image, which answer is right? Its own counts, and that of the image it is paired with.

    Parameters
    ----------
    answers : image to category to the number of the right answer
    """
    parts = []
    for images in chosen.of_each_split():
        found = [(image, name, k) for image in images.index for name, k in answers.get(image, {}).items()]
        asked, prompts, labels, masks = [], [], [], []
        for a, b in paired(*_columns(found), rng):
            for image, name, own in (found[a], found[b]):
                asked.append(image)
                prompts.append(prompt.format(category=name))
                labels.append(np.arange(classes) == own)
                masks.append(np.isin(np.arange(classes), (found[a][2], found[b][2])))
        labels, masks = (np.reshape(table, (-1, classes)) for table in (labels, masks))
        parts.append(example_rows(images.loc[asked], prompts, labels, masks))
    return pd.concat(parts)


def count_task(chosen: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """How many of a category are there: 1, 2, 3, 4 or more? Not where there is a crowd, or a tiny one, of it."""
    answers: dict = defaultdict(dict)
    known = chosen.instances[chosen.instances.category.isin(chosen.shows_nc.columns)]
    for (image, name), own in known.groupby(["image_id", "category"]):
        if not own.iscrowd.any() and not own.tiny.any():
            answers[image][name] = min(len(own), len(COUNTS)) - 1
    return _one_of(chosen, rng, answers, COUNT_PROMPT, len(COUNTS))


def attribute_task(chosen: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """Which colour does a thing have? Only where annotations know it, as those of drawn scenes do.

    Raises
    ------
    ValueError
        No instance has a colour.
    """
    known = alone(chosen.instances)
    known = known[known.colour.isin(COLOURS) & known.category.isin(chosen.shows_nc.columns)]
    if known.empty:
        raise ValueError("the instances of this dataset have no colours (attributes.colour): leave the task attribute "
                         "out, or take drawn scenes (dataset: scenes)")
    answers: dict = defaultdict(dict)
    for row in known.itertuples():
        answers[row.image_id][row.category] = COLOURS.index(row.colour)
    return _one_of(chosen, rng, answers, COLOUR_PROMPT, len(COLOURS))
