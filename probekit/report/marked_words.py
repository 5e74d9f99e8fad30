"""Which words of a prompt differ from those of another one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import takewhile
from typing import NamedTuple

PUNCTUATION = ".,;:!?“”\"'()"


class Words(NamedTuple):
    """A part of a prompt.

    Attributes
    ----------
    text : str
        Its words.
    differs : bool
        Whether the other prompt has other words here, or none.
    """

    text: str
    differs: bool


def mark_words(prompt: str, other: str) -> list[Words]:
    """Split a prompt into parts that another prompt shares with it, and parts that differ.

    Parameters
    ----------
    prompt, other : str
        They are compared word by word, without capitals and punctuation.

    Returns
    -------
    list of Words
        All words of `prompt`, in their order.
    """
    words = prompt.split()
    return [
        Words(" ".join(words[start:stop]), differs=kind != "equal")
        for kind, start, stop, _, _ in _compare(prompt, other).get_opcodes()
        if stop > start
    ]


def shorten(parts: list[Words]) -> list[Words]:
    """Put dots for what a prompt begins and ends with, where that does not differ.

    Parameters
    ----------
    parts : list of Words
        Of :func:`mark_words`.
    """
    first = [Words("…", False)] if parts and not parts[0].differs else parts[:1]
    last = [Words("…", False)] if len(parts) > 1 and not parts[-1].differs else parts[1:][-1:]
    return [*first, *parts[1:-1], *last]


class Ends(NamedTuple):
    """What all prompts of a task begin and end with."""

    start: str
    end: str

    def strip_from(self, prompt: str) -> str:
        """Return what a prompt says between them."""
        return prompt[len(self.start) : len(prompt) - len(self.end)]


def common_ends(prompts: Sequence[str]) -> Ends:
    """Find the words that all prompts begin with, and those that all of them end with.

    Parameters
    ----------
    prompts : sequence of str
        With the template of one task.

    Returns
    -------
    Ends
        Whole words with the spaces beside them; both are empty where the prompts do not differ.
    """
    if len(set(prompts)) < 2:
        return Ends("", "")
    return Ends(
        _common_start(prompts),
        _common_start([prompt[::-1] for prompt in prompts])[::-1],
    )


def _common_start(texts: Sequence[str]) -> str:
    """Return what all texts begin with, up to the last space in it."""
    first = min(texts)
    last = max(texts)
    pairs = zip(first, last, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return re.sub(r"\S+$", "", first[:same])


def likeness(prompt: str, other: str) -> float:
    """Return which share of their words two prompts have in common, from 0 to 1."""
    return _compare(prompt, other).ratio()


def _compare(prompt: str, other: str) -> SequenceMatcher:
    bare, other_bare = (
        [word.strip(PUNCTUATION).lower() for word in text.split()] for text in (prompt, other)
    )
    return SequenceMatcher(None, bare, other_bare, autojunk=False)
