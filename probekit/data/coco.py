"""COCO annotations as tables, in the official layout and in those of common exporters.

::

    <folder>/annotations/captions_<split>.json     and images in <split>/, images/<split>/, images/
    <folder>/annotations/instances_<split>.json    either of the two is enough
    <folder>/<split>/_annotations.coco.json        Roboflow: beside the images
    <folder>/<any>.json                            one file with images and annotations

A file may have captions, boxes, or both. :mod:`probekit.data.coco_records` says what its records
may hold, and :mod:`probekit.data.boxes` what boxes may be. Drawn scenes have the official layout.
"""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from probekit.data.boxes import normalise_boxes
from probekit.data.coco_records import (
    CaptionRecord,
    CategoryRecord,
    ImageRecord,
    InstanceRecord,
    parse_caption,
    parse_category,
    parse_image,
    parse_instance,
    read_records,
)
from probekit.data.dataset import Dataset
from probekit.data.report import ReadingReport
from probekit.images import size_or_zero

LAYOUT = (
    "expected <split>/*.jpg with annotations/captions_<split>.json and "
    "annotations/instances_<split>.json"
)
INSTANCE_COLUMNS = ["image_id", "category", "x", "y", "w", "h", "area", "iscrowd", "colour"]
KINDS = ("captions", "instances")
ROBOFLOW_FILE = "_annotations.coco.json"
LISTED_ERRORS = 5


class AnnotationFile(NamedTuple):
    """A file of annotations and the kinds that are taken from it."""

    path: Path
    kinds: tuple[str, ...]


def find_annotations(folder: Path) -> dict[str, list[AnnotationFile]]:
    """Return the files of annotations in a folder by split, without reading those of the layout.

    Any JSON file in the folder or in ``annotations`` counts only where no file has the name of a
    layout, and where it holds images and annotations.
    """
    files: dict[str, list[AnnotationFile]] = {}
    for kind in KINDS:
        for path in sorted((folder / "annotations").glob(f"{kind}_*.json")):
            files.setdefault(path.stem.removeprefix(f"{kind}_"), []).append(
                AnnotationFile(path, (kind,))
            )
    for split, of_split in files.items():
        if len(of_split) == 1:  # what the other file would have may stand in this one
            files[split] = [AnnotationFile(of_split[0].path, KINDS)]
    if not files:
        for path in sorted(folder.glob(f"*/{ROBOFLOW_FILE}")):
            files[path.parent.name] = [AnnotationFile(path, KINDS)]
    if not files:
        for path in sorted([*folder.glob("annotations/*.json"), *folder.glob("*.json")]):
            if _is_coco(path):
                files[path.stem] = [AnnotationFile(path, KINDS)]
    return files


def split_names(folder: Path) -> list[str]:
    """Return the names of the splits that `folder` holds annotations for, sorted."""
    return sorted(find_annotations(folder))


def _is_coco(path: Path) -> bool:
    try:
        content = _load(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and all(
        isinstance(content.get(name), list) for name in ("images", "annotations")
    )


def read_coco(
    folder: str | Path,
    splits: Sequence[str] | None = None,
    *,
    max_bad: float = 1.0,
    with_outlines: bool = False,
) -> Dataset:
    """Read the annotations of one or several splits.

    Images are not opened, except those whose size no annotation states.

    Parameters
    ----------
    folder : str or Path
        The COCO folder.
    splits : sequence of str, optional
        Such as ``["train2017", "val2017"]``; by default all.
    max_bad : float
        Largest share of the records of a file that may be left out because they cannot be read.
    with_outlines : bool
        Whether `instances` have the column `outline`, see :class:`probekit.data.dataset.Dataset`.

    Returns
    -------
    Dataset
        The splits joined. The categories are those of the first split, then what others add.

    Raises
    ------
    FileNotFoundError
        The folder or a split is missing.
    ValueError
        An annotation file is broken, more than `max_bad` of its records cannot be read, two images
        of a split have the same file, or two splits have an image in common.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"COCO folder {folder} does not exist: {LAYOUT}")
    files = find_annotations(folder)
    if not files:
        raise FileNotFoundError(f"no captions_<split>.json in {folder / 'annotations'}: {LAYOUT}")
    names = [str(split) for split in splits or sorted(files)]
    missing = [name for name in names if name not in files]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no split {', '.join(missing)}: captions_{missing[0]}.json is missing in "
            f"its annotations; there are {', '.join(sorted(files))}"
        )
    report = ReadingReport()
    parts = [
        _SplitReader(
            folder,
            name,
            files[name],
            max_bad=max_bad,
            report=report,
            with_outlines=with_outlines,
        ).read()
        for name in names
    ]
    parts = _with_distinct_ids(_with_ids_of_one_type(parts), names, report=report)
    categories = _join_categories(parts, names, report=report)
    for line in report.lines():
        tqdm.write(line)
    return Dataset(
        pd.concat([part.images for part in parts]),
        pd.concat([part.captions for part in parts], ignore_index=True),
        pd.concat([part.instances for part in parts], ignore_index=True),
        categories,
        report.table(),
    )


def _load(path: Path, *, with_outlines: bool = False) -> Any:
    """Return the content of an annotation file in any encoding of JSON.

    Outlines are most of a file of instances, and building examples needs none of them.
    """
    hook = _with_short_outline if with_outlines else _without_outline
    return json.loads(path.read_bytes(), object_hook=hook)


def _without_outline(annotation: dict) -> dict:
    annotation.pop("segmentation", None)
    return annotation


def _with_short_outline(annotation: dict) -> dict:
    """Keep polygons as arrays, which take a tenth of the memory of lists; broken ones are None."""
    outline = annotation.get("segmentation")
    if isinstance(outline, list):
        try:
            polygons = [np.array(polygon, np.float32).reshape(-1, 2) for polygon in outline]
        except (TypeError, ValueError):
            polygons = []
        annotation["segmentation"] = polygons or None
    return annotation


class _SplitReader:
    """Reads the files of one split."""

    def __init__(
        self,
        folder: Path,
        split: str,
        files: Sequence[AnnotationFile],
        *,
        max_bad: float,
        report: ReadingReport,
        with_outlines: bool,
    ) -> None:
        self.folder = folder
        self.split = split
        self.files = files
        self.max_bad = max_bad
        self.with_outlines = with_outlines
        self.report = report
        self.image_files = _ImageFolders(folder, split, beside=files[0].path.parent)
        self.image_records: dict[Hashable, ImageRecord] = {}
        self.listed_ids: dict[Path, set[Hashable]] = {}
        self.captions: list[CaptionRecord] = []
        self.instances: list[InstanceRecord] = []
        self.instance_file = files[0].path
        self.categories: tuple[str, ...] = ()

    def read(self) -> Dataset:
        """Return the split as tables."""
        for path, kinds in self.files:
            self._read_file(path, kinds)
        self._check_that_files_belong_together()
        images = self._image_table()
        captions = self._of_listed_images(
            pd.DataFrame(self.captions, columns=CaptionRecord._fields), images, kind="captions"
        )
        instances = pd.DataFrame(self.instances, columns=[*INSTANCE_COLUMNS, "outline"])
        if not self.with_outlines:
            instances = instances.drop(columns="outline")
        instances = self._of_listed_images(instances, images, kind="instances")
        instances = normalise_boxes(
            instances, images, source=self._name(self.instance_file), report=self.report
        )
        return Dataset(
            images,
            captions.reset_index(drop=True),
            instances.reset_index(drop=True),
            self.categories,
        )

    def _check_that_files_belong_together(self) -> None:
        """Refuse a file of instances about other images than the file of captions is about."""
        if len(self.files) < 2:
            return
        of_captions, of_instances = (self.listed_ids[file.path] for file in self.files)
        of_instances = of_instances or {record.image_id for record in self.instances}
        if of_instances and of_captions.isdisjoint(of_instances):
            raise ValueError(
                f"none of the images of the instances in {self.files[1].path} is in "
                f"{self.files[0].path}: take the two files of the same split"
            )

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def _read_file(self, path: Path, kinds: tuple[str, ...]) -> None:
        content = self._open(path)
        self._add_images(path, self._parse(path, "images", content["images"], parse_image))
        records = content["annotations"]
        boxes = [one for one in records if _is_box(one, kinds)]
        captions = [one for one in records if _is_caption(one, kinds)]
        if "captions" in kinds and captions:
            parsed = self._parse(path, "captions", captions, parse_caption)
            without = [record for record in parsed if not record.caption]
            self._leave_out(path, "captions", without, reason="they have no words")
            self.captions += [record for record in parsed if record.caption]
        if "instances" in kinds and (boxes or "categories" in content):
            self.instance_file = path
            categories = self._read_categories(path, content)
            parse = partial(parse_instance, categories={one[0]: one[1] for one in categories})
            self.instances += self._parse(path, "instances", boxes, parse)
            self.categories = self._used_categories(path, categories)

    def _open(self, path: Path) -> dict[str, Any]:
        try:
            content = _load(path, with_outlines=self.with_outlines)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a readable COCO annotation file ({error}): it may have been cut "
                "off; write or fetch it again"
            ) from error
        if isinstance(content, dict) and self.image_records:
            # A file of instances need not list the images that the file of captions lists.
            content.setdefault("images", [])
        for name in ("images", "annotations"):
            if not isinstance(content, dict) or not isinstance(content.get(name), list):
                raise ValueError(
                    f"{path} is not a readable COCO annotation file (it has no list {name!r}): "
                    "name the file that has images and annotations"
                )
        return content

    def _parse(self, path: Path, kind: str, records: list, parse) -> list:
        """Return the records that can be read; too many others are an error."""
        rows, errors = read_records(records, parse)
        name = self._name(path)
        self.report.note(name, kind, outcome="read", count=len(records))
        if len(errors) > self.max_bad * len(records) or (errors and not rows):
            listed = "\n".join(f"  {error}" for error in errors[:LISTED_ERRORS])
            raise ValueError(
                f"{path} is not a readable COCO annotation file: {len(errors):,} of "
                f"{len(records):,} {kind} cannot be read, more than max_bad={self.max_bad:.1%}: "
                f"repair them or raise max_bad:\n{listed}"
            )
        if errors:
            self.report.note(
                name,
                kind,
                outcome="left out",
                count=len(errors),
                reason="they cannot be read",
                first=errors[0],
            )
        return rows

    def _leave_out(self, path: Path, kind: str, records: Sequence, *, reason: str) -> None:
        if records:
            self.report.note(
                self._name(path),
                kind,
                outcome="left out",
                count=len(records),
                reason=reason,
                first=f"that of image {records[0].image_id}",
            )

    def _add_images(self, path: Path, records: list[ImageRecord]) -> None:
        self.listed_ids[path] = {record.image_id for record in records}
        for record in records:
            earlier = self.image_records.setdefault(record.image_id, record)
            name = _last_part(record.file_name)
            if _last_part(earlier.file_name) != name:
                raise ValueError(
                    f"{path}: image {record.image_id} is {name}, and elsewhere in the split "
                    f"{self.split} it is {_last_part(earlier.file_name)}: give each image an id of "
                    "its own, the same in captions and instances"
                )

    def _read_categories(self, path: Path, content: dict) -> list[CategoryRecord]:
        records = content.get("categories")
        if not isinstance(records, list):
            raise ValueError(
                f"{path} is not a readable COCO annotation file (it has boxes and no list "
                "'categories'): add the categories with id and name"
            )
        categories = self._parse(path, "categories", records, parse_category)
        return sorted(categories, key=lambda one: (isinstance(one.category_id, str), one[0]))

    def _used_categories(self, path: Path, categories: list[CategoryRecord]) -> tuple[str, ...]:
        """Return the names, without a root above all others that no box belongs to."""
        used = {record.category for record in self.instances}
        above = {record.supercategory for record in categories}
        roots = [
            record.name
            for record in categories
            if record.name not in used
            and (record.supercategory == "none" or record.name in above)
            and len(categories) > 1
            and (self.instances or record.supercategory == "none")
        ]
        if roots and len(roots) < len(categories):
            self.report.note(
                self._name(path),
                "categories",
                outcome="left out",
                count=len(roots),
                reason="they stand above others, and no box belongs to them",
                first=roots[0],
            )
            categories = [record for record in categories if record.name not in roots]
        names = dict.fromkeys(record.name for record in categories)
        if len(names) < len(categories):
            self.report.note(
                self._name(path),
                "categories",
                outcome="corrected",
                count=len(categories) - len(names),
                reason="they have a name that another id has, too: both are one category",
            )
        return tuple(names)

    def _image_table(self) -> pd.DataFrame:
        records = list(self.image_records.values())
        files = [str(self.image_files.find(record.file_name)) for record in records]
        images = pd.DataFrame(
            {
                "coco_split": self.split,
                "file": files,
                "width": [record.width for record in records],
                "height": [record.height for record in records],
            },
            index=pd.Index([record.image_id for record in records], name="image_id"),
        )
        for file in images.file[images.file.duplicated()]:
            if os.path.isfile(file):
                raise ValueError(
                    f"{self.files[0].path}: several images have the file {file}: give each image a "
                    "file of its own"
                )
        return self._fill_sizes(images)

    def _fill_sizes(self, images: pd.DataFrame) -> pd.DataFrame:
        """Read the sizes that no annotation states from the files."""
        lacks = (images[["width", "height"]] == 0).any(axis=1)
        if not lacks.any():
            return images
        with ThreadPoolExecutor(4) as pool:
            sizes = list(pool.map(size_or_zero, images.file[lacks]))
        images.loc[lacks, ["width", "height"]] = sizes
        self.report.note(
            self._name(self.files[0].path),
            "images",
            outcome="corrected",
            count=int(lacks.sum()),
            reason="without width and height: those of the file are taken",
            first=images.file[lacks].iloc[0],
        )
        return images

    def _of_listed_images(
        self, annotations: pd.DataFrame, images: pd.DataFrame, *, kind: str
    ) -> pd.DataFrame:
        is_listed = annotations.image_id.isin(images.index)
        if not is_listed.all():
            others = annotations.image_id[~is_listed]
            self.report.note(
                self._name(self.files[0].path if kind == "captions" else self.instance_file),
                kind,
                outcome="left out",
                count=len(others),
                reason="their images are not listed",
                first=f"image {others.iloc[0]}",
            )
        return annotations[is_listed]


def _is_box(record: object, kinds: tuple[str, ...]) -> bool:
    """Tell whether an annotation is that of an object; one without either field is read as such."""
    if not isinstance(record, dict) or kinds == ("instances",):
        return "instances" in kinds and not _has_only("caption", record, other="bbox")
    return "bbox" in record or "category_id" in record


def _is_caption(record: object, kinds: tuple[str, ...]) -> bool:
    if not isinstance(record, dict) or kinds == ("captions",):
        return "captions" in kinds and not _has_only("bbox", record, other="caption")
    return "caption" in record or not _is_box(record, kinds)


def _has_only(field: str, record: object, *, other: str) -> bool:
    return isinstance(record, dict) and field in record and other not in record


def _last_part(file_name: str) -> str:
    return PurePosixPath(file_name.replace("\\", "/")).name


class _ImageFolders:
    """Finds the images of a split, in the folder that the layout has for them and never outside."""

    def __init__(self, folder: Path, split: str, *, beside: Path) -> None:
        by_split = [folder / split, folder / "images" / split]
        of_all = [beside, folder / "images", folder / "data", folder]
        existing = [path for path in by_split if path.is_dir()]
        self.folders = existing[:1] or [path for path in of_all if path.is_dir()]
        self.names = {path: set(os.listdir(path)) for path in self.folders}

    def find(self, file_name: str) -> Path:
        """Return where an image lies.

        Folders before its name count where it lies in them; else the name alone counts.
        """
        inside = PurePosixPath(file_name.replace("\\", "/"))
        is_nested = len(inside.parts) > 1 and not inside.is_absolute() and ".." not in inside.parts
        if is_nested:
            for folder in self.folders:
                if os.path.isfile(folder / inside):
                    return folder / inside
        for folder in self.folders:
            if inside.name in self.names[folder]:
                return folder / inside.name
        return self.folders[0] / inside.name


# --------------------------------------------------------------------------- several splits


def _with_ids_of_one_type(parts: list[Dataset]) -> list[Dataset]:
    """Return splits whose ids are numbers, or all text where one of them is."""
    ids = [image_id for part in parts for image_id in part.images.index]
    if not any(isinstance(image_id, str) for image_id in ids):
        return parts
    return [_map_ids(part, str) for part in parts]


def _map_ids(part: Dataset, change) -> Dataset:
    return Dataset(
        part.images.set_axis(part.images.index.map(change)).rename_axis("image_id"),
        part.captions.assign(image_id=part.captions.image_id.map(change)),
        part.instances.assign(image_id=part.instances.image_id.map(change)),
        part.categories,
    )


def _with_distinct_ids(
    parts: list[Dataset], names: list[str], *, report: ReadingReport
) -> list[Dataset]:
    """Return splits without ids in common: where they begin anew, those of later splits change.

    Raises
    ------
    ValueError
        Two splits have an image in common.
    """
    distinct: list[Dataset] = []
    for name, part in zip(names, parts, strict=True):
        earlier = pd.concat([one.images for one in distinct]) if distinct else part.images[:0]
        shared = part.images.index.intersection(earlier.index)
        for image_id in shared:
            if _are_one_image(part.images.file[image_id], earlier.file[image_id]):
                raise ValueError(
                    f"image id {image_id} is in more than one of the splits {names}: "
                    "name splits without images in common"
                )
        if len(shared):
            part = _map_ids(part, partial(_renumber, split=name, start=_next_id(earlier)))
            report.note(
                name,
                "images",
                outcome="corrected",
                count=len(part.images),
                reason="their ids begin anew in this split: they are numbered on",
            )
        distinct.append(part)
    return distinct


def _are_one_image(file: str, other: str) -> bool:
    """Tell whether two files hold the same image; of files that are not there, the names count."""
    if not (os.path.isfile(file) and os.path.isfile(other)):
        return Path(file).name == Path(other).name
    return filecmp.cmp(file, other, shallow=False)


def _next_id(images: pd.DataFrame) -> int:
    numbers = [image_id for image_id in images.index if not isinstance(image_id, str)]
    return max(numbers, default=0) + 1


def _renumber(image_id: Hashable, *, split: str, start: int) -> Hashable:
    return start + image_id if isinstance(image_id, int) else f"{split}/{image_id}"


def _join_categories(
    parts: list[Dataset], names: list[str], *, report: ReadingReport
) -> tuple[str, ...]:
    """Return the categories of all splits."""
    joined = tuple(dict.fromkeys(name for part in parts for name in part.categories))
    for split, part in zip(names, parts, strict=True):
        lacking = [name for name in joined if name not in part.categories]
        if part.categories and lacking:
            report.note(
                split,
                "categories",
                outcome="corrected",
                count=len(lacking),
                reason=(
                    "this split does not list them, as other splits do: none of its images counts "
                    "as showing them"
                ),
                first=lacking[0],
            )
    return joined
