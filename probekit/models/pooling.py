"""Pooling: how the tokens of one layer become one vector per example."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probekit.models.devices import copy_to

NAMED_POOLINGS = ("mean", "max", "image_mean", "text_mean", "suffix_mean", "cls", "last")
# Those that are of a prompt's text alone.
TEXT_POOLINGS = ("text_mean", "suffix_mean")
POOLINGS = (*NAMED_POOLINGS, "token:<i>")


def check_pooling(pooling: str) -> str:
    """Return `pooling` if it is the name of a pooling.

    Raises
    ------
    ValueError
        It is not; the message lists :data:`POOLINGS`.
    """
    if pooling in NAMED_POOLINGS or re.fullmatch(r"token:-?\d+", pooling):
        return pooling
    raise ValueError(
        f"unknown pooling {pooling!r}: take one of {', '.join(POOLINGS)} with a whole number for "
        "<i>, counted from the first real token (negative: from the end)"
    )


@dataclass(frozen=True)
class Prefix:
    """Tokens that several examples share.

    Attributes
    ----------
    image_bt : Tensor
        (b, t) bool on the CPU, True at image tokens. Every token of a prefix is real.
    owner_n : Tensor
        (n,) int on the CPU, which of the b prefixes stands before an example's suffix.
    """

    image_bt: torch.Tensor
    owner_n: torch.Tensor

    @property
    def length(self) -> int:
        """Number of tokens t of each prefix."""
        return self.image_bt.shape[1]


class Pooler:
    """Pools one layer after another over the same tokens.

    All tokens of an example are in one pass, or a prefix that several share was run before. What
    depends on lengths alone is worked out on the CPU, so that nothing waits for a GPU.

    Parameters
    ----------
    poolings : sequence of str
        Out of :data:`POOLINGS`.
    mask_nt : Tensor
        (n, t) on the CPU, 1 or True at the examples' real tokens, with padding on either side. With
        a prefix, only their suffixes.
    image_nt : Tensor or None
        (n, t) bool on the CPU, True at image tokens; None where there are none.
    prefix : Prefix or None
        What stands before the suffixes; None where `mask_nt` covers the whole sequence.
    device : str
        Where the hidden states will be.

    Raises
    ------
    ValueError
        There is no such pooling, or an example lacks the tokens of a mean, or the i-th token.
    """

    def __init__(
        self,
        poolings: Sequence[str],
        mask_nt: torch.Tensor,
        *,
        image_nt: torch.Tensor | None = None,
        prefix: Prefix | None = None,
        device: str = "cpu",
    ) -> None:
        self.poolings = [check_pooling(name) for name in poolings]
        self.prefix = prefix
        real_nt = mask_nt.bool()
        image_nt = torch.zeros_like(real_nt) if image_nt is None else image_nt & real_nt
        # By pooling: which tokens count, and how many they are in prefix and suffix together.
        masks_nt = _masks_by_pooling(real_nt, image_nt)
        counts_n = {name: mask_nt.sum(1) for name, mask_nt in masks_nt.items()}
        prefix_masks_bt: dict[str, torch.Tensor] = {}
        if prefix is not None:
            real_bt = torch.ones_like(prefix.image_bt)
            prefix_masks_bt = _masks_by_pooling(real_bt, prefix.image_bt)
            for name, mask_bt in prefix_masks_bt.items():
                counts_n[name] = counts_n[name] + mask_bt.sum(1)[prefix.owner_n]
        self._check_means(counts_n)
        places_n = {
            name: self._find_token(name, real_nt, counts_n["mean"])
            for name in self.poolings
            if name not in masks_nt
        }
        # Which single tokens lie in a shared prefix for some example: "last" never does.
        self._picked_in_prefix = {
            name
            for name, place_n in places_n.items()
            if bool((place_n < self._prefix_length).any())
        }
        self._masks_nt = self._on_device(masks_nt, device)
        self._counts_n = self._on_device(counts_n, device)
        self._prefix_masks_bt = self._on_device(prefix_masks_bt, device)
        self._places_n = self._on_device(places_n, device)
        self._suffix_places_n = {
            name: (place_n - self._prefix_length).clamp(min=0)
            for name, place_n in self._places_n.items()
        }
        self._owner_n = copy_to(device, prefix.owner_n) if prefix else None
        self._row_n = copy_to(device, torch.arange(len(mask_nt)))

    @property
    def _prefix_length(self) -> int:
        return self.prefix.length if self.prefix else 0

    def _on_device(self, tensors: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
        """Copy what belongs to a pooling that is wanted."""
        return {
            name: copy_to(device, tensor)
            for name, tensor in tensors.items()
            if name in self.poolings
        }

    def _check_means(self, counts_n: dict[str, torch.Tensor]) -> None:
        for name in ("image_mean", *TEXT_POOLINGS):
            if name in self.poolings and bool((counts_n[name] == 0).any()):
                raise ValueError(f"pooling {name!r}: an example has no such tokens")

    def _find_token(
        self, pooling: str, real_nt: torch.Tensor, total_n: torch.Tensor
    ) -> torch.Tensor:
        """(n,) place of a single token in the sequence of prefix and suffix."""
        index = _token_index(pooling)
        wanted_n = total_n + index if index < 0 else torch.full_like(total_n, index)
        if bool(((wanted_n < 0) | (wanted_n >= total_n)).any()):
            raise ValueError(
                f"pooling {pooling!r} needs more tokens than the shortest example has "
                f"({int(total_n.min())})"
            )
        ordinal_nt = real_nt.cumsum(1)  # 1 at an example's first real token
        is_wanted_nt = (ordinal_nt == (wanted_n - self._prefix_length)[:, None] + 1) & real_nt
        place_n = is_wanted_nt.int().argmax(1)
        return torch.where(wanted_n < self._prefix_length, wanted_n, place_n + self._prefix_length)

    def pool_prefix(self, hidden_btd: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pool one layer's hidden states of the prefixes.

        Parameters
        ----------
        hidden_btd : Tensor
            (b, t, d).

        Returns
        -------
        dict of str to Tensor
            For each pooling what :meth:`pool` needs: (b, d) sums or maxima, (n, d) single tokens
            where some of them lie in the prefixes.

        Raises
        ------
        ValueError
            There is no prefix.
        """
        if self.prefix is None:
            raise ValueError("this pooler has no prefix")
        pooled = {}
        for name in self.poolings:
            if name in self._picked_in_prefix:
                place_n = self._places_n[name].clamp(max=self.prefix.length - 1)
                pooled[name] = hidden_btd[self._owner_n, place_n].float()
            elif name not in self._places_n:
                pooled[name] = _reduce(hidden_btd, self._prefix_masks_bt[name], pooling=name)
        return pooled

    def pool(
        self, hidden_ntd: torch.Tensor, pooled_prefix: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Pool one layer's hidden states; sums are in float32.

        Parameters
        ----------
        hidden_ntd : Tensor
            (n, t, d) of any floating type.
        pooled_prefix : dict of str to Tensor or None
            What :meth:`pool_prefix` returned for the same layer; None without a prefix.

        Returns
        -------
        dict of str to Tensor
            For each pooling (n, d) float32.
        """
        pooled = {}
        for name in self.poolings:
            prefix_values = pooled_prefix.get(name) if pooled_prefix else None
            if name in self._places_n:
                pooled[name] = self._pick(hidden_ntd, name, prefix_values)
            else:
                pooled[name] = self._pool_tokens(hidden_ntd, name, prefix_values)
        return pooled

    def _pick(
        self, hidden_ntd: torch.Tensor, pooling: str, prefix_values_nd: torch.Tensor | None
    ) -> torch.Tensor:
        """(n, d) the token at a place, which lies in the suffix or in the prefix."""
        values_nd = hidden_ntd[self._row_n, self._suffix_places_n[pooling]].float()
        if prefix_values_nd is None:
            return values_nd
        is_in_prefix_n = self._places_n[pooling] < self._prefix_length
        return torch.where(is_in_prefix_n[:, None], prefix_values_nd, values_nd)

    def _pool_tokens(
        self, hidden_ntd: torch.Tensor, pooling: str, prefix_values_bd: torch.Tensor | None
    ) -> torch.Tensor:
        """(n, d) the maximum or the mean over tokens of suffix and prefix."""
        values_nd = _reduce(hidden_ntd, self._masks_nt[pooling], pooling=pooling)
        if prefix_values_bd is not None:
            prefix_values_nd = prefix_values_bd[self._owner_n]
            if pooling == "max":
                values_nd = torch.maximum(values_nd, prefix_values_nd)
            else:
                values_nd = values_nd + prefix_values_nd
        if pooling == "max":
            return values_nd
        return values_nd / self._counts_n[pooling][:, None]


def _masks_by_pooling(real_nt: torch.Tensor, image_nt: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return which tokens each pooling over several tokens takes in.

    The suffix is what stands after the last image token.
    """
    is_after_image_nt = image_nt.cumsum(1) == image_nt.sum(1, keepdim=True)
    return {
        "mean": real_nt,
        "max": real_nt,
        "image_mean": image_nt,
        "text_mean": real_nt & ~image_nt,
        "suffix_mean": real_nt & ~image_nt & is_after_image_nt,
    }


def _token_index(pooling: str) -> int:
    """Which token a pooling picks, negative from the end."""
    if pooling == "cls":
        return 0
    if pooling == "last":
        return -1
    return int(pooling.removeprefix("token:"))


def _reduce(hidden_ntd: torch.Tensor, mask_nt: torch.Tensor, *, pooling: str) -> torch.Tensor:
    """(n, d) the maximum or the sum over the tokens of a mask, whatever the others hold."""
    if pooling == "max":
        return hidden_ntd.masked_fill(~mask_nt[..., None], -torch.inf).amax(1).float()
    left_in_ntd = hidden_ntd.float().masked_fill(~mask_nt[..., None], 0)
    return torch.einsum("ntd,nt->nd", left_in_ntd, mask_nt.float())
