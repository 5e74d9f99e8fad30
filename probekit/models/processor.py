"""What a model is given: one image with its prompts.

They go through the checkpoint's own processor and chat template.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image

from probekit.models.architectures import find_special_case

IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index", "image_patch_id")
# By `model_type`: where a processor keeps the word that stands for an image, if it is not the token
# that stands for a part of one.
IMAGE_WORD_NAMES = {"gemma3": "boi_token", "t5gemma2": "boi_token", "llama4": "fake_image_token"}
# How image and prompt can be handed to a chat template.
FORMS = ("parts", "word in parts", "word")
# The day of templates that write today's date, so that no state depends on when it was extracted:
# the one that Llama's templates fall back on themselves.
FIXED_DAY = date(2024, 7, 26)
TODAY_PATTERN = re.compile(r"""strftime_now\(\s*(['"])(?P<form>.*?)\1\s*\)""")


@dataclass(frozen=True)
class PreparedImage:
    """One image with its k prompts, as the checkpoint's processor makes them.

    Attributes
    ----------
    image_inputs : dict of str to Tensor
        What belongs to the image (pixels, grids); the first axis runs over parts of the image.
        Empty for prompts without an image.
    tokens : list of dict of str to ndarray
        For each of the k prompts what belongs to its tokens, (t, ...) arrays; ``input_ids`` is one.
    image_masks : list of ndarray
        For each of the k prompts (t,) bool, True at image tokens.
    marks : mapping of str to ndarray
        Some of its image tokens by a name: (image tokens,) bool.
    """

    image_inputs: dict[str, torch.Tensor]
    tokens: list[dict[str, np.ndarray]]
    image_masks: list[np.ndarray]
    marks: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of_ids(
        cls,
        ids: Sequence[Sequence[int]],
        *,
        image_id: int | None = None,
        image_inputs: Mapping[str, torch.Tensor] | None = None,
    ) -> PreparedImage:
        """Put together what an adapter prepares (:class:`probekit.models.protocol.Adapter`).

        Parameters
        ----------
        ids : sequence of sequences of int
            The token ids of each prompt, with one id for each vector of the image.
        image_id : int or None
            The id that stands for a vector of the image; None where there is no image.
        image_inputs : mapping of str to Tensor or None
            What belongs to the image; the first axis runs over its parts, and is 1 for one image.
        """
        tokens = [{"input_ids": np.asarray(row, dtype=np.int64)} for row in ids]
        masks = [
            np.zeros(len(row["input_ids"]), dtype=bool)
            if image_id is None
            else row["input_ids"] == image_id
            for row in tokens
        ]
        return cls(dict(image_inputs or {}), tokens, masks)

    def with_prompt(self, k: int) -> PreparedImage:
        """Return the image with its k-th prompt alone."""
        return self.with_prompts([k])

    def with_prompts(self, places: Sequence[int]) -> PreparedImage:
        """Return the image with some of its prompts."""
        return replace(
            self,
            tokens=[self.tokens[k] for k in places],
            image_masks=[self.image_masks[k] for k in places],
        )

    def with_inputs(self, change: Callable[[Any], Any]) -> PreparedImage:
        """Return the image with each of its inputs changed."""
        inputs = {name: change(value) for name, value in self.image_inputs.items()}
        return replace(self, image_inputs=inputs)

    @property
    def prefix_length(self) -> int:
        """Number of tokens up to and including the image's last one; 1 without an image."""
        places = np.flatnonzero(self.image_masks[0])
        return int(places[-1]) + 1 if len(places) else 1


class EscapedPrompts(NamedTuple):
    """Prompts that are nothing but text, with the token ids of each alone; both are (k,)."""

    texts: list[str]
    token_ids: list[list[int]]


class _SingleImageProcessor:
    """Stands in for an image processor: processes the first image, and repeats the result.

    A processor with k texts wants k images, of which it reads no more than shapes and grids. The
    repeated pixels are no more than views of the first.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.output: Any = {}

    def __call__(self, images: Sequence, *arguments: Any, **options: Any) -> Any:
        self.output = self.original(images[:1], *arguments, **options)
        repeated = {name: self._repeat(value, len(images)) for name, value in self.output.items()}
        return type(self.output)(repeated)

    @staticmethod
    def _repeat(value: Any, k: int) -> Any:
        if torch.is_tensor(value) and value.is_floating_point():
            return value[:1].expand(k * len(value), *value.shape[1:])
        if torch.is_tensor(value):
            return value.repeat(k, *[1] * (value.ndim - 1))
        if isinstance(value, list):
            return value * k
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


@dataclass(frozen=True)
class PromptProcessor:
    """Turns images and prompts into a model's inputs.

    It knows the model's config and processor, not its weights.

    Attributes
    ----------
    name : str
        Of the model, for messages.
    config : transformers.PreTrainedConfig
    processor : transformers.ProcessorMixin
    needs_token_types : bool
        Whether the model reads ``mm_token_type_ids``. Without them some models compute wrong
        states, and raise nothing.
    """

    name: str
    _: KW_ONLY
    config: Any
    processor: Any
    needs_token_types: bool = False

    @cached_property
    def image_id(self) -> int | None:
        """Id of the token that stands for parts of an image; None where there is no such token."""
        for holder in (self.config, self.processor):
            for name in IMAGE_TOKEN_NAMES:
                token_id = getattr(holder, name, None)
                if isinstance(token_id, int):
                    return token_id
        return None

    @cached_property
    def _reserved_words(self) -> dict[str, int]:
        """Words that are not text, such as ``<|im_end|>`` and ``<image>``, with their token ids."""
        tokenizer = self.processor.tokenizer
        words = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special or re.fullmatch(r"[<\[].*[>\]]", token.content)
        ]
        words += tokenizer.all_special_tokens
        words += [value for name, value in vars(self.processor).items() if name.endswith("_token")]
        return {
            word: tokenizer.convert_tokens_to_ids(word)
            for word in words
            if isinstance(word, str) and len(word.strip()) > 1
        }

    @cached_property
    def _reserved_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._reserved_words, key=len, reverse=True)
        never = r"\b\B"
        return re.compile("|".join(re.escape(word) for word in longest_first) or never)

    def escape(self, prompts: Sequence[str]) -> EscapedPrompts:
        """Return prompts as nothing but text: a space breaks up special tokens in them.

        Otherwise a caption with ``<|im_end|>`` in it would end the user's turn, and one with
        ``<image>`` would ask for an image.

        Parameters
        ----------
        prompts : sequence of str
            (k,)

        Raises
        ------
        ValueError
            One still has special tokens, in a spelling that only the tokenizer takes for one.

        Warns
        -----
        UserWarning
            A prompt spells out a special token.
        """
        texts = [self._break_up_reserved_words(prompt) for prompt in prompts]
        token_ids = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for ids, prompt in zip(token_ids, prompts, strict=True):
            self._check_reserved_tokens(ids, prompt)
        return EscapedPrompts(texts, token_ids)

    def _break_up_reserved_words(self, prompt: str) -> str:
        text = prompt
        match = self._reserved_pattern.search(text)
        while match is not None:
            warnings.warn(
                f"{self.name}: {match[0]!r} in a prompt is read as text, with a space after its "
                "first character",
                stacklevel=2,
            )
            text = self._reserved_pattern.sub(_break_up, text)
            match = self._reserved_pattern.search(text)
        return text

    def _check_reserved_tokens(self, ids: Sequence[int], prompt: str) -> None:
        reserved_ids = set(ids) - {self.processor.tokenizer.unk_token_id}
        for word, token_id in self._reserved_words.items():
            if token_id in reserved_ids:
                raise ValueError(
                    f"{self.name} reads the special token {word!r} in the prompt {prompt[:80]!r}: "
                    "take it out"
                )

    @cached_property
    def chat_template(self) -> str | None:
        """The checkpoint's chat template; of several the one called "default".

        Where it writes today's date, it writes that of `FIXED_DAY`.

        Raises
        ------
        ValueError
            None of several is called "default", or the form of the date is not in the template.
        """
        template = self.processor.chat_template
        if isinstance(template, list):
            template = {named["name"]: named["template"] for named in template}
        if isinstance(template, dict):
            template = self._select_template(template)
        template = TODAY_PATTERN.sub(
            lambda call: repr(FIXED_DAY.strftime(call["form"])), template or ""
        )
        if "strftime_now(" in template:
            raise ValueError(
                f"{self.name}: the chat template of this checkpoint writes today's date, so states "
                "would differ from day to day: put a date in the place of strftime_now(...)"
            )
        return template or None

    def _select_template(self, templates: Mapping[str, str]) -> str | None:
        if len(templates) > 1 and "default" not in templates:
            raise ValueError(
                f"{self.name} has several chat templates ({', '.join(templates)}) and none called "
                "default: save the one that is meant as chat_template.jinja"
            )
        return templates.get("default", next(iter(templates.values()), None))

    @cached_property
    def _image_word(self) -> str:
        """The word that a processor replaces by an image; empty where it places images itself."""
        name = IMAGE_WORD_NAMES.get(self.config.model_type, "image_token")
        return str(getattr(self.processor, name, None) or "")

    @property
    def _places_images(self) -> bool:
        """Whether the processor places images itself, wherever the text has none."""
        return "{image}" not in find_special_case(self.config).prompt_format

    def wrap(self, prompt: str, *, with_image: bool = True) -> str:
        """Return the text that the model reads: image and prompt in the chat template.

        Parameters
        ----------
        prompt : str
        with_image : bool
            False leaves the image out.

        Raises
        ------
        ValueError
            The chat template does not place images.
        """
        if self.chat_template is not None:
            return self._fill_template(self._content_form, prompt, with_image=with_image)
        before, _, after = find_special_case(self.config).prompt_format.partition("{prompt}")
        before = before.replace("{image}", self._image_word if with_image else "")
        return before + prompt + after

    def _fill_template(self, form: str, prompt: str, *, with_image: bool) -> str:
        """Return image and prompt in the chat template, handed over in one of the `FORMS`."""
        with_image = with_image and not self._places_images
        word = self._image_word if with_image else ""
        content: str | list[dict[str, str]] = word + prompt
        if form == "word in parts":
            content = [{"type": "text", "text": word + prompt}]
        if form == "parts":
            content = [{"type": "image"}] if with_image else []
            content.append({"type": "text", "text": prompt})
        messages = [{"role": "user", "content": content}]
        if form == "parts":
            return self.processor.apply_chat_template(
                messages, chat_template=self.chat_template, add_generation_prompt=True
            )
        return self.processor.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )

    @cached_property
    def _content_form(self) -> str:
        """The first of the `FORMS` in which the chat template shows both image and prompt.

        Templates of processors take parts; many that only the tokenizer has take text.

        Raises
        ------
        ValueError
            There is none.
        """
        prompt = "Is there a dog?"
        for form in FORMS:
            try:
                text = self._fill_template(form, prompt, with_image=True)
                text_alone = self._fill_template(form, prompt, with_image=False)
            except (TemplateError, TypeError, ValueError):
                continue  # the template wants the content in another form
            shows_prompt = prompt in text and "'type'" not in text
            shows_image = text != text_alone
            if form != "parts":
                shows_image = bool(self._image_word) and text.count(self._image_word) == 1
            if shows_prompt and (shows_image or self._places_images):
                return form
        raise ValueError(
            f"{self.name}: the chat template of this checkpoint does not show one image and the "
            "prompt: take that of the model it was trained from (save its processor beside the "
            "weights), or delete the template"
        )

    def describe_format(self) -> str | None:
        """Say what the model is given where the checkpoint leaves that open, in one line.

        Returns
        -------
        str or None
            None with a chat template that takes images, and for architectures that are known to
            have none.
        """
        has_known_format = find_special_case(self.config).prompt_format != "{image}{prompt}"
        if self.chat_template is None and not has_known_format:
            return (
                f"{self.name} has no chat template: it is given {self.wrap('{prompt}')!r}; where "
                "it was trained with one, save that beside it as chat_template.jinja"
            )
        if self.chat_template is not None and self._content_form != "parts":
            return (
                f"{self.name} has a chat template for text: the image comes right before the "
                f"prompt, {self.wrap('{prompt}')!r}"
            )
        return None

    def prepare(self, image: Image.Image | None, prompts: Sequence[str]) -> PreparedImage:
        """Put one image and each of k prompts through the processor; the image is processed once.

        Parameters
        ----------
        image : PIL.Image.Image or None
            None puts the prompts through the template and the tokenizer alone.
        prompts : sequence of str

        Returns
        -------
        PreparedImage

        Raises
        ------
        ValueError
            A prompt is longer than the model's positions, has special tokens, or changes the number
            of image tokens; or the chat template places no image.
        """
        escaped = self.escape(prompts)
        texts = [self.wrap(text, with_image=image is not None) for text in escaped.texts]
        options = self._tokenizer_options(texts[0])
        if image is None:
            image_inputs: dict[str, torch.Tensor] = {}
            tokens = [
                {"input_ids": np.array(self._tokenize_alone(text, options))} for text in texts
            ]
            image_masks = [np.zeros(len(row["input_ids"]), dtype=bool) for row in tokens]
        else:
            image_inputs, tokens = self._process(image, texts, options)
            image_masks = [self._find_image_tokens(row) for row in tokens]
        self._check_lengths(tokens, prompts)
        self._check_that_prompts_are_in(tokens, image_masks, escaped)
        if image is not None:
            self._check_image_tokens(image_masks, prompts)
        return PreparedImage(image_inputs, tokens, image_masks)

    def decode(self, ids: Sequence[int]) -> str:
        """Return token ids as text, special tokens included."""
        return self.processor.tokenizer.decode(list(ids))

    def _tokenizer_options(self, text: str) -> dict[str, bool]:
        """Keep the tokenizer from adding a first token where the chat template has written it."""
        first_token = getattr(self.processor.tokenizer, "bos_token", None)
        if first_token and text.startswith(str(first_token)):
            return {"add_special_tokens": False}
        return {}

    def _tokenize_alone(self, text: str, options: Mapping[str, bool]) -> list[int]:
        """Return the token ids of a text without an image.

        Some processors write a first token that their tokenizer does not; some want an image. Of
        several texts at once some would pad the shorter ones.
        """
        try:
            return self.processor(text=[text], **options)["input_ids"][0]
        except (TypeError, ValueError, AttributeError):
            return self.processor.tokenizer([text], **options)["input_ids"][0]

    def _process(
        self, image: Image.Image, texts: Sequence[str], options: Mapping[str, bool]
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, np.ndarray]]]:
        """Return the image's inputs, and for each text what belongs to its tokens."""
        token_types = {"return_mm_token_type_ids": True} if self.needs_token_types else {}
        group_size = 1 if find_special_case(self.config).one_text_per_call else len(texts)
        image_inputs: dict[str, torch.Tensor] = {}
        tokens: list[dict[str, np.ndarray]] = []
        original = self.processor.image_processor
        single = _SingleImageProcessor(original)
        self.processor.image_processor = single
        try:
            for start in range(0, len(texts), group_size):
                group = texts[start : start + group_size]
                batch = self.processor(
                    images=[[image]] * len(group),
                    text=group,
                    padding=True,
                    padding_side="right",
                    return_tensors="pt",
                    **options,
                    **token_types,
                )
                # A mask of the image processor gives way to the tokenizer's mask of the same name.
                image_names = set(single.output) - {"attention_mask"}
                image_inputs = {name: single.output[name] for name in batch if name in image_names}
                if "input_ids" not in batch:
                    raise ValueError(
                        f"the processor of {self.name} makes no tokens of a prompt (it returns "
                        f"{', '.join(batch)}), so this checkpoint cannot be probed"
                    )
                if len(batch["input_ids"]) != len(group):
                    raise ValueError(
                        f"the processor of {self.name} makes {len(batch['input_ids'])} rows of "
                        f"{len(group)} prompts, so this checkpoint cannot be probed"
                    )
                of_tokens = {
                    name: values.numpy()
                    for name, values in batch.items()
                    if name not in image_names
                }
                tokens += _split_unpadded(of_tokens)
        finally:
            self.processor.image_processor = original
        for name, value in image_inputs.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"the processor of {self.name} returns {name} as a {type(value).__name__}, not "
                    "as a tensor, so this checkpoint cannot be probed"
                )
        return image_inputs, tokens

    def _find_image_tokens(self, row: Mapping[str, np.ndarray]) -> np.ndarray:
        """(t,) True at image tokens; Kosmos-2 has a mask of its own for them."""
        if "image_embeds_position_mask" in row:
            return row["image_embeds_position_mask"] == 1
        return row["input_ids"] == self.image_id

    def _check_lengths(
        self, tokens: Sequence[Mapping[str, np.ndarray]], prompts: Sequence[str]
    ) -> None:
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        lengths = [len(row["input_ids"]) for row in tokens]
        longest = int(np.argmax(lengths))
        if limit and lengths[longest] > limit:
            raise ValueError(
                f"{lengths[longest]:,} tokens are more than the {limit:,} positions of "
                f"{self.name}, in the prompt {prompts[longest][:80]!r}: shorten it or lower "
                "longest_side"
            )

    def _check_that_prompts_are_in(
        self,
        tokens: Sequence[Mapping[str, np.ndarray]],
        image_masks: Sequence[np.ndarray],
        prompts: EscapedPrompts,
    ) -> None:
        """Refuse tokens that do not contain their prompt."""
        tokenizer = self.processor.tokenizer
        for row, mask, prompt, prompt_ids in zip(
            tokens, image_masks, prompts.texts, prompts.token_ids, strict=True
        ):
            if _contains(row["input_ids"].tolist(), prompt_ids):
                continue
            # Beside other text its first and last tokens may be others.
            text = "".join(tokenizer.decode(row["input_ids"][~mask]).split())
            if "".join(tokenizer.decode(prompt_ids).split()) not in text:
                raise ValueError(
                    f"the processor or the chat template of {self.name} leaves out the prompt "
                    f"{prompt[:80]!r}: what it makes of it is {text[:200]!r}"
                )

    def _check_image_tokens(
        self, image_masks: Sequence[np.ndarray], prompts: Sequence[str]
    ) -> None:
        counts = [int(mask.sum()) for mask in image_masks]
        fewest = min(counts)
        for count, prompt in zip(counts, prompts, strict=True):
            if count != fewest:
                raise ValueError(
                    f"{self.name} gets {count} image tokens instead of {fewest} with the prompt "
                    f"{prompt[:80]!r}: take out the words that stand for an image there"
                )
        if self.image_id is not None and fewest == 0:
            raise ValueError(
                f"{self.name} gets no image token with {self.wrap(prompts[0][:80])!r}: its chat "
                "template does not name an image as its processor expects it; take template and "
                "processor of one model"
            )


def _contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    """Whether some ids have a part, in its order and without a gap."""
    return f" {' '.join(map(str, part))} " in f" {' '.join(map(str, ids))} "


def _break_up(match: re.Match[str]) -> str:
    word = match[0]
    return f"{word[0]} {word[1:]}"


def _split_unpadded(batch: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Split a batch that is padded on the right into rows without padding."""
    lengths = {name: _mask_of(batch, name).sum(1) for name in batch}
    return [
        {name: values[i, : lengths[name][i]] for name, values in batch.items()}
        for i in range(len(batch["input_ids"]))
    ]


def _mask_of(batch: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Find the mask that says what of an array is padding.

    ``qformer_input_ids`` has ``qformer_attention_mask``; most have ``attention_mask``.
    """
    tokenizer_name = name.removesuffix("input_ids").removesuffix("attention_mask")
    mask = batch.get(f"{tokenizer_name}attention_mask")
    if mask is not None and mask.ndim == 2:
        return mask
    return batch["attention_mask"]
