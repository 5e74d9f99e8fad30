"""The tables that probing leaves, on disk and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save_file

from probekit import paths

COLUMNS = ["model", "stage", "layer", "pooling", "task", "probe", "control", "split", "metric", "class", "value", "lo",
           "hi", "n", "seed"]
HEADLINE = {"binary": "accuracy", "multilabel": "f1_macro"}  # the metric that a kind of task is judged by


@dataclass(frozen=True)
class Results:
    """What probing gives, for one store or for a whole run.

    Attributes
    ----------
    metrics : one row a model, layer, pooling, task, probe, control, split, metric, class and seed
    losses : of "linear", by epoch
    predictions : ``"<model>|<control>|<pooling>|<task>|<probe>"`` to (l, n, c) float16, the first seed's
        probabilities for the task's test examples
    """

    metrics: pd.DataFrame
    losses: pd.DataFrame
    predictions: dict[str, np.ndarray]

    @classmethod
    def join(cls, parts: Sequence[Results]) -> Results:
        return cls(pd.concat([p.metrics for p in parts], ignore_index=True)[COLUMNS],
                   pd.concat([p.losses for p in parts], ignore_index=True),
                   {key: values for p in parts for key, values in p.predictions.items()})

    def write(self, folder: Path) -> None:
        paths.write_atomic(folder / "metrics.parquet", self.metrics.to_parquet)
        paths.write_atomic(folder / "losses.parquet", self.losses.to_parquet)
        paths.write_atomic(folder / "predictions.safetensors", lambda part: save_file(self.predictions, part))

    @classmethod
    def read(cls, folder: Path) -> Results:
        if not (folder / "metrics.parquet").exists():
            raise FileNotFoundError(f"{folder} holds no probe results: run 03_probe for this run first")
        with safe_open(folder / "predictions.safetensors", framework="numpy") as file:
            predictions = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        return cls(*(pd.read_parquet(folder / f"{kind}.parquet") for kind in ("metrics", "losses")), predictions)


def summary(table: pd.DataFrame, tasks: dict[str, dict], probe: str = "logreg") -> pd.DataFrame:
    """The best layer of each task, model and pooling on the test split, with its interval.

    Parameters
    ----------
    table : the metrics table
    tasks : kind and classes by task, as in the examples' ``attrs["tasks"]``
    """
    metric = {name: HEADLINE[about["kind"]] for name, about in tasks.items()}
    rows = select(table, probe)
    rows = rows[rows.metric == rows.task.map(metric)]
    best = rows.groupby(["task", "model", "control", "pooling"], sort=False).value.idxmax()
    return rows.loc[best].rename(columns={"layer": "best layer"}).reset_index(drop=True)


def select(table: pd.DataFrame, probe: str = "logreg", metric: str | None = None) -> pd.DataFrame:
    """Test scores about all classes, averaged over the seeds, in the order of the layers."""
    rows = table[(table.probe == probe) & (table.split == "test") & (table["class"] == "")]
    rows = rows[rows.metric == metric] if metric else rows
    keys = ["task", "model", "control", "pooling", "metric", "layer"]
    return rows.groupby(keys, sort=False)[["value", "lo", "hi", "n"]].mean().reset_index()


def describe(best: pd.DataFrame) -> list[str]:
    """The summary as sentences."""
    return [
        f"{r.task}: {r.model}{' (untrained)' if r.control == 'untrained' else ''} is best at {r['best layer']} with "
        f"{r.metric} {r.value:.3f} [{r.lo:.3f}, {r.hi:.3f}] ({r.pooling} pooling)." for _, r in best.iterrows()
    ]
