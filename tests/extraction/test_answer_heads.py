"""What answers are read with lies beside the shards, is made once, and vouches for itself."""

from __future__ import annotations

import pandas as pd
import pytest

from probekit.extraction.answer_heads import answer_head_file, collect_words, load_answer_head
from probekit.extraction.shards import Content, ShardSet
from probekit.extraction.verify import remove_damaged, verify_activations
from probekit.tasks.base import task_infos

WORDS = ("no", "yes")


pytestmark = pytest.mark.slow


@pytest.fixture
def few(examples):
    return examples.head(12).reset_index(drop=True)


def test_it_is_made_with_the_shards_and_then_read_back(extract, few, computed, no_loading):
    activations = extract(few, answers=True)
    assert collect_words([few]) == WORDS
    assert activations.poolings == ("mean", "last")
    assert activations.answer_pooling == "last"
    head = activations.answer_head
    assert {spelling.word for spelling in head.spellings} == set(WORDS)
    assert not head.refusal
    no_loading()
    again = extract(few, answers=True)
    assert again.answer_head.token_ids == head.token_ids
    asked_for = extract(few, answers=True, poolings=("mean", "last"))
    assert asked_for.answer_pooling == ""


def test_other_words_compute_no_shard_again(extract, few, computed):
    extract(few, answers=True)
    computed.clear()
    colours = few.assign(answers=[[["red"], ["green"]]] * len(few))
    activations = extract(colours, answers=True)
    assert not computed
    assert {spelling.word for spelling in activations.answer_head.spellings} == {"green", "red"}


def test_the_pooling_is_added_to_the_decoder_alone(extract, few):
    activations = extract(few, answers=True, stages=("lm", "vision"))
    assert activations.layers_with("last") == [f"lm.{k:02d}" for k in range(9)]
    assert "vision.01" in activations.layers_with("mean")
    (shard_set,) = ShardSet.list_all(activations.folder)
    assert Content("vision", "last") not in shard_set.contents


def test_tables_and_stages_without_answers_have_none(extract, few):
    plain = extract(few.drop(columns="answers"), answers=True)
    assert plain.poolings == ("mean",)
    images = extract(few, answers=True, stages=("vision",))
    assert images.poolings == ("mean",)


def test_a_damaged_file_is_named_and_made_again(extract, few):
    activations = extract(few, answers=True)
    folder = activations.folder
    file = folder.path / answer_head_file(WORDS)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="not what was written: delete it"):
        load_answer_head(folder, WORDS)
    table = verify_activations(folder.url)
    (damaged,) = table[table.state == "damaged"].itertuples()
    assert damaged.file == file.name
    remove_damaged(table)
    assert extract(few, answers=True).answer_head.token_ids
    table = verify_activations(folder.url)
    assert (table.state == "sound").all()


def test_a_model_that_cannot_run_whole_is_read_without_answers(extract, few, monkeypatch, capsys):
    from probekit.extraction import runner

    def fail(*arguments):
        raise KeyError("no such expert")

    monkeypatch.setattr(runner, "take_answer_head", fail)
    activations = extract(few, answers=True)
    assert "the whole model does not run (KeyError" in capsys.readouterr().out
    assert len(activations["lm.03", "mean"]) == len(few)
    with pytest.raises(FileNotFoundError, match="run 02_extract"):
        activations.answer_head  # noqa: B018  # reading it is what is tested
    monkeypatch.undo()
    assert not extract(few, answers=True).answer_head.refusal


def test_tables_can_be_joined_with_those_that_have_no_answers(extract, few):
    mine = few[few.task == "caption"].drop(columns="answers").assign(task="mine")
    joined = pd.concat([few, mine], ignore_index=True)
    assert collect_words([joined]) == WORDS
    assert task_infos(joined)["mine"].answers == ()
    assert extract(joined, answers=True).poolings == ("mean", "last")
