"""Scores of many layers at once, with their bootstrap intervals.

Everything is computed from counts that add up over images, so a resample of the images is one matrix product.
Which F1 is which: `f1_macro` is the mean of the classes' own F1 (Opitz and Burst, 2019, arXiv:1911.03347, "averaged
F1"), `f1_micro` pools the counts of all classes, `f1_positive` is the F1 of label 1 of a binary task.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from probekit import compare

COUNTS = ("tp", "fp", "fn", "tn", "log_loss")  # the last one is a sum of losses


def image_counts(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray, image_n: np.ndarray) -> np.ndarray:
    """Sum hits, misses and log losses (in nats) over the examples of each image.

    Parameters
    ----------
    p_lnc : (l, n, c) probability of label 1; 0.5 and above is a yes
    y_nc, mask_nc : (n, c) labels, and 1 where an entry counts
    image_n : (n,) which image an example belongs to

    Returns
    -------
    (images, l, c, 5) in the order of :data:`COUNTS`
    """
    yes, y, m = p_lnc >= 0.5, y_nc.astype(bool), mask_nc.astype(bool)
    p = np.clip(p_lnc.astype(np.float64), 1e-7, 1 - 1e-7)
    entries = (yes & y & m, yes & ~y & m, ~yes & y & m, ~yes & ~y & m, -np.log(np.where(y, p, 1 - p)) * m)
    number = np.unique(image_n, return_inverse=True)[1]
    totals = np.zeros((number.max() + 1, p_lnc.shape[0], p_lnc.shape[2], len(COUNTS)), np.float32)
    for k, entry in enumerate(entries):
        np.add.at(totals[..., k], number, entry.swapaxes(0, 1).astype(np.float32))
    return totals


def _ratio(a: np.ndarray, b: np.ndarray, empty: float = 0.0) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, empty), where=b > 0)


def _three(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> tuple[np.ndarray, ...]:
    """Precision, recall, F1; 0 where nothing was predicted or present."""
    return _ratio(tp, tp + fp), _ratio(tp, tp + fn), _ratio(2 * tp, 2 * tp + fp + fn)


def scores(counts: np.ndarray, binary: bool) -> dict[tuple[str, int | None], np.ndarray]:
    """Metrics from summed counts (..., c, 5), each of shape (...); the key is (metric, class or None for all).

    A binary task has the classes 0 (no) and 1 (yes); classes that were never asked for are left out of macro means.
    """
    counts = counts.astype(np.float64)
    tp, fp, fn, tn, loss = np.moveaxis(counts, -1, 0)
    asked = tp + fp + fn + tn
    out = {("accuracy", None): _ratio((tp + tn).sum(-1), asked.sum(-1)),
           ("log_loss", None): _ratio(loss.sum(-1), asked.sum(-1), np.nan)}
    if binary:
        for name, values in zip(("precision", "recall", "f1"), _three(tp, fp, fn), strict=True):
            out[f"{name}_positive", None] = values[..., 0]
        tp, fp, fn, tn = (np.concatenate([no, yes], -1) for no, yes in ((tn, tp), (fn, fp), (fp, fn), (tp, tn)))
        asked = tp + fp + fn + tn
    each = _three(tp, fp, fn)
    pooled = _three(*(v.sum(-1) for v in (tp, fp, fn)))
    for name, by_class, micro in zip(("precision", "recall", "f1"), each, pooled, strict=True):
        by_class = np.where(asked > 0, by_class, np.nan)
        share = (asked > 0).sum(-1)
        out[f"{name}_macro", None] = _ratio(np.nansum(by_class, -1), share, np.nan)
        out[f"{name}_micro", None] = micro
        out |= {(name, k): by_class[..., k] for k in range(by_class.shape[-1])}
    for name, values in zip(COUNTS, (tp, fp, fn, tn), strict=False):
        out |= {(name, k): values[..., k] for k in range(values.shape[-1])}
    return out


def table(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray, image_n: np.ndarray, classes: list[str],
          layers: list[str], binary: bool, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Tidy scores of all layers: `layer, metric, class, value, lo, hi, n`.

    `lo` and `hi` are 95 % intervals (:func:`probekit.compare.bca`) from `resamples` bootstrap samples of the images (an
    image's examples stay together; the same samples for every layer, model and task, so that they can be compared).
    `class` is empty where a metric is about all classes; counts have no interval; `n` is the number of entries that
    count (of the class, where there are several).
    """
    counts = image_counts(p_lnc, y_nc, mask_nc, image_n)
    point = scores(counts.sum(0), binary)
    drawn = [key for key, values in point.items() if key[0] not in COUNTS[:4] and not np.isnan(values).all()]
    curve = compare.resample(counts, np.unique(image_n), lambda total: np.concatenate(
        [values for key, values in scores(total, binary).items() if key in drawn], -1), resamples, seed)
    bounds = np.stack(compare.bca(curve)).reshape(2, len(drawn), len(layers))
    spread = dict(zip(drawn, bounds.swapaxes(0, 1), strict=True))
    names = ["no", "yes"] if binary else classes
    n_c, n, rows = mask_nc.sum(0).astype(int), int(mask_nc.sum()), []
    for (metric, k), values in point.items():
        lo, hi = spread.get((metric, k), (np.nan, np.nan))  # none for counts, and classes that were never asked for
        rows.append(pd.DataFrame({"layer": layers, "metric": metric, "class": "" if k is None else names[k],
                                  "value": values, "lo": lo, "hi": hi, "n": n if binary or k is None else n_c[k]}))
    return pd.concat(rows, ignore_index=True)
