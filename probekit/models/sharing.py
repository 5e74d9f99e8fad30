"""Which way a model goes: the cheapest one whose states are those of plain passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probekit.models.forward import WAYS, States, run_pooled
from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # torch's words on MPS and CPU


TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}


def is_out_of_memory(error: Exception) -> bool:
    """Did a device or the machine have no memory left? Only CUDA has an exception of its own for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))


@dataclass(frozen=True)
class SharingVerdict:
    """The cheapest way that is exact with a model, and what was found when it was tried."""

    way: str
    reason: str


def choose_way(vlm: Vlm, prepared: Sequence[PreparedImage], poolings: Sequence[str], stages: Sequence[str],
           ways: Sequence[str]) -> tuple[SharingVerdict, States]:
    """The first of `ways` in which a batch of real images has the states of passes alone, in every layer, else "alone".

    The last example of an image with many prompts, to which the most could have happened, is held against a pass of its
    own. Differences are relative to the layer's largest value.

    Returns
    -------
    tuple
        What was chosen, and the batch's states, of the wanted poolings and of those that were compared besides.
    """
    poolings, failed, alone = [*{*poolings, "mean", "last"}], [], {}
    i = max(range(len(prepared)), key=lambda i: (len(prepared[i].tokens), i))
    row = sum(len(one.tokens) for one in prepared[: i + 1]) - 1
    for way in ways:
        try:
            states = run_pooled(vlm, prepared, poolings, stages, way)
        except Exception as error:  # whatever an architecture makes of it: said, and the next way is tried
            if is_out_of_memory(error):
                raise
            failed.append(f"{way}: {type(error).__name__} ({str(error)[:160]})")
            continue
        alone = alone or run_pooled(vlm, [prepared[i].with_prompt(-1)], poolings)
        gaps = {key: float(((states[key][row] - values[0]).abs().max() / values.abs().max()).nan_to_num(torch.inf))
                for key, values in alone.items()}
        where = max(gaps, key=gaps.get)
        if gaps[where] <= TOLERANCE[vlm.dtype]:
            found = f"{WAYS[way]}, largest difference to plain passes {gaps[where]:.1e} ({where})"
            return SharingVerdict(way, "; not ".join([found, *failed])), states
        failed.append(f"{way}: differs by {gaps[where]:.1e} ({where})")
    return SharingVerdict("alone", "; not ".join([WAYS["alone"], *failed])), run_pooled(vlm, prepared, poolings, stages, "alone")
