import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest

from probekit.report.curves import layer_curves
from probekit.report.style import (
    DARK,
    HALF_PAGE,
    LIGHT,
    MODEL_DASHES,
    PALETTE,
    SYMBOLS,
    apply_style,
    legend_entry,
    legend_height,
    model_looks,
    score_axis,
)
from tests.report.conftest import TASKS


def test_both_themes_change_colours_alone(table):
    figure = layer_curves(table, "caption", TASKS["caption"], "accuracy")
    light = plotly.io.templates[LIGHT].layout
    dark = plotly.io.templates[DARK].layout
    assert figure.layout.template.layout.font.color == light.font.color
    assert light.font.color != dark.font.color
    assert light.xaxis.to_plotly_json().keys() == dark.xaxis.to_plotly_json().keys()
    assert not [trace for trace in figure.data if trace.line.color in ("black", "white")]


@pytest.mark.parametrize("entries", [1, 12])
def test_a_figure_grows_with_its_legend_and_its_plot_does_not_shrink(entries):
    figure = go.Figure()
    for number in range(entries):
        figure.add_trace(legend_entry(f"a long name of a model, number {number}", showlegend=True))
    apply_style(figure, title="a title", height=400)
    legend = figure.layout.height - 400
    rows = legend // 21
    assert rows >= entries * 7 * len("a long name of a model, number 0") / HALF_PAGE
    narrow = legend_height(figure, width=380, font_size=12)
    assert narrow >= entries * 21


def test_a_long_subtitle_is_broken_into_lines_that_have_room():
    words = "local: is this object there (absent ones often occur with the rest)? (mean pooling)"
    short = apply_style(go.Figure(), title="a", subtitle="local")
    long = apply_style(go.Figure(), title="a", subtitle=words)
    lines = long.layout.title.subtitle.text.split("<br>")
    assert " ".join(lines) == words
    assert max(map(len, lines)) < 60
    assert long.layout.margin.t > short.layout.margin.t


@pytest.mark.parametrize(
    ("metric", "low", "high"),
    [
        ("accuracy", 0.48, 0.53),
        ("top1_accuracy", 0.2, 0.3),
        ("decided", 0.9, 1.0),
        ("selectivity", 0.01, 0.03),
        ("over_answer", -0.4, -0.3),
        ("heat_in_boxes", 0.05, 0.1),
        ("codelength", 0.1, 0.2),
        ("precision_macro", 0.0, 1.0),
    ],
)
def test_axes_show_all_that_is_drawn_and_no_noise(metric, low, high):
    axis = score_axis(metric, low, high)
    start, end = axis["range"]
    assert start < low
    assert high < end <= 1.1
    assert end - start >= 0.3
    if "dtick" in axis:
        assert start > -axis["dtick"]
        assert end < 1 + axis["dtick"] / 2


def test_models_differ_in_colour_symbol_and_dash():
    names = [f"model {number}" for number in range(2 * len(PALETTE))]
    looks = model_looks(pd.DataFrame({"model": names}))
    first = [looks[name] for name in names[: len(PALETTE)]]
    for values in zip(*first, strict=True):
        assert len(set(values)) == len(PALETTE)
    assert len(set(looks.values())) == len(names)


@pytest.mark.parametrize(
    "as_seen",
    [
        # Machado, Oliveira and Fernandes (2009): protanopia and deuteranopia, on linear colours.
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.0039, -0.0481, 1.052],
        ],
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.0118, 0.0429, 0.9689],
        ],
        [[0.2126, 0.7152, 0.0722]] * 3,  # grey
    ],
)
def test_two_models_can_be_told_apart_without_red_green_or_any_colour(as_seen):
    rgb = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in PALETTE]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(as_seen).T, 0, 1) ** (1 / 2.2)
    for a in range(len(PALETTE)):
        for b in range(a):
            differs_in_shape = SYMBOLS[a] != SYMBOLS[b] and MODEL_DASHES[a] != MODEL_DASHES[b]
            assert differs_in_shape or np.abs(seen[a] - seen[b]).max() > 0.2
    assert np.abs(seen[0] - seen[1]).max() > 0.05
