import plotly.io
import pytest

from probekit.report.curves import layer_curves
from probekit.report.style import (
    DARK,
    HALF_PAGE,
    LIGHT,
    apply_style,
    legend_entry,
    make_room_for_legend,
)


def test_both_themes_change_colours_alone(table):
    figure = layer_curves(table, "caption", "accuracy")
    light = plotly.io.templates[LIGHT].layout
    dark = plotly.io.templates[DARK].layout
    assert figure.layout.template.layout.font.color == light.font.color
    assert light.font.color != dark.font.color
    assert light.xaxis.to_plotly_json().keys() == dark.xaxis.to_plotly_json().keys()
    assert not [trace for trace in figure.data if trace.line.color in ("black", "white")]


@pytest.mark.parametrize("entries", [1, 12])
def test_a_figure_grows_with_its_legend_and_its_plot_does_not_shrink(table, entries):
    figure = layer_curves(table, "caption", "accuracy").update_layout(updatemenus=[])
    figure.data = []
    for number in range(entries):
        figure.add_trace(legend_entry(f"a long name of a model, number {number}"))
    apply_style(figure, title="a title")
    plot_height = figure.layout.height - figure.layout.margin.t
    make_room_for_legend(figure)
    assert figure.layout.height - figure.layout.margin.t == plot_height
    rows = (figure.layout.margin.t - 46) / 30
    entries_per_row = entries / rows
    width_per_entry = 7.6 * len("a long name of a model, number 0")
    assert entries_per_row * width_per_entry <= HALF_PAGE
