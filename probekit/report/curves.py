"""Curves by layer: scores with intervals, plateaus and controls; heat within boxes; losses."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from probekit.probes.controls import BASELINES, CONTROL_WORDS
from probekit.probes.judged_controls import judge_controls
from probekit.probes.results import LENS, best_layers, select_curve
from probekit.report.paper import LayerFigure, panel_grid, panels
from probekit.report.style import (
    CONTROL_DASHES,
    FULL_PAGE,
    GREY,
    HALF_PAGE,
    LAYER_AXIS,
    PLATEAU_OPACITY,
    PLATEAU_WIDTH,
    ModelLook,
    add_depth_menu,
    apply_style,
    band,
    first_pooling,
    layer_number,
    legend_entry,
    metric_words,
    model_colours,
    model_looks,
    pooling_note,
    set_score_axis,
    task_words,
    tick_step,
    title_by_layer,
    with_alpha,
)
from probekit.tasks.base import TaskInfo

PUBLISHED = Path(__file__).with_name("published.csv")
LOWER_IS_BETTER = ("codelength", "log_loss", "calibration_error", "flips")
# An F1 of guesses says little, so other metrics have no line for baselines.
BASELINE_METRICS = ("accuracy", "log_loss")
CHANCE_ACCURACY = 0.5  # of balanced yes-or-no labels
HEAT_METRICS = ("heat_in_boxes", "others_in_boxes", "area_in_boxes")
ABSENT_WORDS = "absent categories, same boxes"
BAND_OPACITY = 0.22  # of the controls
MOST_LISTED = 3  # models whose scores at one control are listed on hover
LAST_IN_LEGEND = 1001  # plotly's own rank of an entry is 1000
LOSS_DASHES = {"train": "solid", "validation": "dash"}


def scored_split(metric: str) -> str:
    """Return the split that a metric is reported for: ``"train"`` for codelengths, else test."""
    return "train" if metric == "codelength" else "test"


def layer_curves(
    table: pd.DataFrame,
    task: str,
    info: TaskInfo,
    metric: str,
    *,
    probe: str = "logreg",
    pooling: str | None = None,
    published: bool = False,
    relative: bool = False,
) -> LayerFigure:
    """Draw a metric by layer: a look per model, 95 % intervals, plateaus, and a band of controls.

    The band reaches from the lowest to the highest score of the controls; hovering over it lists
    all of them, and a button shows their curves. A control that is above chance (see
    :func:`controls_above_chance`) has a curve from the beginning, and the band is that of the
    others: else it would cover the models.

    A plateau consists of the layers that are not clearly worse than the best one
    (:func:`probekit.probes.comparison.compare_layers`).

    Parameters
    ----------
    table : DataFrame
        The whole metrics table.
    task, metric, probe : str
        What to draw.
    info : TaskInfo
        Of the task.
    pooling : str, optional
        Pooling to draw; the table's first unless it is named. :func:`pooling_curves
        <probekit.report.comparisons.pooling_curves>` compares them.
    published : bool
        Add the published study's numbers for this task as thin grey lines.
    relative : bool
        Begin with relative depth on the axis instead of layers; buttons change it.

    Returns
    -------
    Figure
        One panel.

    Raises
    ------
    ValueError
        The table has no such scores.
    """
    figure = LayerFigure()
    looks = model_looks(table)
    split = scored_split(metric)
    all_poolings = select_curve(table[table.task == task], probe=probe, metric=metric, split=split)
    if pooling is None:
        pooling = all_poolings.pooling.iloc[0]
    rows = all_poolings[all_poolings.pooling == pooling]
    rows_by_layer = rows[~rows.control.isin(BASELINES)]
    controls = rows_by_layer[rows_by_layer.control != "none"]

    above = controls_above_chance(table, task, info, probe=probe, pooling=pooling)
    figure.add_traces(control_band(controls, metric=metric, apart=above))
    if _differ_in_depth(controls):
        in_depth = control_band(controls, metric=metric, apart=above, relative=True)
    else:
        in_depth = []
    for (model, control), curve in rows_by_layer.groupby(["model", "control"], sort=False):
        name = model
        if control != "none":
            name = f"{model} {CONTROL_WORDS[control].removesuffix(' model')}"
        look = looks[model]
        traces = curve_traces(
            curve.reset_index(drop=True),
            name=name,
            control=control,
            colour=look.colour,
            symbol=look.symbol,
            metric=metric,
            dash=look.dash if control == "none" else None,
        )
        if control != "none":
            traces[-1].visible = (model, control) in above
        figure.add_traces(traces)
    hidden = _add_control_entries(figure, controls, above)

    if rows_by_layer.plateau.notna().any():
        line = {"color": with_alpha(GREY, PLATEAU_OPACITY), "width": PLATEAU_WIDTH}
        plateau = legend_entry("not clearly worse than the best", line=line)
        figure.add_trace(plateau.update(legendrank=LAST_IN_LEGEND))
    if published:
        figure.add_traces(_published_traces(task, metric))
    levels = _add_level_lines(figure, rows, metric=metric)

    apply_style(
        figure,
        title=title_by_layer(metric),
        subtitle=task_words(task) + pooling_note(all_poolings, pooling),
    )
    axis = metric_words(metric) if metric == "codelength" else f"{metric_words(metric)} ({split})"
    figure.update_yaxes(title=axis)
    set_score_axis(figure, metric, *levels)
    add_depth_menu(figure, relative=relative, hidden=hidden, in_depth=dict(enumerate(in_depth)))
    return figure


def controls_above_chance(
    table: pd.DataFrame, task: str, info: TaskInfo, *, probe: str, pooling: str
) -> set[tuple[str, str]]:
    """Return the models and controls that :func:`judge_controls` finds above chance.

    The overview's table says the same of them.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table.
    task : str
        Whose controls.
    info : TaskInfo
        Of the task.
    probe, pooling : str
        Whose controls.
    """
    rows = table[(table.task == task) & (table.pooling == pooling)]
    if not (rows.probe == probe).any():
        return set()
    best = best_layers(rows, {task: info}, probe=probe)
    above = set()
    for model, best_of_model in best.groupby("model", sort=False):
        controls = judge_controls(rows[rows.model == model], best_of_model, probe=probe)
        above |= {(model, score.control) for score in controls.scores if score.is_above}
    return above


def _add_control_entries(
    figure: go.Figure, controls: pd.DataFrame, above: set[tuple[str, str]]
) -> list[int]:
    """Add an entry for each kind of control, and return the numbers of the traces that are hidden.

    Entries of controls whose curves are hidden are hidden with them.
    """
    drawn = set(controls.control)
    shown = {control for _, control in above} & drawn
    for control, dash in CONTROL_DASHES.items():
        if control in drawn:
            line = {"dash": dash, "color": GREY, "width": 1.5}
            entry = legend_entry(CONTROL_WORDS[control], legendgroup=control, line=line)
            entry.update(visible=control in shown, legendrank=LAST_IN_LEGEND)
            figure.add_trace(entry)
    return [number for number, trace in enumerate(figure.data) if trace.visible is False]


def control_band(
    controls: pd.DataFrame,
    *,
    metric: str,
    chance: float | None = None,
    apart: Collection[tuple[str, str]] = (),
    in_legend: bool = True,
    relative: bool = False,
) -> list[go.Scatter]:
    """Return the band of the controls, and points to hover over, which list them layer by layer.

    Parameters
    ----------
    controls : DataFrame
        Rows of :func:`probekit.probes.results.select_curve`; `control` is never ``"none"``.
    metric : str
        What they show.
    chance : float, optional
        A level that the band includes.
    apart : collection of (str, str)
        Models and controls that have curves of their own; the band is that of the others.
    in_legend : bool
        Give the band an entry, see :func:`control_band_name`.
    relative : bool
        The band by relative depth instead of layers: each control's scores are interpolated to the
        depths of all, so that layers as deep in models of other depths stand together.

    Returns
    -------
    list of Scatter
        Two traces, or none where there are no controls in the band.
    """
    if controls.empty:
        return []
    scores = controls[controls.value.notna()]
    if relative:
        scores = _at_relative_depths(scores)
    else:
        scores = scores.assign(place=layer_number(scores.layer))
    is_apart = [pair in apart for pair in zip(scores.model, scores.control, strict=True)]
    others = scores[~np.array(is_apart, bool)]
    if others.empty:
        return []
    by_place = others.groupby("place").value.agg(["min", "max"])
    x = by_place.index.to_numpy()
    low = by_place["min"].to_numpy()
    high = by_place["max"].to_numpy()
    if chance is not None:
        low = np.minimum(low, chance)
        high = np.maximum(high, chance)
    name = control_band_name(
        others, metric=metric, with_chance=chance is not None, has_others=len(others) < len(scores)
    )
    area = band(
        x,
        low,
        high,
        colour=GREY,
        opacity=BAND_OPACITY,
        name=name,
        showlegend=in_legend,
        legendrank=LAST_IN_LEGEND,
        legendgroup="all controls",
        line={"width": 1, "color": with_alpha(GREY, 0.5)},
    )
    lists = _list_controls(scores)
    words = [lists[place] for place in x]
    points = go.Scatter(
        x=np.tile(x, 3),
        y=np.concatenate([low, (low + high) / 2, high]),
        mode="markers",
        marker={"size": 10, "color": "rgba(0,0,0,0)"},
        showlegend=False,
        legendgroup="all controls",
        hoverinfo="text",
        hovertext=words * 3,
    )
    return [area, points]


def _differ_in_depth(controls: pd.DataFrame) -> bool:
    """Return whether the models of some controls have different last layers."""
    if controls.empty:
        return False
    return layer_number(controls.layer).groupby(controls.model).max().nunique() > 1


def _at_relative_depths(scores: pd.DataFrame) -> pd.DataFrame:
    """Interpolate the scores of controls to all relative depths at which one of them has some.

    The column `layer` is the depth in words.
    """
    number = layer_number(scores.layer)
    last = number.groupby(scores.model).transform("max").clip(lower=1)
    scores = scores.assign(place=(number / last).round(6))
    places = np.unique(scores.place)
    curves = []
    for (model, control), curve in scores.groupby(["model", "control"], sort=False):
        curve = curve.sort_values("place")
        values = np.interp(places, curve.place, curve.value)
        curves.append(
            pd.DataFrame({"place": places, "value": values, "model": model, "control": control})
        )
    joined = pd.concat(curves, ignore_index=True)
    return joined.assign(layer=joined.place.map("relative depth {:.2f}".format))


def control_band_name(
    controls: pd.DataFrame, *, metric: str, with_chance: bool = False, has_others: bool = False
) -> str:
    """Return what the band of controls is called: with the one that scores best at any layer.

    Parameters
    ----------
    controls : DataFrame
        Their scores.
    metric : str
        What they show.
    with_chance : bool
        Whether the band includes chance.
    has_others : bool
        Whether there are controls besides these.
    """
    is_loss = metric in LOWER_IS_BETTER
    ranked = controls.sort_values("value", ascending=is_loss, kind="stable")
    best = ranked.iloc[0]
    words = f"{CONTROL_WORDS[best.control]}, {best.model}"
    if len(controls[["model", "control"]].drop_duplicates()) == 1:
        return words + (" and chance" if with_chance else "")
    extreme = "lowest" if is_loss else "highest"
    name = "other controls" if has_others else "all controls"
    if with_chance:
        name += " and chance"
    return f"{name}<br>({extreme}: {words} {best.value:.2f})"


def _list_controls(scores: pd.DataFrame) -> dict[float, str]:
    """List the scores of controls by place, those of several models side by side."""
    by_place: dict[float, dict[str, list[tuple[float, str]]]] = {}
    columns = (scores.place, scores.control, scores.value, scores.model)
    for place, control, value, model in zip(*columns, strict=True):
        by_place.setdefault(place, {}).setdefault(control, []).append((value, model))
    words_of = dict(zip(scores.place, scores.layer, strict=True))
    lists = {}
    for place, of_place in by_place.items():
        lines = [f"<b>controls</b>, {words_of[place]}"]
        for control, of_control in of_place.items():
            ranked = sorted(of_control, key=lambda score: -score[0])
            words = [f"{value:.3f} ({model})" for value, model in ranked]
            if len(words) > MOST_LISTED:
                words = [f"{words[0]} to {words[-1]}"]
            lines.append(f"{CONTROL_WORDS[control]}: {', '.join(words)}")
        lists[place] = "<br>".join(lines)
    return lists


def curve_traces(
    curve: pd.DataFrame,
    *,
    name: str,
    control: str,
    colour: str,
    symbol: str,
    metric: str,
    dash: str | None = None,
) -> list[go.Scatter]:
    """Return the traces of one curve: its plateau and its band where it has them, then its line.

    Parameters
    ----------
    curve : DataFrame
        (l,) rows of :func:`probekit.probes.results.select_curve`, indexed from 0.
    name : str
        What the line is called on hover.
    control : str
        ``"none"`` for a model's own curve; a control has a thin line without plateau and band.
    colour, symbol : str
        Of the line and its markers.
    metric : str
        What the curve shows.
    dash : str, optional
        Kind of the line; the control's unless it is given.

    Returns
    -------
    list of Scatter
        One to three traces; the line is the last one.
    """
    x = layer_number(curve.layer)
    is_control = control != "none"
    group = control if is_control else name
    on_plateau = curve.plateau.fillna(False).astype(bool)
    traces = []

    if not is_control and curve.plateau.notna().any():
        plateau_colour = with_alpha(colour, PLATEAU_OPACITY)
        plateau = go.Scatter(
            x=x,
            y=curve.value.where(on_plateau),  # gaps separate the parts of a plateau
            name=f"{name}, plateau",
            mode="lines+markers",
            line={"width": PLATEAU_WIDTH, "color": plateau_colour},
            marker={"size": PLATEAU_WIDTH, "color": plateau_colour},
            legendgroup=group,
            showlegend=False,
            hoverinfo="skip",
        )
        traces.append(plateau)
    if not is_control:
        traces.append(band(x, curve.lo, curve.hi, colour=colour, legendgroup=group))

    best = curve.value.idxmin() if metric in LOWER_IS_BETTER else curve.value.idxmax()
    details = [
        curve.layer,
        curve.lo,
        curve.hi,
        curve.n,
        curve.value - curve.value[best],
        np.full(len(curve), curve.layer[best]),
        np.where(on_plateau, "<br>not clearly worse than the best", ""),
    ]
    hover = (
        f"<b>{name}</b>, %{{customdata[0]}}"
        f"<br>{metric_words(metric)} %{{y:.3f}} [%{{customdata[1]:.3f}}, %{{customdata[2]:.3f}}]"
        "<br>n = %{customdata[3]:,.0f}"
        "<br>%{customdata[4]:+.3f} to its best, %{customdata[5]}%{customdata[6]}<extra></extra>"
    )
    if dash is None:
        dash = CONTROL_DASHES.get(control, "solid")
    line = go.Scatter(
        x=x,
        y=curve.value,
        name=name,
        mode="lines" if is_control else "lines+markers",
        line={"color": colour, "width": 1.5 if is_control else 2.5, "dash": dash},
        marker={"size": 7, "symbol": symbol},
        opacity=0.8 if is_control else 1,
        legendgroup=group,
        showlegend=not is_control,
        customdata=np.stack(details, axis=-1),
        hovertemplate=hover,
    )
    traces.append(line)
    return traces


def _add_level_lines(figure: go.Figure, rows: pd.DataFrame, *, metric: str) -> list[float]:
    """Draw chance, and what guesses without the states score; lines that lie together only once.

    Returns where the lines are.
    """
    levels = {}
    if metric == "accuracy":
        levels["chance"] = CHANCE_ACCURACY
    if metric in BASELINE_METRICS:
        for baseline in BASELINES:
            level = rows[rows.control == baseline].value.max()
            is_new = all(abs(level - drawn) >= 0.01 for drawn in levels.values())
            if not np.isnan(level) and is_new:
                levels[CONTROL_WORDS[baseline]] = level
    for name, level in levels.items():
        figure.add_hline(
            y=level,
            line={"color": GREY, "dash": "dot", "width": 1.5},
            annotation_text=name,
            annotation_font={"color": GREY, "size": 12},
            annotation_position="bottom right" if name == "chance" else "top right",
        )
    return list(levels.values())


def _published_traces(task: str, metric: str) -> list[go.Scatter]:
    """Return the published study's own curves, none where it has no such scores.

    What it calls macro-F1 is micro-F1 (categories) and the F1 of "yes" (captions).
    """
    prompts = {"caption": "caption", "category": "without list", "category_list": "with list"}
    if task not in prompts:
        return []
    f1_name = "f1_positive" if task == "caption" else "f1_micro"
    columns = {"accuracy": "accuracy", f1_name: "f1"}
    if metric not in columns:
        return []
    rows = pd.read_csv(PUBLISHED, encoding="utf-8")
    failed = rows.model.str.startswith("Gemma")  # 0.500 at every layer
    rows = rows[(rows.prompt == prompts[task]) & ~failed]
    traces = []
    for model, dash in zip(rows.model.unique(), ("solid", "dot"), strict=False):
        curve = rows[rows.model == model].sort_values("layer")
        hover = (
            f"{model}, layer %{{customdata}}"
            f"<br>published {metric_words(metric)} %{{y:.3f}}<extra></extra>"
        )
        trace = go.Scatter(
            x=curve.layer,
            y=curve[columns[metric]],
            customdata=curve.layer,
            name=f"{model}, published {metric_words(metric)}",
            mode="lines",
            line={"color": GREY, "width": 1.2, "dash": dash},
            hovertemplate=hover,
        )
        traces.append(trace)
    return traces


def rank_curves(ranks: pd.DataFrame) -> go.Figure:
    """Draw how many directions the states of each layer use, by layer, a colour per model.

    Parameters
    ----------
    ranks : DataFrame
        :attr:`probekit.probes.results.ProbeResults.ranks`.
    """
    metric = "effective_rank"
    figure = LayerFigure()
    for model, look in model_looks(ranks).items():
        curve = ranks[ranks.model == model].rename(columns={metric: "value"})
        traces = curve_traces(
            curve.assign(plateau=pd.NA).reset_index(drop=True),
            name=model,
            control="none",
            colour=look.colour,
            symbol=look.symbol,
            metric=metric,
            dash=look.dash,
        )
        figure.add_traces(traces)
    apply_style(figure, title="How many directions do states use?", subtitle="effective rank")
    figure.update_xaxes(title=LAYER_AXIS, dtick=tick_step(ranks.layer.nunique()))
    return figure.update_yaxes(title=f"{metric_words(metric)} (test images)", rangemode="tozero")


def localisation_curves(table: pd.DataFrame, task: str, *, relative: bool = False) -> go.Figure:
    """Draw the share of a category's heat that lies in its boxes by layer, and the boxes' share.

    Left the local probe, right the lens where there is one. Dotted: the heat of categories that
    the image does not show, in the same boxes. Dashed: the untrained model. See
    :mod:`probekit.probes.localisation`.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table.
    task : str
        A local task with heat maps.
    relative : bool
        Begin with relative depth on the axis instead of layers.

    Returns
    -------
    Figure
        A panel for each of them.
    """
    heat = table[(table.task == task) & table.metric.isin(HEAT_METRICS)]
    readers = {}
    of_probe = heat[heat.probe != LENS]
    if len(of_probe):
        rows, pooling_words = first_pooling(of_probe)
        readers[f"local probe{pooling_words}"] = rows
    if (heat.probe == LENS).any():
        readers["lens: the word for the category"] = heat[heat.probe == LENS]
    figure = panels(
        1, len(readers), subplot_titles=list(readers), shared_yaxes=True, horizontal_spacing=0.04
    )
    looks = model_looks(table)
    for column, rows in enumerate(readers.values(), 1):
        for trace in _heat_traces(rows, looks=looks):
            # The entries of the first panel stand for both.
            trace.showlegend = bool(trace.showlegend) and column == 1
            figure.add_trace(trace, row=1, col=column)
        of_area = (rows.metric == "area_in_boxes") & (rows.control == "none")
        figure.add_hline(
            y=rows[of_area].value.mean(),
            line={"color": GREY, "width": 1.5},
            annotation_text="share of area",
            annotation_font={"color": GREY, "size": 12},
            annotation_position="bottom right",
            row=1,
            col=column,
        )
    figure.add_trace(legend_entry(ABSENT_WORDS, line={"dash": "dot", "color": GREY}))
    apply_style(
        figure,
        title="Heat in the boxes, by layer",
        subtitle=task_words(task),
        height=480,
        width=FULL_PAGE if len(readers) > 1 else HALF_PAGE,
        panel_titles=True,
    )
    figure.update_yaxes(title="share of heat in the boxes", col=1)
    set_score_axis(figure, "heat_in_boxes")
    return add_depth_menu(figure, relative=relative)


def _heat_traces(rows: pd.DataFrame, *, looks: dict[str, ModelLook]) -> list[go.Scatter]:
    """Return the curves of one reader: of categories in their boxes, and of absent ones there."""
    traces = []
    curves = rows[rows.metric != "area_in_boxes"]
    for (model, control, metric), curve in curves.groupby(
        ["model", "control", "metric"], sort=False
    ):
        is_absent = metric == "others_in_boxes"
        name = model
        if control != "none":
            name += " untrained"
        if is_absent:
            name += ", absent categories"
        of_curve = curve_traces(
            curve.reset_index(drop=True),
            name=name,
            control=control,
            colour=looks[model].colour,
            symbol=looks[model].symbol,
            metric=metric,
            dash="dot" if is_absent else CONTROL_DASHES.get(control, "solid"),
        )
        line = of_curve[-1]
        if is_absent:
            line.update(
                showlegend=False,
                opacity=0.8,
                line={"width": 1.2},
                marker={"size": 4},
                mode="lines+markers",
                legendgroup=ABSENT_WORDS,
            )
            of_curve = [line]
        else:
            line.update(showlegend=True)
        traces += of_curve
    return traces


def loss_curves(
    losses: pd.DataFrame, table: pd.DataFrame, task: str, *, metric: str, probe: str = "linear"
) -> go.Figure:
    """Draw training (solid) and validation (dashed) loss, a panel per model, a slider over layers.

    Losses are means over the seeds that are still training. The slider begins at the layer that is
    best on validation for the first model.

    Parameters
    ----------
    losses : DataFrame
        :attr:`probekit.probes.results.ProbeResults.losses`.
    table : DataFrame
        The whole metrics table.
    task : str
        Task to draw.
    metric : str
        Metric that the best layer is chosen by.
    probe : str
        ``"linear"`` or ``"mlp"``.

    Returns
    -------
    Figure
        A panel per model.
    """
    colours = model_colours(table)
    trained = table[(table.task == task) & (table.control == "none")]
    all_poolings = select_curve(trained, probe=probe, metric=metric, split="validation")
    pooling = all_poolings.pooling.iloc[0]
    scores = all_poolings[all_poolings.pooling == pooling]
    models = list(dict.fromkeys(scores.model))
    layers = sorted(scores.layer.unique())
    losses = losses[
        (losses.task == task)
        & (losses.control == "none")
        & (losses.pooling == pooling)
        & (losses.probe == probe)
    ]
    epochs = losses.epoch.max()
    epoch_axis = np.arange(1, epochs + 1)
    means = losses.groupby(["model", "layer", "split", "epoch"]).loss.mean()

    figure, places = panel_grid(models, horizontal_spacing=0.05)
    ys_by_layer: dict[str, list[list[float | None]]] = {layer: [] for layer in layers}
    for place, model in zip(places, models, strict=True):
        for split, dash in LOSS_DASHES.items():
            for layer in layers:
                ys = [means.get((model, layer, split, epoch)) for epoch in epoch_axis]
                ys_by_layer[layer].append(ys)
            hover = f"{split}, epoch %{{x}}<br>loss %{{y:.4f}}<extra>{model}</extra>"
            figure.add_scatter(
                x=epoch_axis,
                name=split,
                mode="lines+markers",
                showlegend=False,
                line={"dash": dash, "color": colours[model], "width": 2.5},
                hovertemplate=hover,
                **place,
            )
    for split, dash in LOSS_DASHES.items():
        line = {"dash": dash, "color": GREY, "width": 2.5}
        figure.add_trace(legend_entry(split, line=line))

    first_model = scores[scores.model == models[0]]
    first_layer = first_model.sort_values("value").layer.iloc[-1]
    for trace, ys in zip(figure.data, ys_by_layer[first_layer], strict=False):
        trace.y = ys
    curve_numbers = list(range(len(ys_by_layer[first_layer])))
    steps = []
    for layer, layer_ys in ys_by_layer.items():
        step = {
            "label": layer.partition(".")[2],
            "method": "restyle",
            "args": [{"y": layer_ys}, curve_numbers],
        }
        steps.append(step)
    slider = {
        "steps": steps,
        "active": layers.index(first_layer),
        "currentvalue": {"prefix": "decoder layer "},
        "pad": {"t": 44},
    }
    apply_style(
        figure,
        title=f"Loss of the {probe} probe",
        subtitle=task_words(task) + pooling_note(all_poolings, pooling),
        height=160 + 330 * places[-1]["row"],
        width=FULL_PAGE,
        panel_titles=True,
    )
    figure.update_layout(margin={"b": 110}, sliders=[slider])
    figure.update_xaxes(title="epoch", dtick=1 if epochs <= 20 else None)
    drawn = means[means.index.get_level_values("layer").isin(layers)]
    figure.update_yaxes(range=[0.95 * float(drawn.min()), 1.03 * float(drawn.max())])
    return figure.update_yaxes(title="loss (nats)", col=1)
