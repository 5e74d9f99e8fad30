"""From activations to tables: one probe per layer, with its scores, intervals and controls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from probekit import paths
from probekit.extraction.store import Activations
from probekit.models.devices import free_gpu_bytes, free_memory, is_out_of_memory
from probekit.probes import adam, codelength, comparison, controls, fitting, metrics, transfer
from probekit.probes.checkpoints import Checkpoints, forget_checkpoints
from probekit.probes.fitting import FittedProbes
from probekit.probes.labels import LabelKey, LabelledTask, LabelSet
from probekit.probes.results import ProbeKey, ProbeResults, StateKey, compact_predictions
from probekit.probes.weights import ProbeWeights
from probekit.probes.wordings import WordingScores
from probekit.tasks.base import task_infos
from probekit.tasks.building import SPLITS, table_fingerprint

# The kinds of probe, and the words for them.
PROBES = {
    "logreg": "logistic-regression",
    "mean_difference": "mean-difference",
    "linear": "linear (Adam)",
    "mlp": "one-hidden-layer",
}
LIBRARIES = ("numpy", "scipy", "pandas", "scikit-learn", "torch")

# Controls whose test predictions are kept, and whose layers are compared.
PREDICTED = ("none", "untrained")

# Of the probes of one layer or wording on the states of another.
TRANSFER_COLUMNS = [
    "task",
    "probe_task",
    "layer",
    "probe_layer",
    "metric",
    "value",
    "lo",
    "hi",
    "n",
]

# Of what the tables hold: tables of another version are made again.
VERSION = 12


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Settings of the probes.

    Attributes
    ----------
    probes : tuple of str
        Kinds of probes: ``"logreg"`` (logistic regression on standardised features, solved to
        convergence, its strength chosen on validation), ``"mean_difference"`` (along the difference
        of the classes' means), ``"linear"`` (dropout and one linear layer, trained with Adam: the
        published study's) and ``"mlp"`` (the same training with one hidden layer).
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
        Bound on what is held at a time, in 10^9 bytes; layers are probed in groups that fit. On a
        GPU the groups are as large as its free memory allows.
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
        if not self.probes:
            raise ValueError(f"probes=[]: name at least one out of {', '.join(PROBES)}")
        unknown = [name for name in self.probes if name not in PROBES]
        if unknown:
            raise ValueError(f"unknown probes {unknown}: take names out of {', '.join(PROBES)}")
        controls.check_controls(self.controls, controls.LABEL_CONTROLS)
        for name in ("probes", "seeds", "strengths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)}: name each once, and at least one")


@dataclass(frozen=True)
class _ProbedTask:
    """A task, and the sets of labels that probes are trained on for it: the true ones first."""

    task: LabelledTask
    label_sets: dict[LabelKey, LabelSet]

    @property
    def name(self) -> str:
        return self.task.name

    def labels(self, key: LabelKey) -> LabelSet:
        return self.task.true if key.control == "none" else self.label_sets[key]


@dataclass
class _GroupLimit:
    """How many layers fit the memory together, once more of them did not; None before."""

    layers: int | None = None


@dataclass(frozen=True)
class _Job:
    """What is probed together: one pooling of the activations of one model.

    `folder` is where fitted probes are kept until all are.
    """

    activations: Activations
    pooling: str
    tasks: Sequence[_ProbedTask]
    settings: ProbeSettings
    device: str
    folder: Path
    group_limit: _GroupLimit

    @property
    def model(self) -> str:
        return self.activations.meta["model"]

    @property
    def control(self) -> str:
        return control_name(self.activations)

    @property
    def is_predicted(self) -> bool:
        return self.control in PREDICTED

    @property
    def layers(self) -> list[str]:
        return self.activations.layers_with(self.pooling)

    @property
    def decoder_layers(self) -> list[str]:
        return [layer for layer in self.layers if layer.startswith("lm.")]

    @property
    def first_key(self) -> LabelKey:
        """The true labels with the first seed, whose predictions and weights are kept."""
        return LabelKey("none", self.settings.seeds[0])


def probe_activations(
    activations: Activations,
    *,
    settings: ProbeSettings,
    folder: Path,
    device: str | None = None,
    n_jobs: int = 1,
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
    device : str or None
        Where probes are trained and scored, see
        :func:`probekit.probes.fitting.training_device`.
    n_jobs : int
        How many processes probe at once, which share what `memory_gb` allows.

    Returns
    -------
    ProbeResults
        Without heat maps, see :func:`probekit.probes.localisation.add_localisation`.

    Raises
    ------
    ValueError
        A setting is unknown, or no task can be scored.
    MemoryError
        The probes of a single layer do not fit.

    Warns
    -----
    UserWarning
        A task cannot be scored or cannot have one of the controls, or probes did not converge.

    Notes
    -----
    Fitted probes are on disk after every group of layers: stopped and called again, it goes on with
    the layers that are missing.
    """
    settings = _suitable_settings(settings, activations)
    stored = stored_results(activations, settings=settings, folder=folder)
    tables_folder = folder / activations.name
    if stored is not None:
        forget_checkpoints(tables_folder)
        return stored

    examples = activations.examples
    examples_fingerprint = table_fingerprint(examples)
    infos = task_infos(examples)
    training_device = fitting.training_device(device)
    tasks = _make_tasks(examples, list(infos), settings, device=training_device)
    infos = {task.name: infos[task.name] for task in tasks}
    # What is fitted depends on none of these three: they may change before it goes on.
    settings_of_fits = replace(settings, probes=(), resamples=0, memory_gb=0.0)
    fingerprint_of_fits = paths.fingerprint(
        VERSION,
        settings_of_fits,
        training_device.partition(":")[0],
        activations.fingerprint,
        examples_fingerprint,
    )
    fingerprint = _fingerprint(activations, settings)
    parts = []
    group_limit = _GroupLimit()
    for pooling in activations.poolings:
        tasks_of_pooling = tasks
        if pooling == activations.answer_pooling:  # it is there for the answers alone
            tasks_of_pooling = [task for task in tasks if infos[task.name].answers]
        if not tasks_of_pooling:
            continue
        job = _Job(
            activations,
            pooling,
            tasks_of_pooling,
            replace(settings, memory_gb=settings.memory_gb / n_jobs),
            device=training_device,
            folder=tables_folder / f"fitted-{fingerprint_of_fits}",
            group_limit=group_limit,
        )
        parts += [part.with_settings(fingerprint) for part in _probe_pooling(job)]
    store = {
        "record": activations.record,
        "meta": activations.meta,
        "settings": asdict(settings),
        "versions": paths.versions(*LIBRARIES),
        "fingerprint": fingerprint,
    }
    results = replace(ProbeResults.join(parts), tasks=infos, stores=(store,))
    results.write(tables_folder, examples_fingerprint)
    forget_checkpoints(tables_folder)
    return results


def control_name(activations: Activations) -> str:
    """Return what the column `control` says for probes of the true labels on these activations."""
    if activations.control == "none" and activations.meta["untrained"]:
        return "untrained"
    return activations.control


def stored_results(
    activations: Activations, *, settings: ProbeSettings, folder: Path
) -> ProbeResults | None:
    """Read the probes of activations, if they were made with these settings and nothing changed.

    Parameters
    ----------
    activations, settings, folder
        See :func:`probe_activations`.

    Raises
    ------
    ValueError
        A setting is unknown.
    """
    settings = _suitable_settings(settings, activations)
    try:
        stored = ProbeResults.read(
            folder / activations.name, table_fingerprint(activations.examples)
        )
    except (FileNotFoundError, ValueError):
        return None
    is_current = stored.stores[0]["fingerprint"] == _fingerprint(activations, settings)
    return stored if is_current else None


def _suitable_settings(settings: ProbeSettings, activations: Activations) -> ProbeSettings:
    """Return what of the settings is for these activations."""
    settings.check()
    if control_name(activations) == "none":
        return settings
    # Controls of the labels are about the real states, and changed inputs have no codelength.
    codelength_wanted = settings.codelength and activations.control == "none"
    return replace(settings, controls=(), codelength=codelength_wanted)


def _fingerprint(activations: Activations, settings: ProbeSettings) -> str:
    return paths.fingerprint(
        VERSION, settings, activations.fingerprint, table_fingerprint(activations.examples)
    )


def _make_tasks(
    examples: pd.DataFrame, names: Sequence[str], settings: ProbeSettings, *, device: str
) -> list[_ProbedTask]:
    """Make the labels of all tasks, and warn of those that cannot be scored.

    Raises
    ------
    ValueError
        No task can be scored.
    """
    tasks = []
    refusals = []
    for name in names:
        try:
            task = LabelledTask.from_examples(examples, name, device=device)
            tasks.append(_ProbedTask(task, _make_label_sets(task, settings)))
        except ValueError as error:
            refusals.append(str(error))
    if not tasks:
        raise ValueError("; ".join(refusals))
    for refusal in refusals:
        warnings.warn(f"{refusal}; the other tasks are probed", stacklevel=3)
    return tasks


def _make_label_sets(task: LabelledTask, settings: ProbeSettings) -> dict[LabelKey, LabelSet]:
    """Make the true labels, then those of each control and seed.

    Warns of controls that the task cannot have.

    Raises
    ------
    ValueError
        The true labels cannot be scored.
    """
    _check_scorable(task.true, f"task {task.name}")
    label_sets = {LabelKey("none", settings.seeds[0]): task.true}
    for name in settings.controls:
        try:
            of_control = {LabelKey(name, seed): task.labels(name, seed) for seed in settings.seeds}
            for labels in of_control.values():
                _check_scorable(labels, "it")
        except ValueError as error:
            message = f"{task.name} has no {controls.CONTROL_WORDS[name]}: {error}"
            warnings.warn(message, stacklevel=4)
            continue
        label_sets.update(of_control)
    return label_sets


def _check_scorable(labels: LabelSet, name: str) -> None:
    """Refuse labels that a split has nothing of, before any probe is fitted to them."""
    for split in SPLITS:
        _, mask_nc, image_n = labels.select(split)
        images = len(np.unique(image_n[mask_nc.any(1)]))
        needed = 1 if split == "train" else 2  # resamples of one image are all the same
        if images < needed:
            raise ValueError(
                f"{name} has labels of {images} images in {split}, and needs those of {needed} or "
                "more: take more images, or other categories, in 01_build_data"
            )


def _probe_pooling(job: _Job) -> Iterator[ProbeResults]:
    """Yield the results of each task and kind of probe, then how the layers relate."""
    weights: dict[ProbeKey, ProbeWeights] = {}
    description = f"probing {job.model} ({job.control}, {job.pooling})"
    total = len(job.layers) * len(job.tasks)
    with tqdm(total=total, desc=description, unit="layer") as bar:
        for probed_task in job.tasks:
            bar.set_postfix_str(probed_task.name)
            for kind, fitted in _fit_task(job, probed_task, bar).items():
                yield _score_task(job, probed_task, kind=kind, fitted=fitted)
                by_layer = fitted[job.first_key].weights
                decoder = [by_layer[layer] for layer in job.decoder_layers if layer in by_layer]
                if decoder:
                    key = ProbeKey(job.model, job.control, job.pooling, probed_task.name, kind)
                    weights[key] = ProbeWeights.concatenate(decoder)
    if weights and job.is_predicted:
        no_rows = pd.DataFrame()
        yield ProbeResults(metrics=no_rows, losses=no_rows, weights=weights)
        of_logreg = {key.task: probes for key, probes in weights.items() if key.probe == "logreg"}
        if of_logreg:
            yield _relate_layers(job, of_logreg)


# ---- fitting ----


def _fit_task(
    job: _Job, probed_task: _ProbedTask, bar: tqdm
) -> dict[str, dict[LabelKey, FittedProbes]]:
    """Fit every kind of probe to all layers, with each set of labels of a task.

    What was fitted is on disk after each group of layers, and is not fitted again.
    """
    checkpoints = {
        kind: Checkpoints(job.folder / paths.fingerprint(job.pooling, probed_task.name, kind))
        for kind in job.settings.probes
    }
    by_layer: dict[tuple[str, str], dict[LabelKey, FittedProbes]] = {}
    for kind, of_kind in checkpoints.items():
        for layer in job.layers:
            fitted = of_kind.read(layer)
            if fitted is not None:
                by_layer[kind, layer] = fitted
    missing = [
        layer for layer in job.layers if any((kind, layer) not in by_layer for kind in checkpoints)
    ]
    bar.update(len(job.layers) - len(missing))
    for layers, x_lnd in _layer_groups(job, missing, rows=probed_task.task.rows):
        for kind, of_kind in checkpoints.items():
            if all((kind, layer) in by_layer for layer in layers):
                continue
            fitted = _fit_in_parts(job, x_lnd, probed_task, kind=kind, layers=layers)
            for place, layer in enumerate(layers):
                of_layer = {key: one.layer(place) for key, one in fitted.items()}
                of_kind.write(layer, of_layer)
                by_layer[kind, layer] = of_layer
        bar.update(len(layers))
    joined = {}
    for kind in checkpoints:
        of_layers = [by_layer[kind, layer] for layer in job.layers]
        joined[kind] = {
            key: FittedProbes.concatenate([of_layer[key] for of_layer in of_layers])
            for key in of_layers[0]
        }
    return joined


def _fit_in_parts(
    job: _Job,
    x_lnd: torch.Tensor,
    probed_task: _ProbedTask,
    *,
    kind: str,
    layers: Sequence[str],
) -> dict[LabelKey, FittedProbes]:
    """Fit one kind of probe to a group of layers; to half of them first where memory runs out."""
    settings = job.settings
    try:
        return _fit(x_lnd, probed_task, kind=kind, layers=layers, settings=settings)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        shortage = str(error).splitlines()[0]
    free_memory()  # outside of the except: a traceback holds on to what did not fit
    if len(layers) == 1:
        raise MemoryError(
            f"the {kind} probes of one layer ({layers[0]}, {probed_task.name}) do not fit the "
            f"memory of {job.device} ({shortage}): close other programs, or take fewer seeds or "
            "images, or another device"
        )
    if job.group_limit.layers is None:
        print(
            f"{len(layers)} layers at a time do not fit the memory of {job.device} ({shortage}): "
            "they are probed in halves, with the same results to rounding",
            flush=True,
        )
    half = len(layers) // 2
    job.group_limit.layers = half
    first = _fit_in_parts(job, x_lnd[:half], probed_task, kind=kind, layers=layers[:half])
    second = _fit_in_parts(job, x_lnd[half:], probed_task, kind=kind, layers=layers[half:])
    return {key: FittedProbes.concatenate([first[key], second[key]]) for key in first}


def _fit(
    x_lnd: torch.Tensor,
    probed_task: _ProbedTask,
    *,
    kind: str,
    layers: Sequence[str],
    settings: ProbeSettings,
) -> dict[LabelKey, FittedProbes]:
    """Fit one kind of probe to a group of layers, with each set of labels."""
    if kind == "logreg":
        memory_gb = free_gpu_bytes(x_lnd.device) / 1e9 if x_lnd.is_cuda else settings.memory_gb
        fitted = fitting.fit_logreg(
            x_lnd,
            probed_task.task,
            label_sets=list(probed_task.label_sets.values()),
            strengths=settings.strengths,
            layers=layers,
            memory_gb=memory_gb / 4,
            measure_codelength=settings.codelength,
        )
        return dict(zip(probed_task.label_sets, fitted, strict=True))
    if kind == "mean_difference":
        fitted = fitting.fit_mean_difference(
            x_lnd, probed_task.task, label_sets=list(probed_task.label_sets.values()), layers=layers
        )
        return dict(zip(probed_task.label_sets, fitted, strict=True))
    training = settings.training if kind == "mlp" else replace(settings.training, hidden=0)
    keys = [LabelKey("none", seed) for seed in settings.seeds]
    keys += [key for key in probed_task.label_sets if key.control != "none"]
    fitted = fitting.fit_adam(
        x_lnd,
        [probed_task.labels(key) for key in keys],
        seeds=[key.seed for key in keys],
        settings=training,
        layers=layers,
    )
    return dict(zip(keys, fitted, strict=True))


def _layer_groups(
    job: _Job, layers: Sequence[str], *, rows: np.ndarray
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yield neighbouring layers of one width, as many as fit, with the states (l, n, d) of rows."""
    most_bytes = job.settings.memory_gb / 6 * 1e9
    if job.device.startswith("cuda"):
        most_bytes = free_gpu_bytes(job.device) / 8
    row_numbers = torch.from_numpy(rows)
    names: list[str] = []
    states: list[torch.Tensor] = []
    for layer in layers:
        x_all_nd = torch.from_numpy(job.activations[layer, job.pooling])
        x_nd = x_all_nd.index_select(0, row_numbers).to(job.device)
        if states:
            is_too_large = (len(states) + 1) * x_nd.nbytes > most_bytes
            is_full = len(states) == job.group_limit.layers
            if is_too_large or is_full or x_nd.shape != states[0].shape:
                yield names, _stack(states)
                names = []
        names.append(layer)
        states.append(x_nd)
    if names:
        yield names, _stack(states)


def _stack(states: list[torch.Tensor]) -> torch.Tensor:
    """Stack states, and empty their list: they need not be held twice."""
    x_lnd = states[0][None] if len(states) == 1 else torch.stack(states)
    states.clear()
    return x_lnd


# ---- scoring ----


def _score_task(
    job: _Job,
    probed_task: _ProbedTask,
    *,
    kind: str,
    fitted: dict[LabelKey, FittedProbes],
) -> ProbeResults:
    """Make the tables of one task and kind of probe, and keep its test predictions."""
    metric_tables = []
    loss_tables = []
    for key, one in fitted.items():
        labels = probed_task.labels(key)
        row_control = job.control if key.control == "none" else key.control
        scores = _score_probes(job, one, labels=labels)
        metric_tables.append(scores.assign(seed=key.seed, control=row_control))
        if len(one.losses):
            loss_tables.append(one.losses.assign(control=row_control))
        if key.control == "control_task":
            true_probes = fitted.get(LabelKey("none", key.seed), fitted[job.first_key])
            selectivity = _selectivity(
                job,
                true_probes=true_probes,
                control_probes=one,
                true_labels=probed_task.task.true,
                control_labels=labels,
            )
            metric_tables.append(selectivity.assign(seed=key.seed, control="none"))
            chance = _score_baseline(job, "name_alone", labels=labels)
            chance = chance[chance.metric == "accuracy"].assign(metric="chance")
            metric_tables.append(chance.assign(seed=key.seed, control=key.control))
    if job.control == "none":
        metric_tables += _score_baselines(job, probed_task.task)

    metrics_table = pd.concat(metric_tables, ignore_index=True)
    losses = pd.concat(loss_tables) if loss_tables else pd.DataFrame()
    names = {
        "model": job.model,
        "pooling": job.pooling,
        "task": probed_task.name,
        "probe": kind,
    }
    predictions = {}
    if job.is_predicted and job.decoder_layers:
        is_decoder = [layer in job.decoder_layers for layer in job.layers]
        p_lnc = fitted[job.first_key].probabilities["test"][is_decoder]
        predictions[ProbeKey(control=job.control, **names)] = compact_predictions(p_lnc)
    stage = metrics_table.layer.str.partition(".")[0]
    return ProbeResults(
        metrics=metrics_table.assign(stage=stage, **names),
        losses=losses.assign(**names),
        predictions=predictions,
    )


def _score_probes(job: _Job, fitted: FittedProbes, *, labels: LabelSet) -> pd.DataFrame:
    """Score probes by the labels that they were trained on."""
    settings = job.settings
    validation = labels.select("validation")
    threshold_lc = metrics.choose_thresholds(
        fitted.probabilities["validation"],
        validation.y_nc,
        mask_nc=validation.mask_nc,
        binary=labels.kind == "binary",
    )
    tables = [
        labels.score(
            fitted.probabilities["validation"],
            split="validation",
            layers=job.layers,
            resamples=settings.resamples,
        ),
        labels.score(
            fitted.probabilities["test"],
            split="test",
            layers=job.layers,
            resamples=settings.resamples,
            by_class=labels.name == "none" and job.is_predicted,
            threshold_lc=threshold_lc,
        ),
    ]
    if len(fitted.strengths):
        table = fitted.strengths.melt(["layer", "strength_solved"], var_name="metric")
        table = table.assign(split="validation", **{"class": ""})
        is_strength = table.metric == "strength"
        table.loc[is_strength, "strength_min"] = min(settings.strengths)
        table.loc[is_strength, "strength_max"] = max(settings.strengths)
        table.loc[~is_strength, "strength_solved"] = np.nan
        tables.append(table)
    if fitted.bits_ln is not None:
        table = codelength.codelength_table(
            fitted.bits_ln, labels, layers=job.layers, resamples=settings.resamples
        )
        tables.append(table)
    return pd.concat(tables)


def _selectivity(
    job: _Job,
    *,
    true_probes: FittedProbes,
    control_probes: FittedProbes,
    true_labels: LabelSet,
    control_labels: LabelSet,
) -> pd.DataFrame:
    """Subtract the accuracy of the control task, with a percentile interval.

    Hewitt and Liang (2019), section 2.
    """
    curves = [
        labels.curve(
            probes.probabilities["test"],
            split="test",
            metric="accuracy",
            resamples=job.settings.resamples,
        )
        for probes, labels in ((true_probes, true_labels), (control_probes, control_labels))
    ]
    difference = comparison.curve_difference(*curves, layers=job.layers)
    table = difference[["layer", "lo", "hi"]].assign(
        value=difference.difference,
        metric="selectivity",
        split="test",
        n=int(true_labels.select("test").mask_nc.sum()),
    )
    table["class"] = ""
    return table


def _score_baselines(job: _Job, task: LabelledTask) -> list[pd.DataFrame]:
    tables = []
    for name in controls.BASELINES:
        p_n = task.text_probabilities.get(name)
        if name in controls.TEXT_BASELINES and p_n is None:
            continue
        scores = _score_baseline(job, name, labels=task.true, p_n=p_n)
        tables.append(scores.assign(seed=job.first_key.seed, control=name))
    return tables


def _score_baseline(
    job: _Job, name: str, *, labels: LabelSet, p_n: np.ndarray | None = None
) -> pd.DataFrame:
    """Score a baseline, which reads no layer and so has the same scores at all of them.

    `p_n` are its probabilities for all examples, if it does not guess from label frequencies.
    """
    train = labels.select("train")
    all_layers = pd.DataFrame({"layer": job.layers})
    tables = []
    for split in ("validation", "test"):
        rows = labels.split[split].numpy()
        if p_n is None:
            p_nc = controls.guess(name, train.y_nc, mask_nc=train.mask_nc, n=len(rows))
        else:
            p_nc = p_n[rows, None]
        scores = labels.score(
            p_nc[None].astype(np.float32),
            split=split,
            layers=["any"],
            resamples=job.settings.resamples,
        )
        tables.append(all_layers.merge(scores.drop(columns="layer"), how="cross"))
    return pd.concat(tables)


# ---- how layers relate ----


def _relate_layers(job: _Job, weights: dict[str, ProbeWeights]) -> ProbeResults:
    """Read every decoder layer once more, with the probes of all layers."""
    tasks = [probed_task.task for probed_task in job.tasks if probed_task.name in weights]
    wording_scores = WordingScores(
        job.activations.examples, {task.name: task for task in tasks}, weights
    )
    tables = []
    nearest: dict[StateKey, list[np.ndarray]] = {}
    keys = {task.name: StateKey(job.model, job.control, job.pooling, task.name) for task in tasks}
    for place, layer in enumerate(job.decoder_layers):
        x_nd = job.activations[layer, job.pooling]
        wording_scores.read_layer(place, x_nd)
        for task in tasks:
            probes = weights[task.name]
            x_test_nd = x_nd[task.rows[task.true.split["test"].numpy()]]
            metric, score_l = transfer.transfer_scores(x_test_nd, task, probes=probes, place=place)
            table = pd.DataFrame(
                {
                    "task": task.name,
                    "probe_task": task.name,
                    "layer": layer,
                    "probe_layer": job.decoder_layers,
                    "metric": metric,
                    "value": score_l,
                }
            )
            tables.append(table)
            standardised_nd = probes.standardise(place, x_test_nd)
            neighbours_nk = transfer.nearest_examples(standardised_nd, device=job.device)
            nearest.setdefault(keys[task.name], []).append(neighbours_nk)
    tables.append(wording_scores.table(job.decoder_layers, resamples=job.settings.resamples))
    scores = pd.concat([table for table in tables if len(table)], ignore_index=True)
    scores = scores.reindex(columns=TRANSFER_COLUMNS)
    return ProbeResults(
        metrics=pd.DataFrame(),
        losses=pd.DataFrame(),
        transfer=scores.assign(model=job.model, control=job.control, pooling=job.pooling),
        neighbours={key: np.stack(by_layer) for key, by_layer in nearest.items()},
    )
