"""What each task makes of a dataset: examples and images by split, seconds, memory.

    python benchmarks/tasks.py [--dataset data/coco] [--images 180 60 60] [--statements FILE ...]
                               [--json PATH]

Each task is built alone, from the same images. It fails if an image is in two splits. `agreement`
is how far the words of first captions agree with the instances. Of each file of statements
(SugarCrepe's and POPE's JSON, CSV, JSONL) it is counted how many are about images of the dataset.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd
from measuring import high_water_mb, save_json

from probekit.data.dataset import Dataset
from probekit.data.layouts import read_dataset
from probekit.data.report import ReadingReport
from probekit.data.statement_files import read_statements, usable_statements
from probekit.tasks.base import BuildSettings
from probekit.tasks.building import build_examples
from probekit.tasks.registry import TASKS


def build_task(settings: BuildSettings, dataset: Dataset, folder: Path) -> dict:
    """Examples by split and seconds of a task, or why the dataset has nothing to ask."""
    (name,) = settings.tasks
    start = time.perf_counter()
    try:
        examples = build_examples(settings, folder / name, dataset=dataset)
    except ValueError as error:
        return {"task": name, "refused": str(error)}
    seconds = time.perf_counter() - start
    split_counts = examples.groupby("image_id").split.nunique()
    assert (split_counts == 1).all(), f"{name}: an image is in two splits"
    return {
        "task": name,
        **examples.split.value_counts().to_dict(),
        "images": examples.image_id.nunique(),
        "seconds": round(seconds, 2),
    }


def read_agreement(rows: list[dict], folder: Path) -> dict:
    """How far captions agree with instances, from the first task that was built."""
    for row in rows:
        if "refused" not in row:
            table = pd.read_csv(folder / row["task"] / "caption_words.csv", index_col="category")
            return table.loc["all"].round(3).to_dict()
    return {}


def count_statements(file: Path, dataset: Dataset) -> dict:
    statements = read_statements(file)
    usable = usable_statements(file, dataset.images, ReadingReport())
    return {
        "statements": len(statements),
        "usable": len(usable),
        "images": usable.image_id.nunique(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, default=Path("data/coco"))
    parser.add_argument(
        "--images",
        type=int,
        nargs=3,
        default=(180, 60, 60),
        metavar=("TRAIN", "VALIDATION", "TEST"),
    )
    parser.add_argument("--statements", type=Path, nargs="*", default=())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dataset = read_dataset(options.dataset)
    train, validation, test = options.images
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in TASKS:
            settings = BuildSettings(
                str(options.dataset), train=train, validation=validation, test=test, tasks=(name,)
            )
            rows.append(build_task(settings, dataset, folder))
        agreement = read_agreement(rows, folder)
    table = pd.DataFrame(rows).convert_dtypes().drop(columns="refused", errors="ignore")
    print(table.to_string(index=False, na_rep="-"))
    for row in rows:
        if "refused" in row:
            print(row["refused"])
    print("words of first captions against instances:", agreement)
    statements = {file.stem: count_statements(file, dataset) for file in options.statements}
    if statements:
        print(pd.DataFrame(statements).T.to_string())
    peak_mb = round(high_water_mb())
    print(f"peak memory: {peak_mb} MB")
    result = {
        "tasks": rows,
        "agreement": agreement,
        "statements": statements,
        "peak_mb": peak_mb,
    }
    save_json(options.json, result)


if __name__ == "__main__":
    main()
