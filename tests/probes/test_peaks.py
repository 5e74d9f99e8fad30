import numpy as np
import pytest
from scipy import stats

from probekit.probes import bootstrap, peaks


def hit_rate(total):
    return total[..., 0] / total[..., 1]


def draw_curves(*strengths, images=300, seed=0, resamples=500):
    """Curves of models that find the same two examples of an image hard."""
    rng = np.random.default_rng(seed)
    curves = []
    shared = rng.normal(size=(images, 1, 1)) + rng.normal(size=(images, 2, 1))
    for strength_l in strengths:
        rest = rng.normal(size=(images, 2, len(strength_l)))
        hits = (np.sqrt(0.3) * shared + np.sqrt(0.4) * rest + strength_l > 0).sum(1)
        counts = np.stack([hits, np.full_like(hits, 2)], -1)
        curve = bootstrap.bootstrap_curve(
            counts, range(images), score=hit_rate, resamples=resamples
        )
        curves.append(curve)
    return curves


def peaked(layer, *, layers=12, slope=0.12):
    return 0.9 - slope * abs(np.arange(layers) - layer)


# Layer 4 is best by two hundredths; what follows is a plateau.
ABOVE_PLATEAU = np.array([0.0, 0.2, 0.4, 0.6, 0.73, *[0.7] * 20])


def curve_of(*scores, resampled=None):
    score_l = np.array(scores)
    resampled_bl = np.tile(score_l, (100, 1)) if resampled is None else np.array(resampled)
    return bootstrap.Curve(score_l, resampled_bl)


# ---- exact properties ----


def test_scores_that_never_vary_peak_at_one_layer():
    a = curve_of(0.5, 0.9, 0.6, 0.5)
    b = curve_of(0.5, 0.6, 0.6, 0.9)
    peak = peaks.find_peak(a)
    assert (peak.layer, peak.lo, peak.hi) == (1, 1, 1)
    assert (peak.resampled_lo, peak.resampled_hi) == (1, 1)
    shift = peaks.compare_peaks(a, b)
    assert (shift.shift, shift.lo, shift.hi) == (2, 2, 2)
    assert (shift.resampled_lo, shift.resampled_hi) == (2, 2)
    assert shift.p < 0.02
    assert shift.is_beyond(1)
    assert not shift.is_beyond(2)
    back = peaks.compare_peaks(b, a)
    assert (back.lo, back.hi, back.p) == (-2, -2, shift.p)
    assert back.is_beyond(1)


def test_layers_that_tie_are_all_possible_peaks_and_share_the_resamples():
    tied = curve_of(0.5, 0.9, 0.9, 0.9)
    peak = peaks.find_peak(tied)
    assert (peak.layer, peak.lo, peak.hi) == (1, 1, 3)
    assert (peak.resampled_lo, peak.resampled_hi) == (1, 3)
    assert not peak.is_place
    shift = peaks.compare_peaks(tied, tied)
    assert (shift.shift, shift.lo, shift.hi, shift.p) == (0, -2, 2, 1)


def test_models_of_other_depths_are_compared_by_relative_depth():
    shallow = curve_of(0.5, 0.6, 0.9, 0.6, 0.5)  # peaks half-way
    deep = curve_of(*np.linspace(0.5, 0.6, 4), 0.9, *np.linspace(0.6, 0.5, 4))
    deeper = curve_of(*np.linspace(0.5, 0.6, 6), 0.9, *np.linspace(0.6, 0.5, 2))
    same = peaks.compare_peaks(shallow, deep)
    assert (same.shift, same.p) == (0, 1)
    moved = peaks.compare_peaks(shallow, deeper)
    assert (moved.shift, moved.lo, moved.hi) == (1, 1, 1)  # a quarter of the depth: one of four
    assert peaks.compare_peaks(deep, curve_of(0.5, 0.6, 0.6, 0.9, 0.5)).shift == 2
    # The shallow model has no layer between: half of one of its layers is no movement.
    between = curve_of(*np.linspace(0.5, 0.6, 5), 0.9, *np.linspace(0.6, 0.5, 3))
    assert peaks.compare_peaks(shallow, between).p == 1


def test_a_layer_without_a_score_is_refused():
    with pytest.raises(ValueError, match="take more test images"):
        peaks.find_peak(curve_of(0.5, np.nan))
    short = bootstrap.Curve(np.array([0.5]), np.full((7, 1), 0.5))
    with pytest.raises(ValueError, match="100 and 7 resamples"):
        peaks.compare_peaks(curve_of(0.5), short)


# ---- studies whose truth is known ----


def test_a_clear_peak_is_covered_and_nothing_is_said_to_move():
    held = []
    alarms = 0
    for seed in range(60):
        a, b = draw_curves(peaked(5), peaked(5), seed=seed)
        peak = peaks.find_peak(a)
        held.append(peak.lo <= 5 <= peak.hi and peak.is_place)
        shift = peaks.compare_peaks(a, b)
        assert (shift.p <= 0.05) == (not shift.lo <= 0 <= shift.hi)
        alarms += shift.p <= 0.05
    assert np.mean(held) >= 0.95
    assert alarms <= stats.binom.ppf(0.995, 60, 0.05)


def test_a_peak_beside_a_plateau_raises_no_false_alarm_where_quantiles_would():
    clear = peaked(4, layers=25)
    held = []
    alarms = 0
    alarms_of_quantiles = 0
    for seed in range(40):
        a, b = draw_curves(clear, ABOVE_PLATEAU, seed=seed)
        peak = peaks.find_peak(b)
        held.append(peak.lo <= 4 <= peak.hi)
        shift = peaks.compare_peaks(a, b)
        alarms += shift.p <= 0.05
        alarms_of_quantiles += not shift.resampled_lo <= 0 <= shift.resampled_hi
    assert np.mean(held) >= 0.93
    assert alarms <= stats.binom.ppf(0.995, 40, 0.05)
    assert alarms_of_quantiles > 8


def test_flat_curves_have_no_peak_and_raise_no_more_alarms_than_stated():
    flat = np.full(12, 0.7)
    alarms = 0
    places = 0
    for seed in range(60):
        a, b = draw_curves(flat, flat, seed=seed)
        alarms += peaks.compare_peaks(a, b).p <= 0.05
        places += peaks.find_peak(a).is_place
    assert alarms <= stats.binom.ppf(0.995, 60, 0.05)
    assert places <= 3


def test_a_movement_of_three_layers_is_found_and_covered():
    found = []
    held = []
    for seed in range(40):
        a, b = draw_curves(peaked(5), peaked(8), seed=seed, images=500)
        shift = peaks.compare_peaks(a, b)
        found.append(shift.p <= 0.05 and shift.lo > 0)
        held.append(shift.lo <= 3 <= shift.hi)
    assert np.mean(found) >= 0.9
    assert np.mean(held) >= 0.95
