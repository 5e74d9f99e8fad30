"""Statements that others wrote: SugarCrepe's and POPE's files, and any table of `image, text, label`.

* ``*.csv`` with the columns `image`, `text`, `label`, and ``*.jsonl`` (or ``*.json``) with one such object a
  line, as POPE's (Li et al., 2023, https://arxiv.org/abs/2305.10355). `text` is the prompt as it stands; `label` is yes
  or no, true or false, 1 or 0.
* ``*.json`` of SugarCrepe (Hsieh et al., 2023, https://arxiv.org/abs/2306.14610): objects with `filename`, `caption`,
  `negative_caption`; each caption is asked with the prompt of the caption tasks.

Images are named as in the dataset: by their file name, or by their path in it where several have that name.
COCO's older names (``COCO_val2014_000000310196.jpg``) are found by their number.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from probekit import paths

KINDS = (".csv", ".jsonl", ".json")
ANSWERS = {"yes": 1, "true": 1, "1": 1, "1.0": 1, "no": 0, "false": 0, "0": 0, "0.0": 0}
COLUMNS = ["image", "text", "label"]
CREPE = ["filename", "caption", "negative_caption"]


def find_statement_files(name: str) -> dict[str, Path]:
    """The files that an entry of `tasks` stands for, by the name of their task: a file, or all of a folder.

    Returns
    -------
    dict
        Empty where there is no such file or folder.
    """
    path = paths.Home.find().resolve(name)
    if path.is_dir():
        return {one.stem: one for one in sorted(path.iterdir()) if one.suffix in KINDS}
    return {path.stem: path} if path.is_file() and path.suffix in KINDS else {}


def read_statements(file: str | Path) -> pd.DataFrame:
    """Statements of a file: `image` (as the file names it), `text` (the prompt), `label` (0 or 1).

    Raises
    ------
    ValueError
        No format of those above, or a row that lacks something; the message names file and row.
    """
    file = Path(file)
    table = parse_table(file)
    columns = CREPE if set(CREPE) <= set(table.columns) else COLUMNS
    missing = [name for name in columns if name not in table.columns]
    if missing or table.empty:
        raise ValueError(f"{file} has no {', '.join(missing) or 'rows'}: wanted are {', '.join(COLUMNS)}")
    absent = table[columns].isna()  # before they become text: "nan" would be asked about like any other word
    table = table[columns].astype(str)
    for name in columns:
        _refuse(file, table, absent[name] | (table[name].str.strip() == ""), f"{name} is empty")
    if columns is CREPE:
        table = pd.concat([pd.DataFrame({"image": table.filename, "label": str(label), "text": table[column]})
            for label, column in ((1, "caption"), (0, "negative_caption"))]).sort_index(kind="stable")
    label = table.label.str.strip().str.lower().map(ANSWERS)
    _refuse(file, table, label.isna(), "label is none of yes, no, true, false, 1, 0")
    return table[COLUMNS].assign(label=label.astype(int), is_caption=columns is CREPE).reset_index(drop=True)


def _refuse(file: Path, table: pd.DataFrame, wrong: pd.Series, reason: str) -> None:
    if wrong.any():
        k = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"{file}, row {k + 1}: {reason}: {table.iloc[k].to_dict()}")


def parse_table(file: Path, **form) -> pd.DataFrame:
    """A file's table as it stands: of JSON objects (``*.json``, ``*.jsonl``), else of text as :func:`pandas.read_csv`.

    Parameters
    ----------
    form : of the text: its separator, header, and quotation marks

    Raises
    ------
    ValueError
        No table, or a row that has more fields than there are columns; the message names the file.
    """
    try:
        if file.suffix in (".json", ".jsonl"):
            return pd.DataFrame(_objects(file.read_text(encoding="utf-8-sig")))
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # instead of fields that are dropped
            return pd.read_csv(file, dtype=str, keep_default_na=False, index_col=False, **form)
    except (ValueError, AttributeError, TypeError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{file} cannot be read as a table ({str(error).strip()}): wanted is CSV, texts with commas "
                         "in quotation marks, or one JSON object a line") from error


def _objects(text: str) -> list[dict]:
    try:
        whole = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(whole, dict) and all(isinstance(one, dict) for one in whole.values()):
        return list(whole.values())  # SugarCrepe's, by number
    return whole if isinstance(whole, list) else [whole]


def match_statements(statements: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Those statements whose image the dataset has: `image_id, text, label`.

    Parameters
    ----------
    images : of :class:`~probekit.data.dataset.Dataset`: indexed by `image_id`, with `file` and `coco_split`

    Raises
    ------
    ValueError
        A name that several images have.
    """
    find = image_finder(images)
    numbers = {number: image for image, file in images.file.items() if (number := _number(file)) is not None}
    owners = [find(name) for name in statements.image]
    ids = [numbers.get(_number(name)) if owner is None else owner
           for owner, name in zip(owners, statements.image, strict=True)]
    table = statements.assign(image_id=ids)[["image_id", "text", "label", "is_caption"]]
    return table[table.image_id.notna()].astype({"image_id": images.index.dtype}).reset_index(drop=True)


def image_finder(images: pd.DataFrame) -> Callable[[str], Hashable | None]:
    """How to find an image by its file name, or by the end of its path (``val/1.jpg``); None of one that is not there.

    What is returned raises a ValueError where several images have a name.
    """
    known = defaultdict(list)
    for image, file in images.file.items():
        known[Path(file).name].append((image, Path(file).parts))

    def find(name: str) -> Hashable | None:
        asked = PurePosixPath(name.strip())
        owners = [image for image, parts in known.get(asked.name, []) if parts[-len(asked.parts):] == asked.parts]
        if len(owners) > 1:
            raise ValueError(f"{name} is the name of {len(owners)} images: write the folders before it, too")
        return owners[0] if owners else None

    return find


def _number(name: str) -> int | None:
    """The number in the names that COCO gives its images, old and new."""
    match = re.fullmatch(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})\.jpg", Path(name).name)
    return int(match[1]) if match else None
