"""Probes and answers on changed images: is an object read off itself or its surroundings.

The probes are those that were trained on whole images; nothing is fitted here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from probekit.answers.reading import LENS, AnswerLogits, read_answers
from probekit.extraction.store import Activations
from probekit.interventions.scores import COLUMNS, difference_rows, mean_rows
from probekit.probes.labels import LabelledTask, LabelSet
from probekit.probes.results import ProbeKey
from probekit.probes.weights import ProbeWeights
from probekit.tasks.base import asked_categories, task_infos
from probekit.tasks.changed_images import ImageChanger

WHOLE_IMAGE = "whole_image"
PIXELS = "pixels"  # the site of what is done to an image
FEWEST_IMAGES = 2  # that can be resampled


def change_test_images(
    examples: pd.DataFrame,
    make_changer: Callable[[], ImageChanger],
    *,
    changes: Sequence[str],
    images: int,
) -> pd.DataFrame:
    """Change the test images of the tasks that ask about objects.

    Parameters
    ----------
    examples : DataFrame
        Of a run.
    make_changer : callable
        Is called where a task asks about objects.
    changes : sequence of str
        Out of :data:`probekit.tasks.changed_images.IMAGE_CHANGES`.
    images : int
        The most test images of each task.

    Returns
    -------
    DataFrame
        The examples whose image could be changed: with the whole image, and with each change. They
        have the columns `change` and `place`, the number of the example in `examples`. Without rows
        where there are none; a line says why.
    """
    tested = _select_test(examples, images)
    if "asked" not in examples:
        tqdm.write(
            "no image is changed: these examples do not say what they ask about; run 01_build_data "
            "again"
        )
        return tested
    if tested.empty:
        tqdm.write(
            "no image is changed: no task of this run asks about objects; add one such as object "
            "or category in 01_build_data, or take inputs=[]"
        )
        return tested
    changed = make_changer().change(tested, changes)
    for (task, reason), count in changed.left_out.items():
        tqdm.write(f"{task}: {count} test images are not changed, {reason}")
    if changed.examples.empty:
        return changed.examples
    whole = changed.examples.drop_duplicates("row").assign(change=WHOLE_IMAGE)
    whole["file"] = tested.file.iloc[whole.row].to_numpy()
    table = pd.concat([whole, changed.examples]).sort_values(["task", "row"], kind="stable")
    return table.drop(columns="row").reset_index(drop=True)


def score_inputs(
    examples: pd.DataFrame,
    extracted: Activations,
    weights: Mapping[ProbeKey, ProbeWeights],
    *,
    resamples: int,
) -> pd.DataFrame:
    """Score a model's probes and answers on changed test images, beside the whole ones.

    Parameters
    ----------
    examples : DataFrame
        Of the run.
    extracted : Activations
        Of the examples that :func:`change_test_images` returns.
    weights : mapping of ProbeKey to ProbeWeights
        Of the model's probes of the decoder's layers.
    resamples : int

    Returns
    -------
    DataFrame
        Rows of the table of interventions, see :func:`probekit.workflow.intervene`.
    """
    answers, _ = read_answers(extracted, task_infos(extracted.examples), with_tuned_lens=False)
    tables = [
        _score_task(
            str(task),
            examples=examples,
            extracted=extracted,
            answers=answers,
            weights={key: one for key, one in weights.items() if key.task == task},
            resamples=resamples,
        )
        for task in extracted.examples.task.unique()
    ]
    scored = pd.concat(tables).assign(
        model=extracted.meta["model"], site=PIXELS, control="none", erased=""
    )
    return scored.reindex(columns=COLUMNS).reset_index(drop=True)


def _select_test(examples: pd.DataFrame, images: int) -> pd.DataFrame:
    """Return the first test images of each task that asks about objects, with their `place`."""
    placed = examples.assign(place=np.arange(len(examples)))
    asks = np.array([len(names) > 0 for names in asked_categories(examples)])
    plain = [name for name, info in task_infos(examples).items() if not info.variant_of]
    rows = placed[(examples.split == "test") & asks & examples.task.isin(plain)]
    image_number = rows.groupby("task", sort=False).image_id.transform(
        lambda ids: pd.factorize(ids)[0]
    )
    return rows[image_number < images].reset_index(drop=True)


def _score_task(
    task: str,
    *,
    examples: pd.DataFrame,
    extracted: Activations,
    answers: Mapping[str, Mapping[str, AnswerLogits]],
    weights: Mapping[ProbeKey, ProbeWeights],
    resamples: int,
) -> pd.DataFrame:
    """Score the probes and the answers of one task on all inputs."""
    try:
        labels = LabelledTask.from_examples(examples, task)
    except ValueError as error:  # too few examples that count
        tqdm.write(f"{task} is not scored on changed images: {error}")
        return pd.DataFrame()
    rows = np.flatnonzero((extracted.examples.task == task).to_numpy())
    places = extracted.examples.place.to_numpy()[rows]
    entries = _Entries.of(labels.true, np.searchsorted(labels.rows, places))
    change_n = extracted.examples.change.to_numpy()[rows]
    if len(np.unique(entries.image_m)) < FEWEST_IMAGES:
        tqdm.write(f"{task} is not scored on changed images: fewer than two can be changed")
        return pd.DataFrame()
    tables = []
    if task in answers:
        answer_na = answers[task][LENS].logits_lna[-1]
        if labels.true.kind == "binary":
            answer_na = answer_na[:, 1:] - answer_na[:, :1]
        right_m1 = entries.right(answer_na[None])
        tables.append(
            _input_rows(
                right_m1,
                entries,
                change_n,
                names=("accuracy", "effect"),
                layers=[""],
                resamples=resamples,
            )
        )
    for key, of_probe in weights.items():
        layers = [layer for layer in extracted.layers_with(key.pooling) if layer.startswith("lm.")]
        logits_lnc = np.stack(
            [
                of_probe.logits(place, extracted[layer, key.pooling][rows])
                for place, layer in enumerate(layers)
            ]
        )
        right_ml = entries.right(logits_lnc)
        table = _input_rows(
            right_ml,
            entries,
            change_n,
            names=("probe_accuracy", "probe_effect"),
            layers=layers,
            resamples=resamples,
        )
        tables.append(table.assign(pooling=key.pooling))
    if not tables:
        return pd.DataFrame()
    return pd.concat(tables).assign(task=task)


@dataclass(frozen=True)
class _Entries:
    """What is right or wrong: examples, of several classes those that count for each.

    Attributes
    ----------
    row_m, class_m : ndarray
        (m,) numbers of the examples and of their classes.
    image_m : ndarray
        (m,) which image each is about.
    kind, y_nc, mask_nc
        See :class:`probekit.probes.labels.LabelSet`; n examples.
    """

    row_m: np.ndarray
    class_m: np.ndarray
    image_m: np.ndarray
    kind: str
    y_nc: np.ndarray
    mask_nc: np.ndarray

    @classmethod
    def of(cls, labels: LabelSet, rows: np.ndarray) -> _Entries:
        """Take the examples of some rows of a task."""
        y_nc = labels.y_nc.numpy()[rows]
        mask_nc = labels.mask_nc.numpy()[rows]
        # Of several answers the right one is chosen, or it is not.
        counts_nc = mask_nc * y_nc if labels.kind == "one_of" else mask_nc
        row_m, class_m = np.nonzero(counts_nc)
        return cls(row_m, class_m, labels.image_n[rows][row_m], labels.kind, y_nc, mask_nc)

    def right(self, logits_lnc: np.ndarray) -> np.ndarray:
        """(m, l) whether an entry is right by log-odds, or logits of one of several answers."""
        if self.kind == "one_of":
            counting_lnc = np.where(self.mask_nc > 0, logits_lnc, -np.inf)
            return (counting_lnc.argmax(-1)[:, self.row_m] == self.class_m).T
        says_lm = logits_lnc[:, self.row_m, self.class_m] > 0
        return (says_lm == (self.y_nc[self.row_m, self.class_m] > 0)).T


def _input_rows(
    right_ml: np.ndarray,
    entries: _Entries,
    change_n: np.ndarray,
    *,
    names: tuple[str, str],
    layers: Sequence[str],
    resamples: int,
) -> pd.DataFrame:
    """Average what is right on each input, and subtract what is right on whole images.

    `names` are those of the two metrics. Entries of all inputs are in the same order.
    """
    share, effect = names
    change_m = change_n[entries.row_m]
    is_whole_m = change_m == WHOLE_IMAGE
    options = {"image_n": entries.image_m[is_whole_m], "resamples": resamples}
    tables = []
    for change in dict.fromkeys(change_m):
        of_change_ml = right_ml[change_m == change]
        table = [mean_rows(share, of_change_ml, read_layer=list(layers), **options)]
        if change != WHOLE_IMAGE:
            difference = difference_rows(
                effect, of_change_ml, right_ml[is_whole_m], layers=layers, **options
            )
            table.append(difference.rename(columns={"layer": "read_layer"}))
        tables.append(pd.concat(table).assign(intervention=change, layer=""))
    return pd.concat(tables)
