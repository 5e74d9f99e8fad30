"""Small drawn scenes, their examples, the demo models, and homes of the tests' own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes on the same cores wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from probekit.data.scenes import write_scenes
from probekit.tasks.base import BuildSettings
from probekit.tasks.building import build_examples

REPOSITORY = Path(__file__).resolve().parents[1]
REAL_COCO = REPOSITORY.parent / "shared" / "coco"
DEMO_MODELS = ("tiny-qwen2-vl", "tiny-fast-vlm")
SPLIT_SIZES = {"train": 36, "validation": 12, "test": 12}

needs_real_coco = pytest.mark.skipif(
    not REAL_COCO.is_dir(), reason=f"no COCO photographs at {REAL_COCO}"
)


# ---------------------------------------------------------------------------------- data and models


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory) -> Path:
    """Sixty drawn scenes in COCO's layout."""
    return write_scenes(tmp_path_factory.mktemp("coco") / "scenes", n=60, seed=7)


@pytest.fixture(scope="session")
def examples(scene_folder, tmp_path_factory) -> pd.DataFrame:
    """The examples of the three demo tasks on these scenes."""
    settings = BuildSettings(str(scene_folder), **SPLIT_SIZES)
    return build_examples(settings, tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session", params=DEMO_MODELS)
def vlm(request):
    """Each of the demo models, loaded once."""
    from probekit.models.load import load_vlm

    return load_vlm(request.param, device="cpu")


# -------------------------------------------------------------------------------------------- homes


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """The data folder of an empty home of the test's own."""
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path))
    return tmp_path / "data"


@pytest.fixture(scope="session")
def small_home(scene_folder, tmp_path_factory) -> Path:
    """A home with the run "small" by the real steps: a model and its untrained twin."""
    from probekit import workflow

    home = tmp_path_factory.mktemp("small")
    examples = workflow.build_examples(scene_folder, run="small", home=home, **SPLIT_SIZES)
    activations = [
        workflow.extract(
            "tiny-qwen2-vl",
            examples,
            untrained=untrained,
            poolings=["mean", "last"],
            stages=["lm", "vision", "projector"],
            home=home,
        )
        for untrained in (False, True)
    ]
    workflow.record_activations(activations, run="small", home=home)
    workflow.probe(
        activations,
        strengths=[0.01, 1.0],
        epochs=3,
        controls=["control_task"],
        resamples=50,
        localise="category",
        heat_images=8,
        device="cpu",
        home=home,
    )
    return home


@pytest.fixture
def small_run(small_home, monkeypatch):
    """The run "small", in a home that is found without naming it."""
    from probekit.report.saved_run import SavedRun

    monkeypatch.setenv("PROBEKIT_HOME", str(small_home))
    return SavedRun.open("small")


# ------------------------------------------------------------------------- the notebooks


SMALL_PARAMETERS = {
    "train": 60,
    "validation": 20,
    "test": 20,
    "shard_images": 40,
    "resamples": 50,
    "heat_images": 15,
    "pictures": False,
}


def small_parameters() -> dict:
    """The demo's parameters at a small size."""
    demo = REPOSITORY / "notebooks" / "params" / "demo.yaml"
    return yaml.safe_load(demo.read_text(encoding="utf-8")) | SMALL_PARAMETERS


def run_notebooks(
    home: Path, *arguments: str, cwd: Path | None = None, **parameters: object
) -> subprocess.CompletedProcess:
    """Run the notebooks as a batch in a home, with the demo's parameters at a small size."""
    (home / "small.yaml").write_text(yaml.safe_dump(small_parameters()), encoding="utf-8")
    command = [sys.executable, "-m", "probekit", "run", "--params", str(home / "small.yaml")]
    command += arguments
    for name, value in parameters.items():
        command += ["-p", f"{name}={value}"]
    environment = os.environ | {"PROBEKIT_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=cwd or home, check=False
    )


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A home for whole runs; notebooks and demo models are the checkout's."""
    root = tmp_path_factory.mktemp("home")
    (root / "data").mkdir()
    return root


@pytest.fixture(scope="session")
def demo(home) -> Path:
    """The home after a small run of all notebooks."""
    result = run_notebooks(home, run="small")
    assert result.returncode == 0, result.stderr[-3000:]
    return home


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as quick what is not marked as slow."""
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.quick)
