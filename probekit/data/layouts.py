"""Datasets in COCO's layout and in other common ones, read into the same tables.

COCO
    ``annotations/captions_<split>.json`` and ``instances_<split>.json``, see
    :mod:`probekit.data.coco`.
Image folder of Hugging Face
    ``metadata.csv``, ``metadata.jsonl`` or ``metadata.parquet`` beside the images, or in a folder
    of its own, or in a folder per split.
Flickr30k, Flickr8k
    Tables of captions beside a folder of images: any of :data:`~probekit.data.tables.FORMATS`, with
    one caption or a list of captions in a row, such as ``image, caption``, or lines such as
    ``1000092795.jpg#0<tab>Two young men ...``, or Karpathy's JSON.
Texts beside images
    ``dog.txt`` beside ``dog.jpg``, with a caption in each line.
Images alone
    For statements about them, see :mod:`probekit.data.statement_files`.

:mod:`probekit.data.tables` says how a table is read, and :mod:`probekit.data.image_names` which
image a name in it means. :mod:`probekit.data.caption_tables` says what becomes of their rows.

Only COCO's layout has instances. The others support caption tasks, statements, and categories as
captions name them (``labels_from: captions``, with ``categories`` named).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from probekit.data import coco
from probekit.data.caption_tables import read_captions, table_files, texts_of_images
from probekit.data.dataset import Dataset
from probekit.data.report import ReadingReport
from probekit.data.tables import IMAGE_SUFFIXES, UNREAD_SUFFIXES, listed
from probekit.images import size_or_zero

LAYOUTS = (
    "annotations/captions_<split>.json (COCO), metadata.csv or metadata.jsonl with file_name and "
    "caption (Hugging Face image folder), tables of image and caption beside the images "
    "(Flickr30k), a text beside each image, or images alone"
)


def read_dataset(
    folder: str | Path,
    splits: Sequence[str] | None = None,
    *,
    max_bad: float = 1.0,
    with_outlines: bool = False,
) -> Dataset:
    """Read a dataset in any of the layouts above.

    Parameters
    ----------
    folder : str or Path
        The folder of the dataset.
    splits : sequence of str, optional
        COCO's splits, or names of the folders that images lie in; by default all.
    max_bad : float
        Largest share of images that may lose their captions because the names in a table fit none.
    with_outlines : bool
        Whether objects have their outlines, too, where there are some.

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
        There is no such split, a table cannot be read or names no image, two tables contradict
        each other, or more images than `max_bad` allows lose their captions. The message names the
        fix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the dataset {folder} does not exist: name a folder with {LAYOUTS}"
        )
    if coco.split_names(folder):
        return coco.read_coco(folder, splits, max_bad=max_bad, with_outlines=with_outlines)
    inner = sorted(one.name for one in folder.iterdir() if coco.split_names(one))
    if inner:
        raise FileNotFoundError(
            f"{folder} is no dataset: put COCO there ({coco.LAYOUT}), fetch a sample of it "
            "(python -m probekit download coco --help), or name a dataset that lies inside "
            f"({', '.join(inner)})"
        )
    all_files = _files_in(folder)
    files = _image_files(all_files)
    unread = [file for file in all_files if file.suffix.lower() in UNREAD_SUFFIXES]
    if unread and not files:
        raise FileNotFoundError(
            f"the {len(unread):,} images in {folder} have formats that are not read "
            f"({listed(file.name for file in unread)}): convert them to JPEG or PNG"
        )
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
    report = ReadingReport()
    report.note(folder, "images", outcome="read", count=len(images) + len(unread))
    report.note(
        folder,
        "images",
        outcome="left out",
        count=len(unread),
        reason="their formats are not read: convert them to JPEG or PNG",
        first=listed(file.name for file in unread),
    )
    captions = read_captions(folder, all_files, images, max_bad=max_bad, report=report)
    for line in report.lines():
        tqdm.write(line)
    if splits:
        images = images[images.coco_split.isin(list(splits))]
        captions = captions[captions.image_id.isin(images.index)].reset_index(drop=True)
    sizes = [size_or_zero(file) for file in images.file]
    images = images.assign(
        width=[width for width, _ in sizes], height=[height for _, height in sizes]
    )
    instances = pd.DataFrame(columns=coco.INSTANCE_COLUMNS)
    return Dataset(images, captions, instances, (), report.table())


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
    annotations = coco.find_annotations(folder)
    if annotations:
        tables = [
            file.path
            for split, files in annotations.items()
            for file in files
            if not splits or split in map(str, splits)
        ]
        image_names = []
    else:
        files = _files_in(folder)
        beside, apart = table_files(folder, files)
        tables = list(dict.fromkeys([*beside, *apart, *texts_of_images(files)]))
        image_names = [str(file.relative_to(folder)) for file in _image_files(files)]
    table_states = []
    for table in tables:
        if table.exists():
            stat = table.stat()
            table_states.append((str(table.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return [table_states, image_names]


def _files_in(folder: Path) -> list[Path]:
    """Return all files in a folder, also behind links to folders, without hidden ones."""
    files: list[Path] = []
    seen: set[Path] = set()
    waiting = [folder]
    while waiting:
        start = waiting.pop(0)
        if start.resolve() in seen:
            continue
        links = []
        for parent, names, file_names in os.walk(start):
            here = Path(parent)
            seen.add(here.resolve())
            names[:] = [
                name
                for name in names
                if not _is_hidden(name) and (here / name).resolve() not in seen
            ]
            links += [here / name for name in sorted(names) if (here / name).is_symlink()]
            files += [here / name for name in file_names if not _is_hidden(name)]
        waiting += links  # later: what lies here, too, is read without a link
    return sorted(files)


def _image_files(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
