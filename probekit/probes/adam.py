"""Probes trained with Adam, all layers and seeds in one batched pass.

They are the probe of the published study that probekit started from (dropout and a linear map) and
a probe with one hidden layer. Every layer and seed has its own weights and its own loss; the losses
are summed before the backward pass, so that one step moves them all and none touches another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """Settings of the training; the defaults are the published study's.

    Features are not standardised.

    Attributes
    ----------
    epochs : int
        Passes over the training examples, at most.
    batch : int
        Examples per step.
    lr : float
        Adam's learning rate.
    dropout : float
        Share of the input features that is set to zero in training.
    hidden : int
        Width of the hidden layer (ReLU) of the probe ``"mlp"``; 0 for none, as in the probe
        ``"linear"``.
    patience : int or None
        Stop a probe after this many epochs without a lower validation loss, and keep its weights
        from the epoch with the lowest. None trains all epochs and keeps the last.
    """

    epochs: int = 10
    batch: int = 16
    lr: float = 1e-3
    dropout: float = 0.1
    hidden: int = 128
    patience: int | None = None


@dataclass(frozen=True)
class AdamProbes:
    """Trained probes of l layers and s seeds.

    Attributes
    ----------
    weights : list of Tensor
        (l, s, in, out) of each linear map, from the first to the last.
    biases : list of Tensor
        (l, s, out) of each linear map.
    losses : Tensor
        (l, s, epochs, 2): the training loss, measured with dropout while the weights change, and
        the validation loss without dropout; nan after a probe has stopped.
    kind : str
        ``"binary"`` or ``"multilabel"``, see :func:`train_adam`.
    """

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    losses: torch.Tensor
    kind: str

    def select_seed(self, index: int) -> AdamProbes:
        """Return the probes of one seed alone; s is then 1."""
        seed = slice(index, index + 1)
        return AdamProbes(
            weights=[weight[:, seed] for weight in self.weights],
            biases=[bias[:, seed] for bias in self.biases],
            losses=self.losses[:, seed],
            kind=self.kind,
        )

    def probabilities(self, x_lnd: torch.Tensor) -> torch.Tensor:
        """Return the probabilities of label 1.

        Parameters
        ----------
        x_lnd : Tensor
            (l, n, d) features.

        Returns
        -------
        Tensor
            (l, s, n, c); c is 1 for ``kind="binary"``.
        """
        logits = _logits(x_lnd[:, None], self.weights, self.biases)
        if self.kind == "binary":
            return logits.softmax(-1)[..., 1:]
        return logits.sigmoid()


def train_adam(
    x_lnd: torch.Tensor,
    y_snc: torch.Tensor,
    *,
    mask_snc: torch.Tensor,
    train: torch.Tensor,
    validation: torch.Tensor,
    kind: str,
    seeds: Sequence[int] = (0,),
    settings: AdamSettings = AdamSettings(),
) -> AdamProbes:
    """Train one probe for each layer and seed.

    A probe does not depend on which others are trained beside it.

    Parameters
    ----------
    x_lnd : Tensor
        (l, n, d) float32 features.
    y_snc : Tensor
        (s, n, c) float32 labels of each seed, 0 or 1; (n, c) if all seeds have the same.
    mask_snc : Tensor
        1 where an entry of the labels counts, else 0; of the same shape.
    train, validation : Tensor
        Numbers of the rows to train on, and of those whose loss is measured after each epoch.
    kind : str
        ``"binary"`` (c is 1: two outputs and their cross-entropy, without the mask) or
        ``"multilabel"`` (c outputs, binary cross-entropy of the entries that count).
    seeds : sequence of int
        Seeds of the initial weights, the order of the batches and the dropout.
    settings : AdamSettings
        Settings of the training.
    """
    n_layers, _, d = x_lnd.shape
    sizes = [d]
    if settings.hidden:
        sizes.append(settings.hidden)
    sizes.append(2 if kind == "binary" else y_snc.shape[-1])
    y_snc = y_snc.expand(len(seeds), *y_snc.shape[-2:])
    mask_snc = mask_snc.expand(len(seeds), *mask_snc.shape[-2:])
    seed_s1 = torch.arange(len(seeds))[:, None]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    weights, biases = _initial_parameters(sizes, n_layers, generators, x_lnd.device)
    parameters = [*weights, *biases]
    optimiser = torch.optim.Adam(parameters, lr=settings.lr)
    best_parameters = [parameter.detach().clone() for parameter in parameters]
    lowest_ls = torch.full((n_layers, len(seeds)), torch.inf, device=x_lnd.device)
    epochs_since_lowest_ls = torch.zeros_like(lowest_ls)
    patience = settings.patience or torch.inf
    losses = []
    for _ in range(settings.epochs):
        order_sn = train[
            _for_each_seed(generators, lambda g: torch.randperm(len(train), generator=g))
        ]
        train_loss_ls = torch.zeros_like(lowest_ls)
        for rows_sb in order_sn.split(settings.batch, dim=1):
            dropped_lsbd = _drop_out(x_lnd[:, rows_sb], settings.dropout, generators)
            loss_ls = _loss(
                _logits(dropped_lsbd, weights, biases),
                y_snc[seed_s1, rows_sb],
                mask_snc[seed_s1, rows_sb],
                kind,
            )
            optimiser.zero_grad()
            loss_ls.sum().backward()
            optimiser.step()
            train_loss_ls = train_loss_ls + loss_ls.detach() * rows_sb.shape[1] / len(train)
        with torch.no_grad():
            logits = _logits(x_lnd[:, None, validation], weights, biases)
            validation_loss_ls = _loss(logits, y_snc[:, validation], mask_snc[:, validation], kind)
        stopped_ls = epochs_since_lowest_ls >= patience
        epoch_losses = torch.stack([train_loss_ls, validation_loss_ls], -1)
        losses.append(torch.where(stopped_ls[..., None], torch.nan, epoch_losses))
        keep_ls = ~stopped_ls
        if settings.patience:
            keep_ls = keep_ls & (validation_loss_ls < lowest_ls)
        epochs_since_lowest_ls = torch.where(keep_ls, 0, epochs_since_lowest_ls + 1)
        lowest_ls = torch.where(keep_ls, validation_loss_ls, lowest_ls)
        for best, parameter in zip(best_parameters, parameters, strict=True):
            best[keep_ls] = parameter.detach()[keep_ls]
        if (epochs_since_lowest_ls >= patience).all():
            break
    return AdamProbes(
        weights=best_parameters[: len(weights)],
        biases=best_parameters[len(weights) :],
        losses=torch.stack(losses, 2).cpu(),
        kind=kind,
    )


def _for_each_seed(
    generators: Sequence[torch.Generator], draw: Callable[[torch.Generator], torch.Tensor]
) -> torch.Tensor:
    return torch.stack([draw(generator) for generator in generators])


def _initial_parameters(
    sizes: Sequence[int],
    n_layers: int,
    generators: Sequence[torch.Generator],
    device: torch.device,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Draw weights and biases as torch.nn.Linear does; a seed's are the same at all layers."""

    def draw(fan_in: int, *shape: int) -> torch.Tensor:
        bound = fan_in**-0.5
        uniform_s = _for_each_seed(generators, lambda g: torch.rand(*shape, generator=g) * 2 - 1)
        first = uniform_s * bound
        return first.expand(n_layers, *first.shape).clone().to(device).requires_grad_()

    weights = []
    biases = []
    for fan_in, fan_out in pairwise(sizes):
        weights.append(draw(fan_in, fan_in, fan_out))
        biases.append(draw(fan_in, fan_out))
    return weights, biases


def _drop_out(
    x_lsbd: torch.Tensor, share: float, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Set a share of the features to zero; a seed drops the same features at all layers."""
    shape = x_lsbd.shape[2:]
    keep_sbd = _for_each_seed(generators, lambda g: torch.rand(shape, generator=g)) >= share
    return x_lsbd * keep_sbd.to(x_lsbd) / (1 - share)


def _logits(
    x_lsbd: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return (l, s, b, out); the second dimension of x may be 1 for all seeds."""
    hidden = x_lsbd @ weights[0] + biases[0][:, :, None]
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        hidden = hidden.relu() @ weight + bias[:, :, None]
    return hidden


def _loss(
    logits: torch.Tensor, y_sbc: torch.Tensor, mask_sbc: torch.Tensor, kind: str
) -> torch.Tensor:
    """Return the mean loss (l, s) over examples ("binary") or entries that count."""
    if kind == "binary":
        label = y_sbc.long().expand(*logits.shape[:-1], 1)
        return -logits.log_softmax(-1).gather(-1, label).mean((-2, -1))
    loss = functional.binary_cross_entropy_with_logits(
        logits, y_sbc.expand_as(logits), reduction="none"
    )
    return (loss * mask_sbc).sum((-2, -1)) / mask_sbc.sum((-2, -1)).clamp(min=1)
