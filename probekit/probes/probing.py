"""From activations to tables: one probe per layer, with its scores, intervals and controls."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from probekit import paths
from probekit.extraction.store import Activations
from probekit.probes import adam, codelength, comparison, controls, fitting, metrics, transfer
from probekit.probes.fitting import FittedProbes
from probekit.probes.labels import LabelledTask, LabelSet
from probekit.probes.results import ProbeKey, ProbeResults, StateKey
from probekit.probes.weights import ProbeWeights
from probekit.tasks.base import task_infos
from probekit.tasks.building import table_fingerprint

PROBES = ("logreg", "linear", "mlp")
LIBRARIES = ("numpy", "scipy", "pandas", "scikit-learn", "torch")

# Controls whose test predictions are kept, and whose layers are compared.
PREDICTED = ("none", "untrained")

# Of what the tables hold: tables of another version are made again.
VERSION = 8


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Settings of the probes.

    Attributes
    ----------
    probes : tuple of str
        Kinds of probes: ``"logreg"`` (logistic regression on standardised features, solved to
        convergence, its strength chosen on validation), ``"linear"`` (dropout and one linear layer,
        trained with Adam: the published study's) and ``"mlp"`` (the same training with one hidden
        layer).
    seeds : tuple of int
        Seeds of the starting points, dropout and batch order of ``"linear"`` and ``"mlp"``, and of
        the labels of controls. A ``"logreg"`` of the true labels has no seed and is fitted once.
    strengths : tuple of float
        Values of C that ``"logreg"`` chooses from: for each layer the one with the lowest log loss
        on validation.
    training : probekit.probes.adam.AdamSettings
        Settings of ``"linear"`` and ``"mlp"``.
    controls : tuple of str
        Names out of :data:`probekit.probes.controls.LABEL_CONTROLS`: the same probes on the same
        states with other labels.
    codelength : bool
        Whether to measure the online codelength of the labels (with ``"logreg"``).
    resamples : int
        Number of bootstrap samples for the intervals.
    memory_gb : float
        Bound on what is held at a time, in 10^9 bytes; layers are probed in groups that fit.
    """

    probes: tuple[str, ...] = ("logreg", "linear")
    seeds: tuple[int, ...] = (0,)
    strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    training: adam.AdamSettings = adam.AdamSettings()
    controls: tuple[str, ...] = ()
    codelength: bool = True
    resamples: int = 2000
    memory_gb: float = 4.0

    def check(self) -> None:
        """Check that every name is one of those that can be chosen, and that none is repeated.

        Raises
        ------
        ValueError
            The message names what can be chosen.
        """
        unknown = [name for name in self.probes if name not in PROBES]
        if unknown or not self.probes:
            raise ValueError(
                f"unknown probes {unknown or self.probes}: take names out of {', '.join(PROBES)}"
            )
        controls.check_controls(self.controls, controls.LABEL_CONTROLS)
        for name in ("probes", "seeds", "strengths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)}: name each once, and at least one")


class LabelKey(NamedTuple):
    """Which labels, and with which seed, a probe was trained on.

    Attributes
    ----------
    control : str
        ``"none"`` for the true labels, or a control of the labels.
    seed : int
        Of the control's labels, and of the probe.
    """

    control: str
    seed: int


LabelSets = dict[LabelKey, LabelSet]


def probe_activations(
    activations: Activations, *, settings: ProbeSettings, folder: Path
) -> ProbeResults:
    """Probe every layer, pooling and task of the activations of one model.

    Parameters
    ----------
    activations : Activations
        What to probe; its `examples` hold the labels. For a control of the inputs that table has
        the changed inputs and the labels of the original examples.
    settings : ProbeSettings
        Settings of the probes. Untrained models and controls of the inputs are not combined with
        controls of the labels.
    folder : Path
        Folder of the run's results. The tables go into a folder inside it that has the activations'
        name, and are read back from there if nothing has changed.

    Returns
    -------
    ProbeResults
        Without heat maps, see :func:`probekit.probes.localisation.add_localisation`.

    Raises
    ------
    ValueError
        A setting is unknown, or a task cannot be probed.

    Warns
    -----
    UserWarning
        A task cannot have one of the controls, or probes did not converge.
    """
    settings.check()
    examples = activations.examples
    if control_name(activations) != "none":
        # Controls of the labels are about the real states, and changed inputs have no codelength.
        codelength_wanted = settings.codelength and activations.control == "none"
        settings = replace(settings, controls=(), codelength=codelength_wanted)
    examples_fingerprint = table_fingerprint(examples)
    fingerprint = paths.fingerprint(
        VERSION, settings, activations.fingerprint, examples_fingerprint
    )
    tables_folder = folder / activations.name
    stored = _read_stored(tables_folder, examples_fingerprint, fingerprint)
    if stored is not None:
        return stored

    infos = task_infos(examples)
    tasks = [LabelledTask.from_examples(examples, name) for name in infos]
    label_sets = {task.name: _make_label_sets(task, settings) for task in tasks}
    parts = []
    for pooling in activations.poolings:
        for part in _probe_pooling(activations, pooling, tasks, label_sets, settings):
            parts.append(part.with_settings(fingerprint))
    store = {
        "record": activations.record,
        "meta": activations.meta,
        "settings": asdict(settings),
        "versions": paths.versions(*LIBRARIES),
        "fingerprint": fingerprint,
    }
    results = replace(ProbeResults.join(parts), tasks=infos, stores=(store,))
    results.write(tables_folder, examples_fingerprint)
    return results


def control_name(activations: Activations) -> str:
    """Return what the column `control` says for probes of the true labels on these activations."""
    if activations.control == "none" and activations.meta["untrained"]:
        return "untrained"
    return activations.control


def _read_stored(folder: Path, examples_fingerprint: str, fingerprint: str) -> ProbeResults | None:
    try:
        stored = ProbeResults.read(folder, examples_fingerprint)
    except (FileNotFoundError, ValueError):
        return None
    return stored if stored.stores[0]["fingerprint"] == fingerprint else None


def _make_label_sets(task: LabelledTask, settings: ProbeSettings) -> LabelSets:
    """Make the true labels, then those of each control and seed.

    Warns of controls that the task cannot have.
    """
    label_sets = {LabelKey("none", settings.seeds[0]): task.true}
    for name in settings.controls:
        try:
            of_control = {LabelKey(name, seed): task.labels(name, seed) for seed in settings.seeds}
        except ValueError as error:
            message = f"{task.name} has no {controls.CONTROL_WORDS[name]}: {error}"
            warnings.warn(message, stacklevel=3)
            continue
        label_sets.update(of_control)
    return label_sets


# ---- fitting ----


def _probe_pooling(
    activations: Activations,
    pooling: str,
    tasks: Sequence[LabelledTask],
    label_sets: dict[str, LabelSets],
    settings: ProbeSettings,
) -> Iterator[ProbeResults]:
    """Yield the results of each task and kind of probe, then how the layers relate."""
    weights: dict[str, ProbeWeights] = {}
    for task, kind, fitted in _fit_all(activations, pooling, tasks, label_sets, settings):
        yield _score_task(activations, pooling, task, kind, fitted, label_sets[task.name], settings)
        by_layer = fitted[LabelKey("none", settings.seeds[0])].weights
        decoder = [probe for layer, probe in by_layer.items() if layer.startswith("lm.")]
        if decoder:
            weights[task.name] = ProbeWeights.concatenate(decoder)
    if weights and control_name(activations) in PREDICTED:
        with_probes = [task for task in tasks if task.name in weights]
        yield _relate_layers(activations, pooling, with_probes, weights)


def _relate_layers(
    activations: Activations,
    pooling: str,
    tasks: Sequence[LabelledTask],
    weights: dict[str, ProbeWeights],
) -> ProbeResults:
    """Read every decoder layer once more, with the probes of all layers."""
    model = activations.meta["model"]
    control = control_name(activations)
    layers = [name for name in activations.layers_with(pooling) if name.startswith("lm.")]
    tables = []
    nearest: dict[str, list[np.ndarray]] = {task.name: [] for task in tasks}
    for place, layer in enumerate(layers):
        x_nd = activations[layer, pooling]
        for task in tasks:
            probes = weights[task.name]
            x_test = x_nd[task.rows[task.true.split["test"].numpy()]]
            metric, score_l = transfer.transfer_scores(x_test, task, probes=probes, place=place)
            table = pd.DataFrame(
                {
                    "task": task.name,
                    "layer": layer,
                    "probe_layer": layers,
                    "metric": metric,
                    "value": score_l,
                }
            )
            tables.append(table)
            standardised = probes.standardise(place, x_test)
            nearest[task.name].append(transfer.nearest_examples(standardised))
    scores = pd.concat(tables, ignore_index=True)
    keys = {task.name: StateKey(model, control, pooling, task.name) for task in tasks}
    return ProbeResults(
        metrics=pd.DataFrame(),
        losses=pd.DataFrame(),
        transfer=scores.assign(model=model, control=control, pooling=pooling),
        neighbours={keys[name]: np.stack(by_layer) for name, by_layer in nearest.items()},
        weights={keys[name]: probes for name, probes in weights.items()},
    )


def _fit_all(
    activations: Activations,
    pooling: str,
    tasks: Sequence[LabelledTask],
    label_sets: dict[str, LabelSets],
    settings: ProbeSettings,
) -> Iterator[tuple[LabelledTask, str, dict[LabelKey, FittedProbes]]]:
    """Fit every kind of probe to all layers, for each task and with each set of labels."""
    parts: dict[tuple[str, str], dict[LabelKey, list[FittedProbes]]] = defaultdict(
        lambda: defaultdict(list)
    )
    layer_count = len(activations.layers_with(pooling))
    description = f"probing {activations.meta['model']} ({control_name(activations)}, {pooling})"
    with tqdm(total=layer_count, desc=description, unit="layer") as bar:
        for layers, x_lnd in _layer_groups(activations, pooling, settings.memory_gb / 16):
            for task in tasks:
                x_task = x_lnd[:, task.rows].to(fitting.training_device())
                for kind in settings.probes:
                    fitted = _fit(x_task, task, kind, settings, layers, label_sets[task.name])
                    for key, one in fitted.items():
                        parts[task.name, kind][key].append(one)
            bar.update(len(layers))
    for task in tasks:
        for kind in settings.probes:
            groups = parts[task.name, kind]
            yield (
                task,
                kind,
                {key: FittedProbes.concatenate(of_key) for key, of_key in groups.items()},
            )


def _fit(
    x_lnd: torch.Tensor,
    task: LabelledTask,
    kind: str,
    settings: ProbeSettings,
    layers: Sequence[str],
    label_sets: LabelSets,
) -> dict[LabelKey, FittedProbes]:
    """Fit one kind of probe to a group of layers, with each set of labels."""
    if kind == "logreg":
        fitted = fitting.fit_logreg(
            x_lnd,
            task,
            label_sets=[*label_sets.values()],
            strengths=settings.strengths,
            layers=layers,
            memory_gb=settings.memory_gb / 4,
            measure_codelength=settings.codelength,
        )
        return dict(zip(label_sets, fitted, strict=True))
    training = settings.training if kind == "mlp" else replace(settings.training, hidden=0)
    keys = [LabelKey("none", seed) for seed in settings.seeds]
    keys += [key for key in label_sets if key.control != "none"]
    labels = [_labels_of(key, task, label_sets) for key in keys]
    fitted = fitting.fit_adam(
        x_lnd,
        labels,
        seeds=[key.seed for key in keys],
        settings=training,
        layers=layers,
    )
    return dict(zip(keys, fitted, strict=True))


def _labels_of(key: LabelKey, task: LabelledTask, label_sets: LabelSets) -> LabelSet:
    return task.true if key.control == "none" else label_sets[key]


def _layer_groups(
    activations: Activations, pooling: str, gigabytes: float
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yield neighbouring layers of one width, as many as fit, with their states (l, n, d)."""
    names: list[str] = []
    states: list[np.ndarray] = []
    for layer in activations.layers_with(pooling):
        x_nd = activations[layer, pooling]
        if states:
            too_large = (len(states) + 1) * x_nd.nbytes > gigabytes * 1e9
            if too_large or x_nd.shape != states[0].shape:
                yield names, torch.from_numpy(np.stack(states))
                names = []
                states = []
        names.append(layer)
        states.append(x_nd)
    yield names, torch.from_numpy(np.stack(states))


# ---- scoring ----


def _score_task(
    activations: Activations,
    pooling: str,
    task: LabelledTask,
    kind: str,
    fitted: dict[LabelKey, FittedProbes],
    label_sets: LabelSets,
    settings: ProbeSettings,
) -> ProbeResults:
    """Make the tables of one task and kind of probe, and keep its test predictions."""
    model = activations.meta["model"]
    control = control_name(activations)
    layers = activations.layers_with(pooling)
    resamples = settings.resamples
    first = LabelKey("none", settings.seeds[0])

    tables = []
    loss_tables = []
    for key, one in fitted.items():
        labels = _labels_of(key, task, label_sets)
        row_control = control if key.control == "none" else key.control
        in_full = key.control == "none" and control in PREDICTED
        scores = _score_labels(one, labels, layers, settings, in_full)
        tables.append(scores.assign(seed=key.seed, control=row_control))
        if len(one.losses):
            loss_tables.append(one.losses.assign(control=row_control))
        if key.control == "control_task":
            true_fit = fitted.get(LabelKey("none", key.seed), fitted[first])
            selectivity = _selectivity(true_fit, one, task.true, labels, layers, resamples)
            tables.append(selectivity.assign(seed=key.seed, control="none"))
            chance = _score_baseline("name_alone", labels, layers, resamples)
            chance = chance[chance.metric == "accuracy"]
            tables.append(chance.assign(seed=key.seed, control=key.control, metric="chance"))
    if control == "none":
        for name in controls.BASELINES:
            if name in controls.TEXT_BASELINES and name not in task.text_probabilities:
                continue
            p_n = task.text_probabilities.get(name)
            scores = _score_baseline(name, task.true, layers, resamples, p_n)
            tables.append(scores.assign(seed=first.seed, control=name))

    table = pd.concat(tables, ignore_index=True)
    losses = pd.concat(loss_tables) if loss_tables else pd.DataFrame()
    names = {"model": model, "pooling": pooling, "task": task.name, "probe": kind}
    decoder = [layer.startswith("lm.") for layer in layers]
    predictions = {}
    if control in PREDICTED and any(decoder):
        p_lnc = fitted[first].probabilities["test"][decoder].astype(np.float16)
        predictions[ProbeKey(model, control, pooling, task.name, kind)] = p_lnc
    return ProbeResults(
        metrics=table.assign(stage=table.layer.str.partition(".")[0], **names),
        losses=losses.assign(**names),
        predictions=predictions,
    )


def _score_labels(
    fitted: FittedProbes,
    labels: LabelSet,
    layers: Sequence[str],
    settings: ProbeSettings,
    in_full: bool,
) -> pd.DataFrame:
    """Score probes by the labels that they were trained on.

    With `in_full` they include those of each class, and how the layers compare.
    """
    validation = labels.select("validation")
    threshold_lc = metrics.choose_thresholds(
        fitted.probabilities["validation"],
        validation.y_nc,
        mask_nc=validation.mask_nc,
        binary=labels.kind == "binary",
    )
    resamples = settings.resamples
    tables = [
        labels.score(
            fitted.probabilities["validation"],
            split="validation",
            layers=layers,
            resamples=resamples,
        ),
        labels.score(
            fitted.probabilities["test"],
            split="test",
            layers=layers,
            resamples=resamples,
            by_class=in_full,
            threshold_lc=threshold_lc,
        ),
    ]
    if len(fitted.strengths):
        table = fitted.strengths.melt("layer", var_name="metric")
        table = table.assign(split="validation", **{"class": ""})
        is_strength = table.metric == "strength"
        table.loc[is_strength, "strength_min"] = min(settings.strengths)
        table.loc[is_strength, "strength_max"] = max(settings.strengths)
        tables.append(table)
    if fitted.bits_ln is not None:
        tables.append(
            codelength.codelength_table(fitted.bits_ln, labels, layers=layers, resamples=resamples)
        )
    return pd.concat(tables)


def _selectivity(
    true_fit: FittedProbes,
    control_fit: FittedProbes,
    true: LabelSet,
    control: LabelSet,
    layers: Sequence[str],
    resamples: int,
) -> pd.DataFrame:
    """Subtract the accuracy of the control task, with a percentile interval.

    Hewitt and Liang (2019), section 2.
    """
    true_curve = true.curve(
        true_fit.probabilities["test"], split="test", metric="accuracy", resamples=resamples
    )
    control_curve = control.curve(
        control_fit.probabilities["test"], split="test", metric="accuracy", resamples=resamples
    )
    gap = comparison.curve_difference(true_curve, control_curve, layers)
    table = gap[["layer", "lo", "hi"]].assign(
        value=gap.difference,
        metric="selectivity",
        split="test",
        n=int(true.select("test").mask_nc.sum()),
    )
    table["class"] = ""
    return table


def _score_baseline(
    name: str,
    labels: LabelSet,
    layers: Sequence[str],
    resamples: int,
    p_n: np.ndarray | None = None,
) -> pd.DataFrame:
    """Score a baseline, which reads no layer and so has the same scores at all of them.

    `p_n` are its probabilities for all examples, if it does not guess from label frequencies.
    """
    train = labels.select("train")
    parts = []
    for split in ("validation", "test"):
        rows = labels.split[split].numpy()
        if p_n is None:
            p_nc = controls.guess(name, train.y_nc, mask_nc=train.mask_nc, n=len(rows))
        else:
            p_nc = p_n[rows, None]
        scores = labels.score(
            p_nc[None].astype(np.float32), split=split, layers=["any"], resamples=resamples
        )
        all_layers = pd.DataFrame({"layer": layers})
        parts.append(all_layers.merge(scores.drop(columns="layer"), how="cross"))
    return pd.concat(parts)
