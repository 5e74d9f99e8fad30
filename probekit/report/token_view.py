"""A prompt as a model gets it: its tokens, those of the image marked."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

from IPython.display import HTML
from PIL import Image

from probekit.report import pictures
from probekit.report.templates import render

PICTURE_SIDE = 220  # pixels


class TokenRun(NamedTuple):
    """A token, or all tokens of the image that follow one another.

    Attributes
    ----------
    text : str
        Of the token; of a run of the image's, of one of them.
    length : int
    is_image : bool
    """

    text: str
    length: int
    is_image: bool


def token_runs(prompt_processor: Any, image: Image.Image | None, prompt: str) -> list[TokenRun]:
    """Return the tokens that a model gets for an image and a prompt.

    Parameters
    ----------
    prompt_processor : PromptProcessor
        Of a model, or what stands in for one.
    image : PIL.Image.Image or None
    prompt : str

    Returns
    -------
    list of TokenRun
        In their order.
    """
    prepared = prompt_processor.prepare(image, [prompt])
    ids = prepared.tokens[0]["input_ids"].tolist()
    runs: list[TokenRun] = []
    for is_image, tokens in groupby(
        zip(prepared.image_masks[0].tolist(), ids, strict=True), key=lambda token: token[0]
    ):
        texts = [prompt_processor.decode([token_id]) for _, token_id in tokens]
        if is_image:
            runs.append(TokenRun(texts[0] or "<image>", len(texts), True))
        else:
            runs += [TokenRun(text, 1, False) for text in texts]
    return runs


def token_view(prompt_processors: Mapping[str, Any], image: Image.Image, prompt: str) -> HTML:
    """Show an image, and a prompt about it as each of several models gets it.

    Parameters
    ----------
    prompt_processors : mapping of str to PromptProcessor
        By the model's name.
    image : PIL.Image.Image
    prompt : str

    Returns
    -------
    IPython.display.HTML
        The picture beside the tokens in boxes; the image's are one box with their number.
    """
    models = {
        name: token_runs(prompt_processor, image, prompt)
        for name, prompt_processor in prompt_processors.items()
    }
    photo = image.copy()
    photo.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return HTML(render("token_view.html.jinja", url=pictures.data_url(photo), models=models))
