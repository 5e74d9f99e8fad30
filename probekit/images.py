"""Image files, decoded the same way wherever an image is looked at."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

# Pillow's decoders of some other formats, such as EPS, start programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def load_rgb(file: str | Path, longest_side: int | None = None) -> Image.Image:
    """Decode an image fully and convert it to RGB, whatever its mode was.

    Parameters
    ----------
    file : str or Path
        The image file.
    longest_side : int, optional
        In pixels. A larger image is reduced to it, its aspect ratio kept; a smaller one stays as
        it is.

    Returns
    -------
    Image
        In mode "RGB".

    Raises
    ------
    OSError
        The file is missing, empty, truncated, so large that Pillow takes it for a decompression
        bomb (179 million pixels), or none of :data:`IMAGE_FORMATS`. The message names the file.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as opened:
            opened.load()
            image = opened.convert("RGB")
        if longest_side:
            image.thumbnail((longest_side, longest_side), Image.Resampling.BICUBIC)
        return image
    except Exception as error:  # a decoder raises more than OSError on a broken file
        reason = str(error) or type(error).__name__
        raise OSError(f"{file} cannot be read as an image: {reason}") from error


def unreadable_images(images: pd.DataFrame, workers: int = 4) -> pd.DataFrame:
    """Decode every image once and list those that fail.

    Parameters
    ----------
    images : DataFrame
        Indexed by ``image_id``, with the column ``file``.
    workers : int
        Threads that decode at the same time.

    Returns
    -------
    DataFrame
        ``image_id``, ``file``, ``reason`` of the images that fail; no rows if all are readable.
    """
    with ThreadPoolExecutor(workers) as pool:
        reasons = list(
            tqdm(
                pool.map(_unreadable_reason, images.file),
                total=len(images),
                desc="checking images",
                unit="image",
            )
        )
    table = pd.DataFrame(
        {"image_id": images.index, "file": images.file.to_numpy(), "reason": reasons}
    )
    return table.dropna(subset="reason").reset_index(drop=True)


def _unreadable_reason(file: str) -> str | None:
    try:
        load_rgb(file)
    except OSError as error:
        return str(error).removeprefix(f"{file} ")
    return None
