"""The same question in other words: what is still known, what is said, and how often it flips."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from probekit.answers.flips import FLIPS
from probekit.answers.scores import ANSWER
from probekit.extraction.answer_heads import ANSWER_POOLING
from probekit.probes.results import HEADLINE, best_layers, find_curve
from probekit.report.curves import CHANCE_ACCURACY, curve_traces
from probekit.report.known_and_said import (
    KNOWN_COLOUR,
    SAID_COLOUR,
    known_and_said,
    said_metric,
    with_interval,
)
from probekit.report.paper import LayerFigure, panels
from probekit.report.style import (
    FULL_PAGE,
    GREY,
    PALETTE,
    PANEL_LAYER_AXIS,
    SYMBOLS,
    apply_style,
    layer_number,
    legend_entry,
    metric_words,
    score_axis,
    task_words,
    tick_step,
    with_alpha,
)
from probekit.tasks.base import TaskInfo
from probekit.tasks.variants import wording_families

PLAIN = "plain"
VARIANT_WORDS = {
    "true_false": "true or false",
    "one_zero": "1 or 0",
    "a_b": "A: yes, B: no",
    "b_a": "A: no, B: yes",
}
# Neither those of probe and answer, and readable on white and on dark.
PLAIN_COLOUR = "#6b7285"
VARIANT_COLOURS = PALETTE[2:]


def wording_words(task: str, base: str) -> str:
    """Return what a wording is called: ``"plain"``, or the name of the variant."""
    if task == base:
        return PLAIN
    variant = task.removeprefix(f"{base}_")
    return VARIANT_WORDS.get(variant, variant.replace("_", " "))


def wording_table(
    table: pd.DataFrame,
    transfer: pd.DataFrame,
    tasks: dict[str, TaskInfo],
    *,
    probe: str = "logreg",
) -> pd.DataFrame:
    """Set the wordings of each question beside each other, for all trained models.

    Parameters
    ----------
    table : DataFrame
        The metrics table.
    transfer : DataFrame
        :attr:`probekit.probes.results.ProbeResults.transfer`.
    tasks : dict of str to TaskInfo
    probe : str
        The kind of probe.

    Returns
    -------
    DataFrame
        One row per question, model and wording: `task`, `model`, `wording`; `answer`, `tuned
        answer` and `probe` (the wording's own, at its best layer) as in
        :func:`probekit.report.known_and_said.answer_table`; `plain probe`: the logreg probe that
        was trained on the plain wording, on the states of this one, at the layer that is best for
        the plain wording; `answer flips` and `probe flips`: the share of examples that the answer,
        and each wording's probe at that layer, judge in another way than in the plain wording. All
        with the ends of their 95 % intervals; NaN where there is nothing to measure.
    """
    rows = []
    for base, names in wording_families(tasks).items():
        of_probe = _decoder_probes(table, base, probe=probe)
        for model in dict.fromkeys(of_probe.model):
            of_model = of_probe[of_probe.model == model]
            layer = _best_layer(of_model, tasks[base], base, probe=probe)
            for name in names:
                row = {"task": base, "model": model, "wording": wording_words(name, base)}
                row |= _known_and_said(table, name, tasks[name], model=model, probe=probe)
                of_wording = table[(table.task == name) & (table.model == model)]
                row |= _flips(of_wording, layer, pooling=of_model.pooling.iloc[0], probe=probe)
                of_transfer = plain_probe_curves(transfer, base, of_model.pooling.iloc[0])
                row |= _plain_probe(of_transfer, name, model=model, layer=layer)
                rows.append(row)
    columns = ["answer", "tuned answer", "probe", "plain probe", "answer flips", "probe flips"]
    with_bounds = [f"{name}{end}" for name in columns for end in ("", " lo", " hi")]
    return pd.DataFrame(rows).reindex(columns=["task", "model", "wording", *with_bounds])


def _decoder_probes(table: pd.DataFrame, task: str, *, probe: str) -> pd.DataFrame:
    """Return the rows of a task's probes of the decoder, on what answers are read from.

    Without answers there may be no such pooling; then it is the first one.
    """
    rows = table[
        (table.task == task)
        & (table.control == "none")
        & (table.probe == probe)
        & (table.stage == "lm")
    ]
    poolings = list(dict.fromkeys(rows.pooling))
    if not poolings:
        return rows
    pooling = ANSWER_POOLING if ANSWER_POOLING in poolings else poolings[0]
    return rows[rows.pooling == pooling]


def _best_layer(rows: pd.DataFrame, info: TaskInfo, task: str, *, probe: str) -> str:
    return str(best_layers(rows, {task: info}, probe=probe)["best layer"].iloc[0])


def _own_probe(
    table: pd.DataFrame, task: str, info: TaskInfo, *, model: str, probe: str
) -> dict[str, float]:
    """Return the score of a wording's own probe at its best layer, chosen on validation."""
    rows = _decoder_probes(table, task, probe=probe)
    rows = rows[rows.model == model]
    if rows.empty:
        return {}
    return with_interval("probe", best_layers(rows, {task: info}, probe=probe).iloc[0])


def _known_and_said(
    table: pd.DataFrame, task: str, info: TaskInfo, *, model: str, probe: str
) -> dict[str, float]:
    """Return the answer, and a wording's own probe by the same metric."""
    both = known_and_said(table, task, info, model=model, probe=probe)
    if both is None:
        return _own_probe(table, task, info, model=model, probe=probe)
    columns = with_interval("answer", both.said) | with_interval("probe", both.known)
    return columns if both.tuned is None else columns | with_interval("tuned answer", both.tuned)


def _flips(rows: pd.DataFrame, layer: str, *, pooling: str, probe: str) -> dict[str, float]:
    flips = rows[(rows.metric == FLIPS) & (rows.control == "none") & (rows.pooling == pooling)]
    columns: dict[str, float] = {}
    of_answer = flips[flips.probe == ANSWER]
    if len(of_answer):
        columns |= with_interval("answer flips", of_answer.iloc[0])
    of_probe = flips[(flips.probe == probe) & (flips.layer == layer)]
    if len(of_probe):
        columns |= with_interval("probe flips", of_probe.iloc[0])
    return columns


def _plain_probe(rows: pd.DataFrame, task: str, *, model: str, layer: str) -> dict[str, float]:
    rows = rows[(rows.model == model) & (rows.task == task) & (rows.layer == layer)]
    return with_interval("plain probe", rows.iloc[0]) if len(rows) else {}


def plain_probe_curves(transfer: pd.DataFrame, base: str, pooling: str) -> pd.DataFrame:
    """Return the scores of probes of the plain wording on the states of the other wordings."""
    if transfer.empty:
        return pd.DataFrame(columns=["model", "task", "layer", "value", "lo", "hi", "n"])
    return transfer[
        (transfer.probe_task == base)
        & (transfer.task != base)
        & (transfer.pooling == pooling)
        & (transfer.control == "none")
    ]


# -------------------------------------------------------------------------------------- the figure


def wordings_figure(
    table: pd.DataFrame,
    transfer: pd.DataFrame,
    tasks: dict[str, TaskInfo],
    base: str,
    *,
    probe: str = "logreg",
) -> LayerFigure:
    """Draw a question in all its wordings: a row of three panels per model.

    Parameters
    ----------
    table, transfer : DataFrame
        The metrics table and the transfer table.
    tasks : dict of str to TaskInfo
    base : str
        The task whose wordings are drawn.
    probe : str
        The kind of probe; on other wordings than its own it is always ``"logreg"``.

    Returns
    -------
    Figure
        Left, by layer: probes of the plain wording, on the states of each wording. Middle: what is
        answered, and what each wording's own probe scores. Right: how often both judge in another
        way than in the plain wording.

    Raises
    ------
    ValueError
        There are no such probes of the decoder.
    """
    names = wording_families(tasks)[base]
    rows = wording_table(table, transfer, {name: tasks[name] for name in names}, probe=probe)
    models = list(dict.fromkeys(rows.model))
    if not models:
        raise ValueError(
            f"no {probe} probes of decoder layers for {base} in these results: set probe to one "
            "that was trained, and extract with the stage lm"
        )
    metric = HEADLINE[tasks[base].kind]
    titles = [
        f"{models[0]}: the plain wording’s probe",
        "answer, and each wording’s probe",
        "judged in another way",
    ]
    for model in models[1:]:
        titles += [model, "", ""]
    panel_height = 90 + 24 * max(6, len(names))
    figure = panels(
        len(models),
        3,
        subplot_titles=titles,
        column_widths=[0.42, 0.29, 0.29],
        horizontal_spacing=0.1,
        vertical_spacing=45 / (panel_height * len(models)),
    )
    all_curves: list[pd.DataFrame] = []
    for place, model in enumerate(models, 1):
        curves = _wording_curves(table, transfer, base, model=model, metric=metric)
        all_curves += curves.values()
        for name, curve in curves.items():
            look = _look(names.index(name))
            traces = curve_traces(
                curve,
                name=wording_words(name, base),
                control="none",
                colour=look["color"],
                symbol=look["symbol"],
                metric=metric,
                dash=look["dash"],
            )
            for trace in traces[-2:]:  # without a plateau, which says nothing of other wordings
                trace.showlegend = False
                figure.add_trace(trace, row=place, col=1)
        layers = layer_number(table[(table.model == model) & (table.stage == "lm")].layer)
        figure.update_xaxes(dtick=tick_step(layers.nunique()), row=place, col=1)
        _add_dots(figure, rows[rows.model == model], row=place)
    figure.add_traces(_legend(names, base))
    apply_style(
        figure,
        title="The same question in other words",
        subtitle=task_words(base),
        height=174 + panel_height * len(models),
        width=FULL_PAGE,
        panel_titles=True,
    )
    drawn = pd.concat(all_curves)
    axis = score_axis(metric, float(drawn.lo.min()), float(drawn.hi.max()))
    figure.update_yaxes(title=f"{metric_words(metric)} (test)", **axis, col=1)
    figure.update_xaxes(range=[-0.02, 1.02], dtick=0.25, col=2)
    figure.update_xaxes(range=[-0.02, 1.02], dtick=0.25, tickformat=".0%", col=3)
    middle = said_metric(tasks[base]) if rows.answer.notna().any() else metric
    titles_below = (PANEL_LAYER_AXIS, f"{metric_words(middle)} (test)", "share of test examples")
    for column, title in enumerate(titles_below, 1):
        figure.update_xaxes(title=title, row=len(models), col=column)
    return figure


def _look(place: int) -> dict[str, str]:
    """Return colour, dash and symbol of the curve of a wording; the plain one is the first."""
    if place == 0:
        return {"color": PLAIN_COLOUR, "dash": "solid", "symbol": SYMBOLS[0]}
    colour = VARIANT_COLOURS[(place - 1) % len(VARIANT_COLOURS)]
    dash = "solid" if place <= len(VARIANT_COLOURS) else "dash"
    return {"color": colour, "dash": dash, "symbol": SYMBOLS[place % len(SYMBOLS)]}


def _wording_curves(
    table: pd.DataFrame, transfer: pd.DataFrame, base: str, *, model: str, metric: str
) -> dict[str, pd.DataFrame]:
    """Return by wording the curve of the probes of the plain one; they are of logreg probes."""
    of_probe = _decoder_probes(table, base, probe="logreg")
    plain = find_curve(of_probe[of_probe.model == model], probe="logreg", metric=metric)
    if plain.empty:
        return {}
    others = plain_probe_curves(transfer, base, plain.pooling.iloc[0])
    curves = {base: plain}
    for name, curve in others[others.model == model].groupby("task", sort=False):
        curves[str(name)] = curve.assign(plateau=False)
    return {name: curve.reset_index(drop=True) for name, curve in curves.items()}


def _add_dots(figure: go.Figure, rows: pd.DataFrame, *, row: int) -> None:
    """Draw answers and probes of each wording with their intervals, and how often they flip."""
    for column, name, colour, symbol, panel in (
        ("probe", "the wording’s own probe", KNOWN_COLOUR, "circle", 2),
        ("answer", "the model’s answer", SAID_COLOUR, "diamond", 2),
        ("probe flips", "the wording’s own probe", KNOWN_COLOUR, "circle", 3),
        ("answer flips", "the model’s answer", SAID_COLOUR, "diamond", 3),
    ):
        of_column = rows.reset_index(drop=True)
        of_column = of_column[of_column[column].notna()]
        share = ".1%" if column.endswith("flips") else ".3f"
        figure.add_scatter(
            x=of_column[column],
            y=of_column.index,
            mode="markers",
            marker={"color": colour, "size": 9, "symbol": symbol},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": of_column[f"{column} hi"] - of_column[column],
                "arrayminus": of_column[column] - of_column[f"{column} lo"],
                "color": with_alpha(colour, 0.6),
                "thickness": 1.5,
                "width": 3,
            },
            customdata=of_column[["wording", f"{column} lo", f"{column} hi"]],
            hovertemplate=(
                f"<b>%{{customdata[0]}}</b><br>{name}: %{{x:{share}}} "
                f"[%{{customdata[1]:{share}}}, %{{customdata[2]:{share}}}]<extra></extra>"
            ),
            showlegend=False,
            row=row,
            col=panel,
        )
    figure.add_vline(CHANCE_ACCURACY, line={"color": GREY, "dash": "dot"}, row=row, col=2)
    places = list(range(len(rows)))
    axis = {"range": [len(rows) - 0.5, -0.5], "tickvals": places, "ticktext": list(rows.wording)}
    figure.update_yaxes(**axis, row=row, col=2)
    figure.update_yaxes(**axis, showticklabels=False, row=row, col=3)


def _legend(names: Sequence[str], base: str) -> list[go.Scatter]:
    entries = []
    for place, name in enumerate(names):
        look = _look(place)
        entry = legend_entry(
            wording_words(name, base),
            line={"color": look["color"], "dash": look["dash"], "width": 2.5},
            mode="lines+markers",
            marker={"symbol": look["symbol"], "size": 7},
        )
        entries.append(entry)
    for name, colour, symbol in (
        ("each wording’s probe", KNOWN_COLOUR, "circle"),
        ("answer", SAID_COLOUR, "diamond"),
    ):
        marker = {"color": colour, "size": 9, "symbol": symbol}
        entries.append(legend_entry(name, mode="markers", marker=marker))
    return entries


# ------------------------------------------------------------------------------------- in sentences


def wording_sentence(rows: pd.DataFrame) -> str:
    """Say how much the answer hangs on the wording; ``""`` without answers in several wordings.

    Parameters
    ----------
    rows : DataFrame
        Those of one task and model out of :func:`wording_table`.
    """
    flips = rows[rows["answer flips"].notna()]
    if flips.empty:
        return ""
    parts = []
    for row in flips.sort_values("answer flips", ascending=False).to_dict("records"):
        interval = f"[{row['answer flips lo']:.0%}, {row['answer flips hi']:.0%}]"
        probe = f" ({row['probe flips']:.0%})" if pd.notna(row["probe flips"]) else ""
        parts.append(f"{row['wording']} {row['answer flips']:.0%} {interval}{probe}")
    return (
        "In other words, the verdict of the model changes on this share of the test examples (in "
        f"brackets that of the wording's own probe): {'; '.join(parts)}."
    )
