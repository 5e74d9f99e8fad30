"""Wrong captions, from easy to hard, dealt out so that a caption alone does not give its label away.

Every kind but "swapped" deals the right captions of a split out anew: each is asked once as right and once as wrong. Of
"swapped" ones right and wrong have the same words.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import scipy.sparse
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

from probekit.chosen import Chosen

PROMPT = "This image contains: {caption}.\nIs this right?"
NEAREST = 30  # captions that are looked at for each
TRIES = 300  # places that are tried for what cannot stay where it is
CHUNK = 256  # captions that are compared with all others at a time
PARAPHRASE = 0.75  # share of content words from which on a caption may be true of the other's image, too
STOP = ENGLISH_STOP_WORDS
COLOURS = frozenset(("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray",
                     "grey", "silver", "gold"))
DETERMINERS = frozenset(("a", "an", "the", "one", "two", "three", "four", "five", "six", "some", "his", "her", "their",
                         "its", "this", "that"))
SAME = frozenset(("and", "with", "near", "beside", "by", "next", "to", "a", "an", "the", ","))  # hold both ways round


def content(caption: str) -> frozenset[str]:
    """Its words, without those that any caption may have."""
    return frozenset(re.findall(r"[a-z0-9']+", caption.lower())) - STOP


def _contents(own: Sequence[Sequence[str]]) -> list[list[frozenset[str]]]:
    """The content words of each image's captions; images that stand there several times share them."""
    found = {id(said): said for said in own}
    words = {key: [content(text) for text in said] for key, said in found.items()}
    return [words[id(said)] for said in own]


def paraphrases(caption: str, known: Sequence[frozenset[str]]) -> bool:
    """Does it say nearly what one of the captions (their content words) says, and so may be true with it?"""
    own = content(caption)
    return any(len(own & other) >= PARAPHRASE * max(1, len(own | other)) for other in known)


# ------------------------------------------------------------------------------------------------------- dealing out


def dealt(n: int, clashes: Callable[[int, int], bool], rng: np.random.Generator, order: np.ndarray | None = None
          ) -> np.ndarray:
    """A permutation (n,) in which no place i gets a j that clashes with it.

    Parameters
    ----------
    order : begin with this one, and change only what clashes; at random without

    Raises
    ------
    ValueError
        None could be found.
    """
    order = rng.permutation(n) if order is None else order.copy()
    for _ in range(20):
        wrong = [i for i in range(n) if clashes(i, order[i])]
        if not wrong:
            return order
        for i in wrong:
            tried = rng.integers(n, size=TRIES).tolist()
            j = next((j for j in tried if not clashes(i, order[j]) and not clashes(j, order[i])), tried[0])
            order[i], order[j] = order[j], order[i]
    raise ValueError(f"nothing wrong could be found for {len(wrong)} of {n} images: take more images, or other ones")


def nearest(captions: Sequence[str], k: int = NEAREST) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar other captions of each by TF-IDF: places (n, k), -1 where there are fewer, and cosines (n, k).

    Captions are compared in chunks, so memory grows with their number and not with its square.
    """
    x = TfidfVectorizer(stop_words="english", sublinear_tf=True, dtype=np.float32).fit_transform(captions)
    xt = scipy.sparse.csc_matrix(x.T)
    places, cosines = np.full((len(captions), k), -1, np.int32), np.zeros((len(captions), k), np.float32)
    for at in range(0, len(captions), CHUNK):
        similar = (x[at : at + CHUNK] @ xt).tocsr()
        for i, (start, end) in enumerate(zip(similar.indptr[:-1], similar.indptr[1:], strict=True), at):
            others = similar.indices[start:end] != i
            index, value = similar.indices[start:end][others], similar.data[start:end][others]
            top = np.argpartition(-value, k - 1)[:k] if len(value) > k else np.arange(len(value))
            top = top[np.argsort(-value[top], kind="stable")]
            places[i, : len(top)], cosines[i, : len(top)] = index[top], value[top]
    return places, cosines


def similar(right: Sequence[str], own: Sequence[Sequence[str]], rng: np.random.Generator) -> np.ndarray:
    """A permutation (n,) that gives each image the most similar caption of another one that is left.

    The closest pairs are dealt out first; what is left over at the end is dealt out at random. Captions that may be
    true of the image, being those of its own or paraphrases of them, are passed over.
    """
    known = _contents(own)
    places, cosines = nearest(right)
    rows = np.repeat(np.arange(len(right)), places.shape[1])
    pairs = np.stack([rows, places.ravel()], 1)[np.argsort(-cosines.ravel(), kind="stable")]
    given, taken = np.full(len(right), -1), np.zeros(len(right), bool)
    for i, j in pairs[pairs[:, 1] >= 0].tolist():
        if given[i] < 0 and not taken[j] and not paraphrases(right[j], known[i]):
            given[i], taken[j] = j, True
    given[given < 0] = rng.permutation(np.flatnonzero(~taken))
    return dealt(len(right), lambda i, j: i == j or paraphrases(right[j], known[i]), rng, given)


def same_kind(right: Sequence[str], own: Sequence[Sequence[str]], kinds: Sequence, rng: np.random.Generator
              ) -> np.ndarray:
    """A permutation (n,) within images of the same kind, such as the same categories; -1 where there is none."""
    known, given = _contents(own), np.full(len(right), -1)
    groups: dict[object, list[int]] = defaultdict(list)
    for i, kind in enumerate(kinds):
        groups[kind].append(i)
    for group in (np.array(group) for group in groups.values() if len(group) > 1):
        try:
            given[group] = group[dealt(len(group), lambda a, b, group=group: a == b or paraphrases(
                right[group[b]], known[group[a]]), rng)]
        except ValueError:
            continue  # they say the same of each other
    return given


# ---------------------------------------------------------------------------------------------------------- swapping


def nouns(captions: Iterable[str]) -> frozenset[str]:
    """Words that stand alone between a determiner and a word such as “is”, “of” or “on”, or the end."""
    found = set()
    for caption in captions:
        low = [word.lower() for word in _split(caption)]
        found |= {word for before, word, after in zip(low, low[1:], [*low[2:], "."], strict=False)
                  if before in DETERMINERS and word.isalpha() and not (after.isalpha() and after not in STOP)}
    return frozenset(found - STOP - COLOURS)


def swapped(caption: str, own: Sequence[str], known: frozenset[str], rng: np.random.Generator) -> str | None:
    """The caption with two nouns or two colours exchanged, so that it has the same words and says something else.

    What holds both ways round (“a dog and a cat”) is no other caption, unless something else is said of each. None
    where nothing can be exchanged.

    Parameters
    ----------
    own : all captions of the image
    known : :func:`nouns`
    """
    words = _split(caption)
    low = [word.lower() for word in words]
    colours = [i for i, word in enumerate(low) if word in COLOURS]
    pairs = [(i, j) for kind in (_heads(low, known), colours) for i in kind for j in kind if i < j and low[i] != low[j]]
    told = {" ".join(_split(text.lower())) for text in own}
    for k in rng.permutation(len(pairs)):
        i, j = pairs[k]
        if _says_the_same(low, i, j) or (low[i][0] in "aeiou") != (low[j][0] in "aeiou"):  # “an green car” tells
            continue
        other = [*words]
        other[i], other[j] = (b.capitalize() if a[0].isupper() else b.lower() for a, b in
                              ((words[i], words[j]), (words[j], words[i])))
        if " ".join(other).lower() not in told:
            return re.sub(r"\s+([^\w\s])", r"\1", " ".join(other))
    return None


def _split(caption: str) -> list[str]:
    return re.findall(r"[\w'’-]+|[^\w\s]", caption)


def _heads(low: Sequence[str], known: frozenset[str]) -> list[int]:
    """Places of nouns that end their phrase and are no frame, as in “a picture of”."""
    after = [*low[1:], "."]
    return [i for i, word in enumerate(low) if word in known and after[i] not in known and after[i] != "of"]


def _says_the_same(low: Sequence[str], i: int, j: int) -> bool:
    """Are two words joined by something that holds both ways round, with nothing else said of either?"""
    return all(word in SAME for word in low[i + 1 : j]) and not _described(low, i) and not _described(low, j)


def _described(low: Sequence[str], i: int) -> bool:
    return i > 0 and low[i - 1] not in DETERMINERS and low[i - 1] not in SAME


# ------------------------------------------------------------------------------------------------------------- the task


def clean(caption: str) -> str:
    """One line, no final punctuation (the prompt brings its own), none doubled, no blank before a mark."""
    text = re.sub(r"\s+", " ", caption).strip()
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    text = re.sub(r"([.,;:!?])[.,;:!?]+", r"\1", text)
    return text.rstrip(" .,;:!?")


def caption_task(chosen: Chosen, rng: np.random.Generator, negatives: str = "random") -> pd.DataFrame:
    """Each image with one of its captions (label 1) and with a wrong one (label 0).

    random
        the one of another image of its split
    similar
        the most similar one of another image, paraphrases excluded
    same_categories
        the one of another image that shows the same categories; images without such another are left out
    swapped
        its own right one with two words exchanged; images with none that can be exchanged are left out

    Wrong captions are the right ones, dealt out anew: every caption is asked once as right and once as wrong (if
    swapped, with the same words), so that a caption alone, or its words, say nothing about its label.
    """
    parts = []
    for _, images in chosen.images.groupby("split", sort=False):
        own = [chosen.captions[i] for i in images.index]
        right = [said[rng.integers(len(said))] for said in own]
        wrong = _wrong_captions(chosen, images, right, own, negatives, rng)
        kept = [i for i, text in enumerate(wrong) if text is not None]
        images = images.iloc[kept]
        for label, texts in ((1, right), (0, wrong)):
            prompts = [PROMPT.format(caption=texts[i]) for i in kept]
            parts.append(images.assign(prompt=prompts, labels=[[label]] * len(images), mask=[[1]] * len(images)))
    return pd.concat(parts)


def _wrong_captions(chosen: Chosen, images: pd.DataFrame, right: list[str], own: list[list[str]], negatives: str,
                    rng: np.random.Generator) -> list[str | None]:
    if negatives == "swapped":
        known = nouns(text for said in own for text in said)
        texts = [swapped(text, said, known, rng) for text, said in zip(right, own, strict=True)]
        return [text and clean(text) for text in texts]
    if negatives == "similar":
        given = similar(right, own, rng)
    elif negatives == "same_categories":
        shows = chosen.shows_nc.loc[images.index].to_numpy()
        given = same_kind(right, own, [row.tobytes() for row in shows], rng)
    else:
        known = [{text.lower() for text in said} for said in own]
        given = dealt(len(right), lambda i, j: right[j].lower() in known[i], rng)
    return [None if j < 0 else right[j] for j in given]
