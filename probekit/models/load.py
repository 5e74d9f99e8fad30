"""Frozen vision-language models with their processors, through transformers' Auto classes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sized
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from probekit import paths
from probekit.models.adapters import AdapterPrompts, AdapterSource, find_adapter
from probekit.models.architectures import (
    LanguageHead,
    LayerStack,
    SpecialCase,
    find_experts,
    has_text_encoder,
    remove_head,
    width_of,
)
from probekit.models.checkpoints import Checkpoint, broken_files_named, open_checkpoint
from probekit.models.devices import copy_to, free_memory
from probekit.models.native import NativeAdapter
from probekit.models.presets import short_name

# What each type is called elsewhere.
DTYPE_NAMES = {
    "float32": ("float32", "fp32", "float", "single"),
    "bfloat16": ("bfloat16", "bf16"),
    "float16": ("float16", "fp16", "half"),
}
# By `model_type`: the subfolder of an adapter that a checkpoint reads images with.
IMAGE_ADAPTERS = {"phi4_multimodal": "vision-lora"}
# Counted in training, and read by nothing else.
UNREAD_BUFFERS = re.compile(r"(^|\.)num_batches_tracked$")
PROCESSOR_FIX = (
    "Training often saves the weights alone: save the processor of the model that it began with "
    "beside them (AutoProcessor.from_pretrained(base).save_pretrained(folder))"
)


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


def read_dtype(dtype: str | torch.dtype | None) -> str | None:
    """Return the name of a floating type, however it is spelled: ``bf16`` is ``bfloat16``.

    Parameters
    ----------
    dtype : str, torch.dtype or None
        None stays None.

    Raises
    ------
    ValueError
        It is none of the types that models are run in.
    """
    if dtype is None:
        return None
    spelling = str(dtype).strip().lower().removeprefix("torch.")
    for name, spellings in DTYPE_NAMES.items():
        if spelling in spellings:
            return name
    raise ValueError(
        f"dtype={str(dtype)!r}: take out of {', '.join(DTYPE_NAMES)}, or leave it out for the one "
        "that suits the device"
    )


class Head(Protocol):
    """The output embedding of a model, and the model's own logits."""

    @property
    def module(self) -> Any:
        """The module whose `weight` is (vocabulary, d)."""
        ...

    def logits(
        self, tokens: Mapping[str, torch.Tensor], images: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Run the whole model; return logits (n, t or 1, vocabulary)."""
        ...


class Vlm:
    """A frozen model without its language-model head, as all of extraction reads it.

    Parameters
    ----------
    name : str
    adapter : Adapter
        The model behind the protocol of :mod:`probekit.models.protocol`.
    device, dtype : str
        Where its weights are, and their type.
    revision : str or None
        The commit of a checkpoint from the hub; the hash of an adapter's code.
    head : Head or None
        Its output embedding, where it was kept.
    prompt_processor : PromptProcessor or AdapterPrompts or None
        What prepares images and prompts; None takes that of the adapter.

    Attributes
    ----------
    model : torch.nn.Module
    is_native : bool
        Whether it is a model of transformers, not an adapter of a user.
    processor, config : object
        Of a model of transformers; else None.
    special_case : SpecialCase
        What its architecture needs besides the generic rule.
    forward_arguments : set of str
        Names of the arguments of the forward pass of a model of transformers.
    tokenizer : object or None
    stack : torch.nn.Module
        The module that ends with the final norm; of a model of transformers the whole decoder.
    blocks : ModuleList
        The l - 1 blocks that read image and prompt together.
    width : int
        d, the width of its hidden states.
    layers : tuple of str
        Names of its l layers in the order of transformers' `hidden_states`: ``lm.00`` is the input
        embeddings, ``lm.k`` the output of block k, the last one after the final norm.
    experts : dict of str to Module
        ``experts.k``: the experts of block k, in mixtures of experts.
    vision_blocks : ModuleList or None
        The blocks of the image encoder; None where it is not a stack of blocks.
    vision_layers : tuple of str
        ``vision.00`` is what enters the image encoder's first block, ``vision.k`` the output of
        block k.
    """

    def __init__(
        self,
        name: str,
        adapter: Any,
        *,
        device: str,
        dtype: str,
        revision: str | None = None,
        head: Head | None = None,
        prompt_processor: Any = None,
    ) -> None:
        self.name = name
        self.adapter = adapter
        self.device = device
        self.dtype = dtype
        self.revision = revision
        self.head = head
        self.model = adapter.model
        # Whatever an adapter calls by these names is its affair.
        of_native = adapter if isinstance(adapter, NativeAdapter) else None
        self.is_native = of_native is not None
        self.processor: Any = of_native.processor if of_native else None
        self.config: Any = of_native.config if of_native else None
        self.special_case: SpecialCase = of_native.special_case if of_native else SpecialCase()
        self.forward_arguments: set[str] = of_native.forward_arguments if of_native else set()
        self.tokenizer: Any = getattr(adapter, "tokenizer", None)
        self.prompt_processor = prompt_processor or adapter.prompt_processor
        self.stack: Any = adapter.final_norm
        self.blocks: nn.ModuleList = _as_modules(adapter.blocks)
        self.width: int = adapter.width
        self.layers = _name_layers("lm", self.blocks)
        self.experts = find_experts(self.blocks)
        self.vision_blocks: nn.ModuleList | None = None
        if _has(adapter, "vision_blocks"):
            self.vision_blocks = _as_modules(adapter.vision_blocks)
        self.vision_layers = (
            () if self.vision_blocks is None else _name_layers("vision", self.vision_blocks)
        )

    @property
    def type(self) -> str:
        """The `model_type` of a model of transformers, else the name of the adapter's class."""
        return self.config.model_type if self.is_native else type(self.adapter).__name__

    @property
    def vision(self) -> LayerStack | None:
        """The image encoder of a model of transformers, and its blocks."""
        return self.adapter.vision if isinstance(self.adapter, NativeAdapter) else None

    @property
    def pad_id(self) -> int:
        """The token that fills up prompts on the right."""
        return getattr(self.tokenizer, "pad_token_id", None) or 0

    @property
    def features_method(self) -> tuple[Any, str] | None:
        """The object and the name of the method that makes image vectors; None without one."""
        if isinstance(self.adapter, NativeAdapter):
            return self.adapter.features_method
        return (self.adapter, "image_features") if _has(self.adapter, "image_features") else None

    @property
    def why_not_shared(self) -> str:
        """Why prompts cannot go on from a prefix; "" where that can be tried."""
        if not (_has(self.adapter, "forward_prefix") and _has(self.adapter, "forward_suffix")):
            return "its adapter has no forward_prefix and forward_suffix"
        return getattr(self.adapter, "why_not_shared", "")

    @property
    def why_not_encoded(self) -> str:
        """Why it does not go on from its image encoder's output; "" where it does."""
        if not _has(self.adapter, "forward_encoded"):
            return "its adapter has no forward_encoded"
        return getattr(self.adapter, "why_not_encoded", "")

    @property
    def reads_prompts_by_encoder(self) -> bool:
        """Whether a bidirectional encoder reads the prompts."""
        return self.is_native and has_text_encoder(self.config)

    @property
    def layers_of_stage(self) -> dict[str, tuple[str, ...]]:
        """Names of the layers that can be read of each stage; none where a stage cannot be read."""
        has_projector = self.features_method is not None and self.special_case.has_projector
        return {
            "lm": self.layers,
            "experts": tuple(self.experts),
            "vision": self.vision_layers,
            "projector": ("projector",) if has_projector else (),
        }

    def record_sync_point(self) -> Callable[[], None]:
        """Return a function that waits until the device has done all that is queued now."""
        if self.device.startswith("mps"):
            return torch.mps.synchronize
        if not self.device.startswith("cuda"):
            return lambda: None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize

    def to_device(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return inputs on the model's device, floating ones in the model's type."""
        float_type = getattr(torch, self.dtype)
        moved = {}
        for name, value in inputs.items():
            dtype = float_type if value.is_floating_point() else None
            moved[name] = copy_to(self.device, value, dtype)
        return moved

    def release(self) -> None:
        """Drop the weights and give their memory back; the model cannot be used any more."""
        self.adapter = None
        self.model = None
        self.head = None
        self.stack = None
        self.blocks = nn.ModuleList()
        self.experts = {}
        self.vision_blocks = None
        free_memory()


def _as_modules(blocks: Any) -> nn.ModuleList:
    return blocks if isinstance(blocks, nn.ModuleList) else nn.ModuleList(blocks)


def _has(adapter: Any, member: str) -> bool:
    return getattr(adapter, member, None) is not None


def _name_layers(stage: str, blocks: Sized) -> tuple[str, ...]:
    return tuple(f"{stage}.{k:02d}" for k in range(len(blocks) + 1))


def load_vlm(
    model: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    untrained: bool = False,
    seed: int = 0,
    trust_remote_code: bool = False,
    with_head: bool = False,
    home: str | Path | paths.Home | None = None,
) -> Vlm:
    """Load a model and its processor, frozen and in evaluation mode; weights from safetensors only.

    Parameters
    ----------
    model : str
        The name of a preset (:data:`probekit.models.presets.PRESETS`), a checkpoint folder, a hub
        id, ``id@revision``, or an adapter (``my_vlm.py:MyVlm``, or the name of an entry point).
    revision : str, optional
        A commit, tag or branch on the hub; by default that of the preset, else the newest. Of an
        adapter the hash that its code must have.
    dtype : {"float32", "bfloat16", "float16"}, optional
        Also as other libraries spell it (:data:`DTYPE_NAMES`). By default what suits the device
        (:func:`best_dtype`).
    device : str, optional
        "cpu", "cuda", "cuda:1", "mps"; by default the fastest one (:func:`best_device`).
    untrained : bool
        Take random weights in the same architecture, as a control.
    seed : int
        Of the random weights.
    trust_remote_code : bool
        Run code that comes with the checkpoint, for architectures that transformers does not have.
    with_head : bool
        Keep the output embedding, from which
        :func:`probekit.models.output_head.take_answer_head` takes the rows of answers.
    home : str, Path or Home, optional
        See :func:`probekit.models.presets.locate`.

    Returns
    -------
    Vlm

    Raises
    ------
    FileNotFoundError, OSError
        There is no such folder, or no such checkpoint on the hub or in its cache, or it has no
        safetensors, or a file is cut off.
    ValueError
        Weights are missing, are left over, or have another shape; it is an adapter; it reads no
        images; its layers cannot be found; this machine has no such device.
    """
    device = device or best_device()
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: take cpu, cuda, cuda:1 or mps") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f'device={device!r}, but torch finds no GPU here: take device="cpu", or install a '
            "torch for the GPU"
        )
    dtype = read_dtype(dtype) or best_dtype(device)
    source = find_adapter(model, home)
    if source is not None:
        return _load_adapter(
            source,
            revision=revision,
            dtype=dtype,
            device=device,
            untrained=untrained,
            seed=seed,
            with_head=with_head,
        )
    checkpoint = open_checkpoint(
        model, revision=revision, trust_remote_code=trust_remote_code, home=home
    )
    config = checkpoint.config
    processor = _load_processor(checkpoint)
    if untrained:
        full_model = _make_random(
            config, dtype=dtype, seed=seed, trust_remote_code=trust_remote_code
        )
        head = LanguageHead.of(full_model)
        read_model = remove_head(full_model)
    else:
        read_model, head = _load_weights(checkpoint, dtype=dtype, device=device)
    if head is not None and with_head:
        head.module.requires_grad_(False).to(device)
        head.full_model.eval().requires_grad_(False).to(device)
    name = short_name(model, home)
    read_model = read_model.eval().requires_grad_(False).to(device)
    vlm = Vlm(
        name,
        NativeAdapter(name, read_model, processor=processor),
        device=device,
        dtype=dtype,
        revision=checkpoint.commit,
        head=head if with_head else None,
    )
    remark = vlm.prompt_processor.describe_format()
    if remark:
        tqdm.write(remark)
    return vlm


# --------------------------------------------------------------------------------------- adapters


def _load_adapter(
    source: AdapterSource,
    *,
    revision: str | None,
    dtype: str | None,
    device: str,
    untrained: bool,
    seed: int,
    with_head: bool,
) -> Vlm:
    """Make a model of a class that is not transformers'; see :func:`load_vlm`.

    With None for the dtype, its weights stay as the class makes them.
    """
    code_hash = source.check_revision(revision)
    adapter = source.make(untrained=untrained, seed=seed)
    model = adapter.model.eval().requires_grad_(False)
    if dtype is None:
        dtype = _dtype_of(model)
    else:
        cast_weights(model, getattr(torch, dtype))
    adapter.model = model.to(device)
    head = AdapterHead.of(adapter) if with_head else None
    return Vlm(
        source.name,
        adapter,
        device=device,
        dtype=dtype,
        revision=code_hash,
        head=head,
        prompt_processor=AdapterPrompts(source.name, adapter),
    )


def _dtype_of(model: nn.Module) -> str:
    floating = (one.dtype for one in model.parameters() if one.is_floating_point())
    return str(next(floating, torch.float32)).removeprefix("torch.")


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change a model's weights to a floating type, in place.

    Buffers that are not saved with it and belong to a module without weights, such as the
    frequencies of rotary positions, keep theirs: they are computed, and need their precision.
    """
    saved = set(model.state_dict(keep_vars=True))
    for module_name, module in model.named_modules():
        has_weights = any(True for _ in module.parameters())
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in list(module.named_buffers(recurse=False)):
            is_saved = f"{module_name}.{name}".removeprefix(".") in saved
            if buffer.is_floating_point() and (is_saved or has_weights):
                setattr(module, name, buffer.to(dtype))
    return model


class AdapterHead(NamedTuple):
    """The output embedding of an adapter, see :class:`Head`."""

    module: Any
    logits: Any

    @classmethod
    def of(cls, adapter: Any) -> AdapterHead | None:
        """Return the head of an adapter; None where it has none, or cannot spell."""
        if not all(_has(adapter, name) for name in ("output_embedding", "logits", "tokenizer")):
            return None
        return cls(adapter.output_embedding, adapter.logits)


# --------------------------------------------------------------------------------------- processor


def _load_processor(checkpoint: Checkpoint) -> Any:
    """Load a checkpoint's processor, with its chat template.

    Raises
    ------
    ValueError
        It reads no images, has no tokenizer, or no size of patches; the message says what is
        missing.
    """
    from transformers import AutoProcessor  # takes seconds

    source, _, hub_options, config = checkpoint
    is_remote_code = hasattr(config, "auto_map")
    if not is_remote_code and not _reads_images(config):
        raise ValueError(
            f"{source} is not a vision-language model: {config.model_type} reads text only, or "
            "writes none; give a checkpoint that reads images and text"
        )
    with broken_files_named(source):
        try:
            processor = AutoProcessor.from_pretrained(source, **hub_options)
        except (OSError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise type(error)(
                f"{source}: its processor cannot be loaded ({reason}). {PROCESSOR_FIX}"
            ) from error
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise ValueError(
                f"{source} has no {part.replace('_', ' ')} that transformers finds: there is a "
                f"{type(processor).__name__} alone. {PROCESSOR_FIX}"
            )
    tokenizer = processor.tokenizer
    read_ids = set(tokenizer("Is there a dog?", add_special_tokens=False)["input_ids"])
    if not read_ids - {tokenizer.unk_token_id}:  # transformers makes an empty one without its files
        raise ValueError(f"{source} has no tokenizer: its vocabulary is empty. {PROCESSOR_FIX}")
    if getattr(processor, "patch_size", "") is None:
        raise ValueError(
            f"{source}: its processor does not say how many tokens an image is, as patch_size is "
            f"missing in processor_config.json. {PROCESSOR_FIX}"
        )
    # Some classes pass over the template that lies beside them, others have one of their own, which
    # is for checkpoints that have none.
    described, _ = processor.get_processor_dict(source, **hub_options)
    templates = (described.get("chat_template"), tokenizer.chat_template, processor.chat_template)
    processor.chat_template = next((template for template in templates if template), None)
    return processor


def _reads_images(config: Any) -> bool:
    """Tell whether transformers has a class for an architecture that writes text about images."""
    from transformers import AutoModelForCausalLM  # takes seconds

    if auto_class(config) is not AutoModelForCausalLM:
        return any(type(config) in candidate._model_mapping for candidate in _candidates())
    return any("vision" in part for part in getattr(config, "sub_configs", {}))


# ----------------------------------------------------------------------------------------- weights


def _load_weights(
    checkpoint: Checkpoint, *, dtype: str, device: str
) -> tuple[Any, LanguageHead | None]:
    """Load a model with all its weights, file by file onto the device; take out its head.

    Raises
    ------
    OSError
        It has no safetensors, or a file is broken.
    ValueError
        Weights are missing, are left over, or have another shape.
    """
    source, _, hub_options, config = checkpoint
    with broken_files_named(source), _LoadingReport() as printed:
        try:
            full_model, report = auto_class(config).from_pretrained(
                source,
                dtype=getattr(torch, dtype),
                device_map=None if device == "cpu" else {"": device},
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                **hub_options,
            )
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            raise OSError(
                f"{source} has no weights in safetensors, and weights in other formats can run "
                "code when they are loaded: take a revision that has them (id@revision; "
                f"refs/pr/... where one is proposed on the hub) ({error})"
            ) from error
        except RuntimeError as error:
            if not printed.unconverted:
                raise
            raise ValueError(
                f"{source}: weights of {len(printed.unconverted):,} modules cannot be put together "
                f"({_first_of(printed.unconverted)}), because some are missing or have another "
                "shape: take a whole checkpoint of this architecture"
            ) from error
    head = LanguageHead.of(full_model)
    modules = full_model.named_modules(remove_duplicate=False)
    head_names = [name for name, module in modules if head and module is head.module]
    read_model = remove_head(full_model)
    faults = _find_weight_faults(full_model, read_model, report, head_names)
    if faults:
        raise ValueError(
            f"{source} does not fit {type(full_model).__name__} of transformers "
            f"{version('transformers')}: {'; '.join(faults)}"
        )
    _add_image_adapter(full_model, checkpoint)
    drawn = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if any(name.rpartition(".")[0] in head_names for name in drawn):
        head = None  # transformers has drawn it at random
    return read_model, head


class _LoadingReport(logging.Filter):
    """Keeps the table that transformers logs of a model's weights: what matters is said in words.

    Attributes
    ----------
    unconverted : list of str
        Names of weights that could not be put together from those of the files.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unconverted: list[str] = []
        self._logger = logging.getLogger("transformers.modeling_utils")
        self._level = self._logger.level
        self._threshold = self._logger.getEffectiveLevel()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        rows = [line.split("|") for line in message.splitlines() if "| CONVERSION" in line]
        self.unconverted += [row[0].strip() for row in rows]
        return "LOAD REPORT" not in message and record.levelno >= self._threshold

    def __enter__(self) -> _LoadingReport:
        self._logger.addFilter(self)
        # That of the table, and one less: at a logger's level of WARNING transformers checks more.
        self._logger.setLevel(min(self._threshold, logging.WARNING - 1))
        return self

    def __exit__(self, *error: object) -> None:
        self._logger.removeFilter(self)
        self._logger.setLevel(self._level)


def _find_weight_faults(
    full_model: Any, read_model: Any, report: Mapping[str, Any], head_names: Collection[str]
) -> list[str]:
    """Say what is wrong with weights that are read, and what to do.

    Tied weights, and what transformers itself declares ignorable, are not in the report.
    """
    of_head = tuple(f"{head}." for head in head_names)
    tensors_read = {id(one) for one in chain(read_model.parameters(), read_model.buffers())}
    tensors = chain(
        full_model.named_parameters(remove_duplicate=False),
        full_model.named_buffers(remove_duplicate=False),
    )
    names = {
        name: id(tensor) in tensors_read and not name.startswith(of_head)
        for name, tensor in tensors
    }
    missing = [
        name
        for name in report["missing_keys"]
        if names.get(name, False) and not UNREAD_BUFFERS.search(name)
    ]
    left_over = [
        name
        for name in report["unexpected_keys"]
        if name not in names and not name.startswith(of_head)
    ]
    misshapen = [
        f"{name} ({_shape(in_file)} instead of {_shape(in_model)})"
        for name, in_file, in_model in report["mismatched_keys"]
        if names.get(name, False)
    ]
    faults = []
    if missing:
        faults.append(
            f"{len(missing):,} of its {sum(names.values()):,} weights are missing, and would be "
            f"drawn at random ({_first_of(missing)}): take a whole checkpoint of this "
            "architecture, or save the model again with save_pretrained"
        )
    if misshapen:
        faults.append(
            f"{len(misshapen):,} have another shape than in config.json ({_first_of(misshapen)}): "
            "parts of them are missing, or they and config.json are of different models"
        )
    if left_over:
        faults.append(
            f"{len(left_over):,} have no place in it, and would be left out "
            f"({_first_of(left_over)}): merge an adapter first (merge_and_unload); weights that "
            "nothing needs go when transformers loads the model and saves it with save_pretrained"
        )
    return faults


def _first_of(names: Collection[str]) -> str:
    first = sorted(names)[:3]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more:,} more" if more else "")


def _shape(sizes: Collection[int]) -> str:
    return " × ".join(map(str, sizes))


def _add_image_adapter(full_model: Any, checkpoint: Checkpoint) -> None:
    """Switch on the adapter without which a model does not read images as it was trained to.

    Raises
    ------
    ValueError
        There is one, and peft, which runs it, is not installed.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    subfolder = IMAGE_ADAPTERS.get(checkpoint.config.model_type)
    if subfolder is None:
        return
    source, _, hub_options, _ = checkpoint
    files = {name: hub_options[name] for name in ("revision", "local_files_only")}
    if find_adapter_config_file(source, subfolder=subfolder, **files) is None:
        tqdm.write(f"{source} has no {subfolder}: its weights are taken as merged with it")
        return
    if find_spec("peft") is None:
        raise ValueError(
            f"{source} reads images with the adapter in its folder {subfolder}, which needs peft: "
            "pip install peft"
        )
    full_model.load_adapter(source, adapter_kwargs={"subfolder": subfolder, **files})
    tqdm.write(f"{source}: with its adapter {subfolder}")


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
    candidates = _candidates()
    for candidate in candidates:
        if type(config) in candidate._model_mapping:
            return candidate
    return candidates[0]


def _candidates() -> tuple[Any, ...]:
    from transformers import (  # takes seconds
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    return AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM


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

    An adapter's are, as nothing but its class knows its layers.

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
        An adapter is made as its class makes it, with the weights that it loads, in their dtype.
    """
    source = find_adapter(model, home)
    if source is not None:
        vlm = _load_adapter(
            source,
            revision=revision,
            dtype=None,
            device="cpu",
            untrained=False,
            seed=0,
            with_head=False,
        )
        return Skeleton(vlm, sum(parameter.numel() for parameter in vlm.model.parameters()))
    checkpoint = open_checkpoint(
        model, revision=revision, trust_remote_code=trust_remote_code, home=home
    )
    processor = _load_processor(checkpoint) if with_processor else None
    with torch.device("meta"):
        full_model = auto_class(checkpoint.config).from_config(
            checkpoint.config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
        )
    parameters = sum(parameter.numel() for parameter in full_model.parameters())
    name = short_name(model, home)
    vlm = Vlm(
        name,
        NativeAdapter(name, remove_head(full_model), processor=processor),
        device="meta",
        dtype="bfloat16",
    )
    return Skeleton(vlm, parameters)


def stage_table(vlm: Vlm) -> pd.DataFrame:
    """Say what can be read of a model.

    Parameters
    ----------
    vlm : Vlm

    Returns
    -------
    DataFrame
        One row per stage that has layers: `stage`, `layers` (their number), `first`, `last`,
        `width` (d).
    """
    rows = [
        {
            "stage": stage,
            "layers": len(layers),
            "first": layers[0],
            "last": layers[-1],
            "width": stage_width(vlm, stage),
        }
        for stage, layers in vlm.layers_of_stage.items()
        if layers
    ]
    return pd.DataFrame(rows)


def stage_width(vlm: Vlm, stage: str) -> int:
    """Return the width (d) of a stage's hidden states."""
    if stage == "vision" and vlm.vision_blocks is not None:
        return width_of(vlm.vision_blocks)
    if stage == "experts" and vlm.experts:
        return int(next(iter(vlm.experts.values())).num_experts)  # type: ignore[arg-type]
    return vlm.width
