"""Frozen vision-language models with their processors, through transformers' Auto classes."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from probekit import paths

PRESETS = {  # short names for checkpoints: a hub id, or a folder of this project
    "tiny-qwen2-vl": "data/models/tiny-qwen2-vl",
    "tiny-fast-vlm": "data/models/tiny-fast-vlm",
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
    "fastvlm-0.5b": "KamilaMila/FastVLM-0.5B",  # transformers' own conversion of apple/FastVLM-0.5B
}


def locate(id_or_folder: str) -> str:
    """Absolute folder, or hub id, of a preset name, a folder (from the project's root) or a hub id."""
    wanted = PRESETS.get(id_or_folder, id_or_folder)
    folder = paths.resolve(wanted)
    if (folder / "config.json").exists():
        return str(folder)
    if folder.is_dir() or wanted.startswith((".", "/", "~", "data/")) or wanted.count("/") > 1:
        raise FileNotFoundError(f"{folder} is not a checkpoint folder (it has no config.json): give a folder with one, "
                                f"a hub id, or one of {', '.join(PRESETS)}")
    return wanted


def commit_of(id_or_folder: str, revision: str | None) -> str | None:
    """The commit that a hub id and revision stand for now; None for a folder, whose files speak for themselves."""
    from transformers import AutoConfig

    source = locate(id_or_folder)
    if Path(source).is_absolute():
        return None
    return AutoConfig.from_pretrained(source, revision=revision)._commit_hash


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
    """A frozen base model (no language-model head) and its processor; free its memory with :meth:`release`.

    Attributes
    ----------
    name : last part of the id or folder
    layers : names of what can be read, in the order of transformers' `hidden_states`: ``lm.00`` is the input
        embeddings, ``lm.k`` the output of block k, the last one after the final norm
    width : d, the decoder's hidden size
    """

    name: str
    model: torch.nn.Module | None
    processor: object
    device: str
    dtype: str
    revision: str | None
    layers: tuple[str, ...] = field(init=False)
    width: int = field(init=False)

    def __post_init__(self):
        text = self.model.config.get_text_config()
        self.layers = tuple(f"lm.{k:02d}" for k in range(text.num_hidden_layers + 1))
        self.width = text.hidden_size

    @property
    def decoder(self) -> torch.nn.Module:
        return self.model.get_decoder()

    def wrap(self, prompt: str) -> str:
        """The text that the model reads: image first, then the prompt, in the checkpoint's own chat template."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def prepare(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Processor output for n examples, one image and one prompt each, padded on the right, nothing cut off.

        Raises
        ------
        ValueError
            A prompt that is longer than the model's positions, or an example without image tokens.
        """
        texts = [self.wrap(prompt) for prompt in prompts]
        inputs = self.processor(
            images=list(images), text=texts, padding=True, padding_side="right", return_tensors="pt"
        )
        lengths = inputs["attention_mask"].sum(1)
        self.check_length(int(lengths.max()), prompts[int(lengths.argmax())])
        seen = self.shows_image(inputs["input_ids"]).sum(1)
        if not bool((seen > 0).all()):
            raise ValueError(f"{self.name} got no image token for the prompt {prompts[int(seen.argmin())][:80]!r}: "
                             "the chat template of this checkpoint does not place images")
        return dict(inputs)

    def check_length(self, tokens: int, prompt: str) -> None:
        """Raise ValueError where an example has more tokens than the model has positions."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and tokens > limit:
            raise ValueError(f"{tokens:,} tokens are more than the {limit:,} positions of {self.name}, in the prompt "
                             f"{prompt[:80]!r}: shorten it or lower longest_side")

    def _cut(self, prompt: str) -> tuple[str, str]:
        head, mark, tail = self.wrap(prompt).rpartition(self.processor.image_token)
        return head + mark, tail

    def prepare_image(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """Processor output for one image and the text before it: what all prompts on it share."""
        return dict(self.processor(images=[image], text=[self._cut("")[0]], return_tensors="pt"))

    def tokens_after_image(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of what follows the image, for each prompt.

        Raises
        ------
        ValueError
            The template puts text of the prompt before the image.
        """
        heads, tails = zip(*map(self._cut, prompts), strict=True)
        if set(heads) != {self._cut("")[0]}:
            raise ValueError(f"{self.name}: the prompt comes before the image, so that images cannot be shared")
        return self.processor.tokenizer(list(tails), add_special_tokens=False)["input_ids"]

    def place(self, inputs: dict) -> dict[str, torch.Tensor]:
        """Inputs on the model's device, its floating ones in the model's type."""
        placed = {key: value.to(self.device) for key, value in inputs.items() if torch.is_tensor(value)}
        return {key: value.to(getattr(torch, self.dtype)) if value.is_floating_point() else value
                for key, value in placed.items()}

    def shows_image(self, input_ids: torch.Tensor) -> torch.Tensor:
        """True where a token stands for a part of the image."""
        return input_ids == self.model.config.image_token_id

    def release(self) -> None:
        """Drop the weights and give their memory back."""
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_vlm(id_or_folder: str, revision: str | None = None, dtype: str | None = None, device: str | None = None,
             untrained: bool = False, seed: int = 0) -> Vlm:
    """Load a VLM and its processor, frozen and in evaluation mode.

    Parameters
    ----------
    id_or_folder : hub id, checkpoint folder, or a name out of :data:`PRESETS`
    revision : commit, tag or branch on the hub
    dtype : "float32", "bfloat16" or "float16"; None chooses by device (:func:`best_dtype`)
    device : "cpu", "cuda", "cuda:1", "mps"; None takes the best one there is
    untrained : random weights (drawn from `seed`) in the same architecture, the control of an untrained model

    Raises
    ------
    FileNotFoundError, OSError
        No such folder, or no such checkpoint on the hub or in its cache.
    ValueError
        The checkpoint's processor has no chat template.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor  # seconds, and not always needed

    device = device or best_device()
    dtype = dtype or best_dtype(device)
    source = locate(id_or_folder)
    config = AutoConfig.from_pretrained(source, revision=revision)
    processor = AutoProcessor.from_pretrained(source, revision=revision)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"the processor of {id_or_folder} has no chat template: take an instruction-tuned checkpoint")
    if untrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            full = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    else:
        full = AutoModelForImageTextToText.from_pretrained(source, revision=revision, dtype=getattr(torch, dtype))
    base = full.base_model.eval().requires_grad_(False).to(device)
    return Vlm(Path(source).name, base, processor, device, dtype, getattr(config, "_commit_hash", None))
