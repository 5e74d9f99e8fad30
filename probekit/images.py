"""Image files: decoded the same way wherever an image is looked at."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # others, as EPS, can start programs


def load_rgb(file: str | Path, longest_side: int | None = None) -> Image.Image:
    """Decode an image fully and turn it into RGB (greyscale, CMYK, palette and RGBA included).

    Parameters
    ----------
    longest_side : pixels; a larger image is reduced to it, its shape kept

    Raises
    ------
    OSError
        The file is absent, empty, truncated, larger than Pillow takes for honest (179 million pixels), or no image of
        :data:`IMAGE_FORMATS`; the message names it.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            image.load()
            image = image.convert("RGB")
        if longest_side:
            image.thumbnail((longest_side, longest_side), Image.Resampling.BICUBIC)
        return image
    except Exception as error:  # what a broken file makes of a decoder is not only OSError
        raise OSError(f"{file} cannot be read as an image: {str(error) or type(error).__name__}") from error


def unreadable_images(images: pd.DataFrame, workers: int = 4) -> pd.DataFrame:
    """Decode every image once and list those that fail.

    Returns
    -------
    DataFrame
        `image_id`, `file`, `reason`; empty where all is well.
    """

    def reason(file: str) -> str | None:
        try:
            load_rgb(file)
        except OSError as error:
            return str(error).removeprefix(f"{file} ")
        return None

    with ThreadPoolExecutor(workers) as pool:
        tried = tqdm(pool.map(reason, images.file), total=len(images), desc="checking images", unit="image")
        reasons = list(tried)
    table = pd.DataFrame({"image_id": images.index, "file": images.file.to_numpy(), "reason": reasons})
    return table.dropna(subset="reason").reset_index(drop=True)
