"""Where the layers of an architecture are: one generic rule, and a small table of what deviates from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Special:
    """What one architecture needs beside the generic rule.

    Attributes
    ----------
    prompt : how image and prompt are put together where the checkpoint has no chat template; ``{image}`` is the
        processor's image token
    streams : axis of hidden states that runs over parallel residual streams, where there are some
    pixel_axis : axis of `pixel_values` along which several images stand one after the other
    counted : image input whose values are numbers of patches, counted through all images of a batch
    one_at_a_time : its processor cannot take several images in a call
    no_vision : why its image encoder is not read, where it is a stack of blocks
    projector : False where the image's vectors are made outside of `get_image_features`
    """

    prompt: str = "{image}{prompt}"
    streams: int | None = None
    pixel_axis: int = 0
    counted: str = ""
    one_at_a_time: bool = False
    no_vision: str = ""
    projector: bool = True


SPECIAL: dict[str, Special] = {  # by `model_type` of config.json
    "blip-2": Special("Question: {prompt} Answer:"),  # its processor puts the image tokens before the text by itself
    "instructblip": Special("{prompt}"),
    "kosmos-2": Special("{prompt}"),
    "florence2": Special("{prompt}"),
    "llama4": Special(projector=False),
    "step3p7": Special(no_vision="runs twice"),
    "mllama": Special(no_vision="pads inside"),
    "aria": Special(one_at_a_time=True),
    "minicpmv4_6": Special(pixel_axis=-1),
    "minicpmv4_7": Special(pixel_axis=-1),
    "molmo2": Special(counted="image_token_pooling"),
    "gemma3n": Special(streams=0),
    "qwen4_exp": Special(streams=-1),
    "glm5_next": Special(streams=2),
}

DEPTH = ("num_hidden_layers", "depth", "encoder_layers", "num_layers", "n_layers")  # the number of blocks, in configs


def special(config) -> Special:
    return SPECIAL.get(config.model_type, Special())


def depth_of(config) -> int | None:
    """Number of blocks that a config states."""
    for name in DEPTH:
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None


def reads_with_encoder(config) -> bool:
    """Is the prompt read, with the image, by the bidirectional encoder of an encoder-decoder model?"""
    return bool(config.is_encoder_decoder or config.get_text_config().is_encoder_decoder)


def text_stack(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that reads image and prompt together and ends with the final norm, and its blocks.

    Raises
    ------
    ValueError
        No list of blocks of the length that the config states.
    """
    config = model.config
    if reads_with_encoder(config):
        part = getattr(model, "language_model", model).get_encoder()
        part = getattr(part, "text_model", part)
        text = part.config
    else:
        text, part = config.get_text_config(decoder=True), model.get_decoder()
    return _owner(part, depth_of(text), nn.ModuleList()) or _fail(config, depth_of(text))


def vision_stack(model: nn.Module, text_blocks: nn.ModuleList) -> tuple[nn.Module, nn.ModuleList] | None:
    """The image encoder that owns a list of blocks, and that list; None where it is no stack of blocks."""
    part = model.get_encoder(modality="image") or model
    vision = getattr(model.config, "vision_config", None) or getattr(part.config, "vision_config", None)
    return _owner(part, depth_of(vision), text_blocks) if vision is not None and depth_of(vision) else None


def _owner(part: nn.Module, length: int | None, other: nn.ModuleList) -> tuple[nn.Module, nn.ModuleList] | None:
    taken = set(other.modules())
    for module in part.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == length and not taken & set(child):
                return module, child
    return None


def _fail(config, length: int | None):
    raise ValueError(f"{config.model_type}: no list of {length} blocks in its decoder: its layers cannot be read")


def width_of(blocks: nn.ModuleList) -> int:
    """d, the size of the hidden states between blocks: that of a block's own normalisation."""
    norms = [(name.count("."), len(p)) for name, p in blocks[0].named_parameters() if "norm" in name and p.ndim == 1]
    return min(norms)[1]


def without_head(model: nn.Module) -> nn.Module:
    """The base model; where there is none, the model itself with its language-model head taken out."""
    if model.base_model is not model:
        return model.base_model
    head = model.get_output_embeddings()
    for module in model.modules():
        for name, child in module.named_children():
            if child is head and head is not None and not isinstance(child, nn.Embedding):
                setattr(module, name, nn.Identity())
    return model


def merge_streams(hidden: torch.Tensor, rule: Special, width: int) -> torch.Tensor:
    """(n, t, d) hidden states; parallel residual streams, on an axis or side by side in the last one, are averaged."""
    if rule.streams is None:
        return hidden
    return hidden.mean(rule.streams) if hidden.ndim > 3 else hidden.unflatten(-1, (-1, width)).mean(-2)
