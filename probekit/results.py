"""The tables that probing leaves, on disk and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save_file

from probekit import compare, paths
from probekit.labels import HEADLINE

COLUMNS = ["model", "stage", "layer", "pooling", "task", "probe", "control", "split", "metric", "class", "value", "lo",
           "hi", "n", "seed", *compare.COLUMNS]


@dataclass(frozen=True)
class Results:
    """What probing gives, for one store or for a whole run.

    Attributes
    ----------
    metrics : one row a model, layer, pooling, task, probe, control, split, metric, class and seed
    losses : of "linear" and "mlp", by epoch
    predictions : ``"<model>|<control>|<pooling>|<task>|<probe>"`` to (l, n, c) float16, the first seed's
        probabilities for the task's test examples
    """

    metrics: pd.DataFrame
    losses: pd.DataFrame
    predictions: dict[str, np.ndarray]

    @classmethod
    def join(cls, parts: Sequence[Results]) -> Results:
        """Put the results of several probings together.

        Raises
        ------
        ValueError
            Two of them have the same name, so that their rows could not be told apart.
        """
        keys = [key for p in parts for key in p.predictions]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice:
            raise ValueError(f"{twice.partition('|')[0]} is there twice: models of one run need different names")
        return cls(pd.concat([p.metrics for p in parts], ignore_index=True)[COLUMNS].astype({"plateau": "boolean"}),
                   pd.concat([p.losses for p in parts], ignore_index=True),
                   {key: values for p in parts for key, values in p.predictions.items()})

    def write(self, folder: Path, examples_key: str) -> None:
        """Write the tables to `folder`, with the key of the examples table that they belong to."""
        (folder / "results.json").unlink(missing_ok=True)  # it vouches for the rest, so it comes last
        paths.write_atomic(folder / "metrics.parquet", self.metrics.to_parquet)
        paths.write_atomic(folder / "losses.parquet", self.losses.to_parquet)
        # safetensors writes the memory as it lies: an array in another order would come back scrambled
        predictions = {key: np.ascontiguousarray(values) for key, values in self.predictions.items()}
        paths.write_atomic(folder / "predictions.safetensors", lambda part: save_file(predictions, part))
        paths.write_json(folder / "results.json", {"examples": examples_key})

    @classmethod
    def read(cls, folder: Path, examples_key: str) -> Results:
        """Read what :meth:`write` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            Nothing there, or the results of another examples table.
        """
        if not (folder / "results.json").exists():
            raise FileNotFoundError(f"{folder} holds no probe results: run 03_probe for this run first")
        if paths.read_json(folder / "results.json")["examples"] != examples_key:
            raise ValueError(f"{folder} was made from another examples table: run 02_extract and 03_probe again")
        with safe_open(folder / "predictions.safetensors", framework="numpy") as file:
            predictions = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        return cls(*(pd.read_parquet(folder / f"{kind}.parquet") for kind in ("metrics", "losses")), predictions)


def select(table: pd.DataFrame, probe: str, metric: str, split: str = "test", stage: str | None = None
           ) -> pd.DataFrame:
    """One metric about all classes of one stage's layers, in their order, averaged over the seeds.

    The stage is the decoder ("lm") unless another one is named, or the table has no decoder.

    How the layers compare (:func:`probekit.compare.layers`) is the first seed's; `spread` is the largest seed's score
    minus the smallest's.

    Raises
    ------
    ValueError
        The table has no scores of this probe.
    """
    stage = stage or ("lm" if (table.stage == "lm").any() or not len(table) else table.stage.iloc[0])
    rows = table[(table.probe == probe) & (table.split == split) & (table["class"] == "") & (table.metric == metric)
                 & (table.stage == stage)]
    if not len(rows):
        raise ValueError(f"no {metric} of {probe} probes in this run; it has {', '.join(table.probe.unique())}")
    keys = ["task", "model", "control", "pooling", "metric", "layer"]
    seeds = rows.groupby(keys, sort=False)
    spread = (seeds.value.max() - seeds.value.min()).rename("spread")
    return pd.concat([seeds[["value", "lo", "hi", "n"]].mean(), spread, seeds[compare.COLUMNS].first()], axis=1
                     ).reset_index()


def best_layers(table: pd.DataFrame, tasks: dict[str, dict], probe: str = "logreg") -> pd.DataFrame:
    """For each task, model and pooling the layer that is best on validation, with its test score and interval.

    A layer chosen by its test score would flatter itself: the largest of many noisy scores lies above the truth.

    Parameters
    ----------
    table : the metrics table
    tasks : kind and classes by task, as in the examples' ``attrs["tasks"]``
    """
    keys, found = ["task", "model", "control", "pooling", "layer"], []
    for name, about in tasks.items():
        validation, test = (select(table[table.task == name], probe, HEADLINE[about["kind"]], split)
                            for split in ("validation", "test"))
        chosen = validation.loc[validation.groupby(keys[:-1], sort=False).value.idxmax(), keys]
        found.append(chosen.merge(test, on=keys, how="left"))
    return pd.concat(found, ignore_index=True).rename(columns={"layer": "best layer"})
