"""From activations to tables: one light probe a layer, its scores with intervals, its controls, its predictions."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from probekit import paths
from probekit.extraction.store import Activations
from probekit.probes import adam, codelength, comparison, controls, fitting, metrics, transfer
from probekit.probes.fitting import Fitted
from probekit.probes.labels import LabelledTask, LabelSet
from probekit.probes.results import ProbeResults
from probekit.probes.weights import ProbeWeights
from probekit.tasks import input_controls
from probekit.tasks.base import task_infos
from probekit.tasks.building import input_fingerprint, table_fingerprint

PROBES = ("logreg", "linear", "mlp")
PREDICTED = ("none", "untrained")  # controls whose test predictions are kept, and whose layers are compared
LabelSets = dict[tuple[str, int], LabelSet]  # by control and seed
LIBRARIES = ("numpy", "scipy", "pandas", "scikit-learn", "torch")
VERSION = 7  # of what the tables hold: those of older versions are made anew


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of the probes.

    Attributes
    ----------
    probes : "logreg" (converged, standardised features, strength chosen on validation), "linear" (the study's), "mlp"
        (the same training with one hidden layer)
    seeds : starting points, dropout and batch order of "linear" and "mlp", and the labels of the controls; the true
        labels have one "logreg", which has no seed
    strengths : values of C that "logreg" chooses from, for each layer the one with the lowest validation log loss
    training : setting of "linear" and "mlp"
    controls : names out of :data:`probekit.probes.controls.LABEL_CONTROLS`: the same probes on the same states with other labels
    codelength : measure the online codelength of the labels, too (with "logreg")
    resamples : bootstrap samples for the intervals
    memory_gb : bound on what is held at a time; layers go through the probes in groups that fit
    """

    probes: tuple[str, ...] = ("logreg", "linear")
    seeds: tuple[int, ...] = (0,)
    strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    training: adam.Training = adam.Training()
    controls: tuple[str, ...] = ()
    codelength: bool = True
    resamples: int = 2000
    memory_gb: float = 4.0

    def check(self) -> None:
        """Raise ValueError naming what can be chosen where a setting is none of it."""
        unknown = [name for name in self.probes if name not in PROBES]
        if unknown or not self.probes:
            raise ValueError(f"unknown probes {unknown or self.probes}: take names out of {', '.join(PROBES)}")
        controls.check_controls(self.controls, controls.LABEL_CONTROLS)
        for name in ("probes", "seeds", "strengths"):
            if len(set(getattr(self, name))) < len(getattr(self, name)) or not getattr(self, name):
                raise ValueError(f"{name}={list(getattr(self, name))}: name each once, and at least one")


# ------------------------------------------------------------------------------------------------------------ a store


def probe(store: Activations, examples: pd.DataFrame, settings: ProbeSettings, folder: Path) -> ProbeResults:
    """Probe every layer, pooling and task of a store; what `folder` already holds for these settings is read back.

    Parameters
    ----------
    examples : the run's examples table, which the store was extracted from
    folder : where the tables go, into a folder of the store's name
    """
    settings.check()
    if input_fingerprint(store.examples) != input_fingerprint(input_controls.change_inputs(examples, store.control)):
        raise ValueError("the store is open for another examples table: open it for this one")
    if control_of(store) != "none":  # other labels are about the real states
        settings = replace(settings, controls=(), codelength=settings.codelength and store.control == "none")
    key = paths.fingerprint(VERSION, settings, store.fingerprint, table_fingerprint(examples))
    own = folder_of(store, folder)
    if (own / "probe.json").exists() and paths.read_json(own / "probe.json")["fingerprint"] == key:
        return ProbeResults.read(own, table_fingerprint(examples))
    (own / "probe.json").unlink(missing_ok=True)
    tasks = [LabelledTask.of(examples, name) for name in task_infos(examples)]
    sets = {task.name: _label_sets(task, settings) for task in tasks}
    done = ProbeResults.join([part.stamped(key) for pooling in store.poolings
                         for part in _probe_pooling(store, pooling, tasks, sets, settings)])
    done = replace(done, stores=({"record": store.record, "meta": store.meta, "settings": asdict(settings),
                                  "versions": paths.versions(*LIBRARIES), "fingerprint": key},))
    done.write(own, table_fingerprint(examples))
    paths.write_json(own / "probe.json", {"fingerprint": key})
    return done


def folder_of(store: Activations, folder: Path) -> Path:
    """Where a store's own tables lie in the folder of a run's results."""
    return folder / "-".join([store.folder.parent.name, store.folder.name, store.control])


def control_of(store: Activations) -> str:
    return "untrained" if store.meta["untrained"] and store.control == "none" else store.control


def _probe_pooling(store: Activations, pooling: str, tasks: Sequence[LabelledTask], sets: dict[str, LabelSets], settings: ProbeSettings
                   ) -> Iterator[ProbeResults]:
    """A part for each task and kind of probe; the last one says how the layers relate."""
    linear, main = {}, control_of(store)
    for task, kind, fitted in _fit_all(store, pooling, tasks, sets, settings):
        yield scored(store, pooling, task, kind, fitted, sets[task.name], settings)
        own = {layer: one for layer, one in fitted["none", settings.seeds[0]].linear.items() if layer.startswith("lm.")}
        linear |= {task.name: ProbeWeights.join([*own.values()])} if own else {}
    if linear and main in PREDICTED:
        about = {"model": store.meta["model"], "control": main, "pooling": pooling}
        scores, near = transfer.relate(store, pooling, [task for task in tasks if task.name in linear], linear)
        prefix = "|".join(about.values())
        yield ProbeResults(pd.DataFrame(), pd.DataFrame(), scores.assign(**about), {},
                      {f"{prefix}|{name}": values for name, values in near.items()},
                      {f"{prefix}|{name}|{part}": values for name, one in linear.items()
                       for part, values in vars(one).items()})


def _fit_all(store: Activations, pooling: str, tasks: Sequence[LabelledTask], sets: dict[str, LabelSets], settings: ProbeSettings
             ) -> Iterator[tuple[LabelledTask, str, dict[tuple[str, int], Fitted]]]:
    """Every task and kind of probe, fitted to all layers: by control of the labels and seed."""
    parts: dict[tuple[str, str], dict[tuple[str, int], list[Fitted]]] = defaultdict(lambda: defaultdict(list))
    name = f"probing {store.folder.parent.name} ({store.control}, {pooling})"
    with tqdm(total=len(store.layers_with(pooling)), desc=name, unit="layer") as bar:
        for layers, x_lnd in _groups(store, pooling, settings.memory_gb / 16):
            for task in tasks:
                x_task = x_lnd[:, task.rows].to(fitting.device())
                for kind in settings.probes:
                    for key, fitted in _fit(x_task, task, kind, settings, layers, sets[task.name]).items():
                        parts[task.name, kind][key].append(fitted)
            bar.update(len(layers))
    for task in tasks:
        for kind in settings.probes:
            yield task, kind, {key: Fitted.join(found) for key, found in parts[task.name, kind].items()}


def _label_sets(task: LabelledTask, settings: ProbeSettings) -> LabelSets:
    """The true labels first, then those of the controls for each seed; a control that it cannot have is a warning."""
    found = {("none", settings.seeds[0]): task.true}
    for name in settings.controls:
        try:
            found |= {(name, seed): task.labels(name, seed) for seed in settings.seeds}
        except ValueError as error:
            warnings.warn(f"{task.name} has no {controls.CONTROL_WORDS[name]}: {error}", stacklevel=2)
    return found


def _fit(x_lnd: torch.Tensor, task: LabelledTask, kind: str, settings: ProbeSettings, layers: Sequence[str],
         sets: LabelSets) -> dict[tuple[str, int], Fitted]:
    """One kind of probe, for the true labels and those of controls: by control and seed."""
    if kind == "logreg":
        found = fitting.with_logreg(x_lnd, task, [*sets.values()], settings.strengths, layers, settings.memory_gb / 4,
                                 settings.codelength)
        return dict(zip(sets, found, strict=True))
    setting = settings.training if kind == "mlp" else replace(settings.training, hidden=0)
    keys = [("none", seed) for seed in settings.seeds] + [*sets][1:]
    labels, seeds = [sets.get(key, task.true) for key in keys], [seed for _, seed in keys]
    found = fitting.with_adam(x_lnd, labels, seeds, setting, layers)
    return dict(zip(keys, found, strict=True))


def _groups(store: Activations, pooling: str, gigabytes: float) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Neighbouring layers of one width, as many as fit, with their features (l, n, d); at least one."""
    names: list[str] = []
    held: list[np.ndarray] = []
    for layer in store.layers_with(pooling):
        x_nd = store[layer, pooling]
        if held and (x_nd.shape != held[0].shape or (len(held) + 1) * x_nd.nbytes > gigabytes * 1e9):
            yield names, torch.from_numpy(np.stack(held))
            names, held = [], []
        names.append(layer)
        held.append(x_nd)
    yield names, torch.from_numpy(np.stack(held))


# ----------------------------------------------------------------------------------------------------------- scoring


def scored(store: Activations, pooling: str, task: LabelledTask, kind: str, fitted: dict[tuple[str, int], Fitted],
           sets: LabelSets, settings: ProbeSettings) -> ProbeResults:
    """Tables of one task and kind of probe, all controls and seeds, and the first seed's test predictions."""
    layers, main, b = store.layers_with(pooling), control_of(store), settings.resamples
    tables = []
    for (name, seed), one in fitted.items():
        labels = sets.get((name, seed), task.true)  # those of "linear" and "mlp" are true for every seed
        cut = metrics.thresholds(one.p_lnc["validation"], *labels.of("validation")[:2], labels.kind == "binary")
        in_full = name == "none" and main in PREDICTED
        rows = [labels.score(one.p_lnc["validation"], "validation", layers, b),
                labels.score(one.p_lnc["test"], "test", layers, b, in_full, cut)]
        if len(one.chosen):
            chosen = one.chosen.melt("layer", var_name="metric").assign(split="validation", **{"class": ""})
            chosen.loc[chosen.metric == "strength", ["lo", "hi"]] = min(settings.strengths), max(settings.strengths)
            rows.append(chosen)
        if one.bits_ln is not None:
            rows.append(codelength.table(one.bits_ln, labels, layers, b))
        tables.append(pd.concat(rows).assign(seed=seed, control=main if name == "none" else name))
        if name == "control_task":
            own = fitted.get(("none", seed), fitted["none", settings.seeds[0]])
            tables += [_selectivity(own, one, task.true, labels, layers, b).assign(seed=seed, control="none"),
                       _baseline("name_alone", labels, layers, b).query("metric == 'accuracy'").assign(
                           seed=seed, control=name, metric="chance")]
    if main == "none":
        tables += [_baseline(name, task.true, layers, b, task.p_texts_n.get(name)).assign(
            seed=settings.seeds[0], control=name)
            for name in controls.BASELINES if name in task.p_texts_n or name not in controls.TEXT_BASELINES]
    about = {"model": store.meta["model"], "pooling": pooling, "task": task.name, "probe": kind}
    table = pd.concat(tables, ignore_index=True)
    losses = pd.concat([one.losses.assign(control=main if name == "none" else name, **about)
                        for (name, _), one in fitted.items() if len(one.losses)] or [pd.DataFrame()])
    decoder = [layer.startswith("lm.") for layer in layers]
    test = fitted["none", settings.seeds[0]].p_lnc["test"][decoder].astype(np.float16)
    key = "|".join((about["model"], main, pooling, task.name, kind))
    return ProbeResults(table.assign(stage=table.layer.str.partition(".")[0], **about), losses,
                   predictions={key: test} if main in PREDICTED and len(test) else {})


def _selectivity(own: Fitted, control: Fitted, true: LabelSet, arbitrary: LabelSet, layers: Sequence[str], resamples: int
                 ) -> pd.DataFrame:
    """Accuracy minus that of the control task (Hewitt and Liang, 2019, section 2), with its percentile interval."""
    gap = comparison.curve_difference(true.curve(own.p_lnc["test"], "test", "accuracy", resamples),
                             arbitrary.curve(control.p_lnc["test"], "test", "accuracy", resamples), layers)
    return gap[["layer", "lo", "hi"]].assign(value=gap.difference, metric="selectivity", split="test",
                                             n=int(true.of("test")[1].sum()), **{"class": ""})


def _baseline(name: str, labels: LabelSet, layers: Sequence[str], resamples: int, p_n: np.ndarray | None = None
              ) -> pd.DataFrame:
    """The same scores at every layer: a baseline looks at none. `p_n` are its probabilities, where it has some."""
    train = labels.split["train"]
    parts = []
    for split in ("validation", "test"):
        rows = labels.split[split].numpy()
        p = p_n[rows, None] if p_n is not None else controls.baseline(
            name, labels.y_nc[train].numpy(), labels.mask_nc[train].numpy(), len(rows))
        once = labels.score(p[None].astype(np.float32), split, ["once"], resamples)
        parts.append(pd.DataFrame({"layer": layers}).merge(once.drop(columns="layer"), how="cross"))
    return pd.concat(parts)
