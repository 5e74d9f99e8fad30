"""Small pictures for the explorer: a photo with heat and boxes, a curve, thumbnails."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from plotly.colors import sample_colorscale, unlabel_rgb

from probekit.images import IMAGE_FORMATS, load_rgb
from probekit.report.style import PALETTE
from probekit.report.templates import render

PHOTO_SIDE = 640  # pixels
THUMBNAIL_SIDE = 128  # pixels
JPEG_QUALITY = 88

# Colour and opacity of heat from 0 to 1 in 256 steps. Opacity never reaches 0 or 1: the photo
# stays visible, and darker where there is no heat.
HEAT_COLOURS = np.array(
    [unlabel_rgb(c) for c in sample_colorscale("Inferno", np.linspace(0, 1, 256).tolist())]
)
HEAT_OPACITIES = np.linspace(0.4, 0.75, 256)
# The same as pillow takes them.
HEAT_PALETTE = HEAT_COLOURS.astype(np.uint8).tobytes()
HEAT_OPACITY_LEVELS = (255 * HEAT_OPACITIES).astype(int).tolist()
HEAT_PIXELS = 4  # of the photo, in each direction, that make one pixel of the heat's raster

BORDER_COLOUR = (255, 255, 255, 95)
BOX_FONT = ImageFont.load_default(size=14)

# Plot area of the curve in its picture, in pixels.
CURVE_LEFT = 46
CURVE_RIGHT = 390
CURVE_TOP = 10
CURVE_BOTTOM = 196


def css_heat_scale() -> str:
    """Return the colours of heat, from none to the largest, as a gradient of CSS."""
    colours = [f"rgb({red:.0f} {green:.0f} {blue:.0f})" for red, green, blue in HEAT_COLOURS[::15]]
    return f"linear-gradient(to right, {', '.join(colours)})"


def plotly_heat_scale() -> list[tuple[float, str]]:
    """Return the colours of heat as a colour scale of plotly, in 18 steps."""
    scale = []
    for level in range(0, 256, 15):
        red, green, blue = HEAT_COLOURS[level]
        opacity = HEAT_OPACITIES[level]
        scale.append((level / 255, f"rgba({red:.0f}, {green:.0f}, {blue:.0f}, {opacity:.2f})"))
    return scale


@lru_cache(maxsize=64)
def load_photo(file: Path, longest_side: int = PHOTO_SIDE, *, enlarge: bool = False) -> Image.Image:
    """Return an image, reduced where it is larger than `longest_side` in pixels; it is cached.

    With `enlarge`, a smaller one is made as large: what is drawn on it is as fine on every photo.
    """
    photo = load_rgb(file, longest_side=longest_side)
    scale = longest_side / max(photo.size)
    if not enlarge or scale == 1:
        return photo
    size = (round(scale * photo.width), round(scale * photo.height))
    return photo.resize(size, Image.Resampling.BICUBIC)


def encode_jpeg(image: Image.Image) -> bytes:
    """Return an image as a JPEG file."""
    buffer = BytesIO()
    image.save(buffer, "jpeg", quality=JPEG_QUALITY)
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    """Return an image as the URL of a JPEG that stands in the page itself."""
    return f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(image)).decode()}"


def interpolate(
    values_t: np.ndarray, cells_t4: np.ndarray, *, width: int, height: int
) -> np.ndarray:
    """Draw the values of an image's tokens as pixels, smoothly between the tokens' centres.

    A pixel is a mean of the tokens around it. The weight of a token falls with the distance from
    its centre as a cosine does, in both directions, and is 0 from one size of the token on. On a
    regular grid a token's centre has exactly the token's value, and no pixel is above the highest
    value or below the lowest.

    Parameters
    ----------
    values_t : ndarray, (t,)
        A value per token.
    cells_t4 : ndarray, (t, 4)
        Where the tokens lie: left, top, right, bottom, in shares of the image. They may overlap
        and differ in size; those outside of the image play no role.
    width, height : int
        Size of the raster in pixels.

    Returns
    -------
    ndarray, (height, width)
        float32; 0 where no cell lies.
    """
    is_inside_t = (cells_t4[:, 2:] > 0).all(axis=1) & (cells_t4[:, :2] < 1).all(axis=1)
    values_t = values_t[is_inside_t].astype(np.float32)
    left_t, top_t, right_t, bottom_t = cells_t4[is_inside_t].T.astype(np.float32)
    weight_tw, covers_tw = _axis_weights(left_t, right_t, width)
    weight_th, covers_th = _axis_weights(top_t, bottom_t, height)
    total_hw = (weight_th * values_t[:, None]).T @ weight_tw
    weight_hw = weight_th.T @ weight_tw
    is_covered_hw = covers_th.T @ covers_tw > 0
    mean_hw = np.divide(total_hw, weight_hw, out=np.zeros_like(total_hw), where=is_covered_hw)
    return mean_hw


def _axis_weights(
    start_t: np.ndarray, stop_t: np.ndarray, pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's weight at the pixels of an axis, and 1 where its cell covers them."""
    centre_p = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels
    size_t = stop_t - start_t
    distance_tp = (centre_p - (start_t + size_t / 2)[:, None]) / size_t[:, None]
    weight_tp = (1 + np.cos(np.pi * np.clip(distance_tp, -1, 1))) / 2
    # Half of a pixel more, so that none is left out where two cells meet.
    covers_tp = np.abs(distance_tp) <= 0.5 + 0.5 / (pixels * size_t[:, None])
    return weight_tp, covers_tp.astype(np.float32)


def draw_heat(image: Image.Image, heat_t: np.ndarray, cells_t4: np.ndarray) -> Image.Image:
    """Return an image with heat over it, from dark to bright, smooth between tokens.

    Parameters
    ----------
    image : Image
        Stays as it is.
    heat_t : ndarray, (t,)
        Heat of each token, from 0 to 1.
    cells_t4 : ndarray, (t, 4)
        Where the tokens lie, see :func:`interpolate`.
    """
    # A quarter of the pixels holds all that is between two tokens, and is drawn much faster.
    width = max(1, image.width // HEAT_PIXELS)
    height = max(1, image.height // HEAT_PIXELS)
    heat_hw = interpolate(heat_t, cells_t4, width=width, height=height)
    level = Image.fromarray((heat_hw * 255).round().astype(np.uint8))
    level = level.resize(image.size, Image.Resampling.BICUBIC)
    opacities = level.point(HEAT_OPACITY_LEVELS)
    level.putpalette(HEAT_PALETTE)
    return Image.composite(level.convert("RGB"), image, opacities)


def draw_borders(image: Image.Image, cells_t4: np.ndarray) -> Image.Image:
    """Return an image with the borders of its tokens as thin lines.

    Parameters
    ----------
    image : Image
        Stays as it is.
    cells_t4 : ndarray, (t, 4)
        Where the tokens lie, in shares of the image.
    """
    image = image.copy()
    pen = ImageDraw.Draw(image, "RGBA")  # mixes colours by their opacity
    for cell in cells_t4 * np.array([*image.size, *image.size]):
        left, top, right, bottom = cell.round().tolist()
        # Only two sides, so that no line between two tokens is drawn twice.
        pen.line([(left, bottom), (right, bottom)], fill=BORDER_COLOUR)
        pen.line([(right, top), (right, bottom)], fill=BORDER_COLOUR)
    return image


def draw_boxes(image: Image.Image, boxes_b4: np.ndarray, *, name: str = "") -> Image.Image:
    """Return an image with boxes on it.

    Parameters
    ----------
    image : Image
        Stays as it is.
    boxes_b4 : ndarray, (b, 4)
        Left, top, right, bottom, in shares of the image.
    name : str
        Written into the upper left corner of the largest box.
    """
    image = image.copy()
    pen = ImageDraw.Draw(image)
    boxes = (boxes_b4 * np.array([*image.size, *image.size])).tolist()
    for box in boxes:
        pen.rectangle(box, outline="#15171c", width=5)
        pen.rectangle(box, outline="white", width=2)
    if name and boxes:
        largest = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        corner = (largest[0] + 7, largest[1] + 5)
        left, top, right, bottom = pen.textbbox(corner, name, font=BOX_FONT)
        pen.rectangle((left - 4, top - 3, right + 4, bottom + 3), fill="#15171c")
        pen.text(corner, name, font=BOX_FONT, fill="white")
    return image


@lru_cache(maxsize=4096)
def thumbnail_url(file: Path) -> str:
    """Return the square middle of an image, made small, as a data URL; it is cached."""
    return data_url(_thumbnail(file))


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
