import numpy as np
import pytest
from scipy import stats

from probekit.probes import bootstrap, comparison


def hit_rate(total):
    """Scores (b, l) of counts (b, l, 2): hits, and entries that count."""
    return total[..., 0] / total[..., 1]


def simulate_study(strength_l, *, images, seed, first_image=0, resamples=1000):
    """Curve and true accuracies of layers that find the same two examples of an image hard."""
    rng = np.random.default_rng(seed)
    shared = 0.8
    of_image = rng.normal(size=(images, 1, 1))
    of_example = rng.normal(size=(images, 2, 1))
    z = np.sqrt(shared / 2) * (of_image + of_example)
    z = z + np.sqrt(1 - shared) * rng.normal(size=(images, 2, len(strength_l)))
    hits = (z + strength_l > 0).sum(1)
    counts = np.stack([hits, np.full_like(hits, 2)], -1)
    names = range(first_image, first_image + images)
    curve = bootstrap.bootstrap_curve(counts, names, score=hit_rate, resamples=resamples)
    return curve, stats.norm.cdf(strength_l)


def curve_of(*hits):
    """A curve of layers that are right (1) or wrong (0) on each image."""
    hits_nl = np.stack(hits, 1)
    counts = np.stack([hits_nl, np.ones_like(hits_nl)], -1)
    return bootstrap.bootstrap_curve(counts, range(len(hits_nl)), score=hit_rate)


RIGHT = np.random.default_rng(7).random(400) < 0.7


# ---- exact properties ----


def test_pairing_makes_differences_certain_that_separate_images_leave_open():
    strength = np.array([0.5, 0.6])
    one, _ = simulate_study(strength, images=800, seed=3)
    other, _ = simulate_study(strength, images=800, seed=4, first_image=10_000)
    paired = comparison.curve_difference(one.select([1]), one.select([0]), layers=["x"])
    apart = comparison.curve_difference(one.select([1]), other.select([0]), layers=["x"])
    apart_width = (apart.hi - apart.lo)[0]
    assert apart_width > 1.5 * (paired.hi - paired.lo)[0]
    # The variances of independent scores add up.
    error = np.sqrt(one.resampled_bl[:, 1].var() + other.resampled_bl[:, 0].var())
    assert apart_width == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_the_order_of_layers_changes_nothing():
    curve, _ = simulate_study(np.array([0.2, 0.7, 0.5, 0.7, 0.65]), images=400, seed=0)
    layers = list("abcde")
    order = [3, 0, 4, 2, 1]
    table = comparison.compare_layers(curve, layers)
    reordered = comparison.compare_layers(curve.select(order), [layers[k] for k in order])
    reordered = reordered.set_index("layer").loc[layers].reset_index()
    for column in table.columns[1:]:
        np.testing.assert_allclose(
            reordered[column].astype(float), table[column].astype(float), atol=1e-6
        )
    assert table.plateau.dtype == bool


def test_layers_that_answer_alike_share_rank_and_plateau():
    worse = RIGHT & (np.arange(400) % 3 > 0)
    table = comparison.compare_layers(curve_of(RIGHT, RIGHT, worse), list("abc"))
    assert table.plateau.tolist() == [True, True, False]
    assert table.gap[:2].tolist() == [0, 0]
    assert table.p[:2].tolist() == [1, 1]
    assert table.p_holm[2] < 0.01
    assert table.best_share.tolist() == [0.5, 0.5, 0]


def test_a_single_layer_is_a_plateau_by_itself():
    table = comparison.compare_layers(curve_of(RIGHT), ["a"])
    assert table.plateau.tolist() == [True]
    assert table.p.tolist() == [1]
    assert table.gap.isna().all()
    assert "among a (1 of 1 layers)" in comparison.plateau_sentence(table)


def test_two_layers_mirror_each_other():
    curve, _ = simulate_study(np.array([0.55, 0.6]), images=300, seed=1)
    a, b = comparison.compare_layers(curve, ["a", "b"]).itertuples()
    assert a.gap == pytest.approx(-b.gap)
    np.testing.assert_allclose([a.gap_lo, a.gap_hi], [-b.gap_hi, -b.gap_lo], atol=1e-9)
    # One-sided; resamples that are as extreme as the scores count on both sides.
    assert 1 <= a.p + b.p < 1.1
    # Either may be the better one.
    assert min(a.p_plateau, b.p_plateau) == pytest.approx(2 * min(a.p, b.p), rel=0.3)


@pytest.mark.filterwarnings("error")
def test_constant_scores_are_told_apart_only_where_they_differ():
    ones = np.ones(50)
    zeros = np.zeros(50)
    equal = comparison.compare_layers(curve_of(ones, ones, ones), list("abc"))
    assert equal.plateau.all()
    assert (equal.p == 1).all()
    assert (equal[["gap", "gap_lo", "gap_hi"]] == 0).all(axis=None)
    table = comparison.compare_layers(curve_of(ones, zeros, ones), list("abc"))
    assert table.plateau.tolist() == [True, False, True]
    assert table.gap_hi[1] == table.gap_lo[1] == -1
    assert comparison.curve_difference(curve_of(ones), curve_of(ones), layers=["a"]).p.tolist() == [
        1
    ]


def test_a_layer_without_a_score_is_named():
    curve = bootstrap.Curve(np.array([0.5, np.nan]), curve_of(RIGHT, RIGHT).resampled_bl)
    with pytest.raises(ValueError, match=r"no score for b: leave these layers out"):
        comparison.compare_layers(curve, ["a", "b"])


def test_curves_of_unequal_resamples_are_refused():
    with pytest.raises(ValueError, match=r"\(2000, 1\) and \(2000, 2\)"):
        comparison.curve_difference(curve_of(RIGHT), curve_of(RIGHT, RIGHT), layers=["a"])


def test_holm_corrects_as_published():
    corrected = comparison.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(corrected, [0.03, 0.06, 0.06, 0.02])
    assert comparison.holm(np.array([0.6, 0.9])).tolist() == [1, 1]


def test_the_sentence_names_every_stretch_of_the_plateau():
    curve, _ = simulate_study(np.array([0.0, 0.9, 0.9, 0.0, 0.9]), images=500, seed=2)
    layers = [f"lm.0{k}" for k in range(5)]
    sentence = comparison.plateau_sentence(comparison.compare_layers(curve, layers))
    assert "with 99 % confidence" in sentence
    assert "among lm.01 to lm.02, lm.04 (3 of 5 layers)." in sentence


# ---- studies whose truth is known ----


@pytest.mark.slow
def test_intervals_hold_the_truth_in_about_95_percent_of_studies():
    strength = np.linspace(0.3, 0.8, 6)
    score_held = []
    difference_held = []
    for seed in range(150):
        curve, truth = simulate_study(strength, images=300, seed=seed)
        lower, upper = bootstrap.bca_interval(curve)
        score_held.append((lower <= truth) & (truth <= upper))
        pair = comparison.curve_difference(
            curve.select(slice(3)), curve.select(slice(3, 6)), layers=range(3)
        )
        true_difference = truth[:3] - truth[3:]
        difference_held.append((pair.lo <= true_difference) & (true_difference <= pair.hi))
    assert 0.92 < np.mean(score_held) < 0.98
    assert 0.92 < np.mean(difference_held) < 0.98


@pytest.mark.slow
def test_the_gap_to_a_selected_best_is_covered_where_a_plain_difference_is_not():
    gap_held = []
    plain_held = []
    for seed in range(120):
        curve, _ = simulate_study(np.full(8, 0.5), images=300, seed=seed)
        table = comparison.compare_layers(curve, range(8))
        gap_held.append((table.gap_lo <= 0) & (table.gap_hi >= 0))
        best = int(curve.score_l.argmax())
        plain = comparison.curve_difference(curve, curve.select([best] * 8), layers=range(8))
        plain_held.append((plain.lo <= 0) & (plain.hi >= 0))
    assert np.mean(gap_held) > 0.93
    assert np.mean(plain_held) < 0.9


@pytest.mark.slow
def test_equal_layers_raise_no_more_false_alarms_than_stated():
    tables = []
    for seed in range(150):
        curve, _ = simulate_study(np.full(10, 0.5), images=300, seed=seed)
        tables.append(comparison.compare_layers(curve, range(10)))
    for column, alpha in (("p_holm", 0.05), ("p_plateau", 0.05), ("p_plateau", 0.01)):
        alarms = sum((table[column] <= alpha).any() for table in tables)
        assert alarms <= stats.binom.ppf(0.995, 150, alpha), column


@pytest.mark.slow
def test_the_planted_plateau_is_found_exactly():
    planted = list(range(5, 10))
    strength = np.where(np.isin(np.arange(20), planted), 0.9, 0.5)
    tables = []
    for seed in range(60):
        curve, _ = simulate_study(strength, images=500, seed=seed)
        tables.append(comparison.compare_layers(curve, range(20)))
    is_exact = [table.layer[table.plateau].tolist() == planted for table in tables]
    assert np.mean(is_exact) >= 0.95
    assert "among 5 to 9 (5 of 20 layers)" in comparison.plateau_sentence(tables[0])
