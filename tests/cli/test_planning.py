"""The plan of a run, as a command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from probekit.cli.main import main
from probekit.cli.notebooks import declared_parameters, find_notebook
from probekit.cli.planning import extractions
from probekit.extraction.planning import estimate_extraction
from probekit.workflow import tables_with_controls
from tests.conftest import REPOSITORY

PARAMETERS = REPOSITORY / "notebooks" / "params"
DEMO = str(PARAMETERS / "demo.yaml")
ONE_MODEL = ["-p", "models=[tiny-qwen2-vl]", "-p", "untrained=[]"]


@pytest.mark.slow
def test_the_plan_is_printed_by_a_command(capsys, tmp_path):
    options = ["--flops", "1e10", "--sample", "24", "--workers", "6"]
    assert main(["plan", "--params", DEMO, *options, *ONE_MODEL, "-p", "stages=[lm]"]) == 0
    output = capsys.readouterr().out
    sizes = yaml.safe_load(Path(DEMO).read_text(encoding="utf-8"))
    images = sizes["train"] + sizes["validation"] + sizes["test"]
    assert re.search(rf"^images +{images:,}$", output, re.MULTILINE)
    assert "TFLOP" in output
    of_extraction, interventions = output.split("interventions (04_intervene)")
    rows = [line.split() for line in of_extraction.splitlines()[-5:-1]]
    assert [int(workers) for workers, _ in rows] == [1, 2, 4, 6]
    hours = [float(text) for _, text in rows]
    assert hours[0] > hours[1] > hours[2] >= hours[3]
    on_each = rf"tiny-qwen2-vl, caption: \d+ on each of {sizes['images']} test images"
    assert re.search(on_each, interventions)
    assert main(["plan", "--params", str(tmp_path / "none.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sample_is_timed_with_prompts_that_have_no_image(capsys):
    command = ["plan", "--params", DEMO, "--sample", "12", *ONE_MODEL]
    assert main([*command, "-p", "controls=[no_image]"]) == 0
    output = capsys.readouterr().out
    assert "as the sample took here" in output
    assert "test images" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("-p", "models=[]"), "models=[]: name at least one"),
        (("-p", "tasks=[]"), "tasks=[]: take one or more"),
        (("-p", "tasks=[captoin]"), "unknown tasks ['captoin']"),
        (("-p", "poolings=[]"), "poolings=(): name at least one"),
        (("-p", "poolings=[median]"), "unknown pooling 'median'"),
        (("-p", "stages=[vison]"), "stages=['vison']: take out of"),
        (("-p", "dtype=int8"), "dtype='int8': take out of"),
        (("-p", "test=0"), "test=0: expected int from 1"),
        (("-p", "shard_images=0"), "shard_images=0: expected int from 1"),
        (("-p", "controls=[blurred]"), "unknown controls ['blurred']"),
        (("--flops", "0"), "numbers from 1"),
        (
            ("-p", "device=cuda", "-p", "models=[tiny-qwen2-vl]"),
            "name one, such as dtype=bfloat16",
        ),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_with_a_fix(change, message, capsys):
    if "device=cuda" in change and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    rate = () if "--flops" in change else ("--flops", "1e10")
    assert main(["plan", "--params", DEMO, "--sample", "12", *rate, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "taking twice as many" not in error


@pytest.mark.slow
def test_more_images_are_taken_where_a_task_finds_nothing_to_ask(capsys):
    options = ["--sample", "12", "--flops", "1e10", *ONE_MODEL, "-p", "controls=[]"]
    assert main(["plan", "--params", str(PARAMETERS / "tasks.yaml"), *options]) == 0
    assert "taking twice as many" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sample_is_run_where_no_rate_is_named(examples):
    declared = declared_parameters(find_notebook("02_extract"))
    parameters = {name: parameter.default for name, parameter in declared.items()}
    parameters |= {"models": ["tiny-qwen2-vl"], "untrained": [], "controls": []}
    ((settings, controls),) = extractions(parameters)
    estimate = estimate_extraction(
        settings,
        tables_with_controls(examples.head(40), controls),
        images=1000,
        sampled_images=examples.head(40).image_id.nunique(),
        device="cpu",
    )
    assert estimate.way == "shared"
    assert 0 < estimate.hours < 1
    assert estimate.start_s > 0
