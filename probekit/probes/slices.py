"""Scores of a task's test examples in slices: by what the image shows, and by how long the text is.

A covariate puts each entry (example, class) into one of its slices, or into none. Each slice is
scored as the whole test split is, see :meth:`probekit.probes.labels.LabelSet.score`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import torch

from probekit.probes import metrics
from probekit.probes.labels import LabelSet
from probekit.tasks.base import asked_categories
from probekit.tasks.registry import find_caption
from probekit.tasks.words import split_words

COVARIATES = ("area", "objects", "words", "combination")
# COCO's: square pixels below which an object is small, and below which it is medium.
AREA_BOUNDS = (32**2, 96**2)
AREAS = ("small", "medium", "large")
# The instances with which each slice of `objects` begins.
OBJECT_BOUNDS = (1, 2, 3, 6)
OBJECTS = ("none", "1", "2", "3 to 5", "6 or more")
COMBINATIONS = ("seen", "novel")
# What is asked about is not in the image, so it has neither an area nor a combination.
NOT_SHOWN = "not shown"
WORD_BINS = 3

# Fewer test images than this have no score.
FEWEST_IMAGES = 10
SHARES_OF_RIGHT = {"binary": "accuracy", "multilabel": "accuracy", "one_of": "top1_accuracy"}
# The share of right answers where all of a covariate's slices have one label each.
RECALL = "recall"
SHARES = (*dict.fromkeys(SHARES_OF_RIGHT.values()), RECALL)
COLUMNS = ["covariate", "slice", "metric", "value", "lo", "hi", "n", "images", "reason"]

# Two categories, or a category and its colour, that one image shows together.
Combination = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Covariate:
    """Something by which the entries of a task's n test examples differ.

    Attributes
    ----------
    name : str
        One of :data:`COVARIATES`.
    slices : tuple of str
        The names of its slices.
    slice_nc : ndarray of int
        (n, c) which slice each entry is in, -1 for none; (n, 1) where all entries of an example
        are in the same one.
    """

    name: str
    slices: tuple[str, ...]
    slice_nc: np.ndarray

    @property
    def varies(self) -> bool:
        """Whether entries of two slices can be compared."""
        numbers = {number for number in np.unique(self.slice_nc) if number >= 0}
        return len({self.slices[number] for number in numbers} - {NOT_SHOWN}) > 1


# --------------------------------------------------------------------------------- the covariates


def find_covariates(
    examples: pd.DataFrame, instances: pd.DataFrame, task: str
) -> tuple[Covariate, ...]:
    """Find by what the test examples of a task differ.

    Parameters
    ----------
    examples : DataFrame
        The examples of a run, all splits, see :mod:`probekit.tasks.building`. Without the column
        `asked` there are no areas, and all combinations of an image count.
    instances : DataFrame
        The instances of its images, see :func:`probekit.tasks.building.load_instances`; may be
        empty.
    task : str
        Name of the task.

    Returns
    -------
    tuple of Covariate
        Those that vary, in the order of :data:`COVARIATES`.

        ``"area"``
            The size of what is asked about: the area, in square pixels of the image file, of the
            largest instance of the category that is neither a crowd nor tiny; of several asked
            categories the smallest of them.
        ``"objects"``
            How many instances the image has. A crowd counts as six.
        ``"words"``
            How many words the caption has that the prompt holds, or else the prompt; about as many
            examples in each slice.
        ``"combination"``
            ``"novel"`` where the image shows two categories, or a category in a colour, that no
            training image of the run shows together; where categories are asked about, those that
            one of them takes part in.

        What asks about a category that the image does not show is in the slice
        :data:`NOT_SHOWN` of area and combination.
    """
    rows = examples[(examples.task == task) & (examples.split == "test")]
    covariates = [_words(rows)]
    if len(instances):
        asked = _asked_by_entry(rows)
        shown = _ShownCategories(instances)
        train_images = examples.image_id[examples.split == "train"].unique()
        covariates += [
            _areas(rows, asked, shown),
            _objects(rows, instances),
            _combinations(rows, asked, shown, train_images=train_images),
        ]
    covariates.sort(key=lambda covariate: COVARIATES.index(covariate.name))
    return tuple(covariate for covariate in covariates if covariate.varies)


def _asked_by_entry(rows: pd.DataFrame) -> list[list[tuple[str, ...]]]:
    """Return for each example the categories that each of its entries asks about.

    The classes of a multilabel task are entries of their own where they are what is asked.
    """
    asked = asked_categories(rows)
    classes = list(rows.classes.iloc[0]) if len(rows) else []
    is_multilabel = (rows.kind == "multilabel").all()
    names = {name for of_example in asked for name in of_example}
    if is_multilabel and names and names <= set(classes):
        return [[(name,) for name in classes]] * len(rows)
    return [[of_example] for of_example in asked]


class _ShownCategories:
    """What the images show: categories, their areas, and what is there together."""

    def __init__(self, instances: pd.DataFrame) -> None:
        is_clear = ~instances.tiny.astype(bool)
        clear = instances[is_clear]
        single = clear[clear.iscrowd == 0]
        self.annotated = set(zip(instances.image_id, instances.category, strict=True))
        self.area = single.groupby(["image_id", "category"]).area.max().dropna().to_dict()
        # What is novel must be clear to see, and be in no training image, clear or not.
        self.clear_combinations = _combinations_by_image(clear)
        self.all_combinations = _combinations_by_image(instances)

    def lacks(self, image: Hashable, names: Iterable[str]) -> bool:
        """Tell whether an image has no instance of one of these categories."""
        return any((image, name) not in self.annotated for name in names)


def _combinations_by_image(instances: pd.DataFrame) -> dict[Hashable, set[Combination]]:
    categories_by_image: dict[Hashable, set[str]] = {}
    coloured_by_image: dict[Hashable, set[Combination]] = {}
    is_coloured = instances.colour.notna()
    columns = (instances.image_id, instances.category, instances.colour, is_coloured)
    for image, category, colour, has_colour in zip(*columns, strict=True):
        categories_by_image.setdefault(image, set()).add(category)
        coloured = coloured_by_image.setdefault(image, set())
        if has_colour:
            coloured.add((("category", category), ("colour", colour)))
    return {
        image: coloured_by_image[image]
        | {(("category", a), ("category", b)) for a, b in combinations(sorted(categories), 2)}
        for image, categories in categories_by_image.items()
    }


def _areas(
    rows: pd.DataFrame, asked: list[list[tuple[str, ...]]], shown: _ShownCategories
) -> Covariate:
    def find_slice(image: Hashable, names: tuple[str, ...]) -> int:
        if not names:
            return -1
        if shown.lacks(image, names):
            return len(AREAS)
        areas = [shown.area.get((image, name), np.nan) for name in names]
        if np.isnan(areas).any():  # a crowd, or too small to be asked about
            return -1
        return int(np.searchsorted(AREA_BOUNDS, min(areas), side="right"))

    return Covariate("area", (*AREAS, NOT_SHOWN), _by_entry(rows, asked, find_slice))


def _combinations(
    rows: pd.DataFrame,
    asked: list[list[tuple[str, ...]]],
    shown: _ShownCategories,
    *,
    train_images: Iterable[Hashable],
) -> Covariate:
    in_training: set[Combination] = set()
    for image in train_images:
        in_training |= shown.all_combinations.get(image, set())

    def find_slice(image: Hashable, names: tuple[str, ...]) -> int:
        if shown.lacks(image, names):
            return len(COMBINATIONS)
        together = shown.clear_combinations.get(image, set())
        if names:
            asked_parts = {("category", name) for name in names}
            together = {combination for combination in together if asked_parts & {*combination}}
        if not together:
            return -1
        return int(not together <= in_training)

    slice_nc = _by_entry(rows, asked, find_slice)
    return Covariate("combination", (*COMBINATIONS, NOT_SHOWN), slice_nc)


def _by_entry(
    rows: pd.DataFrame,
    asked: list[list[tuple[str, ...]]],
    find_slice: Callable[[Hashable, tuple[str, ...]], int],
) -> np.ndarray:
    """Return (n, c) what `find_slice` says of each image and what an entry asks about."""
    slices = [
        [find_slice(image, names) for names in of_example]
        for image, of_example in zip(rows.image_id, asked, strict=True)
    ]
    return np.array(slices, dtype=int).reshape(len(rows), -1)


def _objects(rows: pd.DataFrame, instances: pd.DataFrame) -> Covariate:
    weight = np.where(instances.iscrowd == 0, 1, OBJECT_BOUNDS[-1])
    counts = pd.Series(weight).groupby(instances.image_id.to_numpy()).sum()
    count_n = counts.reindex(rows.image_id, fill_value=0).to_numpy()
    slice_n = np.searchsorted(OBJECT_BOUNDS, count_n, side="right")
    return Covariate("objects", OBJECTS, slice_n[:, None])


def _words(rows: pd.DataFrame) -> Covariate:
    captions = rows.prompt.map(find_caption)
    texts = captions if captions.notna().all() else rows.prompt
    counts = [len(split_words(text, short_forms=True)) for text in texts]
    if len(set(counts)) < 2:
        return Covariate("words", (), np.full((len(rows), 1), -1))
    in_order = sorted(counts)
    ends = {in_order[len(counts) * k // WORD_BINS - 1] for k in range(1, WORD_BINS)}
    # The most words of each slice but the last one.
    most = sorted(ends - {in_order[-1]})
    if not most:
        most = [max(count for count in counts if count < in_order[-1])]
    names = [f"up to {most[0]} words"]
    for before, last in pairwise(most):
        first = before + 1
        names.append(f"{last} words" if first == last else f"{first} to {last} words")
    names.append(f"{most[-1] + 1} words or more")
    slice_n = np.searchsorted(most, counts, side="left")
    return Covariate("words", tuple(names), slice_n[:, None])


# ------------------------------------------------------------------------------------- the scores


def score_slices(
    p_lnc: np.ndarray,
    labels: LabelSet,
    covariates: Sequence[Covariate],
    *,
    metric: str | None = None,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Score probabilities in each slice of the test examples.

    Parameters
    ----------
    p_lnc : ndarray
        (l, n, c) probabilities of label 1 for the n test examples, from l sources: layers, or
        whatever is to be compared.
    labels : LabelSet
        Their labels.
    covariates : sequence of Covariate
        See :func:`find_covariates`.
    metric : str, optional
        A metric over all classes, see :func:`probekit.probes.metrics.score_counts`, or
        ``"average_precision"``. The share of right answers unless it is named: ``"accuracy"``, or
        ``"top1_accuracy"`` where one of several answers is right. Where each slice of a covariate
        has one label, as those of the area have, because what is not shown has none, it is called
        ``"recall"``, and one slice is to be read beside the others: a probe that always says yes
        has a recall of 1 of all that is shown, and of 0 of what is not.
    resamples : int
        Number of bootstrap samples of the images of a slice.

    Returns
    -------
    DataFrame
        One row per source, covariate and slice that has entries: `source` (0 to l - 1) and
        :data:`COLUMNS`. `value` has the 95 % interval `lo` to `hi`; `n` entries of `images` images
        count. Where there is no value, `reason` says why: fewer than :data:`FEWEST_IMAGES` images,
        or one label where the metric needs both.

    Raises
    ------
    ValueError
        There is no such metric of this kind of task.
    """
    names = metrics_of(labels.kind)
    if metric is not None and metric not in names:
        raise ValueError(
            f"slices of a task of the kind {labels.kind} have no {metric}: take one of "
            f"{', '.join(names)}"
        )
    whole = labels.select("test")
    mask_nc = whole.mask_nc > 0
    share_of_right = SHARES_OF_RIGHT[labels.kind]
    if labels.kind == "one_of":
        # Of each example the right answer counts: it is chosen, or another one is.
        p_lnc = np.eye(p_lnc.shape[-1])[np.where(mask_nc, p_lnc, -1).argmax(-1)]
        mask_nc = mask_nc & (whole.y_nc > 0)
    tables = []
    for covariate in covariates:
        slice_nc = np.broadcast_to(covariate.slice_nc, mask_nc.shape)
        in_slices = {
            name: mask_nc & (slice_nc == number) for number, name in enumerate(covariate.slices)
        }
        in_slices = {
            name: in_slice_nc for name, in_slice_nc in in_slices.items() if in_slice_nc.any()
        }
        labels_in = {name: set(whole.y_nc[in_slice_nc]) for name, in_slice_nc in in_slices.items()}
        metric_here = metric or share_of_right
        if metric is None and labels.kind != "one_of":
            has_both = any(len(values) > 1 for values in labels_in.values())
            metric_here = share_of_right if has_both else RECALL
        for name, in_slice_nc in in_slices.items():
            image_count = len(np.unique(whole.image_n[in_slice_nc.any(1)]))
            reason = _reason(metric_here, image_count, labels_in[name])
            table = pd.DataFrame({"source": range(len(p_lnc)), "value": np.nan})
            if not reason:
                table = _score_entries(
                    p_lnc, labels, in_slice_nc, metric=metric_here, resamples=resamples
                )
            tables.append(
                table.assign(
                    covariate=covariate.name,
                    slice=name,
                    metric=metric_here,
                    n=int(in_slice_nc.sum()),
                    images=image_count,
                    reason=reason,
                )
            )
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return table.reindex(columns=["source", *COLUMNS])


def metrics_of(kind: str) -> list[str]:
    """Return the metrics that slices of a kind of task can have."""
    if kind == "one_of":
        return [SHARES_OF_RIGHT[kind]]
    no_counts = torch.ones(1, 1, len(metrics.COUNTS))
    keys = metrics.score_counts(no_counts, binary=kind == "binary")
    return [key.metric for key in keys if key.class_number is None] + ["average_precision"]


def _reason(metric: str, image_count: int, labels: set[float]) -> str:
    """Say why a slice has no score, ``""`` where it has one."""
    if image_count < FEWEST_IMAGES:
        return f"too few: {image_count} test images, fewer than {FEWEST_IMAGES}"
    if len(labels) < 2 and metric not in (RECALL, "top1_accuracy"):
        return f"one label: the right answer is always {'yes' if 1 in labels else 'no'}"
    return ""


def _score_entries(
    p_lnc: np.ndarray, labels: LabelSet, in_slice_nc: np.ndarray, *, metric: str, resamples: int
) -> pd.DataFrame:
    """Return `source`, `value`, `lo` and `hi` of the test entries of one slice."""
    test = labels.split["test"].numpy()
    y_nc = labels.y_nc.numpy()[test]
    image_n = labels.image_n[test]
    if metric in SHARES:
        # Which class an entry is of changes nothing, and a table of one class is scored sooner.
        rows, columns = np.nonzero(in_slice_nc)
        p_lnc = p_lnc[:, rows, columns, None]
        y_nc = y_nc[rows, columns, None]
        in_slice_nc = np.ones_like(y_nc)
        labels = replace(labels, kind="multilabel", classes=["any"])
    else:
        rows = np.flatnonzero(in_slice_nc.any(1))
        p_lnc = p_lnc[:, rows]
        y_nc = y_nc[rows]
        in_slice_nc = in_slice_nc[rows]
    of_slice = replace(
        labels,
        image_n=image_n[rows],
        y_nc=torch.from_numpy(y_nc),
        mask_nc=torch.from_numpy(in_slice_nc).float(),
        split={"test": torch.arange(len(rows))},
    )
    scores = of_slice.score(
        p_lnc.astype(np.float32),
        split="test",
        layers=[str(number) for number in range(len(p_lnc))],
        resamples=resamples,
        by_class=metric == "average_precision",
    )
    scored = "accuracy" if metric in SHARES else metric
    scores = scores[(scores.metric == scored) & (scores["class"] == "")]
    return scores.assign(source=scores.layer.astype(int))[["source", "value", "lo", "hi"]]
