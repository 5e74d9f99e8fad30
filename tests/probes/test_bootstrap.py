import numpy as np
import pytest
from scipy import stats

from probekit.probes import bootstrap, metrics


def hit_rate(total):
    """Scores (b, l) of counts (b, l, 2): hits, and entries that count."""
    return total[..., 0] / total[..., 1]


def test_the_weights_of_an_image_depend_on_its_name_and_the_seed_alone():
    weights = bootstrap.image_weights(["a", "b", 7], resamples=500)
    others = bootstrap.image_weights([7, "x", "a"], resamples=500)
    np.testing.assert_array_equal(others[:, [2, 0]], weights[:, [0, 2]])
    other_seed = bootstrap.image_weights(["a", "b", 7], resamples=500, seed=1)
    assert (other_seed != weights).any()


def test_weights_are_poisson_and_images_independent():
    weights = bootstrap.image_weights(range(300), resamples=2000).numpy().astype(float)
    np.testing.assert_allclose([weights.mean(), weights.var()], 1, atol=0.02)
    assert np.abs(np.corrcoef(weights.T) - np.eye(300)).max() < 0.15


def test_resampling_gives_the_scores_of_metrics_whatever_blocks_and_order(monkeypatch):
    rng = np.random.default_rng(0)
    p_lnc = rng.random((3, 120, 4))
    y_nc = rng.integers(0, 2, (120, 4))
    counts = metrics.count_by_image(
        p_lnc, y_nc, mask_nc=np.ones_like(y_nc), image_n=np.repeat(np.arange(60), 2)
    )

    def f1_macro(total):
        return metrics.score_counts(total, binary=False)["f1_macro", None]

    curve = bootstrap.bootstrap_curve(counts, range(60), score=f1_macro, resamples=300)
    np.testing.assert_allclose(curve.score_l, f1_macro(counts.sum(0)))
    weights = bootstrap.image_weights(range(60), resamples=300)[7]
    by_hand = f1_macro((weights[:, None, None, None] * counts).sum(0))
    np.testing.assert_allclose(curve.resampled_bl[7], by_hand, rtol=1e-6)

    monkeypatch.setattr(bootstrap, "BLOCK", 100)
    order = rng.permutation(60)
    in_blocks = bootstrap.bootstrap_curve(counts[order], order, score=f1_macro, resamples=300)
    for values, values_in_blocks in zip(curve, in_blocks, strict=True):
        np.testing.assert_allclose(values, values_in_blocks, rtol=1e-5, atol=1e-9)


def test_what_cannot_be_resampled_says_why():
    with pytest.raises(ValueError, match="1 test image cannot be resampled: take more images"):
        bootstrap.bootstrap_curve(np.ones((1, 2, 2)), [5], score=hit_rate)
    with pytest.raises(ValueError, match="an image is named twice"):
        bootstrap.bootstrap_curve(np.ones((3, 2, 2)), [5, 6, 5], score=hit_rate)
    with pytest.raises(ValueError, match="counts of 3 images, but 2 names"):
        bootstrap.bootstrap_curve(np.ones((3, 2, 2)), [5, 6], score=hit_rate)


def test_bca_is_that_of_scipy():
    values = np.random.default_rng(1).exponential(size=80)
    counts = np.stack([values, np.ones(80)], -1)[:, None]
    curve = bootstrap.bootstrap_curve(counts, range(80), score=hit_rate, resamples=20_000)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", random_state=0
    )
    interval = np.ravel(bootstrap.bca_interval(curve))
    np.testing.assert_allclose(interval, reference.confidence_interval, rtol=0.02)


def test_bca_holds_the_f1_of_a_rare_class_where_percentiles_do_not():
    """About seven positives in 300 images."""
    hit = 0.012
    false_alarm = 0.012
    truth = 2 * hit / (2 * hit + false_alarm)

    def f1(total):
        return 2 * total[..., 0] / (2 * total[..., 0] + total[..., 1]).clip(1)

    held = []
    held_by_percentiles = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        kind = rng.choice(3, (300, 8), p=[1 - hit - false_alarm, hit, false_alarm])
        counts = np.stack([kind == 1, kind == 2], -1).astype(float)
        curve = bootstrap.bootstrap_curve(counts, range(300), score=f1, resamples=1000)
        lower, upper = bootstrap.bca_interval(curve)
        held.append((lower <= truth) & (truth <= upper))
        lower, upper = np.quantile(curve.resampled_bl, [0.025, 0.975], axis=0)
        held_by_percentiles.append((lower <= truth) & (truth <= upper))
    assert 0.92 < np.mean(held) < 0.98
    assert np.mean(held_by_percentiles) < np.mean(held)


@pytest.mark.filterwarnings("error")
def test_a_score_that_never_varies_has_an_interval_without_width():
    counts = np.ones((50, 2, 2))
    counts[:, 1, 0] = 0
    curve = bootstrap.bootstrap_curve(counts, range(50), score=hit_rate)
    lower, upper = bootstrap.bca_interval(curve)
    assert lower.tolist() == upper.tolist() == [1, 0]


def test_resamples_without_a_score_do_not_count_and_change_no_other_layer():
    rng = np.random.default_rng(0)
    resampled_bl = rng.normal(0.7, 0.1, (400, 4))
    lacks_b = rng.random(400) < 0.3
    of_finite = bootstrap.Curve(np.array([0.7]), resampled_bl[~lacks_b, 1:2], np.array([0.02]))
    resampled_bl[lacks_b, 1] = np.nan
    resampled_bl[1:, 2] = np.inf
    resampled_bl[:, 3] = np.nan
    acceleration_l = np.array([0.01, 0.02, 0.0, 0.0])
    curve = bootstrap.Curve(np.array([0.72, 0.7, 0.7, 0.7]), resampled_bl, acceleration_l)
    lower_l, upper_l = bootstrap.bca_interval(curve)
    for layer, expected in ((0, curve.select([0])), (1, of_finite)):
        lower, upper = bootstrap.bca_interval(expected)
        assert (lower[0], upper[0]) == (lower_l[layer], upper_l[layer])
    assert lower_l[2] == upper_l[2] == resampled_bl[0, 2]
    assert np.isnan([lower_l[3], upper_l[3]]).all()
