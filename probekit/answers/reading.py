"""The logits of a task's answers, read off stored states: of the last layer, and through the lens.

The lens (nostalgebraist 2020, "interpreting GPT: the logit lens") lets each layer answer through
the model's own final norm and output embedding. It underestimates early layers, whose states lie in
other directions (LatentLens, arXiv:2602.00462): a probe is mostly the upper curve. The tuned lens
(Belrose et al. 2023, arXiv:2303.08112) first maps a layer's states to the last layer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import logsumexp, softmax

from probekit.extraction.answer_heads import ANSWER_POOLING
from probekit.extraction.store import Activations
from probekit.models.output_head import AnswerHead, NoAnswers
from probekit.probes.results import LENS
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


NOT_EXTRACTED = "what they are read with was not extracted, or is lost: run 02_extract with answers"
TUNED_LENS = "tuned_lens"
MOST_TUNING_EXAMPLES = 16_384
TUNING_BLOCK = 4096  # examples that are multiplied at a time
# Ridge penalties of the tuned lens, as shares of the mean variance of a state's entries.
TUNING_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def read_answers(
    activations: Activations,
    infos: Mapping[str, TaskInfo],
    *,
    with_tuned_lens: bool = True,
    device: str = "cpu",
) -> tuple[dict[str, dict[str, AnswerLogits]], dict[str, str]]:
    """Read the answers of the tasks that have some, without the model.

    Parameters
    ----------
    activations : Activations
    infos : mapping of str to TaskInfo
        The tasks of its examples.
    with_tuned_lens : bool
        Also fit the tuned lens, to the training examples.
    device : str
        Where it is fitted.

    Returns
    -------
    answers : dict of str to dict of str to AnswerLogits
        For each task that can be read, of its examples in their order, by the lens that layers are
        read through: ``"lens"``, whose only layer is the last one where the final norm is not
        known, and ``"tuned_lens"``, which has NaN for training examples. The last layer of both is
        what the model says.
    refusals : dict of str to str
        For each other task that has answers why there are none.
    """
    asked = {name: info for name, info in infos.items() if info.answers}
    if not asked:
        return {}, {}
    if ANSWER_POOLING not in activations.poolings or "lm" not in activations.stages:
        return {}, dict.fromkeys(asked, NOT_EXTRACTED)
    try:
        head = activations.answer_head
    except FileNotFoundError:
        return {}, dict.fromkeys(asked, NOT_EXTRACTED)
    if head.refusal:
        return {}, dict.fromkeys(asked, head.refusal)
    tokens: dict[str, list[list[int]]] = {}
    refusals: dict[str, str] = {}
    for name, info in asked.items():
        try:
            tokens[name] = head.answer_tokens(info.answers)
        except NoAnswers as error:
            refusals[name] = str(error)
    if not tokens:
        return {}, refusals
    examples = activations.examples
    rows = {name: np.flatnonzero((examples.task == name).to_numpy()) for name in tokens}
    layers = [layer for layer in activations.layers if layer.startswith("lm.")]
    last_nd = activations[layers[-1], ANSWER_POOLING]
    logits: dict[tuple[str, str], list[np.ndarray]] = {}
    split_n = examples.split.to_numpy()
    is_tuned = with_tuned_lens and {"train", "validation"} <= set(split_n)
    is_answered_n = np.isin(np.arange(len(examples)), np.concatenate([*rows.values()]))
    for layer in layers:
        is_last = layer == layers[-1]
        states_nd = last_nd if is_last else activations[layer, ANSWER_POOLING]
        for name, task_rows in rows.items():
            if is_last or head.norm is not None:
                logits.setdefault((name, LENS), []).append(
                    _answer_logits(head, states_nd[task_rows], tokens[name], is_normed=is_last)
                )
        if not is_tuned:
            continue
        tuned_nd = last_nd
        if not is_last:
            tuned_nd = tune_states(
                states_nd,
                last_nd,
                split_n=np.where(is_answered_n, split_n, ""),
                device=device,
            )
        for name, task_rows in rows.items():
            logits.setdefault((name, TUNED_LENS), []).append(
                _answer_logits(head, tuned_nd[task_rows], tokens[name], is_normed=True)
            )
    answers: dict[str, dict[str, AnswerLogits]] = {name: {} for name in tokens}
    for (name, lens), by_layer in logits.items():
        answers[name][lens] = AnswerLogits(layers[-len(by_layer) :], np.stack(by_layer))
    return answers, refusals


def tune_states(
    states_nd: np.ndarray, last_nd: np.ndarray, *, split_n: np.ndarray, device: str = "cpu"
) -> np.ndarray:
    """Map a layer's states to the last layer's, by the affine map that fits the training examples.

    Parameters
    ----------
    states_nd, last_nd : ndarray
        (n, d) states of the layer, and of the last one.
    split_n : ndarray
        (n,) the split of each example; others than train, validation and test take no part.
    device : str
        Where the map is fitted.

    Returns
    -------
    ndarray
        (n, d) float32; NaN but for validation and test examples.

    Notes
    -----
    Ridge regression on at most :data:`MOST_TUNING_EXAMPLES` training examples, its penalty chosen
    by the squared error on as many validation examples. Belrose et al. (2023) minimise the
    divergence between the two predictions instead, over the whole vocabulary, which is not stored.
    """
    train = np.flatnonzero(split_n == "train")[:MOST_TUNING_EXAMPLES]
    validation = np.flatnonzero(split_n == "validation")[:MOST_TUNING_EXAMPLES]
    mean_d = torch.as_tensor(states_nd[train].mean(0), device=device)
    target_mean_d = torch.as_tensor(last_nd[train].mean(0), device=device)

    def centred(rows: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(states_nd[rows], device=device) - mean_d

    def centred_target(rows: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(last_nd[rows], device=device) - target_mean_d

    width = states_nd.shape[1]
    gram_dd = torch.zeros((width, width), dtype=torch.float64, device=device)
    cross_dd = torch.zeros((width, last_nd.shape[1]), dtype=torch.float64, device=device)
    for block in np.array_split(train, -(-len(train) // TUNING_BLOCK)):
        centred_nd = centred(block)
        gram_dd += centred_nd.T @ centred_nd
        cross_dd += centred_nd.T @ centred_target(block)
    variance_d, axes_dd = torch.linalg.eigh(gram_dd / len(train))
    variance_d = variance_d.clip(min=0)
    along_dd = axes_dd.T @ cross_dd / len(train)
    held_out_nd = (centred(validation).double() @ axes_dd).float()
    held_out_target_nd = centred_target(validation)
    best_error = np.inf
    best_map_dd = cross_dd
    for share in TUNING_PENALTIES:
        penalty = share * max(float(variance_d.mean()), 1e-30)
        map_dd = along_dd / (variance_d + penalty)[:, None]
        error = float((held_out_nd @ map_dd.float() - held_out_target_nd).square().mean())
        if error < best_error:
            best_error = error
            best_map_dd = axes_dd @ map_dd
    tuned_nd = np.full(last_nd.shape, np.nan, np.float32)
    mapped = np.flatnonzero(np.isin(split_n, ("validation", "test")))
    tuned_nd[mapped] = (centred(mapped) @ best_map_dd.float() + target_mean_d).cpu().numpy()
    return tuned_nd


def _answer_logits(
    head: AnswerHead, states_nd: np.ndarray, tokens: Sequence[Sequence[int]], *, is_normed: bool
) -> np.ndarray:
    """Return (n, a) the logits of answers: their spellings' probabilities are summed."""
    logits_nv = head.token_logits(states_nd, is_normed=is_normed)
    return np.stack([logsumexp(logits_nv[:, places], axis=1) for places in tokens], axis=1)
