import numpy as np
import pytest
import torch

from probekit import coco


@pytest.fixture
def image(scene_folder):
    return coco.load_rgb(coco.read(scene_folder).images.file.iloc[0])


def test_the_prompt_comes_after_the_image_in_the_chat_template(vlm):
    text = vlm.preparer.wrap("Is this right?")
    assert "Is this right?" in text and "assistant" in text.partition("Is this right?")[2]
    assert any(mark in text.partition("Is this right?")[0] for mark in ("<image>", "<|image_pad|>"))


def test_many_prompts_at_once_are_what_the_processor_makes_of_each(vlm, image):
    prompts = ["short", "a much longer prompt, with a lot more words than the short one", "A dog."]
    made = vlm.preparer.prepare(image, prompts)
    for prompt, row, shown in zip(prompts, made.tokens, made.shown, strict=True):
        honest = vlm.processor(images=[image], text=[vlm.preparer.wrap(prompt)], return_tensors="np")
        assert set(honest) == {*row, *made.image}
        for key, value in row.items():
            assert np.array_equal(value, honest[key][0]), key
        for key, value in made.image.items():
            assert torch.equal(value, torch.from_numpy(honest[key])), key
        assert shown.sum() > 8 and shown.sum() == made.shown[0].sum()
    assert made.head == np.flatnonzero(made.shown[0])[-1] + 1
    assert type(vlm.processor.image_processor).__name__ != "_Once"  # put back


def test_a_prompt_that_is_too_long_is_named_not_cut(vlm, image):
    with pytest.raises(ValueError, match=r"tokens are more than .* 'word word"):
        vlm.preparer.prepare(image, ["fine", "word " * 4000])
