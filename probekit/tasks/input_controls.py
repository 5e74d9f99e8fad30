"""Controls of the inputs: the same examples with another image, or without one, or without a text."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pandas as pd

INPUT_CONTROLS = ("no_image", "no_text", "wrong_image")


def change_inputs(examples: pd.DataFrame, name: str, seed: int = 0) -> pd.DataFrame:
    """The examples with other inputs and their own labels; "none" leaves them as they are.

    no_image
        the prompt alone, in the same chat template; ``file`` is ""
    no_text
        the image alone: the prompt is empty
    wrong_image
        each image's prompts and labels with another image of its split

    Raises
    ------
    ValueError
        A split with a single image has no other one.
    """
    if name == "none":
        return examples
    if name not in INPUT_CONTROLS:
        raise ValueError(
            f"unknown control of the inputs {name!r}: take one of {', '.join(INPUT_CONTROLS)}"
        )
    if name == "no_image":
        changed = examples.assign(file="")
    elif name == "no_text":
        changed = examples.assign(prompt="")
    else:
        changed = examples.assign(file=examples.image_id.map(_other_images(examples, seed)))
    return changed


def _other_images(examples: pd.DataFrame, seed: int) -> dict:
    """The file of another image of the same split, for each image."""
    rng, other = np.random.default_rng([seed, crc32(b"wrong_image")]), {}
    for split, rows in examples.drop_duplicates("image_id").groupby("split", sort=False):
        if len(rows) < 2:
            raise ValueError(f"wrong_image needs a second image in {split}: take more images in 01_build_data")
        rows = rows.iloc[rng.permutation(len(rows))]
        other |= dict(zip(rows.image_id, np.roll(rows.file, 1), strict=True))
    return other
