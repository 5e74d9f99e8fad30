"""Reading one layer from disk against reading the same bytes and nothing else.

    python benchmarks/store.py [--examples 60000] [--json PATH]

Shards of random features as an extraction writes them (1,536 wide, five prompts an image, 200 images a shard), five
layers of them, so that a layer's tensors lie scattered over the files. `raw` knows where its bytes are: it seeks,
reads, and widens them into a new float32 array.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from probekit.extraction import shards, store

LAYERS, WIDTH, PROMPTS = [f"lm.{k:02d}" for k in range(5)], 1536, 5


def fill(folder: Path, examples: int) -> pd.DataFrame:
    """Write all shards; the examples."""
    files = [f"{i}.jpg" for i in range(examples // PROMPTS)]
    rows = pd.DataFrame({"file": np.repeat(files, PROMPTS), "size": 0, "prompt": list("abcde") * len(files)})
    part = shards.Part.plan(folder, rows, ["lm/mean"], 200)
    rng = np.random.default_rng(0)
    for i in range(len(part.starts) - 1):
        n = len(part.shard_rows(i))
        values = rng.normal(size=(n, WIDTH)).astype(np.float32)
        part.write(i, {f"{layer}/mean": values + k for k, layer in enumerate(LAYERS)})
    shards.write_meta(folder, {"layers": {"lm": LAYERS}})
    return rows


def read_raw(folder: Path, layer: str) -> tuple[float, int]:
    """Seconds and bytes of one layer's tensors, found by safetensors' own header."""
    places = []
    for file in sorted(folder.glob("part-*/shard-*")):
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            begin, end = json.loads(handle.read(size))[f"{layer}/mean"]["data_offsets"]
        places.append((file, 8 + size + begin, end - begin))
    start, row = time.perf_counter(), 0
    out = torch.empty(sum(length for *_, length in places) // 2 // WIDTH, WIDTH)
    for file, at, length in places:
        with file.open("rb") as handle:
            handle.seek(at)
            values = torch.frombuffer(bytearray(handle.read(length)), dtype=torch.float16).reshape(-1, WIDTH)
        out[row : row + len(values)] = values
        row += len(values)
    return time.perf_counter() - start, 2 * out.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = fill(Path(temporary), options.examples)
        store.rows_of = lambda examples: examples  # the pictures are made up
        start = time.perf_counter()
        view = store.Activations(Path(temporary), rows, ("lm",), ("mean",))
        opened = time.perf_counter() - start
        times = []
        for layer in LAYERS:
            raw, size = read_raw(Path(temporary), layer)
            start = time.perf_counter()
            view[layer, "mean"]
            times.append((time.perf_counter() - start, raw))
    ours, raw = np.median(times, axis=0)
    found = {"examples": options.examples, "layer_mb": size / 1e6, "open_s": opened, "layer_s": ours, "raw_s": raw,
             "mb_per_s": size / 1e6 / ours, "over_raw": ours / raw}
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
