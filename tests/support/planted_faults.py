"""Faults of sharing, planted into a model that has none, and channels that may hide them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import DynamicCache

from probekit.models import hooks
from probekit.models.load import Vlm

FAULTS = (
    "positions +1",
    "positions +10",
    "a quarter of the prefix masked",
    "another image's cache for the first example",
    "another image's cache for a later example",
)
OUTLIERS = ("none", "a channel x 1000", "a constant channel of 3000")
LATER_EXAMPLE = 3


@contextmanager
def plant_fault(vlm: Vlm, fault: str | None) -> Iterator[None]:
    """Let suffixes run wrongly inside the context; None plants nothing."""
    original = DynamicCache.reorder_cache

    def change_suffix(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        is_suffix = kwargs.get("input_ids") is not None
        return (args, _change_inputs(kwargs, fault)) if is_suffix else None

    def reorder_wrongly(cache: DynamicCache, owner_n: torch.Tensor) -> None:
        owner_n = owner_n.clone()
        if fault is not None and fault.startswith("another image's cache"):
            example = 0 if fault.endswith("first example") else LATER_EXAMPLE
            owner_n[example] = (owner_n[example] + 1) % (owner_n.max() + 1)
        original(cache, owner_n)

    handle = vlm.stack.register_forward_pre_hook(change_suffix, with_kwargs=True)
    try:
        with patch.object(DynamicCache, "reorder_cache", reorder_wrongly):
            yield
    finally:
        handle.remove()


def _change_inputs(kwargs: dict[str, Any], fault: str | None) -> dict[str, Any]:
    """The inputs of a suffix, with a fault of positions or of the mask."""
    n, length = kwargs["input_ids"].shape
    mask = kwargs["attention_mask"].clone()
    prefix_length = mask.shape[1] - length
    changed = dict(kwargs)
    if fault is not None and fault.startswith("positions"):
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(prefix_length, mask.shape[1]).expand(n, length)
        changed["position_ids"] = positions + int(fault.split("+")[1])
    if fault == "a quarter of the prefix masked":
        mask[:, : prefix_length // 4] = 0
        changed["attention_mask"] = mask
    return changed


@contextmanager
def plant_outlier(outlier: str) -> Iterator[None]:
    """Give all hidden states a channel far larger than the others, as large decoders have."""
    original = hooks.merge_streams

    def merge_and_enlarge(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        enlarged = original(hidden, *args, **kwargs).clone()
        if outlier == "a channel x 1000":
            enlarged[..., 0] *= 1000
        if outlier == "a constant channel of 3000":
            enlarged[..., 0] += 3000
        return enlarged

    with patch.object(hooks, "merge_streams", merge_and_enlarge):
        yield
