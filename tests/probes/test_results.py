from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probekit.probes.adam import AdamSettings
from probekit.probes.probing import ProbeSettings, probe_activations
from probekit.probes.results import (
    COLUMNS,
    ProbeKey,
    ProbeResults,
    StateKey,
    best_layers,
    compact_predictions,
    select_curve,
)
from probekit.probes.weights import LinearProbe, ProbeWeights
from probekit.tasks.base import TaskInfo
from probekit.tasks.building import table_fingerprint
from tests.support.tables import planted_activations

STATE = StateKey("planted", "none", "mean", "caption")


@pytest.fixture(scope="module")
def activations():
    return planted_activations(images=60)


@pytest.fixture(scope="module")
def fingerprint(activations):
    return table_fingerprint(activations.examples)


@pytest.fixture(scope="module")
def results(activations, tmp_path_factory):
    settings = ProbeSettings(resamples=50, codelength=False, training=AdamSettings(epochs=2))
    probed = probe_activations(
        activations, settings=settings, folder=tmp_path_factory.mktemp("results")
    )
    return replace(probed, heat={ProbeKey(*STATE, "logreg"): "data/heat.safetensors"})


@pytest.mark.slow
def test_what_is_written_is_read(results, fingerprint, tmp_path):
    results.write(tmp_path, fingerprint)
    read = ProbeResults.read(tmp_path, fingerprint)
    for name in ("metrics", "losses", "transfer"):
        pd.testing.assert_frame_equal(getattr(read, name), getattr(results, name))
    assert list(read.predictions) == [(*STATE, "logreg"), (*STATE, "linear")]
    assert all(isinstance(key, ProbeKey) and key.state == STATE for key in read.predictions)
    for key, p_lnc in read.predictions.items():
        np.testing.assert_array_equal(p_lnc, results.predictions[key])
    assert list(read.neighbours) == [STATE]
    np.testing.assert_array_equal(read.neighbours[STATE], results.neighbours[STATE])
    key = ProbeKey(*STATE, "logreg")
    assert list(read.weights) == [key]
    for name, array in vars(results.weights[key]).items():
        np.testing.assert_array_equal(getattr(read.weights[key], name), array)
    assert read.tasks == results.tasks
    assert read.tasks["caption"].kind == "binary"
    assert read.heat == results.heat
    assert [store["fingerprint"] for store in read.stores] == list(
        results.metrics.settings.unique()
    )


def test_arrays_go_to_their_own_keys(fingerprint, tmp_path):
    rng = np.random.default_rng(0)
    predictions = {}
    weights = {}
    for model in ("b|c", "a"):
        for pooling in ("mean", "last"):
            state = StateKey(model, "none", pooling, "caption")
            # The transpose is not contiguous in memory.
            predictions[ProbeKey(*state, "logreg")] = rng.normal(size=(2, 5, 3)).T
            arrays = [rng.normal(size=shape) for shape in ((2, 4, 1), (2, 1), (2, 4), (2, 4))]
            weights[ProbeKey(*state, "logreg")] = ProbeWeights(*arrays)
    results = ProbeResults(pd.DataFrame(), pd.DataFrame(), predictions=predictions, weights=weights)
    results.write(tmp_path, fingerprint)
    read = ProbeResults.read(tmp_path, fingerprint)
    assert list(read.predictions) == list(predictions)
    assert list(read.weights) == list(weights)
    for key, p_lnc in predictions.items():
        np.testing.assert_array_equal(read.predictions[key], p_lnc)
    for key, probes in weights.items():
        for name, array in vars(probes).items():
            np.testing.assert_array_equal(getattr(read.weights[key], name), array)


def test_stored_predictions_are_those_that_were_scored(results, activations):
    examples = activations.examples
    labels = [label[0] for label in examples["labels"][examples.split == "test"]]
    true_labels = results.metrics[results.metrics.control == "none"]
    for key, p_lnc in results.predictions.items():
        accuracy_l = ((p_lnc[..., 0] >= 0.5) == np.array(labels)).mean(1)
        curve = select_curve(true_labels, probe=key.probe, metric="accuracy")
        np.testing.assert_allclose(accuracy_l, curve.value, atol=1e-6)


def test_further_columns_survive_joining_writing_and_reading(results, fingerprint, tmp_path):
    extra = {"intervention": "erase", "site": "lm.02", "dose": 0.5}
    changed = ProbeResults(
        results.metrics.assign(model="changed", **extra), results.losses.assign(model="changed")
    )
    joined = ProbeResults.join([results, changed])
    joined.write(tmp_path, fingerprint)
    metrics = ProbeResults.read(tmp_path, fingerprint).metrics
    assert list(metrics.columns) == [*COLUMNS, *extra]
    is_changed = metrics.model == "changed"
    for name, value in extra.items():
        assert (metrics.loc[is_changed, name] == value).all()
        assert metrics.loc[~is_changed, name].isna().all()
    own_columns = metrics[~is_changed].drop(columns=[*extra])
    pd.testing.assert_frame_equal(own_columns, results.metrics)
    curve = select_curve(metrics, probe="logreg", metric="accuracy")
    assert set(curve.model) == {"planted", "changed"}


def test_results_belong_to_their_examples(results, activations, fingerprint, tmp_path):
    results.write(tmp_path / "run", fingerprint)
    other = activations.examples.assign(split=activations.examples.split.to_numpy()[::-1])
    with pytest.raises(ValueError, match="another examples table"):
        ProbeResults.read(tmp_path / "run", table_fingerprint(other))
    with pytest.raises(FileNotFoundError, match="run 03_probe"):
        ProbeResults.read(tmp_path / "nothing", fingerprint)
    (tmp_path / "run" / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks a part of the results"):
        ProbeResults.read(tmp_path / "run", fingerprint)


def test_models_of_one_name_are_not_joined(results):
    with pytest.raises(ValueError, match="two sets of results have the name planted"):
        ProbeResults.join([results, results])


def test_probe_weights_are_found_by_name(results):
    probes = results.probe_weights(model="planted", pooling="mean", task="caption")
    assert probes is results.weights[ProbeKey(*STATE, "logreg")]
    with pytest.raises(KeyError, match=r"planted, untrained, mean, caption: run 03_probe"):
        results.probe_weights(model="planted", pooling="mean", task="caption", control="untrained")


def test_one_probe_can_be_taken_along(results, activations, tmp_path):
    probe = results.probe("planted", "lm.02", "caption")
    x_nd = activations["lm.02", "mean"]
    is_test = (activations.examples.split == "test").to_numpy()
    stored = results.predictions[ProbeKey(*STATE, "logreg")][2]
    np.testing.assert_allclose(probe.predict_proba(x_nd)[is_test], stored, atol=1e-3)
    along_n = x_nd @ probe.raw_direction[:, 0]
    shift_n = probe.decision_function(x_nd)[:, 0] - along_n
    np.testing.assert_allclose(shift_n, shift_n[0], atol=1e-3)
    loaded = LinearProbe.load(probe.save(tmp_path / "probe.safetensors"))
    np.testing.assert_array_equal(loaded.decision_function(x_nd), probe.decision_function(x_nd))
    assert loaded.classes == ("match",)
    assert loaded.name == "planted, none, mean, caption, logreg, lm.02"
    with pytest.raises(KeyError, match=r"lm\.09: take one of lm\.00"):
        results.probe("planted", "lm.09", "caption")
    with pytest.raises(KeyError, match="no mean_difference probes"):
        results.probe("planted", "lm.02", "caption", probe="mean_difference")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LinearProbe.load(tmp_path / "nothing")
    (tmp_path / "other").write_bytes(b"no probe")
    with pytest.raises(ValueError, match="holds no probe"):
        LinearProbe.load(tmp_path / "other")


def test_a_curve_that_is_not_there_is_named(results):
    with pytest.raises(ValueError, match="no accuracy of mlp probes in this run; it has logreg"):
        select_curve(results.metrics, probe="mlp", metric="accuracy")


def test_a_curve_averages_seeds_and_tells_their_spread():
    layers = ["lm.00", "lm.01"]
    tables = []
    for seed, value in enumerate((0.5, 0.6, 0.9)):
        table = score_table(layers, [0.0, 0.0], [value, value + 0.05])
        tables.append(table.assign(seed=seed, gap=seed))
    curve = select_curve(pd.concat(tables), probe="logreg", metric="accuracy")
    assert curve.layer.tolist() == layers
    np.testing.assert_allclose(curve.value, [2 / 3, 2 / 3 + 0.05])
    np.testing.assert_allclose(curve.spread, 0.4)
    assert curve.gap.tolist() == [0, 0]  # of the first seed


@pytest.mark.slow
def test_the_best_layer_is_chosen_without_the_test_images():
    """Without any signal the highest test score lies above chance, the reported one does not."""
    rng = np.random.default_rng(0)
    layers = [f"lm.{k:02d}" for k in range(20)]
    tasks = {"caption": TaskInfo("binary", ("match",), "?")}
    reported = []
    highest = []
    for _ in range(50):
        validation = rng.normal(0.5, 0.05, len(layers))
        test = rng.normal(0.5, 0.05, len(layers))
        best = best_layers(score_table(layers, validation, test), tasks).iloc[0]
        assert best["best layer"] == layers[validation.argmax()]
        reported.append(best.value)
        highest.append(test.max())
    assert abs(np.mean(reported) - 0.5) < 0.02
    assert np.mean(highest) > 0.58


def score_table(layers, validation, test):
    """Rows of a metrics table with the accuracies of each layer."""
    tables = [
        pd.DataFrame({"layer": layers, "value": values, "split": split})
        for split, values in (("validation", validation), ("test", test))
    ]
    columns = {
        "model": "m",
        "stage": "lm",
        "pooling": "mean",
        "task": "caption",
        "probe": "logreg",
        "control": "none",
        "metric": "accuracy",
        "class": "",
        "seed": 0,
    }
    return pd.concat(tables).assign(**columns).reindex(columns=COLUMNS)


def test_predictions_stay_on_their_side_of_one_half():
    p = np.array([0.5 - 1e-6, 0.5, 0.5 + 1e-6, 0.4999, 0.0, 1.0, 0.3])
    half = compact_predictions(p)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half >= 0.5, p >= 0.5)
    np.testing.assert_allclose(half, p, atol=5e-4)
