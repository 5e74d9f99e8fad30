"""From COCO to examples: which images, which prompts, which labels.

A task is a function from the chosen images to rows of the examples table (:mod:`probekit.tasks.captions`,
:mod:`probekit.tasks.objects`, :mod:`probekit.tasks.spatial`, :mod:`probekit.data.statement_files`), with the kind of probe that reads them.
A row is one example: `image_id, file, split, task, prompt, labels, mask`. `labels` and `mask` have one entry for each
class of the task (`labels` 0 or 1, counted only where `mask` is 1); a binary task has one class.
"""

from __future__ import annotations

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd

from probekit import paths
from probekit.data import dataset, layouts, statement_files
from probekit.images import unreadable_images
from probekit.tasks import captions, objects
from probekit.tasks.balance import TooFew
from probekit.tasks.base import BuildSettings, Selection, Task, task_infos, task_source
from probekit.tasks.registry import TASKS, find_tasks

VERSION = 7  # of what a build leaves: older ones are made anew
SPLITS = ("train", "validation", "test")


# ------------------------------------------------------------------------------------------------------------ tasks






def _files(names: tuple[str, ...]) -> dict[str, Path]:
    return {stem: file for name in names if name not in TASKS for stem, file in statement_files.find_statement_files(name).items()}


def _made_as(build: BuildSettings) -> str:
    """Fingerprint of what a build comes from: settings, the dataset as it is on disk, statements, and tasks' code."""
    read = {stem: sha256(file.read_bytes()).hexdigest() for stem, file in _files(build.tasks).items()}
    state = layouts.dataset_state(paths.Home.find().resolve(build.folder), build.coco_splits)
    made = [task_source(TASKS[name]) for name in build.tasks if name in TASKS]
    return paths.fingerprint(VERSION, build, read, state, made)


# ------------------------------------------------------------------------------------------------------------ build


def choose(build: BuildSettings, data: dataset.Dataset) -> tuple[Selection, pd.DataFrame]:
    """Draw the images of a build, leave out the unreadable ones, and split them by image.

    Drawn are images that have captions, and those that statements are about before any other.

    Returns
    -------
    Chosen, and the table of left-out images (`image_id, file, reason`)

    Raises
    ------
    ValueError
        Too few images, or more unreadable ones than `max_bad` allows; the message lists them.
    """
    _check(build)
    said = {name: _usable(file, data) for name, file in _files(build.tasks).items()}
    about = np.unique(np.concatenate([[], *(table.image_id for table in said.values())]))
    usable = data.images[data.images.index.isin(data.captions.image_id) | data.images.index.isin(about)].sort_index()
    wanted = build.train + build.validation + build.test
    if wanted > len(usable):
        raise ValueError(f"{wanted:,} images are asked for, {build.folder} has {len(usable):,} with captions: lower "
                         "train, validation and test, or name more coco_splits")
    rng = np.random.default_rng([build.seed, 0])
    images = usable.iloc[rng.permutation(len(usable))]
    if len(about):
        first = images.index.isin(about)
        images = pd.concat([images[first], images[~first]])[:wanted]
        images = images.iloc[rng.permutation(wanted)]
    images = images[:wanted].assign(split=np.repeat(SPLITS, [build.train, build.validation, build.test]))
    bad = unreadable_images(images)
    if len(bad) > build.max_bad * wanted:
        listed = "\n".join(f"  {b.file}: {b.reason}" for b in bad.head(50).itertuples())
        raise ValueError(f"{len(bad)} of {wanted:,} images cannot be read, more than max_bad={build.max_bad:.1%}; "
                         f"mend them or raise max_bad:\n{listed}")
    images = images.drop(index=bad.image_id)[["file", "split", "width", "height"]]
    told, instances = _captions_of(data, images), _instances_of(data, images, build.smallest)
    names = _categories(data, build)
    annotated = objects.shown(instances, images.index, data.categories)
    shows, unclear = (table.reindex(columns=names, fill_value=False) for table in annotated)
    if build.labels_from == "captions":
        shows, unclear = objects.said(told, images.index, names), unclear & False
    if build.categories == "frequent40":
        often = shows[(images.split == "train").to_numpy()].sum().nlargest(40).index
        shows, unclear = (table[[name for name in names if name in often]] for table in (shows, unclear))
    return Selection(build, images, told, shows, unclear, instances, said, *annotated), bad


def _check(build: BuildSettings) -> None:
    if not 1 <= build.captions <= 5:
        raise ValueError(f"captions={build.captions}: 1 to 5 right captions an image, and as many wrong ones")
    if build.labels_from not in ("instances", "captions"):
        raise ValueError(f"labels_from={build.labels_from!r}: take instances or captions")
    if not 0 <= build.smallest < 1:
        raise ValueError(f"smallest={build.smallest}: a share of the image's area, from 0 to below 1")


def _usable(file: Path, data: dataset.Dataset) -> pd.DataFrame:
    every = statement_files.read_statements(file)
    table = statement_files.match_statements(every, data.images)
    if table.empty:
        raise ValueError(f"none of the images that {file} names ({every.image[0]}, ...) is in this dataset "
                         f"({Path(data.images.file.iloc[0]).name}, ...): name the dataset that it is about")
    return table


def _captions_of(data: dataset.Dataset, images: pd.DataFrame) -> pd.Series:
    rows = data.captions[data.captions.image_id.isin(images.index)]
    return rows.caption.map(captions.clean).groupby(rows.image_id).agg(list)


def _instances_of(data: dataset.Dataset, images: pd.DataFrame, smallest: float) -> pd.DataFrame:
    rows = data.instances[data.instances.image_id.isin(images.index)]
    size = (images.width * images.height).reindex(rows.image_id).to_numpy()
    return rows.assign(tiny=rows.area.to_numpy(dtype=float) < smallest * size)


def _categories(data: dataset.Dataset, build: BuildSettings) -> list[str]:
    """The names that are asked about, or may be."""
    if build.categories in ("all", "frequent40"):
        return list(data.categories)
    names = [build.categories] if isinstance(build.categories, str) else list(build.categories)
    unknown = [name for name in names if name not in data.categories]
    if unknown and (data.categories or build.labels_from == "instances"):
        raise ValueError(f"unknown categories {unknown}: take \"all\", \"frequent40\" or names out of "
                         f"{', '.join(data.categories) or 'a dataset that has instances'}")
    return names


def build_examples(build: BuildSettings, folder: Path, data: dataset.Dataset | None = None) -> pd.DataFrame:
    """Build the examples of all tasks and write them to `folder`.

    They are read back, not made again, where settings, dataset, statements and the tasks' code are what they were.

    Parameters
    ----------
    data : the dataset of the settings, where it has been read already

    Returns
    -------
    DataFrame
        The examples, those of one image next to each other; ``attrs["tasks"]`` holds kind and classes of each task,
        ``attrs["settings"]`` the fingerprint of what it was made from, ``attrs["versions"]`` of which libraries.
    """
    asked, made_as = find_tasks(build.tasks), _made_as(build)
    record, file = folder / "build.json", folder / "examples.parquet"
    if record.exists() and file.exists() and paths.read_json(record)["fingerprint"] == made_as:
        return load_examples(folder)
    record.unlink(missing_ok=True)  # it vouches for the table, so it goes first and comes back last
    data = data or layouts.read_dataset(paths.Home.find().resolve(build.folder), build.coco_splits)
    _check_needs(asked, build, data)
    chosen, bad = choose(build, data)
    tables = []
    for name, task in asked.items():
        table = _examples(name, task, chosen)
        classes = ["match"] if task.kind == "binary" else list(task.classes or chosen.shows_nc.columns)
        tables.append(table.assign(kind=task.kind, classes=[classes] * len(table), question=task.question))
    examples = pd.concat(tables, ignore_index=True)
    place = pd.Series(range(len(chosen.images)), index=chosen.images.index)
    examples = examples.iloc[np.argsort(place[examples.image_id].to_numpy(), kind="stable")].reset_index(drop=True)
    examples["file"] = [paths.Home.find().relative(Path(file)) for file in examples.file]
    paths.write_atomic(file, examples.to_parquet)
    bad.to_csv(folder / "left_out_images.csv", index=False)
    there = chosen.instances.join(chosen.images[["width", "height"]], on="image_id")
    paths.write_atomic(folder / "instances.parquet", there.to_parquet)
    said = objects.said(chosen.captions, chosen.images.index, chosen.shows_nc.columns)
    clear = (table.reindex(columns=said.columns, fill_value=False)
             for table in (chosen.annotated_nc, chosen.annotated_unclear_nc))
    objects.agreement(said, *clear).to_csv(folder / "caption_words.csv")
    paths.write_json(record, {"fingerprint": made_as, "settings": asdict(build), "left_out_images": len(bad),
                              "versions": paths.versions("numpy", "pandas", "scikit-learn", "pillow")})
    return load_examples(folder)


def _check_needs(asked: dict[str, Task], build: BuildSettings, data: dataset.Dataset) -> None:
    """Refuse tasks about what the dataset does not have."""
    lacks = {"instances": not len(data.instances), "categories": not _categories(data, build)}
    mends = {"instances": "take other tasks, or a dataset with COCO's instances",
             "categories": "name them, as in categories: [dog, cup]" if build.labels_from == "captions" else
             "take caption tasks, or labels_from: captions with categories named"}
    for name, task in asked.items():
        needs = task.needs or ("categories" if task.kind == "multilabel" and not task.classes else "")
        if lacks.get(needs):
            raise ValueError(f"task {name} asks about {needs}, and {build.folder} has none: {mends[needs]}")


def _examples(name: str, task: Task, chosen: Selection) -> pd.DataFrame:
    """The rows of one task.

    Raises
    ------
    ValueError
        A split for which there is nothing to ask.
    """
    rows = task.build(chosen, np.random.default_rng([chosen.build.seed, crc32(name.encode())]))
    counts = rows.split.value_counts()
    lacking = [split for split in SPLITS if split in set(chosen.images.split) and split not in counts.index]
    if lacking:
        raise TooFew(f"task {name} finds nothing to ask in {', '.join(lacking)} (images there: "
                     f"{', '.join(str((chosen.images.split == split).sum()) for split in lacking)}): take more "
                     "images or more categories, or leave it out")
    return rows.reset_index(names="image_id").assign(task=name)


def load_examples(folder: Path) -> pd.DataFrame:
    """Read the examples that :func:`build_examples` wrote."""
    file = folder / "examples.parquet"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: run 01_build_data for this run first")
    return pd.read_parquet(file)


def load_instances(folder: Path) -> pd.DataFrame:
    """The instances of a run's images: `image_id, category, x, y, w, h, area, iscrowd`, the image's `width, height`.

    All in pixels of the image file.
    """
    file = folder / "instances.parquet"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: run 01_build_data again, this run is of an older version")
    return pd.read_parquet(file)


def input_fingerprint(examples: pd.DataFrame) -> str:
    """Fingerprint of what a model is given: images and prompts, in their order."""
    return paths.fingerprint(examples.file.tolist(), examples.prompt.tolist())


def table_fingerprint(examples: pd.DataFrame) -> str:
    """Fingerprint of the whole table, labels and splits included."""
    return paths.fingerprint(input_fingerprint(examples), [examples[c].tolist() for c in ("task", "split", "labels", "mask")],
                             [[name, asdict(info)] for name, info in task_infos(examples).items()])
