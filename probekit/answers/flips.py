"""How often an answer changes with the wording of the question alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from probekit.probes import bootstrap
from probekit.probes.labels import LabelledTask
from probekit.probes.results import ProbeKey
from probekit.probes.wordings import pair_test_examples
from probekit.tasks.base import task_infos
from probekit.tasks.variants import wording_families

FLIPS = "flips"


def score_flips(
    examples: pd.DataFrame,
    predictions: Mapping[ProbeKey, np.ndarray],
    layers: Sequence[str],
    *,
    resamples: int,
) -> pd.DataFrame:
    """Measure how often what is said, or read by a probe, differs from that in the plain wording.

    Parameters
    ----------
    examples : DataFrame
    predictions : mapping of ProbeKey to ndarray
        Of one model and control, (l, n, c) probabilities of each task's test examples: of probes,
        lenses and answers.
    layers : sequence of str
        Names of the decoder's layers; fewer predictions are those of its last ones.
    resamples : int
        Number of bootstrap samples.

    Returns
    -------
    DataFrame
        Rows of the metrics table of the metric ``"flips"``, one for each variant, kind of probe and
        layer: the share of test examples that are judged in another way than the same example in
        the plain wording. To answer a negated question with the opposite is to judge in the same
        way.
    """
    infos = task_infos(examples)
    read = {key.task for key in predictions}
    families = wording_families({name: info for name, info in infos.items() if name in read})
    tables = []
    for plain, *variants in families.values():
        if infos[plain].kind == "multilabel":  # there is no one answer that could change
            continue
        plain_task = LabelledTask.from_examples(examples, plain)
        for variant in variants:
            task = LabelledTask.from_examples(examples, variant)
            rows = pair_test_examples(examples, plain_task, task)
            if rows is None:
                continue
            pairs = _PairedTest((plain_task, task), rows)
            for key, p_lnc in predictions.items():
                p_plain_lnc = predictions.get(key._replace(task=plain))
                if key.task != variant or p_plain_lnc is None:
                    continue
                flips_ln = pairs.flips(p_plain_lnc, p_lnc)
                curve = bootstrap.mean_curve(flips_ln.T, pairs.image_n, resamples=resamples)
                lower, upper = bootstrap.bca_interval(curve)
                table = {
                    **key._asdict(),
                    "layer": list(layers)[-len(flips_ln) :],
                    "split": "test",
                    "metric": FLIPS,
                    "class": "",
                    "value": curve.score_l,
                    "lo": lower,
                    "hi": upper,
                    "n": len(pairs.image_n),
                }
                tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


class _PairedTest:
    """The test examples of two wordings that ask the same image about the same thing."""

    def __init__(
        self,
        tasks: tuple[LabelledTask, LabelledTask],
        rows: tuple[np.ndarray, np.ndarray],
    ) -> None:
        self.image_n = tasks[0].true.image_n[rows[0]]
        self._binary = tasks[0].true.kind == "binary"
        self._places = []
        self._labels = []
        for task, rows_n in zip(tasks, rows, strict=True):
            test_rows = task.true.split["test"].numpy()
            self._places.append(np.searchsorted(test_rows, rows_n))
            self._labels.append(task.true.y_nc[rows_n, 0].numpy() > 0)

    def flips(self, p_plain_lnc: np.ndarray, p_variant_lnc: np.ndarray) -> np.ndarray:
        """(l, n) True where an example is judged in another way than in the plain wording."""
        judged = []
        for p_lnc, places, label_n in zip(
            (p_plain_lnc, p_variant_lnc), self._places, self._labels, strict=True
        ):
            if self._binary:  # both right, or both wrong: the same is held to be true
                judged.append((p_lnc[:, places, 0] >= 0.5) == label_n)
            else:
                judged.append(p_lnc[:, places].argmax(-1))
        return judged[0] != judged[1]
