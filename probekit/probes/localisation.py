"""Where in the image a probe finds what it finds: the local probe of each layer, asked of every image token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from probekit import paths
from probekit.extraction import loading, shards
from probekit.extraction.store import Activations
from probekit.images import load_rgb
from probekit.models import forward
from probekit.models.load import Vlm, load_vlm
from probekit.models.processor import PreparedImage
from probekit.models.token_grid import NoTokenGrid, TokenGrid, box_coverage, check_token_grid
from probekit.probes import bootstrap, comparison
from probekit.probes.probing import control_of, folder_of
from probekit.probes.results import COLUMNS, ProbeResults
from probekit.probes.weights import ProbeWeights
from probekit.tasks.base import TaskInfo, task_infos

VERSION = 2
CHECKED = 4  # images that show whether tokens lie where they are drawn
LEAVE_OUT = 'localise="" leaves it out'
POOLINGS = ("mean", "image_mean")  # of these a probe's log-odds are the mean over tokens
METRICS = ("heat_in_boxes", "others_in_boxes", "area_in_boxes", "localisation")


@dataclass(frozen=True)
class HeatMap:
    """What the probes of all layers say of each image token of one example.

    Attributes
    ----------
    logit_ltc : log-odds of each class, (l, t, c); for ``image_mean`` the example's own are their mean over tokens, for
        ``mean`` that over image and text tokens
    cell_t4 : see :class:`probekit.models.token_grid.TokenGrid`
    """

    logit_ltc: np.ndarray
    cell_t4: np.ndarray

    @cached_property
    def above_ltc(self) -> np.ndarray:
        """HeatMap: log-odds above the mean of the image's tokens, 0 for the others."""
        values = self.logit_ltc.astype(np.float32)
        return np.maximum(values - values.mean(1, keepdims=True), 0)


def heat(vlm: Vlm, prepared: Sequence[PreparedImage], linear: ProbeWeights, cells: Sequence[np.ndarray]) -> list[HeatMap]:
    """Run images of one shape, each with its first prompt, and apply each layer's probe to every image token.

    No hidden states are kept: the probes are applied in the layers' hooks, on the device.

    Parameters
    ----------
    cells : where each image's tokens lie
    """
    raw = {layer: [part.to(vlm.device) for part in linear.raw(k)] for k, layer in enumerate(vlm.layers)}
    shown = [torch.from_numpy(np.flatnonzero(one.image_masks[0])).to(vlm.device) for one in prepared]
    logits: list[list[np.ndarray]] = [[] for _ in prepared]

    def take(layer: str, hidden_ntd: torch.Tensor) -> None:
        weight_dc, intercept_c = raw[layer]
        for i, places in enumerate(shown):
            logits[i].append((hidden_ntd[i, places].float() @ weight_dc + intercept_c).cpu().numpy())

    forward.read_layers(vlm, prepared, take)
    return [HeatMap(np.stack(values), cell_t4) for values, cell_t4 in zip(logits, cells, strict=True)]


def boxes_of(instances: pd.DataFrame) -> np.ndarray:
    """(b, 4) left, top, right, bottom of instances of one image, in shares of its size."""
    corners = np.stack([instances.x, instances.y, instances.x + instances.w, instances.y + instances.h], 1)
    return corners / instances[["width", "height", "width", "height"]].to_numpy()


def shares(found: HeatMap, boxes_b4: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Which share of each class's heat lies in the boxes (l, c), and which share of the tokens.

    None where the boxes cover all of the tokens, or none.
    """
    inside_t = box_coverage(found.cell_t4, boxes_b4)
    counts = np.isfinite(inside_t)
    inside_t = np.nan_to_num(inside_t)
    if not 0 < inside_t.sum() < counts.sum():
        return None
    heat = found.above_ltc.swapaxes(1, 2)
    total = heat @ counts.astype(np.float32)
    inside = heat @ (inside_t * counts).astype(np.float32)
    return np.divide(inside, total, out=np.zeros_like(inside), where=total > 0), inside_t.sum() / counts.sum()


# ------------------------------------------------------------------------------------------------------- a whole split


def run(vlm: Vlm, rows: pd.DataFrame, linear: ProbeWeights, longest_side: int | None, batch_tokens: int
        ) -> Iterator[tuple[int, HeatMap]]:
    """The place in `rows` (columns `file`, `prompt`; an image each) and the heat of every example, batch by batch."""
    works = loading.ahead(vlm.prompt_processor, longest_side, [shards.rows_of(rows)], 0)
    grid, checked = TokenGrid(vlm), False
    for batch in loading.batches(works, lambda: batch_tokens, lambda: "plain"):
        images = [load_rgb(paths.Home.find().resolve(rows.file.iloc[work.rows[0]]), longest_side) for work in batch]
        if not checked:
            check_token_grid(vlm, images[:CHECKED], rows.prompt.iloc[0])
            checked = True
        prepared = [work.prepared for work in batch]
        cells = [grid(one, image.size) for one, image in zip(prepared, images, strict=True)]
        for work, one in zip(batch, heat(vlm, prepared, linear, cells), strict=True):
            yield int(work.rows[0]), one


def table(found: dict[str, np.ndarray], image_n: np.ndarray, layers: Sequence[str], resamples: int) -> pd.DataFrame:
    """Means over all pairs of image and category, with intervals over images, in the columns of the metrics table.

    Parameters
    ----------
    found : by metric, (n pairs, l)
    image_n : (n,) which image a pair belongs to
    """
    names, number = np.unique(image_n, return_inverse=True)
    rows = []
    for metric in METRICS:
        counts = np.zeros((len(names), len(layers), 2))
        np.add.at(counts, number, np.stack([found[metric], np.ones_like(found[metric])], -1))
        curve = bootstrap.bootstrap_curve(counts, names, lambda total: total[..., 0] / total[..., 1].clip(1e-9), resamples)
        lo, hi = bootstrap.bca_interval(curve)
        row = pd.DataFrame({"layer": layers, "metric": metric, "class": "", "value": curve.score_l, "lo": lo, "hi": hi,
                            "n": len(image_n)})
        if metric == "localisation":
            row = row.merge(comparison.compare_layers(curve, layers)[["layer", *comparison.COLUMNS]], on="layer")
        rows.append(row)
    return pd.concat(rows, ignore_index=True)


def _localise(store: Activations, rows: pd.DataFrame, classes: Sequence[str], instances: pd.DataFrame, linear: ProbeWeights,
              keep: int, resamples: int, device: str | None) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The table of one store and task, and the heat of the first `keep` examples, by ``"<image_id>|<part>"``."""
    kept, image_n, layers = {}, [], [layer for layer in store.layers if layer.startswith("lm.")]
    found: dict[str, list[np.ndarray]] = {metric: [] for metric in METRICS}
    there, nothing = dict([*instances[instances.image_id.isin(rows.image_id)].groupby("image_id")]), instances[:0]
    about = store.meta["settings"]
    try:
        vlm = load_vlm(about["model"], about["revision"], about["dtype"], device, about["untrained"], about["seed"],
                       about["trust_remote_code"])
    except OSError as error:
        raise OSError(f"{error}; for heat maps the model runs once more: {LEAVE_OUT}") from error
    try:
        seen = run(vlm, rows, linear, about["longest_side"], about["batch_tokens"])
        for place, one in tqdm(seen, total=len(rows), desc=f"{store.folder.parent.name}: where", unit="image"):
            image = rows.image_id.iloc[place]
            if place < keep:
                kept |= {f"{image}|logit": one.logit_ltc.astype(np.float16), f"{image}|cell": one.cell_t4}
            for told in _pairs(one, there.get(image, nothing), classes, linear.learnt):
                image_n.append(image)
                for metric, values in told.items():
                    found[metric].append(values)
    finally:
        vlm.release()
    if len(set(image_n)) < 2:
        raise ValueError("fewer than two test images show a category of the task in a box that covers a part of them: "
                         f"take more test images; {LEAVE_OUT}")
    return table({metric: np.array(values) for metric, values in found.items()}, np.array(image_n), layers,
                 resamples), kept


def _pairs(found: HeatMap, own: pd.DataFrame, classes: Sequence[str], learnt: np.ndarray
           ) -> Iterator[dict[str, np.ndarray]]:
    """The metrics by layer (l,) of each category that an image shows in boxes, and that probes could learn.

    Categories with a crowd, whose extent no box tells, are passed over; what is shown as a crowd alone is not absent.
    """
    shown, crowds = set(own.category), set(own.category[own.iscrowd != 0])
    absent = [k for k in learnt if classes[k] not in shown]
    for k in [k for k in learnt if classes[k] in shown - crowds]:
        told = shares(found, boxes_of(own[own.category == classes[k]]))
        if told and absent:
            share_lc, area = told
            others = share_lc[:, absent].mean(1)
            yield {"heat_in_boxes": share_lc[:, k], "others_in_boxes": others,
                   "area_in_boxes": np.full(len(others), area), "localisation": share_lc[:, k] - others}


def _made(own: Path, make: Callable[[], tuple[pd.DataFrame, dict[str, np.ndarray]]]) -> str:
    """Make table and heat and write them to `own`, where they are not there yet; the reason where there is nothing."""
    if not (own / "heat.json").exists():
        for older in own.parent.glob(f"{own.name.rpartition('-')[0]}-*/*"):
            older.unlink()
        nothing = ""
        try:
            told, kept = make()
            paths.write_atomic(own / "localisation.parquet", told.to_parquet)
            paths.write_atomic(own / "heat.safetensors", lambda part: save_file(kept, part))
        except NoTokenGrid as error:
            nothing = str(error)
        paths.write_json(own / "heat.json", {"nothing": nothing})
    return paths.read_json(own / "heat.json")["nothing"]


def add_localisation(stores: Sequence[Activations], examples: pd.DataFrame, instances: pd.DataFrame, task: str, whole: ProbeResults,
             folder: Path, keep: int = 100, resamples: int = 2000, device: str | None = None) -> ProbeResults:
    """Ask the probes of a local task of every image token of all test images; what `folder` holds is read back.

    The models run once more, over the test images. What has no heat (a model whose tokens have no known place in the
    image, a store without "logreg" probes of decoder layers) is passed over with a line that says so.

    Parameters
    ----------
    stores : of the run; those of input controls are passed over
    instances : see :func:`probekit.tasks.building.load_instances`
    task : name of a multilabel task whose classes are categories
    whole : results of the run, with its "logreg" probes; poolings :data:`POOLINGS` are read
    folder : of the run's results
    keep : test examples whose heat is stored for the explorer

    Returns
    -------
    ProbeResults
        With the rows of :data:`METRICS` added to its metrics, and the files of the kept heat.
    """
    about = task_infos(examples).get(task, TaskInfo("", (), ""))
    if about.kind != "multilabel" or not set(about.classes) & set(instances.category):
        tqdm.write(f"no heat maps: this run has no task {task!r} about categories of its images")
        return whole
    rows = examples[(examples.task == task) & (examples.split == "test")].reset_index(drop=True)
    tables, files = [], {}
    fingerprints = {paths.fingerprint(one["record"]): one["fingerprint"] for one in whole.stores}
    for store, pooling in product([store for store in stores if store.control == "none"], POOLINGS):
        model, control = store.meta["model"], control_of(store)
        key = "|".join((model, control, pooling, task))
        if pooling not in store.poolings:
            continue
        if f"{key}|weight_ldc" not in whole.linear:
            tqdm.write(f"no heat maps of {key}: it has no logreg probes of decoder layers")
            continue
        settings = fingerprints[paths.fingerprint(store.record)]
        made_as = paths.fingerprint(VERSION, settings, keep, resamples)
        own = folder_of(store, folder) / f"heat-{pooling}-{task}-{made_as}"
        if nothing := _made(own, partial(_localise, store, rows, about.classes, instances, whole.probes(key), keep,
                                         resamples, device)):
            tqdm.write(nothing)
            continue
        tables.append(pd.read_parquet(own / "localisation.parquet").assign(
            model=model, control=control, pooling=pooling, task=task, stage="lm", probe="logreg", split="test", seed=0,
            settings=settings))
        files[key] = paths.Home.find().relative(own / "heat.safetensors")
    metrics = pd.concat([whole.metrics, *tables], ignore_index=True)[COLUMNS].astype({"plateau": "boolean"})
    return replace(whole, metrics=metrics, heat=files)


class StoredHeat:
    """The stored heat of a run's inspection set.

    Parameters
    ----------
    files : by ``"<model>|<control>|<pooling>|<task>"``; those that are gone are passed over
    """

    def __init__(self, files: Mapping[str, str]):
        there = {key: paths.Home.find().resolve(file) for key, file in files.items() if paths.Home.find().resolve(file).exists()}
        self.files = {key: safe_open(file, framework="numpy") for key, file in there.items()}
        self.names = {key: set(file.keys()) for key, file in self.files.items()}

    def get(self, key: str, image_id: int) -> HeatMap | None:
        """The heat of a test image; None where none is stored."""
        if f"{image_id}|logit" not in self.names.get(key, ()):
            return None
        file = self.files[key]
        return HeatMap(file.get_tensor(f"{image_id}|logit"), file.get_tensor(f"{image_id}|cell"))
