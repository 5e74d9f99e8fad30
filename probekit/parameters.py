"""What each parameter may be: one table for the notebooks, the command line and the calls."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import numbers
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Names of the types as notebooks declare them, and what counts as one of them.
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (numbers.Integral,),
    "float": (numbers.Real,),
    "bool": (bool,),
    "anything": (object,),
}
PACKAGE = str(Path(__file__).parent)
LONGEST_NAME = 150  # bytes; files that carry a run's name add to it, and 255 is the most


class Remark(UserWarning):
    """A line about what is read as something else than it says."""


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Attributes
    ----------
    type : str
        Out of :data:`TYPES`; of a list, the type of its entries.
    words : str
        What is allowed beyond the type.
    fits : callable
        Whether a value of the type is allowed.
    is_list, may_be_list, may_be_none : bool
        Whether it is a list, or one value or a list of them, and whether it may be nothing.
    """

    type: str
    words: str = ""
    fits: Callable[[Any], bool] = lambda value: True
    is_list: bool = False
    may_be_list: bool = False
    may_be_none: bool = False

    def describe(self) -> str:
        """Say what is allowed."""
        text = f"list of {self.type}" if self.is_list else self.type
        if self.may_be_list:
            text += f" or list of {self.type}"
        text += f" {self.words}" if self.words else ""
        return f"{text}, or null" if self.may_be_none else text

    def allows(self, value: object) -> bool:
        """Tell whether a single value has the type and is allowed."""
        if isinstance(value, bool) and self.type in ("int", "float"):
            return False
        return isinstance(value, TYPES[self.type]) and self.fits(value)


def _between(least: float, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: least <= value <= most


def _is_run_name(name: str) -> bool:
    is_one_folder = name not in ("", ".", "..") and not re.search(r"[/\\\x00-\x1f]", name)
    return is_one_folder and name == name.strip() and len(name.encode()) <= LONGEST_NAME


def _is_not_empty(text: str) -> bool:
    return text.strip() != ""


TEXT = Kind("str", "that is not empty", _is_not_empty)
OPTIONAL_TEXT = Kind("str", "that is not empty", _is_not_empty, may_be_none=True)
TEXTS = Kind("str", "that are not empty", _is_not_empty, is_list=True)
FLAG = Kind("bool", "(true or false)")
COUNT = Kind("int", "from 1", _between(1))
OPTIONAL_COUNT = Kind("int", "from 1", _between(1), may_be_none=True)
SEED = Kind("int", "from 0", _between(0))

# What may stand there. All names are known here: a notebook's parameter, an argument of a call and
# an attribute of settings of the same name mean the same.
PARAMETERS: dict[str, Kind] = {
    "run": Kind(
        "str",
        f"that names one folder: not empty, . or .., no / and \\, up to {LONGEST_NAME} bytes",
        _is_run_name,
    ),
    "dataset": TEXT,
    "folder": TEXT,
    "coco_splits": TEXTS,
    "train": COUNT,
    "validation": COUNT,
    "test": COUNT,
    "tasks": TEXTS,
    "categories": Kind("str", "that is not empty", _is_not_empty, may_be_list=True),
    "labels_from": Kind(
        "str", "out of instances, captions", lambda value: value in ("instances", "captions")
    ),
    "smallest": Kind(
        "float", "from 0 to below 1: a share of the image's area", lambda value: 0 <= value < 1
    ),
    "captions": Kind("int", "from 1 to 5", _between(1, 5)),
    "similarity": TEXT,
    "max_bad": Kind("float", "from 0 to 1: a share, 0.05 for 5 percent", _between(0, 1)),
    "seed": SEED,
    "model": TEXT,
    "models": TEXTS,
    "revision": OPTIONAL_TEXT,
    "untrained": TEXTS,
    "controls": TEXTS,
    "poolings": TEXTS,
    "stages": TEXTS,
    "longest_side": OPTIONAL_COUNT,
    "dtype": OPTIONAL_TEXT,
    "device": OPTIONAL_TEXT,
    "batch_tokens": OPTIONAL_COUNT,
    "sharing": TEXT,
    "workers": Kind("int", "from 0", _between(0), may_be_none=True),
    "shard_images": OPTIONAL_COUNT,
    "engine": TEXT,
    "copies": OPTIONAL_COUNT,
    "activations_root": OPTIONAL_TEXT,
    "trust_remote_code": FLAG,
    "answers": FLAG,
    "probes": TEXTS,
    "seeds": Kind("int", "from 0", _between(0), is_list=True),
    "strengths": Kind(
        "float", "above 0", lambda value: value > 0 and math.isfinite(value), is_list=True
    ),
    "codelength": FLAG,
    "epochs": COUNT,
    "patience": OPTIONAL_COUNT,
    "resamples": COUNT,
    "memory_gb": Kind("float", "above 0", lambda value: value > 0),
    "localise": Kind("str"),
    "n_jobs": COUNT,
    "heat_images": Kind("int", "from 0", _between(0)),
    "watch": TEXTS,
    "layers": Kind("int", "from 0", _between(0), is_list=True),
    "tokens": TEXTS,
    "erase": TEXTS,
    "doses": Kind("float", "that is finite", math.isfinite, is_list=True),
    "routes": TEXTS,
    "window": OPTIONAL_COUNT,
    "inputs": TEXTS,
    "images": Kind("int", "from 2", _between(2)),
    "fit_images": COUNT,
    "probe": TEXT,
    "published": FLAG,
    "relative_depth": FLAG,
    "pictures": FLAG,
}


def read_parameter(name: str, value: Any, kind: Kind | None = None) -> Any:
    """Return a value as it is meant.

    A single value for a list is read as a list of one, and a remark says so.

    Parameters
    ----------
    name : str
        Of the parameter.
    value
        As a YAML file or a call has it.
    kind : Kind or None
        None takes that of :data:`PARAMETERS`.

    Returns
    -------
    object
        The value; lists are tuples.

    Raises
    ------
    ValueError
        It is not allowed: the message names the parameter and what is.

    Warns
    -----
    Remark
        It is read as something else than it says.
    """
    kind = kind or PARAMETERS[name]
    if value is None and kind.may_be_none:
        return None
    is_several = _is_several(value)
    if is_several and (kind.is_list or kind.may_be_list):
        entries = tuple(_text_of_path(entry) for entry in value)
        for entry in entries:
            if not kind.allows(entry):
                raise ValueError(_refusal(name, entry, kind, entries=entries))
        return entries
    value = _text_of_path(value)
    if is_several or not kind.allows(value):
        raise ValueError(_refusal(name, value, kind))
    if not kind.is_list:
        return value
    if kind.type == "str" and re.search(r"[,;\[\]]", str(value)):  # several, or one?
        raise ValueError(_refusal(name, value, kind))
    remark(f"{name}={value!r} is read as a list of one: [{value}]")
    return (value,)


def remark(text: str) -> None:
    """Warn with one line, at the line outside of this package that led here."""
    level = 1
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
        level += 1
    warnings.warn(text, Remark, stacklevel=level)


def read_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by name as they are meant, see :func:`read_parameter`.

    Raises
    ------
    ValueError
        A value is not allowed.
    """
    return {name: read_parameter(name, value) for name, value in values.items()}


def read_settings(settings_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values for the attributes of a dataclass of settings as they are meant.

    Raises
    ------
    ValueError
        There is no such setting, or a value is not allowed.
    """
    fields = dataclasses.fields(settings_class)
    types = {field.name: field.type for field in fields if field.kw_only}
    kinds = {name: PARAMETERS[name] for name in types if name in PARAMETERS}
    settings = {}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"there is no setting {name!r}{suggest(name, set(kinds))}")
        # `untrained` is a list of models in a run, and a flag of one model.
        kind = FLAG if types[name] == "bool" else kinds[name]
        settings[name] = read_parameter(name, value, kind)
    return settings


def suggest(name: str, names: set[str] | Mapping[str, Any]) -> str:
    """Return which of the names may have been meant, and all of them, as the end of a message."""
    similar = difflib.get_close_matches(name, names, 1)
    suggestion = f" (did you mean {similar[0]!r}?)" if similar else ""
    return f"{suggestion}; there are {', '.join(sorted(names))}"


def _is_several(value: object) -> bool:
    if isinstance(value, str | bytes | Mapping):
        return False
    return hasattr(value, "__iter__")


def _text_of_path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _refusal(name: str, value: object, kind: Kind, *, entries: tuple | None = None) -> str:
    """Say that a value, or an entry of a list, is not allowed, and how to write what was meant."""
    place = f"{name}={value!r}: " if entries is None else f"{name}={list(entries)}: {value!r}, "
    return f"{place}expected {kind.describe()}{_hint(value, kind)}"


def _hint(value: object, kind: Kind) -> str:
    if kind.type == "str" and not isinstance(value, str):
        if isinstance(value, bool):
            return (
                " (YAML reads yes, no, on, off and true, false without quotes as truth values: "
                'write "no" in quotes)'
            )
        if value is None:
            return " (YAML reads null, ~ and what is left empty as nothing)"
        if not _is_several(value) and not isinstance(value, Mapping):
            return f' (if it is meant as text, write "{value}" in quotes)'
    if isinstance(value, str) and kind.type in ("int", "float"):
        return " (in YAML 12 and 1.0e-3 are numbers, while '12' and 1e-3 are text)"
    if isinstance(value, str) and kind.is_list:
        return " (in YAML a list is [a, b])"
    return ""
