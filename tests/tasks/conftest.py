"""Drawn scenes that several tests of tasks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from probekit.data.scenes import write_scenes
from probekit.tasks.base import Selection
from tests.conftest import REAL_COCO
from tests.support.selections import select


@pytest.fixture(scope="session")
def many_scenes(tmp_path_factory) -> Path:
    """Three hundred drawn scenes in COCO's layout."""
    return write_scenes(tmp_path_factory.mktemp("coco") / "scenes", n=300, seed=9)


@pytest.fixture(scope="session")
def selection(many_scenes) -> Selection:
    """All of these scenes, in three splits."""
    return select(many_scenes, train=200, validation=50, test=50)


@pytest.fixture(scope="session")
def real_selection() -> Selection:
    """Three hundred photographs in three splits."""
    return select(REAL_COCO, train=200, validation=50, test=50)
