"""The notebooks as a batch: one file of parameters, executed one after the other with papermill."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import papermill
import yaml
from nbclient.exceptions import DeadKernelError

from probekit.paths import Home

# A kernel warns that it listens on the loopback interface.
KERNEL_ARGUMENTS = ["--IPKernelApp.log_level=40"]
PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "list": (list,),
    "str|list": (str, list),
}


class NotebookFailedError(RuntimeError):
    """A cell failed, or the kernel died; the message says where to look."""


@dataclass(frozen=True)
class Parameter:
    """What a notebook declares: ``name = default  # type: kind  meaning``.

    Attributes
    ----------
    kind : str
        Out of :data:`PYTHON_TYPES`.
    default : object
    notebook : str
    """

    kind: str
    default: object
    notebook: str


def list_notebooks() -> list[Path]:
    """Return the numbered notebooks in their order."""
    return sorted(Home.find().notebooks.glob("[0-9][0-9]_*.ipynb"))


def find_notebook(name: str) -> Path:
    """Return a notebook by its name without ending.

    Raises
    ------
    FileNotFoundError
        It is not there.
    """
    for notebook in list_notebooks():
        if notebook.stem == name:
            return notebook
    raise FileNotFoundError(
        f"{Home.find().notebooks} has no notebook {name}: start in a checkout of probekit, or name "
        "one in PROBEKIT_HOME"
    )


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """Return the parameters that a notebook declares, by name."""
    inspected = papermill.inspect_notebook(str(notebook))
    return {
        name: Parameter(
            parameter["inferred_type_name"],
            ast.literal_eval(parameter["default"]),
            notebook.stem,
        )
        for name, parameter in inspected.items()
    }


def all_declared_parameters() -> dict[str, Parameter]:
    """Return the parameters that any notebook declares, by name."""
    parameters: dict[str, Parameter] = {}
    for notebook in list_notebooks():
        parameters |= declared_parameters(notebook)
    return parameters


# -------------------------------------------------------------------------------- files of
# parameters


def read_parameters(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Read the parameters of a YAML file, changed by ``key=value`` texts whose values are YAML.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; broken YAML; an override without ``=``.
    """
    home = Home.find()
    if not file.is_file():
        shipped = sorted((home.notebooks / "params").glob("*.yaml"))
        names = ", ".join(home.relative(one) for one in shipped)
        raise FileNotFoundError(f"{file} does not exist; there are {names}")
    try:
        parameters = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"{file} must hold lines of name: value")
        for override in overrides:
            key, sign, value = override.partition("=")
            if not sign:
                raise ValueError(f"-p {override}: write -p {override}=VALUE")
            parameters[key.strip()] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} or a -p value is not YAML: {error}") from None
    return parameters


def check_parameters(parameters: dict[str, object], declared: dict[str, Parameter]) -> None:
    """Refuse names that no notebook declares, and values of another type than declared.

    Raises
    ------
    ValueError
        The message names the parameter and the fix.
    """
    for name, value in parameters.items():
        if name not in declared:
            raise ValueError(_unknown_parameter(str(name), declared))
        if not _has_declared_type(value, declared[name]):
            raise ValueError(_wrong_type(name, value, declared[name]))


def _unknown_parameter(name: str, declared: dict[str, Parameter]) -> str:
    similar = difflib.get_close_matches(name, declared, 1)
    suggestion = f" (did you mean {similar[0]!r}?)" if similar else ""
    names = ", ".join(sorted(declared))
    return f"no notebook declares the parameter {name!r}{suggestion}; there are {names}"


def _has_declared_type(value: object, parameter: Parameter) -> bool:
    if value is None:
        return parameter.default is None
    if isinstance(value, bool) and parameter.kind != "bool":
        return False
    if not isinstance(value, PYTHON_TYPES[parameter.kind]):
        return False
    if isinstance(value, list) and isinstance(parameter.default, list) and parameter.default:
        wants_text = isinstance(parameter.default[0], str)
        return all(isinstance(entry, str) == wants_text for entry in value)
    return True


def _wrong_type(name: str, value: object, parameter: Parameter) -> str:
    example = "or null" if parameter.default is None else f"like {parameter.default!r}"
    message = (
        f"parameter {name!r} of {parameter.notebook} is {value!r}, expected {parameter.kind}, "
        f"{example}"
    )
    if isinstance(value, str | list):
        message += " (in YAML a list is [a, b], and 1e-3 is text, 1.0e-3 a number)"
    return message


def read_notebook_parameters(
    notebook: Path, file: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    """Return the parameters of one notebook: what a file and overrides say, else what it declares.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`read_parameters` and :func:`check_parameters` raise them.
    """
    given = read_parameters(file, overrides)
    check_parameters(given, all_declared_parameters())
    return {
        name: given.get(name, parameter.default)
        for name, parameter in declared_parameters(notebook).items()
    }


# -----------------------------------------------------------------------------------------
# execution


def execute_notebooks(
    file: Path, overrides: Sequence[str], *, start: str = "01", end: str = "99"
) -> Path:
    """Execute the notebooks from number `start` to `end`.

    Returns
    -------
    Path
        The folder of the executed copies.

    Raises
    ------
    FileNotFoundError, ValueError
        What the parameters say is not there or not right; nothing has been run.
    NotebookFailedError
        A notebook stopped; the message shows the cell, and where the notebook lies as far as it
        came.
    """
    first = start[:2].zfill(2)
    last = end[:2].zfill(2)
    notebooks = [notebook for notebook in list_notebooks() if first <= notebook.name[:2] <= last]
    if not notebooks:
        names = ", ".join(notebook.stem for notebook in list_notebooks())
        raise ValueError(f"--from {start} --to {end}: there are {names}")
    parameters = read_parameters(file, overrides)
    declared = all_declared_parameters()
    check_parameters(parameters, declared)
    _report_unused_overrides(overrides, notebooks, declared)
    home = Home.find()
    folder = home.data / "runs" / f"{datetime.now():%Y%m%d-%H%M%S.%f}-{file.stem}"
    folder.mkdir(parents=True)
    for notebook in notebooks:
        declared = declared_parameters(notebook)
        values = {name: value for name, value in parameters.items() if name in declared}
        _execute(notebook, folder / notebook.name, values, home)
    return folder


def _report_unused_overrides(
    overrides: Sequence[str], notebooks: Sequence[Path], declared: dict[str, Parameter]
) -> None:
    used: set[str] = set()
    for notebook in notebooks:
        used |= set(declared_parameters(notebook))
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name not in used:
            print(
                f"probekit: -p {name} is for {declared[name].notebook}, which is not run now: it "
                "changes nothing here",
                file=sys.stderr,
            )


def _execute(notebook: Path, target: Path, values: dict[str, object], home: Home) -> None:
    try:
        papermill.execute_notebook(
            str(notebook),
            str(target),
            values,
            kernel_name="python3",
            cwd=str(home.root),
            progress_bar={"desc": notebook.stem},
            extra_arguments=KERNEL_ARGUMENTS,
        )
    except papermill.PapermillExecutionError as error:
        raise NotebookFailedError(
            f"A cell of {notebook.stem} failed:\n\n{error.source}\n\n{error.ename}: "
            f"{error.evalue}\n\nThe notebook as far as it came: {target}"
        ) from error
    except DeadKernelError as error:
        raise NotebookFailedError(
            f"The kernel of {notebook.stem} died, most likely for want of memory: run it again "
            "with a smaller batch_tokens, which goes on where this stopped. The notebook as far "
            f"as it came: {target}"
        ) from error
