"""Hooks that hand over each layer's hidden states during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from probekit.models.architectures import merge_streams
from probekit.models.load import Vlm

Take = Callable[[str, torch.Tensor], None]


@contextmanager
def decoder_tapped(vlm: Vlm, take: Take) -> Iterator[None]:
    """Within the context a forward pass calls ``take(layer, hidden_ntd)`` for each layer of the decoder."""

    def merged(layer: str, hidden: torch.Tensor) -> None:
        take(layer, merge_streams(hidden, vlm.special, vlm.width))

    handles = _hook(vlm.blocks, vlm.stack, vlm.layers, merged)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def encoder_tapped(vlm: Vlm, b: int, take: Take) -> Iterator[None]:
    """The same for the image encoder: ``take(layer, hidden_bpd)``, b images with p patches.

    Layers are ``vision.00``, what enters its first block, ``vision.k``, the output of block k, and ``projector``, the
    vectors that the decoder gets.
    """

    def split(name: str, hidden: torch.Tensor | Sequence[torch.Tensor]) -> None:
        take(name, by_image(hidden, b))

    handles = _hook(vlm.vision[1], vlm.vision[1][-1], vlm.vision_layers, split) if vlm.vision else []
    honest = getattr(vlm.model, "get_image_features", None)

    def noting(*arguments, **options):
        output = honest(*arguments, **options)
        handed = getattr(output, "pooler_output", output)
        if handed is not None:  # a few project later, outside
            split("projector", handed)
        return output

    if honest is not None:
        vlm.model.get_image_features = noting
    try:
        yield
    finally:
        vars(vlm.model).pop("get_image_features", None)
        for handle in handles:
            handle.remove()


def _hook(blocks: torch.nn.ModuleList, end: torch.nn.Module, layers: Sequence[str], take: Take) -> list:
    """Hooks on what enters the first block, on what leaves each but the last, and on what leaves `end`."""

    def before(layer, module, args, kwargs):
        take(layer, [*args, *kwargs.values()][0])

    def after(layer, module, args, output):
        hidden = getattr(output, "last_hidden_state", output)
        take(layer, hidden[0] if isinstance(hidden, tuple) else hidden)

    handles = [blocks[0].register_forward_pre_hook(partial(before, layers[0]), with_kwargs=True)]
    return handles + [module.register_forward_hook(partial(after, name))
                      for name, module in zip(layers[1:], [*blocks[:-1], end], strict=True)]


def by_image(hidden: torch.Tensor | Sequence[torch.Tensor], b: int) -> torch.Tensor:
    """Lay out what an encoder made of b images of one shape as (b, p, d).

    Encoders return (b, p, d), (b times tiles, p, d), (b times tiles, height, width, d), all patches one after another
    as (total, d) or (1, total, d), or a list of such tensors.

    Raises
    ------
    ValueError
        They cannot be dealt out evenly.
    """
    if not torch.is_tensor(hidden):
        hidden = torch.cat([part.reshape(-1, part.shape[-1]) for part in hidden])
    flat = hidden.reshape(-1, hidden.shape[-1])
    if len(flat) % b:
        raise ValueError(f"{len(flat)} patches cannot be dealt out to {b} images of one shape")
    return flat.unflatten(0, (b, -1))
