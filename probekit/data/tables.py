"""Tables as people have them, read the same way whatever program wrote them.

=====================  =============================================================================
what may differ        what is read
=====================  =============================================================================
format                 delimited text, JSON, one JSON object per line, Parquet: by the ending of the
                       name (:data:`FORMATS`), in capitals, too
encoding               UTF-8; UTF-16 and UTF-32 by their marks; what can only be cp1252
separator              comma, semicolon, tab, ``|``: the one that parts the first line into columns
                       that have a meaning
header                 names of :data:`COLUMNS`, whatever their capitals, blanks, ``_`` and ``-``
no header              ``name.jpg#0<tab>caption`` (Flickr8k, Flickr30k), or rows of an image's name
                       and a text, with a label or without
quotation marks        around fields with separators; blanks before them do not matter
JSON                   a list of objects; objects one after the other; objects by number; lists by
                       column; captions by name of an image; an object with one list of objects;
                       COCO's lists of images and captions
=====================  =============================================================================

Everything else is refused, with the name of the file and the row.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import ntpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from probekit.data.report import ReadingReport

FORMATS = {
    "text": (".csv", ".tsv", ".txt", ".token"),
    "json": (".json", ".jsonl", ".ndjson"),
    "parquet": (".parquet",),
}
TABLE_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
)
# Formats of images that Pillow lacks, or whose decoders are not used.
UNREAD_SUFFIXES = frozenset(
    (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw")
)

CAPTION_NAMES = ("caption", "captions", "comment", "sentence", "sentences", "description", "raw")
# What a column may hold ▶ how it may be called.
COLUMNS = {
    "image": (
        "file_name",
        "image",
        "image_name",
        "image_path",
        "image_file",
        "img",
        "img_name",
        "img_path",
        "file",
        "file_path",
        "path",
    ),
    "image id": ("image_id", "img_id"),
    "caption": (*CAPTION_NAMES, "text"),
    "text": ("text", "statement", "question", "prompt", *CAPTION_NAMES),
    "label": ("label", "labels", "answer"),
    "negative caption": ("negative_caption",),
    "image 0": ("image_0",),
    "image 1": ("image_1",),
    "caption 0": ("caption_0",),
    "caption 1": ("caption_1",),
}
# What a label may be, in any capitals ▶ what it means.
LABELS = {
    "yes": 1,
    "true": 1,
    "1": 1,
    "1.0": 1,
    "no": 0,
    "false": 0,
    "0": 0,
    "0.0": 0,
}

# What a file begins with ▶ its encoding. The mark of UTF-32 begins with that of UTF-16.
ENCODING_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Characters of cp1252 that stand in Western European texts. The others of its upper half are more
# often what a text in another encoding looks like.
WESTERN = frozenset(
    "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûüÿŒœ€‚„…‘’“”–—•™\xa0¡¿«»©®°±²³½·´§£×"
)
LONGEST_NAME = 80
SEPARATORS = ("\t", "|", ";", ",")
# Only with these may a field be in quotation marks and go on over several lines.
QUOTING_SEPARATORS = (",", ";")
FLICKR_LINES = (
    re.compile(r"([^\t]+)#(?:\w+#)?\d+\t(.*)"),
    re.compile(r"(\S+?)#(?:[A-Za-z]+#)?\d+ +(.*)"),
)
NUMBER_OF_CAPTION = re.compile(r"#(?:\w+#)?\d+$")
QUOTED = re.compile(r'"(?:[^"]|"")*"')


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first few names, none of them whole where it is long."""
    names = list(names)
    first = [name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in names]
    return ", ".join(first[:most]) + (", ..." if len(names) > most else "")


class UnknownColumns(ValueError):
    """A table lacks a column that is needed: it may be a table of something else."""


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Attributes
    ----------
    file : Path
        The file.
    rows : DataFrame
        Indexed by the number of the row, from 1. Columns are called as in the file. Fields of text
        are without blanks around them; those of JSON may be of any type.
    encoding : str
        Encoding of a text file that has no mark of it and is not UTF-8; else "".
    """

    file: Path
    rows: pd.DataFrame
    encoding: str = ""

    def has(self, meaning: str) -> bool:
        """Tell whether there is a column of a meaning, out of :data:`COLUMNS`."""
        return bool(self._places(meaning))

    def column(self, meaning: str) -> pd.Series:
        """Return the column of a meaning, out of :data:`COLUMNS`.

        Of several columns that name images, those count that have the endings of image files.

        Raises
        ------
        UnknownColumns
            There is none.
        ValueError
            There are several, and they differ.
        """
        columns = [self.rows.iloc[:, place] for place in self._places(meaning)]
        if not columns:
            raise UnknownColumns(self.missing([meaning]))
        if meaning == "image" and len(columns) > 1:
            with_files = [one for one in columns if one.map(is_image_name).any()]
            columns = with_files or columns
        first = columns[0]
        for other in columns[1:]:
            is_equal = [
                _comparable(a, meaning) == _comparable(b, meaning)
                for a, b in zip(first, other, strict=True)
            ]
            if not all(is_equal):
                row = self.rows.index[is_equal.index(False)]
                raise ValueError(
                    f"{self.file}: the columns {first.name} and {other.name} both name the "
                    f"{meaning} and differ (row {row}): rename the one that is not meant"
                )
        return first

    def note_encoding(self, report: ReadingReport, kind: str, *, count: int) -> None:
        """Add to a report that the file has another encoding than UTF-8, if it has."""
        if self.encoding:
            report.note(
                self.file,
                kind,
                outcome="corrected",
                count=count,
                reason=f"the file is not UTF-8, and is read as {self.encoding}",
            )

    def missing(self, meanings: Sequence[str]) -> str:
        """Return what is wrong where the table lacks some of the columns that are needed."""
        columns = listed(map(str, self.rows.columns), most=12) or "none"
        lacking = [meaning for meaning in meanings if not self.has(meaning)]
        names = "; ".join(f"{one}: {', '.join(COLUMNS[one])}" for one in lacking)
        return (
            f"{self.file} has no {', '.join(lacking)}: it has the columns {columns}, and needs one "
            f"of these names ({names})"
        )

    def _places(self, meaning: str) -> list[int]:
        """Return the places of the columns of a meaning; an image may be named by its id, too."""
        places = [
            place
            for place, name in enumerate(self.rows.columns)
            if means_any(name, COLUMNS[meaning])
        ]
        return self._places("image id") if meaning == "image" and not places else places


def _column_key(name: object) -> str:
    """Return the name of a column without what programs write differently."""
    return re.sub(r"[\W_]+", "", str(name).casefold())


def means_any(name: object, names: Sequence[str]) -> bool:
    """Tell whether a column has one of several names, whatever its capitals and blanks."""
    return _column_key(name) in set(map(_column_key, names))


MEANINGFUL_KEYS = {_column_key(name) for names in COLUMNS.values() for name in names}


def _comparable(value: object, meaning: str) -> str:
    text = str(value).strip()
    return PurePosixPath(text.replace("\\", "/")).name if meaning == "image" else text


def is_image_name(value: object) -> bool:
    """Tell whether a field ends like the name of an image file."""
    if not isinstance(value, str):
        return False
    return ntpath.splitext(image_name(value))[1].lower() in IMAGE_SUFFIXES


def image_name(field: str) -> str:
    """Return the name of an image without the number of its caption, as in ``1.jpg#0``."""
    return NUMBER_OF_CAPTION.sub("", field.strip()).strip()


def is_empty(value: object) -> bool:
    """Tell whether a field has nothing in it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and not value.strip()


# ----------------------------------------------------------------------------------------- reading


def read_table(file: Path) -> Table:
    """Read a table in any of the forms above.

    Parameters
    ----------
    file : Path
        The table; its ending says which format it has.

    Returns
    -------
    Table
        Without rows that have nothing in them.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is no table, its encoding is not clear, or a row has other fields than there are
        columns. The message names file and row.
    """
    suffix = file.suffix.lower()
    encoding = ""
    try:
        if suffix in FORMATS["parquet"]:
            rows = pd.read_parquet(file).astype(object)
        else:
            text, encoding = decode(file.read_bytes())
            parse = _parse_json if suffix in FORMATS["json"] else _parse_text
            rows = parse(text)
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, OSError, RecursionError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"{file} cannot be read as a table ({reason}): write it as CSV in UTF-8, with "
            "quotation marks around texts that have commas, or as one JSON object per line"
        ) from error
    rows = rows.map(_whole_characters).reset_index(drop=True)
    rows.index = pd.RangeIndex(1, len(rows) + 1, name="row")
    has_content = ~rows.map(is_empty).all(axis=1) if len(rows.columns) else []
    return Table(file, rows[has_content], encoding)


def _whole_characters(value: object) -> object:
    """Return a text that UTF-8 can hold: JSON can spell halves of characters; they become "?"."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def decode(content: bytes) -> tuple[str, str]:
    """Return the text of a file, and its encoding where that was not plain.

    Parameters
    ----------
    content : bytes
        The content of the file.

    Returns
    -------
    text : str
        The text.
    encoding : str
        "" for UTF-8 and for what a mark names.

    Raises
    ------
    ValueError
        The text has no mark, is not UTF-8, and may be in several other encodings.
    """
    for mark, encoding in ENCODING_MARKS:
        if content.startswith(mark):
            return content.decode(encoding), ""
    if b"\0" in content[:4]:  # the first character is of ASCII, its other byte is zero
        encoding = "utf-16-be" if content.startswith(b"\0") else "utf-16-le"
        return content.decode(encoding), encoding
    try:
        return content.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        if _is_western(content):
            return content.decode("cp1252"), "cp1252"
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} is not UTF-8, and which encoding it has is not clear: save it as UTF-8"
        ) from error


def _is_western(content: bytes) -> bool:
    """Tell whether a text can only be in cp1252, the encoding of Western Europe.

    Its letters beyond ASCII are few and stand beside others; no capital follows a small letter.
    """
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        return False
    if not {character for character in text if character > "\x7f"} <= WESTERN:
        return False
    is_dense = re.search(r"[^\x00-\x7f]{3}", text)
    has_capital_inside = re.search(r"[a-zß-ÿ][À-ÞŒ]", text)
    return not is_dense and not has_capital_inside


# -------------------------------------------------------------------------------- delimited text


def _parse_text(text: str) -> pd.DataFrame:
    first_line = next((line for line in _lines(text) if line.strip()), "")
    if not first_line:
        raise ValueError("it is empty")
    for pattern in FLICKR_LINES:
        if pattern.fullmatch(first_line):
            return _parse_flickr_lines(text, pattern)
    separator, kind = _choose_separator(first_line)
    if kind == "unknown":  # its rows mean nothing; missing columns are named where they are needed
        return pd.DataFrame(columns=_split_line(first_line, separator), dtype=object)
    records = [record for record in _split_records(text, separator) if any(record)]
    if kind == "header":
        header, *records = records
    else:
        header = _names_without_header(records)
    while not header[-1] and not any(record[len(header) - 1] for record in records):
        header.pop()
    fields = []
    for row, record in enumerate(records, 1):
        if any(record[len(header) :]):
            raise ValueError(f"row {row} has {len(record)} fields for {len(header)} columns")
        filled = record + [""] * (len(header) - len(record))
        fields.append(filled[: len(header)])
    return pd.DataFrame(fields, columns=header, dtype=object)


def _lines(text: str) -> list[str]:
    # Not splitlines: it also splits at characters that stand within texts, such as U+2028.
    return re.split(r"\r\n|\r|\n", text)


def _parse_flickr_lines(text: str, pattern: re.Pattern[str]) -> pd.DataFrame:
    fields = []
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            match = pattern.fullmatch(line)
            if match is None:
                raise ValueError(f"line {number} is not like the first one: {line[:60]!r}")
            fields.append([match[1].strip(), match[2].strip()])
    return pd.DataFrame(fields, columns=["image", "caption"], dtype=object)


def _choose_separator(first_line: str) -> tuple[str, str]:
    """Return the separator, and what the first line is: ``header``, ``row`` or ``unknown``."""
    by_separator = {mark: _split_line(first_line, mark) for mark in SEPARATORS}
    known = {
        mark: sum(_column_key(field) in MEANINGFUL_KEYS for field in fields)
        for mark, fields in by_separator.items()
    }
    best = max(SEPARATORS, key=lambda mark: known[mark])
    if known[best]:
        return best, "header"
    for mark, fields in by_separator.items():
        if _names_by_content([fields]):
            return mark, "row"
    return max(SEPARATORS, key=lambda mark: len(by_separator[mark])), "unknown"


def _split_line(line: str, separator: str) -> list[str]:
    try:
        return next(iter(_split_records(line, separator)), [])
    except ValueError:  # a field in quotation marks goes on in the next line
        return [line]


def _split_records(text: str, separator: str) -> list[list[str]]:
    if separator in QUOTING_SEPARATORS:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
        )
        try:
            return [[field.strip() for field in record] for record in reader]
        except csv.Error as error:
            records = _split_lines(text, separator)
            if not _may_be_literal(records):
                raise ValueError(f"line {reader.line_num}: {error}") from error
            return records
    return [[_unquote(field) for field in record] for record in _split_lines(text, separator)]


def _split_lines(text: str, separator: str) -> list[list[str]]:
    return [[field.strip() for field in line.split(separator)] for line in _lines(text)]


def _may_be_literal(records: list[list[str]]) -> bool:
    """Tell whether quotation marks can only be part of the texts, as in ``"Stop" sign``."""
    records = [record for record in records if any(record)]
    has_equal_width = len({len(record) for record in records}) == 1
    quoting = [field for record in records for field in record if field.startswith('"')]
    return has_equal_width and all(
        field.count('"') % 2 == 0 and not field.endswith('"') for field in quoting
    )


def _unquote(field: str) -> str:
    return field[1:-1].replace('""', '"') if QUOTED.fullmatch(field) else field


def _names_without_header(records: list[list[str]]) -> list[str]:
    names = _names_by_content(records)
    if not names:
        raise ValueError("its first line has no names of columns, and its rows differ")
    return names


def _names_by_content(records: list[list[str]]) -> list[str]:
    """Return the names of columns by what stands in all rows; none where that says too little.

    It says enough where each row is the name of an image and a text, with a label or without.
    """
    names = []
    for k in range(len(records[0]) if records else 0):
        fields = [record[k] if k < len(record) else "" for record in records]
        if all(map(is_image_name, fields)):
            names.append("image")
        elif all(field.casefold() in LABELS for field in fields):
            names.append("label")
        else:
            names.append("text")
    is_enough = sorted(names) in (["image", "text"], ["image", "label", "text"])
    return names if is_enough else []


# ------------------------------------------------------------------------------------------- JSON


def _parse_json(text: str) -> pd.DataFrame:
    values = _json_values(text)
    rows = _records(values[0]) if len(values) == 1 else values
    if isinstance(rows, pd.DataFrame):
        return rows
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object: {str(row)[:60]}")
    return pd.DataFrame(rows, dtype=object)


def _json_values(text: str) -> list[Any]:
    """Return the values that stand one after the other, on lines of their own or not."""
    decoder = json.JSONDecoder()
    values = []
    blanks = " \t\r\n"
    end = len(text.rstrip(blanks))
    position = 0
    while position < end:
        if text[position] in blanks:
            position += 1
            continue
        value, position = decoder.raw_decode(text, position)
        values.append(value)
    if not values:
        raise ValueError("it is empty")
    return values


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _is_captions(value: object) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) for text in texts)


def _records(content: object) -> list | pd.DataFrame:
    """Return the rows of a whole JSON file, whichever way round they are written."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        return [content]
    values = list(content.values())
    if _has_captions_of_coco(content):
        return _join_captions_of_coco(content)
    if _by_column(content, values):
        return pd.DataFrame(content, dtype=object)
    if values and all(isinstance(value, dict) for value in values):
        return values
    if values and all(map(is_image_name, content)) and all(map(_is_captions, values)):
        return [{"image": name, "captions": captions} for name, captions in content.items()]
    lists = [value for value in values if _is_list_of_objects(value)]
    if len(lists) == 1:
        return lists[0]
    return [content]


def _has_captions_of_coco(content: dict) -> bool:
    lists = [content.get(name) for name in ("images", "annotations")]
    return all(map(_is_list_of_objects, lists)) and "caption" in content["annotations"][0]


def _join_captions_of_coco(content: dict) -> list[dict]:
    names = {image.get("id"): image.get("file_name") for image in content["images"]}
    return [
        {"file_name": names.get(one.get("image_id")), "caption": one.get("caption")}
        for one in content["annotations"]
    ]


def _by_column(content: dict, values: list) -> bool:
    has_meaning = any(_column_key(name) in MEANINGFUL_KEYS for name in content)
    kinds = {type(value) for value in values}
    return has_meaning and kinds in ({list}, {dict}) and len({len(value) for value in values}) == 1
