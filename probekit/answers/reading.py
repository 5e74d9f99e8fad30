"""The logits of a task's answers, read off stored states: of the last layer, and through the lens.

The lens (nostalgebraist 2020, "interpreting GPT: the logit lens") lets each layer answer through
the model's own final norm and output embedding. It underestimates early layers, whose states lie in
other directions (LatentLens, arXiv:2602.00462): a probe is the upper curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp, softmax

from probekit.extraction.answer_heads import ANSWER_POOLING
from probekit.extraction.store import Activations
from probekit.models.output_head import AnswerHead, NoAnswers
from probekit.tasks.base import TaskInfo


@dataclass(frozen=True)
class AnswerLogits:
    """What layers answer.

    Attributes
    ----------
    layers : list of str
        The l layers of the decoder that can be read. The last one is the model's: what it says.
    logits_lna : ndarray
        (l, n, a) logits of the a answers, over the spellings of their words.
    """

    layers: list[str]
    logits_lna: np.ndarray

    @property
    def choices_ln(self) -> np.ndarray:
        """(l, n) the number of the answer with the largest logit."""
        return self.logits_lna.argmax(-1)

    def probabilities(self, *, binary: bool) -> np.ndarray:
        """Return (l, n, c) the probability of each class, of these answers alone.

        A binary task has one class, "yes".
        """
        p_lna = softmax(self.logits_lna, axis=-1)
        return p_lna[..., 1:] if binary else p_lna

    def depth_of_decision(self) -> np.ndarray:
        """Return (n,) the place of the first layer from which the final answer stays on top."""
        is_final_ln = self.choices_ln == self.choices_ln[-1]
        stays_ln = np.logical_and.accumulate(is_final_ln[::-1])[::-1]
        return stays_ln.argmax(0)


def read_answers(
    activations: Activations, infos: Mapping[str, TaskInfo]
) -> tuple[dict[str, AnswerLogits], dict[str, str]]:
    """Read the answers of the tasks that have some, without the model.

    Parameters
    ----------
    activations : Activations
    infos : mapping of str to TaskInfo
        The tasks of its examples.

    Returns
    -------
    answers : dict of str to AnswerLogits
        For each task that can be read, of its examples in their order.
    refusals : dict of str to str
        For each other task that has answers why there are none.
    """
    asked = {name: info for name, info in infos.items() if info.answers}
    if not asked:
        return {}, {}
    if ANSWER_POOLING not in activations.poolings or "lm" not in activations.stages:
        return {}, dict.fromkeys(asked, "they were extracted without answers")
    head = activations.answer_head
    if head.refusal:
        return {}, dict.fromkeys(asked, head.refusal)
    tokens: dict[str, list[list[int]]] = {}
    refusals: dict[str, str] = {}
    for name, info in asked.items():
        try:
            tokens[name] = head.answer_tokens(info.answers)
        except NoAnswers as error:
            refusals[name] = str(error)
    layers = [layer for layer in activations.layers if layer.startswith("lm.")]
    if head.norm is None:
        layers = layers[-1:]
    rows = {name: np.flatnonzero((activations.examples.task == name).to_numpy()) for name in tokens}
    logits: dict[str, list[np.ndarray]] = {name: [] for name in tokens}
    if tokens:
        for layer in layers:
            states_nd = activations[layer, ANSWER_POOLING]
            for name in tokens:
                of_layer = _answer_logits(
                    head, states_nd[rows[name]], tokens[name], is_normed=layer == layers[-1]
                )
                logits[name].append(of_layer)
    read = {name: AnswerLogits(layers, np.stack(by_layer)) for name, by_layer in logits.items()}
    return read, refusals


def _answer_logits(
    head: AnswerHead, states_nd: np.ndarray, tokens: Sequence[Sequence[int]], *, is_normed: bool
) -> np.ndarray:
    """Return (n, a) the logits of answers: their spellings' probabilities are summed."""
    logits_nv = head.token_logits(states_nd, is_normed=is_normed)
    return np.stack([logsumexp(logits_nv[:, places], axis=1) for places in tokens], axis=1)
