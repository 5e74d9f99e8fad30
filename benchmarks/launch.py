"""The same shards by each launcher: one process, two processes side by side, Ray with two copies of the model.

    python benchmarks/launch.py [--images 1200] [--json PATH]

Each starts from an empty folder in a new process, and all must leave the same bytes, or this fails. Times are from the
start of the process to its end, imports and loading included, with one thread a worker; `start` is that with nothing to
do: what the launcher itself takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from probekit import paths
from probekit.data import scenes
from probekit.tasks import building

WORKER = """
import sys
from pathlib import Path
import pandas as pd
from probekit import paths
from probekit.extraction import extract
from probekit.extraction.launch import Launch
paths.Home.find().data = Path(sys.argv[1])
if __name__ == "__main__":
    examples, how = pd.read_parquet(paths.Home.find().data.parent / "examples.parquet"), sys.argv[2]
    settings = extract.Extraction("tiny-qwen2-vl", shard_images=50, batch_tokens=2048)
    if how == "ray":
        extract.extract_all(settings, examples, (), "cpu", Launch("ray", 2))
    else:
        rank, size = map(int, how.split("/"))
        Launch(rank=rank, world_size=size).make(extract.plan(settings, examples, (), "cpu")[0])
"""
WAYS = {"one process": ["0/1"], "two processes": ["0/2", "1/2"], "Ray, two copies": ["ray"]}


def timed(folder: Path, ways: list[str]) -> float:
    """Seconds until all processes that work on a folder have ended."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(paths.Home.find().root), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    running = [subprocess.Popen([sys.executable, folder.parent / "work.py", folder, way], env=environment,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for way in ways]
    assert [process.wait() for process in running] == [0] * len(ways), ways
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, expected = [], None
    with tempfile.TemporaryDirectory() as temporary:
        root, few = Path(temporary), options.images // 4
        build = building.BuildSettings(str(scenes.write_scenes(root / "scenes", options.images, 3)), train=options.images - 2 * few,
                            validation=few, test=few)
        building.build_examples(build, root / "tables").to_parquet(root / "examples.parquet")
        (root / "work.py").write_text(WORKER)
        for name, ways in WAYS.items():
            folder = root / name.replace(" ", "-")
            seconds = timed(folder, ways)
            made = {path.name: path.read_bytes() for path in folder.glob("activations/*/*/part-*/shard-*.safetensors")}
            expected = expected or made
            assert made == expected, f"{name} made other shards"
            rows.append({"launcher": name, "shards": len(made), "seconds": round(seconds, 1),
                         "start": round(timed(folder, ways), 1)})
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
