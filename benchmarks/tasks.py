"""What every task makes of a dataset: rows and images by split, seconds, memory; how far captions agree with instances.

    python benchmarks/tasks.py [--dataset data/coco] [--images 180 60 60] [--statements FILE ...] [--json PATH]

Each task is built alone, from the same images. No image is in two splits, or this fails. Of files of statements
(SugarCrepe's and POPE's JSON, CSV, JSONL) it is counted how many statements are about images of the dataset.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import pandas as pd

from probekit.data import layouts, statement_files
from probekit.tasks import building, registry
from probekit.tasks.base import BuildSettings


def counted(name: str, settings: dict, data, folder: Path) -> dict:
    """Rows by split and seconds of one task; why not, where a dataset has nothing to ask."""
    start = time.perf_counter()
    try:
        examples = building.build_examples(BuildSettings(tasks=(name,), **settings), folder, data)
    except ValueError as error:
        return {"task": name, "refused": str(error)}
    assert (examples.groupby("image_id").split.nunique() == 1).all(), f"{name}: an image is in two splits"
    return {"task": name, **examples.split.value_counts().to_dict(), "images": examples.image_id.nunique(),
            "seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("data/coco"))
    parser.add_argument("--images", type=int, nargs=3, default=(180, 60, 60), metavar=("TRAIN", "VALIDATION", "TEST"))
    parser.add_argument("--statements", type=Path, nargs="*", default=())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = layouts.read_dataset(options.dataset)
    settings = dict(zip(building.SPLITS, options.images, strict=True)) | {"folder": str(options.dataset)}
    with tempfile.TemporaryDirectory() as made:
        rows = [counted(name, settings, data, Path(made) / name) for name in registry.TASKS]
        words = [Path(made) / row["task"] / "caption_words.csv" for row in rows if "refused" not in row]
        agree = pd.read_csv(words[0], index_col="category").loc["all"].round(3).to_dict() if words else {}
    table = pd.DataFrame(rows).convert_dtypes().drop(columns="refused", errors="ignore")
    print(table.to_string(index=False, na_rep="-"))
    print(*[row["refused"] for row in rows if "refused" in row], sep="\n")
    print("first caption's words against instances:", agree)
    usable = {}
    for file in options.statements:
        every = statement_files.read_statements(file)
        about = statement_files.match_statements(every, data.images)
        usable[file.stem] = {"statements": len(every), "usable": len(about), "images": about.image_id.nunique()}
    if usable:
        print(pd.DataFrame(usable).T.to_string())
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    print(f"peak memory: {peak} GB")
    if options.json:
        options.json.write_text(json.dumps({"tasks": rows, "agreement": agree, "statements": usable, "peak_gb": peak}))


if __name__ == "__main__":
    main()
