"""What transformers has a class for, read through the protocol of :mod:`probekit.models.protocol`.

Also what its decoders are called with: caches, positions, and what an encoder hands back.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from probekit.models.architectures import (
    LayerStack,
    find_special_case,
    find_text_stack,
    find_vision_stack,
    has_text_encoder,
    width_of,
)
from probekit.models.processor import PreparedImage, PromptProcessor
from probekit.models.protocol import Inputs

if TYPE_CHECKING:
    from transformers import DynamicCache

# Types of tokens, 0 for text: what attends to what may depend on them.
TOKEN_TYPE_INPUTS = ("token_type_ids", "mm_token_type_ids")
# Names under which configs state the soft cap of logits.
SOFT_CAP_NAMES = ("final_logit_softcapping", "logit_softcapping")


@dataclass(frozen=True)
class _Prefix:
    """What a prefix leaves behind: a cache, and the positions of its tokens."""

    cache: DynamicCache
    position_ids: torch.Tensor | None


class NativeAdapter:
    """A model of transformers without its language-model head, and its processor.

    Parameters
    ----------
    name : str
        For messages.
    model : torch.nn.Module
        A transformers model without its head.
    processor : transformers.ProcessorMixin or None
        None where nothing is to be prepared.

    Attributes
    ----------
    config : transformers.PreTrainedConfig
    special_case : SpecialCase
        What its architecture needs besides the generic rule.
    forward_arguments : set of str
        Names of the arguments of its forward pass.
    prompt_processor : PromptProcessor
    vision : LayerStack or None
        The image encoder and its blocks; None where it is not a stack of blocks.
    """

    def __init__(self, name: str, model: Any, *, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.config = model.config
        self.special_case = find_special_case(self.config)
        self.forward_arguments = set(inspect.signature(model.forward).parameters)
        self.prompt_processor = PromptProcessor(
            name,
            config=self.config,
            processor=processor,
            needs_token_types="mm_token_type_ids" in self.forward_arguments,
        )
        self.final_norm, self.blocks = find_text_stack(model)
        self.width = width_of(self.blocks, getattr(self.final_norm, "config", None))
        self.vision: LayerStack | None = None
        if self.special_case.why_no_vision is None:
            self.vision = find_vision_stack(model, self.blocks)
        self.vision_blocks = self.vision.blocks if self.vision else None

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; None without a processor."""
        return getattr(self.processor, "tokenizer", None)

    @property
    def features_method(self) -> tuple[Any, str] | None:
        """The object and the name of the method that makes image vectors; None without one."""
        if not hasattr(self.model, "get_image_features"):
            return None
        return self.model, "get_image_features"

    @property
    def has_projector(self) -> bool:
        """Whether that method returns the vectors that the decoder gets."""
        return self.features_method is not None and self.special_case.has_projector

    @property
    def why_not_shared(self) -> str:
        """Why a prefix cannot run by itself; "" where that can be tried."""
        if has_text_encoder(self.config):
            return "its prompts are read by a bidirectional encoder"
        return ""

    @property
    def why_not_encoded(self) -> str:
        """Why it does not go on from its image encoder's output; "" where it does."""
        if "mm_encoder_outputs" in self.forward_arguments:
            return ""
        # A model that swallows any keyword would not see the image, and would not say so.
        return "it does not take its image encoder's output back"

    @property
    def soft_cap(self) -> float | None:
        """The soft cap of its logits."""
        text_config = self.config.get_text_config(decoder=True)
        for name in SOFT_CAP_NAMES:
            cap = getattr(text_config, name, None)
            if cap:
                return float(cap)
        return None

    def prepare(self, image: Image.Image | None, prompts: Sequence[str]) -> PreparedImage:
        """See :meth:`probekit.models.processor.PromptProcessor.prepare`."""
        return self.prompt_processor.prepare(image, prompts)

    def forward(self, tokens: Inputs, images: Inputs, **options: Any) -> Any:
        """Run prompts with their images, or without; see the protocol.

        `options` go to the model.
        """
        ids_nt = tokens["input_ids"]
        options |= forward_options(self.config, len(ids_nt), device=ids_nt.device)
        if images:
            return self.model(**tokens, **images, **options)
        if not self.special_case.runs_without_image:
            return self.final_norm(**text_inputs(tokens))
        types = {
            name: torch.zeros_like(ids_nt)
            for name in TOKEN_TYPE_INPUTS
            if name in self.forward_arguments
        }
        return self.model(**{**types, **tokens}, **options)

    def forward_prefix(self, tokens: Inputs, images: Inputs) -> Any:
        """Run what prompts have in common, with a key-value cache; see the protocol."""
        from transformers import DynamicCache  # takes seconds

        cache = DynamicCache(config=self.final_norm.config)
        with _record_positions(self.final_norm) as positions:
            self.model(**tokens, **images, **cache_arguments(self.model, cache))
        return _Prefix(cache, positions[0])

    def forward_suffix(self, tokens: Inputs, cache: Any, owner_n: torch.Tensor) -> None:
        """Run the rest of prompts by the decoder alone; see the protocol."""
        # One copy of a prefix for each of its prompts.
        cache.cache.reorder_cache(owner_n)
        options = cache_arguments(self.final_norm, cache.cache)
        length = tokens["input_ids"].shape[1]
        positions = continue_positions(cache.position_ids, owner_n, length=length)
        if positions is not None:
            options["position_ids"] = positions
        self.final_norm(**text_inputs(tokens), **options)

    def image_features(self, images: Inputs) -> Any:
        """Run the image encoder alone; return what it makes of the images."""
        method = self.model.get_image_features
        accepted = inspect.signature(method).parameters
        inputs = {name: value for name, value in images.items() if name in accepted}
        return method(**inputs, return_dict=True)

    def forward_encoded(
        self, tokens: Inputs, images: Mapping[str, torch.Tensor | None], features: Any
    ) -> None:
        """Run prompts with images that are encoded already.

        Parameters
        ----------
        tokens : mapping of str to Tensor
        images : mapping of str to Tensor or None
            None in place of what is encoded.
        features
            What :meth:`image_features` returned, by prompt.
        """
        ids_nt = tokens["input_ids"]
        options = forward_options(self.config, len(ids_nt), device=ids_nt.device)
        self.model(**tokens, **images, mm_encoder_outputs={"image": features}, **options)


def text_inputs(tokens: Inputs) -> dict[str, torch.Tensor]:
    """Select what a decoder takes that knows nothing of images."""
    return {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}


def forward_options(config: Any, n: int, *, device: torch.device | str) -> dict[str, Any]:
    """Arguments of a forward pass of n prompts besides its inputs."""
    options: dict[str, Any] = {"use_cache": False}
    if has_text_encoder(config):
        # Nothing reads the decoder of an encoder-decoder model, so one token is enough.
        options["decoder_input_ids"] = torch.zeros(n, 1, dtype=torch.long, device=device)
    return options


def cache_arguments(module: nn.Module, cache: DynamicCache) -> dict[str, Any]:
    """Return the arguments that hand a cache to a module.

    Their name differs between versions of transformers.
    """
    parameters = inspect.signature(module.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    return {name: cache, "use_cache": True}


@contextmanager
def _record_positions(stack: nn.Module) -> Iterator[list[torch.Tensor | None]]:
    """Note the position ids of each call of the decoder inside the context."""
    positions: list[torch.Tensor | None] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        positions.append(kwargs.get("position_ids"))

    handle = stack.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield positions
    finally:
        handle.remove()


def continue_positions(
    position_ids: torch.Tensor | None, owner_n: torch.Tensor, *, length: int
) -> torch.Tensor | None:
    """Return the positions of `length` more text tokens after a prefix, (n, t) or (axes, n, t).

    After an image the axes of a multi-axis position differ: text goes on, on all of them, after the
    largest. None leaves the positions to the model.
    """
    if position_ids is None:
        return None
    if position_ids.ndim == 3:
        position_ids = position_ids.amax(0, keepdim=True).expand_as(position_ids)
    if position_ids.shape[-2] == 1:  # one row for a whole batch
        owner_n = torch.zeros_like(owner_n)
    last = position_ids[..., -1:].index_select(-2, owner_n)
    return last + 1 + torch.arange(length, device=last.device)
