import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from probekit.probes import metrics

LAYERS = ["lm.00", "lm.01", "lm.02"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def binary_data(rng, *, n=200, layer_count=3):
    """Probabilities, labels, mask and images of a binary task; two examples per image."""
    y_nc = rng.integers(0, 2, (n, 1))
    noise_lnc = rng.random((layer_count, n, 1))
    p_lnc = np.clip(y_nc[None] * 0.3 + noise_lnc * 0.7, 0, 1)
    return p_lnc, y_nc, np.ones_like(y_nc), np.repeat(np.arange(n // 2), 2)


def binary_table(p_lnc, y_nc, mask_nc, image_n, *, layers=tuple(LAYERS), **options):
    return metrics.score_table(
        p_lnc,
        y_nc,
        mask_nc=mask_nc,
        image_n=image_n,
        classes=["match"],
        layers=layers,
        binary=True,
        **options,
    )


def find_row(table, layer, metric, class_name=""):
    is_row = (table.layer == layer) & (table.metric == metric) & (table["class"] == class_name)
    return table[is_row].iloc[0]


def test_binary_scores_are_those_of_scikit_learn(rng):
    p_lnc, y_nc, mask_nc, image_n = binary_data(rng)
    table = binary_table(p_lnc, y_nc, mask_nc, image_n, resamples=50)
    truth = y_nc[:, 0]
    for k, layer in enumerate(LAYERS):
        yes = p_lnc[k, :, 0] >= 0.5
        precision, recall, f1, _ = reference.precision_recall_fscore_support(truth, yes)
        expected = {
            ("accuracy", ""): reference.accuracy_score(truth, yes),
            ("precision_positive", ""): precision[1],
            ("recall_positive", ""): recall[1],
            ("f1_positive", ""): f1[1],
            ("f1", "yes"): f1[1],
            ("f1", "no"): f1[0],
            ("f1_macro", ""): f1.mean(),
            ("f1_micro", ""): reference.f1_score(truth, yes, average="micro"),
            ("log_loss", ""): reference.log_loss(truth, p_lnc[k, :, 0]),
        }
        for (metric, class_name), value in expected.items():
            row = find_row(table, layer, metric, class_name)
            assert row.value == pytest.approx(value, abs=1e-6), metric
        counts = [find_row(table, layer, name, "yes").value for name in ("tn", "fp", "fn", "tp")]
        assert counts == reference.confusion_matrix(truth, yes).ravel().tolist()


def test_multilabel_scores_count_masked_entries_alone(rng):
    n, c = 150, 5
    y_nc = rng.integers(0, 2, (n, c))
    mask_nc = rng.random((n, c)) < 0.5
    mask_nc[:, 4] = False  # never asked about: it must not pull the macro mean down
    p_lnc = rng.random((2, n, c))
    table = metrics.score_table(
        p_lnc,
        y_nc,
        mask_nc=mask_nc,
        image_n=np.arange(n),
        classes=list("vwxyz"),
        layers=["a", "b"],
        binary=False,
        resamples=20,
    )
    yes_nc = p_lnc[1] >= 0.5
    f1_c = []
    for k in range(4):
        rows = mask_nc[:, k]
        f1_c.append(reference.f1_score(y_nc[rows, k], yes_nc[rows, k]))
    assert find_row(table, "b", "f1_macro").value == pytest.approx(np.mean(f1_c))
    f1_micro = reference.f1_score(y_nc[mask_nc], yes_nc[mask_nc])
    assert find_row(table, "b", "f1_micro").value == pytest.approx(f1_micro)
    accuracy = (y_nc == yes_nc)[mask_nc].mean()
    assert find_row(table, "b", "accuracy").value == pytest.approx(accuracy)
    assert np.isnan(find_row(table, "b", "f1", "z").value)
    assert find_row(table, "b", "f1", "w").value == pytest.approx(f1_c[1])
    assert (table.n[table["class"] == ""] == mask_nc.sum()).all()
    assert (table.n[table["class"] == "w"] == mask_nc[:, 1].sum()).all()


@pytest.mark.slow
def test_intervals_hold_the_value_and_resample_whole_images(rng):
    p_lnc, y_nc, mask_nc, image_n = binary_data(rng, n=400)
    table = binary_table(p_lnc, y_nc, mask_nc, image_n)
    rows = table[table.metric == "accuracy"]
    assert (rows.lo < rows.value).all()
    assert (rows.value < rows.hi).all()
    normal_width = 2 * 1.96 * np.sqrt(rows.value * (1 - rows.value) / 400)
    np.testing.assert_allclose(rows.hi - rows.lo, normal_width, rtol=0.25)
    # Ten copies of every example within its image add no knowledge: no interval may shrink.
    copies = binary_table(
        np.repeat(p_lnc, 10, 1),
        np.repeat(y_nc, 10, 0),
        np.repeat(mask_nc, 10, 0),
        np.repeat(image_n, 10),
    )
    copied_rows = copies[copies.metric == "accuracy"]
    np.testing.assert_allclose(copied_rows.hi - copied_rows.lo, rows.hi - rows.lo, rtol=1e-6)


@pytest.mark.parametrize("decimals", [1, 2, 8])  # many ties, some, and none
@pytest.mark.parametrize("most", [1, 4])  # examples of an image
def test_leaving_images_out_is_what_their_weight_of_0_gives(decimals, most, rng):
    image_n = np.repeat(np.arange(40), rng.integers(1, most + 1, 40))
    image_n = rng.permutation(image_n)
    n = len(image_n)
    y_nc = (rng.random((n, 3)) < [0.5, 0.05, 0.9]).astype(int)
    y_nc[:, 1] = 0
    y_nc[7, 1] = 1  # without its image nothing is positive
    mask_nc = (rng.random((n, 3)) < 0.8).astype(int)
    mask_nc[7, 1] = 1
    p_lnc = np.round(0.2 * y_nc + 0.8 * rng.random((2, n, 3)), decimals)
    weight_bn = torch.tensor(1 - np.eye(40)[:, image_n])
    options = {"mask_nc": mask_nc}
    expected = metrics.average_precision(p_lnc, y_nc, weight_bn=weight_bn, **options)
    found = metrics.leave_images_out(p_lnc, y_nc, image_n=image_n, **options)
    assert np.isnan(found[image_n[7], :, 1]).all()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_average_precision_is_that_of_scikit_learn_with_weights_and_ties(rng):
    n, c = 120, 3
    y_nc = rng.integers(0, 2, (n, c))
    y_nc[:, 2] = 0  # no positive example
    mask_nc = rng.random((n, c)) < 0.7
    p_lnc = np.round(rng.random((2, n, c)), 1)  # many are equal
    weight_bn = rng.poisson(1.0, (4, n)).astype(np.uint8)
    average_blc = metrics.average_precision(
        p_lnc, y_nc, mask_nc=mask_nc, weight_bn=torch.tensor(weight_bn)
    )
    assert average_blc.shape == (4, 2, c)
    assert np.isnan(average_blc[..., 2]).all()
    for b, layer, k in np.ndindex(4, 2, 2):
        rows = mask_nc[:, k]
        expected = reference.average_precision_score(
            y_nc[rows, k], p_lnc[layer, rows, k], sample_weight=weight_bn[b, rows]
        )
        assert float(average_blc[b, layer, k]) == pytest.approx(expected, abs=1e-5)

    table = metrics.score_table(
        p_lnc,
        y_nc,
        mask_nc=mask_nc,
        image_n=np.arange(n),
        classes=list("abc"),
        layers=["x", "y"],
        binary=False,
        resamples=50,
    )
    row = find_row(table, "x", "average_precision")
    by_class = [find_row(table, "x", "average_precision", name).value for name in "ab"]
    assert row.value == pytest.approx(np.mean(by_class))
    assert row.lo < row.value < row.hi


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
def test_thresholds_are_the_best_ones_that_can_be_chosen(rng, binary):
    p_lnc, y_nc, mask_nc, _ = binary_data(rng, n=80)
    p_lnc = np.round(p_lnc, 2)
    score = reference.accuracy_score if binary else reference.f1_score
    threshold_lc = metrics.choose_thresholds(p_lnc, y_nc, mask_nc=mask_nc, binary=binary)
    for layer in range(3):
        p_n = p_lnc[layer, :, 0]
        grid = np.arange(-0.005, 1.01, 0.01)  # between all values that occur
        best = max(score(y_nc[:, 0], p_n >= threshold) for threshold in grid)
        assert score(y_nc[:, 0], p_n >= threshold_lc[layer, 0]) >= best - 1e-9


def test_thresholds_of_one_sided_and_hopeless_classes(rng):
    p_lnc, y_nc, mask_nc, _ = binary_data(rng, n=80)
    one_sided = metrics.choose_thresholds(p_lnc, 0 * y_nc, mask_nc=mask_nc, binary=True)
    assert one_sided.tolist() == [[0.5]] * 3
    hopeless = np.zeros_like(y_nc)
    hopeless[p_lnc[0, :, 0].argmin()] = 1  # the least likely example: best is no to all
    threshold_lc = metrics.choose_thresholds(p_lnc, hopeless, mask_nc=mask_nc, binary=True)
    assert not (p_lnc[0] >= threshold_lc[0]).any()


def test_tuned_scores_take_the_thresholds(rng):
    p_lnc, y_nc, mask_nc, image_n = binary_data(rng)
    threshold_lc = np.array([[0.3], [0.5], [0.9]])
    table = binary_table(
        p_lnc, y_nc, mask_nc, image_n, resamples=50, by_class=False, threshold_lc=threshold_lc
    )
    for k, layer in enumerate(LAYERS):
        accuracy = ((p_lnc[k] >= threshold_lc[k]) == y_nc).mean()
        assert find_row(table, layer, "accuracy_tuned").value == pytest.approx(accuracy)
    assert (table["class"] == "").all()
    assert table.gap.isna().all()


def test_layers_are_compared_within_their_stage(rng):
    p_lnc, y_nc, mask_nc, image_n = binary_data(rng, n=400, layer_count=4)
    p_lnc[1] = np.where(y_nc > 0, 0.9, 0.1)  # never wrong: the best of its stage
    p_lnc[3] = rng.random(y_nc.shape)
    layers = ["vision.00", "vision.01", "lm.00", "lm.01"]
    table = binary_table(p_lnc, y_nc, mask_nc, image_n, layers=layers, resamples=300)
    accuracy = table[table.metric == "accuracy"].set_index("layer")
    assert accuracy.plateau.tolist() == [False, True, True, False]
    assert accuracy.gap["vision.01"] > 0 > accuracy.gap["vision.00"]
    log_loss = table[table.metric == "log_loss"].set_index("layer")
    assert log_loss.plateau["vision.01"]  # a smaller loss is better
    assert not log_loss.plateau["vision.00"]
    assert table[table.metric == "precision_macro"].gap.isna().all()
