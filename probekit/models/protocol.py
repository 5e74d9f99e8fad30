"""What extraction needs of a model: the protocol that every model is read through.

:class:`probekit.models.native.NativeAdapter` implements it for what transformers has. A class of
your own with the members of :class:`Adapter` is read the same way; the other protocols here are
optional. ``docs/models.md`` has an example of 60 lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from probekit.models.processor import PreparedImage

Inputs = Mapping[str, torch.Tensor]


class Adapter(Protocol):
    """A model as extraction reads it. Nothing is to be inherited from.

    Optional attributes, besides those of the other protocols:

    ``tokenizer``
        With ``tokenizer(text, add_special_tokens=False)["input_ids"]``, ``decode`` and
        ``pad_token_id``, as transformers' have them.
    ``prompt_format``
        Text around ``{prompt}``, for people to read.
    ``vision_blocks``
        A list of the image encoder's blocks, for the stage ``vision``. Their output is
        (images, patches, d).
    ``width``
        d, where neither the final norm nor the output embedding shows it.
    ``prepares_with_model``
        True where `prepare` runs the model; then no worker processes prepare images.
    ``weights``
        Of the class: files or folders that it loads, from the folder of its own file. Activations
        are filed by them, too.

    Arguments of the class that are filled in, where it has them: ``untrained`` (random weights
    instead of trained ones) and ``seed``.

    Attributes
    ----------
    model : torch.nn.Module
        All of its weights. They are frozen, moved to the device, and changed to the dtype.
    blocks : sequence of torch.nn.Module
        The l - 1 blocks that read image and prompt together. What enters the first one and leaves
        each one is (n, t, d), or a tuple that begins with it.
    final_norm : torch.nn.Module
        The norm after the last block, or a module around the blocks that ends with it.
    """

    model: nn.Module
    blocks: Any
    final_norm: nn.Module

    def prepare(self, image: Image.Image | None, prompts: Sequence[str]) -> PreparedImage:
        """Turn one image and its prompts into inputs, with the image's tokens marked.

        :meth:`probekit.models.processor.PreparedImage.of_ids` puts them together. With None for
        the image, the prompts alone. Equal images and prompts give equal inputs.
        """
        ...

    def forward(self, tokens: Inputs, images: Inputs) -> Any:
        """Run the blocks and the final norm once over n prompts; what it returns is not read.

        Parameters
        ----------
        tokens : mapping of str to Tensor
            ``input_ids`` and ``attention_mask``, (n, t), padded on the right. No token looks at one
            where the mask is 0.
        images : mapping of str to Tensor
            What `prepare` made of the images, those of the n prompts one after the other along the
            first axis; empty without an image.
        """
        ...


class SharesPrefixes(Protocol):
    """Optional: an image runs once for all its prompts. Without it, every prompt runs whole."""

    def forward_prefix(self, tokens: Inputs, images: Inputs) -> Any:
        """Run what b images' prompts have in common; return a cache of it.

        `tokens` are (b, t), without padding.
        """
        ...

    def forward_suffix(self, tokens: Inputs, cache: Any, owner_n: torch.Tensor) -> None:
        """Run the rest of n prompts, each after one of the b prefixes.

        Parameters
        ----------
        tokens : mapping of str to Tensor
            ``input_ids`` is (n, s), padded on the right; ``attention_mask`` is (n, t + s).
        cache
            What `forward_prefix` returned.
        owner_n : Tensor
            (n,) which of the b prefixes a prompt goes on from.
        """
        ...


class EncodesImages(Protocol):
    """Optional: what the image encoder hands to the decoder, for the stage ``projector``."""

    def image_features(self, images: Inputs) -> Any:
        """Return (b, p, d) for b images, or one tensor after the other.

        `forward` and `forward_prefix` call it as a method, so that what it returns can be read. p
        is the number of image tokens.
        """
        ...


class Answers(Protocol):
    """Optional: what the model says. Besides, it needs a `tokenizer`.

    Attributes
    ----------
    output_embedding : torch.nn.Module
        Its `weight` is (vocabulary, d), and it reads the last layer.
    """

    output_embedding: nn.Module

    def logits(self, tokens: Inputs, images: Inputs) -> torch.Tensor:
        """Run the whole model; return logits (n, t, vocabulary), or (n, 1, vocabulary).

        What is computed from `output_embedding` is held against those of the last token.
        """
        ...


class PlacesImageTokens(Protocol):
    """Optional: where in the image each image token lies, for heat maps."""

    def token_grid(self, prepared: PreparedImage, size: tuple[int, int]) -> Any:
        """Return (image tokens, 4): left, top, right, bottom, as fractions of the image.

        `size` is the image's width and height in pixels.
        """
        ...


# What the lack of an optional member switches off, in the words that a user reads.
SWITCHED_OFF = {
    "forward_prefix": "sharing: every prompt runs from its start, with its image",
    "image_features": "the stage projector",
    "vision_blocks": "the stage vision",
    "token_grid": "heat maps",
    "output_embedding": "answers and the lens",
}
# Members that a class must have.
NEEDED = ("model", "blocks", "final_norm", "prepare", "forward")
