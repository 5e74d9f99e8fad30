from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probekit import parts, paths, results, store, tasks
from probekit.adam import Training
from probekit.probe import Probing, probe

LAYERS = ["lm.00", "lm.01", "lm.02", "lm.03"]
D = 16
QUICK = Probing(resamples=50, codelength=False, training=Training(epochs=15, lr=1e-2))


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
    split = np.repeat(rng.permutation(np.repeat(["train", "validation", "test"], sizes)), 2)
    table = pd.DataFrame({"image_id": np.repeat(np.arange(images), 2), "split": split, "task": "caption",
                          "file": [str(f) for f in np.repeat(files, 2)], "prompt": ["one?", "other?"] * images,
                          "labels": [[int(v)] for v in y], "mask": [[1]] * (2 * images)})
    table.attrs["tasks"] = {"caption": {"kind": "binary", "classes": ["match"], "question": "?"}}
    parts.Part.plan(own, parts.rows_of(table), ["lm/mean"], 10_000).write(0, states)
    paths.write_json(own / "meta.json", {"layers": {"lm": LAYERS}, "model": "planted", "untrained": False})
    return store.Store(own, table, ("lm",), ("mean",)), table


def accuracy(found, name):
    rows = found.metrics[found.metrics.control == "none"]
    return results.select(rows, name, "accuracy").set_index("layer").value


@pytest.mark.parametrize("name", ["logreg", "linear", "mlp"])
def test_a_planted_signal_is_found_at_its_layer(tmp_path, name):
    activations, table = planted(tmp_path)
    settings = replace(QUICK, probes=(name,))
    scores = accuracy(probe(activations, table, settings, tmp_path / "out"), name)
    assert scores.idxmax() == "lm.02" and scores["lm.02"] > 0.9
    assert (scores.drop("lm.02") < 0.6).all()
    found = probe(activations, table, settings, tmp_path / "out").metrics
    best = results.best_layers(found, table.attrs["tasks"], name)
    assert list(best[best.control == "none"]["best layer"]) == ["lm.02"]


def test_shuffled_labels_score_at_chance(tmp_path):
    activations, table = planted(tmp_path)
    attrs = table.attrs
    table = table.assign(labels=list(table.labels.sample(frac=1, random_state=0)))
    table.attrs = attrs
    for name in ("logreg", "linear"):
        assert (accuracy(probe(activations, table, QUICK, tmp_path / "out"), name) - 0.5).abs().max() < 0.12


def test_test_labels_do_not_reach_the_probe(tmp_path):
    activations, table = planted(tmp_path)
    attrs = table.attrs
    pairs = zip(table.labels, table.split, strict=True)
    flipped = table.assign(labels=[[1 - y[0]] if split == "test" else y for y, split in pairs])
    flipped.attrs = attrs
    one, two = (probe(activations, t, QUICK, tmp_path / str(k)) for k, t in enumerate((table, flipped)))
    assert one.predictions.keys() == two.predictions.keys()
    for key, p_lnc in one.predictions.items():
        assert np.array_equal(p_lnc, two.predictions[key])
    assert accuracy(one, "logreg")["lm.02"] == pytest.approx(1 - accuracy(two, "logreg")["lm.02"])


def test_results_are_read_back_and_changed_settings_are_not(tmp_path, monkeypatch):
    activations, table = planted(tmp_path, images=60)
    first = probe(activations, table, QUICK, tmp_path / "out")
    monkeypatch.setattr("probekit.logreg.solve", lambda *a, **k: pytest.fail("computed again"))
    again = probe(activations, table, QUICK, tmp_path / "out")
    pd.testing.assert_frame_equal(first.metrics, again.metrics)
    pd.testing.assert_frame_equal(first.losses, again.losses)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        probe(activations, table, replace(QUICK, strengths=(0.1,)), tmp_path / "out")


def test_layers_in_small_groups_give_the_same_answer(tmp_path):
    activations, table = planted(tmp_path, images=60)
    wide, narrow = (probe(activations, table, replace(QUICK, memory_gb=gb), tmp_path / str(gb)) for gb in (4.0, 1e-9))
    pd.testing.assert_frame_equal(wide.metrics, narrow.metrics, rtol=1e-4)


def test_every_seed_has_its_rows(tmp_path):
    activations, table = planted(tmp_path, images=60)
    found = probe(activations, table, replace(QUICK, seeds=(0, 3)), tmp_path / "out").metrics
    found = found[found.control == "none"]
    assert set(found[found.metric == "accuracy"].groupby(["probe", "layer", "split"]).seed.agg(tuple)) == {(0, 3)}


def test_what_does_not_fit_together_is_named(tmp_path):
    activations, table = planted(tmp_path, images=60)
    with pytest.raises(ValueError, match=r"unknown probes .'forest'"):
        probe(activations, table, replace(QUICK, probes=("forest",)), tmp_path)
    other = table.assign(prompt="another")
    other.attrs = table.attrs
    with pytest.raises(ValueError, match="another examples table"):
        probe(activations, other, QUICK, tmp_path)
    no_test = table.assign(split="train")
    no_test.attrs = table.attrs
    with pytest.raises(ValueError, match="no examples in validation, test"):
        probe(activations, no_test, QUICK, tmp_path)


def test_results_belong_to_their_examples_and_names_to_one_model(tmp_path):
    activations, table = planted(tmp_path, images=60)
    found = probe(activations, table, QUICK, tmp_path / "out")
    found.write(tmp_path / "run", tasks.table_key(table))
    read = results.Results.read(tmp_path / "run", tasks.table_key(table))
    pd.testing.assert_frame_equal(read.metrics, found.metrics)
    labels = np.array([y[0] for y, split in zip(table.labels, table.split, strict=True) if split == "test"])
    for key, p_lnc in read.predictions.items():
        np.testing.assert_array_equal(p_lnc, found.predictions[key])
        shares = ((p_lnc[..., 0] >= 0.5) == labels).mean(1)  # the stored predictions are those that were scored
        np.testing.assert_allclose(shares, accuracy(read, key.rpartition("|")[2]), atol=1e-6)
    other = table.assign(split=table.split.to_numpy()[::-1])
    other.attrs = table.attrs
    with pytest.raises(ValueError, match="another examples table"):
        results.Results.read(tmp_path / "run", tasks.table_key(other))
    with pytest.raises(FileNotFoundError, match="run 03_probe"):
        results.Results.read(tmp_path / "nothing", tasks.table_key(table))
    with pytest.raises(ValueError, match="planted is there twice"):
        results.Results.join([found, found])


def test_the_best_layer_is_chosen_without_the_test_images(tmp_path):
    """Over many layers of pure noise the chosen layer's test score stays at chance; the highest test score does not."""
    chosen, highest = [], []
    for seed in range(12):
        activations, table = planted(tmp_path / str(seed), layer="none", images=100, seed=seed)
        found = probe(activations, table, replace(QUICK, probes=("logreg",)), tmp_path / str(seed)).metrics
        chosen.append(results.best_layers(found, table.attrs["tasks"]).value[0])
        highest.append(results.select(found, "logreg", "accuracy").value.max())
    assert abs(np.mean(chosen) - 0.5) < 0.045 and np.mean(highest) > np.mean(chosen) + 0.02


def test_a_problem_that_does_not_converge_is_named(tmp_path, monkeypatch):
    from functools import partial

    from probekit import logreg

    activations, table = planted(tmp_path, images=60)
    monkeypatch.setattr(logreg, "solve", partial(logreg.solve, steps=1))
    with pytest.warns(UserWarning, match=r"did not converge: caption, lm\.0\d, true labels, class 'match', C="):
        probe(activations, table, replace(QUICK, probes=("logreg",)), tmp_path / "out")
