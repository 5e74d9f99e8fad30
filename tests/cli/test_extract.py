"""One of several processes as a command."""

from __future__ import annotations

import pytest

from probekit import workflow
from probekit.cli.main import main
from tests.conftest import REPOSITORY, SPLIT_SIZES

DEMO = str(REPOSITORY / "notebooks" / "params" / "demo.yaml")
OVERRIDES = [
    "run=mine",
    "models=[tiny-qwen2-vl]",
    "untrained=[]",
    "controls=[]",
    "shard_images=10",
    "stages=[lm]",
]


@pytest.mark.slow
def test_a_rank_is_a_command(data, scene_folder, capsys):
    command = ["extract", "--params", DEMO]
    for override in OVERRIDES:
        command += ["-p", override]
    assert main(command) == 2
    assert "run 01_build_data for this run first" in capsys.readouterr().err
    examples = workflow.build_examples(scene_folder, run="mine", **SPLIT_SIZES)
    assert main([*command, "--rank", "2", "--world-size", "2"]) == 2
    assert "a rank is below the world size" in capsys.readouterr().err
    assert main([*command, "-p", "engine=ray"]) == 2
    assert "engine=local" in capsys.readouterr().err
    assert main([*command, "--rank", "1", "--world-size", "2"]) == 0
    assert "rank 1 of 2 made 3 shards" in capsys.readouterr().out
    assert main([*command, "--rank", "0", "--world-size", "2"]) == 0
    assert "rank 0 of 2 made 3 shards" in capsys.readouterr().out
    shards = sorted(data.glob("activations/*/*/shards-*/shard-*"))
    assert len(shards) == 6
    times = [path.stat().st_mtime_ns for path in shards]
    workflow.extract("tiny-qwen2-vl", examples, shard_images=10)
    assert [path.stat().st_mtime_ns for path in shards] == times
