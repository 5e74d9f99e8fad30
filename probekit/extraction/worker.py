"""The shards of a run, and the worker that makes them: one copy of the model, whoever starts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby, product
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from probekit import paths
from probekit.extraction import loading, shards
from probekit.extraction.passes import SHARING, Passes
from probekit.extraction.shards import Part
from probekit.extraction.shared import Shared
from probekit.models import sharing
from probekit.models.load import Vlm, load_vlm

VERSIONS = ("torch", "torchvision", "transformers", "timm", "safetensors")  # that states may depend on
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} images [{elapsed}<{remaining}, {rate_fmt}]"

# ------------------------------------------------------------------------------------------------------------ a shard


def extract_shard(passes: Passes, part: Part, i: int, works: Iterable[loading.Work], bar: tqdm
                  ) -> dict[str, np.ndarray]:
    """The states of shard i, the unit of work: the same model, way and rows make the same numbers, whoever asks.

    Parameters
    ----------
    works : this shard's images in order, as :func:`probekit.extraction.loading.ahead` gives them

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

    for batch in loading.batches(works, lambda: passes.budget, lambda: passes.way):
        found = passes(batch, part)
        arriving = {key: values.to("cpu", non_blocking=True) for key, values in found.items()
                    if shards.want_of(key) in part.wants}
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


# ------------------------------------------------------------------------------------------------------------- a job


@dataclass(frozen=True)
class ExtractionSettings:
    """Settings of one extraction.

    Attributes
    ----------
    model, revision, dtype, untrained, seed, trust_remote_code : as for :func:`probekit.models.load.load_vlm`
    longest_side : pixels that bound an image before the processor sees it; None leaves it to the checkpoint's rule
    sharing : run each image once for all its prompts: "auto" as far as a check finds it exact, "on" (an error where it
        is not), "off"
    poolings : see :mod:`probekit.models.pooling`
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
    trust_remote_code: bool = False

    @property
    def wants(self) -> list[str]:
        """What is to be stored, e.g. "lm/mean"; text is no part of an image."""
        return [f"{stage}/{pooling}" for stage, pooling in product(self.stages, self.poolings)
                if stage == "lm" or pooling != "text_mean"]

    def check(self) -> None:
        """Raise ValueError naming what can be chosen where a setting is none of it."""
        for pooling in self.poolings or ("",):
            pooling.check(pooling)
        for name, values, known in (("sharing", [self.sharing], SHARING), ("stages", self.stages, shards.STAGES),
                                    ("dtype", [self.dtype], (None, *sharing.TOLERANCE))):
            unknown = [value for value in values if value not in known]
            if unknown or not values:
                raise ValueError(f"{name}={unknown or values}: take out of {', '.join(map(str, known))}")
        if self.shard_images < 1 or (self.batch_tokens or 1) < 1 or (self.workers or 0) < 0:
            raise ValueError("shard_images and batch_tokens are numbers from 1, workers from 0")


@dataclass(frozen=True)
class Job:
    """What a run asks of a model, the same for all who work on it.

    Attributes
    ----------
    settings : resolved
    folder : of the model's activations
    device : see :func:`probekit.models.load.load_vlm`
    shards : that hold what is asked, done or not
    url : where `folder` is mirrored for other machines, see :class:`probekit.extraction.shared.Shared`
    """

    settings: ExtractionSettings
    folder: Path
    device: str
    shards: tuple[tuple[Part, int], ...]
    url: str | None = None

    @property
    def shared(self) -> Shared:
        return Shared(self.folder, self.url)

    def missing(self) -> list[int]:
        """Places of those shards that are neither here nor in the mirror."""
        there = self.shared.there("part-*/shard-*.safetensors")
        return [k for k, (part, i) in enumerate(self.shards) if part.shard(i) not in there and not part.is_done(i)]

    def push(self) -> None:
        """Bring to the mirror what is here of this job and not there."""
        shared, files = self.shared, [self.folder / "meta.json"]
        for part, i in self.shards:
            files += [part.folder / "rows.parquet", part.folder / "part.json", *[part.shard(i)] * part.is_done(i)]
        there = shared.there("*") | shared.there("part-*/*")
        for path in dict.fromkeys(files) if shared.mirrored else ():
            if path not in there and path.exists():
                shared.push(path)


class Worker:
    """One copy of the model, and the shards that it makes.

    The model is loaded with the first shard that nobody else has or makes; :meth:`release` gives its memory back.
    """

    def __init__(self, job: Job):
        self.job, self.shared, self.passes = job, job.shared, None

    def __call__(self, places: Sequence[int]) -> list[int]:
        """Make those of the job's shards at `places` that are missing and that nobody else is making.

        Returns
        -------
        list
            The places of those that were made.
        """
        order = self._claimed(places)
        first = next(order, None)
        if first is None:
            return []
        try:
            self.load()
            return self._make(places, chain([first], order))
        finally:
            self.shared.give_up_all()

    def load(self) -> None:
        """Load the model, write down what it is, settle which way it goes."""
        if self.passes:
            return
        job, own = self.job, self.job.settings
        vlm = load_vlm(own.model, own.revision, own.dtype, job.device, own.untrained, own.seed,
                       own.trust_remote_code)
        lacking = [stage for stage in own.stages if not vlm.layers_of_stage[stage]]
        if lacking:
            told = (f"{vlm.name} ({vlm.config.model_type}) has no stage {', '.join(lacking)} that can be read layer by "
                    "layer")
            if lacking == list(own.stages):
                raise ValueError(f"{told}: take stages=[\"lm\"]")
            tqdm.write(f"{told}: left out")
        self._warn_of_versions()
        self.passes = Passes(vlm, own.sharing, own.batch_tokens, own.longest_side, self.shared, _meta(vlm, own))
        missing = [job.shards[place] for place in job.missing()]
        rows = [part.shard_rows(i) for part, i in missing]
        images = sum(shards.units_of(table).max() + 1 for table in rows)
        tqdm.write(f"{vlm.name}{' (untrained)' if own.untrained else ''} on {vlm.device} in {vlm.dtype}: "
                   f"{sum(map(len, rows)):,} examples of {images:,} images, {len(missing)} of {len(job.shards)} shards")
        self.passes.settle(missing)

    def _warn_of_versions(self) -> None:
        before, now = (shards.meta_of(self.job.folder) or {}).get("versions", {}), paths.versions(*VERSIONS)
        other = [f"{name} {before[name]} (now {now[name]})" for name in now if before.get(name, now[name]) != now[name]]
        if other:
            tqdm.write(f"{paths.Home.find().relative(self.job.folder)} was begun with {', '.join(other)}: what is added may differ "
                       "in the last digits")

    def release(self) -> None:
        if self.passes:
            self.passes.vlm.release()
            self.passes = None

    def _claimed(self, places: Sequence[int]) -> Iterator[int]:
        """Positions in `places` of what this worker is to make, each claimed when it is asked for."""
        for at, place in enumerate(places):
            part, i = self.job.shards[place]
            if not self._there(part, i) and self.shared.claim(part.shard(i)):
                if self._there(part, i):  # made between the two looks
                    self.shared.finished(part.shard(i))
                else:
                    yield at

    def _there(self, part: Part, i: int) -> bool:
        return part.is_done(i) or self.shared.has(part.shard(i))

    def _make(self, places: Sequence[int], order: Iterable[int]) -> list[int]:
        job, made = self.job, []
        tables = [part.shard_rows(i) for part, i in (job.shards[place] for place in places)]
        images = sum(shards.units_of(table).max() + 1 for table in tables)
        works = loading.ahead(self.passes.vlm.prompt_processor, job.settings.longest_side, tables, job.settings.workers, order)
        with tqdm(total=images, desc=job.folder.parent.name, unit="image", bar_format=BAR) as bar:
            for at, group in groupby(works, lambda work: work.shard):
                part, i = job.shards[places[at]]
                self.shared.push(finish_shard(part, i, extract_shard(self.passes, part, i, group, bar),
                                              self.passes.vlm.name))
                self.shared.finished(part.shard(i))  # before the next one is begun: no more than one can be lost
                made.append(places[at])
        return made


def _meta(vlm: Vlm, settings: ExtractionSettings) -> dict:
    return {
        "model": vlm.name, "type": vlm.config.model_type, "revision": vlm.revision, "untrained": settings.untrained,
        "dtype": vlm.dtype, "device": vlm.device, "layers": vlm.layers_of_stage, "settings": asdict(settings),
        "prompt": vlm.prompt_processor.wrap("{prompt}"),
        "image_processor": type(vlm.processor.image_processor).__name__,
        "versions": paths.versions(*VERSIONS),
    }
