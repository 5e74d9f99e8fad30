"""Which way a model goes: the cheapest one whose states are those of plain passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probekit.models.forward import WAYS, States, run_pooled
from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage

# Largest difference to plain passes, relative to a layer's largest value, by floating type.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}

# What torch says on MPS and on a CPU; only CUDA has an exception of its own.
OUT_OF_MEMORY_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that a device or the machine has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)


@dataclass(frozen=True)
class SharingVerdict:
    """The cheapest way that is exact with a model.

    Attributes
    ----------
    way : str
        Out of :data:`probekit.models.forward.WAYS`.
    reason : str
        What came out when it, and cheaper ways, were tried.
    """

    way: str
    reason: str


def choose_way(
    vlm: Vlm,
    prepared: Sequence[PreparedImage],
    *,
    poolings: Sequence[str],
    stages: Sequence[str],
    ways: Sequence[str],
) -> tuple[SharingVerdict, States]:
    """Choose the first way in which a batch has the states of passes alone, in every layer.

    The last prompt of the image with the most prompts, to which the most could have happened, is
    compared with a pass of its own.

    Parameters
    ----------
    vlm : Vlm
    prepared : sequence of PreparedImage
        b images of one shape with all their prompts.
    poolings, stages : sequence of str
        See :func:`probekit.models.forward.run_pooled`. The poolings "mean" and "last" are compared
        besides.
    ways : sequence of str
        In the order in which they are tried; where all fail it is "alone".

    Returns
    -------
    verdict : SharingVerdict
    states : dict of str to Tensor
        Of the batch, in this way; of the wanted poolings and of those that were compared besides.

    Raises
    ------
    MemoryError, RuntimeError
        A way does not fit the memory (:func:`is_out_of_memory`).
    """
    poolings = list(dict.fromkeys([*poolings, "mean", "last"]))
    compared_image, compared_row = _find_compared_prompt(prepared)
    failures: list[str] = []
    states_alone: States | None = None
    for way in ways:
        try:
            states = run_pooled(vlm, prepared, poolings=poolings, stages=stages, way=way)
        except Exception as error:  # whatever an architecture makes of it, the next way is tried
            if is_out_of_memory(error):
                raise
            failures.append(f"{way}: {type(error).__name__} ({str(error)[:160]})")
            continue
        if states_alone is None:
            states_alone = run_pooled(vlm, [compared_image.with_prompt(-1)], poolings=poolings)
        key, difference = _largest_difference(states, states_alone, row=compared_row)
        if difference <= TOLERANCE[vlm.dtype]:
            success = f"{WAYS[way]}, largest difference to plain passes {difference:.1e} ({key})"
            return SharingVerdict(way, _join_reasons(success, failures)), states
        failures.append(f"{way}: differs by {difference:.1e} ({key})")
    verdict = SharingVerdict("alone", _join_reasons(WAYS["alone"], failures))
    states = run_pooled(vlm, prepared, poolings=poolings, stages=stages, way="alone")
    return verdict, states


def _find_compared_prompt(prepared: Sequence[PreparedImage]) -> tuple[PreparedImage, int]:
    """Return the last image with the most prompts, and the row of its last prompt."""
    prompt_counts = [len(image.tokens) for image in prepared]
    place = max(range(len(prepared)), key=lambda i: (prompt_counts[i], i))
    return prepared[place], sum(prompt_counts[: place + 1]) - 1


def _largest_difference(states: States, states_alone: States, *, row: int) -> tuple[str, float]:
    """Find where one row differs the most from a pass alone, and by how much.

    Differences are relative to the layer's largest value.
    """
    differences = {}
    for key, alone_1d in states_alone.items():
        alone_d = alone_1d[0]
        difference = (states[key][row] - alone_d).abs().max() / alone_1d.abs().max()
        differences[key] = float(difference.nan_to_num(torch.inf))
    worst = max(differences, key=lambda key: differences[key])
    return worst, differences[worst]


def _join_reasons(result: str, failures: Sequence[str]) -> str:
    return "; not ".join([result, *failures])
