import pandas as pd
import pytest

from probekit.interventions.settings import STEER
from probekit.report.style import DARK, LIGHT
from probekit.report.used import doses_figure, effect_heatmap


def luminance(colour):
    """Relative luminance of WCAG 2 of a hexadecimal or rgb(...) colour."""
    if colour.startswith("#"):
        values = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    else:
        values = [float(value) for value in colour[4:-1].split(",")]
    shares = [value / 255 for value in values]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def interventions(**values):
    row = {
        "model": "a",
        "task": "object",
        "control": "none",
        "site": "last",
        "value": 0.4,
        "lo": 0.3,
        "hi": 0.5,
        "p_holm": 1.0,
    }
    return row | values


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_every_layer_of_doses_stands_out_from_the_page(theme):
    rows = [
        interventions(intervention=STEER, metric="says_yes", layer=f"lm.{k:02d}", dose=dose)
        for k in range(12)
        for dose in (-1.0, 1.0)
    ]
    rows.append(interventions(intervention="none", metric="says_yes", layer="", dose=0.0))
    figure = doses_figure(pd.DataFrame(rows), "object")
    colours = [trace.line.color for trace in figure.data]
    assert len(set(colours)) == 12
    page = {LIGHT: "#ffffff", DARK: "#15171c"}[theme]
    for colour in colours:
        darker, lighter = sorted([luminance(page), luminance(colour)])
        assert (lighter + 0.05) / (darker + 0.05) >= 3


def test_an_effect_is_called_a_difference():
    rows = [interventions(intervention="leace", metric="effect", layer="lm.01")]
    (trace,) = effect_heatmap(pd.DataFrame(rows), "object").data
    assert "accuracy difference %{z:+.3f}" in trace.hovertemplate
