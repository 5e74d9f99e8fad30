"""Fitted logistic regressions of all layers, to be tried elsewhere: on other layers, on single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class ProbeWeights:
    """Logistic regressions on l layers for c classes, with the standardisation that they were fitted with.

    Attributes
    ----------
    weight_ldc, intercept_lc : of standardised features
    mean_ld, scale_ld : of the training features; the scale of a constant feature is infinite
    """

    weight_ldc: np.ndarray
    intercept_lc: np.ndarray
    mean_ld: np.ndarray
    scale_ld: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[ProbeWeights]) -> ProbeWeights:
        """Layers of one width, one after the other."""
        return cls(*(np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))

    @property
    def learnt(self) -> np.ndarray:
        """Numbers of the classes that a probe could learn: others have a single kind of training label."""
        return np.flatnonzero((self.weight_ldc != 0).any((0, 1)))

    def only(self, layer: int) -> ProbeWeights:
        return ProbeWeights(*(values[[layer]] for values in vars(self).values()))

    def standardised(self, layer: int, x_nd: np.ndarray) -> np.ndarray:
        return (x_nd - self.mean_ld[layer]) / self.scale_ld[layer]

    def raw(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (d, c) and intercepts (c,) for features as the model makes them.

        They are linear: of mean-pooled states, the log-odds are the mean of those of the single tokens.
        """
        weight_dc = self.weight_ldc[layer] / self.scale_ld[layer][:, None]
        return torch.from_numpy(weight_dc), torch.from_numpy(self.intercept_lc[layer] - self.mean_ld[layer] @ weight_dc)

    def everywhere(self, layer: int, x_nd: np.ndarray) -> np.ndarray:
        """(l, n, c) log-odds of the probes of all layers, applied to the features of one.

        Features are standardised as those of their own layer, so that what differs is the direction that is read, not
        the size of the states, which grows with depth.
        """
        x_nd = self.standardised(layer, x_nd).astype(np.float32)
        return np.einsum("nd,ldc->lnc", x_nd, self.weight_ldc, optimize=True) + self.intercept_lc[:, None]
