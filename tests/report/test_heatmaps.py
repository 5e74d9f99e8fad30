import numpy as np
import pandas as pd
import pytest

from probekit.probes.results import select_curve
from probekit.report.heatmaps import (
    class_heatmap,
    confusion_counts,
    score_heatmap,
    transfer_heatmap,
)


@pytest.fixture(scope="module")
def metrics(saved_run):
    return saved_run.results.metrics


def test_score_heatmaps_have_a_row_per_metric(metrics):
    names = ["precision_macro", "recall_macro", "f1_macro"]
    figure = score_heatmap(metrics, "category", names)
    grids = [trace.z for trace in figure.data]
    assert [grid.shape for grid in grids] == [(3, 9)]
    trained = metrics[(metrics.control == "none") & (metrics.task == "category")]
    trained = trained[trained.pooling == "mean"]
    for row, metric in enumerate(reversed(names)):  # plotly's first row is at the bottom
        values = select_curve(trained, probe="logreg", metric=metric).value
        np.testing.assert_allclose(grids[0][row], values)


def test_the_pooling_that_is_drawn_is_named(table):
    table = pd.concat([table, table.assign(pooling="last", value=0.9)])
    figure = score_heatmap(table, "caption", ["f1_macro"])
    assert "mean pooling" in figure.layout.title.subtitle.text


def test_classes_are_sorted_with_the_best_on_top(metrics):
    grid = class_heatmap(metrics, "category").data[0]
    rows = metrics[
        (metrics.control == "none")
        & (metrics.probe == "logreg")
        & (metrics.pooling == "mean")
        & (metrics.task == "category")
        & (metrics.stage == "lm")
        & (metrics.split == "test")
        & (metrics.metric == "f1")
    ]
    for row, name in enumerate(grid.y):
        f1 = rows[rows["class"] == name].sort_values("layer").value
        np.testing.assert_allclose(grid.z[row], f1)
    best = np.nanmax(np.array(grid.z, float), axis=1)
    assert (np.diff(best) >= 0).all()


@pytest.mark.parametrize("task", ["caption", "category"])
def test_right_and_wrong_answers_add_up_to_all_test_labels(saved_run, metrics, task):
    figure = confusion_counts(metrics, task)
    counted_labels = sum(int(np.sum(mask)) for mask in saved_run.test_examples(task)["mask"])
    np.testing.assert_allclose(np.sum([trace.y for trace in figure.data], axis=0), counted_labels)


def test_on_its_own_layer_a_probe_scores_as_in_the_metrics(saved_run, metrics):
    grid = transfer_heatmap(saved_run.results.transfer, "caption").data[0]
    trained = metrics[
        (metrics.control == "none") & (metrics.task == "caption") & (metrics.pooling == "mean")
    ]
    accuracy = select_curve(trained, probe="logreg", metric="accuracy").value
    np.testing.assert_allclose(np.diag(grid.z), accuracy, atol=1e-6)
