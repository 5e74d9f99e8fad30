import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import REAL_COCO, needs_real_coco

from probekit import captions, coco, controls, scenes, similar, tasks
from probekit.chosen import Build, Chosen

KINDS = ("random", "similar", "same_categories", "swapped")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    folder = scenes.write(tmp_path_factory.mktemp("coco") / "scenes", n=240, seed=9)
    return tasks.choose(tasks.Build(str(folder), train=140, validation=50, test=50), coco.read(folder))[0]


def said(prompt: str) -> str:
    return prompt.partition(": ")[2].partition(".\n")[0]


def words(text: str) -> Counter:
    return Counter(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_captions_are_wrong_and_tell_nothing_by_themselves(chosen, kind):
    rows = captions.caption_task(chosen, np.random.default_rng(0), kind)
    rows["said"], rows["right"] = rows.prompt.map(said), [labels[0] for labels in rows.labels]
    for image, both in rows.groupby(level=0):
        assert sorted(both.right) == [0, 1]
        wrong = both.said[both.right == 0].item()
        assert wrong.lower() not in {text.lower() for text in chosen.captions[image]}
        if kind == "swapped":
            assert words(wrong) == words(both.said[both.right == 1].item())
        elif kind != "random":
            assert not similar.paraphrases(similar.content(wrong), similar.contents([chosen.captions[image]])[0])
    if kind != "swapped":  # every caption is asked once as right and once as wrong, within its split
        for _, part in rows.groupby("split"):
            assert Counter(part.said[part.right == 1]) == Counter(part.said[part.right == 0])
    if kind == "same_categories":
        by_caption = {text: image for image in rows.index for text in chosen.captions[image]}
        for image, text in rows.said[rows.right == 0].items():
            assert (chosen.annotated_nc.loc[image] == chosen.annotated_nc.loc[by_caption[text]]).all()
    again = captions.caption_task(chosen, np.random.default_rng(0), kind)
    assert list(again.prompt) == list(rows.prompt)


def test_similar_captions_are_more_similar_than_random_ones(chosen):
    def overlap(kind: str) -> float:
        rows = captions.caption_task(chosen, np.random.default_rng(0), kind)
        pairs = [[similar.content(said(text)) for text in both.prompt] for _, both in rows.groupby(level=0)]
        return float(np.mean([len(a & b) / len(a | b) for a, b in pairs]))

    assert overlap("similar") > 2 * overlap("random")


@pytest.mark.parametrize("kind", KINDS)
def test_several_captions_an_image_are_as_often_right_as_wrong(chosen, kind):
    several = replace(chosen, build=replace(chosen.build, captions=3))
    rows = captions.caption_task(several, np.random.default_rng(0), kind)
    rows["said"], rows["right"] = rows.prompt.map(said), [labels[0] for labels in rows.labels]
    by_image = rows.groupby([rows.index, "right"]).size().unstack()
    assert (by_image[0] == by_image[1]).all() and by_image[1].max() == 3
    if kind in ("random", "similar"):
        assert (by_image[1] == 3).all()
    for image, own in rows[rows.right == 1].groupby(level=0):
        assert set(own.said) <= set(chosen.captions[image])
    if kind != "swapped":
        for _, part in rows.groupby("split"):
            assert Counter(part.said[part.right == 1]) == Counter(part.said[part.right == 0])


def test_what_holds_both_ways_round_is_not_swapped():
    known = captions.nouns(["A dog is here", "a cat, a car and a cup", "the picture of a man", "a large beach"])
    assert known == {"dog", "cat", "car", "cup", "picture", "man"}

    def swapped(text, own=()):
        return captions.swapped(text, own, known, np.random.default_rng(0))

    assert swapped("A dog and a cat") is None
    assert swapped("A dog chases a cat") == "A cat chases a dog"
    assert swapped("A dog chases a cat", ["a cat chases a dog"]) is None
    assert swapped("A red dog and a blue cat") in ("A blue dog and a red cat", "A red cat and a blue dog")
    assert swapped("An orange cup is above a red car") == "An orange car is above a red cup"  # not “a orange car”
    assert swapped("Waves") is None
    assert swapped("A picture of a tall man") is None


def test_images_that_show_nothing_are_not_of_the_same_categories():
    images = pd.DataFrame({"file": "x", "split": "train"}, index=range(6))
    texts = pd.Series([["one bird"], ["two boats"], ["a cup"], ["old shoes"], ["snow"], ["a tall tower"]], range(6))
    shows = pd.DataFrame({"cup": [0, 0, 0, 0, 1, 1]}, dtype=bool)
    instances = pd.DataFrame({"image_id": [4, 5], "category": "cup"})
    chosen = Chosen(Build("x"), images, texts, shows, shows & False, instances, {}, shows, shows & False)
    found = captions.caption_task(chosen, np.random.default_rng(0), "same_categories")
    assert set(found.index) == {4, 5} and len(found) == 4
    with pytest.raises(ValueError, match=r"no instances.*leave caption_same_categories out"):
        captions.caption_task(replace(chosen, instances=instances[:0]), np.random.default_rng(0), "same_categories")


@pytest.mark.parametrize("settings", [{"categories": ("cup",)}, {"categories": ("cup", "car"),
                                                                 "labels_from": "captions"}])
def test_the_same_categories_are_all_that_are_annotated(scene_folder, settings):
    data = coco.read(scene_folder)
    chosen = tasks.choose(tasks.Build(str(scene_folder), train=60, validation=0, test=0, **settings), data)[0]
    rows = captions.caption_task(chosen, np.random.default_rng(0), "same_categories")
    there = data.instances.groupby("image_id").category.agg(frozenset)
    own = {text: image for image in rows.index for text in chosen.captions[image]}
    assert len(rows) > 10
    for row in rows.itertuples():
        assert there[row.Index] == there[own[said(row.prompt)]]


def test_a_bag_of_words_finds_a_leak_and_nothing_else(chosen):
    for kind in KINDS:
        rows = captions.caption_task(chosen, np.random.default_rng(0), kind)
        y, prompts = np.array([labels[0] for labels in rows.labels]), rows.prompt.to_numpy()
        train = (rows.split == "train").to_numpy()
        right = ((controls.bag_of_words(prompts, y, train) >= 0.5) == y)[~train]
        error = (0.25 / len(right)) ** 0.5
        assert right.mean() <= 0.5 + 3 * error, kind
    leak = np.where(y, "surely " + prompts, prompts)
    assert ((controls.bag_of_words(leak, y, train) >= 0.5) == y)[~train].all()


@needs_real_coco
def test_real_captions_have_wrong_ones_of_every_kind():
    build = tasks.Build(str(REAL_COCO), train=200, validation=50, test=50)
    chosen = tasks.choose(build, coco.read(REAL_COCO))[0]
    images = {kind: len(captions.caption_task(chosen, np.random.default_rng(0), kind)) // 2 for kind in KINDS}
    assert images["random"] == images["similar"] == 300 and images["swapped"] > 150 and images["same_categories"] > 40
