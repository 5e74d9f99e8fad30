"""What each layer knows beside what the model says: the first picture of a run."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probekit.answers.reading import LENS, TUNED_LENS
from probekit.answers.scores import ANSWER
from probekit.extraction.answer_heads import ANSWER_POOLING
from probekit.probes.controls import CONTROL_WORDS
from probekit.probes.results import find_curve
from probekit.report.curves import (
    BAND_OPACITY,
    control_band,
    control_band_name,
    controls_above_chance,
    curve_traces,
)
from probekit.report.paper import LayerFigure, panels
from probekit.report.style import (
    CONTROL_DASHES,
    FULL_PAGE,
    GREY,
    HALF_PAGE,
    LAYER_AXIS,
    PALETTE,
    PANEL_LAYER_AXIS,
    PLATEAU_OPACITY,
    PLATEAU_WIDTH,
    SYMBOLS,
    apply_style,
    band,
    layer_number,
    legend_entry,
    metric_words,
    set_score_axis,
    task_words,
    tick_step,
    with_alpha,
)
from probekit.tasks.base import TaskInfo

KNOWN_COLOUR, SAID_COLOUR, LENS_COLOUR = PALETTE[:3]
LENS_DASHES = {LENS: "solid", TUNED_LENS: "dash"}
# Entries of the legend.
KNOWN = "probe: known"
PLATEAU = "plateau of the probe"
LENS_WORDS = {LENS: "lens: would be said", TUNED_LENS: "tuned lens"}
SAID = "answer: said"
SAID_TUNED = "answer, tuned threshold"
GAP = "probe less answer"
BAND = "all controls"
PANELS_PER_ROW = 2
# A line that lies closer to another one is not drawn a second time.
NEAR = 0.01


class KnownAndSaid(NamedTuple):
    """What a model knows of a task at its best layer, and what it says.

    Attributes
    ----------
    task, model, control : str
    metric : str
        ``"accuracy"``, or ``"top1_accuracy"`` of a task with several answers.
    layer : str
        The best layer of the probe, chosen on validation.
    known, said : Series
        Rows of the metrics table with `value`, `lo`, `hi`: the probe there, and the answer.
    tuned : Series or None
        The answer with the threshold chosen on validation; None where it has none.
    over_answer, known_not_said : Series
        How far the probe is above the answer, paired, and the share of examples that it gets right
        and the model answers wrongly.
    says_yes : float
        The share of examples that the model says yes to; NaN where that is no answer.
    """

    task: str
    model: str
    control: str
    metric: str
    layer: str
    known: pd.Series
    said: pd.Series
    tuned: pd.Series | None
    over_answer: pd.Series
    known_not_said: pd.Series
    says_yes: float


def said_metric(info: TaskInfo) -> str:
    """Return the metric by which a task's probes and answers are compared."""
    return "accuracy" if info.kind == "binary" else "top1_accuracy"


def models_with_answers(table: pd.DataFrame, task: str) -> list[str]:
    """Return the trained models whose answers to a task are in the metrics table."""
    rows = table[(table.task == task) & (table.probe == ANSWER) & (table.control == "none")]
    return list(dict.fromkeys(rows.model))


def known_and_said(
    table: pd.DataFrame,
    task: str,
    info: TaskInfo,
    *,
    model: str,
    probe: str = "logreg",
    control: str = "none",
) -> KnownAndSaid | None:
    """Compare a model's answer with the probe at its best layer, on the same test images.

    Parameters
    ----------
    table : DataFrame
        The metrics table.
    task : str
    info : TaskInfo
        Of the task.
    model, probe : str
    control : str
        ``"none"`` or ``"untrained"``.

    Returns
    -------
    KnownAndSaid or None
        None where the table has no answers of the model, or no probes on what they are read from.
    """
    rows = table[(table.task == task) & (table.model == model) & (table.control == control)]
    rows = rows[rows.pooling == ANSWER_POOLING]
    is_answer = (rows.probe == ANSWER) & (rows.split == "test")
    of_yes = rows[is_answer & (rows["class"] == "yes")].set_index("metric").value
    rows = rows[rows["class"] == ""]
    of_answer = rows[(rows.probe == ANSWER) & (rows.split == "test")].set_index("metric")
    of_probe = rows[(rows.probe == probe) & (rows.stage == "lm")]
    if of_answer.empty or "over_answer" not in set(of_probe.metric):
        return None
    first_seed = of_probe[of_probe.seed == of_probe.seed.iloc[0]]
    is_chosen_by = (first_seed.split == "validation") & (first_seed.metric == "accuracy")
    scores = first_seed[is_chosen_by].set_index("layer").value
    layer = str(scores.idxmax())
    at_layer = first_seed[(first_seed.layer == layer) & (first_seed.split == "test")]
    at_layer = at_layer.set_index("metric")
    metric = said_metric(info)
    has_tuned = info.kind == "binary"
    return KnownAndSaid(
        task,
        model,
        control,
        metric,
        layer,
        known=at_layer.loc[metric],
        said=of_answer.loc[metric],
        tuned=of_answer.loc["accuracy_tuned"] if has_tuned else None,
        over_answer=at_layer.loc["over_answer"],
        known_not_said=at_layer.loc["known_not_said"],
        says_yes=_share_of_yes(of_yes) if has_tuned else np.nan,
    )


def _share_of_yes(counts: pd.Series) -> float:
    """Return the share of examples that are answered with yes, from counts of right and wrong."""
    return float((counts["tp"] + counts["fp"]) / counts[["tp", "fp", "fn", "tn"]].sum())


def answer_table(
    table: pd.DataFrame, tasks: dict[str, TaskInfo], *, probe: str = "logreg"
) -> pd.DataFrame:
    """Set the answers of all models beside their best probes.

    Parameters
    ----------
    table : DataFrame
        The metrics table.
    tasks : dict of str to TaskInfo
    probe : str

    Returns
    -------
    DataFrame
        One row per task, model and control ("none", "untrained"): `best layer`, `says yes` (the
        share of examples, without an interval), `answer`, `tuned answer`, `probe` (at the best
        layer), `over answer` (the probe less the answer, paired on the same test images) and
        `known, not said`, with the ends of their 95 % intervals.
    """
    rows = []
    for task, info in tasks.items():
        for model in models_with_answers(table, task):
            for control in ("none", "untrained"):
                both = known_and_said(table, task, info, model=model, probe=probe, control=control)
                if both is not None:
                    rows.append(_answer_row(both))
    return pd.DataFrame(rows)


def _answer_row(both: KnownAndSaid) -> dict[str, object]:
    row: dict[str, object] = {
        "task": both.task,
        "model": both.model,
        "control": both.control,
        "best layer": both.layer,
        "n": int(both.over_answer.n),
        "says yes": both.says_yes,
    }
    columns = {
        "answer": both.said,
        "tuned answer": both.tuned,
        "probe": both.known,
        "over answer": both.over_answer,
        "known, not said": both.known_not_said,
    }
    for name, score in columns.items():
        if score is not None:
            row |= with_interval(name, score)
    return row


def with_interval(name: str, score: pd.Series) -> dict[str, float]:
    """Return the columns of a score and of the ends of its interval."""
    return {name: score.value, f"{name} lo": score.lo, f"{name} hi": score.hi}


# -------------------------------------------------------------------------------------- the figure


def known_and_said_figure(
    table: pd.DataFrame, task: str, info: TaskInfo, *, probe: str = "logreg"
) -> LayerFigure:
    """Draw what each layer knows, what it would say, and what the model says; a panel per model.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table.
    task : str
        A task that has answers.
    info : TaskInfo
        Of the task.
    probe : str
        The kind of probe.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        The table has no answers to this task.
    """
    models = models_with_answers(table, task)
    if not models:
        raise ValueError(
            f"no answers of a trained model to {task} in these results: extract with answers, for "
            "a task that has some"
        )
    columns = min(PANELS_PER_ROW, len(models))
    panel_rows = -(-len(models) // columns)
    figure = panels(
        panel_rows,
        columns,
        subplot_titles=models,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.27 / panel_rows,
    )
    rows = table[(table.task == task) & (table.pooling == ANSWER_POOLING)]
    above = controls_above_chance(table, task, info, probe=probe, pooling=ANSWER_POOLING)
    for place, model in enumerate(models):
        panel = {"row": place // columns + 1, "col": place % columns + 1}
        of_model = rows[rows.model == model]
        both = known_and_said(table, task, info, model=model, probe=probe)
        traces = _panel_traces(of_model, metric=said_metric(info), probe=probe, above=above)
        for trace in traces:
            figure.add_trace(trace, **panel)
        if both is not None:
            _mark_gap(figure, both, panel)
            figure.layout.annotations[place].text += _gap_words(both)
        layers = of_model[of_model.stage == "lm"].layer.nunique()
        axis = LAYER_AXIS if columns == 1 else PANEL_LAYER_AXIS
        figure.update_xaxes(title=axis, dtick=tick_step(layers), **panel)
    controls = _controls(rows[rows.model.isin(models)], metric=said_metric(info), probe=probe)
    drawn = {trace.legendgroup for trace in figure.data}
    figure.add_traces(_legend(drawn, controls, metric=said_metric(info), above=above))
    apply_style(
        figure,
        title="Known and said",
        subtitle=task_words(task),
        height=150 + 330 * panel_rows,
        width=FULL_PAGE if columns > 1 else HALF_PAGE,
        panel_titles=True,
    )
    figure.update_yaxes(title=f"{metric_words(said_metric(info))} (test)", col=1)
    set_score_axis(figure, said_metric(info))
    return figure


def _panel_traces(
    rows: pd.DataFrame, *, metric: str, probe: str, above: Collection[tuple[str, str]]
) -> list[go.Scatter]:
    """Return the traces of one model: controls, answer, lens and probe, from back to front.

    Each is in the group of its entry of the legend.
    """
    numbers = layer_number(rows[rows.stage == "lm"].layer)
    ends = [int(numbers.min()), int(numbers.max())]
    trained = rows[rows.control == "none"]
    is_said = (trained.probe == ANSWER) & (trained.split == "test") & (trained["class"] == "")
    of_answer = trained[is_said].set_index("metric")
    chance = float(of_answer.value["guess"])
    controls = _controls(rows, metric=metric, probe=probe)
    traces = control_band(controls, metric=metric, chance=chance, apart=above, in_legend=False)
    line = go.Scatter(
        x=ends,
        y=[chance] * 2,
        mode="lines",
        line={"color": GREY, "dash": "dot", "width": 1.5},
        showlegend=False,
        hoverinfo="skip",
    )
    traces.append(line)
    for control in CONTROL_DASHES:
        curve = controls[controls.control == control] if len(controls) else controls
        if len(curve) and (curve.model.iloc[0], control) in above:
            line = curve_traces(
                curve.reset_index(drop=True),
                name=f"probe, {CONTROL_WORDS[control]}",
                control=control,
                colour=KNOWN_COLOUR,
                symbol=SYMBOLS[0],
                metric=metric,
            )[-1]
            traces.append(line.update(showlegend=False))
    traces += _answer_traces(of_answer, metric=metric, ends=ends)
    for kind, name, colour, symbol in (
        (TUNED_LENS, "tuned lens", LENS_COLOUR, SYMBOLS[1]),
        (LENS, "lens", LENS_COLOUR, SYMBOLS[1]),
        (probe, "probe", KNOWN_COLOUR, SYMBOLS[0]),
    ):
        curve = find_curve(trained, probe=kind, metric=metric, stage="lm").reset_index(drop=True)
        if curve.empty:
            continue
        drawn = curve_traces(
            curve, name=name, control="none", colour=colour, symbol=symbol, metric=metric
        )
        if kind in LENS_DASHES:  # its plateau says nothing: it ends in the answer
            drawn = drawn[-2:]
            drawn[-1].line.update(width=2, dash=LENS_DASHES[kind])
            drawn[-1].marker.size = 5
        for trace in drawn:
            is_plateau = (trace.name or "").endswith(", plateau")
            group = PLATEAU if is_plateau else LENS_WORDS.get(kind, KNOWN)
            trace.update(showlegend=False, legendgroup=group)
        traces += drawn
    return traces


def _controls(rows: pd.DataFrame, *, metric: str, probe: str) -> pd.DataFrame:
    """Return the scores of all controls of the decoder's layers."""
    curves = [
        find_curve(rows, probe=probe, metric=metric, control=control, stage="lm")
        for control in CONTROL_DASHES
    ]
    return pd.concat([curve for curve in curves if len(curve)] or curves[:1])


def _answer_traces(of_answer: pd.DataFrame, *, metric: str, ends: list[int]) -> list[go.Scatter]:
    """Return the answer as a line across with its band, and with its best threshold dashed."""
    said = of_answer.loc[metric]
    traces = [
        band(ends, np.full(2, said.lo), np.full(2, said.hi), colour=SAID_COLOUR, legendgroup=SAID),
        _level(said, ends, name="the model’s answer", dash="solid", metric=metric),
    ]
    if "accuracy_tuned" in of_answer.index and metric == "accuracy":
        tuned = of_answer.loc["accuracy_tuned"]
        if abs(tuned.value - said.value) >= NEAR:
            name = "its answer, yes from another probability on"
            traces.append(_level(tuned, ends, name=name, dash="dash", metric=metric))
    return traces


def _level(score: pd.Series, ends: list[int], *, name: str, dash: str, metric: str) -> go.Scatter:
    # Points in between, so that hovering anywhere on the line shows it.
    x = np.arange(ends[0], ends[1] + 1)
    return go.Scatter(
        x=x,
        y=np.full(len(x), score.value),
        mode="lines",
        line={"color": SAID_COLOUR, "width": 2.5 if dash == "solid" else 1.5, "dash": dash},
        showlegend=False,
        legendgroup=SAID if dash == "solid" else SAID_TUNED,
        hovertemplate=(
            f"<b>{name}</b><br>{metric_words(metric)} {score.value:.3f} "
            f"[{score.lo:.3f}, {score.hi:.3f}]<br>n = {score.n:,.0f}<extra></extra>"
        ),
    )


def _mark_gap(figure: go.Figure, both: KnownAndSaid, panel: dict[str, int]) -> None:
    """Draw a line from the answer up to the probe at its best layer."""
    place = int(both.layer.partition(".")[2])
    gap = both.over_answer
    figure.add_scatter(
        x=[place, place],
        y=[both.said.value, both.said.value + gap.value],
        mode="lines",
        meta={"is_mark": True},  # a difference is no row in a table of levels
        line={"color": SAID_COLOUR, "width": 2, "dash": "dot"},
        showlegend=False,
        legendgroup=GAP,
        hovertemplate=(
            f"<b>known, not said</b>, {both.layer}<br>probe less answer {gap.value:+.3f} "
            f"[{gap.lo:+.3f}, {gap.hi:+.3f}]<br>right in the probe, wrong in the answer: "
            f"{both.known_not_said.value:.1%} of {gap.n:,.0f}<extra></extra>"
        ),
        **panel,
    )


def _gap_words(both: KnownAndSaid) -> str:
    """Return a second line of a panel's title: how far the probe is above the answer."""
    gap = both.over_answer
    numbers = f"{gap.value:+.2f} [{gap.lo:+.2f}, {gap.hi:+.2f}]"
    return f'<br><span style="color:{SAID_COLOUR}">{numbers}</span>'


def _legend(
    drawn: Collection[str | None],
    controls: pd.DataFrame,
    *,
    metric: str,
    above: Collection[tuple[str, str]],
) -> list[go.Scatter]:
    """Return the entries of the groups that are drawn; no curve has one of its own."""
    said = {"color": SAID_COLOUR}
    lens = {"color": LENS_COLOUR, "width": 2}
    lines = {
        KNOWN: {"color": KNOWN_COLOUR, "width": 2.5},
        PLATEAU: {"color": with_alpha(KNOWN_COLOUR, PLATEAU_OPACITY), "width": PLATEAU_WIDTH},
        **{words: lens | {"dash": LENS_DASHES[kind]} for kind, words in LENS_WORDS.items()},
        SAID: said | {"width": 2.5},
        SAID_TUNED: said | {"width": 1.5, "dash": "dash"},
        GAP: said | {"width": 2, "dash": "dot"},
    }
    entries = [legend_entry(name, line=line) for name, line in lines.items() if name in drawn]
    for control, dash in CONTROL_DASHES.items():
        if control in drawn:
            line = {"color": KNOWN_COLOUR, "width": 1.5, "dash": dash}
            name = f"probe, {CONTROL_WORDS[control]}"
            entries.append(legend_entry(name, legendgroup=control, line=line))
    if BAND in drawn:
        is_apart = [pair in above for pair in zip(controls.model, controls.control, strict=True)]
        others = controls[~np.array(is_apart, bool)]
        has_others = len(others) < len(controls)
        name = control_band_name(others, metric=metric, with_chance=True, has_others=has_others)
        line = {"color": with_alpha(GREY, 2 * BAND_OPACITY), "width": PLATEAU_WIDTH}
        entries.append(legend_entry(name, legendgroup=BAND, line=line))
    return entries
