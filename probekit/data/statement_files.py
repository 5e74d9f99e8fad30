"""Statements that others wrote: files of benchmarks, and any table of image, text and label.

A file is one of

* a table with an image, a text and a label (``*.csv``, ``*.tsv``, ``*.json``, ``*.jsonl``,
  ``*.parquet``), as POPE's files [1]_ and VSR's [2]_;
* SugarCrepe's [3]_: an image, a caption and a negative caption;
* Winoground's [4]_: two images and their two captions.

A text in a column ``text``, ``statement``, ``question`` or ``prompt`` is the whole prompt; a
``caption``, ``sentence`` or ``description`` is asked with the prompt of the caption tasks. A label
is yes or no, true or false, 1 or 0. :mod:`probekit.data.tables` says which forms of tables are
read, and :mod:`probekit.data.image_names` how images may be named.

References
----------
.. [1] Li et al. (2023), https://arxiv.org/abs/2305.10355
.. [2] Liu et al. (2023), https://arxiv.org/abs/2205.00363
.. [3] Hsieh et al. (2023), https://arxiv.org/abs/2306.14610
.. [4] Thrush et al. (2022), https://arxiv.org/abs/2204.03162
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from probekit import paths
from probekit.data.image_names import match_names
from probekit.data.report import ReadingReport
from probekit.data.tables import (
    CAPTION_NAMES,
    FORMATS,
    LABELS,
    TABLE_SUFFIXES,
    Table,
    UnknownColumns,
    image_name,
    is_empty,
    listed,
    means_any,
    read_table,
)

# Files in a folder of statements; other texts there may be about them.
SUFFIXES = (".csv", ".tsv", *FORMATS["json"], *FORMATS["parquet"])
# The columns of a file ▶ its statements: image, text, and the label or the column that has it.
# The first line whose columns a file has is what it is.
StatementForm = tuple[tuple[str, str, int | str], ...]
STATEMENT_FORMS: tuple[StatementForm, ...] = (
    (
        ("image 0", "caption 0", 1),
        ("image 0", "caption 1", 0),
        ("image 1", "caption 1", 1),
        ("image 1", "caption 0", 0),
    ),
    (
        ("image", "caption", 1),
        ("image", "negative caption", 0),
    ),
    (("image", "text", "label"),),
)


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

    Raises
    ------
    ValueError
        Two files differ in their ending alone.
    """
    path = paths.Home.find(home).resolve(name)
    if path.is_dir():
        candidates = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
        suffixes = SUFFIXES
    else:
        candidates = [path]
        suffixes = TABLE_SUFFIXES
    files: dict[str, Path] = {}
    for file in candidates:
        if file.suffix.lower() not in suffixes or not file.is_file():
            continue
        if file.stem in files:
            raise ValueError(
                f"{files[file.stem]} and {file} would be one task: rename one of them, or put it "
                "elsewhere"
            )
        files[file.stem] = file
    return files


def read_statements(file: str | Path, report: ReadingReport | None = None) -> pd.DataFrame:
    """Read the statements of a file.

    Parameters
    ----------
    file : str or Path
        In one of the forms above.
    report : ReadingReport, optional
        Receives what was not read as it stands there.

    Returns
    -------
    DataFrame
        ``image`` (as the file names it), ``text`` (a prompt, or a caption), ``label`` (0 or 1),
        ``is_caption`` (whether ``text`` is a caption, which still needs a prompt).

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file has none of the forms, or a row lacks something. The message names file and row.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: name a file of statements")
    table = read_table(file)
    statements = statements_of(table)
    if report is not None:
        table.note_encoding(report, "statements", count=len(statements))
    return statements


def usable_statements(
    file: str | Path, images: pd.DataFrame, report: ReadingReport
) -> pd.DataFrame:
    """Read the statements of a file whose images the dataset has.

    Parameters
    ----------
    file : str or Path
        In one of the forms above.
    images : DataFrame
        Of a :class:`~probekit.data.dataset.Dataset`.
    report : ReadingReport
        Receives what became of all statements.

    Returns
    -------
    DataFrame
        ``image_id``, ``text``, ``label``, ``is_caption``.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        As :func:`read_statements` raises it, a name is that of several images, or the dataset has
        none of the images.
    """
    statements = read_statements(file, report)
    matches = match_names(statements.image, images)
    matches.note(report, Path(file))
    image_ids = statements.image.map(matches.image_of.get)
    is_unknown = image_ids.isna()
    if is_unknown.all():
        raise ValueError(
            f"none of the images that {file} names ({statements.image[0]}, ...) is in this dataset "
            f"({Path(images.file.iloc[0]).name}, ...): name the dataset that it is about"
        )
    usable = statements.assign(image_id=image_ids)[["image_id", "text", "label", "is_caption"]]
    usable = usable[~is_unknown].astype({"image_id": images.index.dtype}).reset_index(drop=True)
    report.note(file, "statements", outcome="read", count=len(statements))
    report.note(
        file,
        "statements",
        outcome="left out",
        count=is_unknown.sum(),
        reason="the name fits no image of the dataset, or several",
        first=listed(statements.image[is_unknown].unique()),
    )
    report.note(file, "statements", outcome="used", count=len(usable))
    _say_contradictions(file, usable)
    return usable


def _say_contradictions(file: str | Path, statements: pd.DataFrame) -> None:
    """Say which statements have both labels beside the same image."""
    label_counts = statements.groupby(["image_id", "text"], sort=False).label.nunique()
    texts = label_counts.index[label_counts > 1].get_level_values("text")
    if not texts.empty:
        tqdm.write(
            f"{file}: {len(texts):,} statements are said to be both true and false of an image "
            f"({listed(texts)}): no probe can tell which they are"
        )


def statements_of(table: Table) -> pd.DataFrame:
    """Return the statements of a table, as :func:`read_statements` does.

    Raises
    ------
    UnknownColumns
        It has no columns of statements.
    ValueError
        A row lacks something.
    """
    form = _form_of(table)
    if form is None:
        raise UnknownColumns(table.missing(("image", "text", "label")))
    if table.rows.empty:
        raise ValueError(f"{table.file} has no rows: it needs an image, a text and a label in each")
    parts = []
    for image, text, label in form:
        texts = _filled_column(table, text)
        parts.append(
            pd.DataFrame(
                {
                    "image": _filled_column(table, image).map(image_name),
                    "text": texts,
                    "label": _read_labels(table, label) if isinstance(label, str) else label,
                    "is_caption": text != "text" or means_any(texts.name, CAPTION_NAMES),
                }
            )
        )
    return pd.concat(parts).sort_index(kind="stable").reset_index(drop=True)


def has_statements(table: Table) -> bool:
    """Tell whether a table has the columns of statements, and labels that are yes or no."""
    form = _form_of(table)
    if form is None:
        return False
    columns = [label for _, _, label in form if isinstance(label, str)]
    labels = [str(label).strip().casefold() for name in columns for label in table.column(name)]
    return all(label in LABELS for label in labels)


def _form_of(table: Table) -> StatementForm | None:
    """Return the first of the forms whose columns a table has; None where it has those of none."""
    for form in STATEMENT_FORMS:
        if all(
            table.has(part) for statement in form for part in statement if isinstance(part, str)
        ):
            return form
    return None


def _filled_column(table: Table, meaning: str) -> pd.Series:
    """Return a column as text; no field of it may be empty."""
    column = table.column(meaning)
    _refuse_rows(table, column.map(is_empty), reason=f"{column.name} is empty")
    return column.map(str).str.strip()


def _read_labels(table: Table, meaning: str) -> pd.Series:
    labels = _filled_column(table, meaning).str.casefold().map(LABELS)
    reason = f"{meaning} is none of yes, no, true, false, 1, 0"
    _refuse_rows(table, labels.isna(), reason=reason)
    return labels.astype(int)


def _refuse_rows(table: Table, is_invalid: pd.Series, *, reason: str) -> None:
    if is_invalid.any():
        row = is_invalid.idxmax()
        content = table.rows.loc[row].to_dict()
        raise ValueError(f"{table.file}, row {row}: {reason}: {content}")
