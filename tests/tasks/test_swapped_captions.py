import numpy as np
import pytest

from probekit.tasks.swapped_captions import WordStatistics, swap_words

STATISTICS = WordStatistics(
    frozenset(
        "dog cat car cup picture man tv apple cars people room sign kite child".split()  # noqa: SIM905  # easier to read
    ),
    frozenset((("hot", "dog"), ("living", "room"), ("stop", "sign"), ("peace", "sign"))),
)


def all_swaps(caption, image_captions=()):
    """Everything that a caption is made into, over twenty seeds."""
    swaps = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        swaps.add(swap_words(caption, image_captions, statistics=STATISTICS, rng=rng))
    return swaps


def test_nouns_stand_between_a_determiner_and_the_end_of_their_phrase():
    captions = ["A dog is here", "a cat, a car and a cup", "the picture of a man", "a large beach"]
    statistics = WordStatistics.from_captions(captions)
    assert statistics.nouns == {"dog", "cat", "car", "cup", "picture", "man"}


def test_what_mostly_stands_elsewhere_is_no_noun():
    captions = ["a car", "the large", *["large cups"] * 40]
    statistics = WordStatistics.from_captions(captions)
    assert "large" not in statistics.nouns
    assert "car" in statistics.nouns


def test_compounds_often_stand_together_or_name_a_category():
    captions = ["a young man at the stop sign", "the stop sign", "a red stop sign"]
    captions += ["a man", "a man", "the man", "a dog"]
    compounds = WordStatistics.from_captions(captions, ["hot dog"]).compounds
    assert {("stop", "sign"), ("hot", "dog"), ("hot", "dogs")} <= compounds
    assert ("young", "man") not in compounds
    assert ("red", "stop") not in compounds


@pytest.mark.parametrize(
    "caption",
    [
        "A dog and a cat",
        "A cup, a dog, a car and a cat",
        "Waves",
        "A picture of a tall man",
        "The apple near a dog",
        "A man with a hot dog in a living room near a stop sign",
        "People look at a dog",
        "The cars hit the man",
    ],
)
def test_captions_in_which_nothing_can_be_exchanged(caption):
    assert all_swaps(caption) == {None}


@pytest.mark.parametrize(
    ("caption", "swaps"),
    [
        ("A dog chases a cat", {"A cat chases a dog"}),
        (
            "A red dog and a blue cat",
            {"A blue dog and a red cat", "A red cat and a blue dog"},
        ),
        # not “a orange car”
        ("An orange cup is above a red car", {"An orange car is above a red cup"}),
        ("A dog near an apple eats the cat", {"A cat near an apple eats the dog"}),
        ("The apple hits the dog", {"The dog hits the apple"}),
        ("A man eats a hot dog on a car", {"A car eats a hot dog on a man"}),
        ("The cars hit the people", {"The people hit the cars"}),
        (
            'A dog, at 8:25, making "peace sign" by a TV',
            {'A TV, at 8:25, making "peace sign" by a dog'},
        ),
        ("Dog behind the TV", {"TV behind the dog"}),
        ("TV behind the dog", {"Dog behind the TV"}),
        ("dog behind the cat", {"cat behind the dog"}),
        ("A DOG EATS A CAT", {"A CAT EATS A DOG"}),
    ],
)
def test_two_words_are_exchanged_and_everything_else_stays(caption, swaps):
    assert all_swaps(caption) == swaps


def test_another_caption_of_the_image_is_no_swap():
    assert all_swaps("A dog chases a cat", ["a cat chases a dog"]) == {None}
