"""Answers and lens, read with a few rows, are what the whole model says."""

from __future__ import annotations

import inspect
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from probekit.models import forward
from probekit.models.load import load_vlm
from probekit.models.output_head import (
    AnswerHead,
    FinalNorm,
    NoAnswers,
    Spelling,
    _describe_norm,
    spell,
    take_answer_head,
)
from tests.support.whole_models import whole_logits

PROMPTS = ["Is there a dog?", "Two cats sleep on a red chair.\nIs this right?", "Dog?"]
YES_OR_NO = [("no",), ("yes",)]
# With tied and untied embeddings; Gemma 3n and Muse Glimmer have a soft cap, Granite and Muse
# Glimmer a scale; Cohere, BLIP-2 and Kosmos-2 a layer norm; BLIP-2 and Kosmos-2 wrap the decoder,
# PaliGemma's processor adds labels, and Chameleon is kept from saying image tokens.
ARCHITECTURES = [
    "qwen2_vl",
    "fast_vlm",
    "llava",
    "gemma3",
    "gemma3n",
    "paligemma",
    "granite_docling",
    "cohere2_vision",
    "blip-2",
    "kosmos-2",
    "chameleon",
    "smolvlm",
    "mllama",
    "internvl",
    "muse_glimmer",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_the_whole_model(checkpoint, noise_images, name):
    vlm = load_vlm(str(checkpoint(name)), device="cpu", with_head=True)
    prepared = vlm.prompt_processor.prepare(noise_images[0], PROMPTS)
    head = take_answer_head(vlm, ["yes", "no"], prepared)
    assert not head.refusal
    states = forward.run_pooled(vlm, [prepared], poolings=["last"], way="plain")
    read_nv = head.token_logits(states[f"{vlm.layers[-1]}/last"].numpy(), is_normed=True)
    expected_nv = whole_logits(vlm, prepared)[:, list(head.token_ids)].numpy()
    scale = np.abs(expected_nv).max()
    assert np.abs(read_nv - expected_nv).max() < 1e-5 * max(scale, 1)
    assert len(set(np.round(read_nv[:, 0], 6))) == len(PROMPTS)  # each prompt has its own


@pytest.mark.parametrize("name, kind", [("llava", "rms"), ("gemma3", "rms"), ("blip-2", "layer")])
def test_the_lens_norms_as_the_model_does(checkpoint, noise_images, name, kind):
    vlm = load_vlm(str(checkpoint(name)), device="cpu", with_head=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in vlm.stack.parameters():  # weights of one would hide a 1 that is added
        if parameter.ndim == 1:
            parameter.data += torch.rand(parameter.shape, generator=generator)
    prepared = vlm.prompt_processor.prepare(noise_images[0], PROMPTS[:1])
    head = take_answer_head(vlm, ["yes"], prepared)
    assert head.norm is not None and head.norm.kind == kind
    leaving = {}
    with torch.inference_mode():
        handle = vlm.blocks[-1].register_forward_hook(
            lambda module, args, output: leaving.update(
                last=(output[0] if isinstance(output, tuple) else output)[:, -1]
            )
        )
        states = forward.run_pooled(vlm, [prepared], poolings=["last"])
        handle.remove()
    last_d = states[f"{vlm.layers[-1]}/last"].numpy()
    np.testing.assert_allclose(head.norm(leaving["last"].numpy()), last_d, rtol=1e-4, atol=1e-5)
    through_lens = head.token_logits(leaving["last"].numpy(), is_normed=False)
    np.testing.assert_allclose(
        through_lens, head.token_logits(last_d, is_normed=True), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_norms_are_told_apart_at_full_width_in_every_dtype(dtype):
    """In bfloat16 the mean of 2,560 entries is lost in rounding, and so is 1 beside 60."""
    torch_dtype = getattr(torch, dtype)
    model = SimpleNamespace(width=2560, dtype=dtype, device="cpu")
    layer_norm = nn.LayerNorm(2560).to(torch_dtype)
    assert _describe_norm(layer_norm, model).kind == "layer"

    class ShiftedNorm(nn.Module):
        """As in Gemma: 1 is added to the weights."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2560,), 60.0))
            self.eps = 1e-6

        def forward(self, hidden):
            return nn.functional.rms_norm(hidden, (2560,), 1 + self.weight, self.eps)

    norm = _describe_norm(ShiftedNorm().to(torch_dtype), model)
    assert norm.kind == "rms"
    np.testing.assert_array_equal(norm.weight_d, 61)


def test_a_norm_that_is_not_known_has_answers_and_no_lens(checkpoint, noise_images):
    vlm = load_vlm(str(checkpoint("llava")), device="cpu", with_head=True)

    class OddNorm(nn.Module):
        def forward(self, hidden):
            return torch.tanh(hidden)

    vlm.stack.norm = OddNorm()
    prepared = vlm.prompt_processor.prepare(noise_images[0], PROMPTS[:1])
    head = take_answer_head(vlm, ["yes"], prepared)
    assert not head.refusal
    assert head.norm is None
    with pytest.raises(NoAnswers, match="no lens"):
        head.token_logits(np.zeros((1, vlm.width)), is_normed=False)


def test_logits_that_are_computed_in_another_way_are_refused(checkpoint, noise_images, monkeypatch):
    vlm = load_vlm(str(checkpoint("llava")), device="cpu", with_head=True)
    original = type(vlm.head.full_model).forward

    def forward_and_square(self, *arguments, **options):
        output = original(self, *arguments, **options)
        output.logits = output.logits**2
        return output

    forward_and_square.__signature__ = inspect.signature(original)
    monkeypatch.setattr(type(vlm.head.full_model), "forward", forward_and_square)
    prepared = vlm.prompt_processor.prepare(noise_images[0], PROMPTS[:1])
    head = take_answer_head(vlm, ["yes"], prepared)
    assert "not those of its output embedding" in head.refusal


@pytest.mark.parametrize("name", ["florence2", "t5gemma2"])
def test_an_encoder_decoder_is_named(checkpoint, noise_images, name):
    vlm = load_vlm(str(checkpoint(name)), device="cpu", with_head=True)
    prepared = vlm.prompt_processor.prepare(noise_images[0], PROMPTS[:1])
    head = take_answer_head(vlm, ["yes"], prepared)
    assert f"not for the architecture {name}" in head.refusal


def test_a_checkpoint_without_its_head_has_no_answers(checkpoint, noise_images, tmp_path):
    """Transformers would draw one at random."""
    folder = shutil.copytree(checkpoint("llava"), tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "lm_head" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    vlm = load_vlm(str(folder), device="cpu", with_head=True)
    prepared = vlm.prompt_processor.prepare(noise_images[0], PROMPTS[:1])
    assert "no output embedding" in take_answer_head(vlm, ["yes"], prepared).refusal


def test_a_head_travels_through_its_tensors(checkpoint, noise_images):
    vlm = load_vlm(str(checkpoint("kosmos-2")), device="cpu", with_head=True)
    prepared = vlm.prompt_processor.prepare(noise_images[0], PROMPTS[:1])
    head = take_answer_head(vlm, ["yes", "no"], prepared)
    again = AnswerHead.from_tensors(*head.to_tensors())
    hidden_nd = np.random.default_rng(0).normal(size=(5, vlm.width)).astype(np.float32)
    for is_normed in (True, False):
        np.testing.assert_array_equal(
            head.token_logits(hidden_nd, is_normed=is_normed),
            again.token_logits(hidden_nd, is_normed=is_normed),
        )
    assert again.spellings == head.spellings
    assert again.answer_tokens(YES_OR_NO) == head.answer_tokens(YES_OR_NO)


# --------------------------------------------------------------------------------- words and tokens


class TokenizerOfPieces:
    """Cuts text into known pieces from the left, longest first, else into `unk_token_id`."""

    unk_token_id = 0

    def __init__(self, *pieces: str) -> None:
        self.pieces = ["?", *pieces]

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        token_ids = []
        while text:
            fitting = [piece for piece in self.pieces[1:] if text.startswith(piece)]
            piece = max(fitting, key=len, default=None)
            token_ids.append(0 if piece is None else self.pieces.index(piece))
            text = text[1 if piece is None else len(piece) :]
        return {"input_ids": token_ids}

    def head(self, *words: str) -> AnswerHead:
        spellings = spell(words, self)
        token_ids = tuple(sorted({token for one in spellings for token in one.token_ids}))
        return AnswerHead(
            spellings=tuple(spellings),
            blank_ids=tuple(token for token in token_ids if not self.pieces[token].strip()),
            token_ids=token_ids,
            rows_vd=np.eye(len(token_ids), dtype=np.float32),
        )

    def texts(self, head: AnswerHead, answers) -> list[set[str]]:
        places = head.answer_tokens(answers)
        return [{self.pieces[head.token_ids[place]] for place in one} for one in places]


def test_spellings_that_the_tokenizer_knows_count_together():
    tokenizer = TokenizerOfPieces("yes", " yes", "Yes", "no", " no", "No", "N", "O")
    head = tokenizer.head("yes", "no")
    assert tokenizer.texts(head, YES_OR_NO) == [{"no", " no", "No", "N"}, {"yes", " yes", "Yes"}]


def test_answers_are_told_apart_after_the_space_that_all_begin_with():
    tokenizer = TokenizerOfPieces(" ", "1", "2", "3")
    head = tokenizer.head("1", "2", "3")
    assert tokenizer.texts(head, [("1",), ("2",), ("3",)]) == [{"1"}, {"2"}, {"3"}]


def test_a_token_that_two_answers_begin_with_tells_nothing():
    tokenizer = TokenizerOfPieces("t", "wo", "hree", "2", "3")
    head = tokenizer.head("two", "2", "three", "3")
    assert tokenizer.texts(head, [("two", "2"), ("three", "3")]) == [{"2"}, {"3"}]
    with pytest.raises(NoAnswers, match="'two' apart: it begins like another one"):
        head.answer_tokens([("two",), ("three",)])


def test_words_that_are_not_in_the_vocabulary_are_named():
    tokenizer = TokenizerOfPieces("yes", "no")
    assert spell(["purple"], tokenizer) == []
    head = tokenizer.head("yes", "no", "purple")
    with pytest.raises(NoAnswers, match="'purple' apart: it is not in its vocabulary"):
        head.answer_tokens([("yes",), ("purple",)])


def test_norms_are_their_formulas():
    hidden_nd = np.random.default_rng(0).normal(3, 2, size=(4, 6)).astype(np.float32)
    weight_d = np.arange(6, dtype=np.float32)
    bias_d = np.ones(6, np.float32)
    tensor = torch.from_numpy(hidden_nd)
    expected = nn.functional.layer_norm(
        tensor, (6,), torch.from_numpy(weight_d), torch.from_numpy(bias_d), 1e-5
    )
    norm = FinalNorm("layer", weight_d=weight_d, bias_d=bias_d, epsilon=1e-5)
    np.testing.assert_allclose(norm(hidden_nd), expected, rtol=1e-5)
    expected = nn.functional.rms_norm(tensor, (6,), torch.from_numpy(weight_d), 1e-5)
    np.testing.assert_allclose(
        FinalNorm("rms", weight_d=weight_d, epsilon=1e-5)(hidden_nd), expected, rtol=1e-5
    )


def test_logits_have_bias_scale_and_soft_cap():
    head = AnswerHead(
        token_ids=(3, 4),
        spellings=(Spelling("a", 0, (3,)), Spelling("b", 0, (4,))),
        rows_vd=np.array([[1.0, 0.0], [0.0, 2.0]], np.float32),
        bias_v=np.array([0.5, 0.0], np.float32),
        scale=4.0,
        soft_cap=5.0,
    )
    logits_nv = head.token_logits(np.array([[1.0, 1.0]]), is_normed=True)
    np.testing.assert_allclose(logits_nv, 5 * np.tanh(np.array([[6.0, 8.0]]) / 5), rtol=1e-6)
