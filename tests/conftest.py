"""Small drawn scenes, their examples and the demo models; nothing is written into the project's own data folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from probekit import paths, scenes, tasks

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_COCO = REPOSITORY.parent / "shared" / "coco"
DEMO_MODELS = ("tiny-qwen2-vl", "tiny-fast-vlm")

needs_real_coco = pytest.mark.skipif(not REAL_COCO.is_dir(), reason=f"no COCO photographs at {REAL_COCO}")


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory) -> Path:
    return scenes.write(tmp_path_factory.mktemp("coco") / "scenes", n=60, seed=7)


@pytest.fixture(scope="session")
def examples(scene_folder, tmp_path_factory):
    build = tasks.Build(str(scene_folder), train=36, validation=12, test=12)
    return tasks.build_examples(build, tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session", params=DEMO_MODELS)
def vlm(request):
    from probekit.models import load_vlm

    return load_vlm(request.param, device="cpu")


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """An empty data folder in place of the project's."""
    monkeypatch.setattr(paths, "DATA", tmp_path)
    return tmp_path
