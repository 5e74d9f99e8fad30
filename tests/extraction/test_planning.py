"""Estimates against what is then done."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from probekit.extraction.jobs import plan_job
from probekit.extraction.loading import prepare_images
from probekit.extraction.planning import (
    ModelSize,
    TimedRun,
    estimate_extraction,
    fit_times,
    hours_by_workers,
)
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.shards import model_inputs
from probekit.models import forward
from probekit.models.load import load_vlm
from probekit.paths import Home
from probekit.tasks.input_controls import change_inputs


def estimate(settings, examples, *, controls=(), images=None, rate=1e9):
    tables = {name: change_inputs(examples, name) for name in ("none", *controls)}
    sampled = examples.image_id.nunique()
    return estimate_extraction(
        settings,
        tables,
        images=images or sampled,
        sampled_images=sampled,
        operations_per_second=rate,
        device="cpu",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-fast-vlm"])
@pytest.mark.parametrize("way", ["shared", "plain"])
def test_operations_are_those_of_the_forward_passes(examples, name, way):
    two_prompts = examples.groupby("image_id").head(2).head(4)
    table = two_prompts.assign(prompt=["a b c d", "d c b a"] * 2)  # nothing is padded
    vlm = load_vlm(name, device="cpu")
    rows = model_inputs(table, Home.find())
    items = list(prepare_images(vlm.prompt_processor, [rows], longest_side=None, home=Home.find()))
    # The CPU's own attention is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for item in items:
            forward.run_pooled(vlm, [item.prepared], poolings=["mean"], stages=("lm",), way=way)
    sharing = "auto" if way == "shared" else "off"
    result = estimate(ExtractionSettings(name, sharing=sharing), table)
    operations = result.operations if way == "shared" else result.plain_operations
    assert result.way == way
    assert operations == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert result.hours == pytest.approx(operations / 1e9 / 3600)


@pytest.mark.slow
def test_tokens_bytes_and_examples_are_those_of_the_extraction(extract, examples):
    controls = ("no_image", "wrong_image")
    settings = {
        "stages": ("lm", "vision", "projector"),
        "poolings": ("mean", "max"),
        "answers": True,
    }
    tables = {name: change_inputs(examples, name) for name in controls}
    activations = extract(examples, tables=tables, **settings)
    result = estimate(ExtractionSettings("tiny-qwen2-vl", **settings), examples, controls=controls)
    folder = activations.folder.path
    row_files = folder.glob("shards-*/rows.parquet")
    assert result.examples == sum(len(pd.read_parquet(file)) for file in row_files)
    shard_bytes = sum(file.stat().st_size for file in folder.glob("shards-*/shard-*"))
    assert result.disk_gb == pytest.approx(shard_bytes / 1e9, rel=0.15)
    vlm = load_vlm("tiny-qwen2-vl", device="cpu")
    weight_bytes = sum(parameter.numel() * 4 for parameter in vlm.model.parameters())
    assert result.weights_gb == pytest.approx(weight_bytes / 1e9)
    assert result.tokens < result.plain_tokens


@pytest.mark.slow
def test_estimates_grow_with_the_number_of_images(examples):
    settings = ExtractionSettings("tiny-qwen2-vl")
    count = examples.image_id.nunique()
    once = estimate(settings, examples, images=count)
    twice = estimate(settings, examples, images=2 * count)
    for name in ("tokens", "operations", "disk_gb", "hours"):
        assert getattr(twice, name) == pytest.approx(2 * getattr(once, name))


def test_experts_count_where_a_token_meets_them():
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    class Skeleton:
        is_native = True

        def __init__(self, active_experts):
            self.config = Qwen3MoeConfig(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                head_dim=16,
                num_key_value_heads=2,
                moe_intermediate_size=16,
                num_experts=8,
                num_experts_per_tok=active_experts,
            )
            with torch.device("meta"):
                self.model = Qwen3MoeModel(self.config)
            self.blocks = self.model.layers

    def active_parameters(active_experts):
        return ModelSize.of(Skeleton(active_experts)).active_parameters

    one_expert = 2 * 3 * 32 * 16  # two layers, three matrices
    assert active_parameters(3) - active_parameters(2) == one_expert
    assert active_parameters(8) == active_parameters(1) + 7 * one_expert


@pytest.mark.slow
def test_prompts_without_an_image_are_units_of_their_own(data, examples):
    settings = ExtractionSettings("tiny-qwen2-vl", shard_images=10)
    tables = {name: change_inputs(examples, name) for name in ("none", "no_image")}
    job = plan_job(settings, tables, device="cpu")
    result = estimate(settings, examples, controls=("no_image",))
    assert len(job.shards) - 1 <= result.shards <= len(job.shards)
    assert result.shards > 12


def test_workers_make_whole_shards_and_each_loads_the_model():
    table = pd.DataFrame({"shards": [10, 3], "hours": [2.0, 0.6], "start_s": [360.0, 0.0]})
    hours = hours_by_workers(table, 4).set_index("workers").hours
    # 2 + 0.6 + 0.1; 5 of 10 and 2 of 3 shards; 3 of 10 and 1 of 3
    assert hours.round(6).to_dict() == {1: 2.7, 2: 1.5, 4: 0.9}


def test_what_it_costs_to_begin_is_not_multiplied():
    assert fit_times(TimedRun(8, 5.0), TimedRun(24, 7.0)) == pytest.approx((4.0, 0.125))
    slow_at_first = fit_times(TimedRun(8, 9.0), TimedRun(24, 6.0))
    assert slow_at_first == (0.0, 0.25)
    only_one = TimedRun(1, 5.0)
    assert fit_times(only_one, only_one) == (0.0, 5.0)
