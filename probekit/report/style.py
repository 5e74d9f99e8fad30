"""The look of all figures: colours, words, axes, a light and a dark theme."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io

# The colour-blind safe palette of Okabe and Ito.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8d99ae"  # readable on a white and on a dark background
SCORE_COLOURS = [[0.0, "#f7fbff"], [0.5, "#6baed6"], [1.0, "#08306b"]]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
# Models differ by these, too, so that a figure can be read in grey.
MODEL_DASHES = ("solid", "10px 4px", "4px 3px", "12px 3px 3px 3px", "2px 3px", "16px 3px 6px 3px")
CONTROL_DASHES = {
    "untrained": "dash",
    "shuffled": "dot",
    "control_task": "dashdot",
    "no_image": "longdash",
    "no_text": "longdashdot",
    "wrong_image": "2px 6px",
}
PLATEAU_OPACITY = 0.3
PLATEAU_WIDTH = 11  # pixels
FONT = "Inter, Helvetica, Arial, sans-serif"

# Width of a saved picture in pixels: half of a paper's page, and all of it.
HALF_PAGE = 640
FULL_PAGE = 1000

# Heights in pixels of what stands around a plot.
TITLE_ROW = 38
SUBTITLE_ROW = 17
PANEL_TITLE_ROW = 26
AXIS_ROWS = 56  # ticks and title of the axis below
LEGEND_ROW = 21
# Characters of a line below the title: it fits a picture of 380 pixels.
SUBTITLE_LENGTH = 56
CHARACTER = 0.53  # mean width of a character in font sizes
LEGEND_KEY = 46  # pixels of a legend's entry besides its words
FONT_SIZE = 13
LEGEND_FONT_SIZE = 12

# How far the axis of a score reaches: room for a marker at 0 and at 1, and no zoom into noise.
ROOM = 0.02
HIGHEST_START = 0.45  # of an axis of accuracies
SMALLEST_SPAN = 0.3
ACCURACIES = ("accuracy", "f1", "precision", "recall", "average_precision", "guess")
SHARES = ("decided", "says_yes")
DIFFERENCES = ("selectivity", "over_", "localisation")
# Scores from 0 on, and what their axes show at least.
FROM_ZERO = {
    "codelength": 1.05,
    "log_loss": 0.75,
    "calibration_error": SMALLEST_SPAN,
    "heat_in_boxes": SMALLEST_SPAN,
    "others_in_boxes": SMALLEST_SPAN,
    "area_in_boxes": SMALLEST_SPAN,
    "known_not_said": SMALLEST_SPAN,
    "flips": SMALLEST_SPAN,
}

METRIC_WORDS = {
    "f1_macro": "macro-F1",
    "f1_micro": "micro-F1",
    "f1_positive": "F1 of “yes”",
    "precision_positive": "precision of “yes”",
    "recall_positive": "recall of “yes”",
    "precision_macro": "macro-precision",
    "recall_macro": "macro-recall",
    "average_precision": "mean average precision",
    "codelength": "codelength (bits per label)",
    "log_loss": "log loss (nats)",
    "f1": "F1",
    "top1_accuracy": "accuracy of the largest answer",
    "calibration_error": "expected calibration error",
    "decided": "share decided",
    "guess": "accuracy of a guess",
    "over_answer": "accuracy less that of the answer",
    "over_tuned_answer": "accuracy less that of the answer with its tuned threshold",
    "known_not_said": "right in the probe, wrong in the answer",
    "flips": "share judged in another way than in the plain wording",
}
TASK_WORDS = {
    "caption": "global: does the caption belong?",
    "caption_similar": "global: does the caption belong, or a similar one?",
    "caption_same_categories": "global: the caption, or one with the same categories?",
    "caption_swapped": "global: the caption, or two of its words swapped?",
    "category": "local: which categories?",
    "category_list": "local: which categories, listed in the prompt?",
    "category_dense": "local: which categories, asked about all of them?",
    "object": "local: is this object there?",
    "object_popular": "local: is this object there (absent ones are frequent)?",
    "object_adversarial": "local: is this object there (absent ones often occur with the rest)?",
    "relation": "where is the one from the other?",
    "size": "which one is larger?",
    "count": "how many?",
    "attribute": "which colour?",
}
LAYER_AXIS = "decoder layer (0 = input embeddings)"
PANEL_LAYER_AXIS = "decoder layer"  # where panels side by side have no room for more
DEPTH_AXIS = "relative depth (0 = input embeddings)"
PANEL_DEPTH_AXIS = "relative depth"


def _theme(*, ink: str, paper: str, grid: str, raised: str) -> go.layout.Template:
    axis = {
        "gridcolor": grid,
        "zeroline": False,
        "linecolor": GREY,
        "tickcolor": GREY,
        "automargin": True,
        "tickfont": {"size": 12},
        "title": {"font": {"size": FONT_SIZE}, "standoff": 8},
    }
    title = {
        "x": 0.01,
        "xanchor": "left",
        "y": 1,
        "yanchor": "top",
        "pad": {"t": 11},
        "font": {"size": 16},
        "subtitle": {"font": {"size": FONT_SIZE, "color": ink}},
    }
    # At the foot of the figure, where it grows without covering anything, however wide that is.
    legend = {
        "orientation": "h",
        "yref": "container",
        "y": 0,
        "yanchor": "bottom",
        "x": 0,
        "bgcolor": "rgba(0,0,0,0)",
        "font": {"size": LEGEND_FONT_SIZE},
    }
    slider = {
        "bgcolor": grid,
        "bordercolor": grid,
        "activebgcolor": GREY,
        "tickcolor": GREY,
        "font": {"size": 12, "color": ink},
    }
    layout = {
        "font": {"family": FONT, "size": FONT_SIZE, "color": ink},
        "paper_bgcolor": paper,
        "plot_bgcolor": paper,
        "colorway": PALETTE,
        "title": title,
        "xaxis": axis | {"ticks": "outside"},
        "yaxis": axis,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": raised, "font": {"size": 13, "color": ink}},
        "legend": legend,
        "updatemenudefaults": {
            "bgcolor": raised,
            "bordercolor": GREY,
            "font": {"size": 12, "color": ink},
        },
        "sliderdefaults": slider,
        "coloraxis": {
            "colorbar": {
                "outlinewidth": 0,
                "thickness": 12,
                "title": {"font": {"size": 12}, "side": "right"},
                "tickfont": {"size": 11},
            }
        },
    }
    return go.layout.Template(layout=layout)


# Names of plotly templates: figure.update_layout(template="probekit_dark").
LIGHT = "probekit"
DARK = "probekit_dark"
plotly.io.templates[LIGHT] = _theme(ink="#2b2d42", paper="white", grid="#e9ecf1", raised="white")
plotly.io.templates[DARK] = _theme(ink="#e4e7ee", paper="#15171c", grid="#2c303a", raised="#23262e")


def apply_style(
    figure: go.Figure,
    *,
    title: str,
    subtitle: str = "",
    height: int = 430,
    width: int = HALF_PAGE,
    panel_titles: bool = False,
) -> go.Figure:
    """Give a figure the project's look.

    Parameters
    ----------
    figure : Figure
        Changed in place; it has all entries of its legend.
    title : str
        Title of the figure.
    subtitle : str
        What stands below it in smaller letters, such as the task.
    height : int
        Height in pixels without the legend, for which room is made.
    width : int
        Width in pixels of a picture that is saved; on the page a figure is as wide as its column.
    panel_titles : bool
        Whether the figure's panels have titles.

    Returns
    -------
    Figure
        The same figure.
    """
    lines = textwrap.wrap(subtitle, SUBTITLE_LENGTH)
    top = TITLE_ROW + SUBTITLE_ROW * len(lines) + 12
    if panel_titles:
        titles = [text.text.count("<br>") for text in figure.layout.annotations]
        top += PANEL_TITLE_ROW - 12 + SUBTITLE_ROW * max(titles, default=0)
    figure.update_layout(
        template=LIGHT,
        height=height,
        title={"text": title},
        meta={"width": width},
        margin={"l": 64, "r": 24, "t": top, "b": AXIS_ROWS},
    )
    if lines:
        figure.layout.title.subtitle.text = "<br>".join(lines)
    if panel_titles:
        for text in figure.layout.annotations:
            text.font.size = FONT_SIZE
    make_room_for_legend(figure)
    return figure


def make_room_for_legend(figure: go.Figure) -> None:
    """Make a figure higher by the legend that its picture has, so that its plot does not shrink.

    Parameters
    ----------
    figure : Figure
        A figure that :func:`apply_style` styles; changed in place.
    """
    height = legend_height(figure, width=figure.layout.meta["width"], font_size=LEGEND_FONT_SIZE)
    figure.layout.height += round(height)


def legend_height(figure: go.Figure, *, width: float, font_size: float) -> float:
    """Return the height in pixels of a horizontal legend, 0 without one.

    Parameters
    ----------
    figure : Figure
        Its traces have the entries.
    width : float
        Width of the figure in pixels.
    font_size : float
        Of the entries, in pixels.
    """
    entries = [
        trace.name
        for trace in figure.data
        if trace.name and trace.showlegend is not False and trace.visible is not False
    ]
    if len(entries) < 2 and not any(trace.showlegend for trace in figure.data):
        return 0
    lines = [entry.split("<br>") for entry in entries]
    widths = [
        LEGEND_KEY + CHARACTER * font_size * max(len(line) for line in of_entry)
        for of_entry in lines
    ]
    room = width - 88
    # Plotly makes all entries as wide as the widest one, once they need more than one row.
    columns = len(entries) if sum(widths) <= room else max(1, math.floor(room / max(widths)))
    row_height = LEGEND_ROW * font_size / LEGEND_FONT_SIZE
    height = 0.0
    for start in range(0, len(entries), columns):
        most_lines = max(len(of_entry) for of_entry in lines[start : start + columns])
        height += row_height + (most_lines - 1) * 1.3 * font_size
    return height + 6


class ModelLook(NamedTuple):
    """How the curves of a model look: colour, symbol of their markers, dash of their lines."""

    colour: str
    symbol: str
    dash: str


def model_looks(table: pd.DataFrame) -> dict[str, ModelLook]:
    """Return how each model looks, the same in every figure of a run.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table, with the column `model`.

    Returns
    -------
    dict of str to ModelLook
        By model. The first six differ in colour, symbol and dash; the next six have these colours
        with other symbols.
    """
    looks = {}
    for place, (model, colour) in enumerate(model_colours(table).items()):
        number = place + place // len(PALETTE)
        looks[model] = ModelLook(
            colour, SYMBOLS[number % len(SYMBOLS)], MODEL_DASHES[number % len(MODEL_DASHES)]
        )
    return looks


def score_axis(metric: str, low: float, high: float) -> dict[str, Any]:
    """Return the range and ticks of an axis of scores.

    Accuracies and the like reach from 0.45 at most, so that chance can be seen, to 1 with room for
    a marker. Shares reach from 0 to 1. Differences show 0. No axis spans less than 0.3, so noise
    looks like noise.

    Parameters
    ----------
    metric : str
        What the axis shows.
    low, high : float
        The lowest and the highest value that is drawn, intervals included.

    Returns
    -------
    dict
        Properties of a plotly axis; empty for a metric without a scale of its own.
    """
    kind = metric.removeprefix("probe_").removeprefix("top1_")
    if kind in FROM_ZERO:
        top = max(FROM_ZERO[kind], 1.05 * high)
        is_share = kind not in ("codelength", "log_loss")
        return {"range": [0, min(top, 1 + ROOM) if is_share else top]}
    if kind.startswith(DIFFERENCES):
        bottom = max(min(low - ROOM, -0.05), -1 - ROOM)
        top = min(max(high + ROOM, bottom + SMALLEST_SPAN), 1 + ROOM)
        return {"range": [bottom, top]}
    if kind in SHARES:
        return {"range": [-ROOM, 1 + ROOM], "tick0": 0, "dtick": 0.2}
    if kind.startswith(ACCURACIES):
        # From the twentieth below, with as much room as above 1.
        below = math.floor(round(20 * (low - ROOM), 6)) / 20
        start = max(min(HIGHEST_START, below), -ROOM)
        return {"range": [start, 1 + ROOM], "tick0": 0, "dtick": 0.1 if start > 0.2 else 0.2}
    return {}


def set_score_axis(figure: go.Figure, metric: str, *levels: float) -> None:
    """Set the y axes of a figure to what its curves need.

    Parameters
    ----------
    figure : Figure
        All its y axes show the same metric; changed in place.
    metric : str
        What they show.
    *levels : float
        Further values that can be seen, such as chance.
    """
    low, high = _drawn_range(figure.data, levels)
    figure.update_yaxes(**score_axis(metric, low, high))


def _drawn_range(traces: Iterable[Any], levels: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest y of visible traces, with their error bars."""
    drawn = [np.array(levels, float)]
    for trace in traces:
        if trace.visible is False or trace.y is None:
            continue
        y = np.array(trace.y, float)
        drawn.append(y)
        if trace.error_y and trace.error_y.array is not None:
            drawn += [y + np.array(trace.error_y.array), y - np.array(trace.error_y.arrayminus)]
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def model_colours(table: pd.DataFrame) -> dict[str, str]:
    """Return one colour per model, the same in every figure of a run.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table, with the column `model`.

    Returns
    -------
    dict of str to str
        Hexadecimal colour by model.
    """
    models = table.model.unique()
    return {model: PALETTE[i % len(PALETTE)] for i, model in enumerate(models)}


def with_alpha(colour: str, alpha: float) -> str:
    """Return a hexadecimal colour as ``rgba(...)`` with an opacity from 0 to 1."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha})"


def layer_number(layer: pd.Series) -> pd.Series:
    """Return the numbers of layers within their stage; 0 for the projector, which has one layer.

    Parameters
    ----------
    layer : Series of str
        Names such as ``lm.03``.
    """
    digits = layer.map(lambda name: name.partition(".")[2])
    return pd.to_numeric(digits, errors="coerce").fillna(0).astype(int)


def tick_step(layers: int) -> int:
    """Return how far apart the ticks of an axis of so many layers are."""
    return 1 if layers <= 14 else 4


def metric_words(metric: str) -> str:
    """Return what a metric is called in figures."""
    return METRIC_WORDS.get(metric, metric.replace("_", " "))


def task_words(task: str) -> str:
    """Return what a task is called in figures."""
    return TASK_WORDS.get(task, task)


def capitalise(text: str) -> str:
    """Return text with a capital first letter; the other letters stay as they are."""
    return text[:1].upper() + text[1:]


def title_by_layer(metric: str) -> str:
    """Return the title of a figure that shows a metric by layer; its unit stands on the axis."""
    return f"{capitalise(metric_words(metric).partition(' (')[0])} by layer"


def layer_ticks(layers: Sequence[str] | pd.Series) -> list[int]:
    """Return the numbers of layers, thinned where there are many, as places of ticks."""
    numbers = sorted(set(layer_number(pd.Series(layers))))
    return numbers[:: tick_step(len(numbers))]


def pooling_note(rows: pd.DataFrame, pooling: str) -> str:
    """Return the end of a title that names the pooling, empty where `rows` have only one."""
    return f" ({pooling} pooling)" if rows.pooling.nunique() > 1 else ""


def first_pooling(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the rows of the first pooling, and the end of a title that names it among several."""
    pooling = rows.pooling.iloc[0]
    return rows[rows.pooling == pooling], pooling_note(rows, pooling)


def band(
    x: np.ndarray | pd.Series | Sequence[int],
    low: np.ndarray | pd.Series,
    high: np.ndarray | pd.Series,
    *,
    colour: str,
    opacity: float = 0.15,
    **options: Any,
) -> go.Scatter:
    """Return the area between two curves, without an entry in the legend.

    Parameters
    ----------
    x, low, high : array-like, (l,)
        Places on the axis, and the lower and the upper curve there.
    colour : str
        Hexadecimal.
    opacity : float
        Of the area.
    **options
        Properties of the trace, such as `legendgroup`.
    """
    properties: dict[str, Any] = {"line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    return go.Scatter(
        x=np.concatenate([x, np.flip(x)]),
        y=np.concatenate([high, np.flip(low)]),
        mode="lines",
        fill="toself",
        fillcolor=with_alpha(colour, opacity),
        **(properties | options),
    )


def legend_entry(name: str, **options: Any) -> go.Scatter:
    """Return a trace that only adds an entry to the legend.

    Parameters
    ----------
    name : str
        Text of the entry.
    **options
        Properties of the trace, such as `line`.
    """
    properties = {"mode": "lines", "legendgroup": name} | options
    return go.Scatter(x=[None], y=[None], name=name, **properties)


def add_depth_menu(
    figure: go.Figure,
    *,
    relative: bool = False,
    hidden: Sequence[int] = (),
    in_depth: Mapping[int, go.Scatter] | None = None,
) -> go.Figure:
    """Add buttons that change the axis between layers and relative depth, to compare models.

    Parameters
    ----------
    figure : Figure
        Changed in place; on their x axis its traces have the numbers of all layers of a model, or
        None.
    relative : bool
        Begin with relative depth.
    hidden : sequence of int
        Numbers of the traces that a further button shows and hides: the controls one by one.
    in_depth : mapping of int to Scatter, optional
        What traces are by relative depth, by their numbers, where that is not the same curve on
        another axis: a band over models of several depths.

    Returns
    -------
    Figure
        The same figure.
    """
    layer_xs = [trace.x for trace in figure.data]
    last_layers = [max((value for value in x if value is not None), default=0) for x in layer_xs]
    depth_xs = []
    for x, last in zip(layer_xs, last_layers, strict=True):
        if last:
            depth_xs.append([None if value is None else value / last for value in x])
        else:
            depth_xs.append(x)
    step = tick_step(max(last_layers) + 1)

    axes = [name for name in figure.layout if name.startswith("xaxis")] or ["xaxis"]

    has_panels = len(axes) > 1
    layer_title = PANEL_LAYER_AXIS if has_panels else LAYER_AXIS
    depth_title = PANEL_DEPTH_AXIS if has_panels else DEPTH_AXIS

    def button(label: str, data: dict[str, list], title: str, dtick: float) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for axis in axes:
            changes |= {f"{axis}.title.text": title, f"{axis}.dtick": dtick}
        return {"label": label, "method": "update", "args": [data, changes]}

    by_layer: dict[str, list] = {"x": layer_xs}
    by_depth: dict[str, list] = {"x": depth_xs}
    in_depth = in_depth or {}
    for number, trace in in_depth.items():
        depth_xs[number] = list(trace.x)
    for name in ("y", "hovertext") if in_depth else ():
        by_layer[name] = [trace[name] for trace in figure.data]
        by_depth[name] = list(by_layer[name])
        for number, trace in in_depth.items():
            by_depth[name][number] = trace[name]
    buttons = [
        button("layer", by_layer, layer_title, step),
        button("depth", by_depth, depth_title, 0.2),
    ]
    for name, of_traces in (by_depth if relative else by_layer).items():
        for trace, values in zip(figure.data, of_traces, strict=True):
            trace[name] = values
    if relative:
        figure.update_xaxes(title=depth_title, dtick=0.2)
    else:
        figure.update_xaxes(title=layer_title, dtick=step)

    if hidden:
        toggle = {
            "label": "controls",
            "method": "restyle",
            "args": [{"visible": True}, list(hidden)],
            "args2": [{"visible": False}, list(hidden)],
        }
        buttons.append(toggle)

    top = figure.layout.margin.t
    legend = legend_height(figure, width=figure.layout.meta["width"], font_size=LEGEND_FONT_SIZE)
    plot_height = figure.layout.height - top - figure.layout.margin.b - legend
    menu = {
        "type": "buttons",
        "direction": "right",
        "buttons": buttons,
        "showactive": False,
        "x": 1,
        "xanchor": "right",
        "y": 1 + (top - 1) / plot_height,  # beside the title
        "yanchor": "top",
        "pad": {"t": 0, "r": 0},
        "font": {"size": 10},
    }
    return figure.update_layout(updatemenus=[menu])
