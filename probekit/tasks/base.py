"""What a task is, what it is built from, and what it returns."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from probekit.paths import Home

# The answers to a binary question, in the order of the labels 0 and 1.
YES_OR_NO = (("no",), ("yes",))


@dataclass(frozen=True)
class BuildSettings:
    """Settings of an examples table.

    Attributes
    ----------
    folder : str
        The dataset: a COCO folder (:mod:`probekit.data.coco`), or one of the other layouts that
        :mod:`probekit.data.layouts` reads.
    coco_splits : tuple of str
        Splits of the dataset to draw images from; empty takes all of them.
    train, validation, test : int
        Number of images in each split.
    tasks : tuple of str
        Names from :data:`probekit.tasks.registry.TASKS`, and files or folders of statements
        (:mod:`probekit.data.statement_files`).
    categories : str or tuple of str
        ``"all"``, ``"frequent40"`` (the 40 categories that most training images show), or names.
    seed : int
        Seed of the drawn images, captions and categories.
    max_bad : float
        Largest share that may be left out: of images that cannot be read, of the records of an
        annotation file that cannot be read, of images that lose their captions because the names
        in a table fit none.
    labels_from : str
        ``"instances"``, or ``"captions"``: the words of an image's first caption.
    smallest : float
        Share of an image's area below which an instance is too small to be asked about.
    captions : int
        Captions of its own that each image is asked about (1 to 5), and as many of other images.
    similarity : str
        How similar captions are found: ``"tfidf"``, or a sentence-embedding model (a hub id or a
        folder).
    """

    folder: str
    _: KW_ONLY
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


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The images that were drawn, and all that a task may ask about them.

    Attributes
    ----------
    settings : BuildSettings
        The settings that the images were drawn with.
    images : DataFrame
        Indexed by `image_id`: `file`, `split`, and `width`, `height` in pixels.
    captions : Series
        The list of captions of each image, by `image_id`; images without a caption are not in it.
    shows_nc : DataFrame of bool
        Images by categories: does the image show the category?
    unclear_nc : DataFrame of bool
        The same shape: the image shows it, but too small to be asked about. `shows_nc` is False
        there.
    instances : DataFrame
        `image_id`, `category`, `x`, `y`, `w`, `h` in pixels, `area`, `iscrowd`, `colour`, and
        `tiny`: is it too small to be asked about?
    statements : dict
        For each task that comes from a file, a DataFrame of `image_id`, `text`, `label` (0 or 1)
        and `is_caption`.
    annotated_nc, annotated_unclear_nc : DataFrame of bool
        As `shows_nc` and `unclear_nc`, but always from the instances, and for all categories of
        the dataset.
    home : Home
        Where relative paths of the settings start.
    """

    settings: BuildSettings
    images: pd.DataFrame
    captions: pd.Series
    shows_nc: pd.DataFrame
    unclear_nc: pd.DataFrame
    instances: pd.DataFrame
    statements: dict[str, pd.DataFrame] = field(default_factory=dict)
    annotated_nc: pd.DataFrame = field(default_factory=pd.DataFrame)
    annotated_unclear_nc: pd.DataFrame = field(default_factory=pd.DataFrame)
    home: Home = field(default_factory=Home.find)

    def images_by_split(self) -> list[pd.DataFrame]:
        """Return the images of each split as a table of its own.

        A task that exchanges texts between images does so within one split, so that no text of the
        test images is seen in training.
        """
        return [images for _, images in self.images.groupby("split", sort=False)]


@dataclass(frozen=True)
class Variant:
    """Another wording of a task's question, see :mod:`probekit.tasks.variants`.

    Attributes
    ----------
    prompt : str
        The template of its prompts, with the same fields as the task's.
    answers : tuple of tuples of str, optional
        See :attr:`Task.answers`; the task's unless they are named.
    negated : bool
        Whether the right answer is the opposite of the task's.
    """

    prompt: str
    _: KW_ONLY
    answers: tuple[tuple[str, ...], ...] | None = None
    negated: bool = False


@dataclass(frozen=True)
class Task:
    """A question about images.

    Attributes
    ----------
    kind : str
        ``"binary"`` (is this true?), ``"multilabel"`` (which of these categories?) or ``"one_of"``
        (which one of these answers?).
    build : callable
        ``build(selection, rng)`` returns the examples, as :func:`example_rows` makes them. The
        generator depends on the seed and on the name of the task.
    question : str
        The question in words, for figures and tables.
    classes : sequence of str, optional
        What the entries of `labels` stand for. By default ``"match"`` for a binary task, and the
        categories for a multilabel task.
    needs : str
        What the dataset must have: ``"categories"``, ``"instances"`` (boxes), or ``""`` where
        images and captions are enough.
    answers : sequence of sequences of str, optional
        The words for each answer that the model itself may begin with: for a binary task those for
        "no", then those for "yes"; for ``"one_of"`` those for each class. By default
        :data:`YES_OR_NO` for a binary task. An empty sequence leaves the model's answer out, as it
        is for a multilabel task, which has no one answer.
    variants : mapping of str to Variant
        Other wordings of the question by name. ``build`` then takes the argument `prompt`, and with
        the same `rng` asks about the same things whatever it is. The variant `negated` of the task
        `object` is the task `object_negated`.
    variant_of : str
        The task whose variant this is; ``""`` for none.
    negated : bool
        Whether the examples have the opposite of the labels that `build` returns.
    """

    kind: str
    build: Callable[..., pd.DataFrame]
    question: str
    _: KW_ONLY
    classes: Sequence[str] | None = None
    needs: Literal["", "categories", "instances"] = ""
    answers: Sequence[Sequence[str]] | None = None
    variants: Mapping[str, Variant] = field(default_factory=dict)
    variant_of: str = ""
    negated: bool = False

    @property
    def answer_words(self) -> tuple[tuple[str, ...], ...]:
        """The words for each answer; none where the model's answer is not read."""
        if self.answers is not None:
            return tuple(tuple(words) for words in self.answers)
        return YES_OR_NO if self.kind == "binary" else ()


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
    answers : tuple of tuples of str
        The words for each answer of the model itself, see :class:`Task`; empty without answers.
    variant_of : str
        The task whose question this asks in other words; ``""`` for none.
    """

    kind: str
    classes: tuple[str, ...]
    question: str
    answers: tuple[tuple[str, ...], ...] = ()
    variant_of: str = ""


TASK_COLUMNS = ("kind", "classes", "question")


def task_infos(examples: pd.DataFrame) -> dict[str, TaskInfo]:
    """Return what each task of an examples table is, in the order in which tasks first occur.

    It stands in the columns `kind`, `classes`, `question`, `answers` and `variant_of`, so that it
    survives whatever is done to the table. Tables may lack the last two.

    Raises
    ------
    ValueError
        A column is missing, the rows of one task contradict each other, or its answers are not as
        many as its labels have values.
    """
    missing = [name for name in ("task", *TASK_COLUMNS) if name not in examples.columns]
    if missing:
        raise ValueError(
            f"the examples have no column {', '.join(missing)}: take the table that build_examples "
            "returns, or name kind, classes and question of each row's task yourself"
        )
    if "variant_of" in examples and "item" not in examples and any(examples.variant_of):
        raise ValueError(
            "the examples have variants but no column item, by which wordings are compared: take "
            "the table that build_examples returns"
        )
    infos = {}
    for name, table in examples.groupby("task", sort=False):
        kinds = table.kind.unique()
        class_lists = {tuple(classes) for classes in table.classes}
        answer_lists = set(table.answers.map(_as_tuples)) if "answers" in table else {()}
        variants = set(table.variant_of.fillna("")) if "variant_of" in table else {""}
        if any(len(values) > 1 for values in (kinds, class_lists, answer_lists, variants)):
            raise ValueError(
                f"the rows of task {name} differ in kind or classes, in answers, or in what they "
                "are a variant of: give each task its own name"
            )
        info = TaskInfo(
            kinds[0],
            class_lists.pop(),
            table.question.iloc[0],
            answers=answer_lists.pop(),
            variant_of=variants.pop(),
        )
        _check_answers(str(name), info)
        infos[str(name)] = info
    return infos


def _as_tuples(answers: object) -> tuple[tuple[str, ...], ...]:
    """Return answers as they can be compared; where tables were joined, rows may have NaN."""
    if not isinstance(answers, (list, tuple, np.ndarray)):
        return ()
    return tuple(tuple(words) for words in answers)


def _check_answers(name: str, info: TaskInfo) -> None:
    """Refuse answers that do not belong to the task's labels."""
    if not info.answers:
        return
    if info.kind == "multilabel":
        raise ValueError(
            f"task {name} is multilabel, so it has no one answer: leave answers out, and ask about "
            "single categories in a binary task, such as object"
        )
    expected = 2 if info.kind == "binary" else len(info.classes)
    if len(info.answers) != expected:
        raise ValueError(
            f"task {name} has {len(info.answers)} answers: name the words for each of {expected} "
            f"({'no, then yes' if info.kind == 'binary' else ', '.join(info.classes)})"
        )
    words = [word for of_answer in info.answers for word in of_answer]
    if not all(info.answers) or any(word.strip() != word or not word for word in words):
        raise ValueError(
            f"task {name} has the answers {info.answers}: give each at least one word, without "
            "spaces around it"
        )


def example_rows(
    images: pd.DataFrame,
    prompts: Sequence[str],
    labels: Sequence | np.ndarray,
    *,
    masks: Sequence | np.ndarray | None = None,
    asked: Sequence[Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Return examples in the form that a task hands back, one for each row of `images`.

    Parameters
    ----------
    images : DataFrame
        n rows of :attr:`Selection.images`; an image may occur several times.
    prompts : sequence of str
        The n prompts.
    labels : array-like
        0 or 1: shape (n,) for a binary task, (n, c) for the others.
    masks : array-like, optional
        Shape (n, c): 1 where a label counts. By default all of them count.
    asked : sequence of sequence of str, optional
        The categories that each of the n prompts asks about. By default none; of a task whose
        classes are categories they are those that count.

    Returns
    -------
    DataFrame
        Indexed like `images`: `file`, `split`, `prompt`, and the lists `labels`, `mask` and
        `asked`.
    """
    label_nc = np.asarray(labels, dtype=int)
    if label_nc.ndim == 1:
        label_nc = label_nc[:, None]
    mask_nc = np.ones_like(label_nc) if masks is None else np.asarray(masks, dtype=int)
    return images[["file", "split"]].assign(
        prompt=list(prompts),
        labels=label_nc.tolist(),
        mask=mask_nc.tolist(),
        asked=[list(names) for names in asked] if asked is not None else [[]] * len(images),
    )


def asked_categories(examples: pd.DataFrame) -> list[tuple[str, ...]]:
    """Return which categories each of n examples asks about.

    Of a table without the column `asked`, or of rows that were joined without it, none.
    """
    if "asked" not in examples:
        return [()] * len(examples)
    is_list = (list, tuple, np.ndarray)
    return [tuple(names) if isinstance(names, is_list) else () for names in examples.asked]


def task_source(task: Task) -> list:
    """Return what the rows of a task come from, for :func:`~probekit.paths.fingerprint`.

    A different answer means that the rows may differ, and that the examples are built again. It
    holds the words and settings of the task and, for a function that a user wrote, the whole file
    in which it stands. A function that was typed into a notebook has no file: its answer differs
    each time.
    """
    function: Callable = task.build
    bound_arguments = []
    while isinstance(function, partial):
        bound_arguments.append(repr((function.args, function.keywords)))
        function = function.func
    classes = list(task.classes or ())
    words = [task.kind, task.question, classes, task.answer_words, task.variant_of, task.negated]
    return [*words, bound_arguments, _code_of(function)]


def _code_of(function: Callable) -> str:
    module = getattr(function, "__module__", None) or ""
    if module.startswith("probekit."):
        return f"{module}.{getattr(function, '__qualname__', function)}"
    try:
        file = inspect.getsourcefile(function)
        return Path(file or "").read_text(encoding="utf-8")
    except (OSError, TypeError, ValueError):
        return str(time.time_ns())
