"""Where in the image a probe sees its category: local probes applied to every image token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from probekit import paths
from probekit.extraction import loading, shards
from probekit.extraction.settings import suitable_batch_tokens
from probekit.extraction.store import Activations
from probekit.images import load_rgb
from probekit.models import forward
from probekit.models.budget import TokenBudget
from probekit.models.devices import copy_to
from probekit.models.load import Vlm, load_vlm
from probekit.models.processor import PreparedImage
from probekit.models.token_grid import NoTokenGrid, TokenGrid, box_coverage, check_token_grid
from probekit.probes import bootstrap, comparison
from probekit.probes.probing import control_name
from probekit.probes.results import ProbeKey, ProbeResults, StateKey, order_columns
from probekit.probes.weights import ProbeWeights

# Poolings for which a probe's log-odds are the mean of those of single tokens.
POOLINGS = ("mean", "image_mean")

# The metrics that localisation adds to the metrics table, see localisation_table.
METRICS = ("heat_in_boxes", "others_in_boxes", "area_in_boxes", "localisation")

# Images that are looked at to check that tokens lie where the grid puts them.
CHECKED_IMAGES = 4

# Settings of an extraction that its model is loaded with again.
LOADING_SETTINGS = ("revision", "dtype", "untrained", "seed", "trust_remote_code")

# Of what the files hold: files of another version are made again.
VERSION = 3

LEAVE_OUT = 'localise="" leaves it out'


class _NothingToLocalise(ValueError):
    """Too few test images show a category in a box."""


# ---- one image ----


@dataclass(frozen=True)
class HeatMap:
    """What the probes of all layers say of each image token of one example.

    Attributes
    ----------
    logit_ltc : ndarray
        (l, t, c) log-odds of each class. With ``image_mean`` pooling the log-odds of the example
        are the mean over its image tokens, with ``mean`` the mean over image and text tokens.
    cells_t4 : ndarray
        (t, 4) where each token lies, see :class:`probekit.models.token_grid.TokenGrid`.
    """

    logit_ltc: np.ndarray
    cells_t4: np.ndarray

    @cached_property
    def heat_ltc(self) -> np.ndarray:
        """Heat (l, t, c): log-odds above the mean of the image's tokens, 0 for the other tokens."""
        logit_ltc = self.logit_ltc.astype(np.float32)
        return np.maximum(logit_ltc - logit_ltc.mean(1, keepdims=True), 0)


def compute_heat(
    vlm: Vlm,
    prepared: Sequence[PreparedImage],
    *,
    weights: ProbeWeights,
    cells: Sequence[np.ndarray],
    budget: TokenBudget | None = None,
) -> list[HeatMap]:
    """Run images through the model and apply each layer's probe to every image token.

    No hidden states are kept: the probes are applied on the device, in the hooks of the layers.

    Parameters
    ----------
    vlm : Vlm
        The model.
    prepared : sequence of PreparedImage
        Images of one shape; each runs with its first prompt.
    weights : ProbeWeights
        Probes of all decoder layers.
    cells : sequence of ndarray
        (t, 4) where each image's tokens lie.
    budget : TokenBudget or None
        Runs images that do not fit the memory in parts; None leaves that to the caller.

    Returns
    -------
    list of HeatMap
        One per image.
    """
    probes = {}
    for place, layer in enumerate(vlm.layers):
        weight_dc, intercept_c = weights.raw_weights(place)
        probes[layer] = (copy_to(vlm.device, weight_dc), copy_to(vlm.device, intercept_c))

    def run(part: Sequence[PreparedImage]) -> list[np.ndarray]:
        return _read_logits(vlm, part, probes)

    first_prompts = [one.with_prompt(0) for one in prepared]
    if budget is None:
        logits = run(first_prompts)
    else:
        logits = budget.run(
            first_prompts, run, way="plain", join=lambda first, second, _: [*first, *second]
        )
    return [HeatMap(logit_ltc, cells_t4) for logit_ltc, cells_t4 in zip(logits, cells, strict=True)]


def _read_logits(
    vlm: Vlm,
    prepared: Sequence[PreparedImage],
    probes: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> list[np.ndarray]:
    """(l, t, c) log-odds per image; `probes` are (d, c) weights and (c,) intercepts of layers."""
    logits_by_layer: list[torch.Tensor] = []

    def apply_probe(layer: str, hidden_ntd: torch.Tensor) -> None:
        weight_dc, intercept_c = probes[layer]
        logits_by_layer.append(hidden_ntd.float() @ weight_dc + intercept_c)

    forward.read_layers(vlm, prepared, apply_probe)
    logit_lntc = torch.stack(logits_by_layer).cpu().numpy()
    # np.take lays numbers out in their order, as they are written to files.
    return [
        np.take(logit_lntc[:, i], np.flatnonzero(one.image_masks[0]), axis=1)
        for i, one in enumerate(prepared)
    ]


def relative_boxes(instances: pd.DataFrame) -> np.ndarray:
    """Return the boxes of instances of one image in shares of its size.

    Parameters
    ----------
    instances : DataFrame
        With the columns `x`, `y`, `w`, `h`, `width` and `height`, all in pixels.

    Returns
    -------
    ndarray
        (b, 4) left, top, right, bottom.
    """
    right = instances.x + instances.w
    bottom = instances.y + instances.h
    corners_b4 = np.stack([instances.x, instances.y, right, bottom], 1)
    return corners_b4 / instances[["width", "height", "width", "height"]].to_numpy()


class BoxShares(NamedTuple):
    """How much of an image's heat lies in boxes.

    Attributes
    ----------
    heat_lc : ndarray
        (l, c) share of each class's heat that lies in the boxes.
    area : float
        Share of the tokens that lie there.
    """

    heat_lc: np.ndarray
    area: float


def box_shares(heat_map: HeatMap, boxes_b4: np.ndarray) -> BoxShares | None:
    """Measure how much of the heat lies in boxes.

    Parameters
    ----------
    heat_map : HeatMap
        Of one image.
    boxes_b4 : ndarray
        (b, 4) boxes of that image, see :func:`relative_boxes`.

    Returns
    -------
    BoxShares or None
        None if the boxes cover all tokens or none, so that they tell nothing. A class without heat
        has the share 0.
    """
    coverage_t = box_coverage(heat_map.cells_t4, boxes_b4)
    in_image_t = np.isfinite(coverage_t)
    coverage_t = np.nan_to_num(coverage_t)
    if not 0 < coverage_t.sum() < in_image_t.sum():
        return None
    heat_lct = heat_map.heat_ltc.swapaxes(1, 2)
    total_lc = heat_lct @ in_image_t.astype(np.float32)
    inside_lc = heat_lct @ (coverage_t * in_image_t).astype(np.float32)
    share_lc = np.divide(inside_lc, total_lc, out=np.zeros_like(inside_lc), where=total_lc > 0)
    return BoxShares(share_lc, coverage_t.sum() / in_image_t.sum())


def _score_categories(
    heat_map: HeatMap,
    instances: pd.DataFrame,
    *,
    classes: Sequence[str],
    learnable: Sequence[int] | np.ndarray,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the metrics (l,) of each category that the image shows in boxes and probes could learn.

    Categories with a crowd are left out, since no box tells how far a crowd reaches. A category
    that is shown only as a crowd does not count as absent either.
    """
    shown = set(instances.category)
    crowds = set(instances.category[instances.iscrowd != 0])
    absent = [k for k in learnable if classes[k] not in shown]
    if not absent:
        return
    for k in learnable:
        if classes[k] not in shown - crowds:
            continue
        of_category = instances[instances.category == classes[k]]
        shares = box_shares(heat_map, relative_boxes(of_category))
        if shares is None:
            continue
        heat_l = shares.heat_lc[:, k]
        others_l = shares.heat_lc[:, absent].mean(1)
        yield {
            "heat_in_boxes": heat_l,
            "others_in_boxes": others_l,
            "area_in_boxes": np.full(len(others_l), shares.area),
            "localisation": heat_l - others_l,
        }


# ---- the test images of one model ----


def localisation_table(
    scores: Mapping[str, np.ndarray],
    image_n: np.ndarray,
    *,
    layers: Sequence[str],
    resamples: int,
) -> pd.DataFrame:
    """Average over all pairs of image and category, with intervals over images.

    Parameters
    ----------
    scores : mapping of str to ndarray
        (n, l) each of :data:`METRICS` for n pairs of image and category.
    image_n : ndarray
        (n,) the image of each pair.
    layers : sequence of str
        Names of the l layers.
    resamples : int
        Number of bootstrap samples.

    Returns
    -------
    DataFrame
        Rows of the metrics table. `heat_in_boxes` is the share of a category's heat in its boxes,
        `others_in_boxes` the share that the heat of absent categories has there, `area_in_boxes`
        the share of tokens there, and `localisation` the first minus the second, by which the
        layers are compared.
    """
    tables = []
    for metric in METRICS:
        curve = bootstrap.mean_curve(scores[metric], image_n, resamples=resamples)
        lower, upper = bootstrap.bca_interval(curve)
        table = pd.DataFrame(
            {
                "layer": layers,
                "metric": metric,
                "class": "",
                "value": curve.score_l,
                "lo": lower,
                "hi": upper,
                "n": len(image_n),
            }
        )
        if metric == "localisation":
            compared = comparison.compare_layers(curve, layers)
            table = table.merge(compared[["layer", *comparison.COLUMNS]], on="layer")
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


class _Question(NamedTuple):
    """What is asked about the test images, the same for all models."""

    task: str
    classes: Sequence[str]
    instances: pd.DataFrame
    keep: int
    resamples: int


def _localise(
    activations: Activations,
    question: _Question,
    *,
    weights: ProbeWeights,
    device: str | None,
    home: paths.Home,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Run one model over the test images; return its table, and the heat to keep as tensors."""
    layers = [layer for layer in activations.layers if layer.startswith("lm.")]
    examples = activations.examples
    is_wanted = (examples.task == question.task) & (examples.split == "test")
    rows = examples[is_wanted].reset_index(drop=True)
    shown = question.instances[question.instances.image_id.isin(rows.image_id)]
    instances_by_image = dict(iter(shown.groupby("image_id")))
    no_instances = question.instances[:0]
    stored: dict[str, np.ndarray] = {}
    image_n = []
    scores: dict[str, list[np.ndarray]] = {metric: [] for metric in METRICS}
    settings = activations.meta["jobs"][-1] | activations.meta["settings"]
    vlm = _load_model(settings, device, home)
    try:
        heat_maps = _compute_all_heat(vlm, rows, weights=weights, settings=settings, home=home)
        description = f"heat maps of {activations.meta['model']} ({control_name(activations)})"
        for place, heat_map in tqdm(heat_maps, total=len(rows), desc=description, unit="image"):
            image_id = rows.image_id.iloc[place]
            if place < question.keep:
                stored[_tensor_name(image_id, "logit_ltc")] = heat_map.logit_ltc.astype(np.float16)
                stored[_tensor_name(image_id, "cells_t4")] = heat_map.cells_t4
            instances = instances_by_image.get(image_id, no_instances)
            for of_category in _score_categories(
                heat_map,
                instances,
                classes=question.classes,
                learnable=weights.learnable_classes,
            ):
                image_n.append(image_id)
                for metric, score_l in of_category.items():
                    scores[metric].append(score_l)
    finally:
        vlm.release()
    if len(set(image_n)) < 2:
        raise _NothingToLocalise(
            f"no heat maps of {activations.meta['model']}: fewer than two test images show a "
            "category of the task in a box that covers a part of them; more test images may"
        )
    table = localisation_table(
        {metric: np.array(scores_nl) for metric, scores_nl in scores.items()},
        np.array(image_n),
        layers=layers,
        resamples=question.resamples,
    )
    return table, stored


def _load_model(settings: Mapping[str, Any], device: str | None, home: paths.Home) -> Vlm:
    try:
        return load_vlm(
            settings["model"],
            device=device,
            home=home,
            **{name: settings[name] for name in LOADING_SETTINGS},
        )
    except OSError as error:
        raise OSError(f"{error}; heat maps need the model once more: {LEAVE_OUT}") from error


def _compute_all_heat(
    vlm: Vlm,
    rows: pd.DataFrame,
    *,
    weights: ProbeWeights,
    settings: Mapping[str, Any],
    home: paths.Home,
) -> Iterator[tuple[int, HeatMap]]:
    """Yield the place in `rows` and the heat of each example, batch by batch."""
    longest_side = settings["longest_side"]
    items = loading.prepare_images(
        vlm.prompt_processor,
        [shards.model_inputs(rows, home)],
        longest_side=longest_side,
        home=home,
        dtype=vlm.dtype,
    )
    budget = TokenBudget(
        min(settings["batch_tokens"], suitable_batch_tokens(vlm.device)),
        model=vlm.name,
        device=vlm.device,
        fix=LEAVE_OUT,
    )
    batches = loading.fill_batches(items, token_budget=lambda: budget.tokens, way=lambda: "plain")
    grid = TokenGrid(vlm)
    is_checked = False
    for batch in batches:
        places = [int(item.rows[0]) for item in batch]
        prepared = [item.prepared for item in batch]
        images = [load_rgb(home.resolve(rows.file.iloc[place]), longest_side) for place in places]
        if not is_checked:
            check_token_grid(vlm, images[:CHECKED_IMAGES], prompt=rows.prompt.iloc[0])
            is_checked = True
        cells = [grid(one, image.size) for one, image in zip(prepared, images, strict=True)]
        heat_maps = compute_heat(vlm, prepared, weights=weights, cells=cells, budget=budget)
        yield from zip(places, heat_maps, strict=True)


# ---- a run ----


def add_localisation(
    activations_list: Sequence[Activations],
    *,
    results: ProbeResults,
    instances: pd.DataFrame,
    task: str,
    folder: Path,
    keep: int = 100,
    resamples: int = 2000,
    device: str | None = None,
    home: str | Path | paths.Home | None = None,
) -> ProbeResults:
    """Apply the probes of a local task to every image token of all test images.

    The models run once more, over the test images. Heat that `folder` holds for these settings is
    read back. What can have no heat (activations without ``"logreg"`` probes of decoder layers, a
    model whose tokens have no known place in the image, test images without boxes) is passed over
    with a line that says so.

    Parameters
    ----------
    activations_list : sequence of Activations
        Of the run; those of controls of the inputs are passed over.
    results : ProbeResults
        Of the run. The ``"logreg"`` probes of the poolings :data:`POOLINGS` are applied.
    instances : DataFrame
        See :func:`probekit.tasks.building.load_instances`.
    task : str
        Name of a multilabel task whose classes are categories.
    folder : Path
        Folder of the run's results.
    keep : int
        Number of test examples whose heat is stored for the explorer.
    resamples : int
        Number of bootstrap samples.
    device : str, optional
        Where the models run; the best one there is unless it is named.
    home : str, Path or Home, optional
        Where relative files start, see :meth:`probekit.paths.Home.find`.

    Returns
    -------
    ProbeResults
        With the rows of :data:`METRICS` in its metrics, and with the files of the stored heat.

    Raises
    ------
    OSError
        A model cannot be loaded again.
    """
    home = paths.Home.find(home)
    info = results.tasks.get(task)
    if info is None or info.kind != "multilabel" or not set(info.classes) & set(instances.category):
        tqdm.write(f"no heat maps: this run has no task {task!r} about categories of its images")
        return results
    question = _Question(task, info.classes, instances, keep, resamples)
    tables = [results.metrics]
    heat = {}
    for activations in activations_list:
        for pooling in POOLINGS:
            if activations.control != "none" or pooling not in activations.poolings:
                continue
            model = activations.meta["model"]
            key = StateKey(model, control_name(activations), pooling, task)
            weights = results.weights.get(ProbeKey(*key, "logreg"))
            if weights is None:
                name = ", ".join(key)
                tqdm.write(f"no heat maps of {name}: it has no logreg probes of decoder layers")
                continue
            settings = _probe_fingerprint(results, activations)
            version = paths.fingerprint(VERSION, settings, keep, resamples)
            heat_folder = folder / activations.name / f"heat-{pooling}-{task}-{version}"
            reason = _store_heat(
                heat_folder,
                activations,
                question=question,
                weights=weights,
                device=device,
                home=home,
            )
            if reason:
                tqdm.write(reason)
                continue
            table = pd.read_parquet(heat_folder / "localisation.parquet")
            columns = {**key._asdict(), "stage": "lm", "probe": "logreg", "split": "test"}
            tables.append(table.assign(**columns, seed=0, settings=settings))
            heat[key] = home.relative(heat_folder / "heat.safetensors")
    metrics = order_columns(pd.concat(tables, ignore_index=True))
    return replace(results, metrics=metrics, heat=heat)


def _probe_fingerprint(results: ProbeResults, activations: Activations) -> str:
    """Return what the column `settings` says for the probes of these activations."""
    record = paths.fingerprint(activations.record)
    for store in results.stores:
        if paths.fingerprint(store["record"]) == record:
            return store["fingerprint"]
    raise ValueError(f"the results hold no probes of {activations.name}: run 03_probe again")


def _store_heat(
    folder: Path,
    activations: Activations,
    *,
    question: _Question,
    weights: ProbeWeights,
    device: str | None,
    home: paths.Home,
) -> str:
    """Write table and heat to `folder` unless they are there; return why there are none."""
    record = folder / "heat.json"
    if record.exists():
        return paths.read_json(record)["reason"]
    name_without_version = folder.name.rpartition("-")[0]
    for file in folder.parent.glob(f"{name_without_version}-*/*"):
        file.unlink()  # heat of other settings
    reason = ""
    try:
        table, tensors = _localise(activations, question, weights=weights, device=device, home=home)
    except (NoTokenGrid, _NothingToLocalise) as error:
        reason = str(error)
    else:
        paths.write_atomic(folder / "localisation.parquet", table.to_parquet)
        paths.write_atomic(folder / "heat.safetensors", lambda part: save_file(tensors, part))
    paths.write_json(record, {"reason": reason})
    return reason


def _tensor_name(image_id: object, part: str) -> str:
    return f"{image_id}/{part}"


class StoredHeat:
    """The heat maps of a run that were stored for the explorer.

    Parameters
    ----------
    heat : mapping of StateKey to str
        The files, such as :attr:`probekit.probes.results.ProbeResults.heat`; those that are gone
        are passed over.
    home : str, Path or Home, optional
        Where relative files start, see :meth:`probekit.paths.Home.find`.

    Attributes
    ----------
    files : dict of StateKey to Path
        The files that exist.
    """

    def __init__(
        self, heat: Mapping[StateKey, str], home: str | Path | paths.Home | None = None
    ) -> None:
        home = paths.Home.find(home)
        self.files: dict[StateKey, Path] = {}
        self._opened: dict[StateKey, Any] = {}
        self._names: dict[StateKey, set[str]] = {}
        for key, name in heat.items():
            file = home.resolve(name)
            if file.exists():
                self.files[key] = file
                self._opened[key] = safe_open(file, framework="numpy")
                self._names[key] = set(self._opened[key].keys())

    def get(self, key: StateKey, image_id: object) -> HeatMap | None:
        """Return the heat map of a test image, or None where none is stored."""
        logit_name = _tensor_name(image_id, "logit_ltc")
        if logit_name not in self._names.get(key, set()):
            return None
        file = self._opened[key]
        cells_name = _tensor_name(image_id, "cells_t4")
        return HeatMap(file.get_tensor(logit_name), file.get_tensor(cells_name))
