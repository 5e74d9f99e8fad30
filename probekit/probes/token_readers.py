"""Who reads single image tokens: a local probe, or the lens through the model's own words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from probekit.models.devices import copy_to
from probekit.models.load import Vlm
from probekit.models.output_head import AnswerHead, FinalNorm, NoAnswers, take_answer_head
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
            raise NoAnswers("its final norm is not one that is known, so there is no lens")
        tokens_by_class = head.distinct_tokens([(name,) for name in classes])
        self.readable = np.array([c for c, tokens in enumerate(tokens_by_class) if tokens], int)
        if len(self.readable) < 2:
            raise NoAnswers(
                "its tokenizer has fewer than two of the classes' names by a first token that no "
                "other name has"
            )
        places = [place for tokens in tokens_by_class for place in tokens]
        class_v = [c for c, tokens in enumerate(tokens_by_class) for _ in tokens]
        device = vlm.device
        self._last_layer = vlm.layers[-1]
        self._norm = _norm_on_device(head.norm, device)
        self._rows_dv = copy_to(device, torch.from_numpy(head.rows_vd[places].T.copy()))
        self._bias_v = None
        if head.bias_v is not None:
            self._bias_v = copy_to(device, torch.from_numpy(head.bias_v[places]))
        self._scale = head.scale
        self._soft_cap = head.soft_cap
        one_hot_vc = np.eye(len(classes), dtype=np.float32)[class_v]
        self._class_vc = copy_to(device, torch.from_numpy(one_hot_vc))

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
        normed_ntd = hidden_ntd.float()
        if layer != self._last_layer:  # which comes after the norm
            normed_ntd = self._norm(normed_ntd)
        logits_ntv = normed_ntd @ self._rows_dv
        if self._bias_v is not None:
            logits_ntv = logits_ntv + self._bias_v
        logits_ntv = self._scale * logits_ntv
        if self._soft_cap is not None:
            logits_ntv = self._soft_cap * torch.tanh(logits_ntv / self._soft_cap)
        # All spellings of a name together; each token belongs to one name.
        p_ntc = logits_ntv.softmax(-1) @ self._class_vc
        log_p_ntc = p_ntc.clamp(min=torch.finfo(torch.float32).tiny).log()
        is_readable_c = self._class_vc.any(0)
        return torch.where(is_readable_c, log_p_ntc, 0.0)


def _norm_on_device(norm: FinalNorm, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a final norm for hidden states (n, t, d) on a device."""
    weight_d = None if norm.weight_d is None else copy_to(device, torch.from_numpy(norm.weight_d))
    bias_d = None if norm.bias_d is None else copy_to(device, torch.from_numpy(norm.bias_d))

    def apply(hidden_ntd: torch.Tensor) -> torch.Tensor:
        width = hidden_ntd.shape[-1:]
        if norm.kind == "layer":
            return functional.layer_norm(hidden_ntd, width, weight_d, bias_d, norm.epsilon)
        if norm.kind == "rms":
            hidden_ntd = functional.rms_norm(hidden_ntd, width, weight_d, norm.epsilon)
        return hidden_ntd if bias_d is None else hidden_ntd + bias_d

    return apply
