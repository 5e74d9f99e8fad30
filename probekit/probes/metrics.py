"""Scores of many layers at once, with their bootstrap intervals.

Everything is computed from counts that add up over images, so a resample of the images is one matrix product.
Which F1 is which: `f1_macro` is the mean of the classes' own F1 (Opitz and Burst, 2019, arXiv:1911.03347, "averaged
F1"), `f1_micro` pools the counts of all classes, `f1_positive` is the F1 of label 1 of a binary task.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from probekit.probes import bootstrap, comparison

COUNTS = ("tp", "fp", "fn", "tn", "log_loss")  # the last one is a sum of losses
PLAIN = (*COUNTS[:4], "prevalence")  # of a class, without an interval
COMPARED = ("accuracy", "f1_macro", "f1_micro", "average_precision", "log_loss")  # layer against layer
TUNED = {True: ("accuracy",), False: ("f1_macro", "f1_micro")}  # binary or not: what thresholds are chosen for


def image_counts(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray, image_n: np.ndarray,
                 threshold_lc: np.ndarray | float = 0.5) -> np.ndarray:
    """Sum hits, misses and log losses (in nats) over the examples of each image.

    Parameters
    ----------
    p_lnc : (l, n, c) probability of label 1
    y_nc, mask_nc : (n, c) labels, and 1 where an entry counts
    image_n : (n,) which image an example belongs to
    threshold_lc : (l, c) probability from which on the answer is yes

    Returns
    -------
    (images, l, c, 5) in the order of :data:`COUNTS`
    """
    yes, y, m = p_lnc >= np.expand_dims(np.atleast_2d(threshold_lc), 1), y_nc.astype(bool), mask_nc.astype(bool)
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
    for name, values in zip(PLAIN, (tp, fp, fn, tn, _ratio(tp + fn, asked, np.nan)), strict=True):
        out |= {(name, k): values[..., k] for k in range(values.shape[-1])}
    return out


def thresholds(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray, binary: bool) -> np.ndarray:
    """(l, c) probabilities from which on to say yes: the ones with the highest F1 of each class (accuracy, if binary).

    To be chosen on validation and used on test; in the middle between two neighbouring probabilities.
    """
    out = np.full((p_lnc.shape[0], p_lnc.shape[2]), 0.5)
    for c in range(p_lnc.shape[2]):
        asked = mask_nc[:, c] > 0
        y = y_nc[asked, c]
        if not 0 < y.sum() < len(y):
            continue
        order = np.argsort(-p_lnc[:, asked, c], 1)
        p = np.take_along_axis(p_lnc[:, asked, c].astype(np.float64), order, 1)
        p = np.pad(p, ((0, 0), (1, 1)), constant_values=((0, 0), (2, 0)))  # to say yes to none, or to all
        tp, k = np.pad(y[order].cumsum(1), ((0, 0), (1, 0))), np.arange(len(y) + 1)
        score = 2 * tp + len(y) - k - y.sum() if binary else 2 * tp / (k + y.sum())  # accuracy: tp + tn
        best = np.where(np.diff(p) < 0, score, -np.inf).argmax(1)[:, None]  # not between equal ones
        out[:, c] = (np.take_along_axis(p, best, 1) + np.take_along_axis(p, best + 1, 1))[:, 0] / 2
    return out


def average_precision(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray, weight_bn: np.ndarray) -> np.ndarray:
    """(b, l, c) average precision of each class, b times with other weights of the examples.

    The sum of precision times the step in recall, as scikit-learn's ``average_precision_score``; equal probabilities
    are one step. nan for a class without a positive example.
    """
    b, (layers, _, classes) = len(weight_bn), p_lnc.shape
    out = np.full((b, layers, classes), np.nan)
    for c in range(classes):
        asked = mask_nc[:, c] > 0
        y, part = torch.from_numpy(y_nc[asked, c] > 0), max(1, 10 * bootstrap.BLOCK // max(1, asked.sum()))
        for at in range(0, b, part):
            w_bn = torch.from_numpy(weight_bn[at : at + part, asked].astype(np.float32))
            for layer in range(layers):
                p, order = torch.from_numpy(p_lnc[layer, asked, c]).sort(descending=True)
                last = torch.searchsorted(-p, -p, right=True) - 1  # of those that are equal
                total = w_bn[:, order]
                hits = total * y[order]
                precision = (hits.cumsum(1) / total.cumsum(1).clamp(min=1e-30))[:, last]
                out[at : at + part, layer, c] = ((precision * hits).sum(1) / hits.sum(1)).numpy()
    return out


def _ranked(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray, image_n: np.ndarray, resamples: int, seed: int
            ) -> dict[int | None, bootstrap.Curve]:
    """Curves of the average precision: of each class, and their mean (None)."""
    images, number = np.unique(image_n, return_inverse=True)
    left_out = 1 - np.eye(len(images), dtype=np.uint8)
    rounds = [np.ones((1, len(images)), np.uint8), bootstrap.image_weights(images, resamples, seed), left_out]
    found_blc = average_precision(p_lnc, y_nc, mask_nc, np.concatenate(rounds)[:, number])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample without a positive example of any class
        found = {None: np.nanmean(found_blc, -1), **dict(enumerate(np.moveaxis(found_blc, -1, 0)))}
    return {k: bootstrap.Curve(v[0], v[1 : 1 + resamples], bootstrap.acceleration(v[1 + resamples :]))
            for k, v in found.items()}


def table(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray, image_n: np.ndarray, classes: list[str],
          layers: list[str], binary: bool, resamples: int = 2000, seed: int = 0, by_class: bool = True,
          threshold_lc: np.ndarray | None = None) -> pd.DataFrame:
    """Tidy scores of all layers: `layer, metric, class, value, lo, hi, n`, and how the layers compare.

    `lo` and `hi` are 95 % intervals (:func:`probekit.probes.bootstrap.bca_interval`) from `resamples` bootstrap samples of the images (an
    image's examples stay together; the same samples for every layer, model and task, so that they can be compared).
    `class` is empty where a metric is about all classes; counts, and a class's `prevalence`, have no interval; `n` is
    the number of entries that count (of the class, where there are several).

    Parameters
    ----------
    by_class : scores of each class, average precision, and the columns of :func:`probekit.probes.comparison.compare_layers` for the
        metrics :data:`COMPARED`, besides the scores about all classes
    threshold_lc : adds `<metric>_tuned`, with these thresholds instead of one half: accuracy of binary tasks, F1 of
        others, as :func:`thresholds` chooses them
    """
    counts = image_counts(p_lnc, y_nc, mask_nc, image_n)
    point, curves = _scored(counts, image_n, binary, lambda key: by_class or key[1] is None, resamples, seed)
    if threshold_lc is not None:
        counts = image_counts(p_lnc, y_nc, mask_nc, image_n, threshold_lc)
        tuned = _scored(counts, image_n, binary, lambda key: key in [(name, None) for name in TUNED[binary]], resamples,
                        seed)
        for all_of_it, found in zip((point, curves), tuned, strict=True):
            all_of_it |= {(f"{metric}_tuned", k): values for (metric, k), values in found.items()}
    if by_class:
        ranked = {("average_precision", k): curve for k, curve in _ranked(
            p_lnc, y_nc, mask_nc, image_n, resamples, seed).items() if k is None or not binary}
        curves |= ranked
        point |= {key: curve.score_l for key, curve in ranked.items()}
    names, n_c, n, rows = ["no", "yes"] if binary else classes, mask_nc.sum(0).astype(int), int(mask_nc.sum()), []
    for (metric, k), values in point.items():
        curve = curves.get((metric, k))  # none for counts, and classes that were never asked for
        lo, hi = bootstrap.bca_interval(curve) if curve else (np.nan, np.nan)
        row = pd.DataFrame({"layer": layers, "metric": metric, "class": "" if k is None else names[k],
                            "value": values, "lo": lo, "hi": hi, "n": n if binary or k is None else n_c[k]})
        if by_class and k is None and metric in COMPARED and np.isfinite(values).all():
            row = row.merge(_compared(curve, layers, metric == "log_loss"), on="layer", how="left")
        rows.append(row)
    whole = pd.concat(rows, ignore_index=True).reindex(columns=[*rows[0].columns[:7], *comparison.COLUMNS])
    return whole.astype({"plateau": "boolean"})


def _scored(counts: np.ndarray, image_n: np.ndarray, binary: bool, kept: Callable[[tuple], bool], resamples: int,
            seed: int) -> tuple[dict[tuple, np.ndarray], dict[tuple, bootstrap.Curve]]:
    """The kept scores (l,), and the curves of those that have an interval."""
    point, layers = scores(counts.sum(0), binary), counts.shape[1]
    drawn = [key for key, values in point.items() if key[0] not in PLAIN and kept(key) and not np.isnan(values).all()]
    curve = bootstrap.bootstrap_curve(counts, np.unique(image_n), lambda total: np.concatenate(
        [values for key, values in scores(total, binary).items() if key in drawn], -1), resamples, seed)
    return ({key: values for key, values in point.items() if kept(key)},
            {key: curve.only(slice(i * layers, (i + 1) * layers)) for i, key in enumerate(drawn)})


def _compared(curve: bootstrap.Curve, layers: list[str], smaller: bool) -> pd.DataFrame:
    """The layers of each stage against each other."""
    if smaller:
        curve = bootstrap.Curve(-curve.score_l, -curve.resampled_bl)
    stage = np.array([layer.partition(".")[0] for layer in layers])
    parts = [np.flatnonzero(stage == name) for name in dict.fromkeys(stage)]
    found = pd.concat([comparison.compare_layers(curve.only(rows), np.array(layers)[rows]) for rows in parts])
    return found[["layer", *comparison.COLUMNS]]
