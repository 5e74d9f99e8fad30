"""What answers cost, and how near they are to the whole model's.

    python benchmarks/answers.py [--images 600] [--rounds 5] [--quick] [--json PATH]

Extraction with and without answers, in turn, of drawn scenes with a demo model: everything from
loading to the last shard. Then the time to read answers and both lenses off the store, and to score
them. Last, for every architecture that the tests have a tiny random model of, the largest
difference of the answers' logits from those of transformers' whole model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from measuring import build_scene_examples, save_json
from PIL import Image
from transformers.utils import logging

from probekit.answers.reading import read_answers
from probekit.answers.scores import score_answers
from probekit.extraction.extracting import extract_tables
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.store import Activations
from probekit.models.load import load_vlm
from probekit.models.output_head import take_answer_head
from probekit.paths import Home
from probekit.probes.results import ProbeResults
from probekit.tasks.base import task_infos
from tests.support.architectures import RECIPES, save_checkpoint

MODEL = "tiny-qwen2-vl"


def time_extraction(
    examples: pd.DataFrame, *, rounds: int
) -> tuple[dict[str, list[float]], Activations]:
    """Seconds of each extraction with and without answers, in turn; the last one with answers."""
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name, answers in (("without", False), ("with", True)):
            home = Home.find(Path(tempfile.mkdtemp()))
            started = time.perf_counter()
            activations = extract_tables(
                ExtractionSettings(MODEL, answers=answers),
                {"none": examples},
                device="cpu",
                home=home,
            )
            seconds[name].append(time.perf_counter() - started)
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
        examples = build_scene_examples(
            Path(folder), images, held_out=images // 4, seed=0, tasks=("caption", "object")
        )
        seconds, activations = time_extraction(examples, rounds=rounds)
        # Whatever else runs on the machine only adds to a time.
        shortest = {name: min(times) for name, times in seconds.items()}
        started = time.perf_counter()
        read_answers(activations, task_infos(examples))
        read_seconds = time.perf_counter() - started
        no_probes = ProbeResults(metrics=pd.DataFrame(), losses=pd.DataFrame())
        started = time.perf_counter()
        score_answers(activations, no_probes, resamples=2000, seed=0)
        score_seconds = time.perf_counter() - started
    differences = compare_with_whole_models(names)
    result = {
        "images": images,
        "examples": len(examples),
        "extraction_seconds": seconds,
        "with_over_without": shortest["with"] / shortest["without"],
        "read_seconds": read_seconds,
        "read_and_score_seconds": score_seconds,
        "logit_differences": differences,
    }
    print(
        f"{len(examples)} examples of {images} scenes, {MODEL}: extraction "
        f"{shortest['without']:.2f} s, with answers {shortest['with']:.2f} s "
        f"({result['with_over_without']:.3f} times)\n"
        f"answers and lenses read in {read_seconds:.2f} s, read and scored in {score_seconds:.2f} s"
    )
    for name, difference in differences.items():
        print(f"{name:24} {difference if isinstance(difference, str) else f'{difference:.1e}'}")
    save_json(options.json, result)


if __name__ == "__main__":
    main()
