"""From a dataset to the examples table: draw images, split them, and ask the tasks about them.

A row is one example: `image_id, file, split, task, item, prompt, labels, mask, asked`, and what its
task is: `kind, classes, question, answers, variant_of`. `item` numbers what a task asks about, the
same in all of its variants. `labels` and `mask` have one entry for each class of the task. A label
is 0 or 1, and counts only where the mask is 1; a binary task has one class. `asked` names the
categories that the prompt asks about.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
import xxhash
from tqdm.auto import tqdm

from probekit import parameters, paths
from probekit.data import layouts, statement_files
from probekit.data.boxes import fit_to_files
from probekit.data.dataset import Dataset
from probekit.data.report import ReadingReport, report_lines
from probekit.images import check_images
from probekit.tasks import objects
from probekit.tasks.balance import TooFewImages
from probekit.tasks.base import BuildSettings, Selection, Task, task_infos, task_source
from probekit.tasks.captions import clean_caption
from probekit.tasks.registry import find_task, find_tasks

SPLITS = ("train", "validation", "test")
# Version of the files that a build leaves. Files of another version are built again.
VERSION = 12
FREQUENT = 40
LISTED_IMAGES = 50


# ----------------------------------------------------------------------------------- the images


def select_images(
    settings: BuildSettings,
    dataset: Dataset,
    *,
    report: ReadingReport,
    home: str | Path | paths.Home | None = None,
) -> tuple[Selection, pd.DataFrame]:
    """Draw images, leave out those that cannot be read, and split the others.

    Images are drawn from those that have captions; images that a file of statements names come
    first.

    Parameters
    ----------
    settings : BuildSettings
        How many images to draw, and what to read from their annotations.
    dataset : Dataset
        The dataset that `settings` names.
    report : ReadingReport
        Receives what is corrected, left out and used.
    home : str, Path or Home, optional
        Where relative paths start, see :meth:`probekit.paths.Home.find`.

    Returns
    -------
    selection : Selection
        The images, and all that tasks may ask about them.
    left_out : DataFrame
        The images that cannot be read, or whose boxes cannot be placed: `image_id`, `file`,
        `reason`.

    Raises
    ------
    ValueError
        A setting makes no sense, there are too few images, or more images than `max_bad` allows
        cannot be read; the message lists them.
    """
    statements = {
        name: statement_files.usable_statements(file, dataset.images, report)
        for name, file in _statement_files(settings.tasks, home).items()
    }
    images = _draw_images(settings, dataset, statements=statements)
    images, instances, left_out = _check_files(images, dataset, settings=settings, report=report)
    captions = _captions_by_image(dataset, images)
    instances = _mark_tiny(instances, images, smallest=settings.smallest)
    annotated_nc, annotated_unclear_nc = objects.categories_from_instances(
        instances, images.index, names=dataset.categories
    )
    names = _category_names(dataset, settings)
    if settings.labels_from == "captions":
        shows_nc = objects.categories_from_captions(captions, images.index, names=names)
        objects.check_named(shows_nc)
        unclear_nc = pd.DataFrame(False, index=images.index, columns=shows_nc.columns)
    else:
        shows_nc = annotated_nc.reindex(columns=names, fill_value=False)
        unclear_nc = annotated_unclear_nc.reindex(columns=names, fill_value=False)
    if settings.categories == "frequent40":
        is_train = (images.split == "train").to_numpy()
        frequent = shows_nc[is_train].sum().nlargest(FREQUENT).index
        names = [name for name in names if name in frequent]
    selection = Selection(
        settings=settings,
        images=images,
        captions=captions,
        shows_nc=shows_nc[names],
        unclear_nc=unclear_nc[names],
        instances=instances,
        statements=statements,
        annotated_nc=annotated_nc,
        annotated_unclear_nc=annotated_unclear_nc,
        home=paths.Home.find(home),
    )
    report.note("this run", "images", outcome="used", count=len(images))
    report.note("this run", "captions", outcome="used", count=int(captions.map(len).sum()))
    report.note("this run", "instances", outcome="used", count=len(instances))
    for name, table in statements.items():
        is_used = table.image_id.isin(images.index)
        report.note(name, "statements", outcome="used", count=int(is_used.sum()))
    return selection, left_out


def _statement_files(names: Sequence[str], home: str | Path | paths.Home | None) -> dict[str, Path]:
    files = {}
    for name in names:
        if find_task(name) is None:
            files.update(statement_files.find_statement_files(name, home))
    return files


def _draw_images(
    settings: BuildSettings, dataset: Dataset, *, statements: dict[str, pd.DataFrame]
) -> pd.DataFrame:
    """Return as many images as the settings ask for, with their `split`."""
    statement_images: set[Hashable] = set()
    for table in statements.values():
        statement_images.update(table.image_id)
    has_caption = dataset.images.index.isin(dataset.captions.image_id)
    if dataset.captions.empty and len(dataset.instances):
        has_caption[:] = True  # a dataset of objects: every image counts
    has_statement = dataset.images.index.isin(list(statement_images))
    usable = dataset.images[has_caption | has_statement].sort_index()
    sizes = [settings.train, settings.validation, settings.test]
    count = sum(sizes)
    if count > len(usable):
        found_with = {"captions": has_caption.any(), "statements": has_statement.any()}
        words = " or ".join(name for name, is_found in found_with.items() if is_found)
        report = dataset.report
        is_lost = (report.outcome == "left out") & report.kind.isin(["images", "captions"])
        hints = ["lower train, validation and test, or name more coco_splits"]
        hints += report_lines(report[is_lost])
        raise ValueError(
            f"{count:,} images are asked for, {settings.folder} has {len(usable):,} with "
            f"{words or 'captions'}: {'; '.join(hints)}"
        )
    rng = np.random.default_rng([settings.seed, 0])
    images = usable.iloc[rng.permutation(len(usable))]
    if statement_images:
        comes_first = images.index.isin(list(statement_images))
        images = pd.concat([images[comes_first], images[~comes_first]])[:count]
        images = images.iloc[rng.permutation(count)]
    return images[:count].assign(split=np.repeat(SPLITS, sizes))


def _check_files(
    images: pd.DataFrame, dataset: Dataset, *, settings: BuildSettings, report: ReadingReport
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Decode the images, and bring their instances into the pixels of the files.

    Returns images, their instances, and the images that are left out.
    """
    checked = check_images(images)
    reasons = checked.reason.dropna()
    readable = images.drop(index=reasons.index)[["file", "split", "width", "height"]]
    instances = dataset.instances[dataset.instances.image_id.isin(readable.index)]
    fitted = fit_to_files(readable, instances, sizes=checked, report=report)
    for line in report.lines():
        tqdm.write(line)
    reasons = pd.concat([reasons, pd.Series(fitted.reasons, dtype=object)])
    left_out = images.file[reasons.index].to_frame().assign(reason=reasons)
    left_out = left_out.rename_axis("image_id").reset_index()
    _check_unreadable(left_out, len(images), settings=settings)
    for reason, count in left_out.reason.value_counts().items():
        report.note("image files", "images", outcome="left out", count=count, reason=str(reason))
    images = fitted.images.drop(index=list(fitted.reasons))
    return images, fitted.instances[fitted.instances.image_id.isin(images.index)], left_out


def _check_unreadable(unreadable: pd.DataFrame, count: int, *, settings: BuildSettings) -> None:
    if len(unreadable) <= settings.max_bad * count:
        return
    lines = [f"  {image.file}: {image.reason}" for image in unreadable[:LISTED_IMAGES].itertuples()]
    raise ValueError(
        f"{len(unreadable)} of {count:,} images cannot be read, more than "
        f"max_bad={settings.max_bad:.1%}: repair them or raise max_bad:\n" + "\n".join(lines)
    )


def _captions_by_image(dataset: Dataset, images: pd.DataFrame) -> pd.Series:
    captions = dataset.captions[dataset.captions.image_id.isin(images.index)]
    return captions.caption.map(clean_caption).groupby(captions.image_id).agg(list)


def _mark_tiny(instances: pd.DataFrame, images: pd.DataFrame, *, smallest: float) -> pd.DataFrame:
    image_area = (images.width * images.height).reindex(instances.image_id).to_numpy()
    return instances.assign(tiny=instances.area.to_numpy(dtype=float) < smallest * image_area)


def _category_names(dataset: Dataset, settings: BuildSettings) -> list[str]:
    """Return the categories that are asked about, or may be."""
    if settings.categories in ("all", "frequent40"):
        return list(dataset.categories)
    if isinstance(settings.categories, str):
        names = [settings.categories]
    else:
        names = list(settings.categories)
    unknown_names = [name for name in names if name not in dataset.categories]
    # Captions may name categories that a dataset without instances does not list.
    must_be_listed = dataset.categories or settings.labels_from == "instances"
    if unknown_names and must_be_listed:
        listed = ", ".join(dataset.categories) or "a dataset that has instances"
        raise ValueError(
            f'unknown categories {unknown_names}: take "all", "frequent40" or names out of {listed}'
        )
    return names


# --------------------------------------------------------------------------------- the examples


def build_examples(
    settings: BuildSettings,
    folder: Path,
    *,
    dataset: Dataset | None = None,
    home: str | Path | paths.Home | None = None,
) -> pd.DataFrame:
    """Build the examples of all tasks and write them to a folder.

    They are read back where the settings, the dataset, the files of statements and the code of the
    tasks are unchanged.

    Parameters
    ----------
    settings : BuildSettings
        Which images to draw, and what to ask about them.
    folder : Path
        Where the table goes, with the instances of its images, the list of unreadable images, and
        how far captions agree with instances.
    dataset : Dataset, optional
        The dataset that `settings` names, where it has been read already.
    home : str, Path or Home, optional
        Where relative paths start, see :meth:`probekit.paths.Home.find`.

    Returns
    -------
    DataFrame
        The examples; those of one image stand next to each other. `kind`, `classes` and `question`
        say what the task of each row is, see :func:`~probekit.tasks.base.task_infos`.

    Raises
    ------
    ValueError
        A setting makes no sense, or a task finds nothing to ask; the message names the fix.
    FileNotFoundError
        There is no such dataset.
    """
    settings = replace(settings, **parameters.read_parameters(asdict(settings)))
    home = paths.Home.find(home)
    tasks = find_tasks(settings.tasks, home)
    fingerprint = _source_fingerprint(settings, home)
    record_file = folder / "build.json"
    examples_file = folder / "examples.parquet"
    is_built = record_file.exists() and examples_file.exists()
    if is_built and paths.read_json(record_file)["fingerprint"] == fingerprint:
        return load_examples(folder)
    # The record vouches for the other files, so it goes first and is written last.
    record_file.unlink(missing_ok=True)
    if dataset is None:
        dataset = layouts.read_dataset(
            home.resolve(settings.folder), settings.coco_splits, max_bad=settings.max_bad
        )
    _check_needs(tasks, settings, dataset=dataset)
    report = ReadingReport()
    selection, left_out = select_images(settings, dataset, report=report, home=home)
    examples = _ask_tasks(tasks, selection)
    examples["file"] = [home.relative(Path(file)) for file in examples.file]
    paths.write_atomic(examples_file, examples.to_parquet)
    left_out.to_csv(folder / "left_out_images.csv", index=False)
    image_sizes = selection.images[["width", "height"]]
    instances = selection.instances.join(image_sizes, on="image_id")
    paths.write_atomic(folder / "instances.parquet", instances.to_parquet)
    _caption_agreement(selection).to_csv(folder / "caption_words.csv")
    record = {
        "fingerprint": fingerprint,
        "settings": asdict(settings),
        "left_out_images": len(left_out),
        "report": [*dataset.report.to_dict("records"), *report.table().to_dict("records")],
        "versions": paths.versions("numpy", "pandas", "scikit-learn", "pillow"),
    }
    paths.write_json(record_file, record)
    return load_examples(folder)


def _source_fingerprint(settings: BuildSettings, home: paths.Home) -> str:
    """Return a fingerprint of the settings, the dataset on disk, the statements and the tasks."""
    statements = {
        name: xxhash.xxh3_128_hexdigest(file.read_bytes())
        for name, file in _statement_files(settings.tasks, home).items()
    }
    state = layouts.dataset_state(home.resolve(settings.folder), settings.coco_splits)
    tasks = [find_task(name) for name in settings.tasks]
    sources = [task_source(task) for task in tasks if task is not None]
    return paths.fingerprint(VERSION, settings, statements, state, sources)


def _check_needs(tasks: dict[str, Task], settings: BuildSettings, *, dataset: Dataset) -> None:
    """Refuse tasks about what the dataset does not have."""
    has = {
        "": True,
        "instances": len(dataset.instances) > 0,
        "categories": len(_category_names(dataset, settings)) > 0,
    }
    fixes = {
        "instances": "take other tasks, or a dataset with COCO's instances",
        "categories": "take caption tasks, or labels_from: captions with categories named",
    }
    if settings.labels_from == "captions":
        fixes["categories"] = "name them, as in categories: [dog, cup]"
    for name, task in tasks.items():
        needs = task.needs
        if not needs and task.kind == "multilabel" and not task.classes:
            needs = "categories"
        if not has[needs]:
            raise ValueError(
                f"task {name} asks about {needs}, and {settings.folder} has none: {fixes[needs]}"
            )


def _ask_tasks(tasks: dict[str, Task], selection: Selection) -> pd.DataFrame:
    """Return the examples of all tasks, image by image in the order of the selection."""
    tables = []
    for name, task in tasks.items():
        table = _ask_task(name, task, selection=selection)
        classes = list(task.classes or selection.shows_nc.columns)
        if task.kind == "binary":
            classes = ["match"]
        if task.kind == "multilabel" and not task.classes:
            table["asked"] = [
                [name for name, counts in zip(classes, mask, strict=True) if counts]
                for mask in table["mask"]
            ]
        elif "asked" not in table:  # a user's own table
            table["asked"] = [[]] * len(table)
        answers = [list(words) for words in task.answer_words]
        tables.append(
            table.assign(
                kind=task.kind,
                classes=[classes] * len(table),
                question=task.question,
                answers=[answers] * len(table),
                variant_of=task.variant_of,
            )
        )
    examples = pd.concat(tables, ignore_index=True)
    positions = selection.images.index.get_indexer(examples.image_id)
    return examples.iloc[np.argsort(positions, kind="stable")].reset_index(drop=True)


def _ask_task(name: str, task: Task, *, selection: Selection) -> pd.DataFrame:
    """Return the examples of one task.

    Raises
    ------
    TooFewImages
        It finds nothing to ask in a split.
    """
    # A variant draws what the plain task draws, so that both ask about the same things.
    seed_name = task.variant_of or name
    rng = np.random.default_rng([selection.settings.seed, crc32(seed_name.encode())])
    rows = task.build(selection, rng)
    if task.negated:
        rows["labels"] = [[1 - label for label in labels] for labels in rows["labels"]]
    image_counts = selection.images.split.value_counts()
    asked_splits = set(rows.split)
    empty_splits = [
        split for split in SPLITS if split in image_counts and split not in asked_splits
    ]
    if empty_splits:
        counts = ", ".join(str(image_counts[split]) for split in empty_splits)
        # Where no image of any split gives a question, more of them rarely would.
        more = "other or more" if len(empty_splits) == len(image_counts) else "more images or more"
        raise TooFewImages(
            f"task {name} finds nothing to ask in {', '.join(empty_splits)} (images there: "
            f"{counts}): take {more} categories, or leave it out"
        )
    rows = rows.reset_index(names="image_id")
    return rows.assign(task=name, item=np.arange(len(rows)))


def _caption_agreement(selection: Selection) -> pd.DataFrame:
    """Measure how far the words of captions agree with the instances."""
    named_nc = objects.categories_from_captions(
        selection.captions, selection.images.index, names=selection.shows_nc.columns
    )
    shows_nc = selection.annotated_nc.reindex(columns=named_nc.columns, fill_value=False)
    unclear_nc = selection.annotated_unclear_nc.reindex(columns=named_nc.columns, fill_value=False)
    return objects.measure_caption_labels(named_nc, shows_nc, unclear_nc=unclear_nc)


# ------------------------------------------------------------------------- the files of a build


def load_examples(folder: Path) -> pd.DataFrame:
    """Read the examples that :func:`build_examples` wrote.

    Raises
    ------
    FileNotFoundError
        They have not been built.
    """
    return _read_table(folder / "examples.parquet")


def load_instances(folder: Path) -> pd.DataFrame:
    """Read the instances of the images that :func:`build_examples` drew.

    Returns
    -------
    DataFrame
        `image_id`, `category`, the box `x`, `y`, `w`, `h`, `area`, `iscrowd`, `colour`, `tiny`, and
        `width` and `height` of the image; all in pixels of the image file.

    Raises
    ------
    FileNotFoundError
        The examples have not been built.
    """
    return _read_table(folder / "instances.parquet")


def load_outlines(folder: Path, *, home: paths.Home) -> Dataset:
    """Read the dataset that examples were built from once more, with the outlines of its objects.

    Raises
    ------
    FileNotFoundError
        The examples have not been built, or the dataset has gone.
    """
    settings = paths.read_json(folder / "build.json")["settings"]
    return layouts.read_dataset(
        home.resolve(settings["folder"]),
        settings["coco_splits"],
        max_bad=settings["max_bad"],
        with_outlines=True,
    )


def _read_table(file: Path) -> pd.DataFrame:
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: run 01_build_data for this run first")
    return pd.read_parquet(file)


def input_fingerprint(examples: pd.DataFrame) -> str:
    """Return a fingerprint of what a model is given: images and prompts, in their order."""
    return paths.fingerprint(examples.file.tolist(), examples.prompt.tolist())


def table_fingerprint(examples: pd.DataFrame) -> str:
    """Return a fingerprint of the whole table, labels and splits included."""
    names = ["task", "split", "labels", "mask"]
    names += ["item"] if "item" in examples else []
    columns = [examples[name].tolist() for name in names]
    infos = [[name, asdict(info)] for name, info in task_infos(examples).items()]
    return paths.fingerprint(input_fingerprint(examples), columns, infos)
