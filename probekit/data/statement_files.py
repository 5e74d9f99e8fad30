"""Statements that others wrote: SugarCrepe's and POPE's files, and any table of image, text, label.

A file is one of

* a CSV file (``*.csv``) with the columns ``image``, ``text``, ``label``;
* JSON (``*.jsonl``, ``*.json``), one object per line with these keys, as POPE's files [1]_;
* JSON of SugarCrepe [2]_ (``*.json``), objects with ``filename``, ``caption``,
  ``negative_caption``: each caption becomes a statement that is asked with the prompt of the
  caption tasks.

``text`` is the whole prompt; ``label`` is yes or no, true or false, 1 or 0.

Images are named by their file name in the dataset, or by the end of their path where several have
that name. COCO's older names (``COCO_val2014_000000310196.jpg``) are matched by their number.

References
----------
.. [1] Li et al. (2023), https://arxiv.org/abs/2305.10355
.. [2] Hsieh et al. (2023), https://arxiv.org/abs/2306.14610
"""

from __future__ import annotations

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from probekit import paths

SUFFIXES = (".csv", ".jsonl", ".json")
LABELS = {"yes": 1, "true": 1, "1": 1, "1.0": 1, "no": 0, "false": 0, "0": 0, "0.0": 0}
STATEMENT_COLUMNS = ["image", "text", "label"]
SUGARCREPE_COLUMNS = ["filename", "caption", "negative_caption"]


def find_statement_files(name: str, home: str | Path | paths.Home | None = None) -> dict[str, Path]:
    """Return the files of statements that an entry of ``tasks`` stands for.

    Parameters
    ----------
    name : str
        A file of statements, or a folder of such files.
    home : str, Path or Home, optional
        Where a relative `name` starts, see :meth:`probekit.paths.Home.find`.

    Returns
    -------
    dict of str to Path
        Files by the name of their task; empty if there is no such file or folder.
    """
    path = paths.Home.find(home).resolve(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.stem: file for file in files if file.suffix in SUFFIXES and file.is_file()}


def read_statements(file: str | Path) -> pd.DataFrame:
    """Read the statements of a file.

    Parameters
    ----------
    file : str or Path
        In one of the formats above.

    Returns
    -------
    DataFrame
        ``image`` (as the file names it), ``text`` (a prompt, or a caption), ``label`` (0 or 1),
        ``is_caption`` (whether ``text`` is a caption, which still needs a prompt).

    Raises
    ------
    ValueError
        The file has none of the formats, or a row lacks something. The message names file and row.
    """
    file = Path(file)
    table = parse_table(file)
    is_sugarcrepe = set(SUGARCREPE_COLUMNS) <= set(table.columns)
    columns = SUGARCREPE_COLUMNS if is_sugarcrepe else STATEMENT_COLUMNS
    missing = [name for name in columns if name not in table.columns]
    if missing or table.empty:
        lacking = ", ".join(missing) or "rows"
        raise ValueError(
            f"{file} has no {lacking}: it needs the columns {', '.join(STATEMENT_COLUMNS)}"
        )
    table = table[columns]
    is_missing = table.isna()  # looked at before missing values become the text "nan"
    table = table.astype(str)
    for name in columns:
        is_empty = is_missing[name] | (table[name].str.strip() == "")
        _refuse_rows(file, table, is_empty, reason=f"{name} is empty")
    if is_sugarcrepe:
        table = _split_sugarcrepe(table)
    labels = table.label.str.strip().str.lower().map(LABELS)
    _refuse_rows(file, table, labels.isna(), reason="label is none of yes, no, true, false, 1, 0")
    table = table[STATEMENT_COLUMNS].assign(label=labels.astype(int), is_caption=is_sugarcrepe)
    return table.reset_index(drop=True)


def _split_sugarcrepe(table: pd.DataFrame) -> pd.DataFrame:
    """Return two statements per row, the right caption first."""
    right = pd.DataFrame({"image": table.filename, "text": table.caption, "label": "1"})
    negative = pd.DataFrame({"image": table.filename, "text": table.negative_caption, "label": "0"})
    return pd.concat([right, negative]).sort_index(kind="stable")


def _refuse_rows(file: Path, table: pd.DataFrame, is_invalid: pd.Series, *, reason: str) -> None:
    if is_invalid.any():
        row = int(np.flatnonzero(is_invalid)[0])
        raise ValueError(f"{file}, row {row + 1}: {reason}: {table.iloc[row].to_dict()}")


def parse_table(file: Path, **csv_options: Any) -> pd.DataFrame:
    """Read a table as it is, from JSON objects (``*.json``, ``*.jsonl``) or from delimited text.

    Parameters
    ----------
    file : Path
        The table.
    **csv_options
        Passed to :func:`pandas.read_csv` if the file is delimited text.

    Returns
    -------
    DataFrame
        All fields of delimited text are strings.

    Raises
    ------
    ValueError
        The file is no table, or a row has more fields than there are columns. The message names
        the file.
    """
    try:
        if file.suffix in (".json", ".jsonl"):
            return pd.DataFrame(_parse_objects(file.read_text(encoding="utf-8-sig")))
        with warnings.catch_warnings():
            # pandas only warns when it drops fields that are too many.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                file, dtype=str, keep_default_na=False, index_col=False, **csv_options
            )
    except (ValueError, AttributeError, TypeError, pd.errors.ParserWarning) as error:
        raise ValueError(
            f"{file} cannot be read as a table ({str(error).strip()}): write it as CSV, with "
            "quotation marks around texts that have commas, or as one JSON object per line"
        ) from error


def _parse_objects(text: str) -> list[dict]:
    try:
        content = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and all(isinstance(value, dict) for value in content.values()):
        return list(content.values())  # SugarCrepe numbers its objects
    return [content]


def match_statements(statements: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Return the statements whose image the dataset has.

    Parameters
    ----------
    statements : DataFrame
        As :func:`read_statements` returns them.
    images : DataFrame
        Of a :class:`~probekit.data.dataset.Dataset`.

    Returns
    -------
    DataFrame
        ``image_id``, ``text``, ``label``, ``is_caption``.

    Raises
    ------
    ValueError
        A name fits several images.
    """
    finder = ImageFinder(images)
    image_ids = [finder.find(name, by_number=True) for name in statements.image]
    table = statements.assign(image_id=image_ids)[["image_id", "text", "label", "is_caption"]]
    table = table[table.image_id.notna()]
    return table.astype({"image_id": images.index.dtype}).reset_index(drop=True)


class ImageFinder:
    """Find the images of a dataset by the names that other files use for them.

    Parameters
    ----------
    images : DataFrame
        Of a :class:`~probekit.data.dataset.Dataset`.
    """

    def __init__(self, images: pd.DataFrame):
        self._images_of_name: dict[str, list[tuple[Hashable, tuple[str, ...]]]] = defaultdict(list)
        self._image_of_number: dict[int, Hashable] = {}
        for image_id, file in images.file.items():
            path = Path(file)
            self._images_of_name[path.name].append((image_id, path.parts))
            number = _coco_number(path.name)
            if number is not None:
                self._image_of_number[number] = image_id

    def find(self, name: str, *, by_number: bool = False) -> Hashable | None:
        """Return the id of the image that a name stands for.

        Parameters
        ----------
        name : str
            File name, or the end of a path, such as ``val/1.jpg``.
        by_number : bool
            Whether a COCO name of another release finds the image of the same number.

        Returns
        -------
        Hashable or None
            None if the dataset has no such image.

        Raises
        ------
        ValueError
            The name fits several images.
        """
        path = PurePosixPath(name.strip())
        depth = len(path.parts)
        matches = [
            image_id
            for image_id, parts in self._images_of_name.get(path.name, [])
            if parts[-depth:] == path.parts
        ]
        if len(matches) > 1:
            raise ValueError(
                f"{name} is the name of {len(matches)} images: write the folders before it, too"
            )
        if matches:
            return matches[0]
        number = _coco_number(path.name)
        if number is None or not by_number:
            return None
        return self._image_of_number.get(number)


def _coco_number(name: str) -> int | None:
    """Return the number in the file names that COCO gives its images, old and new."""
    match = re.fullmatch(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})\.jpg", name)
    return int(match[1]) if match else None
