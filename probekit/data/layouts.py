"""Data sets in other common forms than COCO's, read into the same tables.

COCO
    ``annotations/captions_<split>.json`` and ``instances_<split>.json``, see :mod:`probekit.data.coco`
Hugging Face's image folder
    ``metadata.csv`` or ``metadata.jsonl`` beside the images, or in a folder for each split, with `file_name` and one of
    `text`, `caption`, `captions`
Flickr30k, Flickr8k
    one table of captions (``*.csv``, ``*.jsonl``, ``*.txt``, ``*.token``) beside a folder of images: `image, caption`,
    or `image_name| comment_number| comment`, or the lines ``1000092795.jpg#0<tab>Two young men ...``; images by their
    name, or by the end of their path where several have it. Other tables and texts beside it are passed over
images alone
    for statements about them, see :mod:`probekit.data.statement_files`

All but COCO's have no instances: caption tasks and statements run on them, and categories as captions name them
(`labels_from: captions`, with `categories` named).
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from PIL import Image

from probekit.data import coco, dataset, statement_files
from probekit.images import IMAGE_FORMATS

PHOTOS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"))
IMAGE_COLUMNS = ("file_name", "image", "image_name", "filename")
TABLES = (".csv", ".txt", ".token", ".jsonl")
CAPTION_COLUMNS = ("captions", "caption", "text", "comment", "raw")
LAYOUTS = ("annotations/captions_<split>.json (COCO), metadata.csv or metadata.jsonl with file_name and caption "
           "(Hugging Face image folder), one CSV of image and caption beside the images (Flickr30k), or images alone")


def read_dataset(folder: str | Path, splits: Sequence[str] | None = None) -> dataset.Dataset:
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
    if coco.split_names(folder):
        return coco.read_coco(folder, list(splits or []) or None)
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTOS)
    if not pictures:
        raise FileNotFoundError(f"{folder} holds no images: expected {LAYOUTS}")
    images = pd.DataFrame({"coco_split": [str(p.parent.relative_to(folder)) for p in pictures],
                           "file": [str(p) for p in pictures]}, index=pd.RangeIndex(len(pictures), name="image_id"))
    unknown = sorted(set(splits or ()) - set(images.coco_split))
    if unknown:
        raise ValueError(f"{folder} has no COCO annotations and no folders {', '.join(unknown)}: lay COCO out there as "
                         f"data/README.md says, or take coco_splits out of {', '.join(sorted(set(images.coco_split)))}")
    captions = _captions(folder, images)  # of all of them: a name that another split has, too, is no name for one
    images = images[images.coco_split.isin(list(splits))] if splits else images
    captions = captions[captions.image_id.isin(images.index)].reset_index(drop=True)
    sizes = [_size(file) for file in images.file]
    images = images.assign(width=[w for w, _ in sizes], height=[h for _, h in sizes])
    nothing = pd.DataFrame(columns=["image_id", "category", "x", "y", "w", "h", "area", "iscrowd", "colour"])
    return dataset.Dataset(images, captions, nothing, ())


def dataset_state(folder: str | Path, splits: Sequence[str] | None = None) -> list:
    """What :func:`read` would find now: name, size and time of the files of annotations or captions.

    Where it is the images that make up the data set, their names, too.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    if named := coco.split_names(folder):
        files = [folder / "annotations" / f"{kind}_{split}.json" for split in splits or named
                 for kind in ("captions", "instances")]
        pictures = []
    else:
        files, _ = _tables(folder)
        pictures = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in PHOTOS)
    found = [(str(file.relative_to(folder)), file.stat()) for file in files if file.exists()]
    return [[(name, there.st_size, there.st_mtime_ns) for name, there in found], pictures]


def _size(file: str) -> tuple[int, int]:
    """Width and height in pixels; 0, 0 of what is no image, which is found when images are checked."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return image.size
    except Exception:  # as in load_rgb
        return 0, 0


def _tables(folder: Path) -> tuple[list[Path], bool]:
    """Tables that may hold captions, and whether they are an image folder's, which names images from where it lies."""
    metadata = sorted([*folder.rglob("metadata.csv"), *folder.rglob("metadata.jsonl")])
    return metadata or sorted(path for path in folder.iterdir() if path.suffix in TABLES), bool(metadata)


def _captions(folder: Path, images: pd.DataFrame) -> pd.DataFrame:
    """`image_id`, `caption`; empty where no table is there, but those of statements."""
    numbers = {str(Path(file)): image for image, file in images.file.items()}
    tables, metadata = _tables(folder)
    find, found, named, others = statement_files.image_finder(images), [], [], []
    for path in tables:
        try:
            said = _said(path)
        except ValueError as error:
            others.append(error)  # a README, and the like, where another table has the captions
            continue
        for name, text in said:
            try:
                image = numbers.get(str(path.parent / name)) if metadata else find(name)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            if image is not None:
                found.append((image, text))
        named = named or [(path, name) for name, _ in said[:1]]
        if found and not metadata:
            break
    if others and (metadata or len(others) == len(tables)):
        raise others[0]
    if named and not found:
        path, name = named[0]
        raise ValueError(f"{path} names none of the {len(images):,} images in {folder} ({name}, ...): file names must "
                         "be the same, and folders before them, too")
    return pd.DataFrame(found, columns=["image_id", "caption"])


def _said(path: Path) -> list[tuple[str, str]]:
    """File names and captions of a table; none of statements, or of images' classes.

    Raises
    ------
    ValueError
        It cannot be read, or lacks the columns.
    """
    table = _table(path)
    image = next((name for name in IMAGE_COLUMNS if name in table.columns), None)
    caption = next((name for name in CAPTION_COLUMNS if name in table.columns), None)
    right_or_wrong = set(statement_files.COLUMNS) <= set(table.columns) and image != "file_name"
    if right_or_wrong or (caption is None and "label" in table.columns):
        return []
    if image is None or caption is None:
        raise ValueError(f"{path} has the columns {', '.join(map(str, table.columns))}: one of "
                         f"{', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)} are needed; if it is no "
                         "table of captions, put it elsewhere")
    return [(name.partition("#")[0].strip(), one) for name, text in zip(table[image], table[caption], strict=True)
            if isinstance(name, str) for one in _listed(text)]


def _table(path: Path) -> pd.DataFrame:
    if path.suffix == ".jsonl":
        return statement_files.parse_table(path)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    separator = next((mark for mark in ("|", "\t") if mark in first), ",")
    headed = "#0" not in first
    table = statement_files.parse_table(path, sep=separator, skipinitialspace=True, header=0 if headed else None,
                              names=None if headed else ["image", "caption"],
                              quoting=csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE)
    return table.rename(columns=lambda name: str(name).strip())


def _listed(text: object) -> list[str]:
    """The captions in a field: one, a list, or a JSON list of them; none of an empty field."""
    if isinstance(text, str) and text.startswith("["):
        with contextlib.suppress(ValueError):  # a caption that begins so
            text = json.loads(text)
    several = text if isinstance(text, list) else [text]
    return [one for one in several if isinstance(one, str) and one.strip()]
