"""Tasks about the boxes of instances: where things are, how many, how large, and of which colour.

Every question is asked about two images that show the same things and have different answers, so
that its text says nothing about the answer. Things must have different names. So, except
for counting, an image is asked only about categories of which it shows exactly one instance that is
neither a crowd nor too small to be asked about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from itertools import combinations
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd

from probekit.tasks.balance import pair_opposites
from probekit.tasks.base import Selection, example_rows

COMPARISON_PROMPT = "Is the {a} {how} the {b} in this image?"
COUNT_PROMPT = "Number of objects of the type {category} in this image:"
COLOUR_PROMPT = "Colour of the {category} in this image:"
COUNTS = ("1", "2", "3", "4 or more")
# The words that a model may begin each of these counts with.
COUNT_ANSWERS = (
    ("1", "one"),
    ("2", "two"),
    ("3", "three"),
    ("4", "5", "6", "7", "8", "9", "four", "five", "six", "seven", "eight", "nine"),
)
# The colours of drawn scenes.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
# For each axis, what is said of the first thing and of the second one.
AXES = {
    "horizontal": ("to the left of", "to the right of"),
    "vertical": ("above", "below"),
    "size": ("larger than", "smaller than"),
}
# Two things are apart on an axis if they are this many times further apart on it than on the other
# one, as in the captions of drawn scenes.
CLEAR_RATIO = 1.5
# A thing is larger than another one if it has this many times its area.
LARGER_RATIO = 1.3


class Box(Protocol):
    """The box of an instance in pixels: its top left corner, width and height, and its area."""

    x: float
    y: float
    w: float
    h: float
    area: float


class Comparison(NamedTuple):
    """How two things compare.

    Attributes
    ----------
    axis : str
        A key of :data:`AXES`.
    first : int
        Which of the two comes first on it, 0 or 1: the left one, the upper one, the larger one.
    """

    axis: str
    first: int


class Candidate(NamedTuple):
    """A question that an image can be asked.

    Attributes
    ----------
    image : hashable
        The `image_id`.
    key : tuple of str
        What is asked.
    answer : int
        The number of the right answer.
    """

    image: Hashable
    key: tuple[str, ...]
    answer: int


def single_instances(instances: pd.DataFrame) -> pd.DataFrame:
    """Return the instances that are the only one of their category in their image.

    Neither crowds nor tiny ones are among them.
    """
    count = instances.groupby(["image_id", "category"]).category.transform("size")
    return instances[(count == 1) & (instances.iscrowd == 0) & ~instances.tiny]


def compare_positions(a: Box, b: Box) -> Comparison | None:
    """Return on which axis two boxes lie apart, and which comes first on it.

    Returns
    -------
    Comparison or None
        None where this is ambiguous: the boxes overlap on the axis, or their centres are not
        :data:`CLEAR_RATIO` times further apart on it than on the other one.
    """
    dx = (b.x + b.w / 2) - (a.x + a.w / 2)
    dy = (b.y + b.h / 2) - (a.y + a.h / 2)
    overlaps_in_x = a.x + a.w > b.x and b.x + b.w > a.x
    overlaps_in_y = a.y + a.h > b.y and b.y + b.h > a.y
    if abs(dx) > CLEAR_RATIO * abs(dy) and not overlaps_in_x:
        return Comparison("horizontal", int(dx < 0))
    if abs(dy) > CLEAR_RATIO * abs(dx) and not overlaps_in_y:
        return Comparison("vertical", int(dy < 0))
    return None


def compare_sizes(a: Box, b: Box) -> Comparison | None:
    """Return which of two things is larger, None where neither is clearly larger.

    It must have :data:`LARGER_RATIO` times the area of the other one.
    """
    if max(a.area, b.area) < LARGER_RATIO * min(a.area, b.area):
        return None
    return Comparison("size", int(b.area > a.area))


def relation_task(
    selection: Selection, rng: np.random.Generator, *, prompt: str = COMPARISON_PROMPT
) -> pd.DataFrame:
    """Ask whether one thing is left of, right of, above or below another one, in both orders.

    The template `prompt` has the fields `a`, `how` and `b`.
    """
    return _comparison_rows(selection, rng, compare=compare_positions, prompt=prompt)


def size_task(
    selection: Selection, rng: np.random.Generator, *, prompt: str = COMPARISON_PROMPT
) -> pd.DataFrame:
    """Ask whether one thing is larger, or smaller, than another one, in both orders.

    The template `prompt` has the fields `a`, `how` and `b`.
    """
    return _comparison_rows(selection, rng, compare=compare_sizes, prompt=prompt)


def count_task(selection: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """Ask how many instances of a category an image shows: 1, 2, 3, 4 or more.

    Categories of which an image shows a crowd or a tiny instance are not asked about.
    """
    instances = selection.instances
    instances = instances[instances.category.isin(selection.shows_nc.columns)]
    answers: dict[Hashable, dict[str, int]] = defaultdict(dict)
    for (image, category), group in instances.groupby(["image_id", "category"]):
        if not group.iscrowd.any() and not group.tiny.any():
            answers[image][category] = min(len(group), len(COUNTS)) - 1
    return _answer_rows(
        selection, rng, answers=answers, prompt=COUNT_PROMPT, class_count=len(COUNTS)
    )


def attribute_task(selection: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """Ask which colour a thing has, where the annotations say so, as those of drawn scenes do.

    Raises
    ------
    ValueError
        No instance has a colour.
    """
    instances = single_instances(selection.instances)
    has_colour = instances.colour.isin(COLOURS)
    instances = instances[has_colour & instances.category.isin(selection.shows_nc.columns)]
    if instances.empty:
        raise ValueError(
            "the instances of this dataset have no colours (attributes.colour): leave the task "
            "attribute out, or take drawn scenes (dataset: scenes)"
        )
    answers: dict[Hashable, dict[str, int]] = defaultdict(dict)
    for instance in instances.itertuples():
        answers[instance.image_id][instance.category] = COLOURS.index(instance.colour)
    return _answer_rows(
        selection, rng, answers=answers, prompt=COLOUR_PROMPT, class_count=len(COLOURS)
    )


def _comparison_rows(
    selection: Selection,
    rng: np.random.Generator,
    *,
    compare: Callable[[Box, Box], Comparison | None],
    prompt: str,
) -> pd.DataFrame:
    """Return two rows per image: a question about two things, and the same with them exchanged."""
    parts = []
    for images in selection.images_by_split():
        candidates = _comparison_candidates(selection, images, compare=compare)
        asked_images = []
        prompts = []
        labels = []
        asked = []
        for pair in _pair_candidates(candidates, rng):
            direction = int(rng.integers(2))
            for image, (a, b, axis), first in pair:
                how = AXES[axis][direction]
                for subject, reference, subject_number in ((a, b, 0), (b, a, 1)):
                    # What is said of the first thing is true of it, its opposite of the other.
                    is_first = subject_number == first
                    asked_images.append(image)
                    prompts.append(prompt.format(a=subject, b=reference, how=how))
                    labels.append(int(is_first == (direction == 0)))
                    asked.append([a, b])
        parts.append(example_rows(images.loc[asked_images], prompts, labels, asked=asked))
    return pd.concat(parts)


def _comparison_candidates(
    selection: Selection,
    images: pd.DataFrame,
    *,
    compare: Callable[[Box, Box], Comparison | None],
) -> list[Candidate]:
    """Return all pairs of things that compare; the key is two categories, sorted, and the axis."""
    instances = single_instances(selection.instances)
    is_asked = instances.category.isin(selection.shows_nc.columns)
    instances = instances[is_asked & instances.image_id.isin(images.index)]
    candidates = []
    for image, things in instances.sort_values("category").groupby("image_id"):
        for a, b in combinations(things.itertuples(), 2):
            comparison = compare(a, b)
            if comparison is not None:
                key = (a.category, b.category, comparison.axis)
                candidates.append(Candidate(image, key, comparison.first))
    return candidates


def _pair_candidates(
    candidates: list[Candidate], rng: np.random.Generator
) -> list[tuple[Candidate, Candidate]]:
    pairs = pair_opposites(
        [candidate.image for candidate in candidates],
        [candidate.key for candidate in candidates],
        answers=[candidate.answer for candidate in candidates],
        rng=rng,
    )
    return [(candidates[a], candidates[b]) for a, b in pairs]


def _answer_rows(
    selection: Selection,
    rng: np.random.Generator,
    *,
    answers: dict[Hashable, dict[str, int]],
    prompt: str,
    class_count: int,
) -> pd.DataFrame:
    """Return one row per image: which is right, its own answer or that of its partner.

    `answers` has the number of the right answer by image and category.
    """
    classes = np.arange(class_count)
    parts = []
    for images in selection.images_by_split():
        candidates = [
            Candidate(image, (category,), answer)
            for image in images.index
            for category, answer in answers.get(image, {}).items()
        ]
        asked_images = []
        prompts = []
        labels = []
        masks = []
        asked = []
        for pair in _pair_candidates(candidates, rng):
            pair_answers = [candidate.answer for candidate in pair]
            for image, (category,), answer in pair:
                asked_images.append(image)
                prompts.append(prompt.format(category=category))
                labels.append(classes == answer)
                masks.append(np.isin(classes, pair_answers))
                asked.append([category])
        parts.append(
            example_rows(
                images.loc[asked_images],
                prompts,
                np.reshape(labels, (-1, class_count)),
                masks=np.reshape(masks, (-1, class_count)),
                asked=asked,
            )
        )
    return pd.concat(parts)
