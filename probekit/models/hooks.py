"""Hooks that hand over each layer's hidden states during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from probekit.models.architectures import merge_streams
from probekit.models.load import Vlm

Take = Callable[[str, torch.Tensor], None]


@contextmanager
def tap_decoder(vlm: Vlm, take: Take) -> Iterator[None]:
    """Hand over the decoder's layers during a forward pass inside the context.

    Parameters
    ----------
    vlm : Vlm
    take : callable
        Called as ``take(layer, hidden_ntd)`` for each of `vlm.layers`, in their order.
    """
    latest: dict[str, torch.Tensor] = {}

    def take_merged(layer: str, hidden: torch.Tensor) -> None:
        hidden_ntd = merge_streams(hidden, vlm.special_case, width=vlm.width)
        if vlm.special_case.skips_blocks:
            # What enters a block that does not run leaves it unchanged.
            for entered, entering_ntd in latest.items():
                start = vlm.layers.index(entered) + 1
                for skipped in vlm.layers[start : vlm.layers.index(layer)]:
                    take(skipped, entering_ntd)
            latest.clear()
            latest[layer] = hidden_ntd
        take(layer, hidden_ntd)

    handles = _add_hooks(vlm.blocks, take_merged, last_module=vlm.stack, layers=vlm.layers)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tap_experts(vlm: Vlm, take: Take, *, rows: int) -> Iterator[None]:
    """Hand over which experts tokens are routed to, during a forward pass inside the context.

    Parameters
    ----------
    vlm : Vlm
    take : callable
        Called as ``take(layer, share_nte)`` for each of the layers ``experts.k``: of a token's
        choices the share of each of the e experts, float32.
    rows : int
        n, the number of prompts in the pass.
    """

    def take_choices(layer: str, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        chosen = [*args, *kwargs.values()][1]
        if chosen.is_floating_point() or chosen.ndim != 2 or len(chosen) % rows:
            raise ValueError(
                f"{vlm.name}, {layer}: its experts are not given the number of an expert for each "
                "token: leave the stage experts out"
            )
        # Some models have one more number, for a token that no expert of this device gets.
        experts = int(module.num_experts)
        counts = nn.functional.one_hot(chosen, experts + 1).sum(-2)[..., :-1]
        take(layer, (counts.float() / chosen.shape[-1]).unflatten(0, (rows, -1)))

    handles = [
        module.register_forward_pre_hook(partial(take_choices, layer), with_kwargs=True)
        for layer, module in vlm.experts.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tap_encoder(vlm: Vlm, take: Take, *, image_count: int, with_blocks: bool) -> Iterator[None]:
    """Hand over the image encoder's layers during a forward pass inside the context.

    Parameters
    ----------
    vlm : Vlm
    take : callable
        Called as ``take(layer, hidden_bpd)`` for ``projector``, the vectors that the decoder gets.
    image_count : int
        b, the number of images in the pass.
    with_blocks : bool
        Call it for each of `vlm.vision_layers`, too, where there are some.
    """

    def take_by_image(layer: str, hidden: torch.Tensor | Sequence[torch.Tensor]) -> None:
        take(layer, split_by_image(hidden, image_count))

    handles = []
    if with_blocks and vlm.vision_blocks is not None:
        handles = _add_hooks(
            vlm.vision_blocks,
            take_by_image,
            last_module=vlm.vision_blocks[-1],
            layers=vlm.vision_layers,
        )

    def take_vectors(output: Any) -> None:
        vectors = getattr(output, "pooler_output", output)
        if vectors is not None:  # some architectures project them later, outside of this method
            take_by_image("projector", vectors)

    try:
        with _tap_method(vlm.features_method, take_vectors):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _tap_method(place: tuple[Any, str] | None, take: Callable[[Any], None]) -> Iterator[None]:
    """Hand over what a method of an object returns inside the context."""
    if place is None:
        yield
        return
    owner, name = place
    original = getattr(owner, name)

    @wraps(original)
    def call_and_take(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        take(output)
        return output

    had_it = name in vars(owner)
    setattr(owner, name, call_and_take)
    try:
        yield
    finally:
        if had_it:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def _add_hooks(
    blocks: Any,
    take: Callable[[str, Any], None],
    *,
    last_module: nn.Module,
    layers: Sequence[str],
) -> list[RemovableHandle]:
    """Take what enters the first block, and what leaves each other block and `last_module`."""

    def take_input(layer: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first_argument = [*args, *kwargs.values()][0]
        take(layer, first_argument)

    def take_output(layer: str, module: nn.Module, args: tuple, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", output)
        take(layer, hidden[0] if isinstance(hidden, tuple) else hidden)

    first_hook = partial(take_input, layers[0])
    handles = [blocks[0].register_forward_pre_hook(first_hook, with_kwargs=True)]
    modules = [*list(blocks)[:-1], last_module]
    for layer, module in zip(layers[1:], modules, strict=True):
        handles.append(module.register_forward_hook(partial(take_output, layer)))
    return handles


def split_by_image(hidden: torch.Tensor | Sequence[torch.Tensor], image_count: int) -> torch.Tensor:
    """Lay out what an encoder made of b images of one shape by image.

    Parameters
    ----------
    hidden : Tensor or sequence of Tensor
        (b, p, d), (b times tiles, p, d), (b times tiles, height, width, d), all patches one after
        another as (total, d) or (1, total, d), or a list of such tensors.
    image_count : int
        b.

    Returns
    -------
    Tensor
        (b, p, d).

    Raises
    ------
    ValueError
        The images do not have the same number of patches.
    """
    if isinstance(hidden, torch.Tensor):
        patches = hidden.reshape(-1, hidden.shape[-1])
    else:
        patches = torch.cat([part.reshape(-1, part.shape[-1]) for part in hidden])
    if len(patches) % image_count:
        raise ValueError(
            f"{len(patches)} patches cannot be split evenly among {image_count} images of one shape"
        )
    return patches.unflatten(0, (image_count, -1))
