"""Fitted probes on disk, a file for each layer, so that probing goes on where it was stopped."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from probekit import paths
from probekit.probes.fitting import FittedProbes
from probekit.probes.labels import LabelKey
from probekit.probes.weights import ProbeWeights


class Checkpoints:
    """The probes that were fitted so far, of one kind and pooling for one task, in a folder.

    Parameters
    ----------
    folder : Path
        Made when the first probes are written.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def _path(self, layer: str) -> Path:
        return self._folder / f"{layer}.safetensors"

    def read(self, layer: str) -> dict[LabelKey, FittedProbes] | None:
        """Return the probes of one layer by their labels; None where they are to be fitted."""
        try:
            return self._read(layer)
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
            return None  # there is none, or it is damaged

    def _read(self, layer: str) -> dict[LabelKey, FittedProbes]:
        with safe_open(self._path(layer), framework="numpy") as file:
            tables = json.loads(file.metadata()["tables"])
        arrays = load_file(self._path(layer))
        fitted = {}
        for prefix, texts in tables.items():
            control, _, seed = prefix.partition("/")
            mine = {
                name.removeprefix(f"{prefix}/"): values
                for name, values in arrays.items()
                if name.startswith(f"{prefix}/")
            }
            weights = {}
            if "weights/intercept_lc" in mine:
                parts = {
                    field.name: mine[f"weights/{field.name}"] for field in fields(ProbeWeights)
                }
                weights[layer] = ProbeWeights(**parts)
            fitted[LabelKey(control, int(seed))] = FittedProbes(
                probabilities={
                    split: mine[f"probabilities/{split}"] for split in ("validation", "test")
                },
                bits_ln=mine.get("bits_ln"),
                weights=weights,
                **{name: _read_table(text) for name, text in texts.items()},
            )
        return fitted

    def write(self, layer: str, fitted: Mapping[LabelKey, FittedProbes]) -> None:
        """Write the probes of one layer."""
        arrays: dict[str, np.ndarray] = {}
        tables = {}
        for key, probes in fitted.items():
            prefix = f"{key.control}/{key.seed}"
            for split, p_lnc in probes.probabilities.items():
                arrays[f"{prefix}/probabilities/{split}"] = np.ascontiguousarray(p_lnc)
            if probes.bits_ln is not None:
                arrays[f"{prefix}/bits_ln"] = np.ascontiguousarray(probes.bits_ln)
            for weights in probes.weights.values():
                for field in fields(weights):
                    values = getattr(weights, field.name)
                    arrays[f"{prefix}/weights/{field.name}"] = np.ascontiguousarray(values)
            tables[prefix] = {
                "strengths": probes.strengths.to_csv(index=False),
                "losses": probes.losses.to_csv(index=False),
            }
        metadata = {"tables": json.dumps(tables)}
        paths.write_atomic(
            self._path(layer), lambda path: save_file(arrays, path, metadata=metadata)
        )


def _read_table(text: str) -> pd.DataFrame:
    if not text.strip():
        return pd.DataFrame()
    return pd.read_csv(io.StringIO(text), float_precision="round_trip")


def forget_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a folder of results, those of other settings too."""
    for old in folder.glob("fitted-*"):
        shutil.rmtree(old, ignore_errors=True)
