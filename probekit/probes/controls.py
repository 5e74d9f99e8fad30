"""Controls: runs that must score at chance, or that bound what a score means.

Three kinds. Controls of the *inputs* give the model something else (:func:`inputs`) and are extracted; controls of the
*labels* train the same probe on the same states with other labels (:func:`labels`); *baselines* look at no state at all
(:func:`baseline`). The untrained model is a control as well: it is a model of its own, named in 02_extract.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

LABEL_CONTROLS = ("shuffled", "control_task")
TEXT_BASELINES = {"bag_of_words": 1, "word_order": 3}  # words in a row that are counted, at most; of binary tasks alone
BASELINES = ("majority", "name_alone", *TEXT_BASELINES)
FEWEST = 10  # prompts that a random label is drawn for, and examples that score it
CONTROL_WORDS = {
    "untrained": "untrained model", "no_image": "no image", "no_text": "no text", "wrong_image": "wrong image",
    "shuffled": "shuffled labels", "control_task": "control task", "majority": "majority label",
    "name_alone": "category's name alone", "bag_of_words": "bag of words",
    "word_order": "words and their order",
}
CONTROL_MEANING = {  # of a score above chance
    "untrained": "random weights carry that much of the input to the probe: only what lies above it was learnt",
    "no_image": "the texts alone give that much of the labels away: only what lies above it needs the image",
    "no_text": "the image alone gives that much of the labels away, whatever is asked about it",
    "wrong_image": "something besides the image predicts the labels: the texts, or which of them are asked",
    "shuffled": "one in forty such intervals lies above chance by luck; if more do, they are too narrow",
    "control_task": "the probe learns arbitrary labels by heart: judge layers by selectivity, or take a weaker probe",
    "majority": "labels are out of balance: read accuracy against this line, not against one half",
    "name_alone": "which category is asked gives that much of the label away: read local scores against this line",
    "bag_of_words": "the words of the texts alone give that much of the labels away: only what lies above it is about "
                    "the image",
    "word_order": "the texts alone, by which words follow each other, give that much of the labels away: only what "
                  "lies above it is about the image",
}
from probekit.tasks.input_controls import INPUT_CONTROLS


def check_controls(names: Sequence[str], known: Sequence[str] = INPUT_CONTROLS + LABEL_CONTROLS) -> None:
    """Raise ValueError naming what can be chosen where a name is no control."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown controls {unknown}: take names out of {', '.join(known)}; name models whose weights "
                         "are to be random in untrained")


# ------------------------------------------------------------------------------------------------------------- inputs






# ------------------------------------------------------------------------------------------------------------- labels


def labels(name: str, y_nc: np.ndarray, mask_nc: np.ndarray, prompts: np.ndarray, split: np.ndarray, kind: str,
           seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Other labels for the same states, which of them count, and the split in which they are learnt and scored.

    shuffled
        the true labels, dealt out anew among the examples of each split, each class among those that are asked for it
    control_task
        Hewitt and Liang (2019): a random label for each *type*, the same wherever the type occurs, so that it can only
        be learnt by heart, and each type has one for each class. The type is the prompt (a caption): a caption that is
        asked twice in training is learnt with one image and scored with the other (half of them stand for validation),
        so that the probe meets no new types, as in their design, and learns from fewer examples than it does for the
        true labels. In a multi-label task the type is the rarest *other* category that the image shows; entries of an
        image that shows no other category do not count; the splits stay.

    Parameters
    ----------
    y_nc, mask_nc : (n, c) labels 0 or 1, and 1 where an entry counts
    prompts, split : (n,)
    kind : of the task, see :class:`probekit.tasks.base.Task`

    Returns
    -------
    tuple
        (n, c) labels, (n, c) mask and (n,) splits; "" where an example takes no part.

    Raises
    ------
    ValueError
        A control task for prompts that do not repeat, or of which there are too few to be learnt by heart.
    """
    check_controls([name], LABEL_CONTROLS)
    rng = np.random.default_rng([seed, crc32(name.encode())])
    if name == "shuffled":
        out = y_nc.copy()
        for part in np.unique(split):
            for c in range(y_nc.shape[1]):
                rows = np.flatnonzero((split == part) & (mask_nc[:, c] > 0))
                out[rows, c] = y_nc[rng.permutation(rows), c]
        return out, mask_nc, split
    if kind == "multilabel":
        y, known = _by_other_category(y_nc, split, rng)
        return y.astype(y_nc.dtype), mask_nc * known.astype(mask_nc.dtype), split
    y, parts = _by_prompt(prompts, split, y_nc.shape[1], rng)
    return y.astype(y_nc.dtype), mask_nc, parts


def _by_other_category(y_nc: np.ndarray, split: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(n, c) random labels by the rarest category shown besides the one that is asked for, and where there is one."""
    classes = np.arange(y_nc.shape[1])
    shown = np.where(y_nc > 0, y_nc[split == "train"].sum(0) + 1.0, np.inf)
    shown = np.pad(shown, ((0, 0), (0, 1)), constant_values=np.inf)  # one that is never there
    first, second = shown.argsort(1, kind="stable")[:, :2].T[:, :, None]
    other = np.where(first == classes, second, first)
    drawn = rng.integers(0, 2, (len(classes) + 1, len(classes)))
    return drawn[other, classes], np.isfinite(np.take_along_axis(shown, other, 1))


def _by_prompt(prompts: np.ndarray, split: np.ndarray, c: int, rng: np.random.Generator
               ) -> tuple[np.ndarray, np.ndarray]:
    """(n, c) random labels by prompt, and splits (n,) in which known prompts come back."""
    kind, train = pd.factorize(prompts)[0], rng.permutation(np.flatnonzero(split == "train"))
    again = train[pd.Series(kind[train]).duplicated().to_numpy()]
    if len(again) < 2 * FEWEST or len(np.unique(kind[train])) < FEWEST:
        raise ValueError(f"a control task needs at least {FEWEST} different prompts in training, and {2 * FEWEST} "
                         "examples whose prompt is asked once more there")
    parts = np.full(len(split), "", dtype=object)
    parts[train], parts[again[::2]], parts[again[1::2]] = "train", "validation", "test"
    return rng.integers(0, 2, (kind.max() + 1, c))[kind], parts


def bag_of_words(prompts: np.ndarray, y_n: np.ndarray, train: np.ndarray, longest: int = 1) -> np.ndarray:
    """Probabilities (n,) of label 1 from the words of the prompts alone: counts, and a logistic regression.

    Parameters
    ----------
    train : (n,) True at training examples
    longest : count words in a row, too, up to so many: then their order tells
    """
    y = y_n[train] > 0
    if y.all() or not y.any():
        return np.full(len(y_n), y.mean())
    counts = CountVectorizer(token_pattern=r"\w+", ngram_range=(1, longest))
    reader = make_pipeline(counts, LogisticRegression(max_iter=2000))
    return reader.fit(prompts[train], y).predict_proba(prompts)[:, 1]


def baseline(name: str, y_nc: np.ndarray, mask_nc: np.ndarray, n: int) -> np.ndarray:
    """Probabilities (n, c) of a guess from the training labels: their share of "yes", of all classes or of each.

    Parameters
    ----------
    y_nc, mask_nc : of the training examples
    """
    yes, asked = (y_nc * mask_nc).sum(0), mask_nc.sum(0)
    share = yes / np.maximum(asked, 1) if name == "name_alone" else np.full(len(yes), yes.sum() / max(asked.sum(), 1))
    return np.broadcast_to(share, (n, len(yes)))
