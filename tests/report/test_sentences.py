import re
from dataclasses import replace

import numpy as np
import pandas as pd

from probekit.probes import results
from probekit.probes.probing import probe
from probekit.report import sentences
from probekit.tasks.base import task_infos
from tests.probes.test_probing import QUICK, planted


def run(tmp_path, **change):
    activations, table = planted(tmp_path)
    settings = replace(QUICK, probes=("logreg",), resamples=400, **change)
    return probe(activations, table, settings, tmp_path / "out"), table


def test_the_summary_names_the_planted_layer_its_controls_and_no_false_alarm(tmp_path):
    found, table = run(tmp_path, controls=("shuffled", "control_task"), codelength=True)
    text, = sentences.summarise(found.metrics, task_infos(table))
    best = results.best_layers(found.metrics, task_infos(table))
    value = best[best.control == "none"].value[0]
    assert f"the one on lm.02 (chosen on validation images) has a test accuracy of {value:.3f}" in text
    assert "the truly best layer is among lm.02 (1 of 4 layers)" in text
    assert re.search(r"fewest at lm\.02 \(0\.\d\d\)", text)
    assert re.search(r"Selectivity at lm\.0\d, accuracy minus that of the control task: 0\.\d", text)
    assert "shuffled labels 0." in text.partition("At chance")[2] and "no layer can be told" not in text


def test_selectivity_is_the_difference_to_the_control_task(tmp_path):
    found, _ = run(tmp_path, controls=("control_task",))
    table = found.metrics[(found.metrics.split == "test") & (found.metrics["class"] == "")]
    score = table[table.metric == "accuracy"].pivot_table(index="layer", columns="control", values="value")
    selectivity = table[table.metric == "selectivity"].set_index("layer")
    np.testing.assert_allclose(selectivity.value, score["none"] - score["control_task"])
    assert ((selectivity.lo < selectivity.value) & (selectivity.value < selectivity.hi)).all()


def test_a_control_above_chance_is_said_with_its_meaning(tmp_path):
    found, table = run(tmp_path)
    leaking = found.metrics[found.metrics.control == "none"].assign(control="no_image")
    text, = sentences.summarise(pd.concat([found.metrics, leaking]), task_infos(table))
    assert "No image 0." in text and "above chance: the texts alone give that much of the labels away" in text


def test_what_to_doubt_is_said(tmp_path):
    activations, table = planted(tmp_path, layer="none", images=60)
    settings = replace(QUICK, probes=("logreg",), resamples=200, strengths=(1.0, 10.0))
    found = probe(activations, table, settings, tmp_path / "out")
    text, = sentences.summarise(found.metrics, task_infos(table))
    doubt = text.partition("Doubt: ")[2]
    assert "no layer can be told from the best" in doubt and "wide: take more test images" in doubt
    assert "at an end of the grid" in doubt


def test_two_models_are_compared_on_the_same_images(tmp_path):
    found, table = run(tmp_path)
    key, = found.predictions
    other = {key.replace("planted", "other"): np.full_like(found.predictions[key], 0.4)}
    both = results.ProbeResults(pd.concat([found.metrics, found.metrics.assign(model="other")]), found.losses,
                           predictions=found.predictions | other)
    row, = sentences.compare_pairs(both, table).itertuples()
    assert row.a == "caption, planted, mean, lm.02" and row.b == "caption, other, mean, lm.02"
    yes = np.mean([y[0] for y, split in zip(table.labels, table.split, strict=True) if split == "test"])
    true = found.metrics[found.metrics.control == "none"]
    own = results.select_curve(true, "logreg", "accuracy").set_index("layer").value["lm.02"]
    np.testing.assert_allclose(row.difference, own - (1 - yes), atol=1e-6)
    assert row.lo < row.difference < row.hi and row.p < 0.01
    assert not len(sentences.compare_pairs(found, table))


def test_a_guess_that_beats_one_half_is_said_with_its_meaning(tmp_path):
    activations, table = planted(tmp_path)
    labels = [[1] if i % 4 else y for i, y in enumerate(table.labels)]  # nearly all are yes
    table = table.assign(labels=labels)
    found = probe(activations, table, replace(QUICK, probes=("logreg",), resamples=200), tmp_path / "out")
    text, = sentences.summarise(found.metrics, task_infos(table))
    assert re.search(r"Majority label 0\.8\d\d, above one half: labels are out of balance", text)
    assert re.search(r"guessed with an accuracy of 0\.8", text)
