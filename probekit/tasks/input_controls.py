"""Controls of the inputs: the same questions with another image, without one, or without a text."""

from __future__ import annotations

from collections.abc import Hashable
from zlib import crc32

import numpy as np
import pandas as pd

INPUT_CONTROLS = ("no_image", "no_text", "wrong_image")


def change_inputs(examples: pd.DataFrame, control: str, *, seed: int = 0) -> pd.DataFrame:
    """Return the examples with changed inputs and unchanged labels.

    Parameters
    ----------
    examples : DataFrame
        The examples of :func:`~probekit.tasks.building.build_examples`.
    control : str
        ``"no_image"``
            The prompt alone, in the same chat template: `file` is empty.
        ``"no_text"``
            The image alone: `prompt` is empty.
        ``"wrong_image"``
            The prompts and labels of each image with another image of its split.
        ``"none"``
            The examples as they are.
    seed : int
        Seed of the exchanged images.

    Raises
    ------
    ValueError
        The control is unknown, or a split has a single image and so no other one.
    """
    if control == "none":
        return examples
    if control not in INPUT_CONTROLS:
        raise ValueError(
            f"unknown control of the inputs {control!r}: take one of {', '.join(INPUT_CONTROLS)}"
        )
    if control == "no_image":
        return examples.assign(file="")
    if control == "no_text":
        return examples.assign(prompt="")
    return examples.assign(file=examples.image_id.map(_files_of_other_images(examples, seed)))


def _files_of_other_images(examples: pd.DataFrame, seed: int) -> dict[Hashable, str]:
    """Return for each image the file of another image of its split."""
    rng = np.random.default_rng([seed, crc32(b"wrong_image")])
    other_files: dict[Hashable, str] = {}
    for split, images in examples.drop_duplicates("image_id").groupby("split", sort=False):
        if len(images) < 2:
            raise ValueError(
                f"wrong_image needs a second image in {split}: take more images in 01_build_data"
            )
        images = images.iloc[rng.permutation(len(images))]
        shifted_files = np.roll(images.file, 1)
        other_files.update(zip(images.image_id, shifted_files, strict=True))
    return other_files
