"""Small pictures for the explorer: a photo with heat and boxes over it, a curve, a row of thumbnails."""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw
from plotly.colors import sample_colorscale, unlabel_rgb

from probekit import paths
from probekit.images import IMAGE_FORMATS, load_rgb
from probekit.report.style import GREY, PALETTE

INK, GRID, MARK = "#2b2d42", "#e9ecf1", "#ffe8b3"
SIDE, THUMB = 480, 104  # pixels
CURVE = (560, 300)  # pixels
MARGIN = (52, 14, 18, 40)  # left, right, top, bottom
COLOURS = np.array([unlabel_rgb(c) for c in sample_colorscale("Inferno", np.linspace(0, 1, 256).tolist())])
OPACITY = np.linspace(0.4, 0.75, 256)  # of heat: a photo stays visible where there is none
HEAT = [[k / 255, f"rgba({r:.0f}, {g:.0f}, {b:.0f}, {a:.2f})"]
        for k, (r, g, b), a in zip(range(0, 256, 15), COLOURS[::15], OPACITY[::15], strict=True)]  # plotly's


@lru_cache(maxsize=64)
def photo(file: str, side: int = SIDE) -> Image.Image:
    """An image of the data folder, reduced to `side` pixels."""
    return load_rgb(paths.Home.find().resolve(file), longest_side=side)


def jpeg(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "jpeg", quality=88)
    return buffer.getvalue()


def raster(values_t: np.ndarray, cell_t4: np.ndarray, width: int, height: int) -> np.ndarray:
    """(height, width) what cells say of each point of an image; the mean where they overlap, 0 where there is none."""
    total, count = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    corners = np.clip(np.round(cell_t4 * [width, height, width, height]), 0, [width, height] * 2).astype(int)
    for value, (x0, y0, x1, y1) in zip(values_t, corners, strict=True):
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
    return total / count.clip(1)


def overlaid(image: Image.Image, heat_t: np.ndarray | None, cell_t4: np.ndarray | None, boxes_b4: np.ndarray
             ) -> Image.Image:
    """The image with heat (t,) from 0 to 1 over it, dark to bright, and boxes."""
    if heat_t is not None:
        level = (raster(heat_t, cell_t4, *image.size) * 255).astype(np.uint8)
        colour = Image.fromarray(COLOURS.astype(np.uint8)[level])
        image = Image.composite(colour, image, Image.fromarray((255 * OPACITY).astype(np.uint8)[level]))
    elif len(boxes_b4):
        image = image.copy()
    pen = ImageDraw.Draw(image)
    for box in boxes_b4 * np.array([*image.size, *image.size]):
        for colour, width in (("#15171c", 5), ("white", 2)):
            pen.rectangle(box.tolist(), outline=colour, width=width)
    return image


def thumbnails(files: Sequence[str]) -> Image.Image:
    """Square thumbnails in a row."""
    strip = Image.new("RGB", (max(1, len(files)) * (THUMB + 8) - 8, THUMB), "white")
    for k, file in enumerate(files):
        strip.paste(_thumbnail(file), (k * (THUMB + 8), 0))
    return strip


@lru_cache(maxsize=4096)
def _thumbnail(file: str) -> Image.Image:
    with Image.open(paths.Home.find().resolve(file), formats=IMAGE_FORMATS) as image:
        image.draft("RGB", (2 * THUMB, 2 * THUMB))  # a JPEG is decoded at a fraction of its size
        image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((THUMB, THUMB), box=(left, top, left + side, top + side))


def curve_svg(p_lc: np.ndarray, names: Sequence[str], layer: int, labels: np.ndarray) -> str:
    """Probability of "yes" by layer as an SVG picture, one line a class, the chosen layer marked.

    Parameters
    ----------
    p_lc : (l, c) probabilities
    names, labels : (c,) what the lines are called, and their true labels
    layer : place of the chosen layer
    """
    (width, height), (left, right, top, bottom) = CURVE, MARGIN
    x = left + np.arange(len(p_lc)) * (width - left - right) / max(1, len(p_lc) - 1)
    parts = [f'<rect x="{x[layer] - 6:.1f}" y="{top}" width="12" height="{height - top - bottom}" fill="{MARK}"/>']
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = top + (1 - value) * (height - top - bottom)
        dash = ' stroke-dasharray="4 4"' if value == 0.5 else ""
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" '
                     f'stroke="{GREY if dash else GRID}"{dash}/>'
                     f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    step = max(1, len(p_lc) // 10)
    parts += [f'<text x="{x[k]:.1f}" y="{height - bottom + 18}" text-anchor="middle">{k}</text>'
              for k in range(0, len(p_lc), step)]
    parts.append(f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">decoder layer</text>'
                 f'<text transform="translate(12 {height / 2}) rotate(-90)" text-anchor="middle">p(yes)</text>')
    for c, name in enumerate(names):
        y = top + (1 - p_lc[:, c]) * (height - top - bottom)
        colour, dash = PALETTE[c % len(PALETTE)], "" if labels[c] else ' stroke-dasharray="6 4"'
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"{dash}/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{6 if k == layer else 3}" fill="{colour}"><title>'
                  f'{html.escape(name)}, layer {k}: {p_lc[k, c]:.3f}</title></circle>'
                  for k, (a, b) in enumerate(zip(x, y, strict=True))]
    return (f'<svg width="100%" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" style="font:12px '
            f'sans-serif;fill:{INK};background:white;border-radius:6px;max-width:760px">{"".join(parts)}</svg>')
