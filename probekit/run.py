"""The notebooks as a batch: one file of parameters, executed one after the other with papermill."""

from __future__ import annotations

import ast
from datetime import datetime
from pathlib import Path

import papermill
import yaml

from probekit import paths

QUIET = ["--IPKernelApp.log_level=40"]  # a kernel's warning that it listens on the loopback interface


def notebooks() -> list[Path]:
    return sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def declared(notebook: Path) -> dict[str, object]:
    """The parameters of a notebook and their default values."""
    found = papermill.inspect_notebook(str(notebook))
    return {name: ast.literal_eval(about["default"]) for name, about in found.items()}


def read_parameters(file: Path, overrides: list[str]) -> dict[str, object]:
    """Parameters of a YAML file, changed by ``key=value`` texts whose values are YAML.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; broken YAML; an override without ``=``.
    """
    if not file.exists():
        known = ", ".join(str(p.relative_to(paths.ROOT)) for p in sorted((paths.NOTEBOOKS / "params").glob("*.yaml")))
        raise FileNotFoundError(f"{file} does not exist; there are {known}")
    try:
        parameters = yaml.safe_load(file.read_text()) or {}
        for text in overrides:
            key, sign, value = text.partition("=")
            if not sign:
                raise ValueError(f"-p {text}: write -p {text}=VALUE")
            parameters[key.strip()] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} or a -p value is not YAML: {error}") from None
    return parameters


def checked(parameters: dict[str, object], defaults: dict[str, object]) -> dict[str, object]:
    """Refuse names that no notebook declares, and texts where a number is meant.

    Raises
    ------
    ValueError
        The message names the parameter and the mend.
    """
    for name, value in parameters.items():
        if name not in defaults:
            raise ValueError(f"no notebook declares the parameter {name!r}; there are {', '.join(sorted(defaults))}")
        default = defaults[name]
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if (number and isinstance(value, str)) or (isinstance(default, bool) and not isinstance(value, bool)):
            hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if number else " (true or false)"
            raise ValueError(f"parameter {name!r} is {value!r}, expected something like {default!r}{hint}")
    return parameters


def run(file: Path, overrides: list[str], start: str = "01") -> Path:
    """Execute the notebooks from number `start` on; returns the folder of the executed copies.

    Raises
    ------
    papermill.PapermillExecutionError
        A cell failed; its notebook, as far as it came, is in the returned folder's place (``data/runs/<stamp>``).
    """
    books = [book for book in notebooks() if book.name[:2] >= start[:2]]
    if not books:
        raise ValueError(f"--from {start}: there are {', '.join(book.stem for book in notebooks())}")
    declarations = {book: declared(book) for book in notebooks()}
    everything = {name: value for names in declarations.values() for name, value in names.items()}
    parameters = checked(read_parameters(file, overrides), everything)
    folder = paths.DATA / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-{file.stem}"
    folder.mkdir(parents=True)
    for book in books:
        mine = {name: value for name, value in parameters.items() if name in declarations[book]}
        papermill.execute_notebook(str(book), str(folder / book.name), mine, kernel_name="python3", cwd=str(paths.ROOT),
                                   progress_bar={"desc": book.stem}, extra_arguments=QUIET)
    return folder
