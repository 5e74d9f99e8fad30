"""What the demo models have learned, and what the curves must show of it."""

from __future__ import annotations

import importlib.util

import pytest

from probekit import workflow
from probekit.data.scenes import write_scenes
from probekit.probes.results import select_curve
from tests.conftest import DEMO_MODELS, REPOSITORY

MODELS = REPOSITORY / "data" / "models"


@pytest.fixture(scope="module")
def train():
    """The script that trained the models, as a module."""
    spec = importlib.util.spec_from_file_location("train", MODELS / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO_MODELS)
def test_models_tell_right_from_wrong_captions_of_unseen_scenes(train, name):
    accuracy = train.zero_shot(MODELS / name, n=40)
    assert accuracy["entailment"] >= 0.85
    assert accuracy["presence"] >= 0.85


def test_the_models_are_small_and_hold_no_pickle():
    files = [file for name in DEMO_MODELS for file in (MODELS / name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {file.suffix for file in files} == {".json", ".jinja", ".safetensors"}


@pytest.fixture(scope="module")
def demo_metrics(tmp_path_factory):
    """Metrics of a demo model and its untrained twin on drawn scenes."""
    home = tmp_path_factory.mktemp("home")
    folder = write_scenes(home / "data" / "coco" / "scenes", n=340, seed=11)
    examples = workflow.build_examples(
        folder,
        run="truth",
        home=home,
        train=200,
        validation=40,
        test=100,
        tasks=("caption", "category"),
    )
    activations = [
        workflow.extract(
            "tiny-qwen2-vl",
            examples,
            untrained=untrained,
            poolings=["mean"],
            device="cpu",
            home=home,
        )
        for untrained in (False, True)
    ]
    results = workflow.probe(
        activations,
        probes=("logreg",),
        resamples=100,
        codelength=False,
        localise="category",
        heat_images=0,
        device="cpu",
        home=home,
    )
    return results.metrics


def accuracy_by_layer(metrics, control: str, task: str):
    of_task = (metrics.control == control) & (metrics.task == task)
    table = metrics[of_task & (metrics.pooling == "mean")]
    curve = select_curve(table, probe="logreg", metric="accuracy")
    return curve.set_index("layer").value


def test_captions_are_known_late_and_only_by_the_trained_model(demo_metrics):
    trained = accuracy_by_layer(demo_metrics, "none", "caption")
    untrained = accuracy_by_layer(demo_metrics, "untrained", "caption")
    assert trained["lm.00"] <= 0.6
    assert trained.max() >= 0.75
    assert untrained.max() <= 0.6


def test_categories_are_known_early_and_better_by_the_trained_model(demo_metrics):
    trained = accuracy_by_layer(demo_metrics, "none", "category")
    untrained = accuracy_by_layer(demo_metrics, "untrained", "category")
    assert trained["lm.00"] >= 0.7
    assert trained.max() - untrained.max() > 0.2


def test_the_trained_model_finds_a_category_in_its_boxes(demo_metrics):
    table = demo_metrics.set_index(["probe", "control", "metric", "layer"]).sort_index()
    trained = table.loc["logreg", "none"]
    untrained = table.loc["logreg", "untrained"]
    best = trained.loc["localisation"].value.idxmax()
    assert trained.lo["heat_in_boxes", best] > 4 * trained.value["area_in_boxes", best]
    assert trained.lo["localisation", best] > 0.25
    assert untrained.hi["localisation", best] < 0.1


def test_the_tokens_of_a_category_would_say_its_word(demo_metrics):
    """Above chance for the trained model, and at chance for the untrained one."""
    table = demo_metrics.set_index(["probe", "control", "metric", "layer"]).sort_index()
    trained = table.loc["lens", "none"]
    untrained = table.loc["lens", "untrained"]
    last = "lm.08"
    assert trained.lo["localisation", last] > 0.1
    assert untrained.hi["localisation", last] < 0.1
    assert trained.lo["heat_in_boxes", last] > 2 * trained.value["area_in_boxes", last]
