"""The runner: one copy of the model, and the shards that it makes, whoever starts it."""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from itertools import chain, groupby
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from probekit import paths
from probekit.extraction.answer_heads import write_answer_head
from probekit.extraction.jobs import Job
from probekit.extraction.loading import (
    FORKS,
    WorkItem,
    copy_pixels,
    fill_batches,
    is_unchanged,
    look_ahead,
    name_lost_workers,
    prepare_images,
)
from probekit.extraction.settings import SHARING_WAYS, ExtractionSettings
from probekit.extraction.shards import Shard, TensorKey, count_units, rows_of
from probekit.models import forward
from probekit.models.adapters import switched_off
from probekit.models.budget import TokenBudget
from probekit.models.devices import is_out_of_memory
from probekit.models.load import Vlm, load_vlm
from probekit.models.output_head import AnswerHead, take_answer_head
from probekit.models.processor import PreparedImage
from probekit.models.sharing import SharingVerdict, choose_way, take_few
from probekit.models.unchecked import check_layers

VERSIONED_PACKAGES = ("torch", "torchvision", "transformers", "timm", "safetensors")
PROGRESS_BAR = (
    "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} images "
    "[{elapsed}<{remaining}, {rate_fmt}]"
)
# The first tokens never see a causal model's prompt.
SEEING_POOLINGS = ("mean", "max", "last", "text_mean", "suffix_mean")

States = dict[TensorKey, torch.Tensor]
Key = TypeVar("Key", TensorKey, str)


class Runner:
    """One copy of a job's model. It is loaded with the first shard that is missing.

    Attributes
    ----------
    job : Job
    budget : TokenBudget
        How many tokens a batch may have.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._vlm: Vlm | None = None
        self._verdict: SharingVerdict | None = None
        self._way_without_image = "plain"
        self.budget = TokenBudget(
            job.settings.token_budget,
            model=job.folder.model_name,
            device=job.device,
            fix="take a smaller longest_side, or a half-precision dtype",
        )

    @property
    def vlm(self) -> Vlm:
        """The loaded model."""
        if self._vlm is None:
            raise RuntimeError("the model is not loaded: call load first")
        return self._vlm

    @property
    def way(self) -> str:
        """The way that the model goes, out of :data:`probekit.models.forward.WAYS`."""
        return self._verdict.way if self._verdict else "plain"

    def make_shards(self, places: Sequence[int]) -> list[int]:
        """Make those shards of the job that are missing.

        Whether a shard is missing is looked up again right before it is begun. Two runners that
        make the same shard write the same bytes.

        Parameters
        ----------
        places : sequence of int
            Of shards in the job.

        Returns
        -------
        list of int
            The places of those that were made.
        """
        missing = [place for place in places if not self.job.shards[place].is_done]
        if not missing:
            return []
        self.load()
        return self._make_missing(missing)

    @property
    def _workers(self) -> int:
        """Processes that prepare images; none where they cannot.

        One that is not forked would get an adapter with all weights, and of code that only this
        process has imported.
        """
        if getattr(self.vlm.prompt_processor, "runs_model", False):
            return 0
        if not (self.vlm.is_native or FORKS):
            return 0
        return self.job.settings.workers or 0

    def release(self) -> None:
        """Drop the model and give its memory back."""
        if self._vlm is not None:
            self._vlm.release()
            self._vlm = None

    # ----------------------------------------------------------------------------------- the model

    def load(self) -> None:
        """Load the model, write down what it is, and settle which way it goes.

        Raises
        ------
        ValueError
            It has none of the stages, or sharing is "on" and is not exact with it.
        """
        if self._vlm is not None:
            return
        settings = self.job.settings
        self._vlm = load_vlm(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            device=self.job.device,
            untrained=settings.untrained,
            seed=settings.seed,
            trust_remote_code=settings.trust_remote_code,
            with_head=self.job.lacks_answer_head,
            home=self.job.home,
        )
        self._report_what_is_off()
        self._check_stages()
        self._report_other_versions()
        self._report_what_is_missing()
        self._verdict = self._settle_way()
        self._way_without_image = self._settle_way_without_image()
        if self.job.lacks_answer_head:
            self._store_answer_head()

    def _check_stages(self) -> None:
        stages = self.job.settings.stages
        missing = [stage for stage in stages if not self.vlm.layers_of_stage[stage]]
        if not missing:
            return
        message = (
            f"{self.vlm.name} ({self.vlm.type}) has no stage {', '.join(missing)} "
            "that can be read layer by layer"
        )
        if len(missing) == len(stages):
            raise ValueError(f'{message}: take stages=["lm"]')
        tqdm.write(f"{message}: left out")

    def _report_what_is_off(self) -> None:
        """Say in a line each what cannot be done because an adapter does not have it."""
        if not self.vlm.is_native:
            for member, what in switched_off(self.vlm.adapter).items():
                tqdm.write(f"{self.vlm.name} has no {member}, which switches off {what}")

    def _report_other_versions(self) -> None:
        meta = self.job.folder.read_meta() or {}
        earlier = meta.get("versions", {})
        now = paths.versions(*VERSIONED_PACKAGES)
        changes = [
            f"{name} {earlier[name]} (now {now[name]})"
            for name in now
            if earlier.get(name, now[name]) != now[name]
        ]
        if changes:
            tqdm.write(
                f"{self.job.folder.url} was begun with {', '.join(changes)}: what is added may "
                "differ in the last digits"
            )

    def _report_what_is_missing(self) -> None:
        missing = [self.job.shards[place].rows for place in self.job.missing_shards()]
        examples = sum(len(rows) for rows in missing)
        images = sum(count_units(rows) for rows in missing)
        name = f"{self.vlm.name} (untrained)" if self.job.settings.untrained else self.vlm.name
        tqdm.write(
            f"{name} on {self.vlm.device} in {self.vlm.dtype}: {examples:,} examples of {images:,} "
            f"images, {len(missing)} of {len(self.job.shards)} shards"
        )

    def _store_answer_head(self) -> None:
        """Write down what answers are read with, and drop the rest of the output embedding."""
        head = self._make_answer_head()
        if head is not None:
            write_answer_head(self.job.folder, self.job.answer_words, head)
            if head.refusal:
                tqdm.write(f"{self.vlm.name} gives no answers: {head.refusal}; its layers are read")
        self.vlm.head = None

    def _make_answer_head(self) -> AnswerHead | None:
        """Take it from the model, by the first image that is there; None is tried again."""
        shards = [shard for shard in self.job.shards if "lm" in shard.shard_set.stages]
        for shard in shards:
            rows = shard.rows[_has_any(shard.rows)]
            rows = rows[~rows.file.isin(self._changed_images(rows))].head(1)
            if not len(rows):
                continue
            items = prepare_images(
                self.vlm.prompt_processor,
                [rows],
                longest_side=self.job.settings.longest_side,
                home=self.job.home,
            )
            prepared = next(iter(items)).prepared
            try:
                return take_answer_head(self.vlm, self.job.answer_words, prepared)
            except Exception as error:  # whatever it is, its layers can be read
                if is_out_of_memory(error):
                    raise
                tqdm.write(
                    f"{self.vlm.name} gives no answers, because the whole model does not run "
                    f"({type(error).__name__}: {error}); its layers are read, and answers are "
                    "tried again when 02_extract is run again"
                )
                return None
        return None

    # ------------------------------------------------------------------------------------- the way

    def _settle_way(self) -> SharingVerdict:
        """Find out which way the model goes, or look whether what was found before still holds.

        It is settled on the first and on the last images of the job that have several prompts. So
        all runners of a job come to the same verdict. ``meta.json`` keeps it, by device and dtype,
        and a later run tries it again on its last images. Images with one prompt say nothing about
        sharing: the prompt is all prefix. Where there are no others, they run plainly, or alone
        where batches are not exact, and no verdict is kept.
        """
        recorded = self._recorded_verdict()
        ways = SHARING_WAYS[self.job.settings.sharing]
        verdict = self._try_both_ends(_has_several, ways, recorded=recorded)
        if verdict is not None:
            verdict = self._recorded_verdict() or verdict  # another runner may have been faster
            self._accept(verdict)
            self._write_meta(verdict)
            return verdict
        self._write_meta(None)
        verdict = self._try_both_ends(_has_any, ("plain",))
        return verdict or SharingVerdict("plain", "there is no prompt with an image")

    def _settle_way_without_image(self) -> str:
        """Find out whether prompts without an image can run in one batch."""
        verdict = self._try_both_ends(_has_no_image, ("plain",))
        if verdict is None:
            return "plain"
        if verdict.way != "plain":
            tqdm.write(f"{self.vlm.name}, without an image: {verdict.reason}")
        return verdict.way

    def _try_both_ends(
        self,
        select: Callable[[pd.DataFrame], pd.Series],
        ways: Sequence[str],
        *,
        recorded: SharingVerdict | None = None,
    ) -> SharingVerdict | None:
        """Try ways on a batch from each end of the job's rows; None where it has no such rows.

        Raises
        ------
        ValueError
            What was found before is not exact on the last images.
        """
        shards = [shard for shard in self.job.shards if "lm" in shard.shard_set.stages]
        first = self._first_batch(shards, select)
        last = self._first_batch(shards[::-1], select, from_end=True)
        if first is None or last is None:
            return None
        verdict = recorded or self._try_ways(first, ways)
        if verdict.way == "alone":
            return verdict
        left = ways[ways.index(verdict.way) :] if verdict.way in ways else ways
        on_last = self._try_ways(last, left)
        if on_last.way == verdict.way:
            return verdict
        if recorded is not None:
            raise ValueError(
                f"{self.job.folder.url} has shards of {self.vlm.name} that were made the way "
                f"{recorded.way!r}, which is not exact on the images of this run "
                f'({on_last.reason}): take sharing="off", which makes all of them anew'
            )
        return on_last

    @property
    def _verdict_name(self) -> str:
        """Device and dtype, by which ``meta.json`` keeps verdicts."""
        device = self.vlm.device.partition(":")[0]
        if device == "cuda":
            device = torch.cuda.get_device_name(self.vlm.device)
        return f"{device} {self.vlm.dtype}"

    def _recorded_verdict(self) -> SharingVerdict | None:
        verdicts = (self.job.folder.read_meta() or {}).get("sharing") or {}
        recorded = verdicts.get(self._verdict_name)
        return SharingVerdict(**recorded) if recorded else None

    def _accept(self, verdict: SharingVerdict) -> None:
        if self.job.settings.sharing == "on" and verdict.way != "shared":
            raise ValueError(
                f'sharing="on", but with {self.vlm.name} {verdict.reason}; take sharing="auto" '
                'or "off"'
            )
        tqdm.write(f"{self.vlm.name}: {verdict.reason}")

    def _write_meta(self, verdict: SharingVerdict | None) -> None:
        """Write what the folder holds; of each job, what may differ between jobs."""
        earlier = self.job.folder.read_meta() or {}
        meta = describe_extraction(self.vlm, self.job.settings)
        verdicts = dict(earlier.get("sharing") or {})
        if verdict is not None:
            verdicts[self._verdict_name] = asdict(verdict)
        job = self.job.settings.of_job | {"device": self.vlm.device, "versions": meta["versions"]}
        job = json.loads(json.dumps(job))  # as it is read again
        jobs = [one for one in earlier.get("jobs", []) if one != job]
        self.job.folder.write_meta(meta | {"sharing": verdicts, "jobs": [*jobs, job]})

    def _first_batch(
        self,
        shards: Sequence[Shard],
        select: Callable[[pd.DataFrame], pd.Series],
        *,
        from_end: bool = False,
    ) -> _TrialBatch | None:
        """Make a batch of the first, or last, selected rows, of several images where it can be."""
        for shard in shards:
            rows = shard.rows[select(shard.rows)]
            rows = rows[~rows.file.isin(self._changed_images(rows))]
            if not len(rows):
                continue
            rows = (rows[::-1] if from_end else rows).reset_index(drop=True)
            items = prepare_images(
                self.vlm.prompt_processor,
                [rows],
                longest_side=self.job.settings.longest_side,
                home=self.job.home,
            )
            images = (item.prepared for item in items)
            return _TrialBatch(shard, take_few(images, dtype=self.vlm.dtype))
        return None

    def _changed_images(self, rows: pd.DataFrame) -> list[str]:
        """List the images that were changed or removed after their shard was made."""
        images = rows.loc[rows.file != "", ["file", "size"]].drop_duplicates()
        return [
            image.file
            for image in images.itertuples()
            if not is_unchanged(image.file, image.size, self.job.home)
        ]

    def _try_ways(self, batch: _TrialBatch, ways: Sequence[str]) -> SharingVerdict:
        verdicts: list[SharingVerdict] = []

        def try_batch(prepared: Sequence[PreparedImage]) -> States:
            check_layers(self.vlm, prepared[0].with_prompt(0))
            verdict, states = choose_way(
                self.vlm,
                prepared,
                poolings=batch.shard.shard_set.poolings,
                stages=batch.shard.shard_set.stages,
                ways=ways,
            )
            verdicts.append(verdict)
            return _with_tensor_keys(states)

        self.budget.run(batch.prepared, try_batch, way="plain", join=_join_parts)
        order = [*ways, "alone"]
        return max(verdicts, key=lambda verdict: order.index(verdict.way))

    # ---------------------------------------------------------------------------------- the shards

    def _make_missing(self, places: Sequence[int]) -> list[int]:
        shards = [self.job.shards[place] for place in places]
        tables = [shard.rows for shard in shards]

        def still_missing() -> Iterator[int]:
            for number, shard in enumerate(shards):
                if not shard.is_done:
                    yield number

        items = prepare_images(
            self.vlm.prompt_processor,
            tables,
            longest_side=self.job.settings.longest_side,
            home=self.job.home,
            dtype=self.vlm.dtype,
            workers=self._workers,
            order=still_missing(),
        )
        progress = tqdm(
            total=sum(count_units(table) for table in tables),
            desc=self.job.folder.model_name,
            unit="image",
            bar_format=PROGRESS_BAR,
        )
        with (
            progress,
            name_lost_workers(),
            _ShardWriter(self.vlm) as writer,
            closing(self._make_batches(items)) as batches,
        ):
            self._compute(shards, batches, writer, progress)
        written = {shard.name for shard in writer.written}
        return [place for place in places if self.job.shards[place].name in written]

    def _compute(
        self,
        shards: Sequence[Shard],
        batches: Iterable[list[WorkItem]],
        writer: _ShardWriter,
        progress: tqdm,
    ) -> None:
        """Compute the batches of shards, and hand over each shard when its last batch has arrived.

        While the states of a batch are on their way to the host, the device works on the next one,
        and while a shard is written, on the next shard. So at most these two can be lost.
        """
        number = -1
        in_flight: _Transfer | None = None
        try:
            for batch in batches:
                if batch[0].table != number:
                    number = batch[0].table
                    writer.wait()
                    target = ShardStates(shards[number])
                arriving = in_flight
                in_flight = self._start_batch(batch, target)
                if arriving is not None:
                    arriving.complete(writer)
                progress.update(len(batch))
        finally:
            if in_flight is not None:  # it may be the last of its shard
                in_flight.complete(writer)

    def _make_batches(self, items: Iterable[WorkItem]) -> Generator[list[WorkItem]]:
        """Batch items, and on a GPU make each batch while the one before is computed.

        A batch ends with its shard, so that numbers do not depend on what else is missing. Where an
        item cannot be made, those before it come first.
        """
        errors: list[Exception] = []

        def take_until_error() -> Iterator[WorkItem]:
            try:
                yield from items
            except Exception as error:
                errors.append(error)

        batches = chain.from_iterable(
            fill_batches(of_shard, token_budget=lambda: self.budget.tokens, way=lambda: self.way)
            for _, of_shard in groupby(take_until_error(), key=lambda item: item.table)
        )
        if self.vlm.device.startswith("cuda"):
            yield from look_ahead(self._copy_pixels(batches))
        else:
            yield from batches
        if errors:
            raise errors[0]

    def _copy_pixels(self, batches: Iterable[list[WorkItem]]) -> Iterator[list[WorkItem]]:
        """Copy the pixels of batches to the GPU, on the stream of the thread that begins it."""
        stream = torch.cuda.current_stream(self.vlm.device)
        for batch in batches:
            with torch.cuda.stream(stream):
                copied = copy_pixels(batch, self.vlm.device)
            yield copied

    def _start_batch(self, batch: Sequence[WorkItem], target: ShardStates) -> _Transfer:
        """Queue a batch on the device, and the copies of its states to the host."""
        states = self._run_batch(batch, target.shard)
        contents = target.shard.shard_set.contents
        arriving = copy_to_host(
            {key: values for key, values in states.items() if key.content in contents}
        )
        rows = np.concatenate([item.rows for item in batch])
        images = np.array([item.image for item in batch])
        return _Transfer(target, rows, images, arriving, self.vlm.record_sync_point())

    def _run_batch(self, batch: Sequence[WorkItem], shard: Shard) -> States:
        def run(prepared: Sequence[PreparedImage]) -> States:
            states = forward.run_pooled(
                self.vlm,
                prepared,
                poolings=shard.shard_set.poolings,
                stages=shard.shard_set.stages,
                way=way,
            )
            return _with_tensor_keys(states)

        prepared = [item.prepared for item in batch]
        way = self.way if prepared[0].image_inputs else self._way_without_image
        return self.budget.run(prepared, run, way=way, join=_join_parts)


class _TrialBatch(NamedTuple):
    """Images with their prompts that ways are tried on, and the shard that they are from."""

    shard: Shard
    prepared: list[PreparedImage]


class ShardStates:
    """The states of a shard, put together batch by batch.

    Attributes
    ----------
    shard : Shard
    states : dict
        From key to float32: (rows, d) for the decoder, (images, d) for the image encoder.
    """

    def __init__(self, shard: Shard) -> None:
        rows = shard.rows
        self.shard = shard
        self.states: dict[TensorKey, np.ndarray] = {}
        self._row_count = len(rows)
        self._image_count = rows.file.nunique()
        self._rows_seen = 0
        self._is_filled: dict[TensorKey, np.ndarray] = {}

    @property
    def has_all_rows(self) -> bool:
        """Whether the last batch has been added."""
        return self._rows_seen == self._row_count

    def add(
        self, rows: np.ndarray, images: np.ndarray, states: Mapping[TensorKey, torch.Tensor]
    ) -> None:
        """Add what was read of a batch.

        Parameters
        ----------
        rows, images : ndarray of int
            Their places in the shard.
        states : mapping of TensorKey to Tensor
        """
        self._rows_seen += len(rows)
        for key, values in states.items():
            of_image = key.content.is_of_image
            count = self._image_count if of_image else self._row_count
            places = images if of_image else rows
            if key not in self.states:
                self.states[key] = np.full((count, values.shape[1]), np.nan, np.float32)
                self._is_filled[key] = np.zeros(count, bool)
            self.states[key][places] = values.numpy()
            self._is_filled[key][places] = True

    def write(self, vlm: Vlm) -> None:
        """Check the states and write the shard.

        Raises
        ------
        FloatingPointError
            A hidden state is not finite; model, layer and example are named.
        ValueError
            A layer was not read for every row, or the model does not see the prompts.
        """
        rows = self.shard.rows
        self._check_filled(vlm)
        check_finite(self.states, rows, vlm.name)
        check_prompts_are_seen(self.states, rows, vlm.name)
        self.shard.shard_set.write_shard(self.shard.number, self.states)

    def _check_filled(self, vlm: Vlm) -> None:
        rows = self.shard.rows
        for content in self.shard.shard_set.contents:
            for layer in vlm.layers_of_stage[content.stage]:
                key = TensorKey(layer, content.pooling)
                is_filled = self._is_filled.get(key, np.zeros(1, bool))
                if is_filled.all():
                    continue
                first = rows_of(rows, content).iloc[int(np.argmin(is_filled))]
                raise ValueError(
                    f"{vlm.name}, {key.tensor_name}: this layer did not run for "
                    f"{np.sum(~is_filled):,} of {len(is_filled):,} rows, the first is "
                    f"{first['file'] or 'no image'} with {first.prompt[:80]!r}, so there is "
                    "nothing to store: leave these rows out"
                )


class _Transfer(NamedTuple):
    """States of a batch on their way to the host, and the shard that they belong to."""

    target: ShardStates
    rows: np.ndarray
    images: np.ndarray
    arriving: States
    wait: Callable[[], None]

    def complete(self, writer: _ShardWriter) -> None:
        """Wait for the states, and have the shard written if they were its last."""
        self.wait()
        self.target.add(self.rows, self.images, self.arriving)
        if self.target.has_all_rows:
            writer.write(self.target)


class _ShardWriter:
    """Checks and writes shards in a thread, one at a time, while the next is computed.

    Attributes
    ----------
    written : list of Shard
    """

    def __init__(self, vlm: Vlm) -> None:
        self.written: list[Shard] = []
        self._vlm = vlm
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def write(self, assembled: ShardStates) -> None:
        """Begin to write a shard, after the one before."""
        earlier = self._pending
        self._pending = self._thread.submit(self._write, assembled)
        if earlier is not None:
            earlier.result()

    def _write(self, assembled: ShardStates) -> None:
        assembled.write(self._vlm)
        self.written.append(assembled.shard)

    def wait(self) -> None:
        """Wait until the last shard is written; raise what checking or writing it raised."""
        if self._pending is not None:
            pending = self._pending
            self._pending = None
            pending.result()

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._thread.shutdown()  # what was computed is written, whatever else went wrong
        if kind is None:
            self.wait()
        elif self._pending is not None and self._pending.exception() is not None:
            tqdm.write(f"besides, a shard was not written: {self._pending.exception()}")


def _with_tensor_keys(states: dict[str, torch.Tensor]) -> States:
    return {TensorKey.of(name): values for name, values in states.items()}


def copy_to_host(states: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Begin to copy states to the host, all of one shape at once: each copy takes its time."""
    keys_by_shape: dict[torch.Size, list[Key]] = defaultdict(list)
    for key, values in states.items():
        keys_by_shape[values.shape].append(key)
    arriving: dict[Key, torch.Tensor] = {}
    for keys in keys_by_shape.values():
        together = torch.stack([states[key] for key in keys]).to("cpu", non_blocking=True)
        arriving.update(zip(keys, together, strict=True))
    return arriving


def _has_several(rows: pd.DataFrame) -> pd.Series:
    """(n,) True where an image has several prompts."""
    return _has_any(rows) & (rows.groupby("file").prompt.transform("size") > 1)


def _has_any(rows: pd.DataFrame) -> pd.Series:
    return rows.file != ""


def _has_no_image(rows: pd.DataFrame) -> pd.Series:
    return rows.file == ""


def _join_parts(first: States, second: States, of_images: bool) -> States:
    joined = {}
    for key in first:
        if of_images or not key.content.is_of_image:
            joined[key] = torch.cat([first[key], second[key]])
        else:  # of the same image
            joined[key] = first[key]
    return joined


# ------------------------------------------------------------------------------------------- checks


def check_finite(states: dict[TensorKey, np.ndarray], rows: pd.DataFrame, model: str) -> None:
    """Raise FloatingPointError where a hidden state is not finite."""
    for key, values in states.items():
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if not len(bad):
            continue
        first = rows_of(rows, key.content).iloc[bad[0]]
        raise FloatingPointError(
            f"{model}, {key.tensor_name}: not finite for {len(bad)} of {len(values)}, the first is "
            f'{first["file"]} with {first.prompt[:80]!r}; try dtype="float32" or "bfloat16"'
        )


def check_prompts_are_seen(
    states: dict[TensorKey, np.ndarray], rows: pd.DataFrame, model: str
) -> None:
    """Raise ValueError where the last layer is the same whatever the prompt."""
    decoder_layers = [key.layer for key in states if key.stage == "lm"]
    if not decoder_layers:
        return
    last_layer = max(decoder_layers)
    first_row, differs = _pair_with_other_prompts(rows)
    if not differs.any():
        return
    for pooling in SEEING_POOLINGS:
        values = states.get(TensorKey(last_layer, pooling))
        if values is not None and (values[differs] == values[first_row[differs]]).all():
            raise ValueError(
                f"{model}, {last_layer}/{pooling}: the same for examples with different prompts, "
                f"in all {differs.sum()} pairs, so any probe of it scores at chance; the prompt "
                "does not reach the tokens that are pooled: check this checkpoint's chat template, "
                "processor and attention mask"
            )


def _pair_with_other_prompts(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """For each row the first one of its image, and where their prompts differ; both (n,).

    With one prompt per image, rows are paired with the very first one.
    """
    image = pd.factorize(rows.file)[0]
    first_of_image = np.unique(image, return_index=True)[1]
    first_row = first_of_image[image]
    if (first_row == np.arange(len(rows))).all():
        first_row = np.zeros(len(rows), int)
    prompts = rows.prompt.to_numpy()
    return first_row, prompts != prompts[first_row]


def describe_extraction(vlm: Vlm, settings: ExtractionSettings) -> dict:
    """Return what ``meta.json`` says of a model and its settings."""
    of_adapter = {}
    if not vlm.is_native:
        of_adapter = {"adapter": {"file": inspect.getfile(type(vlm.adapter)), "hash": vlm.revision}}
    return {
        "model": vlm.name,
        "type": vlm.type,
        "revision": vlm.revision,
        "untrained": settings.untrained,
        "dtype": vlm.dtype,
        "device": vlm.device,
        "layers": vlm.layers_of_stage,
        "settings": settings.naming,
        "prompt": vlm.prompt_processor.wrap("{prompt}"),
        "image_processor": type(getattr(vlm.processor, "image_processor", vlm.adapter)).__name__,
        "versions": paths.versions(*VERSIONED_PACKAGES),
        **of_adapter,
    }
