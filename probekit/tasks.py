"""From COCO to examples: which images, which prompts, which labels.

A task is a function from the chosen images to rows of the examples table (:mod:`probekit.captions`,
:mod:`probekit.objects`), with the kind of probe that reads them.
A row is one example: `image_id, file, split, task, prompt, labels, mask`. `labels` and `mask` have one entry for each
class of the task (`labels` 0 or 1, counted only where `mask` is 1); a binary task has one class.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd

from probekit import captions, coco, objects, paths
from probekit.chosen import Chosen, Task

VERSION = 3  # of what a build leaves: older ones are made anew


@dataclass(frozen=True)
class Build:
    """Settings of an examples table.

    Attributes
    ----------
    folder : COCO folder (see :mod:`probekit.coco`)
    coco_splits : which of its splits to draw images from; () takes all
    train, validation, test : numbers of images
    tasks : names out of :data:`TASKS`
    categories : ``"all"``, ``"frequent40"`` (the 40 that most of the chosen training images show), or their names
    max_bad : largest share of unreadable images that is left out without stopping
    """

    folder: str
    coco_splits: tuple[str, ...] = ()
    train: int = 1600
    validation: int = 400
    test: int = 400
    tasks: tuple[str, ...] = ("caption", "category", "category_list")
    categories: str | tuple[str, ...] = "all"
    seed: int = 0
    max_bad: float = 0.01


# ------------------------------------------------------------------------------------------------------------ tasks


BELONGS, THERE = "Does this caption belong to this image?", "Is this object in the image?"
WHICH = "Which categories are there"
TASKS = {
    "caption": Task("binary", captions.caption_task, BELONGS),
    "caption_similar": Task("binary", partial(captions.caption_task, negatives="similar"),
                            f"{BELONGS} (or a similar one?)"),
    "caption_same_categories": Task("binary", partial(captions.caption_task, negatives="same_categories"),
                                    f"{BELONGS} (or one with the same categories?)"),
    "caption_swapped": Task("binary", partial(captions.caption_task, negatives="swapped"),
                            f"{BELONGS} (or are two words exchanged?)"),
    "category": Task("multilabel", objects.category_task, f"{WHICH} (not listed in the prompt)?"),
    "category_list": Task("multilabel", objects.category_list_task, f"{WHICH} (listed in the prompt)?"),
    "category_dense": Task("multilabel", objects.category_dense_task, f"{WHICH} (all of them asked)?"),
    "object": Task("binary", objects.object_task, THERE),
    "object_popular": Task("binary", partial(objects.object_task, absent="popular"),
                           f"{THERE} (absent ones are frequent)"),
    "object_adversarial": Task("binary", partial(objects.object_task, absent="adversarial"),
                               f"{THERE} (absent ones go with what is there)"),
}


# ------------------------------------------------------------------------------------------------------------ build


def choose(build: Build, data: coco.Coco) -> tuple[Chosen, pd.DataFrame]:
    """Draw the images of a build, leave out the unreadable ones, and split them by image.

    Returns
    -------
    Chosen, and the table of left-out images (`image_id, file, reason`)

    Raises
    ------
    ValueError
        Too few images, or more unreadable ones than `max_bad` allows; the message lists them.
    """
    usable = data.images[data.images.index.isin(data.captions.image_id)].sort_index()
    wanted = build.train + build.validation + build.test
    if wanted > len(usable):
        raise ValueError(f"{wanted:,} images are asked for, {build.folder} has {len(usable):,} with captions: lower "
                         "train, validation and test, or name more coco_splits")
    rng = np.random.default_rng([build.seed, 0])
    images = usable.iloc[rng.permutation(len(usable))[:wanted]]
    names = np.repeat(["train", "validation", "test"], [build.train, build.validation, build.test])
    images = images.assign(split=names)[["file", "split"]]
    bad = coco.unreadable(images)
    if len(bad) > build.max_bad * wanted:
        listed = "\n".join(f"  {b.file}: {b.reason}" for b in bad.head(50).itertuples())
        raise ValueError(f"{len(bad)} of {wanted:,} images cannot be read, more than max_bad={build.max_bad:.1%}; "
                         f"mend them or raise max_bad:\n{listed}")
    images = images.drop(index=bad.image_id)
    shows_nc = _shown_categories(data, images, build.categories)
    return Chosen(images, _captions_of(data, images), shows_nc, build.seed), bad


def _captions_of(data: coco.Coco, images: pd.DataFrame) -> pd.Series:
    rows = data.captions[data.captions.image_id.isin(images.index)]
    return rows.caption.map(captions.clean).groupby(rows.image_id).agg(list)


def _shown_categories(data: coco.Coco, images: pd.DataFrame, wanted: str | tuple[str, ...]) -> pd.DataFrame:
    """(n, c) table of booleans: does the image hold an instance of the category?"""
    rows = data.instances[data.instances.image_id.isin(images.index)]
    shows = pd.crosstab(rows.image_id, rows.category).astype(bool)
    shows = shows.reindex(index=images.index, columns=list(data.categories), fill_value=False)
    if wanted == "all":
        return shows
    if wanted == "frequent40":
        often = shows[(images.split == "train").to_numpy()].sum().nlargest(40).index
        return shows[[name for name in data.categories if name in often]]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in names if name not in data.categories]
    if unknown:
        raise ValueError(f"unknown categories {unknown}: take \"all\", \"frequent40\" or names out of "
                         f"{', '.join(data.categories)}")
    return shows[names]


def build_examples(build: Build, folder: Path, data: coco.Coco | None = None) -> pd.DataFrame:
    """Build the examples of all tasks and write them to `folder`; the same settings are read back, not made again.

    Parameters
    ----------
    data : the COCO folder of the settings, where it has been read already

    Returns
    -------
    DataFrame
        The examples, those of one image next to each other; ``attrs["tasks"]`` holds kind and classes of each task.
    """
    unknown = [t for t in build.tasks if t not in TASKS]
    if unknown:
        raise ValueError(f"unknown tasks {unknown}: take names out of {', '.join(TASKS)}")
    record, file, made_as = folder / "build.json", folder / "examples.parquet", paths.fingerprint(VERSION, build)
    if record.exists() and file.exists() and paths.read_json(record)["fingerprint"] == made_as:
        return load(folder)
    record.unlink(missing_ok=True)  # it vouches for the table, so it goes first and comes back last
    data = data or coco.read(paths.resolve(build.folder), list(build.coco_splits) or None)
    chosen, bad = choose(build, data)
    tables, about = [], {}
    for name in build.tasks:
        task, rng = TASKS[name], np.random.default_rng([build.seed, crc32(name.encode())])
        rows = task.build(chosen, rng).reset_index(names="image_id")
        tables.append(rows.assign(task=name))
        classes = ["match"] if task.kind == "binary" else list(chosen.shows_nc.columns)
        about[name] = {"kind": task.kind, "classes": classes, "question": task.question}
    examples = pd.concat(tables, ignore_index=True)
    place = pd.Series(range(len(chosen.images)), index=chosen.images.index)
    examples = examples.iloc[np.argsort(place[examples.image_id].to_numpy(), kind="stable")].reset_index(drop=True)
    examples["file"] = [paths.relative(Path(file)) for file in examples.file]
    examples.attrs["tasks"] = about
    paths.write_atomic(file, examples.to_parquet)
    bad.to_csv(folder / "left_out_images.csv", index=False)
    there = data.instances[data.instances.image_id.isin(chosen.images.index)]
    sizes = data.images[["width", "height"]]
    paths.write_atomic(folder / "instances.parquet", there.join(sizes, on="image_id").to_parquet)
    paths.write_json(record, {"fingerprint": made_as, "settings": asdict(build), "left_out_images": len(bad)})
    return load(folder)


def load(folder: Path) -> pd.DataFrame:
    """Read the examples that :func:`build_examples` wrote."""
    file = folder / "examples.parquet"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: run 01_build_data for this run first")
    return pd.read_parquet(file)


def instances(folder: Path) -> pd.DataFrame:
    """The instances of a run's images: `image_id, category, x, y, w, h, area, iscrowd`, the image's `width, height`.

    All in pixels of the image file.
    """
    file = folder / "instances.parquet"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: run 01_build_data again, this run is of an older version")
    return pd.read_parquet(file)


def rows_key(examples: pd.DataFrame) -> str:
    """Fingerprint of what a model is given: images and prompts, in their order."""
    return paths.fingerprint(examples.file.tolist(), examples.prompt.tolist())


def table_key(examples: pd.DataFrame) -> str:
    """Fingerprint of the whole table, labels and splits included."""
    return paths.fingerprint(rows_key(examples), [examples[c].tolist() for c in ("task", "split", "labels", "mask")],
                             examples.attrs["tasks"])
