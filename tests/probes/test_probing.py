from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from probekit import paths
from probekit.probes import logreg, probing
from probekit.probes.adam import AdamSettings
from probekit.probes.probing import ProbeSettings, probe_activations
from probekit.probes.results import best_layers, select_curve
from tests.support.tables import planted_activations, planted_categories

QUICK = ProbeSettings(
    resamples=50, codelength=False, training=AdamSettings(epochs=8, batch=32, lr=2e-2)
)
ONLY_LOGREG = replace(QUICK, probes=("logreg",))


@pytest.fixture(scope="module")
def planted():
    return planted_activations()


@pytest.fixture(scope="module")
def small():
    return planted_activations(images=60)


def accuracy(results, probe):
    """Test accuracy of the true labels by layer."""
    rows = results.metrics[results.metrics.control == "none"]
    curve = select_curve(rows, probe=probe, metric="accuracy")
    return curve.set_index("layer").value


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["logreg", "linear", "mlp"])
def test_a_planted_signal_is_found_at_its_layer(planted, probe, tmp_path):
    settings = replace(QUICK, probes=(probe,))
    results = probe_activations(planted, settings=settings, folder=tmp_path)
    scores = accuracy(results, probe)
    assert scores.idxmax() == "lm.02"
    assert scores["lm.02"] > 0.9
    assert (scores.drop("lm.02") < 0.6).all()
    best = best_layers(results.metrics, results.tasks, probe=probe)
    assert list(best[best.control == "none"]["best layer"]) == ["lm.02"]


@pytest.mark.slow
def test_shuffled_labels_score_at_chance(planted, tmp_path):
    labels = planted.examples["labels"].sample(frac=1, random_state=0)
    shuffled = planted.with_examples(labels=list(labels))
    results = probe_activations(shuffled, settings=QUICK, folder=tmp_path)
    for probe in ("logreg", "linear"):
        assert (accuracy(results, probe) - 0.5).abs().max() < 0.12


@pytest.mark.slow
def test_test_labels_do_not_reach_the_probe(planted, tmp_path):
    examples = planted.examples
    flipped_labels = [
        [1 - label[0]] if split == "test" else label
        for label, split in zip(examples["labels"], examples.split, strict=True)
    ]
    flipped = planted.with_examples(labels=flipped_labels)
    results = probe_activations(planted, settings=QUICK, folder=tmp_path / "true")
    flipped_results = probe_activations(flipped, settings=QUICK, folder=tmp_path / "flipped")
    assert results.predictions.keys() == flipped_results.predictions.keys()
    for key, p_lnc in results.predictions.items():
        assert np.array_equal(p_lnc, flipped_results.predictions[key])
    score = accuracy(results, "logreg")["lm.02"]
    assert score == pytest.approx(1 - accuracy(flipped_results, "logreg")["lm.02"])


@pytest.mark.slow
def test_results_are_read_back_until_settings_states_or_labels_change(small, tmp_path, monkeypatch):
    first = probe_activations(small, settings=QUICK, folder=tmp_path)
    monkeypatch.setattr(
        logreg, "choose_logreg", lambda *args, **kwargs: pytest.fail("computed again")
    )
    again = probe_activations(small, settings=QUICK, folder=tmp_path)
    pd.testing.assert_frame_equal(first.metrics, again.metrics)
    pd.testing.assert_frame_equal(first.losses, again.losses)

    other_settings = replace(QUICK, strengths=(0.1,))
    other_states = replace(small, states={key: x_nd + 1 for key, x_nd in small.states.items()})
    other_labels = small.with_examples(labels=list(small.examples["labels"])[::-1])
    for activations, settings in (
        (small, other_settings),
        (other_states, QUICK),
        (other_labels, QUICK),
    ):
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            probe_activations(activations, settings=settings, folder=tmp_path)


@pytest.mark.slow
def test_the_same_settings_give_the_same_tables(small, tmp_path):
    settings = replace(QUICK, controls=("control_task",), codelength=True)
    one = probe_activations(small, settings=settings, folder=tmp_path / "one")
    other = probe_activations(small, settings=settings, folder=tmp_path / "other")
    for name in ("metrics", "losses", "transfer"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)
    for key, p_lnc in one.predictions.items():
        assert np.array_equal(p_lnc, other.predictions[key])


@pytest.mark.slow
def test_layers_in_small_groups_give_the_same_answer(small, tmp_path):
    wide = probe_activations(small, settings=QUICK, folder=tmp_path / "wide")
    narrow_settings = replace(QUICK, memory_gb=1e-9)
    narrow = probe_activations(small, settings=narrow_settings, folder=tmp_path / "narrow")
    for key, p_lnc in wide.predictions.items():
        np.testing.assert_allclose(p_lnc, narrow.predictions[key], atol=1e-3)
    # Average precision is left out: a rank can flip in the last digit.
    is_smooth = wide.metrics.metric.isin(["accuracy", "log_loss", "f1_macro"])
    pd.testing.assert_frame_equal(
        wide.metrics[is_smooth].drop(columns="settings"),
        narrow.metrics[is_smooth].drop(columns="settings"),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.slow
def test_every_seed_has_its_rows_where_it_has_an_effect(small, tmp_path):
    settings = replace(QUICK, seeds=(0, 3), controls=("shuffled",))
    metrics = probe_activations(small, settings=settings, folder=tmp_path).metrics
    rows = metrics[(metrics.metric == "log_loss") & (metrics.split == "test")]
    rows = rows[rows.control.isin(["none", "shuffled"])]
    seeds = rows.groupby(["probe", "control"]).seed.agg(lambda seed: tuple(sorted(set(seed))))
    assert seeds.to_dict() == {
        ("logreg", "none"): (0,),
        ("logreg", "shuffled"): (0, 3),
        ("linear", "none"): (0, 3),
        ("linear", "shuffled"): (0, 3),
    }
    values = rows.pivot_table(index=["probe", "control", "layer"], columns="seed", values="value")
    assert (values[0] != values[3]).drop(("logreg", "none")).all()


def test_the_ends_of_the_grid_stand_beside_the_strength_and_are_no_interval(small, tmp_path):
    settings = replace(ONLY_LOGREG, strengths=(0.1, 0.01, 1.0))
    metrics = probe_activations(small, settings=settings, folder=tmp_path).metrics
    is_strength = metrics.metric == "strength"
    strengths = metrics[is_strength]
    assert set(strengths.layer) == set(small.layers)
    assert strengths.value.isin(settings.strengths).all()
    assert set(strengths.strength_min) == {0.01}
    assert set(strengths.strength_max) == {1.0}
    assert strengths[["lo", "hi"]].isna().all(axis=None)
    assert strengths.strength_solved.isin(settings.strengths).all()
    assert (strengths.strength_solved >= strengths.value).all()
    columns = ["strength_min", "strength_max", "strength_solved"]
    assert metrics.loc[~is_strength, columns].isna().all(axis=None)


def test_unknown_repeated_and_missing_settings_are_named(small, tmp_path):
    unknown_probe = replace(QUICK, probes=("forest",))
    with pytest.raises(ValueError, match=r"unknown probes .'forest'"):
        probe_activations(small, settings=unknown_probe, folder=tmp_path)
    of_inputs = replace(QUICK, controls=("no_image",))
    message = r"unknown controls .'no_image'.: take names out of shuffled, control_task"
    with pytest.raises(ValueError, match=message):
        probe_activations(small, settings=of_inputs, folder=tmp_path)
    for seeds in ((), (1, 1)):
        with pytest.raises(ValueError, match="name each once, and at least one"):
            probe_activations(small, settings=replace(QUICK, seeds=seeds), folder=tmp_path)


def test_a_split_without_examples_is_named(small, tmp_path):
    only_train = small.with_examples(split="train")
    with pytest.raises(ValueError, match="no examples in validation, test"):
        probe_activations(only_train, settings=QUICK, folder=tmp_path)


def test_a_problem_that_does_not_converge_is_named(small, tmp_path, monkeypatch):
    one_step = partial(logreg.choose_logreg, max_steps=1)
    monkeypatch.setattr(logreg, "choose_logreg", one_step)
    message = r"in \d+ of \d+ problems; the worst: caption, lm\.0\d, true labels, class"
    with pytest.warns(UserWarning, match=message):
        probe_activations(small, settings=ONLY_LOGREG, folder=tmp_path)


def test_changed_inputs_and_random_weights_have_no_controls_of_the_labels(small, tmp_path):
    settings = replace(ONLY_LOGREG, controls=("shuffled",), codelength=True)
    no_image = replace(small, control="no_image")
    results = probe_activations(no_image, settings=settings, folder=tmp_path)
    assert set(results.metrics.control) == {"no_image"}
    assert "codelength" not in set(results.metrics.metric)
    assert not results.predictions
    untrained = replace(small, untrained=True)
    results = probe_activations(untrained, settings=settings, folder=tmp_path)
    assert set(results.metrics.control) == {"untrained"}
    assert "codelength" in set(results.metrics.metric)
    assert {key.control for key in results.predictions} == {"untrained"}
    assert not results.metrics.plateau[results.metrics.metric == "accuracy"].isna().all()


@pytest.mark.slow
def test_controls_and_codelength_of_several_classes(tmp_path):
    activations = planted_categories()
    settings = replace(
        ONLY_LOGREG, controls=("shuffled", "control_task"), codelength=True, seeds=(0, 1, 2)
    )
    metrics = probe_activations(activations, settings=settings, folder=tmp_path).metrics
    of_all = metrics[(metrics["class"] == "") & (metrics.split != "validation")]
    score = of_all.groupby(["metric", "control", "layer"]).value.mean()
    assert score["accuracy", "none", "lm.01"] > 0.9
    assert score["average_precision", "none", "lm.01"] > 0.9
    guess = score["accuracy", "name_alone"]
    assert abs(score["accuracy", "shuffled"] - guess).max() < 0.1
    chance = score["chance", "control_task", "lm.00"]
    assert score["accuracy", "control_task", "lm.00"] < chance + 0.1
    difference = score["accuracy", "none", "lm.01"] - score["accuracy", "control_task", "lm.01"]
    assert score["selectivity", "none", "lm.01"] == pytest.approx(difference)
    assert score["codelength", "none", "lm.01"] < 0.6
    assert 0.85 < score["codelength", "none", "lm.00"] < 1.2

    norms = metrics[(metrics.metric == "gradient_norm") & (metrics.control == "none")]
    assert set(norms.layer) == {"lm.00", "lm.01"}
    assert (norms.value <= 1e-5).all()

    is_prevalence = (metrics.metric == "prevalence") & (metrics.layer == "lm.00")
    prevalence = metrics[is_prevalence].set_index("class").value
    test_examples = activations.examples[activations.examples.split == "test"]
    y_nc = np.array(test_examples["labels"].tolist())
    mask_nc = np.array(test_examples["mask"].tolist())
    np.testing.assert_allclose(prevalence, (y_nc * mask_nc).sum(0) / mask_nc.sum(0))


@pytest.mark.slow
def test_a_control_that_a_task_cannot_have_is_left_out_with_a_warning(small, tmp_path):
    no_repeats = small.with_examples(prompt=[f"{i}" for i in range(len(small.examples))])
    settings = replace(ONLY_LOGREG, controls=("shuffled", "control_task"))
    message = "caption has no control task: .* whose prompt occurs there more than once"
    with pytest.warns(UserWarning, match=message):
        metrics = probe_activations(no_repeats, settings=settings, folder=tmp_path).metrics
    assert "shuffled" in set(metrics.control)
    assert "control_task" not in set(metrics.control)


def test_every_table_says_what_it_was_made_with(small_run, tmp_path):
    stores = {store["fingerprint"]: store for store in small_run.results.stores}
    assert len(stores) == 2
    for name in ("metrics", "losses", "transfer"):
        table = getattr(small_run.results, name)
        assert set(table.settings) == set(stores)
    for store in stores.values():
        versions = store["meta"]["versions"] | store["versions"]
        assert {"torch", "transformers", "scikit-learn", "numpy", "probekit"} <= set(versions)
    controls = small_run.results.metrics.groupby("settings").control.agg(set)
    (untrained,) = (key for key, store in stores.items() if store["meta"]["untrained"])
    assert controls[untrained] == {"untrained"}

    files = small_run.write_tables(tmp_path)
    written = paths.read_json(tmp_path / "settings.json")
    metrics = pd.read_csv(tmp_path / "metrics.csv", low_memory=False)
    assert set(metrics.settings) == set(written)
    assert "settings.json" in files
    assert written[untrained]["meta"]["versions"]["transformers"]
    assert written[untrained]["settings"]["seeds"] == [0]


def test_a_control_without_anything_to_score_is_named_and_left_out(tmp_path):
    # A category's label is drawn by the other categories of its image, and here it has none.
    activations = planted_categories(images=60)
    is_test = activations.examples.split == "test"
    shown = [
        [0] * len(label) if nothing else label
        for label, nothing in zip(activations.examples["labels"], is_test, strict=True)
    ]
    activations = activations.with_examples(labels=shown)
    settings = replace(ONLY_LOGREG, controls=("shuffled", "control_task"))
    with pytest.warns(UserWarning, match="category has no control task: it has labels of 0 images"):
        results = probe_activations(activations, settings=settings, folder=tmp_path)
    assert set(results.metrics.control) == {"none", "shuffled", "majority", "name_alone"}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_task_without_anything_to_score_is_refused_before_the_work(
    split, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(logreg, "choose_logreg", lambda *args, **kwargs: pytest.fail("was fitted"))
    is_of_split = small.examples.split == split
    image = small.examples.image_id[is_of_split].iloc[0]
    counts = ~is_of_split | (small.examples.image_id == image)
    one_image = small.with_examples(mask=[[int(one)] for one in counts])
    with pytest.raises(ValueError, match=f"task caption has labels of 1 images in {split}"):
        probe_activations(one_image, settings=QUICK, folder=tmp_path)


def two_tasks():
    """Activations of two tasks, one of which has other labels."""
    first = planted_activations(images=60)
    tables = [first.examples, first.examples.assign(task="other")]
    states = {key: np.concatenate([x_nd, x_nd]) for key, x_nd in first.states.items()}
    return replace(first, examples=pd.concat(tables, ignore_index=True), states=states)


def assert_same_results(found, expected):
    for name in ("metrics", "losses", "transfer"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(expected, name))
    for key, p_lnc in expected.predictions.items():
        assert np.array_equal(p_lnc, found.predictions[key])


@pytest.mark.slow
@pytest.mark.parametrize("fits", [1, 4, 11])
def test_probing_that_was_stopped_goes_on_where_it_was(fits, tmp_path, monkeypatch):
    activations = two_tasks()
    settings = replace(QUICK, memory_gb=1e-9, codelength=True, controls=("shuffled",))
    expected = probe_activations(activations, settings=settings, folder=tmp_path / "whole")
    fitted = []
    original = probing._fit

    def fit_some(x_lnd, probed_task, *, kind, layers, settings):
        if len(fitted) == fits:
            raise KeyboardInterrupt
        fitted.append((probed_task.name, kind, *layers))
        return original(x_lnd, probed_task, kind=kind, layers=layers, settings=settings)

    monkeypatch.setattr(probing, "_fit", fit_some)
    with pytest.raises(KeyboardInterrupt):
        probe_activations(activations, settings=settings, folder=tmp_path / "stopped")
    before = set(fitted)
    fitted.clear()
    fits = 1000
    results = probe_activations(activations, settings=settings, folder=tmp_path / "stopped")
    assert len(before) + len(fitted) == 16  # tasks x kinds x layers
    assert not before & set(fitted)
    assert_same_results(results, expected)
    assert not list((tmp_path / "stopped").rglob("fitted-*"))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_fitted_again(tmp_path, monkeypatch):
    activations = two_tasks()
    settings = replace(QUICK, memory_gb=1e-9)
    expected = probe_activations(activations, settings=settings, folder=tmp_path / "whole")
    monkeypatch.setattr(probing, "_relate_layers", partial(fail_with, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        probe_activations(activations, settings=settings, folder=tmp_path / "stopped")
    monkeypatch.undo()
    files = sorted((tmp_path / "stopped").rglob("fitted-*/*/*.safetensors"))
    assert len(files) == 16
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(b"")
    save_file({"something": np.zeros(3)}, files[2])
    fitted = []
    original = probing._fit

    def count_fits(*arguments, **options):
        fitted.append(options["layers"])
        return original(*arguments, **options)

    monkeypatch.setattr(probing, "_fit", count_fits)
    results = probe_activations(
        activations,
        settings=replace(settings, memory_gb=2e-9),  # it may change on the way
        folder=tmp_path / "stopped",
    )
    assert len(fitted) == 3
    results = results.with_settings("")
    expected = expected.with_settings("")
    assert_same_results(results, expected)


@pytest.mark.slow
def test_layers_that_do_not_fit_the_memory_are_probed_in_halves(tmp_path, monkeypatch, capsys):
    activations = two_tasks()
    expected = probe_activations(activations, settings=QUICK, folder=tmp_path / "whole")
    original = probing._fit

    sizes = []

    def fit_two(x_lnd, probed_task, *, kind, layers, settings):
        sizes.append(len(layers))
        if len(layers) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return original(x_lnd, probed_task, kind=kind, layers=layers, settings=settings)

    monkeypatch.setattr(probing, "_fit", fit_two)
    results = probe_activations(activations, settings=QUICK, folder=tmp_path / "halves")
    assert capsys.readouterr().out.count("they are probed in halves") == 1
    # Each kind tries the group that is loaded; those of the other task come two by two.
    assert sizes == [4, 2, 2, 4, 2, 2, 2, 2, 2, 2]
    for key, p_lnc in expected.predictions.items():
        np.testing.assert_allclose(p_lnc, results.predictions[key], atol=1e-3)
    monkeypatch.setattr(probing, "_fit", partial(fail_with, MemoryError("no memory")))
    with pytest.raises(MemoryError, match=r"of one layer \(lm.00, caption\) do not fit"):
        probe_activations(activations, settings=QUICK, folder=tmp_path / "none")
    monkeypatch.setattr(probing, "_fit", partial(fail_with, RuntimeError("another error")))
    with pytest.raises(RuntimeError, match="another error"):
        probe_activations(activations, settings=QUICK, folder=tmp_path / "none")


def fail_with(error, *_args, **_options):
    raise error


@pytest.mark.slow
def test_a_task_that_cannot_be_scored_costs_the_others_nothing(tmp_path):
    activations = two_tasks()
    examples = activations.examples
    is_test = (examples.task == "other") & (examples.split == "test")
    activations = activations.with_examples(mask=[[int(not nothing)] for nothing in is_test])
    with pytest.warns(UserWarning, match=r"task other has labels of 0 images in test.*the other"):
        results = probe_activations(activations, settings=QUICK, folder=tmp_path)
    assert set(results.metrics.task) == {"caption"}
    assert set(results.tasks) == {"caption"}
