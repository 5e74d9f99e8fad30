"""Data sets in other common forms than COCO's, read into the same tables.

COCO
    ``annotations/captions_<split>.json`` and ``instances_<split>.json``, see :mod:`probekit.coco`
Hugging Face's image folder
    ``metadata.csv`` or ``metadata.jsonl`` beside the images, or in a folder for each split, with `file_name` and one of
    `text`, `caption`, `captions`
Flickr30k, Flickr8k
    one table of captions (``*.csv``, ``*.txt``, ``*.token``) beside a folder of images: `image, caption`, or
    `image_name| comment_number| comment`, or the lines ``1000092795.jpg#0<tab>Two young men ...``
images alone
    for statements about them, see :mod:`probekit.statements`

All but COCO's have no instances: caption tasks and statements run on them, and categories as captions name them
(`labels_from: captions`, with `categories` named).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from PIL import Image

from probekit import coco

PHOTOS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"))
IMAGE_COLUMNS = ("file_name", "image", "image_name", "filename")
CAPTION_COLUMNS = ("captions", "caption", "text", "comment", "raw")
LAYOUTS = ("annotations/captions_<split>.json (COCO), metadata.csv or metadata.jsonl with file_name and caption "
           "(Hugging Face image folder), one CSV of image and caption beside the images (Flickr30k), or images alone")


def read(folder: str | Path, splits: Sequence[str] | None = None) -> coco.Coco:
    """Read a data set in any of the forms above.

    Parameters
    ----------
    splits : COCO's splits, or names of the folders that images lie in; None takes all

    Raises
    ------
    FileNotFoundError, ValueError
        No such folder or split, nothing in it that is known, a table without the columns; the message names the mend.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"the dataset {folder} does not exist: name a folder with {LAYOUTS}")
    if coco.splits_of(folder):
        return coco.read(folder, list(splits or []) or None)
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTOS)
    if not pictures:
        raise FileNotFoundError(f"{folder} holds no images: expected {LAYOUTS}")
    images = pd.DataFrame({"coco_split": [str(p.parent.relative_to(folder)) for p in pictures],
                           "file": [str(p) for p in pictures]}, index=pd.RangeIndex(len(pictures), name="image_id"))
    unknown = sorted(set(splits or ()) - set(images.coco_split))
    if unknown:
        raise ValueError(f"{folder} has no folders {unknown}: take out of {sorted(set(images.coco_split))}")
    images = images[images.coco_split.isin(list(splits))] if splits else images
    sizes = [_size(file) for file in images.file]
    images = images.assign(width=[w for w, _ in sizes], height=[h for _, h in sizes])
    nothing = pd.DataFrame(columns=["image_id", "category", "x", "y", "w", "h", "area", "iscrowd", "colour"])
    return coco.Coco(images, _captions(folder, images), nothing, ())


def _size(file: str) -> tuple[int, int]:
    """Width and height in pixels; 0, 0 of what is no image, which is found when images are checked."""
    try:
        with Image.open(file, formats=coco.FORMATS) as image:
            return image.size
    except Exception:  # as in coco.load_rgb
        return 0, 0


def _captions(folder: Path, images: pd.DataFrame) -> pd.DataFrame:
    """`image_id`, `caption`; empty where no table is there."""
    numbers = {str(Path(file)): image for image, file in images.file.items()}
    by_name = {Path(file).name: image for image, file in images.file.items()}
    metadata = sorted([*folder.rglob("metadata.csv"), *folder.rglob("metadata.jsonl")])
    tables = metadata or [p for p in sorted(folder.iterdir()) if p.suffix in (".csv", ".txt", ".token", ".jsonl")]
    found, named = [], False
    for path in tables:
        names, texts = _table(path)
        named |= bool(names)
        for name, text in zip(names, texts, strict=True):
            image = numbers.get(str(path.parent / name)) if metadata else by_name.get(Path(name).name)
            if image is not None:
                found += [(image, str(one)) for one in (text if isinstance(text, list) else [text]) if str(one).strip()]
        if not metadata and found:
            break
    if named and not found:
        raise ValueError(f"{tables[0]} names none of the {len(images):,} images in {folder}: file names must be "
                         "the same")
    return pd.DataFrame(found, columns=["image_id", "caption"])


def _table(path: Path) -> tuple[list[str], list]:
    """File names and captions of a table of captions."""
    if path.suffix == ".jsonl":
        table = pd.read_json(path, lines=True, dtype=False)
    else:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
        separator = next((mark for mark in ("|", "\t") if mark in first), ",")
        headed = "#0" not in first
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, skipinitialspace=True,
                            header=0 if headed else None, names=None if headed else ["image", "caption"],
                            quoting=csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE)
        table.columns = [str(name).strip() for name in table.columns]
    if "label" in table.columns:
        return [], []  # statements, right or wrong
    image = next((name for name in IMAGE_COLUMNS if name in table.columns), None)
    caption = next((name for name in CAPTION_COLUMNS if name in table.columns), None)
    if image is None or caption is None:
        raise ValueError(f"{path} has the columns {', '.join(map(str, table.columns))}: one of "
                         f"{', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)} are needed")
    texts = [_listed(text) for text in table[caption]]
    return [str(name).partition("#")[0].strip() for name in table[image]], texts


def _listed(text: object) -> object:
    """Several captions may stand in one field, as a JSON list."""
    if isinstance(text, str) and text.startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text
