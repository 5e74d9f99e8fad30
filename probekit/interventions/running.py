"""Run a model again and again over test images, each time with one intervention, and read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from probekit import paths
from probekit.extraction import loading, shards
from probekit.interventions.concepts import FittedEdits
from probekit.interventions.edits import NoEdit
from probekit.interventions.object_tokens import ELSEWHERE, NO_OBJECT, OBJECT, ObjectMarker
from probekit.interventions.settings import CUT, NOTHING, OBJECT_ROUTE, RANDOM, Intervention
from probekit.models.attention import AttentionCut, NoCut
from probekit.models.budget import TokenBudget
from probekit.models.devices import copy_to
from probekit.models.load import Vlm
from probekit.models.output_head import AnswerHead
from probekit.models.processor import PreparedImage
from probekit.models.replay import KeptPass
from probekit.models.replay_check import ReplayVerdict
from probekit.probes.weights import ProbeWeights

SHARD_IMAGES = 50  # test images whose results lie in one file per layer
NOT_FINITE = "states are not finite after it"


class Readings(NamedTuple):
    """What is read off a model after an intervention.

    Attributes
    ----------
    answers_na : ndarray
        (n, a) float32 logits of the answers; NaN for examples that an intervention does not touch.
    probes_lnc : ndarray
        (l, n, c) float32 log-odds of the probes of the layer where it begins and of all later ones;
        c is 0 where there are no probes.
    """

    answers_na: np.ndarray
    probes_lnc: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Readings]) -> Readings:
        """Put the readings of several batches together."""
        return cls(
            np.concatenate([part.answers_na for part in parts]),
            np.concatenate([part.probes_lnc for part in parts], axis=1),
        )

    def only(self, counts_n: np.ndarray) -> Readings:
        """Return NaN for the answers of all other examples."""
        return Readings(np.where(counts_n[:, None], self.answers_na, np.nan), self.probes_lnc)

    def select(self, order: np.ndarray) -> Readings:
        """Return the examples in another order."""
        return Readings(self.answers_na[order], self.probes_lnc[:, order])


class Reader:
    """Reads answers and probes off the states of the last token.

    Parameters
    ----------
    head : AnswerHead
    tokens : sequence of sequence of int
        Of each answer, see :meth:`probekit.models.output_head.AnswerHead.answer_tokens`.
    weights : ProbeWeights or None
        Probes of all layers of the decoder; None where there are none.
    vlm : Vlm
    """

    def __init__(
        self,
        head: AnswerHead,
        tokens: Sequence[Sequence[int]],
        weights: ProbeWeights | None,
        vlm: Vlm,
    ) -> None:
        self._logits = head.on(vlm.device)
        self._tokens = tokens
        self._last = len(vlm.blocks)
        self._probes = []
        if weights is not None:
            for place in range(len(vlm.layers)):
                weight_dc, intercept_c = weights.raw_weights(place)
                self._probes.append(
                    (copy_to(vlm.device, weight_dc), copy_to(vlm.device, intercept_c))
                )

    def __call__(self, states: Mapping[int, torch.Tensor]) -> Readings:
        """Read the states (n, d) of some layers, the last one among them."""
        last_nd = states[self._last]
        logits_nv = self._logits(last_nd, is_normed=True)
        answers_na = torch.stack(
            [logits_nv[:, places].logsumexp(1) for places in map(list, self._tokens)], 1
        )
        if self._probes:
            probes_lnc = torch.stack(
                [
                    states[layer] @ self._probes[layer][0] + self._probes[layer][1]
                    for layer in sorted(states)
                ]
            )
        else:
            probes_lnc = last_nd.new_zeros(len(states), len(last_nd), 0)
        return Readings(answers_na.cpu().numpy(), probes_lnc.cpu().numpy())


@dataclass(frozen=True)
class Work:
    """What is done to one model for one task, and where the readings go.

    Attributes
    ----------
    folder : Path
        Of their files.
    examples : DataFrame
        n test examples of the task, rows of one image side by side.
    interventions : sequence of Intervention
        Layer by layer.
    fingerprint : str
        Of all that decides the readings besides layer and interventions.
    """

    folder: Path
    examples: pd.DataFrame
    interventions: Sequence[Intervention]
    fingerprint: str

    @property
    def by_layer(self) -> dict[int, list[Intervention]]:
        """The interventions that begin at each layer."""
        by_layer: dict[int, list[Intervention]] = {}
        for one in self.interventions:
            by_layer.setdefault(one.layer, []).append(one)
        return by_layer

    def shards(self) -> list[pd.DataFrame]:
        """Return the examples of :data:`SHARD_IMAGES` images each, with their `row` of all."""
        number_n = pd.factorize(self.examples.file)[0] // SHARD_IMAGES
        numbered = self.examples.assign(row=np.arange(len(self.examples)))
        return [rows.reset_index(drop=True) for _, rows in numbered.groupby(number_n)]

    def file(self, shard: int, layer: int) -> Path:
        """Return the file of what a shard's examples give for the interventions of a layer."""
        done = [tuple(one) for one in self.by_layer[layer]]
        fingerprint = paths.fingerprint(self.fingerprint, done)
        return self.folder / f"shard-{shard:03d}-lm.{layer:02d}-{fingerprint}.safetensors"

    def missing(self) -> list[tuple[int, list[int]]]:
        """Return for each shard that is not done the layers that are missing."""
        missing = []
        for shard in range(len(self.shards())):
            left = [layer for layer in self.by_layer if not self.file(shard, layer).exists()]
            if left:
                missing.append((shard, left))
        return missing

    def read(self, layer: int) -> tuple[list[Readings | None], list[str]]:
        """Read what was done at a layer to all examples: one entry for each intervention.

        Returns
        -------
        readings : list of Readings or None
            None where an intervention could not be done.
        reasons : list of str
            Why it could not be done.
        """
        parts = [_read_file(self.file(shard, layer)) for shard in range(len(self.shards()))]
        count = len(parts[0])
        readings: list[Readings | None] = []
        reasons = []
        for place in range(count):
            reason = next((part[place][1] for part in parts if part[place][1]), "")
            reasons.append(reason)
            done = [part[place][0] for part in parts]
            readings.append(None if reason else Readings.join([one for one in done if one]))
        return readings, reasons


def run_interventions(
    work: Work,
    vlm: Vlm,
    edits: FittedEdits,
    reader: Reader,
    verdict: ReplayVerdict,
    marker: ObjectMarker | None,
    *,
    settings: Mapping[str, Any],
    home: paths.Home,
) -> None:
    """Do what is not on disk yet: every intervention on each test example.

    Parameters
    ----------
    work : Work
    vlm : Vlm
    edits : FittedEdits
    reader : Reader
    verdict : ReplayVerdict
        How its passes run again.
    marker : ObjectMarker or None
        Of the tokens of asked objects; None where no route needs them.
    settings : mapping
        Of the extraction: `longest_side` and `batch_tokens`.
    home : Home
        Where relative files start.

    Raises
    ------
    OSError, ValueError, MemoryError
        An image cannot be read or does not fit the memory; what is done is on disk.
    """
    missing = work.missing()
    layers_missing = {layer for _, layers in missing for layer in layers}
    edits.fit([one for one in work.interventions if one.layer in layers_missing])
    tables = work.shards()
    total = sum(
        tables[shard].file.nunique() * sum(len(work.by_layer[layer]) for layer in layers)
        for shard, layers in missing
    )
    description = f"interventions on {vlm.name}"
    with tqdm(total=total, desc=description, unit=" passes", unit_scale=True) as bar:
        for shard, layers in missing:
            _run_shard(
                tables[shard],
                {layer: work.by_layer[layer] for layer in layers},
                files={layer: work.file(shard, layer) for layer in layers},
                vlm=vlm,
                edits=edits,
                reader=reader,
                verdict=verdict,
                marker=marker,
                settings=settings,
                home=home,
                bar=bar,
            )


def _run_shard(
    table: pd.DataFrame,
    planned: Mapping[int, Sequence[Intervention]],
    *,
    files: Mapping[int, Path],
    vlm: Vlm,
    edits: FittedEdits,
    reader: Reader,
    verdict: ReplayVerdict,
    marker: ObjectMarker | None,
    settings: Mapping[str, Any],
    home: paths.Home,
    bar: tqdm,
) -> None:
    budget = TokenBudget(
        settings["batch_tokens"],
        model=vlm.name,
        device=vlm.device,
        fix="take a smaller batch_tokens or longest_side in 02_extract",
    )

    def why_no_cut(one: Intervention) -> str:
        of_object = marker.refusal if marker is not None and one.site == OBJECT_ROUTE else ""
        return verdict.why_no_cut or of_object

    def run(prepared: Sequence[PreparedImage]) -> _Results:
        kept = KeptPass(vlm, prepared, way=verdict.way)
        results: _Results = {}
        for layer, ones in planned.items():
            results[layer] = [
                do_one(kept, one, edits, reader, why_no_cut=why_no_cut(one)) for one in ones
            ]
            bar.update(len(prepared) * len(ones))
        return results

    parts = []
    order = []
    for rows, prepared in _batches(
        vlm, table, verdict, marker, budget=budget, longest_side=settings["longest_side"], home=home
    ):
        order.append(rows)
        parts.append(budget.run(prepared, run, way=verdict.way, join=_join_two))
    places = np.argsort(np.concatenate(order))
    for layer in planned:
        of_layer = zip(*(part[layer] for part in parts), strict=True)
        joined = [_join(of_one) for of_one in of_layer]
        _write_file(
            files[layer], [one if isinstance(one, str) else one.select(places) for one in joined]
        )


# By layer: what was read after each intervention, or why nothing was.
_Results = dict[int, list[Readings | str]]


def _join_two(first: _Results, second: _Results, _: bool) -> _Results:
    return {
        layer: [_join(pair) for pair in zip(first[layer], second[layer], strict=True)]
        for layer in first
    }


def _join(parts: Sequence[Readings | str]) -> Readings | str:
    reason = next((part for part in parts if isinstance(part, str)), None)
    if reason is not None:
        return reason
    return Readings.join([part for part in parts if isinstance(part, Readings)])


def _batches(
    vlm: Vlm,
    table: pd.DataFrame,
    verdict: ReplayVerdict,
    marker: ObjectMarker | None,
    *,
    budget: TokenBudget,
    longest_side: int | None,
    home: paths.Home,
) -> Iterator[tuple[np.ndarray, list[PreparedImage]]]:
    """Yield images of one shape with their prompts, and the places of these in the table."""
    items = loading.prepare_images(
        vlm.prompt_processor,
        [shards.model_inputs(table, home)],
        longest_side=longest_side,
        home=home,
        dtype=vlm.dtype,
    )
    batches = loading.fill_batches(
        items, token_budget=lambda: budget.tokens, way=lambda: verdict.way
    )
    for batch in batches:
        prepared = [item.prepared for item in batch]
        if marker is not None:
            first_rows = [table.row.iloc[item.rows[0]] for item in batch]
            prepared = [marker.mark(*one) for one in zip(prepared, first_rows, strict=True)]
        yield np.concatenate([item.rows for item in batch]), prepared


def do_one(
    kept: KeptPass,
    one: Intervention,
    edits: FittedEdits,
    reader: Reader,
    *,
    why_no_cut: str,
) -> Readings | str:
    """Do one intervention to a batch; return what is read, or why it cannot be done."""
    try:
        if one.name == NOTHING:
            return reader({k: kept.last_states(k) for k in range(len(kept.vlm.layers))})
        if one.name == CUT:
            if why_no_cut:
                return why_no_cut
            states = kept.rerun(one.layer, {}, cut=_cut(kept, one))
        else:
            states = kept.rerun(one.layer, edits.changes(one, device=kept.vlm.device))
    except (NoEdit, NoCut) as error:
        return str(error)
    readings = reader(states)
    if not np.isfinite(readings.answers_na).all():
        return NOT_FINITE
    if one.site == OBJECT_ROUTE:
        is_marked_n = kept.token_sets[OBJECT].any(1).cpu().numpy()
        return readings.only(is_marked_n)
    return readings


def _cut(kept: KeptPass, one: Intervention) -> AttentionCut:
    seen, looking = one.site.split(">")
    sets = kept.token_sets
    if one.site == OBJECT_ROUTE:
        if OBJECT not in sets:
            raise NoCut(NO_OBJECT)
        key_nt = sets[ELSEWHERE if one.control == RANDOM else OBJECT]
    else:
        key_nt = sets["image_span" if seen == "image" else seen]
    query_nt = sets["image_span"] | sets["text"] if looking == "all" else sets[looking]
    return AttentionCut(range(one.layer, one.layer + int(one.dose or 0)), query_nt, key_nt)


def _write_file(file: Path, results: Sequence[Readings | str]) -> None:
    arrays = {}
    reasons = []
    for place, one in enumerate(results):
        reasons.append(one if isinstance(one, str) else "")
        if isinstance(one, Readings):
            arrays[f"{place}/answers"] = np.ascontiguousarray(one.answers_na)
            arrays[f"{place}/probes"] = np.ascontiguousarray(one.probes_lnc)
    metadata = {"probekit": json.dumps({"reasons": reasons})}
    paths.write_atomic(file, lambda part: save_file(arrays, part, metadata=metadata))


def _read_file(file: Path) -> list[tuple[Readings | None, str]]:
    """Return for each intervention of a layer what was read, or why nothing was.

    Raises
    ------
    ValueError
        The file is damaged; the message names the fix.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            reasons = json.loads(opened.metadata()["probekit"])["reasons"]
            return [
                (None, reason) if reason else (_read_tensors(opened, place), "")
                for place, reason in enumerate(reasons)
            ]
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): delete it, then 04_intervene makes just that again"
        ) from error


def _read_tensors(opened: Any, place: int) -> Readings:
    return Readings(opened.get_tensor(f"{place}/answers"), opened.get_tensor(f"{place}/probes"))
