"""Activations on disk: rows that were extracted together, in shards.

    data/activations/<model>/<fingerprint of what decides the model's states>/
        meta.json                         which model, with what, which way it was run
        part-<fingerprint>/               rows that were extracted together
            rows.parquet                  file, size in bytes, prompt; rows of one image next to each other
            part.json                     wants ("lm/mean", ...), the shards' first rows
            shard-00000.safetensors       "<layer>/<pooling>": (rows of the shard, d) for the decoder, (images, d) for
                                          the image encoder; float16 where that is precise enough, else float32;
                                          and which shard of which part of which model it is, with a hash a tensor

What a row holds is a matter of its image and prompt alone, so runs share parts: a new run computes what no part has.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from probekit import paths

STAGES = ("lm", "vision", "projector")
FORMAT = 2  # of meta.json and the shards
FLOAT16_MAX = np.finfo(np.float16).max


def compact(values: np.ndarray) -> np.ndarray:
    """float16 where it keeps what a probe can tell apart, float32 otherwise.

    That is where no value overflows, and where rounding is below 1/32 of its column's standard deviation; a column that
    hardly varies is measured by 1/100 of the median one. Fewer than 8 rows do not tell what varies.
    """
    if len(values) >= 8 and np.abs(values).max() <= FLOAT16_MAX:
        half, spread = values.astype(np.float16), values.std(0)
        if (np.abs(half - values).max(0) * 32 <= np.maximum(spread, np.median(spread) / 100)).all():
            return np.ascontiguousarray(half)
    return np.ascontiguousarray(values, dtype=np.float32)


def _digest_of(rows: pd.DataFrame) -> str:
    """16 hexadecimal digits that tell rows, in their order, from others."""
    return hashlib.sha256(pd.util.hash_pandas_object(rows[["file", "size", "prompt"]], index=False).to_numpy().tobytes()
                          ).hexdigest()[:16]


def digest(values: np.ndarray) -> str:
    """32 hexadecimal digits of the SHA-256 of an array's numbers as they lie on disk, little end first."""
    values = np.ascontiguousarray(values)
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<"), copy=False).data).hexdigest()[:32]


def note_of(shard: safe_open) -> dict:
    """What a shard says of itself: `model`, `part`, `first_row`, and `sha256` by tensor."""
    try:
        note = json.loads((shard.metadata() or {}).get("probekit", "{}"))
    except ValueError:  # a damaged header
        note = {}
    return note if isinstance(note, dict) else {}


def write_meta(folder: Path, about: dict) -> Path:
    """Write down in ``meta.json`` what a folder's model is."""
    return paths.write_json(folder / "meta.json", {"format": FORMAT} | about)


def meta_of(folder: Path) -> dict | None:
    """What ``meta.json`` says of a folder's model; None where it is missing, damaged, or of another version."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return meta if meta["format"] == FORMAT else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def want_of(key: str) -> str:
    """The stage and pooling of a tensor: "lm/mean" of "lm.12/mean"."""
    layer, _, pooling = key.rpartition("/")
    return f"{layer.partition('.')[0]}/{pooling}"


# --------------------------------------------------------------------------------------------------------------- rows


def rows_of(examples: pd.DataFrame) -> pd.DataFrame:
    """What a model is given for each example: `file` ("" for a prompt without an image), its `size` in bytes, `prompt`.

    Raises
    ------
    FileNotFoundError
        An image of the examples is gone.
    """
    try:
        sizes = {file: paths.Home.find().resolve(file).stat().st_size if file else 0 for file in examples.file.unique()}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is gone: run 01_build_data again") from None
    return pd.DataFrame({"file": examples.file, "size": examples.file.map(sizes), "prompt": examples.prompt}
                        ).reset_index(drop=True)


def units_of(rows: pd.DataFrame) -> np.ndarray:
    """(n,) numbers of what is run together: an image with its prompts, or a prompt that has none."""
    return pd.factorize(rows.file.where(rows.file != "", "\n" + rows.prompt))[0]


def keys_of(rows: pd.DataFrame, want: str) -> np.ndarray:
    """(n,) numbers that name what a want such as "lm/mean" depends on: image and prompt, or the image alone."""
    columns = ["file", "size", "prompt"] if want.startswith("lm/") else ["file", "size"]
    return pd.util.hash_pandas_object(rows[columns], index=False).to_numpy()


# -------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Part:
    """Rows that were (or are to be) extracted together.

    Attributes
    ----------
    wants : stage and pooling, e.g. "lm/mean", "vision/max"
    starts : first row of each shard, and n at the end
    """

    folder: Path
    rows: pd.DataFrame
    wants: tuple[str, ...]
    starts: np.ndarray

    @classmethod
    def plan(cls, folder: Path, rows: pd.DataFrame, wants: Sequence[str], shard_images: int) -> Part:
        """Write down what is to be extracted, so that it can be resumed; `folder` is the model's."""
        unit, order = np.sort(units_of(rows)), np.argsort(units_of(rows), kind="stable")
        rows = rows.iloc[order].reset_index(drop=True)
        starts = np.append(np.flatnonzero(np.diff(unit // shard_images, prepend=-1)), len(rows))
        own = folder / f"part-{paths.fingerprint(rows.to_csv(index=False), sorted(wants), shard_images)}"
        paths.write_atomic(own / "rows.parquet", rows.to_parquet)
        paths.write_json(own / "part.json", {"wants": sorted(wants), "starts": starts.tolist(),
                                             "rows": _digest_of(rows)})
        return cls(own, rows, tuple(sorted(wants)), starts)

    @classmethod
    def all_of(cls, folder: Path) -> list[Part]:
        """The parts of a model's folder that were planned to the end and can be read, in a fixed order."""
        return [part for record in sorted(folder.glob("part-*/part.json")) if (part := cls._read(record))]

    @classmethod
    def _read(cls, record: Path) -> Part | None:
        """A part as it was planned; None where its record is damaged: planned again, it is written anew."""
        try:
            about, rows = json.loads(record.read_text()), pd.read_parquet(record.with_name("rows.parquet"))
            whole = about["starts"][-1] == len(rows) and about["rows"] == _digest_of(rows)
            return cls(record.parent, rows, tuple(about["wants"]), np.array(about["starts"])) if whole else None
        except (OSError, ValueError, LookupError, TypeError):  # pyarrow's errors are ValueErrors
            return None

    @property
    def stages(self) -> list[str]:
        return sorted({want.partition("/")[0] for want in self.wants})

    @property
    def poolings(self) -> list[str]:
        return sorted({want.partition("/")[2] for want in self.wants})

    def shard(self, i: int) -> Path:
        return self.folder / f"shard-{i:05d}.safetensors"

    def shard_rows(self, i: int) -> pd.DataFrame:
        return self.rows.iloc[self.starts[i] : self.starts[i + 1]].reset_index(drop=True)

    def write(self, i: int, states: dict[str, np.ndarray]) -> Path:
        """Write shard i whole; `states` maps ``"<layer>/<pooling>"`` to float32 of this shard's rows or images."""
        keys = sorted(states)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # numpy and hashlib let go of the interpreter
            arrays = [*pool.map(lambda key: compact(states[key]), keys)]
            hashes = dict(zip(keys, pool.map(digest, arrays), strict=True))
        tensors = dict(zip(keys, arrays, strict=True))
        # one metadata key: safetensors writes several in no fixed order, and equal shards must be equal files
        note = {"probekit": json.dumps(self._note(i) | {"sha256": hashes})}
        path = paths.write_atomic(self.shard(i), lambda part: save_file(tensors, part, metadata=note))
        for left in self.folder.glob(f".{path.name}.*.part"):  # by processes that were killed while they wrote
            left.unlink(missing_ok=True)
        return path

    def _note(self, i: int) -> dict:
        return {"model": self.folder.parent.name, "part": self.folder.name, "first_row": int(self.starts[i])}

    def is_done(self, i: int) -> bool:
        """Is shard i there, complete, and the one that belongs there?"""
        return not self.lacks(i)

    def lacks(self, i: int) -> str:
        """Why shard i cannot be read; "" where it can. Looks at its beginning and its length, not at its numbers."""
        if not self.shard(i).exists():
            return "is missing"
        try:
            with safe_open(self.shard(i), framework="numpy") as shard:
                note = note_of(shard)
        except (OSError, SafetensorError) as error:
            return f"cannot be opened ({error})"
        return "" if note.items() >= self._note(i).items() else "belongs somewhere else"

    def places(self, want: str) -> pd.DataFrame:
        """Where the values of a want are, by key: `shard`, and `row` in its tensors."""
        rows = self.rows if want.startswith("lm/") else self.rows[self.rows.file.ne(self.rows.file.shift())]
        shard = np.searchsorted(self.starts, rows.index, side="right") - 1
        row = pd.Series(shard).groupby(shard).cumcount()
        return pd.DataFrame({"shard": shard, "row": row.to_numpy()}, index=keys_of(rows, want))


def plan(folder: Path, rows: pd.DataFrame, wants: Sequence[str], shard_images: int) -> list[tuple[Part, int]]:
    """The shards, done or not, that hold these rows and wants; what no part has yet is planned as new parts."""
    rows = rows.drop_duplicates()
    parts, keys = Part.all_of(folder), {want: keys_of(rows, want) for want in wants}
    while True:
        held = {want: [*map(_held, parts, repeat(want), repeat(keys))] for want in wants}
        lacks = pd.DataFrame({want: ~np.isin(keys[want], np.concatenate([np.zeros(0, np.uint64), *held[want]]))
                              for want in wants})
        patterns = lacks[lacks.any(axis=1)].value_counts()
        if patterns.empty:
            break
        missing = [want for want, lacking in zip(wants, patterns.index[0], strict=True) if lacking]
        chosen = rows[(lacks == patterns.index[0]).all(axis=1).to_numpy()]
        finest = min(missing, key=lambda want: not want.startswith("lm/"))
        parts.append(Part.plan(folder, chosen[~pd.Series(keys_of(chosen, finest)).duplicated().to_numpy()], missing,
                               shard_images))
    found = set()
    for k, part in enumerate(parts):
        for want in set(part.wants) & set(wants):
            places = part.places(want)
            here = np.isin(places.index, np.intersect1d(keys[want], held[want][k]))
            found |= {(k, int(i)) for i in places.shard[here].unique()}
    return [(parts[k], i) for k, i in sorted(found)]


def _held(part: Part, want: str, keys: dict[str, np.ndarray]) -> np.ndarray:
    """Keys that a part has of a want, or may be asked for: what is done, and shards that hold nothing but this run's.

    What another run planned and never made (it failed, or asked for more) is not taken up.
    """
    if want not in part.wants:
        return np.zeros(0, np.uint64)
    places, own = part.places(want), set(part.wants) <= set(keys)
    usable = [i for i in places.shard.unique() if part.is_done(i) or (own and all(
        np.isin(keys_of(part.shard_rows(i), w), keys[w]).all() for w in part.wants))]
    return places.index[places.shard.isin(usable)].to_numpy()
