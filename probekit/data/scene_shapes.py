"""The twelve categories of drawn scenes, as polygons.

Coordinates are those of a square cell of side 1 whose centre is 0: x to the right, y down. A
polygon is an array of shape (points, 2).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WOOD = (134, 96, 66)
CREAM = (255, 248, 232)
INK = (66, 62, 78)
GLASS = (210, 232, 244)


class Part(NamedTuple):
    """One painted polygon of a category.

    Attributes
    ----------
    paint : str or tuple of int
        "main", "dark" or "light", which follow the colour of the thing; else RGB, which does not.
    polygon : ndarray of shape (points, 2)
        In the unit cell.
    """

    paint: str | tuple[int, int, int]
    polygon: np.ndarray


def _arc(
    x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360, n: int = 32
) -> np.ndarray:
    """Return points on an ellipse from `start` to `stop` degrees (0 is to the right, clockwise)."""
    angle = np.deg2rad(np.linspace(start, stop, n))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _ring(x: float, y: float, outer: float, inner: float, start: float, stop: float) -> np.ndarray:
    outside = _arc(x, y, outer, outer, start, stop)
    inside = _arc(x, y, inner, inner, stop, start)
    return np.concatenate([outside, inside])


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return _polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _star(points: int = 5, inner: float = 0.46) -> np.ndarray:
    corner = np.arange(2 * points)
    angle = np.deg2rad(corner * 180 / points - 90)
    radius = np.where(corner % 2, 0.5 * inner, 0.5)
    return np.stack([radius * np.cos(angle), 0.03 + radius * np.sin(angle)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 34, (y - 2.5) / 32], axis=1)


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points)


# The parts of each category in the order of drawing.
SHAPES: dict[str, list[Part]] = {
    "ball": [
        Part("main", _arc(0, 0, 0.45, 0.45)),
        Part(CREAM, _arc(0, 0, 0.16, 0.45)),
        Part("dark", _arc(0, 0, 0.07, 0.07)),
    ],
    "boat": [
        Part(WOOD, _box(-0.03, -0.5, 0.02, 0.2)),
        Part("light", _polygon((0.05, -0.46), (0.4, 0.1), (0.05, 0.1))),
        Part("main", _polygon((-0.06, -0.36), (-0.06, 0.1), (-0.36, 0.1))),
        Part("main", _polygon((-0.5, 0.16), (0.5, 0.16), (0.32, 0.44), (-0.32, 0.44))),
    ],
    "car": [
        Part("dark", _polygon((-0.24, -0.24), (0.16, -0.24), (0.32, 0.02), (-0.34, 0.02))),
        Part(GLASS, _polygon((-0.2, -0.18), (-0.03, -0.18), (-0.03, 0), (-0.27, 0))),
        Part(GLASS, _polygon((0.02, -0.18), (0.13, -0.18), (0.24, 0), (0.02, 0))),
        Part(
            "main",
            _polygon((-0.46, 0), (0.42, 0), (0.5, 0.08), (0.5, 0.22), (-0.5, 0.22), (-0.5, 0.06)),
        ),
        Part(INK, _arc(-0.27, 0.22, 0.12, 0.12)),
        Part(INK, _arc(0.27, 0.22, 0.12, 0.12)),
        Part(CREAM, _arc(-0.27, 0.22, 0.05, 0.05)),
        Part(CREAM, _arc(0.27, 0.22, 0.05, 0.05)),
    ],
    "cup": [
        Part("dark", _ring(0.24, 0.0, 0.2, 0.11, -90, 90)),
        Part("main", _polygon((-0.4, -0.32), (0.28, -0.32), (0.2, 0.4), (-0.32, 0.4))),
        Part("dark", _arc(-0.06, -0.32, 0.34, 0.09)),
        Part(CREAM, _polygon((-0.37, -0.06), (0.25, -0.06), (0.23, 0.08), (-0.35, 0.08))),
    ],
    "fish": [
        Part("dark", _polygon((0.2, 0), (0.5, -0.26), (0.44, 0), (0.5, 0.26))),
        Part("main", _arc(-0.1, 0, 0.4, 0.27)),
        Part("light", _polygon((-0.02, -0.1), (0.16, 0), (-0.02, 0.1))),
        Part(CREAM, _arc(-0.32, -0.07, 0.07, 0.07)),
        Part(INK, _arc(-0.33, -0.07, 0.035, 0.035)),
    ],
    "flag": [
        Part(INK, _box(-0.36, -0.5, -0.29, 0.5)),
        Part(
            "main",
            _polygon(
                (-0.29, -0.46),
                (0.05, -0.4),
                (0.44, -0.46),
                (0.44, 0.08),
                (0.05, 0.14),
                (-0.29, 0.08),
            ),
        ),
        Part(
            CREAM,
            _polygon(
                (-0.29, -0.25),
                (0.05, -0.19),
                (0.44, -0.25),
                (0.44, -0.13),
                (0.05, -0.07),
                (-0.29, -0.13),
            ),
        ),
    ],
    "heart": [
        Part("main", _heart()),
        Part("light", _arc(-0.22, -0.2, 0.1, 0.08)),
    ],
    "house": [
        Part("light", _box(-0.36, -0.06, 0.36, 0.46)),
        Part("main", _polygon((0, -0.5), (0.48, -0.04), (-0.48, -0.04))),
        Part("dark", _box(-0.1, 0.14, 0.1, 0.46)),
        Part(CREAM, _box(-0.29, 0.06, -0.15, 0.22)),
        Part(CREAM, _box(0.15, 0.06, 0.29, 0.22)),
    ],
    "kite": [
        Part("main", _polygon((0, -0.5), (0.3, -0.14), (0, 0.26))),
        Part("light", _polygon((0, -0.5), (-0.3, -0.14), (0, 0.26))),
        Part(
            INK,
            _polygon(
                (0, 0.24), (0.06, 0.34), (-0.02, 0.5), (-0.05, 0.5), (0.02, 0.34), (-0.02, 0.26)
            ),
        ),
        Part("dark", _polygon((-0.08, 0.3), (0.16, 0.4), (0.16, 0.3), (-0.08, 0.4))),
    ],
    "star": [
        Part("main", _star()),
        Part("light", 0.42 * _star() + (0, 0.02)),
    ],
    "tree": [
        Part(WOOD, _box(-0.07, 0.2, 0.07, 0.5)),
        Part("dark", _arc(-0.2, 0.04, 0.22, 0.22)),
        Part("dark", _arc(0.2, 0.04, 0.22, 0.22)),
        Part("main", _arc(0, -0.2, 0.3, 0.29)),
        Part("main", _arc(0, 0.06, 0.26, 0.2)),
    ],
    "umbrella": [
        Part(INK, _box(-0.025, -0.3, 0.025, 0.38)),
        Part(INK, _ring(0.08, 0.36, 0.105, 0.055, 0, 180)),
        Part("main", _arc(0, 0.04, 0.5, 0.5, 180, 360)),
        Part("light", _arc(0, 0.04, 0.2, 0.5, 180, 360)),
    ],
}


def outline(category: str) -> list[np.ndarray]:
    """Return the polygons whose union is the silhouette of a category, in the unit cell."""
    return [part.polygon for part in SHAPES[category]]
