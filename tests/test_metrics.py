import numpy as np
import pytest
from sklearn import metrics as reference

from probekit import metrics

RNG = np.random.default_rng(0)


def binary(n=200, layers=3):
    y = RNG.integers(0, 2, (n, 1))
    p = np.clip(y[None] * 0.3 + RNG.random((layers, n, 1)) * 0.7, 0, 1)
    return p, y, np.ones_like(y), np.repeat(np.arange(n // 2), 2)


def look(table, layer, metric, name=""):
    return table[(table.layer == layer) & (table.metric == metric) & (table["class"] == name)].iloc[0]


def test_binary_scores_are_those_of_scikit_learn():
    p, y, mask, image = binary()
    table = metrics.table(p, y, mask, image, ["match"], ["a", "b", "c"], binary=True, resamples=50)
    for k, layer in enumerate("abc"):
        yes = p[k, :, 0] >= 0.5
        truth = y[:, 0]
        precision, recall, f1, _ = reference.precision_recall_fscore_support(truth, yes)
        wanted = {("accuracy", ""): reference.accuracy_score(truth, yes),
                  ("precision_positive", ""): precision[1], ("recall_positive", ""): recall[1],
                  ("f1_positive", ""): f1[1], ("f1", "yes"): f1[1], ("f1", "no"): f1[0], ("f1_macro", ""): f1.mean(),
                  ("f1_micro", ""): reference.f1_score(truth, yes, average="micro"),
                  ("log_loss", ""): reference.log_loss(truth, p[k, :, 0])}
        for (metric, name), value in wanted.items():
            assert look(table, layer, metric, name).value == pytest.approx(value, abs=1e-6), metric
        counts = [look(table, layer, m, "yes").value for m in ("tn", "fp", "fn", "tp")]
        assert counts == reference.confusion_matrix(truth, yes).ravel().tolist()


def test_masked_multilabel_scores_count_asked_entries_alone():
    n, c = 150, 5
    y, mask = RNG.integers(0, 2, (n, c)), RNG.random((n, c)) < 0.5
    mask[:, 4] = False  # never asked: must not pull the macro mean down
    p = RNG.random((2, n, c))
    names = list("vwxyz")
    table = metrics.table(p, y, mask, np.arange(n), names, ["a", "b"], binary=False, resamples=20)
    yes = p[1] >= 0.5
    each = [reference.f1_score(y[mask[:, k], k], yes[mask[:, k], k]) for k in range(4)]
    assert look(table, "b", "f1_macro").value == pytest.approx(np.mean(each))
    assert look(table, "b", "f1_micro").value == pytest.approx(reference.f1_score(y[mask], yes[mask]))
    assert look(table, "b", "accuracy").value == pytest.approx((y == yes)[mask].mean())
    assert np.isnan(look(table, "b", "f1", "z").value) and look(table, "b", "f1", "w").value == pytest.approx(each[1])
    assert (table.n[table["class"] == ""] == mask.sum()).all()
    assert (table.n[table["class"] == "w"] == mask[:, 1].sum()).all()


def test_intervals_hold_the_value_and_resample_whole_images():
    p, y, mask, image = binary(400)
    table = metrics.table(p, y, mask, image, ["match"], ["a", "b", "c"], binary=True)
    rows = table[table.metric == "accuracy"]
    assert ((rows.lo < rows.value) & (rows.value < rows.hi)).all()
    expected = 2 * 1.96 * np.sqrt(rows.value * (1 - rows.value) / 400)
    np.testing.assert_allclose(rows.hi - rows.lo, expected, rtol=0.25)
    # ten copies of every example within its image add no knowledge, so the interval must not shrink
    many = metrics.table(np.repeat(p, 10, 1), np.repeat(y, 10, 0), np.repeat(mask, 10, 0), np.repeat(image, 10),
                         ["match"], ["a", "b", "c"], binary=True)
    wide = many[many.metric == "accuracy"]
    np.testing.assert_allclose(wide.hi - wide.lo, rows.hi - rows.lo, rtol=1e-6)
