"""Images and prompts on their way to the model: prepared ahead by workers, then batched."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from probekit.extraction.shards import unit_numbers
from probekit.images import load_rgb
from probekit.models.batches import input_shape
from probekit.models.processor import PreparedImage, PromptProcessor
from probekit.paths import Home

PLAIN_SIZE = (224, 224)  # pixels of an image that every processor should take
WAITING_BUDGETS = 4  # batches' worth of tokens that may wait for images of their shape


@dataclass(frozen=True)
class WorkItem:
    """One image of a table with its prompts, or a prompt without an image.

    Attributes
    ----------
    table : int
        Which of the tables that are worked on.
    image : int
        Its place among the table's images.
    rows : ndarray of int
        Places of its prompts among the table's rows.
    prepared : PreparedImage
        What the processor makes of it.
    """

    table: int
    image: int
    rows: np.ndarray
    prepared: PreparedImage

    def count_tokens(self, way: str) -> int:
        """Count the tokens that the decoder computes for it, going one of the `WAYS`."""
        lengths = [len(tokens["input_ids"]) for tokens in self.prepared.tokens]
        if way != "shared":
            return sum(lengths)
        return sum(lengths) - self.prepared.prefix_length * (len(lengths) - 1)


class _ImageRow(NamedTuple):
    table: int
    image: int
    rows: np.ndarray
    file: str
    size: int
    prompts: list[str]


class _ImageDataset(Dataset):
    """The images of several tables, one after the other; an error is an item too."""

    def __init__(
        self,
        processor: PromptProcessor,
        *,
        longest_side: int | None,
        tables: Sequence[pd.DataFrame],
        home: Home,
    ) -> None:
        self.processor = processor
        self.longest_side = longest_side
        self.home = home
        self.items: list[_ImageRow] = []
        self.table_starts = [0]
        for number, table in enumerate(tables):
            self.items += _image_rows(number, table)
            self.table_starts.append(len(self.items))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> WorkItem | Exception:
        item = self.items[k]
        try:
            image = self._load(item)
        except Exception as error:
            return error
        try:
            prepared = self.processor.prepare(image, item.prompts)
        except Exception as error:
            return ValueError(
                f"{item.file or 'no image'} with {item.prompts[0][:80]!r}: {type(error).__name__}: "
                f"{error} ({self._find_fault(item)})"
            )
        return WorkItem(item.table, item.image, item.rows, prepared)

    def _find_fault(self, item: _ImageRow) -> str:
        """Say whether it is the image that cannot be processed, and the fix.

        It is where the same prompts go through with a plain grey image.
        """
        if not item.file:
            return "the model's processor cannot take this prompt without an image"
        plain = Image.new("RGB", PLAIN_SIZE, "grey")
        try:
            self.processor.prepare(plain, item.prompts)
        except Exception:
            return (
                "it is not the image, a plain grey one fails too: the model's processor cannot "
                "take these prompts"
            )
        return (
            "it is the image, a plain grey one goes through: take it out of the dataset and run "
            "01_build_data again"
        )

    def _load(self, item: _ImageRow):
        if not item.file:
            return None
        if not is_unchanged(item.file, item.size, self.home):
            raise ValueError(
                f"{item.file} is gone or has changed since this extraction was planned: run "
                "02_extract again"
            )
        return load_rgb(self.home.resolve(item.file), self.longest_side)


def is_unchanged(file: str, size: int, home: Home) -> bool:
    """Return whether an image file is there and has the size in bytes that it was planned with."""
    path = home.resolve(file)
    return path.is_file() and path.stat().st_size == size


def _image_rows(number: int, table: pd.DataFrame) -> list[_ImageRow]:
    starts = np.flatnonzero(np.diff(unit_numbers(table), prepend=-1))
    rows_per_image = np.split(np.arange(len(table)), starts[1:])
    image_rows = []
    for image, rows in enumerate(rows_per_image):
        first = table.iloc[rows[0]]
        prompts = table.prompt.iloc[rows].tolist()
        image_rows.append(_ImageRow(number, image, rows, first["file"], first["size"], prompts))
    return image_rows


class _TableOrder(Sampler):
    """The images of tables; each table is taken from `order` when its first image is needed."""

    def __init__(self, table_starts: Sequence[int], order: Iterable[int]) -> None:
        self.table_starts = table_starts
        self.order = order

    def __iter__(self) -> Iterator[int]:
        for table in self.order:
            yield from range(self.table_starts[table], self.table_starts[table + 1])


def prepare_images(
    processor: PromptProcessor,
    tables: Sequence[pd.DataFrame],
    *,
    longest_side: int | None,
    home: Home,
    workers: int = 0,
    order: Iterable[int] | None = None,
) -> Iterator[WorkItem]:
    """Decode and process the images of tables ahead of the model, in worker processes.

    Parameters
    ----------
    processor : PromptProcessor
    tables : sequence of DataFrame
        With `file`, `size` and `prompt`, rows of one image side by side.
    longest_side : int or None
        Pixels that bound an image.
    home : Home
        Where relative files start.
    workers : int
        0 prepares each image when it is needed.
    order : iterable of int
        Numbers of the tables that are wanted; each is taken not long before it is worked on. None
        takes all.

    Raises
    ------
    OSError, ValueError
        An image cannot be read or processed; the message names it.
    """
    dataset = _ImageDataset(processor, longest_side=longest_side, tables=tables, home=home)
    workers = min(workers, len(dataset) // 8)
    order = range(len(tables)) if order is None else order
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        collate_fn=_pack if workers else _leave,
        worker_init_fn=_silence_tokenizers,
        sampler=_TableOrder(dataset.table_starts, order),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    for item in _name_the_fix(loader):
        if isinstance(item, Exception):
            raise item
        yield _with_inputs(item, torch.from_numpy) if workers else item


def _name_the_fix(loader: DataLoader) -> Iterator[Any]:
    try:
        yield from loader
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise RuntimeError(
            f"{error}: take workers=0, which prepares images in this process, or fewer workers"
        ) from error


def _leave(item: Any) -> Any:
    return item


def _pack(item: Any) -> Any:
    """Make a worker send an item through its pipe: as arrays.

    Tensors would go through shared memory, of which containers have little: where it is full, the
    item is lost and waited for.
    """
    return _with_inputs(item, torch.Tensor.numpy) if isinstance(item, WorkItem) else item


def _with_inputs(item: WorkItem, change: Callable[[Any], Any]) -> WorkItem:
    """Return an item with each of the image's inputs changed."""
    inputs = {name: change(value) for name, value in item.prepared.image_inputs.items()}
    return replace(item, prepared=replace(item.prepared, image_inputs=inputs))


def _silence_tokenizers(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def fill_batches(
    items: Iterable[WorkItem], *, token_budget: Callable[[], int], way: Callable[[], str]
) -> Iterator[list[WorkItem]]:
    """Put images of one shape together, each with all its prompts, until a batch is full.

    Images of rare shapes wait for others of theirs, up to :data:`WAITING_BUDGETS` budgets in all;
    then the fullest batch goes.

    Parameters
    ----------
    items : iterable of WorkItem
    token_budget : callable
        Tokens of a batch; may shrink meanwhile.
    way : callable
        The way the model goes, on which the number of tokens depends; may be settled meanwhile.
    """
    waiting: dict[tuple, list[WorkItem]] = defaultdict(list)
    waiting_tokens: dict[tuple, int] = defaultdict(int)
    for item in items:
        shape = input_shape(item.prepared)
        tokens = item.count_tokens(way())
        if waiting[shape] and waiting_tokens[shape] + tokens > token_budget():
            waiting_tokens.pop(shape)
            yield waiting.pop(shape)
        waiting[shape].append(item)
        waiting_tokens[shape] += tokens
        if sum(waiting_tokens.values()) > WAITING_BUDGETS * token_budget():
            fullest = max(waiting_tokens, key=lambda one: waiting_tokens[one])
            waiting_tokens.pop(fullest)
            yield waiting.pop(fullest)
    yield from waiting.values()
