"""Peak memory of probing activations that are larger than the memory it may use.

    python benchmarks/memory.py [--examples 40000] [--layers 29] [--width 1536] [--gb 4]
                                [--device cpu] [--json PATH]

Writes activations of random features (40,000 x 29 x 1,536 are 7 GB as float32), one of whose layers
carries the label, and probes all layers with `logreg`, eight strengths and a control, in a process
that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from measuring import high_water_mb, plan_random_shards, save_json

from probekit.extraction.folder import ActivationFolder, open_folder
from probekit.extraction.shards import TensorKey
from probekit.extraction.store import Activations
from probekit.paths import Home
from probekit.probes.probing import ProbeSettings, probe_activations

SHARD_PROMPTS = 1000


def make_examples(count: int, rng: np.random.Generator) -> pd.DataFrame:
    """Examples of a binary task, two per image; no images exist, so the model is given none."""
    images = count // 2
    split = rng.choice(["train", "validation", "test"], images, p=[0.8, 0.1, 0.1])
    examples = pd.DataFrame(
        {
            "image_id": np.repeat(np.arange(images), 2),
            "file": "",
            "split": np.repeat(split, 2),
            "task": "caption",
            "prompt": [f"{i} {k}" for i in range(images) for k in "ab"],
            "kind": "binary",
            "question": "?",
        }
    )
    labels = rng.integers(0, 2, len(examples))
    examples["labels"] = [[int(label)] for label in labels]
    examples["mask"] = [[1]] * len(examples)
    examples["classes"] = [["match"]] * len(examples)
    return examples


def write_random_shards(
    folder: ActivationFolder,
    examples: pd.DataFrame,
    *,
    layers: list[str],
    width: int,
    rng: np.random.Generator,
    home: Home,
) -> None:
    """Write random features; the last layer carries the label."""
    shard_set = plan_random_shards(folder, examples, home, prompts=SHARD_PROMPTS)
    sign_n1 = 2 * np.array(examples["labels"].tolist()) - 1
    row = 0
    for i in range(shard_set.shard_count):
        count = len(shard_set.shard_rows(i))
        noise = rng.normal(size=(count, width)).astype(np.float32)
        states = {TensorKey(layer, "mean"): noise for layer in layers}
        signal = 0.1 * sign_n1[row : row + count].astype(np.float32)
        states[TensorKey(layers[-1], "mean")] = noise + signal
        shard_set.write_shard(i, states)
        row += count
    folder.write_meta({"layers": {"lm": layers}, "model": "random", "untrained": False})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=40_000)
    parser.add_argument("--layers", type=int, default=29)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    layers = [f"lm.{k:02d}" for k in range(options.layers)]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        home = Home.find(temporary)
        examples = make_examples(options.examples, rng)
        folder = open_folder("data/activations/random/features", home)
        write_random_shards(
            folder, examples, layers=layers, width=options.width, rng=rng, home=home
        )
        settings = ProbeSettings(probes=("logreg",), controls=("shuffled",), memory_gb=options.gb)
        before_mb = high_water_mb()
        start = time.perf_counter()
        activations = Activations(folder, examples, ("lm",), ("mean",), home=home)
        results = probe_activations(
            activations, settings=settings, folder=home.data / "probes", device=options.device
        )
        seconds = time.perf_counter() - start
    metrics = results.metrics
    accuracy = metrics[(metrics.metric == "accuracy") & (metrics.control == "none")]
    result = {
        "store_gb": options.examples * options.layers * options.width * 4 / 1e9,
        "before_mb": before_mb,
        "peak_rss_mb": high_water_mb(),
        "bound_mb": options.gb * 1000,
        "seconds": seconds,
        "best_layer": accuracy.loc[accuracy.value.idxmax(), "layer"],
    }
    print(json.dumps(result, indent=1))
    save_json(options.json, result)


if __name__ == "__main__":
    main()
