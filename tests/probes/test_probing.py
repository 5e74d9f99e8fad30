from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probekit import paths
from probekit.extraction import shards, store
from probekit.probes import results
from probekit.probes.adam import Training
from probekit.probes.probing import ProbeSettings, probe
from probekit.tasks import building
from probekit.tasks.base import task_infos
from tests.support.tables import with_task_info

LAYERS = ["lm.00", "lm.01", "lm.02", "lm.03"]
D = 16
QUICK = ProbeSettings(resamples=50, codelength=False, training=Training(epochs=15, lr=1e-2))


def planted(folder, layer="lm.02", images=400, seed=0):
    """Activations in which one layer alone carries the label, with the examples they belong to."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, 2 * images)
    signal = np.outer(2 * y - 1, rng.normal(size=D)) * 0.5
    states = {f"{name}/mean": (rng.normal(size=(2 * images, D)) + (name == layer) * signal).astype(np.float32)
              for name in LAYERS}
    own = folder / "activations" / "planted" / "0"
    own.mkdir(parents=True, exist_ok=True)
    files = [own / f"{i}.jpg" for i in range(images)]
    for file in files:
        file.touch()
    sizes = [images // 2, images // 4, images // 4]
    split = rng.permutation(np.repeat(["train", "validation", "test"], sizes))
    this, other = np.arange(images), np.empty(images, int)
    for name in set(split):  # an image is asked about its own text and another one's of its split
        other[split == name] = np.roll(this[split == name], 1)
    split, prompts = np.repeat(split, 2), [f"text {i}?" for i in np.stack([this, other], 1).ravel()]
    table = pd.DataFrame({"image_id": np.repeat(np.arange(images), 2), "split": split, "task": "caption",
                          "file": [str(f) for f in np.repeat(files, 2)], "prompt": prompts,
                          "labels": [[int(v)] for v in y], "mask": [[1]] * (2 * images)})
    table = with_task_info(table, "binary")
    shards.Part.plan(own, shards.rows_of(table), ["lm/mean"], 10_000).write(0, states)
    shards.write_meta(own, {"layers": {"lm": LAYERS}, "model": "planted", "untrained": False})
    return store.Activations(own, table, ("lm",), ("mean",)), table


def accuracy(found, name):
    rows = found.metrics[found.metrics.control == "none"]
    return results.select_curve(rows, name, "accuracy").set_index("layer").value


@pytest.mark.parametrize("name", ["logreg", "linear", "mlp"])
def test_a_planted_signal_is_found_at_its_layer(tmp_path, name):
    activations, table = planted(tmp_path)
    settings = replace(QUICK, probes=(name,))
    scores = accuracy(probe(activations, table, settings, tmp_path / "out"), name)
    assert scores.idxmax() == "lm.02" and scores["lm.02"] > 0.9
    assert (scores.drop("lm.02") < 0.6).all()
    found = probe(activations, table, settings, tmp_path / "out").metrics
    best = results.best_layers(found, task_infos(table), name)
    assert list(best[best.control == "none"]["best layer"]) == ["lm.02"]


def test_shuffled_labels_score_at_chance(tmp_path):
    activations, table = planted(tmp_path)
    table = table.assign(labels=list(table.labels.sample(frac=1, random_state=0)))
    for name in ("logreg", "linear"):
        assert (accuracy(probe(activations, table, QUICK, tmp_path / "out"), name) - 0.5).abs().max() < 0.12


def test_test_labels_do_not_reach_the_probe(tmp_path):
    activations, table = planted(tmp_path)
    pairs = zip(table.labels, table.split, strict=True)
    flipped = table.assign(labels=[[1 - y[0]] if split == "test" else y for y, split in pairs])
    one, two = (probe(activations, t, QUICK, tmp_path / str(k)) for k, t in enumerate((table, flipped)))
    assert one.predictions.keys() == two.predictions.keys()
    for key, p_lnc in one.predictions.items():
        assert np.array_equal(p_lnc, two.predictions[key])
    assert accuracy(one, "logreg")["lm.02"] == pytest.approx(1 - accuracy(two, "logreg")["lm.02"])


def test_results_are_read_back_and_changed_settings_are_not(tmp_path, monkeypatch):
    activations, table = planted(tmp_path, images=60)
    first = probe(activations, table, QUICK, tmp_path / "out")
    monkeypatch.setattr("probekit.probes.logreg.solve", lambda *a, **k: pytest.fail("computed again"))
    again = probe(activations, table, QUICK, tmp_path / "out")
    pd.testing.assert_frame_equal(first.metrics, again.metrics)
    pd.testing.assert_frame_equal(first.losses, again.losses)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        probe(activations, table, replace(QUICK, strengths=(0.1,)), tmp_path / "out")


def test_layers_in_small_groups_give_the_same_answer(tmp_path):
    activations, table = planted(tmp_path, images=60)
    wide, narrow = (probe(activations, table, replace(QUICK, memory_gb=gb), tmp_path / str(gb)) for gb in (4.0, 1e-9))
    for key, p_lnc in wide.predictions.items():
        np.testing.assert_allclose(p_lnc, narrow.predictions[key], atol=1e-3)
    kept = wide.metrics.metric.isin(["accuracy", "log_loss", "f1_macro"])  # a rank can flip in the last digit
    wide, narrow = (found.metrics[kept].drop(columns="settings") for found in (wide, narrow))
    pd.testing.assert_frame_equal(wide, narrow, rtol=1e-3, atol=1e-4)


def test_every_seed_has_its_rows_where_it_has_an_effect(tmp_path):
    activations, table = planted(tmp_path, images=60)
    settings = replace(QUICK, seeds=(0, 3), controls=("shuffled",), probes=("logreg", "linear"))
    found = probe(activations, table, settings, tmp_path / "out").metrics
    rows = found[(found.metric == "log_loss") & (found.split == "test") & found.control.isin(["none", "shuffled"])]
    seeds = rows.groupby(["probe", "control"]).seed.agg(lambda s: tuple(sorted(set(s))))
    assert seeds.to_dict() == {("logreg", "none"): (0,), ("logreg", "shuffled"): (0, 3), ("linear", "none"): (0, 3),
                               ("linear", "shuffled"): (0, 3)}
    values = rows.pivot_table(index=["probe", "control", "layer"], columns="seed", values="value")
    assert (values[0] != values[3]).drop(("logreg", "none")).all()


def test_what_does_not_fit_together_is_named(tmp_path):
    activations, table = planted(tmp_path, images=60)
    with pytest.raises(ValueError, match=r"unknown probes .'forest'"):
        probe(activations, table, replace(QUICK, probes=("forest",)), tmp_path)
    other = table.assign(prompt="another")
    with pytest.raises(ValueError, match="another examples table"):
        probe(activations, other, QUICK, tmp_path)
    no_test = table.assign(split="train")
    with pytest.raises(ValueError, match="no examples in validation, test"):
        probe(activations, no_test, QUICK, tmp_path)


def test_results_belong_to_their_examples_and_names_to_one_model(tmp_path):
    activations, table = planted(tmp_path, images=60)
    found = probe(activations, table, QUICK, tmp_path / "out")
    found.write(tmp_path / "run", building.table_fingerprint(table))
    read = results.ProbeResults.read(tmp_path / "run", building.table_fingerprint(table))
    pd.testing.assert_frame_equal(read.metrics, found.metrics)
    for name in results.ARRAYS:
        assert getattr(read, name).keys() == getattr(found, name).keys() and len(getattr(read, name))
        for key, values in getattr(read, name).items():
            np.testing.assert_array_equal(values, getattr(found, name)[key])
    labels = np.array([y[0] for y, split in zip(table.labels, table.split, strict=True) if split == "test"])
    for key, p_lnc in read.predictions.items():
        shares = ((p_lnc[..., 0] >= 0.5) == labels).mean(1)  # the stored predictions are those that were scored
        np.testing.assert_allclose(shares, accuracy(read, key.rpartition("|")[2]), atol=1e-6)
    other = table.assign(split=table.split.to_numpy()[::-1])
    with pytest.raises(ValueError, match="another examples table"):
        results.ProbeResults.read(tmp_path / "run", building.table_fingerprint(other))
    with pytest.raises(FileNotFoundError, match="run 03_probe"):
        results.ProbeResults.read(tmp_path / "nothing", building.table_fingerprint(table))
    with pytest.raises(ValueError, match="planted is there twice"):
        results.ProbeResults.join([found, found])


def test_the_best_layer_is_chosen_without_the_test_images(tmp_path):
    """Over many layers of pure noise the chosen layer's test score stays at chance; the highest test score does not."""
    chosen, highest = [], []
    for seed in range(12):
        activations, table = planted(tmp_path / str(seed), layer="none", images=100, seed=seed)
        found = probe(activations, table, replace(QUICK, probes=("logreg",)), tmp_path / str(seed)).metrics
        chosen.append(results.best_layers(found, task_infos(table)).value[0])
        highest.append(results.select_curve(found, "logreg", "accuracy").value.max())
    assert abs(np.mean(chosen) - 0.5) < 0.045 and np.mean(highest) > np.mean(chosen) + 0.02


def test_a_problem_that_does_not_converge_is_named(tmp_path, monkeypatch):
    from functools import partial

    from probekit.probes import logreg

    activations, table = planted(tmp_path, images=60)
    monkeypatch.setattr(logreg, "solve", partial(logreg.solve, steps=1))
    with pytest.warns(UserWarning, match=r"in \d+ of \d+ problems; the worst: caption, lm\.0\d, true labels, class"):
        probe(activations, table, replace(QUICK, probes=("logreg",)), tmp_path / "out")


def multilabel(folder, images=500, c=6):
    """Activations that hold which classes are there, in one layer of two; three classes an image are asked for."""
    rng = np.random.default_rng(0)
    y = (rng.random((images, c)) < np.linspace(0.5, 0.15, c)).astype(int)
    y[np.arange(images), rng.integers(0, c, images)] = 1
    mask = np.stack([rng.permutation([1] * 3 + [0] * (c - 3)) for _ in range(images)])
    states = {"lm.00/mean": rng.normal(size=(images, D)), "lm.01/mean": rng.normal(size=(images, D)) * 0.5 + (
        2 * y - 1) @ rng.normal(size=(c, D))}
    own = folder / "activations" / "several" / "0"
    own.mkdir(parents=True)
    files = [own / f"{i}.jpg" for i in range(images)]
    for file in files:
        file.touch()
    table = pd.DataFrame({"image_id": np.arange(images), "task": "category", "file": [str(f) for f in files],
                          "split": rng.choice(["train", "validation", "test"], images, p=[0.6, 0.2, 0.2]),
                          "prompt": "which?", "labels": y.tolist(), "mask": mask.tolist()})
    table = with_task_info(table, "multilabel", "abcdef")
    part = shards.Part.plan(own, shards.rows_of(table), ["lm/mean"], 10_000)
    part.write(0, {key: values.astype(np.float32) for key, values in states.items()})
    shards.write_meta(own, {"layers": {"lm": LAYERS[:2]}, "model": "several", "untrained": False})
    return store.Activations(own, table, ("lm",), ("mean",)), table


def test_controls_and_codelength_of_several_classes(tmp_path):
    activations, table = multilabel(tmp_path)
    both = ("shuffled", "control_task")
    settings = replace(QUICK, probes=("logreg",), controls=both, codelength=True, seeds=(0, 1, 2))
    found = probe(activations, table, settings, tmp_path / "out").metrics
    test = found[(found["class"] == "") & (found.split != "validation")]
    score = test.groupby(["metric", "control", "layer"]).value.mean()
    assert score["accuracy", "none", "lm.01"] > 0.9 and score["average_precision", "none", "lm.01"] > 0.9
    assert abs(score["accuracy", "shuffled"] - score["accuracy", "name_alone"]).max() < 0.1
    assert score["accuracy", "control_task", "lm.00"] < score["chance", "control_task", "lm.00"] + 0.1
    assert score["selectivity", "none", "lm.01"] == pytest.approx(
        score["accuracy", "none", "lm.01"] - score["accuracy", "control_task", "lm.01"])
    assert score["codelength", "none", "lm.01"] < 0.6 and 0.85 < score["codelength", "none", "lm.00"] < 1.2
    norms = found[(found.metric == "gradient_norm") & (found.control == "none")]
    assert set(norms.layer) == {"lm.00", "lm.01"} and (norms.value <= 1e-5).all()
    shares = found[(found.metric == "prevalence") & (found.layer == "lm.00")].set_index("class").value
    rows = table[table.split == "test"]
    y, mask = (np.array(rows[name].tolist()) for name in ("labels", "mask"))
    np.testing.assert_allclose(shares, (y * mask).sum(0) / mask.sum(0))


def test_a_control_that_a_task_cannot_have_is_left_out_with_a_word(tmp_path):
    activations, table = planted(tmp_path, images=60)
    single = table.assign(prompt=[f"{i}" for i in range(len(table))])
    shards.Part.plan(activations.folder, shards.rows_of(single), ["lm/mean"], 10_000).write(0, {
        f"{name}/mean": activations[name, "mean"] for name in LAYERS})
    view = store.Activations(activations.folder, single, ("lm",), ("mean",))
    settings = replace(QUICK, probes=("logreg",), controls=("shuffled", "control_task"))
    with pytest.warns(UserWarning, match="caption has no control task: .* whose prompt is asked once more"):
        found = probe(view, single, settings, tmp_path / "out").metrics
    assert "shuffled" in set(found.control) and "control_task" not in set(found.control)


def test_controls_of_another_kind_are_refused(tmp_path):
    activations, table = planted(tmp_path, images=60)
    with pytest.raises(ValueError, match=r"unknown controls .'no_image'.: take names out of shuffled, control_task"):
        probe(activations, table, replace(QUICK, controls=("no_image",)), tmp_path)


def test_every_table_says_what_it_was_made_with(small_run, tmp_path):
    made = {one["fingerprint"]: one for one in small_run.results.stores}
    assert len(made) == 2
    for name in ("metrics", "losses", "transfer"):
        table = getattr(small_run.results, name)
        assert set(table.settings) == set(made)
    for one in made.values():
        versions = one["meta"]["versions"] | one["versions"]
        assert {"torch", "transformers", "scikit-learn", "numpy", "probekit"} <= set(versions)
    by_model = small_run.results.metrics.groupby("settings").control.agg(set)
    untrained, = (key for key, one in made.items() if one["meta"]["untrained"])
    assert by_model[untrained] == {"untrained"}
    told = small_run.write_tables(tmp_path)
    written = paths.read_json(tmp_path / "settings.json")
    assert set(pd.read_csv(tmp_path / "metrics.csv", low_memory=False).settings) == set(written)
    assert "settings.json" in told
    assert written[untrained]["meta"]["versions"]["transformers"] and written[untrained]["settings"]["seeds"] == [0]


def test_the_same_settings_give_the_same_tables(examples, tmp_path, monkeypatch):
    from probekit.extraction.extract import ExtractionSettings, extract

    found = []
    for name in ("one", "other"):
        monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path / name))
        store_ = extract(ExtractionSettings("tiny-qwen2-vl"), examples, "cpu")
        settings = ProbeSettings(strengths=(0.01, 1.0), training=Training(epochs=2), controls=("control_task",), resamples=50)
        found.append(probe(store_, examples, settings, tmp_path / name / "probes"))
    for name in ("metrics", "losses", "transfer"):
        one, other = (getattr(results_, name).drop(columns="settings") for results_ in found)
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert all(np.array_equal(values, found[1].predictions[key]) for key, values in found[0].predictions.items())
