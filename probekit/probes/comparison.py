"""Which layers differ, and which is best: curves compared on the same resamples of the test images.

A curve is anything with one score a layer and its bootstrap resamples; larger is better (negate a log loss). An
image's weight in a resample depends on nothing but its name and the seed, so curves of different models, poolings or
tasks are paired where they share images, and independent where they do not, without being told.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

COLUMNS = ["gap", "gap_lo", "gap_hi", "p_holm", "p_plateau", "plateau", "best_share"]  # what layers() says of a layer
TIE = 1e-6  # the same for differences in standard errors
from probekit.probes.bootstrap import ROUNDING, Curve

# -------------------------------------------------------------------------------------------------------- resampling












# ---------------------------------------------------------------------------------------------------- layer by layer


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction (1979): below 5 % where any of the hypotheses holds, it is wrong in at most 5 % of studies."""
    order, m = np.argsort(p, kind="stable"), len(p)
    out = np.empty(m)
    out[order] = np.minimum(1, np.maximum.accumulate((m - np.arange(m)) * np.asarray(p)[order]))
    return out


def _standardised(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leads of layer j over layer i: z_ll of the scores, z_bll of the resamples about them, standard error (l, l)."""
    score, drawn = curve.score_l, curve.resampled_bl
    cov = np.atleast_2d(np.cov(drawn.T))
    own = np.diag(cov)[:, None] + np.diag(cov)
    variance = own - 2 * cov
    error = np.sqrt(np.where(variance > 1e-9 * own, variance, 0))
    lead = score - score[:, None]
    scale = np.where(error > 0, error, np.inf)
    certain = np.where(lead > ROUNDING, np.inf, np.where(lead < -ROUNDING, -np.inf, 0))  # no resample differs
    z_ll = np.where(error > 0, lead / scale, certain)
    z_bll = np.empty((len(drawn), *lead.shape), np.float32)
    for i in range(len(score)):  # a row at a time: no second array of this size
        z_bll[:, i] = (drawn - drawn[:, [i]] - lead[i]) / scale[i]
    return z_ll, z_bll, error


def _tail(observed: np.ndarray, drawn_b: np.ndarray) -> np.ndarray:
    """Share of resamples at least as extreme, the observed one among them (never 0)."""
    return (1 + (drawn_b >= observed - TIE).sum(0)) / (1 + len(drawn_b))


def _confidence_set(z_ll: np.ndarray, z_bll: np.ndarray) -> np.ndarray:
    """p-values (l,) of the model confidence set: Hansen, Lunde and Nason (2011), range statistic, section 3.1.2."""
    left, p, highest = list(range(len(z_ll))), np.ones(len(z_ll)), 0.0
    while len(left) > 1:
        behind = z_ll[np.ix_(left, left)].max(1)
        drawn = z_bll[:, left][:, :, left].max((1, 2))
        highest = max(highest, float(_tail(behind.max(), drawn)))
        p[left[int(behind.argmax())]] = highest
        del left[int(behind.argmax())]
    return p


def _gap_interval(curve: Curve, z_bll: np.ndarray, error: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of `score_i - max(score_j, j != i)`, which is the smallest of the differences to the others.

    Below, the bound to the true best of the others suffices, whichever it is; above, all bounds must hold together.
    """
    tail, places = (1 - level) / 2, np.arange(len(error))
    lo, hi = np.empty(len(places)), np.empty(len(places))
    for i in places:
        others = places != i
        ahead, z = curve.score_l[i] - curve.score_l[others], z_bll[:, i, others]
        lo[i] = (ahead + np.quantile(z, tail, axis=0) * error[i, others]).min()
        hi[i] = (ahead + np.quantile(z.max(1), 1 - tail) * error[i, others]).min()
    return lo, hi


def compare_layers(curve: Curve, names: Sequence[str], alpha: float = 0.01, level: float = 0.95) -> pd.DataFrame:
    """Each layer against the best of the others, and the plateau of those that cannot be told from the best.

    The plateau is a model confidence set and not Hsu's comparison with the best (1984), because in simulation
    (benchmarks/compare.py) Hsu's lost one of 12 equal layers in a third of the studies, and with Holm's correction it
    found the planted plateau less often where differences were small (in 71 instead of 84 of 100).

    Parameters
    ----------
    curve : scores of l layers
    names : (l,)
    alpha : all layers that are as good as the best are in the plateau in 1 - alpha of studies; so alpha bounds how
        often a plateau of equals is found without one of them, which is why it is stricter than the intervals
    level : of the interval of each single layer's gap

    Returns
    -------
    One row a layer: `gap`, its score minus the best score of the others, with `gap_lo` and `gap_hi`; `p`, one-sided,
    of "this layer, named beforehand, is as good as all others" (Hsu's); `p_holm`, corrected for asking it of all
    layers; `p_plateau` of the confidence set, `plateau` where that is above alpha; `best_share`, the resamples in
    which it comes first (it describes; it guarantees nothing). A gap's interval is about that layer alone, so it may
    lie below 0 within the plateau. A single layer has no gap and is its own plateau.
    """
    if not np.isfinite(curve.score_l).all():
        missing = [name for name, s in zip(names, curve.score_l, strict=True) if not np.isfinite(s)]
        raise ValueError(f"no score for {', '.join(missing)}: leave these layers out (Curve.only)")
    curve = Curve(curve.score_l, curve.resampled_bl[np.isfinite(curve.resampled_bl).all(1)])
    first = np.isclose(curve.resampled_bl, curve.resampled_bl.max(1, keepdims=True), rtol=0, atol=ROUNDING)
    table = pd.DataFrame({"layer": list(names), "gap": np.nan, "gap_lo": np.nan, "gap_hi": np.nan, "p": 1.0,
                          "p_holm": 1.0, "p_plateau": 1.0, "plateau": True,
                          "best_share": (first / first.sum(1, keepdims=True)).mean(0)})
    if len(table) == 1:
        return table
    z_ll, z_bll, error = _standardised(curve)
    s = curve.score_l
    table["gap"] = [s[i] - np.delete(s, i).max() for i in range(len(s))]
    table["gap_lo"], table["gap_hi"] = _gap_interval(curve, z_bll, error, level)
    table["p"] = _tail(z_ll.max(1), z_bll.max(2))
    table["p_holm"], table["p_plateau"] = holm(table.p), _confidence_set(z_ll, z_bll)
    return table.assign(plateau=table.p_plateau > alpha)


def plateau_sentence(table: pd.DataFrame, alpha: float = 0.01) -> str:
    """The interval of the best layer in words, from the table that :func:`layers` gave for this alpha."""
    names, inside = list(table.layer), np.flatnonzero(table.plateau)
    runs = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
    spans = [names[r[0]] if len(r) == 1 else f"{names[r[0]]} to {names[r[-1]]}" for r in runs]
    best = names[int(table.gap.argmax())] if len(table) > 1 else names[0]
    return (f"{best} scores highest; with {100 * (1 - alpha):g} % confidence the truly best layer is among "
            f"{', '.join(spans)} ({len(inside)} of {len(names)} layers).")


# ------------------------------------------------------------------------------------------------------- two curves


def curve_difference(a: Curve, b: Curve, names: Sequence[str], level: float = 0.95) -> pd.DataFrame:
    """Curve a minus curve b, point by point: two models, poolings, tasks, or named layers of one curve.

    Both must come from :func:`resample` with one seed and number of resamples: then shared images are paired.

    Returns
    -------
    One row a point: `difference` with `lo` and `hi` (each by itself), `p` (two-sided), `p_holm` over the points
    """
    if a.resampled_bl.shape != b.resampled_bl.shape:
        raise ValueError(f"resamples of shape {a.resampled_bl.shape} and {b.resampled_bl.shape}: compare as many "
                         "layers and take as many resamples of both")
    drawn, tail = a.resampled_bl - b.resampled_bl, (1 - level) / 2
    lo, hi = np.quantile(drawn, [tail, 1 - tail], axis=0)
    rarer = np.minimum((drawn <= ROUNDING).sum(0), (drawn >= -ROUNDING).sum(0))
    p = np.minimum(1, 2 * (1 + rarer) / (1 + len(drawn)))
    return pd.DataFrame({"layer": list(names), "difference": a.score_l - b.score_l, "lo": lo, "hi": hi, "p": p,
                         "p_holm": holm(p)})
