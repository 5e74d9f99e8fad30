import numpy as np
import pytest
from sklearn import metrics as reference

from probekit.probes import metrics

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


def test_average_precision_is_that_of_scikit_learn_with_weights_and_ties():
    n, c = 120, 3
    y, mask = RNG.integers(0, 2, (n, c)), RNG.random((n, c)) < 0.7
    y[:, 2] = 0  # no positive
    p = np.round(RNG.random((2, n, c)), 1)  # many are equal
    weight = RNG.poisson(1.0, (4, n)).astype(np.uint8)
    found = metrics.average_precision(p, y, mask, weight)
    assert found.shape == (4, 2, c) and np.isnan(found[..., 2]).all()
    for b in range(4):
        for layer in range(2):
            for k in range(2):
                rows = mask[:, k]
                wanted = reference.average_precision_score(y[rows, k], p[layer, rows, k], sample_weight=weight[b, rows])
                assert found[b, layer, k] == pytest.approx(wanted, abs=1e-5)
    table = metrics.table(p, y, mask, np.arange(n), list("abc"), ["a", "b"], binary=False, resamples=50)
    row = look(table, "a", "average_precision")
    each = [look(table, "a", "average_precision", name).value for name in "ab"]
    assert row.value == pytest.approx(np.mean(each)) and row.lo < row.value < row.hi


@pytest.mark.parametrize("is_binary", [True, False])
def test_thresholds_are_the_best_ones_of_those_that_can_be_taken(is_binary):
    p, y, mask, _ = binary(80)
    p, score = np.round(p, 2), (reference.accuracy_score if is_binary else reference.f1_score)
    cut = metrics.thresholds(p, y, mask, is_binary)
    for layer in range(3):
        tried = [score(y[:, 0], p[layer, :, 0] >= t) for t in np.linspace(0, 1.01, 203)]
        assert score(y[:, 0], p[layer, :, 0] >= cut[layer, 0]) >= max(tried) - 1e-9
    assert metrics.thresholds(p, 0 * y, mask, is_binary).tolist() == [[0.5]] * 3
    rare = np.zeros_like(y)
    rare[p[0, :, 0].argmin()] = 1  # the least likely one: best is to say no to all
    assert not is_binary or (p[0] >= metrics.thresholds(p, rare, mask, True)[0]).sum() == 0


def test_tuned_scores_take_the_thresholds():
    p, y, mask, image = binary()
    cut = np.array([[0.3], [0.5], [0.9]])
    table = metrics.table(p, y, mask, image, ["match"], list("abc"), True, 50, by_class=False, threshold_lc=cut)
    for k, layer in enumerate("abc"):
        assert look(table, layer, "accuracy_tuned").value == pytest.approx(((p[k] >= cut[k]) == y).mean())
    assert (table["class"] == "").all() and table.gap.isna().all()


def test_layers_are_compared_within_their_stage():
    p, y, mask, image = binary(400, 4)
    p[1] = np.where(y > 0, 0.9, 0.1)  # the best of its stage, without an error
    p[3] = RNG.random(y.shape)
    table = metrics.table(p, y, mask, image, ["match"], ["vision.00", "vision.01", "lm.00", "lm.01"], True, 300)
    rows = table[table.metric == "accuracy"].set_index("layer")
    assert rows.plateau.tolist() == [False, True, True, False] and rows.gap["vision.01"] > 0 > rows.gap["vision.00"]
    losses = table[table.metric == "log_loss"].set_index("layer")
    assert losses.plateau["vision.01"] and not losses.plateau["vision.00"]  # a smaller loss is better
    assert table[table.metric == "precision_macro"].gap.isna().all()
