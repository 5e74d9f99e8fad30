"""The house as a whole: who may import whom, and that pip and conda users get the same packages."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from tests.conftest import REPOSITORY

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on

PIP_NAMES = {
    "pytorch": "torch",
    "huggingface_hub": "huggingface-hub",
    "python-xxhash": "xxhash",
}  # by their name on conda-forge


def test_the_import_contracts_are_kept():
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as lint; lint()",
    ]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_pip_and_conda_users_get_the_same_packages():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text(encoding="utf-8"))
    conda = set()
    for line in environment["dependencies"]:
        if not isinstance(line, str) or re.match(r"(python|pip)\b(?!-)", line):
            continue
        name, bound = re.match(r"([\w-]+)(.*)", line).groups()
        conda.add(PIP_NAMES.get(name, name) + bound)
    assert conda == set(project["dependencies"])


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, probekit; assert not {'torch', 'transformers', 'plotly'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_building_examples_loads_no_torch():
    code = (
        "import sys, probekit.workflow, probekit.report.example_grid; "
        "assert not {'torch', 'transformers', 'sklearn', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_every_name_of_the_front_door_can_be_had():
    import probekit

    for name in probekit.__all__:
        assert getattr(probekit, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        probekit.nothing  # noqa: B018  # the access is what is tested
