import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probekit.data.coco import read_coco
from probekit.probes.controls import bag_of_words
from probekit.tasks.balance import TooFewImages
from probekit.tasks.base import BuildSettings, Selection
from probekit.tasks.captions import assign_within_groups, caption_task, clean_caption
from probekit.tasks.paraphrases import content_words, is_paraphrase
from tests.conftest import needs_real_coco
from tests.support.selections import binary_labels, select

KINDS = ("random", "similar", "same_categories", "swapped")


def ask(selection: Selection, kind: str) -> pd.DataFrame:
    """The examples of a caption task, with the caption and the label of each."""
    rows = caption_task(selection, np.random.default_rng(0), negatives=kind)
    captions = rows.prompt.str.removeprefix("This image contains: ")
    captions = captions.str.removesuffix(".\nIs this right?")
    return rows.assign(caption=captions, label=binary_labels(rows))


def count_words(text: str) -> Counter:
    return Counter(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("  A dog ,\n a cat..  ", "A dog, a cat"),
        ("Two cups.", "Two cups"),
        ("Is it,, really?", "Is it, really"),
        ("What?? A cat!!", "What? A cat"),
        ("No. 5 bus", "No. 5 bus"),
        ("一只狗。", "一只狗"),
    ],
)
def test_clean_caption(caption, cleaned):
    assert clean_caption(caption) == cleaned


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_image_is_asked_about_one_caption_of_its_own_and_one_that_is_not(selection, kind):
    rows = ask(selection, kind)
    for image, both in rows.groupby(level=0):
        assert sorted(both.label) == [0, 1]
        true_caption = both.caption[both.label == 1].item()
        false_caption = both.caption[both.label == 0].item()
        image_captions = selection.captions[image]
        assert true_caption in image_captions
        assert false_caption.lower() not in {caption.lower() for caption in image_captions}
        if kind == "swapped":
            assert count_words(false_caption) == count_words(true_caption)
        elif kind != "random":
            image_words = [content_words(caption) for caption in image_captions]
            assert not is_paraphrase(content_words(false_caption), image_words)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "similar", "same_categories"])
def test_a_caption_alone_says_nothing(selection, kind):
    for captions_per_image in (1, 3):
        settings = replace(selection.settings, captions=captions_per_image)
        rows = ask(replace(selection, settings=settings), kind)
        for _, part in rows.groupby("split"):
            true_captions = part.caption[part.label == 1]
            false_captions = part.caption[part.label == 0]
            assert Counter(true_captions) == Counter(false_captions)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_several_captions_per_image_are_as_often_true_as_false(selection, kind):
    several = replace(selection, settings=replace(selection.settings, captions=3))
    rows = ask(several, kind)
    counts = rows.groupby([rows.index, "label"]).size().unstack()
    assert (counts[0] == counts[1]).all()
    assert counts[1].max() == 3
    if kind in ("random", "similar"):
        assert (counts[1] == 3).all()
    for image, own_rows in rows[rows.label == 1].groupby(level=0):
        assert Counter(own_rows.caption) <= Counter(selection.captions[image])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_generator_gives_the_same_examples(selection, kind):
    assert ask(selection, kind).equals(ask(selection, kind))


def test_similar_captions_are_more_similar_than_random_ones(selection):
    def mean_overlap(kind: str) -> float:
        overlaps = []
        for _, both in ask(selection, kind).groupby(level=0):
            first, second = (content_words(caption) for caption in both.caption)
            overlaps.append(len(first & second) / len(first | second))
        return float(np.mean(overlaps))

    assert mean_overlap("similar") > 2 * mean_overlap("random")


def test_images_of_the_same_categories_exchange_captions(selection):
    rows = ask(selection, "same_categories")
    owner = {caption: image for image in rows.index for caption in selection.captions[image]}
    false_rows = rows[rows.label == 0]
    assert len(false_rows) > 40
    for image, caption in false_rows.caption.items():
        shown = selection.annotated_nc.loc[image]
        assert shown.equals(selection.annotated_nc.loc[owner[caption]].rename(image))


@pytest.mark.parametrize(
    "settings",
    [{"categories": ("cup",)}, {"categories": ("cup", "car"), "labels_from": "captions"}],
)
def test_the_same_categories_are_all_that_are_annotated(scene_folder, settings):
    dataset = read_coco(scene_folder)
    selection = select(scene_folder, dataset=dataset, train=60, validation=0, test=0, **settings)
    rows = ask(selection, "same_categories")
    categories = dataset.instances.groupby("image_id").category.agg(frozenset)
    owner = {caption: image for image in rows.index for caption in selection.captions[image]}
    assert len(rows) > 10
    for image, caption in rows.caption.items():
        assert categories[image] == categories[owner[caption]]


def test_images_that_show_nothing_are_not_of_the_same_categories():
    images = pd.DataFrame({"file": "x", "split": "train"}, index=range(6))
    captions = pd.Series(
        [["one bird"], ["two boats"], ["a cup"], ["old shoes"], ["snow"], ["a tall tower"]]
    )
    shows_nc = pd.DataFrame({"cup": [0, 0, 0, 0, 1, 1]}, dtype=bool)
    selection = Selection(
        settings=BuildSettings("x"),
        images=images,
        captions=captions,
        shows_nc=shows_nc,
        unclear_nc=shows_nc & False,
        instances=pd.DataFrame({"image_id": [4, 5], "category": "cup"}),
        annotated_nc=shows_nc,
        annotated_unclear_nc=shows_nc & False,
    )
    rows = ask(selection, "same_categories")
    assert set(rows.index) == {4, 5}
    assert len(rows) == 4
    without_instances = replace(selection, instances=selection.instances[:0])
    with pytest.raises(ValueError, match=r"no instances.*leave caption_same_categories out"):
        ask(without_instances, "same_categories")


def test_captions_of_a_single_image_are_not_exchanged():
    captions_by_image = {
        "a": ["A cup", "A red kite", "One bench"],
        "b": ["A car", "Blue boats", "The dog"],
    }
    owners = [image for image, captions in captions_by_image.items() for _ in captions]
    captions = [caption for captions in captions_by_image.values() for caption in captions]

    def assign(groups):
        return assign_within_groups(
            captions,
            owners,
            captions_by_image=captions_by_image,
            groups=groups,
            rng=np.random.default_rng(0),
        )

    assert (assign([0, 0, 0, 1, 1, 1]) == -1).all()
    assert (assign([None] * 6) == -1).all()
    assert sorted(assign([0] * 6)) == list(range(6))


def test_a_group_is_exchanged_in_chunks_of_bounded_size(monkeypatch):
    monkeypatch.setattr("probekit.tasks.captions.CAPTION_CHUNK", 10)
    names = [f"w{k}" for k in range(33)]
    captions_by_image = {name: [name] for name in names}
    rng = np.random.default_rng(0)
    assigned = assign_within_groups(
        names, names, captions_by_image=captions_by_image, groups=["all"] * 33, rng=rng
    )
    assert sorted(assigned) == list(range(33))
    assert (assigned != np.arange(33)).all()


@pytest.mark.filterwarnings("ignore:.*captions are left out")
@pytest.mark.parametrize("kind", ["similar", "same_categories"])
def test_captions_of_an_image_in_another_script_are_never_asked_as_false(kind):
    images = pd.DataFrame({"file": "x", "split": "train"}, index=range(20))
    captions = pd.Series(
        [
            [f"一只狗 {k} 和 {7 * k} {letter}" for letter in "甲乙丙丁"] + ["It is there"]
            for k in range(20)
        ]
    )
    shows_nc = pd.DataFrame({"dog": np.ones(20, bool)})
    selection = Selection(
        settings=BuildSettings("x", captions=5),
        images=images,
        captions=captions,
        shows_nc=shows_nc,
        unclear_nc=~shows_nc,
        instances=pd.DataFrame({"image_id": [1]}),
        annotated_nc=shows_nc,
        annotated_unclear_nc=~shows_nc,
    )
    rows = ask(selection, kind)
    false_captions = rows.caption[rows.label == 0]
    assert len(false_captions) > 40
    for image, caption in false_captions.items():
        assert caption.lower() not in [text.lower() for text in captions[image]]


def selection_of(captions: list[list[str]]) -> Selection:
    """Images that have captions and nothing else."""
    images = pd.DataFrame({"file": "x", "split": "train"}, index=range(len(captions)))
    nothing = pd.DataFrame(index=images.index)
    return Selection(
        settings=BuildSettings("photos"),
        images=images,
        captions=pd.Series(captions),
        shows_nc=nothing,
        unclear_nc=nothing,
        instances=pd.DataFrame(),
        annotated_nc=nothing,
    )


def test_a_caption_that_most_images_have_is_named():
    captions = [["Not to be seen"]] * 6 + [[f"A cup {k}"] for k in range(5)]
    message = r"6 of 11 captions of a split are the same, 'Not to be seen'.*remove these"
    with pytest.raises(TooFewImages, match=message):
        ask(selection_of(captions), "random")
    rows = ask(selection_of(captions[1:]), "random")
    assert (rows.label == 0).sum() == 10


def test_captions_without_english_nouns_are_not_swapped():
    captions = [[f"一只狗在草地{k}上"] for k in range(5)]
    with pytest.raises(ValueError, match=r"no caption of photos has an English noun.*leave"):
        ask(selection_of(captions), "swapped")


@pytest.mark.filterwarnings("ignore:.*captions are left out")
def test_similar_captions_are_similar_in_scripts_without_spaces():
    places = ["草地", "沙滩", "公园", "马路"]
    captions = [[f"一只{thing}在{place}上"] for thing in ("猫", "狗") for place in places]
    rows = ask(selection_of(captions), "similar")
    assert (rows.label == 0).sum() == 8
    for image, caption in rows.caption[rows.label == 0].items():
        assert caption[3:5] == captions[image][0][3:5] or caption[2] == captions[image][0][2]


def test_unknown_negatives_are_refused(selection):
    with pytest.raises(ValueError, match="'hardest': take one of random, similar"):
        ask(selection, "hardest")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bag_of_words_is_at_chance_unless_there_is_a_leak(selection, kind):
    rows = ask(selection, kind)
    y = rows.label.to_numpy()
    prompts = rows.prompt.to_numpy()
    is_train = (rows.split == "train").to_numpy()
    is_right = (bag_of_words(prompts, y, train_n=is_train) >= 0.5) == y
    standard_error = (0.25 / (~is_train).sum()) ** 0.5
    assert is_right[~is_train].mean() <= 0.5 + 3 * standard_error
    leaking_prompts = np.where(y, "surely " + prompts, prompts)
    is_right = (bag_of_words(leaking_prompts, y, train_n=is_train) >= 0.5) == y
    assert is_right[~is_train].all()


@pytest.mark.slow
@needs_real_coco
def test_swapped_real_captions_have_the_same_words_and_punctuation(real_selection):
    settings = replace(real_selection.settings, captions=5)
    rows = ask(replace(real_selection, settings=settings), "swapped")
    true_captions = rows.caption[rows.label == 1]
    false_captions = rows.caption[rows.label == 0]
    assert len(true_captions) > 700
    for true_caption, false_caption in zip(true_captions, false_captions, strict=True):
        assert true_caption.lower() != false_caption.lower()
        assert count_words(true_caption) == count_words(false_caption)
        true_punctuation = re.sub(r"[\w'’-]+", "", true_caption)
        false_punctuation = re.sub(r"[\w'’-]+", "", false_caption)
        assert sorted(true_punctuation) == sorted(false_punctuation)
        for article, letter in re.findall(r"\b(an?) (\w)", false_caption.lower()):
            is_the_writers = f"{article} {letter}" in true_caption.lower()
            assert is_the_writers or (article == "an") == (letter in "aeiou"), false_caption


@needs_real_coco
def test_similar_real_captions_share_a_content_word(real_selection):
    one_split = replace(real_selection, images=real_selection.images.assign(split="train"))
    rows = ask(one_split, "similar")
    false_captions = rows.caption[rows.label == 0]
    assert len(false_captions) >= 290
    for image, caption in false_captions.items():
        words = content_words(caption)
        assert any(words & content_words(text) for text in real_selection.captions[image])


@needs_real_coco
@pytest.mark.filterwarnings("ignore:.*captions are left out")
def test_real_images_have_captions_of_every_kind(real_selection):
    images = {kind: ask(real_selection, kind).index.nunique() for kind in KINDS}
    assert images["random"] == 300
    assert images["similar"] > 290
    assert images["swapped"] > 130
    assert images["same_categories"] > 40
