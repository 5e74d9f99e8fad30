r"""What COCO's records may hold as exporters write them, and what it means.

================  =======================================  ======================================
field             what may stand there                     what it means
================  =======================================  ======================================
id, image_id,     a whole number, ``7.0``, ``"7"``         the number
category_id       any other text                           the text
file_name         text, with ``/`` or ``\``                 a file below the folder of its split
width, height     a number above 0, ``320.0``, ``"320"``   pixels
                  nothing, 0, -1, null                     what the file says
caption           text with a letter or a digit            the caption
                  text without                             no caption: left out, and counted
bbox              four finite numbers, ``1.5``, ``"1.5"``   x, y, w, h, see :mod:`.boxes`
area              a number above 0, ``12.5``, ``"12.5"``   square pixels
                  nothing, 0, null, less than 1 in all     w times h
iscrowd           0, 1, false, true                        whether the outline is of a crowd
                  nothing, null                            0
attributes        an object with ``colour``                the colour of a drawn scene's object
                  anything else                            no colour
category name     text with a letter or a digit            the category, whatever its id is
================  =======================================  ======================================

Any other value is an error of its record. The record is left out, and counted.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]

# How text spells a length or an area.
MEASURE = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


class BadRecord(ValueError):
    """A record holds something that has no meaning; the message names field and value."""


class ImageRecord(NamedTuple):
    """An image: 0 pixels where only the file knows its size."""

    image_id: Hashable
    file_name: str
    width: int
    height: int


class CaptionRecord(NamedTuple):
    """A caption; "" where there is none."""

    image_id: Hashable
    caption: str


class InstanceRecord(NamedTuple):
    """An object in an image; its area is 0 where it is that of its box.

    Its outline is None, a list of polygons (t, 2) in pixels, or a run-length encoding of COCO's.
    """

    image_id: Hashable
    category: str
    x: float
    y: float
    w: float
    h: float
    area: float
    iscrowd: int
    colour: str | None
    outline: list | dict | None = None


class CategoryRecord(NamedTuple):
    """A category and the one above it."""

    category_id: Hashable
    name: str
    supercategory: str | None


def read_records(records: Sequence, parse: Callable[[Record], Any]) -> tuple[list, list[str]]:
    """Read records of one kind, and note which could not be read.

    Parameters
    ----------
    records : sequence
    parse : callable
        Makes a record of the kind, or raises :class:`BadRecord`.

    Returns
    -------
    rows : list
        What `parse` made of each record that could be read.
    errors : list of str
        One for each of the others: its place, its id, and the reason.
    """
    rows = []
    errors = []
    for place, record in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise BadRecord(f"{record!r:.40} is no record")
            rows.append(parse(record))
        except BadRecord as error:
            number = record.get("id") if isinstance(record, dict) else None
            errors.append(f"record {place + 1} (id {number!r}): {error}")
    return rows, errors


def parse_image(record: Record) -> ImageRecord:
    """Read an image."""
    return ImageRecord(
        _identifier(record, "id"),
        _text(record, "file_name"),
        _size(record, "width"),
        _size(record, "height"),
    )


def parse_caption(record: Record) -> CaptionRecord:
    """Read a caption."""
    caption = _text(record, "caption")
    has_words = any(map(str.isalnum, caption))
    return CaptionRecord(_identifier(record, "image_id"), caption if has_words else "")


def parse_category(record: Record) -> CategoryRecord:
    """Read a category."""
    name = _text(record, "name").strip()
    if not any(map(str.isalnum, name)):
        raise BadRecord(f"name {name!r:.40} has neither a letter nor a digit")
    above = record.get("supercategory")
    return CategoryRecord(
        _identifier(record, "id"), name, above if isinstance(above, str) else None
    )


def parse_instance(record: Record, categories: Mapping[Hashable, str]) -> InstanceRecord:
    """Read an object.

    Parameters
    ----------
    record : mapping
    categories : mapping
        From ids of categories to their names.
    """
    image_id = _identifier(record, "image_id")
    category_id = _identifier(record, "category_id")
    if category_id not in categories:
        raise BadRecord(f"category_id {record['category_id']!r} is not among the categories")
    attributes = record.get("attributes")
    colour = attributes.get("colour") if isinstance(attributes, dict) else None
    return InstanceRecord(
        image_id,
        categories[category_id],
        *_box(record),
        _area(record),
        _flag(record, "iscrowd"),
        colour if isinstance(colour, str) else None,
        record.get("segmentation"),
    )


def _value(record: Record, name: str) -> Any:
    if name not in record:
        raise BadRecord(f"{name} is missing")
    return record[name]


def _identifier(record: Record, name: str) -> Hashable:
    value = _value(record, name)
    number = _number(value)
    if number is not None and number == int(number):
        return int(number)
    if isinstance(value, str) and value.strip():
        return _clean(value.strip())
    raise BadRecord(f"{name} {value!r:.40} is neither a whole number nor text")


def _text(record: Record, name: str) -> str:
    value = _value(record, name)
    if not isinstance(value, str):
        raise BadRecord(f"{name} {value!r:.40} is no text")
    return _clean(value)


def _clean(text: str) -> str:
    """Return text that UTF-8 can hold: JSON can spell single halves of surrogate pairs."""
    return text.encode(errors="replace").decode()


def _size(record: Record, name: str) -> int:
    value = record.get(name)
    if value is None or value == -1:
        return 0
    number = _measure(value)
    if number is None or number < 0 or number != int(number):
        raise BadRecord(f"{name} {value!r:.40} is no number of pixels")
    return int(number)


def _box(record: Record) -> tuple[float, float, float, float]:
    value = _value(record, "bbox")
    if not isinstance(value, list) or len(value) != 4:
        raise BadRecord(f"bbox {value!r:.60} does not have four numbers")
    numbers = [number for number in map(_measure, value) if number is not None]
    if len(numbers) != 4:
        raise BadRecord(f"bbox {value!r:.60} does not have four finite numbers")
    x, y, w, h = numbers
    if w < 0 or h < 0:
        raise BadRecord(f"bbox {value!r:.60} has a negative width or height")
    return x, y, w, h


def _area(record: Record) -> float:
    value = record.get("area")
    if value is None:
        return 0
    number = _measure(value)
    if number is None or number < 0:
        raise BadRecord(f"area {value!r:.40} is no number of square pixels")
    return number


def _flag(record: Record, name: str) -> int:
    value = record.get(name)
    if value in (None, 0, 1):  # False and True are 0 and 1
        return int(value or 0)
    raise BadRecord(f"{name} {value!r:.40} is neither 0 nor 1")


def _measure(value: object) -> float | None:
    """Return a finite length or area, also where text spells it; None for anything else."""
    if isinstance(value, str) and MEASURE.fullmatch(value.strip()):
        value = float(value)
    return _number(value)


def _number(value: object) -> float | None:
    """Return a finite number, also where text spells a whole one; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() and len(value) < 19 else None
    if isinstance(value, (int, float)):
        # Not math.isfinite alone: JSON can spell integers that no float can hold.
        is_finite = abs(value) <= sys.float_info.max and not math.isnan(value)
        return value if is_finite else None
    return None
