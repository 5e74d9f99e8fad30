"""Probes of one wording of a question, on the states of its other wordings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from tqdm.auto import tqdm

from probekit.probes import bootstrap
from probekit.probes.labels import LabelledTask, LabelSet
from probekit.probes.results import HEADLINE
from probekit.probes.weights import ProbeWeights
from probekit.tasks.base import task_infos
from probekit.tasks.variants import pair_examples, wording_families


def pair_test_examples(
    examples: pd.DataFrame, first: LabelledTask, second: LabelledTask
) -> tuple[np.ndarray, np.ndarray] | None:
    """Find the test examples that count in which two wordings ask about the same thing.

    Returns
    -------
    first_n, second_n : ndarray of int
        (n,) their numbers among the examples of each task. None, with a line that says so, where
        they are of fewer than two images, so that nothing can be resampled.
    """
    first_n, second_n = pair_examples(examples, first.name, second.name)
    counts_n = np.ones(len(first_n), bool)
    for task, rows in ((first, first_n), (second, second_n)):
        counts_n &= task.split_n[rows] == "test"
        counts_n &= task.true.mask_nc.numpy()[rows].max(1) > 0
    first_n, second_n = first_n[counts_n], second_n[counts_n]
    if len(set(first.true.image_n[first_n])) < 2:
        tqdm.write(
            f"{first.name} and {second.name} are not compared: fewer than two test images are "
            "asked about the same things in both"
        )
        return None
    return first_n, second_n


class WordingScores:
    """Collects what the probes of each wording say of the test examples of the others.

    Parameters
    ----------
    examples : DataFrame
        Of all tasks.
    tasks : mapping of str to LabelledTask
        Those that have probes.
    weights : mapping of str to ProbeWeights
        By task, probes of l layers.
    """

    def __init__(
        self,
        examples: pd.DataFrame,
        tasks: Mapping[str, LabelledTask],
        weights: Mapping[str, ProbeWeights],
    ) -> None:
        self.tasks = tasks
        self.weights = weights
        self._logits: dict[tuple[str, str], list[np.ndarray]] = {}
        # Of each pair of wordings, the examples of both that ask about the same things.
        self._pairs: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        infos = {name: info for name, info in task_infos(examples).items() if name in weights}
        for names in wording_families(infos).values():
            for trained_on, read in permutations(names, 2):
                pair = pair_test_examples(examples, tasks[trained_on], tasks[read])
                if pair is not None:
                    self._pairs[trained_on, read] = pair

    def read_layer(self, place: int, x_nd: np.ndarray) -> None:
        """Apply the probes of one layer to its states.

        Parameters
        ----------
        place : int
            Of the layer among those of the probes; layers are read in their order.
        x_nd : ndarray
            (n, d) states of all examples.
        """
        standardised: dict[str, torch.Tensor] = {}
        for (trained_on, read), (_, read_n) in self._pairs.items():
            if read not in standardised:
                # By the mean and spread of their own wording: what differs is the direction.
                task = self.tasks[read]
                states_nd = self.weights[read].standardise(place, x_nd[task.rows])
                standardised[read] = torch.as_tensor(states_nd, device=task.true.device)
            weights = self.weights[trained_on]
            weight_dc = torch.as_tensor(weights.weight_ldc[place]).to(standardised[read])
            logits_nc = (standardised[read][read_n] @ weight_dc).cpu().numpy()
            logits_nc += weights.intercept_lc[place]
            self._logits.setdefault((trained_on, read), []).append(logits_nc)

    def table(self, layers: Sequence[str], *, resamples: int) -> pd.DataFrame:
        """Score every pair of wordings.

        Parameters
        ----------
        layers : sequence of str
            Names of the layers that were read.
        resamples : int
            Number of bootstrap samples.

        Returns
        -------
        DataFrame
            `task` (the wording that is read), `probe_task` (the one that the probe was trained on),
            `layer`, `probe_layer` (the same), the headline `metric`, `value` with its 95 %
            interval `lo` to `hi`, and `n`. The labels are those of `probe_task`: a probe of
            whether a cup is there is scored by whether a cup is there, even where the prompt asks
            whether there is none.
        """
        tables = []
        for (trained_on, read), logits in self._logits.items():
            labels = self._paired_labels(trained_on, read)
            metric = HEADLINE[labels.kind]
            curve = labels.curve(
                expit(np.stack(logits)), split="test", metric=metric, resamples=resamples
            )
            lower, upper = bootstrap.bca_interval(curve)
            table = {
                "task": read,
                "probe_task": trained_on,
                "layer": list(layers),
                "probe_layer": list(layers),
                "metric": metric,
                "value": curve.score_l,
                "lo": lower,
                "hi": upper,
                "n": int(labels.select("test").mask_nc.sum()),
            }
            tables.append(pd.DataFrame(table))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def _paired_labels(self, trained_on: str, read: str) -> LabelSet:
        """Return the labels of one wording, with the examples that the other one has as well."""
        trained_n, _ = self._pairs[trained_on, read]
        labels = self.tasks[trained_on].true
        return replace(labels, split={"test": torch.from_numpy(trained_n)})
