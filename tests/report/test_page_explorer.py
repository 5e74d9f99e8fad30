from dataclasses import replace

import numpy as np
import pytest

from probekit.probes.results import ProbeKey
from probekit.report.example_search import KNOWN_NOT_SAID, SORT_KEYS
from probekit.report.page_explorer import example_figure, page_explorers


@pytest.fixture(scope="module")
def figure(saved_run):
    return example_figure(saved_run, "tiny-qwen2-vl")


def heat_trace(figure):
    return next(trace for trace in figure.data if trace.type == "heatmap")


def test_trained_models_have_an_explorer(saved_run):
    assert list(page_explorers(saved_run)) == ["explorer_tiny-qwen2-vl"]


def test_the_menu_has_two_examples_of_each_order_and_task(figure):
    labels = [button.label for button in figure.layout.updatemenus[0].buttons]
    kinds = [label.partition(" — image ")[0] for label in labels]
    expected = [
        f"{task}: {order}" for task in ("category", "caption") for order in SORT_KEYS for _ in "12"
    ]
    assert kinds[:12] == expected
    assert set(kinds[12:]) <= {f"caption: {KNOWN_NOT_SAID}"}
    images = [label.partition(" — image ")[2] for label in labels]
    assert len(set(images[:6])) == 6
    assert len(set(images[6:])) == len(images[6:])


def test_what_is_known_but_answered_wrongly_is_just_that(saved_run):
    """Whatever the model says: here the opposite of what its probe reads in the last layer."""
    results = saved_run.results
    predictions = dict(results.predictions)
    state = ("tiny-qwen2-vl", "none")
    probe = predictions[ProbeKey(*state, "mean", "caption", "logreg")]
    for key in predictions:
        if key.task == "caption" and key.probe == "lens" and key.control == "none":
            predictions[key] = (1 - probe.astype(float)).astype(np.float16)
    run = replace(saved_run, results=replace(results, predictions=predictions))
    figure = example_figure(run, "tiny-qwen2-vl")
    buttons = [
        button for button in figure.layout.updatemenus[0].buttons if KNOWN_NOT_SAID in button.label
    ]
    assert len(buttons) == 2
    for button in buttons:
        properties, layout = button.args
        said = layout["title.text"].partition("the model says ")[2].partition(" (")[0]
        curve = properties["y"][2]
        truth = properties["name"][2].rpartition(": ")[2]
        assert ("yes" if curve[-1] >= 0.5 else "no") == truth
        assert {said, truth} == {"yes", "no"}
        lens = properties["y"][properties["name"].index("lens")]
        np.testing.assert_allclose(lens, 1 - np.array(curve), atol=2e-3)


def test_a_button_changes_every_trace_to_its_example(saved_run, figure):
    button = figure.layout.updatemenus[0].buttons[0]
    properties, layout = button.args
    row = saved_run.test_examples("category")
    image_id = int(button.label.rpartition(" ")[2])
    row = row[row.image_id == image_id].iloc[0]
    counted = np.flatnonzero(row["mask"])
    classes = saved_run.results.tasks["category"].classes
    names = [f"{classes[c]}: {'yes' if row.labels[c] else 'no'}" for c in counted]
    assert [name for name in properties["name"] if name] == names
    assert len(properties["x"]) == len(figure.data)
    assert layout["sliders"][0]["active"] == 8
    assert layout["images"][0]["source"].startswith("data:image/jpeg;base64,")


def test_the_slider_changes_heat_and_mark(figure):
    steps = figure.layout.sliders[0].steps
    assert len(steps) == 9
    last = steps[-1].args[0]
    np.testing.assert_array_equal(heat_trace(figure).z, last["z"][0])
    mark = figure.data[steps[-1].args[1][1]]
    assert list(mark.x) == list(last["x"][1]) == [8, 8]
    heats = [np.array(step.args[0]["z"][0]) for step in steps]
    assert all(heat.max() == 1 for heat in heats)
    assert not np.array_equal(heats[0], heats[-1])


def test_an_example_without_heat_shows_none(figure):
    caption_button = figure.layout.updatemenus[0].buttons[-1]
    properties, layout = caption_button.args
    place = [trace.type for trace in figure.data].index("heatmap")
    assert set(np.ravel(properties["z"][place])) == {None}
    assert "heat of" not in layout["title.text"]


def test_boxes_lie_on_the_photo(figure):
    width = figure.layout.images[0].sizex
    lines = [trace for trace in figure.data if trace.type == "scatter"]
    boxes = next(trace for trace in lines if trace.line.color == "white")
    xs = [x for x in boxes.x if x is not None]
    ys = [y for y in boxes.y if y is not None]
    assert len(xs) % 5 == 0  # closed outlines
    assert 0 <= min(xs) < max(xs) <= width + 1e-9
    assert 0 <= min(ys) < max(ys) <= 1
