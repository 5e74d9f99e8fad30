"""The twelve things that drawn scenes are made of, as polygons in a unit cell (x to the right, y down, centre 0)."""

from __future__ import annotations

import numpy as np

WOOD, CREAM, INK, GLASS = (134, 96, 66), (255, 248, 232), (66, 62, 78), (210, 232, 244)


def _arc(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360, n: int = 32) -> np.ndarray:
    """Points on an ellipse from `start` to `stop` degrees (0 is to the right, clockwise)."""
    angle = np.deg2rad(np.linspace(start, stop, n))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _star(points: int = 5, inner: float = 0.46) -> np.ndarray:
    angle = np.deg2rad(np.arange(2 * points) * 180 / points - 90)
    radius = np.where(np.arange(2 * points) % 2, 0.5 * inner, 0.5)
    return np.stack([radius * np.cos(angle), 0.03 + radius * np.sin(angle)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([16 * np.sin(t) ** 3 / 34, (y - 2.5) / 32], 1)


def _ring(x: float, y: float, outer: float, inner: float, start: float, stop: float) -> np.ndarray:
    return np.concatenate([_arc(x, y, outer, outer, start, stop), _arc(x, y, inner, inner, stop, start)])


def _poly(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points)


# (paint, polygon) in the order of drawing; "main", "dark" and "light" follow the thing's colour
SHAPES: dict[str, list[tuple]] = {
    "ball": [
        ("main", _arc(0, 0, 0.45, 0.45)), (CREAM, _arc(0, 0, 0.16, 0.45)), ("dark", _arc(0, 0, 0.07, 0.07)),
    ],
    "boat": [
        (WOOD, _box(-0.03, -0.5, 0.02, 0.2)), ("light", _poly((0.05, -0.46), (0.4, 0.1), (0.05, 0.1))),
        ("main", _poly((-0.06, -0.36), (-0.06, 0.1), (-0.36, 0.1))),
        ("main", _poly((-0.5, 0.16), (0.5, 0.16), (0.32, 0.44), (-0.32, 0.44))),
    ],
    "car": [
        ("dark", _poly((-0.24, -0.24), (0.16, -0.24), (0.32, 0.02), (-0.34, 0.02))),
        (GLASS, _poly((-0.2, -0.18), (-0.03, -0.18), (-0.03, 0), (-0.27, 0))),
        (GLASS, _poly((0.02, -0.18), (0.13, -0.18), (0.24, 0), (0.02, 0))),
        ("main", _poly((-0.46, 0), (0.42, 0), (0.5, 0.08), (0.5, 0.22), (-0.5, 0.22), (-0.5, 0.06))),
        (INK, _arc(-0.27, 0.22, 0.12, 0.12)), (INK, _arc(0.27, 0.22, 0.12, 0.12)),
        (CREAM, _arc(-0.27, 0.22, 0.05, 0.05)), (CREAM, _arc(0.27, 0.22, 0.05, 0.05)),
    ],
    "cup": [
        ("dark", _ring(0.24, 0.0, 0.2, 0.11, -90, 90)),
        ("main", _poly((-0.4, -0.32), (0.28, -0.32), (0.2, 0.4), (-0.32, 0.4))),
        ("dark", _arc(-0.06, -0.32, 0.34, 0.09)),
        (CREAM, _poly((-0.37, -0.06), (0.25, -0.06), (0.23, 0.08), (-0.35, 0.08))),
    ],
    "fish": [
        ("dark", _poly((0.2, 0), (0.5, -0.26), (0.44, 0), (0.5, 0.26))), ("main", _arc(-0.1, 0, 0.4, 0.27)),
        ("light", _poly((-0.02, -0.1), (0.16, 0), (-0.02, 0.1))), (CREAM, _arc(-0.32, -0.07, 0.07, 0.07)),
        (INK, _arc(-0.33, -0.07, 0.035, 0.035)),
    ],
    "flag": [
        (INK, _box(-0.36, -0.5, -0.29, 0.5)),
        ("main", _poly((-0.29, -0.46), (0.05, -0.4), (0.44, -0.46), (0.44, 0.08), (0.05, 0.14), (-0.29, 0.08))),
        (CREAM, _poly((-0.29, -0.25), (0.05, -0.19), (0.44, -0.25), (0.44, -0.13), (0.05, -0.07), (-0.29, -0.13))),
    ],
    "heart": [("main", _heart()), ("light", _arc(-0.22, -0.2, 0.1, 0.08))],
    "house": [
        ("light", _box(-0.36, -0.06, 0.36, 0.46)), ("main", _poly((0, -0.5), (0.48, -0.04), (-0.48, -0.04))),
        ("dark", _box(-0.1, 0.14, 0.1, 0.46)), (CREAM, _box(-0.29, 0.06, -0.15, 0.22)),
        (CREAM, _box(0.15, 0.06, 0.29, 0.22)),
    ],
    "kite": [
        ("main", _poly((0, -0.5), (0.3, -0.14), (0, 0.26))), ("light", _poly((0, -0.5), (-0.3, -0.14), (0, 0.26))),
        (INK, _poly((0, 0.24), (0.06, 0.34), (-0.02, 0.5), (-0.05, 0.5), (0.02, 0.34), (-0.02, 0.26))),
        ("dark", _poly((-0.08, 0.3), (0.16, 0.4), (0.16, 0.3), (-0.08, 0.4))),
    ],
    "star": [("main", _star()), ("light", 0.42 * _star() + (0, 0.02))],
    "tree": [
        (WOOD, _box(-0.07, 0.2, 0.07, 0.5)), ("dark", _arc(-0.2, 0.04, 0.22, 0.22)),
        ("dark", _arc(0.2, 0.04, 0.22, 0.22)),
        ("main", _arc(0, -0.2, 0.3, 0.29)), ("main", _arc(0, 0.06, 0.26, 0.2)),
    ],
    "umbrella": [
        (INK, _box(-0.025, -0.3, 0.025, 0.38)), (INK, _ring(0.08, 0.36, 0.105, 0.055, 0, 180)),
        ("main", _arc(0, 0.04, 0.5, 0.5, 180, 360)), ("light", _arc(0, 0.04, 0.2, 0.5, 180, 360)),
    ],
}


def outline(category: str) -> list[np.ndarray]:
    """The polygons whose union is the thing's silhouette."""
    return [polygon for _, polygon in SHAPES[category]]
