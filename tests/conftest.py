"""Small drawn scenes, their examples and the demo models; nothing is written into the project's own data folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes on the same cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from probekit import paths
from probekit.data import scenes
from probekit.tasks import building

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_COCO = REPOSITORY.parent / "shared" / "coco"
DEMO_MODELS = ("tiny-qwen2-vl", "tiny-fast-vlm")

needs_real_coco = pytest.mark.skipif(not REAL_COCO.is_dir(), reason=f"no COCO photographs at {REAL_COCO}")


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory) -> Path:
    return scenes.write_scenes(tmp_path_factory.mktemp("coco") / "scenes", n=60, seed=7)


@pytest.fixture(scope="session")
def examples(scene_folder, tmp_path_factory):
    build = building.BuildSettings(str(scene_folder), train=36, validation=12, test=12)
    return building.build_examples(build, tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session", params=DEMO_MODELS)
def vlm(request):
    from probekit.models.load import load_vlm

    return load_vlm(request.param, device="cpu")


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """An empty data folder, of a home of its own."""
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path))
    return tmp_path / "data"


@pytest.fixture(scope="session")
def small_data(scene_folder, tmp_path_factory) -> Path:
    """A data folder with the run "small", made by the real steps: a model and its untrained twin, two poolings."""
    from probekit.extraction.extract import ExtractionSettings, extract
    from probekit.probes.adam import Training
    from probekit.probes.localisation import add_localisation
    from probekit.probes.probing import ProbeSettings, probe
    from probekit.probes.results import ProbeResults

    folder = tmp_path_factory.mktemp("home") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROBEKIT_HOME", str(folder.parent))
        examples = building.build_examples(building.BuildSettings(str(scene_folder), train=36, validation=12, test=12),
                                        folder / "tasks" / "small")
        stores = [extract(ExtractionSettings("tiny-qwen2-vl", untrained=untrained, poolings=("mean", "last"),
                                     stages=("lm", "vision", "projector")), examples) for untrained in (False, True)]
        paths.write_json(folder / "activations" / "small.json", {"stores": [store.record for store in stores]})
        settings = ProbeSettings(strengths=(0.01, 1.0), training=Training(epochs=3), controls=("control_task",), resamples=50)
        probes = folder / "probes" / "small"
        whole = ProbeResults.join([probe(store, examples, settings, probes) for store in stores])
        whole = add_localisation(stores, examples, building.load_instances(folder / "tasks" / "small"), "category", whole, probes, 8,
                         50, "cpu")
        whole.write(probes, building.table_fingerprint(examples))
    return folder


@pytest.fixture
def small_run(small_data, monkeypatch):
    from probekit.report.saved_run import SavedRun

    monkeypatch.setenv("PROBEKIT_HOME", str(small_data.parent))
    return SavedRun.open("small")


# ------------------------------------------------------------------------------------------- the notebooks as a whole


SMALL = {"train": 60, "validation": 20, "test": 20, "shard_images": 40, "resamples": 50, "heat_images": 15,
         "pictures": False}


def small_parameters() -> dict:
    """The demo's parameters at a small size."""
    return yaml.safe_load((REPOSITORY / "notebooks" / "params" / "demo.yaml").read_text()) | SMALL


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A project folder of its own: the notebooks and demo models of this one, its own data and figures."""
    root = tmp_path_factory.mktemp("home")
    (root / "data").mkdir()
    (root / "notebooks").symlink_to(REPOSITORY / "notebooks")
    (root / "data" / "models").symlink_to(REPOSITORY / "data" / "models")
    return root


def call(home, *arguments, cwd=None, **parameters) -> subprocess.CompletedProcess:
    (home / "small.yaml").write_text(yaml.safe_dump(small_parameters()))
    command = [sys.executable, "-m", "probekit", "run", "--params", str(home / "small.yaml"), *arguments]
    command += [word for k, v in parameters.items() for word in ("-p", f"{k}={v}")]
    environment = os.environ | {"PROBEKIT_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd or home, check=False)


@pytest.fixture(scope="session")
def demo(home) -> Path:
    done = call(home, run="small")
    assert done.returncode == 0, done.stderr[-3000:]
    return home
