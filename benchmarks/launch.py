"""The same shards by each launcher: one process, two side by side, Ray with two copies.

    python benchmarks/launch.py [--images 1200] [--launchers NAME ...] [--device cpu]
                                [--dtype float32] [--json PATH]

Each starts from an empty home in new processes, and all must leave the same bytes, or this fails.
Times are from the start of the processes to their end, loading of the model included and imports
left out (but those of Ray's workers), with one thread per process. `idle_seconds` is the same once
more, with nothing left to do but a look at what is there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from measuring import PROCESSES, build_scene_examples, read_shards, run_in_new_process, save_json

from probekit.extraction.jobs import plan_job
from probekit.extraction.launch import Launcher
from probekit.extraction.settings import ExtractionSettings
from probekit.paths import Home

LAUNCHERS = {
    "one process": [Launcher()],
    "two processes": [Launcher(rank=rank, world_size=2) for rank in (0, 1)],
    "Ray, two copies": [Launcher("ray", copies=2)],
}


def make_shards(home: Home, launcher: Launcher, settings: ExtractionSettings, device: str) -> None:
    """Make the share of a launcher in this process."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.pop("RAY_ADDRESS", None)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = log_of(home).open("a", encoding="utf-8")
    examples = pd.read_parquet(home.root.parent / "examples.parquet")
    job = plan_job(settings, {"none": examples}, device=device, home=home)
    launcher.make_shards(job)


def log_of(home: Home) -> Path:
    return home.root.with_name(f"{home.root.name}.txt")


def time_processes(
    home: Home, launchers: list[Launcher], settings: ExtractionSettings, device: str
) -> float:
    """Seconds until all processes that work on a home have ended."""
    start = time.perf_counter()
    processes = [
        PROCESSES.Process(target=make_shards, args=(home, launcher, settings, device))
        for launcher in launchers
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - start
    codes = [process.exitcode for process in processes]
    assert codes == [0] * len(launchers), log_of(home).read_text(encoding="utf-8")[-3000:]
    return seconds


def compare_launchers(
    root: Path, images: int, *, names: list[str], settings: ExtractionSettings, device: str
) -> list[dict]:
    examples = build_scene_examples(root, images, held_out=images // 4, seed=3)
    examples.to_parquet(root / "examples.parquet")
    run_in_new_process(os.getpid)  # the process that the others are forked from imports
    rows = []
    expected: dict[str, bytes] = {}
    for name in names:
        launchers = LAUNCHERS[name]
        home = Home.find(root / name.replace(" ", "-"))
        seconds = time_processes(home, launchers, settings, device)
        stored = read_shards(home)
        expected = expected or stored
        assert stored == expected, f"{name} made other shards"
        idle_seconds = time_processes(home, launchers, settings, device)
        rows.append(
            {
                "launcher": name,
                "shards": len(stored),
                "seconds": round(seconds, 1),
                "idle_seconds": round(idle_seconds, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = ExtractionSettings(
        "tiny-qwen2-vl", shard_images=50, batch_tokens=2048, dtype=options.dtype
    )
    with tempfile.TemporaryDirectory() as temporary:
        rows = compare_launchers(
            Path(temporary),
            options.images,
            names=options.launchers,
            settings=settings,
            device=options.device,
        )
    print(pd.DataFrame(rows).to_string(index=False))
    save_json(options.json, rows)


if __name__ == "__main__":
    main()
