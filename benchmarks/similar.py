"""Similar captions for all of COCO: minutes, memory, and how similar they are.

    python benchmarks/similar.py [--images 118287] [--captions 5] [--json PATH]

Captions are simulated at COCO's size: ten words each, drawn from a vocabulary of 25,000 with the
frequencies of a natural text (Zipf's law); half of an image's words are shared by its captions.
Each caption is exchanged for the most similar one of another image, as in the task
`caption_similar`. `cosine` is the mean similarity of what is exchanged.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from measuring import high_water_mb, save_json
from sklearn.feature_extraction.text import TfidfVectorizer

from probekit.tasks.similar_captions import assign_similar

VOCABULARY = 25_000
SHARED_WORDS = 5
OTHER_WORDS = 5


def simulate_captions(images: int, each: int, rng: np.random.Generator) -> dict[int, list[str]]:
    """The captions of each image."""
    rank = np.arange(1, VOCABULARY + 1)
    words = np.array([f"w{number}" for number in rank])
    chance = 1 / (rank + 2.7)
    drawn = rng.choice(
        words, size=(images, SHARED_WORDS + OTHER_WORDS * each), p=chance / chance.sum()
    )
    captions_by_image = {}
    for image, image_words in enumerate(drawn):
        shared = image_words[:SHARED_WORDS]
        others = np.split(image_words[SHARED_WORDS:], each)
        captions_by_image[image] = [" ".join([*shared, *words_of_one]) for words_of_one in others]
    return captions_by_image


def mean_cosine(captions: list[str], assigned: np.ndarray) -> float:
    """How similar captions are to what they were exchanged for."""
    vectors = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(captions)
    kept = np.flatnonzero(assigned >= 0)
    return float(vectors[kept].multiply(vectors[assigned[kept]]).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    captions_by_image = simulate_captions(options.images, options.captions, rng)
    captions = []
    owners = []
    for image, image_captions in captions_by_image.items():
        captions += image_captions
        owners += [image] * len(image_captions)
    start = time.perf_counter()
    start_cpu = time.process_time()
    assigned = assign_similar(captions, owners, captions_by_image=captions_by_image, rng=rng)
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - start_cpu
    peak_mb = high_water_mb()
    kept = np.flatnonzero(assigned >= 0)
    assert sorted(assigned[kept]) == kept.tolist()
    result = {
        "captions": len(captions),
        "left_out": round(1 - len(kept) / len(captions), 4),
        "cosine": round(mean_cosine(captions, assigned), 3),
        "minutes": round(seconds / 60, 2),
        "cpu_minutes": round(cpu_seconds / 60, 2),
        "peak_mb": round(peak_mb),
    }
    print(result)
    save_json(options.json, result)


if __name__ == "__main__":
    main()
