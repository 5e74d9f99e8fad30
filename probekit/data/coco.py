"""MS COCO in its official folder layout, as tables; drawn scenes come in the same layout.

    <folder>/<split>/*.jpg
    <folder>/annotations/captions_<split>.json
    <folder>/annotations/instances_<split>.json
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

LAYOUT = "expected <split>/*.jpg with annotations/captions_<split>.json and annotations/instances_<split>.json"
from probekit.data.dataset import Dataset


def split_names(folder: Path) -> list[str]:
    """Names of the splits that `folder` holds captions for."""
    return sorted(p.stem.removeprefix("captions_") for p in (folder / "annotations").glob("captions_*.json"))


@contextlib.contextmanager
def _annotations(path: Path) -> Iterator[dict]:
    """What an annotation file holds, but for the outlines; what is amiss while it is looked at is the file's fault."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {LAYOUT}")
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=_without_outline)
        yield content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a readable COCO annotation file ({reason}): download it again") from error


def _without_outline(found: dict) -> dict:
    """Outlines are most of a file of instances, and nothing here asks for them: let go while it is read."""
    found.pop("segmentation", None)
    return found


def read_coco(folder: str | Path, splits: list[str] | None = None) -> Dataset:
    """Read annotations of one or several splits; images are looked at later, and only those that are used.

    Parameters
    ----------
    folder : the COCO folder
    splits : names such as ``["train2017", "val2017"]``; None takes all that have captions

    Raises
    ------
    FileNotFoundError, ValueError
        A missing folder or annotation file, a broken JSON file, an image id that two splits share.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"COCO folder {folder} does not exist: {LAYOUT}")
    splits = list(splits or split_names(folder))
    if not splits:
        raise FileNotFoundError(f"no captions_<split>.json in {folder / 'annotations'}: {LAYOUT}")
    tables = [_read_split(folder, split) for split in splits]
    images, captions, instances = (pd.concat([t[i] for t in tables], ignore_index=True) for i in range(3))
    twice = images.image_id[images.image_id.duplicated()]
    if len(twice):
        raise ValueError(f"image id {twice.iloc[0]} is in more than one of the splits {splits}: name disjoint splits")
    return Dataset(images.set_index("image_id"), captions, instances, tables[0][3])


def _read_split(folder: Path, split: str) -> tuple:
    return (*_told(folder, split), *_found(folder / "annotations" / f"instances_{split}.json"))


def _told(folder: Path, split: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    with _annotations(folder / "annotations" / f"captions_{split}.json") as told:
        images = pd.DataFrame([
            (i["id"], split, str(_place(folder / split, i["file_name"])), i["width"], i["height"])
            for i in told["images"]
        ], columns=["image_id", "coco_split", "file", "width", "height"])
        twice = [file for file in images.file[images.file.duplicated()] if os.path.isfile(file)]
        if twice:
            raise ValueError(f"several images have the file {twice[0]}: give each a file of its own")
        captions = pd.DataFrame([(a["image_id"], a["caption"]) for a in told["annotations"]],
                                columns=["image_id", "caption"])
        return _checked(images), _checked(captions)


def _place(folder: Path, name: str) -> Path:
    """Where an image of a split lies: by its name, in folders of the split where it says so, and never outside."""
    inside = PurePosixPath(name)
    nested = len(inside.parts) > 1 and not inside.is_absolute() and ".." not in inside.parts
    return folder / (inside if nested and os.path.isfile(folder / inside) else Path(name).name)


def _found(path: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    with _annotations(path) as found:
        kinds = {c["id"]: c["name"] for c in sorted(found["categories"], key=lambda c: c["id"])}
        instances = pd.DataFrame([
            (a["image_id"], kinds[a["category_id"]], *a["bbox"], a["area"], a.get("iscrowd", 0),
             a.get("attributes", {}).get("colour"))
            for a in found["annotations"]
        ], columns=["image_id", "category", "x", "y", "w", "h", "area", "iscrowd", "colour"])
        names = _checked(pd.DataFrame({"category": [*kinds.values()]})).category
        return _checked(instances), tuple(names)


WHOLE, NUMBERS, TEXTS = ("image_id", "width", "height", "iscrowd"), ("x", "y", "w", "h", "area"), (
    "file", "caption", "category")


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """The table, where its columns hold what they should; halves of letters that JSON can spell become "?"."""
    for kinds, names, meant in ((int, WHOLE, "whole number"), ((int, float), NUMBERS, "number"), (str, TEXTS, "text")):
        for name in table.columns.intersection(names):
            fits = [isinstance(value, kinds) and not isinstance(value, bool) for value in table[name]]
            if kinds is not str and all(fits):
                fits = np.isfinite(table[name].astype(float)).to_list()
            if not all(fits):
                raise ValueError(f"{name} {table[name][fits.index(False)]!r} is no {meant}")
            if kinds is str:
                table[name] = [text.encode(errors="replace").decode() for text in table[name]]
    return table
