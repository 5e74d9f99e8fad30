"""Drawn scenes in COCO's layout: the dataset that needs no download.

A scene is two to four flat things on a pastel landscape. Its captions come from a small grammar
over what the scene shows (counts, colours, spatial relations), and every thing carries its exact
box and outline. :func:`write_scenes` saves scenes as a COCO folder, so that
:mod:`probekit.data.coco` reads them like photographs.
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

SIZE = (320, 240)  # width, height in pixels
COLOURS = {
    "red": (220, 50, 47),
    "orange": (245, 140, 40),
    "yellow": (250, 208, 50),
    "green": (44, 158, 90),
    "blue": (45, 105, 215),
    "purple": (140, 75, 190),
}
# Colours of the sky at the top, the sky at the horizon, the far hill, the near hill.
LANDSCAPES = (
    ((205, 230, 245), (240, 246, 244), (200, 222, 206), (182, 210, 188)),
    ((250, 226, 214), (253, 244, 230), (226, 210, 214), (212, 194, 204)),
    ((222, 218, 240), (246, 238, 244), (206, 208, 226), (190, 194, 216)),
    ((214, 238, 232), (246, 248, 236), (226, 224, 196), (236, 226, 200)),
    ((228, 232, 238), (247, 247, 245), (212, 216, 220), (198, 204, 210)),
)
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Thing:
    """One object of a scene, in a square cell.

    Attributes
    ----------
    category : str
        One of :data:`~probekit.data.scene_shapes.SHAPES`.
    colour : str
        One of :data:`COLOURS`.
    x, y : float
        Centre of the cell in pixels.
    side : float
        Side of the cell in pixels.
    """

    category: str
    colour: str
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """Things that do not overlap, on a landscape.

    Attributes
    ----------
    things : tuple of Thing
        Two to four.
    landscape : int
        Index into :data:`LANDSCAPES`.
    horizon : float
        Height of the horizon as a fraction of the image's height, from the top.
    """

    things: tuple[Thing, ...]
    landscape: int
    horizon: float


# ---------------------------------------------------------------------------------------- drawing


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene at random.

    It has two to four things; in a quarter of the scenes two of them are of the same category.

    Parameters
    ----------
    rng : Generator
        Source of randomness.

    Returns
    -------
    Scene
        Nothing is rendered yet.
    """
    n_things = int(rng.choice([2, 3, 4], p=[0.4, 0.4, 0.2]))
    categories = list(rng.choice(list(SHAPES), size=n_things, replace=False))
    if rng.random() < 0.25:
        categories[1] = categories[0]
    things: list[Thing] = []
    while len(things) < n_things:
        side = float(rng.uniform(64, 96))
        x = float(rng.uniform(side / 2 + 3, SIZE[0] - side / 2 - 3))
        y = float(rng.uniform(side / 2 + 3, SIZE[1] - side / 2 - 3))
        if _is_free(x, y, side, things):
            colour = str(rng.choice(list(COLOURS)))
            things.append(Thing(str(categories[len(things)]), colour, x, y, side))
        elif rng.random() < 0.02:  # perhaps no cell fits any more: start again
            things.clear()
    landscape = int(rng.integers(len(LANDSCAPES)))
    horizon = float(rng.uniform(0.55, 0.8))
    return Scene(tuple(things), landscape, horizon)


def _is_free(x: float, y: float, side: float, things: list[Thing]) -> bool:
    for thing in things:
        distance = max(abs(x - thing.x), abs(y - thing.y))
        if distance <= 0.5 * (side + thing.side):
            return False
    return True


def draw_scene(scene: Scene, scale: int = 2) -> Image.Image:
    """Render a scene.

    Parameters
    ----------
    scene : Scene
        What to draw.
    scale : int
        The scene is drawn that many times larger and then reduced, which smooths its edges.

    Returns
    -------
    Image
        RGB, of :data:`SIZE`.
    """
    image = _draw_landscape(scene, SIZE[0] * scale, SIZE[1] * scale)
    shadow = _draw_shadow(scene).resize(image.size, Image.Resampling.NEAREST)
    image.paste((70, 70, 100), mask=shadow)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        main = np.array(COLOURS[thing.colour])
        paints = {"main": main, "dark": main * 0.72, "light": main + (255 - main) * 0.45}
        for part in SHAPES[thing.category]:
            rgb = paints[part.paint] if isinstance(part.paint, str) else part.paint
            pen.polygon(_to_pixels(part.polygon, thing, scale), fill=_to_fill(rgb))
    return image.reduce(scale)


def _draw_landscape(scene: Scene, width: int, height: int) -> Image.Image:
    sky_top, sky_low, far_hill, near_hill = LANDSCAPES[scene.landscape]
    top = np.array(sky_top)
    low = np.array(sky_low)
    ramp = np.linspace(0, 1, height)[:, None, None]
    sky = Image.fromarray((top + (low - top) * ramp).astype(np.uint8))
    image = sky.resize((width, height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    x = np.linspace(0, width, 40)
    hills = ((far_hill, scene.horizon, 5.0), (near_hill, scene.horizon + 0.12, 2.0))
    for rgb, level, phase in hills:
        y = height * (level + 0.05 * np.sin(x / width * 5 + phase * scene.horizon * 4))
        crest = list(zip(x.tolist(), y.tolist(), strict=True))
        pen.polygon([(0.0, float(height)), *crest, (float(width), float(height))], fill=rgb)
    return image


def _draw_shadow(scene: Scene) -> Image.Image:
    """Return the soft shadow of the things, a little below them, as a mask of :data:`SIZE`."""
    mask = Image.new("L", SIZE, 0)
    pen = ImageDraw.Draw(mask)
    for thing in scene.things:
        for polygon in outline(thing.category):
            pen.polygon(_to_pixels(polygon, thing), fill=70)
    return ImageChops.offset(mask.filter(ImageFilter.GaussianBlur(3)), 2, 4)


def _to_pixels(polygon: np.ndarray, thing: Thing, scale: float = 1) -> list[tuple[float, float]]:
    points = (polygon * thing.side + (thing.x, thing.y)) * scale
    return [(x, y) for x, y in points.tolist()]


def _to_fill(rgb: np.ndarray | tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(int(value) for value in rgb)


# --------------------------------------------------------------------------------------- captions


def describe_thing(thing: Thing) -> str:
    """Return a thing as a noun phrase, such as "an orange cup"."""
    article = "an" if thing.colour == "orange" else "a"
    return f"{article} {thing.colour} {thing.category}"


def describe_relation(subject: Thing, reference: Thing) -> str:
    """Return where `subject` is, seen from `reference`.

    Parameters
    ----------
    subject, reference : Thing
        Two things of a scene.

    Returns
    -------
    str
        "to the left of", "to the right of", "above" or "below" where one axis separates the things
        more than 1.5 times as far as the other; else both, such as "above and to the left of".
    """
    dx = reference.x - subject.x
    dy = reference.y - subject.y
    horizontal = "to the left of" if dx > 0 else "to the right of"
    vertical = "above" if dy > 0 else "below"
    if abs(dx) > 1.5 * abs(dy):
        return horizontal
    if abs(dy) > 1.5 * abs(dx):
        return vertical
    return f"{vertical} and {horizontal}"


def write_captions(scene: Scene, rng: np.random.Generator, n: int = 5) -> list[str]:
    """Write true captions of a scene.

    Parameters
    ----------
    scene : Scene
        What the captions are about.
    rng : Generator
        Chooses things, their order and the wording.
    n : int
        Number of captions: of each five, three say a spatial relation, one lists all things, one
        says a count.

    Returns
    -------
    list of str
        Sentences with a capital letter and a full stop.
    """
    writers = (
        _relation_caption,
        _list_caption,
        _count_caption,
        _relation_caption,
        _relation_caption,
    )
    captions = []
    for i in range(n):
        text = writers[i % len(writers)](scene, rng)
        captions.append(f"{text[0].upper()}{text[1:]}.")
    return captions


def _relation_caption(scene: Scene, rng: np.random.Generator) -> str:
    first, second = _shuffled_things(scene, rng)[:2]
    relation = describe_relation(first, second)
    subject = describe_thing(first)
    reference = describe_thing(second)
    wordings = [
        f"{subject} is {relation} {reference}",
        f"there is {subject} {relation} {reference}",
    ]
    return str(rng.choice(wordings))


def _list_caption(scene: Scene, rng: np.random.Generator) -> str:
    names = _join_words([describe_thing(thing) for thing in _shuffled_things(scene, rng)])
    return str(rng.choice([f"a picture of {names}", f"{names} in a quiet landscape"]))


def _count_caption(scene: Scene, rng: np.random.Generator) -> str:
    groups: dict[str, list[Thing]] = {}
    for thing in _shuffled_things(scene, rng):
        groups.setdefault(thing.category, []).append(thing)
    largest = max(groups.values(), key=len)
    if len(largest) == 1:
        first, second = _shuffled_things(scene, rng)[:2]
        count = COUNT_WORDS[len(scene.things)]
        return f"{count} things, among them {describe_thing(first)} and {describe_thing(second)}"
    category = largest[0].category
    plural = category if category == "fish" else f"{category}s"
    others = [describe_thing(group[0]) for group in groups.values() if group is not largest]
    return _join_words([f"{COUNT_WORDS[len(largest)]} {plural}", *others])


def _shuffled_things(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    return [scene.things[i] for i in rng.permutation(len(scene.things))]


def _join_words(words: list[str]) -> str:
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} and {words[-1]}"


# ------------------------------------------------------------------------------------ COCO folder


def annotate(scene: Scene) -> list[dict]:
    """Return the COCO instance annotations of a scene, without ids.

    Parameters
    ----------
    scene : Scene
        What to annotate.

    Returns
    -------
    list of dict
        One per thing, with COCO's keys: ``category_id``, ``segmentation`` (polygons), ``area`` in
        square pixels, ``bbox`` (x, y, width, height in pixels), ``iscrowd``; and the colour as
        ``attributes["colour"]``.
    """
    annotations = []
    for thing in scene.things:
        polygons = [np.array(_to_pixels(polygon, thing)) for polygon in outline(thing.category)]
        points = np.concatenate(polygons)
        x0, y0 = points.min(axis=0)
        x1, y1 = points.max(axis=0)
        segmentation = [polygon.round(2).ravel().tolist() for polygon in polygons]
        mask = rle.merge(rle.frPyObjects(segmentation, SIZE[1], SIZE[0]))
        annotations.append(
            {
                "category_id": list(SHAPES).index(thing.category) + 1,
                "attributes": {"colour": thing.colour},
                "segmentation": segmentation,
                "area": float(rle.area(mask)),
                "iscrowd": 0,
                "bbox": [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)],
            }
        )
    return annotations


def write_scenes(
    folder: str | Path,
    n: int = 2400,
    *,
    seed: int = 0,
    split: str = "scenes",
    home: str | Path | paths.Home | None = None,
) -> Path:
    """Draw scenes into a folder in COCO's layout.

    A folder that holds exactly these scenes already is left as it is.

    Parameters
    ----------
    folder : str or Path
        Receives ``<split>/*.jpg`` and ``annotations/{captions,instances}_<split>.json``.
    n : int
        Number of scenes.
    seed : int
        Scene i depends on (seed, i) alone.
    split : str
        Name of the split.
    home : str, Path or Home, optional
        Where a relative `folder` starts, see :meth:`probekit.paths.Home.find`.

    Returns
    -------
    Path
        The folder, absolute.
    """
    folder = paths.Home.find(home).resolve(folder)
    image_folder = folder / split
    annotation_folder = folder / "annotations"
    captions_file = annotation_folder / f"captions_{split}.json"
    instances_file = annotation_folder / f"instances_{split}.json"
    info = {"description": "probekit drawn scenes", "seed": seed, "n": n, "drawing": 1}
    # The file of instances is written last: where it is complete, everything is.
    if instances_file.exists() and paths.read_json(instances_file).get("info") == info:
        return folder
    image_folder.mkdir(parents=True, exist_ok=True)
    annotation_folder.mkdir(parents=True, exist_ok=True)

    write_image = partial(_write_image, image_folder, seed)
    with ThreadPoolExecutor(2) as pool:  # Pillow releases the interpreter's lock while it draws
        scenes = list(
            tqdm(pool.map(write_image, range(n)), total=n, desc="drawing scenes", unit="scene")
        )

    images = []
    captions: list[dict] = []
    instances: list[dict] = []
    for i, (scene, texts) in enumerate(scenes):
        images.append({"id": i, "file_name": _file_name(i), "width": SIZE[0], "height": SIZE[1]})
        for text in texts:
            captions.append({"id": len(captions), "image_id": i, "caption": text})
        for annotation in annotate(scene):
            instances.append({"id": len(instances), "image_id": i, **annotation})
    categories = [
        {"id": i, "name": category, "supercategory": "drawn"}
        for i, category in enumerate(SHAPES, start=1)
    ]
    shared = {"info": info, "images": images}
    _write_annotations(captions_file, {**shared, "annotations": captions})
    _write_annotations(
        instances_file, {**shared, "annotations": instances, "categories": categories}
    )
    return folder


def _write_image(folder: Path, seed: int, number: int) -> tuple[Scene, list[str]]:
    rng = np.random.default_rng([seed, number])
    scene = sample_scene(rng)
    draw_scene(scene).save(folder / _file_name(number), quality=92)
    return scene, write_captions(scene, rng)


def _file_name(number: int) -> str:
    return f"{number:012d}.jpg"


def _write_annotations(file: Path, content: dict) -> None:
    text = json.dumps(content)
    paths.write_atomic(file, lambda part: part.write_text(text, encoding="utf-8"))
