"""Drawn scenes: reproducible, true to their captions, and annotated as they are drawn."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from pycocotools import mask as rle

from probekit.data import scenes
from probekit.data.coco import read_coco
from probekit.data.scene_shapes import SHAPES
from probekit.images import check_images

PLACES = "above|below|to the left of|to the right of"
NUMBERS = {"Two": 2, "Three": 3, "Four": 4}


def sample_scenes(n: int) -> Iterator[tuple[scenes.Scene, np.random.Generator]]:
    for i in range(n):
        rng = np.random.default_rng([3, i])
        yield scenes.sample_scene(rng), rng


def draw(seed: int) -> bytes:
    return scenes.draw_scene(scenes.sample_scene(np.random.default_rng(seed))).tobytes()


def test_a_seed_draws_the_same_scene_and_another_seed_another():
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_things_stay_inside_and_apart():
    width, height = scenes.SIZE
    for scene, _ in sample_scenes(40):
        assert 2 <= len(scene.things) <= 4
        for annotation in scenes.annotate(scene):
            x, y, w, h = annotation["bbox"]
            assert x >= 0
            assert y >= 0
            assert x + w <= width
            assert y + h <= height
        for i, thing in enumerate(scene.things):
            for other in scene.things[:i]:
                distance = max(abs(thing.x - other.x), abs(thing.y - other.y))
                assert distance > (thing.side + other.side) / 2


# --------------------------------------------------------------------------------------- captions


def things_named(text: str, scene: scenes.Scene) -> list[scenes.Thing]:
    return [thing for thing in scene.things if f"{thing.colour} {thing.category}" in text]


def check_things(text: str, scene: scenes.Scene) -> None:
    shown = {(thing.colour, thing.category) for thing in scene.things}
    for colour, category in re.findall(r"\ban? (\w+) (\w+)", text.lower()):
        if colour in scenes.COLOURS:
            assert (colour, category) in shown, text


def check_count(text: str, scene: scenes.Scene) -> bool:
    match = re.match(r"(Two|Three|Four) (\w+)", text)
    if match is None:
        return False
    number, noun = match.groups()
    counted = [
        thing for thing in scene.things if noun in ("things", thing.category, f"{thing.category}s")
    ]
    assert NUMBERS[number] == len(counted), text
    return True


def check_relation(text: str, scene: scenes.Scene) -> bool:
    pattern = rf"(an? \w+ \w+) (?:is )?((?:{PLACES})(?: and (?:{PLACES}))?) (an? \w+ \w+)"
    match = re.search(pattern, text[0].lower() + text[1:])
    if match is None:
        return False
    subject, relation, reference = match.groups()
    relations = [
        scenes.describe_relation(first, second)
        for first in things_named(subject, scene)
        for second in things_named(reference, scene)
        if first is not second
    ]
    assert relation in relations, text
    return True


def test_every_caption_is_true():
    n_counts = 0
    n_relations = 0
    for scene, rng in sample_scenes(60):
        for text in scenes.write_captions(scene, rng, n=10):
            check_things(text, scene)
            n_counts += check_count(text, scene)
            n_relations += check_relation(text, scene)
    assert n_counts == 60 * 2
    assert n_relations == 60 * 6


@pytest.mark.parametrize(
    ("x", "y", "relation", "opposite"),
    [
        (200, 60, "to the left of", "to the right of"),
        (60, 200, "above", "below"),
        (200, 200, "above and to the left of", "below and to the right of"),
    ],
)
def test_relations_follow_the_pixels(x, y, relation, opposite):
    first = scenes.Thing("cup", "red", 50, 50, 60)
    second = scenes.Thing("cup", "red", x, y, 60)
    assert scenes.describe_relation(first, second) == relation
    assert scenes.describe_relation(second, first) == opposite


# ------------------------------------------------------------------------------------ COCO folder


def test_masks_agree_with_the_picture():
    scene, _ = next(sample_scenes(1))
    background = scenes.Scene((), scene.landscape, scene.horizon)
    with_things = np.asarray(scenes.draw_scene(scene), int)
    without_things = np.asarray(scenes.draw_scene(background), int)
    change = np.abs(with_things - without_things).sum(axis=-1)
    width, height = scenes.SIZE
    covered = np.zeros((height, width), bool)
    for annotation in scenes.annotate(scene):
        polygons = rle.frPyObjects(annotation["segmentation"], height, width)
        mask = rle.decode(rle.merge(polygons)).astype(bool)
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.06)
        covered |= mask
    assert (change > 40)[covered].mean() > 0.93
    assert (change > 140)[~covered].sum() / covered.sum() < 0.08  # a shadow changes less than that


def test_a_folder_of_scenes_reads_as_coco(scene_folder):
    dataset = read_coco(scene_folder)
    assert len(dataset.images) == 60
    assert len(dataset.captions) == 300
    assert dataset.categories == tuple(SHAPES)
    assert check_images(dataset.images).reason.isna().all()


def test_scenes_that_exist_are_not_drawn_again(tmp_path):
    folder = scenes.write_scenes("coco/some", n=2, seed=7, home=tmp_path)
    assert folder == tmp_path / "coco" / "some"
    file = folder / "annotations" / "captions_scenes.json"
    captions = file.read_text()
    file.write_text("{}")
    scenes.write_scenes(folder, n=2, seed=7)
    assert file.read_text() == "{}"
    scenes.write_scenes(folder, n=2, seed=8)
    assert file.read_text() not in ("{}", captions)
