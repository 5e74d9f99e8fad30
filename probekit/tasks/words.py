"""Words of texts in any script, also of those that put no spaces between words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import pairwise

# Thai and Lao, Burmese, Khmer, Japanese kana, and Chinese characters: no spaces between words.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Accents and vowel signs that are characters of their own, such as those of Hindi.
MARKS = "".join(chr(c) for c in range(0x10000) if unicodedata.category(chr(c)).startswith("M"))
# A character of an unspaced script, or a whole word of another one.
TOKEN = re.compile(rf"(?=\w)[{UNSPACED}][{MARKS}]*|(?:(?![{UNSPACED}])\w[{MARKS}]*)+")
# The same, where an apostrophe is part of a word.
TOKEN_OR_SHORT_FORM = re.compile(
    rf"(?=\w)[{UNSPACED}][{MARKS}]*|(?:(?![{UNSPACED}])[\w'][{MARKS}]*)+"
)
IS_UNSPACED = re.compile(f"[{UNSPACED}]")
# A word of an unspaced script has about so many characters.
CHARACTERS_PER_WORD = 2


@cache
def stop_words() -> frozenset[str]:
    """Return scikit-learn's list of English words that any text may have."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # takes seconds

    return ENGLISH_STOP_WORDS


def split_words(text: str, *, short_forms: bool = False) -> list[str]:
    """Return the words of a text in their order.

    In scripts without spaces, pairs of neighbouring characters stand for the words, and a character
    that has no neighbour stands for itself.

    Parameters
    ----------
    text : str
        The text.
    short_forms : bool
        Whether an apostrophe is part of a word, as in *it's*.
    """
    pattern = TOKEN_OR_SHORT_FORM if short_forms else TOKEN
    words: list[str] = []
    characters: list[str] = []
    end_of_last = 0
    for match in pattern.finditer(text):
        is_character = IS_UNSPACED.match(match[0]) is not None
        if characters and not (is_character and match.start() == end_of_last):
            words += _pairs(characters)
            characters = []
        if is_character:
            characters.append(match[0])
        else:
            words.append(match[0])
        end_of_last = match.end()
    return words + _pairs(characters)


def _pairs(characters: list[str]) -> list[str]:
    if len(characters) == 1:
        return characters
    return [first + second for first, second in pairwise(characters)]


def word_runs(text: str, longest: int) -> list[str]:
    """Return all runs of up to `longest` words of a text, in small letters.

    In scripts without spaces, two characters count as a word: all runs of up to twice as many
    characters are returned.

    Parameters
    ----------
    text : str
        The text.
    longest : int
        How many words a run has at most.
    """
    tokens = TOKEN.findall(text.lower())
    lengths = [1 if IS_UNSPACED.match(token) else CHARACTERS_PER_WORD for token in tokens]
    runs = []
    for start in range(len(tokens)):
        length = 0
        for end in range(start, len(tokens)):
            length += lengths[end]
            if length > CHARACTERS_PER_WORD * longest:
                break
            runs.append(" ".join(tokens[start : end + 1]))
    return runs


def whole_word_pattern(forms: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of several forms of a word, but not inside of other words.

    In scripts without spaces nothing says where a word ends, so they are found anywhere.

    Parameters
    ----------
    forms : iterable of str
        The forms, none of them empty.
    """
    letter = rf"(?![{UNSPACED}])[\w{MARKS}]"
    alternatives = []
    for form in sorted(forms):
        before = "" if IS_UNSPACED.match(form[0]) else f"(?<!{letter})"
        after = "" if IS_UNSPACED.match(form[-1]) else f"(?!{letter})"
        alternatives.append(before + re.escape(form) + after)
    return re.compile("|".join(alternatives))
