"""Captions of images, out of the tables that lie beside them.

All tables of captions in a folder are read, and their captions counted: each is used, or left out
for a reason that is said. Where two tables say different things of the same image, they are
refused. Tables of other things, such as statements, and other texts are named.
"""

from __future__ import annotations

import ast
import contextlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from probekit.data.image_names import match_names
from probekit.data.report import ReadingReport
from probekit.data.statement_files import has_statements
from probekit.data.tables import (
    CAPTION_NAMES,
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    Table,
    UnknownColumns,
    decode,
    image_name,
    is_empty,
    listed,
    means_any,
    read_table,
)

# Why captions, or rows without any, are left out.
NO_CAPTION = "the row has no caption"
NO_NAME = "the row names no image"
NO_IMAGE = "the name fits no image, or several"
IN_ANOTHER = "another table has captions of the image, too, and the same ones"
LEMMAS = "they are lemmas, and another table has captions"


@dataclass(frozen=True, eq=False)
class CaptionTable:
    """The captions of a table.

    Attributes
    ----------
    source : Table
    captions : DataFrame
        ``name`` of the image as the table has it, and ``caption``; or the ``reason`` why a row has
        none.
    """

    source: Table
    captions: pd.DataFrame

    @property
    def file(self) -> Path:
        """The table's."""
        return self.source.file


def read_captions(
    folder: Path,
    files: Sequence[Path],
    images: pd.DataFrame,
    *,
    max_bad: float,
    report: ReadingReport,
) -> pd.DataFrame:
    """Read the tables of captions among the files of a folder.

    Parameters
    ----------
    folder : Path
        The folder.
    files : sequence of Path
        All files in it.
    images : DataFrame
        Of a :class:`~probekit.data.dataset.Dataset`.
    max_bad : float
        Largest share of images that may lose their captions because the names in a table fit none.
    report : ReadingReport
        Receives what became of the captions. A row that has none counts as one.

    Returns
    -------
    DataFrame
        ``image_id``, ``caption``; empty if the folder has no tables of captions.

    Raises
    ------
    ValueError
        A table cannot be read or names no image, two tables contradict each other, or more images
        than `max_bad` allows lose their captions.
    """
    texts = texts_of_images(files)
    tables, other_files = _caption_tables(folder, [file for file in files if file not in texts])
    table_of_texts = _read_texts(folder, texts)
    if table_of_texts.rows.caption.map(_has_letters).any():
        tables.append(_captions_of(table_of_texts))
    else:
        other_files += texts  # such as boxes in YOLO's format
    if not tables:
        return pd.DataFrame(columns=["image_id", "caption"])
    report.note(
        folder,
        "tables and texts",
        outcome="left out",
        count=len(other_files),
        reason="they have no captions",
        first=listed(file.name for file in other_files),
    )
    captions = pd.concat(
        [_match_names(table, images, report) for table in tables], ignore_index=True
    )
    is_open = captions.reason == ""
    if not is_open.any():
        names = captions.name[captions.reason == NO_IMAGE].unique()
        raise ValueError(
            f"{tables[0].file} names none of the {len(images):,} images in {folder} "
            f"({listed(names)}): write the names as the files are called, with the folders before "
            "them"
        )
    if len(tables) > 1:
        captions.loc[is_open & _stands_in_another(captions[is_open]), "reason"] = IN_ANOTHER
    for table in tables:
        _note_captions(report, table.file, captions[captions.file == table.file])
    used = captions.loc[captions.reason == "", ["image_id", "caption"]].reset_index(drop=True)
    used = used.astype({"image_id": images.index.dtype})
    _check_left_out(folder, captions, used=used, images=images, max_bad=max_bad)
    return used


def _match_names(table: CaptionTable, images: pd.DataFrame, report: ReadingReport) -> pd.DataFrame:
    """Return the captions of a table with ``image_id`` and ``file``."""
    names = table.captions.name
    is_open = table.captions.reason == ""
    try:
        matches = match_names(names[is_open], images, folder=table.file.parent)
    except ValueError as error:
        raise ValueError(f"{table.file}: {error}") from None
    matches.note(report, table.file)
    table.source.note_encoding(report, "captions", count=len(names))
    image_ids = names.map(matches.image_of)
    reasons = table.captions.reason.mask(is_open & image_ids.isna(), NO_IMAGE)
    return table.captions.assign(image_id=image_ids, file=table.file, reason=reasons)


def _note_captions(report: ReadingReport, file: Path, captions: pd.DataFrame) -> None:
    report.note(file, "captions", outcome="read", count=len(captions))
    for reason, left_out in captions[captions.reason != ""].groupby("reason"):
        report.note(
            file,
            "captions",
            outcome="left out",
            count=len(left_out),
            reason=str(reason),
            first=listed(left_out.name.unique()),
        )
    report.note(file, "captions", outcome="used", count=int((captions.reason == "").sum()))


def table_files(folder: Path, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the files that may be tables of captions.

    Parameters
    ----------
    folder : Path
        The folder of a dataset.
    files : sequence of Path
        All files in it.

    Returns
    -------
    beside, apart : list of Path
        Those beside the folders of images or for image folders of Hugging Face, and those in
        folders of their own, which count where the others have no captions.
    """
    tables = [file for file in files if file.suffix.lower() in TABLE_SUFFIXES]
    image_folders = {file.parent for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
    beside = [file for file in tables if file.parent == folder or _is_metadata(file)]
    apart = [
        file
        for file in tables
        if file.parent.parent == folder and file.parent not in image_folders and file not in beside
    ]
    return beside, apart


def texts_of_images(files: Sequence[Path]) -> dict[Path, Path]:
    """Return the texts that are called as an image beside them, each with that image.

    ``dog.txt`` has the captions of ``dog.jpg``, one in each line. Where several images have that
    name, what they share stands for them.
    """
    images: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        if file.suffix.lower() in IMAGE_SUFFIXES:
            images[file.with_suffix("")].append(file)
    texts = {}
    for file in files:
        stem = file.with_suffix("")
        if file.suffix.lower() == ".txt" and stem in images:
            texts[file] = images[stem][0] if len(images[stem]) == 1 else stem
    return texts


def _read_texts(folder: Path, texts: Mapping[Path, Path]) -> Table:
    """Read the texts beside images as one table."""
    rows = []
    encodings = set()
    for file, image in texts.items():
        try:
            text, encoding = decode(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        encodings.add(encoding)
        name = image.relative_to(folder).as_posix()
        rows += [(name, line.strip()) for line in text.splitlines() or [""]]
    table = pd.DataFrame(rows, columns=["image", "caption"], dtype=object)
    return Table(folder / "*.txt", table, " and ".join(sorted(encodings - {""})))


def _has_letters(text: str) -> bool:
    return any(map(str.isalpha, text))


def _is_metadata(file: Path) -> bool:
    """Tell whether a file is the table of an image folder of Hugging Face."""
    return file.stem.lower() == "metadata"


def _caption_tables(folder: Path, files: Sequence[Path]) -> tuple[list[CaptionTable], list[Path]]:
    """Return the tables of captions among the files of a folder, and the tables of other things.

    Raises
    ------
    ValueError
        A table of captions cannot be read, or all files are something else that might be meant as
        captions.
    """
    other_files: list[Path] = []
    errors: list[UnknownColumns] = []
    is_for_statements = False
    for files_of_a_kind in table_files(folder, files):
        tables = []
        for file in files_of_a_kind:
            try:
                table = read_table(file)
                if _is_about_statements(table):
                    is_for_statements = True
                    other_files.append(file)
                else:
                    tables.append(_captions_of(table))
            except UnknownColumns as error:
                if _is_metadata(file):
                    raise
                other_files.append(file)
                if file.parent == folder:
                    errors.append(error)
        if tables:
            _set_lemmas_aside(tables)
            return tables, other_files
    if errors and not is_for_statements:
        raise ValueError(f"{errors[0]}; if it is no table of captions, put it elsewhere")
    return [], other_files


def _is_about_statements(table: Table) -> bool:
    """Tell whether a table has statements, or classes of images, and no captions.

    A number in ``label`` beside ``file_name`` is a class, as in image folders of Hugging Face.
    """
    if not table.has("image"):
        return False
    if not table.has("caption"):
        return table.has("label")
    if _is_metadata(table.file) or not has_statements(table):
        return False
    return not means_any(table.column("image").name, ["file_name"])


def _captions_of(table: Table) -> CaptionTable:
    """Return the captions of a table, each with the name of its image.

    Raises
    ------
    UnknownColumns
        The table lacks images' names or captions.
    ValueError
        It has no captions at all.
    """
    if not table.has("image") or not table.has("caption"):
        raise UnknownColumns(table.missing(("image", "caption")))
    names = table.column("image")
    fields = table.column("caption")
    captions = []
    for name, field in zip(names, fields, strict=True):
        file_name = "" if is_empty(name) else image_name(str(name))
        texts = _captions_in(field)
        if not texts:
            captions.append((file_name, "", NO_CAPTION))
        for text in texts:
            captions.append((file_name, text, "" if file_name else NO_NAME))
    captions_of_rows = pd.DataFrame(captions, columns=["name", "caption", "reason"], dtype=object)
    if not (captions_of_rows.reason == "").any():
        raise ValueError(
            f"{table.file} has no captions: none of its {len(table.rows):,} rows has both "
            f"{names.name} and {fields.name}"
        )
    return CaptionTable(table, captions_of_rows)


def _captions_in(field: object) -> list[str]:
    """Return the captions in a field: a text, a list of texts or of objects, or a list as text."""
    if isinstance(field, str):
        field = _parse_list(field)
    if isinstance(field, np.ndarray):
        field = field.tolist()
    texts = []
    for item in field if isinstance(field, list) else [field]:
        if isinstance(item, dict):
            names = [name for name in item if means_any(name, CAPTION_NAMES)]
            item = item[names[0]] if names else None
        if isinstance(item, str) and any(map(str.isalnum, item)):
            texts.append(item)
    return texts


def _parse_list(text: str) -> object:
    """Return the list that a field of a CSV file spells, or the text itself."""
    if text.startswith("[") and text.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                content = parse(text)
                if isinstance(content, list):
                    return content
    return text


def _set_lemmas_aside(tables: list[CaptionTable]) -> None:
    """Leave out tables of lemmas (“dog be run”), such as Flickr8k's, beside the captions."""
    of_lemmas = [table for table in tables if "lemma" in table.file.name.lower()]
    if len(of_lemmas) < len(tables):
        for table in of_lemmas:
            table.captions.loc[table.captions.reason == "", "reason"] = LEMMAS


def _stands_in_another(captions: pd.DataFrame) -> pd.Series:
    """Return which captions of an image stand in an earlier table, too.

    Raises
    ------
    ValueError
        Two tables have different captions of one image.
    """
    texts = captions.groupby(["image_id", "file"], sort=False).caption.agg(frozenset)
    differs = texts.groupby("image_id", sort=False).nunique() > 1
    if differs.any():
        image_id = differs.idxmax()
        first, second = texts[image_id].index[:2]
        name = captions.name[captions.image_id == image_id].iloc[0]
        raise ValueError(
            f"{first} and {second} have different captions of the same images ({differs.sum():,} "
            f"of them, such as {name}): leave the one that is meant and put the other elsewhere, "
            "or write both into one table"
        )
    return captions.file != captions.groupby("image_id").file.transform("first")


def _check_left_out(
    folder: Path,
    captions: pd.DataFrame,
    *,
    used: pd.DataFrame,
    images: pd.DataFrame,
    max_bad: float,
) -> None:
    """Refuse tables whose names may be those of images that are without captions now.

    Names of images that a folder does not hold are no loss where all that it holds have captions.
    """
    names = captions.name[captions.reason == NO_IMAGE].unique()
    without = images.file[~images.index.isin(used.image_id)]
    if min(len(names), len(without)) <= max_bad * len(images):
        return
    files = listed(Path(file).name for file in without)
    raise ValueError(
        f"{len(names):,} of the names in the tables of {folder} fit no image, or several "
        f"({listed(names)}), and {len(without):,} of {len(images):,} images have no caption "
        f"({files}), more than max_bad={max_bad:.1%}: write the names as the files are called, or "
        "raise max_bad"
    )
