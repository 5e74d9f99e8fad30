"""Several processes at once: the same results as in one."""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from tqdm import tqdm

from probekit import workflow
from probekit.processes import map_in_processes

ROW = ["model", "control", "pooling", "task", "probe", "layer", "split", "metric", "class", "seed"]


def process_and_threads(number: int) -> tuple[int, int, int]:
    return number, os.getpid(), torch.get_num_threads()


def speak(number: int) -> None:
    for _ in tqdm(range(3), desc=f"counting {number}", unit="step"):
        time.sleep(0.8 if number == 1 else 0)
    print("once for both")
    print(f"only {number}")
    warnings.warn("look out", stacklevel=1)


def refuse(number: int) -> None:
    raise ValueError(f"number {number} is refused: take another one")


def be_killed(number: int) -> None:
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def test_values_come_in_the_order_of_the_items_from_processes_that_divide_the_threads():
    values = map_in_processes(process_and_threads, [3, 1, 2], n_jobs=2)
    assert [number for number, _, _ in values] == [3, 1, 2]
    assert os.getpid() not in {process for _, process, _ in values}
    assert {threads for _, _, threads in values} == {max(1, torch.get_num_threads() // 2)}


@pytest.mark.parametrize(("items", "n_jobs"), [([1, 2], 1), ([1], 2)])
def test_what_one_process_does_is_done_in_this_one(items, n_jobs):
    values = map_in_processes(process_and_threads, items, n_jobs=n_jobs)
    assert {process for _, process, _ in values} == {os.getpid()}


def test_lines_arrive_once_and_bars_when_they_took_some_seconds(capfd):
    map_in_processes(speak, [1, 2], n_jobs=2)
    out, err = capfd.readouterr()
    assert sorted(out.split()) == sorted(["once", "for", "both", "only", "1", "only", "2"])
    assert err.count("UserWarning: look out") == 1
    assert "counting 1: 100% 3/3 [00:02<" in err
    assert "counting 2: 100%" not in err


def test_an_error_arrives_with_its_words():
    with pytest.raises(ValueError, match=r"number \d is refused: take another one"):
        map_in_processes(refuse, [1, 2], n_jobs=2)


def test_a_process_that_is_killed_says_how_to_go_on():
    with pytest.raises(MemoryError, match=r"was killed.*fewer at once \(n_jobs, copies\)"):
        map_in_processes(be_killed, [1, 2], n_jobs=2)
    assert len(map_in_processes(process_and_threads, [1, 2], n_jobs=2)) == 2


@pytest.mark.slow
def test_probing_in_two_processes_gives_the_results_of_one(small_home, small_run, tmp_path):
    home = shutil.copytree(small_home, tmp_path / "home")
    shutil.rmtree(home / "data" / "probes")
    settings = {
        "strengths": [0.01, 1.0],
        "epochs": 3,
        "controls": ["control_task"],
        "resamples": 50,
        "localise": "category",
        "heat_images": 8,
        "device": "cpu",
        "home": home,
    }
    activations = workflow.open_activations("small", home=home)
    results = workflow.probe(activations, n_jobs=2, **settings)

    expected = small_run.results
    assert set(results.heat) == set(expected.heat)
    assert set(results.predictions) == set(expected.predictions)
    made, alone = (
        table.metrics.set_index(ROW).sort_index()[["value", "lo", "hi"]]
        for table in (results, expected)
    )
    pd.testing.assert_frame_equal(made, alone, rtol=1e-3, atol=1e-3)
    written = modification_times(home / "data" / "probes" / "small")
    workflow.probe(activations, n_jobs=2, **settings)
    again = modification_times(home / "data" / "probes" / "small")
    of_views = {file for file in written if file.parent.name != "small"}
    assert of_views
    assert {file: again[file] for file in of_views} == {file: written[file] for file in of_views}


def modification_times(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
