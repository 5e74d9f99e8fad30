"""How time and memory grow with the number of examples: extraction, reading a store, probing.

    python benchmarks/growth.py [--images 150] [--times 1 2 4 8] [--json PATH]

Drawn scenes go through a demo model with three prompts an image; each size is measured in a process of its own, from
the loaded model on. `growth` is what the largest size takes in multiples of the smallest, beside the multiple of
examples: linear is the same number, flat is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))
from extract import high_water_mb

from probekit import paths
from probekit.data import scenes
from probekit.extraction import extract
from probekit.extraction.store import Activations
from probekit.extraction.worker import Worker
from probekit.probes.probing import ProbeSettings, probe
from probekit.tasks import building

STEPS = ("extraction", "reading", "probing")


def measure(step: str, images: int, folder: Path) -> dict:
    """Seconds of a step, and the memory that it adds to what the process held before."""
    paths.Home.find().data = folder / str(images)
    few, rest = images // 5, images - 2 * (images // 5)
    build = building.BuildSettings(str(folder / "scenes"), train=rest, validation=few, test=few, tasks=("caption", "category"))
    examples = building.build_examples(build, paths.Home.find().data / "tasks")
    job, views = extract.plan(extract.ExtractionSettings("tiny-qwen2-vl", shard_images=50), examples, (), "cpu")
    if step == "extraction":
        worker = Worker(job)
        worker.load()
        work = lambda: worker([*range(len(job.shards))])  # noqa: E731
    else:
        _, table, own = views[0]
        store = Activations(job.folder, table, own.stages, own.poolings)
        work = {"reading": lambda: [len(store[layer, "mean"]) for layer in store.layers],
                "probing": lambda: probe(store, examples, ProbeSettings(probes=("logreg",), resamples=200),
                                         paths.Home.find().data / "probes")}[step]
    before, start = high_water_mb(), time.perf_counter()
    work()
    return {"step": step, "examples": len(examples), "seconds": round(time.perf_counter() - start, 3),
            "added_mb": round(high_water_mb() - before, 1), "mb": round(high_water_mb(), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=150, help="of the smallest size")
    parser.add_argument("--times", type=int, nargs="+", default=(1, 2, 4, 8))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # step, images, folder: measured in this process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), Path(options.one[2]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        scenes.write_scenes(Path(temporary) / "scenes", options.images * max(options.times), 5)
        rows = []
        for k in options.times:
            for step in STEPS:
                done = subprocess.run([sys.executable, __file__, "--one", step, str(k * options.images), temporary],
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = pd.concat([part for _, part in pd.DataFrame(rows).groupby("step", sort=False)])
    sizes = table.groupby("step", sort=False)[["examples", "seconds", "mb"]]
    grown = sizes.last() / sizes.first()
    print(table.to_string(index=False), "\ngrowth:", grown.round(2).to_string(), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "growth": grown.T.to_dict()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
