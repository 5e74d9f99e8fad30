"""Curves by layer: scores with intervals, plateaus and controls, losses, and where in the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probekit import controls
from probekit.plots import style as look
from probekit.plots.style import DASHES, FULL, GREY, PLATEAU, SYMBOLS, TASK_WORDS, WORDS, faded, layer_number
from probekit.results import select

LOWER = ("codelength", "log_loss")  # is better


def layer_curves(table: pd.DataFrame, task: str, metric: str, probe: str = "logreg", published: bool = False,
                 chance: float | None = None, split: str = "test", relative: bool = False, pooling: str | None = None
                 ) -> go.Figure:
    """A metric by layer: one colour a model, its 95 % interval as a band, its plateau highlighted, controls dashed.

    The plateau are the layers that cannot be told from the best one (:func:`probekit.compare.layers`).

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
    everything = select(table[table.task == task], probe, metric, split)
    pooling = pooling or everything.pooling.iloc[0]
    rows = everything[(everything.pooling == pooling) & ~everything.control.isin(controls.BASELINES)]
    models = list(colours)
    for (model, control), curve in rows.groupby(["model", "control"], sort=False):
        curve, again = curve.reset_index(drop=True), models.index(model) // len(look.PALETTE)
        name = model + (f" {controls.WORDS[control].removesuffix(' model')}" if control != "none" else "")
        traces = curve_traces(curve, name, control, colours[model], SYMBOLS[again % len(SYMBOLS)], metric)
        figure.add_traces(traces)
        deepest += [int(layer_number(curve.layer).max())] * len(traces)
    for control in [name for name in DASHES if name in set(rows.control)]:
        figure.add_trace(look.key(controls.WORDS[control], legendgroup=control,
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
            lines[controls.WORDS[name]] = value
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
    rows = pd.read_csv(Path(__file__).parent.with_name("published.csv"))
    rows = rows[(rows.prompt == kind) & ~rows.model.str.startswith("Gemma")]  # a failed run: 0.500 at every layer
    traces = []
    for model, dash in zip(rows.model.unique(), ("solid", "dot"), strict=False):
        curve = rows[rows.model == model].sort_values("layer")
        hover = f"{model}, layer %{{customdata}}<br>published {WORDS[metric]} %{{y:.3f}}<extra></extra>"
        traces.append(go.Scatter(
            x=curve.layer, y=curve[column], customdata=curve.layer, name=f"{model}, published {WORDS[metric]}",
            mode="lines", line={"color": GREY, "width": 1.2, "dash": dash}, hovertemplate=hover))
    return traces


# ------------------------------------------------------------------------------------------------ several kinds at once


def global_and_local(table: pd.DataFrame, tasks: dict[str, dict], probe: str = "logreg") -> go.Figure:
    """Accuracy of the global and the local tasks by layer (left), and one against the other (right), a row a model.

    The global task is the first binary one, local ones are multilabel. On the right each point is a layer; filled ones
    are those that no other layer beats at both: along them one is traded for the other.
    """
    every = select(table[table.control == "none"], probe, "accuracy")
    rows = every[every.pooling == every.pooling.iloc[0]]
    whole = next(name for name, about in tasks.items() if about["kind"] == "binary")
    local = [name for name, about in tasks.items() if about["kind"] == "multilabel"]
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
            curve = select(part, probe, metric, stage=stage)
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
    rows = select(table[(table.control == "none") & (table.task == task)], probe, metric)
    models, poolings = (list(dict.fromkeys(rows[name])) for name in ("model", "pooling"))
    colours = look.colour_of(table)
    figure = make_subplots(1, len(models), subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.05)
    for i, model in enumerate(models, 1):
        for k, pooling in enumerate(poolings):
            curve = rows[(rows.model == model) & (rows.pooling == pooling)].reset_index(drop=True)
            if not len(curve):
                continue
            shade = faded(colours[model], 1 - 0.7 * k / len(poolings))
            for trace in curve_traces(curve, f"{model}, {pooling}", "none", colours[model], SYMBOLS[k % len(SYMBOLS)],
                                      metric)[-2:]:
                trace.update(showlegend=False, **({} if trace.fill else {"line": {"color": shade}}))
                figure.add_trace(trace, 1, i)
    for k, pooling in enumerate(poolings):
        figure.add_trace(look.key(pooling, line={"color": faded(GREY, 1 - 0.7 * k / len(poolings))}, marker={
            "symbol": SYMBOLS[k % len(SYMBOLS)], "size": 8}).update(mode="lines+markers"))
    look.style(figure, f"Poolings: {look.headed(metric, task)}", 450, FULL, True)
    figure.update_xaxes(title=look.LAYER_AXIS, dtick=look.ticks(rows.layer.nunique()))
    return figure.update_yaxes(title=f"{WORDS[metric]} (test)", col=1)


def localisation_curves(table: pd.DataFrame, task: str, relative: bool = False) -> go.Figure:
    """The share of a category's heat that lies in its boxes, by layer, against the share of tokens that lie there.

    See :mod:`probekit.localise`. Dotted: the same for probes of categories that the image does not show, in the same
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
    scores = select(table[(table.task == task) & (table.control == "none")], probe, metric, "validation")
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
