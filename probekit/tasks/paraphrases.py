"""Which captions may be true of an image besides its own: those that say nearly the same."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cache

import snowballstemmer

from probekit.tasks.words import split_words, stop_words

# Numbers that are stop words, but say something about an image.
NUMBERS = frozenset(("two", "three", "four", "five", "six", "eight", "nine", "ten"))
# Share of the content words of both captions that they have in common, from which on both may be
# true of the same image.
PARAPHRASE_SHARE = 0.75
# Share of a caption's content words that another caption has, from which on it says nothing else.
COVERED_SHARE = 0.8

_STEMMER = snowballstemmer.stemmer("english")


def content_words(caption: str) -> frozenset[str]:
    """Return the stems of a caption's words, without words that any caption may have.

    Stems are those of the Snowball stemmer for English: *rides*, *riding* and *ride* are the same.
    In scripts without spaces, words are pairs of characters.
    """
    words = split_words(caption.lower(), short_forms=True)
    return frozenset(_stem(word) for word in words if word in NUMBERS or word not in stop_words())


@cache
def _stem(word: str) -> str:
    return _STEMMER.stemWord(word)


def is_paraphrase(words: frozenset[str], other_words: Sequence[frozenset[str]]) -> bool:
    """Tell whether a caption says nearly what one of several others says.

    Parameters
    ----------
    words : frozenset of str
        The content words of the caption.
    other_words : sequence of frozenset of str
        The content words of the other captions.
    """
    for other in other_words:
        shared = len(words & other)
        needed = min(COVERED_SHARE * len(words), PARAPHRASE_SHARE * len(words | other))
        if shared and shared >= needed:
            return True
    return False


class CaptionJudge:
    """Tells by their words whether captions fit the images of other captions.

    Parameters
    ----------
    captions : sequence of str
        The n captions that are asked about.
    owners : sequence
        The image that each of them belongs to.
    captions_by_image : mapping
        All captions of each image.
    """

    def __init__(
        self,
        captions: Sequence[str],
        owners: Sequence[Hashable],
        *,
        captions_by_image: Mapping[Hashable, Sequence[str]],
    ) -> None:
        words_of = cache(content_words)
        self._owners = owners
        self._texts = [caption.lower() for caption in captions]
        self._words = [words_of(caption) for caption in captions]
        self._image_texts = {}
        self._image_words = {}
        for image in dict.fromkeys(owners):
            image_captions = captions_by_image[image]
            self._image_texts[image] = frozenset(caption.lower() for caption in image_captions)
            self._image_words[image] = [words_of(caption) for caption in image_captions]

    def may_be_true(self, i: int, j: int) -> bool:
        """Tell whether caption j may be true of the image that caption i belongs to.

        It may where it is one of that image's captions, in upper or lower case, or a paraphrase of
        one.
        """
        image = self._owners[i]
        if self._texts[j] in self._image_texts[image]:
            return True
        return is_paraphrase(self._words[j], self._image_words[image])

    def shares_word(self, i: int, j: int) -> bool:
        """Tell whether caption j has a content word of any caption of the image of caption i."""
        words = self._words[j]
        return any(words & other for other in self._image_words[self._owners[i]])
