"""Which layers differ, and which is best: curves compared on the same resamples of the images.

The functions take a :class:`~probekit.probes.bootstrap.Curve`: one score per layer and its
bootstrap resamples, of which larger ones are better (negate a log loss). Since an image's weight in
a resample depends only on its name and the seed, curves of different models, poolings or tasks are
paired where they share images, and independent where they do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from probekit.probes.bootstrap import ROUNDING, Curve

# The columns of compare_layers that the metrics table keeps.
COLUMNS = ["gap", "gap_lo", "gap_hi", "p_holm", "p_plateau", "plateau", "best_share"]

# Differences, in standard errors, that are smaller than this are ties.
TIE = 1e-6


def holm(p: np.ndarray) -> np.ndarray:
    """Correct p-values for the number of hypotheses, so that few studies have any false alarm.

    Parameters
    ----------
    p : ndarray
        (m,) p-values.

    Returns
    -------
    ndarray
        (m,) corrected p-values. If every hypothesis that is below 0.05 is rejected, at most 5 % of
        studies reject one that holds.

    References
    ----------
    Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p)
    order = np.argsort(p, kind="stable")
    factor = len(p) - np.arange(len(p))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(factor * p[order]))
    return corrected


def standardised_leads(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standardise how far layer j leads over layer i.

    Returns
    -------
    z_ll : ndarray
        (l, l) lead of the scores, in standard errors; row i, column j.
    z_bll : ndarray
        (b, l, l) lead of the resampled scores, less that of the scores, in standard errors.
    error_ll : ndarray
        (l, l) standard errors of the leads.
    """
    score_l = curve.score_l
    resampled_bl = curve.resampled_bl
    covariance = np.atleast_2d(np.cov(resampled_bl.T))
    variance_l = np.diag(covariance)
    sum_of_variances = variance_l[:, None] + variance_l
    variance_ll = sum_of_variances - 2 * covariance
    # Less than 1e-9 of the variances is rounding: the difference of these layers never varies.
    varies = variance_ll > 1e-9 * sum_of_variances
    error_ll = np.sqrt(np.where(varies, variance_ll, 0))
    lead_ll = score_l - score_l[:, None]
    certain_z = np.where(lead_ll > ROUNDING, np.inf, np.where(lead_ll < -ROUNDING, -np.inf, 0))
    scale_ll = np.where(error_ll > 0, error_ll, np.inf)
    z_ll = np.where(error_ll > 0, lead_ll / scale_ll, certain_z)
    z_bll = np.empty((len(resampled_bl), *lead_ll.shape), np.float32)
    for i in range(len(score_l)):  # one row at a time needs no second array of this size
        lead_bl = resampled_bl - resampled_bl[:, [i]]
        z_bll[:, i] = (lead_bl - lead_ll[i]) / scale_ll[i]
    return z_ll, z_bll, error_ll


def tail_share(observed: np.ndarray, resampled: np.ndarray) -> np.ndarray:
    """Compute the share of values at least as extreme as the observed one, itself among them.

    Resamples are along the first axis. The share is never 0.
    """
    return (1 + (resampled >= observed - TIE).sum(0)) / (1 + len(resampled))


def _confidence_set(z_ll: np.ndarray, z_bll: np.ndarray) -> np.ndarray:
    """Compute the p-values (l,) of the model confidence set.

    Hansen, Lunde and Nason (2011), "The Model Confidence Set", range statistic, section 3.1.2: the
    layer that lies furthest behind another one is removed, again and again; a layer's p-value is
    the largest of the tests up to its removal.
    """
    remaining = list(range(len(z_ll)))
    p = np.ones(len(z_ll))
    highest = 0.0
    while len(remaining) > 1:
        behind = z_ll[np.ix_(remaining, remaining)].max(1)
        range_b = z_bll[:, remaining][:, :, remaining].max((1, 2))
        highest = max(highest, float(tail_share(behind.max(), range_b)))
        worst = int(behind.argmax())
        p[remaining[worst]] = highest
        del remaining[worst]
    return p


def _gap_interval(
    curve: Curve, *, z_bll: np.ndarray, error_ll: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Bound each layer's gap to the best of the others.

    The gap is the smallest of the differences to the others. For its lower bound the bound to the
    truly best of the others suffices, whichever that is; for its upper bound the bounds to all
    others must hold together.
    """
    tail = (1 - level) / 2
    layer_count = len(error_ll)
    lower = np.empty(layer_count)
    upper = np.empty(layer_count)
    for i in range(layer_count):
        others = np.arange(layer_count) != i
        lead = curve.score_l[i] - curve.score_l[others]
        error = error_ll[i, others]
        z = z_bll[:, i, others]
        lower[i] = (lead + np.quantile(z, tail, axis=0) * error).min()
        upper[i] = (lead + np.quantile(z.max(1), 1 - tail) * error).min()
    return lower, upper


def compare_layers(
    curve: Curve, layers: Sequence | np.ndarray, *, alpha: float = 0.01, level: float = 0.95
) -> pd.DataFrame:
    """Compare each layer with the best of the others, and find the plateau.

    The plateau are the layers that are not clearly worse than the best one.

    Parameters
    ----------
    curve : Curve
        Scores of l layers.
    layers : sequence or ndarray
        (l,) their names.
    alpha : float
        All layers that are as good as the best are in the plateau in 1 - alpha of studies. So it
        bounds how often a plateau of equal layers is found without one of them, which is why it is
        stricter than the intervals.
    level : float
        Of the interval of each layer's gap.

    Returns
    -------
    DataFrame
        One row per layer, with the columns

        * `layer`.
        * `gap`: its score minus the best score of the others, with the interval `gap_lo` to
          `gap_hi`. The interval is about that layer alone, so it may lie below 0 within the
          plateau. A single layer has no gap, and is a plateau by itself.
        * `p`: one-sided, of "this layer, named beforehand, is as good as all others" (Hsu's).
        * `p_holm`: the same, corrected for asking it of all layers.
        * `p_plateau`: of the model confidence set; `plateau` where it is above `alpha`.
        * `best_share`: the share of resamples in which the layer comes first. It describes, and
          guarantees nothing.

    Raises
    ------
    ValueError
        A layer has no score.

    Notes
    -----
    The plateau is a model confidence set and not Hsu's comparison with the best: in simulation
    (``benchmarks/compare.py``) Hsu's lost one of 12 equal layers in a third of the studies, and
    with Holm's correction it found the planted plateau less often where differences were small (in
    71 instead of 84 of 100).

    References
    ----------
    Hansen, Lunde and Nason (2011), "The Model Confidence Set". Hsu (1984), "Constrained
    simultaneous confidence intervals for multiple comparisons with the best".
    """
    if not np.isfinite(curve.score_l).all():
        missing = [
            str(name)
            for name, score in zip(layers, curve.score_l, strict=True)
            if not np.isfinite(score)
        ]
        raise ValueError(
            f"no score for {', '.join(missing)}: leave these layers out (Curve.select)"
        )
    is_finite_b = np.isfinite(curve.resampled_bl).all(1)
    curve = Curve(curve.score_l, curve.resampled_bl[is_finite_b])
    highest_b1 = curve.resampled_bl.max(1, keepdims=True)
    is_first_bl = np.isclose(curve.resampled_bl, highest_b1, rtol=0, atol=ROUNDING)
    best_share = (is_first_bl / is_first_bl.sum(1, keepdims=True)).mean(0)
    table = pd.DataFrame(
        {
            "layer": list(layers),
            "gap": np.nan,
            "gap_lo": np.nan,
            "gap_hi": np.nan,
            "p": 1.0,
            "p_holm": 1.0,
            "p_plateau": 1.0,
            "plateau": True,
            "best_share": best_share,
        }
    )
    if len(table) == 1:
        return table
    z_ll, z_bll, error_ll = standardised_leads(curve)
    score_l = curve.score_l
    table["gap"] = [score_l[i] - np.delete(score_l, i).max() for i in range(len(score_l))]
    table["gap_lo"], table["gap_hi"] = _gap_interval(
        curve, z_bll=z_bll, error_ll=error_ll, level=level
    )
    table["p"] = tail_share(z_ll.max(1), z_bll.max(2))
    table["p_holm"] = holm(table.p.to_numpy())
    table["p_plateau"] = _confidence_set(z_ll, z_bll)
    table["plateau"] = table.p_plateau > alpha
    return table


def plateau_sentence(table: pd.DataFrame, *, alpha: float = 0.01) -> str:
    """Say in words where the plateau is.

    Parameters
    ----------
    table : DataFrame
        Layers in order, with the columns of :func:`compare_layers`.
    alpha : float
        The one that :func:`compare_layers` was called with.

    Returns
    -------
    str
        Names the layer with the highest score, and every stretch of neighbouring layers of the
        plateau.
    """
    layers = list(table.layer)
    spans = plateau_spans(table)
    count = int(table.plateau.sum())
    best = layers[int(table.gap.argmax())] if len(table) > 1 else layers[0]
    return (
        f"{best} scores highest; with {100 * (1 - alpha):g} % confidence the truly best layer is "
        f"among {', '.join(spans)} ({count} of {len(layers)} layers)."
    )


def plateau_spans(table: pd.DataFrame) -> list[str]:
    """Return every stretch of neighbouring layers of the plateau, such as ``"lm.03 to lm.08"``.

    Parameters
    ----------
    table : DataFrame
        Layers in order, with the columns of :func:`compare_layers`.
    """
    layers = list(table.layer)
    inside = np.flatnonzero(table.plateau)
    stretches = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
    spans = []
    for stretch in stretches:
        first = layers[stretch[0]]
        last = layers[stretch[-1]]
        spans.append(str(first) if len(stretch) == 1 else f"{first} to {last}")
    return spans


def curve_difference(
    a: Curve, b: Curve, *, layers: Sequence | np.ndarray, level: float = 0.95
) -> pd.DataFrame:
    """Subtract curve b from curve a, point by point.

    The curves may be of two models, poolings or tasks, or selected layers of one curve.

    Parameters
    ----------
    a, b : Curve
        With the same seed and number of resamples; then shared images are paired.
    layers : sequence or ndarray
        (l,) names of the points.
    level : float
        Of each interval.

    Returns
    -------
    DataFrame
        One row per point: `layer`, `difference` with the percentile interval `lo` to `hi`, `p`
        (two-sided), and `p_holm`, corrected for the number of points.

    Raises
    ------
    ValueError
        The curves differ in the number of layers or resamples.
    """
    if a.resampled_bl.shape != b.resampled_bl.shape:
        raise ValueError(
            f"resamples of shape {a.resampled_bl.shape} and {b.resampled_bl.shape}: compare as "
            "many layers and take as many resamples of both"
        )
    resampled_bl = a.resampled_bl - b.resampled_bl
    tail = (1 - level) / 2
    lower, upper = np.quantile(resampled_bl, [tail, 1 - tail], axis=0)
    at_most_0 = (resampled_bl <= ROUNDING).sum(0)
    at_least_0 = (resampled_bl >= -ROUNDING).sum(0)
    rarer = np.minimum(at_most_0, at_least_0)
    p = np.minimum(1, 2 * (1 + rarer) / (1 + len(resampled_bl)))
    return pd.DataFrame(
        {
            "layer": list(layers),
            "difference": a.score_l - b.score_l,
            "lo": lower,
            "hi": upper,
            "p": p,
            "p_holm": holm(p),
        }
    )
