"""The one look of all figures: colours, words, axes; light and dark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's: colour-blind safe
DASHES = {"untrained": "dash", "shuffled": "dot", "control_task": "dashdot", "no_image": "longdash",
          "no_text": "longdashdot", "wrong_image": "2px 6px"}  # one a control
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
PLATEAU = 0.3  # opacity
GREY = "#8d99ae"  # readable on both backgrounds
SCORES = [[0.0, "#f7fbff"], [0.5, "#6baed6"], [1.0, "#08306b"]]
FONT = "Inter, Helvetica, Arial, sans-serif"
HALF, FULL = 640, 1000  # pixels of a picture: half a page wide, and a whole one
WORDS = {
    "accuracy": "accuracy", "f1_macro": "macro-F1", "f1_micro": "micro-F1", "f1_positive": "F1 of “yes”",
    "precision_positive": "precision of “yes”", "recall_positive": "recall of “yes”",
    "precision_macro": "macro-precision", "recall_macro": "macro-recall", "loss": "loss (nats)",
    "average_precision": "mean average precision", "codelength": "codelength (bits a label)",
    "selectivity": "selectivity", "log_loss": "log loss (nats)", "f1": "F1",
}
TASK_WORDS = {"caption": "global: does the caption belong?",
              "caption_similar": "global: does the caption belong, or a similar one?",
              "caption_same_categories": "global: the caption, or one with the same categories?",
              "caption_swapped": "global: the caption, or two of its words exchanged?",
              "category": "local: which categories?",
              "category_list": "local: which categories, listed in the prompt?",
              "category_dense": "local: which categories, all of them asked?",
              "object": "local: is this object there?",
              "object_popular": "local: is this object there (absent ones are frequent)?",
              "object_adversarial": "local: is this object there (absent ones go with the rest)?",
              "relation": "where is the one from the other?", "size": "which one is larger?",
              "count": "how many?", "attribute": "which colour?"}
LAYER_AXIS = "decoder layer (0 = input embeddings)"
DEPTH_AXIS = "relative depth (0 = input embeddings, 1 = last layer)"


def _template(ink: str, paper: str, grid: str, raised: str) -> go.layout.Template:
    axis = {"gridcolor": grid, "zeroline": False, "linecolor": GREY, "tickcolor": GREY, "automargin": True}
    return go.layout.Template(layout={
        "font": {"family": FONT, "size": 14, "color": ink}, "paper_bgcolor": paper, "plot_bgcolor": paper,
        "colorway": PALETTE, "title": {"x": 0.01, "xanchor": "left", "y": 0.98, "yanchor": "top",
                                       "font": {"size": 16}},
        "xaxis": axis | {"ticks": "outside"}, "yaxis": axis, "hovermode": "closest",
        "hoverlabel": {"bgcolor": raised, "font": {"size": 13, "color": ink}},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "bgcolor": "rgba(0,0,0,0)"},
        "updatemenudefaults": {"bgcolor": raised, "bordercolor": GREY, "font": {"size": 12, "color": ink}},
        "sliderdefaults": {"bgcolor": grid, "bordercolor": grid, "activebgcolor": GREY, "tickcolor": GREY,
                           "font": {"size": 12, "color": ink}},
        "coloraxis": {"colorbar": {"outlinewidth": 0}},
    })


LIGHT, DARK = "probekit", "probekit_dark"  # plotly templates: figure.update_layout(template="probekit_dark")
plotly.io.templates[LIGHT] = _template("#2b2d42", "white", "#e9ecf1", "white")
plotly.io.templates[DARK] = _template("#e4e7ee", "#15171c", "#2c303a", "#23262e")


def style(figure: go.Figure, title: str, height: int = 430, width: int = HALF, panels: bool = False) -> go.Figure:
    """Give a figure the look; `height`, and the `width` of a picture of it, in pixels; `panels` have titles."""
    figure.update_layout(template=LIGHT, height=height, title={"text": title}, meta={"width": width},
                         margin={"l": 64, "r": 24, "t": 118 if panels else 92, "b": 56})
    if panels:  # the legend goes above their titles
        figure.update_layout(legend={"y": 1 + 30 / (height - 174)})
        figure.update_annotations(font={"size": 14})
    return figure


def fit_legend(figure: go.Figure) -> go.Figure:
    """Make room above for as many rows as the legend takes in a picture of half a page."""
    rows, used, room = 1, 0.0, HALF - 100
    for name in [trace.name for trace in figure.data if trace.name and trace.showlegend is not False]:
        width = 58 + 7.6 * len(name)
        rows, used = (rows + 1, width) if used + width > room else (rows, used + width)
    extra = max(0, 46 + 30 * rows - figure.layout.margin.t)
    return figure.update_layout(height=figure.layout.height + extra, margin={"t": figure.layout.margin.t + extra})


def colour_of(table: pd.DataFrame) -> dict[str, str]:
    """One colour a model, the same in every figure of a run."""
    return {model: PALETTE[i % len(PALETTE)] for i, model in enumerate(dict.fromkeys(table.model))}


def faded(colour: str, alpha: float) -> str:
    return f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, {alpha})"


def layer_number(layer: pd.Series) -> pd.Series:
    """Place within the stage; 0 for the projector, which has one layer."""
    return pd.to_numeric(layer.str.partition(".")[2], errors="coerce").fillna(0).astype(int)


def ticks(layers: int) -> int:
    """Distance of the ticks on an axis of so many layers."""
    return 1 if layers <= 14 else 4


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def headed(metric: str, task: str) -> str:
    return f"{sentence_case(WORDS[metric])} by layer — {TASK_WORDS.get(task, task)}"


def pooling_named(rows: pd.DataFrame, drawn: str) -> str:
    """The pooling that is drawn, where there are rows of several."""
    return f" ({drawn} pooling)" if rows.pooling.nunique() > 1 else ""


def band(x: Sequence, lo: Sequence, hi: Sequence, colour: str, **options) -> go.Scatter:
    """An interval along a curve."""
    x, lo, hi = (np.asarray(values) for values in (x, lo, hi))
    return go.Scatter(x=[*x, *x[::-1]], y=[*hi, *lo[::-1]], fill="toself", mode="lines", line={"width": 0},
                      fillcolor=faded(colour, 0.15), hoverinfo="skip", showlegend=False, **options)


def key(name: str, **look) -> go.Scatter:
    """An entry of the legend alone."""
    return go.Scatter(x=[None], y=[None], name=name, mode="lines", **{"legendgroup": name} | look)


def depth_menu(figure: go.Figure, deepest: Sequence[int | None], relative: bool = False) -> go.Figure:
    """Buttons that change the axis from layers to relative depth and back, so that models of any depth compare.

    Parameters
    ----------
    deepest : for each trace the number of its model's last layer; None for one that has none
    relative : begin with relative depth
    """
    number = [trace.x for trace in figure.data]
    share = [x if not end else [None if v is None else v / end for v in x]
             for x, end in zip(number, deepest, strict=True)]
    step = ticks(max((end for end in deepest if end), default=1) + 1)
    changes = [({"x": number}, {"xaxis.title.text": LAYER_AXIS, "xaxis.dtick": step}),
               ({"x": share}, {"xaxis.title.text": DEPTH_AXIS, "xaxis.dtick": 0.1})]
    for trace, x in zip(figure.data, (number, share)[relative], strict=True):
        trace.x = x
    figure.update_xaxes(title=(LAYER_AXIS, DEPTH_AXIS)[relative], dtick=(step, 0.1)[relative])
    buttons = [{"label": name, "method": "update", "args": list(change)}
               for name, change in zip(("layer", "relative depth"), changes, strict=True)]
    top, whole = figure.layout.margin.t, figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    return figure.update_layout(updatemenus=[{  # in the row of the title
        "type": "buttons", "direction": "right", "buttons": buttons, "showactive": False, "x": 1, "xanchor": "right",
        "y": 1 + (top - 6) / whole, "yanchor": "top", "pad": {"t": 0, "r": 0}, "font": {"size": 11}}])
