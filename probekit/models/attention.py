"""Attention that is taken away: some tokens no longer see some others, in some blocks.

It goes through transformers' own interfaces of attention functions and of their masks, so that no
architecture needs code of its own (Geva et al. 2023, arXiv:2304.14767, "attention knockout").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probekit.models.load import Vlm

NAME = "probekit_cut"
CUTTABLE = "sdpa"


class NoCut(ValueError):
    """Why the attention of a model cannot be cut, in one line."""


@dataclass(frozen=True)
class AttentionCut:
    """Which tokens no longer see which, and where.

    A token always sees itself.

    Attributes
    ----------
    blocks : range
        Numbers of the blocks, from 0.
    query_nt : Tensor
        (n, t) bool, True at the tokens that look.
    key_nt : Tensor
        (n, t) bool, True at the tokens that they no longer see.
    """

    blocks: range
    query_nt: torch.Tensor
    key_nt: torch.Tensor

    def of_rows(self, rows: torch.Tensor) -> AttentionCut:
        """Return the cut of some of the n."""
        return AttentionCut(self.blocks, self.query_nt[rows], self.key_nt[rows])

    def of_last_alone(self) -> AttentionCut:
        """Return the cut for one more token after all others, which looks."""
        looks_n1 = torch.ones_like(self.query_nt[:, :1])
        return AttentionCut(
            self.blocks,
            torch.cat([torch.zeros_like(self.query_nt), looks_n1], 1),
            torch.cat([self.key_nt, ~looks_n1], 1),
        )


@dataclass
class _Active:
    """What is cut in the block that runs now."""

    cut: AttentionCut | None = None
    start: int = 0
    calls: int = 0


_active = _Active()


@contextmanager
def cut_attention(vlm: Vlm, cut: AttentionCut, *, start: int = 0) -> Iterator[None]:
    """Take attention away in passes of the decoder inside the context.

    Parameters
    ----------
    vlm : Vlm
    cut : AttentionCut
    start : int
        Place of the first token that runs; those before it are in a cache.

    Raises
    ------
    NoCut
        Blocks of the cut have no attention that goes through transformers' interface.
    """
    config = vlm.stack.config
    original = config._attn_implementation
    if original != CUTTABLE:
        raise NoCut(f"attention is {original!r}, and only {CUTTABLE!r} can be cut")
    _register()

    was_cut: set[nn.Module] = set()

    def switch_on(block: nn.Module, args: tuple) -> None:
        _active.cut = cut
        _active.calls = 0

    def switch_off(block: nn.Module, args: tuple, output: Any) -> None:
        if _active.calls:
            was_cut.add(block)
        _active.cut = None

    _active.start = start
    handles = []
    for number in cut.blocks:
        handles.append(vlm.blocks[number].register_forward_pre_hook(switch_on))
        handles.append(vlm.blocks[number].register_forward_hook(switch_off))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = original
        _active.cut = None
        for handle in handles:
            handle.remove()
    uncut = [number for number in cut.blocks if vlm.blocks[number] not in was_cut]
    if uncut:
        raise NoCut(
            "attention does not go through transformers' interface in block "
            f"{', '.join(map(str, uncut))} of {len(vlm.blocks)}"
        )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface  # takes seconds
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        if _active.cut is not None:
            _active.calls += 1
            attention_mask = _without(
                attention_mask,
                _active.cut,
                start=_active.start,
                lengths=(query.shape[-2], key.shape[-2]),
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def whole_mask(*args: Any, **options: Any) -> torch.Tensor | None:
        return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, whole_mask)


def _without(
    mask: torch.Tensor | None, cut: AttentionCut, *, start: int, lengths: tuple[int, int]
) -> torch.Tensor:
    """Return an attention mask (n, 1, q, k) without what is cut."""
    queries, keys = lengths
    end = start + queries
    query_nq = cut.query_nt[:, start:end]
    # A sliding window may have dropped the first keys.
    key_nk = cut.key_nt[:, end - keys : end]
    cut_nqk = query_nq[:, :, None] & key_nk[:, None, :]
    place_q = torch.arange(queries, device=cut_nqk.device) + keys - queries
    place_k = torch.arange(keys, device=cut_nqk.device)
    cut_nqk = cut_nqk & (place_q[:, None] != place_k)
    if mask is None:
        mask = (place_q[:, None] >= place_k)[None, None]
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return mask & ~cut_nqk[:, None]
    return mask.masked_fill(cut_nqk[:, None], torch.finfo(mask.dtype).min)
