"""Wrong captions, from easy to hard, dealt out so that a caption alone does not give its label away.

Every kind but "swapped" deals the right captions of a split out anew: each is asked once as right and once as wrong. Of
"swapped" ones right and wrong have the same words.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from probekit.tasks.balance import dealt, mixed, without
from probekit.tasks.base import Selection, example_rows
from probekit.tasks.similar_captions import STOP, judge, similar

PROMPT = "This image contains: {caption}.\nIs this right?"
COLOURS = frozenset(("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray",
                     "grey", "silver", "gold"))
DETERMINERS = frozenset(("a", "an", "the", "one", "two", "three", "four", "five", "six", "some", "his", "her", "their",
                         "its", "this", "that"))
PLURALS = frozenset(("people", "men", "women", "children", "feet", "teeth", "mice", "geese", "sheep"))
WORD = re.compile(r"[\w'’-]+|[^\w\s]")
MOSTLY = 0.1  # share of a word's places in which it must stand as a noun does
OFTEN, TOGETHER = 3, 0.2  # pairs of words that stand together so many times, in such a share of the rarer one's places
SAME = frozenset(("and", "with", "near", "beside", "by", "next", "to", "a", "an", "the", ","))  # hold both ways round


def same_kind(right: Sequence[str], own: Sequence[Sequence[str]], kinds: Sequence, rng: np.random.Generator
              ) -> np.ndarray:
    """A permutation (n,) within images of the same kind, such as the same categories; -1 where there is none."""
    true, given = judge(right, own), np.full(len(right), -1)
    groups: dict[object, list[int]] = defaultdict(list)
    for i, kind in enumerate(kinds):
        groups[kind].append(i)
    for group in map(np.array, groups.values()):
        if len({id(own[i]) for i in group}) < 2:
            continue  # captions of a single image

        def clashes(a: int, b: int, group: np.ndarray = group) -> bool:
            return a == b or true(group[a], group[b])

        order = without(*mixed(len(group), clashes, rng), clashes)
        given[group[order >= 0]] = group[order[order >= 0]]
    return given


# ---------------------------------------------------------------------------------------------------------- swapping


@dataclass(frozen=True)
class Words:
    """What captions tell about words.

    Attributes
    ----------
    nouns : words that stand alone between a determiner and a word such as “is”, “of” or “on”, or the end
    compounds : pairs of neighbouring words that often stand together, or in a category's name
    """

    nouns: frozenset[str]
    compounds: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, captions: Iterable[str], categories: Iterable[str] = ()) -> Words:
        alone, single, pairs = Counter(), Counter(), Counter()
        for caption in captions:
            low = [word.lower() for word in WORD.findall(caption)]
            alone.update(word for before, word, after in zip(low, low[1:], [*low[2:], "."], strict=False)
                         if before in DETERMINERS and word.isalpha() and not (after.isalpha() and after not in STOP))
            single.update(low)
            pairs.update(pair for pair in pairwise(low) if not STOP.intersection(pair))
        often = {(a, b) for (a, b), count in pairs.items()
                 if count >= OFTEN and count >= TOGETHER * min(single[a], single[b])}
        named = {pair for name in categories for pair in pairwise(name.lower().split())}
        nouns = frozenset(word for word, count in alone.items() if count >= MOSTLY * single[word]) - STOP - COLOURS
        return cls(nouns, frozenset(often | named | {(a, b + "s") for a, b in named}))


def swapped(caption: str, own: Sequence[str], known: Words, rng: np.random.Generator) -> str | None:
    """The caption with two nouns or two colours exchanged, so that it has the same words and says something else.

    Nouns are of the same number and no part of a compound (“hot dog”), and “a” and “an” stay right. What holds both
    ways round (“a dog and a cat”) is no other caption, unless something else is said of each. Everything else, blanks
    and marks too, stays as it is. None where nothing can be exchanged.

    Parameters
    ----------
    own : all captions of the image
    """
    found = [match.span() for match in WORD.finditer(caption)]
    low = [caption[start:end].lower() for start, end in found]
    colours = [i for i, word in enumerate(low) if word in COLOURS]
    pairs = [(i, j) for kind in (_heads(low, known), colours) for i in kind for j in kind if i < j and low[i] != low[j]]
    told = {tuple(WORD.findall(text.lower())) for text in own}
    for k in rng.permutation(len(pairs)):
        i, j = pairs[k]
        if _says_the_same(low, i, j, known) or not (_fits(low, i, low[j]) and _fits(low, j, low[i])):
            continue
        (a, b), (c, d) = found[i], found[j]
        one, other = caption[a:b], caption[c:d]
        if i == 0 and one[0].isupper():  # the sentence's first letter, not the word's
            one, other = one if one.isupper() else one[0].lower() + one[1:], other[0].upper() + other[1:]
        text = caption[:a] + other + caption[b:c] + one + caption[d:]
        if tuple(WORD.findall(text.lower())) not in told:
            return text
    return None


def _heads(low: Sequence[str], known: Words) -> list[int]:
    """Places of nouns that end their phrase, are no part of a compound and no frame, as in “a picture of”."""
    out = []
    for i, word in enumerate(low):
        before, after = low[i - 1] if i else "", low[i + 1] if i + 1 < len(low) else ""
        together = (before, word) in known.compounds or (word, after) in known.compounds or before in known.nouns
        if word in known.nouns and after not in known.nouns and after != "of" and not together:
            out.append(i)
    return out


def _plural(word: str) -> bool:
    return word in PLURALS or (word.endswith("s") and not word.endswith(("ss", "us", "is")))


def _fits(low: Sequence[str], i: int, word: str) -> bool:
    """Can this word stand in place i: of the same number, and right after “a” or “an”?"""
    vowel = {"a": False, "an": True}.get(low[i - 1] if i else "")
    return _plural(low[i]) == _plural(word) and vowel in (None, word[0] in "aeiou")


def _says_the_same(low: Sequence[str], i: int, j: int, known: Words) -> bool:
    """Are two words joined by what holds both ways round, or parts of a list, with nothing else said of either?"""
    between = set(low[i + 1 : j])
    listed = low[i] in known.nouns and between <= DETERMINERS | known.nouns | {",", "and"}
    return (between <= SAME or listed) and not _described(low, i) and not _described(low, j)


def _described(low: Sequence[str], i: int) -> bool:
    return i > 0 and low[i - 1] not in DETERMINERS and low[i - 1] not in SAME


# ------------------------------------------------------------------------------------------------------------- the task


def clean(caption: str) -> str:
    """One line, no final punctuation (the prompt brings its own), none doubled, no blank before a mark."""
    text = re.sub(r"\s+", " ", caption).strip()
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    text = re.sub(r"([.,;:!?])[.,;:!?]+", r"\1", text)
    return text.rstrip(" .,;:!?")


def caption_task(chosen: Selection, rng: np.random.Generator, negatives: str = "random") -> pd.DataFrame:
    """Each image with some of its captions (label 1) and with as many wrong ones (label 0).

    random
        those of other images of its split
    similar
        the most similar ones of other images, paraphrases excluded; what nothing similar is found for is left out
    same_categories
        those of other images that show the same categories, of all that are annotated; images without such another, or
        without any, are left out
    swapped
        its own right ones with two words exchanged; captions in which none can be exchanged are left out

    Wrong captions are the right ones, dealt out anew: every caption is asked once as right and once as wrong (if
    swapped, with the same words), so that a caption alone, or its words, say nothing about its label. How many an image
    is asked about is in :attr:`~probekit.tasks.base.Build.captions`; images that have fewer are asked about all they have.
    """
    parts = []
    for images in chosen.of_each_split():
        images = images[images.index.isin(chosen.captions.index)]
        own = [chosen.captions[i] for i in images.index]
        right = [[said[k] for k in _drawn(len(said), chosen.build.captions, rng)] for said in own]
        images = images.loc[np.repeat(images.index, [len(texts) for texts in right])]
        own = [said for said, texts in zip(own, right, strict=True) for _ in texts]
        right = [text for texts in right for text in texts]
        wrong = _wrong_captions(chosen, images, right, own, negatives, rng)
        kept = [i for i, text in enumerate(wrong) if text is not None]
        for label, texts in ((1, right), (0, wrong)):
            prompts = [PROMPT.format(caption=texts[i]) for i in kept]
            parts.append(example_rows(images.iloc[kept], prompts, [label] * len(kept)))
    return pd.concat(parts)


def _drawn(n: int, count: int, rng: np.random.Generator) -> list[int]:
    return [int(rng.integers(n))] if count == 1 else rng.permutation(n)[:count].tolist()


def _wrong_captions(chosen: Selection, images: pd.DataFrame, right: list[str], own: list[list[str]], negatives: str,
                    rng: np.random.Generator) -> list[str | None]:
    if negatives == "swapped":
        every = {id(said): said for said in own}.values()  # an image's captions once, however many are asked
        known = Words.of((text for said in every for text in said), chosen.annotated_nc.columns)
        return [swapped(text, said, known, rng) for text, said in zip(right, own, strict=True)]
    if negatives == "similar":
        given = similar(right, own, rng, chosen.build.similarity)
    elif negatives == "same_categories":
        if chosen.instances.empty:
            raise ValueError(f"{chosen.build.folder} has no instances, so no categories that could be the same: leave "
                             "caption_same_categories out")
        shows = chosen.annotated_nc.loc[images.index].to_numpy()
        same = [row.tobytes() if row.any() else i for i, row in enumerate(shows)]  # what shows none is like no other
        given = same_kind(right, own, same, rng)
    else:
        known = [{text.lower() for text in said} for said in own]
        given = dealt(len(right), lambda i, j: right[j].lower() in known[i], rng)
    return [None if j < 0 else right[j] for j in given]
