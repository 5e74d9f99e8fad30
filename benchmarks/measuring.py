"""What several benchmarks share: drawn examples, shards of a home, processes, memory, files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pandas as pd

from probekit.data.scenes import write_scenes
from probekit.extraction.folder import ActivationFolder
from probekit.extraction.shards import Content, ShardSet, model_inputs
from probekit.paths import Home
from probekit.tasks.base import BuildSettings
from probekit.tasks.building import build_examples

# Benchmarks share some pieces with the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.processes import PROCESSES, STEADY_MEMORY

Result = TypeVar("Result")

for variable, setting in STEADY_MEMORY.items():  # for processes that start from here
    os.environ.setdefault(variable, setting)


def build_scene_examples(
    folder: Path, images: int, *, held_out: int, seed: int, **settings
) -> pd.DataFrame:
    """Draw scenes below a folder and build their examples.

    `held_out` images are for validation, as many for testing, the others for training; `settings`
    are further attributes of BuildSettings.
    """
    scenes = write_scenes(folder / "scenes", images, seed=seed)
    build_settings = BuildSettings(
        str(scenes),
        train=images - 2 * held_out,
        validation=held_out,
        test=held_out,
        **settings,
    )
    return build_examples(build_settings, folder / f"tables-{images}")


def plan_random_shards(
    folder: ActivationFolder, examples: pd.DataFrame, home: Home, *, prompts: int
) -> ShardSet:
    """Plan shards of mean-pooled states for examples without images."""
    return ShardSet.create(
        folder,
        model_inputs(examples, home),
        contents=[Content("lm", "mean")],
        shard_images=prompts,  # a prompt without an image counts for one
    )


def list_shards(home: Home) -> list[Path]:
    """The shards of all models in a home."""
    return sorted(home.data.glob("activations/*/*/shards-*/shard-*.safetensors"))


def read_shards(home: Home) -> dict[str, bytes]:
    """The bytes of each shard of the only model in a home."""
    return {path.name: path.read_bytes() for path in list_shards(home)}


def run_in_new_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function where nothing else has used memory yet."""
    with PROCESSES.Pool(1) as pool:
        result = pool.apply(function, arguments)
        pool.close()  # the process ends by itself and takes away what it made
        pool.join()
    return result


def high_water_mb() -> float:
    """Peak memory of this process; getrusage would also count its parent's when it forked."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def save_json(file: Path | None, result: object) -> None:
    """Write a result where the option --json names a file."""
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
