"""Where in the image a category is seen: local probes, and the lens, applied to image tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from probekit.extraction.reloading import reload_model
from probekit.extraction.settings import suitable_batch_tokens
from probekit.extraction.store import Activations
from probekit.images import load_rgb
from probekit.models import forward
from probekit.models.budget import TokenBudget
from probekit.models.load import Vlm
from probekit.models.output_head import NoAnswers
from probekit.models.processor import PreparedImage
from probekit.models.token_grid import NoTokenGrid, TokenGrid, box_coverage, check_token_grid
from probekit.probes import bootstrap, comparison
from probekit.probes.probing import control_name
from probekit.probes.results import LENS, ProbeKey, ProbeResults, order_columns
from probekit.probes.token_readers import LensReader, ProbeReader, TokenReader
from probekit.probes.weights import ProbeWeights

# Poolings for which a probe's log-odds are the mean of those of single tokens.
POOLINGS = ("mean", "image_mean")

# What the column `pooling` says for the lens, which reads each token by itself.
NOT_POOLED = "none"

# The metrics that localisation adds to the metrics table, see localisation_table.
METRICS = ("heat_in_boxes", "others_in_boxes", "area_in_boxes", "localisation")

# Images that are looked at to check that tokens lie where the grid puts them.
CHECKED_IMAGES = 4

# Of what the files hold: files of another version are made again.
VERSION = 4

LEAVE_OUT = 'localise="" leaves it out'
NEEDS_MODEL = f"heat maps need the model once more: {LEAVE_OUT}"


class _NothingToLocalise(ValueError):
    """Too few test images show a category in a box."""


# ---- one image ----


@dataclass(frozen=True)
class HeatMap:
    """What is read off each image token of one example, at all layers.

    Attributes
    ----------
    logit_ltc : ndarray
        (l, t, c) of each class: log-odds of a probe, log-probabilities of the lens. With
        ``image_mean`` pooling the log-odds of the example are the mean over its image tokens, with
        ``mean`` the mean over image and text tokens.
    cells_t4 : ndarray
        (t, 4) where each token lies, see :class:`probekit.models.token_grid.TokenGrid`.
    """

    logit_ltc: np.ndarray
    cells_t4: np.ndarray

    @cached_property
    def heat_ltc(self) -> np.ndarray:
        """Heat (l, t, c): how far a token is above the mean of the image's tokens, else 0."""
        logit_ltc = self.logit_ltc.astype(np.float32)
        return np.maximum(logit_ltc - logit_ltc.mean(1, keepdims=True), 0)


def compute_heat(
    vlm: Vlm,
    prepared: Sequence[PreparedImage],
    *,
    readers: Sequence[TokenReader],
    cells: Sequence[np.ndarray],
    budget: TokenBudget | None = None,
) -> list[list[HeatMap]]:
    """Run images through the model and read every image token at each layer.

    No hidden states are kept: tokens are read on the device, in the hooks of the layers.

    Parameters
    ----------
    vlm : Vlm
        The model.
    prepared : sequence of PreparedImage
        Images of one shape; each runs with its first prompt.
    readers : sequence of TokenReader
        Who reads the tokens; the images run once for all of them.
    cells : sequence of ndarray
        (t, 4) where each image's tokens lie.
    budget : TokenBudget or None
        Runs images that do not fit the memory in parts; None leaves that to the caller.

    Returns
    -------
    list of list of HeatMap
        For each image one per reader.
    """

    def run(part: Sequence[PreparedImage]) -> list[list[np.ndarray]]:
        return _read_tokens(vlm, part, readers)

    first_prompts = [one.with_prompt(0) for one in prepared]
    if budget is None:
        logits_by_image = run(first_prompts)
    else:
        logits_by_image = budget.run(
            first_prompts, run, way="plain", join=lambda first, second, _: [*first, *second]
        )
    return [
        [HeatMap(logit_ltc, cells_t4) for logit_ltc in logits]
        for logits, cells_t4 in zip(logits_by_image, cells, strict=True)
    ]


def _read_tokens(
    vlm: Vlm, prepared: Sequence[PreparedImage], readers: Sequence[TokenReader]
) -> list[list[np.ndarray]]:
    """Return what each reader reads, (l, t, c), image by image."""
    by_layer: list[list[torch.Tensor]] = [[] for _ in readers]

    def read(layer: str, hidden_ntd: torch.Tensor) -> None:
        for reader, read_so_far in zip(readers, by_layer, strict=True):
            read_so_far.append(reader(layer, hidden_ntd))

    forward.read_layers(vlm, prepared, read)
    of_readers = [torch.stack(layers).cpu().numpy() for layers in by_layer]
    # np.take lays numbers out in their order, as they are written to files.
    return [
        [
            np.take(read_lntc[:, i], np.flatnonzero(one.image_masks[0]), axis=1)
            for read_lntc in of_readers
        ]
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


class _Shown(NamedTuple):
    """What an image shows: the boxes (b, 4) of each category, and which of them have a crowd."""

    boxes: dict[str, np.ndarray]
    crowds: set[str]


NOTHING_SHOWN = _Shown({}, set())


def _shown_by_image(instances: pd.DataFrame) -> dict[Any, _Shown]:
    boxes: dict[Any, dict[str, list[np.ndarray]]] = {}
    crowds: dict[Any, set[str]] = {}
    columns = (instances.image_id, instances.category, instances.iscrowd != 0)
    for image_id, category, is_crowd, box_4 in zip(
        *columns, relative_boxes(instances), strict=True
    ):
        boxes.setdefault(image_id, {}).setdefault(category, []).append(box_4)
        of_image = crowds.setdefault(image_id, set())
        if is_crowd:
            of_image.add(category)
    return {
        image_id: _Shown(
            {category: np.stack(boxes_b4) for category, boxes_b4 in by_category.items()},
            crowds[image_id],
        )
        for image_id, by_category in boxes.items()
    }


def _score_categories(
    heat_map: HeatMap,
    shown: _Shown,
    *,
    classes: Sequence[str],
    readable: Sequence[int] | np.ndarray,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the metrics (l,) of each category that the image shows in boxes and can be read.

    Categories with a crowd are left out, since no box tells how far a crowd reaches. A category
    that is shown only as a crowd does not count as absent either.
    """
    absent = [k for k in readable if classes[k] not in shown.boxes]
    if not absent:
        return
    for k in readable:
        category = classes[k]
        if category not in shown.boxes or category in shown.crowds:
            continue
        shares = box_shares(heat_map, shown.boxes[category])
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


@dataclass(frozen=True)
class _Heat:
    """Heat that is wanted: who reads the tokens of a model, and where the result goes.

    `weights` are those of the probes; None for the lens.
    """

    key: ProbeKey
    folder: Path
    weights: ProbeWeights | None

    @property
    def record(self) -> Path:
        return self.folder / "heat.json"

    @property
    def file(self) -> Path:
        return self.folder / "heat.safetensors"

    @property
    def table(self) -> Path:
        return self.folder / "localisation.parquet"

    def write(self, table: pd.DataFrame, stored: dict[str, np.ndarray]) -> None:
        """Write the metrics, and the heat to keep as tensors."""
        paths.write_atomic(self.table, table.to_parquet)
        paths.write_atomic(self.file, lambda part: save_file(stored, part))
        paths.write_json(self.record, {"reason": ""})

    def refuse(self, reason: str) -> None:
        """Write down why there is none, so that it is not tried again."""
        paths.write_json(self.record, {"reason": reason})

    def forget_others(self) -> None:
        """Remove the heat of other settings."""
        name_without_version = self.folder.name.rpartition("-")[0]
        for file in self.folder.parent.glob(f"{name_without_version}-*/*"):
            file.unlink()


class _Scores:
    """Collects what one reader's heat maps score, and those that are stored."""

    def __init__(self, reader: TokenReader) -> None:
        self.reader = reader
        self.stored: dict[str, np.ndarray] = {}
        self._image_n: list[Any] = []
        self._scores: dict[str, list[np.ndarray]] = {metric: [] for metric in METRICS}

    def add(
        self,
        heat_map: HeatMap,
        image_id: Any,
        shown: _Shown,
        *,
        classes: Sequence[str],
        keep: bool,
    ) -> None:
        """Score one image, and keep its heat map where it is to be stored."""
        if keep:
            self.stored[_tensor_name(image_id, "logit_ltc")] = heat_map.logit_ltc.astype(np.float16)
            self.stored[_tensor_name(image_id, "cells_t4")] = heat_map.cells_t4
        for of_category in _score_categories(
            heat_map, shown, classes=classes, readable=self.reader.readable
        ):
            self._image_n.append(image_id)
            for metric, score_l in of_category.items():
                self._scores[metric].append(score_l)

    def table(self, layers: Sequence[str], *, model: str, resamples: int) -> pd.DataFrame:
        """Return the metrics.

        Raises
        ------
        _NothingToLocalise
            There are too few pairs of image and category.
        """
        if len(set(self._image_n)) < 2:
            raise _NothingToLocalise(
                f"no heat maps of {model}: fewer than two test images show a category that "
                "can be read in a box that covers a part of them; more test images may"
            )
        return localisation_table(
            {metric: np.array(scores_nl) for metric, scores_nl in self._scores.items()},
            np.array(self._image_n),
            layers=layers,
            resamples=resamples,
        )


def _localise(
    activations: Activations,
    question: _Question,
    wanted: Sequence[_Heat],
    *,
    device: str | None,
    home: paths.Home,
) -> None:
    """Run one model over the test images, and write the heat of all who read its tokens."""
    layers = [layer for layer in activations.layers if layer.startswith("lm.")]
    model = activations.meta["model"]
    examples = activations.examples
    is_wanted = (examples.task == question.task) & (examples.split == "test")
    rows = examples[is_wanted].reset_index(drop=True)
    is_of_test = question.instances.image_id.isin(rows.image_id)
    shown_by_image = _shown_by_image(question.instances[is_of_test])
    settings = activations.meta["jobs"][-1] | activations.meta["settings"]
    scores: dict[ProbeKey, _Scores] = {}
    with_lens = any(heat.weights is None for heat in wanted)
    vlm = reload_model(settings, home=home, device=device, with_head=with_lens, remedy=NEEDS_MODEL)

    def make_readers(prepared: PreparedImage) -> list[TokenReader]:
        for heat in wanted:
            try:
                scores[heat.key] = _Scores(_make_reader(heat, vlm, question.classes, prepared))
            except NoAnswers as error:
                heat.refuse(f"no heat maps of the lens of {model}: {error}")
        return [of_reader.reader for of_reader in scores.values()]

    try:
        all_heat = _compute_all_heat(vlm, rows, make_readers, settings=settings, home=home)
        description = f"heat maps of {model} ({control_name(activations)})"
        for place, heat_maps in tqdm(all_heat, total=len(rows), desc=description, unit="image"):
            image_id = rows.image_id.iloc[place]
            shown = shown_by_image.get(image_id, NOTHING_SHOWN)
            for heat_map, of_reader in zip(heat_maps, scores.values(), strict=True):
                of_reader.add(
                    heat_map,
                    image_id,
                    shown,
                    classes=question.classes,
                    keep=place < question.keep,
                )
    finally:
        vlm.release()
    for heat in wanted:
        if heat.key in scores:
            of_reader = scores[heat.key]
            try:
                table = of_reader.table(layers, model=model, resamples=question.resamples)
            except _NothingToLocalise as error:
                heat.refuse(str(error))
            else:
                heat.write(table, of_reader.stored)


def _make_reader(
    heat: _Heat, vlm: Vlm, classes: Sequence[str], prepared: PreparedImage
) -> TokenReader:
    if heat.weights is None:
        return LensReader.of(vlm, classes, prepared)
    return ProbeReader(heat.weights, vlm)


def _compute_all_heat(
    vlm: Vlm,
    rows: pd.DataFrame,
    make_readers: Callable[[PreparedImage], list[TokenReader]],
    *,
    settings: Mapping[str, Any],
    home: paths.Home,
) -> Iterator[tuple[int, list[HeatMap]]]:
    """Yield the place in `rows` of each example and the heat that each reader finds there."""
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
    readers: list[TokenReader] | None = None
    for batch in batches:
        places = [int(item.rows[0]) for item in batch]
        prepared = [item.prepared for item in batch]
        images = [load_rgb(home.resolve(rows.file.iloc[place]), longest_side) for place in places]
        if readers is None:
            check_token_grid(vlm, images[:CHECKED_IMAGES], prompt=rows.prompt.iloc[0])
            readers = make_readers(prepared[0].with_prompt(0))
            if not readers:
                return
        cells = [grid(one, image.size) for one, image in zip(prepared, images, strict=True)]
        heat_maps = compute_heat(vlm, prepared, readers=readers, cells=cells, budget=budget)
        yield from zip(places, heat_maps, strict=True)


# ---- a run ----


def add_localisation(
    activations: Activations,
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
    """Apply the probes of a local task, and the lens, to every image token of all test images.

    The model runs once more, over the test images. Heat that `folder` holds for these settings is
    read back. What can have no heat (activations without ``"logreg"`` probes of decoder layers, a
    model whose tokens have no known place in the image, test images without boxes, a lens without
    words) is passed over with a line that says so.

    Parameters
    ----------
    activations : Activations
        Of a model, trained or not, with its true inputs.
    results : ProbeResults
        Of these activations. The ``"logreg"`` probes of the poolings :data:`POOLINGS` are applied.
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
        Where the model runs; the best one there is unless it is named.
    home : str, Path or Home, optional
        Where relative files start, see :meth:`probekit.paths.Home.find`.

    Returns
    -------
    ProbeResults
        With the rows of :data:`METRICS` in its metrics, and with the files of the stored heat.

    Raises
    ------
    OSError
        The model cannot be loaded again.
    """
    home = paths.Home.find(home)
    info = results.tasks.get(task)
    if info is None or info.kind != "multilabel" or not set(info.classes) & set(instances.category):
        model = activations.meta["model"]
        tqdm.write(
            f"no heat maps of {model} ({control_name(activations)}): this run has no task {task!r} "
            "about categories of its images"
        )
        return results
    question = _Question(task, info.classes, instances, keep, resamples)
    tables = [results.metrics]
    heat_files = {}
    wanted = _wanted_heat(activations, results, question=question, folder=folder)
    _make_missing(activations, wanted, question=question, device=device, home=home)
    for heat in wanted:
        reason = paths.read_json(heat.record)["reason"]
        if reason:
            tqdm.write(reason)
            continue
        table = pd.read_parquet(heat.table)
        table = table.assign(**heat.key._asdict(), stage="lm", split="test", seed=0)
        tables.append(table.assign(settings=_probe_fingerprint(results, activations)))
        heat_files[heat.key] = home.relative(heat.file)
    metrics = order_columns(pd.concat(tables, ignore_index=True))
    return replace(results, metrics=metrics, heat=heat_files)


def _wanted_heat(
    activations: Activations, results: ProbeResults, *, question: _Question, folder: Path
) -> list[_Heat]:
    """Return who is to read the tokens of a model: its probes, and the lens."""
    wanted = []
    model = activations.meta["model"]
    control = control_name(activations)
    version = paths.fingerprint(
        VERSION, _probe_fingerprint(results, activations), question.keep, question.resamples
    )
    for pooling in POOLINGS:
        if pooling not in activations.poolings:
            continue
        key = ProbeKey(model, control, pooling, question.task, "logreg")
        weights = results.weights.get(key)
        if weights is None:
            tqdm.write(
                f"no heat maps of {', '.join(key.state)}: it has no logreg probes of decoder layers"
            )
            continue
        name = f"heat-{pooling}-{question.task}-{version}"
        wanted.append(_Heat(key, folder / activations.name / name, weights))
    if "lm" in activations.stages:
        key = ProbeKey(model, control, NOT_POOLED, question.task, LENS)
        name = f"heat-{LENS}-{question.task}-{version}"
        wanted.append(_Heat(key, folder / activations.name / name, None))
    return wanted


def _make_missing(
    activations: Activations,
    wanted: Sequence[_Heat],
    *,
    question: _Question,
    device: str | None,
    home: paths.Home,
) -> None:
    """Make the heat that is not on disk, or write down why there is none."""
    missing = [heat for heat in wanted if not heat.record.exists()]
    if not missing:
        return
    for heat in missing:
        heat.forget_others()
    try:
        _localise(activations, question, missing, device=device, home=home)
    except NoTokenGrid as error:
        for heat in missing:
            heat.refuse(str(error))


def _probe_fingerprint(results: ProbeResults, activations: Activations) -> str:
    """Return what the column `settings` says for the probes of these activations."""
    record = paths.fingerprint(activations.record)
    for store in results.stores:
        if paths.fingerprint(store["record"]) == record:
            return store["fingerprint"]
    raise ValueError(f"the results hold no probes of {activations.name}: run 03_probe again")


def _tensor_name(image_id: object, part: str) -> str:
    return f"{image_id}/{part}"


class StoredHeat:
    """The heat maps of a run that were stored for the explorer.

    Parameters
    ----------
    heat : mapping of ProbeKey to str
        The files, such as :attr:`probekit.probes.results.ProbeResults.heat`; those that are gone
        are passed over.
    home : str, Path or Home, optional
        Where relative files start, see :meth:`probekit.paths.Home.find`.

    Attributes
    ----------
    files : dict of ProbeKey to Path
        The files that exist.
    """

    def __init__(
        self, heat: Mapping[ProbeKey, str], home: str | Path | paths.Home | None = None
    ) -> None:
        home = paths.Home.find(home)
        self.files: dict[ProbeKey, Path] = {}
        self._opened: dict[ProbeKey, Any] = {}
        self._names: dict[ProbeKey, set[str]] = {}
        for key, name in heat.items():
            file = home.resolve(name)
            if file.exists():
                self.files[key] = file
                self._opened[key] = safe_open(file, framework="numpy")
                self._names[key] = set(self._opened[key].keys())

    def get(self, key: ProbeKey, image_id: object) -> HeatMap | None:
        """Return the heat map of a test image, or None where none is stored."""
        logit_name = _tensor_name(image_id, "logit_ltc")
        if logit_name not in self._names.get(key, set()):
            return None
        file = self._opened[key]
        cells_name = _tensor_name(image_id, "cells_t4")
        return HeatMap(file.get_tensor(logit_name), file.get_tensor(cells_name))
