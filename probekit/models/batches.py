"""Prepared images and prompts as one batch: what goes into a forward pass, and which of it is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage


def input_shape(prepared: PreparedImage) -> tuple:
    """Prepared images of one shape fit into one batch."""
    return (prepared.prefix_length, *((key, values.shape[1:]) for key, values in prepared.image_inputs.items()))


def batch_tokens(vlm: Vlm, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Token arrays of n examples as one batch, padded on the right; nothing is cut off."""
    batch = {}
    for key in rows[0]:
        fill = vlm.processor.tokenizer.pad_token_id or 0 if key == "input_ids" else 0
        length = max(len(row[key]) for row in rows)
        batch[key] = torch.from_numpy(np.stack([
            np.pad(row[key], [(0, length - len(row[key])), *[(0, 0)] * (row[key].ndim - 1)], constant_values=fill)
            for row in rows
        ]))
    if "attention_mask" not in batch:
        batch["attention_mask"] = pad_masks([np.ones(len(row["input_ids"]), int) for row in rows],
                                         batch["input_ids"].shape[1], "cpu")
    return vlm.place(batch)


def batch_images(vlm: Vlm, prepared: Sequence[PreparedImage], counts: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
    """What belongs to the images, each as often as `counts` says, one after the other."""
    order = [i for i, count in enumerate(counts or [1] * len(prepared)) for _ in range(count)]
    parts = {key: [prepared[i].image_inputs[key] for i in order] for key in prepared[0].image_inputs}
    if (counted := vlm.special.counted) and parts:
        starts = np.cumsum([0, *(pixels.shape[:2].numel() for pixels in parts["pixel_values"])]).tolist()
        parts[counted] = [torch.where(part < 0, part, part + start)
                          for part, start in zip(parts[counted], starts, strict=False)]
    axes = {"pixel_values": vlm.special.pixel_axis}
    return vlm.place({key: torch.cat(values, axes.get(key, 0)) for key, values in parts.items()})


def pad_masks(masks: Sequence[np.ndarray], length: int, device: str) -> torch.Tensor:
    rows = [np.pad(mask[:length], (0, max(0, length - len(mask)))) for mask in masks]
    return torch.from_numpy(np.stack(rows)).to(device)


def patch_mask(prepared: Sequence[PreparedImage], p: int) -> torch.Tensor:
    """(b, p) True at patches that are no padding, from whatever mask the processor gives with the images.

    Raises
    ------
    ValueError
        A mask says that there is padding, but not at which patches.
    """
    real = torch.ones(len(prepared), p, dtype=torch.bool)
    for i, one in enumerate(prepared):
        masks = {key: mask for key, mask in one.image_inputs.items() if "mask" in key}
        if "image_position_ids" in one.image_inputs:
            masks["image_position_ids"] = (one.image_inputs["image_position_ids"] >= 0).all(-1)
        for key, mask in masks.items():
            mask = mask.bool()
            side = int((mask.numel() / p) ** 0.5)  # of a patch, where the mask is about pixels
            if mask.all():
                continue
            if mask.numel() == p:
                real[i] &= mask.reshape(p)
            elif mask.ndim > 2 and side * side * p == mask.numel() and not mask.shape[-1] % side:
                pixels = mask.reshape(-1, 1, *mask.shape[-2:]).float()
                real[i] &= torch.nn.functional.max_pool2d(pixels, side).reshape(p) > 0
            else:
                raise ValueError(f"{key} pads the image, but not patch by patch: leave the stage vision out")
    return real


def shared_prefix_length(prepared: Sequence[PreparedImage]) -> int:
    """Number of leading tokens that the prompts of each image share; every prompt keeps a token of its own.

    Raises
    ------
    ValueError
        The prompts, or something else that belongs to the prefix, differ before the image ends.
    """
    p = min(len(row["input_ids"]) for one in prepared for row in one.tokens) - 1
    for one in prepared:
        first = one.tokens[0]["input_ids"]
        for row in one.tokens[1:]:
            differ = np.flatnonzero(row["input_ids"][:p] != first[:p])
            p = min(p, int(differ[0])) if len(differ) else p
    if p < max(one.prefix_length for one in prepared):
        raise ValueError("prompts differ before the image ends, so that it cannot be shared: take sharing=\"off\"")
    for first, row in ((one.tokens[0], row) for one in prepared for row in one.tokens[1:]):
        for key, values in row.items():
            aligned = p if len(values) == len(row["input_ids"]) else None
            if key != "attention_mask" and not np.array_equal(values[:aligned], first[key][:aligned]):
                raise ValueError(f"{key} differs between the prompts of an image")
    return p
