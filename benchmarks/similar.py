"""Similar wrong captions for all of COCO: minutes and memory.

    python benchmarks/similar.py [--images 118287] [--captions 5] [--json PATH]

Captions are simulated at COCO's size: ten words each, drawn from a vocabulary of 25,000 with the frequencies of a
natural text (Zipf's law), half of an image's words shared by its captions. Each image gets the most similar caption of
another one, for every one of its captions, as the task `caption_similar` deals them out.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from probekit.tasks import similar_captions


def simulated(images: int, each: int, rng: np.random.Generator) -> list[list[str]]:
    rank = np.arange(1, 25_001)
    words = np.array([f"w{k}" for k in rank])
    p = 1 / (rank + 2.7)
    drawn = rng.choice(words, size=(images, 5 + 5 * each), p=p / p.sum())
    return [[" ".join([*row[:5], *row[5 + 5 * k : 10 + 5 * k]]) for k in range(each)] for row in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    own = simulated(options.images, options.captions, rng)
    right, owner = [text for said in own for text in said], [said for said in own for _ in said]
    start = time.perf_counter()
    given = similar_captions.similar(right, owner, rng)
    minutes = (time.perf_counter() - start) / 60
    kept = np.flatnonzero(given >= 0)
    assert sorted(given[kept]) == kept.tolist()
    told = {"captions": len(right), "left_out": round(1 - len(kept) / len(right), 4), "minutes": round(minutes, 1),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)}
    print(told)
    if options.json:
        options.json.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
