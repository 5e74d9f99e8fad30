"""Where a curve peaks, and whether the peak of another curve lies elsewhere.

The functions take a :class:`~probekit.probes.bootstrap.Curve`, of which larger scores are better.
Curves with the same seed and number of resamples are paired where they share images.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from probekit.probes.bootstrap import ROUNDING, Curve
from probekit.probes.comparison import standardised_leads, tail_share

LEVEL = 0.95

# Layers that lie so many standard errors behind are not counted among those that may be the best.
CLEARLY_BEHIND = 3.0


class Peak(NamedTuple):
    """Where a curve of l layers peaks.

    Attributes
    ----------
    layer : int
        The layer with the highest score; the first of several equal ones.
    lo, hi : int
        The first and the last layer that may truly be the best one.
    resampled_lo, resampled_hi : int
        Between which layers the resamples peak. It describes, and guarantees nothing.
    layers : int
        How many layers the curve has.
    """

    layer: int
    lo: int
    hi: int
    resampled_lo: int
    resampled_hi: int
    layers: int

    @property
    def is_place(self) -> bool:
        """Whether half of the layers are ruled out: else the curve is too flat to have a peak."""
        return self.hi - self.lo + 1 <= self.layers / 2


class PeakShift(NamedTuple):
    """How far the peak of curve b lies from that of curve a, in layers of a.

    Attributes
    ----------
    shift : float
        From the layer of a with the highest score to that of b; positive where b peaks deeper.
    lo, hi : float
        Its interval.
    p : float
        Of "both peak at the same depth", two-sided. It may be small while the interval holds 0:
        two equal peaks of a, on either side of the peak of b, leave the direction open.
    resampled_lo, resampled_hi : float
        Between which values the shift lies in the resamples. It describes, and guarantees nothing.
    """

    shift: float
    lo: float
    hi: float
    p: float
    resampled_lo: float
    resampled_hi: float

    def is_beyond(self, layers: float) -> bool:
        """Tell whether the whole interval lies more than so many layers from 0, on one side."""
        return self.lo > layers or self.hi < -layers


def find_peak(curve: Curve, *, level: float = LEVEL) -> Peak:
    """Find the layer with the highest score, and the layers that may truly be the best.

    Parameters
    ----------
    curve : Curve
        Scores of l layers.
    level : float
        The truly best layer lies in the interval in this share of studies. So does each of
        several that are equally good; for a set that holds all of them at once see
        :func:`probekit.probes.comparison.compare_layers`.

    Raises
    ------
    ValueError
        A layer has no score.

    Notes
    -----
    See :func:`compare_peaks`.
    """
    behind_l, behind_bl = _squares_behind(curve)
    inside = np.flatnonzero(tail_share(behind_l, behind_bl) > 1 - level)
    share_l = _first_shares(curve).mean(0)
    resampled_lo, resampled_hi = _quantiles(np.arange(len(share_l)), share_l, level=level)
    return Peak(
        layer=int(curve.score_l.argmax()),
        lo=int(inside[0]),
        hi=int(inside[-1]),
        resampled_lo=int(resampled_lo),
        resampled_hi=int(resampled_hi),
        layers=len(share_l),
    )


def compare_peaks(a: Curve, b: Curve, *, level: float = LEVEL) -> PeakShift:
    """Compare where two curves peak.

    Parameters
    ----------
    a, b : Curve
        With the same number of resamples, and the same seed where they share images. Where they
        differ in the number of layers, places are compared by relative depth.
    level : float
        Of the interval.

    Returns
    -------
    PeakShift
        In layers of a.

    Raises
    ------
    ValueError
        A layer has no score, or the curves differ in the number of resamples.

    Notes
    -----
    Each pair of layers, i of a and j of b, is tested: are they the best ones of their curves? The
    statistic is the sum of two squares: how far, in standard errors, i and j lie behind any other
    layer of their curves. Its distribution is that of the resampled scores less the observed ones.
    This is Hsu's comparison with the best, of both curves together; layers that lie three standard
    errors behind i are not counted as possible rivals of it (as in Andrews and Soares, 2010). The
    interval reaches over all pairs that are not rejected, and p is the largest of the pairs at the
    same depth. Depths are the same up to half a layer of the model with fewer layers.

    The quantiles of the resamples' peaks are no such interval. Where a peak stands barely above a
    long plateau, the highest of many noisy scores lies on the plateau, and in the resamples as
    well (Hall and Miller, 2009). In 300 simulated studies of 25 layers and 300 images, in which
    one curve had a clear peak and the other one stood at the same layer one hundredth above a
    plateau, these quantiles said in 36 % that the peak had moved; the interval here in none
    (``benchmarks/compare.py``).

    The price is power. False alarms are rarer than stated, and the interval is wider than it would
    have to be for clear peaks: 3.5 layers on average there. A movement of three layers was found in
    83 % of the studies.

    References
    ----------
    Hsu (1984), "Constrained simultaneous confidence intervals for multiple comparisons with the
    best", Annals of Statistics 12. Hall and Miller (2009), "Using the bootstrap to quantify the
    authority of an empirical ranking", Annals of Statistics 37. Andrews and Soares (2010),
    "Inference for parameters defined by moment inequalities using generalized moment selection",
    Econometrica 78.
    """
    if len(a.resampled_bl) != len(b.resampled_bl):
        raise ValueError(
            f"{len(a.resampled_bl)} and {len(b.resampled_bl)} resamples: take as many of both"
        )
    behind_i, behind_bi = _squares_behind(a)
    behind_j, behind_bj = _squares_behind(b)
    p_ij = np.empty((len(behind_i), len(behind_j)))
    for i in range(len(behind_i)):  # a row at a time takes little memory
        p_ij[i] = tail_share(behind_i[i] + behind_j, behind_bi[:, [i]] + behind_bj)

    layers_of_a = np.arange(len(behind_i))
    last_a = max(1, len(behind_i) - 1)
    last_b = max(1, len(behind_j) - 1)
    shift_ij = np.arange(len(behind_j)) * (last_a / last_b) - layers_of_a[:, None]
    largest_step = max(1.0, last_a / last_b)
    is_same_ij = np.abs(shift_ij) <= largest_step / 2 + ROUNDING
    may_be = shift_ij[p_ij > 1 - level]
    share_ij = _first_shares(a).T @ _first_shares(b) / len(a.resampled_bl)
    resampled_lo, resampled_hi = _quantiles(shift_ij, share_ij, level=level)
    return PeakShift(
        shift=float(shift_ij[a.score_l.argmax(), b.score_l.argmax()]),
        lo=float(may_be.min()),
        hi=float(may_be.max()),
        p=float(p_ij[is_same_ij].max()),
        resampled_lo=float(resampled_lo),
        resampled_hi=float(resampled_hi),
    )


def _squares_behind(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Square how far each layer lies behind any other one: (l,), and (b, l) in the resamples.

    The observed leads are taken off those of the resamples, which then say how far a layer that is
    as good as its rivals lies behind them by luck.
    """
    if not np.isfinite(curve.score_l).all() or not np.isfinite(curve.resampled_bl).all():
        raise ValueError("a layer has no score in some resample: take more test images")
    z_ll, z_bll, _ = standardised_leads(curve)
    is_rival_ll = z_ll > -CLEARLY_BEHIND
    behind_bl = np.where(is_rival_ll, z_bll, 0).max(2)
    return z_ll.max(1) ** 2, behind_bl.astype(float) ** 2


def _first_shares(curve: Curve) -> np.ndarray:
    """Return (b, l) 1 where a layer comes first in a resample; those that tie share it."""
    highest_b1 = curve.resampled_bl.max(1, keepdims=True)
    is_first_bl = curve.resampled_bl >= highest_b1 - ROUNDING
    return is_first_bl / is_first_bl.sum(1, keepdims=True)


def _quantiles(values: np.ndarray, shares: np.ndarray, *, level: float) -> tuple[float, float]:
    """Return between which values the middle `level` of their shares lies."""
    order = np.argsort(values, axis=None, kind="stable")
    below = shares.ravel()[order].cumsum()
    tail = (1 - level) / 2
    lower, upper = np.searchsorted(below, [tail + ROUNDING, 1 - tail - ROUNDING])
    sorted_values = values.ravel()[order]
    return sorted_values[lower], sorted_values[min(upper, len(order) - 1)]
