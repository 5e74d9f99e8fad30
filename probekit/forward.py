"""Forward passes that leave every layer's pooled states: plain, or with each image run once for all its prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from transformers import DynamicCache

from probekit.models import Vlm
from probekit.pool import Pooler, Prefix

States = dict[str, torch.Tensor]  # "<layer>/<pooling>" to (n, d) float32


@contextmanager
def tapped(vlm: Vlm, take: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Within the context a forward pass calls ``take(layer, hidden_ntd)`` for each layer of the decoder."""

    def before(layer, module, args, kwargs):
        take(layer, args[0] if args else kwargs["hidden_states"])

    def after(layer, module, args, output):
        take(layer, output[0] if isinstance(output, tuple) else output)

    decoder, layers = vlm.decoder, vlm.layers
    handles = [decoder.layers[0].register_forward_pre_hook(partial(before, layers[0]), with_kwargs=True)]
    handles += [decoder.layers[k - 1].register_forward_hook(partial(after, layers[k]))
                for k in range(1, len(layers) - 1)]
    handles.append(decoder.norm.register_forward_hook(partial(after, layers[-1])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def plain(vlm: Vlm, images: Sequence[Image.Image], prompts: Sequence[str], poolings: Sequence[str]) -> States:
    """n prompts, each with its image, from the start: the way that works for every model."""
    inputs = vlm.place(vlm.prepare(images, prompts))
    pooler = Pooler(poolings, inputs["attention_mask"], vlm.shows_image(inputs["input_ids"]))
    states: States = {}

    def take(layer: str, hidden_ntd: torch.Tensor) -> None:
        states.update({f"{layer}/{name}": values for name, values in pooler.pool(hidden_ntd).items()})

    with tapped(vlm, take):
        vlm.model(**inputs, use_cache=False)
    return states


@torch.inference_mode()
def shared(vlm: Vlm, images: Sequence[dict[str, torch.Tensor]], tails: Sequence[list[int]], owner: Sequence[int],
           poolings: Sequence[str]) -> States:
    """Each image and what comes before it once, with a key-value cache; then only the prompts' own tokens.

    Exact under causal attention.

    Parameters
    ----------
    images : b outputs of :meth:`Vlm.prepare_image`, of the same number of tokens
    tails : n lists of :meth:`Vlm.tokens_after_image`
    owner : n places in `images`
    """
    owner_n = torch.as_tensor(owner, device=vlm.device)
    inputs, suffix = (vlm.place(part) for part in _join(vlm, images, tails))
    prefix = Prefix(vlm.shows_image(inputs["input_ids"]), owner_n)
    pooler = Pooler(poolings, suffix["attention_mask"], None, prefix)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    states: States = {}
    cache = DynamicCache(config=vlm.decoder.config)

    def take_prefix(layer: str, hidden_btd: torch.Tensor) -> None:
        parts[layer] = pooler.prefix_part(hidden_btd)

    def take(layer: str, hidden_ntd: torch.Tensor) -> None:
        pooled = pooler.pool(hidden_ntd, parts.pop(layer))
        states.update({f"{layer}/{name}": values for name, values in pooled.items()})

    with tapped(vlm, take_prefix), _positions(vlm.decoder) as seen:
        vlm.model(**inputs, past_key_values=cache, use_cache=True)
    cache.reorder_cache(owner_n)
    before_nt = suffix["attention_mask"].new_ones(len(owner_n), prefix.length)
    with tapped(vlm, take):
        vlm.decoder(
            inputs_embeds=vlm.decoder.get_input_embeddings()(suffix["input_ids"]), past_key_values=cache,
            attention_mask=torch.cat([before_nt, suffix["attention_mask"]], 1), use_cache=True,
            position_ids=_continued(seen[0], owner_n, suffix["input_ids"].shape[1]),
        )
    return states


def _join(vlm: Vlm, images: Sequence[dict[str, torch.Tensor]], tails: Sequence[list[int]]) -> tuple[dict, dict]:
    """One batch of images, with the first tokens that all prompts have in common, and one of the prompts' rest."""
    inputs = {key: torch.cat([image[key] for image in images]) for key in images[0]}
    common = next((k for k, column in enumerate(zip(*tails, strict=False)) if len(set(column)) > 1), 1)
    common = min(common, min(map(len, tails)) - 1)  # every prompt keeps a token of its own
    added = {"input_ids": tails[0][:common], "attention_mask": [1] * common}
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            more = torch.tensor(added.get(key, [0] * common), dtype=inputs[key].dtype)
            inputs[key] = torch.cat([inputs[key], more.expand(len(images), -1)], 1)
    rest = {"input_ids": [row[common:] for row in tails]}
    return inputs, dict(vlm.processor.tokenizer.pad(rest, padding_side="right", return_tensors="pt"))


TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Sharing:
    """Whether images are shared between prompts, and what was found when it was tried."""

    used: bool
    words: str


def try_sharing(vlm: Vlm, images: Sequence[Image.Image], prompts: Sequence[str], owner: Sequence[int]) -> Sharing:
    """Run a few examples both ways and compare every layer: differences are relative to the layer's largest value."""
    poolings = ("mean", "last")
    try:
        ready, tails = [vlm.prepare_image(image) for image in images], vlm.tokens_after_image(prompts)
        groups = [[i for i in range(len(ready)) if shape_of(ready[i]) == shape] for shape in {*map(shape_of, ready)}]
        order = [[n for n, i in enumerate(owner) if i in group] for group in groups]
        ours = [shared(vlm, [ready[i] for i in group], [tails[n] for n in rows], [group.index(owner[n]) for n in rows],
                       poolings) for group, rows in zip(groups, order, strict=True)]
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        return Sharing(False, f"every prompt runs from the start: sharing the image fails ({str(error)[:200]})")
    reference = plain(vlm, [images[i] for i in owner], prompts, poolings)
    turned = [n for rows in order for n in rows]
    gaps = {key: float((torch.cat([part[key] for part in ours]) - values[turned]).abs().max()
                       / values.abs().max()) for key, values in reference.items()}
    where = max(gaps, key=gaps.get)
    told = f"largest difference to plain passes {gaps[where]:.1e} ({where})"
    if gaps[where] <= TOLERANCE[vlm.dtype]:
        return Sharing(True, f"each image runs once for all its prompts, {told}")
    return Sharing(False, f"every prompt runs from the start: sharing the image is not exact, {told}")


def shape_of(image: dict[str, torch.Tensor]) -> tuple:
    """Prepared images of one shape fit into one batch."""
    return tuple((key, values.shape[1:]) for key, values in image.items())


@contextmanager
def _positions(decoder: torch.nn.Module) -> Iterator[list[torch.Tensor | None]]:
    """The position ids that the decoder is called with inside the context."""
    seen: list[torch.Tensor | None] = []
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def _continued(position_ids: torch.Tensor | None, owner_n: torch.Tensor, length: int) -> torch.Tensor | None:
    """Positions of `length` more text tokens after a prefix, (n, t) or (axes, n, t); None leaves them to the model.

    After an image the axes of a multi-axis position differ: text goes on, on all of them, after the largest.
    """
    if position_ids is None:
        return None
    if position_ids.ndim == 3:
        position_ids = position_ids.amax(0, keepdim=True).expand_as(position_ids)
    if position_ids.shape[-2] == 1:  # one row for a whole batch
        owner_n = torch.zeros_like(owner_n)
    last = position_ids[..., -1:].index_select(-2, owner_n)
    return last + 1 + torch.arange(length, device=last.device)
