"""What the tables say, in sentences that can go into a paper, with what to doubt."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd

from probekit.probes import comparison, controls
from probekit.probes.labels import HEADLINE, LabelledTask
from probekit.probes.results import ProbeResults, best_layers, select_curve
from probekit.tasks.base import TaskInfo, task_infos

NAMES = {"accuracy": "accuracy", "f1_macro": "macro-F1"}
PROBES = {"logreg": "logistic-regression", "linear": "linear (Adam)", "mlp": "one-hidden-layer"}
WIDE = 0.1  # of an interval


def summarise(table: pd.DataFrame, tasks: dict[str, TaskInfo], probe: str = "logreg") -> list[str]:
    """A paragraph a task, model and pooling: best layer, plateau, selectivity, codelength, controls, doubts.

    Parameters
    ----------
    table : the metrics table
    tasks : kind and classes by task, see :func:`probekit.tasks.base.task_infos`
    """
    best = best_layers(table, tasks, probe)
    out = []
    for _, row in best[best.control == "none"].iterrows():
        kind = tasks[row.task].kind
        own = table[(table.task == row.task) & (table.model == row.model) & (table.pooling == row.pooling)]
        curve = _curve(own, probe, HEADLINE[kind])
        name = f"{row.task}, {row.model}" + (f", {row.pooling} pooling" if table.pooling.nunique() > 1 else "")
        parts = [
            f"{name}: of the {PROBES[probe]} probes on {len(curve)} layers, the one on {row['best layer']} (chosen on "
            f"validation images) has a test {NAMES[row.metric]} of {_interval(row)}, n = {row.n:,.0f} labels.",
            comparison.plateau_sentence(curve) if curve.plateau.notna().all() else "",
            _selectivity(own, probe, row["best layer"]), _codelength(own, probe, row["best layer"]),
            *_controls(own, best, row, probe), *_doubts(own, curve, row, probe),
        ]
        out.append(" ".join(part for part in parts if part))
    return out


def compare_pairs(whole: ProbeResults, examples: pd.DataFrame, probe: str = "logreg", resamples: int = 2000) -> pd.DataFrame:
    """Models, their untrained twins, poolings and tasks against each other at their best layers (of validation).

    All pairs that differ in one of them and have the same headline metric; test images that both have are paired.

    Returns
    -------
    DataFrame
        `a`, `b` (task, model, pooling, layer), `metric`, their `difference` with `lo` and `hi`, `p` (two-sided),
        `p_holm` over all rows of a metric
    """
    best = best_layers(whole.metrics, task_infos(examples), probe)
    best = best[best.control.isin(["none", "untrained"]) & best["best layer"].str.startswith("lm.")]
    tasks, found = {name: LabelledTask.of(examples, name) for name in best.task.unique()}, []
    for metric, rows in best.groupby("metric", sort=False):
        curves = {}
        for _, row in rows.iterrows():
            p_lnc = whole.predictions["|".join((row.model, row.control, row.pooling, row.task, probe))]
            layer = int(row["best layer"].partition(".")[2])
            curve = tasks[row.task].true.curve(p_lnc[[layer]].astype(np.float32), "test", metric, resamples)
            model = row.model + " (untrained)" * (row.control == "untrained")
            curves[row.task, model, row.pooling] = row["best layer"], curve
        pairs = [(a, b) for a, b in combinations(curves, 2) if sum(x != y for x, y in zip(a, b, strict=True)) == 1]
        parts = [comparison.curve_difference(curves[a][1], curves[b][1], [metric]).assign(
            a=", ".join([*a, curves[a][0]]), b=", ".join([*b, curves[b][0]])) for a, b in pairs]
        if parts:
            part = pd.concat(parts).rename(columns={"layer": "metric"})
            found.append(part.assign(p_holm=comparison.holm(part.p)))
    columns = ["a", "b", "metric", "difference", "lo", "hi", "p", "p_holm"]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def _interval(row: pd.Series) -> str:
    return f"{row.value:.3f} (95\u00a0% interval {row.lo:.3f} to {row.hi:.3f})"


def _curve(own: pd.DataFrame, probe: str, metric: str, control: str = "none") -> pd.DataFrame:
    rows = own[own.control == control]
    has = ((rows.probe == probe) & (rows.metric == metric) & (rows.split == "test")).any()
    return select_curve(rows, probe, metric) if has else pd.DataFrame(columns=["layer", "value", "lo", "hi"])


def _at(curve: pd.DataFrame, layer: str) -> pd.Series | None:
    found = curve[curve.layer == layer]
    return found.iloc[0] if len(found) else None


def _selectivity(own: pd.DataFrame, probe: str, layer: str) -> str:
    here = _at(_curve(own, probe, "selectivity"), layer)
    return "" if here is None else (
        f"Selectivity at {layer}, accuracy minus that of the control task: {_interval(here)}.")


def _codelength(own: pd.DataFrame, probe: str, layer: str) -> str:
    rows = own[(own.control == "none") & (own.probe == probe) & (own.metric == "codelength")]
    rows = rows[rows.layer.str.startswith("lm.")].groupby("layer", sort=False).value.mean()
    if not len(rows):
        return ""
    return (f"Its labels take {rows[layer]:.2f} bits each there (online codelength; 1 is the uniform code), fewest at "
            f"{rows.idxmin()} ({rows.min():.2f}).")


def _controls(own: pd.DataFrame, best: pd.DataFrame, row: pd.Series, probe: str) -> list[str]:
    """Accuracy of each control at the layer that is best for it on validation, against chance."""
    guesses = {name: _curve(own, probe, "accuracy", name) for name in controls.BASELINES}
    level, low, high = np.nanmax([0.5, *(guess.value.max() for guess in guesses.values())]), [], []
    same = best[(best.task == row.task) & (best.model == row.model) & (best.pooling == row.pooling)]
    for _, control in same[~same.control.isin(["none", *controls.BASELINES])].iterrows():
        here = _at(_curve(own, probe, "accuracy", control.control), control["best layer"])
        guessed = max(level, _curve(own, probe, "chance", control.control).value.max(), key=np.nan_to_num)
        told = f"{controls.CONTROL_WORDS[control.control]} {here.value:.3f} ({here.lo:.3f} to {here.hi:.3f})"
        if here.lo > guessed:
            high.append(f"{told}, above chance: {controls.CONTROL_MEANING[control.control]}.")
        else:
            low.append(told)
    out = [f"Without the states the labels can be guessed with an accuracy of {level:.3f}."]
    high += [f"{controls.CONTROL_WORDS[name]} {guess.value.iloc[0]:.3f}, above one half: {controls.CONTROL_MEANING[name]}."
             for name, guess in guesses.items() if len(guess) and guess.lo.iloc[0] > 0.5]
    if low:
        out.append(f"At chance, as it should be, at the best layer of each: {'; '.join(low)}.")
    return out + [told[0].upper() + told[1:] for told in high]


def _doubts(own: pd.DataFrame, curve: pd.DataFrame, row: pd.Series, probe: str) -> list[str]:
    found = []
    if len(curve) > 1 and curve.plateau.notna().all() and curve.plateau.astype(bool).all():
        found.append("no layer can be told from the best, so the curve has no peak")
    if (curve.spread > 0.01).any():
        found.append(f"seeds differ by up to {curve.spread.max():.3f} at a layer, which no interval here counts in")
    rows = own[(own.control == "none") & (own.probe == probe) & (own.metric == "strength") & (own.lo < own.hi)]
    rows = rows[rows.layer == row["best layer"]]  # lo and hi are the ends of the grid
    if ((rows.value == rows.lo) | (rows.value == rows.hi)).any():
        found.append("the strength that validation chose is at an end of the grid: widen strengths")
    if row.hi - row.lo > WIDE:
        found.append(f"the interval is {row.hi - row.lo:.2f} wide: take more test images")
    return [f"Doubt: {'; '.join(found)}."] if found else []
