"""From COCO to examples: which images, which prompts, which labels.

A task is a function from the chosen images to rows of the examples table, with the kind of probe that reads them.
A row is one example: `image_id, file, split, task, prompt, labels, mask`. `labels` and `mask` have one entry for each
class of the task (`labels` 0 or 1, counted only where `mask` is 1); a binary task has one class.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd

from probekit import captions, coco, objects, paths

CAPTION_PROMPT = "This image contains: {caption}.\nIs this right?"
CATEGORY_PROMPT = "This image contains the following types of object:"
CATEGORY_LIST_PROMPT = CATEGORY_PROMPT + " {categories}"
OBJECT_PROMPT = "Objects: {categories}.\nIs there a {category} in this image?"
VERSION = 2  # of what a build leaves: older ones are made anew
ASKED = 3  # categories that an image is asked for, as in the study


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


@dataclass(frozen=True)
class Chosen:
    """What a task is built from: images with their `split`, their captions, and which categories each one shows."""

    images: pd.DataFrame
    captions: pd.Series
    shows_nc: pd.DataFrame
    seed: int


@dataclass(frozen=True)
class Task:
    """`kind` is ``"binary"`` or ``"multilabel"``; `build(chosen, rng)` returns the rows."""

    kind: str
    build: Callable[[Chosen, np.random.Generator], pd.DataFrame]
    question: str


def clean_caption(caption: str) -> str:
    """One line, no final punctuation (the prompt brings its own), none doubled, no blank before a mark."""
    text = re.sub(r"\s+", " ", caption).strip()
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    text = re.sub(r"([.,;:!?])[.,;:!?]+", r"\1", text)
    return text.rstrip(" .,;:!?")


# ------------------------------------------------------------------------------------------------------------ tasks


def caption_task(chosen: Chosen, rng: np.random.Generator, negatives: str = "random") -> pd.DataFrame:
    """Each image with one of its captions (label 1) and with a wrong one (label 0), see :mod:`probekit.captions`.

    random
        the one of another image of its split
    similar
        the most similar one of another image, paraphrases excluded
    same_categories
        the one of another image that shows the same categories; images without such another are left out
    swapped
        its own right one with two words exchanged; images with none that can be exchanged are left out

    Wrong captions are the right ones, dealt out anew: every caption is asked once as right and once as wrong (if
    swapped, with the same words), so that a caption alone, or its words, say nothing about its label.
    """
    parts = []
    for _, images in chosen.images.groupby("split", sort=False):
        own = [chosen.captions[i] for i in images.index]
        right = [said[rng.integers(len(said))] for said in own]
        wrong = _wrong_captions(chosen, images, right, own, negatives, rng)
        kept = [i for i, text in enumerate(wrong) if text is not None]
        images = images.iloc[kept]
        for label, texts in ((1, right), (0, wrong)):
            prompts = [CAPTION_PROMPT.format(caption=texts[i]) for i in kept]
            parts.append(images.assign(prompt=prompts, labels=[[label]] * len(images), mask=[[1]] * len(images)))
    return pd.concat(parts)


def _wrong_captions(chosen: Chosen, images: pd.DataFrame, right: list[str], own: list[list[str]], negatives: str,
                    rng: np.random.Generator) -> list[str | None]:
    if negatives == "swapped":
        known = captions.nouns(text for said in own for text in said)
        texts = [captions.swapped(text, said, known, rng) for text, said in zip(right, own, strict=True)]
        return [text and clean_caption(text) for text in texts]
    if negatives == "similar":
        given = captions.similar(right, own, rng)
    elif negatives == "same_categories":
        shows = chosen.shows_nc.loc[images.index].to_numpy()
        given = captions.same_kind(right, own, [row.tobytes() for row in shows], rng)
    else:
        known = [{text.lower() for text in said} for said in own]
        given = captions.dealt(len(right), lambda i, j: right[j].lower() in known[i], rng)
    return [None if j < 0 else right[j] for j in given]


def _category_rows(chosen: Chosen) -> pd.DataFrame:
    """Labels and masks, the same for all category tasks; images that show none of the categories are left out."""
    rng = np.random.default_rng([chosen.seed, 1])
    shows = chosen.shows_nc.loc[chosen.images.index]
    images = chosen.images[shows.any(axis=1).to_numpy()]
    masks = np.zeros((len(images), shows.shape[1]), dtype=int)
    labels = shows.loc[images.index].to_numpy(dtype=int)
    for split in images.split.unique():
        rows = np.flatnonzero((images.split == split).to_numpy())
        masks[rows] = balanced_mask(labels[rows], rng)
    return images.assign(labels=labels.tolist(), mask=masks.tolist())


def balanced_mask(labels_nc: np.ndarray, rng: np.random.Generator, asked: int = ASKED) -> np.ndarray:
    """Choose which categories each image is asked for: one or two that it shows, the rest absent ones.

    Present ones are drawn with a chance inverse to how often a category occurs; absent ones go where a category
    has been asked as present more often than as absent, so that its name does not give its label away.

    Parameters
    ----------
    labels_nc : (n, c) of 0 and 1, at least one 1 a row

    Returns
    -------
    (n, c) of 0 and 1, `asked` ones a row (fewer only where there are fewer categories)
    """
    n, c = labels_nc.shape
    mask_nc = np.zeros((n, c), dtype=int)
    rarity = 1 / np.maximum(labels_nc.sum(0), 1)
    several = rng.permutation(np.flatnonzero(labels_nc.sum(1) > 1))
    takes_two = np.isin(np.arange(n), several[: n // 2])
    for row in range(n):
        present = np.flatnonzero(labels_nc[row])
        weight = rarity[present] / rarity[present].sum()
        mask_nc[row, rng.choice(present, size=1 + takes_two[row], replace=False, p=weight)] = 1
    owed = mask_nc.sum(0).astype(float)
    for row in rng.permutation(n):
        absent = np.flatnonzero(labels_nc[row] == 0)
        order = absent[np.argsort(-(owed[absent] + rng.random(len(absent))), kind="stable")]
        pick = order[: asked - mask_nc[row].sum()]
        mask_nc[row, pick] = 1
        owed[pick] -= 1
    return mask_nc


def category_task(chosen: Chosen, rng: np.random.Generator) -> pd.DataFrame:
    """Which categories are there? The prompt does not name them."""
    return _category_rows(chosen).assign(prompt=CATEGORY_PROMPT)


def category_list_task(chosen: Chosen, rng: np.random.Generator) -> pd.DataFrame:
    """Which categories are there? The prompt lists all of them, shuffled anew for each image."""
    rows = _category_rows(chosen)
    names = list(chosen.shows_nc.columns)
    lists = [", ".join(rng.permutation(names)) for _ in range(len(rows))]
    return rows.assign(prompt=[CATEGORY_LIST_PROMPT.format(categories=text) for text in lists])


def category_dense_task(chosen: Chosen, rng: np.random.Generator) -> pd.DataFrame:
    """Which categories are there? Every category of every image counts; most are absent."""
    shows = chosen.shows_nc.loc[chosen.images.index].to_numpy(dtype=int)
    return chosen.images.assign(labels=shows.tolist(), mask=np.ones_like(shows).tolist(), prompt=CATEGORY_PROMPT)


def object_task(chosen: Chosen, rng: np.random.Generator, absent: str = "random") -> pd.DataFrame:
    """Is this object there? Each image is asked for one that is and one that is not, all listed before, shuffled.

    Parameters
    ----------
    absent : which ones, see :func:`probekit.objects.asked`; images that show none or all are left out
    """
    names, parts = np.array(chosen.shows_nc.columns), []
    for _, images in chosen.images.groupby("split", sort=False):
        shows = chosen.shows_nc.loc[images.index].to_numpy()
        kept = shows.any(1) & ~shows.all(1)
        images, shows = images[kept], shows[kept]
        lists = [", ".join(rng.permutation(names)) for _ in range(len(images))]
        for label, places in zip((1, 0), objects.asked(shows, absent, rng), strict=True):
            prompts = [OBJECT_PROMPT.format(categories=text, category=name)
                       for text, name in zip(lists, names[places], strict=True)]
            parts.append(images.assign(prompt=prompts, labels=[[label]] * len(images), mask=[[1]] * len(images)))
    return pd.concat(parts)


THERE = "Is this object in the image?"
BELONGS = "Does this caption belong to this image?"
TASKS = {
    "caption": Task("binary", caption_task, BELONGS),
    "caption_similar": Task("binary", partial(caption_task, negatives="similar"), f"{BELONGS} (or a similar one?)"),
    "caption_same_categories": Task("binary", partial(caption_task, negatives="same_categories"),
                                    f"{BELONGS} (or one with the same categories?)"),
    "caption_swapped": Task("binary", partial(caption_task, negatives="swapped"),
                            f"{BELONGS} (or are two words exchanged?)"),
    "category": Task("multilabel", category_task, "Which categories are there (not listed in the prompt)?"),
    "category_dense": Task("multilabel", category_dense_task, "Which categories are there (all of them asked)?"),
    "object": Task("binary", object_task, THERE),
    "object_popular": Task("binary", partial(object_task, absent="popular"), f"{THERE} (absent ones are frequent)"),
    "object_adversarial": Task("binary", partial(object_task, absent="adversarial"),
                               f"{THERE} (absent ones go with what is there)"),
    "category_list": Task("multilabel", category_list_task, "Which categories are there (listed in the prompt)?"),
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
    return rows.caption.map(clean_caption).groupby(rows.image_id).agg(list)


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
    return paths.fingerprint(list(examples.file), list(examples.prompt))


def table_key(examples: pd.DataFrame) -> str:
    """Fingerprint of the whole table, labels and splits included."""
    return paths.fingerprint(rows_key(examples), [list(examples[c]) for c in ("task", "split", "labels", "mask")],
                             examples.attrs["tasks"])
