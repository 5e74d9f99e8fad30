"""Parameters of the notebooks: declared once, refused by name where they are wrong."""

from __future__ import annotations

import ast
import re

import nbformat
import pytest

from probekit.cli.main import main
from probekit.cli.notebooks import (
    all_declared_parameters,
    check_parameters,
    declared_parameters,
    read_parameters,
)
from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
PARAMETER_FILES = sorted((REPOSITORY / "notebooks" / "params").glob("*.yaml"))
DEMO = str(REPOSITORY / "notebooks" / "params" / "demo.yaml")
DECLARATION = r"\w+ = .+  # type: (str|int|float|bool|list|str\|list)  .{10,}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code_cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for cell in code_cells:
        assert not cell.outputs
        assert cell.execution_count is None
        definitions = (ast.FunctionDef, ast.ClassDef)
        assert not any(isinstance(node, definitions) for node in ast.walk(ast.parse(cell.source)))
    lines = tagged[0].source.splitlines()
    for line in lines:
        assert re.fullmatch(DECLARATION, line), line
    assert list(declared_parameters(path)) == [line.split(" = ")[0] for line in lines]


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda path: path.stem)
def test_the_shipped_parameter_files_are_accepted(path):
    parameters = read_parameters(path, [])
    check_parameters(parameters, all_declared_parameters())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian=5", "did you mean 'train'"),
        ("longest_side=wide", "expected int, or null"),
        ("max_bad=1e-2", "1.0e-3 a number"),
        ("pictures=maybe", "expected bool"),
        ("models=tiny-qwen2-vl", "a list is [a, b]"),
        ("strengths=[1e-5]", "expected list, like [1e-05"),
        ("train=1.5", "expected int"),
        ("run=2024", "expected str"),
        ("seeds=0", "expected list"),
        ("train", "train=VALUE"),
        ("train=[", "not YAML"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(override, message, capsys):
    assert main(["run", "--params", DEMO, "-p", override]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there_names_those_that_are(capsys):
    assert main(["run", "--params", "nowhere.yaml"]) == 2
    assert "notebooks/params/demo.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_a_parameter_of_a_notebook_that_does_not_run_is_reported(data, capsys):
    arguments = ["run", "--params", DEMO, "-p", "train=5", "-p", "run=none"]
    assert main([*arguments, "--from", "04", "--to", "04"]) == 1
    assert "-p train is for 01_build_data, which is not run now" in capsys.readouterr().err
