"""What tasks are built from, and what a task is."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class BuildSettings:
    """Settings of an examples table.

    Attributes
    ----------
    folder : COCO folder (see :mod:`probekit.data.coco`), or one of the other kinds that :mod:`probekit.data.layouts` reads
    coco_splits : which of its splits to draw images from; () takes all
    train, validation, test : numbers of images
    tasks : names out of :data:`probekit.tasks.registry.TASKS`, and files or folders of statements (:mod:`probekit.data.statement_files`)
    categories : ``"all"``, ``"frequent40"`` (the 40 that most of the chosen training images show), or their names
    labels_from : ``"instances"``, or ``"captions"``: the words of an image's first caption, as in the study
    smallest : share of an image's area below which an instance is too small to be asked about
    captions : right captions an image (1 to 5), and as many wrong ones
    similarity : what "similar" captions are judged by: ``"tfidf"``, or a sentence-embedding model (hub id or folder)
    max_bad : largest share of unreadable images that is left out without stopping
    """

    folder: str
    coco_splits: tuple[str, ...] = ()
    train: int = 1600
    validation: int = 400
    test: int = 400
    tasks: tuple[str, ...] = ("caption", "category", "category_list")
    categories: str | tuple[str, ...] = "all"
    seed: int = 0
    max_bad: float = 0.01
    labels_from: str = "instances"
    smallest: float = 0.001
    captions: int = 1
    similarity: str = "tfidf"


@dataclass(frozen=True)
class Selection:
    """What a task is built from.

    Attributes
    ----------
    build : the settings
    images : DataFrame, indexed by `image_id`: `file`, `split`, `width`, `height` in pixels
    captions : Series of lists, by `image_id`: the captions of an image in their order; images without one are not in it
    shows_nc : DataFrame of booleans, images by categories: is the category there?
    unclear_nc : the same shape: it is there, but too small to be asked about (`shows_nc` says no)
    instances : DataFrame: `image_id`, `category`, `x`, `y`, `w`, `h` in pixels, `area`, `iscrowd`, `colour`, and `tiny`
    statements : by the name of their task: DataFrame of `image_id`, `text`, `label` (0 or 1)
    annotated_nc, annotated_unclear_nc : as `shows_nc` and `unclear_nc`, by the instances whatever labels are from, and
        of all categories of the dataset, whichever are asked about
    """

    build: BuildSettings
    images: pd.DataFrame
    captions: pd.Series
    shows_nc: pd.DataFrame
    unclear_nc: pd.DataFrame
    instances: pd.DataFrame
    statements: dict[str, pd.DataFrame] = field(default_factory=dict)
    annotated_nc: pd.DataFrame = field(default_factory=pd.DataFrame)
    annotated_unclear_nc: pd.DataFrame = field(default_factory=pd.DataFrame)

    def of_each_split(self) -> list[pd.DataFrame]:
        """The images of train, validation and test, apart: what is asked in one takes nothing from another."""
        return [images for _, images in self.images.groupby("split", sort=False)]


@dataclass(frozen=True)
class Task:
    """What is asked about images.

    Attributes
    ----------
    kind : ``"binary"`` (is this right?), ``"multilabel"`` (which of these categories?) or ``"one_of"`` (which one?)
    build : from the chosen images to the rows; called with a generator that depends on seed and name of the task
    question : in words
    classes : what the entries of `labels` stand for; None takes "match" (binary) or the categories
    needs : what the dataset must have: ``"categories"``, ``"instances"`` (boxes), or nothing but images and captions
    """

    kind: str
    build: Callable[[Selection, np.random.Generator], pd.DataFrame]
    question: str
    classes: Sequence[str] | None = None
    needs: Literal["", "categories", "instances"] = ""


@dataclass(frozen=True)
class TaskInfo:
    """What a task is, as the examples carry it.

    Attributes
    ----------
    kind : str
        ``"binary"``, ``"multilabel"`` or ``"one_of"``, see :class:`Task`.
    classes : tuple of str
        What the entries of `labels` and `mask` stand for.
    question : str
        The question in words.
    """

    kind: str
    classes: tuple[str, ...]
    question: str


TASK_COLUMNS = ("kind", "classes", "question")


def task_infos(examples: pd.DataFrame) -> dict[str, TaskInfo]:
    """Return what each task of an examples table is, in the order in which tasks first occur.

    It stands in the columns `kind`, `classes` and `question`, so that it survives whatever is done
    to the table.

    Raises
    ------
    ValueError
        A column is missing, or the rows of one task contradict each other.
    """
    missing = [name for name in ("task", *TASK_COLUMNS) if name not in examples.columns]
    if missing:
        raise ValueError(
            f"the examples have no column {', '.join(missing)}: take the table that build_examples "
            "returns, or name kind, classes and question of each row's task yourself"
        )
    infos = {}
    for name, table in examples.groupby("task", sort=False):
        kinds = table.kind.unique()
        class_lists = {tuple(classes) for classes in table.classes}
        if len(kinds) > 1 or len(class_lists) > 1:
            raise ValueError(
                f"the rows of task {name} differ in kind or classes: give each task a name of its own"
            )
        infos[name] = TaskInfo(kinds[0], class_lists.pop(), table.question.iloc[0])
    return infos


def example_rows(images: pd.DataFrame, prompts: Sequence[str], labels: Sequence, masks: Sequence | None = None) -> pd.DataFrame:
    """Examples as a task returns them: one a row of `images`.

    Parameters
    ----------
    images : (n,) rows of :attr:`Chosen.images`; an image may be there several times
    prompts : (n,)
    labels : (n,) 0 or 1 of a binary task, or (n, c)
    masks : (n, c) 1 where a label counts; None counts all
    """
    y = np.asarray(labels, dtype=int)
    y = y[:, None] if y.ndim == 1 else y
    mask = np.ones_like(y) if masks is None else np.asarray(masks, dtype=int)
    return images[["file", "split"]].assign(prompt=list(prompts), labels=y.tolist(), mask=mask.tolist())


def task_source(task: Task) -> list:
    """What the rows of a task come from, for :func:`~probekit.paths.fingerprint`: another answer may mean other rows.

    Its words and settings, and all of the file in which a function of the user's own stands. What was typed in, in a
    notebook say, has no file: it is another one each time.
    """
    function, given = task.build, []
    while isinstance(function, partial):
        given.append(repr((function.args, function.keywords)))
        function = function.func
    module = getattr(function, "__module__", None) or ""
    try:
        code = f"{module}.{function.__qualname__}" if module.startswith("probekit.") else Path(
            inspect.getsourcefile(function)).read_text(encoding="utf-8")
    except (OSError, TypeError, ValueError, AttributeError):
        code = str(time.time_ns())
    return [task.kind, task.question, list(task.classes or ()), given, code]
