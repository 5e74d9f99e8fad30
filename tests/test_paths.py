"""Where artefacts live."""

from __future__ import annotations

import pytest

from probekit import paths
from probekit.paths import Home
from tests.conftest import REPOSITORY


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package in site-packages, and no home named."""
    monkeypatch.delenv("PROBEKIT_HOME", raising=False)
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path / "site-packages")
    return tmp_path


def test_an_installed_package_finds_the_checkout_around_the_working_directory(
    installed, monkeypatch
):
    monkeypatch.chdir(REPOSITORY / "notebooks" / "params")
    assert Home.find().root == REPOSITORY
    monkeypatch.setenv("PROBEKIT_HOME", str(installed))
    assert Home.find().root == installed
    assert Home.find().notebooks == REPOSITORY / "notebooks"


def test_without_a_checkout_the_home_is_the_working_directory(installed, monkeypatch):
    monkeypatch.chdir(installed)
    assert Home.find().root == installed
    assert Home.find().notebooks == installed / "notebooks"


def test_an_empty_folder_of_notebooks_does_not_hide_those_of_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "notebooks" / ".ipynb_checkpoints").mkdir(parents=True)
    assert Home.find(tmp_path).notebooks == REPOSITORY / "notebooks"
    (tmp_path / "notebooks" / "01_mine.ipynb").touch()
    assert Home.find(tmp_path).notebooks == tmp_path / "notebooks"
