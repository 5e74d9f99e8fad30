"""Pooling: how the tokens of one layer become one vector an example."""

from __future__ import annotations

import re

import torch

NAMES = ("mean", "max", "cls", "last", "token:<i>")


def check(pooling: str) -> str:
    """Return `pooling` if it is a known one; else raise ValueError naming those that are."""
    if pooling in NAMES[:4] or re.fullmatch(r"token:-?\d+", pooling):
        return pooling
    raise ValueError(f"unknown pooling {pooling!r}: take one of {', '.join(NAMES)} with a whole number for <i>, "
                     "counted from the first real token (negative: from the end)")


def pool(hidden_ntd: torch.Tensor, mask_nt: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool one layer's hidden states over the tokens that `mask_nt` marks as real, on either padding side.

    Parameters
    ----------
    hidden_ntd : (n, t, d) of any floating type; summed in float32
    mask_nt : (n, t), 1 or True at real tokens, at least one a row
    pooling : ``mean``, ``max``, ``cls`` (first real token), ``last`` (last real token), ``token:<i>`` (i-th real
        token, negative from the end)

    Returns
    -------
    (n, d) float32

    Raises
    ------
    ValueError
        Unknown pooling, or an example with fewer tokens than ``token:<i>`` needs.
    """
    real = mask_nt.bool()
    if pooling == "mean":
        weight = real.float()
        return torch.einsum("ntd,nt->nd", hidden_ntd.float(), weight) / weight.sum(1, keepdim=True)
    if pooling == "max":
        return hidden_ntd.masked_fill(~real[..., None], -torch.inf).amax(1).float()
    index = {"cls": 0, "last": -1}.get(pooling)
    index = int(check(pooling).removeprefix("token:")) if index is None else index
    count = real.sum(1)
    wanted = count + index if index < 0 else torch.full_like(count, index)
    if bool(((wanted < 0) | (wanted >= count)).any()):
        raise ValueError(f"pooling {pooling!r} needs more tokens than the shortest example has ({int(count.min())})")
    place = ((real.cumsum(1) == wanted[:, None] + 1) & real).int().argmax(1)
    return hidden_ntd[torch.arange(len(hidden_ntd), device=hidden_ntd.device), place].float()
