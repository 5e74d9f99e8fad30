"""Who reads single image tokens: a local probe, or the lens through the model's own words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from probekit.models.devices import copy_to
from probekit.models.load import Vlm
from probekit.models.output_head import NO_LENS, AnswerHead, NoAnswers, take_answer_head
from probekit.models.processor import PreparedImage
from probekit.probes.weights import ProbeWeights


class TokenReader(Protocol):
    """Turns the hidden states of a layer into a number for each of c classes.

    Attributes
    ----------
    readable : ndarray of int
        Numbers of the classes that it can read; its numbers for the others mean nothing.
    """

    readable: np.ndarray

    def __call__(self, layer: str, hidden_ntd: torch.Tensor) -> torch.Tensor:
        """Return (n, t, c) float32 numbers for the hidden states of a layer."""


class ProbeReader:
    """Reads tokens with the probes of each layer: their log-odds.

    Parameters
    ----------
    weights : ProbeWeights
        Probes of all decoder layers.
    vlm : Vlm
        The model whose tokens are read.
    """

    def __init__(self, weights: ProbeWeights, vlm: Vlm) -> None:
        self.readable = weights.learnable_classes
        self._probes = {}
        for place, layer in enumerate(vlm.layers):
            weight_dc, intercept_c = weights.raw_weights(place)
            self._probes[layer] = (copy_to(vlm.device, weight_dc), copy_to(vlm.device, intercept_c))

    def __call__(self, layer: str, hidden_ntd: torch.Tensor) -> torch.Tensor:
        """Return (n, t, c) log-odds."""
        weight_dc, intercept_c = self._probes[layer]
        return hidden_ntd.float() @ weight_dc + intercept_c


class LensReader:
    """Reads which class's name each token would say: log-probabilities among the names.

    Each layer goes through the model's own final norm and output embedding, as in Neo et al.
    (2024), "Towards interpreting visual information processing in vision-language models",
    https://arxiv.org/abs/2410.07149. There all words of the vocabulary compete, here those of the
    classes alone.

    Parameters
    ----------
    head : AnswerHead
        With the words of the classes.
    classes : sequence of str
        Names of the c classes.
    vlm : Vlm
        The model whose tokens are read.

    Raises
    ------
    NoAnswers
        The head is refused, its final norm is not known, or fewer than two classes begin with a
        token of their own.
    """

    def __init__(self, head: AnswerHead, classes: Sequence[str], vlm: Vlm) -> None:
        if head.refusal:
            raise NoAnswers(head.refusal)
        if head.norm is None:
            raise NoAnswers(NO_LENS)
        tokens_by_class = head.distinct_tokens([(name,) for name in classes])
        self.readable = np.array([c for c, tokens in enumerate(tokens_by_class) if tokens], int)
        if len(self.readable) < 2:
            raise NoAnswers(
                "its tokenizer has fewer than two of the classes' names by a first token that no "
                "other name has"
            )
        places = [place for tokens in tokens_by_class for place in tokens]
        class_v = [c for c, tokens in enumerate(tokens_by_class) for _ in tokens]
        self._last_layer = vlm.layers[-1]
        self._logits = head.on(vlm.device, places)
        one_hot_vc = np.eye(len(classes), dtype=np.float32)[class_v]
        self._class_vc = copy_to(vlm.device, torch.from_numpy(one_hot_vc))
        self._is_readable_c = self._class_vc.any(0)

    @classmethod
    def of(cls, vlm: Vlm, classes: Sequence[str], prepared: PreparedImage) -> LensReader:
        """Take what is needed from a model; one prompt runs through all of it.

        Parameters
        ----------
        vlm : Vlm
            With its head (`with_head` of :func:`probekit.models.load.load_vlm`).
        classes : sequence of str
            Names of the c classes.
        prepared : PreparedImage
            One image with one prompt.

        Raises
        ------
        NoAnswers
            See :class:`LensReader`.
        """
        return cls(take_answer_head(vlm, classes, prepared), classes, vlm)

    def __call__(self, layer: str, hidden_ntd: torch.Tensor) -> torch.Tensor:
        """Return (n, t, c) log-probabilities, 0 for classes that cannot be read."""
        # The last layer comes after the norm.
        logits_ntv = self._logits(hidden_ntd.float(), is_normed=layer == self._last_layer)
        # All spellings of a name together; each token belongs to one name.
        p_ntc = logits_ntv.softmax(-1) @ self._class_vc
        log_p_ntc = p_ntc.clamp(min=torch.finfo(torch.float32).tiny).log()
        return torch.where(self._is_readable_c, log_p_ntc, 0.0)
