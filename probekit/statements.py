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
from pathlib import Path

import numpy as np
import pandas as pd

from probekit import captions, paths
from probekit.chosen import Chosen, Task, rows

KINDS = (".csv", ".jsonl", ".json")
ANSWERS = {"yes": 1, "true": 1, "1": 1, "1.0": 1, "no": 0, "false": 0, "0": 0, "0.0": 0}
COLUMNS = ["image", "text", "label"]


def files(name: str) -> dict[str, Path]:
    """The files that an entry of `tasks` stands for, by the name of their task: a file, or all of a folder.

    Returns
    -------
    dict
        Empty where there is no such file or folder.
    """
    path = paths.resolve(name)
    if path.is_dir():
        return {one.stem: one for one in sorted(path.iterdir()) if one.suffix in KINDS}
    return {path.stem: path} if path.is_file() and path.suffix in KINDS else {}


def read(file: str | Path) -> pd.DataFrame:
    """Statements of a file: `image` (as the file names it), `text` (the prompt), `label` (0 or 1).

    Raises
    ------
    ValueError
        No format of those above, or a row that lacks something; the message names file and row.
    """
    file = Path(file)
    try:
        if file.suffix == ".csv":
            table = pd.read_csv(file, dtype=str, keep_default_na=False)
        else:
            table = pd.DataFrame(_objects(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: wanted is a table of {', '.join(COLUMNS)} (CSV, or one JSON object a "
                         f"line), or SugarCrepe's JSON ({error})") from error
    if {"filename", "caption", "negative_caption"} <= set(table.columns):
        table = pd.concat([pd.DataFrame({"image": table.filename, "label": str(label), "text": [
            captions.PROMPT.format(caption=captions.clean(str(text))) for text in table[column]]})
            for label, column in ((1, "caption"), (0, "negative_caption"))]).sort_index(kind="stable")
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing or table.empty:
        raise ValueError(f"{file} has no {', '.join(missing) or 'rows'}: wanted are {', '.join(COLUMNS)}")
    table = table[COLUMNS].astype(str).reset_index(drop=True)
    label = table.label.str.strip().str.lower().map(ANSWERS)
    for wrong, reason in ((label.isna(), "label is none of yes, no, true, false, 1, 0"),
                          (table.text.str.strip() == "", "text is empty"), (table.image.str.strip() == "", "no image")):
        if wrong.any():
            k = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"{file}, row {k + 1}: {reason}: {table.loc[k].to_dict()}")
    return table.assign(label=label.astype(int))


def _objects(text: str) -> list[dict]:
    try:
        whole = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(whole, dict) and all(isinstance(one, dict) for one in whole.values()):
        return list(whole.values())  # SugarCrepe's, by number
    return whole if isinstance(whole, list) else [whole]


def found(statements: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Those statements whose image the dataset has: `image_id, text, label`.

    Parameters
    ----------
    images : of :class:`~probekit.coco.Coco`: indexed by `image_id`, with `file` and `coco_split`

    Raises
    ------
    ValueError
        A name that several images have.
    """
    known: dict[str, list] = {}
    for image, file in images.file.items():
        parts = Path(file).parts
        for k in range(1, min(len(parts), 4) + 1):  # 1.jpg, val/1.jpg, images/val/1.jpg, ...
            known.setdefault("/".join(parts[-k:]), []).append(image)
    numbers = {number: image for image, file in images.file.items() if (number := _number(file)) is not None}
    ids = []
    for name in statements.image:
        owners = known.get(name.strip().removeprefix("./"), [])
        if len(owners) > 1:
            raise ValueError(f"{name} is the name of {len(owners)} images: write the folders before it, too")
        ids.append(owners[0] if owners else numbers.get(_number(name)))
    table = statements.assign(image_id=ids)[["image_id", "text", "label"]]
    return table[table.image_id.notna()].astype({"image_id": images.index.dtype}).reset_index(drop=True)


def _number(name: str) -> int | None:
    """The number in the names that COCO gives its images, old and new."""
    match = re.fullmatch(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})\.jpg", Path(name).name)
    return int(match[1]) if match else None


def statement_task(name: str, file: Path) -> Task:
    """The task that asks a file's statements of those chosen images that they are about."""

    def build(chosen: Chosen, rng: np.random.Generator) -> pd.DataFrame:
        own = chosen.statements[name]
        own = own[own.image_id.isin(chosen.images.index)]
        return rows(chosen.images.loc[own.image_id], own.text, own.label)

    return Task("binary", build, f"Is this statement of {file.name} true?")
