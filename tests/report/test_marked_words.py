from probekit.report.marked_words import Ends, Words, common_ends, likeness, mark_words, shorten

RIGHT = "This image contains: A red boat, left of a cup.\nIs this right?"
WRONG = "This image contains: a green boat left of a big cup. Is this right?"


def test_words_are_marked_that_the_other_prompt_lacks():
    assert mark_words(RIGHT, WRONG) == [
        Words("This image contains: A", False),
        Words("red", True),
        Words("boat, left of a", False),
        Words("cup. Is this right?", False),
    ]
    assert [part.text for part in mark_words(WRONG, RIGHT) if part.differs] == ["green", "big"]
    assert [part.differs for part in mark_words(RIGHT, RIGHT)] == [False]


def test_no_word_is_lost():
    for prompt, other in ((RIGHT, WRONG), (WRONG, RIGHT), (RIGHT, "")):
        words = " ".join(part.text for part in mark_words(prompt, other))
        assert words.split() == prompt.split()


def test_what_does_not_differ_at_the_ends_is_left_out():
    shortened = shorten(mark_words(WRONG, RIGHT))
    assert shortened[0] == shortened[-1] == Words("…", False)
    assert Words("green", True) in shortened
    assert shorten(mark_words("yes or no", "maybe")) == [Words("yes or no", True)]
    assert shorten(mark_words("a dog", "a cat")) == [Words("…", False), Words("dog", True)]
    assert shorten([]) == []


def test_the_template_of_prompts_is_found():
    prompts = ["Is there a cup?\nAnswer now.", "Is there a cap?\nAnswer now."]
    ends = common_ends(prompts)
    assert ends == Ends("Is there a ", "\nAnswer now.")
    assert ends.strip_from(prompts[1]) == "cap?"
    assert common_ends(["the same", "the same"]) == Ends("", "")


def test_likeness_counts_words():
    assert likeness(RIGHT, RIGHT) == 1
    assert likeness("a b", "c d") == 0
    assert likeness(RIGHT, WRONG) > likeness(RIGHT, "a cup")
