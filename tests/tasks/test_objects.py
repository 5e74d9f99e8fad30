import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probekit.data.coco import read_coco
from probekit.probes.controls import bag_of_words
from probekit.tasks.balance import CHUNK
from probekit.tasks.objects import (
    SAMPLINGS,
    categories_from_captions,
    categories_from_instances,
    check_named,
    choose_objects,
    draw_balanced_mask,
    measure_caption_labels,
)
from probekit.tasks.registry import TASKS
from tests.conftest import needs_real_coco
from tests.support.selections import binary_labels, most_shown_categories, select

OBJECT_TASKS = ("object", "object_popular", "object_adversarial")


def draw_shown(n=600, c=20, seed=0) -> np.ndarray:
    """Objects in pairs that go together, from frequent to rare; each image shows some of them."""
    rng = np.random.default_rng(seed)
    chance = np.geomspace(0.6, 0.02, c // 2)
    shows_first = rng.random((n, c // 2)) < chance
    shows_nc = np.repeat(shows_first, 2, axis=1) & (rng.random((n, c)) < 0.8)
    shows_nc[~shows_nc.any(1), 0] = True
    return shows_nc


# --------------------------------------------------------------------------- one object at a time


@pytest.mark.parametrize("absent", SAMPLINGS)
def test_every_object_is_asked_about_as_often_present_as_absent(absent):
    shows_nc = draw_shown()
    present, lacked = choose_objects(shows_nc, absent=absent, rng=np.random.default_rng(1))
    rows = np.arange(len(shows_nc))
    assert shows_nc[rows, present].all()
    assert not shows_nc[rows, lacked].any()
    assert Counter(present.tolist()) == Counter(lacked.tolist())


def test_what_is_left_out_is_left_out_with_both_answers():
    """Half of the images show one object, so many others lack nothing that could be given."""
    rng = np.random.default_rng(0)
    shows_nc = rng.random((CHUNK + 400, 4)) < (0.9, 0.3, 0.2, 0.05)  # two chunks
    shows_nc = shows_nc[shows_nc.any(1) & ~shows_nc.all(1)]
    for absent in SAMPLINGS:
        present, lacked = choose_objects(shows_nc, absent=absent, rng=rng)
        kept = np.flatnonzero(lacked >= 0)
        assert 200 < len(kept) < len(shows_nc)
        assert not shows_nc[kept, lacked[kept]].any()
        assert Counter(present[kept].tolist()) == Counter(lacked[kept].tolist())


@pytest.mark.parametrize("absent", SAMPLINGS)
def test_an_object_that_most_images_show_is_not_asked_more_often_than_others_lack_it(absent):
    rng = np.random.default_rng(0)
    shows_nc = rng.random((1000, 10)) < (0.9, *[0.25] * 9)
    shows_nc = shows_nc[shows_nc.any(1) & ~shows_nc.all(1)]
    present, lacked = choose_objects(shows_nc, absent=absent, rng=rng)
    assert (present == 0).sum() <= (~shows_nc[:, 0]).sum()
    assert (lacked < 0).mean() < 0.02


def test_samplings_are_what_their_names_say():
    shows_nc = draw_shown()
    frequency = shows_nc.mean(0)
    together_cc = shows_nc.T.astype(float) @ shows_nc / shows_nc.sum(0)
    rng = np.random.default_rng(1)
    mean_frequency = {}
    mean_company = {}
    for absent in SAMPLINGS:
        _, lacked = choose_objects(shows_nc, absent=absent, rng=rng)
        mean_frequency[absent] = frequency[lacked].mean()
        company = [together_cc[c, shows_nc[i]].max() for i, c in enumerate(lacked)]
        mean_company[absent] = np.mean(company)
    assert mean_frequency["popular"] > 1.1 * mean_frequency["random"]
    assert mean_company["adversarial"] > mean_company["popular"] + 0.05
    with pytest.raises(ValueError, match="take one of random, popular, adversarial"):
        choose_objects(shows_nc, absent="rare", rng=rng)


@pytest.mark.parametrize("absent", SAMPLINGS)
def test_what_is_too_small_is_not_asked_about(absent):
    shows_nc = draw_shown()
    rng = np.random.default_rng(1)
    unclear_nc = ~shows_nc & (rng.random(shows_nc.shape) < 0.3)
    present, lacked = choose_objects(shows_nc, absent=absent, rng=rng, unclear_nc=unclear_nc)
    rows = np.arange(len(shows_nc))
    assert shows_nc[rows, present].all()
    assert not (shows_nc | unclear_nc)[rows, lacked].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECT_TASKS)
def test_the_prompt_alone_is_at_chance(name, selection):
    rows = TASKS[name].build(selection, np.random.default_rng(0))
    y = binary_labels(rows)
    is_test = (rows.split != "train").to_numpy()
    is_right = (bag_of_words(rows.prompt.to_numpy(), y, train_n=~is_test) >= 0.5) == y
    standard_error = (0.25 / is_test.sum()) ** 0.5
    assert abs(is_right[is_test].mean() - 0.5) <= 3 * standard_error


def test_the_prompt_lists_all_categories_in_an_order_drawn_for_each_image(selection):
    rows = TASKS["object"].build(selection, np.random.default_rng(0))
    lists = rows.prompt.str.partition(".\n")[0].str.removeprefix("Objects: ")
    names = sorted(selection.shows_nc.columns)
    assert all(sorted(text.split(", ")) == names for text in lists)
    assert lists.nunique() > 0.9 * rows.index.nunique()
    assert (lists.groupby(level=0).nunique() == 1).all()


@pytest.mark.slow
@needs_real_coco
@pytest.mark.parametrize(("count", "fewest_kept"), [(2, 0.15), (5, 0.6), (10, 0.85), (40, 0.97)])
@pytest.mark.parametrize("name", OBJECT_TASKS)
def test_few_categories_and_small_splits_leave_images_out_instead_of_stopping(
    name, count, fewest_kept, real_selection
):
    selection = most_shown_categories(real_selection, count)
    rows = TASKS[name].build(selection, np.random.default_rng(0))
    rows["label"] = binary_labels(rows)
    rows["object"] = rows.prompt.str.extract("Is there a (.*) in this image")[0].to_numpy()
    assert (rows.groupby(["split", "object"]).label.mean() == 0.5).all()
    assert (rows.groupby(level=0).size() == 2).all()
    for row in rows.itertuples():
        assert selection.shows_nc.loc[row.Index, row.object] == row.label
        assert not selection.unclear_nc.loc[row.Index, row.object]
    is_barred_nc = selection.shows_nc | selection.unclear_nc
    can_be_asked = selection.shows_nc.any(axis=1) & ~is_barred_nc.all(axis=1)
    assert rows.index.nunique() > fewest_kept * can_be_asked.sum()


# ----------------------------------------------------------------------------- several categories


def test_categories_do_not_give_their_labels_away():
    rng = np.random.default_rng(0)
    # As uneven as COCO: the first category is in every second image.
    frequency = np.geomspace(0.5, 0.02, 20)
    labels_nc = (rng.random((3000, 20)) < frequency).astype(int)
    labels_nc = labels_nc[labels_nc.any(1)]
    mask_nc = draw_balanced_mask(labels_nc, rng=rng)
    present_count = (labels_nc * mask_nc).sum(0)
    assert (2 * present_count == mask_nc.sum(0)).all()
    assert mask_nc.sum() > 2.9 * len(labels_nc)


def test_the_mask_leaves_out_what_is_too_small():
    shows_nc = draw_shown()
    rng = np.random.default_rng(1)
    unclear_nc = ~shows_nc & (rng.random(shows_nc.shape) < 0.3)
    mask_nc = draw_balanced_mask(shows_nc.astype(int), rng=rng, unclear_nc=unclear_nc)
    assert not (mask_nc.astype(bool) & unclear_nc).any()
    assert (mask_nc.sum(1) == 3).mean() > 0.98


def test_images_that_show_nothing_are_asked_where_the_others_do_not_suffice():
    shows_nc = np.zeros((300, 2), dtype=bool)
    shows_nc[:100, 0] = True
    shows_nc[90:120, 1] = True  # 180 images show neither
    unclear_nc = np.zeros_like(shows_nc)
    unclear_nc[120:140, 0] = True
    mask_nc = draw_balanced_mask(
        shows_nc.astype(int), rng=np.random.default_rng(0), unclear_nc=unclear_nc
    ).astype(bool)
    assert (mask_nc & shows_nc).sum(0).tolist() == [100, 30]
    assert (mask_nc & ~shows_nc).sum(0).tolist() == [100, 30]
    assert mask_nc[140:].any()
    assert not (mask_nc & unclear_nc).any()


def test_a_category_that_every_image_shows_is_not_asked_about():
    labels_nc = np.ones((20, 1), int)
    assert not draw_balanced_mask(labels_nc, rng=np.random.default_rng(0)).any()


@needs_real_coco
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 20, 40, 80])
def test_a_category_s_name_says_nothing_about_its_label_however_few_are_asked(
    count, real_selection
):
    selection = most_shown_categories(real_selection, count)
    rows = TASKS["category"].build(selection, np.random.default_rng(0))
    asked_count = 0
    for _, part in rows.groupby("split"):
        label_nc = np.array(part.labels.tolist())
        mask_nc = np.array(part["mask"].tolist())
        assert mask_nc.any(1).all()
        assert ((label_nc * mask_nc).sum(0) * 2 == mask_nc.sum(0)).all()
        asked_count += mask_nc.sum()
    shown_count = selection.shows_nc.sum()
    possible_count = np.minimum(shown_count, len(selection.images) - shown_count)
    assert asked_count >= 1.6 * possible_count.max()  # most of what the data allow


# ----------------------------------------------------------------------------- what an image shows


def test_a_category_with_tiny_instances_alone_is_unclear():
    instances = pd.DataFrame(
        [
            ("a", "cup", False),
            ("a", "car", True),
            ("b", "cup", True),
            ("b", "cup", False),
            ("c", "kite", True),
        ],
        columns=["image_id", "category", "tiny"],
    )
    images = pd.Index(["a", "b", "c", "d"])
    shows_nc, unclear_nc = categories_from_instances(
        instances, images, names=["car", "cup", "kite"]
    )
    assert shows_nc.to_numpy().tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert unclear_nc.to_numpy().tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]


NAMES = ["person", "cat", "hot dog", "knife"]
CAPTIONS = pd.Series(
    {
        1: ["Two people and a hot dog", "A cat"],
        2: ["A catfish", "Knives"],
        3: ["A knife. A person"],
    }
)


def test_labels_from_captions_are_whole_words_in_singular_or_plural():
    images = pd.Index([1, 2, 3, 4])
    first = categories_from_captions(CAPTIONS, images, names=NAMES)
    assert first.to_numpy().tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    all_captions = categories_from_captions(CAPTIONS, images, names=NAMES, first_only=False)
    assert all_captions.cat.tolist() == [1, 0, 0, 0]
    assert all_captions.knife.tolist() == [0, 1, 1, 0]


def test_labels_from_captions_in_scripts_without_spaces():
    captions = pd.Series({1: ["一只狗在草地上"], 2: ["A cat, 两只猫"], 3: ["कुत्ता"]})
    named = categories_from_captions(captions, captions.index, names=["狗", "猫", "cat", "कुत्ता"])
    assert named.to_numpy().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_categories_that_no_caption_names_are_said(capsys):
    named = pd.DataFrame({"cup": [True, False], "car": False, "kite": False})
    check_named(named[["cup"]])
    assert capsys.readouterr().out == ""
    check_named(named)
    assert "2 of 3 categories are in no first caption" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"names any of the categories \(car, kite\)"):
        check_named(named[["car", "kite"]])


def test_labels_from_captions_are_compared_with_instances():
    named_nc = categories_from_captions(CAPTIONS, pd.Index([1, 2, 3, 4]), names=NAMES)
    shown = [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    shows_nc = pd.DataFrame(shown, named_nc.index, NAMES, dtype=bool)
    agreement = measure_caption_labels(named_nc, shows_nc, unclear_nc=shows_nc & False)
    assert agreement.loc["all"].tolist() == [4, 0.5, 0.5]
    assert agreement.precision["person"] == 0.5
    assert np.isnan(agreement.precision["cat"])
    unclear_nc = shows_nc & False
    unclear_nc.loc[1, "hot dog"] = True  # named, neither shown nor lacking
    agreement = measure_caption_labels(named_nc, shows_nc, unclear_nc=unclear_nc)
    assert agreement.precision["all"] == pytest.approx(2 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(name for name in TASKS if not name.startswith("caption")))
def test_tiny_instances_and_crowds_go_through_every_task_as_documented(task, many_scenes):
    """The first thing is tiny in every third image, and a crowd in every other third."""
    dataset = read_coco(many_scenes)
    instances = dataset.instances.copy()
    is_first = ~instances.image_id.duplicated()
    is_tiny = is_first & (instances.image_id % 3 == 0)
    is_crowd = is_first & (instances.image_id % 3 == 1)
    instances.loc[is_tiny, "area"] = 2.0
    instances.loc[is_crowd, "iscrowd"] = 1
    dataset = replace(dataset, instances=instances)
    selection = select(many_scenes, dataset=dataset, train=300, validation=0, test=0)
    assert selection.instances.tiny.sum() == is_tiny.sum() == 100
    is_single = ~instances.duplicated(["image_id", "category"], keep=False)
    tiny = things(instances[is_tiny & is_single])
    crowds = things(instances[is_crowd & is_single])
    examples = TASKS[task].build(selection, np.random.default_rng(0))
    asked_things = set()
    for image, row in examples.iterrows():
        for name, label in names_and_labels(task, row, list(selection.shows_nc.columns)):
            asked_things.add((image, name))
            if (image, name) in crowds:
                assert label == 1
    assert len(asked_things) > 15
    assert not asked_things & tiny
    asks_about_single_things = task in ("relation", "size", "count", "attribute")
    assert bool(asked_things & crowds) != asks_about_single_things


def things(instances: pd.DataFrame) -> set:
    return set(zip(instances.image_id, instances.category, strict=True))


def names_and_labels(task: str, row: pd.Series, names: list[str]) -> list[tuple[str, int]]:
    """The categories that an example asks about, and their labels."""
    if task.startswith("category"):
        return [(names[c], row.labels[c]) for c in np.flatnonzero(row["mask"])]
    question = row.prompt.partition("Is there a ")[2] or row.prompt
    return [(name, row.labels[0]) for name in names if re.search(rf"\b{name}\b", question)]
