"""Small pictures for the explorer: a photo with heat and boxes, a curve, a strip of thumbnails."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from plotly.colors import sample_colorscale, unlabel_rgb

from probekit.images import IMAGE_FORMATS, load_rgb
from probekit.report.style import PALETTE
from probekit.report.templates import render

PHOTO_SIDE = 480  # pixels
THUMBNAIL_SIDE = 104  # pixels
THUMBNAIL_GAP = 8  # pixels
JPEG_QUALITY = 88

# Colour and opacity of heat from 0 to 1 in 256 steps. Opacity never reaches 0 or 1: the photo
# stays visible, and darker where there is no heat.
HEAT_COLOURS = np.array(
    [unlabel_rgb(c) for c in sample_colorscale("Inferno", np.linspace(0, 1, 256).tolist())]
)
HEAT_OPACITIES = np.linspace(0.4, 0.75, 256)

# Plot area of the curve in its picture, in pixels.
CURVE_LEFT = 52
CURVE_RIGHT = 546
CURVE_TOP = 18
CURVE_BOTTOM = 260


def plotly_heat_scale() -> list[tuple[float, str]]:
    """Return the colours of heat as a colour scale of plotly, in 18 steps."""
    scale = []
    for level in range(0, 256, 15):
        red, green, blue = HEAT_COLOURS[level]
        opacity = HEAT_OPACITIES[level]
        scale.append((level / 255, f"rgba({red:.0f}, {green:.0f}, {blue:.0f}, {opacity:.2f})"))
    return scale


@lru_cache(maxsize=64)
def load_photo(file: Path, longest_side: int = PHOTO_SIDE) -> Image.Image:
    """Return an image, reduced where it is larger than `longest_side` in pixels; it is cached."""
    return load_rgb(file, longest_side=longest_side)


def encode_jpeg(image: Image.Image) -> bytes:
    """Return an image as a JPEG file."""
    buffer = BytesIO()
    image.save(buffer, "jpeg", quality=JPEG_QUALITY)
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    """Return an image as the URL of a JPEG that stands in the page itself."""
    return f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(image)).decode()}"


def rasterise(values_t: np.ndarray, cells_t4: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Draw the values of an image's tokens as pixels.

    Parameters
    ----------
    values_t : ndarray, (t,)
        A value per token.
    cells_t4 : ndarray, (t, 4)
        Where the tokens lie: left, top, right, bottom, in shares of the image.
    width, height : int
        Size of the raster in pixels.

    Returns
    -------
    ndarray, (height, width)
        float32; the mean where cells overlap, 0 where there is none.
    """
    total = np.zeros((height, width), np.float32)
    count = np.zeros((height, width), np.float32)
    size = np.array([width, height, width, height])
    corners_t4 = np.clip(np.round(cells_t4 * size), 0, size).astype(int)
    for value, (left, top, right, bottom) in zip(values_t, corners_t4, strict=True):
        total[top:bottom, left:right] += value
        count[top:bottom, left:right] += 1
    return total / count.clip(1)


def draw_heat(image: Image.Image, heat_t: np.ndarray, cells_t4: np.ndarray) -> Image.Image:
    """Return an image with heat over it, from dark to bright.

    Parameters
    ----------
    image : Image
        Stays as it is.
    heat_t : ndarray, (t,)
        Heat of each token, from 0 to 1.
    cells_t4 : ndarray, (t, 4)
        Where the tokens lie, see :func:`rasterise`.
    """
    heat_hw = rasterise(heat_t, cells_t4, width=image.width, height=image.height)
    level_hw = (heat_hw * 255).astype(np.uint8)
    colours = Image.fromarray(HEAT_COLOURS.astype(np.uint8)[level_hw])
    opacities = Image.fromarray((255 * HEAT_OPACITIES).astype(np.uint8)[level_hw])
    return Image.composite(colours, image, opacities)


def draw_boxes(image: Image.Image, boxes_b4: np.ndarray) -> Image.Image:
    """Return an image with boxes on it.

    Parameters
    ----------
    image : Image
        Stays as it is.
    boxes_b4 : ndarray, (b, 4)
        Left, top, right, bottom, in shares of the image.
    """
    image = image.copy()
    pen = ImageDraw.Draw(image)
    for box in boxes_b4 * np.array([*image.size, *image.size]):
        pen.rectangle(box.tolist(), outline="#15171c", width=5)
        pen.rectangle(box.tolist(), outline="white", width=2)
    return image


def thumbnail_strip(files: Sequence[Path]) -> Image.Image:
    """Return square thumbnails of images, side by side."""
    stride = THUMBNAIL_SIDE + THUMBNAIL_GAP
    width = max(1, len(files)) * stride - THUMBNAIL_GAP
    strip = Image.new("RGB", (width, THUMBNAIL_SIDE), "white")
    for place, file in enumerate(files):
        strip.paste(_thumbnail(file), (place * stride, 0))
    return strip


@lru_cache(maxsize=4096)
def _thumbnail(file: Path) -> Image.Image:
    with Image.open(file, formats=IMAGE_FORMATS) as opened:
        # A JPEG is decoded at a fraction of its size, which is much faster.
        opened.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
        image = opened.convert("RGB")
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    middle = (left, top, left + side, top + side)
    return image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), box=middle)


def curve_svg(
    p_lc: np.ndarray,
    names: Sequence[str],
    *,
    labels: Sequence[int] | np.ndarray,
    layer: int,
    lens_lc: np.ndarray | None = None,
) -> str:
    """Draw the probability of "yes" by layer as an SVG picture, a line per class.

    Parameters
    ----------
    p_lc : ndarray, (l, c)
        Probabilities.
    names : sequence of str, (c,)
        What the lines are called.
    labels : sequence of int, (c,)
        True labels: 1 has a full line, 0 a dashed one.
    layer : int
        Number of the layer to mark.
    lens_lc : ndarray, (l, c), optional
        What the layers would answer, as thin lines.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    layers = len(p_lc)
    x_l = CURVE_LEFT + np.arange(layers) * (CURVE_RIGHT - CURVE_LEFT) / max(1, layers - 1)
    curves = [(p_lc, "", 2.5)]
    if lens_lc is not None:
        curves.append((lens_lc, ", lens", 1.2))
    lines = []
    for values_lc, words, width in curves:
        y_lc = CURVE_TOP + (1 - values_lc) * (CURVE_BOTTOM - CURVE_TOP)
        for c, name in enumerate(names):
            points = [
                {"x": x_l[k], "y": y_lc[k, c], "layer": k, "p": values_lc[k, c]}
                for k in range(layers)
            ]
            line = {
                "name": name + words,
                "colour": PALETTE[c % len(PALETTE)],
                "is_yes": bool(labels[c]),
                "width": width,
                "points": points,
            }
            lines.append(line)
    return render(
        "curve.svg.jinja",
        left=CURVE_LEFT,
        right=CURVE_RIGHT,
        top=CURVE_TOP,
        bottom=CURVE_BOTTOM,
        x_of_layers=x_l.tolist(),
        label_step=max(1, layers // 10),
        layer=layer,
        lines=lines,
    )
