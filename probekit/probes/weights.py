"""The weights of fitted linear probes, to be applied to other states.

The probes of a run are read again on the states of other layers
(:mod:`probekit.probes.transfer`) and on single image tokens (:mod:`probekit.probes.localisation`),
and a single one can be taken along as a :class:`LinearProbe`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.special import expit

from probekit import paths


@dataclass(frozen=True)
class ProbeWeights:
    r"""One task's linear probes of l layers, with the standardisation of their features.

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

    def logits(self, layer: int, x_nd: np.ndarray) -> np.ndarray:
        """Return (n, c) log-odds of states (n, d) of the probes' own layer, by its number."""
        return self.standardise(layer, x_nd) @ self.weight_ldc[layer] + self.intercept_lc[layer]

    def logits_on(self, layer: int, x_nd: np.ndarray, *, device: str = "cpu") -> torch.Tensor:
        """Apply the probes of all layers to the states of one layer.

        The states are standardised as their own layer's are. What then differs between the probes
        is the direction that each reads, not the size of the states, which grows with depth.

        Parameters
        ----------
        layer : int
            Number of the layer that the states come from.
        x_nd : ndarray
            (n, d) its states.
        device : str
            Where the probes are applied.

        Returns
        -------
        Tensor
            (l, n, c) float32 log-odds, there: entry k comes from the probes of layer k.
        """
        standardised_nd = self.standardise(layer, x_nd).astype(np.float32)
        states_nd = torch.as_tensor(standardised_nd, device=device)
        weight_ldc = torch.as_tensor(self.weight_ldc, device=device)
        intercept_lc = torch.as_tensor(self.intercept_lc, device=device)
        return states_nd @ weight_ldc + intercept_lc[:, None]


@dataclass(frozen=True)
class LinearProbe:
    r"""The probe of one layer, for states as the model computes them.

    The log-odds of class c are
    :math:`\sum_d w_{dc} (x_d - m_d) / s_d + b_c`.

    Attributes
    ----------
    direction : ndarray
        (d, c) weights w of the standardised features.
    bias : ndarray
        (c,) b.
    mean, scale : ndarray
        (d,) m and s, of the training features. A scale is infinite for a constant feature, which
        counts for nothing.
    classes : tuple of str
        What the c entries stand for; ``("match",)`` for a binary task.
    name : str
        Model, control, pooling, task, kind of probe and layer.
    """

    direction: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    classes: tuple[str, ...]
    name: str = ""

    def decision_function(self, x_nd: np.ndarray) -> np.ndarray:
        """Return (n, c) log-odds of states (n, d)."""
        return (x_nd - self.mean) / self.scale @ self.direction + self.bias

    def predict_proba(self, x_nd: np.ndarray) -> np.ndarray:
        """Return (n, c) probabilities of each class; they do not exclude each other."""
        return expit(self.decision_function(x_nd))

    @property
    def raw_direction(self) -> np.ndarray:
        """(d, c) weights of states that are not standardised, such as a hook sees them."""
        return self.direction / self.scale[:, None]

    def save(self, file: str | Path) -> Path:
        """Write the probe as a safetensors file, with names and classes in its header."""
        arrays = {
            name: np.ascontiguousarray(getattr(self, name))
            for name in ("direction", "bias", "mean", "scale")
        }
        note = {"probekit": json.dumps({"classes": self.classes, "name": self.name})}
        return paths.write_atomic(Path(file), lambda part: save_file(arrays, part, metadata=note))

    @classmethod
    def load(cls, file: str | Path) -> LinearProbe:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            It holds no probe.
        """
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: save a probe there first")
        try:
            with safe_open(path, framework="numpy") as opened:
                note = json.loads((opened.metadata() or {})["probekit"])
                parts = {
                    name: opened.get_tensor(name) for name in ("direction", "bias", "mean", "scale")
                }
            return cls(**parts, classes=tuple(note["classes"]), name=note["name"])
        except (SafetensorError, LookupError, ValueError) as error:
            raise ValueError(
                f"{path} holds no probe ({error}): take a file that LinearProbe.save wrote"
            ) from error
