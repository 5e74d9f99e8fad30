"""What answers cost, and how near they are to the whole model's.

    python benchmarks/answers.py [--model tiny-qwen2-vl] [--device cpu] [--dtype float32]
                                 [--images 600] [--rounds 5] [--no-logits] [--quick] [--json PATH]

Answers take one pass of the whole model, and add the pooling ``last`` to every batch and to what is
written. Whole extractions differ by more than that from one to the next on a machine that does
other things as well. So every batch, and every shard, is done --rounds times with and without
answers, in turn, and the shortest time of each counts. --model names a demo model, or qwen2-vl-2b
or fastvlm-0.5b for random weights of that size, see ``gpu.py``.

Then the time to read answers and both lenses off the store, and to score them. Last, for every
architecture that the tests have a tiny random model of, the largest difference of the answers'
logits from those of transformers' whole model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from extract import extract_with
from gpu import MODELS, draw_weights, make_checkpoint
from measuring import build_scene_examples, save_json
from PIL import Image
from transformers.utils import logging

from probekit.answers.reading import read_answers
from probekit.answers.scores import score_answers
from probekit.extraction.answer_heads import ANSWER_POOLING, collect_words
from probekit.extraction.folder import open_folder
from probekit.extraction.loading import fill_batches, prepare_images
from probekit.extraction.runner import copy_to_host
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.shards import Content, ShardSet, TensorKey, model_inputs
from probekit.models.forward import States, run_pooled
from probekit.models.load import Vlm, load_vlm
from probekit.models.output_head import take_answer_head
from probekit.models.processor import PreparedImage
from probekit.paths import Home
from probekit.probes.results import ProbeResults
from probekit.tasks.base import task_infos
from tests.support.architectures import RECIPES, save_checkpoint


def load_with_head(name: str, root: Path, *, dtype: str, device: str) -> tuple[Vlm, str]:
    """A demo model, or one of a published size with random weights; and its checkpoint."""
    if name not in MODELS:
        return load_vlm(name, dtype=dtype, device=device, with_head=True), name
    checkpoint = root / name
    make_checkpoint(MODELS[name], checkpoint, quick=False)
    return draw_weights(name, checkpoint, dtype=dtype, device=device), str(checkpoint)


Poolings = tuple[str, ...]
WITHOUT: Poolings = ("mean",)
WITH: Poolings = ("mean", ANSWER_POOLING)


class Seconds(NamedTuple):
    """Of an extraction's parts; by their poolings those that answers add to."""

    preparing: float
    head: float
    passes: dict[Poolings, float]
    writing: dict[Poolings, float]

    @property
    def ratio(self) -> float:
        """With answers over without."""
        with_answers = self.preparing + self.head + self.passes[WITH] + self.writing[WITH]
        return with_answers / (self.preparing + self.passes[WITHOUT] + self.writing[WITHOUT])


def time_parts(
    vlm: Vlm, checkpoint: str, examples: pd.DataFrame, root: Path, *, rounds: int
) -> Seconds:
    """Seconds of preparing all images, and the shortest of some rounds of what answers change."""
    home = Home.find(root)
    settings = ExtractionSettings(checkpoint, dtype=vlm.dtype).fill_in(vlm.device, home)
    rows = model_inputs(examples, home)
    started = time.perf_counter()
    items = list(prepare_images(vlm.prompt_processor, [rows], longest_side=None, home=home))
    preparing = time.perf_counter() - started
    words = collect_words([examples])
    head = min(seconds_of(take_answer_head, vlm, words, items[0].prepared) for _ in range(rounds))
    batches = fill_batches(items, token_budget=lambda: settings.token_budget, way=lambda: "shared")
    passes = {WITHOUT: 0.0, WITH: 0.0}
    states: dict[Poolings, list[States]] = {WITHOUT: [], WITH: []}
    for batch in batches:
        prepared = [item.prepared for item in batch]
        times: dict[Poolings, list[float]] = {WITHOUT: [], WITH: []}
        for poolings in passes:
            states[poolings].append(run_batch(vlm, prepared, poolings))  # and warm up
        for _ in range(rounds):
            for poolings in passes:
                times[poolings].append(seconds_of(run_batch, vlm, prepared, poolings))
        for poolings in passes:
            passes[poolings] += min(times[poolings])
    writing = {}
    for poolings, of_batches in states.items():
        joined = {
            TensorKey.of(name): np.concatenate([of_batch[name].numpy() for of_batch in of_batches])
            for name in of_batches[0]
        }
        shard_set = ShardSet.create(
            open_folder(f"data/activations/random/{len(poolings)}", home),
            rows,
            contents=[Content("lm", pooling) for pooling in poolings],
            shard_images=len(rows),
        )
        writing[poolings] = min(seconds_of(shard_set.write_shard, 0, joined) for _ in range(rounds))
    return Seconds(preparing, head, passes, writing)


def run_batch(vlm: Vlm, prepared: Sequence[PreparedImage], poolings: Poolings) -> States:
    """Run and pool a batch, and wait until its states are on the host."""
    on_host = copy_to_host(run_pooled(vlm, prepared, poolings=poolings, way="shared"))
    vlm.record_sync_point()()
    return on_host


def seconds_of(function: Callable[..., object], *arguments: object) -> float:
    """Call a function, and return how long it takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def compare_with_whole_models(names: list[str]) -> dict[str, float | str]:
    """The largest difference of logits by architecture, or why there are none."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (100, 120, 3), np.uint8))
    differences: dict[str, float | str] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            vlm = load_vlm(
                str(save_checkpoint(name, Path(folder) / name)), device="cpu", with_head=True
            )
            prepared = vlm.prompt_processor.prepare(image, ["Is there a dog?"])
            head = take_answer_head(vlm, ["yes", "no"], prepared)
        differences[name] = head.refusal or head.largest_error
    return differences


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-qwen2-vl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="60 images, one round, 2 models")
    parser.add_argument("--no-logits", action="store_true", help="leave out the architectures")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    images = 60 if options.quick else options.images
    rounds = 1 if options.quick else options.rounds
    names = list(RECIPES)[:2] if options.quick else list(RECIPES)
    if options.no_logits:
        names = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        examples = build_scene_examples(
            root, images, held_out=images // 4, seed=0, tasks=("caption", "object")
        )
        vlm, checkpoint = load_with_head(
            options.model, root, dtype=options.dtype, device=options.device
        )
        seconds = time_parts(vlm, checkpoint, examples, root, rounds=rounds)
        activations = extract_with(vlm, checkpoint, examples, root / "whole")
        started = time.perf_counter()
        read_answers(activations, task_infos(examples))
        read_seconds = time.perf_counter() - started
        no_probes = ProbeResults(metrics=pd.DataFrame(), losses=pd.DataFrame())
        started = time.perf_counter()
        score_answers(activations, no_probes, resamples=2000, seed=0)
        score_seconds = time.perf_counter() - started
    differences = compare_with_whole_models(names)
    result = {
        "model": options.model,
        "images": images,
        "examples": len(examples),
        "preparing_s": seconds.preparing,
        "head_s": seconds.head,
        "passes_s": {"without": seconds.passes[WITHOUT], "with": seconds.passes[WITH]},
        "writing_s": {"without": seconds.writing[WITHOUT], "with": seconds.writing[WITH]},
        "with_over_without": seconds.ratio,
        "read_seconds": read_seconds,
        "read_and_score_seconds": score_seconds,
        "logit_differences": differences,
    }
    print(
        f"{len(examples)} examples of {images} scenes, {options.model} on {options.device}: "
        f"extraction with answers takes {seconds.ratio:.3f} times as long as without\n"
        f"images {seconds.preparing:.2f} s; head {seconds.head:.2f} s; passes "
        f"{seconds.passes[WITHOUT]:.2f} and {seconds.passes[WITH]:.2f} s; writing "
        f"{seconds.writing[WITHOUT]:.2f} and {seconds.writing[WITH]:.2f} s\n"
        f"answers and lenses read in {read_seconds:.2f} s, read and scored in {score_seconds:.2f} s"
    )
    for name, difference in differences.items():
        print(f"{name:24} {difference if isinstance(difference, str) else f'{difference:.1e}'}")
    save_json(options.json, result)


if __name__ == "__main__":
    main()
