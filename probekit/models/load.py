"""Frozen vision-language models with their processors, through transformers' Auto classes."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch

from probekit.models import architectures
from probekit.models.presets import locate, pinned_revision, short_name
from probekit.models.processor import PromptProcessor


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> str:
    """bfloat16 on GPUs that have it, float16 on other GPUs, float32 on CPU (where half precision is often slower)."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "float16" if device == "mps" else "float32"


@dataclass
class Vlm:
    """A frozen model without its language-model head, and its processor; free its memory with :meth:`release`.

    Attributes
    ----------
    name : last part of the id or folder
    stack, blocks : the module that reads image and prompt together and ends with the final norm, and its blocks
    vision : the image encoder's module and its blocks; None where it is no stack of blocks
    layers : names of what can be read of the decoder, in the order of transformers' `hidden_states`: ``lm.00`` is the
        input embeddings, ``lm.k`` the output of block k, the last one after the final norm
    width : d, their size
    """

    name: str
    model: torch.nn.Module | None
    processor: object
    device: str
    dtype: str
    revision: str | None

    def __post_init__(self):
        self.config = self.model.config
        self.special = architectures.special(self.config)
        self.takes = set(inspect.signature(self.model.forward).parameters)
        self.prompt_processor = PromptProcessor(self.name, self.config, self.processor, "mm_token_type_ids" in self.takes)
        self.stack, self.blocks = architectures.text_stack(self.model)
        self.width = architectures.width_of(self.blocks)
        self.vision = None if self.special.no_vision else architectures.vision_stack(self.model, self.blocks)
        self.layers = tuple(f"lm.{k:02d}" for k in range(len(self.blocks) + 1))
        self.vision_layers = tuple(f"vision.{k:02d}" for k in range(len(self.vision[1]) + 1)) if self.vision else ()

    @property
    def layers_of_stage(self) -> dict[str, tuple[str, ...]]:
        """What each stage has to read; no ``vision`` where the image encoder is no stack of blocks."""
        hands_over = hasattr(self.model, "get_image_features") and self.special.projector
        projector = ("projector",) if hands_over else ()
        return {"lm": self.layers, "vision": self.vision_layers, "projector": projector}

    def mark(self) -> Callable[[], None]:
        """A call that waits until the device has done all that it was asked for up to now."""
        if not self.device.startswith("cuda"):
            return torch.mps.synchronize if self.device == "mps" else lambda: None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize

    def place(self, inputs: dict) -> dict[str, torch.Tensor]:
        """Inputs on the model's device, its floating ones in the model's type."""
        dtype = getattr(torch, self.dtype)
        return {key: value.to(self.device, dtype if value.is_floating_point() else None, non_blocking=True)
                for key, value in inputs.items()}

    def release(self) -> None:
        """Drop the weights and give their memory back."""
        self.model = self.stack = self.blocks = self.vision = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_vlm(id_or_folder: str, revision: str | None = None, dtype: str | None = None, device: str | None = None,
             untrained: bool = False, seed: int = 0, trust_remote_code: bool = False) -> Vlm:
    """Load a VLM and its processor, frozen and in evaluation mode; weights out of safetensors alone.

    Parameters
    ----------
    id_or_folder : hub id, ``id@revision``, checkpoint folder, or a name out of :data:`probekit.models.presets.PRESETS`
    revision : commit, tag or branch on the hub; None takes the preset's
    dtype : "float32", "bfloat16" or "float16"; None chooses by device (:func:`best_dtype`)
    device : "cpu", "cuda", "cuda:1", "mps"; None takes the best one there is
    untrained : random weights (drawn from `seed`) in the same architecture, the control of an untrained model
    trust_remote_code : run code that comes with the checkpoint, for architectures that transformers does not have

    Raises
    ------
    FileNotFoundError, OSError
        No such folder, or no such checkpoint on the hub or in its cache, or one without safetensors.
    ValueError
        Its layers cannot be found; there is no such device.
    """
    from transformers import AutoConfig, AutoProcessor  # seconds, and not always needed

    device = device or best_device()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch finds no GPU here: take device=\"cpu\", or a torch for it")
    dtype = dtype or best_dtype(device)
    source, revision = locate(id_or_folder), pinned_revision(id_or_folder, revision)
    own = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(source, **own)
    processor = AutoProcessor.from_pretrained(source, **own)
    full = _random(config, dtype, seed, trust_remote_code) if untrained else _pretrained(source, config, dtype, own)
    base = architectures.without_head(full).eval().requires_grad_(False).to(device)
    return Vlm(short_name(id_or_folder), base, processor, device, dtype, getattr(config, "_commit_hash", None))


def _pretrained(source: str, config, dtype: str, own: dict) -> torch.nn.Module:
    try:
        return _auto_class(config).from_pretrained(source, dtype=getattr(torch, dtype), use_safetensors=True, **own)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise OSError(f"{source} has no weights in safetensors, and others can run code when they are loaded: take a "
                      f"revision that has them (id@revision; refs/pr/... where one is proposed on the hub) ({error})"
                      ) from error


def _random(config, dtype: str, seed: int, trust_remote_code: bool) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _auto_class(config).from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)


def _auto_class(config) -> type:
    """The Auto class that knows the architecture: some are listed as causal language models only."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    known = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)
    return next((auto for auto in known if type(config) in auto._model_mapping), AutoModelForImageTextToText)


def describe_model(id_or_folder: str, revision: str | None = None) -> pd.DataFrame:
    """What can be read of a checkpoint, from its config alone: its weights are neither loaded nor downloaded.

    Returns
    -------
    DataFrame
        One row a stage: `layers` (number), `first`, `last`, `width` (d); ``attrs`` has `type` and `parameters`.
    """
    vlm, parameters = load_skeleton(id_or_folder, revision)
    widths = {"lm": vlm.width, "projector": vlm.width,
              "vision": architectures.width_of(vlm.vision[1]) if vlm.vision else None}
    rows = [{"stage": stage, "layers": len(layers), "first": layers[0], "last": layers[-1], "width": widths[stage]}
            for stage, layers in vlm.layers_of_stage.items() if layers]
    table = pd.DataFrame(rows)
    table.attrs = {"type": vlm.config.model_type, "parameters": parameters}
    return table


def load_skeleton(id_or_folder: str, revision: str | None = None, trust_remote_code: bool = False, processor: bool = False
           ) -> tuple[Vlm, int]:
    """A model whose weights have shapes and no values, and the number of its parameters, its head's included.

    Parameters
    ----------
    processor : load the processor, too
    """
    from transformers import AutoConfig, AutoProcessor

    source = locate(id_or_folder)
    own = {"revision": pinned_revision(id_or_folder, revision), "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(source, **own)
    with torch.device("meta"):
        full = _auto_class(config).from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    reader = AutoProcessor.from_pretrained(source, **own) if processor else None
    parameters = sum(p.numel() for p in full.parameters())
    return Vlm(short_name(id_or_folder), architectures.without_head(full), reader, "meta", "bfloat16", None), parameters
