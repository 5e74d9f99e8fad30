"""Forward passes that pool every layer's hidden states on the way.

They are plain, or they run each image once for all its prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch

from probekit.models.batches import (
    batch_images,
    batch_tokens,
    patch_mask,
    shared_prefix_length,
    stack_padded,
)
from probekit.models.devices import copy_to
from probekit.models.hooks import Take, tap_decoder, tap_encoder, tap_experts
from probekit.models.load import Vlm
from probekit.models.pooling import TEXT_POOLINGS, Pooler, Prefix
from probekit.models.processor import PreparedImage

# From "<layer>/<pooling>" to float32: (n, d) of the decoder, (b, d) of image encoder and projector.
States = dict[str, torch.Tensor]

WAYS = {
    "shared": "each image runs once for all its prompts",
    "encoded": "each image is encoded once, but every prompt runs from its start",
    "plain": "every prompt runs from its start, with its image",
    "alone": "every prompt runs from its start, with its image, in a batch of its own",
}


@torch.inference_mode()
def run_pooled(
    vlm: Vlm,
    prepared: Sequence[PreparedImage],
    *,
    poolings: Sequence[str],
    stages: Sequence[str] = ("lm",),
    way: str = "plain",
) -> States:
    """Run b images with all their prompts, n in all, and pool each layer's hidden states.

    Parameters
    ----------
    vlm : Vlm
    prepared : sequence of PreparedImage
        b images of one shape (:func:`probekit.models.batches.input_shape`), with their prompts.
    poolings : sequence of str
        Out of :data:`probekit.models.pooling.POOLINGS`.
    stages : sequence of {"lm", "experts", "vision", "projector"}
        Without "lm" and "experts" the decoder does not run.
    way : str
        Out of :data:`WAYS`. Prompts without an image have nothing to share, and run plainly.

    Returns
    -------
    dict of str to Tensor
        ``"lm.03/mean"`` is (n, d), examples in the order of images and their prompts;
        ``"vision.03/mean"`` and ``"projector/mean"`` are (b, d).

    Raises
    ------
    ValueError
        The model cannot go this way, or its image encoder makes another number of image vectors
        than its processor announced.
    """
    encoder_is_enough = not {"lm", "experts"} & set(stages) and vlm.features_method is not None
    if way == "alone" and not encoder_is_enough:
        return _run_alone(vlm, prepared, poolings=poolings, stages=stages)
    forward_pass = _PooledPass(vlm, prepared, poolings=poolings, stages=stages)
    has_image = bool(prepared[0].image_inputs)
    if encoder_is_enough:
        forward_pass.run_encoder()
    elif way == "shared" and has_image:
        forward_pass.run_shared()
    elif way == "encoded" and has_image:
        forward_pass.run_encoded()
    else:
        forward_pass.run_plain()
    return forward_pass.states


@torch.inference_mode()
def read_layers(
    vlm: Vlm, prepared: Sequence[PreparedImage], take: Take, *, output_hidden_states: bool = False
) -> Any:
    """Run images of one shape, each with its first prompt, and hand over the states of all tokens.

    Parameters
    ----------
    vlm : Vlm
    prepared : sequence of PreparedImage
    take : callable
        Called as ``take(layer, hidden_ntd)`` for each layer of the decoder; padding is on the
        right.
    output_hidden_states : bool
        Whether the output has transformers' own hidden states, too; for its models alone.

    Returns
    -------
    object
        What the pass returns, of transformers' models a ModelOutput.
    """
    tokens = vlm.to_device(batch_tokens(vlm, [image.tokens[0] for image in prepared]))
    images = vlm.to_device(batch_images(vlm, prepared))
    options = {"output_hidden_states": True} if output_hidden_states else {}
    with tap_decoder(vlm, take):
        return vlm.adapter.forward(tokens, images, **options)


def _run_alone(
    vlm: Vlm,
    prepared: Sequence[PreparedImage],
    *,
    poolings: Sequence[str],
    stages: Sequence[str],
) -> States:
    """Run one plain pass per prompt; of the image encoder keep what each first prompt gave."""
    of_prompts: list[States] = []
    of_first_prompts: list[States] = []
    for image in prepared:
        for k in range(len(image.tokens)):
            states = run_pooled(vlm, [image.with_prompt(k)], poolings=poolings, stages=stages)
            of_prompts.append(states)
            if k == 0:
                of_first_prompts.append(states)
    joined = {}
    for key in of_prompts[0]:
        rows = of_prompts if key.startswith(("lm.", "experts.")) else of_first_prompts
        joined[key] = torch.cat([states[key] for states in rows])
    return joined


class _PooledPass:
    """One batch on its way through a model; `states` fills up while it runs."""

    def __init__(
        self,
        vlm: Vlm,
        prepared: Sequence[PreparedImage],
        *,
        poolings: Sequence[str],
        stages: Sequence[str],
    ) -> None:
        self.vlm = vlm
        self.prepared = prepared
        self.poolings = poolings
        self.stages = stages
        self.states: States = {}
        self.rows = [row for image in prepared for row in image.tokens]
        self.prompt_counts = [len(image.tokens) for image in prepared]

    @cached_property
    def owner_n(self) -> torch.Tensor:
        """(n,) which image each prompt belongs to, on the CPU."""
        return torch.repeat_interleave(torch.tensor(self.prompt_counts))

    def run_plain(self) -> None:
        """Run every prompt from its start, with its image."""
        vlm = self.vlm
        tokens = batch_tokens(vlm, self.rows)
        images = batch_images(vlm, self.prepared, counts=self.prompt_counts)
        with (
            self._tap_decoder(self._pool_whole_prompts(tokens), rows=len(self.rows)),
            self._pool_encoder(self.prompt_counts) if images else nullcontext(),
        ):
            vlm.adapter.forward(vlm.to_device(tokens), vlm.to_device(images))

    def run_encoded(self) -> None:
        """Run the image encoder once per image, then every prompt from its start."""
        vlm = self.vlm
        if vlm.why_not_encoded:
            raise ValueError(vlm.why_not_encoded)
        tokens = batch_tokens(vlm, self.rows)
        features = self.run_encoder()
        images: dict[str, torch.Tensor | None] = {}
        for name, value in batch_images(vlm, self.prepared, counts=self.prompt_counts).items():
            images[name] = None if value.is_floating_point() else copy_to(vlm.device, value)
        repeated = _repeat_for_prompts(features, self.owner_n, image_count=len(self.prepared))
        with self._tap_decoder(self._pool_whole_prompts(tokens), rows=len(self.rows)):
            vlm.adapter.forward_encoded(vlm.to_device(tokens), images, repeated)

    def run_shared(self) -> None:
        """Run the prefix of each image once, with a key-value cache; then only the suffixes."""
        vlm = self.vlm
        if vlm.why_not_shared:
            raise ValueError(vlm.why_not_shared)
        prefix_length = shared_prefix_length(self.prepared)
        prefix_tokens = batch_tokens(
            vlm,
            [
                {name: values[:prefix_length] for name, values in image.tokens[0].items()}
                for image in self.prepared
            ],
        )
        suffix_tokens = batch_tokens(
            vlm,
            [
                {
                    name: values[prefix_length:]
                    for name, values in row.items()
                    if len(values) == len(row["input_ids"])
                }
                for row in self.rows
            ],
        )
        prefix_masks = [image.image_masks[0][:prefix_length] for image in self.prepared]
        pooler = Pooler(
            self.poolings,
            suffix_tokens["attention_mask"],
            prefix=Prefix(stack_padded(prefix_masks), self.owner_n),
            device=vlm.device,
        )
        owner_n = copy_to(vlm.device, self.owner_n)
        suffix_tokens = vlm.to_device(suffix_tokens)
        pooled_prefixes: dict[str, dict[str, torch.Tensor]] = {}

        def take_prefix(layer: str, hidden_btd: torch.Tensor) -> None:
            pooled_prefixes[layer] = pooler.pool_prefix(hidden_btd)

        def take_suffix(layer: str, hidden_ntd: torch.Tensor) -> None:
            pooled = pooler.pool(hidden_ntd, pooled_prefixes.pop(layer))
            self._add_states(layer, pooled)

        with (
            self._tap_decoder(take_prefix, rows=len(self.prepared)),
            self._pool_encoder([1] * len(self.prepared)),
        ):
            cache = vlm.adapter.forward_prefix(
                vlm.to_device(prefix_tokens), vlm.to_device(batch_images(vlm, self.prepared))
            )
        suffix_mask = suffix_tokens["attention_mask"]
        prefix_mask = suffix_mask.new_ones(len(self.rows), prefix_length)
        suffix_tokens["attention_mask"] = torch.cat([prefix_mask, suffix_mask], 1)
        with self._tap_decoder(take_suffix, rows=len(self.rows)):
            vlm.adapter.forward_suffix(suffix_tokens, cache, owner_n)

    def run_encoder(self) -> Any:
        """Run the image encoder alone, once per image; return what it makes of them."""
        vlm = self.vlm
        images = vlm.to_device(batch_images(vlm, self.prepared))
        with self._pool_encoder([1] * len(self.prepared)):
            return vlm.adapter.image_features(images)

    @contextmanager
    def _tap_decoder(self, take: Take, *, rows: int) -> Iterator[None]:
        """Hand over the decoder's layers and, where wanted, what its experts get."""
        with tap_decoder(self.vlm, take):
            if "experts" not in self.stages:
                yield
                return
            with tap_experts(self.vlm, take, rows=rows):
                yield

    def _add_states(self, layer: str, pooled: Mapping[str, torch.Tensor]) -> None:
        for pooling, values in pooled.items():
            self.states[f"{layer}/{pooling}"] = values

    def _pool_whole_prompts(self, tokens: Mapping[str, torch.Tensor]) -> Take:
        """Return a function that pools the decoder's layers over prompts with their images."""
        masks = [mask for image in self.prepared for mask in image.image_masks]
        pooler = Pooler(
            self.poolings,
            tokens["attention_mask"],
            image_nt=stack_padded(masks),
            device=self.vlm.device,
        )

        def take(layer: str, hidden_ntd: torch.Tensor) -> None:
            self._add_states(layer, pooler.pool(hidden_ntd))

        return take

    @contextmanager
    def _pool_encoder(self, counts: Sequence[int]) -> Iterator[None]:
        """Pool the encoder's layers over patches during a pass inside the context.

        Each image occurs in the pass as often as `counts` says. The number of vectors that the
        decoder gets is compared with the number of image tokens.
        """
        first_places = None
        if max(counts) > 1:
            first_places = copy_to(self.vlm.device, torch.tensor([0, *counts[:-1]]).cumsum(0))
        token_counts = {int(image.image_masks[0].sum()) for image in self.prepared} - {0}
        poolers: dict[tuple[str, int], Pooler] = {}
        layers_seen: set[str] = set()

        def take(layer: str, hidden_bpd: torch.Tensor) -> None:
            patches = hidden_bpd.shape[1]
            stage = layer.partition(".")[0]
            other_counts = token_counts - {patches}
            if stage == "projector" and other_counts:
                raise ValueError(
                    f"{self.vlm.name} announced {max(other_counts)} image tokens but got {patches} "
                    "image vectors: its processor and its weights do not fit together"
                )
            if stage not in self.stages:
                return
            if layer in layers_seen:
                raise ValueError(
                    f"{self.vlm.name} runs its image encoder several times per image: leave the "
                    "stage vision out"
                )
            layers_seen.add(layer)
            if first_places is not None:
                hidden_bpd = hidden_bpd.index_select(0, first_places)
            if (stage, patches) not in poolers:
                poolers[stage, patches] = self._patch_pooler(stage, hidden_bpd)
            self._add_states(layer, poolers[stage, patches].pool(hidden_bpd))

        with_blocks = "vision" in self.stages
        with tap_encoder(self.vlm, take, image_count=sum(counts), with_blocks=with_blocks):
            yield

    def _patch_pooler(self, stage: str, hidden_bpd: torch.Tensor) -> Pooler:
        """Make a pooler over images' real patches, or over the vectors of the projector."""
        if stage == "vision":
            mask_bp = patch_mask(self.prepared, hidden_bpd.shape[1])
        else:
            mask_bp = torch.ones(hidden_bpd.shape[:2], dtype=torch.bool)
        poolings = [pooling for pooling in self.poolings if pooling not in TEXT_POOLINGS]
        return Pooler(poolings, mask_bp, image_nt=mask_bp, device=self.vlm.device)


def _repeat_for_prompts(output: Any, owner_n: torch.Tensor, *, image_count: int) -> Any:
    """Repeat an encoder's output for b images once per prompt; intermediate states are left out.

    `owner_n` is on the CPU.
    """
    if isinstance(output, torch.Tensor):
        if not output.ndim or len(output) % image_count:
            return output
        places_n = copy_to(str(output.device), owner_n)
        return output.unflatten(0, (image_count, -1)).index_select(0, places_n).flatten(0, 1)
    if isinstance(output, (list, tuple)):
        is_nested = bool(output) and isinstance(output[0], (list, tuple))
        if len(output) == image_count and not is_nested:
            return type(output)(output[i] for i in owner_n.tolist())
        return type(output)(
            _repeat_for_prompts(part, owner_n, image_count=image_count) for part in output
        )
    if hasattr(output, "items"):
        repeated: dict[str, Any] = {}
        for name, value in output.items():
            if name.endswith("hidden_states"):
                repeated[name] = None
            else:
                repeated[name] = _repeat_for_prompts(value, owner_n, image_count=image_count)
        return type(output)(**repeated)
    return output
