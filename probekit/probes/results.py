"""The tables that probing leaves, on disk and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from probekit import paths
from probekit.probes import comparison
from probekit.probes.labels import HEADLINE
from probekit.probes.weights import ProbeWeights
from probekit.tasks.base import TaskInfo

COLUMNS = ["model", "stage", "layer", "pooling", "task", "probe", "control", "split", "metric", "class", "value", "lo",
           "hi", "n", "seed", *comparison.COLUMNS, "settings"]


TABLES, ARRAYS = ("metrics", "losses", "transfer"), ("predictions", "neighbours", "linear")


@dataclass(frozen=True)
class ProbeResults:
    """What probing gives, for one store or for a whole run.

    Attributes
    ----------
    metrics : one row a model, layer, pooling, task, probe, control, split, metric, class and seed; like all tables
        with `settings`, the fingerprint of what it was made with, which `stores` spells out
    losses : of "linear" and "mlp", by epoch
    transfer : the score of each layer's probe (`probe_layer`) on the states of each layer, see
        :func:`probekit.probes.transfer.relate`; of decoder layers and "logreg"
    predictions : ``"<model>|<control>|<pooling>|<task>|<probe>"`` to (l, n, c) float16, the first seed's
        probabilities for the task's test examples
    neighbours : ``"<model>|<control>|<pooling>|<task>"`` to (l, n, 5), the nearest test examples of each
    linear : ``"<model>|<control>|<pooling>|<task>|<part>"`` to a part of :class:`probekit.probes.weights.Linear`
    stores : for each store that was probed its `record`, its `meta`, the `settings` of the probes, the `versions` of
        the libraries that trained them, and the `fingerprint` of all this
    heat : ``"<model>|<control>|<pooling>|<task>"`` to the file with the heat of the test images that are kept
    """

    metrics: pd.DataFrame
    losses: pd.DataFrame
    transfer: pd.DataFrame = field(default_factory=pd.DataFrame)
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    neighbours: dict[str, np.ndarray] = field(default_factory=dict)
    linear: dict[str, np.ndarray] = field(default_factory=dict)
    stores: tuple[dict, ...] = ()
    heat: dict[str, str] = field(default_factory=dict)

    def probes(self, key: str) -> ProbeWeights:
        """The logistic regressions of ``"<model>|<control>|<pooling>|<task>"``.

        Raises
        ------
        KeyError
            There are none.
        """
        try:
            return ProbeWeights(**{name.name: self.linear[f"{key}|{name.name}"] for name in fields(ProbeWeights)})
        except KeyError:
            raise KeyError(f"no logreg probes of {key}: run 03_probe with probes that include logreg") from None

    def stamped(self, settings: str) -> ProbeResults:
        """The same with `settings` in every row."""
        return replace(self, **{name: getattr(self, name).assign(settings=settings) for name in TABLES})

    @classmethod
    def join(cls, parts: Sequence[ProbeResults]) -> ProbeResults:
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
        tables = {name: _joined([getattr(p, name) for p in parts]) for name in TABLES}
        tables["metrics"] = tables["metrics"][COLUMNS].astype({"plateau": "boolean"})
        return cls(**tables, stores=tuple(store for p in parts for store in p.stores),
                   **{name: {key: values for p in parts for key, values in getattr(p, name).items()}
                      for name in (*ARRAYS, "heat")})

    def write(self, folder: Path, examples_key: str) -> None:
        """Write the tables to `folder`, with the key of the examples table that they belong to."""
        (folder / "results.json").unlink(missing_ok=True)  # it vouches for the rest, so it comes last
        for name in TABLES:
            table = getattr(self, name)
            paths.write_atomic(folder / f"{name}.parquet", table.to_parquet)
        for name in ARRAYS:  # safetensors writes the memory as it lies: an array in another order would be scrambled
            arrays = {key: np.ascontiguousarray(values) for key, values in getattr(self, name).items()}
            paths.write_atomic(folder / f"{name}.safetensors", lambda part, arrays=arrays: save_file(arrays, part))
        order = {name: list(getattr(self, name)) for name in ARRAYS}  # which the files do not keep
        paths.write_json(folder / "results.json", {"examples": examples_key, "order": order, "stores": self.stores,
                                                   "heat": self.heat})

    @classmethod
    def read(cls, folder: Path, examples_key: str) -> ProbeResults:
        """Read what :meth:`write` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            Nothing there, or the results of another examples table or of an older version.
        """
        if not (folder / "results.json").exists():
            raise FileNotFoundError(f"{folder} holds no probe results: run 03_probe for this run first")
        record = paths.read_json(folder / "results.json")
        if record["examples"] != examples_key:
            raise ValueError(f"{folder} was made from another examples table: run 02_extract and 03_probe again")
        try:
            arrays = {name: load_file(folder / f"{name}.safetensors") for name in ARRAYS}
            return cls(**{name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES},
                       **{name: {key: arrays[name][key] for key in record["order"][name]} for name in ARRAYS},
                       stores=tuple(record["stores"]), heat=record["heat"])
        except (FileNotFoundError, KeyError) as error:
            raise FileNotFoundError(f"{folder} lacks a part of the results ({error}): run 03_probe again") from None


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One below the other; empty ones would change the types of columns that they lack."""
    return pd.concat([table for table in tables if len(table)] or [pd.DataFrame()], ignore_index=True)


def stage_of(table: pd.DataFrame) -> str:
    """The decoder ("lm"), or what comes first in a table without one."""
    return "lm" if (table.stage == "lm").any() or not len(table) else table.stage.iloc[0]


def select_curve(table: pd.DataFrame, probe: str, metric: str, split: str = "test", stage: str | None = None
           ) -> pd.DataFrame:
    """One metric about all classes of one stage's layers, in their order, averaged over the seeds.

    The stage is the decoder ("lm") unless another one is named, or the table has no decoder.

    How the layers compare (:func:`probekit.probes.comparison.compare_layers`) is the first seed's; `spread` is the largest seed's score
    minus the smallest's.

    Raises
    ------
    ValueError
        The table has no scores of this probe.
    """
    stage = stage or stage_of(table)
    rows = table[(table.probe == probe) & (table.split == split) & (table["class"] == "") & (table.metric == metric)
                 & (table.stage == stage)]
    if not len(rows):
        known = ", ".join(table.probe.unique())
        raise ValueError(f"no {metric} of {probe} probes in this run; it has {known}: set probe to one of them")
    keys = ["task", "model", "control", "pooling", "metric", "layer"]
    seeds = rows.groupby(keys, sort=False)
    spread = (seeds.value.max() - seeds.value.min()).rename("spread")
    return pd.concat([seeds[["value", "lo", "hi", "n"]].mean(), spread, seeds[comparison.COLUMNS].first()], axis=1
                     ).reset_index()


def best_layers(table: pd.DataFrame, tasks: dict[str, TaskInfo], probe: str = "logreg") -> pd.DataFrame:
    """For each task, model and pooling the layer that is best on validation, with its test score and interval.

    A layer chosen by its test score would flatter itself: the largest of many noisy scores lies above the truth.

    Parameters
    ----------
    table : the metrics table
    tasks : kind and classes by task, see :func:`probekit.tasks.base.task_infos`
    """
    keys, found = ["task", "model", "control", "pooling", "layer"], []
    for name, about in tasks.items():
        validation, test = (select_curve(table[table.task == name], probe, HEADLINE[about.kind], split)
                            for split in ("validation", "test"))
        chosen = validation.loc[validation.groupby(keys[:-1], sort=False).value.idxmax(), keys]
        found.append(chosen.merge(test, on=keys, how="left"))
    return pd.concat(found, ignore_index=True).rename(columns={"layer": "best layer"})
