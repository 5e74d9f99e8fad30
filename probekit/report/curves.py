"""Curves by layer: scores with intervals, plateaus and controls, losses, and where in the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probekit.probes import controls
from probekit.probes.results import select_curve
from probekit.report import style as look
from probekit.report.style import (
    DASHES,
    FULL,
    GREY,
    PLATEAU,
    SYMBOLS,
    TASK_WORDS,
    WORDS,
    faded,
    layer_number,
)

LOWER = ("codelength", "log_loss")  # is better


def layer_curves(table: pd.DataFrame, task: str, metric: str, probe: str = "logreg", published: bool = False,
                 chance: float | None = None, split: str = "test", relative: bool = False, pooling: str | None = None
                 ) -> go.Figure:
    """A metric by layer: one colour a model, its 95 % interval as a band, its plateau highlighted, controls dashed.

    The plateau are the layers that cannot be told from the best one (:func:`probekit.probes.comparison.compare_layers`).

    Parameters
    ----------
    table : metrics table (all of it)
    published : overlay the published study's numbers for this task as thin grey lines
    chance : value of the chance line, if one is known
    split : which one's scores; codelengths are those of "train"
    relative : begin with relative depth on the axis instead of layers; buttons change it
    pooling : which one to draw; None takes the table's first. :func:`pooling_curves` compares them
    """
    figure, colours, deepest = go.Figure(), look.colour_of(table), []
    everything = select_curve(table[table.task == task], probe, metric, split)
    pooling = pooling or everything.pooling.iloc[0]
    rows = everything[(everything.pooling == pooling) & ~everything.control.isin(controls.BASELINES)]
    models = list(colours)
    for (model, control), curve in rows.groupby(["model", "control"], sort=False):
        curve, again = curve.reset_index(drop=True), models.index(model) // len(look.PALETTE)
        name = model + (f" {controls.CONTROL_WORDS[control].removesuffix(' model')}" if control != "none" else "")
        traces = curve_traces(curve, name, control, colours[model], SYMBOLS[again % len(SYMBOLS)], metric)
        figure.add_traces(traces)
        deepest += [int(layer_number(curve.layer).max())] * len(traces)
    for control in [name for name in DASHES if name in set(rows.control)]:
        figure.add_trace(look.key(controls.CONTROL_WORDS[control], legendgroup=control,
                                  line={"dash": DASHES[control], "color": GREY, "width": 2}))
    if rows.plateau.notna().any():
        figure.add_trace(look.key("cannot be told from the best", line={"color": faded(GREY, PLATEAU), "width": 14}))
    for trace in _published(task, metric) if published else ():
        figure.add_trace(trace)
        deepest += [None] * (len(figure.data) - 1 - len(deepest)) + [max(trace.x)]
    _level_lines(figure, everything[everything.pooling == pooling], metric, chance)
    look.fit_legend(look.style(figure, look.headed(metric, task) + look.pooling_named(everything, pooling)))
    figure.update_yaxes(title=WORDS[metric] if metric == "codelength" else f"{WORDS[metric]} ({split})")
    return look.depth_menu(figure, deepest + [None] * (len(figure.data) - len(deepest)), relative)


def curve_traces(curve: pd.DataFrame, name: str, control: str, colour: str, symbol: str, metric: str, line: str = ""
                 ) -> list[go.Scatter]:
    """One curve with its band and plateau, and all that a person may ask about its points on hover."""
    x, real, traces = layer_number(curve.layer), control == "none", []
    best = curve.value.idxmin() if metric in LOWER else curve.value.idxmax()
    group = name if real else control
    if real and curve.plateau.notna().any():  # what is connected is highlighted in one stroke
        traces.append(go.Scatter(
            x=x, y=curve.value.where(curve.plateau.fillna(False).astype(bool)), mode="lines+markers", legendgroup=group,
            line={"width": 14, "color": faded(colour, PLATEAU)}, hoverinfo="skip", showlegend=False,
            marker={"size": 14, "color": faded(colour, PLATEAU)}, name=f"{name}, plateau"))
    if real or control == "untrained":
        traces.append(look.band(x, curve.lo, curve.hi, colour, legendgroup=group))
    gap = curve.value - curve.value[best]
    told = np.stack([curve.layer, curve.lo, curve.hi, curve.n, gap, np.full(len(curve), curve.layer[best]),
                     np.where(curve.plateau.fillna(False).astype(bool), "<br>cannot be told from the best", "")], -1)
    hover = (f"<b>{name}</b>, %{{customdata[0]}}<br>{WORDS.get(metric, metric)} %{{y:.3f}} [%{{customdata[1]:.3f}}, "
             "%{customdata[2]:.3f}]<br>n = %{customdata[3]:,.0f}<br>%{customdata[4]:+.3f} to its best, "
             "%{customdata[5]}%{customdata[6]}<extra></extra>")
    pen = {"color": colour, "width": 2.5 if real else 1.5, "dash": line or DASHES.get(control, "solid")}
    return [*traces, go.Scatter(
        x=x, y=curve.value, name=name, mode="lines+markers" if real else "lines", line=pen, legendgroup=group,
        showlegend=real, customdata=told, hovertemplate=hover, opacity=1 if real else 0.8,
        marker={"size": 7, "symbol": symbol})]


def _level_lines(figure: go.Figure, rows: pd.DataFrame, metric: str, chance: float | None) -> None:
    """Chance, and what guesses without the states score; lines that lie together are drawn once."""
    lines = {} if chance is None else {"chance": chance}
    for name in controls.BASELINES if metric in ("accuracy", "log_loss") else ():  # an F1 of guesses says little
        value = rows[rows.control == name].value.max()
        if value == value and not any(abs(value - known) < 0.01 for known in lines.values()):
            lines[controls.CONTROL_WORDS[name]] = value
    for name, value in lines.items():
        place = "bottom right" if name == "chance" else "top right"
        figure.add_hline(y=value, line={"color": GREY, "dash": "dot", "width": 1.5}, annotation_text=name,
                         annotation_font_color=GREY, annotation_position=place)


def _published(task: str, metric: str) -> list[go.Scatter]:
    """The study's own curves; what it calls macro-F1 is micro-F1 (category) and the F1 of "yes" (caption)."""
    kind = {"caption": "caption", "category": "without list", "category_list": "with list"}.get(task)
    column = {"accuracy": "accuracy", "f1_micro" if kind != "caption" else "f1_positive": "f1"}.get(metric)
    if kind is None or column is None:
        return []
    rows = pd.read_csv(Path(__file__).with_name("published.csv"))
    rows = rows[(rows.prompt == kind) & ~rows.model.str.startswith("Gemma")]  # a failed run: 0.500 at every layer
    traces = []
    for model, dash in zip(rows.model.unique(), ("solid", "dot"), strict=False):
        curve = rows[rows.model == model].sort_values("layer")
        hover = f"{model}, layer %{{customdata}}<br>published {WORDS[metric]} %{{y:.3f}}<extra></extra>"
        traces.append(go.Scatter(
            x=curve.layer, y=curve[column], customdata=curve.layer, name=f"{model}, published {WORDS[metric]}",
            mode="lines", line={"color": GREY, "width": 1.2, "dash": dash}, hovertemplate=hover))
    return traces


# --------------------------------------------------------------------------------------------------- where in the image


def localisation_curves(table: pd.DataFrame, task: str, relative: bool = False) -> go.Figure:
    """The share of a category's heat that lies in its boxes, by layer, against the share of tokens that lie there.

    See :mod:`probekit.probes.localisation`. Dotted: the same for probes of categories that the image does not show, in the same
    boxes. Dashed: the untrained model.
    """
    every = table[(table.task == task) & table.metric.isin(["heat_in_boxes", "others_in_boxes", "area_in_boxes"])]
    rows, dotted = every[every.pooling == every.pooling.iloc[0]], "probes of absent categories, same boxes"
    figure, colours, deepest = go.Figure(), look.colour_of(table), []
    for (model, control, metric), curve in rows.groupby(["model", "control", "metric"], sort=False):
        curve = curve.reset_index(drop=True)
        if metric == "area_in_boxes":
            continue
        others = metric == "others_in_boxes"
        name = f"{model}{' untrained' * (control != 'none')}{', absent categories' * others}"
        traces = curve_traces(curve, name, control, colours[model], SYMBOLS[0], metric, "dot" if others else "")
        for trace in traces[-1:] if others else traces:
            trace.update(showlegend=not (others or trace.fill))
            if others:
                trace.update(opacity=0.8, line={"width": 1.5}, mode="lines", legendgroup=dotted)
            figure.add_trace(trace)
            deepest.append(int(layer_number(curve.layer).max()))
    figure.add_trace(look.key(dotted, line={"dash": "dot", "color": GREY}))
    area = rows[(rows.metric == "area_in_boxes") & (rows.control == "none")].value.mean()
    figure.add_hline(y=area, line={"color": GREY, "width": 1.5}, annotation_text="share of area",
                     annotation_font_color=GREY, annotation_position="bottom right")
    title = "Where in the image: heat of the local probe within the boxes"
    look.fit_legend(look.style(figure, title + look.pooling_named(every, rows.pooling.iloc[0])))
    figure.update_yaxes(title="share of heat in the boxes", rangemode="tozero")
    return look.depth_menu(figure, [*deepest, None], relative)


# -------------------------------------------------------------------------------------------------------------- losses


def loss_curves(losses: pd.DataFrame, table: pd.DataFrame, task: str, metric: str, probe: str = "linear") -> go.Figure:
    """Training (solid) and validation (dashed) loss of "linear" or "mlp", a panel a model, with a slider over layers.

    It opens at the layer that `metric` on validation finds best for the first model; losses are means over the seeds
    that are still trained.
    """
    scores = select_curve(table[(table.task == task) & (table.control == "none")], probe, metric, "validation")
    models, pooling = list(dict.fromkeys(scores.model)), scores.pooling.iloc[0]
    named, colours = look.pooling_named(scores, pooling), look.colour_of(table)
    scores = scores[scores.pooling == pooling]
    kept = losses[(losses.task == task) & (losses.control == "none") & (losses.pooling == pooling)
                  & (losses.probe == probe)]
    mean = {key: own.groupby("epoch").loss.mean() for key, own in kept.groupby(["model", "layer", "split"])}
    layers = sorted(scores.layer.unique())
    figure = make_subplots(1, len(models), subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.05)
    epochs, values = kept.epoch.max(), {layer: [] for layer in layers}
    for i, model in enumerate(models, 1):
        for split, dash in (("train", "solid"), ("validation", "dash")):
            for layer in layers:
                own = mean.get((model, layer, split), pd.Series(dtype=float)).reindex(range(1, epochs + 1))
                values[layer].append([None if v != v else v for v in own])
            figure.add_scatter(
                x=np.arange(1, epochs + 1), name=split, mode="lines+markers", showlegend=False, row=1, col=i,
                line={"dash": dash, "color": colours[model], "width": 2.5},
                hovertemplate=f"{split}, epoch %{{x}}<br>loss %{{y:.4f}}<extra>{model}</extra>")
    for split, dash in (("train", "solid"), ("validation", "dash")):
        figure.add_trace(look.key(split, line={"dash": dash, "color": GREY, "width": 2.5}))
    first = layers.index(scores[scores.model == models[0]].sort_values("value").layer.iloc[-1])
    for trace, y in zip(figure.data, values[layers[first]], strict=False):
        trace.y = y
    shown = list(range(len(values[layers[0]])))
    steps = [{"label": layer.partition(".")[2], "method": "restyle", "args": [{"y": y}, shown]}
             for layer, y in values.items()]
    look.style(figure, f"Loss of the {probe} probe — {TASK_WORDS.get(task, task)}{named}", 490, FULL, True)
    figure.update_layout(margin={"b": 110}, sliders=[{
        "steps": steps, "active": first, "currentvalue": {"prefix": "decoder layer "}, "pad": {"t": 44}}])
    every = [v for y in values.values() for line in y for v in line if v is not None]
    figure.update_xaxes(title="epoch", dtick=1 if epochs <= 20 else None)
    figure.update_yaxes(range=[0.95 * min(every), 1.03 * max(every)])
    return figure.update_yaxes(title="loss (nats)", col=1)
