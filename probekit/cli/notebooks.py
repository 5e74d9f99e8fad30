"""The notebooks as a batch: one file of parameters, executed one after the other with papermill."""

from __future__ import annotations

import ast
import difflib
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import papermill
import yaml
from nbclient.exceptions import DeadKernelError

from probekit import paths

QUIET = ["--IPKernelApp.log_level=40"]  # a kernel's warning that it listens on the loopback interface


def notebooks() -> list[Path]:
    return sorted(paths.Home.find().notebooks.glob("[0-9][0-9]_*.ipynb"))


@dataclass(frozen=True)
class Parameter:
    """What a notebook declares: ``name = default  # type: kind  meaning``."""

    kind: str
    default: object
    notebook: str


def declared(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook."""
    found = papermill.inspect_notebook(str(notebook))
    return {name: Parameter(about["inferred_type_name"], ast.literal_eval(about["default"]), notebook.stem)
            for name, about in found.items()}


class NotebookFailed(RuntimeError):
    """A cell failed, or the kernel died; the message says where to look."""


def read_parameters(file: Path, overrides: list[str]) -> dict[str, object]:
    """Parameters of a YAML file, changed by ``key=value`` texts whose values are YAML.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; broken YAML; an override without ``=``.
    """
    if not file.is_file():
        known = ", ".join(str(p.relative_to(paths.Home.find().root)) for p in sorted((paths.Home.find().notebooks / "params").glob("*.yaml")))
        raise FileNotFoundError(f"{file} does not exist; there are {known}")
    try:
        parameters, changed = yaml.safe_load(file.read_text()) or {}, {}
        if not isinstance(parameters, dict):
            raise ValueError(f"{file} must hold lines of name: value")
        for text in overrides:
            key, sign, value = text.partition("=")
            if not sign:
                raise ValueError(f"-p {text}: write -p {text}=VALUE")
            changed[key.strip()] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} or a -p value is not YAML: {error}") from None
    return parameters | changed


KINDS = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "list": (list,), "str|list": (str, list)}


def checked(parameters: dict[str, object], known: dict[str, Parameter]) -> dict[str, object]:
    """Refuse names that no notebook declares, and values of another type than declared.

    Raises
    ------
    ValueError
        The message names the parameter and the mend.
    """
    for name, value in parameters.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"no notebook declares the parameter {name!r}{meant}; there are "
                             f"{', '.join(sorted(known))}")
        about = known[name]
        fits = isinstance(value, KINDS[about.kind]) and (about.kind == "bool" or not isinstance(value, bool))
        if about.kind == "list" and fits and about.default:
            fits = all(isinstance(entry, str) == isinstance(about.default[0], str) for entry in value)
        if not fits and not (value is None and about.default is None):
            like = "or null" if about.default is None else f"like {about.default!r}"
            hint = " (in YAML a list is [a, b], and 1e-3 is text, 1.0e-3 a number)" if isinstance(value, str) else ""
            told = f"parameter {name!r} of {about.notebook} is {value!r}"
            raise ValueError(f"{told}, expected {about.kind}, {like}{hint}")
    return parameters


def parameters_of(book: Path, file: Path, overrides: list[str]) -> dict[str, object]:
    """The parameters of one notebook: what a file and overrides say, else what it declares.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`read_parameters` and :func:`checked`.
    """
    known = {name: about for one in notebooks() for name, about in declared(one).items()}
    given = checked(read_parameters(file, overrides), known)
    return {name: given.get(name, about.default) for name, about in declared(book).items()}


def run(file: Path, overrides: list[str], start: str = "01", end: str = "99") -> Path:
    """Execute the notebooks from number `start` to `end`; returns the folder of the executed copies.

    Raises
    ------
    FileNotFoundError, ValueError
        What the parameters say is not there or not right; nothing has been run.
    NotebookFailed
        A notebook stopped; the message shows the cell and where the notebook lies, as far as it came.
    """
    books = [book for book in notebooks() if start[:2].zfill(2) <= book.name[:2] <= end[:2].zfill(2)]
    if not books:
        raise ValueError(f"--from {start} --to {end}: there are {', '.join(book.stem for book in notebooks())}")
    declarations = {book: declared(book) for book in notebooks()}
    known = {name: about for own in declarations.values() for name, about in own.items()}
    parameters = checked(read_parameters(file, overrides), known)
    for name in (text.partition("=")[0].strip() for text in overrides):
        if not any(name in declarations[book] for book in books):
            print(f"probekit: -p {name} is for {known[name].notebook}, which is not run now: it changes nothing here",
                  file=sys.stderr)
    folder = paths.Home.find().data / "runs" / f"{datetime.now():%Y%m%d-%H%M%S.%f}-{file.stem}"
    folder.mkdir(parents=True)
    for book in books:
        mine = {name: value for name, value in parameters.items() if name in declarations[book]}
        try:
            papermill.execute_notebook(str(book), str(folder / book.name), mine, kernel_name="python3",
                                       cwd=str(paths.Home.find().root), progress_bar={"desc": book.stem}, extra_arguments=QUIET)
        except papermill.PapermillExecutionError as error:
            told = f"A cell of {book.stem} failed:\n\n{error.source}\n\n{error.ename}: {error.evalue}"
            raise NotebookFailed(f"{told}\n\nThe notebook as far as it came: {folder / book.name}") from error
        except DeadKernelError as error:
            raise NotebookFailed(f"The kernel of {book.stem} died, most likely for want of memory: run it again "
                                 f"with a smaller batch_tokens, which goes on where this stopped. The notebook as far "
                                 f"as it came: {folder / book.name}") from error
    return folder
