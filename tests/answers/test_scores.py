"""What a model says is scored as its probes are, and beside them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from probekit.answers.reading import LENS, TUNED_LENS
from probekit.answers.scores import ANSWER, score_answers
from probekit.models.output_head import AnswerHead, FinalNorm, Spelling
from probekit.probes.bootstrap import bootstrap_curve
from probekit.probes.metrics import (
    CALIBRATION_BINS,
    calibration_counts,
    calibration_error,
    calibration_interval,
)
from probekit.probes.probing import ProbeSettings, probe_activations
from probekit.probes.results import ProbeResults
from probekit.report.figures import run_figures
from probekit.report.known_and_said import answer_table, known_and_said, known_and_said_figure
from tests.support.tables import DECODER_LAYERS, WIDTH, planted_activations

SETTINGS = ProbeSettings(probes=("logreg",), strengths=(0.01, 1.0), codelength=False, resamples=400)


def planted_answers(*, from_layer: str, bias: float = 0.0, images: int = 400):
    """A model that says yes along one direction, which carries the label from one layer on.

    Before, that direction says no to everything. `bias` is added to what speaks for yes.
    """
    planted = planted_activations(layer=None, images=images)
    label_n = np.array(planted.examples["labels"].tolist())[:, 0]
    says = DECODER_LAYERS.index(from_layer)
    states = {}
    for k, layer in enumerate(DECODER_LAYERS):
        x_nd = planted.states[layer, "mean"].copy()
        x_nd[:, 0] = 3.0 * (2 * label_n - 1) if k >= says else -3.0
        states[layer, "last"] = x_nd
    rows_vd = np.zeros((2, WIDTH), np.float32)
    rows_vd[0, 0] = -1.0
    rows_vd[1, 0] = 1.0
    head = AnswerHead(
        spellings=(Spelling("no", 0, (7,)), Spelling("yes", 0, (9,))),
        token_ids=(7, 9),
        rows_vd=rows_vd,
        bias_v=np.array([0.0, bias], np.float32),
        norm=FinalNorm("none"),
    )
    examples = planted.examples.assign(answers=[[["no"], ["yes"]]] * len(planted.examples))
    return replace(planted, examples=examples, states=states, answer_head=head)


def score(activations, folder) -> pd.DataFrame:
    probed = probe_activations(activations, settings=SETTINGS, folder=folder, device="cpu")
    answers = score_answers(activations, probed, resamples=400, seed=0)
    return type(probed).join([probed, answers])


def values(table: pd.DataFrame, probe: str, metric: str) -> pd.Series:
    rows = table[(table.probe == probe) & (table.metric == metric) & (table.split == "test")]
    return rows[(rows["class"] == "") & (rows.control == "none")].set_index("layer").value


def test_the_depth_of_decision_is_where_it_was_planted(tmp_path):
    results = score(planted_answers(from_layer="lm.02"), tmp_path)
    table = results.metrics
    right = values(table, LENS, "accuracy")
    assert right["lm.02"] == right["lm.03"] == 1.0
    assert right["lm.00"] == pytest.approx(0.5, abs=0.1)
    decided = values(table, LENS, "decided")
    # Those that are answered with no have been decided from the beginning.
    assert decided["lm.01"] == pytest.approx(0.5, abs=0.1)
    assert decided["lm.02"] == decided["lm.03"] == 1.0
    assert values(table, ANSWER, "accuracy").to_dict() == {"lm.03": 1.0}


def test_a_model_that_says_yes_to_all_knows_better_at_another_threshold(tmp_path):
    results = score(planted_answers(from_layer="lm.01", bias=20.0), tmp_path)
    table = results.metrics
    said = table[(table.probe == ANSWER) & (table.split == "test") & (table["class"] == "")]
    said = said.set_index("metric")
    n_yes = table[(table.metric == "prevalence") & (table["class"] == "yes")].value.iloc[0]
    assert said.value["accuracy"] == pytest.approx(n_yes)
    assert said.value["accuracy_tuned"] == 1.0
    assert said.value["average_precision"] == pytest.approx(1.0)
    assert said.value["calibration_error"] == pytest.approx(1 - n_yes, abs=1e-3)
    both = known_and_said(table, "caption", results.tasks["caption"], model="planted")
    assert both.known.value == 1.0
    assert both.over_answer.value == pytest.approx(1 - n_yes)
    assert both.known_not_said.value == pytest.approx(1 - n_yes)
    assert both.over_answer.lo > 0.35
    assert both.says_yes == 1.0
    over_tuned = values(table, "logreg", "over_tuned_answer")
    assert over_tuned["lm.03"] == pytest.approx(0.0)


def test_gaps_are_differences_of_the_accuracies(tmp_path):
    results = score(planted_answers(from_layer="lm.03"), tmp_path)
    table = results.metrics
    said = values(table, ANSWER, "accuracy").iloc[0]
    known = values(table, "logreg", "accuracy")
    np.testing.assert_allclose(values(table, "logreg", "over_answer"), known - said, atol=1e-6)
    rows = table[table.metric == "over_answer"]
    assert ((rows.lo <= rows.value) & (rows.value <= rows.hi)).all()


@pytest.mark.slow
def test_the_table_and_the_figure_have_a_row_and_a_panel_for_each_model(tmp_path):
    first = score(planted_answers(from_layer="lm.02"), tmp_path / "a")
    other = replace(planted_answers(from_layer="lm.01", bias=20.0), model="yes-sayer")
    second = score(other, tmp_path / "b")
    joined = type(first).join([first, second])
    rows = answer_table(joined.metrics, joined.tasks)
    assert rows.model.tolist() == ["planted", "yes-sayer"]
    assert rows["over answer"].iloc[0] == pytest.approx(rows.probe[0] - rows.answer[0])
    figure = known_and_said_figure(joined.metrics, "caption", joined.tasks["caption"])
    titles = [note.text for note in figure.layout.annotations]
    assert [title.partition("<br>")[0] for title in titles[:2]] == ["planted", "yes-sayer"]
    gap = f"{rows['over answer'].iloc[0]:+.2f} [{rows['over answer lo'].iloc[0]:+.2f}, "
    assert gap in titles[0]
    lens = [trace for trace in figure.data if trace.name == "lens"]
    assert len(lens) == 2
    np.testing.assert_allclose(lens[0].y, values(first.metrics, LENS, "accuracy"))
    with pytest.raises(ValueError, match="no answers of a trained model to category"):
        known_and_said_figure(joined.metrics, "category", joined.tasks["caption"])


def test_one_of_several_answers_is_the_largest_of_those_that_count(tmp_path):
    planted = planted_activations(layer=None, images=300)
    n = len(planted.examples)
    rng = np.random.default_rng(0)
    right_n = rng.integers(0, 3, n)
    other_n = (right_n + rng.integers(1, 3, n)) % 3
    mask_nc = np.zeros((n, 3), int)
    mask_nc[np.arange(n), right_n] = np.arange(n) % 10 > 0  # some right answers do not count
    mask_nc[np.arange(n), other_n] = 1
    states_nd = np.zeros((n, WIDTH), np.float32)
    states_nd[np.arange(n), right_n] = 1.0
    states_nd[:, 2] += 5.0 * (mask_nc[:, 2] == 0)  # the largest of all, where it does not count
    examples = planted.examples.assign(
        kind="one_of",
        classes=[["red", "green", "blue"]] * n,
        labels=np.eye(3, dtype=int)[right_n].tolist(),
        mask=mask_nc.tolist(),
        answers=[[["red"], ["green"], ["blue"]]] * n,
    )
    words = ("red", "green", "blue")
    head = AnswerHead(
        spellings=tuple(Spelling(word, 0, (k,)) for k, word in enumerate(words)),
        token_ids=(0, 1, 2),
        rows_vd=np.eye(3, WIDTH, dtype=np.float32),
        norm=FinalNorm("none"),
    )
    states = {(layer, "last"): states_nd for layer in DECODER_LAYERS}
    activations = replace(planted, examples=examples, states=states, answer_head=head)
    results = score(activations, tmp_path)
    assert values(results.metrics, ANSWER, "top1_accuracy").tolist() == [1.0]
    assert values(results.metrics, ANSWER, "accuracy").tolist() == [1.0]
    assert values(results.metrics, ANSWER, "f1_macro").tolist() == [1.0]


@pytest.mark.slow
def test_intervals_of_noise_hold_chance():
    planted = planted_answers(from_layer="lm.03")
    no_probes = ProbeResults(metrics=pd.DataFrame(), losses=pd.DataFrame())
    misses = 0
    for seed in range(10):
        rng = np.random.default_rng(seed + 1)
        states = {
            key: rng.normal(size=x_nd.shape).astype(np.float32)
            for key, x_nd in planted.states.items()
        }
        of_noise = replace(planted, states=states)
        table = score_answers(of_noise, no_probes, resamples=400, seed=0).metrics
        rows = table[(table.probe == LENS) & (table.metric == "accuracy")]
        rows = rows[rows.split == "test"]
        misses += int(((rows.lo > 0.5) | (rows.hi < 0.5)).sum())
    assert misses <= 6  # of 40 intervals of 95 %: more in one of 300 studies


def test_without_a_known_norm_there_is_an_answer_and_a_tuned_lens(tmp_path):
    planted = planted_answers(from_layer="lm.02")
    unknown = replace(planted, answer_head=replace(planted.answer_head, norm=None))
    results = score(unknown, tmp_path)
    table = results.metrics
    assert set(table.probe) == {"logreg", ANSWER, TUNED_LENS}
    assert values(table, ANSWER, "accuracy").to_dict() == {"lm.03": 1.0}
    assert list(values(table, "logreg", "over_answer").index) == list(DECODER_LAYERS)
    figures = run_figures(results)
    assert "caption_known_and_said" in figures
    assert "caption_decided" not in figures


def test_what_does_not_count_is_not_compared(tmp_path):
    """Every fourth example is masked: the probe and the answer are scored on the same others."""
    planted = planted_answers(from_layer="lm.02", bias=20.0)
    mask = [[int(k % 4 > 0)] for k in range(len(planted.examples))]
    results = score(planted.with_examples(mask=mask), tmp_path)
    table = results.metrics
    said = values(table, ANSWER, "accuracy").iloc[0]
    known = values(table, "logreg", "accuracy")
    np.testing.assert_allclose(values(table, "logreg", "over_answer"), known - said, atol=1e-6)
    rows = table[
        (table.split == "test") & table.metric.isin(["accuracy", "over_answer", "decided"])
    ]
    rows = rows[(rows.control == "none") & (rows["class"] == "")]
    assert rows.n.nunique() == 1


def test_answers_that_cannot_be_scored_are_named_and_cost_the_others_nothing(capsys):
    """Only one image of the second task counts on validation: there is nothing to resample."""
    planted = planted_answers(from_layer="lm.02")
    mask = [[1]] * len(planted.examples)
    is_validation = planted.examples.split == "validation"
    first_image = planted.examples.image_id[is_validation].iloc[0]
    masked = [
        [int(split != "validation" or image == first_image)]
        for split, image in zip(planted.examples.split, planted.examples.image_id, strict=True)
    ]
    both = pd.concat(
        [planted.examples.assign(mask=mask), planted.examples.assign(task="few", mask=masked)],
        ignore_index=True,
    )
    states = {key: np.concatenate([x_nd, x_nd]) for key, x_nd in planted.states.items()}
    activations = replace(planted, examples=both, states=states)
    no_probes = ProbeResults(metrics=pd.DataFrame(), losses=pd.DataFrame())
    table = score_answers(activations, no_probes, resamples=50, seed=0).metrics
    assert set(table.task) == {"caption"}
    assert "answers to few cannot be scored" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- calibration


@pytest.mark.slow
def test_intervals_of_calibration_errors_hold_the_truth():
    """Of calibrated answers 0 is held, and of answers that are less often right than is said."""
    rng = np.random.default_rng(0)
    for off in (0.0, 0.1):
        held = 0
        for _ in range(20):
            confidence_ln = rng.uniform(0.6, 1, (1, 500))
            right_ln = rng.random((1, 500)) < confidence_ln - off
            counts = calibration_counts(confidence_ln, right_ln)
            curve = bootstrap_curve(
                counts, [str(k) for k in range(500)], score=calibration_error, resamples=200
            )
            lower_l, upper_l = calibration_interval(curve, confidence_ln)
            assert lower_l[0] <= curve.score_l[0] <= upper_l[0]
            held += lower_l[0] <= off <= upper_l[0]
        assert held >= 17


def test_the_calibration_error_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    confidence_ln = rng.uniform(0.5, 1, (2, 500))
    right_ln = rng.random((2, 500)) < confidence_ln
    sums = torch.from_numpy(calibration_counts(confidence_ln, right_ln).sum(0)[None])
    for layer in range(2):
        expected = 0.0
        edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
        for low, high in pairwise(edges):
            inside = (confidence_ln[layer] >= low) & (confidence_ln[layer] < high)
            if inside.any():
                off = right_ln[layer, inside].mean() - confidence_ln[layer, inside].mean()
                expected += inside.mean() * abs(off)
        assert calibration_error(sums)[0, layer] == pytest.approx(expected, abs=1e-6)


def test_one_who_is_sure_and_wrong_half_of_the_time_is_off_by_a_half():
    confidence_ln = np.ones((1, 100))
    right_ln = np.arange(100)[None] % 2 == 0
    sums = torch.from_numpy(calibration_counts(confidence_ln, right_ln).sum(0)[None])
    assert calibration_error(sums)[0, 0] == pytest.approx(0.5)
