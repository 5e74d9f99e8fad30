"""The look of all figures: colours, words, axes, a light and a dark theme."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io

# The colour-blind safe palette of Okabe and Ito.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8d99ae"  # readable on a white and on a dark background
SCORE_COLOURS = [[0.0, "#f7fbff"], [0.5, "#6baed6"], [1.0, "#08306b"]]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
CONTROL_DASHES = {
    "untrained": "dash",
    "shuffled": "dot",
    "control_task": "dashdot",
    "no_image": "longdash",
    "no_text": "longdashdot",
    "wrong_image": "2px 6px",
}
PLATEAU_OPACITY = 0.3
PLATEAU_WIDTH = 14  # pixels
FONT = "Inter, Helvetica, Arial, sans-serif"

# Width of a saved picture in pixels: half of a paper's page, and all of it.
HALF_PAGE = 640
FULL_PAGE = 1000

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
DEPTH_AXIS = "relative depth (0 = input embeddings, 1 = last layer)"


def _theme(*, ink: str, paper: str, grid: str, raised: str) -> go.layout.Template:
    axis = {
        "gridcolor": grid,
        "zeroline": False,
        "linecolor": GREY,
        "tickcolor": GREY,
        "automargin": True,
    }
    title = {
        "x": 0.01,
        "xanchor": "left",
        "y": 0.98,
        "yanchor": "top",
        "font": {"size": 16},
    }
    legend = {
        "orientation": "h",
        "y": 1.02,
        "yanchor": "bottom",
        "x": 0,
        "bgcolor": "rgba(0,0,0,0)",
    }
    slider = {
        "bgcolor": grid,
        "bordercolor": grid,
        "activebgcolor": GREY,
        "tickcolor": GREY,
        "font": {"size": 12, "color": ink},
    }
    layout = {
        "font": {"family": FONT, "size": 14, "color": ink},
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
        "coloraxis": {"colorbar": {"outlinewidth": 0}},
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
    height: int = 430,
    width: int = HALF_PAGE,
    panel_titles: bool = False,
) -> go.Figure:
    """Give a figure the project's look.

    Parameters
    ----------
    figure : Figure
        Changed in place.
    title : str
        Title of the figure.
    height : int
        Height in pixels.
    width : int
        Width in pixels of a picture that is saved; on the page a figure is as wide as its column.
    panel_titles : bool
        Whether the figure's panels have titles; the legend then goes above them.

    Returns
    -------
    Figure
        The same figure.
    """
    top = 118 if panel_titles else 92
    figure.update_layout(
        template=LIGHT,
        height=height,
        title={"text": title},
        meta={"width": width},
        margin={"l": 64, "r": 24, "t": top, "b": 56},
    )
    if panel_titles:
        figure.update_layout(legend={"y": 1 + 30 / (height - 174)})
        figure.update_annotations(font={"size": 14})
    return figure


def make_room_for_legend(figure: go.Figure) -> None:
    """Raise a figure's top margin by the rows that its legend takes in a picture of half a page.

    Parameters
    ----------
    figure : Figure
        A figure that :func:`apply_style` has styled; changed in place.
    """
    entries = [trace.name for trace in figure.data if trace.name and trace.showlegend is not False]
    row_width = HALF_PAGE - 100
    rows = 1
    used = 0.0
    for entry in entries:
        entry_width = 58 + 7.6 * len(entry)
        used += entry_width
        if used > row_width:
            rows += 1
            used = entry_width
    top = figure.layout.margin.t
    extra = max(0, 46 + 30 * rows - top)
    figure.update_layout(height=figure.layout.height + extra, margin={"t": top + extra})


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
    models = dict.fromkeys(table.model)
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
    digits = layer.str.partition(".")[2]
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


def title_by_layer(metric: str, task: str) -> str:
    """Return the title of a figure that shows a metric of a task by layer."""
    return f"{capitalise(metric_words(metric))} by layer — {task_words(task)}"


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


def add_depth_menu(figure: go.Figure, *, relative: bool = False) -> go.Figure:
    """Add buttons that change the axis between layers and relative depth, to compare models.

    Parameters
    ----------
    figure : Figure
        Changed in place; on their x axis its traces have the numbers of all layers of a model, or
        None.
    relative : bool
        Begin with relative depth.

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

    def button(label: str, xs: list, title: str, dtick: float) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for axis in axes:
            changes |= {f"{axis}.title.text": title, f"{axis}.dtick": dtick}
        return {"label": label, "method": "update", "args": [{"x": xs}, changes]}

    buttons = [
        button("layer", layer_xs, LAYER_AXIS, step),
        button("relative depth", depth_xs, DEPTH_AXIS, 0.1),
    ]
    for trace, x in zip(figure.data, depth_xs if relative else layer_xs, strict=True):
        trace.x = x
    if relative:
        figure.update_xaxes(title=DEPTH_AXIS, dtick=0.1)
    else:
        figure.update_xaxes(title=LAYER_AXIS, dtick=step)

    top = figure.layout.margin.t
    plot_height = figure.layout.height - top - figure.layout.margin.b
    menu = {
        "type": "buttons",
        "direction": "right",
        "buttons": buttons,
        "showactive": False,
        "x": 1,
        "xanchor": "right",
        "y": 1 + (top - 6) / plot_height,  # beside the title
        "yanchor": "top",
        "pad": {"t": 0, "r": 0},
        "font": {"size": 11},
    }
    return figure.update_layout(updatemenus=[menu])
