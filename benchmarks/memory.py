"""Peak memory of probing a store that is larger than the memory it may use.

    python benchmarks/memory.py [--examples 40000] [--layers 29] [--width 1536] [--gb 4] [--json PATH]

Writes a store of random features (40,000 x 29 x 1,536 are 7 GB as float32), one of whose layers carries the label, and
probes all its layers with `logreg`, six strengths and a control, in a process that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from extract import high_water_mb

from probekit.extraction import shards, store
from probekit.probes import probing


def fill(folder: Path, examples: int, layers: list[str], width: int) -> pd.DataFrame:
    """Write the shards; the examples, two of an image."""
    rng = np.random.default_rng(0)
    files = [f"{i}.jpg" for i in range(examples // 2)]
    split = rng.choice(["train", "validation", "test"], len(files), p=[0.8, 0.1, 0.1])
    table = pd.DataFrame({"file": np.repeat(files, 2), "split": np.repeat(split, 2), "task": "caption",
                          "prompt": [f"{i} {k}" for i in range(len(files)) for k in "ab"]})
    table["image_id"] = table.index // 2
    y = rng.integers(0, 2, len(table))
    table = table.assign(labels=[[int(v)] for v in y], mask=[[1]] * len(y))
    table.attrs["tasks"] = {"caption": {"kind": "binary", "classes": ["match"], "question": "?"}}
    part = shards.Part.plan(folder, made_up(table), ["lm/mean"], 1000)
    for i in range(len(part.starts) - 1):
        values = rng.normal(size=(len(part.shard_rows(i)), width)).astype(np.float32)
        sign = 2 * y[part.starts[i] : part.starts[i + 1], None] - 1
        part.write(i, {f"{layer}/mean": values + (0.1 * sign if layer == layers[-1] else 0) for layer in layers})
    shards.write_meta(folder, {"layers": {"lm": layers}, "model": "made-up", "untrained": False})
    return table


def made_up(examples: pd.DataFrame) -> pd.DataFrame:
    """The rows of pictures that do not exist."""
    return pd.DataFrame({"file": examples.file, "size": 0, "prompt": examples.prompt})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=40_000)
    parser.add_argument("--layers", type=int, default=29)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    layers = [f"lm.{k:02d}" for k in range(options.layers)]
    with tempfile.TemporaryDirectory() as temporary:
        own = Path(temporary) / "made-up" / "0"
        examples = fill(own, options.examples, layers, options.width)
        store.rows_of = made_up
        before, start = high_water_mb(), time.perf_counter()
        settings = probing.ProbeSettings(("logreg",), controls=("shuffled",), memory_gb=options.gb)
        found = probing.probe(store.Activations(own, examples, ("lm",), ("mean",)), examples, settings, Path(temporary) / "out")
        seconds = time.perf_counter() - start
    best = found.metrics[(found.metrics.metric == "accuracy") & (found.metrics.control == "none")]
    result = {"store_gb": options.examples * options.layers * options.width * 4 / 1e9, "before_mb": before,
              "peak_rss_mb": high_water_mb(), "bound_mb": options.gb * 1000, "seconds": seconds,
              "best_layer": best.loc[best.value.idxmax(), "layer"]}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
