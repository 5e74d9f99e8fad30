"""Probes of a group of layers, fitted to all sets of labels of a task."""

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
class FittedProbes:
    """What the probes of one kind, fitted to one set of labels, leave behind.

    Attributes
    ----------
    probabilities : dict of str to ndarray
        By split (``"validation"`` and ``"test"``) the probabilities (l, n of the split, c).
    strengths : DataFrame
        Of ``"logreg"``: one row per layer with the columns `layer`, `strength` (the one that was
        selected on validation), `gradient_norm` (the largest of its classes at the end) and
        `strength_solved` (the weakest regularisation that was solved to choose it).
    losses : DataFrame
        Of ``"linear"`` and ``"mlp"``: columns `layer`, `seed`, `epoch`, `split` and `loss`.
    bits_ln : ndarray or None
        (l, n) bits of the training examples, see :mod:`probekit.probes.codelength`.
    weights : dict of str to ProbeWeights
        By layer the logistic regressions; of the true labels alone.
    """

    probabilities: dict[str, np.ndarray]
    strengths: pd.DataFrame = field(default_factory=pd.DataFrame)
    losses: pd.DataFrame = field(default_factory=pd.DataFrame)
    bits_ln: np.ndarray | None = None
    weights: dict[str, ProbeWeights] = field(default_factory=dict)

    def layer(self, place: int) -> FittedProbes:
        """Return what one of the l layers has, by its place."""
        layers = slice(place, place + 1)
        tables = {}
        for name in ("strengths", "losses"):
            table = getattr(self, name)
            if len(table):
                table = table[table.layer == table.layer.unique()[place]]
            tables[name] = table
        return FittedProbes(
            probabilities={split: p_lnc[layers] for split, p_lnc in self.probabilities.items()},
            bits_ln=None if self.bits_ln is None else self.bits_ln[layers],
            weights=dict(list(self.weights.items())[layers]),
            **tables,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[FittedProbes]) -> FittedProbes:
        """Put the layers of several groups one after the other."""
        probabilities = {
            split: np.concatenate([part.probabilities[split] for part in parts])
            for split in parts[0].probabilities
        }
        bits = [part.bits_ln for part in parts if part.bits_ln is not None]
        weights: dict[str, ProbeWeights] = {}
        for part in parts:
            weights |= part.weights
        return cls(
            probabilities=probabilities,
            strengths=pd.concat([part.strengths for part in parts]),
            losses=pd.concat([part.losses for part in parts]),
            bits_ln=np.concatenate(bits) if bits else None,
            weights=weights,
        )


def training_device(device: str | None = None) -> str:
    """Return where probes are trained.

    Parameters
    ----------
    device : str or None
        That models run on; None takes a GPU where there is one. Probes need float64, which MPS
        lacks: there the CPU trains them.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device.startswith("mps") else device


def fit_logreg(
    x_lnd: torch.Tensor,
    task: LabelledTask,
    *,
    label_sets: Sequence[LabelSet],
    strengths: Sequence[float],
    layers: Sequence[str],
    memory_gb: float,
    measure_codelength: bool = False,
) -> list[FittedProbes]:
    """Fit logistic regressions to several sets of labels of a task, side by side.

    Features are standardised with the mean and scale of the task's training examples. At each
    layer, a set of labels takes the strength with the lowest log loss on its validation examples.

    Parameters
    ----------
    x_lnd : Tensor
        (l, n, d) float32 features of the task's examples.
    task : LabelledTask
        The task.
    label_sets : sequence of LabelSet
        The labels; the true ones are the first.
    strengths : sequence of float
        Inverse strengths of regularisation C.
    layers : sequence of str
        Names of the l layers.
    memory_gb : float
        Bound on what the solver holds besides the features.
    measure_codelength : bool
        Also measure the online codelength of the true labels.

    Returns
    -------
    list of FittedProbes
        One for each set of labels. The first one also has the weights.

    Warns
    -----
    UserWarning
        Problems did not converge. The message says how many, and names the worst by task, layer,
        labels, class and strength.
    """
    together = logreg.layers_together(x_lnd, memory_gb)
    choices = []
    parts = []
    for start in range(0, len(x_lnd), together):
        part = slice(start, start + together)
        choice, fitted = _fit_logreg_part(
            x_lnd[part],
            task,
            label_sets=label_sets,
            strengths=strengths,
            layers=layers[part],
            memory_gb=memory_gb,
            measure_codelength=measure_codelength,
        )
        choices.append(choice)
        parts.append(fitted)
    _warn_if_unconverged(
        logreg.Choice.concatenate(choices),
        task,
        label_sets=label_sets,
        strengths=strengths,
        layers=layers,
    )
    return [FittedProbes.concatenate(of_set) for of_set in zip(*parts, strict=True)]


def _fit_logreg_part(
    x_lnd: torch.Tensor,
    task: LabelledTask,
    *,
    label_sets: Sequence[LabelSet],
    strengths: Sequence[float],
    layers: Sequence[str],
    memory_gb: float,
    measure_codelength: bool,
) -> tuple[logreg.Choice, list[FittedProbes]]:
    """Do what :func:`fit_logreg` does for as many layers as are solved together."""
    train = task.true.split["train"]
    mean_ld, scale_ld = logreg.feature_spread(x_lnd[:, train])
    features = logreg.Features((x_lnd - mean_ld[:, None]) / scale_ld[:, None], train)
    device = x_lnd.device
    choice = logreg.choose_logreg(
        features,
        torch.stack([labels.y_nc for labels in label_sets], 1).to(device),
        train_nsk=_stack_masks(label_sets, "train").to(device),
        validation_nsk=_stack_masks(label_sets, "validation").to(device),
        strengths=strengths,
        memory_gb=memory_gb,
    )
    fitted = []
    for i, labels in enumerate(label_sets):
        norm_lk = choice.solution.gradient_norm_lsk[:, i]
        table = pd.DataFrame(
            {
                "layer": list(layers),
                "strength": [strengths[number] for number in choice.strength_ls[:, i].tolist()],
                "gradient_norm": norm_lk.amax(1).double().cpu().numpy(),
                "strength_solved": [
                    sorted(strengths)[tried - 1] for tried in choice.tried_ls[:, i].tolist()
                ],
            }
        )
        probabilities = _probabilities(choice.solution, features, labels=labels, number=i)
        fitted.append(FittedProbes(probabilities=probabilities, strengths=table))
    first = features.turn_back(choice.solution.select_sets(slice(0, 1)))
    weights = ProbeWeights(
        weight_ldc=first.weight_ldsk[:, :, 0].cpu().numpy(),
        intercept_lc=first.intercept_lsk[:, 0].cpu().numpy(),
        mean_ld=mean_ld.cpu().numpy(),
        scale_ld=scale_ld.cpu().numpy(),
    )
    fitted[0].weights = {layer: weights.layer(place) for place, layer in enumerate(layers)}
    if measure_codelength:
        fitted[0].bits_ln = codelength.online_codelength(
            features, label_sets[0], strengths=strengths, memory_gb=memory_gb
        )
    return choice, fitted


def _stack_masks(label_sets: Sequence[LabelSet], split: str) -> torch.Tensor:
    """Return (n, s, c) which entries count in a split of each set of labels.

    A control of the labels may train on fewer examples than the task does.
    """
    masks = []
    for labels in label_sets:
        mask_nc = torch.zeros_like(labels.mask_nc)
        rows = labels.split[split]
        mask_nc[rows] = labels.mask_nc[rows]
        masks.append(mask_nc)
    return torch.stack(masks, 1)


def _warn_if_unconverged(
    choice: logreg.Choice,
    task: LabelledTask,
    *,
    label_sets: Sequence[LabelSet],
    strengths: Sequence[float],
    layers: Sequence[str],
) -> None:
    solution = choice.solution
    unconverged_lsk = ~solution.converged_lsk
    if not unconverged_lsk.any():
        return
    worst = torch.where(unconverged_lsk, solution.gradient_norm_lsk, -1).argmax()
    place = torch.unravel_index(worst, unconverged_lsk.shape)
    layer, set_number, class_number = (int(index) for index in place)
    strength = strengths[int(choice.strength_ls[layer, set_number])]
    labels = controls.CONTROL_WORDS.get(label_sets[set_number].name, "true labels")
    norm = solution.gradient_norm_lsk[layer, set_number, class_number].item()
    warnings.warn(
        f"logreg did not converge in {int(unconverged_lsk.sum()):,} of {unconverged_lsk.numel():,} "
        f"problems; the worst: {task.name}, {layers[layer]}, {labels}, class "
        f"{task.true.classes[class_number]!r}, C={strength:g}, gradient norm {norm:.1e} "
        f"(converged ones have at most {logreg.TOLERANCE:g}, and nothing left to gain)",
        stacklevel=3,
    )


def _probabilities(
    solution: logreg.Solution, features: logreg.Features, *, labels: LabelSet, number: int
) -> dict[str, np.ndarray]:
    """Return the probabilities (l, n, c) of validation and test, of a set by its number."""
    of_set = solution.select_sets(slice(number, number + 1))
    probabilities = {}
    for split in ("validation", "test"):
        logits = of_set.logits(features.z_lne[:, labels.split[split]])[:, :, 0]
        probabilities[split] = logits.sigmoid().cpu().numpy()
    return probabilities


def fit_mean_difference(
    x_lnd: torch.Tensor,
    task: LabelledTask,
    *,
    label_sets: Sequence[LabelSet],
    layers: Sequence[str],
) -> list[FittedProbes]:
    r"""Take for each class the difference of the means of its two kinds of training examples.

    Parameters
    ----------
    x_lnd : Tensor
        (l, n, d) float32 features of the task's examples.
    task : LabelledTask
        The task.
    label_sets : sequence of LabelSet
        The labels; the true ones are the first.
    layers : sequence of str
        Names of the l layers.

    Returns
    -------
    list of FittedProbes
        One for each set of labels. The first one also has the weights.

    Notes
    -----
    The direction is :math:`\delta = \mu_1 - \mu_0` of the states as they are (Marks and Tegmark
    2023, arXiv:2310.06824, section 5). The log-odds along it are those of two normal distributions
    of one variance :math:`v = \mathrm{var}(\delta^\top x)` around the means:
    :math:`\delta^\top (x - (\mu_0 + \mu_1) / 2) \, \delta^\top \delta / v`.
    """
    train = task.true.split["train"]
    device = x_lnd.device
    mean_l1d = x_lnd[:, train].mean(1, keepdim=True)
    y_nsc = torch.stack([labels.y_nc for labels in label_sets], 1).to(device)
    mask_nsc = _stack_masks(label_sets, "train").to(device)
    # Counted from the mean of all, so that sums of large numbers keep their digits.
    centred_lnd = x_lnd - mean_l1d
    yes_nq = (mask_nsc * y_nsc).flatten(1)
    no_nq = (mask_nsc * (1 - y_nsc)).flatten(1)
    mean_yes_ldq = _masked_means(centred_lnd, yes_nq)
    mean_no_ldq = _masked_means(centred_lnd, no_nq)
    has_both_q = (yes_nq.sum(0) > 0) & (no_nq.sum(0) > 0)
    delta_ldq = (mean_yes_ldq - mean_no_ldq) * has_both_q
    middle_ldq = (mean_yes_ldq + mean_no_ldq) / 2
    along_lnq = centred_lnd @ delta_ldq
    length_lq = (delta_ldq**2).sum(1)
    of_class_lnq = torch.where(
        yes_nq > 0,
        along_lnq - (mean_yes_ldq * delta_ldq).sum(1, keepdim=True),
        along_lnq - (mean_no_ldq * delta_ldq).sum(1, keepdim=True),
    )
    counts_nq = yes_nq + no_nq
    variance_lq = (of_class_lnq**2 * counts_nq).sum(1) / counts_nq.sum(0).clamp(min=1)
    factor_lq = torch.where(variance_lq > 0, length_lq / variance_lq.clamp(min=1e-30), 0.0)
    bias_lq = -(middle_ldq * delta_ldq).sum(1) * factor_lq
    logits_lnq = along_lnq * factor_lq[:, None] + bias_lq[:, None]
    p_lnsc = logits_lnq.sigmoid().unflatten(2, mask_nsc.shape[1:]).cpu().numpy()
    fitted = []
    for i, labels in enumerate(label_sets):
        probabilities = {
            split: p_lnsc[:, labels.split[split].numpy(), i] for split in ("validation", "test")
        }
        fitted.append(FittedProbes(probabilities=probabilities))
    class_count = mask_nsc.shape[2]
    weights = ProbeWeights(
        weight_ldc=(delta_ldq * factor_lq[:, None])[..., :class_count].cpu().numpy(),
        intercept_lc=bias_lq[:, :class_count].cpu().numpy(),
        mean_ld=mean_l1d[:, 0].cpu().numpy(),
        scale_ld=np.ones(mean_l1d[:, 0].shape, np.float32),
    )
    fitted[0].weights = {layer: weights.layer(place) for place, layer in enumerate(layers)}
    return fitted


def _masked_means(x_lnd: torch.Tensor, mask_nq: torch.Tensor) -> torch.Tensor:
    """Return (l, d, q) the means over the examples of each mask; 0 where it is empty."""
    return x_lnd.transpose(1, 2) @ (mask_nq / mask_nq.sum(0).clamp(min=1))


def fit_adam(
    x_lnd: torch.Tensor,
    label_sets: Sequence[LabelSet],
    *,
    seeds: Sequence[int],
    settings: adam.AdamSettings,
    layers: Sequence[str],
) -> list[FittedProbes]:
    """Train the probe ``"linear"`` (no hidden layer) or ``"mlp"`` on several sets of labels.

    Sets that train on the same examples are trained side by side.

    Parameters
    ----------
    x_lnd : Tensor
        (l, n, d) float32 features of the task's examples.
    label_sets : sequence of LabelSet
        The labels.
    seeds : sequence of int
        The seed of each set of labels.
    settings : AdamSettings
        Settings of the training.
    layers : sequence of str
        Names of the l layers.

    Returns
    -------
    list of FittedProbes
        One for each set of labels.
    """
    fitted: dict[int, FittedProbes] = {}
    for group in _group_by_rows(label_sets):
        split = label_sets[group[0]].split
        probes = adam.train_adam(
            x_lnd,
            torch.stack([label_sets[i].y_nc for i in group]).to(x_lnd.device),
            mask_snc=torch.stack([label_sets[i].mask_nc for i in group]).to(x_lnd.device),
            train=split["train"],
            validation=split["validation"],
            kind=label_sets[group[0]].kind,
            seeds=[seeds[i] for i in group],
            settings=settings,
        )
        for place, i in enumerate(group):
            probe = probes.select_set(place)
            probabilities = {}
            for name in ("validation", "test"):
                p_lnc = probe.probabilities(x_lnd[:, label_sets[i].split[name]])[:, 0]
                probabilities[name] = p_lnc.cpu().numpy()
            losses = _loss_table(probe.losses[:, 0].numpy(), layers=layers, seed=seeds[i])
            fitted[i] = FittedProbes(probabilities=probabilities, losses=losses)
    return [fitted[i] for i in range(len(label_sets))]


def _group_by_rows(label_sets: Sequence[LabelSet]) -> list[list[int]]:
    """Group the sets, by number, that have the same training and validation examples."""
    groups: dict[tuple[bytes, bytes], list[int]] = {}
    for i, labels in enumerate(label_sets):
        train = labels.split["train"].numpy().tobytes()
        validation = labels.split["validation"].numpy().tobytes()
        groups.setdefault((train, validation), []).append(i)
    return list(groups.values())


def _loss_table(losses: np.ndarray, layers: Sequence[str], seed: int) -> pd.DataFrame:
    """Tabulate losses (l, epochs, 2) of training and validation."""
    layer, epoch, split = np.indices(losses.shape).reshape(3, -1)
    return pd.DataFrame(
        {
            "layer": np.array(layers)[layer],
            "seed": seed,
            "epoch": epoch + 1,
            "split": np.array(["train", "validation"])[split],
            "loss": losses.ravel().astype(float),
        }
    )
