import numpy as np
import pytest
from scipy import stats

from probekit.probes import bootstrap, comparison, metrics


def rates(total):
    """Scores (b, l) of counts (b, l, 2): right, asked."""
    return total[..., 0] / total[..., 1]


def study(strength_l, images, seed, shared=0.8, first=0, resamples=1000):
    """Curve and true accuracies of layers that find the same two examples of an image hard."""
    rng = np.random.default_rng(seed)
    z = np.sqrt(shared / 2) * (rng.normal(size=(images, 1, 1)) + rng.normal(size=(images, 2, 1)))
    z = z + np.sqrt(1 - shared) * rng.normal(size=(images, 2, len(strength_l)))
    right = (z + strength_l > 0).sum(1)
    counts = np.stack([right, np.full_like(right, 2)], -1)
    return bootstrap.bootstrap_curve(counts, range(first, first + images), rates, resamples), stats.norm.cdf(strength_l)


def of(*columns):
    """A curve of layers that are right (1) or wrong (0) on each image."""
    right = np.stack(columns, 1)
    return bootstrap.bootstrap_curve(np.stack([right, np.ones_like(right)], -1), range(len(right)), rates)


RIGHT = np.random.default_rng(7).random(400) < 0.7


# -------------------------------------------------------------------------------------------------------- resampling


def test_an_images_weight_depends_on_its_name_alone():
    w = bootstrap.image_weights(["a", "b", 7], 500)
    np.testing.assert_array_equal(bootstrap.image_weights([7, "x", "a"], 500)[:, [2, 0]], w[:, [0, 2]])
    assert (bootstrap.image_weights(["a", "b", 7], 500, seed=1) != w).any()
    many = bootstrap.image_weights(range(300), 2000).astype(float)
    np.testing.assert_allclose([many.mean(), many.var()], 1, atol=0.02)
    assert np.abs(np.corrcoef(many.T) - np.eye(300)).max() < 0.15  # images are drawn independently


def test_resampling_gives_the_scores_of_metrics_and_does_not_depend_on_blocks_or_order(monkeypatch):
    rng = np.random.default_rng(0)
    p, y, image = rng.random((3, 120, 4)), rng.integers(0, 2, (120, 4)), np.repeat(np.arange(60), 2)
    counts = metrics.image_counts(p, y, np.ones_like(y), image)
    macro = lambda total: metrics.scores(total, False)["f1_macro", None]  # noqa: E731
    curve = bootstrap.bootstrap_curve(counts, range(60), macro, 300)
    np.testing.assert_allclose(curve.score_l, macro(counts.sum(0)))
    by_hand = macro((bootstrap.image_weights(range(60), 300)[7][:, None, None, None] * counts).sum(0))
    np.testing.assert_allclose(curve.resampled_bl[7], by_hand, rtol=1e-6)
    monkeypatch.setattr(comparison, "BLOCK", 100)
    order = rng.permutation(60)
    for a, b in zip(curve, bootstrap.bootstrap_curve(counts[order], np.arange(60)[order], macro, 300), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


def test_what_cannot_be_resampled_says_why():
    with pytest.raises(ValueError, match="1 test image cannot be resampled: take more images"):
        bootstrap.bootstrap_curve(np.ones((1, 2, 2)), [5], rates)
    with pytest.raises(ValueError, match="an image is there twice"):
        bootstrap.bootstrap_curve(np.ones((3, 2, 2)), [5, 6, 5], rates)
    with pytest.raises(ValueError, match="counts of 3 images, but 2 names"):
        bootstrap.bootstrap_curve(np.ones((3, 2, 2)), [5, 6], rates)


def test_bca_is_that_of_scipy_and_holds_a_rare_classes_f1_where_percentiles_do_not():
    values = np.random.default_rng(1).exponential(size=80)
    curve = bootstrap.bootstrap_curve(np.stack([values, np.ones(80)], -1)[:, None], range(80), rates, 20_000)
    wanted = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", random_state=0).confidence_interval
    np.testing.assert_allclose(np.ravel(bootstrap.bca_interval(curve)), wanted, rtol=0.02)
    f1 = lambda total: 2 * total[..., 0] / np.maximum(2 * total[..., 0] + total[..., 1], 1)  # noqa: E731
    hit, wrong, held, percentile = 0.012, 0.012, [], []
    for seed in range(150):  # about seven positives in 300 images
        kind = np.random.default_rng(seed).choice(3, (300, 8), p=[1 - hit - wrong, hit, wrong])
        drawn = bootstrap.bootstrap_curve(np.stack([kind == 1, kind == 2], -1).astype(float), range(300), f1, 1000)
        truth = 2 * hit / (2 * hit + wrong)
        lo, hi = bootstrap.bca_interval(drawn)
        held.append((lo <= truth) & (truth <= hi))
        lo, hi = np.quantile(drawn.resampled_bl, [0.025, 0.975], axis=0)
        percentile.append((lo <= truth) & (truth <= hi))
    assert 0.92 < np.mean(held) < 0.98 and np.mean(percentile) < np.mean(held)


# ---------------------------------------------------------------------------------------------------- exact properties


def test_pairing_makes_differences_certain_that_separate_images_leave_open():
    strength = np.array([0.5, 0.6])
    paired = comparison.curve_difference((one := study(strength, 800, 3)[0]).only([1]), one.only([0]), ["x"])
    other = study(strength, 800, 4, first=10_000)[0]
    apart = comparison.curve_difference(one.only([1]), other.only([0]), ["x"])
    assert (apart.hi - apart.lo)[0] > 1.5 * (paired.hi - paired.lo)[0]
    expected = np.sqrt(one.resampled_bl[:, 1].var() + other.resampled_bl[:, 0].var())  # independent: variances add
    assert (apart.hi - apart.lo)[0] == pytest.approx(2 * 1.96 * expected, rel=0.08)


def test_the_order_of_layers_changes_nothing():
    curve, _ = study(np.array([0.2, 0.7, 0.5, 0.7, 0.65]), 400, 0)
    table, order = comparison.compare_layers(curve, list("abcde")), [3, 0, 4, 2, 1]
    again = comparison.compare_layers(curve.only(order), [list("abcde")[k] for k in order])
    again = again.set_index("layer").loc[list("abcde")].reset_index()
    for column in table.columns[1:]:
        np.testing.assert_allclose(again[column].astype(float), table[column].astype(float), atol=1e-6)
    assert "plateau" in table and table.plateau.dtype == bool


def test_layers_that_answer_alike_share_rank_and_plateau():
    worse = RIGHT & (np.arange(400) % 3 > 0)
    table = comparison.compare_layers(of(RIGHT, RIGHT, worse), list("abc"))
    assert table.plateau.tolist() == [True, True, False]
    assert table.gap[0] == table.gap[1] == 0 and (table.p[:2] == 1).all() and table.p_holm[2] < 0.01
    assert table.best_share.tolist() == [0.5, 0.5, 0]


def test_a_single_layer_is_its_own_plateau():
    table = comparison.compare_layers(of(RIGHT), ["a"])
    assert table.plateau.tolist() == [True] and table.p.tolist() == [1] and table.gap.isna().all()
    assert "among a (1 of 1 layers)" in comparison.plateau_sentence(table)


def test_two_layers_mirror_each_other():
    curve, _ = study(np.array([0.55, 0.6]), 300, 1)
    table = comparison.compare_layers(curve, ["a", "b"])
    assert table.gap[0] == pytest.approx(-table.gap[1])
    np.testing.assert_allclose([table.gap_lo[0], table.gap_hi[0]], [-table.gap_hi[1], -table.gap_lo[1]], atol=1e-9)
    assert 1 <= table.p.sum() < 1.1  # one-sided; resamples as extreme as the scores count on both sides
    assert table.p_plateau.min() == pytest.approx(2 * table.p.min(), rel=0.3)  # either may be the better one


@pytest.mark.filterwarnings("error")
def test_constant_scores_are_told_apart_only_where_they_differ():
    ones, zeros = np.ones(50), np.zeros(50)
    same = comparison.compare_layers(of(ones, ones, ones), list("abc"))
    assert same.plateau.all() and (same.p == 1).all() and (same[["gap", "gap_lo", "gap_hi"]] == 0).all(axis=None)
    table = comparison.compare_layers(of(ones, zeros, ones), list("abc"))
    assert table.plateau.tolist() == [True, False, True] and table.gap_hi[1] == table.gap_lo[1] == -1
    lo, hi = bootstrap.bca_interval(of(ones, zeros))
    assert lo.tolist() == hi.tolist() == [1, 0]
    assert comparison.curve_difference(of(ones), of(ones), ["a"]).p.tolist() == [1]


def test_a_layer_without_a_score_is_named():
    curve = of(RIGHT, RIGHT)
    with pytest.raises(ValueError, match=r"no score for b: leave these layers out"):
        comparison.compare_layers(bootstrap.Curve(np.array([0.5, np.nan]), curve.resampled_bl), ["a", "b"])


def test_curves_of_unequal_resamples_are_refused():
    with pytest.raises(ValueError, match=r"\(2000, 1\) and \(2000, 2\)"):
        comparison.curve_difference(of(RIGHT), of(RIGHT, RIGHT), ["a"])


def test_holm_is_holms():
    np.testing.assert_allclose(comparison.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert comparison.holm(np.array([0.6, 0.9])).tolist() == [1, 1]


def test_the_sentence_names_every_stretch_of_the_plateau():
    strength = np.array([0.0, 0.9, 0.9, 0.0, 0.9])
    text = comparison.plateau_sentence(comparison.compare_layers(study(strength, 500, 2)[0], [f"lm.0{k}" for k in range(5)]))
    assert "with 99 % confidence" in text and "among lm.01 to lm.02, lm.04 (3 of 5 layers)." in text


# ------------------------------------------------------------------------------------------------------- known truth


def test_intervals_hold_the_truth_in_about_95_percent_of_studies():
    strength, score, models = np.linspace(0.3, 0.8, 6), [], []
    for seed in range(150):
        curve, truth = study(strength, 300, seed)
        lo, hi = bootstrap.bca_interval(curve)
        score.append((lo <= truth) & (truth <= hi))
        pair = comparison.curve_difference(curve.only(slice(3)), curve.only(slice(3, 6)), range(3))
        models.append((pair.lo <= truth[:3] - truth[3:]) & (truth[:3] - truth[3:] <= pair.hi))
    assert 0.92 < np.mean(score) < 0.98 and 0.92 < np.mean(models) < 0.98


def test_the_gap_to_a_selected_best_is_covered_where_a_plain_difference_is_not():
    gaps, plain = [], []
    for seed in range(120):
        curve, _ = study(np.full(8, 0.5), 300, seed)
        table = comparison.compare_layers(curve, range(8))
        gaps.append((table.gap_lo <= 0) & (table.gap_hi >= 0))
        chosen = comparison.curve_difference(curve, curve.only([int(curve.score_l.argmax())] * 8), range(8))
        plain.append((chosen.lo <= 0) & (chosen.hi >= 0))
    assert np.mean(gaps) > 0.93 and np.mean(plain) < 0.9


def test_equal_layers_raise_no_more_false_alarms_than_stated():
    tables = [comparison.compare_layers(study(np.full(10, 0.5), 300, seed)[0], range(10)) for seed in range(150)]
    for column, alpha in (("p_holm", 0.05), ("p_plateau", 0.05), ("p_plateau", 0.01)):
        alarms = sum((table[column] <= alpha).any() for table in tables)
        assert alarms <= stats.binom.ppf(0.995, 150, alpha), column


def test_the_planted_plateau_is_found_exactly():
    planted = list(range(5, 10))
    strength = np.where(np.isin(np.arange(20), planted), 0.9, 0.5)
    tables = [comparison.compare_layers(study(strength, 500, seed)[0], range(20)) for seed in range(60)]
    found = [table.layer[table.plateau].tolist() == planted for table in tables]
    assert np.mean(found) >= 0.95
    assert "among 5 to 9 (5 of 20 layers)" in comparison.plateau_sentence(tables[0])
