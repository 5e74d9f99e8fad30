"""A model's forward passes over batches of images: which way it goes, and batches that fit its memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from tqdm.auto import tqdm

from probekit.extraction import loading
from probekit.extraction.shards import Part, meta_of, write_meta
from probekit.extraction.shared import Shared
from probekit.models import forward, sharing
from probekit.models.forward import States
from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage
from probekit.models.sharing import SharingVerdict

SHARING = {"auto": ("shared", "encoded", "plain"), "on": ("shared",), "off": ("plain",)}


class Passes:
    """Forward passes in the way that suits a model.

    Which way that is, is settled on the first images of a job that have several prompts, once for all who work on it;
    ``meta.json`` keeps it. Images with one prompt cannot tell: the prompt is all prefix. Where there are but such, they
    are run plainly, or alone where batches are not exact.

    Attributes
    ----------
    budget : tokens of a batch; becomes smaller where one does not fit the memory
    meta : what ``meta.json`` says besides
    """

    def __init__(self, vlm: Vlm, sharing: str, budget: int, longest_side: int | None, shared: Shared, meta: dict):
        self.vlm, self.sharing, self.budget, self.longest_side = vlm, sharing, budget, longest_side
        self.shared, self.meta, self.record = shared, meta, shared.folder / "meta.json"
        self.choice: SharingVerdict | None = None
        self.single: SharingVerdict | None = None  # where no image has several prompts
        self.shared.pull(self.record)
        if meta_of(shared.folder) is None:
            self._write(None)

    @property
    def way(self) -> str:
        choice = self.choice or self.single
        return choice.way if choice else "plain"

    def __call__(self, batch: Sequence[loading.Work], part: Part) -> States:
        """Pooled states of a batch, as :func:`probekit.models.forward.run_pooled` gives them.

        Raises
        ------
        MemoryError
            A single prompt with its image does not fit the memory.
        """
        return self._fitting([work.prepared for work in batch], lambda prepared: forward.run_pooled(
            self.vlm, prepared, part.poolings, part.stages, self.way))

    # ---------------------------------------------------------------------------------------------------- the way

    def settle(self, shards: Sequence[tuple[Part, int]]) -> None:
        """Find out which way the model goes, or read what was found; `shards` are those to be made."""
        if self._read():
            return
        several = next(filter(None, (self._first(part, i, True) for part, i in shards)), None)
        while several and not self._read():  # by now another worker may have found it
            if self.shared.claim(self.record):
                try:
                    if not self._read():
                        choice = self._choose(*several, SHARING[self.sharing])
                        self._heed(choice)
                        self._write(choice)
                    self.shared.finished(self.record)
                except BaseException:
                    self.shared.give_up(self.record)
                    raise
            else:
                time.sleep(1)
        if not several:
            one = next(filter(None, (self._first(part, i, False) for part, i in shards)), None)
            self.single = self._choose(*one, ("plain",)) if one else None

    def _first(self, part: Part, i: int, several: bool) -> tuple[list[loading.Work], Part] | None:
        """The first batch of a shard's images that have several prompts (or of any)."""
        rows = part.shard_rows(i)
        rows = rows[(rows.file != "") & (rows.groupby("file").prompt.transform("size") > several)]
        if "lm" not in part.stages or rows.empty:
            return None
        works = loading.ahead(self.vlm.prompt_processor, self.longest_side, [rows.reset_index(drop=True)], 0)
        return next(loading.batches(works, lambda: self.budget, lambda: "plain")), part

    def _choose(self, batch: Sequence[loading.Work], part: Part, ways: Sequence[str]) -> SharingVerdict:
        found: list[SharingVerdict] = []

        def tried(prepared: Sequence[PreparedImage]) -> States:
            choice, states = sharing.choose_way(self.vlm, prepared, part.poolings, part.stages, ways)
            found.append(choice)
            return states

        self._fitting([work.prepared for work in batch], tried)
        return found[0]

    def _read(self) -> bool:
        self.shared.pull(self.record)
        known = (meta_of(self.shared.folder) or {}).get("sharing")
        if known:
            self._heed(SharingVerdict(**known))
        return bool(known)

    def _heed(self, choice: SharingVerdict) -> None:
        if self.sharing == "on" and choice.way != "shared":
            raise ValueError(f"sharing=\"on\", but with {self.vlm.name} {choice.words}; take sharing=\"auto\" or "
                             "\"off\"")
        if choice != self.choice:
            tqdm.write(f"{self.vlm.name}: {choice.words}")
        self.choice = choice

    def _write(self, choice: SharingVerdict | None) -> None:
        write_meta(self.shared.folder, self.meta | {"sharing": asdict(choice) if choice else None})
        self.shared.push(self.record)

    # ----------------------------------------------------------------------------------------------------- memory

    def _fitting(self, prepared: Sequence[PreparedImage], run: Callable[[Sequence[PreparedImage]], States]) -> States:
        """What `run` says of images with their prompts, in halves where it runs out of memory."""
        try:
            return run(prepared)
        except (MemoryError, RuntimeError) as error:
            if not sharing.is_out_of_memory(error):
                raise
            told = str(error).partition("\n")[0]
        gc.collect()  # outside the except: a traceback holds on to what did not fit
        if self.vlm.device.startswith("cuda"):
            torch.cuda.empty_cache()
        tokens = sum(len(row["input_ids"]) for one in prepared for row in one.tokens)
        halves = _halves(prepared)
        if halves is None:
            raise MemoryError(f"one prompt with its image, {tokens:,} tokens, does not fit the memory of "
                              f"{self.vlm.device}: take a smaller longest_side, or a half-precision dtype ({told})")
        if self.budget > 1:
            self.budget = max(1, min(self.budget, tokens) // 2)
            tqdm.write(f"{self.vlm.name}: a batch of {tokens:,} tokens does not fit the memory of {self.vlm.device}: "
                       f"halved, and batches of {self.budget:,} tokens from here on")
        first, second = (self._fitting(half, run) for half in halves)
        of_images = len(prepared) > 1
        return {key: torch.cat([first[key], second[key]]) if of_images or key.startswith("lm.") else first[key]
                for key in first}


def _halves(prepared: Sequence[PreparedImage]) -> tuple[Sequence[PreparedImage], Sequence[PreparedImage]] | None:
    """The images, or the prompts of the only one, in two halves; None where there is but one prompt."""
    if len(prepared) > 1:
        return prepared[: len(prepared) // 2], prepared[len(prepared) // 2 :]
    one, half = prepared[0], len(prepared[0].tokens) // 2
    if not half:
        return None
    return ([replace(one, tokens=one.tokens[:half], shown=one.image_masks[:half])],
            [replace(one, tokens=one.tokens[half:], shown=one.image_masks[half:])])
