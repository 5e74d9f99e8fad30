"""From examples to activations: the only step that needs the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from probekit import controls, forward, loading, parts, paths, pool, store
from probekit.forward import Choice
from probekit.parts import Part

if TYPE_CHECKING:
    from probekit.models import Vlm

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} images [{elapsed}<{remaining}, {rate_fmt}]"
SHARING = {"auto": ("shared", "encoded", "plain"), "on": ("shared",), "off": ("plain",)}


@dataclass(frozen=True)
class Extraction:
    """Settings of one extraction.

    Attributes
    ----------
    model, revision, dtype, untrained, seed : as for :func:`probekit.models.load_vlm`
    longest_side : pixels that bound an image before the processor sees it; None leaves it to the checkpoint's rule
    sharing : run each image once for all its prompts: "auto" as far as a check finds it exact, "on" (an error where it
        is not), "off"
    poolings : see :mod:`probekit.pool`
    stages : "lm", and where asked for "vision" and "projector", whose states are pooled over the image's patches
    shard_images : images a shard, the unit of work, of writing and of resuming
    batch_tokens : tokens that a batch of whole images with their prompts is filled up to. None takes 8,192 with a GPU,
        2,048 without: there small batches stay in the cache
    workers : processes that decode and preprocess images ahead of the model; 0 does it in between. None takes 4 with a
        GPU, fewer with fewer cores, and 0 without: there they would take the model's cores
    """

    model: str
    revision: str | None = None
    dtype: str | None = None
    untrained: bool = False
    seed: int = 0
    longest_side: int | None = None
    sharing: str = "auto"
    poolings: tuple[str, ...] = ("mean",)
    stages: tuple[str, ...] = ("lm",)
    shard_images: int = 200
    batch_tokens: int | None = None
    workers: int | None = None

    @property
    def wants(self) -> list[str]:
        """What is to be stored, e.g. "lm/mean"; text is no part of an image."""
        return [f"{stage}/{pooling}" for stage, pooling in product(self.stages, self.poolings)
                if stage == "lm" or pooling != "text_mean"]

    def check(self) -> None:
        """Raise ValueError naming what can be chosen where a setting is none of it."""
        for pooling in self.poolings:
            pool.check(pooling)
        for name, values, known in (("sharing", [self.sharing], SHARING), ("stages", self.stages, parts.STAGES),
                                    ("dtype", [self.dtype], (None, *forward.TOLERANCE))):
            unknown = [value for value in values if value not in known]
            if unknown or not values:
                raise ValueError(f"{name}={unknown or values}: take out of {', '.join(map(str, known))}")
        if self.shard_images < 1 or (self.batch_tokens or 1) < 1 or (self.workers or 0) < 0:
            raise ValueError("shard_images and batch_tokens are numbers from 1, workers from 0")


def resolved(settings: Extraction, device: str) -> Extraction:
    """The settings with what they leave open filled in: what suits the device, the commit on the hub."""
    from probekit.models import best_dtype
    from probekit.presets import commit_of

    tokens, workers = (2048, 0) if device == "cpu" else (8192, min(4, (os.cpu_count() or 2) - 1))
    return replace(settings, dtype=settings.dtype or best_dtype(device),
                   revision=commit_of(settings.model, settings.revision),
                   batch_tokens=settings.batch_tokens or tokens,
                   workers=workers if settings.workers is None else settings.workers)


def folder_of(settings: Extraction) -> Path:
    """The folder of all that this checkpoint says with these (resolved) settings, whatever the images and prompts."""
    from probekit.presets import locate

    source = Path(locate(settings.model))
    files = sorted(f for f in source.glob("*") if f.is_file()) if source.is_absolute() else []  # a hub id has none
    weights = [(f.name, f.stat().st_size, _sampled_hash(f)) for f in files]
    decides = {name: getattr(settings, name) for name in ("model", "revision", "dtype", "untrained", "seed",
                                                          "longest_side")} | {"transformers": version("transformers")}
    name = source.name + ("-untrained" if settings.untrained else "")
    return paths.DATA / "activations" / name / paths.fingerprint(decides, settings.sharing == "off", weights)


def _sampled_hash(file: Path, pieces: int = 128, piece: int = 1 << 15) -> str:
    """Hash of 4 MiB spread over a file: tells checkpoints apart without reading gigabytes."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as handle:
        for at in sorted({round(k * max(0, size - piece) / (pieces - 1)) for k in range(pieces)}):
            handle.seek(at)
            digest.update(handle.read(piece))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ a shard


@dataclass
class Passes:
    """Forward passes in the way that suits a model; which one is found out on the first batch that can tell.

    A batch with one prompt an image cannot: its prompt is all prefix. Until another one comes it runs plainly.
    """

    vlm: Vlm
    settings: Extraction
    folder: Path
    choice: Choice | None = None  # kept on disk
    single: Choice | None = None  # for batches with one prompt an image

    def __post_init__(self):
        record = self.folder / "meta.json"
        known = paths.read_json(record)["sharing"] if record.exists() else None
        if known:
            self._settle(Choice(**known))
        elif not record.exists():
            self._write(None)

    def __call__(self, batch: Sequence[loading.Work], part: Part) -> dict[str, torch.Tensor]:
        prepared, wanted = [work.prepared for work in batch], (part.poolings, part.stages)
        try:
            if not prepared[0].image:
                return forward.run(self.vlm, prepared, *wanted)
            if self.choice or "lm" not in part.stages:
                return forward.run(self.vlm, prepared, *wanted, self.way)
            if max(len(one.tokens) for one in prepared) > 1:
                choice, states = forward.choose(self.vlm, prepared, *wanted, SHARING[self.settings.sharing])
                self._settle(choice)
                self._write(choice)
            elif self.single:
                states = forward.run(self.vlm, prepared, *wanted, self.single.way)
            else:
                self.single, states = forward.choose(self.vlm, prepared, *wanted, ("plain",))
            return states
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"a batch of {sum(work.tokens(self.way) for work in batch):,} tokens does not fit the "
                              f"memory of {self.vlm.device}: take fewer batch_tokens ({error})") from None

    @property
    def way(self) -> str:
        return self.choice.way if self.choice else "plain"

    def _settle(self, choice: Choice) -> None:
        if self.settings.sharing == "on" and choice.way != "shared":
            raise ValueError(f"sharing=\"on\", but with {self.vlm.name} {choice.words}; take sharing=\"auto\" or "
                             "\"off\"")
        tqdm.write(f"{self.vlm.name}: {choice.words}")
        self.choice = choice

    def _write(self, choice: Choice | None) -> None:
        found = {"sharing": asdict(choice) if choice else None}
        paths.write_json(self.folder / "meta.json", _meta(self.vlm, self.settings) | found)


def extract_shard(passes: Passes, part: Part, i: int, works: Iterable[loading.Work], bar: tqdm
                  ) -> dict[str, np.ndarray]:
    """The states of shard i: the same model, way and rows make the same numbers.

    Parameters
    ----------
    works : this shard's images in order, as :func:`probekit.loading.ahead` gives them

    Returns
    -------
    dict
        ``"<layer>/<pooling>"`` to float32, (rows, d) for the decoder and (images, d) for the image encoder.
    """
    rows = part.shard_rows(i)
    size, states, held = {True: len(rows), False: rows.file.nunique()}, {}, None

    def land(batch: Sequence[loading.Work], arriving: dict, wait: Callable[[], None]) -> None:
        wait()
        places = {True: np.concatenate([work.rows for work in batch]), False: np.array([work.image for work in batch])}
        for key, values in arriving.items():
            of_lm = key.startswith("lm.")
            states.setdefault(key, np.empty((size[of_lm], values.shape[1]), np.float32))[places[of_lm]] = values

    for batch in loading.batches(works, passes.settings.batch_tokens, lambda: passes.way):
        found = passes(batch, part)
        arriving = {key: values.to("cpu", non_blocking=True) for key, values in found.items()
                    if parts.want_of(key) in part.wants}
        coming = batch, arriving, passes.vlm.mark()
        if held:  # the device works on this batch while the one before is put away
            land(*held)
        held = coming
        bar.update(len(batch))
    land(*held)
    return states


def finish_shard(part: Part, i: int, states: dict[str, np.ndarray], name: str) -> Path:
    """Check a shard and write it.

    Raises
    ------
    FloatingPointError
        A hidden state is not finite (model, layer and example are named).
    ValueError
        The model does not see the prompts.
    """
    rows = part.shard_rows(i)
    for key, values in states.items():
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            at = rows[rows.file.ne(rows.file.shift())] if len(values) < len(rows) else rows
            raise FloatingPointError(
                f"{name}, {key}: not finite for {len(bad)} of {len(values)}, the first is {at.file.iloc[bad[0]]} with "
                f"{at.prompt.iloc[bad[0]][:80]!r}; try dtype=\"float32\" or \"bfloat16\"")
    _check_prompts_seen(states, rows, name)
    return part.write(i, states)


def _check_prompts_seen(states: dict[str, np.ndarray], rows: pd.DataFrame, name: str) -> None:
    last = max((key.partition("/")[0] for key in states if key.startswith("lm.")), default=None)
    image = pd.factorize(rows.file)[0]
    first = np.unique(image, return_index=True)[1][image]
    other = (rows.prompt.to_numpy() != rows.prompt.to_numpy()[first]) if (first != np.arange(len(rows))).any() else None
    if other is None:  # one prompt an image: against the first example
        first, other = np.zeros(len(rows), int), (rows.prompt != rows.prompt[0]).to_numpy()
    for pooling in ("mean", "max", "last", "text_mean"):  # the first tokens of a causal model never see the prompt
        values = states.get(f"{last}/{pooling}")
        if values is not None and other.any() and (values[other] == values[first[other]]).all():
            raise ValueError(
                f"{name}, {last}/{pooling}: the same for examples with different prompts, in all {other.sum()} pairs, "
                "so any probe of it scores at chance; the prompt does not reach the tokens that are pooled: check this "
                "checkpoint's chat template, processor and attention mask")


# ------------------------------------------------------------------------------------------------------------- a run


def extract(settings: Extraction, examples: pd.DataFrame, device: str | None = None) -> store.Store:
    """The store of the examples alone, see :func:`extract_all`."""
    return extract_all(settings, examples, (), device)[0]


def extract_all(settings: Extraction, examples: pd.DataFrame, control: Sequence[str], device: str | None = None
                ) -> list[store.Store]:
    """Extract all examples, shard by shard; what is already on disk, of whatever run, is not computed again.

    The model is loaded only where something is missing, and released at the end.

    Parameters
    ----------
    examples : columns `file`, `prompt`, and for controls `image_id` and `split`
    control : names out of :data:`probekit.controls.INPUTS`; an image that several of them ask about still runs once
    device : see :func:`probekit.models.load_vlm`

    Returns
    -------
    The store of the examples, and one for each control.
    """
    from probekit.models import best_device, load_vlm

    settings.check()
    controls.check(control, controls.INPUTS)
    of_text = tuple(p for p in settings.poolings if p != "image_mean" and not p.startswith("token:"))
    if "no_image" in control and ("lm" not in settings.stages or not of_text):
        raise ValueError("no_image needs the stage lm, and a pooling besides image_mean and token:<i>")
    device = device or best_device()
    settings = resolved(settings, device)
    folder = folder_of(settings)
    if not (folder / "meta.json").exists():  # shards without it cannot be told how they were made
        for shard in folder.glob("part-*/shard-*"):
            shard.unlink()
    blind = replace(settings, stages=("lm",), poolings=of_text)
    views = [(name, controls.inputs(examples, name), blind if name == "no_image" else settings)
             for name in ("none", *control)]
    planned = []
    for own in dict.fromkeys(own for _, _, own in views):
        rows = pd.concat([parts.rows_of(table) for _, table, taken in views if taken == own])
        planned += parts.plan(folder, rows, own.wants, own.shard_images)
    missing = [*{part.shard(i): (part, i) for part, i in planned if not part.is_done(i)}.values()]
    if missing:
        vlm = load_vlm(settings.model, settings.revision, settings.dtype, device, settings.untrained, settings.seed)
        try:
            _extract(vlm, settings, folder, missing, len(planned))
        finally:
            vlm.release()
    return [store.Store(folder, table, own.stages, own.poolings, name) for name, table, own in views]


def _extract(vlm: Vlm, settings: Extraction, folder: Path, missing: list[tuple[Part, int]], planned: int) -> None:
    tables = [part.shard_rows(i) for part, i in missing]
    images = sum(parts.units_of(table).max() + 1 for table in tables)
    tqdm.write(f"{vlm.name}{' (untrained)' if settings.untrained else ''} on {vlm.device} in {vlm.dtype}: "
               f"{sum(map(len, tables)):,} examples of {images:,} images, {len(missing)} of {planned} shards")
    lacking = [stage for stage in settings.stages if not vlm.layers_of_stage[stage]]
    if lacking:
        told = f"{vlm.name} ({vlm.config.model_type}) has no stage {', '.join(lacking)} that can be read layer by layer"
        if lacking == list(settings.stages):
            raise ValueError(f"{told}: take stages=[\"lm\"]")
        tqdm.write(f"{told}: left out")
    passes = Passes(vlm, settings, folder)
    works = loading.ahead(vlm.preparer, settings.longest_side, tables, settings.workers)
    with ThreadPoolExecutor(1) as writer, tqdm(total=images, desc=folder.parent.name, unit="image", bar_format=BAR
                                               ) as bar:
        writing: Future | None = None
        for k, group in groupby(works, lambda work: work.shard):
            part, i = missing[k]
            states = extract_shard(passes, part, i, group, bar)
            before, writing = writing, writer.submit(finish_shard, part, i, states, vlm.name)
            for done in (before, writing if k == 0 else None):  # the first shard shows what is wrong with the model;
                if done:  # later ones are written while the next is computed
                    done.result()
        writing.result()


def _meta(vlm: Vlm, settings: Extraction) -> dict:
    return {
        "model": vlm.name, "type": vlm.config.model_type, "revision": vlm.revision, "untrained": settings.untrained,
        "dtype": vlm.dtype, "device": vlm.device, "layers": vlm.layers_of_stage, "settings": asdict(settings),
        "prompt": vlm.preparer.wrap("{prompt}"),
        "image_processor": type(vlm.processor.image_processor).__name__,
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers", "timm", "safetensors")},
    }
