"""How the layers of a model relate: probes of one layer on another, and neighbouring examples."""

from __future__ import annotations

import numpy as np
import torch

from probekit.probes import metrics
from probekit.probes.labels import LabelledTask
from probekit.probes.results import HEADLINE
from probekit.probes.weights import ProbeWeights

# Neighbours that are kept of each example.
NEAREST = 5

# Examples that are compared with all others at a time.
CHUNK = 1000


def transfer_scores(
    x_nd: np.ndarray, task: LabelledTask, *, probes: ProbeWeights, place: int
) -> tuple[str, np.ndarray]:
    """Score the probes of all layers on the states of one layer.

    Parameters
    ----------
    x_nd : ndarray
        (n, d) states of the task's n test examples.
    task : LabelledTask
        The task that the probes were trained for.
    probes : ProbeWeights
        Probes of l layers.
    place : int
        Place of the states' layer among those of the probes.

    Returns
    -------
    metric : str
        The headline metric of the task.
    score_l : ndarray
        (l,) its value for the probe of each layer.

    Notes
    -----
    The states are standardised as those of their layer, see
    :meth:`probekit.probes.weights.ProbeWeights.logits_on`.
    """
    metric = HEADLINE[task.true.kind]
    y_nc, mask_nc, _ = task.true.select("test")
    device = task.true.device
    says_yes_lnc = probes.logits_on(place, x_nd, device=device) >= 0
    is_yes_nc = torch.as_tensor(y_nc > 0, device=device)
    counts_nc = torch.as_tensor(mask_nc > 0, device=device)
    hits = [
        (says_yes_lnc & is_yes_nc & counts_nc).sum(1),
        (says_yes_lnc & ~is_yes_nc & counts_nc).sum(1),
        (~says_yes_lnc & is_yes_nc & counts_nc).sum(1),
        (~says_yes_lnc & ~is_yes_nc & counts_nc).sum(1),
    ]
    no_log_loss = torch.zeros_like(hits[0])
    counts_lc5 = torch.stack([*hits, no_log_loss], -1).cpu()
    scores = metrics.score_counts(counts_lc5, binary=task.true.kind == "binary")
    return metric, scores[metrics.ScoreKey(metric)].numpy()


def nearest_examples(x_nd: np.ndarray, *, device: str = "cpu") -> np.ndarray:
    """Find the most similar other examples of each example.

    Parameters
    ----------
    x_nd : ndarray
        (n, d) states.
    device : str
        Where they are compared.

    Returns
    -------
    ndarray
        (n, k) int32 rows with the largest cosine similarity, the most similar first. k is
        :data:`NEAREST`, or n - 1 if there are fewer others.
    """
    k = min(NEAREST, len(x_nd) - 1)
    states_nd = torch.as_tensor(x_nd, device=device)
    unit_nd = states_nd / states_nd.norm(dim=1, keepdim=True).clip(1e-12)
    nearest = []
    for start in range(0, len(unit_nd), CHUNK):
        similarity = unit_nd[start : start + CHUNK] @ unit_nd.T
        # An example is not its own neighbour.
        similarity.diagonal(offset=start).fill_(-torch.inf)
        nearest.append(similarity.topk(k, dim=1).indices)
    return torch.cat(nearest).int().cpu().numpy()
