"""What a model uses: its answers after a layer has lost something, by layer, tokens and dose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from probekit.interventions.inputs import PIXELS, WHOLE_IMAGE
from probekit.interventions.settings import CUT, OBJECT_ROUTE, OTHER_TASK, RANDOM, STEER
from probekit.report.paper import LayerFigure, panel_grid, panels
from probekit.report.style import (
    FULL_PAGE,
    GREY,
    LAYER_AXIS,
    PALETTE,
    PANEL_LAYER_AXIS,
    SYMBOLS,
    apply_style,
    band,
    layer_number,
    layer_ticks,
    legend_entry,
    set_score_axis,
    task_words,
    tick_step,
    with_alpha,
)

KNOWN_COLOUR, SAID_COLOUR = PALETTE[:2]
# Colour and symbol of each site.
SITE_LOOKS = {
    "image": (PALETTE[2], SYMBOLS[1]),
    "text": (PALETTE[3], SYMBOLS[2]),
    "last": (PALETTE[4], SYMBOLS[3]),
    "all": (PALETTE[5], SYMBOLS[4]),
}
SITE_WORDS = {
    "image": "image tokens",
    "text": "text tokens",
    "last": "last token",
    "all": "image and text",
}
ERASURE_WORDS = {
    "leace": "LEACE",
    "mean_difference": "mean difference",
    "logreg": "logistic direction",
}
CONTROL_WORDS = {
    "none": "",
    RANDOM: "a random subspace",
    OTHER_TASK: "another task’s subspace",
}
# Words, colour and symbol of each route and its control.
ROUTE_LOOKS = {
    ("image>text", "none"): ("image ▶ text", PALETTE[2], SYMBOLS[1]),
    ("image>last", "none"): ("image ▶ last", PALETTE[3], SYMBOLS[2]),
    ("text>last", "none"): ("text ▶ last", PALETTE[4], SYMBOLS[3]),
    (OBJECT_ROUTE, "none"): ("the object’s tokens ▶ all", PALETTE[5], SYMBOLS[4]),
    (OBJECT_ROUTE, RANDOM): ("as many other image tokens ▶ all", GREY, SYMBOLS[5]),
}
# Words, colour and symbol of each kind of image.
INPUT_LOOKS = {
    WHOLE_IMAGE: ("whole image", KNOWN_COLOUR, SYMBOLS[0]),
    "same_area": ("as much greyed elsewhere", GREY, SYMBOLS[4]),
    "no_object": ("the object greyed", PALETTE[3], SYMBOLS[2]),
    "no_box": ("its box greyed", PALETTE[1], SYMBOLS[3]),
    "only_object": ("all but the object greyed", PALETTE[2], SYMBOLS[1]),
}
EFFECT_COLOURS = "RdBu"
# As light as each other, so that all layers stand out from a white and from a dark page.
DOSE_COLOURS = [[0, "#4a72dc"], [1 / 3, "#a855c7"], [2 / 3, "#dd5170"], [1, "#c07a14"]]
SIGNIFICANT = 0.05


def tasks_of(table: pd.DataFrame) -> list[str]:
    """Return the tasks whose answers were watched while states or attention were changed."""
    return list(dict.fromkeys(table.task[table.site != PIXELS])) if len(table) else []


def tasks_on_inputs(table: pd.DataFrame) -> list[str]:
    """Return the tasks that were scored on changed images."""
    return list(dict.fromkeys(table.task[table.site == PIXELS])) if len(table) else []


def erasures_of(table: pd.DataFrame) -> list[str]:
    """Return the erasures that were done, in the table's order."""
    done = table.intervention[table.value.notna()]
    return [name for name in dict.fromkeys(done) if name in ERASURE_WORDS]


# ------------------------------------------------------------------------- known, said and used


def used_figure(table: pd.DataFrame, task: str, *, erasure: str | None = None) -> LayerFigure:
    """Draw what is known, what is said, and what is said without it; a panel per model.

    Parameters
    ----------
    table : DataFrame
        Of :func:`probekit.workflow.intervene`.
    task : str
    erasure : str, optional
        The first of the table unless it is named.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        Nothing was erased for this task.
    """
    rows = table[(table.task == task) & (table.site != PIXELS) & table.value.notna()]
    erasure = _choose_erasure(rows, erasure, task=task)
    models = list(dict.fromkeys(rows.model))
    figure, places = panel_grid(models)
    sites = [site for site in SITE_LOOKS if site in set(rows.site)]
    for place, model in zip(places, models, strict=True):
        of_model = rows[rows.model == model]
        for trace in _used_traces(of_model, erasure, sites):
            figure.add_trace(trace, **place)
    has_probes = ((rows.metric == "probe_accuracy") & (rows.intervention == "none")).any()
    if has_probes:
        figure.add_trace(legend_entry("probe: known", line={"color": KNOWN_COLOUR, "width": 2.5}))
    figure.add_trace(legend_entry("answer: said", line={"color": SAID_COLOUR, "width": 2.5}))
    for site in sites:
        colour, symbol = SITE_LOOKS[site]
        figure.add_trace(
            legend_entry(
                f"said, erased from {SITE_WORDS[site]}",
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"symbol": symbol, "size": 8},
            )
        )
    line = {"color": with_alpha(GREY, 0.4), "width": 10}
    figure.add_trace(legend_entry("random subspaces", line=line))
    words = ERASURE_WORDS[erasure]
    _style(figure, f"Known, said and used ({words})", task, rows)
    figure.update_yaxes(title="accuracy (test)", col=1)
    set_score_axis(figure, "accuracy")
    return figure


def _choose_erasure(rows: pd.DataFrame, erasure: str | None, *, task: str) -> str:
    """Return the erasure that is named, or the first; refuse one that was not done."""
    done = erasures_of(rows)
    if not done or (erasure or done[0]) not in done:
        raise ValueError(f"no {erasure or 'erasure'} for {task} in these interventions")
    return erasure or done[0]


def _used_traces(rows: pd.DataFrame, erasure: str, sites: Sequence[str]) -> list[go.Scatter]:
    traces = []
    erased = rows[(rows.intervention == erasure) & (rows.metric == "accuracy")]
    random = erased[erased.control == RANDOM]
    if len(random):
        of_layers = random.groupby("layer", sort=True).value
        x = layer_number(pd.Series(of_layers.min().index))
        line = {"width": 1, "color": with_alpha(GREY, 0.5)}
        traces.append(
            band(x, of_layers.min(), of_layers.max(), colour=GREY, opacity=0.25, line=line)
        )
    plain = rows[rows.intervention == "none"]
    said = plain[plain.metric == "accuracy"].iloc[0]
    known = plain[plain.metric == "probe_accuracy"]
    last_layer = int(layer_number(rows.layer[rows.layer != ""]).max())
    if len(known):
        last_layer = int(layer_number(known.read_layer).max())
        traces += _curve(
            layer_number(known.read_layer),
            known,
            name="probe",
            colour=KNOWN_COLOUR,
            symbol=SYMBOLS[0],
        )
    traces += _said_traces(said, last_layer)
    for site in sites:
        colour, symbol = SITE_LOOKS[site]
        curve = erased[(erased.site == site) & (erased.control == "none")]
        if len(curve):
            traces += _curve(
                layer_number(curve.layer),
                curve,
                name=f"answer, {curve.erased.iloc[0]} erased from {SITE_WORDS[site]}",
                colour=colour,
                symbol=symbol,
            )
    return traces


def _said_traces(said: pd.Series, last_layer: int) -> list[go.Scatter]:
    """Return what the model says when it is left alone: a line across with its band."""
    ends = [0, last_layer]
    return [
        band(ends, np.full(2, said.lo), np.full(2, said.hi), colour=SAID_COLOUR),
        go.Scatter(
            # Points in between, so that hovering anywhere on the line shows it.
            x=np.arange(last_layer + 1),
            y=np.full(last_layer + 1, said.value),
            mode="lines",
            line={"color": SAID_COLOUR, "width": 2.5},
            showlegend=False,
            hovertemplate=(
                f"<b>the model’s answer</b><br>accuracy {said.value:.3f} "
                f"[{said.lo:.3f}, {said.hi:.3f}]<br>n = {said.n:,.0f}<extra></extra>"
            ),
        ),
    ]


def _curve(
    x: pd.Series, curve: pd.DataFrame, *, name: str, colour: str, symbol: str
) -> list[go.Scatter]:
    """Return the band of a curve and its line."""
    line = go.Scatter(
        x=x,
        y=curve.value,
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"symbol": symbol, "size": 7},
        showlegend=False,
        customdata=np.stack([curve.lo, curve.hi, curve.n], 1),
        hovertemplate=(
            f"<b>{name}</b><br>layer %{{x}}: accuracy %{{y:.3f}} "
            "[%{customdata[0]:.3f}, %{customdata[1]:.3f}]<br>n = %{customdata[2]:,.0f}"
            "<extra></extra>"
        ),
    )
    return [band(x, curve.lo, curve.hi, colour=colour), line]


# ---------------------------------------------------------------------------------- the heat map


def effect_heatmap(table: pd.DataFrame, task: str) -> LayerFigure:
    """Draw how much accuracy each erasure takes, by layer and tokens; a panel per model.

    A star marks what takes more than the random subspace, corrected for the number of layers.

    Parameters
    ----------
    table : DataFrame
        Of :func:`probekit.workflow.intervene`.
    task : str
    """
    rows = table[(table.task == task) & table.intervention.isin(ERASURE_WORDS)]
    effects = rows[(rows.metric == "effect") & rows.value.notna()]
    beyond = rows[(rows.metric == "over_random") & (rows.p_holm < SIGNIFICANT) & (rows.value < 0)]
    stars = set(zip(beyond.model, beyond.layer, beyond.intervention, beyond.site, strict=True))
    models = list(dict.fromkeys(effects.model))
    figure = panels(
        len(models), 1, subplot_titles=models, vertical_spacing=0.3 / max(1, len(models))
    )
    height = 130
    for place, model in enumerate(models, 1):
        of_model = effects[effects.model == model].assign(
            kind=lambda part: pd.Categorical(
                part.control, ["none", OTHER_TASK, RANDOM], ordered=True
            )
        )
        keys = ["kind", "intervention", "site"]
        grid = of_model.pivot_table(
            index=keys, columns="layer", values="value", observed=True, sort=True
        )[::-1]
        texts = [
            [
                "★" if kind == "none" and (model, layer, name, site) in stars else ""
                for layer in grid.columns
            ]
            for kind, name, site in grid.index
        ]
        figure.add_heatmap(
            z=grid.to_numpy(),
            x=layer_number(grid.columns.to_series()),
            y=[_row_words(kind, name, site) for kind, name, site in grid.index],
            coloraxis="coloraxis",
            text=texts,
            texttemplate="%{text}",
            textfont={"size": 11},
            xgap=1,
            ygap=1,
            hovertemplate=(
                f"<b>{model}</b>, layer %{{x}}<br>%{{y}}<br>accuracy difference "
                "%{z:+.3f} to the model left alone<extra></extra>"
            ),
            row=place,
            col=1,
        )
        height += 60 + 24 * len(grid)
    apply_style(
        figure,
        title="What erasing takes from the answer",
        subtitle=task_words(task),
        height=height,
        width=FULL_PAGE,
        panel_titles=True,
    )
    largest = float(np.abs(effects.value).max()) if len(effects) else 1.0
    figure.update_layout(
        coloraxis={
            "colorscale": EFFECT_COLOURS,
            "cmin": -largest,
            "cmax": largest,
            "colorbar": {"title": {"text": "accuracy, difference"}},
        }
    )
    figure.update_xaxes(tickvals=layer_ticks(effects.layer), showgrid=False)
    figure.update_xaxes(title=LAYER_AXIS, row=len(models), col=1)
    return figure.update_yaxes(showgrid=False)


def _row_words(kind: str, name: str, site: str) -> str:
    if kind == "none":
        return f"{ERASURE_WORDS[name]}, {SITE_WORDS[site]}"
    if kind == RANDOM:
        return f"random as {ERASURE_WORDS[name]}, {SITE_WORDS[site]}"
    return f"other task, {SITE_WORDS[site]}"


# ------------------------------------------------------------------------------------ the others


def rebuilt_figure(table: pd.DataFrame, task: str, *, erasure: str | None = None) -> LayerFigure:
    """Draw what the probes of later layers read after an erasure: a panel per model and tokens.

    Parameters
    ----------
    table : DataFrame
        Of :func:`probekit.workflow.intervene`.
    task : str
    erasure : str, optional
        The first of the table unless it is named.

    Raises
    ------
    ValueError
        Nothing was erased for this task.
    """
    rows = table[(table.task == task) & (table.control == "none")]
    erasure = _choose_erasure(rows, erasure, task=task)
    rows = rows[(rows.intervention == erasure) & (rows.metric == "probe_accuracy")]
    models = list(dict.fromkeys(rows.model))
    sites = [site for site in SITE_LOOKS if site in set(rows.site)]
    titles = [f"{model},<br>{SITE_WORDS[site]}" for model in models for site in sites]
    figure = panels(
        len(models),
        len(sites),
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.24 / len(models),
    )
    for row, model in enumerate(models, 1):
        for column, site in enumerate(sites, 1):
            part = rows[(rows.model == model) & (rows.site == site)]
            grid = part.pivot_table(index="layer", columns="read_layer", values="value")
            figure.add_heatmap(
                z=grid.to_numpy(),
                x=layer_number(grid.columns.to_series()),
                y=layer_number(grid.index.to_series()),
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                hovertemplate=(
                    f"<b>{model}</b>, erased from {SITE_WORDS[site]} at layer %{{y}}<br>probe of "
                    "layer %{x}: accuracy %{z:.3f}<extra></extra>"
                ),
                row=row,
                col=column,
            )
    apply_style(
        figure,
        title=f"Is it rebuilt? ({ERASURE_WORDS[erasure]})",
        subtitle=task_words(task),
        height=130 + 260 * len(models),
        width=FULL_PAGE,
        panel_titles=True,
    )
    figure.update_layout(
        coloraxis={
            "colorscale": "Blues",
            "cmin": 0.5 if rows.value.min() >= 0.4 else float(rows.value.min()),
            "cmax": float(rows.value.max()),
            "colorbar": {"title": {"text": "accuracy of the probe"}},
        }
    )
    figure.update_xaxes(tickvals=layer_ticks(rows.read_layer), showgrid=False)
    figure.update_xaxes(title="probe of layer", row=len(models))
    figure.update_yaxes(tickvals=layer_ticks(rows.layer), showgrid=False)
    return figure.update_yaxes(title="erased at layer", col=1)


def routes_figure(table: pd.DataFrame, task: str) -> LayerFigure:
    """Draw the answers while attention is cut in a window of blocks; a panel per model.

    Parameters
    ----------
    table : DataFrame
        Of :func:`probekit.workflow.intervene`.
    task : str
    """
    rows = table[(table.task == task) & table.value.notna() & (table.metric == "accuracy")]
    cut = rows[rows.intervention == CUT]
    models = list(dict.fromkeys(cut.model))
    figure, places = panel_grid(models)
    routes = sorted(set(zip(cut.site, cut.control, strict=True)), key=list(ROUTE_LOOKS).index)
    for place, model in zip(places, models, strict=True):
        of_model = cut[cut.model == model]
        said = rows[(rows.model == model) & (rows.intervention == "none")].iloc[0]
        traces = _said_traces(said, int(layer_number(of_model.layer).max()))
        for route, control in routes:
            words, colour, symbol = ROUTE_LOOKS[route, control]
            curve = of_model[(of_model.site == route) & (of_model.control == control)]
            traces += _curve(
                layer_number(curve.layer), curve, name=f"{words} cut", colour=colour, symbol=symbol
            )
        for trace in traces:
            figure.add_trace(trace, **place)
    figure.add_trace(legend_entry("answer", line={"color": SAID_COLOUR, "width": 2.5}))
    for words, colour, symbol in (ROUTE_LOOKS[route] for route in routes):
        figure.add_trace(
            legend_entry(
                words,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"symbol": symbol, "size": 7},
            )
        )
    window = int(cut.dose.iloc[0])
    blocks = "1 block" if window == 1 else f"{window} blocks"
    _style(figure, f"Without attention, in windows of {blocks}", task, cut)
    figure.update_xaxes(title="first block cut" if window > 1 else "block cut")
    figure.update_yaxes(title="accuracy (test)", col=1)
    set_score_axis(figure, "accuracy")
    return figure


def doses_figure(table: pd.DataFrame, task: str) -> LayerFigure:
    """Draw how often a model says yes after so much of a direction was added; a panel per model.

    Parameters
    ----------
    table : DataFrame
        Of :func:`probekit.workflow.intervene`.
    task : str
    """
    rows = table[(table.task == task) & (table.metric == "says_yes") & table.value.notna()]
    steered = rows[rows.intervention == STEER]
    models = list(dict.fromkeys(steered.model))
    figure, places = panel_grid(models)
    layers = sorted(set(steered.layer))
    for place, model in zip(places, models, strict=True):
        alone = rows[(rows.model == model) & (rows.intervention == "none")].assign(dose=0.0)
        for number, layer in enumerate(layers):
            curve = steered[(steered.model == model) & (steered.layer == layer)]
            curve = pd.concat([curve, alone]).sort_values("dose")
            figure.add_scatter(
                x=curve.dose,
                y=curve.value,
                mode="lines+markers",
                line={"color": _depth_colour(number, len(layers)), "width": 2},
                marker={"size": 6, "symbol": SYMBOLS[number % len(SYMBOLS)]},
                name=layer,
                legendgroup=layer,
                showlegend=place == places[0],
                customdata=np.stack([curve.lo, curve.hi], 1),
                hovertemplate=(
                    f"<b>{model}</b>, {layer}<br>%{{x:+g}} standard deviations: says yes to "
                    "%{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]<extra></extra>"
                ),
                **place,
            )
    site = steered.site.iloc[0]
    _style(figure, f"Dose and response, {SITE_WORDS[site]}", task, steered)
    figure.update_xaxes(title="std. deviations added", dtick=None)
    set_score_axis(figure, "says_yes")
    return figure.update_yaxes(title="share of yes (test)", col=1)


# ------------------------------------------------------------------------------ changed images


def surroundings_figure(
    table: pd.DataFrame, task: str, *, pooling: str | None = None
) -> LayerFigure:
    """Draw probes and answers on images without the object, and with it alone; a panel per model.

    Parameters
    ----------
    table : DataFrame
        Of :func:`probekit.workflow.intervene`.
    task : str
        One that asks about objects.
    pooling : str, optional
        That of the probes; the first one unless it is named.

    Raises
    ------
    ValueError
        There are no such rows.
    """
    rows = table[(table.task == task) & (table.site == PIXELS) & table.value.notna()]
    read = rows[rows.metric == "probe_accuracy"]
    poolings = list(dict.fromkeys(read.pooling))
    if rows.empty or (pooling and pooling not in poolings):
        raise ValueError(
            f"no {pooling or ''} probes of {task} on changed images in these interventions: there "
            f"are {', '.join([*tasks_on_inputs(table), *poolings]) or 'none'}"
        )
    pooling = pooling or (poolings[0] if poolings else "")
    said = rows[rows.metric == "accuracy"]
    last_layer = int(layer_number(read.read_layer).max()) if len(read) else 0
    changes = [change for change in INPUT_LOOKS if change in set(rows.intervention)]
    models = list(dict.fromkeys(rows.model))
    figure, places = panel_grid(models)
    for place, model in zip(places, models, strict=True):
        for number, change in enumerate(changes):
            words, colour, symbol = INPUT_LOOKS[change]
            curve = read[
                (read.model == model) & (read.intervention == change) & (read.pooling == pooling)
            ]
            answer = said[(said.model == model) & (said.intervention == change)]
            traces = []
            if len(curve):
                x = layer_number(curve.read_layer)
                traces += _curve(x, curve, name=f"probe, {words}", colour=colour, symbol=symbol)
            if len(answer):
                x = last_layer + 0.3 + 0.14 * number
                traces.append(_answer_mark(answer.iloc[0], x, words=words, colour=colour))
            for trace in traces:
                figure.add_trace(trace, **place)
    for words, colour, symbol in (INPUT_LOOKS[change] for change in changes):
        marker = {"symbol": symbol, "size": 7}
        line = {"color": colour, "width": 2}
        figure.add_trace(legend_entry(words, mode="lines+markers", line=line, marker=marker))
    if len(said):
        marker = {"symbol": "diamond-open", "size": 11, "color": GREY, "line": {"width": 2}}
        figure.add_trace(legend_entry("the model’s answer", mode="markers", marker=marker))
    _style(figure, "The object or its surroundings?", task, read)
    if len(read):
        dtick = tick_step(read.read_layer.nunique())
        figure.update_xaxes(dtick=dtick, range=[-0.4, last_layer + (0.95 if len(said) else 0.4)])
    figure.update_yaxes(
        title=f"accuracy (test, {pooling} pooling)" if pooling else "accuracy (test)", col=1
    )
    set_score_axis(figure, "accuracy")
    return figure


def _answer_mark(answer: pd.Series, x: float, *, words: str, colour: str) -> go.Scatter:
    """Return what the model says to one kind of image, to the right of its last layer."""
    return go.Scatter(
        x=[x],
        y=[answer.value],
        error_y={
            "array": [answer.hi - answer.value],
            "arrayminus": [answer.value - answer.lo],
            "thickness": 1.5,
            "width": 3,
        },
        mode="markers",
        marker={"symbol": "diamond-open", "size": 11, "color": colour, "line": {"width": 2}},
        showlegend=False,
        hovertemplate=(
            f"<b>the model’s answer, {words}</b><br>accuracy {answer.value:.3f} "
            f"[{answer.lo:.3f}, {answer.hi:.3f}]<br>n = {answer.n:,.0f}<extra></extra>"
        ),
    )


def _depth_colour(number: int, count: int) -> str:
    return sample_colorscale(DOSE_COLOURS, [number / max(1, count - 1)])[0]


def _style(figure: LayerFigure, title: str, task: str, rows: pd.DataFrame) -> None:
    panel_rows = len({axis.domain for axis in figure.select_yaxes()})
    apply_style(
        figure,
        title=title,
        subtitle=task_words(task),
        height=150 + 330 * panel_rows,
        width=FULL_PAGE,
        panel_titles=True,
    )
    layers = rows.layer[rows.layer != ""].nunique()
    figure.update_xaxes(title=PANEL_LAYER_AXIS, dtick=tick_step(layers))
