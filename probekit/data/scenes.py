"""Drawn scenes in COCO's own layout: the data set that needs no download.

A scene is two to four flat objects on a pastel landscape. Five captions a scene come from a small grammar over what
is really there (counts, colours, spatial relations), and every object carries its exact box and outline.
:func:`write` saves them as an official COCO folder, so that :mod:`probekit.data.coco` reads them like the photographs.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from pycocotools import mask as rle
from tqdm.auto import tqdm

from probekit import paths
from probekit.data.scene_shapes import SHAPES, outline

SIZE = (320, 240)
COLOURS = {
    "red": (220, 50, 47), "orange": (245, 140, 40), "yellow": (250, 208, 50),
    "green": (44, 158, 90), "blue": (45, 105, 215), "purple": (140, 75, 190),
}
LANDSCAPES = (  # sky at the top, sky at the horizon, far hill, near hill
    ((205, 230, 245), (240, 246, 244), (200, 222, 206), (182, 210, 188)),
    ((250, 226, 214), (253, 244, 230), (226, 210, 214), (212, 194, 204)),
    ((222, 218, 240), (246, 238, 244), (206, 208, 226), (190, 194, 216)),
    ((214, 238, 232), (246, 248, 236), (226, 224, 196), (236, 226, 200)),
    ((228, 232, 238), (247, 247, 245), (212, 216, 220), (198, 204, 210)),
)
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Thing:
    """One object: its category, its colour, the centre and the side of its square cell in pixels."""

    category: str
    colour: str
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """Things that do not overlap, on one of the landscapes; `horizon` is a fraction of the height."""

    things: tuple[Thing, ...]
    landscape: int
    horizon: float


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene at random: 2 to 4 things; in a quarter of the scenes one category stands there more than once."""
    n = int(rng.choice([2, 3, 4], p=[0.4, 0.4, 0.2]))
    categories = list(rng.choice(list(SHAPES), size=n, replace=False))
    if rng.random() < 0.25:
        categories[1] = categories[0]
    things: list[Thing] = []
    while len(things) < n:
        side = float(rng.uniform(64, 96))
        x, y = (float(rng.uniform(side / 2 + 3, limit - side / 2 - 3)) for limit in SIZE)
        if all(max(abs(x - t.x), abs(y - t.y)) > 0.5 * (side + t.side) for t in things):
            colour = str(rng.choice(list(COLOURS)))
            things.append(Thing(str(categories[len(things)]), colour, x, y, side))
        elif rng.random() < 0.02:  # a corner no cell fits into any more: start again
            things.clear()
    return Scene(tuple(things), int(rng.integers(len(LANDSCAPES))), float(rng.uniform(0.55, 0.8)))


def draw_scene(scene: Scene, scale: int = 2) -> Image.Image:
    """Render a scene as an RGB image of :data:`SIZE`, drawn `scale` times larger and reduced."""
    width, height = SIZE[0] * scale, SIZE[1] * scale
    image = _landscape(scene, width, height)
    image.paste((70, 70, 100), mask=_shadow(scene).resize(image.size, Image.Resampling.NEAREST))
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        base = np.array(COLOURS[thing.colour])
        paints = {"main": base, "dark": base * 0.72, "light": base + (255 - base) * 0.45}
        for paint, polygon in SHAPES[thing.category]:
            fill = paints.get(paint, paint)
            pen.polygon(_place(polygon, thing, scale), fill=tuple(int(v) for v in fill))
    return image.reduce(scale)


def _shadow(scene: Scene) -> Image.Image:
    """The things' shadow, soft and a little below them, as a mask of :data:`SIZE`."""
    mask = Image.new("L", SIZE, 0)
    pen = ImageDraw.Draw(mask)
    for thing in scene.things:
        for polygon in outline(thing.category):
            pen.polygon(_place(polygon, thing), fill=70)
    return ImageChops.offset(mask.filter(ImageFilter.GaussianBlur(3)), 2, 4)


def _landscape(scene: Scene, width: int, height: int) -> Image.Image:
    top, low, far, near = (np.array(c) for c in LANDSCAPES[scene.landscape])
    ramp = np.linspace(0, 1, height)[:, None, None]
    sky = Image.fromarray((top + (low - top) * ramp).astype(np.uint8))
    image = sky.resize((width, height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    x = np.linspace(0, width, 40)
    for colour, level, phase in ((far, scene.horizon, 5.0), (near, scene.horizon + 0.12, 2.0)):
        y = height * (level + 0.05 * np.sin(x / width * 5 + phase * scene.horizon * 4))
        pen.polygon([(0, height), *zip(x, y, strict=True), (width, height)], fill=tuple(int(v) for v in colour))
    return image


def _place(polygon: np.ndarray, thing: Thing, scale: float = 1) -> list[tuple[float, float]]:
    return [*map(tuple, ((polygon * thing.side + (thing.x, thing.y)) * scale).tolist())]


# --------------------------------------------------------------------------------------------------------- captions


def name(thing: Thing) -> str:
    return f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {thing.category}"


def relation(a: Thing, b: Thing) -> str:
    """How `a` stands to `b`: "to the left of", "above", ... or, where neither axis is 1.5 times the other, both."""
    dx, dy = b.x - a.x, b.y - a.y
    across, along = "to the left of" if dx > 0 else "to the right of", "above" if dy > 0 else "below"
    if abs(dx) > 1.5 * abs(dy):
        return across
    return along if abs(dy) > 1.5 * abs(dx) else f"{along} and {across}"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _said_with_place(scene: Scene, rng: np.random.Generator) -> str:
    a, b = (scene.things[i] for i in rng.permutation(len(scene.things))[:2])
    how = relation(a, b)
    return str(rng.choice([f"{name(a)} is {how} {name(b)}", f"there is {name(a)} {how} {name(b)}"]))


def _said_as_list(scene: Scene, rng: np.random.Generator) -> str:
    listed = _listed([name(scene.things[i]) for i in rng.permutation(len(scene.things))])
    return str(rng.choice([f"a picture of {listed}", f"{listed} in a quiet landscape"]))


def _said_with_count(scene: Scene, rng: np.random.Generator) -> str:
    groups: dict[str, list[Thing]] = {}
    for i in rng.permutation(len(scene.things)):
        groups.setdefault(scene.things[i].category, []).append(scene.things[i])
    group = max(groups.values(), key=len)
    if len(group) == 1:
        a, b = (scene.things[i] for i in rng.permutation(len(scene.things))[:2])
        return f"{COUNT_WORDS[len(scene.things)]} things, among them {name(a)} and {name(b)}"
    category = group[0].category
    plural = category if category == "fish" else category + "s"
    return _listed([f"{COUNT_WORDS[len(group)]} {plural}", *(name(g[0]) for g in groups.values() if g is not group)])


def captions(scene: Scene, rng: np.random.Generator, n: int = 5) -> list[str]:
    """Write `n` true captions: in each five three with a spatial relation, a list and a count."""
    makers = [_said_with_place, _said_as_list, _said_with_count, _said_with_place, _said_with_place]
    said = []
    for i in range(n):
        text = makers[i % len(makers)](scene, rng)
        said.append(text[0].upper() + text[1:] + ".")
    return said


# ------------------------------------------------------------------------------------------------------ COCO folder


def annotate(scene: Scene) -> list[dict]:
    """COCO instance annotations of a scene (without ids): category, colour, polygons, box `x y width height`, area."""
    found = []
    for thing in scene.things:
        polygons = [np.array(_place(p, thing)) for p in outline(thing.category)]
        points = np.concatenate(polygons)
        (x0, y0), (x1, y1) = points.min(0), points.max(0)
        flat = [p.round(2).ravel().tolist() for p in polygons]
        mask = rle.merge(rle.frPyObjects(flat, SIZE[1], SIZE[0]))
        found.append({
            "category_id": list(SHAPES).index(thing.category) + 1, "attributes": {"colour": thing.colour},
            "segmentation": flat, "area": float(rle.area(mask)), "iscrowd": 0,
            "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        })
    return found


def _write_one(folder: Path, seed: int, number: int) -> tuple[Scene, list[str]]:
    rng = np.random.default_rng([seed, number])
    scene = sample_scene(rng)
    draw_scene(scene).save(folder / f"{number:012d}.jpg", quality=92)
    return scene, captions(scene, rng)


def write_scenes(folder: str | Path, n: int = 2400, seed: int = 0, split: str = "scenes") -> Path:
    """Draw `n` scenes into `folder` in COCO's layout; a folder that already holds exactly these is left alone.

    Parameters
    ----------
    folder : path that receives ``<split>/*.jpg`` and ``annotations/{captions,instances}_<split>.json``
    n, seed : number of scenes, and the seed; scene i depends on (seed, i) alone
    split : name of the split

    Returns
    -------
    Path
        `folder`
    """
    folder = paths.Home.find().resolve(folder)
    pictures, notes = folder / split, folder / "annotations"
    about = {"description": "probekit drawn scenes", "seed": seed, "n": n, "drawing": 1}
    done = notes / f"instances_{split}.json"  # written last
    if done.exists() and paths.read_json(done).get("info") == about:
        return folder
    pictures.mkdir(parents=True, exist_ok=True)
    notes.mkdir(parents=True, exist_ok=True)
    make = partial(_write_one, pictures, seed)
    with ThreadPoolExecutor(2) as pool:  # Pillow lets go of the interpreter while it draws and encodes
        drawn = list(tqdm(pool.map(make, range(n)), total=n, desc="drawing scenes", unit="scene"))
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": SIZE[0], "height": SIZE[1]} for i in range(n)]
    told = [{"image_id": i, "caption": c} for i, (_, said) in enumerate(drawn) for c in said]
    found = [{"image_id": i, **a} for i, (scene, _) in enumerate(drawn) for a in annotate(scene)]
    kinds = [{"id": i + 1, "name": c, "supercategory": "drawn"} for i, c in enumerate(SHAPES)]
    for kind, rows, extra in (("captions", told, {}), ("instances", found, {"categories": kinds})):
        rows = [{"id": i, **row} for i, row in enumerate(rows)]
        text = json.dumps({"info": about, "images": images, "annotations": rows, **extra})
        paths.write_atomic(notes / f"{kind}_{split}.json", lambda part, text=text: part.write_text(text))
    return folder
