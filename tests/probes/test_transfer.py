import numpy as np
import pytest
import torch

from probekit.probes import transfer
from probekit.probes.labels import LabelledTask, LabelSet
from probekit.probes.weights import ProbeWeights


def test_nearest_examples_are_the_most_similar_others():
    rng = np.random.default_rng(0)
    x_nd = rng.normal(size=(2300, 6)).astype(np.float32)  # more than two chunks
    x_nd[1700] = 3 * x_nd[4] + 0.01
    nearest = transfer.nearest_examples(x_nd)
    assert nearest.shape == (2300, 5)
    assert nearest[4, 0] == 1700
    assert nearest[1700, 0] == 4
    unit_nd = x_nd / np.linalg.norm(x_nd, axis=1, keepdims=True)
    similarity = unit_nd @ unit_nd[1234]
    similarity[1234] = -2
    assert nearest[1234].tolist() == np.argsort(-similarity)[:5].tolist()
    assert transfer.nearest_examples(x_nd[:3]).shape == (3, 2)


def one_feature_task(kind, y_nc, mask_nc):
    """A task all of whose examples are in the test split."""
    rows = np.arange(len(y_nc))
    labels = LabelSet(
        name="none",
        kind=kind,
        classes=[str(c) for c in range(y_nc.shape[1])],
        image_n=rows,
        y_nc=torch.tensor(y_nc, dtype=torch.float32),
        mask_nc=torch.tensor(mask_nc, dtype=torch.float32),
        split={"test": torch.from_numpy(rows)},
    )
    return LabelledTask("task", rows, rows.astype(str), np.full(len(rows), "test"), labels)


def test_probes_of_other_layers_read_standardised_states():
    """Layer 1 is larger and shifted; the probe of layer 0 reads its direction anyway."""
    y_n = np.array([0, 1, 1, 0, 1, 0])
    x_n = np.where(y_n > 0, 1.0, -1.0)
    weights = ProbeWeights(
        weight_ldc=np.array([[[1.0]], [[-1.0]]], np.float32),
        intercept_lc=np.zeros((2, 1), np.float32),
        mean_ld=np.array([[0.0], [5.0]]),
        scale_ld=np.array([[1.0], [10.0]]),
    )
    task = one_feature_task("binary", y_n[:, None], np.ones((6, 1)))
    metric, score_l = transfer.transfer_scores(10 * x_n[:, None] + 5, task, probes=weights, place=1)
    assert metric == "accuracy"
    assert score_l.tolist() == [1, 0]


def test_transfer_scores_of_categories_count_masked_entries_alone():
    y_nc = np.array([[1, 1], [0, 1], [1, 0]])
    mask_nc = np.array([[1, 0], [1, 1], [1, 1]])
    x_nd = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]])
    weights = ProbeWeights(
        weight_ldc=np.eye(2, dtype=np.float32)[None],
        intercept_lc=np.zeros((1, 2), np.float32),
        mean_ld=np.zeros((1, 2)),
        scale_ld=np.ones((1, 2)),
    )
    task = one_feature_task("multilabel", y_nc, mask_nc)
    metric, score_l = transfer.transfer_scores(x_nd, task, probes=weights, place=0)
    assert metric == "f1_macro"
    assert score_l == pytest.approx([1])  # the only wrong entry is masked
