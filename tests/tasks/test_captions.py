import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probekit.data import coco, scenes
from probekit.probes import controls
from probekit.tasks import building, captions, similar_captions
from probekit.tasks.base import BuildSettings, Selection
from tests.conftest import REAL_COCO, needs_real_coco

KINDS = ("random", "similar", "same_categories", "swapped")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    folder = scenes.write_scenes(tmp_path_factory.mktemp("coco") / "scenes", n=240, seed=9)
    return building.choose(building.BuildSettings(str(folder), train=140, validation=50, test=50), coco.read_coco(folder))[0]


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
            assert not similar_captions.paraphrases(similar_captions.content(wrong), similar_captions.contents([chosen.captions[image]])[0])
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
        pairs = [[similar_captions.content(said(text)) for text in both.prompt] for _, both in rows.groupby(level=0)]
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


KNOWN = captions.Words(frozenset(("dog", "cat", "car", "cup", "picture", "man", "tv", "apple", "cars", "people", "room",
                                  "sign", "kite", "child")),
                       frozenset((("hot", "dog"), ("living", "room"), ("stop", "sign"), ("peace", "sign"))))


def swaps(text, own=(), seeds=20):
    """All that a caption is made into."""
    return {captions.swapped(text, own, KNOWN, np.random.default_rng(seed)) for seed in range(seeds)}


def test_what_holds_both_ways_round_is_not_swapped():
    known = captions.Words.of(["A dog is here", "a cat, a car and a cup", "the picture of a man", "a large beach"])
    assert known.nouns == {"dog", "cat", "car", "cup", "picture", "man"}
    assert swaps("A dog and a cat") == swaps("A cup, a dog, a car and a cat") == {None}
    assert swaps("A dog chases a cat") == {"A cat chases a dog"}
    assert swaps("A dog chases a cat", ["a cat chases a dog"]) == {None}
    assert swaps("A red dog and a blue cat") == {"A blue dog and a red cat", "A red cat and a blue dog"}
    assert swaps("Waves") == swaps("A picture of a tall man") == {None}


def test_a_and_an_stay_right():
    assert swaps("An orange cup is above a red car") == {"An orange car is above a red cup"}  # not “a orange car”
    assert swaps("A dog near an apple eats the cat") == {"A cat near an apple eats the dog"}
    assert swaps("The apple near a dog") == {None} and swaps("The apple hits the dog") == {"The dog hits the apple"}


def test_only_nouns_of_one_number_that_are_no_part_of_a_compound_are_swapped():
    assert swaps("A man with a hot dog in a living room near a stop sign") == {None}
    assert swaps("A man eats a hot dog on a car") == {"A car eats a hot dog on a man"}
    assert swaps("People look at a dog") == swaps("The cars hit the man") == {None}
    assert swaps("The cars hit the people") == {"The people hit the cars"}
    texts = ["a young man at the stop sign", "the stop sign", "a red stop sign", "a man", "a man", "the man", "a dog"]
    known = captions.Words.of(texts, ["hot dog"])
    assert {("stop", "sign"), ("hot", "dog"), ("hot", "dogs")} <= known.compounds
    assert ("young", "man") not in known.compounds and ("red", "stop") not in known.compounds
    often = captions.Words.of(["a car", "the large", *["large cups"] * 40])
    assert "large" not in often.nouns and "car" in often.nouns


def test_only_two_words_of_a_swapped_caption_are_others():
    assert swaps("A dog, at 8:25, making \"peace sign\" by a TV") == {"A TV, at 8:25, making \"peace sign\" by a dog"}
    assert swaps("Dog behind the TV") == {"TV behind the dog"} and swaps("TV behind the dog") == {"Dog behind the TV"}
    assert swaps("dog behind the cat") == {"cat behind the dog"}
    assert swaps("A DOG EATS A CAT") == {"A CAT EATS A DOG"}


def test_images_that_show_nothing_are_not_of_the_same_categories():
    images = pd.DataFrame({"file": "x", "split": "train"}, index=range(6))
    texts = pd.Series([["one bird"], ["two boats"], ["a cup"], ["old shoes"], ["snow"], ["a tall tower"]], range(6))
    shows = pd.DataFrame({"cup": [0, 0, 0, 0, 1, 1]}, dtype=bool)
    instances = pd.DataFrame({"image_id": [4, 5], "category": "cup"})
    chosen = Selection(BuildSettings("x"), images, texts, shows, shows & False, instances, {}, shows, shows & False)
    found = captions.caption_task(chosen, np.random.default_rng(0), "same_categories")
    assert set(found.index) == {4, 5} and len(found) == 4
    with pytest.raises(ValueError, match=r"no instances.*leave caption_same_categories out"):
        captions.caption_task(replace(chosen, instances=instances[:0]), np.random.default_rng(0), "same_categories")


@pytest.mark.parametrize("settings", [{"categories": ("cup",)}, {"categories": ("cup", "car"),
                                                                 "labels_from": "captions"}])
def test_the_same_categories_are_all_that_are_annotated(scene_folder, settings):
    data = coco.read_coco(scene_folder)
    chosen = building.choose(building.BuildSettings(str(scene_folder), train=60, validation=0, test=0, **settings), data)[0]
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
def test_swapped_real_captions_have_the_same_words_and_marks():
    build = building.BuildSettings(str(REAL_COCO), train=300, validation=0, test=0, captions=5)
    rows = captions.caption_task(building.choose(build, coco.read_coco(REAL_COCO))[0], np.random.default_rng(0), "swapped")
    texts = rows.prompt.map(said).to_numpy().reshape(2, -1)
    for right, wrong in texts.T:
        assert words(right) == words(wrong) and re.sub(r"\w", "", right) != "" and right.lower() != wrong.lower()
        assert sorted(re.sub(r"[\w'’-]+", "", right)) == sorted(re.sub(r"[\w'’-]+", "", wrong))
        for article, noun in re.findall(r"\b(an?) (\w)", wrong.lower()):
            kept = f"{article} {noun}" in right.lower()  # a mistake of the writer's stays
            assert kept or (article == "an") == (noun in "aeiou"), wrong
    assert texts.shape[1] > 700


@needs_real_coco
def test_similar_real_captions_share_a_content_word():
    build = building.BuildSettings(str(REAL_COCO), train=300, validation=0, test=0)
    chosen = building.choose(build, coco.read_coco(REAL_COCO))[0]
    rows = captions.caption_task(chosen, np.random.default_rng(0), "similar")
    wrong = rows[[labels == [0] for labels in rows.labels]].prompt.map(said)
    assert len(wrong) >= 290
    for image, text in wrong.items():
        assert any(similar_captions.content(text) & similar_captions.content(own) for own in chosen.captions[image])


def test_captions_of_a_single_image_are_not_dealt_out(monkeypatch):
    def never(*_):
        raise AssertionError("there is nothing to deal out")

    monkeypatch.setattr(captions, "mixed", never)
    own = [["A cup", "A red cup", "One cup"], ["A car", "Blue cars", "The car"]]
    right, whose = [text for said in own for text in said], [said for said in own for _ in said]
    assert (captions.same_kind(right, whose, [0, 0, 0, 1, 1, 1], np.random.default_rng(0)) == -1).all()


@pytest.mark.parametrize("kind", ["similar", "same_categories"])
def test_own_captions_in_another_script_are_not_asked_as_wrong(kind):
    images = pd.DataFrame({"file": "x", "split": "train"}, index=range(20))
    texts = pd.Series([[f"一只狗 {k} 号 {c}" for c in "甲乙丙丁"] + ["It is there"] for k in range(20)], range(20))
    shows = pd.DataFrame({"dog": np.ones(20, bool)})
    chosen = Selection(BuildSettings("x", captions=5), images, texts, shows, ~shows, pd.DataFrame({"image_id": [1]}), {}, shows,
                    ~shows)
    rows = captions.caption_task(chosen, np.random.default_rng(0), kind)
    wrong = rows[[labels == [0] for labels in rows.labels]].prompt.map(said)
    assert len(wrong) > 40 and not any(text.lower() in map(str.lower, texts[image]) for image, text in wrong.items())


@needs_real_coco
def test_real_captions_have_wrong_ones_of_every_kind():
    build = building.BuildSettings(str(REAL_COCO), train=200, validation=50, test=50)
    chosen = building.choose(build, coco.read_coco(REAL_COCO))[0]
    images = {kind: len(captions.caption_task(chosen, np.random.default_rng(0), kind)) // 2 for kind in KINDS}
    assert images["random"] == 300 and images["similar"] > 250  # of splits of 50 captions some are like no other
    assert images["swapped"] > 130 and images["same_categories"] > 40
