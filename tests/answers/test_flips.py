"""How often a judgement changes with the wording, on judgements that are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from probekit.answers.flips import score_flips
from probekit.probes.results import ProbeKey
from tests.support.tables import with_task_info

IMAGES = 60
LAYERS = ["lm.00", "lm.01", "lm.02"]


def wording(task: str, labels: np.ndarray, *, kind: str = "binary", variant_of: str = "plain"):
    """One example per image, in three splits."""
    classes = ("match",) if kind == "binary" else ("one", "two", "three")
    table = pd.DataFrame(
        {
            "image_id": np.arange(IMAGES),
            "item": np.arange(IMAGES),
            "split": np.repeat(["train", "validation", "test"], 20),
            "task": task,
            "file": "a.jpg",
            "prompt": task,
            "labels": labels.reshape(IMAGES, -1).tolist(),
            "mask": np.ones((IMAGES, len(classes)), int).tolist(),
            "variant_of": "" if task == variant_of else variant_of,
        }
    )
    return with_task_info(table, kind, classes)


def key(task: str, probe: str) -> ProbeKey:
    return ProbeKey("model", "none", "last", task, probe)


def test_the_opposite_answer_to_a_negated_question_is_no_flip():
    label_n = np.tile([0, 1], IMAGES // 2)
    examples = pd.concat(
        [
            wording("plain", label_n),
            wording("reworded", label_n),
            wording("negated", 1 - label_n),
        ]
    ).sample(frac=1, random_state=0)
    # Predictions are of the test examples in the order of the table.
    in_order = {
        task: examples[(examples.task == task) & (examples.split == "test")].image_id.to_numpy()
        for task in ("plain", "reworded", "negated")
    }

    def says(task: str, yes_n: np.ndarray) -> np.ndarray:
        return np.where(yes_n, 0.9, 0.1)[in_order[task]][None, :, None]

    yes_n = np.arange(IMAGES) % 3 == 0  # whatever is true
    odd_n = np.arange(IMAGES) >= 55
    predictions = {
        key("plain", "answer"): says("plain", yes_n),
        key("reworded", "answer"): says("reworded", yes_n ^ odd_n),
        key("negated", "answer"): says("negated", yes_n),
        key("plain", "logreg"): np.repeat(says("plain", yes_n), 3, axis=0),
        key("negated", "logreg"): np.repeat(says("negated", ~yes_n), 3, axis=0),
        key("reworded", "linear"): says("reworded", yes_n),  # nothing to compare it with
    }
    table = score_flips(examples, predictions, LAYERS, resamples=200)
    value = table.set_index(["task", "probe", "layer"]).value
    assert value["reworded", "answer", "lm.02"] == pytest.approx(5 / 20)
    assert value["negated", "answer", "lm.02"] == 1.0  # it says the same, and means the opposite
    assert [value["negated", "logreg", layer] for layer in LAYERS] == [0, 0, 0]
    assert len(value) == 5
    assert set(table.n) == {20}
    interval = table[table.task == "reworded"].iloc[0]
    assert 0 < interval.lo < 0.25 < interval.hi < 0.6


def test_only_items_that_both_wordings_have_are_compared():
    label_n = np.tile([0, 1], IMAGES // 2)
    examples = pd.concat([wording("plain", label_n), wording("reworded", label_n)])
    left_out = (examples.task == "reworded") & (examples.image_id >= 50)
    examples = examples[~left_out].reset_index(drop=True)
    predictions = {
        key("plain", "answer"): np.full((1, 20, 1), 0.9),
        key("reworded", "answer"): np.full((1, 10, 1), 0.1),
    }
    table = score_flips(examples, predictions, LAYERS, resamples=50)
    assert table.value.tolist() == [1.0]
    assert table.n.tolist() == [10]


def test_of_several_answers_the_largest_is_compared():
    class_n = np.arange(IMAGES) % 3
    labels = np.eye(3, dtype=int)[class_n]
    examples = pd.concat(
        [wording("plain", labels, kind="one_of"), wording("reworded", labels, kind="one_of")]
    )
    p_nc = np.eye(3)[class_n[40:]] * 0.4 + 0.2
    other_nc = p_nc.copy()
    other_nc[:4] = np.roll(other_nc[:4], 1, axis=1)
    predictions = {
        key("plain", "answer"): p_nc[None],
        key("reworded", "answer"): other_nc[None] * 0.5,
    }
    table = score_flips(examples, predictions, LAYERS, resamples=50)
    assert table.value.tolist() == [pytest.approx(4 / 20)]


def test_tasks_in_one_wording_have_no_flips():
    label_n = np.tile([0, 1], IMAGES // 2)
    predictions = {key("plain", "answer"): np.full((1, 20, 1), 0.9)}
    assert score_flips(wording("plain", label_n), predictions, LAYERS, resamples=50).empty


def test_examples_that_count_in_one_wording_alone_are_left_out(capsys):
    label_n = np.tile([0, 1], IMAGES // 2)
    masked = wording("negated", 1 - label_n)
    masked["mask"] = [[int(k < 50)] for k in range(IMAGES)]
    other_split = wording("reworded", label_n)
    other_split.loc[other_split.image_id == 45, "split"] = "train"
    nowhere = wording("statement", label_n).assign(item=np.arange(IMAGES) + 1000)
    examples = pd.concat([wording("plain", label_n), masked, other_split, nowhere])
    predictions = {key("plain", "answer"): np.full((1, 20, 1), 0.9)}
    predictions[key("negated", "answer")] = np.where(np.arange(20) < 10, 0.1, 0.0)[None, :, None]
    predictions[key("reworded", "answer")] = np.full((1, 19, 1), 0.9)
    predictions[key("statement", "answer")] = np.full((1, 20, 1), 0.9)
    table = score_flips(examples, predictions, LAYERS, resamples=50).set_index("task")
    assert table.n.to_dict() == {"negated": 10, "reworded": 19}
    assert table.value.to_dict() == {"negated": 0, "reworded": 0}
    assert "plain and statement are not compared: fewer than two" in capsys.readouterr().out
