"""Captions with two words exchanged: they have the same words and say something else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from probekit.tasks.words import stop_words

COLOURS = frozenset(
    (
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "purple",
        "pink",
        "brown",
        "black",
        "white",
        "gray",
        "grey",
        "silver",
        "gold",
    )
)
DETERMINERS = frozenset(
    (
        "a",
        "an",
        "the",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "some",
        "his",
        "her",
        "their",
        "its",
        "this",
        "that",
    )
)
IRREGULAR_PLURALS = frozenset(
    ("people", "men", "women", "children", "feet", "teeth", "mice", "geese", "sheep")
)
# Words that hold both ways round: “a dog near a cat” is “a cat near a dog”.
SYMMETRIC_WORDS = frozenset(
    ("and", "with", "near", "beside", "by", "next", "to", "a", "an", "the", ",")
)
WORD = re.compile(r"[\w'’-]+|[^\w\s]")
# Share of a word's places at which it must stand as a noun does.
NOUN_SHARE = 0.1
# Words are a compound that stand together this often, and at this share of the rarer one's places.
COMPOUND_COUNT = 3
COMPOUND_SHARE = 0.2


@dataclass(frozen=True)
class WordStatistics:
    """Which words are nouns and which are compounds, as far as many captions tell.

    Attributes
    ----------
    nouns : frozenset of str
        Words that stand between a determiner and a word such as “is”, “of” or “on”, or the end.
    compounds : frozenset of (str, str)
        Pairs of neighbouring words that often stand together, or in the name of a category.
    """

    nouns: frozenset[str]
    compounds: frozenset[tuple[str, str]]

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], categories: Iterable[str] = ()
    ) -> WordStatistics:
        """Count the words of captions, and take compounds from the names of categories too."""
        noun_counts: Counter[str] = Counter()
        word_counts: Counter[str] = Counter()
        pair_counts: Counter[tuple[str, str]] = Counter()
        for caption in captions:
            words = _lower_words(caption)
            noun_counts.update(_words_placed_as_nouns(words))
            word_counts.update(words)
            for pair in pairwise(words):
                if not stop_words().intersection(pair):
                    pair_counts[pair] += 1
        nouns = {
            word for word, count in noun_counts.items() if count >= NOUN_SHARE * word_counts[word]
        }
        compounds = _compounds_of_names(categories)
        for (first, second), count in pair_counts.items():
            rarer_count = min(word_counts[first], word_counts[second])
            if count >= COMPOUND_COUNT and count >= COMPOUND_SHARE * rarer_count:
                compounds.add((first, second))
        return cls(frozenset(nouns - stop_words() - COLOURS), frozenset(compounds))


def _lower_words(caption: str) -> list[str]:
    return [word.lower() for word in WORD.findall(caption)]


def _words_placed_as_nouns(words: list[str]) -> list[str]:
    nouns = []
    for before, word, after in zip(words, words[1:], [*words[2:], "."], strict=False):
        ends_phrase = not after.isalpha() or after in stop_words()
        if before in DETERMINERS and word.isalpha() and ends_phrase:
            nouns.append(word)
    return nouns


def _compounds_of_names(categories: Iterable[str]) -> set[tuple[str, str]]:
    """Return the neighbouring words of category names, in the singular and in the plural."""
    compounds = set()
    for name in categories:
        for first, second in pairwise(name.lower().split()):
            compounds.add((first, second))
            compounds.add((first, f"{second}s"))
    return compounds


def swap_words(
    caption: str,
    image_captions: Sequence[str],
    *,
    statistics: WordStatistics,
    rng: np.random.Generator,
) -> str | None:
    """Exchange two nouns or two colours of a caption, so that it says something else.

    Nouns must be of the same number and no part of a compound (“hot dog”), and “a” and “an” must
    stay right. What holds both ways round (“a dog and a cat”) is not exchanged, unless something
    else is said of either. Everything else stays as it is, spaces and punctuation too.

    Parameters
    ----------
    caption : str
        The caption.
    image_captions : sequence of str
        All captions of its image, none of which may be the result.
    statistics : WordStatistics
        Which words are nouns and which are compounds.
    rng : Generator
        Draws which of the possible pairs is exchanged.

    Returns
    -------
    str or None
        None where nothing can be exchanged.
    """
    spans = [match.span() for match in WORD.finditer(caption)]
    words = [caption[start:end].lower() for start, end in spans]
    true_word_lists = [_lower_words(text) for text in image_captions]
    pairs = _exchangeable_pairs(words, statistics)
    for number in rng.permutation(len(pairs)):
        i, j = pairs[number]
        if _says_the_same(words, pairs[number], statistics=statistics):
            continue
        if not _fits(words, i, word=words[j]) or not _fits(words, j, word=words[i]):
            continue
        swapped = _exchange(caption, (spans[i], spans[j]), is_first=i == 0)
        if _lower_words(swapped) not in true_word_lists:
            return swapped
    return None


def _exchangeable_pairs(words: Sequence[str], statistics: WordStatistics) -> list[tuple[int, int]]:
    """Return the places of two different nouns, then those of two different colours."""
    nouns = _noun_places(words, statistics)
    colours = [i for i, word in enumerate(words) if word in COLOURS]
    pairs = []
    for places in (nouns, colours):
        for i in places:
            for j in places:
                if i < j and words[i] != words[j]:
                    pairs.append((i, j))
    return pairs


def _exchange(
    caption: str, spans: tuple[tuple[int, int], tuple[int, int]], *, is_first: bool
) -> str:
    """Exchange two spans of a caption; the capital letter that begins it stays in its place."""
    first, second = spans
    first_word = caption[slice(*first)]
    second_word = caption[slice(*second)]
    if is_first and first_word[0].isupper():
        second_word = second_word[0].upper() + second_word[1:]
        if not first_word.isupper():
            first_word = first_word[0].lower() + first_word[1:]
    between = caption[first[1] : second[0]]
    return caption[: first[0]] + second_word + between + first_word + caption[second[1] :]


def _noun_places(words: Sequence[str], statistics: WordStatistics) -> list[int]:
    """Return the places of nouns that end their phrase and are no part of a compound.

    A noun before “of” is left out, since it may only frame the rest, as in “a picture of”.
    """
    places = []
    for i, word in enumerate(words):
        before = words[i - 1] if i > 0 else ""
        after = words[i + 1] if i + 1 < len(words) else ""
        if word not in statistics.nouns:
            continue
        if before in statistics.nouns or after in statistics.nouns or after == "of":
            continue
        if {(before, word), (word, after)} & statistics.compounds:
            continue
        places.append(i)
    return places


def _is_plural(word: str) -> bool:
    if word in IRREGULAR_PLURALS:
        return True
    return word.endswith("s") and not word.endswith(("ss", "us", "is"))


def _fits(words: Sequence[str], i: int, *, word: str) -> bool:
    """Tell whether a word can stand at place i: of the same number, and right after “a” or “an”."""
    if _is_plural(words[i]) != _is_plural(word):
        return False
    before = words[i - 1] if i > 0 else ""
    if before not in ("a", "an"):
        return True
    return (word[0] in "aeiou") == (before == "an")


def _says_the_same(
    words: Sequence[str], pair: tuple[int, int], *, statistics: WordStatistics
) -> bool:
    """Tell whether the caption says the same with the words at two places exchanged.

    It does where they are joined by words that hold both ways round, or stand in one list, and
    nothing else is said of either.
    """
    i, j = pair
    if _is_described(words, i) or _is_described(words, j):
        return False
    between = set(words[i + 1 : j])
    is_list = words[i] in statistics.nouns and between <= (
        DETERMINERS | statistics.nouns | {",", "and"}
    )
    return is_list or between <= SYMMETRIC_WORDS


def _is_described(words: Sequence[str], i: int) -> bool:
    return i > 0 and words[i - 1] not in DETERMINERS and words[i - 1] not in SYMMETRIC_WORDS
