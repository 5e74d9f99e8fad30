"""Parameters of the notebooks: declared once, refused by name where they are wrong."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from probekit import paths
from probekit.cli.main import main
from probekit.cli.notebooks import (
    Parameter,
    all_declared_parameters,
    check_parameters,
    declared_parameters,
    list_copies,
    list_notebooks,
    read_parameters,
)
from probekit.parameters import PARAMETERS, Remark, read_parameter
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
        ("longest_side=wide", "longest_side='wide': expected int from 1, or null"),
        ("max_bad=1e-2", "1.0e-3 are numbers"),
        ("max_bad=5", "max_bad=5: expected float from 0 to 1: a share, 0.05 for 5 percent"),
        ("pictures=maybe", "expected bool"),
        ("models=tiny-qwen2-vl, tiny-fast-vlm", "a list is [a, b]"),
        ("models=[]", "models=[]: name at least one"),
        ("models=[tiny-qwen2-vl, tiny-qwen2-vl]", "name each model once"),
        ("untrained=[qwen2-vl-2b]", "qwen2-vl-2b is no model of this run"),
        ("strengths=[1e-5]", "'1e-5', expected list of float above 0"),
        ("strengths=[0.1, 0]", "strengths=[0.1, 0]: 0, expected list of float above 0"),
        ("train=1.5", "expected int"),
        ("train=0", "train=0: expected int from 1"),
        ("validation=-5", "validation=-5: expected int from 1"),
        ("seed=-1", "seed=-1: expected int from 0"),
        ("run=2024", "expected str"),
        ("run=", "run=None: expected str that names one folder"),
        ("run=''", "run='': expected str that names one folder"),
        ("run=../../out", "run='../../out': expected str that names one folder"),
        ("run=/tmp/out", "run='/tmp/out': expected str that names one folder"),
        ("run=no", "run=False: expected str"),
        ("categories=[yes, no]", 'write "no" in quotes'),
        ("categories=[7]", 'write "7" in quotes'),
        ("copies=0", "copies=0: expected int from 1"),
        ("sharing=maybe", "sharing='maybe': take out of auto, on, off"),
        ("engine=slurm", "engine='slurm': take out of local, ray"),
        ("tasks=[captoin]", "unknown tasks ['captoin']"),
        ("controls=[blurred]", "unknown controls ['blurred']"),
        ("probes=[svm]", "unknown probes ['svm']"),
        ("probe=svm", "probe='svm': take one of logreg"),
        ("models=[nowhere]", "no checkpoint with the name nowhere"),
        ("train", "train=VALUE"),
        ("train=[", "not YAML"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(override, message, capsys):
    assert main(["run", "--params", DEMO, "-p", override]) == 2
    assert message in capsys.readouterr().err


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path, capsys):
    file = tmp_path / "twice.yaml"
    file.write_text("run: c\ntrain: 12\n\ntrain: 6\n", encoding="utf-8")
    assert main(["run", "--params", str(file)]) == 2
    assert f"{file}: 'train' stands twice, in line 2 and in line 4" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_parameter_file_is_read_as_unicode(encoding, tmp_path):
    file = tmp_path / "unicode.yaml"
    file.write_bytes("run: Läufe – 画\n".encode(encoding))
    assert read_parameters(file, []) == {"run": "Läufe – 画"}


def test_a_file_of_another_encoding_is_named(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_bytes("run: Läufe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"old\.yaml is not YAML in UTF-8 .*save it as UTF-8"):
        read_parameters(file, [])


def test_a_folder_of_parameters_is_called_a_folder(capsys):
    assert main(["run", "--params", str(REPOSITORY / "notebooks" / "params")]) == 2
    assert "is a folder: name a file of parameters" in capsys.readouterr().err


def test_a_relative_file_is_looked_for_beside_the_notebooks_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_parameters(Path("notebooks/params/demo.yaml"), [])["run"] == "demo"


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [("models", "tiny-qwen2-vl", ["tiny-qwen2-vl"]), ("seeds", 3, [3]), ("strengths", 1, [1])],
)
def test_one_value_is_a_list_of_one_and_a_line_says_so(name, value, meant):
    with pytest.warns(Remark, match=f"{name}=.* is read as a list of one"):
        assert check_parameters({name: value}, all_declared_parameters()) == {name: meant}


def test_every_declared_parameter_has_its_kind_in_the_table():
    for name, parameter in all_declared_parameters().items():
        kind = PARAMETERS[name]
        words = {"list": kind.is_list, "str|list": kind.may_be_list}
        assert words.get(parameter.kind, parameter.kind == kind.type)
        read_parameter(name, parameter.default)


def test_a_parameter_of_a_users_notebook_keeps_its_declared_type():
    declared = {"depth": Parameter("int", 3, "06_mine"), "things": Parameter("list", [], "06_mine")}
    assert check_parameters({"depth": 4, "things": [1, "a"]}, declared) == {
        "depth": 4,
        "things": [1, "a"],
    }
    with pytest.raises(ValueError, match="depth='deep': expected int"):
        check_parameters({"depth": "deep"}, declared)


# ------------------------------------------------------------------------- which notebooks are run


@pytest.fixture
def copied_notebooks(tmp_path, monkeypatch):
    """The notebooks' folder of a home of the test's own."""
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path))
    return shutil.copytree(REPOSITORY / "notebooks", tmp_path / "notebooks")


@pytest.mark.parametrize("ending", ["-Copy1", "-Copy1-Copy2", " copy", " (1)", "-checkpoint"])
def test_copies_of_notebooks_are_not_run(copied_notebooks, ending):
    names = [notebook.name for notebook in list_notebooks()]
    copy = copied_notebooks / f"01_build_data{ending}.ipynb"
    shutil.copy(copied_notebooks / "01_build_data.ipynb", copy)
    shutil.copy(copied_notebooks / "03_probe.ipynb", copied_notebooks / "07_copy_of_mine.ipynb")
    assert [one.name for one in list_notebooks()] == [*names, "07_copy_of_mine.ipynb"]
    assert list_copies() == [copy]


def test_notebooks_are_those_of_the_checkout_where_the_home_has_none(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path))
    assert list_notebooks() == NOTEBOOKS
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path / "site-packages")
    monkeypatch.chdir(REPOSITORY / "docs")
    assert list_notebooks() == NOTEBOOKS
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="set PROBEKIT_HOME"):
        list_notebooks()


# ------------------------------------------------------------------------------------- the command


def test_a_file_that_is_not_there_names_those_that_are(capsys):
    assert main(["run", "--params", "nowhere.yaml"]) == 2
    assert "notebooks/params/demo.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_a_parameter_of_a_notebook_that_does_not_run_is_reported(data, capsys):
    arguments = ["run", "--params", DEMO, "-p", "train=5", "-p", "run=none"]
    assert main([*arguments, "--from", "04", "--to", "04"]) == 1
    errors = capsys.readouterr().err
    assert "-p train is for 01_build_data, which is not run now" in errors
    assert f"{data.parent} has no notebooks: those of {REPOSITORY} are run" in errors
