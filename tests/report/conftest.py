"""Tables with known values, and a saved run, that the tests of the report share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from probekit.cli.notebooks import declared_parameters, list_notebooks
from probekit.probes.results import COLUMNS, ProbeResults
from probekit.report.saved_run import SavedRun
from probekit.tasks.base import TaskInfo
from tests.conftest import small_parameters
from tests.support import lab

TASKS = {
    "caption": TaskInfo("binary", ("match",), "Right?"),
    "category": TaskInfo("multilabel", ("cup", "car"), "Which?"),
}
AVERAGES = {"binary": "positive", "multilabel": "macro"}
CURVES = [("small", "none", 4), ("large", "none", 7), ("small", "untrained", 4)]


def _curve_rows(task: str, model: str, control: str, layers: int) -> list[dict]:
    average = AVERAGES[TASKS[task].kind]
    metrics = ["accuracy", "f1_macro", "f1_micro"]
    metrics += [f"{name}_{average}" for name in ("precision", "recall", "f1")]
    rows = []
    for k in range(layers):
        value = 0.5
        if control == "none":
            value += 0.1 * min(k, 3)
        for metric in dict.fromkeys(metrics):
            for probe in ("logreg", "linear"):
                for split in ("validation", "test"):
                    row = {
                        "model": model,
                        "stage": "lm",
                        "layer": f"lm.{k:02d}",
                        "pooling": "mean",
                        "task": task,
                        "control": control,
                        "probe": probe,
                        "split": split,
                        "metric": metric,
                        "class": "",
                        "value": value,
                        "lo": value - 0.05,
                        "hi": value + 0.05,
                        "n": 80,
                        "seed": 0,
                    }
                    rows.append(row)
    return rows


@pytest.fixture(scope="session")
def tasks() -> dict[str, TaskInfo]:
    """A global and a local task."""
    return TASKS


@pytest.fixture(scope="session")
def table() -> pd.DataFrame:
    """A metrics table: trained models score 0.5, 0.6, 0.7, 0.8, 0.8, ... and untrained ones 0.5."""
    rows = []
    for task in TASKS:
        for model, control, layers in CURVES:
            rows += _curve_rows(task, model, control, layers)
    metrics = pd.DataFrame(rows).reindex(columns=COLUMNS)
    metrics["plateau"] = metrics.value > 0.75
    return metrics


@pytest.fixture(scope="session")
def losses() -> pd.DataFrame:
    """Losses of the probe "linear": layer plus 1 / epoch."""
    rows = []
    for task in TASKS:
        for model, control, layers in CURVES:
            for k in range(layers):
                for epoch in (1, 2, 3):
                    for split in ("train", "validation"):
                        row = {
                            "model": model,
                            "layer": f"lm.{k:02d}",
                            "pooling": "mean",
                            "task": task,
                            "control": control,
                            "seed": 0,
                            "probe": "linear",
                            "epoch": epoch,
                            "split": split,
                            "loss": k + 1 / epoch,
                        }
                        rows.append(row)
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def probe_results(table, losses, tasks) -> ProbeResults:
    """The tables as the results of a run."""
    return ProbeResults(metrics=table, losses=losses, tasks=tasks)


@pytest.fixture(scope="session")
def saved_run(small_home) -> SavedRun:
    """The run "small", opened once for tests that only read it; its home is named, not found."""
    return SavedRun.open("small", small_home)


@pytest.fixture(scope="session")
def jupyter(demo: Path) -> Iterator[str]:
    """The address of a JupyterLab with the notebooks of the run "small"."""
    parameters = small_parameters() | {"run": "small"}
    declared = {file.stem: declared_parameters(file) for file in list_notebooks()}
    of_notebooks = {
        notebook: {name: value for name, value in parameters.items() if name in names}
        for notebook, names in declared.items()
    }
    lab.prepare_notebooks(demo / "lab", of_notebooks)
    with lab.serve_notebooks(demo / "lab", demo) as url:
        yield url
