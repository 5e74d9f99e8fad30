"""Variants of a task ask about the same things in other words."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probekit.tasks.base import BuildSettings, Task, Variant, example_rows, task_infos
from probekit.tasks.building import build_examples, table_fingerprint
from probekit.tasks.registry import TASKS, find_task, find_tasks
from probekit.tasks.variants import has_plain_wording, pair_examples, vary_task, wording_families

VARIED = [f"{base}_{variant}" for base, task in TASKS.items() for variant in ("", *task.variants)]
VARIED = [name.removesuffix("_") for name in VARIED]


@pytest.fixture(scope="module")
def all_wordings(many_scenes, tmp_path_factory) -> pd.DataFrame:
    """Every task that has variants, in all of them."""
    names = [name for name in VARIED if find_task(name).variant_of or find_task(name).variants]
    settings = BuildSettings(
        str(many_scenes), train=200, validation=50, test=50, tasks=tuple(names)
    )
    return build_examples(settings, tmp_path_factory.mktemp("wordings"))


def things_asked(prompt: str) -> str:
    """What a prompt asks about, whatever its wording."""
    last = prompt.partition("Objects: ")[2].partition("\n")[2] or prompt
    patterns = (
        r"(?:contains|contain|describe the image): (.*?)\W*(?:\n|$)",
        r"(?:there|There|show)(?: is)? (?:a|no) ([a-z ]+?)(?: in this image)?\W*(?:\n|$)",
        r"(?:The|the) ([a-z]+ is(?: not)? .* in this image)",
        r"Is the ([a-z]+) ((?:to the|above|below|larger|smaller).* in this image)",
    )
    for pattern in patterns:
        match = re.search(pattern, last)
        if match:
            words = " ".join(match.groups()).replace(" is not ", " ").replace(" is ", " ")
            return words
    raise AssertionError(prompt)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIED if find_task(name).variant_of])
def test_a_variant_asks_each_image_about_the_same_things(all_wordings, name):
    base = find_task(name).variant_of
    tables = [all_wordings[all_wordings.task == one].reset_index(drop=True) for one in (base, name)]
    numbers = pair_examples(all_wordings, base, name)
    plain, varied = (table.iloc[rows] for table, rows in zip(tables, numbers, strict=True))
    assert len(plain) == len(tables[0]) == len(tables[1])
    assert plain.image_id.tolist() == varied.image_id.tolist()
    assert plain.split.tolist() == varied.split.tolist()
    asked = [things_asked(prompt) for prompt in plain.prompt]
    assert asked == [things_asked(prompt) for prompt in varied.prompt]
    assert len(set(asked)) > 5
    assert not set(plain.prompt) & set(varied.prompt)
    plain_labels, labels = (np.array(one["labels"].tolist()) for one in (plain, varied))
    expected = 1 - plain_labels if name.endswith("_negated") else plain_labels
    assert labels.tolist() == expected.tolist()
    assert 0.4 < labels.mean() < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIED if find_task(name).variant_of])
def test_the_answers_are_those_that_the_prompt_asks_for(all_wordings, name):
    prompt = all_wordings[all_wordings.task == name].prompt.iloc[0]
    (no,), (yes,) = task_infos(all_wordings)[name].answers
    if name.endswith(("_a_b", "_b_a")):
        assert f"\n{yes}: yes\n" in prompt
        assert f"\n{no}: no\n" in prompt
        assert prompt.index("\nA:") < prompt.index("\nB:")
    elif name.endswith("_one_zero"):
        assert "1 if this is right, and 0 if it is wrong" in prompt
        assert (no, yes) == ("0", "1")
    elif name.endswith("_true_false"):
        assert "true or false?" in prompt
        assert (no, yes) == ("false", "true")
    else:
        assert (no, yes) == ("no", "yes")


@pytest.mark.slow
def test_a_task_of_a_user_has_variants_too(many_scenes, tmp_path, monkeypatch):
    def build(selection, rng, *, prompt="Is {name} on top?"):
        parts = []
        for images in selection.images_by_split():
            label_n = rng.permutation(len(images)) % 2
            prompts = [prompt.format(name=f"it {rng.integers(100)}") for _ in label_n]
            parts.append(example_rows(images, prompts, label_n))
        return pd.concat(parts)

    variants = {"negated": Variant("Is {name} anywhere but on top?", negated=True)}
    mine = Task("binary", build, "On top?", variants=variants)
    monkeypatch.setitem(TASKS, "mine", mine)
    settings = BuildSettings(
        str(many_scenes), train=20, validation=10, test=10, tasks=("mine", "mine_negated")
    )
    examples = build_examples(settings, tmp_path)
    first, second = pair_examples(examples, "mine", "mine_negated")
    plain = examples[examples.task == "mine"].iloc[first]
    negated = examples[examples.task == "mine_negated"].iloc[second]
    assert len(plain) == 40
    number = r"it (\d+)"
    assert plain.prompt.str.extract(number).to_numpy().tolist() == (
        negated.prompt.str.extract(number).to_numpy().tolist()
    )
    assert all(a[0] + b[0] == 1 for a, b in zip(plain.labels, negated.labels, strict=True))
    assert negated.question.iloc[0] == "On top? (negated)"


@pytest.mark.slow
def test_families_begin_with_the_plain_wording(all_wordings):
    infos = task_infos(all_wordings)
    families = wording_families(infos)
    assert families["object"][0] == "object"
    assert len(families["object"]) == 1 + len(TASKS["object"].variants)
    assert "caption_similar_negated" in families["caption_similar"]
    assert has_plain_wording("object_negated", infos)
    assert not has_plain_wording("object", infos)
    alone = {name: infos[name] for name in ("object_negated", "caption")}
    assert wording_families(alone) == {}
    assert not has_plain_wording("object_negated", alone)
    two = {name: infos[name] for name in ("object_negated", "object_a_b")}
    assert wording_families(two) == {}  # there is no plain wording to hold them against


@pytest.mark.slow
def test_pairs_survive_what_is_done_to_the_table(all_wordings):
    few = all_wordings.sample(frac=0.5, random_state=0).reset_index(drop=True)
    first, second = pair_examples(few, "object", "object_negated")
    plain = few[few.task == "object"].iloc[first]
    negated = few[few.task == "object_negated"].iloc[second]
    assert 20 < len(plain) < (few.task == "object").sum()
    assert plain.image_id.tolist() == negated.image_id.tolist()
    assert [things_asked(prompt) for prompt in plain.prompt] == [
        things_asked(prompt) for prompt in negated.prompt
    ]


@pytest.mark.slow
def test_items_of_other_images_are_refused(all_wordings):
    is_negated = all_wordings.task == "object_negated"
    rolled = np.roll(all_wordings.image_id[is_negated], 2)
    mixed = all_wordings.copy()
    mixed.loc[is_negated, "image_id"] = rolled
    with pytest.raises(ValueError, match="about different images: build them in one call"):
        pair_examples(mixed, "object", "object_negated")
    without_items = all_wordings.drop(columns="item")
    with pytest.raises(ValueError, match="no column item"):
        pair_examples(without_items, "object", "object_negated")
    with pytest.raises(ValueError, match="variants but no column item"):
        task_infos(without_items)  # before any probe is trained


@pytest.mark.slow
def test_a_variant_is_part_of_what_a_table_is(all_wordings):
    fingerprint = table_fingerprint(all_wordings)
    assert table_fingerprint(all_wordings.assign(variant_of="")) != fingerprint
    assert table_fingerprint(all_wordings.assign(item=all_wordings.item + 1)) != fingerprint
    mixed = all_wordings.copy()
    mixed.loc[mixed.index[mixed.task == "object"][0], "variant_of"] = "caption"
    with pytest.raises(ValueError, match="or in what they are a variant of"):
        task_infos(mixed)


def test_variants_are_found_by_name_and_unknown_ones_named():
    assert find_task("caption_similar_negated").variant_of == "caption_similar"
    assert list(find_tasks(["object", "object_b_a"])) == ["object", "object_b_a"]
    with pytest.raises(ValueError, match=r"object has the variants object_unlisted, .*object_b_a"):
        find_tasks(["object_inverted"])
    for name in ("count_negated", "negated", "statement", "captions"):
        assert find_task(name) is None
        with pytest.raises(ValueError, match=f"unknown tasks .'{name}'.*or a file of statements"):
            find_tasks([name])


def test_only_binary_questions_have_an_opposite():
    counted = replace(
        TASKS["count"], variants={"negated": Variant("Not {category}?", negated=True)}
    )
    with pytest.raises(ValueError, match="only the answer to a binary task has an opposite"):
        vary_task("count", counted, "negated")


def test_a_variant_has_the_answers_of_its_task_unless_it_names_others():
    counted = replace(TASKS["count"], variants={"reworded": Variant("How many {category}?")})
    assert vary_task("count", counted, "reworded").answer_words == TASKS["count"].answer_words
    assert find_task("object_reworded").answer_words == (("no",), ("yes",))
    assert find_task("object_one_zero").answer_words == (("0",), ("1",))
