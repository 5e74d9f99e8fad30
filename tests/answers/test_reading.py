"""Answers are read off states: what is said, through the lens, and from which layer on."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax, softmax

from probekit.answers.reading import AnswerLogits, read_answers, tune_states
from probekit.extraction.extracting import extract_tables
from probekit.extraction.settings import ExtractionSettings
from probekit.images import load_rgb
from probekit.models.load import load_vlm
from probekit.models.output_head import AnswerHead
from probekit.paths import Home
from probekit.tasks.base import task_infos
from tests.support.whole_models import whole_logits


@pytest.fixture(scope="module")
def captions(examples):
    """Captions of a few images, right and wrong ones."""
    return examples[examples.task == "caption"].head(24).reset_index(drop=True)


@pytest.mark.slow
def test_probabilities_are_those_of_the_whole_model(captions, data):
    """All spellings of an answer together, in proportion to the other answer's."""
    activations = extract_tables(
        ExtractionSettings("tiny-qwen2-vl"), {"none": captions}, device="cpu"
    )
    assert activations.poolings == ("mean", "last")
    answers, refusals = read_answers(activations, task_infos(captions))
    assert not refusals
    p_n = answers["caption"]["lens"].probabilities(binary=True)[-1, :, 0]
    vlm = load_vlm("tiny-qwen2-vl", device="cpu", with_head=True)
    tokenizer = vlm.processor.tokenizer
    first_of = {
        word: {
            tokenizer(text, add_special_tokens=False)["input_ids"][0]
            for text in (word, f" {word}", word.capitalize(), f" {word.capitalize()}")
        }
        for word in ("no", "yes")
    }
    upper = {word: tokenizer(word.upper())["input_ids"][0] for word in ("no", "yes")}
    for i in (0, 7, len(captions) - 1):
        row = captions.iloc[i]
        image = load_rgb(Home.find().resolve(row.file))
        prepared = vlm.prompt_processor.prepare(image, [row.prompt])
        p_v = torch.softmax(whole_logits(vlm, prepared)[0].double(), 0)
        no, yes = (
            float(p_v[sorted(first_of[word] | {upper[word]})].sum()) for word in ("no", "yes")
        )
        assert p_n[i] == pytest.approx(yes / (yes + no), abs=2e-3)


@pytest.mark.slow
def test_the_lens_is_final_norm_and_output_embedding_on_every_layer(captions, data):
    """Where the later blocks add nothing, all layers from there on say what the model says."""
    activations = extract_tables(
        ExtractionSettings("tiny-fast-vlm"), {"none": captions}, device="cpu"
    )
    answers, _ = read_answers(activations, task_infos(captions))
    logits = answers["caption"]["lens"]
    vlm = load_vlm("tiny-fast-vlm", device="cpu", with_head=True)
    hidden_nd = torch.from_numpy(activations["lm.05", "last"])
    with torch.inference_mode():
        logits_nv = vlm.head.module(vlm.stack.norm(hidden_nd)).numpy()
    head = activations.answer_head
    of_answers = [
        [head.token_ids[place] for place in places]
        for places in head.answer_tokens([("no",), ("yes",)])
    ]
    p_na = np.stack([softmax(logits_nv, -1)[:, ids].sum(-1) for ids in of_answers], -1)
    place = logits.layers.index("lm.05")
    np.testing.assert_allclose(
        log_softmax(logits.logits_lna[place], -1),
        np.log(p_na / p_na.sum(-1, keepdims=True)),
        atol=1e-4,
    )


@pytest.mark.slow
def test_blocks_that_add_nothing_leave_the_decision_where_it_was(captions, data):
    """A tiny model whose last block is silent has decided one layer earlier at the latest."""
    folder = data / "models" / "silent"
    vlm = load_vlm("tiny-qwen2-vl", device="cpu", with_head=True)
    for block in vlm.blocks[7:]:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    vlm.head.full_model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    activations = extract_tables(ExtractionSettings(str(folder)), {"none": captions}, device="cpu")
    answers, _ = read_answers(activations, task_infos(captions))
    logits = answers["caption"]["lens"]
    depth_n = logits.depth_of_decision()
    assert (depth_n <= 7).all()
    np.testing.assert_allclose(logits.logits_lna[7], logits.logits_lna[-1], atol=2e-2)
    assert (depth_n == 7).any()  # the block before it still changes answers


def test_the_tuned_lens_finds_an_affine_map():
    rng = np.random.default_rng(0)
    states_nd = rng.normal(size=(300, 8)).astype(np.float32)
    last_nd = (states_nd @ rng.normal(size=(8, 8)) + 5).astype(np.float32)
    split_n = np.repeat(["train", "validation", "test"], 100)
    tuned_nd = tune_states(states_nd, last_nd, split_n=split_n)
    np.testing.assert_allclose(tuned_nd[100:], last_nd[100:], atol=0.01)
    assert np.isnan(tuned_nd[:100]).all()
    noise_nd = rng.normal(size=(300, 200)).astype(np.float32)  # more dimensions than examples
    tuned_nd = tune_states(noise_nd, last_nd, split_n=split_n)
    error = ((tuned_nd - last_nd)[split_n == "test"] ** 2).mean()
    guess = ((last_nd[split_n == "train"].mean(0) - last_nd[split_n == "test"]) ** 2).mean()
    assert error < 1.7 * guess  # the penalty holds it near the mean


def test_the_depth_is_where_the_final_answer_begins_to_stay():
    first = [[0, 1], [0, 1], [1, 0], [0, 1]]  # on top, then not, then again
    second = [[1, 0], [0, 1], [0, 1], [0, 1]]
    always = [[0, 1]] * 4
    at_the_end = [[1, 0], [1, 0], [1, 0], [0, 1]]
    logits_lna = np.array([first, second, always, at_the_end], float).swapaxes(0, 1)
    logits = AnswerLogits([f"lm.{k:02d}" for k in range(4)], logits_lna)
    assert logits.depth_of_decision().tolist() == [3, 1, 0, 3]


@pytest.mark.slow
def test_what_has_no_answers_is_named_and_the_rest_is_read(captions, data):
    both = captions.assign(task="named")
    both["answers"] = [[["no"], ["xylophone"]]] * len(both)
    table = pd.concat([captions, both], ignore_index=True)
    activations = extract_tables(ExtractionSettings("tiny-qwen2-vl"), {"none": table}, device="cpu")
    answers, refusals = read_answers(activations, task_infos(table))
    assert set(answers) | set(refusals) == {"caption", "named"}
    assert len(answers["caption"]["lens"].logits_lna[0]) == len(captions)
    without = extract_tables(
        ExtractionSettings("tiny-qwen2-vl", answers=False), {"none": captions}, device="cpu"
    )
    answers, refusals = read_answers(without, task_infos(captions))
    assert not answers
    assert "run 02_extract with answers" in refusals["caption"]
    asked_for = extract_tables(
        ExtractionSettings("tiny-fast-vlm", answers=False, poolings=("mean", "last")),
        {"none": captions},
        device="cpu",
    )
    answers, refusals = read_answers(asked_for, task_infos(captions))
    assert not answers
    assert "run 02_extract with answers" in refusals["caption"]


@pytest.mark.slow
def test_a_model_that_gives_no_answers_says_why(captions, data):
    activations = extract_tables(
        ExtractionSettings("tiny-qwen2-vl"), {"none": captions}, device="cpu"
    )
    vars(activations)["answer_head"] = AnswerHead.refused("it only sings")
    answers, refusals = read_answers(activations, task_infos(captions))
    assert not answers
    assert refusals == {"caption": "it only sings"}
