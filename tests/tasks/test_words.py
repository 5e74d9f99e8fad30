"""Words of texts in scripts with and without spaces between them."""

from __future__ import annotations

import pytest

from probekit.tasks.words import split_words, whole_word_pattern, word_runs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog's 2 hats.", ["A", "dog", "s", "2", "hats"]),
        ("一只狗，狗", ["一只", "只狗", "狗"]),
        ("犬がball追う", ["犬が", "ball", "追う"]),
        ("หมาวิ่ง", ["หม", "มา", "าวิ่", "วิ่ง"]),
        ("एक कुत्ता है", ["एक", "कुत्ता", "है"]),
        ("cafe\u0301 noir", ["cafe\u0301", "noir"]),
        ("…!", []),
    ],
)
def test_words_are_whole_and_pairs_of_characters_stand_for_them(text, words):
    assert split_words(text) == words


def test_short_forms_are_one_word_where_wanted():
    assert split_words("it's 一只 狗", short_forms=True) == ["it's", "一只", "狗"]


def test_two_characters_count_as_a_word():
    assert word_runs("A red dog", 1) == ["a", "red", "dog"]
    assert word_runs("A red dog", 2) == ["a", "a red", "red", "red dog", "dog"]
    assert word_runs("红色狗", 1) == ["红", "红 色", "色", "色 狗", "狗"]
    assert word_runs("红色dog", 2)[:3] == ["红", "红 色", "红 色 dog"]


@pytest.mark.parametrize(
    ("forms", "text", "is_in"),
    [
        (["dog", "dogs"], "two dogs.", True),
        (["dog", "dogs"], "a hotdog", False),
        (["dog"], "dogmas", False),
        (["dog"], "一只dog在", True),
        (["狗"], "一只狗在草地上", True),
        (["猫"], "一只狗在草地上", False),
        (["कुत्ता"], "एक कुत्ता है", True),
        (["कुत्त"], "एक कुत्ता है", False),
        (["t.v."], "a t.v. set", True),
        (["t.v."], "a tava set", False),
    ],
)
def test_whole_words_are_searched_where_words_have_ends(forms, text, is_in):
    assert (whole_word_pattern(forms).search(text) is not None) == is_in
