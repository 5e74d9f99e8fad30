"""Online codelength: how many bits a probe needs to send the labels, given the states (minimum description length).

Voita and Titov (2020), section 2.2.2: the first block of examples is sent with the uniform code, each later one with a
probe that was trained on all blocks before it. A label that is easy to extract is learnt from few examples and costs
few bits, so that the codelength also counts the effort that accuracy leaves out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from probekit.probes import bootstrap, logreg
from probekit.probes.labels import LabelSet

PORTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)  # of the images, as in the paper
TOLERANCE = 1e-3  # of a probe's gradient: whatever probe there is makes a code, so it need not be at its optimum
SMALLEST = 8  # images; smaller portions are left out


def blocks(image_n: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Places of the examples, block by block; an image's examples are in one block, images in random order."""
    images, number = np.unique(image_n, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(images))
    ends = [round(share * len(images)) for share in PORTIONS]
    ends = [end for end in ends if end >= min(SMALLEST, len(images))]
    block_of = np.searchsorted(ends, order, side="right")
    return [np.flatnonzero(block_of[number] == k) for k in range(len(ends)) if (block_of[number] == k).any()]


def online(x_lnd: torch.Tensor, labels: LabelSet, strengths: Sequence[float], memory_gb: float) -> np.ndarray:
    """Bits (l, n) for the labels of the n training examples together, in the order of ``labels.split["train"]``.

    Each block's probe takes the strength with the lowest log loss on validation, the same for all classes.

    Parameters
    ----------
    x_lnd : (l, all n, d) standardised features
    """
    train, validation = labels.split["train"], labels.split["validation"]
    parts = blocks(labels.image_n[train.numpy()])
    bits = torch.zeros(len(x_lnd), len(train))
    bits[:, parts[0]] = labels.mask_nc[train[parts[0]]].sum(1)

    def losses(solution: logreg.Solution, rows: torch.Tensor) -> torch.Tensor:
        """(l, n, s) in nats."""
        logits = solution.logits(x_lnd[:, rows])
        y, mask = (t[rows, None].to(x_lnd.device) for t in (labels.y_nc, labels.mask_nc))
        return ((torch.nn.functional.softplus(logits) - y * logits) * mask).sum(-1)

    for k in range(1, len(parts)):
        known, sent = train[np.concatenate(parts[:k])], train[parts[k]]
        solution = logreg.solve(x_lnd[:, known], *(t[known].to(x_lnd.device) for t in (labels.y_nc, labels.mask_nc)),
                                strengths, tolerance=TOLERANCE, memory_gb=memory_gb)
        if not bool(solution.converged_lsk.all()):
            many = int((~solution.converged_lsk).sum())
            warnings.warn(f"{many} probes of the codelength did not converge", stacklevel=2)
        best = losses(solution, validation).sum(1).argmin(1)
        bits[:, parts[k]] = losses(solution.at(best), sent)[..., 0].cpu() / np.log(2)
    return bits.numpy()


def table(bits_ln: np.ndarray, labels: LabelSet, layers: Sequence[str], resamples: int) -> pd.DataFrame:
    """`codelength` in bits a label (1 is what the uniform code takes) and `compression`, 1 / codelength.

    Intervals are bootstrapped over the training images whose labels were sent, with the probes as they are.
    """
    _, mask, image = labels.of("train")
    images, number = np.unique(image, return_inverse=True)
    counts = np.zeros((len(images), len(layers), 2))
    np.add.at(counts[..., 0], number, bits_ln.T)
    np.add.at(counts[..., 1], number, np.broadcast_to(mask.sum(1)[:, None], bits_ln.T.shape))
    curve = bootstrap.bootstrap_curve(counts, images, lambda total: total[..., 0] / total[..., 1], resamples)
    lo, hi = bootstrap.bca_interval(curve)
    row = {"layer": list(layers), "class": "", "n": int(mask.sum()), "split": "train"}
    return pd.concat([
        pd.DataFrame(row | {"metric": "codelength", "value": curve.score_l, "lo": lo, "hi": hi}),
        pd.DataFrame(row | {"metric": "compression", "value": 1 / curve.score_l, "lo": 1 / hi, "hi": 1 / lo}),
    ])
