"""Online codelength: how many bits the labels take, given the states (minimum description length).

The first block of examples is sent with the uniform code. Each later block is sent with a probe
that was trained on all blocks before it. A label that is easy to extract is learnt from few
examples and costs few bits, so the codelength also counts the effort of extraction, which accuracy
leaves out.

References
----------
E. Voita and I. Titov, "Information-Theoretic Probing with Minimum Description Length", EMNLP 2020,
section 2.2.2.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from probekit.probes import bootstrap, logreg
from probekit.probes.labels import LabelSet

PORTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Shares of the images at which the blocks end, as in the paper."""

SMALLEST = 8
"""Images that a portion must have; smaller ones are left out."""


def image_blocks(image_n: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Divide examples into the blocks that are sent one after the other.

    Parameters
    ----------
    image_n : ndarray
        (n,) which image each example shows. All examples of an image are in one block.
    seed : int
        Seed of the order of the images.

    Returns
    -------
    list of ndarray
        The row numbers of each block. Together they are all n rows; no block is empty.
    """
    images, image_number_n = np.unique(image_n, return_inverse=True)
    position = np.random.default_rng(seed).permutation(len(images))
    ends = [round(portion * len(images)) for portion in PORTIONS]
    ends = [end for end in ends if end >= min(SMALLEST, len(images))]
    block_n = np.searchsorted(ends, position, side="right")[image_number_n]
    return [np.flatnonzero(block_n == block) for block in np.unique(block_n)]


def online_codelength(
    features: logreg.Features, labels: LabelSet, *, strengths: Sequence[float], memory_gb: float
) -> np.ndarray:
    """Measure how many bits it takes to send the training labels.

    Each block's probes take, at each layer, the strength with the lowest log loss on validation,
    the same for all classes. Any probe makes a code, so they are solved as roughly as for that
    choice (:data:`probekit.probes.logreg.ROUGH`). A warning says how many did not converge.

    Parameters
    ----------
    features : Features
        Standardised features of all examples of the labels, whatever their split.
    labels : LabelSet
        The labels; those of the training split are sent.
    strengths : sequence of float
        Inverse strengths of regularisation C.
    memory_gb : float
        Bound on what the solver holds besides the features.

    Returns
    -------
    ndarray
        (l, n) bits of each training example (all of its labels together), in the order of
        ``labels.split["train"]``.
    """
    train = labels.split["train"]
    device = features.z_lne.device
    y_nsc = labels.y_nc[:, None].to(device)
    mask_nsc = labels.mask_nc[:, None].to(device)
    validation_nsc = torch.zeros_like(mask_nsc)
    validation_nsc[labels.split["validation"]] = mask_nsc[labels.split["validation"]]
    blocks = image_blocks(labels.image_n[train.numpy()])
    bits_ln = torch.zeros(len(features.z_lne), len(train))
    bits_ln[:, blocks[0]] = labels.mask_nc[train[blocks[0]]].sum(1)  # uniform code: 1 bit a label

    for k in range(1, len(blocks)):
        already_sent = train[np.concatenate(blocks[:k])]
        block = train[blocks[k]]
        sent_nsc = torch.zeros_like(mask_nsc)
        sent_nsc[already_sent] = mask_nsc[already_sent]
        solution = logreg.choose_logreg(
            features,
            y_nsc,
            train_nsk=sent_nsc,
            validation_nsk=validation_nsc,
            strengths=strengths,
            tolerance=None,
            memory_gb=memory_gb,
        ).solution
        unconverged_lsk = ~solution.converged_lsk
        if unconverged_lsk.any():
            warnings.warn(
                f"{int(unconverged_lsk.sum())} of {unconverged_lsk.numel()} probes of the "
                "codelength did not converge: leave out the largest strengths",
                stacklevel=2,
            )
        logits = solution.logits(features.z_lne[:, block])
        losses = logreg.log_losses(logits, y_nsc[block], mask_nsc[block])
        bits_ln[:, blocks[k]] = losses.sum((2, 3)).cpu() / np.log(2)
    return bits_ln.numpy()


def codelength_table(
    bits_ln: np.ndarray, labels: LabelSet, *, layers: Sequence[str], resamples: int
) -> pd.DataFrame:
    """Tabulate the codelength of each layer.

    Parameters
    ----------
    bits_ln : ndarray
        (l, n) that :func:`online_codelength` returned for these labels.
    labels : LabelSet
        The labels that were sent.
    layers : sequence of str
        Names of the l layers.
    resamples : int
        Bootstrap resamples of the training images, with the probes as they are.

    Returns
    -------
    DataFrame
        Rows of the metrics table: `codelength` in bits per label (1 for the uniform code) and
        `compression`, which is 1 / codelength.
    """
    _, mask_nc, image_n = labels.select("train")
    labels_ln = np.broadcast_to(mask_nc.sum(1), bits_ln.shape)
    counts, images = bootstrap.sum_by_image(np.stack([bits_ln.T, labels_ln.T], -1), image_n)

    def bits_per_label(total: torch.Tensor) -> torch.Tensor:
        return total[..., 0] / total[..., 1]

    curve = bootstrap.bootstrap_curve(
        torch.as_tensor(counts, device=labels.device),
        images,
        score=bits_per_label,
        resamples=resamples,
    )
    lo, hi = bootstrap.bca_interval(curve)
    shared = {"layer": list(layers), "class": "", "n": int(mask_nc.sum()), "split": "train"}
    codelength = {"metric": "codelength", "value": curve.score_l, "lo": lo, "hi": hi}
    compression = {
        "metric": "compression",
        "value": 1 / curve.score_l,
        "lo": 1 / hi,
        "hi": 1 / lo,
    }
    return pd.concat([pd.DataFrame(shared | codelength), pd.DataFrame(shared | compression)])
