"""The weights of fitted logistic regressions, to be applied to other states.

The probes of a run are read again on the states of other layers
(:mod:`probekit.probes.transfer`) and on single image tokens (:mod:`probekit.probes.localisation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class ProbeWeights:
    r"""One task's logistic regressions of l layers, with the standardisation of their features.

    The log-odds of class c at layer l are
    :math:`\sum_d w_{ldc} (x_d - m_{ld}) / s_{ld} + b_{lc}`.

    Attributes
    ----------
    weight_ldc : ndarray
        (l, d, c) weights w of the standardised features.
    intercept_lc : ndarray
        (l, c) intercepts b.
    mean_ld : ndarray
        (l, d) means m of the training features.
    scale_ld : ndarray
        (l, d) standard deviations s of the training features; infinite for a constant feature,
        which therefore counts for nothing.
    """

    weight_ldc: np.ndarray
    intercept_lc: np.ndarray
    mean_ld: np.ndarray
    scale_ld: np.ndarray

    @classmethod
    def concatenate(cls, parts: Sequence[ProbeWeights]) -> ProbeWeights:
        """Put the layers of several groups one after the other.

        Parameters
        ----------
        parts : sequence of ProbeWeights
            Probes of the same classes on layers of the same width.
        """
        return cls(
            weight_ldc=np.concatenate([part.weight_ldc for part in parts]),
            intercept_lc=np.concatenate([part.intercept_lc for part in parts]),
            mean_ld=np.concatenate([part.mean_ld for part in parts]),
            scale_ld=np.concatenate([part.scale_ld for part in parts]),
        )

    @property
    def learnable_classes(self) -> np.ndarray:
        """Numbers of the classes that have a probe.

        A class with a single kind of training label has none: all its weights are zero.
        """
        return np.flatnonzero((self.weight_ldc != 0).any(axis=(0, 1)))

    def layer(self, index: int) -> ProbeWeights:
        """Return the probes of one layer alone; l is then 1."""
        return ProbeWeights(
            weight_ldc=self.weight_ldc[[index]],
            intercept_lc=self.intercept_lc[[index]],
            mean_ld=self.mean_ld[[index]],
            scale_ld=self.scale_ld[[index]],
        )

    def standardise(self, layer: int, x_nd: np.ndarray) -> np.ndarray:
        """Standardise states of one layer with the mean and scale of its training features."""
        return (x_nd - self.mean_ld[layer]) / self.scale_ld[layer]

    def raw_weights(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one layer's probes for states as the model computes them, not standardised.

        Returns
        -------
        weight_dc : Tensor
            (d, c) weights.
        intercept_c : Tensor
            (c,) intercepts.

        Notes
        -----
        The probes are linear, so the log-odds of mean-pooled states are the mean of the log-odds of
        the tokens that were pooled.
        """
        weight_dc = self.weight_ldc[layer] / self.scale_ld[layer][:, None]
        intercept_c = self.intercept_lc[layer] - self.mean_ld[layer] @ weight_dc
        return torch.from_numpy(weight_dc), torch.from_numpy(intercept_c)

    def logits_on(self, layer: int, x_nd: np.ndarray) -> np.ndarray:
        """Apply the probes of all layers to the states of one layer.

        The states are standardised as their own layer's are. What then differs between the probes
        is the direction that each reads, not the size of the states, which grows with depth.

        Parameters
        ----------
        layer : int
            Number of the layer that the states come from.
        x_nd : ndarray
            (n, d) its states.

        Returns
        -------
        ndarray
            (l, n, c) log-odds: entry k comes from the probes of layer k.
        """
        standardised_nd = self.standardise(layer, x_nd).astype(np.float32)
        logits_lnc = np.einsum("nd,ldc->lnc", standardised_nd, self.weight_ldc, optimize=True)
        return logits_lnc + self.intercept_lc[:, None]
