"""How time and memory grow with the number of examples: extracting, reading activations, probing.

    python benchmarks/growth.py [--images 150] [--times 1 2 4 8] [--device cpu]
                                [--dtype float32] [--json PATH]

Drawn scenes go through a demo model with three prompts per image. Each step of each size is
measured in a process of its own, from the loaded model on. `growth` is what the largest size takes
in multiples of the smallest, beside the multiple of examples: linear is the same number, flat is 1.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd
from measuring import build_scene_examples, high_water_mb, run_in_new_process, save_json

from probekit.extraction.extracting import open_views
from probekit.extraction.jobs import plan_job
from probekit.extraction.runner import Runner
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.store import Activations
from probekit.paths import Home
from probekit.probes.probing import ProbeSettings, probe_activations

PROBES = ProbeSettings(probes=("logreg",), resamples=200)
STEPS = ("extracting", "reading", "probing")


def measure(
    step: str, examples: pd.DataFrame, home: Home, settings: ExtractionSettings, device: str
) -> dict:
    """Seconds of a step, and the memory that it adds to what the process held before."""
    job = plan_job(settings, {"none": examples}, device=device, home=home)
    if step == "extracting":
        runner = Runner(job)
        runner.load()
    else:
        activations = open_views(job, {"none": examples})
    before_mb = high_water_mb()
    start = time.perf_counter()
    if step == "extracting":
        runner.make_shards(range(len(job.shards)))
    elif step == "reading":
        read_all(activations)
    else:
        probe_activations(activations, settings=PROBES, folder=home.data / "probes", device=device)
    seconds = time.perf_counter() - start
    return {
        "step": step,
        "examples": len(examples),
        "seconds": round(seconds, 3),
        "added_mb": round(high_water_mb() - before_mb, 1),
        "mb": round(high_water_mb(), 1),
    }


def read_all(activations: Activations) -> None:
    for layer in activations.layers:
        activations[layer, "mean"]


def measure_all(
    root: Path,
    smallest: int,
    factors: list[int],
    *,
    settings: ExtractionSettings,
    device: str,
) -> pd.DataFrame:
    rows = []
    for factor in factors:
        images = factor * smallest
        home = Home.find(root / str(images))
        examples = build_scene_examples(
            home.root, images, held_out=images // 5, seed=5, tasks=("caption", "category")
        )
        rows += [
            run_in_new_process(measure, step, examples, home, settings, device) for step in STEPS
        ]
    table = pd.DataFrame(rows)
    return table.sort_values("step", key=lambda steps: steps.map(STEPS.index), kind="stable")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=150, help="of the smallest size")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = ExtractionSettings("tiny-qwen2-vl", shard_images=50, dtype=options.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        table = measure_all(
            Path(temporary),
            options.images,
            options.times,
            settings=settings,
            device=options.device,
        )
    sizes = table.groupby("step", sort=False)[["examples", "seconds", "mb"]]
    growth = sizes.last() / sizes.first()
    print(table.to_string(index=False))
    print(f"\ngrowth:\n{growth.round(2).to_string()}")
    save_json(options.json, {"rows": table.to_dict("records"), "growth": growth.T.to_dict()})


if __name__ == "__main__":
    main()
