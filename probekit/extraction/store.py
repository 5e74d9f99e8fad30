"""The activations of a run: a view on parts, read one layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from probekit import paths
from probekit.extraction.shards import Part, digest, keys_of, meta_of, note_of, rows_of
from probekit.tasks import input_controls


@dataclass(frozen=True)
class Activations:
    """The activations of a run: ``store["lm.12", "mean"]`` is (n, d) float32, rows as in its examples.

    Attributes
    ----------
    examples : what the model was given; that of a control differs from the run's examples
    control : "none", or a name out of :data:`probekit.tasks.input_controls.INPUT_CONTROLS`

    Raises
    ------
    FileNotFoundError
        Some of them have not been extracted.
    ValueError
        What is read is not what was written.
    """

    folder: Path
    examples: pd.DataFrame
    stages: tuple[str, ...]
    poolings: tuple[str, ...]
    control: str = "none"

    def __post_init__(self):
        for stage in self.stages:
            for pooling in self.poolings_of(stage):
                missing = self._where(f"{stage}/{pooling}").shard.isna().sum()
                if missing:
                    raise FileNotFoundError(f"{missing:,} of {len(self.examples):,} examples have no {stage}/{pooling} "
                                            f"in {self.folder}: run 02_extract for this run, it computes only those")

    @classmethod
    def open(cls, record: dict, examples: pd.DataFrame) -> Activations:
        """The store that a run's record (:attr:`record`) names; `examples` are the run's."""
        control = record["control"]
        return cls(paths.Home.find().resolve(record["folder"]), input_controls.change_inputs(examples, control), tuple(record["stages"]),
                   tuple(record["poolings"]), control)

    @property
    def record(self) -> dict:
        return {"folder": paths.Home.find().relative(self.folder), "stages": self.stages, "poolings": self.poolings,
                "control": self.control}

    @property
    def dtypes(self) -> dict[str, int]:
        """How many of the tensors that this run reads are on disk in which type."""
        found: dict[str, int] = {}
        for part, i in self._shards:
            with safe_open(part.shard(i), framework="numpy") as shard:
                for key in shard.keys():  # noqa: SIM118 (not a dictionary)
                    dtype = shard.get_slice(key).get_dtype()
                    found[dtype] = found.get(dtype, 0) + 1
        return found

    @property
    def megabytes(self) -> float:
        """Size on disk of the shards that this run reads."""
        return round(sum(part.shard(i).stat().st_size for part, i in self._shards) / 1e6, 1)

    @property
    def _shards(self) -> list[tuple[Part, int]]:
        wants = [f"{stage}/{pooling}" for stage in self.stages for pooling in self.poolings_of(stage)]
        pairs = pd.concat([self._where(want)[["part", "shard"]] for want in wants]).drop_duplicates()
        return [(self._parts[int(k)], int(i)) for k, i in pairs.itertuples(index=False)]

    def poolings_of(self, stage: str) -> list[str]:
        return [pooling for pooling in self.poolings if stage == "lm" or pooling != "text_mean"]

    @cached_property
    def meta(self) -> dict:
        meta = meta_of(self.folder)
        if meta is None:
            raise FileNotFoundError(f"{self.folder / 'meta.json'} is missing, damaged, or of another version: run "
                                    "02_extract again for this run, it makes no sound shard anew")
        return meta

    @property
    def layers(self) -> list[str]:
        """Names of the layers, stage by stage in the order of the depth."""
        return [layer for stage in self.stages for layer in self.meta["layers"][stage]]

    def layers_with(self, pooling: str) -> list[str]:
        """The layers that have this pooling: text is no part of an image."""
        return [layer for layer in self.layers if pooling in self.poolings_of(layer.partition(".")[0])]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of what these activations are: the model, the images as they are on disk, the prompts."""
        return paths.fingerprint(self.record, self._rows.to_csv(index=False))

    @cached_property
    def _rows(self) -> pd.DataFrame:
        return rows_of(self.examples)

    @cached_property
    def _parts(self) -> list[Part]:
        return Part.all_of(self.folder)

    def _where(self, want: str) -> pd.DataFrame:
        """(n) part, shard and row of each example's values; nothing where no finished shard has them."""
        cache = self.__dict__.setdefault("_found", {})
        if want not in cache:
            tables = []
            for k, part in enumerate(self._parts):
                if want in part.wants:
                    done = [i for i in range(len(part.starts) - 1) if part.is_done(i)]
                    places = part.places(want)
                    tables.append(places[places.shard.isin(done)].assign(part=k))
            held = pd.concat(tables) if tables else pd.DataFrame(columns=["shard", "row", "part"])
            held = held[~held.index.duplicated()]
            cache[want] = held.reindex(keys_of(self._rows, want)).reset_index(drop=True)
        return cache[want]

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        layer, pooling = key
        stage = layer.partition(".")[0]
        known = self.poolings_of(stage)
        for what, wanted, there in (("layer", layer, self.layers), ("pooling", pooling, known)):
            if wanted not in there:
                mend = "take one of these" if what == "layer" else "run 02_extract with poolings that include it"
                raise KeyError(f"{what} {wanted} is not stored: this run has {', '.join(there)}; {mend}")
        out = None
        for path, to, rows in self._reads(f"{stage}/{pooling}"):
            with safe_open(path, framework="pt") as shard:
                values = shard.get_tensor(f"{layer}/{pooling}")
                if digest(values.numpy()) != note_of(shard).get("sha256", {}).get(f"{layer}/{pooling}"):
                    raise ValueError(f"{path} is damaged, its {layer}/{pooling} is not what was written: python -m "
                                     f"probekit verify {paths.Home.find().relative(self.folder)} --remove takes away what is "
                                     "damaged, then 02_extract makes just that again")
            out = torch.empty(len(self.examples), values.shape[1]) if out is None else out
            out[to] = values[rows].float() if isinstance(to, torch.Tensor) else values[rows]
        return out.numpy()

    def _reads(self, want: str) -> list[tuple[Path, slice | torch.Tensor, slice | torch.Tensor]]:
        """Which shards hold a want, whose rows of theirs go where; neighbours as slices, which need no copy."""
        cache = self.__dict__.setdefault("_plans", {})
        if want not in cache:
            cache[want] = []
            for (k, i), places in self._where(want).groupby(["part", "shard"]):
                to, rows = places.index.to_numpy(), places.row.to_numpy(np.int64)
                if (np.diff(to) == 1).all() and (np.diff(rows) == 1).all():
                    to, rows = (slice(int(at[0]), int(at[-1]) + 1) for at in (to, rows))
                else:
                    to, rows = torch.tensor(to), torch.tensor(rows)
                cache[want].append((self._parts[int(k)].shard(int(i)), to, rows))
        return cache[want]
