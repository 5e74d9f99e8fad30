"""Activations on disk: shards in safetensors, read one layer at a time.

    data/activations/<model>/<fingerprint of the settings>/
        meta.json                     what was extracted, from what, with what
        shard-00000.safetensors       "<layer>/<pooling>": (rows, d), float16 where the values fit, else float32
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from probekit import paths

FLOAT16_MAX = np.finfo(np.float16).max


def shard_path(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:05d}.safetensors"


def compact(values: np.ndarray) -> np.ndarray:
    """float16 where every value fits, float32 otherwise."""
    fits = np.abs(values).max(initial=0) <= FLOAT16_MAX
    return np.ascontiguousarray(values, dtype=np.float16 if fits else np.float32)


def write_shard(folder: Path, i: int, states: dict[str, np.ndarray], first_row: int) -> Path:
    """Write one shard whole; `states` maps ``"<layer>/<pooling>"`` to (rows, d) float32."""
    tensors = {key: compact(values) for key, values in states.items()}
    # one metadata key: safetensors writes several in no fixed order, and equal shards must be equal files
    note = {"probekit": json.dumps({"first_row": first_row, "folder": folder.name})}
    return paths.write_atomic(shard_path(folder, i), lambda part: save_file(tensors, part, metadata=note))


def is_done(folder: Path, i: int, first_row: int) -> bool:
    """Is shard i there, complete, and the one that belongs there?"""
    try:
        with safe_open(shard_path(folder, i), framework="numpy") as shard:
            note = json.loads((shard.metadata() or {}).get("probekit", "{}"))
    except (FileNotFoundError, SafetensorError):
        return False
    return note == {"first_row": first_row, "folder": folder.name}


@dataclass(frozen=True)
class Store:
    """The finished activations of one extraction: ``store["lm.12", "mean"]`` is (n, d) float32.

    Raises
    ------
    FileNotFoundError
        The folder holds no extraction, or an unfinished one.
    """

    folder: Path

    def __post_init__(self):
        starts = self.meta["shard_starts"]
        missing = sum(not is_done(self.folder, i, row) for i, row in enumerate(starts))
        if missing:
            raise FileNotFoundError(f"{missing} of {len(starts)} shards are missing or damaged in {self.folder}: run "
                                    "02_extract again, it computes only those")

    @cached_property
    def meta(self) -> dict:
        return paths.read_json(self.folder / "meta.json")

    @property
    def layers(self) -> list[str]:
        return self.meta["layers"]

    @property
    def poolings(self) -> list[str]:
        return self.meta["settings"]["poolings"]

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        layer, pooling = key
        for what, wanted, known in (("layer", layer, self.layers), ("pooling", pooling, self.poolings)):
            if wanted not in known:
                raise KeyError(f"{what} {wanted} is not stored: this run has {', '.join(known)}; run 02_extract with "
                               f"{what}s that include it")
        parts = []
        for i in range(len(self.meta["shard_starts"])):
            with safe_open(shard_path(self.folder, i), framework="numpy") as shard:
                parts.append(shard.get_tensor(f"{layer}/{pooling}"))
        return np.concatenate(parts, dtype=np.float32)
