"""From readings to tables: what each intervention does to answers and to the probes after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import logsumexp

from probekit.extraction.answer_heads import ANSWER_POOLING
from probekit.interventions.edits import ERASURES
from probekit.interventions.running import Readings
from probekit.interventions.settings import RANDOM, Intervention
from probekit.probes import bootstrap, comparison
from probekit.probes.labels import LabelSet

# So many resamples for each layer that is compared: the smallest p-value, corrected for the number
# of layers, is then about 2 / 60.
RESAMPLES_PER_LAYER = 60
# Of the table of interventions; those of the metrics table have the same names.
COLUMNS = [
    "model",
    "task",
    "layer",
    "intervention",
    "site",
    "dose",
    "control",
    "erased",
    "metric",
    "read_layer",
    "pooling",
    "value",
    "lo",
    "hi",
    "p",
    "p_holm",
    "n",
    "reason",
]


class Done(NamedTuple):
    """One intervention and what was read after it; or why nothing was."""

    intervention: Intervention
    readings: Readings | None
    reason: str


class _Scored(NamedTuple):
    """What is averaged over examples."""

    right_n: np.ndarray
    margin_n: np.ndarray
    yes_n: np.ndarray | None


class TaskScores:
    """Scores interventions on the test examples of one task.

    Parameters
    ----------
    labels : LabelSet
        Of the n test examples in the order of the readings: all of its rows.
    resamples : int
        Bootstrap samples; of differences at least :data:`RESAMPLES_PER_LAYER` for each layer.
    """

    def __init__(self, labels: LabelSet, *, resamples: int) -> None:
        self._binary = labels.kind == "binary"
        y_nc = labels.y_nc.numpy()
        mask_nc = labels.mask_nc.numpy()
        if self._binary:
            self._right_n = y_nc[:, 0].astype(int)
            self._counts_na = np.repeat(mask_nc[:, :1] > 0, 2, axis=1)
        else:
            self._right_n = y_nc.argmax(1)
            self._counts_na = mask_nc > 0
        is_scored_n = np.take_along_axis(self._counts_na, self._right_n[:, None], 1)[:, 0]
        self._rows = np.flatnonzero(is_scored_n)
        self._image_n = labels.image_n[self._rows]
        self._resamples = resamples

    def table(
        self, plain: Readings, done: Sequence[Done], *, layers: Sequence[str]
    ) -> pd.DataFrame:
        """Score all that was done.

        Parameters
        ----------
        plain : Readings
            Of the model alone.
        done : sequence of Done
        layers : sequence of str
            Names of the decoder's layers.

        Returns
        -------
        DataFrame
            See :func:`probekit.workflow.intervene`.
        """
        alone = self._score(plain.answers_na)
        tables = [self._plain_rows(alone, plain, layers)]
        curves: dict[tuple, list[Done]] = {}
        for one in done:
            what = (one.intervention.name, one.intervention.site, one.intervention.dose)
            curves.setdefault((*what, one.intervention.control), []).append(one)
        randoms = {key[:3]: ones for key, ones in curves.items() if key[3] == RANDOM}
        for key, ones in curves.items():
            control_of = randoms.get(key[:3], []) if key[3] == "none" else []
            tables.append(self._curve_rows(ones, alone, control_of, layers))
        return pd.concat(tables, ignore_index=True)

    # ----------------------------------------------------------------------------- one example

    def _score(self, answers_na: np.ndarray) -> _Scored:
        answers_na = np.where(self._counts_na, answers_na, -np.inf)[self._rows]
        right_n = self._right_n[self._rows]
        of_right_n = np.take_along_axis(answers_na, right_n[:, None], 1)[:, 0]
        others_na = answers_na.copy()
        np.put_along_axis(others_na, right_n[:, None], -np.inf, 1)
        margin_n = of_right_n - logsumexp(others_na, axis=1)
        yes_n = answers_na[:, 1] - answers_na[:, 0] if self._binary else None
        return _Scored(margin_n > 0, margin_n, yes_n)

    def _probe_is_right(self, probes_lnc: np.ndarray) -> np.ndarray:
        """(l, n) True where a probe reads the right answer."""
        probes_lnc = probes_lnc[:, self._rows]
        if self._binary:
            return (probes_lnc[..., 0] > 0) == (self._right_n[self._rows] > 0)
        counting_lnc = np.where(self._counts_na[self._rows], probes_lnc, -np.inf)
        return counting_lnc.argmax(-1) == self._right_n[self._rows]

    # ---------------------------------------------------------------------------------- tables

    def _plain_rows(self, alone: _Scored, plain: Readings, layers: Sequence[str]) -> pd.DataFrame:
        values = self._answer_values([alone])
        tables = [self._mean_rows(metric, value_nl, layer=[""]) for metric, value_nl in values]
        if plain.probes_lnc.shape[-1]:
            right_ln = self._probe_is_right(plain.probes_lnc)
            tables.append(
                self._mean_rows("probe_accuracy", right_ln.T, layer="", read_layer=list(layers))
            )
        return pd.concat(tables).assign(intervention="none", site="", control="none")

    def _curve_rows(
        self,
        ones: Sequence[Done],
        alone: _Scored,
        control_of: Sequence[Done],
        layers: Sequence[str],
    ) -> pd.DataFrame:
        """Score one intervention at all layers, beside its random control where it has one."""
        finished = [one for one in ones if one.readings is not None]
        tables = [self._empty_rows(ones, layers)]
        if finished:
            numbers = [one.intervention.layer for one in finished]
            names = [layers[number] for number in numbers]
            scored = [self._score(_answers(one)) for one in finished]
            for metric, value_nl in self._answer_values(scored):
                tables.append(self._mean_rows(metric, value_nl, layer=names))
            tables.append(self._difference_rows("effect", scored, [alone] * len(scored), names))
            controls = {
                one.intervention.layer: self._score(_answers(one))
                for one in control_of
                if one.readings is not None
            }
            paired = [place for place, number in enumerate(numbers) if number in controls]
            if paired:
                tables.append(
                    self._difference_rows(
                        "over_random",
                        [scored[place] for place in paired],
                        [controls[numbers[place]] for place in paired],
                        [names[place] for place in paired],
                    )
                )
            tables += [self._probe_rows(one, layers) for one in finished]
        first = ones[0].intervention
        return pd.concat(tables).assign(
            intervention=first.name,
            site=first.site,
            dose=np.nan if first.dose is None else first.dose,
            control=first.control,
        )

    def _empty_rows(self, ones: Sequence[Done], layers: Sequence[str]) -> pd.DataFrame:
        rows = [
            {"layer": layers[one.intervention.layer], "metric": "accuracy", "reason": one.reason}
            for one in ones
            if one.readings is None
        ]
        return pd.DataFrame(rows)

    def _answer_values(self, scored: Sequence[_Scored]) -> list[tuple[str, np.ndarray]]:
        """Return (n, l) values of the metrics of answers, by their names."""
        values = [
            ("accuracy", np.stack([one.right_n for one in scored], 1).astype(float)),
            ("margin", np.stack([one.margin_n for one in scored], 1)),
        ]
        yes = [one.yes_n for one in scored if one.yes_n is not None]
        if yes:
            values.append(("yes_margin", np.stack(yes, 1)))
            values.append(("says_yes", (np.stack(yes, 1) > 0).astype(float)))
        return values

    def _probe_rows(self, one: Done, layers: Sequence[str]) -> pd.DataFrame:
        """Score the probes of the layer of an intervention, and of all later ones."""
        if one.readings is None or not one.readings.probes_lnc.shape[-1]:
            return pd.DataFrame()
        right_ln = self._probe_is_right(one.readings.probes_lnc)
        number = one.intervention.layer
        return self._mean_rows(
            "probe_accuracy",
            right_ln.T.astype(float),
            layer=layers[number],
            read_layer=list(layers[number:]),
        )

    def _mean_rows(self, metric: str, value_nl: np.ndarray, **columns: object) -> pd.DataFrame:
        return mean_rows(
            metric, value_nl, image_n=self._image_n, resamples=self._resamples, **columns
        )

    def _difference_rows(
        self,
        name: str,
        scored: Sequence[_Scored],
        others: Sequence[_Scored],
        layers: Sequence[str],
    ) -> pd.DataFrame:
        """Compare answers with others to the same examples, corrected for the number of layers."""
        tables = []
        for metric, values_nl, others_nl in (
            (name, [one.right_n for one in scored], [one.right_n for one in others]),
            (f"margin_{name}", [one.margin_n for one in scored], [one.margin_n for one in others]),
        ):
            tables.append(
                difference_rows(
                    metric,
                    np.stack(values_nl, 1),
                    np.stack(others_nl, 1),
                    image_n=self._image_n,
                    resamples=self._resamples,
                    layers=layers,
                )
            )
        return pd.concat(tables)


def mean_rows(
    metric: str, value_nl: np.ndarray, *, image_n: np.ndarray, resamples: int, **columns: object
) -> pd.DataFrame:
    """Average values over examples, with intervals over images.

    Parameters
    ----------
    metric : str
    value_nl : ndarray
        (n, l) of n examples in l rows of the table.
    image_n : ndarray
        (n,) which image each example shows.
    resamples : int
    **columns
        Further columns, each a single value or l of them.
    """
    curve = bootstrap.mean_curve(value_nl.astype(float), image_n, resamples=resamples)
    lower, upper = bootstrap.bca_interval(curve)
    return pd.DataFrame(
        {
            **columns,
            "metric": metric,
            "value": curve.score_l,
            "lo": lower,
            "hi": upper,
            "n": len(image_n),
        }
    )


def difference_rows(
    metric: str,
    value_nl: np.ndarray,
    other_nl: np.ndarray,
    *,
    image_n: np.ndarray,
    resamples: int,
    layers: Sequence[str],
) -> pd.DataFrame:
    """Subtract the means of others from those of values of the same examples, layer by layer.

    Parameters
    ----------
    metric : str
    value_nl, other_nl : ndarray
        (n, l).
    image_n, resamples
        See :func:`mean_rows`; resamples are at least :data:`RESAMPLES_PER_LAYER` for each layer.
    layers : sequence of str
        (l,) names; `p_holm` is corrected for their number.
    """
    enough = max(resamples, RESAMPLES_PER_LAYER * len(layers))
    curves = [
        bootstrap.mean_curve(of_layers_nl.astype(float), image_n, resamples=enough)
        for of_layers_nl in (value_nl, other_nl)
    ]
    table = comparison.curve_difference(*curves, layers=layers)
    return table.rename(columns={"difference": "value"}).assign(metric=metric, n=len(image_n))


def _answers(one: Done) -> np.ndarray:
    if one.readings is None:
        raise ValueError(one.reason)
    return one.readings.answers_na


def complete(
    table: pd.DataFrame,
    *,
    model: str,
    task: str,
    erased: Callable[[str, str], str],
) -> pd.DataFrame:
    """Return a table with all :data:`COLUMNS`, in their order.

    Parameters
    ----------
    table : DataFrame
    model, task : str
    erased : callable
        From site and control to the tasks whose labels are erased there.
    """
    is_erasure = table.intervention.isin(ERASURES)
    names = [
        erased(site, control) if was_erased else ""
        for site, control, was_erased in zip(table.site, table.control, is_erasure, strict=True)
    ]
    is_read_n = table.metric == "probe_accuracy"
    table = table.assign(
        model=model, task=task, erased=names, pooling=np.where(is_read_n, ANSWER_POOLING, "")
    )
    return table.reindex(columns=COLUMNS).reset_index(drop=True)
