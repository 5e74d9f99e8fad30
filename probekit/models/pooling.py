"""Pooling: how the tokens of one layer become one vector an example."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

POOLINGS = ("mean", "max", "image_mean", "text_mean", "cls", "last", "token:<i>")


def check_pooling(pooling: str) -> str:
    """Return `pooling` if it is a known one; else raise ValueError naming those that are."""
    if pooling in POOLINGS[:6] or re.fullmatch(r"token:-?\d+", pooling):
        return pooling
    raise ValueError(f"unknown pooling {pooling!r}: take one of {', '.join(POOLINGS)} with a whole number for <i>, "
                     "counted from the first real token (negative: from the end)")


@dataclass(frozen=True)
class Prefix:
    """Tokens that several examples share: which of them show the image, and whose prefix an example has.

    Attributes
    ----------
    image_bt : (b, t) True at image tokens; every token of a prefix is real
    owner_n : (n,) the prefix, 0 to b - 1, that stands before an example's own tokens
    """

    image_bt: torch.Tensor
    owner_n: torch.Tensor

    @property
    def length(self) -> int:
        return self.image_bt.shape[1]


class Pooler:
    """Pools one layer after another over the same tokens, with or without a prefix that was run on its own.

    Parameters
    ----------
    poolings : names out of :data:`POOLINGS`
    mask_nt : (n, t), 1 or True at the examples' real tokens (their own, without the prefix), on either padding side
    image_nt : (n, t) True at their image tokens; None where there are none
    prefix : what stands before them; None where `mask_nt` covers the whole sequence

    Raises
    ------
    ValueError
        Unknown pooling, or an example with fewer tokens than ``token:<i>`` needs, or without the tokens of a mean.
    """

    def __init__(self, poolings: Sequence[str], mask_nt: torch.Tensor, image_nt: torch.Tensor | None = None,
                 prefix: Prefix | None = None):
        self.poolings, self.prefix = [check_pooling(name) for name in poolings], prefix
        real = mask_nt.bool()
        image = torch.zeros_like(real) if image_nt is None else image_nt & real
        self.own = {"mean": real, "max": real, "image_mean": image, "text_mean": real & ~image}
        self.shared, self.count = {}, {name: mask.sum(1) for name, mask in self.own.items()}
        if prefix is not None:
            every = torch.ones_like(prefix.image_bt)
            self.shared = {"mean": every, "max": every, "image_mean": prefix.image_bt, "text_mean": ~prefix.image_bt}
            self.count = {name: n + self.shared[name].sum(1)[prefix.owner_n] for name, n in self.count.items()}
        for name in set(self.poolings) & {"image_mean", "text_mean"}:
            if bool((self.count[name] == 0).any()):
                raise ValueError(f"pooling {name!r}: an example has no such tokens")
        self.place = {name: self._place(name) for name in self.poolings if name not in self.own}

    def _place(self, name: str) -> torch.Tensor:
        """(n,) index of a single token in prefix and own tokens, one after the other."""
        index = {"cls": 0, "last": -1}.get(name)
        index = int(name.removeprefix("token:")) if index is None else index
        total, before = self.count["mean"], self.prefix.length if self.prefix else 0
        wanted = total + index if index < 0 else torch.full_like(total, index)
        if bool(((wanted < 0) | (wanted >= total)).any()):
            raise ValueError(f"pooling {name!r} needs more tokens than the shortest example has ({int(total.min())})")
        real = self.own["mean"]
        own = ((real.cumsum(1) == (wanted - before)[:, None] + 1) & real).int().argmax(1)
        return torch.where(wanted < before, wanted, own + before)

    def prefix_part(self, hidden_btd: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the prefix adds to each pooling of one layer: (b, d) sums and maxima, (n, d) single tokens."""
        part = {}
        for name in self.poolings:
            if name in self.place:
                at = self.place[name].clamp(max=self.prefix.length - 1)
                part[name] = hidden_btd[self.prefix.owner_n, at].float()
            else:
                part[name] = _total(hidden_btd, self.shared[name], name)
        return part

    def pool(self, hidden_ntd: torch.Tensor, part: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Pool one layer's hidden states (n, t, d), of any floating type, to (n, d) float32 a pooling.

        `part` is what :meth:`prefix_part` said of the same layer; sums are in float32.
        """
        pooled = {}
        for name in self.poolings:
            if name in self.place:
                before = self.prefix.length if self.prefix else 0
                at = (self.place[name] - before).clamp(min=0)
                values = hidden_ntd[torch.arange(len(at), device=at.device), at].float()
                pooled[name] = torch.where((self.place[name] < before)[:, None], part[name], values) if part else values
                continue
            values = _total(hidden_ntd, self.own[name], name)
            if part:
                shared = part[name][self.prefix.owner_n]
                values = torch.maximum(values, shared) if name == "max" else values + shared
            pooled[name] = values if name == "max" else values / self.count[name][:, None]
        return pooled


def _total(hidden: torch.Tensor, mask: torch.Tensor, name: str) -> torch.Tensor:
    if name == "max":
        return hidden.masked_fill(~mask[..., None], -torch.inf).amax(1).float()
    return torch.einsum("ntd,nt->nd", hidden.float(), mask.float())
