"""Several kinds of curves in one figure: global and local tasks, stages, poolings, prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probekit.probes.results import select_curve
from probekit.report.curves import curve_traces
from probekit.report.paper import LayerFigure, panel_grid, panels
from probekit.report.style import (
    FULL_PAGE,
    GREY,
    PANEL_LAYER_AXIS,
    ROOM,
    SMALLEST_SPAN,
    SYMBOLS,
    apply_style,
    first_pooling,
    layer_number,
    legend_entry,
    metric_words,
    model_colours,
    model_looks,
    pooling_note,
    score_axis,
    set_score_axis,
    task_words,
    tick_step,
    title_by_layer,
    with_alpha,
)
from probekit.tasks.base import TaskInfo

# Name of each stage, and where it begins and ends on the axis of `stage_curves`.
STAGES = {
    "vision": ("image encoder", 0.0, 1.0),
    "projector": ("projector", 1.18, 1.18),
    "lm": ("decoder", 1.36, 2.36),
    "experts": ("experts", 2.54, 3.54),  # where there are some
}
TASK_DASHES = ("solid", "dash", "dot", "dashdot")
BAND_OPACITY = 0.15
MOST_BANDS = 2  # that lie over each other at full opacity


def global_and_local(
    table: pd.DataFrame, tasks: dict[str, TaskInfo], *, probe: str = "logreg"
) -> LayerFigure:
    """Draw accuracy of global and local tasks by layer, and one against the other, a row per model.

    Left: accuracy by layer of the first binary task, which is the global one, and of all
    multilabel tasks, which are local. Right: each point is a layer; the filled ones are those that
    no other layer beats at both tasks: along them one is traded for the other.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table.
    tasks : dict of str to TaskInfo
        With a binary and a multilabel task.
    probe : str
        The kind of probe.

    Returns
    -------
    Figure
        Two panels per model.
    """
    global_task = next(name for name, info in tasks.items() if info.kind == "binary")
    local_tasks = [name for name, info in tasks.items() if info.kind == "multilabel"]
    trained = table[table.control == "none"]
    rows, pooling_words = first_pooling(select_curve(trained, probe=probe, metric="accuracy"))
    models = list(dict.fromkeys(rows.model))
    colours = model_colours(table)
    dashes = dict(zip([global_task, *local_tasks], TASK_DASHES, strict=False))

    panel_titles = []
    for model in models:
        panel_titles += [model, ""]
    figure = panels(
        len(models),
        2,
        column_widths=[0.58, 0.42],
        horizontal_spacing=0.12,
        vertical_spacing=0.22 / len(models),
        subplot_titles=panel_titles,
    )
    for panel, model in enumerate(models, 1):
        curves = {}
        for task, dash in dashes.items():
            of_task = (rows.model == model) & (rows.task == task)
            curve = rows[of_task].reset_index(drop=True)
            curves[task] = curve
            is_global = task == global_task
            traces = curve_traces(
                curve,
                name=f"{model}, {task}",
                control="none",
                colour=colours[model],
                symbol=SYMBOLS[0] if is_global else SYMBOLS[1],
                metric="accuracy",
                dash=dash,
            )
            # Several curves share one colour, so their plateaus are left out.
            band, line = traces[-2:]
            line.update(showlegend=False)
            figure.add_trace(band, row=panel, col=1)
            figure.add_trace(line, row=panel, col=1)
            best = curve.loc[curve.value.idxmax()]
            figure.add_scatter(
                x=[int(best.layer.partition(".")[2])],
                y=[best.value],
                mode="markers",
                marker={"symbol": "star", "size": 14, "color": colours[model]},
                showlegend=False,
                hovertemplate=(
                    f"<b>{model}, peak of {task}</b><br>{best.layer}: accuracy %{{y:.3f}}"
                    "<extra></extra>"
                ),
                row=panel,
                col=1,
            )
        trade_traces = _trade_traces(
            curves[global_task],
            curves[local_tasks[0]],
            colour=colours[model],
            global_task=global_task,
            local_task=local_tasks[0],
            model=model,
        )
        for trace in trade_traces:
            figure.add_trace(trace, row=panel, col=2)
        values = pd.concat(curves.values())
        axis = score_axis("accuracy", values.lo.min(), values.hi.max())
        figure.update_yaxes(title="accuracy (test)", **axis, row=panel, col=1)
        figure.update_yaxes(title=f"{global_task} (global)", **axis, row=panel, col=2)
        start = min(curves[local_tasks[0]].value.min() - ROOM, 1 - SMALLEST_SPAN)
        figure.update_xaxes(range=[max(start, -ROOM), 1 + ROOM], row=panel, col=2)

    for task, dash in dashes.items():
        kind = "global" if task == global_task else "local"
        line = {"dash": dash, "color": GREY, "width": 2.5}
        figure.add_trace(legend_entry(f"{task} ({kind})", line=line))
    marker = {"color": GREY, "size": 9}
    filled = legend_entry("no other layer is better at both", mode="markers", marker=marker)
    figure.add_trace(filled)
    star = {"color": GREY, "size": 12, "symbol": "star"}
    figure.add_trace(legend_entry("peak", mode="markers", marker=star))
    apply_style(
        figure,
        title="Global against local semantics",
        subtitle=f"accuracy{pooling_words}",
        height=170 + 270 * len(models),
        width=FULL_PAGE,
        panel_titles=True,
    )
    figure.update_xaxes(title=PANEL_LAYER_AXIS, row=len(models), col=1)
    figure.update_xaxes(dtick=tick_step(rows.layer.nunique()), col=1)
    return figure.update_xaxes(title=f"{local_tasks[0]} (local)", row=len(models), col=2)


def _trade_traces(
    global_curve: pd.DataFrame,
    local_curve: pd.DataFrame,
    *,
    colour: str,
    global_task: str,
    local_task: str,
    model: str,
) -> list[go.Scatter]:
    """Return the path from layer to layer, and its points: filled where no layer beats both."""
    x = local_curve.value.to_numpy()
    y = global_curve.value.to_numpy()
    at_least_as_good = (x >= x[:, None]) & (y >= y[:, None])
    better = (x > x[:, None]) | (y > y[:, None])
    is_beaten = (at_least_as_good & better).any(axis=1)
    path = go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": with_alpha(colour, 0.4), "width": 1.5},
        hoverinfo="skip",
        showlegend=False,
    )
    hover = (
        f"<b>{model}</b>, %{{customdata}}<br>{local_task} %{{x:.3f}}<br>{global_task} %{{y:.3f}}"
        "<extra></extra>"
    )
    points = go.Scatter(
        x=x,
        y=y,
        mode="markers+text",
        text=[
            str(number) if place == 0 or not is_beaten[place] else ""
            for place, number in enumerate(layer_number(global_curve.layer))
        ],
        textposition="top center",
        textfont={"size": 10},
        showlegend=False,
        customdata=global_curve.layer,
        marker={
            "size": 9,
            "color": np.where(is_beaten, "rgba(0,0,0,0)", colour),
            "line": {"color": colour, "width": 1.5},
        },
        hovertemplate=hover,
    )
    return [path, points]


def stage_curves(
    table: pd.DataFrame, task: str, metric: str, *, probe: str = "logreg"
) -> LayerFigure:
    """Draw image encoder, projector and decoder on one axis, by relative depth within each stage.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table, with more stages than the decoder.
    task, metric, probe : str
        What to draw.

    Returns
    -------
    Figure
        One panel.
    """
    figure = LayerFigure()
    looks = model_looks(table)
    trained = table[(table.task == task) & (table.control == "none")]
    shown = dict(STAGES)
    if not (trained.stage == "experts").any():
        shown.pop("experts")
    # Experts and the decoder have poolings that the image encoder has not.
    stages_of_pooling = trained[trained.stage.isin(shown)].groupby("pooling", sort=False).stage
    pooling = stages_of_pooling.nunique().idxmax()
    rows = trained[trained.pooling == pooling]
    in_legend = set()
    for model in dict.fromkeys(trained.model):
        for stage, (_, start, end) in shown.items():
            part = rows[(rows.model == model) & (rows.stage == stage)]
            if len(part) == 0:
                continue
            curve = select_curve(part, probe=probe, metric=metric, stage=stage)
            share_of_stage = np.arange(len(curve)) / max(1, len(curve) - 1)
            x = start + share_of_stage * (end - start)
            traces = curve_traces(
                curve,
                name=model,
                control="none",
                colour=looks[model].colour,
                symbol=looks[model].symbol,
                metric=metric,
                dash=looks[model].dash,
            )
            for trace in traces:
                trace.x = [*x, *x[::-1]] if trace.fill else x
                trace.showlegend = bool(trace.showlegend) and model not in in_legend
            figure.add_traces(traces)
            in_legend.add(model)

    tick_places = []
    tick_names = []
    for name, start, end in shown.values():
        tick_places.append((start + end) / 2)
        has_width = start < end
        tick_names.append(f"{name},<br>first to last block" if has_width else name)
        if has_width:
            figure.add_vrect(
                x0=start - 0.06,
                x1=end + 0.06,
                fillcolor=GREY,
                opacity=0.08,
                line_width=0,
                layer="below",
            )
    apply_style(
        figure,
        title=f"{title_by_layer(metric)}, from image to answer",
        subtitle=task_words(task) + pooling_note(trained, pooling),
        width=FULL_PAGE,
    )
    figure.update_xaxes(
        tickvals=tick_places, ticktext=tick_names, tickangle=0, ticks="", showgrid=False
    )
    set_score_axis(figure, metric)
    return figure.update_yaxes(title=f"{metric_words(metric)} (test)")


def pooling_curves(
    table: pd.DataFrame, task: str, metric: str, *, probe: str = "logreg"
) -> LayerFigure:
    """Draw a metric of every pooling: a panel per model, a symbol and a shade for each pooling.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table.
    task, metric, probe : str
        What to draw.

    Returns
    -------
    Figure
        A panel per model.
    """
    trained = table[(table.control == "none") & (table.task == task)]
    rows = select_curve(trained, probe=probe, metric=metric)
    figure, places = _shaded_curves(
        rows, column="pooling", colours=model_colours(table), metric=metric
    )
    apply_style(
        figure,
        title=f"Poolings: {title_by_layer(metric)}",
        subtitle=task_words(task),
        height=120 + 330 * places[-1]["row"],
        width=FULL_PAGE,
        panel_titles=True,
    )
    set_score_axis(figure, metric)
    return figure


def task_curves(table: pd.DataFrame, tasks: Sequence[str], *, probe: str = "logreg") -> LayerFigure:
    """Draw accuracy of several tasks: a panel per model, a symbol and a shade for each task.

    Dotted, with the same symbol: what the prompts' words and their order alone give away, which is
    the control ``word_order``.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table.
    tasks : sequence of str
        Tasks to draw.
    probe : str
        The kind of probe.

    Returns
    -------
    Figure
        A panel per model.
    """
    of_tasks = table[table.task.isin(tasks)]
    rows, pooling_words = first_pooling(select_curve(of_tasks, probe=probe, metric="accuracy"))
    trained = rows[rows.control == "none"]
    text_only = rows[rows.control == "word_order"]
    figure, places = _shaded_curves(
        trained, column="task", colours=model_colours(table), metric="accuracy"
    )
    for place, model in zip(places, dict.fromkeys(trained.model), strict=True):
        for number, task in enumerate(tasks):
            curve = text_only[(text_only.model == model) & (text_only.task == task)]
            figure.add_scatter(
                x=layer_number(curve.layer),
                y=curve.value,
                mode="lines+markers",
                showlegend=False,
                line={"dash": "dot", "color": GREY, "width": 1.5},
                marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 5},
                hovertemplate=f"the texts alone, {task}<br>accuracy %{{y:.3f}}<extra></extra>",
                **place,
            )
    figure.add_trace(legend_entry("the texts alone", line={"dash": "dot", "color": GREY}))
    apply_style(
        figure,
        title="Accuracy by layer",
        subtitle=f"global: wrong captions of several kinds{pooling_words}",
        height=120 + 330 * places[-1]["row"],
        width=FULL_PAGE,
        panel_titles=True,
    )
    set_score_axis(figure, "accuracy")
    return figure


def _shaded_curves(
    rows: pd.DataFrame, *, column: str, colours: dict[str, str], metric: str
) -> tuple[LayerFigure, list[dict[str, int]]]:
    """Draw a panel per model, and in it a curve for each value; return the panels' places too."""
    models = list(dict.fromkeys(rows.model))
    values = list(dict.fromkeys(rows[column]))
    opacities = [1 - 0.7 * number / len(values) for number in range(len(values))]
    symbols = [SYMBOLS[number % len(SYMBOLS)] for number in range(len(values))]
    figure, places = panel_grid(models, horizontal_spacing=0.05)
    # Many bands over each other would be darker than the curves.
    opacity_of_bands = BAND_OPACITY * min(1, MOST_BANDS / len(values))
    for place, model in zip(places, models, strict=True):
        for value, opacity, symbol in zip(values, opacities, symbols, strict=True):
            curve = rows[(rows.model == model) & (rows[column] == value)].reset_index(drop=True)
            if len(curve) == 0:
                continue
            traces = curve_traces(
                curve,
                name=f"{model}, {value}",
                control="none",
                colour=colours[model],
                symbol=symbol,
                metric=metric,
            )
            # Several curves share one colour, so their plateaus are left out.
            band, line = traces[-2:]
            band.fillcolor = with_alpha(colours[model], opacity_of_bands)
            line.update(showlegend=False, line={"color": with_alpha(colours[model], opacity)})
            figure.add_trace(band, **place)
            figure.add_trace(line, **place)
    for value, opacity, symbol in zip(values, opacities, symbols, strict=True):
        entry = legend_entry(
            value,
            mode="lines+markers",
            line={"color": with_alpha(GREY, opacity)},
            marker={"symbol": symbol, "size": 8},
        )
        figure.add_trace(entry)
    figure.update_xaxes(title=PANEL_LAYER_AXIS, dtick=tick_step(rows.layer.nunique()))
    return figure.update_yaxes(title=f"{metric_words(metric)} (test)", col=1), places
