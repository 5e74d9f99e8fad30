"""Some examples to look at: photographs with their prompts and the right answers."""

from __future__ import annotations

from typing import Any

import pandas as pd
from IPython.display import HTML

from probekit import paths
from probekit.report import pictures
from probekit.report.templates import render

PICTURE_SIDE = 220  # pixels
MOST_PROMPTS = 6  # of an image


def example_grid(
    examples: pd.DataFrame, *, images: int = 6, home: str | paths.Home | None = None
) -> HTML:
    """Show the first images of an examples table with what is asked about them.

    Parameters
    ----------
    examples : DataFrame
        Of :func:`probekit.workflow.build_examples`; rows without an image are left out.
    images : int
        How many.
    home : str, Path, Home or None
        See :func:`probekit.workflow.build_examples`.

    Returns
    -------
    IPython.display.HTML
        A card per image: the picture, then task, prompt and right answer of its first
        :data:`MOST_PROMPTS` rows.
    """
    place = paths.Home.find(home)
    cards: list[dict[str, Any]] = []
    for file, rows in examples[examples.file != ""].groupby("file", sort=False):
        if len(cards) == images:
            break
        photo = pictures.load_photo(place.resolve(str(file)), PICTURE_SIDE)
        asked = [
            {"task": row.task, "prompt": row.prompt, "answer": right_answer(row)}
            for row in rows.head(MOST_PROMPTS).itertuples()
        ]
        card = {
            "url": pictures.data_url(photo),
            "image": rows.image_id.iloc[0],
            "asked": asked,
            "further": max(0, len(rows) - MOST_PROMPTS),
        }
        cards.append(card)
    return HTML(render("example_grid.html.jinja", cards=cards))


def right_answer(example: Any) -> str:
    """Return in words what is right for an example, a row of the table as a named tuple.

    What its mask leaves out does not count, and is not named.
    """
    counting = [
        (name, label)
        for name, label, counts in zip(example.classes, example.labels, example.mask, strict=True)
        if counts
    ]
    if not counting:
        return "does not count"
    if example.kind == "binary":
        return "yes" if example.labels[0] else "no"
    if example.kind == "multilabel":
        return ", ".join(f"{name}: {'yes' if label else 'no'}" for name, label in counting)
    return ", ".join(name for name, label in counting if label)
