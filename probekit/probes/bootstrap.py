"""Scores on bootstrap resamples of the images, and their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtr, ndtri

# Counts that are resampled at a time: 16 MB, and about 20 times that within metrics.score_counts.
BLOCK = 2_000_000

# Scores that are closer than this are equal.
ROUNDING = 1e-9


class Curve(NamedTuple):
    """The scores of l layers, and the same scores in each of b bootstrap resamples.

    Attributes
    ----------
    score_l : ndarray
        (l,) scores; larger is better where layers are compared.
    resampled_bl : ndarray
        (b, l) scores in each resample.
    acceleration_l : ndarray or float
        (l,) see :func:`acceleration`; only :func:`bca_interval` uses it.
    """

    score_l: np.ndarray
    resampled_bl: np.ndarray
    acceleration_l: np.ndarray | float = 0.0

    def select(self, layers: Sequence[int] | np.ndarray | slice) -> Curve:
        """Return the curve of some of the layers, by their places."""
        acceleration_l = np.broadcast_to(self.acceleration_l, self.score_l.shape)
        return Curve(self.score_l[layers], self.resampled_bl[:, layers], acceleration_l[layers])


def image_weights(
    images: Sequence | np.ndarray, *, resamples: int = 2000, seed: int = 0, device: str = "cpu"
) -> torch.Tensor:
    """Draw how often each image occurs in each resample.

    Parameters
    ----------
    images : sequence or ndarray
        The names of the images, each once.
    resamples : int
        Number of resamples, b.
    seed : int
        Seed of all draws.
    device : str
        Where they are wanted.

    Returns
    -------
    Tensor
        (b, images) uint8, Poisson distributed with mean 1. An image's column depends on its name
        and the seed alone, so curves of different models, poolings or tasks are paired where they
        share images. The tensor is cached: do not write to it.

    Raises
    ------
    ValueError
        There are fewer than two images, or one of them is repeated.

    References
    ----------
    Hanley and MacGibbon (2006), "Creating non-parametric bootstrap samples using Poisson
    frequencies". Drawing every image independently is equivalent to the usual bootstrap for scores
    that do not change when all counts double.
    """
    names = tuple(str(image).encode() for image in images)
    if len(names) < 2:
        raise ValueError(
            f"{len(names)} test image cannot be resampled: take more images in 01_build_data"
        )
    if len(set(names)) < len(names):
        raise ValueError(
            "an image is named twice: sum the counts of its examples first (metrics.count_by_image)"
        )
    return _draw_weights(names, resamples, seed, device)


@lru_cache(maxsize=4)  # one set of test images serves many models, poolings and probes
def _draw_weights(names: tuple[bytes, ...], resamples: int, seed: int, device: str) -> torch.Tensor:
    columns = []
    for name in names:
        # The digest decides the numbers that come out, so it must never change.
        digest = int.from_bytes(blake2b(name, digest_size=8).digest(), "big")
        rng = np.random.default_rng([seed, digest])
        columns.append(rng.poisson(1.0, resamples).astype(np.uint8))
    return torch.from_numpy(np.stack(columns, axis=1)).to(device)


def bootstrap_curve(
    counts: np.ndarray | torch.Tensor,
    images: Sequence | np.ndarray,
    *,
    score: Callable[[torch.Tensor], torch.Tensor],
    resamples: int = 2000,
    seed: int = 0,
) -> Curve:
    """Score all images together, and again in each bootstrap resample of them.

    Parameters
    ----------
    counts : ndarray or Tensor
        (images, l, ...) counts of each image, such as
        :func:`probekit.probes.metrics.count_by_image` gives. They are resampled on their device.
    images : sequence or ndarray
        The names of the images in the same order; ``np.unique(image_n)`` for ``count_by_image``.
    score : callable
        From summed counts, a float64 tensor (b, l, ...), to scores (b, l). The score must be a
        ratio of sums, or a mean of such, for example
        ``metrics.score_counts(total, binary=False)["f1_macro", None]``.
    resamples : int
        Number of resamples, b.
    seed : int
        Of :func:`image_weights`.

    Raises
    ------
    ValueError
        Counts and names differ in number, or :func:`image_weights` cannot resample these images.
    """
    if len(counts) != len(images):
        raise ValueError(f"counts of {len(counts)} images, but {len(images)} names")
    counts = torch.as_tensor(counts)
    weight_bn = image_weights(images, resamples=resamples, seed=seed, device=str(counts.device))
    flat = counts.reshape(len(counts), -1).float()
    total = counts.sum(0, dtype=torch.float64)
    step = max(1, BLOCK // flat.shape[1])

    resampled = []
    for start in range(0, resamples, step):
        totals = weight_bn[start : start + step].float() @ flat
        resampled.append(score(totals.double().reshape(-1, *counts.shape[1:])))
    left_out = []
    for start in range(0, len(counts), step):
        left_out.append(score(total - counts[start : start + step].double()))
    return Curve(
        score_l=score(total[None])[0].cpu().numpy(),
        resampled_bl=torch.cat(resampled).cpu().numpy(),
        acceleration_l=acceleration(torch.cat(left_out)).cpu().numpy(),
    )


def sum_by_image(count_n: np.ndarray, image_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum the counts (n, ...) of examples for each image.

    Returns
    -------
    counts : ndarray
        (images, ...) float64.
    images : ndarray
        (images,) their names, each once.
    """
    images, image_number_n = np.unique(image_n, return_inverse=True)
    counts = np.zeros((len(images), *count_n.shape[1:]))
    np.add.at(counts, image_number_n, count_n)
    return counts, images


def mean_curve(
    value_nl: np.ndarray, image_n: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> Curve:
    """Average values over examples, and again in each bootstrap resample of their images.

    Parameters
    ----------
    value_nl : ndarray
        (n, l) values of n examples.
    image_n : ndarray
        (n,) the image of each.
    resamples, seed : int
        See :func:`bootstrap_curve`.

    Raises
    ------
    ValueError
        They are examples of fewer than two images.
    """
    counts, images = sum_by_image(np.stack([value_nl, np.ones_like(value_nl)], -1), image_n)

    def mean_score(total: torch.Tensor) -> torch.Tensor:
        return total[..., 0] / total[..., 1].clip(1e-9)

    return bootstrap_curve(counts, images, score=mean_score, resamples=resamples, seed=seed)


def acceleration(left_out: torch.Tensor) -> torch.Tensor:
    """Estimate the acceleration of a score from its jackknife values.

    Parameters
    ----------
    left_out : Tensor
        (images, ...) scores without one image each. Those that are NaN do not count.

    Returns
    -------
    Tensor
        (...) ``sum(d**3) / (6 * sum(d**2)**1.5)`` for the differences d of the jackknife values
        from their mean; 0 where they do not differ.

    References
    ----------
    Efron and Tibshirani (1993), "An Introduction to the Bootstrap", equation 14.15.
    """
    difference = left_out.nanmean(0) - left_out
    squares = difference**2
    scale = squares.nansum(0) ** 1.5
    skewness = (squares * difference).nansum(0)
    return torch.where(scale > 0, skewness / (6 * scale), 0)


def bca_interval(curve: Curve, *, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Compute the bias-corrected and accelerated interval of each score by itself.

    Parameters
    ----------
    curve : Curve
        Scores of l layers.
    level : float
        Probability with which an interval is meant to hold the truth.

    Returns
    -------
    lower, upper : ndarray
        (l,) bounds; NaN where a score is not finite.

    Notes
    -----
    Plain percentiles are as good for scores of many examples, and miss more often for few: below
    some 100 images, and for the F1 of a class with a dozen positives. With fewer than 50 images,
    or a handful of positives, these intervals are too narrow as well.

    References
    ----------
    Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapter 14.3.
    """
    finite_bl = np.where(np.isfinite(curve.resampled_bl), curve.resampled_bl, np.nan)
    finite_bl.sort(axis=0)  # NaN comes last
    count_l = np.isfinite(finite_bl).sum(0)
    has_interval_l = (count_l > 0) & np.isfinite(curve.score_l)
    n_l = np.maximum(count_l, 1)
    # Half of the resamples that tie with the score count as below it.
    below_l = (finite_bl < curve.score_l - ROUNDING).sum(0) / n_l / 2
    below_l += (finite_bl <= curve.score_l + ROUNDING).sum(0) / n_l / 2
    smallest_share_l = 1 / np.maximum(count_l, 2)
    z_l = ndtri(np.clip(below_l, smallest_share_l, 1 - smallest_share_l))
    bounds = []
    for tail in ndtri([(1 - level) / 2, (1 + level) / 2]):
        quantile_l = ndtr(z_l + (z_l + tail) / (1 - curve.acceleration_l * (z_l + tail)))
        bound_l = _sorted_quantile(finite_bl, quantile_l, n_l)
        bounds.append(np.where(has_interval_l, bound_l, np.nan))
    return bounds[0], bounds[1]


def _sorted_quantile(sorted_bl: np.ndarray, quantile_l: np.ndarray, n_l: np.ndarray) -> np.ndarray:
    """Interpolate one quantile of each column between its first n sorted values.

    ``np.quantile`` takes the same quantiles of all columns. ``scipy.stats.quantile`` needs a SciPy
    that Python 3.10 does not have, and took two to six times as long.
    """
    place_l = np.nan_to_num(quantile_l) * (n_l - 1)
    lower_l = place_l.astype(int)
    upper_l = np.minimum(lower_l + 1, n_l - 1)
    columns = np.arange(len(n_l))
    at_lower_l = sorted_bl[lower_l, columns]
    at_upper_l = sorted_bl[upper_l, columns]
    return at_lower_l + (place_l - lower_l) * (at_upper_l - at_lower_l)
