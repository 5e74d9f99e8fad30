"""Images and prompts on their way to the model: prepared ahead by workers, then batched."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from probekit.extraction.shards import unit_numbers
from probekit.images import load_rgb
from probekit.models.batches import count_tokens, input_shape
from probekit.models.devices import copy_to, is_out_of_memory
from probekit.models.processor import PreparedImage, PromptProcessor
from probekit.paths import Home

FORKS = sys.platform == "linux"  # whether workers are copies of this process
PLAIN_SIZE = (224, 224)  # pixels of an image that every processor should take
PREFETCHED_IMAGES = 4  # per worker
IMAGES_PER_WORKER = 8  # fewer are not worth a process
WAITING_BUDGETS = 4  # batches' worth of tokens that may wait for images of their shape


Item = TypeVar("Item")


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
        return count_tokens([self.prepared], way)


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
        dtype: torch.dtype,
        tables: Sequence[pd.DataFrame],
        home: Home,
    ) -> None:
        self.processor = processor
        self.longest_side = longest_side
        self.dtype = dtype
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
        return WorkItem(item.table, item.image, item.rows, prepared.with_inputs(self._cast))

    def _cast(self, values: torch.Tensor) -> torch.Tensor:
        """Change pixels to the model's type: on their way they take half the room."""
        return values.to(self.dtype) if values.is_floating_point() else values

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
    dtype: str = "float32",
    workers: int = 0,
    order: Iterable[int] | None = None,
) -> Iterator[WorkItem]:
    """Decode and process the images of tables ahead of the model, in worker processes.

    A worker has at most :data:`PREFETCHED_IMAGES` images ready.

    Parameters
    ----------
    processor : PromptProcessor
    tables : sequence of DataFrame
        With `file`, `size` and `prompt`, rows of one image side by side.
    longest_side : int or None
        Pixels that bound an image.
    home : Home
        Where relative files start.
    dtype : str
        The model's, to which pixels are changed.
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
    dataset = _ImageDataset(
        processor,
        longest_side=longest_side,
        dtype=getattr(torch, dtype),
        tables=tables,
        home=home,
    )
    workers = workers_for(len(dataset), workers)
    order = range(len(tables)) if order is None else order
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCHED_IMAGES if workers else None,
        collate_fn=_pack if workers else _leave,
        worker_init_fn=_silence_tokenizers,
        sampler=_TableOrder(dataset.table_starts, order),
        multiprocessing_context="fork" if workers and FORKS else None,
    )
    for item in loader:
        if isinstance(item, Exception):
            raise item
        yield _unpack(item) if workers else item


def workers_for(images: int, workers: int) -> int:
    """Return how many processes are worth starting for so many images."""
    return min(workers, images // IMAGES_PER_WORKER)


@contextmanager
def name_lost_workers() -> Iterator[None]:
    """Name the fix where a worker process ends before its time.

    torch raises that in the main thread, whichever thread waits for the worker.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            f"{error}: take workers=0, which prepares images in this process, or fewer workers"
        ) from error


def _leave(item: Any) -> Any:
    return item


class _PackedTensor(NamedTuple):
    """The bytes of a tensor, of any type: numpy has no bfloat16."""

    bytes: np.ndarray
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _PackedTensor:
        return cls(tensor.contiguous().view(torch.uint8).numpy(), tensor.dtype)

    @property
    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.bytes).view(self.dtype)


def _pack(item: Any) -> Any:
    """Make a worker send an item through its pipe: as arrays.

    Tensors would go through shared memory, of which containers have little: where it is full, the
    item is lost and waited for.
    """
    if not isinstance(item, WorkItem):
        return item
    return replace(item, prepared=item.prepared.with_inputs(_PackedTensor.of))


def _unpack(item: WorkItem) -> WorkItem:
    return replace(item, prepared=item.prepared.with_inputs(lambda packed: packed.tensor))


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


def look_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Make the next item in a thread while the one before is worked on."""
    iterator = iter(items)
    end = object()
    item = next(iterator, end)  # in this thread, in which worker processes are started
    with ThreadPoolExecutor(max_workers=1) as thread:
        while item is not end:
            following = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]  # it is not the end
            item = following.result()


def copy_pixels(batch: list[WorkItem], device: str) -> list[WorkItem]:
    """Copy the pixels of a batch to a device; what does not fit there yet stays where it is.

    Masks and sizes are looked at on the CPU.
    """
    copied = []
    try:
        for item in batch:
            inputs = {
                name: copy_to(device, values)
                if values.is_floating_point() and "mask" not in name
                else values
                for name, values in item.prepared.image_inputs.items()
            }
            copied.append(replace(item, prepared=replace(item.prepared, image_inputs=inputs)))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return batch
    return copied
