"""Frozen vision-language models with their processors, through transformers' Auto classes."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from probekit import paths
from probekit.models.architectures import (
    find_special_case,
    find_text_stack,
    find_vision_stack,
    remove_head,
    width_of,
)
from probekit.models.presets import locate, pinned_revision, short_name
from probekit.models.processor import PromptProcessor


def best_device() -> str:
    """Return "cuda", "mps" or "cpu": the fastest device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def best_dtype(device: str) -> str:
    """Return the floating type that suits a device.

    bfloat16 on GPUs that have it, float16 on other GPUs, float32 on a CPU, where half precision is
    often slower.
    """
    if device.startswith("cuda"):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bfloat16 else "float16"
    return "float16" if device == "mps" else "float32"


class Vlm:
    """A frozen model without its language-model head, and its processor.

    Parameters
    ----------
    name : str
    model : torch.nn.Module
        A transformers model without its head.
    processor : transformers.ProcessorMixin or None
        None where nothing is to be prepared.
    device, dtype : str
        Where its weights are, and their type.
    revision : str or None
        The commit of a checkpoint from the hub.

    Attributes
    ----------
    config : transformers.PreTrainedConfig
    special_case : SpecialCase
        What its architecture needs besides the generic rule.
    forward_arguments : set of str
        Names of the arguments of its forward pass.
    prompt_processor : PromptProcessor
    stack : torch.nn.Module
        The module that reads image and prompt together and ends with the final norm.
    blocks : torch.nn.ModuleList
        Its l - 1 blocks.
    width : int
        d, the width of its hidden states.
    layers : tuple of str
        Names of its l layers in the order of transformers' `hidden_states`: ``lm.00`` is the input
        embeddings, ``lm.k`` the output of block k, the last one after the final norm.
    vision : LayerStack or None
        The image encoder and its blocks; None where it is not a stack of blocks.
    vision_layers : tuple of str
        ``vision.00`` is what enters the image encoder's first block, ``vision.k`` the output of
        block k.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        processor: Any,
        device: str,
        dtype: str,
        revision: str | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.processor = processor
        self.device = device
        self.dtype = dtype
        self.revision = revision
        self.config = model.config
        self.special_case = find_special_case(self.config)
        self.forward_arguments = set(inspect.signature(model.forward).parameters)
        self.prompt_processor = PromptProcessor(
            name,
            config=self.config,
            processor=processor,
            needs_token_types="mm_token_type_ids" in self.forward_arguments,
        )
        self.stack, self.blocks = find_text_stack(model)
        self.width = width_of(self.blocks)
        self.layers = _name_layers("lm", self.blocks)
        self.vision = None
        if self.special_case.why_no_vision is None:
            self.vision = find_vision_stack(model, self.blocks)
        self.vision_layers = _name_layers("vision", self.vision.blocks) if self.vision else ()

    @property
    def layers_of_stage(self) -> dict[str, tuple[str, ...]]:
        """Names of the layers that can be read of each stage; none where a stage cannot be read."""
        has_projector = (
            hasattr(self.model, "get_image_features") and self.special_case.has_projector
        )
        return {
            "lm": self.layers,
            "vision": self.vision_layers,
            "projector": ("projector",) if has_projector else (),
        }

    def record_sync_point(self) -> Callable[[], None]:
        """Return a function that waits until the device has done all that is queued now."""
        if self.device == "mps":
            return torch.mps.synchronize
        if not self.device.startswith("cuda"):
            return _return_at_once
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize

    def to_device(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return inputs on the model's device, floating ones in the model's type."""
        float_type = getattr(torch, self.dtype)
        moved = {}
        for name, value in inputs.items():
            dtype = float_type if value.is_floating_point() else None
            moved[name] = value.to(self.device, dtype, non_blocking=True)
        return moved

    def release(self) -> None:
        """Drop the weights and give their memory back; the model cannot be used any more."""
        self.model = None
        self.stack = None
        self.blocks = nn.ModuleList()
        self.vision = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _name_layers(stage: str, blocks: nn.ModuleList) -> tuple[str, ...]:
    return tuple(f"{stage}.{k:02d}" for k in range(len(blocks) + 1))


def _return_at_once() -> None:
    pass


def load_vlm(
    model: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    untrained: bool = False,
    seed: int = 0,
    trust_remote_code: bool = False,
    home: str | Path | paths.Home | None = None,
) -> Vlm:
    """Load a model and its processor, frozen and in evaluation mode; weights from safetensors only.

    Parameters
    ----------
    model : str
        The name of a preset (:data:`probekit.models.presets.PRESETS`), a checkpoint folder, a hub
        id, or ``id@revision``.
    revision : str, optional
        A commit, tag or branch on the hub; by default that of the preset, else the newest.
    dtype : {"float32", "bfloat16", "float16"}, optional
        By default what suits the device (:func:`best_dtype`).
    device : str, optional
        "cpu", "cuda", "cuda:1", "mps"; by default the fastest one (:func:`best_device`).
    untrained : bool
        Take random weights in the same architecture, as a control.
    seed : int
        Of the random weights.
    trust_remote_code : bool
        Run code that comes with the checkpoint, for architectures that transformers does not have.
    home : str, Path or Home, optional
        See :func:`probekit.models.presets.locate`.

    Returns
    -------
    Vlm

    Raises
    ------
    FileNotFoundError, OSError
        There is no such folder, or no such checkpoint on the hub or in its cache, or it has no
        safetensors.
    ValueError
        Its layers cannot be found, or this machine has no such device.
    """
    from transformers import AutoConfig, AutoProcessor  # takes seconds

    device = device or best_device()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f'device={device!r}, but torch finds no GPU here: take device="cpu", or install a '
            "torch for the GPU"
        )
    dtype = dtype or best_dtype(device)
    source = locate(model, home)
    hub_options = {
        "revision": pinned_revision(model, revision, home=home),
        "trust_remote_code": trust_remote_code,
    }
    config = AutoConfig.from_pretrained(source, **hub_options)
    processor = AutoProcessor.from_pretrained(source, **hub_options)
    if untrained:
        full_model = _make_random(
            config, dtype=dtype, seed=seed, trust_remote_code=trust_remote_code
        )
    else:
        full_model = _load_weights(source, config, dtype=dtype, hub_options=hub_options)
    frozen = remove_head(full_model).eval().requires_grad_(False).to(device)
    return Vlm(
        short_name(model, home),
        frozen,
        processor=processor,
        device=device,
        dtype=dtype,
        revision=getattr(config, "_commit_hash", None),
    )


def _load_weights(source: str, config: Any, *, dtype: str, hub_options: Mapping[str, Any]) -> Any:
    try:
        return auto_class(config).from_pretrained(
            source, dtype=getattr(torch, dtype), use_safetensors=True, **hub_options
        )
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise OSError(
            f"{source} has no weights in safetensors, and weights in other formats can run code "
            "when they are loaded: take a revision that has them (id@revision; refs/pr/... where "
            f"one is proposed on the hub) ({error})"
        ) from error


def _make_random(config: Any, *, dtype: str, seed: int, trust_remote_code: bool) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto_class(config).from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )


def auto_class(config: Any) -> Any:
    """Return the Auto class of transformers that knows an architecture.

    Some vision-language models are listed as causal language models only.
    """
    from transformers import (  # takes seconds
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    candidates = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)
    for candidate in candidates:
        if type(config) in candidate._model_mapping:
            return candidate
    return AutoModelForImageTextToText


class Skeleton(NamedTuple):
    """A model whose weights have shapes and no values.

    Attributes
    ----------
    vlm : Vlm
    parameters : int
        Their number, those of the language-model head included.
    """

    vlm: Vlm
    parameters: int


def load_skeleton(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    with_processor: bool = False,
    home: str | Path | paths.Home | None = None,
) -> Skeleton:
    """Make a model from its config alone: its weights are neither loaded nor downloaded.

    Parameters
    ----------
    model : str
    revision : str, optional
    trust_remote_code : bool
    with_processor : bool
        Load its processor as well, to prepare images and prompts.
    home : str, Path or Home, optional
        This and the others: see :func:`load_vlm`.

    Returns
    -------
    Skeleton
    """
    from transformers import AutoConfig, AutoProcessor  # takes seconds

    source = locate(model, home)
    hub_options = {
        "revision": pinned_revision(model, revision, home=home),
        "trust_remote_code": trust_remote_code,
    }
    config = AutoConfig.from_pretrained(source, **hub_options)
    processor = AutoProcessor.from_pretrained(source, **hub_options) if with_processor else None
    with torch.device("meta"):
        full_model = auto_class(config).from_config(
            config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
        )
    parameters = sum(parameter.numel() for parameter in full_model.parameters())
    vlm = Vlm(
        short_name(model, home),
        remove_head(full_model),
        processor=processor,
        device="meta",
        dtype="bfloat16",
    )
    return Skeleton(vlm, parameters)


@dataclass(frozen=True)
class ModelDescription:
    """What can be read of a checkpoint.

    Attributes
    ----------
    table : DataFrame
        One row per stage: `stage`, `layers` (their number), `first`, `last`, `width` (d).
    model_type : str
        `model_type` of its config.
    parameters : int
        Their number, those of the language-model head included.
    """

    table: pd.DataFrame
    model_type: str
    parameters: int


def describe_model(
    model: str,
    *,
    revision: str | None = None,
    home: str | Path | paths.Home | None = None,
) -> ModelDescription:
    """Say what can be read of a checkpoint, from its config alone.

    Parameters
    ----------
    model : str
    revision : str, optional
    home : str, Path or Home, optional
        This and the others: see :func:`load_vlm`.

    Returns
    -------
    ModelDescription
    """
    vlm, parameters = load_skeleton(model, revision=revision, home=home)
    rows = []
    for stage, layers in vlm.layers_of_stage.items():
        if not layers:
            continue
        rows.append(
            {
                "stage": stage,
                "layers": len(layers),
                "first": layers[0],
                "last": layers[-1],
                "width": _stage_width(vlm, stage),
            }
        )
    return ModelDescription(pd.DataFrame(rows), vlm.config.model_type, parameters)


def _stage_width(vlm: Vlm, stage: str) -> int:
    if stage == "vision" and vlm.vision is not None:
        return width_of(vlm.vision.blocks)
    return vlm.width
