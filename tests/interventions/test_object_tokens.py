"""Which image tokens are the asked object's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import probekit as pk
from probekit.images import load_rgb
from probekit.interventions.object_tokens import (
    ELSEWHERE,
    NO_OBJECT,
    OBJECT,
    ObjectMarker,
    choose_tokens,
    find_object_boxes,
)
from probekit.models.token_grid import NoTokenGrid, TokenGrid
from probekit.paths import Home
from probekit.workflow import build_examples, extract
from tests.conftest import SPLIT_SIZES

ROUTE = {"erase": [], "doses": [], "inputs": [], "routes": ["object>all"]}


def grid_cells(side: int) -> np.ndarray:
    ends = np.linspace(0, 1, side + 1)
    rows, columns = np.divmod(np.arange(side * side), side)
    return np.stack([ends[columns], ends[rows], ends[columns + 1], ends[rows + 1]], 1)


def test_tokens_in_boxes_and_as_many_elsewhere():
    inside_i, elsewhere_i = choose_tokens(grid_cells(4), np.array([[0, 0, 0.5, 0.5]]), seed=0)
    assert np.flatnonzero(inside_i).tolist() == [0, 1, 4, 5]
    assert elsewhere_i.sum() == 4 and not (inside_i & elsewhere_i).any()
    beside = np.array([[-1, 0, -0.5, 1]])  # what no token covers, as where an image is cropped
    assert not any(mask_i.any() for mask_i in choose_tokens(grid_cells(4), beside, seed=0))
    large = np.array([[0, 0, 0.8, 1]])  # fewer tokens are elsewhere
    assert not any(mask_i.any() for mask_i in choose_tokens(grid_cells(4), large, seed=0))
    small = np.array([[0.3, 0.3, 0.32, 0.32]])  # less than half of any token
    assert np.flatnonzero(choose_tokens(grid_cells(4), small, seed=0)[0]).tolist() == [5]
    others = [choose_tokens(grid_cells(4), small, seed=seed)[1].argmax() for seed in range(9)]
    assert len(set(others)) > 3


def test_boxes_are_those_of_all_that_is_asked_about():
    examples = pd.DataFrame(
        {"image_id": [1, 1, 2, 3, 4, 5], "asked": [["dog"], ["cat"], ["cat"], ["dog"], [], ["ox"]]}
    )
    instance = {"y": 0, "h": 50, "width": 100, "height": 100, "tiny": False}
    instances = pd.DataFrame(
        instance | one
        for one in [
            {"image_id": 1, "category": "dog", "x": 0, "w": 20},
            {"image_id": 1, "category": "dog", "x": 50, "w": 20},
            {"image_id": 1, "category": "car", "x": 80, "w": 20},
            {"image_id": 2, "category": "dog", "x": 0, "w": 20},
            {"image_id": 3, "category": "dog", "x": 0, "w": 100, "h": 60},
            {"image_id": 4, "category": "dog", "x": 0, "w": 20},
            {"image_id": 5, "category": "ox", "x": 0, "w": 1, "h": 1, "tiny": True},
        ]
    )
    boxes = find_object_boxes(examples, instances)
    assert set(boxes) == {1, 3}  # the ox is too small to be asked about
    assert boxes[1].tolist() == [[0, 0, 0.2, 0.5], [0.5, 0, 0.7, 0.5]]
    assert find_object_boxes(examples.drop(columns="asked"), instances) == {}


@pytest.fixture(scope="module")
def objects(scene_folder, tmp_path_factory):
    home = Home.find(tmp_path_factory.mktemp("objects"))
    examples = build_examples(
        scene_folder, run="objects", tasks=["object", "caption"], home=home, **SPLIT_SIZES
    )
    return extract("tiny-qwen2-vl", examples, poolings=["mean"], home=home), home


def test_marked_tokens_lie_in_the_boxes(vlm, objects):
    activations, home = objects
    examples = activations.examples
    examples = examples[(examples.task == "object") & (examples.split == "test")]
    examples = examples.reset_index(drop=True)
    boxes = {image: np.array([[0.5, 0, 1, 1]]) for image in examples.image_id.unique()[1:]}
    marker = ObjectMarker(vlm, examples, boxes, longest_side=None, home=home, seed=0)
    assert marker.refusal == ""
    for row, example in enumerate(examples.itertuples()):
        image = load_rgb(home.resolve(example.file))
        prepared = vlm.prompt_processor.prepare(image, [example.prompt])
        marks = marker.mark(prepared, row).marks
        cells = TokenGrid(vlm)(prepared, image.size)
        expected = cells[:, 0] >= 0.5 - 1e-9
        if example.image_id not in boxes:
            assert not marks[OBJECT].any() and not marks[ELSEWHERE].any()
            continue
        centres = cells[:, [0, 2]].mean(1)
        assert marks[OBJECT][expected].all()
        assert (centres[marks[OBJECT]] >= 0.5 - 1e-9).all()
        assert (centres[marks[ELSEWHERE]] < 0.5).all()


def test_the_route_is_cut_where_a_task_asks_about_objects(objects, capsys):
    activations, home = objects
    table = pk.intervene(
        activations, **ROUTE, images=12, resamples=30, fit_images=5, device="cpu", home=home
    )
    cut = table[(table.intervention == "cut") & (table.site == "object>all")]
    done = cut[(cut.metric == "accuracy") & cut.value.notna()]
    assert set(done.task) == {"object"}
    assert set(done.control) == {"none", "random"}
    assert done.layer.nunique() == 8
    of_all = table[(table.task == "object") & (table.intervention == "none")].n.iloc[0]
    assert 0 < done.n.iloc[0] <= of_all
    refused = cut[(cut.task == "caption") & cut.value.isna()]
    assert set(refused.reason) == {NO_OBJECT}
    margins = cut[(cut.task == "object") & (cut.metric == "margin_effect")]
    assert (margins.value != 0).any()


def test_one_image_with_such_tokens_is_too_few(objects, monkeypatch):
    activations, home = objects
    chosen = activations.examples.image_id[activations.examples.split == "test"].iloc[0]

    def find_one(examples, instances):
        boxes = find_object_boxes(examples, instances)
        return {image: one for image, one in boxes.items() if image == chosen}

    monkeypatch.setattr("probekit.interventions.study.find_object_boxes", find_one)
    table = pk.intervene(
        activations,
        **ROUTE,
        watch=["object"],
        images=12,
        resamples=30,
        fit_images=5,
        device="cpu",
        home=home,
    )
    cut = table[table.site == "object>all"]
    assert cut.value.isna().all()
    assert cut.reason.str.startswith("fewer than two test images have such tokens").all()


def test_a_model_without_a_grid_says_why(vlm, objects, monkeypatch):
    activations, home = objects
    examples = activations.examples[activations.examples.task == "object"].head(3)

    def refuse(*arguments, **options):
        raise NoTokenGrid("its tokens look everywhere")

    monkeypatch.setattr("probekit.interventions.object_tokens.check_token_grid", refuse)
    boxes = {image: np.array([[0.5, 0, 1, 1]]) for image in examples.image_id}
    marker = ObjectMarker(vlm, examples, boxes, longest_side=None, home=home, seed=0)
    assert marker.refusal == "its tokens look everywhere"
    image = load_rgb(home.resolve(examples.file.iloc[0]))
    prepared = vlm.prompt_processor.prepare(image, ["?"])
    assert not marker.mark(prepared, 0).marks[OBJECT].any()
    without = replace(prepared, marks={})
    assert without.with_prompts([0]).marks == {}
