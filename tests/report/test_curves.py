import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from probekit.probes.controls import CONTROL_WORDS
from probekit.report.curves import (
    controls_above_chance,
    layer_curves,
    localisation_curves,
    loss_curves,
)
from probekit.report.style import CONTROL_DASHES, DEPTH_AXIS
from tests.report.conftest import TASKS
from tests.support.figures import curves_by_name

CAPTION, CATEGORY = TASKS["caption"], TASKS["category"]


def test_curves_show_every_layer_of_every_model(table):
    figure = layer_curves(table, "caption", CAPTION, "accuracy")
    curves = curves_by_name(figure)
    assert set(curves) == {"small", "large", "small untrained"}
    assert list(curves["large"].x) == list(range(7))
    np.testing.assert_allclose(curves["small"].y, [0.5, 0.6, 0.7, 0.8])
    assert curves["small untrained"].line.dash == "dash"
    assert curves["small"].line.color == curves["small untrained"].line.color
    for property_of in (
        lambda curve: curve.line.color,
        lambda curve: curve.line.dash,
        lambda curve: curve.marker.symbol,
    ):
        assert property_of(curves["small"]) != property_of(curves["large"])
    bands = [trace for trace in figure.data if trace.fill == "toself" and not trace.name]
    assert len(bands) == 2
    assert max(bands[0].y) == pytest.approx(0.85)
    assert min(bands[0].y) == pytest.approx(0.45)


def test_the_plateau_is_highlighted_and_explained(table):
    figure = layer_curves(table, "caption", CAPTION, "accuracy")
    plateau = next(trace for trace in figure.data if trace.name == "large, plateau")
    assert list(np.isfinite(np.array(plateau.y, float))) == [False] * 3 + [True] * 4
    in_legend = {
        trace.name
        for trace in figure.data
        if trace.showlegend is not False and trace.visible is not False
    }
    assert in_legend == {
        "small",
        "large",
        "untrained model, small",
        "not clearly worse than the best",
    }
    details = curves_by_name(figure)["small"].customdata
    assert details[0][5] == "lm.03"  # the best layer
    assert details[0][6] == ""
    assert "not clearly worse" in details[3][6]


def test_models_of_any_depth_share_a_relative_axis(table):
    figure = layer_curves(table, "caption", CAPTION, "accuracy", published=True, relative=True)
    curves = curves_by_name(figure)
    np.testing.assert_allclose(curves["small"].x, [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curves["large"].x, np.arange(7) / 6)
    published = curves["Qwen2-VL-2B, published accuracy"]
    assert published.x[-1] == 1
    assert published.customdata[-1] == 28
    assert figure.layout.xaxis.title.text == DEPTH_AXIS


def test_buttons_change_between_layers_and_relative_depth(table):
    figure = layer_curves(table, "caption", CAPTION, "accuracy", published=True, relative=True)
    layer_button, depth_button, _ = figure.layout.updatemenus[0].buttons
    layer_xs = layer_button.args[0]["x"]
    depth_xs = depth_button.args[0]["x"]
    for trace, layer_x, depth_x in zip(figure.data, layer_xs, depth_xs, strict=True):
        assert list(trace.x) == list(depth_x)
        if trace.hovertemplate:
            np.testing.assert_allclose(np.array(layer_x) / max(layer_x), depth_x)


def test_by_depth_the_band_has_controls_of_all_models_at_the_same_depth(table):
    table = with_controls(table, no_image=0.5)
    number = table.layer.str[3:].astype(int)
    last = table.model.map({"small": 3, "large": 6})
    is_control = table.control == "no_image"
    table.loc[is_control, "value"] = 0.4 + 0.1 * (number / last)[is_control]  # the same by depth
    figure = layer_curves(table[table.control != "untrained"], "caption", CAPTION, "f1_macro")
    layer_button, depth_button, _ = figure.layout.updatemenus[0].buttons
    place = next(i for i, trace in enumerate(figure.data) if trace.name and trace.fill == "toself")
    x, y = (np.array(depth_button.args[0][name][place]) for name in "xy")
    np.testing.assert_allclose(y, 0.4 + 0.1 * x, atol=1e-6)
    assert len(x) == 2 * 7
    assert "relative depth 0.50" in depth_button.args[0]["hovertext"][place + 1][3]
    assert list(layer_button.args[0]["y"][place]) == list(figure.data[place].y)
    begun = layer_curves(
        table[table.control != "untrained"], "caption", CAPTION, "f1_macro", relative=True
    )
    np.testing.assert_allclose(begun.data[place].y, y)


def test_published_numbers_can_be_overlaid(table):
    curves = curves_by_name(layer_curves(table, "caption", CAPTION, "accuracy", published=True))
    assert len(curves["Qwen2-VL-2B, published accuracy"].x) == 29
    assert len(curves["FastVLM-0.5B, published accuracy"].x) == 25
    assert not any("Gemma" in name for name in curves)


def test_what_the_study_calls_macro_f1_is_drawn_as_micro_f1(table):
    micro = curves_by_name(layer_curves(table, "category", CATEGORY, "f1_micro", published=True))
    macro = curves_by_name(layer_curves(table, "category", CATEGORY, "f1_macro", published=True))
    assert any("published micro-F1" in name for name in micro)
    assert not any("published" in name for name in macro)


def test_the_pooling_is_chosen_and_named(table):
    table = pd.concat([table, table.assign(pooling="last", value=0.9)])
    first = layer_curves(table, "caption", CAPTION, "accuracy")
    assert "mean pooling" in first.layout.title.subtitle.text
    assert set(curves_by_name(first)["small"].y) == {0.5, 0.6, 0.7, 0.8}
    last = layer_curves(table, "caption", CAPTION, "accuracy", pooling="last")
    assert "last pooling" in last.layout.title.subtitle.text
    assert set(curves_by_name(last)["small"].y) == {0.9}


def test_a_missing_probe_is_named(table):
    with pytest.raises(ValueError, match="it has logreg, linear"):
        layer_curves(table, "caption", CAPTION, "accuracy", probe="mlp")


def test_guesses_without_the_states_are_lines_unless_they_lie_on_chance(table):
    rows = table[table.control == "none"]
    biased = rows.assign(control="majority", value=0.7)
    balanced = rows.assign(control="bag_of_words", value=0.505)
    figure = layer_curves(pd.concat([table, biased, balanced]), "caption", CAPTION, "accuracy")
    levels = {shape.y0 for shape in figure.layout.shapes}
    names = {annotation.text for annotation in figure.layout.annotations}
    assert levels == {0.5, 0.7}
    assert names == {"chance", "majority label"}
    assert set(curves_by_name(figure)) == {"small", "large", "small untrained"}


def with_controls(table, **values):
    """Give both models these controls, which score the same at all layers, ± 0.02."""
    rows = table[table.control == "none"]
    controls = [
        rows.assign(control=name, value=value, lo=value - 0.02, hi=value + 0.02, plateau=pd.NA)
        for name, value in values.items()
    ]
    return pd.concat([table, *controls], ignore_index=True)


def shown(figure):
    return {name for name, trace in curves_by_name(figure).items() if trace.visible is not False}


def test_controls_are_one_band_that_lists_them_on_hover(table):
    table = with_controls(table, no_image=0.48, shuffled=0.51)
    figure = layer_curves(table, "caption", CAPTION, "accuracy")
    assert shown(figure) == {"small", "large"}
    (area,) = [trace for trace in figure.data if trace.name and trace.fill == "toself"]
    assert (min(area.y), max(area.y)) == (0.48, 0.51)
    assert area.name.startswith("all controls<br>(highest: shuffled labels, ")
    (points,) = [trace for trace in figure.data if trace.hovertext]
    assert sorted(set(points.y)) == pytest.approx([0.48, 0.495, 0.51])
    at_layer_2 = points.hovertext[list(points.x).index(2)]
    assert "lm.02" in at_layer_2
    for line in (
        "no image: 0.480 (small), 0.480 (large)",
        "shuffled labels: 0.510 (small), 0.510 (large)",
        "untrained model: 0.500 (small)",
    ):
        assert line in at_layer_2.split("<br>")


def test_without_controls_there_is_no_band(table):
    figure = layer_curves(table[table.control == "none"], "caption", CAPTION, "accuracy")
    assert not [trace for trace in figure.data if trace.name and trace.fill == "toself"]


def test_a_button_shows_each_control_with_its_entry(table):
    figure = layer_curves(with_controls(table, shuffled=0.51), "caption", CAPTION, "accuracy")
    button = figure.layout.updatemenus[0].buttons[2]
    changes, numbers = button.args
    assert changes == {"visible": True}
    names = {figure.data[number].name for number in numbers}
    assert {"small untrained", "small shuffled labels", "large shuffled labels"} <= names
    assert {"untrained model", "shuffled labels"} <= names
    assert button.args2[0] == {"visible": False}


def test_a_control_above_chance_is_never_hidden_in_the_band(table):
    table = with_controls(table, no_image=0.6, wrong_image=0.515, shuffled=0.49)
    figure = layer_curves(table, "caption", CAPTION, "f1_macro")
    assert shown(figure) == {"small", "large", "small no image", "large no image"}
    (area,) = [trace for trace in figure.data if trace.name and trace.fill == "toself"]
    assert max(area.y) == 0.515
    assert area.name.startswith("other controls<br>(highest: wrong image, ")
    entries = [trace.name for trace in figure.data if trace.visible is True and trace.name]
    assert "no image" in entries
    (points,) = [trace for trace in figure.data if trace.hovertext]
    assert all("no image: 0.600 (small)" in text for text in points.hovertext[:4])


def test_a_control_is_judged_at_the_layer_that_validation_chooses(table):
    table = with_controls(table, no_image=0.5, wrong_image=0.5)
    is_large = table.model == "large"
    is_chosen = (table.control == "no_image") & (table.layer == "lm.05") & is_large
    is_lucky = (table.control == "wrong_image") & table.layer.isin(["lm.02", "lm.03"]) & is_large
    raised = is_chosen | (is_lucky & (table.split == "test"))
    table.loc[raised, ["value", "lo", "hi"]] = 0.8, 0.78, 0.82
    figure = layer_curves(table, "caption", CAPTION, "accuracy")
    assert shown(figure) == {"small", "large", "large no image"}


def test_a_control_has_a_line_where_the_overview_calls_it_above_chance(saved_run):
    results = saved_run.results
    overview = results.overview()
    judged = {name.removesuffix(" is") for name in overview if name.endswith(" is")}
    for task, pooling in {*zip(overview.task, overview.pooling, strict=True)}:
        rows = overview[(overview.task == task) & (overview.pooling == pooling)]
        above = {
            (row["model"], control)
            for _, row in rows.iterrows()
            for control in judged & {*CONTROL_DASHES}
            if row[f"{control} is"] == "above chance"
        }
        found = controls_above_chance(
            results.metrics, task, results.tasks[task], probe="logreg", pooling=pooling
        )
        assert found == above
        words = {control: CONTROL_WORDS[control].removesuffix(" model") for _, control in above}
        names = {f"{model} {words[control]}" for model, control in above}
        assert shown(results.plot("accuracy", task=task, pooling=pooling)) == {*rows.model, *names}


def test_a_guess_that_scores_as_much_leaves_the_control_in_the_band(table):
    table = with_controls(table, no_image=0.6, majority=0.6)
    figure = layer_curves(table, "caption", CAPTION, "accuracy")
    assert shown(figure) == {"small", "large"}
    assert 0.6 in {shape.y0 for shape in figure.layout.shapes}


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
@pytest.mark.parametrize("value", [0.5, 0.999])
def test_axes_end_at_1_and_chance_looks_like_chance(table, metric, value):
    rows = table.assign(value=value, lo=value - 0.01, hi=min(1, value + 0.01))
    low, high = layer_curves(rows, "caption", CAPTION, metric).layout.yaxis.range
    assert 0 < low <= 0.45
    assert 1 < high <= 1.02


def test_heat_in_boxes_is_drawn_beside_that_of_absent_categories(saved_run):
    table = saved_run.results.metrics
    figure = localisation_curves(table, "category")
    names = {
        "tiny-qwen2-vl",
        "tiny-qwen2-vl, absent categories",
        "tiny-qwen2-vl untrained",
        "tiny-qwen2-vl untrained, absent categories",
    }
    for probe, axis in (("logreg", "x"), ("lens", "x2")):
        panel = go.Figure([trace for trace in figure.data if (trace.xaxis or "x") == axis])
        curves = curves_by_name(panel)
        assert names <= set(curves)
        rows = table[(table.probe == probe) & (table.control == "none")]
        for name, metric in (
            ("tiny-qwen2-vl", "heat_in_boxes"),
            ("tiny-qwen2-vl, absent categories", "others_in_boxes"),
        ):
            values = rows[rows.metric == metric].sort_values("layer").value
            np.testing.assert_allclose(curves[name].y, values)
    area = rows[rows.metric == "area_in_boxes"].value.mean()
    assert figure.layout.shapes[0].y0 == pytest.approx(area)
    entries = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert len(entries) == len(set(entries))
    depth = figure.layout.updatemenus[0].buttons[1].args[1]
    assert depth["xaxis.title.text"] == depth["xaxis2.title.text"]


def test_without_a_lens_the_probe_has_the_figure_to_itself(saved_run):
    table = saved_run.results.metrics
    alone = localisation_curves(table[table.probe != "lens"], "category")
    assert not [trace for trace in alone.data if trace.xaxis == "x2"]
    assert localisation_curves(table[table.probe == "lens"], "category").data


def test_losses_of_every_layer_are_on_the_slider(table, losses):
    figure = loss_curves(losses, table, "caption", metric="accuracy")
    curves = curves_by_name(figure)
    assert len([trace for trace in figure.data if trace.hovertemplate]) == 4
    assert set(curves) == {"train", "validation"}
    slider = figure.layout.sliders[0]
    assert [step.label for step in slider.steps] == [f"{k:02d}" for k in range(7)]
    assert slider.active == 3  # the best layer of the first model
    np.testing.assert_allclose(figure.data[0].y, [4, 3.5, 3 + 1 / 3])
    ys_at_layer_5 = slider.steps[5].args[0]["y"]
    np.testing.assert_allclose(ys_at_layer_5[2], [6, 5.5, 5 + 1 / 3])
    assert list(ys_at_layer_5[0]) == [None] * 3  # the small model has four layers
