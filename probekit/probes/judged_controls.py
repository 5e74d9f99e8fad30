"""What the accuracy of controls says: the same judgement for tables, sentences and figures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from probekit.probes.controls import BASELINES
from probekit.probes.results import find_curve


class ControlScore(NamedTuple):
    """The accuracy of a control, beside what it must not exceed.

    Attributes
    ----------
    control : str
        As in the metrics table.
    value, lo, hi : float
        Accuracy with the ends of its 95 % interval: at the control's best layer, chosen on
        validation, or of a baseline.
    level : float
        What guesses score.
    """

    control: str
    value: float
    lo: float
    hi: float
    level: float

    @property
    def is_above(self) -> bool:
        """Whether the interval lies above what guesses score."""
        return self.lo > self.level


class Controls(NamedTuple):
    """The controls of one task, model and pooling.

    Attributes
    ----------
    guess : float
        The accuracy with which labels can be guessed without the states.
    scores : list of ControlScore
        Controls of inputs, labels and weights: they are compared with `guess`, or with what their
        labels let one guess.
    baselines : list of ControlScore
        What guesses without the states: compared with one half.
    """

    guess: float
    scores: list[ControlScore]
    baselines: list[ControlScore]


def judge_controls(rows: pd.DataFrame, best_of_controls: pd.DataFrame, *, probe: str) -> Controls:
    """Compare the accuracy of each control, at its own best layer, with what guesses score.

    Parameters
    ----------
    rows : DataFrame
        Metrics of one task, model and pooling.
    best_of_controls : DataFrame
        The best layer of each control, chosen on validation.
    probe : str
        The kind of probe.

    Returns
    -------
    Controls
    """
    accuracies = find_curve(rows, probe=probe, metric="accuracy", control=None)
    chances = find_curve(rows, probe=probe, metric="chance", control=None)
    baselines = []
    guesses = [0.5]
    for baseline in BASELINES:
        curve = accuracies[accuracies.control == baseline]
        if len(curve):
            first = curve.iloc[0]
            baselines.append(ControlScore(baseline, first.value, first.lo, first.hi, 0.5))
            guesses.append(curve.value.max())
    guess = float(np.nanmax(guesses))

    scores = []
    is_control = ~best_of_controls.control.isin(["none", *BASELINES])
    for _, best_row in best_of_controls[is_control].iterrows():
        control = best_row.control
        is_best = (accuracies.control == control) & (accuracies.layer == best_row["best layer"])
        at_best = accuracies[is_best].iloc[0]
        chance = chances.value[chances.control == control].max()
        level = float(np.nanmax([guess, chance]))
        scores.append(ControlScore(control, at_best.value, at_best.lo, at_best.hi, level))
    return Controls(guess, scores, baselines)
