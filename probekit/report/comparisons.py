"""Several kinds of curves in one picture: global and local, stages, poolings, tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probekit.probes.results import select_curve
from probekit.report import style as look
from probekit.report.curves import curve_traces
from probekit.report.style import FULL, GREY, SYMBOLS, WORDS, faded, layer_number
from probekit.tasks.base import TaskInfo


def global_and_local(table: pd.DataFrame, tasks: dict[str, TaskInfo], probe: str = "logreg") -> go.Figure:
    """Accuracy of the global and the local tasks by layer (left), and one against the other (right), a row a model.

    The global task is the first binary one, local ones are multilabel. On the right each point is a layer; filled ones
    are those that no other layer beats at both: along them one is traded for the other.
    """
    every = select_curve(table[table.control == "none"], probe, "accuracy")
    rows = every[every.pooling == every.pooling.iloc[0]]
    whole = next(name for name, about in tasks.items() if about.kind == "binary")
    local = [name for name, about in tasks.items() if about.kind == "multilabel"]
    models, colours = list(dict.fromkeys(rows.model)), look.colour_of(table)
    figure = make_subplots(len(models), 2, column_widths=[0.58, 0.42], horizontal_spacing=0.12,
                           vertical_spacing=0.22 / len(models), subplot_titles=[t for m in models for t in (m, "")])
    dashes = dict(zip([whole, *local], ("solid", "dash", "dot", "dashdot"), strict=False))
    for i, model in enumerate(models, 1):
        of = {name: rows[(rows.model == model) & (rows.task == name)].reset_index(drop=True) for name in dashes}
        peaks = []
        for k, (name, curve) in enumerate(of.items()):
            for trace in curve_traces(curve, f"{model}, {name}", "none", colours[model], SYMBOLS[k > 0], "accuracy",
                                      dashes[name])[-2:]:  # without the plateau: one hue has room for one
                figure.add_trace(trace.update(showlegend=False), i, 1)
            best = curve.loc[curve.value.idxmax()]
            peaks.append(f"{name} peaks at {best.layer}" if not k else f"{name} at {best.layer}")
            figure.add_scatter(x=[int(best.layer.partition(".")[2])], y=[best.value], mode="markers", row=i, col=1,
                               marker={"symbol": "star", "size": 15, "color": colours[model]}, showlegend=False,
                               hoverinfo="skip")
        figure.layout.annotations[i - 1].text = f"<b>{model}</b>: {', '.join(peaks)}"
        for trace in _against(of[whole], of[local[0]], colours[model], (whole, local[0])):
            figure.add_trace(trace, i, 2)
        figure.update_yaxes(title="accuracy (test)", row=i, col=1)
        figure.update_yaxes(title=f"{whole} (global)", row=i, col=2)
    for name, dash in dashes.items():
        kind = "global" if name == whole else "local"
        figure.add_trace(look.key(f"{name} ({kind})", line={"dash": dash, "color": GREY, "width": 2.5}))
    figure.add_trace(look.key("no other layer is better at both", marker={"color": GREY, "size": 9}).update(
        mode="markers"))
    title = f"Global against local semantics{look.pooling_named(every, rows.pooling.iloc[0])}"
    look.style(figure, title, 200 + 270 * len(models), FULL, True)
    figure.update_xaxes(title=look.LAYER_AXIS, row=len(models), col=1)
    figure.update_xaxes(dtick=look.ticks(rows.layer.nunique()), col=1)
    return figure.update_xaxes(title=f"{local[0]} (local)", row=len(models), col=2)


def _against(whole: pd.DataFrame, local: pd.DataFrame, colour: str, names: tuple[str, str]) -> list[go.Scatter]:
    """The way through the depth, from layer to layer, with the layers that no other one beats at both filled."""
    x, y = local.value.to_numpy(), whole.value.to_numpy()
    beaten = ((x >= x[:, None]) & (y >= y[:, None]) & ((x > x[:, None]) | (y > y[:, None]))).any(1)
    number = layer_number(whole.layer)
    path = go.Scatter(x=x, y=y, mode="lines", line={"color": faded(colour, 0.4), "width": 1.5}, hoverinfo="skip",
                      showlegend=False)
    points = go.Scatter(
        x=x, y=y, mode="markers+text", text=[str(k) for k in number], textposition="top center",
        textfont={"size": 10}, showlegend=False, customdata=whole.layer,
        marker={"size": 9, "color": np.where(beaten, "rgba(0,0,0,0)", colour), "line": {"color": colour, "width": 1.5}},
        hovertemplate=f"%{{customdata}}<br>{names[1]} %{{x:.3f}}<br>{names[0]} %{{y:.3f}}<extra></extra>")
    return [path, points]


STAGES = {"vision": ("image encoder", 0.0, 1.0), "projector": ("projector", 1.18, 1.18), "lm": ("decoder", 1.36, 2.36)}


def stage_curves(table: pd.DataFrame, task: str, metric: str, probe: str = "logreg") -> go.Figure:
    """Image encoder, projector and decoder on one axis: relative depth within each stage."""
    figure, colours = go.Figure(), look.colour_of(table)
    own = table[(table.task == task) & (table.control == "none")]
    pooling = own[own.stage != "lm"].pooling.iloc[0]
    for model in dict.fromkeys(own.model):
        for stage, (_, start, end) in STAGES.items():
            part = own[(own.model == model) & (own.stage == stage) & (own.pooling == pooling)]
            if not len(part):
                continue
            curve = select_curve(part, probe, metric, stage=stage)
            x = start + np.arange(len(curve)) / max(1, len(curve) - 1) * (end - start)
            first = not any(trace.name == model for trace in figure.data)
            for trace in curve_traces(curve, model, "none", colours[model], SYMBOLS[0], metric):
                xs = [*x, *x[::-1]] if trace.fill else x
                figure.add_trace(trace.update(x=xs, showlegend=bool(trace.showlegend) and first))
    for start, end in ((0, 1), (1.36, 2.36)):
        figure.add_vrect(x0=start - 0.06, x1=end + 0.06, fillcolor=GREY, opacity=0.08, line_width=0, layer="below")
    look.style(figure, look.headed(metric, task) + look.pooling_named(own, pooling), width=FULL)
    figure.update_xaxes(tickvals=[(a + b) / 2 for _, a, b in STAGES.values()], ticks="", showgrid=False,
                        ticktext=[f"{name}, first to last block" * (a < b) or name for name, a, b in STAGES.values()])
    return figure.update_yaxes(title=f"{WORDS[metric]} (test)")


def pooling_curves(table: pd.DataFrame, task: str, metric: str, probe: str = "logreg") -> go.Figure:
    """How the choice of tokens matters: a panel a model, a symbol and a shade of its colour for each pooling."""
    rows = select_curve(table[(table.control == "none") & (table.task == task)], probe, metric)
    figure = _shades(rows, "pooling", look.colour_of(table), metric)
    return look.style(figure, f"Poolings: {look.headed(metric, task)}", 450, FULL, True)


def task_curves(table: pd.DataFrame, tasks: Sequence[str], probe: str = "logreg") -> go.Figure:
    """Accuracy of several tasks: a panel a model, a symbol and a shade of its colour for each task.

    Dotted, of the same symbol: what the words of the prompts and their order alone tell (the control ``word_order``).
    """
    every = select_curve(table[table.task.isin(tasks)], probe, "accuracy")
    rows = every[every.pooling == every.pooling.iloc[0]]
    colours = look.colour_of(table)
    figure = _shades(rows[rows.control == "none"], "task", colours, "accuracy")
    words = rows[rows.control == "word_order"]
    for i, model in enumerate(dict.fromkeys(rows.model), 1):
        for k, task in enumerate(tasks):
            line = words[(words.model == model) & (words.task == task)]
            figure.add_scatter(
                x=layer_number(line.layer), y=line.value, mode="lines+markers", showlegend=False, row=1, col=i,
                line={"dash": "dot", "color": GREY, "width": 1.5}, hovertemplate=f"the texts alone, {task}<br>accuracy "
                "%{y:.3f}<extra></extra>", marker={"symbol": SYMBOLS[k % len(SYMBOLS)], "size": 5})
    figure.add_trace(look.key("the texts alone", line={"dash": "dot", "color": GREY}))
    named = look.pooling_named(every, rows.pooling.iloc[0])
    return look.style(figure, f"Accuracy by layer: how hard the wrong captions are{named}", 450, FULL, True)


def _shades(rows: pd.DataFrame, column: str, colours: dict[str, str], metric: str) -> go.Figure:
    """A panel a model, and in it a curve for each kind in a column, in shades of the model's colour."""
    models, kinds = (list(dict.fromkeys(rows[name])) for name in ("model", column))
    figure = make_subplots(1, len(models), subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.05)
    shades, symbols = [1 - 0.7 * k / len(kinds) for k in range(len(kinds))], SYMBOLS * (len(kinds) // len(SYMBOLS) + 1)
    for i, model in enumerate(models, 1):
        for kind, shade, symbol in zip(kinds, shades, symbols, strict=False):
            curve = rows[(rows.model == model) & (rows[column] == kind)].reset_index(drop=True)
            if not len(curve):
                continue
            for trace in curve_traces(curve, f"{model}, {kind}", "none", colours[model], symbol, metric)[-2:]:
                own = {} if trace.fill else {"line": {"color": faded(colours[model], shade)}}
                figure.add_trace(trace.update(showlegend=False, **own), 1, i)
    for kind, shade, symbol in zip(kinds, shades, symbols, strict=False):
        figure.add_trace(look.key(kind, line={"color": faded(GREY, shade)}, marker={
            "symbol": symbol, "size": 8}).update(mode="lines+markers"))
    figure.update_xaxes(title=look.LAYER_AXIS, dtick=look.ticks(rows.layer.nunique()))
    return figure.update_yaxes(title=f"{WORDS[metric]} (test)", col=1)
