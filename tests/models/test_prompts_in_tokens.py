"""Each prompt makes one row of tokens, and is in it."""

from __future__ import annotations

import warnings

import pytest

from probekit.models.load import load_vlm


def test_one_row_for_each_prompt(vlm, noise_images, monkeypatch):
    processor = vlm.prompt_processor
    original = type(vlm.processor).__call__

    def ask_about_policies(self, images=None, text=None, **options):
        return original(self, images=images * 3, text=[*text] * 3, **options)

    monkeypatch.setattr(type(vlm.processor), "__call__", ask_about_policies)
    with pytest.raises(ValueError, match="makes 6 rows of 2 prompts"):
        processor.prepare(noise_images[0], ["A dog.", "A cat."])


def test_a_processor_that_makes_no_tokens_is_refused(vlm, noise_images, monkeypatch):
    original = type(vlm.processor).__call__

    def make_patches_alone(self, *arguments, **options):
        output = original(self, *arguments, **options)
        del output["input_ids"]
        return output

    monkeypatch.setattr(type(vlm.processor), "__call__", make_patches_alone)
    with pytest.raises(ValueError, match="makes no tokens of a prompt"):
        vlm.prompt_processor.prepare(noise_images[0], ["A dog."])


def test_image_inputs_that_are_no_tensors_are_refused(vlm, noise_images, monkeypatch):
    original = type(vlm.processor.image_processor).__call__

    def list_parts(self, *arguments, **options):
        output = original(self, *arguments, **options)
        output["pixel_values"] = [output["pixel_values"]]
        return output

    monkeypatch.setattr(type(vlm.processor.image_processor), "__call__", list_parts)
    with pytest.raises(ValueError, match="returns pixel_values as a list, not as a tensor"):
        vlm.prompt_processor.prepare(noise_images[0], ["A dog."])


@pytest.mark.parametrize("prompts", [["A dog."], ["A dog.", "A cat."]])
def test_a_prompt_that_gets_lost_is_named(vlm, noise_images, monkeypatch, prompts):
    processor = vlm.prompt_processor
    texts = {prompt: processor.wrap(prompt) for prompt in ("Something else", *prompts)}
    monkeypatch.setattr(
        type(processor), "wrap", lambda self, prompt, with_image=True: texts["Something else"]
    )
    with pytest.raises(ValueError, match=r"leaves out the prompt 'A dog\.'"):
        processor.prepare(noise_images[0], prompts)
    with pytest.raises(ValueError, match=r"leaves out the prompt 'A dog\.'"):
        processor.prepare(None, prompts)


@pytest.mark.parametrize(
    "prompt", ["A", " two  spaces ", "Ünï — “quotes” 狗", "a\nline", "<image>"]
)
def test_prompts_of_any_text_are_found_again(vlm, noise_images, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the special token
        (row,) = vlm.prompt_processor.prepare(noise_images[0], [prompt]).tokens
    assert len(row["input_ids"])


def test_a_first_token_that_only_the_processor_writes_is_kept_without_an_image(checkpoint):
    vlm = load_vlm(str(checkpoint("molmo2")), device="cpu")
    (row,) = vlm.prompt_processor.prepare(None, ["A dog."]).tokens
    text = vlm.prompt_processor.wrap("A dog.", with_image=False)
    expected = vlm.processor(text=text, return_tensors="np")["input_ids"][0]
    assert row["input_ids"].tolist() == expected.tolist()
    assert row["input_ids"][0] == vlm.processor.tokenizer.bos_token_id
