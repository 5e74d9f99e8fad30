import pandas as pd

from probekit.report.comparisons import (
    global_and_local,
    pooling_curves,
    stage_curves,
    task_curves,
)
from tests.support.figures import curves_by_name


def test_global_and_local_marks_the_peaks(table, tasks):
    table = table.copy()
    is_late = (table.task == "category") & (table.layer == "lm.01") & (table.control == "none")
    table.loc[is_late, "value"] = 0.95
    figure = global_and_local(table, tasks)
    stars = [
        trace for trace in figure.data if trace.marker.symbol == "star" and trace.hovertemplate
    ]
    assert [list(star.x) for star in stars[:2]] == [[3], [1]]
    assert "<b>small, peak of caption</b><br>lm.03" in stars[0].hovertemplate


def test_layers_that_no_other_beats_at_both_are_filled(table, tasks):
    table = table.copy()
    is_late = (table.task == "category") & (table.layer == "lm.01") & (table.control == "none")
    table.loc[is_late, "value"] = 0.95
    figure = global_and_local(table, tasks)
    points = [trace for trace in figure.data if trace.mode == "markers+text"]
    assert [trace.hovertemplate.split("<br>")[0] for trace in points] == [
        "<b>small</b>, %{customdata}",
        "<b>large</b>, %{customdata}",
    ]
    assert list(points[0].x) == [0.5, 0.95, 0.7, 0.8]
    assert list(points[0].text) == ["0", "1", "", "3"]
    is_filled = [colour != "rgba(0,0,0,0)" for colour in points[0].marker.color]
    assert is_filled == [False, True, False, True]


def test_every_pooling_has_a_symbol_and_a_shade(table):
    table = pd.concat([table, table.assign(pooling="last", value=0.9)])
    curves = curves_by_name(pooling_curves(table, "caption", "accuracy"))
    assert set(curves) == {"small, mean", "small, last", "large, mean", "large, last"}
    assert set(curves["small, last"].y) == {0.9}
    assert curves["small, mean"].marker.symbol != curves["small, last"].marker.symbol
    colours = {curve.line.color for curve in curves.values()}
    assert len(colours) == 4


def test_tasks_are_drawn_with_what_their_texts_give_away(table):
    texts = table[table.control == "none"].assign(control="word_order", value=0.55)
    figure = task_curves(pd.concat([table, texts]), ["caption", "category"])
    curves = curves_by_name(figure)
    assert {"small, caption", "small, category", "large, caption"} <= set(curves)
    dotted = [trace for trace in figure.data if trace.line.dash == "dot" and trace.hovertemplate]
    assert len(dotted) == 4  # two models, two tasks
    assert all(set(trace.y) == {0.55} for trace in dotted)


def test_stages_stand_one_after_the_other(saved_run):
    figure = stage_curves(saved_run.results.metrics, "category", "f1_macro")
    curves = [trace for trace in figure.data if trace.hovertemplate]
    ends = [(min(curve.x), max(curve.x)) for curve in curves]
    assert ends == [(0, 1), (1.18, 1.18), (1.36, 2.36)]
    assert [curve.showlegend for curve in curves] == [True, False, False]


def test_stages_are_drawn_by_a_pooling_that_all_have(saved_run):
    table = saved_run.results.metrics
    decoder = table[(table.stage == "lm") & (table.pooling == "mean")]
    experts = decoder.assign(stage="experts", layer=decoder.layer.str.replace("lm", "experts"))
    of_text = [part.assign(pooling="text_mean") for part in (experts, decoder)]
    figure = stage_curves(pd.concat([*of_text, table, experts]), "category", "f1_macro")
    curves = [trace for trace in figure.data if trace.hovertemplate]
    assert [min(curve.x) for curve in curves] == [0, 1.18, 1.36, 2.54]


def test_many_models_have_panels_that_are_wide_enough(table):
    small = table[(table.model == "small") & (table.task == "caption")]
    table = pd.concat([small.assign(model=f"model {k}") for k in range(7)])
    figure = pooling_curves(table, "caption", "accuracy")
    axes = {trace.xaxis for trace in figure.data if trace.hovertemplate}
    domains = [axis.domain for axis in figure.select_xaxes()]
    assert len(axes) == len(domains) == 7  # the place that is left over has no axes
    assert min(end - start for start, end in domains) > 0.2
    assert len({axis.domain for axis in figure.select_yaxes()}) == 2
    assert figure.layout.height > 700
