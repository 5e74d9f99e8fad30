import pytest

from probekit.tasks.paraphrases import CaptionJudge, content_words, is_paraphrase

SKATE_PARK = "A man on a skateboard performs a trick at the skate park"


@pytest.mark.parametrize(
    ("caption", "others"),
    [
        ("a man on a skateboard performing a trick at a skate park", [SKATE_PARK]),
        ("A man on a skateboard", [SKATE_PARK]),
        ("Men riding horses", ["Two men ride a brown horse on a beach"]),
        # 4 of 5 words in either
        ("a red cup, a kite, a car and a bench", ["a cup, a kite, a car and a bench"]),
        # 3 of 4 words in both together
        ("a cup, a kite, a car and a bench", ["a cup, a car and a bench"]),
    ],
)
def test_what_says_nearly_the_same_is_a_paraphrase(caption, others):
    assert is_paraphrase(content_words(caption), [content_words(other) for other in others])


@pytest.mark.parametrize(
    ("caption", "others"),
    [
        # no single one of them covers it
        ("A man on a skateboard", ["A man in a car", "A skateboard in a park"]),
        ("Two cars", ["A car and a cup"]),
        ("", ["A car"]),
        ("A car", []),
    ],
)
def test_what_says_something_else_is_none(caption, others):
    assert not is_paraphrase(content_words(caption), [content_words(other) for other in others])


@pytest.mark.parametrize(
    ("caption", "same"),
    [
        ("A dog rides", "the dog is riding"),
        ("the dogs' ponies jumped", "a dog jumps over the pony"),
        ("running, stopped", "run stop"),
    ],
)
def test_endings_of_words_do_not_matter(caption, same):
    assert content_words(caption) == content_words(same)


def test_numbers_matter():
    assert content_words("two dogs") != content_words("a dog")


OTHER_SCRIPTS = [
    "一个男人在沙滩上骑马",
    "一只狗在草地上",
    "Un café crème",
    "It is there",
    "桌子上有两个杯子",
]


def test_captions_in_any_script_have_words_and_may_be_true_of_their_own_image_alone():
    assert all(content_words(caption) for caption in OTHER_SCRIPTS if caption != "It is there")
    captions = [caption.lower() for caption in OTHER_SCRIPTS]
    captions_by_image = {i: [text, text.upper()] for i, text in enumerate(OTHER_SCRIPTS)}
    judge = CaptionJudge(captions, range(5), captions_by_image=captions_by_image)
    for i in range(5):
        for j in range(5):
            assert judge.may_be_true(i, j) == (i == j)


def test_all_captions_of_an_image_count():
    captions = ["a dog", "a red cup", "an old car"]
    captions_by_image = {"a": ["a dog", "one cup that is red"], "b": ["an old car", "dogs"]}
    judge = CaptionJudge(captions, ["a", "a", "b"], captions_by_image=captions_by_image)
    assert judge.may_be_true(0, 1)
    assert judge.may_be_true(2, 0)
    assert not judge.may_be_true(2, 1)
    assert judge.shares_word(2, 0)
    assert not judge.shares_word(2, 1)
