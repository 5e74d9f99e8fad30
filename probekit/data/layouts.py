"""Datasets in COCO's layout and in other common ones, read into the same tables.

COCO
    ``annotations/captions_<split>.json`` and ``instances_<split>.json``, see
    :mod:`probekit.data.coco`.
Image folder of Hugging Face
    ``metadata.csv`` or ``metadata.jsonl`` beside the images, or in a folder per split, with
    ``file_name`` and one of ``text``, ``caption``, ``captions``.
Flickr30k, Flickr8k
    One table of captions (``*.csv``, ``*.jsonl``, ``*.txt``, ``*.token``) beside a folder of
    images: ``image, caption``, or ``image_name| comment_number| comment``, or lines such as
    ``1000092795.jpg#0<tab>Two young men ...``. Images are named by their file name, or by the end
    of their path where several have that name. Other tables and texts beside it are ignored.
Images alone
    For statements about them, see :mod:`probekit.data.statement_files`.

Only COCO's layout has instances. The others support caption tasks, statements, and categories as
captions name them (``labels_from: captions``, with ``categories`` named).
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Hashable, Sequence
from pathlib import Path

import pandas as pd
from PIL import Image

from probekit.data import coco
from probekit.data.dataset import Dataset
from probekit.data.statement_files import STATEMENT_COLUMNS, ImageFinder, parse_table
from probekit.images import IMAGE_FORMATS

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"))
TABLE_SUFFIXES = (".csv", ".txt", ".token", ".jsonl")
IMAGE_COLUMNS = ("file_name", "image", "image_name", "filename")
CAPTION_COLUMNS = ("captions", "caption", "text", "comment", "raw")
LAYOUTS = (
    "annotations/captions_<split>.json (COCO), metadata.csv or metadata.jsonl with file_name and "
    "caption (Hugging Face image folder), one CSV of image and caption beside the images "
    "(Flickr30k), or images alone"
)


def read_dataset(folder: str | Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read a dataset in any of the layouts above.

    Parameters
    ----------
    folder : str or Path
        The folder of the dataset.
    splits : sequence of str, optional
        COCO's splits, or names of the folders that images lie in; by default all.

    Returns
    -------
    Dataset
        Without instances and categories, except in COCO's layout. An image that cannot be opened
        has width and height 0.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or it holds no images.
    ValueError
        There is no such split, or a table cannot be read or names no image. The message names the
        fix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the dataset {folder} does not exist: name a folder with {LAYOUTS}"
        )
    if coco.split_names(folder):
        return coco.read_coco(folder, list(splits or ()))
    files = _image_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} holds no images: expected {LAYOUTS}")
    images = pd.DataFrame(
        {
            "coco_split": [str(file.parent.relative_to(folder)) for file in files],
            "file": [str(file) for file in files],
        },
        index=pd.RangeIndex(len(files), name="image_id"),
    )
    existing = sorted(set(images.coco_split))
    unknown = sorted(set(splits or ()) - set(existing))
    if unknown:
        raise ValueError(
            f"{folder} has no COCO annotations and no folders {', '.join(unknown)}: put COCO there "
            f"as data/README.md says, or choose coco_splits from {', '.join(existing)}"
        )
    # Read for all images: a name that an image of another split has, too, is ambiguous.
    captions = _read_captions(folder, images)
    if splits:
        images = images[images.coco_split.isin(list(splits))]
        captions = captions[captions.image_id.isin(images.index)].reset_index(drop=True)
    sizes = [_image_size(file) for file in images.file]
    images = images.assign(
        width=[width for width, _ in sizes], height=[height for _, height in sizes]
    )
    return Dataset(images, captions, pd.DataFrame(columns=coco.INSTANCE_COLUMNS), ())


def dataset_state(folder: str | Path, splits: Sequence[str] | None = None) -> list:
    """Return what a dataset is on disk now, without reading it; two equal states read the same.

    Parameters
    ----------
    folder : str or Path
        The folder of the dataset.
    splits : sequence of str, optional
        As for :func:`read_dataset`.

    Returns
    -------
    list
        Empty if there is no such folder; else name, size in bytes and time in ns of each file of
        annotations or captions, and the names of the images (none in COCO's layout, where the
        annotations list them).
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    coco_splits = coco.split_names(folder)
    if coco_splits:
        tables = [
            folder / "annotations" / f"{kind}_{split}.json"
            for split in splits or coco_splits
            for kind in ("captions", "instances")
        ]
        image_names = []
    else:
        tables, _ = _caption_tables(folder)
        image_names = [str(file.relative_to(folder)) for file in _image_files(folder)]
    table_states = []
    for table in tables:
        if table.exists():
            stat = table.stat()
            table_states.append((str(table.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return [table_states, image_names]


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def _image_size(file: str) -> tuple[int, int]:
    """Return width and height in pixels; 0, 0 of a broken image, which is reported when decoded."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return image.size
    except Exception:  # a decoder raises more than OSError on a broken file
        return 0, 0


# --------------------------------------------------------------------------------------- captions


def _caption_tables(folder: Path) -> tuple[list[Path], bool]:
    """Return the tables that may hold captions, and whether they are those of an image folder."""
    metadata = sorted([*folder.rglob("metadata.csv"), *folder.rglob("metadata.jsonl")])
    if metadata:
        return metadata, True
    return sorted(path for path in folder.iterdir() if path.suffix in TABLE_SUFFIXES), False


def _read_captions(folder: Path, images: pd.DataFrame) -> pd.DataFrame:
    """Return ``image_id``, ``caption``; empty if the folder has no tables of captions."""
    tables, is_image_folder = _caption_tables(folder)
    image_of_path = {str(Path(file)): image_id for image_id, file in images.file.items()}
    finder = ImageFinder(images)
    captions: list[tuple[Hashable, str]] = []
    unreadable: list[ValueError] = []
    example = None  # a table with captions, and the first image that it names
    for table in tables:
        try:
            rows = _caption_rows(table)
        except ValueError as error:  # perhaps a README beside the table that has the captions
            unreadable.append(error)
            continue
        if rows and example is None:
            example = (table, rows[0][0])
        for name, caption in rows:
            if is_image_folder:
                image_id = image_of_path.get(str(table.parent / name))
            else:
                image_id = _find_image(finder, name, table)
            if image_id is not None:
                captions.append((image_id, caption))
        if captions and not is_image_folder:
            break
    if unreadable and (is_image_folder or len(unreadable) == len(tables)):
        raise unreadable[0]
    if example and not captions:
        table, name = example
        raise ValueError(
            f"{table} names none of the {len(images):,} images in {folder} ({name}, ...): file "
            "names must be the same, and folders before them, too"
        )
    return pd.DataFrame(captions, columns=["image_id", "caption"])


def _find_image(finder: ImageFinder, name: str, table: Path) -> Hashable | None:
    try:
        return finder.find(name)
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from None


def _caption_rows(path: Path) -> list[tuple[str, str]]:
    """Return pairs of file name and caption; none if the table has statements or classes.

    Raises
    ------
    ValueError
        The table cannot be read, or lacks the columns.
    """
    table = _parse_caption_table(path)
    image_column = _first_column(table, IMAGE_COLUMNS)
    caption_column = _first_column(table, CAPTION_COLUMNS)
    has_statements = set(STATEMENT_COLUMNS) <= set(table.columns) and image_column != "file_name"
    has_classes = caption_column is None and "label" in table.columns
    if has_statements or has_classes:
        return []
    if image_column is None or caption_column is None:
        raise ValueError(
            f"{path} has the columns {', '.join(map(str, table.columns))}: it needs one of "
            f"{', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}; if it is no "
            "table of captions, put it elsewhere"
        )
    rows = []
    for name, field in zip(table[image_column], table[caption_column], strict=True):
        if isinstance(name, str):
            file_name = name.partition("#")[0].strip()
            rows += [(file_name, caption) for caption in _captions_in(field)]
    return rows


def _first_column(table: pd.DataFrame, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in table.columns), None)


def _parse_caption_table(path: Path) -> pd.DataFrame:
    if path.suffix == ".jsonl":
        return parse_table(path)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first_line = file.readline()
    separator = next((mark for mark in ("|", "\t") if mark in first_line), ",")
    has_header = "#0" not in first_line  # Flickr's lines begin with 1000092795.jpg#0
    table = parse_table(
        path,
        sep=separator,
        skipinitialspace=True,
        header=0 if has_header else None,
        names=None if has_header else ["image", "caption"],
        quoting=csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE,
    )
    return table.rename(columns=lambda name: str(name).strip())


def _captions_in(field: object) -> list[str]:
    """Return the captions in a field: one text, a list, or a JSON list of texts."""
    if isinstance(field, str) and field.startswith("["):
        with contextlib.suppress(ValueError):  # else it is a caption that begins with a bracket
            field = json.loads(field)
    texts = field if isinstance(field, list) else [field]
    return [text for text in texts if isinstance(text, str) and text.strip()]
