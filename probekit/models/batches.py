"""Prepared images and prompts as one batch: the inputs of a forward pass, and their padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage


def input_shape(prepared: PreparedImage) -> tuple:
    """Return the shape of an image's inputs; images of one shape fit into one batch."""
    shapes = [(name, values.shape[1:]) for name, values in prepared.image_inputs.items()]
    return (prepared.prefix_length, *shapes)


def count_tokens(prepared: Sequence[PreparedImage], way: str) -> int:
    """Count the tokens that the decoder computes for images and their prompts.

    Parameters
    ----------
    prepared : sequence of PreparedImage
    way : str
        Out of :data:`probekit.models.forward.WAYS`.
    """
    total = 0
    for image in prepared:
        lengths = [len(tokens["input_ids"]) for tokens in image.tokens]
        total += sum(lengths)
        if way == "shared":
            total -= image.prefix_length * (len(lengths) - 1)
    return total


def batch_tokens(vlm: Vlm, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Put the tokens of n examples into one batch, padded on the right; nothing is cut off.

    Parameters
    ----------
    vlm : Vlm
    rows : sequence of dict of str to ndarray
        See :attr:`probekit.models.processor.PreparedImage.tokens`.

    Returns
    -------
    dict of str to Tensor
        (n, t, ...) on the CPU, ``attention_mask`` among them.
    """
    batch = {}
    for name in rows[0]:
        padding = vlm.pad_id if name == "input_ids" else 0
        batch[name] = stack_padded([row[name] for row in rows], padding=padding)
    if "attention_mask" not in batch:
        masks = [np.ones(len(row["input_ids"]), dtype=int) for row in rows]
        batch["attention_mask"] = stack_padded(masks)
    return batch


def batch_images(
    vlm: Vlm, prepared: Sequence[PreparedImage], *, counts: Sequence[int] | None = None
) -> dict[str, torch.Tensor]:
    """Put the inputs of b images into one batch, one after the other.

    Parameters
    ----------
    vlm : Vlm
    prepared : sequence of PreparedImage
        Of one shape (:func:`input_shape`).
    counts : sequence of int or None
        How often each image is repeated; None takes each once.

    Returns
    -------
    dict of str to Tensor
        Pixels where those of the images are, the rest on the CPU; the first axis runs over parts of
        images.
    """
    repeated: list[PreparedImage] = []
    for image, count in zip(prepared, counts or [1] * len(prepared), strict=True):
        repeated += [image] * count
    parts = {
        name: [image.image_inputs[name] for image in repeated] for name in prepared[0].image_inputs
    }
    index_input = vlm.special_case.patch_index_input
    if index_input is not None and parts:
        parts[index_input] = _count_through(parts[index_input], parts["pixel_values"])
    batch = {}
    for name, values in parts.items():
        axis = vlm.special_case.pixel_axis if name == "pixel_values" else 0
        batch[name] = torch.cat(values, axis)
    return batch


def _count_through(
    indices: Sequence[torch.Tensor], pixels: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Turn indices of patches within each image into indices within the batch.

    Negative ones mean no patch, and stay.
    """
    shifted = []
    start = 0
    for index, pixel in zip(indices, pixels, strict=True):
        shifted.append(torch.where(index < 0, index, index + start))
        start += pixel.shape[:2].numel()
    return shifted


def stack_padded(arrays: Sequence[np.ndarray], *, padding: int = 0) -> torch.Tensor:
    """Stack (t, ...) arrays, each filled up at the end to the length of the longest."""
    tensors = [torch.from_numpy(array) for array in arrays]
    return pad_sequence(tensors, batch_first=True, padding_value=padding)


def patch_mask(prepared: Sequence[PreparedImage], p: int) -> torch.Tensor:
    """Find the patches that are no padding, from whatever mask the processor gives with the images.

    Parameters
    ----------
    prepared : sequence of PreparedImage
        b images.
    p : int
        Number of patches of each image.

    Returns
    -------
    Tensor
        (b, p) bool, True at real patches.

    Raises
    ------
    ValueError
        A mask says that there is padding, but not at which patches.
    """
    real_bp = torch.ones(len(prepared), p, dtype=torch.bool)
    for i, image in enumerate(prepared):
        for name, mask in _padding_masks(image).items():
            if mask.all():
                continue
            mask_p = _mask_by_patch(mask, p)
            if mask_p is None:
                raise ValueError(
                    f"{name} pads the image, but not patch by patch: leave the stage vision out"
                )
            real_bp[i] &= mask_p
    return real_bp


def _padding_masks(prepared: PreparedImage) -> dict[str, torch.Tensor]:
    """Return those inputs of an image that say what is padding, True where it is not."""
    masks = {
        name: values.bool() for name, values in prepared.image_inputs.items() if "mask" in name
    }
    positions = prepared.image_inputs.get("image_position_ids")
    if positions is not None:
        masks["image_position_ids"] = (positions >= 0).all(-1)
    return masks


def _mask_by_patch(mask: torch.Tensor, p: int) -> torch.Tensor | None:
    """(p,) bool from a mask of patches, or of pixels in square patches; None from any other."""
    if mask.numel() == p:
        return mask.reshape(p)
    side = int((mask.numel() / p) ** 0.5)
    is_square = side * side * p == mask.numel()
    if mask.ndim <= 2 or not is_square or mask.shape[-1] % side:
        return None
    pixels = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return torch.nn.functional.max_pool2d(pixels, side).reshape(p) > 0


def shared_prefix_length(prepared: Sequence[PreparedImage]) -> int:
    """Count the leading tokens that the prompts of each image share.

    The last token of a prompt is never shared, so that every prompt has a suffix.

    Parameters
    ----------
    prepared : sequence of PreparedImage
        b images of one shape.

    Returns
    -------
    int
        The same for all b images.

    Raises
    ------
    ValueError
        The prompts, or something else that belongs to the prefix, differ before the image ends.
    """
    length = min(len(row["input_ids"]) for image in prepared for row in image.tokens) - 1
    for image in prepared:
        first_ids = image.tokens[0]["input_ids"]
        for row in image.tokens[1:]:
            differing = np.flatnonzero(row["input_ids"][:length] != first_ids[:length])
            if len(differing):
                length = min(length, int(differing[0]))
    if length < max(image.prefix_length for image in prepared):
        raise ValueError(
            'prompts differ before the image ends, so that it cannot be shared: take sharing="off"'
        )
    for image in prepared:
        for row in image.tokens[1:]:
            _check_prefix(row, image.tokens[0], length)
    return length


def _check_prefix(row: dict[str, np.ndarray], first: dict[str, np.ndarray], length: int) -> None:
    """Refuse tokens whose prefix differs from the first prompt's.

    Inputs that do not have one entry per token must be the same in full.
    """
    for name, values in row.items():
        if name == "attention_mask":
            continue
        end = length if len(values) == len(row["input_ids"]) else None
        if not np.array_equal(values[:end], first[name][:end]):
            raise ValueError(f"{name} differs between the prompts of an image")
