"""Settings name the folder, and settings that make no sense are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from probekit.extraction import settings
from probekit.extraction.settings import ExtractionSettings
from probekit.paths import Home

BASE = ExtractionSettings("tiny-qwen2-vl", dtype="float32")


@pytest.mark.parametrize(
    "change",
    [
        {"longest_side": 64},
        {"untrained": True},
        {"sharing": "off"},
        {"model": "tiny-fast-vlm"},
        {"seed": 1},
        {"dtype": "bfloat16"},
    ],
)
def test_what_changes_hidden_states_names_another_folder(change):
    home = Home.find()
    assert replace(BASE, **change).folder_name(home) != BASE.folder_name(home)


@pytest.mark.parametrize(
    "change", [{"batch_tokens": 99}, {"poolings": ("last",)}, {"workers": 0}, {"sharing": "on"}]
)
def test_what_does_not_change_them_names_the_same_folder(change):
    home = Home.find()
    assert replace(BASE, **change).folder_name(home) == BASE.folder_name(home)


def test_a_patch_release_of_transformers_names_the_same_folder(monkeypatch):
    home = Home.find()
    names = []
    for release in ("5.23.0", "5.23.1", "5.24.0"):
        monkeypatch.setattr(settings, "version", lambda package, release=release: release)
        names.append(BASE.folder_name(home))
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype=.*float16"),
        ({"stages": ("llm",)}, "stages=.*projector"),
        ({"stages": ()}, "stages="),
        ({"shard_images": 0}, "shard_images=0: expected int from 1"),
        ({"batch_tokens": 0}, "batch_tokens=0: expected int from 1"),
        ({"workers": -1}, "workers=-1: expected int from 0"),
        ({"poolings": ("median",)}, "unknown pooling 'median'"),
        ({"poolings": ()}, "name at least one"),
        ({"sharing": "sure"}, "take out of auto, on, off"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_before_anything_is_loaded(
    change, message, extract, examples, no_loading
):
    no_loading()
    with pytest.raises(ValueError, match=message):
        extract(examples, **change)


@pytest.mark.parametrize(
    ("gigabytes", "tokens"), [(2, 2048), (4, 4096), (8, 8192), (24, 16_384), (140, 16_384)]
)
def test_batches_are_chosen_by_all_of_a_gpus_memory(monkeypatch, gigabytes, tokens):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, int(gigabytes * 1.07e9)))
    settings = ExtractionSettings("tiny-qwen2-vl", dtype="bfloat16")
    filled = settings.fill_in("cuda:0", Home.find())
    assert filled.token_budget == tokens
    assert filled.images_per_shard == 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_wants_a_dtype():
    with pytest.raises(ValueError, match="name one, such as dtype=bfloat16"):
        ExtractionSettings("tiny-qwen2-vl").fill_in("cuda", Home.find())


def test_a_type_names_the_same_folder_however_it_is_spelled():
    home = Home.find()
    assert replace(BASE, dtype="fp32").folder_name(home) == BASE.folder_name(home)
