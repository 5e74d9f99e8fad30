import re

import numpy as np
import pytest
from pycocotools import mask as rle

from probekit.data import coco, scene_shapes, scenes
from probekit.images import unreadable_images


def some(n=40):
    for i in range(n):
        rng = np.random.default_rng([3, i])
        yield scenes.sample_scene(rng), rng


def test_a_seed_draws_the_same_scene_and_another_seed_another():
    a, b, c = (scenes.draw_scene(scenes.sample_scene(np.random.default_rng(s))).tobytes() for s in (1, 1, 2))
    assert a == b != c


def test_things_stay_inside_and_apart():
    for scene, _ in some():
        assert 2 <= len(scene.things) <= 4
        for a in scenes.annotate(scene):
            x, y, w, h = a["bbox"]
            assert x >= 0 and y >= 0 and x + w <= scenes.SIZE[0] and y + h <= scenes.SIZE[1]
        for i, t in enumerate(scene.things):
            for u in scene.things[:i]:
                assert max(abs(t.x - u.x), abs(t.y - u.y)) > (t.side + u.side) / 2


def things_named(text, scene):
    return [t for t in scene.things if f"{t.colour} {t.category}" in text]


def test_every_caption_is_true():
    how = r"((?:above|below|to the left of|to the right of)(?: and .*? of)?)"
    pattern = re.compile(rf"(an? \w+ \w+) (?:is )?{how} (an? \w+ \w+)")
    checked = 0
    for scene, rng in some(60):
        for text in scenes.captions(scene, rng, 10):
            for colour, category in re.findall(r"\ban? (\w+) (\w+)", text.lower()):
                if colour in scenes.COLOURS:
                    assert any((t.colour, t.category) == (colour, category) for t in scene.things), text
            count = re.match(r"(Two|Three|Four) (\w+)", text)
            if count:
                n = {"Two": 2, "Three": 3, "Four": 4}[count[1]]
                same = [t for t in scene.things if t.category == count[2] or t.category + "s" == count[2]]
                assert n == (len(scene.things) if count[2] == "things" else len(same)), text
            place = pattern.search(text[0].lower() + text[1:])
            if place:
                first, how, second = place.groups()
                pairs = [(a, b) for a in things_named(first, scene) for b in things_named(second, scene) if a is not b]
                assert any(scenes.relation(a, b) == how for a, b in pairs), text
                checked += 1
    assert checked > 100


def test_relation_words_follow_the_pixels():
    here = scenes.Thing("cup", "red", 50, 50, 60)
    for x, y, word in ((200, 60, "to the left of"), (60, 200, "above"), (200, 200, "above and to the left of")):
        there = scenes.Thing("cup", "red", x, y, 60)
        assert scenes.relation(here, there) == word
        opposite = word.replace("above", "below").replace("left", "right")
        assert scenes.relation(there, here) == opposite


def test_masks_agree_with_the_picture():
    scene = next(s for s, _ in some())
    plain = scenes.Scene((), scene.landscape, scene.horizon)
    change = np.abs(np.asarray(scenes.draw_scene(scene), int) - np.asarray(scenes.draw_scene(plain), int)).sum(-1)
    width, height = scenes.SIZE
    union = np.zeros((height, width), bool)
    for a in scenes.annotate(scene):
        one = rle.decode(rle.merge(rle.frPyObjects(a["segmentation"], height, width))).astype(bool)
        assert one.sum() == pytest.approx(a["area"], rel=0.06)
        union |= one
    assert (change > 40)[union].mean() > 0.93
    assert (change > 140)[~union].sum() / union.sum() < 0.08  # a shadow changes less than that


def test_folder_reads_as_coco(scene_folder):
    data = coco.read_coco(scene_folder)
    assert len(data.images) == 60 and len(data.captions) == 300
    assert data.categories == tuple(scene_shapes.SHAPES) and len(data.categories) >= 12
    assert len(unreadable_images(data.images)) == 0
    before = (scene_folder / "annotations" / "captions_scenes.json").stat().st_mtime_ns
    scenes.write_scenes(scene_folder, n=60, seed=7)
    assert (scene_folder / "annotations" / "captions_scenes.json").stat().st_mtime_ns == before
