"""Probes trained with Adam, all layers and seeds in one batched pass: the published study's, and one hidden layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Training:
    """The study's setting; features are not standardised, and the last epoch counts.

    Attributes
    ----------
    hidden : width of the hidden layer with ReLU of the probe "mlp"; 0 has none, as the probe "linear"
    patience : stop a probe after so many epochs without a lower validation loss, and take it as it was at its lowest;
        None trains all epochs and takes the last
    """

    epochs: int = 10
    batch: int = 16
    lr: float = 1e-3
    dropout: float = 0.1
    hidden: int = 128
    patience: int | None = None


@dataclass(frozen=True)
class Fit:
    """Probes of l layers and s seeds.

    Attributes
    ----------
    weights, biases : of each linear map, (l, s, in, out) and (l, s, out)
    losses : (l, s, epoch, 2): train with dropout, validation without; nan after a probe has stopped
    """

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    losses: torch.Tensor
    kind: str

    def only(self, s: int) -> Fit:
        """The probes of one seed."""
        parts = [[values[:, s : s + 1] for values in of] for of in (self.weights, self.biases)]
        return Fit(*parts, self.losses[:, s : s + 1], self.kind)

    def probabilities(self, x_lnd: torch.Tensor) -> torch.Tensor:
        """(l, s, n, c) probability of label 1."""
        logits = _logits(x_lnd[:, None], self.weights, self.biases)
        return logits.softmax(-1)[..., 1:] if self.kind == "binary" else logits.sigmoid()


def _logits(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    """(l, s, b, out) of x (l, s or 1, b, d)."""
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = (x.relu() if k else x) @ weight + bias[:, :, None]
    return x


def _loss(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
    """(l, s) mean loss: cross-entropy of two outputs (binary) or masked binary cross-entropy; `y`, `mask` (s, b, c)."""
    if kind == "binary":
        picked = logits.log_softmax(-1).gather(-1, y.long().expand(*logits.shape[:-1], 1))
        return -picked.mean((-2, -1))
    each = functional.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none")
    return (each * mask).sum((-2, -1)) / mask.sum((-2, -1)).clamp(min=1)


def _start(sizes: Sequence[int], layers: int, each_seed: Callable, device: torch.device
           ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and biases as torch.nn.Linear draws them, the same for all layers."""

    def drawn(fan_in: int, *shape: int) -> torch.Tensor:
        first = each_seed(lambda g: (torch.rand(*shape, generator=g) * 2 - 1) * fan_in**-0.5)
        return first.expand(layers, *first.shape).clone().to(device).requires_grad_()

    pairs = [(drawn(a, a, b), drawn(a, b)) for a, b in pairwise(sizes)]
    return [weight for weight, _ in pairs], [bias for _, bias in pairs]


def fit(x_lnd: torch.Tensor, y_snc: torch.Tensor, mask_snc: torch.Tensor, train: torch.Tensor,
        validation: torch.Tensor, kind: str, seeds: Sequence[int] = (0,), setting: Training = Training()) -> Fit:
    """Train one probe a layer and seed; none depends on which others are trained beside it.

    Parameters
    ----------
    x_lnd : (l, n, d) float32
    y_snc, mask_snc : (s, n, c) float32 labels of each seed, and 1 where an entry counts; (n, c) if all have the same
    train, validation : row numbers
    kind : "binary" (two outputs, cross-entropy) or "multilabel" (c outputs, masked binary cross-entropy)
    """
    layers, _, d = x_lnd.shape
    sizes = [d, *[setting.hidden] * bool(setting.hidden), 2 if kind == "binary" else y_snc.shape[-1]]
    y_snc, mask_snc = (values.expand(len(seeds), *values.shape[-2:]) for values in (y_snc, mask_snc))
    own = torch.arange(len(seeds))[:, None]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def each_seed(make) -> torch.Tensor:
        return torch.stack([make(generator) for generator in generators])

    weights, biases = _start(sizes, layers, each_seed, x_lnd.device)
    parameters = [*weights, *biases]
    optimiser = torch.optim.Adam(parameters, lr=setting.lr)
    lowest = torch.full((layers, len(seeds)), torch.inf, device=x_lnd.device)
    best, since, losses = [p.detach().clone() for p in parameters], torch.zeros_like(lowest), []
    for _ in range(setting.epochs):
        order_sn = train[each_seed(lambda g: torch.randperm(len(train), generator=g))]
        running = 0.0
        for rows_sb in order_sn.split(setting.batch, dim=1):
            keep = each_seed(lambda g, b=rows_sb.shape[1]: torch.rand(b, d, generator=g)) >= setting.dropout
            dropped = x_lnd[:, rows_sb] * keep.to(x_lnd) / (1 - setting.dropout)
            loss_ls = _loss(_logits(dropped, weights, biases), y_snc[own, rows_sb], mask_snc[own, rows_sb], kind)
            optimiser.zero_grad()
            loss_ls.sum().backward()
            optimiser.step()
            running = running + loss_ls.detach() * rows_sb.shape[1] / len(train)
        with torch.no_grad():
            logits = _logits(x_lnd[:, None, validation], weights, biases)
            checked = _loss(logits, y_snc[:, validation], mask_snc[:, validation], kind)
            stopped = since >= (setting.patience or torch.inf)
            losses.append(torch.where(stopped[..., None], torch.nan, torch.stack([running, checked], -1)))
            better = ~stopped & ((checked < lowest) if setting.patience else torch.ones_like(stopped))
            since = torch.where(better, 0, since + 1)
            lowest = torch.where(better, checked, lowest)
            for kept, now in zip(best, parameters, strict=True):
                kept[better] = now.detach()[better]
        if setting.patience and (since >= setting.patience).all():
            break
    return Fit(best[: len(weights)], best[len(weights) :], torch.stack(losses, 2).cpu(), kind)
