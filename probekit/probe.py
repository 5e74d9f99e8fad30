"""From activations to tables: one light probe a layer, its scores with intervals, its losses, its test predictions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from probekit import linear, logreg, metrics, paths
from probekit.results import Results
from probekit.store import Store
from probekit.tasks import rows_key, table_key

PROBES = ("logreg", "linear")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Probing:
    """Settings of the probes.

    Attributes
    ----------
    probes : "logreg" (converged, standardised features, strength chosen on validation) and "linear" (the study's)
    seeds : starting points of both, and dropout and batch order of "linear"
    strengths : values of C that "logreg" chooses from, for each layer the one with the lowest validation log loss
    training : setting of "linear"
    resamples : bootstrap samples for the intervals
    memory_gb : bound on the features that "linear" holds at a time; its layers are trained in groups that fit
    """

    probes: tuple[str, ...] = PROBES
    seeds: tuple[int, ...] = (0,)
    strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    training: linear.Training = linear.Training()
    resamples: int = 2000
    memory_gb: float = 4.0


@dataclass(frozen=True)
class TaskData:
    """One task of a run: where its rows are in the store, and its labels.

    Entries of a class that no training example is asked for do not count: no probe can learn it.
    """

    name: str
    kind: str
    classes: list[str]
    rows: np.ndarray  # (n,) of the store
    image_n: np.ndarray
    y_nc: torch.Tensor
    mask_nc: torch.Tensor
    split: dict[str, torch.Tensor]  # row numbers within the task

    @classmethod
    def of(cls, examples: pd.DataFrame, name: str) -> TaskData:
        about = examples.attrs["tasks"][name]
        rows = np.flatnonzero((examples.task == name).to_numpy())
        table = examples.iloc[rows]
        split = {s: torch.from_numpy(np.flatnonzero((table.split == s).to_numpy())) for s in SPLITS}
        empty = [s for s, numbers in split.items() if not len(numbers)]
        if empty:
            raise ValueError(f"task {name} has no examples in {', '.join(empty)}: take more images in 01_build_data")
        y, mask = (torch.tensor(np.array(table[column].tolist()), dtype=torch.float32) for column in ("labels", "mask"))
        mask *= mask[split["train"]].amax(0)
        return cls(name, about["kind"], list(about["classes"]), rows, table.image_id.to_numpy(), y, mask, split)

    def score(self, p_lnc: np.ndarray, split: str, layers: Sequence[str], resamples: int) -> pd.DataFrame:
        at = self.split[split].numpy()
        scored = metrics.table(p_lnc, self.y_nc[at].numpy(), self.mask_nc[at].numpy(), self.image_n[at], self.classes,
                               list(layers), self.kind == "binary", resamples)
        return scored.assign(split=split)


# -------------------------------------------------------------------------------------------------------- the probes


def standardised(x_nd: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """Features with mean 0 and standard deviation 1 over the training rows; a constant one becomes 0."""
    part = x_nd[train]
    scale = part.std(0, correction=0)
    return torch.where(scale > 0, (x_nd - part.mean(0)) / scale, 0)


def fit_logreg(x_nd: torch.Tensor, task: TaskData, settings: Probing, layer: str) -> tuple[np.ndarray, list[float]]:
    """Probabilities (s, n, c) of all rows, and the strengths C (s) that validation chose.

    A problem that does not converge is a warning with layer, class and strength in it.
    """
    train, validation, c = task.split["train"], task.split["validation"], len(task.classes)
    x = standardised(x_nd, train)
    shape = (len(settings.seeds), len(settings.strengths), c)
    repeated = [t[train].repeat(1, shape[0] * shape[1]) for t in (task.y_nc, task.mask_nc)]
    c_p = torch.tensor(settings.strengths, dtype=torch.float32).repeat_interleave(c).repeat(shape[0])
    solution = logreg.solve(x[train], *repeated, c_p, settings.seeds)
    for p in torch.nonzero(~solution.converged_p).ravel().tolist():
        warnings.warn(f"logreg did not converge: {task.name}, {layer}, class {task.classes[p % c]!r}, "
                      f"C={float(c_p[p]):g}, gradient norm {float(solution.gradient_p[p]):.1e}", stacklevel=2)
    logits = solution.logits(x).reshape(len(x), *shape)
    y, mask = (t[validation, None, None] for t in (task.y_nc, task.mask_nc))
    each = torch.nn.functional.softplus(logits[validation]) - y * logits[validation]
    best = (each * mask).sum((0, -1)).argmin(1).tolist()
    chosen = torch.stack([logits[:, s, k] for s, k in enumerate(best)])
    return chosen.sigmoid().numpy(), [settings.strengths[k] for k in best]


def _logreg_all(store: Store, pooling: str, task: TaskData, settings: Probing) -> tuple[np.ndarray, pd.DataFrame]:
    """(seeds, l, n, c) probabilities, and the chosen strengths as rows of the metrics table."""
    out, chosen = [], []
    for layer in store.layers_of(pooling):
        p_snc, strengths = fit_logreg(torch.from_numpy(store[layer, pooling][task.rows]), task, settings, layer)
        out.append(p_snc)
        chosen += [{"layer": layer, "seed": s, "metric": "strength", "class": "", "value": c, "split": "validation"}
                   for s, c in zip(settings.seeds, strengths, strict=True)]
    return np.stack(out, 1), pd.DataFrame(chosen)


def _linear_all(store: Store, pooling: str, task: TaskData, settings: Probing) -> tuple[np.ndarray, pd.DataFrame]:
    """(seeds, l, n, c) probabilities, and the losses by layer, seed and epoch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    y, mask = task.y_nc.to(device), task.mask_nc.to(device)
    out, losses = [], []
    for layers, x in _groups(store, pooling, task.rows, settings.memory_gb):
        x = x.to(device)
        fit = linear.fit(x, y, mask, task.split["train"], task.split["validation"], task.kind, settings.seeds,
                         settings.training)
        out.append(fit.probabilities(x).cpu().numpy().swapaxes(0, 1))
        shape = fit.losses.shape
        place = np.indices(shape).reshape(4, -1)
        losses.append(pd.DataFrame({
            "layer": np.array(layers)[place[0]], "seed": np.array(settings.seeds)[place[1]], "epoch": place[2] + 1,
            "split": np.array(["train", "validation"])[place[3]], "loss": fit.losses.numpy().ravel(),
        }))
    return np.concatenate(out, 1), pd.concat(losses)


def _groups(store: Store, pooling: str, rows: np.ndarray, memory_gb: float) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Neighbouring layers of one width, as many as fit the memory, with their features (l, n, d)."""
    names: list[str] = []
    held: list[np.ndarray] = []
    for layer in store.layers_of(pooling):
        x_nd = store[layer, pooling][rows]
        if held and (x_nd.shape != held[0].shape or (len(held) + 1) * x_nd.nbytes > memory_gb * 1e9):
            yield names, torch.from_numpy(np.stack(held))
            names, held = [], []
        names.append(layer)
        held.append(x_nd)
    yield names, torch.from_numpy(np.stack(held))


# ------------------------------------------------------------------------------------------------------------ a store


def probe(store: Store, examples: pd.DataFrame, settings: Probing, folder: Path) -> Results:
    """Probe every layer, pooling and task of a store; what `folder` already holds for these settings is read back.

    Parameters
    ----------
    examples : the table that the store was extracted from
    folder : where the tables go, into a folder of the store's name
    """
    unknown = [name for name in settings.probes if name not in PROBES]
    if unknown:
        raise ValueError(f"unknown probes {unknown}: take names out of {', '.join(PROBES)}")
    if rows_key(store.examples) != rows_key(examples):
        raise ValueError("the store is open for another examples table: open it for this one")
    key = paths.fingerprint(settings, store.key, table_key(examples))
    own = folder / f"{store.folder.parent.name}-{store.folder.name}"
    if (own / "probe.json").exists() and paths.read_json(own / "probe.json")["fingerprint"] == key:
        return Results.read(own, table_key(examples))
    (own / "probe.json").unlink(missing_ok=True)
    done = Results.join(list(_probe_parts(store, examples, settings)))
    done.write(own, table_key(examples))
    paths.write_json(own / "probe.json", {"fingerprint": key, "settings": asdict(settings),
                                          "store": store.record})
    return done


def _probe_parts(store: Store, examples: pd.DataFrame, settings: Probing) -> Iterator[Results]:
    model, control = store.meta["model"], "untrained" if store.meta["untrained"] else "none"
    work = list(product(examples.attrs["tasks"], store.poolings, settings.probes))
    for name, pooling, kind in tqdm(work, desc=f"probing {store.folder.parent.name}", unit="probe"):
        task, layers = TaskData.of(examples, name), store.layers_of(pooling)
        losses = chosen = pd.DataFrame()
        if kind == "logreg":
            p_slnc, chosen = _logreg_all(store, pooling, task, settings)
        else:
            p_slnc, losses = _linear_all(store, pooling, task, settings)
        scored = [chosen]
        for seed, p_lnc in zip(settings.seeds, p_slnc, strict=True):
            scored += [task.score(p_lnc[:, task.split[split].numpy()], split, layers, settings.resamples)
                       .assign(seed=seed) for split in ("validation", "test")]
        labels = {"model": model, "pooling": pooling, "task": name, "probe": kind, "control": control}
        table = pd.concat(scored, ignore_index=True)
        decoder = [layer.startswith("lm.") for layer in layers]
        test = p_slnc[0][decoder][:, task.split["test"].numpy()].astype(np.float16)
        yield Results(table.assign(stage=table.layer.str.partition(".")[0], **labels), losses.assign(**labels), {
            "|".join((model, control, pooling, name, kind)): test})
