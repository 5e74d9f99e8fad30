"""The answer of a run in one table: a row for each task, model and pooling."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from probekit.answers.scores import ANSWER
from probekit.probes.comparison import plateau_spans
from probekit.probes.controls import CONTROL_MEANING, CONTROL_WORDS
from probekit.probes.judged_controls import Controls, ControlScore, judge_controls
from probekit.probes.results import HEADLINE, best_layers, find_curve
from probekit.report.known_and_said import said_metric, with_interval
from probekit.report.sentences import (
    is_a_guess,
    plain_tasks,
    same_source,
)
from probekit.report.style import capitalise, metric_words
from probekit.tasks.base import TaskInfo

AT_CHANCE = "at chance"
ABOVE_CHANCE = "above chance"
CHECKED = "✓"
MISSING = "–"


def overview_table(
    table: pd.DataFrame, tasks: dict[str, TaskInfo], *, probe: str = "logreg"
) -> pd.DataFrame:
    """Set the best layer of each task, model and pooling beside its controls and the answer.

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
    DataFrame
        One row per task, model and pooling of a trained model. Other wordings of a question have
        no row (:func:`probekit.report.wordings.wording_table` has them). Columns, NaN or "" where
        something was not measured:

        * `task`, `model`, `pooling`.
        * `best layer`, chosen on validation, and its test score there: `metric`, `value` with the
          95 % interval `lo` to `hi`, and the number of labels `n`.
        * `is a guess`: whether yes-or-no labels would be guessed as well.
        * `plateau`: the layers that are not clearly worse than the best one, in words; there are
          `plateau layers` of them, among `layers`.
        * `selectivity` at the best layer, with `selectivity lo` and `selectivity hi`.
        * `answer`: what the model itself scores on the same test images (`answer metric`), with
          `answer lo`, `answer hi`, and `answer is a guess`.
        * `guess`: the accuracy with which labels can be guessed without the states.
        * for each control its `accuracy` at its own best layer, such as `untrained`,
          `untrained lo`, `untrained hi`, and `untrained is`: "at chance" where the interval does
          not lie above what guesses score, else "above chance".

    Raises
    ------
    ValueError
        The table has no such probes.
    """
    best = best_layers(table, plain_tasks(tasks), probe=probe)
    rows = []
    for _, best_row in best[best.control == "none"].iterrows():
        info = tasks[best_row.task]
        of_source = same_source(table, best_row)
        row: dict[str, object] = {
            "task": best_row.task,
            "model": best_row.model,
            "pooling": best_row.pooling,
            "best layer": best_row["best layer"],
            "metric": best_row.metric,
            "value": best_row.value,
            "lo": best_row.lo,
            "hi": best_row.hi,
            "n": int(best_row.n),
            "is a guess": is_a_guess(best_row.lo, info),
        }
        row |= _plateau_columns(of_source, probe=probe, metric=HEADLINE[info.kind])
        row |= _selectivity_columns(of_source, probe=probe, layer=best_row["best layer"])
        row |= _answer_columns(table, best_row, info)
        row |= _control_columns(judge_controls(of_source, same_source(best, best_row), probe=probe))
        rows.append(row)
    overview = pd.DataFrame(rows)
    controls = [f"{name}{end}" for name in CONTROL_WORDS for end in ("", " lo", " hi", " is")]
    others = [name for name in overview if name not in controls]
    overview = overview[[*others, *(name for name in controls if name in overview)]]
    words = [name for name in overview if name.endswith(" is") or name == "answer metric"]
    return overview.fillna(dict.fromkeys(words, ""))


def _plateau_columns(rows: pd.DataFrame, *, probe: str, metric: str) -> dict[str, object]:
    curve = find_curve(rows, probe=probe, metric=metric)
    if curve.plateau.isna().any():
        return {"plateau": "", "plateau layers": None, "layers": len(curve)}
    return {
        "plateau": ", ".join(plateau_spans(curve)),
        "plateau layers": int(curve.plateau.sum()),
        "layers": len(curve),
    }


def _selectivity_columns(rows: pd.DataFrame, *, probe: str, layer: str) -> dict[str, float]:
    curve = find_curve(rows, probe=probe, metric="selectivity")
    at_layer = curve[curve.layer == layer]
    return with_interval("selectivity", at_layer.iloc[0]) if len(at_layer) else {}


def _answer_columns(
    table: pd.DataFrame, best_row: pd.Series, info: TaskInfo
) -> dict[str, float | str | bool]:
    metric = said_metric(info)
    answers = table[
        (table.task == best_row.task)
        & (table.model == best_row.model)
        & (table.control == "none")
        & (table.probe == ANSWER)
        & (table.split == "test")
        & (table["class"] == "")
        & (table.metric == metric)
    ]
    if answers.empty:
        return {}
    answer = answers.iloc[0]
    return {
        **with_interval("answer", answer),
        "answer metric": metric,
        "answer is a guess": is_a_guess(answer.lo, info),
    }


def _control_columns(controls: Controls) -> dict[str, float | str]:
    columns: dict[str, float | str] = {"guess": controls.guess}
    for score in [*controls.scores, *controls.baselines]:
        columns |= _columns_of(score)
    return columns


def _columns_of(score: ControlScore) -> dict[str, float | str]:
    name = score.control
    return {
        name: score.value,
        f"{name} lo": score.lo,
        f"{name} hi": score.hi,
        f"{name} is": ABOVE_CHANCE if score.is_above else AT_CHANCE,
    }


# ------------------------------------------------------------------------------- for people to read


class OverviewColumn(NamedTuple):
    """A column as people read it.

    Attributes
    ----------
    heading : str
    texts : list of str
        A cell for each row.
    keys : list
        What rows are sorted by: a number or text for each row, None where nothing was measured.
    notes : list of str
        More about each cell, empty where there is none.
    """

    heading: str
    texts: list[str]
    keys: list[float | str | None]
    notes: list[str]


def overview_columns(table: pd.DataFrame) -> list[OverviewColumn]:
    """Put the columns of :func:`overview_table` into words.

    Parameters
    ----------
    table : DataFrame
        Of :func:`overview_table`; a column `run` in front is kept.

    Returns
    -------
    list of OverviewColumn
    """
    columns = [
        _text_column(name, table[name]) for name in ("run", "task", "model") if name in table
    ]
    if table.pooling.nunique() > 1:
        columns.append(_text_column("pooling", table.pooling))
    columns += [
        _text_column("best layer", table["best layer"]),
        _text_column("measured by", table.metric.map(metric_words)),
        _score_column("score", table, "value", ("lo", "hi"), is_guess=table["is a guess"]),
        _plateau_column(table),
    ]
    if "selectivity" in table:
        ends = ("selectivity lo", "selectivity hi")
        columns.append(_score_column("selectivity", table, "selectivity", ends))
    if "answer" in table:
        columns.append(_answer_column(table))
    for control, words in CONTROL_WORDS.items():
        if control in table:
            columns.append(_control_column(control, words, table))
    return columns


def overview_for_people(table: pd.DataFrame) -> pd.DataFrame:
    """Return the overview with one cell for a score and its interval, and ✓ for good controls.

    Parameters
    ----------
    table : DataFrame
        Of :func:`overview_table`.

    Returns
    -------
    DataFrame
        Text in every cell: "0.85 [0.82, 0.87]" is a score with its 95 % interval; ✓ is a control
        that is no better than what guesses score; – was not measured.
    """
    columns = overview_columns(table)
    return pd.DataFrame({column.heading: column.texts for column in columns})


def control_notes(table: pd.DataFrame) -> list[str]:
    """Say what it means of each control that is somewhere above chance.

    Parameters
    ----------
    table : DataFrame
        Of :func:`overview_table`.
    """
    return [
        f"{capitalise(words)} above chance: {CONTROL_MEANING[control]}."
        for control, words in CONTROL_WORDS.items()
        if f"{control} is" in table and (table[f"{control} is"] == ABOVE_CHANCE).any()
    ]


def _text_column(heading: str, values: Iterable[str]) -> OverviewColumn:
    texts = [str(value) for value in values]
    return OverviewColumn(heading, texts, list(texts), [""] * len(texts))


def _score_column(
    heading: str,
    table: pd.DataFrame,
    name: str,
    ends: tuple[str, str],
    *,
    is_guess: pd.Series | None = None,
) -> OverviewColumn:
    texts = []
    keys: list[float | str | None] = []
    for place, value in enumerate(table[name]):
        if pd.isna(value):
            texts.append(MISSING)
            keys.append(None)
            continue
        lo, hi = (table[end].iloc[place] for end in ends)
        guess = ", no better than a guess" if is_guess is not None and is_guess.iloc[place] else ""
        texts.append(f"{value:.2f} [{lo:.2f}, {hi:.2f}]{guess}")
        keys.append(float(value))
    return OverviewColumn(heading, texts, keys, [""] * len(texts))


def _plateau_column(table: pd.DataFrame) -> OverviewColumn:
    texts = []
    notes = []
    for spans, count, layers in zip(
        table.plateau, table["plateau layers"], table.layers, strict=True
    ):
        texts.append(spans or MISSING)
        notes.append(f"{count:.0f} of {layers} layers" if spans else "")
    keys: list[float | str | None] = [text if text != MISSING else None for text in texts]
    return OverviewColumn("plateau", texts, keys, notes)


def _answer_column(table: pd.DataFrame) -> OverviewColumn:
    is_guess = table["answer is a guess"].fillna(False).astype(bool)
    ends = ("answer lo", "answer hi")
    column = _score_column("the model says", table, "answer", ends, is_guess=is_guess)
    texts = []
    for text, metric, answer_metric in zip(
        column.texts, table.metric, table["answer metric"], strict=True
    ):
        is_other = answer_metric not in ("", metric)
        texts.append(f"{text} ({metric_words(answer_metric)})" if is_other else text)
    return column._replace(texts=texts)


def _control_column(control: str, heading: str, table: pd.DataFrame) -> OverviewColumn:
    texts = []
    keys: list[float | str | None] = []
    notes = []
    for value, lo, hi, verdict in table[
        [control, f"{control} lo", f"{control} hi", f"{control} is"]
    ].itertuples(index=False):
        if pd.isna(value):
            texts.append(MISSING)
            keys.append(None)
            notes.append("")
            continue
        texts.append(CHECKED if verdict == AT_CHANCE else f"{verdict}: {value:.2f}")
        keys.append(float(value))
        notes.append(f"accuracy {value:.2f} [{lo:.2f}, {hi:.2f}]")
    return OverviewColumn(heading, texts, keys, notes)
