"""The published study's probe: dropout, one linear layer, Adam; all layers and seeds trained in one batched pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Training:
    """The study's setting; features are not standardised, and the last epoch counts."""

    epochs: int = 10
    batch: int = 16
    lr: float = 1e-3
    dropout: float = 0.1


@dataclass(frozen=True)
class Fit:
    """`weight` (l, s, d, o), `bias` (l, s, o), `losses` (l, s, epoch, 2: train with dropout, validation without)."""

    weight: torch.Tensor
    bias: torch.Tensor
    losses: torch.Tensor
    kind: str

    def probabilities(self, x_lnd: torch.Tensor) -> torch.Tensor:
        """(l, s, n, c) probability of label 1."""
        logits = torch.einsum("lnd,lsdo->lsno", x_lnd, self.weight) + self.bias[:, :, None]
        return logits.softmax(-1)[..., 1:] if self.kind == "binary" else logits.sigmoid()


def _loss(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
    """(l, s) mean loss: cross-entropy of two outputs (binary) or masked binary cross-entropy; `y`, `mask` (s, b, c)."""
    if kind == "binary":
        picked = logits.log_softmax(-1).gather(-1, y.long().expand(*logits.shape[:-1], 1))
        return -picked.mean((-2, -1))
    each = functional.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none")
    return (each * mask).sum((-2, -1)) / mask.sum((-2, -1)).clamp(min=1)


def fit(x_lnd: torch.Tensor, y_nc: torch.Tensor, mask_nc: torch.Tensor, train: torch.Tensor, validation: torch.Tensor,
        kind: str, seeds: tuple[int, ...] = (0,), setting: Training = Training()) -> Fit:
    """Train one probe a layer and seed; a layer's probe does not depend on which others are trained beside it.

    Parameters
    ----------
    x_lnd : (l, n, d) float32
    y_nc, mask_nc : (n, c) float32 labels, and 1 where an entry counts
    train, validation : row numbers
    kind : "binary" (two outputs, cross-entropy) or "multilabel" (c outputs, masked binary cross-entropy)
    """
    layers, _, d = x_lnd.shape
    outputs = 2 if kind == "binary" else y_nc.shape[1]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def each_seed(make) -> torch.Tensor:
        return torch.stack([make(generator) for generator in generators])

    def start(*shape: int) -> torch.Tensor:
        first = each_seed(lambda g: (torch.rand(*shape, generator=g) * 2 - 1) * d**-0.5)
        return first.expand(layers, *first.shape).clone().to(x_lnd.device).requires_grad_()

    weight, bias = start(d, outputs), start(outputs)
    optimiser = torch.optim.Adam([weight, bias], lr=setting.lr)
    losses = []
    for _ in range(setting.epochs):
        order_sn = train[each_seed(lambda g: torch.randperm(len(train), generator=g))]
        running = 0.0
        for rows_sb in order_sn.split(setting.batch, dim=1):
            keep = each_seed(lambda g, b=rows_sb.shape[1]: torch.rand(b, d, generator=g)) >= setting.dropout
            dropped = x_lnd[:, rows_sb] * keep.to(x_lnd) / (1 - setting.dropout)
            logits = dropped @ weight + bias[:, :, None]
            loss_ls = _loss(logits, y_nc[rows_sb], mask_nc[rows_sb], kind)
            optimiser.zero_grad()
            loss_ls.sum().backward()
            optimiser.step()
            running = running + loss_ls.detach() * rows_sb.shape[1] / len(train)
        with torch.no_grad():
            logits = torch.einsum("lnd,lsdo->lsno", x_lnd[:, validation], weight) + bias[:, :, None]
            losses.append(torch.stack([running, _loss(logits, y_nc[validation], mask_nc[validation], kind)], -1))
    return Fit(weight.detach(), bias.detach(), torch.stack(losses, 2).cpu(), kind)
