"""Forward passes that leave every layer's pooled states: plain, or with each image run once for all its prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from transformers import DynamicCache

from probekit.models import batches
from probekit.models.architectures import reads_with_encoder
from probekit.models.hooks import Take, decoder_tapped, encoder_tapped
from probekit.models.load import Vlm
from probekit.models.pooling import Pooler, Prefix
from probekit.models.processor import PreparedImage

States = dict[str, torch.Tensor]  # "<layer>/<pooling>" to float32: lm (n, d), vision and projector (b, d)
WAYS = {
    "shared": "each image runs once for all its prompts",
    "encoded": "each image is encoded once, but every prompt runs from its start",
    "plain": "every prompt runs from its start, with its image",
    "alone": "every prompt runs from its start, with its image, in a batch of its own",
}


@torch.inference_mode()
def run_pooled(vlm: Vlm, prepared: Sequence[PreparedImage], poolings: Sequence[str], stages: Sequence[str] = ("lm",),
        way: str = "plain") -> States:
    """All k prompts of b images through the model.

    Parameters
    ----------
    prepared : b images of one shape (:func:`probekit.models.batches.input_shape`), with their prompts
    stages : names out of :data:`probekit.extraction.shards.STAGES`; where "lm" is not among them the decoder does not run
    way : out of :data:`WAYS`

    Returns
    -------
    dict
        ``"lm.03/mean"`` is (n, d), examples in the order of images and their prompts; ``"vision.03/mean"`` and
        ``"projector/mean"`` are (b, d).

    Raises
    ------
    ValueError
        Prompts differ before the image ends ("shared"), or the decoder got another number of image vectors than the
        processor announced.
    """
    states: States = {}
    if "lm" not in stages and hasattr(vlm.model, "get_image_features"):
        _encode(vlm, prepared, [1] * len(prepared), poolings, stages, states)
    elif way == "shared":
        _shared(vlm, prepared, poolings, stages, states)
    elif way == "alone":
        each = [run_pooled(vlm, [one.with_prompt(k)], poolings, stages) for one in prepared for k in range(len(one.tokens))]
        firsts = np.cumsum([0, *(len(one.tokens) for one in prepared[:-1])])
        states |= {key: torch.cat([each[i][key] for i in (range(len(each)) if key.startswith("lm.") else firsts)])
                   for key in each[0]}
    else:
        _plain(vlm, prepared, poolings, stages, states, way == "encoded")
    return states


@torch.inference_mode()
def read_layers(vlm: Vlm, prepared: Sequence[PreparedImage], take: Take) -> None:
    """Run images of one shape, each with its first prompt, and hand over the states of all tokens.

    Parameters
    ----------
    take : called as ``take(layer, hidden_ntd)`` for each layer of the decoder, padded on the right
    """
    tokens = batches.batch_tokens(vlm, [one.tokens[0] for one in prepared])
    with decoder_tapped(vlm, take):
        vlm.model(**tokens, **batches.batch_images(vlm, prepared), **_options(vlm, len(prepared)))


def _options(vlm: Vlm, n: int) -> dict:
    if not reads_with_encoder(vlm.config):
        return {"use_cache": False}
    token = torch.zeros(n, 1, dtype=torch.long, device=vlm.device)  # nobody reads the decoder: a single token will do
    return {"use_cache": False, "decoder_input_ids": token}


# ------------------------------------------------------------------------------------------------------- the passes


def _plain(vlm: Vlm, prepared: Sequence[PreparedImage], poolings: Sequence[str], stages: Sequence[str], states: States,
           encode_once: bool) -> None:
    counts = [len(one.tokens) for one in prepared]
    tokens = batches.batch_tokens(vlm, [row for one in prepared for row in one.tokens])
    shown = batches.pad_masks([mask for one in prepared for mask in one.image_masks], tokens["input_ids"].shape[1], vlm.device)
    pooler = Pooler(poolings, tokens["attention_mask"], shown)

    def take(layer: str, hidden_ntd: torch.Tensor) -> None:
        states.update({f"{layer}/{name}": values for name, values in pooler.pool(hidden_ntd).items()})

    options = _options(vlm, len(shown))
    with decoder_tapped(vlm, take):
        if encode_once:
            if "mm_encoder_outputs" not in vlm.takes:  # one that swallows any keyword would not see the image
                raise ValueError("it does not take its image encoder's output back")
            images, features = _encode(vlm, prepared, counts, poolings, stages, states)
            vlm.model(**tokens, **images, mm_encoder_outputs={"image": features}, **options)
        else:
            with _encoder_read(vlm, prepared, counts, poolings, stages, states):
                vlm.model(**tokens, **batches.batch_images(vlm, prepared, counts), **options)


def _shared(vlm: Vlm, prepared: Sequence[PreparedImage], poolings: Sequence[str], stages: Sequence[str], states: States
            ) -> None:
    """Each image and what comes before it once, with a key-value cache; then only the prompts' own tokens."""
    if reads_with_encoder(vlm.config):
        raise ValueError("its prompts are read by a bidirectional encoder")
    rows, p = [row for one in prepared for row in one.tokens], batches.shared_prefix_length(prepared)
    owner_n = torch.tensor([i for i, one in enumerate(prepared) for _ in one.tokens], device=vlm.device)
    before = batches.batch_tokens(vlm, [{key: value[:p] for key, value in one.tokens[0].items()} for one in prepared])
    kept = [key for key in ("input_ids", "attention_mask") if key in rows[0]]
    own = batches.batch_tokens(vlm, [{key: row[key][p:] for key in kept} for row in rows])
    prefix = Prefix(batches.pad_masks([one.image_masks[0] for one in prepared], p, vlm.device), owner_n)
    pooler = Pooler(poolings, own["attention_mask"], None, prefix)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    cache = DynamicCache(config=vlm.stack.config)

    def take_prefix(layer: str, hidden_btd: torch.Tensor) -> None:
        parts[layer] = pooler.prefix_part(hidden_btd)

    def take(layer: str, hidden_ntd: torch.Tensor) -> None:
        pooled = pooler.pool(hidden_ntd, parts.pop(layer))
        states.update({f"{layer}/{name}": values for name, values in pooled.items()})

    with ExitStack() as taps:
        taps.enter_context(decoder_tapped(vlm, take_prefix))
        seen = taps.enter_context(_positions(vlm.stack))
        taps.enter_context(_encoder_read(vlm, prepared, [1] * len(prepared), poolings, stages, states))
        vlm.model(**before, **batches.batch_images(vlm, prepared), **caching(vlm.model, cache))
    cache.reorder_cache(owner_n)
    positions = _continued(seen[0], owner_n, own["input_ids"].shape[1])
    with decoder_tapped(vlm, take):
        vlm.stack(
            input_ids=own["input_ids"], **caching(vlm.stack, cache),
            attention_mask=torch.cat([own["attention_mask"].new_ones(len(rows), p), own["attention_mask"]], 1),
            **({} if positions is None else {"position_ids": positions}),
        )


def caching(module: torch.nn.Module, cache: DynamicCache) -> dict:
    """The arguments that hand a cache to a module, whose name for it is another one since transformers 5.24."""
    name = "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def _encode(vlm: Vlm, prepared: Sequence[PreparedImage], counts: Sequence[int], poolings: Sequence[str],
            stages: Sequence[str], states: States) -> tuple[dict[str, torch.Tensor], object]:
    """Run the image encoder once an image; its output, and what else the model needs, laid out for n examples."""
    images, known = batches.batch_images(vlm, prepared), inspect.signature(vlm.model.get_image_features).parameters
    with _encoder_read(vlm, prepared, [1] * len(prepared), poolings, stages, states):
        features = vlm.model.get_image_features(
            **{key: value for key, value in images.items() if key in known}, return_dict=True)
    others = batches.batch_images(vlm, prepared, counts)
    others |= {key: None for key, value in others.items() if value.is_floating_point()}
    return others, _dealt(features, torch.repeat_interleave(torch.tensor(counts)).to(vlm.device), len(prepared))


def _dealt(output, owner_n: torch.Tensor, b: int):
    """An encoder's output for b images, laid out for n examples; intermediate states are left out."""
    if torch.is_tensor(output):
        whole = not output.ndim or len(output) % b
        return output if whole else output.unflatten(0, (b, -1))[owner_n].flatten(0, 1)
    if isinstance(output, (list, tuple)) and len(output) == b and not isinstance(output[0], (list, tuple)):
        return type(output)(output[i] for i in owner_n.tolist())
    if isinstance(output, (list, tuple)):
        return type(output)(_dealt(part, owner_n, b) for part in output)
    if hasattr(output, "items"):
        return type(output)(**{key: None if key.endswith("hidden_states") else _dealt(value, owner_n, b)
                               for key, value in output.items()})
    return output


@contextmanager
def _encoder_read(vlm: Vlm, prepared: Sequence[PreparedImage], counts: Sequence[int], poolings: Sequence[str],
                  stages: Sequence[str], states: States) -> Iterator[None]:
    """Pool the encoder's layers over patches, and count the vectors that the decoder gets against its image tokens."""
    firsts = np.cumsum([0, *counts[:-1]])
    poolers: dict[tuple[str, int], Pooler] = {}
    seen: set[str] = set()

    def take(layer: str, hidden_bpd: torch.Tensor) -> None:
        hidden, p = hidden_bpd[firsts], hidden_bpd.shape[1]
        announced = {int(one.image_masks[0].sum()) for one in prepared} - {0, p}
        if layer == "projector" and announced:
            raise ValueError(f"{vlm.name} announced {max(announced)} image tokens but got {p} image vectors: its "
                             "processor and its weights do not fit together")
        if layer.partition(".")[0] not in stages:
            return
        if layer in seen:
            raise ValueError(f"{vlm.name} runs its image encoder several times an image: leave the stage vision out")
        seen.add(layer)
        kind = layer.partition(".")[0], p
        if kind not in poolers:
            whole = torch.ones(hidden.shape[:2], dtype=torch.bool)
            mask = (batches.patch_mask(prepared, p) if kind[0] == "vision" else whole).to(hidden.device)
            poolers[kind] = Pooler([name for name in poolings if name != "text_mean"], mask, mask)
        states.update({f"{layer}/{name}": values for name, values in poolers[kind].pool(hidden).items()})

    with encoder_tapped(vlm, sum(counts), take):
        yield


@contextmanager
def _positions(stack: torch.nn.Module) -> Iterator[list[torch.Tensor | None]]:
    """The position ids that the decoder is called with inside the context."""
    seen: list[torch.Tensor | None] = []
    handle = stack.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True)
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


# --------------------------------------------------------------------------------------------------------- the choice







