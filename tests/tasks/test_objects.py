import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probekit.data import coco, scenes
from probekit.probes import controls
from probekit.tasks import building, objects, registry
from tests.conftest import REAL_COCO, needs_real_coco


def shows(n=600, c=20, seed=0):
    """Objects in pairs that go together, from frequent to rare; each image shows some and lacks some."""
    rng = np.random.default_rng(seed)
    chance = np.repeat(np.geomspace(0.6, 0.02, c // 2), 2)
    first = rng.random((n, c // 2)) < chance[::2]
    both = np.repeat(first, 2, axis=1) & (rng.random((n, c)) < 0.8)
    both[~both.any(1), 0] = True
    return both


@pytest.mark.parametrize("absent", objects.SAMPLINGS)
def test_every_object_is_asked_as_often_there_as_not(absent):
    there = shows()
    present, missing = objects.asked(there, absent, np.random.default_rng(1))
    rows = np.arange(len(there))
    assert there[rows, present].all() and not there[rows, missing].any()
    assert Counter(present.tolist()) == Counter(missing.tolist())


def test_samplings_are_what_they_say():
    there = shows()
    often, rng = there.mean(0), np.random.default_rng(1)
    together = there.T.astype(float) @ there / there.sum(0)
    rate, close = {}, {}
    for absent in objects.SAMPLINGS:
        _, missing = objects.asked(there, absent, rng)
        rate[absent] = often[missing].mean()
        close[absent] = np.mean([together[k, there[i]].max() for i, k in enumerate(missing)])
    assert rate["popular"] > 1.1 * rate["random"]
    assert close["adversarial"] > close["popular"] + 0.05
    with pytest.raises(ValueError, match="take one of random, popular, adversarial"):
        objects.asked(there, "rare", rng)


def test_what_is_too_small_is_not_asked_about():
    there, rng = shows(), np.random.default_rng(1)
    unclear = ~there & (rng.random(there.shape) < 0.3)
    rows = np.arange(len(there))
    for absent in objects.SAMPLINGS:
        present, missing = objects.asked(there, absent, rng, unclear)
        assert there[rows, present].all() and not (there | unclear)[rows, missing].any()
    mask = objects.balanced_mask(there.astype(int), rng, 3, unclear)
    assert not (mask.astype(bool) & unclear).any() and (mask.sum(1) == 3).mean() > 0.98


def test_images_that_show_nothing_answer_no_where_others_do_not_suffice():
    there = np.zeros((300, 2), dtype=bool)
    there[:100, 0] = there[90:120, 1] = True  # 180 show neither
    unclear = np.zeros_like(there)
    unclear[120:140, 0] = True
    mask = objects.balanced_mask(there.astype(int), np.random.default_rng(0), 3, unclear).astype(bool)
    assert (mask & there).sum(0).tolist() == (mask & ~there).sum(0).tolist() == [100, 30]
    assert mask[140:].any() and not (mask & unclear).any()
    always = objects.balanced_mask(np.ones((20, 1), int), np.random.default_rng(0))
    assert not always.any()  # nobody lacks it, so its name would tell


@needs_real_coco
@pytest.mark.parametrize("name", ["object", "object_popular", "object_adversarial"])
def test_few_categories_and_small_splits_leave_images_out_instead_of_stopping(name):
    data = coco.read_coco(REAL_COCO)
    often = tuple(data.instances.drop_duplicates(["image_id", "category"]).category.value_counts().index)
    images = {}
    for count in (2, 5, 10, 40):
        build = building.BuildSettings(str(REAL_COCO), train=240, validation=30, test=30, categories=often[:count])
        chosen = building.choose(build, data)[0]
        rows = registry.TASKS[name].build(chosen, np.random.default_rng(0))
        rows["yes"] = [labels[0] for labels in rows.labels]
        rows["asked"] = rows.prompt.str.extract("Is there a (.*) in this image")[0].to_numpy()
        assert (rows.groupby(["split", "asked"]).yes.mean() == 0.5).all() and (rows.groupby(level=0).size() == 2).all()
        assert all(chosen.shows_nc.loc[row.Index, row.asked] == row.yes for row in rows.itertuples())
        assert not any(chosen.unclear_nc.loc[row.Index, row.asked] for row in rows.itertuples())
        could = chosen.shows_nc.any(axis=1) & ~(chosen.shows_nc | chosen.unclear_nc).all(axis=1)
        images[count] = rows.index.nunique() / could.sum()
    assert images[2] > 0.15 and images[5] > 0.6 and images[10] > 0.85 and images[40] > 0.97, images


def test_crowds_count_and_tiny_instances_neither_way():
    instances = pd.DataFrame([("a", "cup", False), ("a", "car", True), ("b", "cup", True), ("b", "cup", False),
                              ("c", "kite", True)], columns=["image_id", "category", "tiny"])
    there, unclear = objects.shown(instances, pd.Index(["a", "b", "c", "d"]), ["car", "cup", "kite"])
    assert there.to_numpy().tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert unclear.to_numpy().tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]


@pytest.fixture(scope="module")
def many_scenes(tmp_path_factory):
    return scenes.write_scenes(tmp_path_factory.mktemp("coco") / "scenes", n=240, seed=9)


@pytest.mark.parametrize("task", ["category", "category_list", "category_dense", "object", "object_popular",
                                  "object_adversarial", "relation", "size", "count", "attribute"])
def test_tiny_instances_and_crowds_go_through_every_task_as_said(task, many_scenes):
    """Of every third image the first thing is tiny, of every other third it is a crowd."""
    data = coco.read_coco(many_scenes)
    rows = data.instances.copy()
    first = ~rows.image_id.duplicated()
    tiny, crowd = first & (rows.image_id % 3 == 0), first & (rows.image_id % 3 == 1)
    rows.loc[tiny, "area"], rows.loc[crowd, "iscrowd"] = 2.0, 1
    data = replace(data, instances=rows)
    chosen = building.choose(building.BuildSettings(str(many_scenes), train=240, validation=0, test=0, smallest=0.001), data)[0]
    assert chosen.instances.tiny.sum() == tiny.sum() == 80
    only = ~rows.duplicated(["image_id", "category"], keep=False)
    small, many = (set(zip(rows.image_id[what & only], rows.category[what & only], strict=True))
                   for what in (tiny, crowd))
    made = registry.TASKS[task].build(chosen, np.random.default_rng(0))
    asked = [(image, name, label) for image, row in made.iterrows() for name, label in _asked(task, row, chosen)]
    about = {(image, name) for image, name, _ in asked}
    assert len(about) > 15 and not about & small
    if task in ("relation", "size", "count", "attribute"):
        assert not about & many
    else:
        assert all(label == 1 for image, name, label in asked if (image, name) in many) and about & many


def _asked(task, row, chosen):
    """Names and labels that a row asks about."""
    names = list(chosen.shows_nc.columns)
    if task.startswith("category"):
        return [(names[k], row.labels[k]) for k in np.flatnonzero(row["mask"])]
    text = row.prompt.partition("Is there a ")[2] or row.prompt
    return [(name, row.labels[0]) for name in names if re.search(rf"\b{name}\b", text)]


def test_labels_from_captions_are_whole_words():
    told = pd.Series({1: ["Two people and a hot dog", "A cat"], 2: ["A catfish", "Knives"], 3: ["A knife. A person"]})
    names = ["person", "cat", "hot dog", "knife"]
    first = objects.said(told, pd.Index([1, 2, 3, 4]), names)
    assert first.to_numpy().tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    every = objects.said(told, pd.Index([1, 2, 3, 4]), names, first=False)
    assert every.cat.tolist() == [1, 0, 0, 0] and every.knife.tolist() == [0, 1, 1, 0]
    there = pd.DataFrame([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]], first.index, names, dtype=bool)
    told = objects.agreement(first, there, there & False)
    assert told.loc["all"].tolist() == [4, 0.5, 0.5] and told.precision["person"] == 0.5


@pytest.mark.parametrize("name", ["object", "object_popular", "object_adversarial"])
def test_the_name_alone_is_at_chance(name, tmp_path):
    folder = scenes.write_scenes(tmp_path / "scenes", n=300, seed=3)
    chosen = building.choose(building.BuildSettings(str(folder), train=180, validation=60, test=60), coco.read_coco(folder))[0]
    rows = registry.TASKS[name].build(chosen, np.random.default_rng(0))
    y, train = np.array([labels[0] for labels in rows.labels]), (rows.split == "train").to_numpy()
    right = (controls.bag_of_words(rows.prompt.to_numpy(), y, train) >= 0.5) == y
    assert abs(right[~train].mean() - 0.5) <= 3 * (0.25 / (~train).sum()) ** 0.5
    listed = rows.prompt.iloc[0].partition(".\n")[0].removeprefix("Objects: ").split(", ")
    assert sorted(listed) == sorted(chosen.shows_nc.columns)
    assert rows.prompt.iloc[0].partition(".")[0] != rows.prompt.iloc[1].partition(".")[0]  # shuffled for each image
