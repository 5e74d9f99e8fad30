import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probekit.probes.probing import ProbeSettings, probe_activations
from probekit.probes.results import best_layers, select_curve
from probekit.report.sentences import compare_pairs, summarise
from tests.support.tables import planted_activations

SETTINGS = ProbeSettings(probes=("logreg",), resamples=200, codelength=False)


@pytest.fixture(scope="module")
def activations():
    return planted_activations()


@pytest.fixture(scope="module")
def results(activations, tmp_path_factory):
    """The signal is planted at lm.02; with controls and codelengths."""
    settings = replace(SETTINGS, controls=("shuffled", "control_task"), codelength=True)
    folder = tmp_path_factory.mktemp("sentences")
    return probe_activations(activations, settings=settings, folder=folder)


@pytest.mark.slow
def test_the_summary_names_the_planted_layer_its_controls_and_no_false_alarm(results):
    (text,) = summarise(results.metrics, results.tasks)
    best = best_layers(results.metrics, results.tasks)
    value = best[best.control == "none"].value.iloc[0]
    assert "the one on lm.02 (chosen on validation images)" in text
    assert f"has a test accuracy of {value:.3f}" in text
    assert "the truly best layer is among lm.02 (1 of 4 layers)" in text
    assert re.search(r"fewest at lm\.02 \(0\.\d\d\)", text)
    assert re.search(r"Selectivity at lm\.02, accuracy minus that of the control task: 0\.\d", text)
    assert "shuffled labels 0." in text.partition("At chance")[2]
    assert "no layer is clearly worse" not in text


def test_selectivity_lies_within_its_interval(results):
    rows = results.metrics[results.metrics.metric == "selectivity"]
    assert len(rows) == 4
    assert ((rows.lo < rows.value) & (rows.value < rows.hi)).all()


def test_a_control_above_chance_is_named_with_its_meaning(results):
    metrics = results.metrics
    leaking = metrics[metrics.control == "none"].assign(control="no_image")
    (text,) = summarise(pd.concat([metrics, leaking]), results.tasks)
    assert "No image 0." in text
    assert "above chance: the texts alone give that much of the labels away" in text


def test_a_guess_that_beats_one_half_is_named_with_its_meaning(activations, tmp_path):
    labels = [[1] if i % 4 else label for i, label in enumerate(activations.examples["labels"])]
    mostly_yes = activations.with_examples(labels=labels)
    results = probe_activations(mostly_yes, settings=SETTINGS, folder=tmp_path)
    (text,) = summarise(results.metrics, results.tasks)
    assert re.search(r"Majority label 0\.8\d\d, above one half: labels are out of balance", text)
    assert re.search(r"guessed with an accuracy of 0\.8", text)


def test_what_to_doubt_is_named(tmp_path):
    activations = planted_activations(layer=None, images=60)
    settings = replace(SETTINGS, strengths=(1.0, 10.0))
    results = probe_activations(activations, settings=settings, folder=tmp_path)
    (text,) = summarise(results.metrics, results.tasks)
    doubts = text.partition("Doubt: ")[2]
    assert "no layer is clearly worse than the best" in doubts
    assert "wide: take more test images" in doubts
    assert "at an end of the grid" in doubts


def test_seeds_that_differ_are_a_doubt(results):
    rows = results.metrics[results.metrics.control == "none"]
    other_seed = rows.assign(seed=1, value=rows.value - 0.2)
    (text,) = summarise(pd.concat([rows, other_seed]), results.tasks)
    assert "seeds differ by up to 0.200 at a layer" in text.partition("Doubt: ")[2]


def test_two_models_are_compared_on_the_same_images(activations, results):
    (key,) = results.predictions
    always_no = np.full_like(results.predictions[key], 0.4)
    both = replace(
        results,
        metrics=pd.concat([results.metrics, results.metrics.assign(model="other")]),
        predictions={**results.predictions, key._replace(model="other"): always_no},
    )
    examples = activations.examples
    (row,) = compare_pairs(both, examples, resamples=400).itertuples()
    assert row.a == "caption, planted, mean, lm.02"
    assert row.b == "caption, other, mean, lm.02"
    test_labels = [label[0] for label in examples["labels"][examples.split == "test"]]
    accuracy_of_no = 1 - np.mean(test_labels)
    trained = results.metrics[results.metrics.control == "none"]
    accuracy = select_curve(trained, probe="logreg", metric="accuracy").set_index("layer").value
    np.testing.assert_allclose(row.difference, accuracy["lm.02"] - accuracy_of_no, atol=1e-6)
    assert row.lo < row.difference < row.hi
    assert row.p < 0.01


def test_a_model_alone_has_nothing_to_be_compared_with(activations, results):
    table = compare_pairs(results, activations.examples)
    assert len(table) == 0
    assert {"a", "b", "difference", "p_holm"} <= set(table.columns)
