"""Which way a model goes: the cheapest one whose states are those of plain passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch

from probekit.models.batches import input_shape
from probekit.models.devices import is_out_of_memory
from probekit.models.forward import WAYS, States, run_pooled
from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage


class Precision(NamedTuple):
    """What a floating type lets two right passes differ by.

    Attributes
    ----------
    spread : float
        In standard deviations of a channel over examples.
    rounding : float
        Relative to a channel's mean magnitude.
    padding : float
        Likewise `spread`, but between a padded batch and passes alone, whose difference is the
        measure of all others.
    rerun : float
        Likewise, but between a pass and one of fewer tokens, for which kernels round otherwise.
    prompts : int
        How many show it: noise is measured by several.
    """

    spread: float
    rounding: float
    padding: float
    rerun: float
    prompts: int


PRECISIONS = {
    "float32": Precision(spread=1e-3, rounding=1e-5, padding=1e-3, rerun=1e-3, prompts=4),
    "float16": Precision(spread=1e-2, rounding=5e-4, padding=0.1, rerun=2e-2, prompts=8),
    # After 28 blocks 0.03 was seen between passes of fewer tokens.
    "bfloat16": Precision(spread=2e-2, rounding=4e-3, padding=0.3, rerun=0.1, prompts=8),
}
# Among so many images those of one shape are looked for.
TRIED_IMAGES = 16
# Where a batch has more prompts, only some of them run alone as well.
MOST_COMPARED_ALONE = 9
NOISE_FACTOR = 3  # how much more than the noise of another batching a sound way may differ

# A channel that hardly varies is measured by this part of the layer's median one.
SMALLEST_SPREAD = 0.01
# A sum rounds by the size of what it adds up, which a channel near zero shares with the others.
SMALLEST_MAGNITUDE = 0.1
TINY = 1e-30  # in place of a zero that something is divided by


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


def take_few(images: Iterable[PreparedImage], *, dtype: str) -> list[PreparedImage]:
    """Take what ways are tried on: trying a whole batch would cost as much as many images.

    Parameters
    ----------
    images : iterable of PreparedImage
        No more of them are made than are needed.
    dtype : str
        That of the model.

    Returns
    -------
    list of PreparedImage
        The first images of one shape, each with its shortest and its longest prompt, until there
        are enough prompts (:class:`Precision`).
    """
    batches: dict[tuple, list[PreparedImage]] = defaultdict(list)
    for image in islice(images, TRIED_IMAGES):
        batch = batches[input_shape(image)]
        lengths = [len(tokens["input_ids"]) for tokens in image.tokens]
        longest = max(reversed(range(len(lengths))), key=lengths.__getitem__)
        batch.append(image.with_prompts(sorted({lengths.index(min(lengths)), longest})))
        if sum(len(one.tokens) for one in batch) >= PRECISIONS[dtype].prompts:
            return batch
    return max(batches.values(), key=len)


def choose_way(
    vlm: Vlm,
    prepared: Sequence[PreparedImage],
    *,
    poolings: Sequence[str],
    stages: Sequence[str],
    ways: Sequence[str],
) -> tuple[SharingVerdict, States]:
    """Choose the first way in which a batch has the states of plain passes in all decoder layers.

    Every example is compared with the plain batch, channel by channel. What counts is a difference
    in standard deviations over examples, since that is what a probe sees. The plain batch itself is
    compared with passes alone, for all of a few prompts, or for some of many. What they differ by
    is noise of batching; a sound way may have somewhat more of it. In float32, a way that agrees
    with passes alone needs no measure of that noise, where all prompts ran alone.

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
        A way does not fit the memory (:func:`probekit.models.devices.is_out_of_memory`).
    """
    poolings = list(dict.fromkeys([*poolings, "mean", "last"]))
    trial = _Trial(vlm, prepared, poolings=poolings, stages=stages)
    failures = []
    for way in ways:
        states = trial.run(way)
        if isinstance(states, Exception):
            failures.append(f"{way}: {type(states).__name__} ({str(states)[:160]})")
            continue
        difference = trial.compare(way, states)
        if difference.excess <= 1:
            success = f"{WAYS[way]}, largest difference to plain passes {difference}"
            return SharingVerdict(way, _join_reasons(success, failures)), states
        times = f"{difference.excess:.1f} times what rounding explains"
        failures.append(f"{way}: differs by {difference}, {times}")
    verdict = SharingVerdict("alone", _join_reasons(WAYS["alone"], failures))
    states = run_pooled(vlm, prepared, poolings=poolings, stages=stages, way="alone")
    return verdict, states


class Difference(NamedTuple):
    """Where states differ the most.

    `excess` is relative to what is tolerated, `deviations` in standard deviations over examples.
    """

    excess: float
    deviations: float
    key: str

    def __str__(self) -> str:
        return f"{self.deviations:.1e} standard deviations ({self.key})"


class _Trial:
    """One batch, run in several ways, and some of its prompts alone."""

    def __init__(
        self,
        vlm: Vlm,
        prepared: Sequence[PreparedImage],
        *,
        poolings: Sequence[str],
        stages: Sequence[str],
    ) -> None:
        self.vlm = vlm
        self.prepared = prepared
        self.poolings = poolings
        self.stages = stages
        self.precision = PRECISIONS[vlm.dtype]
        self.prompts = _find_compared_prompts(prepared)
        self._states_by_way: dict[str, States | Exception] = {}
        each = [
            run_pooled(vlm, [prepared[image].with_prompt(k)], poolings=poolings)
            for image, k in self.prompts
        ]
        self.states_alone = {key: torch.cat([states[key] for states in each]) for key in each[0]}

    def run(self, way: str) -> States | Exception:
        """Run the batch, once in each way; an error is a result, too, whatever raises it."""
        if way not in self._states_by_way:
            try:
                self._states_by_way[way] = run_pooled(
                    self.vlm, self.prepared, poolings=self.poolings, stages=self.stages, way=way
                )
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self._states_by_way[way] = error
        return self._states_by_way[way]

    def compare(self, way: str, states: States) -> Difference:
        """Compare a way with the plain batch, and that with passes alone.

        The plain batch need not run where all prompts ran alone and no more noise is allowed for.
        """
        all_ran_alone = len(self.prompts) == sum(len(image.tokens) for image in self.prepared)
        if all_ran_alone and self.precision.padding <= self.precision.spread:
            difference = self._compare_with_alone(states)
            if difference.excess <= 1:
                return difference
        plain = states if way == "plain" else self.run("plain")
        if isinstance(plain, Exception):
            return self._compare_with_alone(states)
        of_padding = self._compare_with_alone(plain)
        if way == "plain":
            return of_padding
        if of_padding.excess > 1:
            return self._compare_with_alone(states)
        noise = {}
        for key, values in self._select_compared(plain).items():
            noise[key] = (values - self.states_alone[key]).square().mean(0).sqrt()
        return find_largest_difference(
            states,
            {key: plain[key] for key in self.states_alone},
            spread_part=self.precision.spread,
            rounding=self.precision.rounding,
            noise=noise,
        )

    def _compare_with_alone(self, states: States) -> Difference:
        return find_largest_difference(
            self._select_compared(states),
            self.states_alone,
            spread_part=self.precision.padding,
            rounding=self.precision.rounding,
        )

    def _select_compared(self, states: States) -> States:
        """Select the rows of the compared prompts, of the decoder's layers."""
        counts = [len(image.tokens) for image in self.prepared]
        rows = [sum(counts[:image]) + k for image, k in self.prompts]
        return {key: states[key][rows] for key in self.states_alone}


def _find_compared_prompts(prepared: Sequence[PreparedImage]) -> list[tuple[int, int]]:
    """Find the prompts that run alone, too: all of what :func:`take_few` takes.

    Of larger batches the first and last prompts of the first and last image and of the one with the
    most. Each is the number of an image, and that of a prompt.
    """
    counts = [len(image.tokens) for image in prepared]
    if sum(counts) <= MOST_COMPARED_ALONE:
        return [(image, k) for image, count in enumerate(counts) for k in range(count)]
    images = {0, len(counts) - 1, counts.index(max(counts))}
    return sorted({(image, k) for image in images for k in (0, counts[image] - 1)})


def find_largest_difference(
    states: States,
    expected: States,
    *,
    spread_part: float,
    rounding: float,
    noise: States | None = None,
) -> Difference:
    """Find the example and layer that differ the most, relative to what is tolerated.

    Each channel is measured by what it may differ by; the root mean square over channels counts,
    so neither a channel that is large nor one that never changes hides the others.
    """
    differences = []
    for key, expected_nd in expected.items():
        spread_d = expected_nd.std(0, correction=0)
        spread_d = spread_d.clamp(min=float(spread_d.median()) * SMALLEST_SPREAD)
        magnitude_d = expected_nd.abs().mean(0)
        magnitude_d = magnitude_d.clamp(min=float(magnitude_d.median()) * SMALLEST_MAGNITUDE)
        tolerated_d = spread_part * spread_d + rounding * magnitude_d
        if noise is not None:
            tolerated_d = tolerated_d + NOISE_FACTOR * noise[key]
        smallest = max(float(tolerated_d.median()) * SMALLEST_SPREAD, TINY)
        error_nd = (states[key] - expected_nd).abs().nan_to_num(torch.inf)
        excess_n = (error_nd / tolerated_d.clamp(min=smallest)).square().mean(1).sqrt()
        row = int(excess_n.argmax())
        deviations = float((error_nd[row] / spread_d.clamp(min=TINY)).median())
        differences.append(Difference(float(excess_n[row]), deviations, key))
    return max(differences)


def _join_reasons(result: str, failures: Sequence[str]) -> str:
    return "; not ".join([result, *failures])
