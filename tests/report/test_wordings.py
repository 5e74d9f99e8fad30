"""The same question in other words: its table, its figure, its sentence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probekit.probes.results import COLUMNS, ProbeKey, ProbeResults
from probekit.report.figures import run_figures
from probekit.report.results import Results
from probekit.report.sentences import compare_pairs, summarise
from probekit.report.wordings import wording_table, wordings_figure
from probekit.tasks.base import TaskInfo
from tests.support.tables import with_task_info

TASKS = {
    "object": TaskInfo("binary", ("match",), "Is it there?", answers=(("no",), ("yes",))),
    "object_negated": TaskInfo("binary", ("match",), "Is it not there?", variant_of="object"),
    "object_a_b": TaskInfo("binary", ("match",), "A or B?", variant_of="object"),
    "caption": TaskInfo("binary", ("match",), "Right?"),
}
# Answer, its flips, the flips of the probe, and the plain probe's score, all at the last layer.
KNOWN = {
    "object": (0.55, np.nan, np.nan, np.nan),
    "object_negated": (0.45, 0.95, 0.04, 0.9),
    "object_a_b": (0.5, 0.5, 0.1, 0.6),
}
LAYERS = 4


def metric_rows(task: str, *, model: str = "small") -> list[dict]:
    row = {
        "model": model,
        "stage": "lm",
        "pooling": "last",
        "task": task,
        "control": "none",
        "class": "",
        "n": 80,
        "seed": 0,
        "split": "test",
    }
    rows = []
    for k in range(LAYERS):
        layer = {**row, "layer": f"lm.{k:02d}", "probe": "logreg"}
        score = {"value": 0.5 + 0.1 * k, "lo": 0.45 + 0.1 * k, "hi": 0.55 + 0.1 * k}
        for metric in ("accuracy", "precision_positive", "recall_positive", "f1_positive"):
            for split in ("validation", "test"):
                rows.append({**layer, "metric": metric, "split": split, **score})
        for metric in ("over_answer", "known_not_said"):
            rows.append({**layer, "metric": metric, "value": 0.1 * k, "lo": 0.0, "hi": 0.4})
        for metric in ("tp", "fp", "fn", "tn"):
            rows.append({**layer, "metric": metric, "class": "yes", "value": 20.0})
    if task not in KNOWN:
        return rows
    said, flips, probe_flips, _ = KNOWN[task]
    answer = {**row, "layer": f"lm.{LAYERS - 1:02d}", "probe": "answer"}
    values = {"accuracy": said, "accuracy_tuned": 0.7, "guess": 0.5, "flips": flips}
    for metric, value in values.items():
        if not np.isnan(value):
            rows.append(
                {**answer, "metric": metric, "value": value, "lo": value - 0.04, "hi": value + 0.04}
            )
    for metric in ("tp", "fp", "fn", "tn"):
        rows.append({**answer, "metric": metric, "class": "yes", "value": 20.0})
    if not np.isnan(probe_flips):
        for k in range(LAYERS):
            layer = {**row, "layer": f"lm.{k:02d}", "probe": "logreg", "metric": "flips"}
            value = probe_flips + 0.1 * (LAYERS - 1 - k)
            rows.append({**layer, "value": value, "lo": value - 0.02, "hi": value + 0.02})
    return rows


@pytest.fixture(scope="module")
def results() -> ProbeResults:
    """One question in three wordings, and another one in one."""
    metrics = pd.DataFrame([row for task in TASKS for row in metric_rows(task)])
    metrics = metrics.reindex(columns=COLUMNS)
    transfer = []
    for task, (*_, plain_probe) in KNOWN.items():
        for k in range(LAYERS):
            value = 0.5 + (plain_probe - 0.5) * k / (LAYERS - 1)
            row = {
                "model": "small",
                "control": "none",
                "pooling": "last",
                "task": task,
                "probe_task": "object",
                "layer": f"lm.{k:02d}",
                "probe_layer": f"lm.{k:02d}",
                "metric": "accuracy",
            }
            if task != "object":
                row |= {"value": value, "lo": value - 0.05, "hi": value + 0.05, "n": 80}
            else:
                row |= {"value": 0.8}
            transfer.append(row)
    return ProbeResults(
        metrics=metrics, losses=pd.DataFrame(), transfer=pd.DataFrame(transfer), tasks=TASKS
    )


def test_the_table_has_a_row_for_each_wording(results):
    table = wording_table(results.metrics, results.transfer, TASKS).set_index("wording")
    assert table.index.tolist() == ["plain", "negated", "A: yes, B: no"]
    assert set(table.task) == {"object"}
    assert table.answer.tolist() == [0.55, 0.45, 0.5]
    assert table.probe.tolist() == [0.8] * 3
    negated = table.loc["negated"]
    assert negated["answer flips"] == 0.95
    assert negated["probe flips"] == pytest.approx(0.04)  # at the best layer of the plain wording
    assert negated["plain probe"] == pytest.approx(0.9)
    assert (negated["plain probe lo"], negated["plain probe hi"]) == pytest.approx((0.85, 0.95))
    assert table.loc["plain", ["answer flips", "probe flips", "plain probe"]].isna().all()


def test_without_probes_on_other_wordings_or_answers_the_rest_stays(results):
    table = wording_table(results.metrics, pd.DataFrame(), TASKS)
    assert table["plain probe"].isna().all()
    assert table["answer flips"].notna().sum() == 2
    no_answers = results.metrics[results.metrics.probe != "answer"]
    table = wording_table(no_answers, results.transfer, TASKS)
    assert table[["answer", "answer flips"]].isna().all(axis=None)
    assert table["plain probe"].notna().sum() == 2
    assert len(wordings_figure(no_answers, results.transfer, TASKS, "object").data)


def test_the_figure_shows_curves_answers_and_flips(results):
    figure = wordings_figure(results.metrics, results.transfer, TASKS, "object")
    curves = [trace for trace in figure.data if trace.mode == "lines+markers" and trace.x[0] == 0]
    ends = [trace.y[-1] for trace in curves]
    assert ends == pytest.approx([0.8, 0.9, 0.6])
    dots = [trace for trace in figure.data if trace.mode == "markers" and trace.x[0] is not None]
    panels = {(trace.xaxis, trace.marker.symbol): list(trace.x) for trace in dots}
    assert panels["x2", "diamond"] == [0.55, 0.45, 0.5]
    assert panels["x3", "diamond"] == [0.95, 0.5]
    # Both panels have a wording in the same row.
    rows_of_flips = next(list(t.y) for t in dots if (t.xaxis, t.marker.symbol) == ("x3", "diamond"))
    assert rows_of_flips == [1, 2]
    assert list(figure.layout.yaxis2.ticktext) == ["plain", "negated", "A: yes, B: no"]
    assert figure.layout.yaxis2.range == figure.layout.yaxis3.range == (2.5, -0.5)


def test_the_page_has_one_figure_of_all_wordings(results):
    figures = run_figures(results)
    assert "object_wordings" in figures
    assert not [name for name in figures if name.startswith(("object_negated", "object_a_b"))]
    assert "caption_wordings" not in figures
    alone = {name: TASKS[name] for name in ("object_negated", "caption")}
    without_plain = replace(results, tasks=alone, transfer=pd.DataFrame())
    assert "object_negated_accuracy" in run_figures(without_plain)


def test_the_summary_says_in_the_plain_wording_s_paragraph_how_much_flips(results):
    paragraphs = summarise(results.metrics, TASKS)
    assert [paragraph.partition(",")[0] for paragraph in paragraphs] == ["object", "caption"]
    assert (
        "changes on this share of the test examples (in brackets that of the wording's own probe): "
        "negated 95% [91%, 99%] (4%); A: yes, B: no 50% [46%, 54%] (10%)."
    ) in paragraphs[0]
    assert "In other words" not in paragraphs[1]


def test_what_was_asked_in_one_wording_cannot_be_drawn_in_several(results):
    mine = Results.of(results, pd.DataFrame())
    assert mine.plot("wordings").layout.title.text.startswith("The same question in other words")
    with pytest.raises(ValueError, match=r"caption is in .* without another.* take one of object"):
        mine.plot("wordings", task="caption")
    for names in (("caption",), ("object_negated", "object_a_b")):
        alone = replace(mine, tasks={name: TASKS[name] for name in names})
        assert alone.wordings().empty
        with pytest.raises(
            ValueError, match=r"each task is in .* the plain one: add both to tasks"
        ):
            alone.plot("wordings")
    with pytest.raises(ValueError, match="no mlp probes of decoder layers for object"):
        mine.plot("wordings", probe="mlp")


def test_without_answers_the_wordings_are_compared_on_the_first_pooling(results):
    pooled = replace(
        results,
        metrics=results.metrics[results.metrics.probe != "answer"].assign(pooling="mean"),
        transfer=results.transfer.assign(pooling="mean"),
    )
    table = wording_table(pooled.metrics, pooled.transfer, TASKS).set_index("wording")
    assert table.probe.tolist() == [0.8] * 3
    assert table["plain probe"].loc["negated"] == pytest.approx(0.9)
    assert table.answer.isna().all()
    assert "object_wordings" in run_figures(pooled)


def test_other_wordings_do_not_weaken_comparisons_of_tasks(results):
    """They are no pairs that a p value is corrected for."""
    rng = np.random.default_rng(0)
    tables = []
    for name, info in TASKS.items():
        table = pd.DataFrame({"image_id": range(30), "item": range(30), "task": name})
        table["split"] = np.repeat(["train", "validation", "test"], 10)
        table["labels"] = [[k % 2] for k in range(30)]
        table["mask"] = [[1]] * 30
        table["variant_of"] = info.variant_of
        tables.append(with_task_info(table.assign(file="a", prompt="p"), "binary"))
    predictions = {
        ProbeKey("small", "none", "last", name, "logreg"): rng.random((LAYERS, 10, 1))
        for name in TASKS
    }
    with_predictions = replace(results, predictions=predictions)
    compared = compare_pairs(with_predictions, pd.concat(tables), resamples=50)
    assert len(compared) == 1
    assert compared.a.iloc[0].startswith("object,")
    assert compared.b.iloc[0].startswith("caption,")
