"""Probes and answers on changed images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import probekit as pk
from probekit.interventions.inputs import WHOLE_IMAGE, score_inputs
from probekit.probes.results import ProbeKey
from probekit.probes.weights import ProbeWeights
from probekit.report.saved_run import SavedRun
from probekit.report.used import used_figure
from probekit.tasks.changed_images import IMAGE_CHANGES
from probekit.workflow import open_activations

INPUTS = (WHOLE_IMAGE, *IMAGE_CHANGES)
LAYERS = ["lm.00", "lm.01", "lm.02"]
NOTHING_ELSE = {"erase": [], "doses": [], "routes": [], "images": 12, "resamples": 50}


def test_probes_on_whole_images_score_what_the_results_hold(small_run):
    table = pk.intervene(open_activations("small"), **NOTHING_ELSE, device="cpu")
    on_inputs = table[table.site == "pixels"]
    assert set(on_inputs.intervention) == set(INPUTS)
    assert set(on_inputs.task) == {"category", "category_list"}
    assert set(on_inputs.pooling) == {"mean", "last"}
    assert set(on_inputs.metric) == {"probe_accuracy", "probe_effect"}
    assert (on_inputs.n == on_inputs.groupby("task").n.transform("first")).all()
    results = small_run.results
    whole = on_inputs[on_inputs.intervention == WHOLE_IMAGE]
    metrics = results.metrics
    of_all = metrics[
        (metrics.task == "category")
        & (metrics.probe == "logreg")
        & (metrics.control == "none")
        & (metrics.model == "tiny-qwen2-vl")
        & (metrics.metric == "accuracy")
        & (metrics.split == "test")
        & (metrics["class"] == "")
        & (metrics.pooling == "mean")
    ].set_index("layer")
    rows = whole[(whole.task == "category") & (whole.pooling == "mean")].set_index("read_layer")
    # Of some images the object is too large; the others are most of them.
    assert 0.7 * of_all.n.iloc[0] < rows.n.iloc[0] <= of_all.n.iloc[0]
    assert (rows.value - of_all.value.reindex(rows.index)).abs().max() < 0.15
    effect = on_inputs[on_inputs.metric == "probe_effect"]
    merged = effect.merge(whole, on=["task", "pooling", "read_layer"], suffixes=("", "_whole"))
    accuracy = on_inputs[on_inputs.metric == "probe_accuracy"]
    merged = merged.merge(
        accuracy, on=["task", "pooling", "read_layer", "intervention"], suffixes=("", "_here")
    )
    np.testing.assert_allclose(merged.value, merged.value_here - merged.value_whole, atol=1e-12)
    reopened = SavedRun.open("small").results
    assert {"category_surroundings", "category_list_surroundings"} <= set(reopened.figures())
    title = reopened.plot("surroundings", task="category", pooling="last").layout.title.text
    assert title.startswith("The object or its surroundings?")
    with pytest.raises(ValueError, match=r"no scores of caption on changed images .*: take one of"):
        reopened.plot("surroundings", task="caption")


def test_a_run_without_questions_about_objects_says_so(small_run, capsys):
    views = open_activations("small")
    examples = views[0].examples
    captions = views[0].__class__(
        views[0].folder,
        examples[examples.task == "caption"].reset_index(drop=True),
        views[0].stages,
        views[0].poolings,
        home=views[0].home,
        answer_pooling=views[0].answer_pooling,
    )
    table = pk.intervene([captions], **NOTHING_ELSE, device="cpu")
    assert not (table.site == "pixels").any()
    assert "no task of this run asks about objects" in capsys.readouterr().out


# ------------------------------------------------------------------------------- planted truth


class PlantedStates:
    """States of a model that sees the object in one direction and its surroundings in another.

    Layer 0 has neither, layer 1 the object, layer 2 the surroundings. A trained probe reads both.
    """

    poolings = ("mean",)
    stages = ("lm",)
    meta = {"model": "planted"}  # noqa: RUF012

    def __init__(self, examples: pd.DataFrame, rng: np.random.Generator) -> None:
        self.examples = examples
        self.layers = LAYERS
        truth = np.array([labels[0] for labels in examples.labels]) * 2.0 - 1
        noise = rng.normal(scale=0.3, size=(len(LAYERS), len(examples), 4))
        shows_object = examples.change.isin([WHOLE_IMAGE, "only_object", "same_area"])
        shows_rest = examples.change != "only_object"
        noise[1, :, 0] += truth * shows_object
        noise[2, :, 1] += truth * shows_rest
        self._states = noise.astype(np.float32)

    def layers_with(self, pooling: str) -> list[str]:
        return self.layers

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        return self._states[LAYERS.index(key[0])]


def planted_examples(images: int) -> pd.DataFrame:
    """Two questions about each image, one with each answer, in all splits."""
    rows = [
        {
            "image_id": image,
            "file": f"{image}.png",
            "split": split,
            "task": "object",
            "prompt": "?",
            "labels": [label],
            "mask": [1],
            "kind": "binary",
            "classes": ["match"],
            "question": "?",
        }
        for image in range(images)
        for split in (("train", "validation", "test")[image % 3],)
        for label in (0, 1)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seed", range(20))
def test_what_reads_the_object_falls_without_it_and_what_reads_the_rest_does_not(seed):
    examples = planted_examples(120)
    placed = examples.assign(place=np.arange(len(examples)))[examples.split == "test"]
    on_inputs = pd.concat([placed.assign(change=name) for name in INPUTS])
    states = PlantedStates(
        on_inputs.sort_values(["place"], kind="stable").reset_index(drop=True),
        np.random.default_rng(seed),
    )
    weight_ldc = np.zeros((3, 4, 1), np.float32)
    weight_ldc[:, :2] = 3
    ones = np.ones((3, 4), np.float32)
    weights = ProbeWeights(weight_ldc, np.zeros((3, 1), np.float32), 0 * ones, ones)
    key = ProbeKey("planted", "none", "mean", "object", "logreg")
    table = score_inputs(examples, states, {key: weights}, resamples=500)
    effect = table[table.metric == "probe_effect"].set_index(["intervention", "read_layer"])
    assert effect.p_holm["no_object", "lm.01"] < 0.05
    assert effect.value["no_object", "lm.01"] < -0.2
    assert effect.p_holm["only_object", "lm.02"] < 0.05
    assert effect.value["only_object", "lm.02"] < -0.2
    for stands in (("no_object", "lm.02"), ("only_object", "lm.01"), ("same_area", "lm.01")):
        assert abs(effect.value[stands]) < 0.1
    accuracy = table[table.metric == "probe_accuracy"].set_index(["intervention", "read_layer"])
    assert accuracy.value[WHOLE_IMAGE, "lm.01"] > 0.9
    assert (accuracy.n == 80).all()


def test_of_several_answers_the_largest_that_counts_is_given():
    examples = planted_examples(30).assign(
        kind="one_of",
        classes=[["1", "2", "3"]] * 60,
        labels=[[0, 1, 0]] * 60,
        mask=[[1, 1, 0]] * 60,
    )
    placed = examples.assign(place=np.arange(len(examples)), change=WHOLE_IMAGE)
    tested = placed[placed.split == "test"].reset_index(drop=True)
    states = SimpleNamespace(
        examples=tested,
        meta={"model": "planted"},
        poolings=("mean",),
        stages=("lm",),
        layers=LAYERS[:1],
        layers_with=lambda pooling: LAYERS[:1],
    )

    class Indexed(SimpleNamespace):
        def __getitem__(self, key):
            # The third answer is the largest, and does not count; half prefer the first.
            first = np.where(np.arange(len(tested)) % 2, 2.0, 0.0)
            return np.stack([first, np.ones(len(tested)), np.full(len(tested), 9.0)], 1)

    weights = ProbeWeights(
        np.eye(3, dtype=np.float32)[None],
        np.zeros((1, 3), np.float32),
        np.zeros((1, 3), np.float32),
        np.ones((1, 3), np.float32),
    )
    key = ProbeKey("planted", "none", "mean", "object", "logreg")
    table = score_inputs(examples, Indexed(**vars(states)), {key: weights}, resamples=20)
    assert table.value.tolist() == [0.5]
    assert table.n.tolist() == [20]


def test_a_model_whose_answers_were_not_watched_has_no_panel(small_run):
    wanted = NOTHING_ELSE | {"erase": ["leace"], "layers": [8], "tokens": ["last"]}
    table = pk.intervene(open_activations("small"), **wanted, fit_images=20, device="cpu")
    pixels = table[table.site == "pixels"].assign(model="another", task="caption")
    figure = used_figure(pd.concat([table, pixels], ignore_index=True), "caption")
    panels = {annotation.text for annotation in figure.layout.annotations}
    assert "tiny-qwen2-vl" in panels and "another" not in panels
