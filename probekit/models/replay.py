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

from probekit.models.attention import AttentionCut, cut_attention
from probekit.models.batches import (
    batch_images,
    batch_tokens,
    shared_prefix_length,
    stack_padded,
)
from probekit.models.devices import copy_to
from probekit.models.load import Vlm
from probekit.models.native import cache_arguments, continue_positions, forward_options
from probekit.models.processor import PreparedImage

TOKEN_SETS = ("image", "image_span", "text", "last")

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

    `cache` holds what stands before them; None where nothing does. `last_place_n` (n,) is where in
    them each prompt's last token is.
    """

    call: _RecordedCall
    start: int
    cache: Any
    last_place_n: torch.Tensor


class KeptPass:
    """A batch of images with their prompts that has run, and can run again with changes.

    What runs again is what a change touches, and what comes after it. In the plain way that is
    whole prompts with their images. In the shared way it is the last token of each prompt, or the
    text after the image, or once per image what stands up to its end as well.

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
        For each of :data:`TOKEN_SETS` (n, t) bool on the model's device, True at its tokens:
        ``"image"``, ``"image_span"`` (what stands between them as well, such as ends of rows),
        ``"text"`` (the tokens after the image) and ``"last"`` (after it the answer begins). Tokens
        before the image are in none of them: they see nothing that differs between examples. Also
        the marks of the images (:class:`probekit.models.processor.PreparedImage`).

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
        self.token_sets = self._find_token_sets(prepared)
        self._row_n = torch.arange(len(self._rows), device=vlm.device)
        self._prefix: _Segment | None = None
        self._last: _Segment | None = None
        with torch.inference_mode():
            if way == "shared":
                self._run_shared(prepared)
            else:
                self._run_plain(prepared)

    @property
    def _owner_n(self) -> torch.Tensor:
        """(n,) which image each prompt belongs to, on the CPU."""
        return torch.repeat_interleave(torch.tensor(self._prompt_counts))

    def _find_token_sets(self, prepared: Sequence[PreparedImage]) -> dict[str, torch.Tensor]:
        image_nt = stack_padded([mask for image in prepared for mask in image.image_masks]).bool()
        length_n = torch.tensor([len(row["input_ids"]) for row in self._rows])
        end_n = torch.tensor([image.prefix_length for image in prepared])[self._owner_n]
        place_t = torch.arange(image_nt.shape[1])
        sets = {
            "image": image_nt,
            "image_span": (image_nt.cumsum(1) > 0) & (place_t < end_n[:, None]),
            "text": (place_t >= end_n[:, None]) & (place_t < length_n[:, None]),
            "last": place_t == (length_n - 1)[:, None],
        }
        for name in prepared[0].marks:
            marked = [
                _spread(image.marks[name], mask_t)
                for image in prepared
                for mask_t in image.image_masks
            ]
            sets[name] = stack_padded(marked).bool()
        self._last_place_n = copy_to(self.vlm.device, length_n - 1)
        return {name: copy_to(self.vlm.device, mask_nt) for name, mask_nt in sets.items()}

    # ------------------------------------------------------------------------------ the first run

    def _run_plain(self, prepared: Sequence[PreparedImage]) -> None:
        vlm = self.vlm
        tokens = batch_tokens(vlm, self._rows)
        images = batch_images(vlm, prepared, counts=self._prompt_counts)
        with _record(vlm) as call:
            vlm.model(
                **vlm.to_device(tokens),
                **vlm.to_device(images),
                **forward_options(vlm.config, len(self._rows), device=vlm.device),
            )
        self._text = _Segment(call, 0, None, self._last_place_n)

    def _run_shared(self, prepared: Sequence[PreparedImage]) -> None:
        vlm = self.vlm
        shared_prefix_length(prepared)  # raises where prompts differ before the image ends
        length = prepared[0].prefix_length
        prefix_rows = [
            {name: values[:length] for name, values in image.tokens[0].items()}
            for image in prepared
        ]
        cache = self._empty_cache()
        with _record(vlm) as call:
            vlm.model(
                **vlm.to_device(batch_tokens(vlm, prefix_rows)),
                **vlm.to_device(batch_images(vlm, prepared)),
                **cache_arguments(vlm.model, cache),
            )
        owner_n = copy_to(vlm.device, self._owner_n)
        self._prefix = _Segment(call, 0, None, owner_n)
        cache.reorder_cache(owner_n)
        before_text = _fork(cache)
        ids = [row["input_ids"][length:] for row in self._rows]
        ids_nt = stack_padded(ids)
        mask_nt = torch.cat(
            [
                torch.ones(len(ids), length, dtype=torch.long),
                stack_padded([np.ones_like(one) for one in ids]),
            ],
            1,
        )
        positions = continue_positions(
            call.kwargs.get("position_ids"), owner_n, length=ids_nt.shape[1]
        )
        if positions is None:
            place_t = torch.arange(length, mask_nt.shape[1], device=vlm.device)
            positions = place_t.expand(len(ids), -1)
        with _record(vlm) as call:
            vlm.stack(
                input_ids=copy_to(vlm.device, ids_nt),
                attention_mask=copy_to(vlm.device, mask_nt),
                position_ids=positions,
                **cache_arguments(vlm.stack, cache),
            )
        place_n = self._last_place_n - length
        self._text = _Segment(call, length, before_text, place_n)
        self._last = self._alone(self._text, cache)

    def _alone(self, text: _Segment, cache: Any) -> _Segment:
        """Return the last token of each prompt as if it ran after all others.

        What the cache holds of it, and of padding, is not looked at.
        """
        kwargs = text.call.kwargs
        place_n = text.last_place_n
        position_ids = kwargs["position_ids"]
        mask_nt = kwargs["attention_mask"].clone()
        mask_nt[self._row_n, text.start + place_n] = 0
        call = _RecordedCall(
            kwargs=kwargs
            | {
                "input_ids": kwargs["input_ids"][self._row_n, place_n][:, None],
                "attention_mask": torch.cat([mask_nt, torch.ones_like(mask_nt[:, :1])], 1),
                "position_ids": position_ids[..., self._row_n, place_n][..., None],
            },
            outputs=[
                _with_hidden(output, self._pick(_hidden_of(output), text)[:, None])
                for output in text.call.outputs
            ],
            entering=self._pick(text.call.states(0), text)[:, None],
            last=self._pick(text.call.states(len(text.call.outputs)), text)[:, None],
        )
        return _Segment(call, mask_nt.shape[1], cache, torch.zeros_like(place_n))

    def _pick(self, hidden_ntd: torch.Tensor, segment: _Segment) -> torch.Tensor:
        """(n, d) the states of each prompt's last token, out of those of a segment."""
        return hidden_ntd[self._row_n, segment.last_place_n]

    # -------------------------------------------------------------------------------- other runs

    def last_states(self, layer: int) -> torch.Tensor:
        """Return (n, d) float32 states of each prompt's last token, as the model has them."""
        return self._pick(self._text.call.states(layer), self._text).float()

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
            Attention that is taken away meanwhile, in blocks from `layer` on. Where image tokens
            look, all prompts of an image must have the same cut up to its end.

        Returns
        -------
        dict of int to Tensor
            (n, d) float32 states of each prompt's last token, of this layer and all later ones.

        Raises
        ------
        NoCut
            The attention of a block cannot be cut.
        """
        segment = self._text
        if self._last is not None and self._touches_last_alone(changes, cut):
            segment = self._last
            cut = None if cut is None else cut.of_last_alone()
        states_ntd = self._changed(segment, layer, changes)
        if layer == len(self.vlm.blocks):  # nothing comes after it
            return {layer: self._pick(states_ntd, segment).float()}
        cache = _fork(segment.cache)
        image_looks = cut is not None and self._image_looks(cut)
        if self._prefix is not None and ("image" in changes or image_looks):
            cache = self._rerun_prefix(self._prefix, layer, changes.get("image"), cut)
        states: dict[int, torch.Tensor] = {}

        def take(number: int, hidden_ntd: torch.Tensor) -> None:
            states[number] = self._pick(hidden_ntd, segment).float()

        with ExitStack() as contexts:
            if cut is not None:
                contexts.enter_context(cut_attention(self.vlm, cut, start=segment.start))
            self._replay(segment, layer, states_ntd, cache=cache, take=take)
        return states

    def _touches_last_alone(self, changes: Mapping[str, Change], cut: AttentionCut | None) -> bool:
        if set(changes) - {"last"}:
            return False
        return cut is None or torch.equal(cut.query_nt, self.token_sets["last"])

    def _image_looks(self, cut: AttentionCut) -> bool:
        """Tell whether a cut takes something away from tokens up to the image's end."""
        return bool(cut.query_nt[:, : self._text.start].any())

    def _rerun_prefix(
        self, prefix: _Segment, layer: int, change: Change | None, cut: AttentionCut | None
    ) -> Any:
        """Run image tokens again; return the cache that the prompts go on with."""
        states_btd = prefix.call.states(layer)
        starts = copy_to(
            self.vlm.device, torch.from_numpy(np.cumsum([0, *self._prompt_counts[:-1]]))
        )
        if change is not None:
            image_bt = self.token_sets["image"][:, : states_btd.shape[1]][starts]
            states_btd = torch.where(image_bt[..., None], change(states_btd), states_btd)
        cache = self._empty_cache()
        with ExitStack() as contexts:
            if cut is not None and self._image_looks(cut):
                contexts.enter_context(cut_attention(self.vlm, cut.of_rows(starts)))
            self._replay(prefix, layer, states_btd, cache=cache)
        cache.reorder_cache(prefix.last_place_n)
        # Blocks before the layer did not run; masks are as long as the first one's keys.
        cache.layers[:layer] = _fork(self._text.cache).layers[:layer]
        return cache

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache  # takes seconds

        return DynamicCache(config=self.vlm.stack.config)

    def _changed(
        self, segment: _Segment, layer: int, changes: Mapping[str, Change]
    ) -> torch.Tensor:
        """Return a layer's states of a segment, with those of some tokens changed."""
        hidden = segment.call.states(layer)
        if segment is self._last:
            for change in changes.values():
                hidden = change(hidden)
            return hidden
        for name, change in changes.items():
            if name == "image" and segment.start:  # they are in the prefix
                continue
            mask_nt = self.token_sets[name][:, segment.start :]
            hidden = torch.where(mask_nt[..., None], change(hidden), hidden)
        return hidden

    def _replay(
        self,
        segment: _Segment,
        layer: int,
        states_ntd: torch.Tensor,
        *,
        cache: Any,
        take: Callable[[int, torch.Tensor], None] | None = None,
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


def _spread(mark_i: np.ndarray, image_mask_t: np.ndarray) -> np.ndarray:
    """(t,) True at the marked ones of a prompt's image tokens."""
    spread_t = np.zeros_like(image_mask_t)
    spread_t[np.flatnonzero(image_mask_t)] = mark_i
    return spread_t


def why_no_replay(vlm: Vlm) -> str:
    """Return in a line why passes of a model cannot be run again with changes; "" if they can."""
    if not vlm.is_native:
        return "its adapter has no decoder of transformers, whose parts could run again"
    if vlm.reads_prompts_by_encoder:
        return "prompts are read by an encoder"
    if vlm.special_case.stream_axis is not None:
        return "layers have parallel streams"
    return ""


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


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """Return what a block would have returned with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


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
            is_last = number == layer
            block.forward = hand_back(_with_hidden(output, states_ntd) if is_last else output)
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

    if cache is None:
        return None
    fork = copy.copy(cache)
    fork.layers = [
        # These put longer tensors in the place of theirs; others write into them.
        copy.copy(one)
        if type(one) in (DynamicLayer, DynamicSlidingWindowLayer)
        else copy.deepcopy(one)
        for one in cache.layers
    ]
    return fork
