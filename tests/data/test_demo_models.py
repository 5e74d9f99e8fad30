"""What the demo models have learned, and what the curves must show of it."""

import importlib.util

import pytest

from probekit.data import scenes
from probekit.extraction import extract
from probekit.probes import results
from probekit.probes.localisation import METRICS, add_localisation
from probekit.probes.probing import ProbeSettings, probe
from probekit.tasks import building
from tests.conftest import DEMO_MODELS, REPOSITORY

spec = importlib.util.spec_from_file_location("train", REPOSITORY / "data" / "models" / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_it_tells_right_from_wrong_captions_of_unseen_scenes(name):
    found = train.zero_shot(REPOSITORY / "data" / "models" / name, n=80)
    assert found["entailment"] >= 0.85 and found["presence"] >= 0.85


def test_training_and_probed_scenes_share_no_seed():
    assert min(train.TRAIN_SEED, train.CHECK_SEED) >= 10_000  # runs draw theirs from small seeds


def test_the_models_are_small_and_hold_no_pickle():
    files = [f for name in DEMO_MODELS for f in (REPOSITORY / "data" / "models" / name).iterdir()]
    assert sum(f.stat().st_size for f in files) < 12e6
    assert {f.suffix for f in files} == {".json", ".jinja", ".safetensors"}


def test_the_curves_tell_the_truth(data, tmp_path):
    """Global semantics: chance at the embeddings, high later, chance everywhere without training; local: early.

    And where in the image: the trained model's probes find a category in its boxes, not in those of any object.
    """
    folder = scenes.write_scenes(tmp_path / "coco", n=500, seed=11)
    examples = building.build_examples(
        building.BuildSettings(str(folder), train=300, validation=60, test=140, tasks=("caption", "category")), tmp_path / "tasks"
    )
    score, where = {}, {}
    for untrained in (False, True):
        store = extract.extract(extract.ExtractionSettings("tiny-qwen2-vl", untrained=untrained), examples, "cpu")
        settings = ProbeSettings(probes=("logreg",), resamples=20, codelength=False)
        whole = probe(store, examples, settings, tmp_path / "probes")
        whole = add_localisation([store], examples, building.load_instances(tmp_path / "tasks"), "category", whole, tmp_path / "probes",
                         0, 100, "cpu")
        where[untrained] = whole.metrics[whole.metrics.metric.isin(METRICS)].set_index(["metric", "layer"])
        table = whole.metrics[whole.metrics.metric == "accuracy"]
        table = table[table.control == ("untrained" if untrained else "none")]
        score[untrained] = results.select_curve(table, "logreg", "accuracy").set_index(["task", "layer"]).value
    assert score[False]["caption"].max() >= 0.75
    assert score[False]["caption"]["lm.00"] <= 0.6
    assert score[True]["caption"].max() <= 0.6
    assert score[False]["category"]["lm.00"] >= 0.7
    assert score[False]["category"].max() - score[True]["category"].max() > 0.2
    trained, random = where[False], where[True]
    best = trained.loc["localisation"].value.idxmax()
    assert trained.lo["heat_in_boxes", best] > 4 * trained.value["area_in_boxes", best]
    assert trained.lo["localisation", best] > 0.25 and random.hi["localisation", best] < 0.1
