"""Where in the image a probe finds what it finds: the local probe of each layer, asked of every image token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from probekit import coco, compare, forward, loading, parts, paths
from probekit.grid import Grid, NoGrid, check, covered
from probekit.linear import Linear
from probekit.models import Vlm, load_vlm
from probekit.prepare import Prepared
from probekit.probe import control_of, folder_of
from probekit.results import COLUMNS, Results
from probekit.store import Store
from probekit.tasks import table_key

VERSION = 1
POOLINGS = ("mean", "image_mean")  # of these a probe's log-odds are the mean over tokens
METRICS = ("heat_in_boxes", "others_in_boxes", "area_in_boxes", "localisation")


@dataclass(frozen=True)
class Heat:
    """What the probes of all layers say of each image token of one example.

    Attributes
    ----------
    logit_ltc : log-odds of each class, (l, t, c); for mean-pooled probes the example's own are their mean over tokens
    cell_t4 : see :class:`probekit.grid.Grid`
    """

    logit_ltc: np.ndarray
    cell_t4: np.ndarray

    def above(self, c: int) -> np.ndarray:
        """(l, t) heat of a class: its log-odds above the mean of the image's tokens, 0 for the others."""
        values = self.logit_ltc[:, :, c].astype(np.float32)
        return np.maximum(values - values.mean(1, keepdims=True), 0)


def heat(vlm: Vlm, prepared: Sequence[Prepared], linear: Linear, cells: Sequence[np.ndarray]) -> list[Heat]:
    """Run images of one shape, each with its first prompt, and apply each layer's probe to every image token.

    No hidden states are kept: the probes are applied in the layers' hooks, on the device.

    Parameters
    ----------
    cells : where each image's tokens lie
    """
    raw = {layer: [part.to(vlm.device) for part in linear.raw(k)] for k, layer in enumerate(vlm.layers)}
    shown = [torch.from_numpy(np.flatnonzero(one.shown[0])).to(vlm.device) for one in prepared]
    logits: list[list[np.ndarray]] = [[] for _ in prepared]

    def take(layer: str, hidden_ntd: torch.Tensor) -> None:
        weight_dc, intercept_c = raw[layer]
        for i, places in enumerate(shown):
            logits[i].append((hidden_ntd[i, places].float() @ weight_dc + intercept_c).cpu().numpy())

    forward.read(vlm, prepared, take)
    return [Heat(np.stack(values), cell_t4) for values, cell_t4 in zip(logits, cells, strict=True)]


def boxes_of(instances: pd.DataFrame) -> np.ndarray:
    """(b, 4) left, top, right, bottom of instances of one image, in shares of its size."""
    corners = np.stack([instances.x, instances.y, instances.x + instances.w, instances.y + instances.h], 1)
    return corners / instances[["width", "height", "width", "height"]].to_numpy()


def shares(found: Heat, c: int, absent: Sequence[int], boxes_b4: np.ndarray) -> dict[str, np.ndarray] | None:
    """Which share of a class's heat lies in its boxes, by layer (l,); None where the boxes cover all or no tokens.

    Parameters
    ----------
    absent : classes that the image does not show: their heat in the same boxes is what any probe would find there,
        because objects stand out from a background, whatever they are
    """
    inside_t = covered(found.cell_t4, boxes_b4)
    counts = np.isfinite(inside_t)
    inside_t = np.nan_to_num(inside_t)
    if not 0 < inside_t.sum() < counts.sum():
        return None

    def share(k: int) -> np.ndarray:
        heat_lt = found.above(k) * counts
        return heat_lt @ inside_t / heat_lt.sum(1).clip(1e-12)

    own, area = share(c), inside_t.sum() / counts.sum()
    others = np.mean([share(k) for k in absent], 0) if len(absent) else np.full(len(own), area)
    return {"heat_in_boxes": own, "others_in_boxes": others, "area_in_boxes": np.full(len(own), area),
            "localisation": own - others}


# ------------------------------------------------------------------------------------------------------- a whole split


def run(vlm: Vlm, rows: pd.DataFrame, linear: Linear, longest_side: int | None, batch_tokens: int
        ) -> Iterator[tuple[int, Heat]]:
    """The place in `rows` (columns `file`, `prompt`; an image each) and the heat of every example, batch by batch."""
    works = loading.ahead(vlm.preparer, longest_side, [parts.rows_of(rows)], 0)
    grid, first = Grid(vlm), True
    for batch in loading.batches(works, batch_tokens, lambda: "plain"):
        images = [coco.load_rgb(paths.resolve(rows.file.iloc[work.rows[0]]), longest_side) for work in batch]
        if first:
            check(vlm, images[0], rows.prompt.iloc[0])
            first = False
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
        curve = compare.resample(counts, names, lambda total: total[..., 0] / total[..., 1].clip(1e-9), resamples)
        lo, hi = compare.bca(curve)
        row = pd.DataFrame({"layer": layers, "metric": metric, "class": "", "value": curve.score_l, "lo": lo, "hi": hi,
                            "n": len(image_n)})
        if metric == "localisation":
            row = row.merge(compare.layers(curve, layers)[["layer", *compare.COLUMNS]], on="layer")
        rows.append(row)
    return pd.concat(rows, ignore_index=True)


def _localise(store: Store, rows: pd.DataFrame, classes: Sequence[str], instances: pd.DataFrame, linear: Linear,
              keep: int, resamples: int, device: str | None) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The table of one store and task, and the heat of the first `keep` examples, by ``"<image_id>|<part>"``."""
    about = store.meta["settings"]
    vlm = load_vlm(about["model"], about["revision"], about["dtype"], device, about["untrained"], about["seed"])
    boxes, kept, image_n = dict([*instances[instances.iscrowd == 0].groupby("image_id")]), {}, []
    found: dict[str, list[np.ndarray]] = {metric: [] for metric in METRICS}
    name = f"{store.folder.parent.name}: where in the image"
    try:
        seen = run(vlm, rows, linear, about["longest_side"], about["batch_tokens"])
        for place, one in tqdm(seen, total=len(rows), desc=name, unit="image"):
            image = rows.image_id.iloc[place]
            if place < keep:
                kept |= {f"{image}|logit": one.logit_ltc.astype(np.float16), f"{image}|cell": one.cell_t4}
            own = boxes.get(image, instances[:0])
            absent = [k for k, name in enumerate(classes) if name not in set(own.category)]
            for category, of_it in own[own.category.isin(classes)].groupby("category"):
                told = shares(one, list(classes).index(category), absent, boxes_of(of_it))
                for metric, values in (told or {}).items():
                    found[metric].append(values)
                image_n += [image] * (told is not None)
    finally:
        vlm.release()
    if len(set(image_n)) < 2:
        raise ValueError("fewer than two test images show a category whose boxes cover a part of them: take more")
    layers = [layer for layer in store.layers if layer.startswith("lm.")]
    return table({metric: np.array(values) for metric, values in found.items()}, np.array(image_n), layers,
                 resamples), kept


def localise(stores: Sequence[Store], examples: pd.DataFrame, instances: pd.DataFrame, task: str, whole: Results,
             folder: Path, keep: int = 100, resamples: int = 2000, device: str | None = None) -> Results:
    """Ask the probes of a local task of every image token of all test images; what `folder` holds is read back.

    The models run once more, over the test images. A model whose tokens have no known place in the image is passed over
    with a line that says so.

    Parameters
    ----------
    stores : of the run; those of input controls are passed over
    instances : see :func:`probekit.tasks.instances`
    task : name of a multilabel task whose classes are categories
    whole : results of the run, with its "logreg" probes; poolings :data:`POOLINGS` are read
    folder : of the run's results: `heat.json` there names the files with the kept heat
    keep : test examples whose heat is stored for the explorer

    Returns
    -------
    Results
        With the rows of :data:`METRICS` added to its metrics.
    """
    rows = examples[(examples.task == task) & (examples.split == "test")].reset_index(drop=True)
    classes, tables, files = examples.attrs["tasks"][task]["classes"], [], {}
    for store in [store for store in stores if store.control == "none"]:
        for pooling in [name for name in store.poolings if name in POOLINGS]:
            key = "|".join((store.meta["model"], control_of(store), pooling, task))
            own = folder_of(store, folder) / f"heat-{pooling}-{task}"
            made_as = paths.fingerprint(VERSION, paths.read_json(own.parent / "probe.json")["fingerprint"], keep,
                                        resamples, table_key(examples))
            record = own / "heat.json"
            if not (record.exists() and paths.read_json(record)["fingerprint"] == made_as):
                record.unlink(missing_ok=True)
                try:
                    told, kept = _localise(store, rows, classes, instances, whole.probes(key), keep, resamples, device)
                except NoGrid as error:
                    tqdm.write(str(error))
                    continue
                paths.write_atomic(own / "localisation.parquet", told.to_parquet)
                paths.write_atomic(own / "heat.safetensors", lambda part, kept=kept: save_file(kept, part))
                paths.write_json(record, {"fingerprint": made_as})
            model, control, *_ = key.split("|")
            tables.append(pd.read_parquet(own / "localisation.parquet").assign(
                model=model, control=control, pooling=pooling, task=task, stage="lm", probe="logreg", split="test",
                seed=0))
            files[key] = paths.relative(own / "heat.safetensors")
    paths.write_json(folder / "heat.json", {"files": files})
    metrics = pd.concat([whole.metrics, *tables], ignore_index=True)[COLUMNS].astype({"plateau": "boolean"})
    return replace(whole, metrics=metrics)


class Kept:
    """The stored heat of a run's inspection set.

    Parameters
    ----------
    folder : of the run's results
    """

    def __init__(self, folder: Path):
        record = folder / "heat.json"
        files = paths.read_json(record)["files"] if record.exists() else {}
        self.files = {key: safe_open(paths.resolve(file), framework="numpy") for key, file in files.items()}
        self.names = {key: set(file.keys()) for key, file in self.files.items()}

    def get(self, key: str, image_id: int) -> Heat | None:
        """The heat of a test image for ``"<model>|<control>|<pooling>|<task>"``; None where none is stored."""
        file = self.files.get(key)
        if file is None or f"{image_id}|logit" not in self.names[key]:
            return None
        return Heat(file.get_tensor(f"{image_id}|logit"), file.get_tensor(f"{image_id}|cell"))
