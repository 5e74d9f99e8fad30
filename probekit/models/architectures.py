"""Where the layers of an architecture are: one generic rule, and a short table of special cases."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

# Names under which configs state the number of blocks.
BLOCK_COUNT_NAMES = ("num_hidden_layers", "depth", "encoder_layers", "num_layers", "n_layers")


@dataclass(frozen=True, kw_only=True)
class SpecialCase:
    """What one architecture needs besides the generic rule.

    Attributes
    ----------
    prompt_format : str
        How image and prompt are put together where the checkpoint has no chat template. ``{image}``
        stands for the processor's image token, ``{prompt}`` for the prompt.
    stream_axis : int or None
        Axis of the hidden states that runs over parallel residual streams; None where there is one
        stream.
    pixel_axis : int
        Axis of `pixel_values` along which the images of a batch follow one another.
    patch_index_input : str or None
        The image input whose values are indices of patches, counted through all images of a batch.
    one_text_per_call : bool
        Whether its processor takes only one text and its image per call.
    why_no_vision : str or None
        Why its image encoder is not read although it is a stack of blocks.
    has_projector : bool
        Whether ``get_image_features`` returns the vectors that the decoder gets.
    runs_without_image : bool
        Whether its forward pass takes prompts without an image; else its decoder runs by itself.
    skips_blocks : bool
        Whether blocks that read the image are passed over where there is none.
    """

    prompt_format: str = "{image}{prompt}"
    stream_axis: int | None = None
    pixel_axis: int = 0
    patch_index_input: str | None = None
    one_text_per_call: bool = False
    why_no_vision: str | None = None
    has_projector: bool = True
    runs_without_image: bool = True
    skips_blocks: bool = False


# By `model_type` of config.json. The processors of the first four place image tokens themselves.
SPECIAL_CASES: dict[str, SpecialCase] = {
    "blip-2": SpecialCase(prompt_format="Question: {prompt} Answer:", runs_without_image=False),
    "instructblip": SpecialCase(prompt_format="{prompt}", runs_without_image=False),
    "kosmos-2": SpecialCase(prompt_format="Question: {prompt} Answer:", runs_without_image=False),
    "florence2": SpecialCase(prompt_format="{prompt}"),
    "llama4": SpecialCase(has_projector=False),
    "step3p7": SpecialCase(why_no_vision="runs twice"),
    "mllama": SpecialCase(why_no_vision="pads inside", skips_blocks=True),
    "aria": SpecialCase(one_text_per_call=True),
    "minicpmv4_6": SpecialCase(pixel_axis=-1),
    "minicpmv4_7": SpecialCase(pixel_axis=-1),
    "molmo2": SpecialCase(patch_index_input="image_token_pooling"),
    "gemma3n": SpecialCase(stream_axis=0),
    "qwen4_exp": SpecialCase(stream_axis=-1),
    "glm5_next": SpecialCase(stream_axis=2),
}

# Why architectures cannot be read that transformers lists for images and text, by `model_type`.
REFUSED = {
    "shieldgemma2": "its processor asks about policies of its own instead of the prompt",
    "hunyuan_vl": "what its processor makes of a prompt depends on the prompts beside it",
    "got_ocr2": "its processor takes one list of images, not one for each prompt",
    "unlimited_ocr": "its processor returns the parts of an image as lists, not as tensors",
    "fuyu": "its processor makes no inputs of the image that are apart from those of the prompt",
    "idefics": "its processor takes no prompts whose images are given beside them",
    "blip": "transformers returns the layers of its image encoder, not those that read the prompt",
    "git": "it puts the image before the prompt inside of the model, which its tokens do not show",
    "instructblipvideo": "it takes videos, and an example is one image",
}


class LayerStack(NamedTuple):
    """A module that runs a list of blocks one after the other, and that list."""

    module: Any
    blocks: nn.ModuleList


def find_special_case(config: Any) -> SpecialCase:
    """Return what the architecture of a config needs besides the generic rule.

    Raises
    ------
    ValueError
        It cannot be read (:data:`REFUSED`).
    """
    if config.model_type in REFUSED:
        raise ValueError(
            f"models of the type {config.model_type} cannot be read: {REFUSED[config.model_type]}; "
            "python -m probekit models lists those that can"
        )
    return SPECIAL_CASES.get(config.model_type, SpecialCase())


def count_blocks(config: Any) -> int | None:
    """Return the number of blocks that a config states, None where it states none."""
    for name in BLOCK_COUNT_NAMES:
        count = getattr(config, name, None)
        if isinstance(count, int):
            return count
    return None


def has_text_encoder(config: Any) -> bool:
    """Tell whether the bidirectional encoder of an encoder-decoder model reads the prompt."""
    return bool(config.is_encoder_decoder or config.get_text_config().is_encoder_decoder)


def find_text_stack(model: Any) -> LayerStack:
    """Find the module that reads image and prompt together and ends with the final norm.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Returns
    -------
    LayerStack
        The decoder and its blocks; in an encoder-decoder model the text encoder and its blocks.

    Raises
    ------
    ValueError
        It has no list of as many blocks as the config states.
    """
    module: Any
    if has_text_encoder(model.config):
        encoder = getattr(model, "language_model", model).get_encoder()
        module = getattr(encoder, "text_model", encoder)
        block_count = count_blocks(module.config)
    else:
        module = model.get_decoder()
        block_count = count_blocks(model.config.get_text_config(decoder=True))
    stack = _find_stack(module, block_count=block_count)
    if stack is None:
        raise ValueError(
            f"{model.config.model_type}: its decoder has no list of blocks whose number its config "
            f"states ({block_count}), so its layers cannot be read"
        )
    return stack


def find_vision_stack(model: Any, text_blocks: nn.ModuleList) -> LayerStack | None:
    """Find the image encoder and its blocks.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    text_blocks : ModuleList
        The blocks of the decoder, which are not to be mistaken for those of the image encoder.

    Returns
    -------
    LayerStack or None
        None where the image encoder is not a stack of blocks.
    """
    module: Any = model.get_encoder(modality="image") or model
    config = getattr(model.config, "vision_config", None)
    if config is None:
        config = getattr(module.config, "vision_config", None)
    if config is None or not count_blocks(config):
        return None
    return _find_stack(module, block_count=count_blocks(config), other_blocks=text_blocks)


def _find_stack(
    module: nn.Module, *, block_count: int | None, other_blocks: nn.ModuleList | None = None
) -> LayerStack | None:
    """Find the first module in `module` that has `block_count` blocks, none of `other_blocks`."""
    excluded = set() if other_blocks is None else set(other_blocks.modules())
    for parent in module.modules():
        for child in parent.children():
            if not isinstance(child, nn.ModuleList) or len(child) != block_count:
                continue
            if excluded.isdisjoint(child):
                return LayerStack(parent, child)
    return None


def width_of(blocks: nn.ModuleList, config: Any = None) -> int:
    """Return d, the width of the hidden states between blocks.

    Parameters
    ----------
    blocks : ModuleList
    config : transformers.PreTrainedConfig or None
        Of a decoder, which states it. The configs of image encoders mean different things by the
        same names: there, the width is that of a block's outermost norm.

    Returns
    -------
    int
    """
    width = getattr(config, "hidden_size", None)
    if isinstance(width, int):
        return width
    norms = [
        (name.count("."), len(parameter))
        for name, parameter in blocks[0].named_parameters()
        if "norm" in name and parameter.ndim == 1
    ]
    _, width = min(norms)
    return width


def find_experts(blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Find the experts of a decoder's blocks, by the number of the block from 1.

    They are modules with `num_experts` that are called with states, the numbers of the experts of
    each token, and weights. A block with several of them, each for some of the tokens, has none.
    """
    found = {}
    for number, block in enumerate(blocks, start=1):
        modules = [
            module
            for module in block.modules()
            if isinstance(getattr(module, "num_experts", None), int) and _takes_choices(module)
        ]
        if len(modules) == 1:
            found[f"experts.{number:02d}"] = modules[0]
    return found


def _takes_choices(module: nn.Module) -> bool:
    names = list(inspect.signature(module.forward).parameters)
    return len(names) >= 3 and ("ind" in names[1] or "experts" in names[1])


@dataclass(frozen=True)
class LanguageHead:
    """The output embedding of a whole model.

    Attributes
    ----------
    full_model : transformers.PreTrainedModel
    module : torch.nn.Module
        Its `weight` is (vocabulary, d).
    places : tuple of (torch.nn.Module, str)
        The modules that have it, and its name there.
    """

    full_model: Any
    module: Any
    places: tuple[tuple[nn.Module, str], ...]

    @classmethod
    def of(cls, model: Any) -> LanguageHead | None:
        """Return the head of a model, before it is removed; None where it has none."""
        head = model.get_output_embeddings()
        if head is None:
            return None
        places = [
            (parent, name)
            for parent in model.modules()
            for name, child in parent.named_children()
            if child is head
        ]
        return cls(model, head, tuple(places))

    def logits(
        self, tokens: Mapping[str, torch.Tensor], images: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Run the whole model; return (n, t, vocabulary), or (n, 1, vocabulary) of last tokens."""
        inputs = {**tokens, **images}
        inputs.pop("labels", None)  # some processors add them, and then a loss is computed
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self.full_model.forward).parameters:
            options["logits_to_keep"] = 1
        with self.in_place():
            return self.full_model(**inputs, **options).logits

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the head where it belongs inside the context."""
        instead = [getattr(parent, name) for parent, name in self.places]
        for parent, name in self.places:
            setattr(parent, name, self.module)
        try:
            yield
        finally:
            for (parent, name), module in zip(self.places, instead, strict=True):
                setattr(parent, name, module)


def remove_head(model: Any) -> Any:
    """Return the base model; where there is none, the model with its language-model head taken out.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place where it has no base model.

    Returns
    -------
    torch.nn.Module
    """
    if model.base_model is not model:
        return model.base_model
    head = LanguageHead.of(model)
    if head is None or isinstance(head.module, nn.Embedding):
        return model
    for parent, name in head.places:
        setattr(parent, name, nn.Identity())
    return model


def merge_streams(hidden: torch.Tensor, special_case: SpecialCase, *, width: int) -> torch.Tensor:
    """Average parallel residual streams.

    Parameters
    ----------
    hidden : Tensor
        (n, t, d) hidden states; with parallel streams they have one more axis, or the streams stand
        side by side in the last axis.
    special_case : SpecialCase
    width : int
        d, the width of one stream.

    Returns
    -------
    Tensor
        (n, t, d); `hidden` itself where there is one stream.
    """
    if special_case.stream_axis is None:
        return hidden
    if hidden.ndim > 3:
        return hidden.mean(special_case.stream_axis)
    return hidden.unflatten(-1, (-1, width)).mean(-2)
