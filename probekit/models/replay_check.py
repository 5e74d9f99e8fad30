"""Whether passes of a model can run again: changing nothing must give what plain passes give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from probekit.models.attention import AttentionCut, NoCut
from probekit.models.devices import is_out_of_memory
from probekit.models.forward import States, run_pooled
from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage
from probekit.models.replay import KeptPass, NoReplay
from probekit.models.sharing import PRECISIONS, Difference, find_largest_difference

REPLAY_WAYS = ("shared", "plain")


@dataclass(frozen=True)
class ReplayVerdict:
    """How passes of a model run again.

    Attributes
    ----------
    way : str
        The cheapest of :data:`REPLAY_WAYS` that is exact; ``""`` where none is.
    reason : str
        Why not the cheaper ones.
    why_no_cut : str
        Why attention cannot be cut; ``""`` where it can.
    """

    way: str
    reason: str = ""
    why_no_cut: str = ""


def check_replay(vlm: Vlm, prepared: Sequence[PreparedImage]) -> ReplayVerdict:
    """Find the cheapest way in which nothing changes where nothing is changed.

    Parameters
    ----------
    vlm : Vlm
    prepared : sequence of PreparedImage
        A few images of one shape with a few prompts each.

    Returns
    -------
    ReplayVerdict
        The states of every layer's last token are those of a plain pass; running again from the
        first, a middle and the last block leaves them, and so does cutting no attention. With all
        attention to the image cut, they do not depend on what the image shows.

    Raises
    ------
    MemoryError, RuntimeError
        A pass does not fit the memory (:func:`probekit.models.devices.is_out_of_memory`).
    """
    expected = run_pooled(vlm, prepared, poolings=["last"], way="plain")
    reasons = []
    for way in REPLAY_WAYS:
        try:
            trial = _Trial(vlm, KeptPass(vlm, prepared, way=way), expected)
            reason = trial.why_inexact()
        except NoReplay as error:
            return ReplayVerdict("", str(error), str(error))
        except Exception as error:  # whatever a model raises, this way is not one of its
            if is_out_of_memory(error):
                raise
            reasons.append(f"{way}: {type(error).__name__}: {error}")
            continue
        if not reason:
            return ReplayVerdict(way, "; ".join(reasons), trial.why_no_cut(prepared))
        reasons.append(f"{way}: {reason}")
    reason = "; ".join(reasons)
    return ReplayVerdict("", reason, reason)


class _Trial:
    """A kept pass beside a plain one."""

    def __init__(self, vlm: Vlm, kept: KeptPass, expected: States) -> None:
        self.vlm = vlm
        self.kept = kept
        self.expected = expected
        self.precision = PRECISIONS[vlm.dtype]
        self.first_run = self._by_name(
            {number: kept.last_states(number) for number in range(len(vlm.blocks) + 1)}
        )

    def why_inexact(self) -> str:
        """Say where states are not as they should be; "" where all of them are."""
        difference = self._compare(self.first_run, self.expected, self.precision.padding)
        if difference.excess > 1:
            return f"a pass in parts differs by {difference} from a plain one"
        blocks = len(self.vlm.blocks)
        for layer in sorted({0, blocks // 2, blocks - 1}):
            for names in (("last",), ("text",), ("image", "text")):
                again = self.kept.rerun(layer, dict.fromkeys(names, _unchanged))
                difference = self._compare_with_first_run(again)
                if difference.excess > 1:
                    return f"changing nothing changes {difference}"
        return ""

    def why_no_cut(self, prepared: Sequence[PreparedImage]) -> str:
        """Say in a line why attention cannot be cut; "" where it can."""
        try:
            sets = self.kept.token_sets
            nothing_nt = torch.zeros_like(sets["image"])
            blocks = len(self.vlm.blocks)
            for query_nt in (sets["text"], sets["text"] | sets["image_span"]):
                for layer in sorted({0, blocks // 2}):
                    cut = AttentionCut(range(layer, blocks), query_nt, nothing_nt)
                    difference = self._compare_with_first_run(self.kept.rerun(layer, {}, cut=cut))
                    if difference.excess > 1:
                        return f"cutting nothing changes {difference}"
            return self._why_image_shows(prepared)
        except NoCut as error:
            return str(error)
        except Exception as error:  # whatever a model raises, its attention cannot be cut
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {error}"

    def _why_image_shows(self, prepared: Sequence[PreparedImage]) -> str:
        """Say that the image reaches the answer although no token after it looks at its tokens."""
        inputs = [image.image_inputs for image in prepared]
        swapped = [
            replace(image, image_inputs=other)
            for image, other in zip(prepared, [*inputs[1:], inputs[0]], strict=True)
        ]
        if len(prepared) == 1:
            swapped = [prepared[0].with_inputs(_negative)]
        states = []
        for one in (self.kept, KeptPass(self.vlm, swapped, way=self.kept.way)):
            cut = _cut_from_text(one, one.token_sets["image_span"])
            states.append(self._by_name(one.rerun(0, {}, cut=cut)))
        difference = self._compare(states[1], states[0], self.precision.padding)
        if difference.excess > 1:
            return "the image reaches the answer by another way than its tokens"
        return ""

    def _compare_with_first_run(self, again: Mapping[int, torch.Tensor]) -> Difference:
        states = self._by_name(again)
        expected = {key: self.first_run[key] for key in states}
        return self._compare(states, expected, self.precision.rerun)

    def _compare(self, states: States, expected: States, spread_part: float) -> Difference:
        return find_largest_difference(
            states, expected, spread_part=spread_part, rounding=self.precision.rounding
        )

    def _by_name(self, states: Mapping[int, torch.Tensor]) -> States:
        return {f"{self.vlm.layers[number]}/last": values for number, values in states.items()}


def _cut_from_text(kept: KeptPass, key_nt: torch.Tensor) -> AttentionCut:
    return AttentionCut(range(len(kept.vlm.blocks)), kept.token_sets["text"], key_nt)


def _negative(values: torch.Tensor) -> torch.Tensor:
    return -values if values.is_floating_point() else values


def _unchanged(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
