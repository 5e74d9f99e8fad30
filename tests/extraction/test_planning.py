"""Estimates against what is then done."""

import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from probekit.cli import notebooks
from probekit.cli.main import main
from probekit.extraction import extract, loading, planning, shards
from probekit.extraction.extract import ExtractionSettings
from probekit.models import forward, load
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-fast-vlm"])
@pytest.mark.parametrize("way", ["shared", "plain"])
def test_operations_are_those_of_the_forward_passes(examples, name, way):
    given = (
        examples.groupby("image_id").head(2).head(4).assign(prompt=["a b c d", "d c b a"] * 2)
    )  # nothing is padded
    rows = shards.rows_of(given)
    vlm = load.load_vlm(name, device="cpu")
    works = [*loading.ahead(vlm.prompt_processor, None, [rows], 0)]
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # the CPU's own is not counted
        for work in works:
            forward.run_pooled(vlm, [work.prepared], ["mean"], ("lm",), way)
    settings = ExtractionSettings(name, sharing="auto" if way == "shared" else "off")
    told = planning.estimate(settings, (), given, given.image_id.nunique(), 1e9, "cpu")
    key = "operations" if way == "shared" else "plain operations"
    assert told["way"] == way and told[key] == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert told["hours"] == told[key] / 1e9 / 3600


def test_tokens_bytes_and_examples_are_those_of_the_extraction(data, examples):
    settings = ExtractionSettings(
        "tiny-qwen2-vl", stages=("lm", "vision", "projector"), poolings=("mean", "max")
    )
    stores = extract.extract_all(settings, examples, ("no_image", "wrong_image"), "cpu")
    told = planning.estimate(
        settings, ("no_image", "wrong_image"), examples, examples.image_id.nunique(), 1e9, "cpu"
    )
    shards = [*stores[0].folder.glob("part-*/shard-*.safetensors")]
    rows = sum(len(pd.read_parquet(file)) for file in stores[0].folder.glob("part-*/rows.parquet"))
    assert told["examples"] == rows
    assert told["GB on disk"] == pytest.approx(
        sum(file.stat().st_size for file in shards) / 1e9, rel=0.15
    )
    vlm = load.load_vlm("tiny-qwen2-vl", device="cpu")
    assert told["GB weights"] == pytest.approx(
        sum(p.numel() * 4 for p in vlm.model.parameters()) / 1e9
    )
    assert told["tokens"] < told["plain tokens"]
    twice = planning.estimate(settings, (), examples, 2 * examples.image_id.nunique(), 1e9, "cpu")
    once = planning.estimate(settings, (), examples, examples.image_id.nunique(), 1e9, "cpu")
    assert all(
        twice[key] == pytest.approx(2 * once[key])
        for key in ("tokens", "operations", "GB on disk", "hours")
    )


def test_experts_count_where_a_token_meets_them():
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    def active(asked):
        config = Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=16,
            num_key_value_heads=2,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=asked,
        )
        with torch.device("meta"):
            model = Qwen3MoeModel(config)
        vlm = type("", (), {"config": config, "model": model, "blocks": model.layers})
        return planning.Shape.of(vlm).active

    one = 2 * 3 * 32 * 16  # two layers, three matrices
    assert active(3) - active(2) == one and active(8) == active(1) + 7 * one


def test_the_plan_is_told_by_a_command(capsys, tmp_path):
    demo = str(REPOSITORY / "notebooks" / "params" / "demo.yaml")
    assert (
        main(
            [
                "plan",
                "--params",
                demo,
                "--flops",
                "1e10",
                "--sample",
                "24",
                "--workers",
                "6",
                "-p",
                "models=[tiny-qwen2-vl]",
                "-p",
                "untrained=[]",
                "-p",
                "stages=[lm]",
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "1,800" in told and "TFLOP" in told
    table = [line.split() for line in told.splitlines()[-4:]]
    assert [int(k) for k, _ in table] == [1, 2, 4, 6]
    hours = [float(h) for _, h in table]
    assert hours[0] > hours[1] > hours[2] >= hours[3]
    assert main(["plan", "--params", str(tmp_path / "none.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("-p", "models=[]"), "models=[]: name at least one"),
        (("-p", "tasks=[]"), "tasks=[]: take one or more"),
        (("-p", "tasks=[captoin]"), "unknown tasks ['captoin']"),
        (("-p", "poolings=[]"), "unknown pooling ''"),
        (("-p", "poolings=[median]"), "unknown pooling 'median'"),
        (("-p", "stages=[vison]"), "stages=['vison']: take out of"),
        (("-p", "dtype=fp16"), "dtype=['fp16']: take out of"),
        (("-p", "test=0"), "each split needs images"),
        (("-p", "shard_images=0"), "numbers from 1"),
        (("--flops", "0"), "numbers from 1"),
        (("-p", "device=cuda", "-p", "models=[tiny-qwen2-vl]"), "name one, such as dtype=bfloat16"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_with_a_mend(change, told, capsys):
    if "device=cuda" in change and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert (
        main(
            [
                "plan",
                "--params",
                str(REPOSITORY / "notebooks" / "params" / "demo.yaml"),
                "--sample",
                "12",
                *(() if "--flops" in change else ("--flops", "1e10")),
                *change,
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert told in err and "taking twice as many" not in err


def test_more_images_are_taken_where_a_task_finds_nothing_to_ask(capsys):
    assert (
        main(
            [
                "plan",
                "--params",
                str(REPOSITORY / "notebooks" / "params" / "tasks.yaml"),
                "--sample",
                "12",
                "--flops",
                "1e10",
                "-p",
                "models=[tiny-qwen2-vl]",
                "-p",
                "untrained=[]",
                "-p",
                "controls=[]",
            ]
        )
        == 0
    )
    assert "taking twice as many" in capsys.readouterr().err


def test_prompts_without_an_image_are_units_of_their_own(data, examples):
    settings = ExtractionSettings("tiny-qwen2-vl", shard_images=10)
    job, _ = extract.plan(settings, examples, ("no_image",), "cpu")
    told = planning.estimate(
        settings, ("no_image",), examples, examples.image_id.nunique(), 1e9, "cpu"
    )
    assert len(job.shards) - 1 <= told["shards"] <= len(job.shards) and told["shards"] > 12


def test_workers_make_whole_shards_and_each_loads_the_model():
    models = pd.DataFrame({"shards": [10, 3], "hours": [2.0, 0.6], "load_s": [360.0, 0.0]})
    found = planning.by_workers(models, 4).set_index("workers").hours
    assert found.round(6).to_dict() == {
        1: 2.7,
        2: 1.5,
        4: 0.9,
    }  # 2 + 0.6 + 0.1, 5 / 10 and 2 / 3, 3 / 10 and 1 / 3


def test_a_sample_is_run_where_no_rate_is_named(examples):
    book = next(book for book in notebooks.notebooks() if book.stem == "02_extract")
    extraction = {name: about.default for name, about in notebooks.declared(book).items()}
    extraction |= {"models": ["tiny-qwen2-vl"], "untrained": [], "controls": [], "device": "cpu"}
    settings, control = extract.asked_by(extraction)[0]
    told = planning.estimate(settings, control, examples.head(40), 1000, None, "cpu")
    assert told["way"] == "shared" and 0 < told["hours"] < 1 and told["load_s"] > 0
