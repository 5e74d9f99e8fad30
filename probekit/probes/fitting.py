"""Probes fitted to a group of layers, for all sets of labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from probekit.probes import adam, codelength, controls, logreg
from probekit.probes.labels import LabelledTask, LabelSet
from probekit.probes.weights import ProbeWeights


@dataclass
class Fitted:
    """Probabilities (l, n of the split, c) of one set of labels, and what else a probe leaves.

    Attributes
    ----------
    chosen : of "logreg", by layer: `strength`, and `gradient_norm`, the largest of its classes at the end
    losses : of the others, by layer, seed and epoch
    bits_ln : of the training examples, see :mod:`probekit.probes.codelength`
    linear : the probes of the true labels themselves, of each layer
    """

    p_lnc: dict[str, np.ndarray]
    chosen: pd.DataFrame
    losses: pd.DataFrame
    bits_ln: np.ndarray | None = None
    linear: dict[str, ProbeWeights] = field(default_factory=dict)

    @classmethod
    def join(cls, parts: Sequence[Fitted]) -> Fitted:
        """Groups of layers, one after the other."""
        p = {split: np.concatenate([part.p_lnc[split] for part in parts]) for split in parts[0].p_lnc}
        bits = None if parts[0].bits_ln is None else np.concatenate([part.bits_ln for part in parts])
        chosen, losses = (pd.concat([getattr(part, name) for part in parts]) for name in ("chosen", "losses"))
        return cls(p, chosen, losses, bits, {layer: probe for part in parts for layer, probe in part.linear.items()})


def device() -> str:
    """Where probes are trained."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def spread(x_lnd: torch.Tensor, train: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (l, d) over the training rows; that of a constant feature is infinite."""
    part = x_lnd[:, train]
    mean, scale = part.mean(1), part.std(1, correction=0)
    return mean, torch.where(scale > 1e-7 * part.abs().amax(1), scale, torch.inf)


def with_logreg(x_lnd: torch.Tensor, task: LabelledTask, sets: Sequence[LabelSet], strengths: Sequence[float],
                layers: Sequence[str], memory_gb: float, coded: bool = False) -> list[Fitted]:
    """Logistic regressions for several sets of labels of a task, in one solve.

    Where problems do not converge, a warning says how many, and names the worst: task, layer, labels, class, strength.

    Parameters
    ----------
    x_lnd : (l, n, d) features of the task's examples
    sets : labels, the true ones first
    coded : measure the online codelength of the true labels, too
    """
    train = task.true.split["train"]
    mean, scale = spread(x_lnd, train)
    x_lnd = (x_lnd - mean[:, None]) / scale[:, None]
    inside = [torch.isin(train, labels.split["train"]).float()[:, None] * labels.mask_nc[train] for labels in sets]
    y, mask = (torch.cat(parts, 1).to(x_lnd.device) for parts in ([s.y_nc[train] for s in sets], inside))
    solution = logreg.solve(x_lnd[:, train], y, mask, strengths, memory_gb=memory_gb)
    c = len(task.true.classes)
    short = ~solution.converged_lsk
    if short.any():
        worst = torch.where(short, solution.gradient_lsk, -1).argmax()
        layer, strength, k = (int(at) for at in torch.unravel_index(worst, short.shape))
        words = controls.CONTROL_WORDS.get(sets[k // c].name, "true labels")
        norm = solution.gradient_lsk[layer, strength, k].item()
        warnings.warn(f"logreg did not converge in {int(short.sum()):,} of {short.numel():,} problems; the worst: "
                      f"{task.name}, {layers[layer]}, {words}, class {task.true.classes[k % c]!r}, "
                      f"C={strengths[strength]:g}, gradient norm {norm:.1e} (where it did: at most "
                      f"{logreg.TOLERANCE:g})", stacklevel=2)
    chosen = [_chosen(solution.columns(slice(i * c, (i + 1) * c)), x_lnd, labels, strengths, layers)
              for i, labels in enumerate(sets)]
    found, true = [fitted for fitted, _ in chosen], chosen[0][1]
    parts = (true.weight_ldsk[:, :, 0], true.intercept_lsk[:, 0], mean, scale)
    whole = ProbeWeights(*(values.cpu().numpy() for values in parts))
    found[0].linear = {layer: whole.only(k) for k, layer in enumerate(layers)}
    if coded:
        found[0].bits_ln = codelength.online(x_lnd, sets[0], strengths, memory_gb)
    return found


def _chosen(solution: logreg.Solution, x_lnd: torch.Tensor, labels: LabelSet, strengths: Sequence[float],
            layers: Sequence[str]) -> tuple[Fitted, logreg.Solution]:
    """Each layer with the strength that has the lowest log loss on validation, and the solution for those."""
    rows = labels.split["validation"]
    y, mask = (t[rows].to(x_lnd.device) for t in (labels.y_nc, labels.mask_nc))
    logits = solution.logits(x_lnd[:, rows])
    losses = ((torch.nn.functional.softplus(logits) - y[:, None] * logits) * mask[:, None]).sum((1, 3))
    best = losses.argmin(1)
    solution = solution.at(best)
    p = {split: solution.logits(x_lnd[:, labels.split[split]])[:, :, 0].sigmoid().cpu().numpy()
         for split in ("validation", "test")}
    about = pd.DataFrame({"layer": list(layers), "strength": [strengths[k] for k in best.tolist()],
                          "gradient_norm": solution.gradient_lsk.amax((1, 2)).cpu().numpy()})
    return Fitted(p, about, pd.DataFrame()), solution


def with_adam(x_lnd: torch.Tensor, sets: Sequence[LabelSet], seeds: Sequence[int], setting: adam.Training,
              layers: Sequence[str]) -> list[Fitted]:
    """The probes "linear" (no hidden layer) and "mlp", one Fitted for each set of labels with its seed.

    Sets that are learnt from the same examples are trained side by side.
    """
    groups: dict[tuple[bytes, ...], list[int]] = {}
    for i, labels in enumerate(sets):
        rows = tuple(labels.split[split].numpy().tobytes() for split in ("train", "validation"))
        groups.setdefault(rows, []).append(i)
    found: dict[int, Fitted] = {}
    for group in groups.values():
        y, mask = (torch.stack([getattr(sets[i], name) for i in group]).to(x_lnd.device)
                   for name in ("y_nc", "mask_nc"))
        split, own = sets[group[0]].split, [seeds[i] for i in group]
        fit = adam.fit(x_lnd, y, mask, split["train"], split["validation"], sets[0].kind, own, setting)
        for s, i in enumerate(group):
            probes = fit.only(s)
            p = {name: probes.probabilities(x_lnd[:, sets[i].split[name]])[:, 0].cpu().numpy()
                 for name in ("validation", "test")}
            place = np.indices(fit.losses[:, s].shape).reshape(3, -1)
            found[i] = Fitted(p, pd.DataFrame(), pd.DataFrame({
                "layer": np.array(layers)[place[0]], "seed": seeds[i], "epoch": place[1] + 1,
                "split": np.array(["train", "validation"])[place[2]], "loss": fit.losses[:, s].numpy().ravel()}))
    return [found[i] for i in range(len(sets))]
