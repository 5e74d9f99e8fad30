"""What the tables say, in sentences that can go into a paper, and what to doubt about it."""

from __future__ import annotations

import html
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd

from probekit.extraction.answer_heads import ANSWER_POOLING
from probekit.probes.bootstrap import Curve
from probekit.probes.comparison import curve_difference, holm, plateau_sentence
from probekit.probes.controls import CONTROL_MEANING, CONTROL_WORDS
from probekit.probes.judged_controls import judge_controls
from probekit.probes.labels import LabelledTask
from probekit.probes.probing import PROBES
from probekit.probes.results import HEADLINE, ProbeKey, ProbeResults, best_layers, find_curve
from probekit.report.curves import CHANCE_ACCURACY
from probekit.report.known_and_said import NEAR, known_and_said
from probekit.report.style import capitalise, metric_words
from probekit.report.wordings import wording_sentence, wording_table
from probekit.tasks.base import TaskInfo
from probekit.tasks.variants import has_plain_wording

WIDE_INTERVAL = 0.1
LARGE_SPREAD = 0.01  # of the seeds' scores at a layer
COMPARISON_COLUMNS = ["a", "b", "metric", "difference", "lo", "hi", "p", "p_holm"]


class Summary(list[str]):
    """Paragraphs about a run: they fold out in a notebook, and are plain text when printed."""

    def __str__(self) -> str:
        return "\n\n".join(self)

    def _repr_html_(self) -> str:
        paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in self)
        return f"<details><summary>In sentences</summary>{paragraphs}</details>"


def summarise(table: pd.DataFrame, tasks: dict[str, TaskInfo], *, probe: str = "logreg") -> Summary:
    """Describe each task, model and pooling: best layer, plateau, controls, and what to doubt.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table.
    tasks : dict of str to TaskInfo
        Such as :attr:`probekit.probes.results.ProbeResults.tasks`.
    probe : str
        The kind of probe.

    Returns
    -------
    Summary
        A paragraph for each, in the order of the table. Other wordings of a question have no
        paragraph of their own: that of the plain one says how far they differ.
    """
    best = best_layers(table, plain_tasks(tasks), probe=probe)
    in_other_words = wording_table(table, pd.DataFrame(), tasks, probe=probe)
    several_poolings = table.pooling[table.probe == probe].nunique() > 1
    paragraphs = Summary()
    for _, best_row in best[best.control == "none"].iterrows():
        rows = same_source(table, best_row)
        curve = find_curve(rows, probe=probe, metric=HEADLINE[tasks[best_row.task].kind])
        name = f"{best_row.task}, {best_row.model}"
        if several_poolings:
            name += f", {best_row.pooling} pooling"
        sentences = [
            f"{name}: of the {PROBES[probe]} probes on {len(curve)} layers, the one on "
            f"{best_row['best layer']} (chosen on validation images) has a test "
            f"{metric_words(best_row.metric)} of {_with_interval(best_row)}, "
            f"n = {best_row.n:,.0f} labels{_chance_words(best_row, tasks[best_row.task])}."
        ]
        if curve.plateau.notna().all():
            sentences.append(plateau_sentence(curve))
        sentences += _selectivity_sentences(rows, probe=probe, layer=best_row["best layer"])
        sentences += _answer_sentences(table, best_row, tasks[best_row.task], probe=probe)
        sentences += _wording_sentences(in_other_words, best_row)
        sentences += _codelength_sentences(rows, probe=probe, layer=best_row["best layer"])
        sentences += _control_sentences(rows, same_source(best, best_row), probe=probe)
        sentences += _doubt_sentences(rows, curve, best_row, probe=probe)
        paragraphs.append(" ".join(sentences))
    return paragraphs


def plain_tasks(tasks: dict[str, TaskInfo]) -> dict[str, TaskInfo]:
    """Return the tasks without other wordings of a question that is among them."""
    return {name: info for name, info in tasks.items() if not has_plain_wording(name, tasks)}


def _chance_words(row: pd.Series, info: TaskInfo) -> str:
    """Say of an accuracy of balanced yes-or-no labels that a guess is as good."""
    return ": no better than a guess" if is_a_guess(row.lo, info) else ""


def is_a_guess(lo: float, info: TaskInfo) -> bool:
    """Return whether an accuracy of balanced yes-or-no labels may be that of a guess.

    Parameters
    ----------
    lo : float
        Lower end of its interval.
    info : TaskInfo
        Of the task.
    """
    return info.kind == "binary" and lo <= CHANCE_ACCURACY


def same_source(table: pd.DataFrame, row: pd.Series) -> pd.DataFrame:
    """Return the rows with the task, model and pooling of `row`, controls included."""
    return table[
        (table.task == row.task) & (table.model == row.model) & (table.pooling == row.pooling)
    ]


def _with_interval(row: pd.Series) -> str:
    return f"{row.value:.3f} (95\u00a0% interval {row.lo:.3f} to {row.hi:.3f})"


def _selectivity_sentences(rows: pd.DataFrame, *, probe: str, layer: str) -> list[str]:
    curve = find_curve(rows, probe=probe, metric="selectivity")
    at_layer = curve[curve.layer == layer]
    if len(at_layer) == 0:
        return []
    value = _with_interval(at_layer.iloc[0])
    return [f"Selectivity at {layer}, accuracy minus that of the control task: {value}."]


def _answer_sentences(
    table: pd.DataFrame, best_row: pd.Series, info: TaskInfo, *, probe: str
) -> list[str]:
    """Say how far the best probe on the answer's token is above the model's own answer."""
    if best_row.pooling != ANSWER_POOLING:
        return []
    both = known_and_said(table, best_row.task, info, model=best_row.model, probe=probe)
    if both is None:
        return []
    gap = both.over_answer
    tuned = ""
    if both.tuned is not None and abs(both.tuned.value - both.said.value) >= NEAR:
        tuned = f" ({both.tuned.value:.3f} with the threshold that suits the validation images)"
    known_not_said = ""
    if gap.lo > 0:  # else two that guess differ so, too
        known_not_said = (
            f"; {both.known_not_said.value:.1%} of the examples are right in the probe and "
            "answered wrongly"
        )
    return [
        f"The model itself answers with an {metric_words(both.metric)} of "
        f"{_with_interval(both.said)}{tuned}{_chance_words(both.said, info)}. The probe at "
        f"{both.layer} less the answer, on the same images: {gap.value:+.3f} (95\u00a0% interval "
        f"{gap.lo:+.3f} to {gap.hi:+.3f}){known_not_said}."
    ]


def _wording_sentences(in_other_words: pd.DataFrame, best_row: pd.Series) -> list[str]:
    """Say how much the answer hangs on the wording, beside the answer itself."""
    if best_row.pooling != ANSWER_POOLING:
        return []
    is_same = (in_other_words.task == best_row.task) & (in_other_words.model == best_row.model)
    sentence = wording_sentence(in_other_words[is_same])
    return [sentence] if sentence else []


def _codelength_sentences(rows: pd.DataFrame, *, probe: str, layer: str) -> list[str]:
    rows = rows[
        (rows.control == "none")
        & (rows.probe == probe)
        & (rows.metric == "codelength")
        & rows.layer.str.startswith("lm.")
    ]
    if len(rows) == 0:
        return []
    bits = rows.groupby("layer", sort=False).value.mean()
    return [
        f"At {layer} the labels take {bits[layer]:.2f} bits each (online codelength; 1 is the "
        f"uniform code), fewest at {bits.idxmin()} ({bits.min():.2f})."
    ]


def _control_sentences(
    rows: pd.DataFrame, best_of_controls: pd.DataFrame, *, probe: str
) -> list[str]:
    """Say which controls are at chance, and what it means of the others that they are not."""
    controls = judge_controls(rows, best_of_controls, probe=probe)
    at_chance = []
    above_chance = []
    for score in controls.scores:
        words = (
            f"{CONTROL_WORDS[score.control]} {score.value:.3f} ({score.lo:.3f} to {score.hi:.3f})"
        )
        if score.is_above:
            above_chance.append(f"{words}, above chance: {CONTROL_MEANING[score.control]}.")
        else:
            at_chance.append(words)
    for score in controls.baselines:
        if score.is_above:
            above_chance.append(
                f"{CONTROL_WORDS[score.control]} {score.value:.3f}, above one half: "
                f"{CONTROL_MEANING[score.control]}."
            )

    sentences = [
        f"Without the states the labels can be guessed with an accuracy of {controls.guess:.3f}."
    ]
    if at_chance:
        sentences.append(
            f"At chance, as it should be, at the best layer of each: {'; '.join(at_chance)}."
        )
    sentences += [capitalise(sentence) for sentence in above_chance]
    return sentences


def _doubt_sentences(
    rows: pd.DataFrame, curve: pd.DataFrame, best_row: pd.Series, *, probe: str
) -> list[str]:
    doubts = []
    if len(curve) > 1 and curve.plateau.notna().all() and curve.plateau.astype(bool).all():
        doubts.append("no layer is clearly worse than the best, so the curve has no peak")
    if (curve.spread > LARGE_SPREAD).any():
        doubts.append(
            f"seeds differ by up to {curve.spread.max():.3f} at a layer, which the intervals here "
            "leave out"
        )
    strengths = rows[
        (rows.control == "none")
        & (rows.probe == probe)
        & (rows.metric == "strength")
        & (rows.layer == best_row["best layer"])
        & (rows.strength_min < rows.strength_max)
    ]
    at_end = (strengths.value == strengths.strength_min) | (
        strengths.value == strengths.strength_max
    )
    if at_end.any():
        doubts.append(
            "the strength that validation chose is at an end of the grid: widen strengths"
        )
    width = best_row.hi - best_row.lo
    if width > WIDE_INTERVAL:
        doubts.append(f"the interval is {width:.2f} wide: take more test images")
    return [f"Doubt: {'; '.join(doubts)}."] if doubts else []


class _Candidate(NamedTuple):
    """A model, trained or not, at its best layer for one task."""

    task: str
    model: str
    pooling: str
    layer: str
    curve: Curve

    @property
    def name(self) -> str:
        return f"{self.task}, {self.model}, {self.pooling}, {self.layer}"

    def differs_in_one_thing(self, other: _Candidate) -> bool:
        differences = (
            self.task != other.task,
            self.model != other.model,
            self.pooling != other.pooling,
        )
        return sum(differences) == 1


def compare_pairs(
    results: ProbeResults,
    examples: pd.DataFrame,
    *,
    probe: str = "logreg",
    resamples: int = 2000,
) -> pd.DataFrame:
    """Compare models, untrained twins, poolings and tasks with each other at their best layers.

    Compared are all pairs that differ in one of these and have the same headline metric. Best
    layers are chosen on validation images; test images that both have are paired. Other wordings of
    a question are left out: they are compared with each other elsewhere
    (:func:`probekit.report.wordings.wording_table`).

    Parameters
    ----------
    results : ProbeResults
        Results of a whole run.
    examples : DataFrame
        The examples that were probed.
    probe : str
        The kind of probe.
    resamples : int
        Bootstrap resamples of the test images.

    Returns
    -------
    DataFrame
        One row per pair: `a` and `b` (task, model, pooling, layer), `metric`, their `difference`
        with `lo` and `hi`, `p` (two-sided), and `p_holm`, corrected over all rows of a metric.
    """
    best = best_layers(results.metrics, plain_tasks(results.tasks), probe=probe)
    is_decoder = best["best layer"].str.startswith("lm.")
    best = best[best.control.isin(["none", "untrained"]) & is_decoder]
    labelled_tasks = {
        task: LabelledTask.from_examples(examples, task) for task in best.task.unique()
    }
    tables = []
    for metric, best_of_metric in best.groupby("metric", sort=False):
        candidates = []
        for _, row in best_of_metric.iterrows():
            key = ProbeKey(row.model, row.control, row.pooling, row.task, probe)
            layer = row["best layer"]
            number = int(layer.partition(".")[2])
            p_1nc = results.predictions[key][[number]].astype(np.float32)
            curve = labelled_tasks[row.task].true.curve(
                p_1nc, split="test", metric=metric, resamples=resamples
            )
            is_untrained = row.control == "untrained"
            model = f"{row.model} (untrained)" if is_untrained else row.model
            candidates.append(_Candidate(row.task, model, row.pooling, layer, curve))
        comparisons = []
        for a, b in combinations(candidates, 2):
            if a.differs_in_one_thing(b):
                comparison = curve_difference(a.curve, b.curve, layers=[metric])
                comparisons.append(comparison.assign(a=a.name, b=b.name))
        if comparisons:
            table = pd.concat(comparisons).rename(columns={"layer": "metric"})
            tables.append(table.assign(p_holm=holm(table.p)))
    if not tables:
        return pd.DataFrame(columns=COMPARISON_COLUMNS)
    return pd.concat(tables, ignore_index=True)[COMPARISON_COLUMNS]
