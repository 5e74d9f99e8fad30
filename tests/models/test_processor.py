"""Prompts and images go through the checkpoint's own processor, and arrive as it makes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from probekit import paths
from probekit.data import coco
from probekit.images import load_rgb
from probekit.models.load import load_skeleton, load_vlm
from probekit.models.processor import PromptProcessor


@pytest.fixture(scope="module")
def image(scene_folder):
    return load_rgb(coco.read_coco(scene_folder).images.file.iloc[0])


@pytest.mark.slow
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


# ------------------------------------------------------------------------------------- templates

PARTS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}<|im_end|>"
)
TEXT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
)
PARTS_WITHOUT_IMAGE = (
    "{% for m in messages %}<|im_start|>{% for part in m['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}{% endfor %}<|im_end|>"
)


@pytest.fixture
def bare_checkpoint(checkpoint, tmp_path):
    """A LLaVA checkpoint without a chat template, which a test may change."""
    folder = shutil.copytree(checkpoint("llava"), tmp_path / "llava")
    (folder / "chat_template.jinja").unlink()
    return folder


def prompts_of(folder: Path) -> PromptProcessor:
    return load_skeleton(str(folder), with_processor=True).vlm.prompt_processor


def save_as_jinja(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def save_as_json(folder: Path, template: str) -> None:
    paths.write_json(folder / "chat_template.json", {"chat_template": template})


def save_in_tokenizer(folder: Path, template: object) -> None:
    file = folder / "tokenizer_config.json"
    paths.write_json(file, paths.read_json(file) | {"chat_template": template})


def save_with_others_in_tokenizer(folder: Path, template: str) -> None:
    others = [{"name": "rag", "template": "other"}, {"name": "default", "template": template}]
    save_in_tokenizer(folder, others)


def save_with_others_beside(folder: Path, template: str) -> None:
    save_as_jinja(folder, template)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("other", encoding="utf-8")


@pytest.mark.parametrize("template", [PARTS_TEMPLATE, TEXT_TEMPLATE, PARTS_WITHOUT_IMAGE])
@pytest.mark.parametrize(
    "save",
    [
        save_as_jinja,
        save_as_json,
        save_in_tokenizer,
        save_with_others_in_tokenizer,
        save_with_others_beside,
    ],
)
def test_a_chat_template_is_used_wherever_it_is(bare_checkpoint, save, template, image):
    save(bare_checkpoint, template)
    prompts = prompts_of(bare_checkpoint)
    assert prompts.wrap("A dog.") == "<|im_start|><image>A dog.<|im_end|>"
    assert prompts.wrap("A dog.", with_image=False) == "<|im_start|>A dog.<|im_end|>"
    assert prompts.prepare(image, ["A dog."]).image_masks[0].sum() == 16


@pytest.mark.parametrize("save", [save_as_jinja, save_as_json, save_in_tokenizer])
@pytest.mark.parametrize(
    "name, expected",
    [
        ("phi4_multimodal", "<|im_start|><image>A dog.<|im_end|>"),  # its processor takes none
        ("llama4", "<|im_start|><|image|>A dog.<|im_end|>"),  # its processor has one of its own
        ("blip-2", "<|im_start|>A dog.<|im_end|>"),  # its processor places the image
    ],
)
def test_no_processor_loses_the_template(checkpoint, tmp_path, save, name, expected):
    folder = shutil.copytree(checkpoint(name), tmp_path / "copy")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    save(folder, TEXT_TEMPLATE)
    assert prompts_of(folder).wrap("A dog.") == expected


def test_a_template_without_the_prompt_or_the_image_is_refused(bare_checkpoint):
    for template in ("{{ bos_token }}", "{% for m in messages %}<image>{% endfor %}"):
        save_as_jinja(bare_checkpoint, template)
        with pytest.raises(ValueError, match="does not show one image and the prompt"):
            prompts_of(bare_checkpoint).wrap("A dog.")


def test_what_a_model_without_a_template_is_given_is_said(bare_checkpoint, checkpoint, capsys):
    load_vlm(str(bare_checkpoint), device="cpu")
    message = capsys.readouterr().out
    assert "llava has no chat template: it is given '<image>{prompt}'" in message
    save_as_jinja(bare_checkpoint, TEXT_TEMPLATE)
    load_vlm(str(bare_checkpoint), device="cpu")
    assert "'<|im_start|><image>{prompt}<|im_end|>'" in capsys.readouterr().out
    for known in ("blip-2", "kosmos-2", "llava"):
        load_vlm(str(checkpoint(known)), device="cpu")
        assert "template" not in capsys.readouterr().out


@pytest.mark.parametrize("template", [PARTS_TEMPLATE, TEXT_TEMPLATE])
def test_a_template_that_writes_the_date_writes_the_same_every_day(bare_checkpoint, template):
    save_as_jinja(bare_checkpoint, "{{ strftime_now('%d %b %Y') }} " + template)
    wrapped = prompts_of(bare_checkpoint).wrap("A dog.")
    assert wrapped == "26 Jul 2024 <|im_start|><image>A dog.<|im_end|>"


def test_a_date_whose_form_the_template_works_out_is_refused(bare_checkpoint):
    save_as_jinja(bare_checkpoint, "{{ strftime_now(form) }} " + PARTS_TEMPLATE)
    with pytest.raises(ValueError, match="writes today's date"):
        prompts_of(bare_checkpoint).wrap("A dog.")


@pytest.mark.parametrize("name", ["gemma3", "t5gemma2", "llama4"])
def test_the_word_for_an_image_is_the_one_that_the_processor_replaces(
    name, checkpoint, tmp_path, image
):
    expected = prompts_of(checkpoint(name)).prepare(image, ["A dog."]).image_masks[0].sum()
    folder = shutil.copytree(checkpoint(name), tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    assert prompts_of(folder).prepare(image, ["A dog."]).image_masks[0].sum() == expected > 1
