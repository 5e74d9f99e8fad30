"""Reading one layer from disk against reading the same bytes and nothing else.

    python benchmarks/store.py [--examples 60000] [--json PATH]

Random features lie in shards as an extraction writes them (1,536 wide, 1,000 prompts a shard), five
layers of them, so that a layer's tensors are scattered over the files. `raw` knows where its bytes
are: it seeks, reads, and widens them into a new float32 array. Both must return the same numbers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from measuring import list_shards, plan_random_shards, save_json
from tqdm import trange

from probekit.extraction.folder import ActivationFolder, open_folder
from probekit.extraction.shards import TensorKey
from probekit.extraction.store import Activations
from probekit.paths import Home

LAYERS = [f"lm.{k:02d}" for k in range(5)]
WIDTH = 1536
SHARD_PROMPTS = 1000


def write_random_shards(folder: ActivationFolder, examples: pd.DataFrame, home: Home) -> None:
    shard_set = plan_random_shards(folder, examples, home, prompts=SHARD_PROMPTS)
    rng = np.random.default_rng(0)
    for i in trange(shard_set.shard_count, desc="writing", unit="shard"):
        count = len(shard_set.shard_rows(i))
        values = rng.normal(size=(count, WIDTH)).astype(np.float32)
        states = {TensorKey(layer, "mean"): values + k for k, layer in enumerate(LAYERS)}
        shard_set.write_shard(i, states)
    folder.write_meta({"layers": {"lm": LAYERS}})


class TensorPlace(NamedTuple):
    """Where the bytes of a tensor are."""

    file: Path
    start: int
    length: int


def find_tensors(files: list[Path], layer: str) -> list[TensorPlace]:
    """Find the tensors of a layer by the headers of safetensors files."""
    places = []
    for file in files:
        with file.open("rb") as handle:
            header_size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(header_size))
        start, end = header[f"{layer}/mean"]["data_offsets"]
        places.append(TensorPlace(file, 8 + header_size + start, end - start))
    return places


def read_raw(places: list[TensorPlace]) -> torch.Tensor:
    """(n, d) float32 of float16 tensors."""
    rows = sum(place.length for place in places) // 2 // WIDTH
    values_nd = torch.empty(rows, WIDTH)
    row = 0
    for place in places:
        with place.file.open("rb") as handle:
            handle.seek(place.start)
            content = bytearray(handle.read(place.length))
        tensor = torch.frombuffer(content, dtype=torch.float16).reshape(-1, WIDTH)
        values_nd[row : row + len(tensor)] = tensor
        row += len(tensor)
    return values_nd


def measure(home: Home, example_count: int) -> dict:
    prompts = [f"prompt {i}" for i in range(example_count)]
    examples = pd.DataFrame({"file": "", "prompt": prompts})
    folder = open_folder("data/activations/random/features", home)
    write_random_shards(folder, examples, home)
    start = time.perf_counter()
    activations = Activations(folder, examples, ("lm",), ("mean",), home=home)
    open_seconds = time.perf_counter() - start
    raw_seconds = []
    layer_seconds = []
    for layer in LAYERS:
        places = find_tensors(list_shards(home), layer)
        start = time.perf_counter()
        raw = read_raw(places)
        raw_done = time.perf_counter()
        values = activations[layer, "mean"]
        layer_done = time.perf_counter()
        raw_seconds.append(raw_done - start)
        layer_seconds.append(layer_done - raw_done)
        assert np.array_equal(values, raw.numpy())
    layer_mb = sum(place.length for place in places) / 1e6
    layer_s = float(np.median(layer_seconds))
    raw_s = float(np.median(raw_seconds))
    return {
        "examples": example_count,
        "layer_mb": layer_mb,
        "open_s": open_seconds,
        "layer_s": layer_s,
        "raw_s": raw_s,
        "mb_per_s": layer_mb / layer_s,
        "over_raw": layer_s / raw_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(Home.find(temporary), options.examples)
    print(json.dumps(result, indent=1))
    save_json(options.json, result)


if __name__ == "__main__":
    main()
