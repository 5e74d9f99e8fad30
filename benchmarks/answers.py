"""What answers cost, and how near they are to the whole model's.

    python benchmarks/answers.py [--model tiny-qwen2-vl] [--device cpu] [--dtype float32]
                                 [--images 600] [--rounds 5] [--quick] [--json PATH]

Extraction of drawn scenes with and without answers, in turn, by a model that is loaded beforehand:
everything from its check to the last shard. --model names a demo model, or qwen2-vl-2b or
fastvlm-0.5b for random weights of that size, see ``gpu.py``. Other work on the machine changes
single times by more than answers do, so the ratio is the median over the rounds.

Then the time to read answers and both lenses off the store, and to score them. Last, for every
architecture that the tests have a tiny random model of, the largest difference of the answers'
logits from those of transformers' whole model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from extract import extract_with
from gpu import MODELS, draw_weights, make_checkpoint
from measuring import build_scene_examples, save_json
from PIL import Image
from transformers.utils import logging

from probekit.answers.reading import read_answers
from probekit.answers.scores import score_answers
from probekit.extraction.store import Activations
from probekit.models.load import Vlm, load_vlm
from probekit.models.output_head import take_answer_head
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


def time_extraction(
    vlm: Vlm, checkpoint: str, examples: pd.DataFrame, root: Path, *, rounds: int
) -> tuple[dict[str, list[float]], Activations]:
    """Seconds of each extraction with and without answers, in turn; the last one with answers."""
    head = vlm.head
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    extract_with(vlm, checkpoint, examples.head(32), root / "warm-up")
    for turn in range(rounds):
        for name, answers in (("without", False), ("with", True)):
            vlm.head = head  # an extraction takes what it needs, and drops the rest
            home = root / f"{turn}-{name}"
            started = time.perf_counter()
            activations = extract_with(vlm, checkpoint, examples, home, answers=answers)
            seconds[name].append(time.perf_counter() - started)
    vlm.release()
    return seconds, activations


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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    images = 60 if options.quick else options.images
    rounds = 1 if options.quick else options.rounds
    names = list(RECIPES)[:2] if options.quick else list(RECIPES)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        examples = build_scene_examples(
            root, images, held_out=images // 4, seed=0, tasks=("caption", "object")
        )
        vlm, checkpoint = load_with_head(
            options.model, root, dtype=options.dtype, device=options.device
        )
        seconds, activations = time_extraction(vlm, checkpoint, examples, root, rounds=rounds)
        started = time.perf_counter()
        read_answers(activations, task_infos(examples))
        read_seconds = time.perf_counter() - started
        no_probes = ProbeResults(metrics=pd.DataFrame(), losses=pd.DataFrame())
        started = time.perf_counter()
        score_answers(activations, no_probes, resamples=2000, seed=0)
        score_seconds = time.perf_counter() - started
    ratios = np.divide(seconds["with"], seconds["without"])
    differences = compare_with_whole_models(names)
    result = {
        "model": options.model,
        "images": images,
        "examples": len(examples),
        "extraction_seconds": seconds,
        "with_over_without": float(np.median(ratios)),
        "read_seconds": read_seconds,
        "read_and_score_seconds": score_seconds,
        "logit_differences": differences,
    }
    print(
        f"{len(examples)} examples of {images} scenes, {options.model} on {options.device}: "
        f"extraction {np.median(seconds['without']):.2f} s, with answers "
        f"{np.median(seconds['with']):.2f} s; ratio {result['with_over_without']:.3f} "
        f"({ratios.min():.3f} to {ratios.max():.3f} in {rounds} rounds)\n"
        f"answers and lenses read in {read_seconds:.2f} s, read and scored in {score_seconds:.2f} s"
    )
    for name, difference in differences.items():
        print(f"{name:24} {difference if isinstance(difference, str) else f'{difference:.1e}'}")
    save_json(options.json, result)


if __name__ == "__main__":
    main()
