"""A forward pass that is kept, to run again from any layer on with something changed.

What comes before the change does not run again: the blocks before it hand back what they gave, and
so does the image encoder. With a key-value cache an image runs once for all its prompts, and again
only where its own tokens are changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from probekit.models.architectures import has_text_encoder
from probekit.models.attention import AttentionCut, cut_attention
from probekit.models.batches import (
    batch_images,
    batch_tokens,
    shared_prefix_length,
    stack_padded,
)
from probekit.models.devices import copy_to
from probekit.models.forward import (
    cache_arguments,
    continue_positions,
    forward_options,
)
from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage

TOKEN_SETS = ("image", "text", "last")

# From (..., d) hidden states to changed ones.
Change = Callable[[torch.Tensor], torch.Tensor]


class NoReplay(ValueError):
    """Why passes of a model cannot be kept and run again, in one line."""


@dataclass
class _RecordedCall:
    """One call of the decoder, with what entered its first block and what each block returned."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    entering: torch.Tensor | None = None
    last: torch.Tensor | None = None

    def states(self, layer: int) -> torch.Tensor:
        """(n, t, d) of a layer, by its number."""
        if layer == 0:
            hidden = self.entering
        elif layer > len(self.outputs) - 1:
            hidden = self.last
        else:
            hidden = _hidden_of(self.outputs[layer - 1])
        if hidden is None:
            raise NoReplay("its decoder did not run")
        return hidden


class _Segment(NamedTuple):
    """Tokens that run in one call, from a place in the sequence on.

    `cache` holds what stands before them; None where nothing does.
    """

    call: _RecordedCall
    start: int
    cache: Any = None


class KeptPass:
    """A batch of images with their prompts that has run, and can run again with changes.

    The plain way has one segment, whole prompts with their images. The shared way has three: what
    stands up to the end of the image, once per image; the text after it; and the last token alone.
    A change runs again from the first segment that it touches.

    Parameters
    ----------
    vlm : Vlm
    prepared : sequence of PreparedImage
        b images of one shape (:func:`probekit.models.batches.input_shape`), with n prompts in all.
    way : {"shared", "plain"}
        See :data:`probekit.models.forward.WAYS`.

    Attributes
    ----------
    vlm, way
    token_sets : dict of str to Tensor
        For each of :data:`TOKEN_SETS` (n, t) bool on the model's device, True at its tokens, in the
        order in which the segments stand: ``"image"``, ``"text"`` (the tokens after the image) and
        ``"last"`` (after it the answer begins). Tokens before the image are in none of them: they
        see nothing that differs between examples.

    Raises
    ------
    NoReplay
        Its passes cannot be kept.
    ValueError
        The prompts of an image differ before it ends, so that it cannot be shared.
    """

    def __init__(self, vlm: Vlm, prepared: Sequence[PreparedImage], *, way: str) -> None:
        refusal = why_no_replay(vlm)
        if refusal:
            raise NoReplay(refusal)
        self.vlm = vlm
        self.way = way
        self._rows = [row for image in prepared for row in image.tokens]
        self._prompt_counts = [len(image.tokens) for image in prepared]
        self._segments: list[_Segment] = []
        with torch.inference_mode():
            if way == "shared":
                self.token_sets = self._run_shared(prepared)
            else:
                self.token_sets = self._run_plain(prepared)
        last_nt = self.token_sets["last"]
        self._last_place_n = last_nt.int().argmax(1) - self._segments[-1].start
        self._row_n = torch.arange(len(last_nt), device=vlm.device)

    @property
    def _owner_n(self) -> torch.Tensor:
        """(n,) which image each prompt belongs to, on the CPU."""
        return torch.repeat_interleave(torch.tensor(self._prompt_counts))

    # ------------------------------------------------------------------------------ the first run

    def _run_plain(self, prepared: Sequence[PreparedImage]) -> dict[str, torch.Tensor]:
        vlm = self.vlm
        tokens = batch_tokens(vlm, self._rows)
        images = batch_images(vlm, prepared, counts=self._prompt_counts)
        with _record(vlm) as call:
            vlm.model(
                **vlm.to_device(tokens),
                **vlm.to_device(images),
                **forward_options(vlm, len(self._rows)),
            )
        self._segments = [_Segment(call, start=0)]
        image_nt = stack_padded([mask for image in prepared for mask in image.image_masks])
        length_n = torch.tensor([len(row["input_ids"]) for row in self._rows])
        end_n = torch.tensor([image.prefix_length for image in prepared])[self._owner_n]
        place_t = torch.arange(image_nt.shape[1])
        return self._on_device(
            image=image_nt.bool(),
            text=(place_t >= end_n[:, None]) & (place_t < length_n[:, None]),
            last=place_t == (length_n - 1)[:, None],
        )

    def _run_shared(self, prepared: Sequence[PreparedImage]) -> dict[str, torch.Tensor]:
        from transformers import DynamicCache  # takes seconds

        vlm = self.vlm
        shared_prefix_length(prepared)  # raises where prompts differ before the image ends
        length = prepared[0].prefix_length
        prefix_rows = [
            {name: values[:length] for name, values in image.tokens[0].items()}
            for image in prepared
        ]
        cache = DynamicCache(config=vlm.stack.config)
        with _record(vlm) as call:
            vlm.model(
                **vlm.to_device(batch_tokens(vlm, prefix_rows)),
                **vlm.to_device(batch_images(vlm, prepared)),
                **cache_arguments(vlm.model, cache),
            )
        self._segments = [_Segment(call, start=0)]
        owner_n = copy_to(vlm.device, self._owner_n)
        cache.reorder_cache(owner_n)  # type: ignore[arg-type]  # int64 is what a LongTensor holds
        position_n = _next_positions(call.kwargs.get("position_ids"), owner_n, length=length)
        ids = [row["input_ids"][length:] for row in self._rows]
        middle_nt = stack_padded([np.ones(len(one) - 1, dtype=int) for one in ids])
        mask_nt = torch.cat([middle_nt.new_ones(len(ids), length), middle_nt], 1)
        if middle_nt.shape[1]:
            step_t = torch.arange(middle_nt.shape[1], device=vlm.device)
            self._run_segment(
                stack_padded([one[:-1] for one in ids]),
                mask_nt,
                position_ids=position_n[..., None] + step_t,
                cache=cache,
            )
        last_n1 = torch.tensor([[int(one[-1])] for one in ids])
        step_n = copy_to(vlm.device, middle_nt.sum(1))
        self._run_segment(
            last_n1,
            torch.cat([mask_nt, torch.ones_like(last_n1)], 1),
            position_ids=(position_n + step_n)[..., None],
            cache=cache,
        )
        image_nt = stack_padded([image.image_masks[0][:length] for image in prepared])
        image_nt = image_nt[self._owner_n].bool()
        none_n1 = torch.zeros_like(last_n1).bool()
        return self._on_device(
            image=torch.cat([image_nt, torch.zeros_like(middle_nt).bool(), none_n1], 1),
            text=torch.cat([torch.zeros_like(image_nt), middle_nt.bool(), ~none_n1], 1),
            last=torch.cat([torch.zeros_like(mask_nt).bool(), ~none_n1], 1),
        )

    def _run_segment(
        self,
        ids_nt: torch.Tensor,
        mask_nt: torch.Tensor,
        *,
        position_ids: torch.Tensor,
        cache: Any,
    ) -> None:
        """Run more tokens of all prompts after what is in the cache, which they are added to."""
        vlm = self.vlm
        before = _fork(cache)
        with _record(vlm) as call:
            vlm.stack(
                input_ids=copy_to(vlm.device, ids_nt),
                attention_mask=copy_to(vlm.device, mask_nt),
                position_ids=position_ids,
                **cache_arguments(vlm.stack, cache),
            )
        start = mask_nt.shape[1] - ids_nt.shape[1]
        self._segments.append(_Segment(call, start=start, cache=before))

    def _on_device(self, **masks: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: copy_to(self.vlm.device, mask_nt) for name, mask_nt in masks.items()}

    # -------------------------------------------------------------------------------- other runs

    def last_states(self, layer: int) -> torch.Tensor:
        """Return (n, d) float32 states of each prompt's last token, as the model has them."""
        return self._pick_last(self._segments[-1].call.states(layer))

    @torch.inference_mode()
    def rerun(
        self, layer: int, changes: Mapping[str, Change], *, cut: AttentionCut | None = None
    ) -> dict[int, torch.Tensor]:
        """Run everything after a layer again, with the states of some of its tokens changed.

        Parameters
        ----------
        layer : int
            Number of the layer, from 0 (the embeddings) to the number of blocks.
        changes : mapping of str to callable
            For some of :data:`TOKEN_SETS` what becomes of their states; each gets (..., d) and
            returns the same shape.
        cut : AttentionCut or None
            Attention that is taken away meanwhile, in blocks from `layer` on.

        Returns
        -------
        dict of int to Tensor
            (n, d) float32 states of each prompt's last token, of this layer and all later ones.
        """
        touched_nt = torch.zeros_like(self.token_sets["last"])
        for name in changes:
            touched_nt |= self.token_sets[name]
        if cut is not None:
            touched_nt |= cut.query_nt
        columns = touched_nt.any(0).nonzero()
        first_column = int(columns[0]) if len(columns) else self._segments[-1].start
        if layer == len(self.vlm.blocks):  # nothing comes after it, so tokens are on their own
            last = self._segments[-1]
            return {layer: self._pick_last(self._changed(last, layer, changes))}
        first = max(k for k, one in enumerate(self._segments) if one.start <= first_column)
        cache = None
        states: dict[int, torch.Tensor] = {}

        def take(number: int, hidden_ntd: torch.Tensor) -> None:
            states[number] = self._pick_last(hidden_ntd)

        for place in range(first, len(self._segments)):
            segment = self._segments[place]
            cache = self._cache_before(segment, cache, layer, after=place - 1)
            with ExitStack() as contexts:
                if cut is not None:
                    contexts.enter_context(cut_attention(self.vlm, cut, start=segment.start))
                self._replay(
                    segment,
                    layer,
                    self._changed(segment, layer, changes),
                    cache=cache,
                    take=take if segment is self._segments[-1] else None,
                )
        return states

    def _cache_before(self, segment: _Segment, cache: Any, layer: int, *, after: int) -> Any:
        """Return the cache that a segment runs with, after the one before it ran again."""
        if segment.cache is None:
            return self._empty_cache() if len(self._segments) > 1 else None
        plain = _fork(segment.cache)
        if cache is None:
            return plain
        if after == 0:
            owner_n = copy_to(self.vlm.device, self._owner_n)
            cache.reorder_cache(owner_n)
        # Blocks before the layer did not run; masks are as long as the first one's keys.
        cache.layers[:layer] = plain.layers[:layer]
        return cache

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache  # takes seconds

        return DynamicCache(config=self.vlm.stack.config)

    def _changed(
        self, segment: _Segment, layer: int, changes: Mapping[str, Change]
    ) -> torch.Tensor:
        """Return a layer's states of a segment, with those of some tokens changed."""
        hidden = segment.call.states(layer)
        end = segment.start + hidden.shape[1]
        for name, change in changes.items():
            mask_nt = self.token_sets[name][:, segment.start : end]
            if len(mask_nt) != len(hidden):  # one row per image
                starts = np.cumsum([0, *self._prompt_counts[:-1]])
                mask_nt = mask_nt[copy_to(self.vlm.device, torch.from_numpy(starts))]
            if name == "image" or segment.start or len(self._segments) == 1:
                hidden = torch.where(mask_nt[..., None], change(hidden), hidden)
        return hidden

    def _replay(
        self,
        segment: _Segment,
        layer: int,
        states_ntd: torch.Tensor,
        *,
        cache: Any,
        take: Callable[[int, torch.Tensor], None] | None,
    ) -> None:
        """Call the decoder again, with the blocks before a layer standing still."""
        vlm = self.vlm
        kwargs = dict(segment.call.kwargs)
        if cache is not None:
            kwargs |= cache_arguments(vlm.stack, cache)
        with ExitStack() as contexts:
            if take is not None:
                take(layer, states_ntd)
                contexts.enter_context(_later_layers(vlm, layer, take))
            if layer == 0:
                contexts.enter_context(_replaced_input(vlm.blocks[0], states_ntd))
            outputs = segment.call.outputs
            contexts.enter_context(_standing_still(vlm.blocks, outputs, layer, states_ntd))
            vlm.stack(*segment.call.args, **kwargs)

    def _pick_last(self, hidden_ntd: torch.Tensor) -> torch.Tensor:
        return hidden_ntd[self._row_n, self._last_place_n].float()


def why_no_replay(vlm: Vlm) -> str:
    """Return in a line why passes of a model cannot be run again with changes; "" if they can."""
    if has_text_encoder(vlm.config):
        return "prompts are read by an encoder"
    if vlm.special_case.stream_axis is not None:
        return "layers have parallel streams"
    return ""


def _next_positions(
    position_ids: torch.Tensor | None, owner_n: torch.Tensor, *, length: int
) -> torch.Tensor:
    """Return the position of the token after a prefix, (n,) or (axes, n)."""
    following = continue_positions(position_ids, owner_n, length=1)
    if following is None:
        return torch.full_like(owner_n, length)
    return following[..., 0]


# ------------------------------------------------------------------------------------- the hooks


@contextmanager
def _record(vlm: Vlm) -> Iterator[_RecordedCall]:
    """Keep the call of the decoder inside the context."""
    call = _RecordedCall()

    def keep_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call.args = args
        call.kwargs = dict(kwargs)

    def keep_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call.entering = [*args, *kwargs.values()][0]

    def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
        call.outputs.append(output)

    def keep_last(module: nn.Module, args: tuple, output: Any) -> None:
        call.last = _hidden_of(output)

    handles = [
        vlm.stack.register_forward_pre_hook(keep_call, with_kwargs=True),
        vlm.blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True),
        vlm.stack.register_forward_hook(keep_last),
        *(block.register_forward_hook(keep_output) for block in vlm.blocks),
    ]
    with _removed_at_the_end(handles):
        yield call
    if len(call.outputs) != len(vlm.blocks):
        raise NoReplay(f"{len(call.outputs)} of its {len(vlm.blocks)} blocks ran")


def _hidden_of(output: Any) -> torch.Tensor:
    hidden = getattr(output, "last_hidden_state", output)
    return hidden[0] if isinstance(hidden, tuple) else hidden


@contextmanager
def _removed_at_the_end(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _standing_still(
    blocks: nn.ModuleList, outputs: Sequence[Any], layer: int, states_ntd: torch.Tensor
) -> Iterator[None]:
    """Make blocks before a layer hand back what they gave, the last of them these states."""

    def hand_back(output: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: output

    try:
        for number, (block, output) in enumerate(zip(blocks[:layer], outputs, strict=False), 1):
            if number == layer:
                is_tuple = isinstance(output, tuple)
                output = (states_ntd, *output[1:]) if is_tuple else states_ntd
            block.forward = hand_back(output)
        yield
    finally:
        for block in blocks[:layer]:
            vars(block).pop("forward", None)


@contextmanager
def _replaced_input(block: nn.Module, states_ntd: torch.Tensor) -> Iterator[None]:
    """Have a block get these states as its first argument."""

    def replace(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        if args:
            return (states_ntd, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): states_ntd}

    handle = block.register_forward_pre_hook(replace, with_kwargs=True)
    with _removed_at_the_end([handle]):
        yield


@contextmanager
def _later_layers(
    vlm: Vlm, layer: int, take: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Hand over the layers after one."""

    def take_output(number: int) -> Callable[..., None]:
        return lambda module, args, output: take(number, _hidden_of(output))

    last = len(vlm.blocks)
    handles = [vlm.stack.register_forward_hook(take_output(last))]
    for number in range(layer + 1, last):
        handles.append(vlm.blocks[number - 1].register_forward_hook(take_output(number)))
    with _removed_at_the_end(handles):
        yield


def _fork(cache: Any) -> Any:
    """Copy a cache so that a pass that adds to the copy leaves the original as it is."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # takes seconds

    fork = copy.copy(cache)
    fork.layers = [
        # These put longer tensors in the place of theirs; others write into them.
        copy.copy(one)
        if type(one) in (DynamicLayer, DynamicSlidingWindowLayer)
        else copy.deepcopy(one)
        for one in cache.layers
    ]
    return fork
