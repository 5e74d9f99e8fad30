from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from probekit.data import coco, scenes
from probekit.tasks import building, registry, spatial
from tests.conftest import REAL_COCO, needs_real_coco

NAMES = ("relation", "size", "count", "attribute")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    folder = scenes.write_scenes(tmp_path_factory.mktemp("coco") / "scenes", n=300, seed=5)
    return building.choose(building.BuildSettings(str(folder), train=200, validation=50, test=50), coco.read_coco(folder))[0]


def asked(name: str, chosen) -> pd.DataFrame:
    task = registry.TASKS[name]
    rows, classes = task.build(chosen, np.random.default_rng(0)), task.classes or ["match"]
    entries = [(image, row.split, row.prompt, classes[k], row.labels[k]) for image, row in rows.iterrows()
               for k in np.flatnonzero(row["mask"])]
    return pd.DataFrame(entries, columns=["image", "split", "prompt", "class", "label"])


@pytest.mark.parametrize("name", NAMES)
def test_a_text_alone_says_exactly_nothing(chosen, name):
    rows = asked(name, chosen)
    assert (rows.groupby(["split", "prompt", "class"]).label.mean() == 0.5).all()
    assert (rows.groupby("image").size() == 2).all()
    assert rows.image.nunique() > (0.1 if name == "size" else 0.3) * len(chosen.images)


@pytest.mark.parametrize("name", ["relation", "size"])
def test_comparisons_are_true_of_the_scene_and_asked_in_both_orders(chosen, name):
    things = {key: row for key, row in chosen.instances.set_index(["image_id", "category"]).iterrows()}
    seen = Counter()
    for image, both in asked(name, chosen).groupby("image"):
        named = [row.prompt.removeprefix("Is the ").removesuffix(" in this image?") for row in both.itertuples()]
        for text, label in zip(named, both.label, strict=True):
            how = next(how for ways in spatial.WAYS.values() for how in ways if f" {how} the " in text)
            a, b = (things[image, category] for category in text.split(f" {how} the "))
            truth = {
                "to the left of": a.x + a.w <= b.x, "to the right of": b.x + b.w <= a.x, "above": a.y + a.h <= b.y,
                "below": b.y + b.h <= a.y,
                "larger than": a.area >= 1.3 * b.area, "smaller than": b.area >= 1.3 * a.area,
            }[how]
            assert truth == bool(label), text
            seen[how] += 1
        assert {tuple(text.split(f" {how} the ")) for text in named} == {
            tuple(named[0].split(f" {how} the ")), tuple(reversed(named[0].split(f" {how} the ")))}
    assert set(seen) == set().union(*(spatial.WAYS[k] for k in (("size",) if name == "size" else ("across", "along"))))


def test_counts_and_colours_are_those_of_the_scene(chosen):
    found = chosen.instances.groupby(["image_id", "category"])
    counts, colours = found.size(), found.colour.agg(set)
    for row in asked("count", chosen).itertuples():
        category = row.prompt.removesuffix(" in this image:").rpartition("type ")[2]
        assert (str(counts[row.image, category]) == row[4]) == bool(row.label)
    for row in asked("attribute", chosen).itertuples():
        category = row.prompt.removeprefix("Colour of the ").removesuffix(" in this image:")
        assert (colours[row.image, category] == {row[4]}) == bool(row.label)


def box(x, y, w=10, h=10, area=100):
    return SimpleNamespace(x=x, y=y, w=w, h=h, area=area)


def test_ambiguous_pairs_are_left_out():
    assert spatial.relation(box(0, 0), box(20, 2)) == ("across", 0)
    assert spatial.relation(box(20, 2), box(0, 0)) == ("across", 1)
    assert spatial.relation(box(0, 30), box(2, 0)) == ("along", 1)
    assert spatial.relation(box(0, 0), box(20, 18)) is None  # aslant
    assert spatial.relation(box(0, 0), box(8, 0)) is None  # they overlap
    assert spatial.relation(box(0, 0), box(0, 0)) is None
    assert spatial.larger(box(0, 0, area=250), box(0, 0)) == ("size", 0)
    assert spatial.larger(box(0, 0), box(0, 0, area=120)) is None


def test_crowds_tiny_ones_and_twins_are_not_asked_about():
    instances = pd.DataFrame([
        (1, "cup", 0, False), (1, "car", 1, False), (1, "kite", 0, True), (2, "cup", 0, False), (2, "cup", 0, True),
    ], columns=["image_id", "category", "iscrowd", "tiny"])
    left = spatial.alone(instances)
    assert list(zip(left.image_id, left.category, strict=True)) == [(1, "cup")]


@needs_real_coco
def test_real_photographs_have_relations_sizes_and_counts_but_no_colours():
    build = building.BuildSettings(str(REAL_COCO), train=200, validation=50, test=50)
    chosen = building.choose(build, coco.read_coco(REAL_COCO))[0]
    for name in ("relation", "size", "count"):
        rows = asked(name, chosen)
        assert (rows.groupby(["split", "prompt", "class"]).label.mean() == 0.5).all()
        assert rows.image.nunique() >= 16, name
    with pytest.raises(ValueError, match="leave the task attribute out, or take drawn scenes"):
        asked("attribute", chosen)
