"""Prompts and images go through the checkpoint's own processor, and arrive as it makes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from probekit.data import coco
from probekit.images import load_rgb
from probekit.models.load import load_vlm


@pytest.fixture(scope="module")
def image(scene_folder):
    return load_rgb(coco.read_coco(scene_folder).images.file.iloc[0])


def test_the_prompt_comes_after_the_image_in_the_chat_template(vlm):
    before, _, after = vlm.prompt_processor.wrap("Is this right?").partition("Is this right?")
    assert "assistant" in after
    assert "<image>" in before or "<|image_pad|>" in before


def test_many_prompts_at_once_are_what_the_processor_makes_of_each(vlm, image):
    prompts = [
        "short",
        "a much longer prompt, with a lot more words than the short one",
        "A dog.",
    ]
    original_image_processor = vlm.processor.image_processor
    prepared = vlm.prompt_processor.prepare(image, prompts)
    assert vlm.processor.image_processor is original_image_processor
    for prompt, row, image_mask in zip(prompts, prepared.tokens, prepared.image_masks, strict=True):
        text = vlm.prompt_processor.wrap(prompt)
        expected = vlm.processor(images=[image], text=[text], return_tensors="np")
        assert set(expected) == {*row, *prepared.image_inputs}
        for name, value in row.items():
            assert np.array_equal(value, expected[name][0]), name
        for name, value in prepared.image_inputs.items():
            assert torch.equal(value, torch.from_numpy(expected[name])), name
        assert image_mask.sum() == prepared.image_masks[0].sum() > 8
    last_image_token = np.flatnonzero(prepared.image_masks[0])[-1]
    assert prepared.prefix_length == last_image_token + 1


def test_a_prompt_that_is_too_long_is_named_not_cut(vlm, image):
    with pytest.raises(ValueError, match=r"tokens are more than .* 'word word"):
        vlm.prompt_processor.prepare(image, ["fine", "word " * 4000])


def test_a_template_that_writes_the_first_token_gets_no_second_one(image):
    vlm = load_vlm("tiny-fast-vlm", device="cpu")
    processor = vlm.processor
    first_token = "<|im_start|>"
    processor.tokenizer.bos_token = first_token
    first_id = processor.tokenizer.bos_token_id
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{first_token} $A", special_tokens=[(first_token, first_id)]
    )
    content = [{"type": "image", "image": image}, {"type": "text", "text": "A dog."}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    prepared = vlm.prompt_processor.prepare(image, ["A dog."])
    ids = prepared.tokens[0]["input_ids"]
    assert np.array_equal(ids, expected["input_ids"][0])
    assert (ids[:2] == first_id).sum() == 1
