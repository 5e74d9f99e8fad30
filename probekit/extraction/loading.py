"""Images and prompts on their way to the model: prepared ahead in worker processes, and put together into batches."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from torch.utils.data import DataLoader, Dataset, Sampler

from probekit import paths
from probekit.extraction.shards import units_of
from probekit.images import load_rgb
from probekit.models.batches import input_shape
from probekit.models.processor import PreparedImage, PromptProcessor


@dataclass(frozen=True)
class Work:
    """One image of a shard with its prompts, or a prompt without an image.

    Attributes
    ----------
    shard : which of the shards that are being worked on
    image : its place among the shard's images
    rows : places of its prompts among the shard's rows
    """

    shard: int
    image: int
    rows: np.ndarray
    prepared: PreparedImage

    def tokens(self, way: str) -> int:
        """Tokens that the decoder has to compute for it."""
        lengths = [len(row["input_ids"]) for row in self.prepared.tokens]
        shared = self.prepared.prefix_length * (len(lengths) - 1) if way == "shared" else 0
        return sum(lengths) - shared


class _Images(Dataset):
    """The images of several tables of rows, one after the other; an error is an item too."""

    def __init__(self, preparer: PromptProcessor, longest_side: int | None, shards: Sequence[pd.DataFrame]):
        self.prompt_processor, self.longest_side, self.items, self.starts = preparer, longest_side, [], [0]
        for shard, rows in enumerate(shards):
            starts = np.flatnonzero(np.diff(units_of(rows), prepend=-1))
            for image, places in enumerate(np.split(np.arange(len(rows)), starts[1:])):
                first = rows.iloc[places[0]]
                self.items.append((shard, image, places, first.file, first["size"], rows.prompt[places].tolist()))
            self.starts.append(len(self.items))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> Work | Exception:
        shard, image, places, file, size, prompts = self.items[k]
        try:
            if file and paths.Home.find().resolve(file).stat().st_size != size:
                return ValueError(f"{file} has changed since this extraction was planned: run 02_extract again")
            picture = load_rgb(paths.Home.find().resolve(file), self.longest_side) if file else None
        except Exception as error:
            return error
        try:
            return Work(shard, image, places, self.prompt_processor.prepare(picture, prompts))
        except Exception as error:
            return ValueError(f"{file or 'no image'} with {prompts[0][:80]!r}: {type(error).__name__}: {error} "
                              "(if it is the image: take it out of the dataset and run 01_build_data again)")


class _InOrder(Sampler):
    """The images of shards, each shard asked for when its first image is."""

    def __init__(self, starts: Sequence[int], order: Iterable[int]):
        self.starts, self.order = starts, order

    def __iter__(self) -> Iterator[int]:
        return (k for shard in self.order for k in range(self.starts[shard], self.starts[shard + 1]))


def ahead(preparer: PromptProcessor, longest_side: int | None, shards: Sequence[pd.DataFrame], workers: int,
          order: Iterable[int] | None = None) -> Iterator[Work]:
    """The images of shards, decoded and processed ahead of the model by worker processes.

    Parameters
    ----------
    shards : rows with `file` and `prompt`, those of one image next to each other
    workers : 0 prepares each image when it is asked for
    order : numbers of the shards that are wanted, each taken from it not long before it is worked on; None takes all
    """
    images = _Images(preparer, longest_side, shards)
    workers = min(workers, len(images) // 8)
    start = {"multiprocessing_context": "fork"} if workers and sys.platform == "linux" else {}
    order = _InOrder(images.starts, range(len(shards)) if order is None else order)
    loader = DataLoader(images, batch_size=None, num_workers=workers, worker_init_fn=_quiet, sampler=order, **start)
    for work in loader:
        if isinstance(work, Exception):
            raise work
        if workers:  # a copy of its own frees the worker's shared memory and its file handle
            own = {key: value.clone() for key, value in work.prepared.image.items()}
            work = replace(work, prepared=replace(work.prepared, image=own))
        yield work


def _quiet(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def batches(works: Iterable[Work], budget: Callable[[], int], way: Callable[[], str]) -> Iterator[list[Work]]:
    """Images of one shape together, each with all its prompts, until the next would go over the budget of tokens.

    `budget` may shrink meanwhile, and `way`, on which the number of tokens depends, be found out. Images of rare shapes
    wait for others of theirs, up to four budgets in all; then the fullest batch goes.
    """
    waiting: dict[tuple, list[Work]] = defaultdict(list)
    filled: dict[tuple, int] = defaultdict(int)
    for work in works:
        shape, tokens = input_shape(work.prepared), work.tokens(way())
        if waiting[shape] and filled[shape] + tokens > budget():
            filled.pop(shape)
            yield waiting.pop(shape)
        waiting[shape].append(work)
        filled[shape] += tokens
        if sum(filled.values()) > 4 * budget():
            fullest = max(filled, key=filled.get)
            filled.pop(fullest)
            yield waiting.pop(fullest)
    yield from waiting.values()
