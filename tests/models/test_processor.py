import numpy as np
import pytest
import torch

from probekit.data import coco
from probekit.images import load_rgb


@pytest.fixture
def image(scene_folder):
    return load_rgb(coco.read_coco(scene_folder).images.file.iloc[0])


def test_the_prompt_comes_after_the_image_in_the_chat_template(vlm):
    text = vlm.prompt_processor.wrap("Is this right?")
    assert "Is this right?" in text and "assistant" in text.partition("Is this right?")[2]
    assert any(mark in text.partition("Is this right?")[0] for mark in ("<image>", "<|image_pad|>"))


def test_many_prompts_at_once_are_what_the_processor_makes_of_each(vlm, image):
    prompts = ["short", "a much longer prompt, with a lot more words than the short one", "A dog."]
    made = vlm.prompt_processor.prepare(image, prompts)
    for prompt, row, shown in zip(prompts, made.tokens, made.image_masks, strict=True):
        honest = vlm.processor(images=[image], text=[vlm.prompt_processor.wrap(prompt)], return_tensors="np")
        assert set(honest) == {*row, *made.image_inputs}
        for key, value in row.items():
            assert np.array_equal(value, honest[key][0]), key
        for key, value in made.image_inputs.items():
            assert torch.equal(value, torch.from_numpy(honest[key])), key
        assert shown.sum() > 8 and shown.sum() == made.image_masks[0].sum()
    assert made.prefix_length == np.flatnonzero(made.image_masks[0])[-1] + 1
    assert type(vlm.processor.image_processor).__name__ != "_Once"  # put back


def test_a_prompt_that_is_too_long_is_named_not_cut(vlm, image):
    with pytest.raises(ValueError, match=r"tokens are more than .* 'word word"):
        vlm.prompt_processor.prepare(image, ["fine", "word " * 4000])


def test_a_template_that_writes_the_first_token_gets_no_second_one(image):
    from tokenizers.processors import TemplateProcessing

    from probekit.models.load import load_vlm

    vlm = load_vlm("tiny-fast-vlm", device="cpu")
    processor, start = vlm.processor, "<|im_start|>"
    processor.tokenizer.bos_token = start
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, processor.tokenizer.bos_token_id)])
    content = [{"type": "image", "image": image}, {"type": "text", "text": "A dog."}]
    honest = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="np")
    ours = vlm.prompt_processor.prepare(image, ["A dog."]).tokens[0]["input_ids"]
    assert np.array_equal(ours, honest["input_ids"][0]) and (ours[:2] == processor.tokenizer.bos_token_id).sum() == 1
