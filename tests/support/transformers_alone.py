"""Hidden states of one image and one prompt, by transformers alone.

Nothing of the package is used here, so that what it reads can be compared with something else.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoProcessor as Processors

# What a prompt becomes where a checkpoint has no chat template; without an image its token is away.
FORMATS = {
    "paligemma": "<image>{}",
    "chameleon": "<image>{}",
    "phi4_multimodal": "<image>{}",
    "blip-2": "Question: {} Answer:",
    "kosmos-2": "Question: {} Answer:",
}
# Models whose whole forward pass wants an image, by the attribute that is their language model.
LANGUAGE_MODELS = {
    "blip-2": "language_model",
    "instructblip": "language_model",
    "kosmos-2": "text_model",
}


class Reference(NamedTuple):
    """What a model holds of one prompt.

    Attributes
    ----------
    token_ids : list of int
        t of them.
    layers_td : list of Tensor
        (t, d) of each layer, in the order of `hidden_states`.
    """

    token_ids: list[int]
    layers_td: list[torch.Tensor]


class TransformersAlone:
    """A checkpoint, loaded by the Auto classes, that runs one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self.config = AutoConfig.from_pretrained(folder)
        self.type = self.config.model_type
        is_listed = type(self.config) in AutoModelForImageTextToText._model_mapping
        models = AutoModelForImageTextToText if is_listed else AutoModelForCausalLM
        self.model = models.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = Processors.from_pretrained(folder)

    @torch.inference_mode()
    def run(self, image: Image.Image | None, prompt: str) -> Reference:
        """Run one prompt with or without an image."""
        inputs = self.prepare(image, self.write(image, prompt))
        token_ids = inputs["input_ids"][0].tolist()
        model = self.model
        if image is None and self.type in LANGUAGE_MODELS:
            model = getattr(model, LANGUAGE_MODELS[self.type])
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if self.reads_text_in_an_encoder:
            inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
        output = model(**inputs, output_hidden_states=True, use_cache=False)
        layers_td = [self.merge(one)[0] for one in self.select(output)]
        if image is None and self.type == "mllama":
            # Blocks that read the image do not run, and transformers returns nothing for them.
            for block in self.config.text_config.cross_attention_layers:
                layers_td.insert(block + 1, layers_td[block])
        return Reference(token_ids, layers_td)

    @property
    def reads_text_in_an_encoder(self) -> bool:
        """Whether image and prompt are read by the encoder of an encoder-decoder model."""
        return self.config.is_encoder_decoder or self.config.get_text_config().is_encoder_decoder

    def write(self, image: Image.Image | None, prompt: str) -> str:
        """Write the text of a turn."""
        template = getattr(self.processor, "chat_template", None)
        template = template or self.processor.tokenizer.chat_template
        if template is None:
            text = FORMATS.get(self.type, "{}").format(prompt)
            return text if image is not None else text.replace("<image>", "")
        content: list[dict[str, str]] = [{"type": "image"}] if image is not None else []
        content.append({"type": "text", "text": prompt})
        turn = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(
            turn, chat_template=template, add_generation_prompt=True
        )

    def prepare(self, image: Image.Image | None, text: str) -> dict[str, Any]:
        """Put text and image through the processor, without more."""
        if image is not None:
            extra = {}
            arguments = inspect.signature(self.model.base_model.forward).parameters
            if "mm_token_type_ids" in arguments:
                extra["return_mm_token_type_ids"] = True
            inputs = self.processor(images=image, text=text, return_tensors="pt", **extra)
            return {
                name: value.float() if value.is_floating_point() else value
                for name, value in inputs.items()
                if torch.is_tensor(value)
            }
        if self.type == "paligemma":  # its processor wants an image
            return dict(self.processor.tokenizer(text, return_tensors="pt"))
        return dict(self.processor(text=text, return_tensors="pt"))

    def select(self, output: Any) -> tuple[torch.Tensor, ...]:
        """Find the hidden states of the language model in an output."""
        name = "encoder_hidden_states" if self.reads_text_in_an_encoder else "hidden_states"
        states = getattr(output, name, None)
        if states is None:
            states = getattr(output.language_model_outputs, name)
        return states

    def merge(self, hidden: torch.Tensor) -> torch.Tensor:
        """Average parallel streams into (n, t, d)."""
        if self.type == "gemma3n":
            return hidden.mean(0)
        if self.type == "qwen4_exp":
            width = self.config.get_text_config().hidden_size
            return torch.stack(hidden.split(width, -1)).mean(0)
        return hidden


def pool(hidden_td: torch.Tensor) -> dict[str, np.ndarray]:
    """The poolings that are compared, (d,) each."""
    return {
        "mean": hidden_td.mean(0).numpy(),
        "max": hidden_td.amax(0).numpy(),
        "last": hidden_td[-1].numpy(),
    }
