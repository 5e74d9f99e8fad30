"""What tasks are built from, and what a task is."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Literal

import numpy as np
import pandas as pd

from probekit import paths


@dataclass(frozen=True)
class Build:
    """Settings of an examples table.

    Attributes
    ----------
    folder : COCO folder (see :mod:`probekit.coco`), or one of the other kinds that :mod:`probekit.folders` reads
    coco_splits : which of its splits to draw images from; () takes all
    train, validation, test : numbers of images
    tasks : names out of :data:`probekit.tasks.TASKS`, and files or folders of statements (:mod:`probekit.statements`)
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
class Chosen:
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
    """

    build: Build
    images: pd.DataFrame
    captions: pd.Series
    shows_nc: pd.DataFrame
    unclear_nc: pd.DataFrame
    instances: pd.DataFrame
    statements: dict[str, pd.DataFrame] = field(default_factory=dict)

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
    build: Callable[[Chosen, np.random.Generator], pd.DataFrame]
    question: str
    classes: Sequence[str] | None = None
    needs: Literal["", "categories", "instances"] = ""


def rows(images: pd.DataFrame, prompts: Sequence[str], labels: Sequence, masks: Sequence | None = None) -> pd.DataFrame:
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


# ----------------------------------------------------------------------------------------------- what a task comes from


def made_by(task: Task) -> list:
    """What the rows of a task come from, for :func:`~probekit.paths.fingerprint`: another answer may mean other rows.

    Its words and settings, and of a function of the user's own its file, its code, and the values that the code names.
    """
    function, settings = task.build, []
    while not inspect.isfunction(function):
        if isinstance(function, partial):
            settings.append([_told(function.args), _told(function.keywords)])
            function = function.func
        elif inspect.ismethod(function):
            settings.append(_told(getattr(function.__self__, "__dict__", None)))
            function = function.__func__
        elif inspect.ismethod(getattr(function, "__call__", None)):  # noqa: B004 (which one it is, is wanted)
            function = function.__call__
        else:
            return [task.kind, task.question, _told(task.classes), settings, repr(function)]  # compiled
    own = not (function.__module__ or "").startswith("probekit.")
    code = [_file_of(function), _code_of(function, frozenset())] if own else function.__qualname__
    return [task.kind, task.question, _told(task.classes), settings, code]


def _file_of(function: Callable) -> str:
    """All of the file that a function stands in: helpers and constants count as it does."""
    try:
        return Path(inspect.getsourcefile(function)).read_text(encoding="utf-8")
    except (OSError, TypeError, ValueError):  # typed in, in a notebook or by exec
        return ""


def _code_of(function: Callable, seen: frozenset) -> list:
    code, within = function.__code__, seen | {function}
    closed = [cell.cell_contents for cell in function.__closure__ or ()]
    named = {name: function.__globals__[name] for name in sorted(_globals(code)) if name in function.__globals__}
    return [_told(value, within) for value in (code, function.__defaults__, function.__kwdefaults__, closed, named)]


def _globals(code: CodeType) -> set[str]:
    """The names that code takes from its module, that of functions within it included."""
    own = {one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_globals(const) for const in code.co_consts if isinstance(const, CodeType)))


def _told(value: object, seen: frozenset = frozenset()) -> object:
    """A value in text and lists that are the same in every process, which addresses and the order of sets are not."""
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, [_told(const, seen) for const in value.co_consts]]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return [_told(one, seen) for one in value]
    if isinstance(value, dict):
        return [[repr(key), _told(one, seen)] for key, one in value.items()]
    if isinstance(value, partial):
        return [_told(one, seen) for one in (value.func, value.args, value.keywords)]
    if inspect.isfunction(value):
        mine = value not in seen and value.__module__ in {one.__module__ for one in seen}
        return _code_of(value, seen) if mine else value.__qualname__
    if inspect.ismodule(value) or inspect.isclass(value):
        return value.__name__
    try:
        return paths.fingerprint(value)
    except (TypeError, AttributeError):
        return repr(value)
