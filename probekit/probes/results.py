"""The tables and arrays that probing leaves, and how they are stored."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from probekit import paths
from probekit.probes import comparison
from probekit.probes.weights import LinearProbe, ProbeWeights
from probekit.tasks.base import TaskInfo

# The metric that each kind of task is judged by.
HEADLINE = {"binary": "accuracy", "multilabel": "f1_macro", "one_of": "f1_macro"}

# Called like a probe in tables and keys: what a layer would say through the model's own head.
LENS = "lens"

TABLES = ("metrics", "losses", "transfer", "similarity", "ranks")

# The columns of `metrics` that always exist, in their order; further columns follow them.
COLUMNS = [
    "model",
    "stage",
    "layer",
    "pooling",
    "task",
    "probe",
    "control",
    "split",
    "metric",
    "class",
    "value",
    "lo",
    "hi",
    "n",
    "seed",
    *comparison.COLUMNS,
    "strength_min",
    "strength_max",
    "strength_solved",
    "settings",
]


class StateKey(NamedTuple):
    """One pooling of one model's states, for the examples of one task.

    Attributes
    ----------
    model : str
        Name of the model.
    control : str
        ``"none"``, ``"untrained"``, or a control of the inputs.
    pooling : str
        How the tokens of a layer became one vector.
    task : str
        Name of the task.
    """

    model: str
    control: str
    pooling: str
    task: str


class ProbeKey(NamedTuple):
    """One kind of probe on the states that a :class:`StateKey` names.

    Attributes
    ----------
    model, control, pooling, task : str
        See :class:`StateKey`.
    probe : str
        ``"logreg"``, ``"mean_difference"``, ``"linear"`` or ``"mlp"``; ``"lens"`` and
        ``"tuned_lens"`` for what layers would answer.
    """

    model: str
    control: str
    pooling: str
    task: str
    probe: str

    @property
    def state(self) -> StateKey:
        """The states that these probes read."""
        return StateKey(self.model, self.control, self.pooling, self.task)


@dataclass(frozen=True)
class ProbeResults:
    """What probing gives, for the activations of one model or for a whole run.

    Attributes
    ----------
    metrics : DataFrame
        One row per model, layer, pooling, task, probe, control, split, metric, class and seed.
        Columns are :data:`COLUMNS` and whatever a later step adds. `lo` and `hi` bound the 95 %
        interval of `value`; rows of the metric ``"strength"`` have the ends of the grid that the
        strength was chosen from in `strength_min` and `strength_max`, and the largest one that was
        solved for that choice in `strength_solved`. Like all tables it has the column `settings`:
        the fingerprint of what the row was made with, which `stores` spells out.
    losses : DataFrame
        Training and validation loss of the probes ``"linear"`` and ``"mlp"`` by epoch.
    transfer : DataFrame
        The score of each layer's ``"logreg"`` probe (`probe_layer`) on the states of each decoder
        layer (`layer`), see :func:`probekit.probes.transfer.transfer_scores`; and of the probe
        that was trained on one wording of a question (`probe_task`) on the states of another one
        (`task`), see :class:`probekit.probes.wordings.WordingScores`.
    similarity, ranks : DataFrame
        How the decoder's layers resemble each other, within and between trained models, and how
        many directions each uses, see :func:`probekit.probes.similarity.compare_models`.
    predictions : dict of ProbeKey to ndarray
        (l, n, c) float16: probabilities of the first seed for the task's n test examples at the l
        decoder layers.
    neighbours : dict of StateKey to ndarray
        (l, n, 5) int32: the nearest test examples of each test example.
    weights : dict of ProbeKey to ProbeWeights
        The ``"logreg"`` and ``"mean_difference"`` probes of the decoder layers.
    heat : dict of ProbeKey to str
        The file with the stored heat maps of test images, relative to the home where it lies there:
        of ``"logreg"`` probes and of the ``"lens"``.
    tasks : dict of str to TaskInfo
        Kind, classes and question of each task.
    stores : tuple of dict
        For the activations of each model and control: their `record` and `meta`, the `settings` of
        the probes, the `versions` of the libraries that trained them, and the `fingerprint` of all
        this.
    """

    metrics: pd.DataFrame
    losses: pd.DataFrame
    transfer: pd.DataFrame = field(default_factory=pd.DataFrame)
    similarity: pd.DataFrame = field(default_factory=pd.DataFrame)
    ranks: pd.DataFrame = field(default_factory=pd.DataFrame)
    predictions: dict[ProbeKey, np.ndarray] = field(default_factory=dict)
    neighbours: dict[StateKey, np.ndarray] = field(default_factory=dict)
    weights: dict[ProbeKey, ProbeWeights] = field(default_factory=dict)
    heat: dict[ProbeKey, str] = field(default_factory=dict)
    tasks: dict[str, TaskInfo] = field(default_factory=dict)
    stores: tuple[dict[str, Any], ...] = ()

    def probe_weights(
        self, *, model: str, pooling: str, task: str, control: str = "none", probe: str = "logreg"
    ) -> ProbeWeights:
        """Return the linear probes of all decoder layers of a model.

        Parameters
        ----------
        model, pooling, task : str
            As in the metrics table.
        control : str
            ``"none"`` for the trained model, ``"untrained"`` for its untrained twin.
        probe : {"logreg", "mean_difference"}

        Raises
        ------
        KeyError
            This run has no such probes.
        """
        key = ProbeKey(model, control, pooling, task, probe)
        if key not in self.weights:
            raise KeyError(
                f"no {probe} probes of {', '.join(key.state)}: run 03_probe with probes that "
                f"include {probe}"
            )
        return self.weights[key]

    def probe(
        self,
        model: str,
        layer: str,
        task: str,
        *,
        pooling: str = "mean",
        control: str = "none",
        probe: str = "logreg",
    ) -> LinearProbe:
        """Return one probe as an object that can be saved, and used in other tools.

        Parameters
        ----------
        model, layer, task, pooling, control, probe : str
            As in the metrics table; a layer of the decoder.

        Raises
        ------
        KeyError
            This run has no such probe, or layer.
        """
        weights = self.probe_weights(
            model=model, pooling=pooling, task=task, control=control, probe=probe
        )
        layers = [f"lm.{k:02d}" for k in range(len(weights.weight_ldc))]
        if layer not in layers:
            raise KeyError(f"no probe of layer {layer}: take one of {', '.join(layers)}")
        place = layers.index(layer)
        return LinearProbe(
            direction=weights.weight_ldc[place],
            bias=weights.intercept_lc[place],
            mean=weights.mean_ld[place],
            scale=weights.scale_ld[place],
            classes=self.tasks[task].classes,
            name=", ".join((model, control, pooling, task, probe, layer)),
        )

    def with_settings(self, fingerprint: str) -> ProbeResults:
        """Return the same results with `fingerprint` in the column `settings` of every table."""
        stamped = {name: getattr(self, name).assign(settings=fingerprint) for name in TABLES}
        return replace(self, **stamped)

    @classmethod
    def join(cls, parts: Sequence[ProbeResults]) -> ProbeResults:
        """Put the results of several models, poolings or tasks together.

        Raises
        ------
        ValueError
            Two parts have results of the same name, so that their rows would be mixed up.
        """
        counts = Counter(key for part in parts for key in part.predictions)
        for key, count in counts.items():
            if count > 1:
                raise ValueError(
                    f"two sets of results have the name {key.model}: give the models of one run "
                    "different names"
                )
        metrics = _concatenate([part.metrics for part in parts])
        joined = cls(
            metrics=order_columns(metrics),
            losses=_concatenate([part.losses for part in parts]),
            transfer=_concatenate([part.transfer for part in parts]),
            similarity=_concatenate([part.similarity for part in parts]),
            ranks=_concatenate([part.ranks for part in parts]),
            stores=tuple(store for part in parts for store in part.stores),
        )
        for part in parts:
            joined.predictions.update(part.predictions)
            joined.neighbours.update(part.neighbours)
            joined.weights.update(part.weights)
            joined.heat.update(part.heat)
            joined.tasks.update(part.tasks)
        return joined

    def write(self, folder: Path, examples_fingerprint: str) -> None:
        """Write tables and arrays to `folder`.

        Parameters
        ----------
        folder : Path
            Made where it does not exist.
        examples_fingerprint : str
            :func:`probekit.tasks.building.table_fingerprint` of the examples that were probed.

        Notes
        -----
        Tables are Parquet files. The arrays of a safetensors file are numbered, and
        ``results.json`` lists under the file's name what each number is, by the fields of its key.
        ``results.json`` is removed first and written last: where it exists, the rest is complete.
        """
        (folder / "results.json").unlink(missing_ok=True)
        for name in TABLES:
            paths.write_atomic(folder / f"{name}.parquet", getattr(self, name).to_parquet)

        _write_arrays(folder / "predictions.safetensors", [*self.predictions.values()])
        _write_arrays(folder / "neighbours.safetensors", [*self.neighbours.values()])
        weight_fields = []
        weight_arrays = []
        for key, weights in self.weights.items():
            for part in dataclasses.fields(weights):
                weight_fields.append({**key._asdict(), "field": part.name})
                weight_arrays.append(getattr(weights, part.name))
        _write_arrays(folder / "weights.safetensors", weight_arrays)

        content = {
            "examples": examples_fingerprint,
            "tasks": {name: asdict(info) for name, info in self.tasks.items()},
            "predictions": [key._asdict() for key in self.predictions],
            "neighbours": [key._asdict() for key in self.neighbours],
            "weights": weight_fields,
            "heat": [{**key._asdict(), "file": file} for key, file in self.heat.items()],
            "stores": self.stores,
        }
        paths.write_json(folder / "results.json", content)

    @classmethod
    def read(cls, folder: Path, examples_fingerprint: str) -> ProbeResults:
        """Read what :meth:`write` wrote.

        Raises
        ------
        FileNotFoundError
            The folder holds no results, or a part of them is missing.
        ValueError
            The results are of another examples table.
        """
        if not (folder / "results.json").exists():
            raise FileNotFoundError(
                f"{folder} holds no probe results: run 03_probe for this run first"
            )
        content = paths.read_json(folder / "results.json")
        if content["examples"] != examples_fingerprint:
            raise ValueError(
                f"{folder} was made from another examples table: run 02_extract and 03_probe again"
            )
        try:
            return cls._read_parts(folder, content)
        except (FileNotFoundError, KeyError) as error:
            raise FileNotFoundError(
                f"{folder} lacks a part of the results ({error}): run 03_probe again"
            ) from None

    @classmethod
    def _read_parts(cls, folder: Path, content: dict[str, Any]) -> ProbeResults:
        prediction_arrays = load_file(folder / "predictions.safetensors")
        neighbour_arrays = load_file(folder / "neighbours.safetensors")
        weight_arrays = load_file(folder / "weights.safetensors")
        weight_fields: dict[ProbeKey, dict[str, np.ndarray]] = {}
        for number, entry in enumerate(content["weights"]):
            key = ProbeKey(*(entry[name] for name in ProbeKey._fields))
            parts = weight_fields.setdefault(key, {})
            parts[entry["field"]] = weight_arrays[str(number)]
        tasks = {}
        for name, info in content["tasks"].items():
            tasks[name] = TaskInfo(
                info["kind"],
                tuple(info["classes"]),
                info["question"],
                answers=tuple(tuple(words) for words in info["answers"]),
                variant_of=info["variant_of"],
            )
        return cls(
            **{name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES},
            predictions={
                ProbeKey(**entry): prediction_arrays[str(number)]
                for number, entry in enumerate(content["predictions"])
            },
            neighbours={
                StateKey(**entry): neighbour_arrays[str(number)]
                for number, entry in enumerate(content["neighbours"])
            },
            weights={key: ProbeWeights(**parts) for key, parts in weight_fields.items()},
            heat={
                ProbeKey(*(entry[name] for name in ProbeKey._fields)): entry["file"]
                for entry in content["heat"]
            },
            tasks=tasks,
            stores=tuple(content["stores"]),
        )


def compact_predictions(p_lnc: np.ndarray) -> np.ndarray:
    """Return probabilities as float16, each on the side of one half where it was."""
    half_lnc = p_lnc.astype(np.float16)
    below_half = np.nextafter(np.float16(0.5), np.float16(0))
    return np.where((p_lnc < 0.5) & (half_lnc >= 0.5), below_half, half_lnc)


def order_columns(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return a metrics table with :data:`COLUMNS` first and in order, then any further columns."""
    further = [name for name in metrics.columns if name not in COLUMNS]
    return metrics.reindex(columns=[*COLUMNS, *further]).astype({"plateau": "boolean"})


def _concatenate(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    # An empty table would change the types of the columns that it lacks.
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def _write_arrays(file: Path, arrays: Sequence[np.ndarray]) -> None:
    # safetensors writes the memory as it lies: an array in another order would be scrambled.
    numbered = {str(number): np.ascontiguousarray(array) for number, array in enumerate(arrays)}
    paths.write_atomic(file, lambda part: save_file(numbered, part))


def default_stage(table: pd.DataFrame) -> str:
    """Return the stage that curves show: ``"lm"``, or the first one of a table without it."""
    if len(table) == 0 or (table.stage == "lm").any():
        return "lm"
    return table.stage.iloc[0]


def select_curve(
    table: pd.DataFrame,
    *,
    probe: str,
    metric: str,
    split: str = "test",
    stage: str | None = None,
) -> pd.DataFrame:
    """Select one metric, over all classes, of the layers of one stage in their order.

    Parameters
    ----------
    table : DataFrame
        Rows of the metrics table.
    probe : str
        The kind of probe.
    metric : str
        The metric.
    split : str
        The split it was measured on.
    stage : str, optional
        The stage; :func:`default_stage` unless it is named.

    Returns
    -------
    DataFrame
        One row per task, model, control, pooling and layer: `value`, `lo`, `hi` and `n` are means
        over the seeds, `spread` is the largest seed's value minus the smallest, and the columns of
        :func:`probekit.probes.comparison.compare_layers` are those of the first seed.

    Raises
    ------
    ValueError
        The table has no such rows.
    """
    if stage is None:
        stage = default_stage(table)
    rows = table[
        (table.probe == probe)
        & (table.split == split)
        & (table["class"] == "")
        & (table.metric == metric)
        & (table.stage == stage)
    ]
    if len(rows) == 0:
        probes = ", ".join(table.probe.unique())
        raise ValueError(
            f"no {metric} of {probe} probes in this run; it has {probes}: set probe to one of them"
        )
    keys = ["task", "model", "control", "pooling", "metric", "layer"]
    seeds = rows.groupby(keys, sort=False)
    means = seeds[["value", "lo", "hi", "n"]].mean()
    spread = (seeds.value.max() - seeds.value.min()).rename("spread")
    compared = seeds[comparison.COLUMNS].first()
    return pd.concat([means, spread, compared], axis=1).reset_index()


def find_curve(
    table: pd.DataFrame,
    *,
    probe: str,
    metric: str,
    control: str | None = "none",
    stage: str | None = None,
) -> pd.DataFrame:
    """Return :func:`select_curve` of the test split and one control, empty where there is none.

    All controls for the control None.
    """
    rows = table if control is None else table[table.control == control]
    has_curve = (rows.probe == probe) & (rows.metric == metric) & (rows.split == "test")
    if stage is not None:
        has_curve &= rows.stage == stage
    if not has_curve.any():
        return pd.DataFrame(columns=["control", "layer", "value", "lo", "hi"])
    return select_curve(rows, probe=probe, metric=metric, stage=stage)


def best_layers(
    table: pd.DataFrame, tasks: dict[str, TaskInfo], *, probe: str = "logreg"
) -> pd.DataFrame:
    """Choose the best layer of each task, model and pooling on validation; return its test scores.

    Parameters
    ----------
    table : DataFrame
        The metrics table.
    tasks : dict of str to TaskInfo
        The tasks to report, such as :attr:`ProbeResults.tasks`.
    probe : str
        The kind of probe.

    Returns
    -------
    DataFrame
        The rows of :func:`select_curve` for the test split, with `best layer` instead of `layer`.

    Notes
    -----
    A layer chosen by its test score would flatter itself: the largest of many noisy scores lies
    above the truth.
    """
    keys = ["task", "model", "control", "pooling"]
    best_by_task = []
    for name, info in tasks.items():
        of_task = table[table.task == name]
        metric = HEADLINE[info.kind]
        validation = select_curve(of_task, probe=probe, metric=metric, split="validation")
        test = select_curve(of_task, probe=probe, metric=metric, split="test")
        best = validation.groupby(keys, sort=False).value.idxmax()
        best_keys = validation.loc[best, [*keys, "layer"]]
        best_by_task.append(best_keys.merge(test, on=[*keys, "layer"], how="left"))
    return pd.concat(best_by_task, ignore_index=True).rename(columns={"layer": "best layer"})
