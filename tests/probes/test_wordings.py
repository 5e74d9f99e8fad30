"""Probes of one wording read the others: the planted direction decides what they score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probekit.probes.probing import ProbeSettings, probe_activations
from tests.support.tables import DECODER_LAYERS, WIDTH, planted_activations

SETTINGS = ProbeSettings(probes=("logreg",), strengths=(0.1,), codelength=False, resamples=100)


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> pd.DataFrame:
    """Three wordings: the negated one in the same direction, the other one in another."""
    planted = planted_activations(layer=None, images=200)
    examples = planted.examples.assign(item=np.arange(len(planted.examples)), variant_of="")
    label_n = np.array([labels[0] for labels in examples["labels"]])
    opposite = [[1 - label] for label in label_n]
    variants = {
        "caption": {},
        "caption_negated": {"labels": opposite, "variant_of": "caption"},
        "caption_reworded": {"variant_of": "caption"},
    }
    tables = [examples.assign(task=name, **columns) for name, columns in variants.items()]
    directions = np.eye(WIDTH)
    # Of each wording at each layer where the truth, label 1 of the plain wording, is written.
    written = {"caption": 0, "caption_negated": 0, "caption_reworded": 1}
    rng = np.random.default_rng(0)
    states = {}
    for k, layer in enumerate(DECODER_LAYERS):
        parts = []
        for name, direction in written.items():
            noise_nd = rng.normal(size=(len(examples), WIDTH))
            signal_nd = np.outer(2 * label_n - 1, directions[direction]) * 4.0
            # Another mean and size: a probe reads a wording's states in its own units.
            size = 1 + 3 * (name == "caption_negated")
            parts.append(size * (noise_nd + (k >= 2) * signal_nd) + 7 * size)
        states[layer, "last"] = np.concatenate(parts).astype(np.float32)
    activations = replace(planted, examples=pd.concat(tables, ignore_index=True), states=states)
    folder = tmp_path_factory.mktemp("wordings")
    return probe_activations(activations, settings=SETTINGS, folder=folder, device="cpu").transfer


def score(scores: pd.DataFrame, probe_task: str, task: str) -> pd.DataFrame:
    rows = scores[(scores.probe_task == probe_task) & (scores.task == task)]
    return rows[rows.layer == rows.probe_layer].set_index("layer")


def test_a_probe_of_the_same_direction_reads_the_same_fact_in_a_negated_prompt(scores):
    rows = score(scores, "caption", "caption_negated")
    assert rows.metric.unique().tolist() == ["accuracy"]
    assert rows.value["lm.03"] > 0.98
    assert rows.value["lm.00"] == pytest.approx(0.5, abs=0.12)
    assert (rows.lo <= rows.value).all()
    assert (rows.value <= rows.hi).all()
    assert set(rows.n) == {100}
    back = score(scores, "caption_negated", "caption")  # it is scored by its own labels
    assert back.value["lm.03"] > 0.98


def test_a_probe_of_another_direction_is_at_chance(scores):
    assert score(scores, "caption", "caption_reworded").value["lm.03"] == pytest.approx(
        0.5, abs=0.12
    )
    own = score(scores, "caption_reworded", "caption_reworded")
    assert own.value["lm.03"] > 0.98


def test_every_pair_of_wordings_is_scored_at_every_layer(scores):
    other = scores[scores.probe_task != scores.task]
    assert len(other) == 3 * 2 * len(DECODER_LAYERS)
    assert (other.layer == other.probe_layer).all()
    same = scores[scores.probe_task == scores.task]
    assert len(same) == 3 * len(DECODER_LAYERS) ** 2
