"""What a model is given: one image with its prompts, through the checkpoint's own processor and chat template."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from probekit.models import architectures


@dataclass(frozen=True)
class PreparedImage:
    """One image with its k prompts, as the checkpoint's processor makes them.

    Attributes
    ----------
    image_inputs : what belongs to the image (pixels, grids), first axis: parts of the image
    tokens : for each prompt what belongs to its tokens, (t, ...) arrays; ``input_ids`` among them
    image_masks : (k, t) as lists: True at image tokens
    """

    image_inputs: dict[str, torch.Tensor]
    tokens: list[dict[str, np.ndarray]]
    image_masks: list[np.ndarray]

    def with_prompt(self, k: int) -> PreparedImage:
        """The image with its k-th prompt alone."""
        return PreparedImage(self.image_inputs, [self.tokens[k]], [self.image_masks[k]])

    @property
    def prefix_length(self) -> int:
        """Number of tokens up to the image's last one."""
        return int(np.flatnonzero(self.image_masks[0])[-1]) + 1 if self.image_masks[0].any() else 1


class _Once:
    """Stands in for an image processor: processes one image, and says of its copies what it said of that one.

    Pixels of the copies have the right shape but no meaning: the processor only asks for shapes and grids.
    """

    def __init__(self, honest):
        self.honest, self.output = honest, {}

    def __call__(self, images, *arguments, **options):
        self.output = self.honest(images[:1], *arguments, **options)
        return type(self.output)({key: self._copies(value, len(images)) for key, value in self.output.items()})

    @staticmethod
    def _copies(value, k: int):
        if torch.is_tensor(value) and value.is_floating_point():
            return value[:1].expand(k * len(value), *value.shape[1:])
        if torch.is_tensor(value):
            return value.repeat(k, *[1] * (value.ndim - 1))
        return value * k if isinstance(value, list) else value

    def __getattr__(self, name: str):
        return getattr(self.honest, name)


@dataclass(frozen=True)
class PromptProcessor:
    """Turns images and prompts into a model's inputs; knows its config and processor, not its weights."""

    name: str
    config: object
    processor: object
    token_types: bool = False  # does the model read `mm_token_type_ids`? without them some are wrong in silence

    @cached_property
    def image_id(self) -> int | None:
        """Id of the token that stands for parts of an image; None where images do not enter as tokens."""
        for owner in (self.config, self.processor):
            for name in ("image_token_id", "image_token_index", "image_patch_id"):
                if isinstance(getattr(owner, name, None), int):
                    return getattr(owner, name)
        return None

    @cached_property
    def _reserved(self) -> dict[str, int]:
        """What stands for something else than text, such as ``<|im_end|>`` and ``<image>``, and its token."""
        tokenizer, own = self.processor.tokenizer, vars(self.processor)
        added = [token.content for token in tokenizer.added_tokens_decoder.values()
                 if token.special or re.fullmatch(r"[<\[].*[>\]]", token.content)]
        words = [*added, *tokenizer.all_special_tokens, *(own[name] for name in own if name.endswith("_token"))]
        return {word: tokenizer.convert_tokens_to_ids(word) for word in words
                if isinstance(word, str) and len(word.strip()) > 1}

    @cached_property
    def _spelt(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, sorted(self._reserved, key=len, reverse=True))) or r"\b\B")

    def escape(self, prompt: str) -> str:
        """The prompt as nothing but text: a special token that it spells out gets a space after its first character.

        Else a caption with ``<|im_end|>`` in it would end the user's turn, and one with ``<image>`` ask for an image.

        Raises
        ------
        ValueError
            It has special tokens nevertheless, spelt in another way that the tokenizer takes for theirs.
        """
        text = prompt
        while found := self._spelt.search(text):
            warnings.warn(f"{self.name}: {found[0]!r} in a prompt is read as text, with a space after its first "
                          "character", stacklevel=2)
            text = self._spelt.sub(lambda word: f"{word[0][0]} {word[0][1:]}", text)
        tokenizer = self.processor.tokenizer
        ids = set(tokenizer(text, add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}
        word = next((word for word, token in self._reserved.items() if token in ids), None)
        if word:
            raise ValueError(f"{self.name} reads {word!r} in the prompt {prompt[:80]!r}, which is no text: take it out")
        return text

    def wrap(self, prompt: str, image: bool = True) -> str:
        """The text that the model reads: image first, then the prompt, in the checkpoint's own chat template."""
        if getattr(self.processor, "chat_template", None) is None:
            before, _, after = architectures.special(self.config).prompt.partition("{prompt}")
            shown = str(getattr(self.processor, "image_token", None) or "") if image else ""
            return before.replace("{image}", shown) + prompt + after
        content = [{"type": "image"}] * image + [{"type": "text", "text": prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def prepare(self, image: Image.Image | None, prompts: Sequence[str]) -> PreparedImage:
        """What the processor makes of one image with each of k prompts; the image itself is processed once.

        Without an image the prompts go through the template and the tokenizer alone.

        Raises
        ------
        ValueError
            A prompt that is longer than the model's positions, that is not all text, or that changes how often the
            image is seen.
        """
        texts = [self.wrap(self.escape(prompt), image is not None) for prompt in prompts]
        start = getattr(self.processor.tokenizer, "bos_token", None)
        written = bool(start) and texts[0].startswith(start)  # by the template
        options = {"add_special_tokens": False} if written else {}
        if image is None:
            return self._text_only(texts, prompts, options)
        honest = self.processor.image_processor
        self.processor.image_processor = once = _Once(honest)
        options |= {"return_mm_token_type_ids": True} if self.token_types else {}
        size = 1 if architectures.special(self.config).one_at_a_time else len(prompts)
        tokens = []
        try:
            for group in (texts[at : at + size] for at in range(0, len(texts), size)):
                made = self.processor(images=[[image]] * len(group), text=group, padding=True, padding_side="right",
                                      return_tensors="pt", **options)
                of_image = {*once.output} - {"attention_mask"}
                tokens += _unpadded({key: value.numpy() for key, value in made.items() if key not in of_image})
        finally:
            self.processor.image_processor = honest
        shown = [self._shown(row) for row in tokens]
        self._check_lengths(tokens, prompts)
        counts = [int(mask.sum()) for mask in shown]
        wrong = next((k for k, count in enumerate(counts) if count != min(counts)), None)
        if wrong is not None:
            raise ValueError(f"{self.name} sees {counts[wrong]} image tokens instead of {min(counts)} with the prompt "
                             f"{prompts[wrong][:80]!r}: take out the words that stand for an image there")
        if self.image_id is not None and not counts[0]:
            raise ValueError(f"{self.name} got no image token for the prompt {prompts[0][:80]!r}: the chat template "
                             "of this checkpoint does not place images")
        return PreparedImage({key: once.output[key] for key in made if key in of_image}, tokens, shown)

    def _shown(self, row: dict[str, np.ndarray]) -> np.ndarray:
        mask = row.get("image_embeds_position_mask")
        return row["input_ids"] == self.image_id if mask is None else mask == 1

    def _text_only(self, texts: list[str], prompts: Sequence[str], options: dict[str, bool]) -> PreparedImage:
        tokens = [{"input_ids": np.array(ids)} for ids in self.processor.tokenizer(texts, **options)["input_ids"]]
        self._check_lengths(tokens, prompts)
        return PreparedImage({}, tokens, [np.zeros(len(row["input_ids"]), bool) for row in tokens])

    def _check_lengths(self, tokens: list[dict[str, np.ndarray]], prompts: Sequence[str]) -> None:
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        k = int(np.argmax([len(row["input_ids"]) for row in tokens]))
        if limit and len(tokens[k]["input_ids"]) > limit:
            raise ValueError(f"{len(tokens[k]['input_ids']):,} tokens are more than the {limit:,} positions of "
                             f"{self.name}, in the prompt {prompts[k][:80]!r}: shorten it or lower longest_side")


def _unpadded(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The rows of a batch that is padded on the right, each without its padding."""
    lengths = {}
    for key in batch:
        own = key.removesuffix("input_ids").removesuffix("attention_mask") + "attention_mask"
        mask = batch[own] if own in batch and batch[own].ndim == 2 else batch["attention_mask"]
        lengths[key] = mask.sum(1)
    return [{key: values[i, : lengths[key][i]] for key, values in batch.items()} for i in range(len(mask))]
