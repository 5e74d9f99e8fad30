"""Controls: runs that must score at chance, or that bound what a score means.

There are four kinds:

* Controls of the *inputs* give the model something else. They are extracted, see
  :mod:`probekit.tasks.input_controls`.
* Controls of the *labels* train the same probe on the same states with other labels, see
  :func:`control_labels`.
* *Baselines* guess without reading any state, see :func:`guess` and :func:`bag_of_words`.
* The *untrained model* is a model of its own, named in 02_extract.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from zlib import crc32

import numpy as np
import pandas as pd

from probekit.tasks.input_controls import INPUT_CONTROLS
from probekit.tasks.words import word_runs

LABEL_CONTROLS = ("shuffled", "control_task")

# Baselines of binary tasks that read the prompt, and how many words in a row they count at most.
TEXT_BASELINES = {"bag_of_words": 1, "word_order": 3}

BASELINES = ("majority", "name_alone", *TEXT_BASELINES)

# Different prompts that a control task needs, and examples that each of its scores needs.
FEWEST = 10

# What a control is called in figures and sentences.
CONTROL_WORDS = {
    "untrained": "untrained model",
    "no_image": "no image",
    "no_text": "no text",
    "wrong_image": "wrong image",
    "shuffled": "shuffled labels",
    "control_task": "control task",
    "majority": "majority label",
    "name_alone": "category's name alone",
    "bag_of_words": "bag of words",
    "word_order": "words and their order",
}

# What a score above chance of a control means.
CONTROL_MEANING = {
    "untrained": "random weights carry that much of the input to the probe: only what lies above "
    "it was learnt",
    "no_image": "the texts alone give that much of the labels away: only what lies above it needs "
    "the image",
    "no_text": "the image alone gives that much of the labels away, whatever is asked about it",
    "wrong_image": "something besides the image predicts the labels: the texts, or which of them "
    "are asked",
    "shuffled": "one in forty such intervals lies above chance by luck; if more do, they are too "
    "narrow",
    "control_task": "the probe learns arbitrary labels by heart: judge layers by selectivity, or "
    "take a weaker probe",
    "majority": "labels are out of balance: read accuracy against this line, not against one half",
    "name_alone": "which category is asked gives that much of the label away: read local scores "
    "against this line",
    "bag_of_words": "the words of the texts alone give that much of the labels away: only what "
    "lies above it is about the image",
    "word_order": "the texts alone, by which words follow each other, give that much of the labels "
    "away: only what lies above it is about the image",
}


def check_controls(
    names: Sequence[str], available: Sequence[str] = INPUT_CONTROLS + LABEL_CONTROLS
) -> None:
    """Check that every name is a control.

    Parameters
    ----------
    names : sequence of str
        The names to check.
    available : sequence of str
        The controls that can be chosen here.

    Raises
    ------
    ValueError
        The message names what can be chosen.
    """
    unknown = [name for name in names if name not in available]
    if unknown:
        raise ValueError(
            f"unknown controls {unknown}: take names out of {', '.join(available)}; name models "
            "whose weights are to be random in untrained"
        )


def control_labels(
    name: str,
    y_nc: np.ndarray,
    *,
    mask_nc: np.ndarray,
    prompts: np.ndarray,
    split_n: np.ndarray,
    kind: str,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make other labels for the same states.

    Parameters
    ----------
    name : str
        ``"shuffled"`` or ``"control_task"``.
    y_nc : ndarray
        (n, c) true labels, 0 or 1.
    mask_nc : ndarray
        (n, c) 1 where an entry counts.
    prompts, split_n : ndarray
        (n,) prompt and split of each example.
    kind : str
        Of the task, see :class:`probekit.tasks.base.TaskInfo`.
    seed : int
        Seed of the labels.

    Returns
    -------
    y_nc : ndarray
        (n, c) the labels.
    mask_nc : ndarray
        (n, c) which of them count.
    split_n : ndarray
        (n,) the splits in which they are learnt and scored; "" where an example takes no part.

    Raises
    ------
    ValueError
        A control task was wanted for prompts that do not repeat, or that are too few.

    Notes
    -----
    shuffled
        The true labels, exchanged among the examples of each split; each class is permuted among
        the examples for which it counts.
    control_task
        A random label for each *type*, the same wherever the type occurs, so that it can only be
        learnt by heart (Hewitt and Liang, 2019). There is one such label for each class. The type
        is the prompt. A prompt that occurs twice in training is learnt with one image and scored
        with the other (half of them for validation), so that, as in their design, the probe meets
        no new types; it learns from fewer examples than it does for the true labels. In a
        multilabel task the type is the rarest *other* category that the image shows, entries of an
        image that shows no other category do not count, and the splits stay as they are.

    References
    ----------
    Hewitt and Liang (2019), "Designing and Interpreting Probes with Control Tasks".
    """
    check_controls([name], LABEL_CONTROLS)
    rng = np.random.default_rng([seed, crc32(name.encode())])
    if name == "shuffled":
        shuffled_nc = _shuffle_labels(y_nc, mask_nc=mask_nc, split_n=split_n, rng=rng)
        return shuffled_nc, mask_nc, split_n
    if kind == "multilabel":
        random_nc, has_type_nc = _draw_by_other_category(y_nc, split_n=split_n, rng=rng)
        mask_nc = mask_nc * has_type_nc.astype(mask_nc.dtype)
        return random_nc.astype(y_nc.dtype), mask_nc, split_n
    random_nc, split_n = _draw_by_prompt(
        prompts, split_n=split_n, class_count=y_nc.shape[1], rng=rng
    )
    return random_nc.astype(y_nc.dtype), mask_nc, split_n


def _shuffle_labels(
    y_nc: np.ndarray,
    *,
    mask_nc: np.ndarray,
    split_n: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    shuffled_nc = y_nc.copy()
    for split in np.unique(split_n):
        for c in range(y_nc.shape[1]):
            rows = np.flatnonzero((split_n == split) & (mask_nc[:, c] > 0))
            shuffled_nc[rows, c] = y_nc[rng.permutation(rows), c]
    return shuffled_nc


def _draw_by_other_category(
    y_nc: np.ndarray, *, split_n: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels (n, c) by the rarest category shown besides c; tell where there is one."""
    classes = np.arange(y_nc.shape[1])
    count_c = y_nc[split_n == "train"].sum(0) + 1.0
    rarity_nc = np.where(y_nc > 0, count_c, np.inf)
    # One more category that no image shows, for images that show fewer than two.
    rarity_nc = np.pad(rarity_nc, ((0, 0), (0, 1)), constant_values=np.inf)
    order_nc = rarity_nc.argsort(1, kind="stable")
    rarest_n1 = order_nc[:, [0]]
    second_n1 = order_nc[:, [1]]
    other_nc = np.where(rarest_n1 == classes, second_n1, rarest_n1)
    label_of_type = rng.integers(0, 2, (len(classes) + 1, len(classes)))
    has_type_nc = np.isfinite(np.take_along_axis(rarity_nc, other_nc, 1))
    return label_of_type[other_nc, classes], has_type_nc


def _draw_by_prompt(
    prompts: np.ndarray, *, split_n: np.ndarray, class_count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels (n, c) by prompt, and splits (n,) in which prompts of training come back."""
    type_n = pd.factorize(prompts)[0]
    train = rng.permutation(np.flatnonzero(split_n == "train"))
    is_repeated = pd.Series(type_n[train]).duplicated().to_numpy()
    repeated = train[is_repeated]
    if len(repeated) < 2 * FEWEST or len(np.unique(type_n[train])) < FEWEST:
        raise ValueError(
            f"a control task needs at least {FEWEST} different prompts in training, and "
            f"{2 * FEWEST} examples whose prompt occurs there more than once"
        )
    new_split_n = np.full(len(split_n), "", dtype=object)
    new_split_n[train] = "train"
    new_split_n[repeated[::2]] = "validation"
    new_split_n[repeated[1::2]] = "test"
    label_of_type = rng.integers(0, 2, (type_n.max() + 1, class_count))
    return label_of_type[type_n], new_split_n


def bag_of_words(
    prompts: np.ndarray, y_n: np.ndarray, *, train_n: np.ndarray, longest: int = 1
) -> np.ndarray:
    """Predict the labels of a binary task from the words of the prompts alone.

    Parameters
    ----------
    prompts : ndarray
        (n,) the prompts.
    y_n : ndarray
        (n,) labels, 0 or 1.
    train_n : ndarray
        (n,) True at training examples.
    longest : int
        How many words in a row are counted at most; above 1 their order tells something. In
        scripts without spaces between words, twice as many characters are.

    Returns
    -------
    ndarray
        (n,) probabilities of label 1, from a logistic regression on word counts.
    """
    from sklearn.feature_extraction.text import CountVectorizer  # takes seconds
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    y_train = y_n[train_n] > 0
    if y_train.all() or not y_train.any():
        return np.full(len(y_n), y_train.mean())
    counter = CountVectorizer(analyzer=partial(word_runs, longest=longest))
    classifier = make_pipeline(counter, LogisticRegression(max_iter=2000))
    classifier.fit(prompts[train_n], y_train)
    return classifier.predict_proba(prompts)[:, 1]


def guess(baseline: str, y_nc: np.ndarray, *, mask_nc: np.ndarray, n: int) -> np.ndarray:
    """Guess labels by how often the answer is yes in training.

    Parameters
    ----------
    baseline : str
        ``"name_alone"`` for the share of each class, ``"majority"`` for that of all classes.
    y_nc, mask_nc : ndarray
        (training examples, c) labels, and 1 where an entry counts.
    n : int
        Number of examples to guess for.

    Returns
    -------
    ndarray
        (n, c) probabilities of label 1.
    """
    yes_c = (y_nc * mask_nc).sum(0)
    entries_c = mask_nc.sum(0)
    if baseline == "name_alone":
        share_c = yes_c / np.maximum(entries_c, 1)
    else:
        share_c = np.full(len(yes_c), yes_c.sum() / max(entries_c.sum(), 1))
    return np.broadcast_to(share_c, (n, len(yes_c)))
