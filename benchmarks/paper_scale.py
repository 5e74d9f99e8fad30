"""Probing at the study's size, by part: 24,000 images, 96,000 examples, 1,536 wide, 40 categories.

    python benchmarks/paper_scale.py [--layers 2] [--images 24000] [--probes logreg linear]
                                     [--epochs 10] [--device cpu] [--json PATH]

Writes activations of that size, badly conditioned as real ones are: a caption is right or wrong
(two prompts per image), and three of 40 categories are asked about (one prompt per image, twice).
Then 03 runs on them in a process of its own, with three seeds, both controls of the labels, eight
strengths and the codelength, and each part is timed:

logreg_s_per_layer   logistic regressions with all of that
linear_s_per_layer   the study's probe (Adam), --epochs of it
score_s_per_layer    scores with intervals, and how the layers relate

Beside them, over a stated fraction of the same work: scikit-learn's LogisticRegression, one problem
after the other, and the study's loop, one layer and one set of labels at a time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from measuring import high_water_mb, plan_random_shards, run_in_new_process, save_json
from sklearn.linear_model import LogisticRegression

from probekit.extraction.folder import ActivationFolder, open_folder
from probekit.extraction.shards import TensorKey
from probekit.extraction.store import Activations
from probekit.paths import Home
from probekit.probes import fitting, probing
from probekit.probes.adam import AdamSettings
from probekit.probes.probing import ProbeSettings, probe_activations

WIDTH = 1536
CATEGORIES = 40
ASKED = 3  # categories per image
SHARD_PROMPTS = 4000
LATENT = 300  # directions that vary, the k-th with 1 / k of the first one's spread
CAPTION_ROWS = 2
FOLDER = "data/activations/random/paper-scale"
SKLEARN_PROBLEMS = 6
STUDY_STEPS = 300


def make_examples(images: int, rng: np.random.Generator) -> pd.DataFrame:
    """Examples of three tasks; no images exist, so the model is given none."""
    split = np.full(images, "train", dtype=object)
    held_out = images // 12
    split[:held_out] = "validation"
    split[held_out : 2 * held_out] = "test"
    tables = []
    for k in range(CAPTION_ROWS):
        tables.append(
            pd.DataFrame(
                {
                    "image_id": np.arange(images),
                    "split": split,
                    "task": "caption",
                    "prompt": [f"caption {k} of {i}" for i in range(images)],
                    "kind": "binary",
                    "labels": [np.array([1 - k])] * images,
                    "mask": [np.array([1])] * images,
                    "classes": [np.array(["match"])] * images,
                }
            )
        )
    classes = np.array([f"category {k}" for k in range(CATEGORIES)])
    asked = rng.random((images, CATEGORIES)).argpartition(ASKED, axis=1)[:, :ASKED]
    mask = np.zeros((images, CATEGORIES), int)
    np.put_along_axis(mask, asked, 1, axis=1)
    labels = rng.integers(0, 2, mask.shape) * mask
    for task in ("category", "category_list"):
        tables.append(
            pd.DataFrame(
                {
                    "image_id": np.arange(images),
                    "split": split,
                    "task": task,
                    "prompt": [f"{task} of {i}" for i in range(images)],
                    "kind": "multilabel",
                    "labels": list(labels),
                    "mask": list(mask),
                    "classes": [classes] * images,
                }
            )
        )
    examples = pd.concat(tables, ignore_index=True)
    examples["file"] = ""
    examples["question"] = "?"
    return examples


def write_features(
    folder: ActivationFolder,
    examples: pd.DataFrame,
    *,
    layers: list[str],
    rng: np.random.Generator,
    home: Home,
) -> None:
    """Write features from which labels can be read in part, better from layer to layer."""
    shard_set = plan_random_shards(folder, examples, home, prompts=SHARD_PROMPTS)
    signs = np.zeros((len(examples), CATEGORIES), np.float32)
    for i, (labels, mask) in enumerate(zip(examples["labels"], examples["mask"], strict=True)):
        signs[i, : len(labels)] = (2 * labels - 1) * mask
    mixing = rng.normal(size=(LATENT, WIDTH)).astype(np.float32)
    mixing /= np.arange(1, LATENT + 1, dtype=np.float32)[:, None]
    directions = rng.integers(5, LATENT, CATEGORIES)
    scale = np.exp(rng.normal(size=WIDTH)).astype(np.float32)
    row = 0
    for number in range(shard_set.shard_count):
        count = len(shard_set.shard_rows(number))
        latent = rng.normal(size=(count, LATENT)).astype(np.float32)
        noise = 0.01 * rng.normal(size=(count, WIDTH)).astype(np.float32)
        states = {}
        for place, layer in enumerate(layers, start=1):
            with_labels = latent.copy()
            strength = 0.8 * place / len(layers)
            np.add.at(with_labels.T, directions, strength * signs[row : row + count].T)
            states[TensorKey(layer, "mean")] = (with_labels @ mixing + noise) * scale
        shard_set.write_shard(number, states)
        row += count
    folder.write_meta({"layers": {"lm": layers}, "model": "random", "untrained": False})


class Stopwatch:
    """Seconds by part, of functions that run while it is in its context."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, module, name: str, part: str):
        """Return a patch of a module's function that adds its seconds to a part."""
        original = getattr(module, name)

        def run(*arguments, **options):
            start = time.perf_counter()
            result = original(*arguments, **options)
            self.seconds[part] += time.perf_counter() - start
            return result

        return patch.object(module, name, run)


def run_probes(root: str, examples: pd.DataFrame, settings: ProbeSettings, device: str) -> dict:
    """Run 03 on the activations of a home, and time its parts."""
    home = Home.find(root)
    before_mb = high_water_mb()
    watch = Stopwatch()
    activations = Activations(open_folder(FOLDER, home), examples, ("lm",), ("mean",), home=home)
    with (
        watch.timed(fitting, "fit_logreg", "logreg"),
        watch.timed(fitting, "fit_adam", "linear"),
        watch.timed(probing, "_score_task", "score"),
        watch.timed(probing, "_relate_layers", "score"),
    ):
        start = time.perf_counter()
        results = probe_activations(
            activations, settings=settings, folder=home.data / "probes", device=device
        )
        total = time.perf_counter() - start
    metrics = results.metrics
    shown = metrics[(metrics.control == "none") & (metrics.metric == "accuracy")]
    shown = shown[(shown.split == "test") & (shown["class"] == "")]
    return {
        "seconds": dict(watch.seconds) | {"total": total},
        "peak_rss_mb": high_water_mb(),
        "before_mb": before_mb,
        "rows": len(metrics),
        "accuracy": shown.groupby(["task", "probe"])
        .value.max()
        .round(4)
        .unstack()
        .to_dict("index"),
    }


def run_others(root: str, examples: pd.DataFrame) -> dict:
    """Time scikit-learn and the study's loop on a part of the first layer's work."""
    home = Home.find(root)
    activations = Activations(open_folder(FOLDER, home), examples, ("lm",), ("mean",), home=home)
    rows = ((examples.task == "category") & (examples.split == "train")).to_numpy()
    x_nd = activations["lm.00", "mean"][rows]
    x_nd = (x_nd - x_nd.mean(0)) / x_nd.std(0)
    y_nc = np.array(examples["labels"][rows].tolist())
    mask_nc = np.array(examples["mask"][rows].tolist()) > 0
    start = time.perf_counter()
    for k in range(SKLEARN_PROBLEMS):
        asked = mask_nc[:, k]
        LogisticRegression(C=0.01, max_iter=10_000).fit(x_nd[asked], y_nc[asked, k])
    sklearn_s = time.perf_counter() - start
    probe = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(WIDTH, CATEGORIES))
    optimiser = torch.optim.Adam(probe.parameters(), lr=1e-3)
    x, y, mask = (torch.from_numpy(array).float() for array in (x_nd, y_nc, mask_nc))
    start = time.perf_counter()
    for rows_of_batch in torch.randperm(len(x))[: 16 * STUDY_STEPS].split(16):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            probe(x[rows_of_batch]), y[rows_of_batch], weight=mask[rows_of_batch]
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    study_s = time.perf_counter() - start
    return {
        "sklearn_s_per_problem": sklearn_s / SKLEARN_PROBLEMS,
        "study_s_per_step": study_s / STUDY_STEPS,
    }


def write_activations(root: str, *, images: int, layers: int) -> pd.DataFrame:
    """Write the activations of a home; return their examples."""
    rng = np.random.default_rng(0)
    home = Home.find(root)
    names = [f"lm.{k:02d}" for k in range(layers)]
    examples = make_examples(images, rng)
    write_features(open_folder(FOLDER, home), examples, layers=names, rng=rng, home=home)
    return examples


def study_settings(
    probes: Sequence[str] = ("logreg", "linear"), *, epochs: int = 10, memory_gb: float = 4.0
) -> ProbeSettings:
    """Return what 03 does at the study's size: three seeds and both controls of the labels."""
    return ProbeSettings(
        probes=tuple(probes),
        seeds=(0, 1, 2),
        controls=("shuffled", "control_task"),
        training=AdamSettings(epochs=epochs),
        memory_gb=memory_gb,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--images", type=int, default=24_000)
    parser.add_argument("--probes", nargs="+", default=["logreg", "linear"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--gb", type=float, default=4.0, help="memory_gb of the probes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = study_settings(options.probes, epochs=options.epochs, memory_gb=options.gb)
    with tempfile.TemporaryDirectory() as temporary:
        examples = write_activations(temporary, images=options.images, layers=options.layers)
        measured = run_in_new_process(run_probes, temporary, examples, settings, options.device)
        others = run_in_new_process(run_others, temporary, examples)
    seconds = measured.pop("seconds")
    result = {f"{part}_s_per_layer": value / options.layers for part, value in seconds.items()}
    result |= measured | others | {"layers": options.layers, "examples": len(examples)}
    print(json.dumps(result, indent=1))
    save_json(options.json, result)


if __name__ == "__main__":
    main()
