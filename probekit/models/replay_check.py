"""Whether passes of a model can run again: changing nothing must give what plain passes give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from probekit.models.attention import AttentionCut, NoCut
from probekit.models.devices import is_out_of_memory
from probekit.models.forward import States, run_pooled
from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage
from probekit.models.replay import KeptPass, NoReplay
from probekit.models.sharing import PRECISIONS, find_largest_difference

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
            kept = KeptPass(vlm, prepared, way=way)
            difference = _largest_difference(vlm, kept, expected)
        except NoReplay as error:
            return ReplayVerdict("", str(error), str(error))
        except Exception as error:  # whatever a model raises, this way is not one of its
            if is_out_of_memory(error):
                raise
            reasons.append(f"{way}: {type(error).__name__}: {error}")
            continue
        if difference is None:
            return ReplayVerdict(way, "; ".join(reasons), _why_no_cut(vlm, kept, prepared=prepared))
        reasons.append(f"{way}: {difference}")
    reason = "; ".join(reasons)
    return ReplayVerdict("", reason, reason)


def _largest_difference(vlm: Vlm, kept: KeptPass, expected: States) -> str | None:
    """Say where states are not as they should be; None where all of them are."""
    precision = PRECISIONS[vlm.dtype]
    blocks = len(vlm.blocks)
    first_run = {number: kept.last_states(number) for number in range(blocks + 1)}
    difference = find_largest_difference(
        _by_name(vlm, first_run),
        expected,
        spread_part=precision.padding,
        rounding=precision.rounding,
    )
    if difference.excess > 1:
        return f"a pass in parts differs by {difference} from a plain one"
    for layer in sorted({0, blocks // 2, blocks - 1}):
        for names in (("last",), ("text",), ("image", "text")):
            again = kept.rerun(layer, dict.fromkeys(names, _unchanged))
            difference = find_largest_difference(
                _by_name(vlm, again),
                _by_name(vlm, {number: first_run[number] for number in again}),
                spread_part=precision.spread,
                rounding=precision.rounding,
            )
            if difference.excess > 1:
                return f"changing nothing changes {difference}"
    return None


def _why_no_cut(vlm: Vlm, kept: KeptPass, *, prepared: Sequence[PreparedImage]) -> str:
    precision = PRECISIONS[vlm.dtype]
    try:
        nothing_nt = torch.zeros_like(kept.token_sets["image"])
        uncut = kept.rerun(0, {}, cut=_cut_from_text(kept, nothing_nt))
        difference = find_largest_difference(
            _by_name(vlm, uncut),
            _by_name(vlm, {number: kept.last_states(number) for number in uncut}),
            spread_part=precision.spread,
            rounding=precision.rounding,
        )
        if difference.excess > 1:
            return f"cutting nothing changes {difference}"
        return _why_image_shows(vlm, kept, prepared=prepared)
    except NoCut as error:
        return str(error)
    except Exception as error:  # whatever a model raises, its attention cannot be cut
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"


def _why_image_shows(vlm: Vlm, kept: KeptPass, *, prepared: Sequence[PreparedImage]) -> str:
    """Say that the image reaches the answer although no token after it looks at its tokens."""
    precision = PRECISIONS[vlm.dtype]
    inputs = [image.image_inputs for image in prepared]
    swapped = [
        replace(image, image_inputs=other)
        for image, other in zip(prepared, [*inputs[1:], inputs[0]], strict=True)
    ]
    if len(prepared) == 1:
        swapped = [prepared[0].with_inputs(lambda one: -one if one.is_floating_point() else one)]
    states = []
    for one in (kept, KeptPass(vlm, swapped, way=kept.way)):
        cut = _cut_from_text(one, one.token_sets["image_span"])
        states.append(_by_name(vlm, one.rerun(0, {}, cut=cut)))
    difference = find_largest_difference(
        states[1], states[0], spread_part=precision.padding, rounding=precision.rounding
    )
    if difference.excess > 1:
        return "the image reaches the answer by another way than its tokens"
    return ""


def _cut_from_text(kept: KeptPass, key_nt: torch.Tensor) -> AttentionCut:
    return AttentionCut(range(len(kept.vlm.blocks)), kept.token_sets["text"], key_nt)


def _unchanged(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _by_name(vlm: Vlm, states: dict[int, torch.Tensor]) -> States:
    return {f"{vlm.layers[number]}/last": values_nd for number, values_nd in states.items()}
