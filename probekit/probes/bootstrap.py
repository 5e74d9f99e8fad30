"""Scores on bootstrap resamples of the images, and their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

BLOCK = 2_000_000  # counts that are resampled at a time: 16 MB, and about 20 times that within metrics.scores


ROUNDING = 1e-9  # scores closer than this are equal


class Curve(NamedTuple):
    """Scores of l layers (l,), the same in each of b bootstrap resamples (b, l), and how skewed they are.

    The last, (l,), is the acceleration of :func:`bca`; it serves the intervals of the scores alone.
    """

    score_l: np.ndarray
    resampled_bl: np.ndarray
    acceleration_l: np.ndarray | float = 0.0

    def only(self, rows: Sequence[int] | slice) -> Curve:
        """Some of the layers."""
        skew = np.broadcast_to(self.acceleration_l, self.score_l.shape)[rows]
        return Curve(self.score_l[rows], self.resampled_bl[:, rows], skew)


def image_weights(images: Sequence, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each image is drawn in each resample: (b, images) uint8, Poisson with mean 1.

    The Poisson bootstrap (Hanley and MacGibbon, 2006) draws every image for itself; for scores that do not change
    when all counts double, it is the usual one. An image's column comes from its name and the seed alone.

    Raises
    ------
    ValueError
        Fewer than two images, or one that is there twice.
    """
    names = tuple(str(image).encode() for image in images)
    if len(names) < 2:
        raise ValueError(f"{len(names)} test image cannot be resampled: take more images in 01_build_data")
    if len(set(names)) < len(names):
        raise ValueError("an image is there twice: sum the counts of its examples first (metrics.image_counts)")
    return _drawn(names, resamples, seed)


@lru_cache(maxsize=4)  # one set of test images serves many models, poolings and probes
def _drawn(names: tuple[bytes, ...], resamples: int, seed: int) -> np.ndarray:
    keys = [[seed, int.from_bytes(blake2b(name, digest_size=8).digest(), "big")] for name in names]
    drawn = np.stack([np.random.default_rng(key).poisson(1.0, resamples).astype(np.uint8) for key in keys], 1)
    drawn.setflags(write=False)
    return drawn


def bootstrap_curve(counts: np.ndarray, images: Sequence, score: Callable[[np.ndarray], np.ndarray], resamples: int = 2000,
             seed: int = 0) -> Curve:
    """Score all images together, and again in each bootstrap resample of them.

    Parameters
    ----------
    counts : (images, l, ...) of each image, such as :func:`probekit.probes.metrics.image_counts` gives
    images : (images,) their names, in the same order (``np.unique(image_n)`` for ``image_counts``)
    score : from summed counts (b, l, ...) to scores (b, l); a score that is a ratio or a mean of such, for example
        ``lambda total: metrics.scores(total, binary=False)["f1_macro", None]``
    """
    if len(counts) != len(images):
        raise ValueError(f"counts of {len(counts)} images, but {len(images)} names")
    drawn, flat = image_weights(images, resamples, seed), counts.reshape(len(counts), -1).astype(np.float32, copy=False)
    step, total = max(1, BLOCK // flat.shape[1]), counts.sum(0, dtype=np.float64)
    again = [score((drawn[b : b + step].astype(np.float32) @ flat).reshape(-1, *counts.shape[1:]))
             for b in range(0, resamples, step)]
    left_out = [score(total - counts[i : i + step]) for i in range(0, len(counts), step)]
    return Curve(score(total[None])[0], np.concatenate(again), acceleration(np.concatenate(left_out)))


def acceleration(left_out: np.ndarray) -> np.ndarray:
    """Skewness of a score (...), from the scores (images, ...) without one image each."""
    known = np.isfinite(left_out)
    pull = np.nansum(left_out, 0) / known.sum(0).clip(1) - left_out
    spread = np.nansum(pull**2, 0) ** 1.5
    return np.divide(np.nansum(pull**3, 0), 6 * spread, out=np.zeros(spread.shape), where=spread > 0)


def bca_interval(curve: Curve, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (l,) of each score by itself: bias-corrected and accelerated, Efron and Tibshirani (1993), chapter 14.3.

    Percentiles are as good for scores of many examples, and miss more often for few: below some 100 images, and for the
    F1 of a class with a dozen. With under 50 images, or a handful of a class, these intervals are too narrow as well.
    """
    tails = ndtri([(1 - level) / 2, (1 + level) / 2])
    skew, bounds = np.broadcast_to(curve.acceleration_l, curve.score_l.shape), []
    for score, column, a in zip(curve.score_l, curve.resampled_bl.T, skew, strict=True):
        drawn = column[np.isfinite(column)]
        if not (len(drawn) and np.isfinite(score)):
            bounds.append((np.nan, np.nan))
            continue
        below = (drawn < score - ROUNDING).mean() / 2 + (drawn <= score + ROUNDING).mean() / 2
        z = ndtri(np.clip(below, 1 / len(drawn), 1 - 1 / len(drawn)))
        bounds.append(np.quantile(drawn, ndtr(z + (z + tails) / (1 - a * (z + tails)))))
    return tuple(np.array(bounds).T)
