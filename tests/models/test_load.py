"""Models are loaded frozen, from safetensors, and leave nothing behind."""

from __future__ import annotations

import gc
import os
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from probekit import paths
from probekit.models import load
from probekit.models.forward import run_pooled
from probekit.models.load import load_vlm, read_dtype
from tests.conftest import DEMO_MODELS, REPOSITORY
from tests.support.architectures import RECIPES

Weights = dict[str, torch.Tensor]


@pytest.fixture
def copied_checkpoint(tmp_path):
    """A demo model that a test may change."""
    source = REPOSITORY / "data" / "models" / "tiny-qwen2-vl"
    return shutil.copytree(source, tmp_path / "copied")


def edit_weights(folder: Path, edit: Callable[[Weights], Weights]) -> None:
    edited = edit(load_file(folder / "model.safetensors"))
    contiguous = {name: weight.contiguous() for name, weight in edited.items()}
    (folder / "model.safetensors").unlink()  # it may be a link
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def without(weights: Weights, *parts: str) -> Weights:
    """The weights whose names contain none of these."""
    return {
        name: weight for name, weight in weights.items() if not any(part in name for part in parts)
    }


@pytest.mark.slow
def test_the_model_is_frozen_and_its_layers_are_named(vlm):
    assert not vlm.model.training
    assert not any(parameter.requires_grad for parameter in vlm.model.parameters())
    assert not hasattr(vlm.model, "lm_head")
    assert vlm.layers[0] == "lm.00"
    assert len(vlm.layers) == len(vlm.blocks) + 1


def test_the_tokenizer_can_read_any_caption(vlm):
    tokenizer = vlm.processor.tokenizer
    text = "Ein Mädchen eats naïve jalapeños — 寿司 🍣 at 7:45pm"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO_MODELS)
def test_untrained_weights_follow_the_seed(name):
    def first_weights(**options):
        return next(load_vlm(name, device="cpu", **options).blocks.parameters())

    weights = first_weights(untrained=True, seed=0)
    assert torch.equal(weights, first_weights(untrained=True, seed=0))
    assert not torch.equal(weights, first_weights(untrained=True, seed=1))
    assert not torch.equal(weights, first_weights())


def test_loading_does_not_touch_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_vlm("tiny-qwen2-vl", device="cpu", untrained=True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_released_memory_is_given_back():
    vlm = load_vlm("tiny-qwen2-vl", device="cpu")
    weights = [weakref.ref(parameter) for parameter in vlm.model.parameters()]
    vlm.release()
    gc.collect()
    assert not any(reference() is not None for reference in weights)


# ------------------------------------------------------------------------------- whole checkpoints


def halve_first_axis(weights: Weights) -> Weights:
    return {
        name: weight[: len(weight) // 2] if name.endswith("layers.1.mlp.up_proj.weight") else weight
        for name, weight in weights.items()
    }


def add_lora(weights: Weights) -> Weights:
    return weights | {"model.language_model.layers.1.mlp.up_proj.lora_A.weight": torch.ones(4, 4)}


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda weights: without(weights, "layers.1.mlp"), r"3 of its .* missing.*layers\.1\.mlp"),
        (lambda weights: without(weights, "visual"), r"are missing.*visual"),
        (
            lambda weights: {f"base_model.{name}": weight for name, weight in weights.items()},
            r"are missing.*have no place in it.*base_model\.",
        ),
        (halve_first_axis, r"1 have another shape.*layers\.1\.mlp\.up_proj.*instead of"),
        (add_lora, r"1 have no place in it.*up_proj\.lora_A.*merge"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(copied_checkpoint, edit, message):
    edit_weights(copied_checkpoint, edit)
    with pytest.raises(ValueError, match=message):
        load_vlm(str(copied_checkpoint), device="cpu")


def test_the_head_is_not_needed(checkpoint, tmp_path):
    """Whether it is missing, or has another shape: it is not read."""
    folder = shutil.copytree(checkpoint("llava"), tmp_path / "copy")
    assert "language_model.lm_head.weight" in load_file(folder / "model.safetensors")
    edit_weights(folder, lambda weights: without(weights, "lm_head"))
    headless = load_vlm(str(folder), device="cpu")
    whole = load_vlm(str(checkpoint("llava")), device="cpu")
    for one, other in zip(headless.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_sharded_checkpoint_needs_all_its_shards(copied_checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(copied_checkpoint)
    (copied_checkpoint / "model.safetensors").unlink()
    model.save_pretrained(copied_checkpoint, max_shard_size="300KB")
    load_vlm(str(copied_checkpoint), device="cpu")
    shards = sorted(copied_checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 2
    weights = load_file(shards[1])
    lost = sorted(weights)[0]
    save_file(without(weights, lost), shards[1], metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 of its .* missing.*{re.escape(lost)}"):
        load_vlm(str(copied_checkpoint), device="cpu")
    shards[1].unlink()
    with pytest.raises(OSError, match=re.escape(shards[1].name)):
        load_vlm(str(copied_checkpoint), device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_each_architecture_misses_a_weight_of_a_middle_layer(name, checkpoint, tmp_path):
    folder = checkpoint(name)
    load_vlm(str(folder), device="cpu")
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=os.link)
    of_middle_layer = [key for key in load_file(copy / "model.safetensors") if ".1." in key]
    taken = of_middle_layer[len(of_middle_layer) // 2]
    edit_weights(copy, lambda weights: {key: weights[key] for key in weights if key != taken})
    with pytest.raises(ValueError, match=r"missing|parts of them are missing"):
        load_vlm(str(copy), device="cpu")


@pytest.mark.parametrize("has_weights", [True, False], ids=["beside weights", "alone"])
def test_an_adapter_is_not_passed_over(copied_checkpoint, has_weights):
    description = {"base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "peft_type": "LORA"}
    paths.write_json(copied_checkpoint / "adapter_config.json", description)
    if not has_weights:
        (copied_checkpoint / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"(?s)adapter.*Qwen/Qwen2-VL-2B.*merge_and_unload\(\)"
    ) as caught:
        load_vlm(str(copied_checkpoint), device="cpu")
    assert str(copied_checkpoint) in str(caught.value)


def test_the_image_adapter_of_a_checkpoint_is_not_passed_over(
    checkpoint, tmp_path, capsys, monkeypatch
):
    """Phi-4 multimodal reads images with an adapter in a folder of its own."""
    folder = shutil.copytree(checkpoint("phi4_multimodal"), tmp_path / "phi4")
    load_vlm(str(folder), device="cpu")
    assert "no vision-lora" in capsys.readouterr().out
    paths.write_json(folder / "vision-lora" / "adapter_config.json", {"peft_type": "LORA"})
    monkeypatch.setattr(load, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"vision-lora, which needs peft: pip install peft"):
        load_vlm(str(folder), device="cpu")


def test_the_image_adapter_of_a_checkpoint_is_used(checkpoint, tmp_path, noise_images):
    peft = pytest.importorskip("peft")
    folder = shutil.copytree(checkpoint("phi4_multimodal"), tmp_path / "phi4")
    merged_folder = shutil.copytree(folder, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder)
    lora = peft.LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"])
    adapted = peft.get_peft_model(model, lora)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder / "vision-lora")
    adapted.merge_and_unload().save_pretrained(merged_folder)
    states = []
    for one in (folder, merged_folder):
        vlm = load_vlm(str(one), device="cpu")
        prepared = [vlm.prompt_processor.prepare(noise_images[0], ["A dog."])]
        states.append(run_pooled(vlm, prepared, poolings=("mean",))["lm.03/mean"])
    assert torch.allclose(*states, atol=1e-5)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4000000000\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_is_not_the_file_is_named(copied_checkpoint, name):
    file = copied_checkpoint / name
    half = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(half)
    with pytest.raises(OSError, match=rf"{name}.*cut off or damaged: copy"):
        load_vlm(str(copied_checkpoint), device="cpu")
    file.write_text(POINTER, encoding="utf-8")
    with pytest.raises(OSError, match=rf"{name} is a Git-LFS pointer.*git lfs pull"):
        load_vlm(str(copied_checkpoint), device="cpu")


# ----------------------------------------------------------------------------------- other models


def test_a_model_that_reads_no_images_is_refused(copied_checkpoint, tmp_path):
    sizes = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    text_model = Qwen2ForCausalLM(Qwen2Config(**sizes, **counts))
    text_model.save_pretrained(tmp_path / "text")
    AutoTokenizer.from_pretrained(copied_checkpoint).save_pretrained(tmp_path / "text")
    CLIPConfig().save_pretrained(tmp_path / "clip")
    for folder in ("text", "clip"):
        with pytest.raises(ValueError, match="is not a vision-language model"):
            load_vlm(str(tmp_path / folder), device="cpu")


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("*processor_config.json", "processor cannot be loaded|no image processor"),
        ("*token*", "processor cannot be loaded|no tokenizer"),
    ],
)
def test_what_a_processor_lacks_is_named(copied_checkpoint, pattern, message):
    for file in copied_checkpoint.glob(pattern):
        file.unlink()
    with pytest.raises(
        (OSError, ValueError), match=f"({message}).*save the processor of the model"
    ):
        load_vlm(str(copied_checkpoint), device="cpu")


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_next_video", "perception_lm"])
def test_a_processor_without_the_size_of_patches_is_refused(checkpoint, tmp_path, name):
    folder = shutil.copytree(checkpoint(name), tmp_path / name)
    described = paths.read_json(folder / "processor_config.json")
    del described["patch_size"]
    paths.write_json(folder / "processor_config.json", described)
    with pytest.raises(ValueError, match=r"patch_size is missing in processor_config\.json"):
        load_vlm(str(folder), device="cpu")


@pytest.mark.parametrize(
    "spelling, name",
    [
        ("bf16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        (torch.float16, "float16"),
        ("float", "float32"),
        ("FP32", "float32"),
        (None, None),
    ],
)
def test_types_are_read_as_they_are_spelled_elsewhere(spelling, name):
    assert read_dtype(spelling) == name


def test_other_types_are_refused_with_those_that_there_are():
    for dtype in ("float64", "int8", torch.float64, "auto"):
        with pytest.raises(ValueError, match="take out of float32, bfloat16, float16"):
            read_dtype(dtype)
    assert load_vlm("tiny-qwen2-vl", device="cpu", dtype="bf16").dtype == "bfloat16"


def test_a_device_that_is_none_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="device='gpu': take cpu, cuda"):
        load_vlm("tiny-qwen2-vl", device="gpu")


def test_pickled_weights_are_refused(copied_checkpoint):
    safe_file = copied_checkpoint / "model.safetensors"
    torch.save(load_file(safe_file), copied_checkpoint / "pytorch_model.bin")
    safe_file.unlink()
    message = r"no weights in safetensors, .* take a revision that has them"
    with pytest.raises(OSError, match=message):
        load_vlm(str(copied_checkpoint), device="cpu")
    load_vlm(str(copied_checkpoint), device="cpu", untrained=True)


def test_code_of_a_checkpoint_is_not_run_unasked(copied_checkpoint):
    config_file = copied_checkpoint / "config.json"
    changes = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    paths.write_json(config_file, paths.read_json(config_file) | changes)
    proof = copied_checkpoint / "ran"
    code = f"open({str(proof)!r}, 'w').close()\nraise ImportError('as far as this')\n"
    (copied_checkpoint / "own.py").write_text(code, encoding="utf-8")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_vlm(str(copied_checkpoint), device="cpu")
    assert not proof.exists()
    with pytest.raises(ImportError, match="as far as this"):
        load_vlm(str(copied_checkpoint), device="cpu", trust_remote_code=True)
    assert proof.exists()


def test_nothing_is_pickled():
    # joblib starts processes, and could read and write files.
    unsafe = re.compile(
        r"pickle|joblib\.|joblib import (?!Parallel, delayed, parallel_config$)"
        r"|import joblib|torch\.load|torch\.save|shelve|marshal"
    )
    lines = []
    for file in (REPOSITORY / "probekit").rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if unsafe.search(line):
                lines.append(f"{file.name}: {line}")
    assert lines == []
