"""Image files, decoded the same way wherever an image is looked at.

What a viewer shows counts: the orientation that EXIF states, transparency over white, and the whole
range of grey of files with more than 8 bits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, PngImagePlugin
from tqdm.auto import tqdm

# Pillow's decoders of some other formats, such as EPS, start programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# EXIF's orientations that turn a picture by 90 degrees.
TURNED = (5, 6, 7, 8)
EXIF_ORIENTATION = 0x0112
# Image processors refuse strips; Qwen2-VL's takes sides of up to 1 to 200.
LONGEST_RATIO = 200
# Values of white: what the numbers of a file with more than 8 bits, or of floats, may run up to.
WHITE_VALUES = (1.0, 255.0, 65535.0)

# Some programs keep long notes in PNG files; Pillow stops at 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = 2**24


class ImageSize(NamedTuple):
    """Width and height in pixels, as a viewer shows an image; and as EXIF's orientation states it.

    Attributes
    ----------
    width, height : int
    orientation : int
        1 where the file holds the picture upright, see :data:`TURNED`.
    """

    width: int
    height: int
    orientation: int = 1

    @property
    def stored(self) -> tuple[int, int]:
        """Width and height of the pixels in the file, before they are turned."""
        if self.orientation in TURNED:
            return self.height, self.width
        return self.width, self.height


def image_size(file: str | Path) -> ImageSize:
    """Return the size of an image without decoding it.

    Raises
    ------
    OSError
        The file is missing, or none of :data:`IMAGE_FORMATS`. The message names the file.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as opened:
            return _size_of(opened)
    except Exception as error:  # a decoder raises more than OSError on a broken file
        raise OSError(f"{file} cannot be read as an image: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return str(error) or type(error).__name__


def size_or_zero(file: str | Path) -> tuple[int, int]:
    """Return width and height; 0, 0 of a broken image, which is reported when it is decoded."""
    try:
        size = image_size(file)
    except OSError:
        return 0, 0
    return size.width, size.height


def _size_of(image: Image.Image) -> ImageSize:
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    width, height = image.size
    if orientation in TURNED:
        width, height = height, width
    return ImageSize(width, height, orientation)


def load_rgb(file: str | Path, longest_side: int | None = None) -> Image.Image:
    """Decode an image fully and convert it to RGB as a viewer shows it, whatever its mode was.

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
        bomb (179 million pixels), or none of :data:`IMAGE_FORMATS`; or its numbers have no known
        white. The message names the file.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as opened:
            opened.load()
            image = _convert_to_rgb(ImageOps.exif_transpose(opened))
        if longest_side:
            image.thumbnail((longest_side, longest_side), Image.Resampling.BICUBIC)
        return image
    except Exception as error:  # a decoder raises more than OSError on a broken file
        raise OSError(f"{file} cannot be read as an image: {_reason(error)}") from error


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _scale_grey(np.asarray(image, dtype=np.float64), is_integer=image.mode != "F")
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, "white")
        return Image.alpha_composite(white, pixels).convert("RGB")
    return image.convert("RGB")


def _scale_grey(values: np.ndarray, *, is_integer: bool) -> Image.Image:
    """Return grey values of more than 8 bits, or floats, as RGB: the whole range, not clipped.

    Integers of these modes run up to 65,535. Floats run up to 1, 255 or 65,535, the smallest of
    these that is not exceeded.
    """
    low = values.min(initial=0)
    high = values.max(initial=0)
    whites = WHITE_VALUES[-1:] if is_integer else WHITE_VALUES
    white = next((white for white in whites if high <= white), None)
    if white is None or not low >= 0:  # a nan is not
        raise OSError(
            f"its grey values run from {values.min():g} to {values.max():g}, and which of them is "
            "white is not known: convert it to 8 bits"
        )
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")


def check_images(images: pd.DataFrame) -> pd.DataFrame:
    """Decode every image once, and tell its size or why it cannot be used.

    Parameters
    ----------
    images : DataFrame
        Indexed by ``image_id``, with the column ``file``.

    Returns
    -------
    DataFrame
        Indexed as `images`: ``file``, ``width``, ``height``, ``orientation`` (see
        :class:`ImageSize`), and ``reason``, None where nothing is wrong.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        checked = pool.map(_check_image, images.file)
        rows = list(tqdm(checked, total=len(images), desc="checking images", unit="image"))
    columns = ["width", "height", "orientation", "reason"]
    table = pd.DataFrame(rows, columns=columns, index=images.index)
    table["reason"] = table.reason.astype(object).where(table.reason.notna(), None)
    table.insert(0, "file", images.file)
    return table


def _check_image(file: str) -> tuple[int, int, int, str | None]:
    try:
        size = image_size(file)
        load_rgb(file)
    except OSError as error:
        return 0, 0, 1, str(error).removeprefix(f"{file} ")
    reason = None
    if max(size.width, size.height) > LONGEST_RATIO * min(size.width, size.height):
        reason = (
            f"is a strip of {size.width} x {size.height} pixels, and image processors refuse sides "
            f"of more than 1 to {LONGEST_RATIO}"
        )
    return *size, reason
