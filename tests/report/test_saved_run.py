import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest

from probekit.probes.localisation import NOT_POOLED
from probekit.probes.results import ProbeKey
from probekit.report import saved_run as module
from probekit.report.saved_run import SavedRun, list_runs, setting_words

PROBES = ProbeKey("tiny-qwen2-vl", "none", "mean", "category", "logreg")
LENS = PROBES._replace(pooling=NOT_POOLED, probe="lens")


def test_a_run_is_opened_from_the_home_that_is_named(saved_run, small_home, data):
    assert saved_run.home.root == small_home
    assert list_runs(small_home) == ["small"]
    assert list_runs() == []  # the home that is found without naming it is empty
    with pytest.raises(FileNotFoundError, match="run 01_build_data"):
        SavedRun.open("small")


def test_runs_are_listed_from_the_newest(data):
    for name, time in (("old", 1_000), ("new", 3_000), ("middle", 2_000)):
        file = data / "probes" / name / "results.json"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (time, time))
    (data / "probes" / "unfinished").mkdir()
    assert list_runs() == ["new", "middle", "old"]


def test_a_run_without_results_names_the_step(small_home, data):
    shutil.copytree(small_home / "data" / "tasks", data / "tasks")
    with pytest.raises(FileNotFoundError, match="run 03_probe"):
        SavedRun.open("small")


def test_a_home_can_be_moved(small_home, tmp_path):
    shutil.copytree(small_home / "data", tmp_path / "data")
    moved = SavedRun.open("small", tmp_path)
    expected = {key._replace(control=c) for key in (PROBES, LENS) for c in ("none", "untrained")}
    assert set(moved.stored_heat.files) == expected
    assert all(file.is_relative_to(tmp_path) for file in moved.stored_heat.files.values())


def test_test_examples_are_in_the_order_of_the_predictions(saved_run):
    for key, p_lnc in saved_run.results.predictions.items():
        rows = saved_run.test_examples(key.task)
        assert set(rows.task) == {key.task}
        assert set(rows.split) == {"test"}
        assert len(rows) == p_lnc.shape[1]


def test_boxes_are_shares_of_the_image_and_leave_crowds_out(saved_run):
    instances = saved_run.instances
    row = saved_run.test_examples("category").iloc[0]
    of_image = instances[instances.image_id == row.image_id]
    assert saved_run.categories_of(row.image_id) == sorted(set(of_image.category))
    for category in saved_run.categories_of(row.image_id):
        boxes_b4 = saved_run.boxes(row.image_id, category)
        of_category = of_image[(of_image.category == category) & (of_image.iscrowd == 0)]
        assert len(boxes_b4) == len(of_category)
        np.testing.assert_allclose(boxes_b4[:, 0], of_category.x / of_category.width)
        np.testing.assert_allclose(
            boxes_b4[:, 3], (of_category.y + of_category.h) / of_category.height
        )
    assert saved_run.boxes(row.image_id, "no such category").shape == (0, 4)


@pytest.mark.slow
def test_heat_is_read_where_it_is_stored_and_made_where_it_is_not(small_home, monkeypatch):
    run = SavedRun.open("small", small_home)
    rows = run.test_examples(PROBES.task)
    loaded = []
    reload_model = module.reload_model

    def load_and_record(*args, **options):
        loaded.append((args[0]["untrained"], options["with_head"]))
        return reload_model(*args, **options)

    monkeypatch.setattr(module, "reload_model", load_and_record)
    stored = {key: run.heat_map(key, rows.iloc[0]) for key in (PROBES, LENS)}
    assert run.heat_map(PROBES, rows.iloc[-1], run_model=False) is None
    assert loaded == []

    trained = run.heat_map(PROBES, rows.iloc[-1])
    run.stored_heat = module.StoredHeat({}, small_home)
    computed = {key: run.heat_map(key, rows.iloc[0]) for key in (PROBES, LENS)}
    for key, heat_map in stored.items():
        np.testing.assert_allclose(
            computed[key].logit_ltc, heat_map.logit_ltc, atol=0.02, rtol=2e-3
        )
        np.testing.assert_allclose(computed[key].cells_t4, heat_map.cells_t4)
    run.heat_map(PROBES, rows.iloc[1])
    # Once for the probes of all examples, and once more with the head that the lens needs.
    assert loaded == [(False, False), (False, True)]

    untrained = run.heat_map(PROBES._replace(control="untrained"), rows.iloc[-1])
    assert loaded[2:] == [(True, False)]
    assert not np.allclose(trained.logit_ltc, untrained.logit_ltc, atol=0.1)


def test_settings_are_in_words():
    assert setting_words("codelength", True) == "yes"
    assert setting_words("seeds", [0, 1]) == "0, 1"
    assert setting_words("dtype", None) == "chosen by device"
    assert setting_words("longest_side", None) == ""
    nested = {"epochs": 10, "patience": None, "probes": ["logreg", "mlp"]}
    assert setting_words("training", nested) == "epochs: 10; probes: logreg, mlp"


def test_settings_name_every_step(saved_run):
    settings = saved_run.settings
    assert settings["data: train"] == "36"
    assert "poolings: mean, last" in settings["extraction: tiny-qwen2-vl"]
    assert "untrained: yes" in settings["extraction: tiny-qwen2-vl (untrained)"]
    assert "torch " in settings["versions: tiny-qwen2-vl"]
    assert settings["probes: resamples"] == "50"


def test_tables_are_written_with_what_they_come_from(saved_run, tmp_path):
    contents = saved_run.write_tables(tmp_path / "new")
    assert {file.name for file in (tmp_path / "new").iterdir()} == set(contents)
    for name in ("metrics", "losses", "transfer"):
        table = getattr(saved_run.results, name)
        written = pd.read_csv(tmp_path / "new" / f"{name}.csv", keep_default_na=False)
        assert list(written.columns) == list(table.columns)
        assert len(written) == len(table)
    written = pd.read_csv(tmp_path / "new" / "metrics.csv")
    np.testing.assert_allclose(written.value, saved_run.results.metrics.value, rtol=1e-4)
    sources = json.loads((tmp_path / "new" / "settings.json").read_text(encoding="utf-8"))
    assert set(written.settings) == set(sources)
