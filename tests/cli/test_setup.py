"""The project itself: environments, notebooks, documentation, command line."""

import ast
import importlib
import re
import sys

import nbformat
import pytest
import yaml

from probekit.cli import doctor, notebooks
from probekit.cli.main import main
from tests.conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
CONDA = {"pytorch": "torch", "huggingface_hub": "huggingface-hub"}


def test_pip_and_conda_users_get_the_same_packages():
    pip = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"])
    listed = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"]
    conda = set()
    for line in listed:
        if (isinstance(line, str) and not line.startswith(("python", "pip"))) or str(line).startswith("pytorch"):
            name, bound = re.match(r"([\w-]+)(.*)", line).groups()
            conda.add(CONDA.get(name, name) + bound)
    assert pip == conda
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"ray", "export", "dev"} <= set(extras)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean_and_short(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [c for c in book.cells if c.cell_type == "code"]
    assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1
    for cell in code:
        assert not cell.outputs and cell.execution_count is None
        if "parameters" not in cell.metadata.get("tags", []):
            assert len(cell.source.splitlines()) <= 12
        tree = ast.parse(cell.source)
        assert not any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.walk(tree))


def test_every_parameter_says_its_type_and_what_it_means():
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        cell = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
        for line in cell.source.splitlines():
            assert re.fullmatch(r"\w+ = .+  # type: (str|int|float|bool|list|str\|list)  .{10,}", line), line
        assert list(notebooks.declared(path)) == [line.split(" = ")[0] for line in cell.source.splitlines()]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "notebooks" / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_parameter_files_name_declared_parameters_alone(path):
    known = {k: v for book in NOTEBOOKS for k, v in notebooks.declared(book).items()}
    assert notebooks.checked(notebooks.read_parameters(path, []), known)


def test_a_wrong_parameter_is_refused_by_name(capsys):
    params = str(REPOSITORY / "notebooks" / "params" / "demo.yaml")
    for text, told in (("trian=5", "did you mean 'train'"), ("longest_side=wide", "expected int, or null"),
                       ("max_bad=1e-2", "1.0e-3 a number"), ("pictures=maybe", "expected bool"),
                       ("models=tiny-qwen2-vl", "a list is [a, b]"), ("strengths=[1e-5]", "expected list, like [1e-05"),
                       ("train=1.5", "expected int"), ("run=2024", "expected str"), ("seeds=0", "expected list"),
                       ("train", "train=VALUE"), ("train=[", "not YAML")):
        assert main(["run", "--params", params, "-p", text]) == 2
        assert told in capsys.readouterr().err
    assert main(["run", "--params", params, "-p", "train=5", "-p", "run=none", "--from", "04", "--to", "04"]) == 1
    assert "-p train is for 01_build_data, which is not run now" in capsys.readouterr().err
    assert main(["run", "--params", "nowhere.yaml"]) == 2
    assert "notebooks/params/demo.yaml" in capsys.readouterr().err


def test_the_doctor_looks_at_everything(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for name in ("Python", "torch", "device", "COCO", "model cache", "Chrome", "widgets"):
        assert name in told


def test_the_doctor_names_the_mend(monkeypatch):
    def broken():
        raise ImportError("torchvision does not match")

    monkeypatch.setitem(doctor.CHECKS, "Chrome", lambda: (False, "none", "install Chrome or Chromium"))
    monkeypatch.setitem(doctor.CHECKS, "device", broken)
    told = doctor.report()
    assert len(told) == len(doctor.CHECKS)
    assert any("▸ install Chrome or Chromium" in line for line in told)
    assert any("torchvision does not match" in line and "▸" in line for line in told)


def test_the_package_is_thin():
    for path in (REPOSITORY / "probekit").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name}"


def test_the_tree_in_the_readme_is_the_tree():
    text = (REPOSITORY / "README.md").read_text()
    for path in sorted((REPOSITORY / "probekit").glob("*.py")) + NOTEBOOKS:
        if not path.name.startswith("__init__"):
            assert path.stem in text, f"README.md does not name {path.name}"
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (REPOSITORY / name).exists(), name


def test_the_python_in_the_readme_names_what_is_there():
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.S)
    assert blocks
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
