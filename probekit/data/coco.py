"""MS COCO in its official folder layout, as tables; drawn scenes have the same layout.

::

    <folder>/<split>/*.jpg
    <folder>/annotations/captions_<split>.json
    <folder>/annotations/instances_<split>.json
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path, PurePosixPath

import pandas as pd

from probekit.data.dataset import Dataset

LAYOUT = (
    "expected <split>/*.jpg with annotations/captions_<split>.json and "
    "annotations/instances_<split>.json"
)
IMAGE_COLUMNS = ["image_id", "coco_split", "file", "width", "height"]
INSTANCE_COLUMNS = ["image_id", "category", "x", "y", "w", "h", "area", "iscrowd", "colour"]
INTEGER_COLUMNS = ("image_id", "width", "height", "iscrowd")
NUMBER_COLUMNS = ("x", "y", "w", "h", "area")
TEXT_COLUMNS = ("file", "caption", "category")


def split_names(folder: Path) -> list[str]:
    """Return the names of the splits that `folder` holds captions for, sorted."""
    files = (folder / "annotations").glob("captions_*.json")
    return sorted(file.stem.removeprefix("captions_") for file in files)


def read_coco(folder: str | Path, splits: list[str] | None = None) -> Dataset:
    """Read the annotations of one or several splits.

    Images are not opened: only those that are used are, later.

    Parameters
    ----------
    folder : str or Path
        The COCO folder.
    splits : list of str, optional
        Such as ``["train2017", "val2017"]``; by default all that have captions.

    Returns
    -------
    Dataset
        The splits joined. The categories are those of the first split.

    Raises
    ------
    FileNotFoundError
        The folder or an annotation file is missing.
    ValueError
        An annotation file is broken, two images of a split have the same file, or two splits have
        an image id in common.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"COCO folder {folder} does not exist: {LAYOUT}")
    splits = list(splits or split_names(folder))
    if not splits:
        raise FileNotFoundError(f"no captions_<split>.json in {folder / 'annotations'}: {LAYOUT}")
    parts = [_read_split(folder, split) for split in splits]
    images = pd.concat([part.images for part in parts])
    repeated = images.index[images.index.duplicated()]
    if len(repeated):
        raise ValueError(
            f"image id {repeated[0]} is in more than one of the splits {splits}: "
            "name splits without images in common"
        )
    return Dataset(
        images,
        pd.concat([part.captions for part in parts], ignore_index=True),
        pd.concat([part.instances for part in parts], ignore_index=True),
        parts[0].categories,
    )


def _read_split(folder: Path, split: str) -> Dataset:
    images, captions = _read_captions(folder, split)
    instances, categories = _read_instances(folder, split)
    return Dataset(images.set_index("image_id"), captions, instances, categories)


@contextlib.contextmanager
def _open_annotations(path: Path) -> Iterator[dict]:
    """Yield the content of an annotation file; an error in looking at it names the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {LAYOUT}")
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=_without_outline)
        yield content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is not a readable COCO annotation file ({reason}): download it again"
        ) from error


def _without_outline(annotation: dict) -> dict:
    # Nothing uses the outlines, and they are most of a file of instances.
    annotation.pop("segmentation", None)
    return annotation


def _read_captions(folder: Path, split: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    path = folder / "annotations" / f"captions_{split}.json"
    image_rows = []
    with _open_annotations(path) as content:
        for image in content["images"]:
            file = str(_image_path(folder / split, image["file_name"]))
            image_rows.append((image["id"], split, file, image["width"], image["height"]))
        caption_rows = [
            (annotation["image_id"], annotation["caption"]) for annotation in content["annotations"]
        ]
        images = _check_columns(pd.DataFrame(image_rows, columns=IMAGE_COLUMNS))
        captions = _check_columns(pd.DataFrame(caption_rows, columns=["image_id", "caption"]))
    for file in images.file[images.file.duplicated()]:
        if os.path.isfile(file):
            raise ValueError(
                f"{path}: several images have the file {file}: give each image a file of its own"
            )
    return images, captions


def _image_path(folder: Path, file_name: str) -> Path:
    """Return where an image of a split lies: never outside of the split's folder.

    Folders before the name count where the image lies in them; else the name alone counts.
    """
    inside = PurePosixPath(file_name)
    is_nested = len(inside.parts) > 1 and not inside.is_absolute() and ".." not in inside.parts
    if is_nested and os.path.isfile(folder / inside):
        return folder / inside
    return folder / Path(file_name).name


def _read_instances(folder: Path, split: str) -> tuple[pd.DataFrame, tuple[str, ...]]:
    rows = []
    with _open_annotations(folder / "annotations" / f"instances_{split}.json") as content:
        categories = sorted(content["categories"], key=itemgetter("id"))
        names = {category["id"]: category["name"] for category in categories}
        for annotation in content["annotations"]:
            image_id = annotation["image_id"]
            category = names[annotation["category_id"]]
            x, y, w, h = annotation["bbox"]
            is_crowd = annotation.get("iscrowd", 0)
            colour = annotation.get("attributes", {}).get("colour")
            rows.append((image_id, category, x, y, w, h, annotation["area"], is_crowd, colour))
        instances = _check_columns(pd.DataFrame(rows, columns=INSTANCE_COLUMNS))
        category_table = _check_columns(pd.DataFrame({"category": list(names.values())}))
    return instances, tuple(category_table.category)


def _check_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table if its columns hold what they should, with text that UTF-8 can hold.

    JSON can spell single halves of surrogate pairs; they become "?".
    """
    for name in table.columns.intersection(INTEGER_COLUMNS):
        is_valid = [isinstance(value, int) and _is_finite(value) for value in table[name]]
        _refuse_invalid(table[name], is_valid, "a whole number")
    for name in table.columns.intersection(NUMBER_COLUMNS):
        is_valid = [isinstance(value, (int, float)) and _is_finite(value) for value in table[name]]
        _refuse_invalid(table[name], is_valid, "a finite number")
    for name in table.columns.intersection(TEXT_COLUMNS):
        is_valid = [isinstance(value, str) for value in table[name]]
        _refuse_invalid(table[name], is_valid, "text")
        table[name] = [text.encode(errors="replace").decode() for text in table[name]]
    return table


def _is_finite(value: float) -> bool:
    # Not math.isfinite: JSON can spell integers that no float can hold.
    limit = sys.float_info.max
    return not isinstance(value, bool) and -limit <= value <= limit


def _refuse_invalid(column: pd.Series, is_valid: list[bool], kind: str) -> None:
    if not all(is_valid):
        value = column.tolist()[is_valid.index(False)]
        raise ValueError(f"{column.name} {value!r} is not {kind}")
