"""What the model says, scored as probes are: the same examples, metrics and intervals.

Rows of the metrics table with the probe ``"answer"`` are about the model's answer, those with the
probes ``"lens"`` and ``"tuned_lens"`` about what its layers would answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from probekit import paths
from probekit.answers.flips import score_flips
from probekit.answers.reading import LENS, TUNED_LENS, AnswerLogits, read_answers
from probekit.extraction.answer_heads import ANSWER_POOLING
from probekit.extraction.store import Activations
from probekit.probes import bootstrap, metrics
from probekit.probes.labels import LabelledTask, LabelSet
from probekit.probes.probing import PREDICTED, control_name
from probekit.probes.results import ProbeKey, ProbeResults, StateKey, compact_predictions
from probekit.tasks.base import TaskInfo, task_infos
from probekit.tasks.building import table_fingerprint

ANSWER = "answer"
SCORED_SPLITS = ("validation", "test")
# Of what the stored scores hold: those of another version are made again.
VERSION = 1
# Metrics that do not depend on a decision between the answers.
UNDECIDED = ("log_loss", "average_precision")


def stored_answers(
    activations: Activations,
    probed: ProbeResults,
    *,
    folder: Path,
    resamples: int,
    seed: int,
    device: str = "cpu",
) -> ProbeResults:
    """Read the scores of a model's answers, or score them and write them down.

    Parameters
    ----------
    activations, probed, resamples, seed, device
        See :func:`score_answers`.
    folder : Path
        Of the run's results. The scores go into a folder inside that of the probes.
    """
    try:
        head = activations.answer_head.refusal
    except FileNotFoundError:  # a later 02_extract may have it
        head = None
    fingerprint = paths.fingerprint(VERSION, head, probed.stores[0]["fingerprint"])
    examples_fingerprint = table_fingerprint(activations.examples)
    folder = folder / activations.name / "answers"
    try:
        stored = ProbeResults.read(folder, examples_fingerprint)
    except (FileNotFoundError, ValueError):
        stored = None
    if stored is None or stored.stores[0]["fingerprint"] != fingerprint:
        scored = score_answers(
            activations, probed, resamples=resamples, seed=seed, device=device
        ).with_settings(probed.stores[0]["fingerprint"])
        stored = replace(scored, stores=({"fingerprint": fingerprint},))
        stored.write(folder, examples_fingerprint)
    return replace(stored, stores=())


def score_answers(
    activations: Activations,
    probed: ProbeResults,
    *,
    resamples: int,
    seed: int,
    device: str = "cpu",
) -> ProbeResults:
    """Score what a model says to every task that has answers, and how far probes know more.

    Parameters
    ----------
    activations : Activations
    probed : ProbeResults
        The probes of these activations.
    resamples : int
        Number of bootstrap samples.
    seed : int
        What the column `seed` says.
    device : str
        Where the tuned lens is fitted and answers are scored.

    Returns
    -------
    ProbeResults
        Rows of the metrics table, and as predictions of the probes ``"lens"`` and ``"tuned_lens"``
        the probabilities of the decoder layers. Besides the metrics of the probes they have

        * ``calibration_error``: Guo et al. (2017), expected calibration error;
        * ``top1_accuracy`` where one of several answers is right, of the probes, too: the share of
          examples whose largest answer is right, of those answers that count for the example;
        * ``decided``: the share of examples whose final answer stays on top from this layer on;
        * of the probes ``over_answer``: their accuracy less the answer's, on the same images;
          ``over_tuned_answer``: less that of the answer with the threshold chosen on validation;
          ``known_not_said``: the share of examples that the probe gets right and the model answers
          wrongly;
        * of all in another wording ``flips``, see :func:`probekit.answers.flips.score_flips`.
    """
    infos = task_infos(activations.examples)
    tasks = [name for name in infos if name in probed.tasks or not probed.tasks]
    model = activations.meta["model"]
    control = control_name(activations)
    answers, refusals = read_answers(
        activations,
        {name: infos[name] for name in tasks},
        with_tuned_lens=control in PREDICTED,
        device=device,
    )
    decoder_layers = [layer for layer in activations.layers if layer.startswith("lm.")]
    for reason in dict.fromkeys(refusals.values()):
        names = ", ".join(name for name, one in refusals.items() if one == reason)
        tqdm.write(f"{model} ({control}): no answers to {names}: {reason}")
    parts = []
    # What probes, lenses and the model itself hold of the test examples.
    judged = {
        key: p_lnc
        for key, p_lnc in probed.predictions.items()
        if (key.model, key.control) == (model, control)
    }
    for name, by_lens in answers.items():
        of_task = {key: p_lnc for key, p_lnc in judged.items() if key.task == name}
        try:
            task = LabelledTask.from_examples(activations.examples, name, device=device)
            scored = {
                lens: _TaskAnswers(task.true, infos[name], logits, resamples)
                for lens, logits in by_lens.items()
            }
            table = _score_task(scored, of_task, decoder_layers, by_class=control in PREDICTED)
        except ValueError as error:  # too few examples that count
            tqdm.write(f"{model} ({control}): answers to {name} cannot be scored: {error}")
            continue
        predictions = {}
        if control in PREDICTED:
            key = ProbeKey(model, control, ANSWER_POOLING, name, ANSWER)
            judged[key] = scored[LENS].test_probabilities[-1:]
            for lens, of_lens in scored.items():
                if len(of_lens.layers) > 1:
                    key = ProbeKey(model, control, ANSWER_POOLING, name, lens)
                    predictions[key] = compact_predictions(of_lens.test_probabilities)
        judged |= predictions
        table = table.assign(model=model, control=control, task=name, stage="lm", seed=seed)
        parts.append(ProbeResults(metrics=table, losses=pd.DataFrame(), predictions=predictions))
    flips = score_flips(activations.examples, judged, decoder_layers, resamples=resamples)
    flips = flips.assign(stage="lm", seed=seed)
    parts.append(ProbeResults(metrics=flips, losses=pd.DataFrame()))
    return ProbeResults.join(parts)


def _score_task(
    scored: Mapping[str, _TaskAnswers],
    probed: Mapping[ProbeKey, np.ndarray],
    decoder_layers: Sequence[str],
    *,
    by_class: bool,
) -> pd.DataFrame:
    """Score the answer to one task, both lenses, and its probes beside the answer."""
    said = scored[LENS]
    tables = [said.score_answer().assign(probe=ANSWER, pooling=ANSWER_POOLING)]
    for lens, of_lens in scored.items():
        if len(of_lens.layers) > 1:  # else the final norm is not known
            table = of_lens.score(by_class=by_class)
            tables.append(table.assign(probe=lens, pooling=ANSWER_POOLING))
    for key, p_lnc in probed.items():
        table = said.compare(p_lnc, decoder_layers)
        tables.append(table.assign(probe=key.probe, pooling=key.pooling))
    return pd.concat(tables, ignore_index=True)


def lens_probabilities(
    results: ProbeResults, state: StateKey, *, lens: str = LENS
) -> np.ndarray | None:
    """Return what the layers would answer to the test examples of a task.

    Parameters
    ----------
    results : ProbeResults
    state : StateKey
        Model, control and task; answers are read off one pooling, whichever it names.
    lens : {"lens", "tuned_lens"}

    Returns
    -------
    ndarray or None
        (l, n, c) probabilities, of the last layer what the model says; None where there are no
        answers.
    """
    key = ProbeKey(state.model, state.control, ANSWER_POOLING, state.task, lens)
    return results.predictions.get(key)


def said_probabilities(results: ProbeResults, state: StateKey) -> np.ndarray | None:
    """Return (n, c) the probabilities of what a model says, see :func:`lens_probabilities`."""
    for lens in (LENS, TUNED_LENS):
        p_lnc = lens_probabilities(results, state, lens=lens)
        if p_lnc is not None:
            return p_lnc[-1]
    return None


class Said(NamedTuple):
    """What a model says to an example.

    Attributes
    ----------
    words : str
        Yes, no, or the class.
    p : float
        Its probability among the answers.
    is_right : bool
    """

    words: str
    p: float
    is_right: bool

    @classmethod
    def of(cls, said_c: np.ndarray, row: pd.Series, info: TaskInfo) -> Said:
        """Put into words what is said to an example.

        Parameters
        ----------
        said_c : ndarray, (c,)
            Probabilities of the classes, among the answers.
        row : Series
            The example.
        info : TaskInfo
            Of its task.
        """
        if info.kind == "binary":
            p_yes = float(said_c[0])
            says_yes = p_yes >= 0.5
            words = "yes" if says_yes else "no"
            return cls(words, max(p_yes, 1 - p_yes), says_yes == bool(row.labels[0]))
        c = int(np.argmax(said_c))
        return cls(info.classes[c], float(said_c[c]), bool(row.labels[c]))


class _TaskAnswers:
    """What the layers of one model answer to the examples of one task."""

    def __init__(
        self, labels: LabelSet, info: TaskInfo, logits: AnswerLogits, resamples: int
    ) -> None:
        self._all_labels = labels
        self._info = info
        self._logits = logits
        self.layers = logits.layers
        self.resamples = resamples
        self.binary = info.kind == "binary"
        # Examples whose right answer does not count have nothing to be scored.
        self.counts = {split: self._find_counting(split) for split in SCORED_SPLITS}
        self.labels = replace(
            labels,
            split={split: labels.split[split][self.counts[split]] for split in SCORED_SPLITS},
        )
        self.logits = {
            split: self._select(split, rows.numpy()) for split, rows in self.labels.split.items()
        }
        self.p = {
            split: of_split.probabilities(binary=self.binary)
            for split, of_split in self.logits.items()
        }
        validation = self.labels.select("validation")
        self.threshold_lc = metrics.choose_thresholds(
            self.p["validation"],
            validation.y_nc,
            mask_nc=validation.mask_nc,
            binary=self.binary,
        )

    def _find_counting(self, split: str) -> np.ndarray:
        """(n,) True where the right answer to an example of a split counts."""
        labels = self._all_labels.select(split)
        right_nc = labels.mask_nc if self.binary else labels.mask_nc * labels.y_nc
        return np.asarray(right_nc.max(1) > 0)

    def _select(self, split: str, rows: np.ndarray) -> AnswerLogits:
        """Take the examples of a split, and of several answers those that count for each."""
        logits_lna = self._logits.logits_lna[:, rows]
        if not self.binary:
            logits_lna = np.where(self.labels.select(split).mask_nc > 0, logits_lna, -np.inf)
        return AnswerLogits(self.layers, logits_lna)

    @property
    def test_probabilities(self) -> np.ndarray:
        """(l, n, c) of all n test examples, 0 where no answer counts."""
        counts_n = self.counts["test"]
        layers, _, classes = self.p["test"].shape
        p_lnc = np.zeros((layers, len(counts_n), classes))
        p_lnc[:, counts_n] = self.p["test"]
        return p_lnc

    def score(self, *, by_class: bool) -> pd.DataFrame:
        """Score what all layers would say."""
        tables = [
            self._score_split("validation"),
            self._score_split("test", by_class=by_class),
            self._decided(),
        ]
        return pd.concat(tables, ignore_index=True)

    def score_answer(self) -> pd.DataFrame:
        """Score what the model says: its last layer alone."""
        logits = AnswerLogits(self.layers[-1:], self._logits.logits_lna[-1:])
        alone = _TaskAnswers(self._all_labels, self._info, logits, self.resamples)
        tables = [
            alone._score_split("validation"),
            alone._score_split("test", by_class=True),
            alone._guess(),
        ]
        table = pd.concat(tables, ignore_index=True)
        return table.assign(**dict.fromkeys(metrics.comparison.COLUMNS))  # one layer has no others

    def _score_split(self, split: str, *, by_class: bool = False) -> pd.DataFrame:
        p_lnc = self.p[split]
        is_test = split == "test"
        table = self.labels.score(
            p_lnc,
            split=split,
            layers=self.layers,
            resamples=self.resamples,
            by_class=by_class,
            threshold_lc=self.threshold_lc if is_test else None,
        )
        tables = [table]
        if not self.binary:  # the largest answer is the one that is given, however probable
            chosen_lnc = np.eye(p_lnc.shape[-1])[p_lnc.argmax(-1)]
            decided = self.labels.score(
                chosen_lnc,
                split=split,
                layers=self.layers,
                resamples=self.resamples,
                by_class=by_class,
            )
            tables = [
                table[table.metric.isin(UNDECIDED) | table.metric.str.endswith("_tuned")],
                decided[~decided.metric.isin(UNDECIDED)],
                self._top1(split),
            ]
        if is_test:
            tables.append(self._calibration_error())
        return pd.concat(tables, ignore_index=True)

    def _mean(
        self,
        metric: str,
        values_ln: np.ndarray,
        *,
        split: str = "test",
        layers: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Average values (l, n) over the examples of a split, with intervals over images."""
        image_n = self.labels.select(split).image_n
        curve = bootstrap.mean_curve(values_ln.T, image_n, resamples=self.resamples)
        bounds = bootstrap.bca_interval(curve)
        return self._rows(metric, curve.score_l, bounds, split=split, layers=layers)

    def _rows(
        self,
        metric: str,
        score_l: np.ndarray,
        bounds: tuple[np.ndarray | float, np.ndarray | float],
        *,
        split: str = "test",
        layers: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        lower_l, upper_l = bounds
        table = {
            "layer": list(layers or self.layers),
            "metric": metric,
            "class": "",
            "value": score_l,
            "lo": lower_l,
            "hi": upper_l,
            "n": len(self.labels.split[split]),
            "split": split,
        }
        return pd.DataFrame(table)

    def _top1(self, split: str) -> pd.DataFrame:
        return self._mean("top1_accuracy", self._is_right(self.p[split], split), split=split)

    def _calibration_error(self) -> pd.DataFrame:
        p_lnc = self.p["test"]
        confidence_ln = p_lnc.max(-1)
        if self.binary:
            confidence_ln = np.maximum(p_lnc[..., 0], 1 - p_lnc[..., 0])
        right_ln = self._is_right(p_lnc, "test")
        counts, images = bootstrap.sum_by_image(
            metrics.calibration_counts(confidence_ln, right_ln), self.labels.select("test").image_n
        )
        curve = bootstrap.bootstrap_curve(
            counts, images, score=metrics.calibration_error, resamples=self.resamples
        )
        bounds = metrics.calibration_interval(curve, confidence_ln)
        return self._rows("calibration_error", curve.score_l, bounds)

    def _decided(self) -> pd.DataFrame:
        depth_n = self.logits["test"].depth_of_decision()
        return self._mean("decided", np.arange(len(self.layers))[:, None] >= depth_n)

    def _guess(self) -> pd.DataFrame:
        """Say how often a guess among the answers that count is right."""
        mask_nc = self.labels.select("test").mask_nc
        answers_n = np.full(len(mask_nc), 2) if self.binary else mask_nc.sum(1)
        return self._rows("guess", np.array([np.mean(1 / answers_n)]), (np.nan, np.nan))

    # ---- probes beside the answer ----

    def compare(self, p_lnc: np.ndarray, layers: Sequence[str]) -> pd.DataFrame:
        """Compare probes with the answer, on the same test images.

        Parameters
        ----------
        p_lnc : ndarray
            (l, n, c) of the probes, for all test examples.
        layers : sequence of str
            Names of their l layers.
        """
        p_lnc = p_lnc[:, self.counts["test"]]
        right_ln = self._is_right(p_lnc, "test")
        answered_n = self._is_right(self.p["test"][-1:], "test")[0]
        averaged = {"known_not_said": right_ln & ~answered_n}
        averaged["over_answer"] = right_ln.astype(int) - answered_n
        if self.binary:
            threshold = float(self.threshold_lc[-1, 0])
            tuned_n = self._is_right(self.p["test"][-1:], "test", threshold=threshold)[0]
            averaged["over_tuned_answer"] = right_ln.astype(int) - tuned_n
        else:
            averaged["top1_accuracy"] = right_ln
        tables = [
            self._mean(name, values_ln, layers=layers) for name, values_ln in averaged.items()
        ]
        return pd.concat(tables, ignore_index=True)

    def _is_right(self, p_lnc: np.ndarray, split: str, *, threshold: float = 0.5) -> np.ndarray:
        """(l, n) True where the larger answer is the right one."""
        labels = self.labels.select(split)
        if self.binary:
            return (p_lnc[..., 0] >= threshold) == (labels.y_nc[:, 0] > 0)
        counting_lnc = np.where(labels.mask_nc > 0, p_lnc, -1)
        return counting_lnc.argmax(-1) == labels.y_nc.argmax(-1)
