"""Small drawn scenes, their examples, the demo models, and homes of the tests' own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from filelock import FileLock

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


def copy_of_shared_home(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """Have the first of several workers make a home, and give each worker a copy of it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    shared = root / f"shared-{name}"
    with FileLock(root / f"{name}.lock"):
        if not shared.exists():
            partial = root / f"partial-{name}"
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "data").mkdir(parents=True)
            make(partial)
            partial.rename(shared)
    return shutil.copytree(shared, tmp_path_factory.mktemp(name), dirs_exist_ok=True)


@pytest.fixture(scope="session")
def small_home(tmp_path_factory) -> Path:
    """A home with the run "small" by the real steps: a model and its untrained twin."""
    return copy_of_shared_home(tmp_path_factory, "small", make_small_run)


def make_small_run(home: Path) -> None:
    """Make the run "small" in a home."""
    from probekit import workflow

    scene_folder = write_scenes(home / "data" / "coco" / "scenes", n=60, seed=7)
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
    "strengths": [0.001, 0.1],
    "epochs": 3,
    "resamples": 50,
    "heat_images": 15,
    "layers": [0, 8],
    "images": 10,
    "fit_images": 40,
    "pictures": False,
    "copies": 1,  # starting processes takes longer than such a run
    "n_jobs": 1,
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
def demo(tmp_path_factory) -> Path:
    """A home after a small run of all notebooks; notebooks and demo models are the checkout's."""
    return copy_of_shared_home(tmp_path_factory, "demo", make_demo)


def make_demo(home: Path) -> None:
    """Run all notebooks in a home, with two processes where they can."""
    result = run_notebooks(home, run="small", copies=2, n_jobs=2)
    assert result.returncode == 0, result.stderr[-3000:]
    (home / "stdout.txt").write_text(result.stdout, encoding="utf-8")
    (home / "stderr.txt").write_text(result.stderr, encoding="utf-8")


# Files that take minutes, in the order in which they start. At the end they keep one worker idle.
LONG_FILES = (
    "test_notebooks.py",
    "test_benchmarks.py",
    "test_launch.py",
    "test_browser.py",
    "test_explorer_browser.py",
    "test_worked_examples.py",
    "test_extracting.py",
)


# Fixtures that take about a minute to make.
LONG_FIXTURES = {"demo", "small_home", "demo_metrics"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as quick what is not marked as slow, and put the longest files first."""
    for item in items:
        if LONG_FIXTURES.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.quick)
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
