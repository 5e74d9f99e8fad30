"""Activations on disk: rows that were extracted together, in shards.

::

    <root>/<model>/<fingerprint of what decides the hidden states>/
        meta.json                      which model, with what, which way it was run
        shards-<fingerprint>/          rows that were extracted together
            rows.parquet               file, size in bytes, prompt; rows of one image side by side
            plan.json                  contents (stage and pooling), first row of each shard
            shard-00000.safetensors    one tensor per layer and pooling, "<layer>/<pooling>":
                                       (rows of the shard, d) for the decoder, (images, d) for the
                                       image encoder; float16 where that is precise enough, else
                                       float32; in the header, which shard of which model it is and
                                       a hash per tensor

What a row holds depends on its image and prompt alone, so runs share shards: a new run computes
what no shard has yet.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from probekit import paths
from probekit.extraction.folder import ActivationFolder

STAGES = ("lm", "experts", "vision", "projector")
# Those whose values depend on the prompt: one row per prompt, not per image.
OF_PROMPTS = ("lm", "experts")
FLOAT16_MAX = np.finfo(np.float16).max


class Content(NamedTuple):
    """What a set of shards holds of a stage: one pooling of all of its layers."""

    stage: str
    pooling: str

    @property
    def is_of_image(self) -> bool:
        """Whether its values depend on the image alone, not on the prompt."""
        return self.stage not in OF_PROMPTS


class TensorKey(NamedTuple):
    """A tensor of a shard: one layer with one pooling."""

    layer: str
    pooling: str

    @property
    def stage(self) -> str:
        """One of :data:`STAGES`."""
        return self.layer.partition(".")[0]

    @property
    def content(self) -> Content:
        """The content that it is a part of."""
        return Content(self.stage, self.pooling)

    @property
    def tensor_name(self) -> str:
        """Its name in a safetensors file."""
        return f"{self.layer}/{self.pooling}"

    @classmethod
    def of(cls, tensor_name: str) -> TensorKey:
        """Read the name of a tensor in a safetensors file."""
        layer, _, pooling = tensor_name.rpartition("/")
        return cls(layer, pooling)


# --------------------------------------------------------------------------------------------- rows


def model_inputs(examples: pd.DataFrame, home: paths.Home) -> pd.DataFrame:
    """Return what a model is given for each example.

    Parameters
    ----------
    examples : DataFrame
        With the columns `file` (``""`` for a prompt without an image) and `prompt`.
    home : Home
        Where relative files start.

    Returns
    -------
    DataFrame
        `file`, `size` (of the file in bytes, 0 without an image), `prompt`; rows as in `examples`.

    Raises
    ------
    FileNotFoundError
        An image is gone.
    """
    sizes = {}
    for file in examples.file.unique():
        try:
            # Not home.resolve, which looks at each folder of the path.
            path = os.path.join(home.root, os.path.expanduser(file))
            sizes[file] = os.stat(path).st_size if file else 0
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{home.resolve(file)} is gone: run 01_build_data again"
            ) from None
    columns = {
        "file": examples.file,
        "size": examples.file.map(sizes),
        "prompt": examples.prompt,
    }
    return pd.DataFrame(columns).reset_index(drop=True)


def unit_numbers(rows: pd.DataFrame) -> np.ndarray:
    """Give one number to what is run together, (n,): an image, or a prompt without one."""
    without_image = "\n" + rows.prompt
    return pd.factorize(rows.file.where(rows.file != "", without_image))[0]


def count_units(rows: pd.DataFrame) -> int:
    """Count the images of rows, each prompt without an image for one."""
    return int(unit_numbers(rows).max()) + 1 if len(rows) else 0


def content_keys(rows: pd.DataFrame, content: Content) -> np.ndarray:
    """Return numbers (n,) of what a content depends on: image and prompt, or image alone."""
    columns = ["file", "size"] if content.is_of_image else ["file", "size", "prompt"]
    return pd.util.hash_pandas_object(rows[columns], index=False).to_numpy()


def rows_of(rows: pd.DataFrame, content: Content) -> pd.DataFrame:
    """Select the rows that a content has values for: all, or the first of each image."""
    return rows[rows.file.ne(rows.file.shift())] if content.is_of_image else rows


def _rows_digest(rows: pd.DataFrame) -> str:
    hashes = pd.util.hash_pandas_object(rows[["file", "size", "prompt"]], index=False).to_numpy()
    return xxhash.xxh3_64_hexdigest(hashes.tobytes())


# ------------------------------------------------------------------------------------------ tensors


def compact(values: np.ndarray) -> np.ndarray:
    """Return float16 where it keeps what a probe can tell apart, float32 otherwise.

    That is where no value overflows, and where rounding stays below 1/32 of its column's standard
    deviation; a column that hardly varies is measured by 1/100 of the median one. Fewer than 8 rows
    do not tell what varies.

    Parameters
    ----------
    values : ndarray of float32, (n, d)
    """
    if len(values) >= 8 and np.abs(values).max() <= FLOAT16_MAX:
        half = values.astype(np.float16)
        spread_d = values.std(0)
        tolerated_d = np.maximum(spread_d, np.median(spread_d) / 100)
        rounding_d = np.abs(half - values).max(0)
        if (rounding_d * 32 <= tolerated_d).all():
            return np.ascontiguousarray(half)
    return np.ascontiguousarray(values, dtype=np.float32)


def tensor_digest(values: np.ndarray) -> str:
    """Return 32 hexadecimal digits that name an array's numbers (XXH3, little-endian)."""
    values = np.ascontiguousarray(values)
    little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return xxhash.xxh3_128_hexdigest(little_endian.data.cast("B"))


def shard_note(shard: safe_open) -> dict:
    """Return what a header says: `model`, `settings`, `shard_set`, `first_row`, `digests`."""
    try:
        note = json.loads((shard.metadata() or {}).get("probekit", "{}"))
    except ValueError:  # a damaged header
        return {}
    return note if isinstance(note, dict) else {}


# --------------------------------------------------------------------------------------- shard sets


@dataclass(frozen=True)
class ShardSet:
    """Rows that were extracted together, or are to be.

    Attributes
    ----------
    folder : ActivationFolder
        The model's.
    name : str
        Of its folder in there.
    rows : DataFrame
        `file`, `size`, `prompt`.
    contents : tuple of Content
        What its shards hold.
    starts : ndarray of int, (shards + 1,)
        First row of each shard, and n at the end.
    """

    folder: ActivationFolder
    name: str
    rows: pd.DataFrame
    contents: tuple[Content, ...]
    starts: np.ndarray

    @classmethod
    def create(
        cls,
        folder: ActivationFolder,
        rows: pd.DataFrame,
        *,
        contents: Sequence[Content],
        shard_images: int,
    ) -> ShardSet:
        """Write down what is to be extracted, so that it can be resumed.

        Parameters
        ----------
        folder : ActivationFolder
        rows : DataFrame
            As :func:`model_inputs` returns them.
        contents : sequence of Content
        shard_images : int
            Images per shard.
        """
        units = unit_numbers(rows)
        order = np.argsort(units, kind="stable")
        rows = rows.iloc[order].reset_index(drop=True)
        shard_of_row = units[order] // shard_images
        starts = np.append(np.flatnonzero(np.diff(shard_of_row, prepend=-1)), len(rows))
        contents = tuple(sorted(contents))
        name = f"shards-{paths.fingerprint(rows.to_csv(index=False), contents, shard_images)}"
        folder.write(f"{name}/rows.parquet", rows.to_parquet)
        plan = {"contents": contents, "starts": starts.tolist(), "rows": _rows_digest(rows)}
        text = json.dumps(plan) + "\n"
        folder.write(f"{name}/plan.json", lambda file: file.write_text(text, encoding="utf-8"))
        return cls(folder, name, rows, contents, starts)

    @classmethod
    def list_all(cls, folder: ActivationFolder) -> list[ShardSet]:
        """Read the sets of a folder that were planned to the end, in a fixed order."""
        names = sorted(
            file.partition("/")[0]
            for file in folder.list_files()
            if file.startswith("shards-") and file.endswith("/plan.json")
        )
        shard_sets = [cls._read(folder, name) for name in names]
        return [shard_set for shard_set in shard_sets if shard_set is not None]

    @classmethod
    def _read(cls, folder: ActivationFolder, name: str) -> ShardSet | None:
        """Read a set as it was planned; None where its record is damaged."""
        try:
            plan = json.loads(folder.read_bytes(f"{name}/plan.json"))
            rows = pd.read_parquet(io.BytesIO(folder.read_bytes(f"{name}/rows.parquet")))
            if plan["starts"][-1] != len(rows) or plan["rows"] != _rows_digest(rows):
                return None
            contents = tuple(Content(*content) for content in plan["contents"])
            return cls(folder, name, rows, contents, np.array(plan["starts"]))
        except (OSError, ValueError, LookupError, TypeError):  # pyarrow's errors are ValueErrors
            return None

    @property
    def stages(self) -> list[str]:
        """The stages that it holds something of."""
        return sorted({content.stage for content in self.contents})

    @property
    def poolings(self) -> list[str]:
        """The poolings that it holds something of."""
        return sorted({content.pooling for content in self.contents})

    @property
    def shard_count(self) -> int:
        """The number of its shards."""
        return len(self.starts) - 1

    def shard_name(self, i: int) -> str:
        """Return the name of shard i, from the model's folder."""
        return f"{self.name}/shard-{i:05d}.safetensors"

    def shard_rows(self, i: int) -> pd.DataFrame:
        """Return the rows of shard i."""
        return self.rows.iloc[self.starts[i] : self.starts[i + 1]].reset_index(drop=True)

    def write_shard(self, i: int, states: Mapping[TensorKey, np.ndarray]) -> None:
        """Write shard i whole.

        Parameters
        ----------
        i : int
        states : mapping of TensorKey to ndarray of float32
            (rows of the shard, d) for the decoder, (images, d) for the image encoder.
        """
        keys = sorted(states)
        threads = min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:  # numpy and xxhash let go of the interpreter
            arrays = list(pool.map(lambda key: compact(states[key]), keys))
            digests = list(pool.map(tensor_digest, arrays))
        tensors = {}
        digest_of = {}
        for key, array, digest in zip(keys, arrays, digests, strict=True):
            tensors[key.tensor_name] = array
            digest_of[key.tensor_name] = digest
        # One key: safetensors writes several in no fixed order, and equal shards must be equal
        # files.
        metadata = {"probekit": json.dumps(self._note(i) | {"digests": digest_of})}
        name = self.shard_name(i)
        self.folder.write(name, lambda file: save_file(tensors, file, metadata=metadata))

    def _note(self, i: int) -> dict:
        return {
            "model": self.folder.model_name,
            "settings": self.folder.settings_name,
            "shard_set": self.name,
            "first_row": int(self.starts[i]),
        }

    def is_done(self, i: int) -> bool:
        """Tell whether shard i is there, complete, and the one that belongs there."""
        return not self.find_fault(i)

    def find_fault(self, i: int) -> str:
        """Say why shard i cannot be read; ``""`` where it can.

        On this machine its header and length are looked at, not its numbers; behind a URL, where
        files appear whole, only whether it is there.
        """
        name = self.shard_name(i)
        if not self.folder.exists(name):
            return "is missing"
        if not self.folder.is_local:
            return ""
        return self.find_header_fault(i)

    def find_header_fault(self, i: int) -> str:
        """Say what is wrong with the header of a shard that is there; ``""`` where nothing is."""
        try:
            with safe_open(self.folder.local_copy(self.shard_name(i)), framework="numpy") as shard:
                note = shard_note(shard)
        except (OSError, SafetensorError) as error:
            return f"cannot be opened ({error})"
        return "" if note.items() >= self._note(i).items() else "belongs somewhere else"

    def locate(self, content: Content) -> pd.DataFrame:
        """Say where the values of a content are.

        Returns
        -------
        DataFrame
            `shard`, and `row` in its tensors; indexed by :func:`content_keys`.
        """
        return self._places_of_images if content.is_of_image else self._places_of_prompts

    @cached_property
    def _places_of_images(self) -> pd.DataFrame:
        return self._find_places(Content("vision", ""))

    @cached_property
    def _places_of_prompts(self) -> pd.DataFrame:
        return self._find_places(Content("lm", ""))

    def _find_places(self, content: Content) -> pd.DataFrame:
        rows = rows_of(self.rows, content)
        shard = np.searchsorted(self.starts, rows.index, side="right") - 1
        row = pd.Series(shard).groupby(shard).cumcount()
        places = {"shard": shard, "row": row.to_numpy()}
        return pd.DataFrame(places, index=content_keys(rows, content))


class Shard(NamedTuple):
    """One shard of a set, done or not."""

    shard_set: ShardSet
    number: int

    @property
    def name(self) -> str:
        """Its file's name, from the model's folder."""
        return self.shard_set.shard_name(self.number)

    @property
    def rows(self) -> pd.DataFrame:
        """What the model is given for it."""
        return self.shard_set.shard_rows(self.number)

    @property
    def is_done(self) -> bool:
        """Whether it is there, complete, and the one that belongs there."""
        return self.shard_set.is_done(self.number)


# ----------------------------------------------------------------------------------------- planning


def plan_shards(
    folder: ActivationFolder,
    rows: pd.DataFrame,
    *,
    contents: Sequence[Content],
    shard_images: int,
) -> list[Shard]:
    """Return the shards, done or not, that hold these rows and contents.

    What no set has yet is planned as new sets.

    Parameters
    ----------
    folder : ActivationFolder
    rows : DataFrame
        As :func:`model_inputs` returns them; rows that repeat count once.
    contents : sequence of Content
    shard_images : int
        Images per new shard.
    """
    rows = rows.drop_duplicates()
    wanted_keys = {content: content_keys(rows, content) for content in contents}
    shard_sets = ShardSet.list_all(folder)
    while True:
        lacks_per_content = [
            ~np.isin(keys, _usable_keys(shard_sets, content, wanted_keys))
            for content, keys in wanted_keys.items()
        ]
        lacking = pd.DataFrame(dict(enumerate(lacks_per_content)))
        patterns = lacking[lacking.any(axis=1)].value_counts()
        if patterns.empty:
            break
        pattern = patterns.index[0]
        missing = [content for content, lacks in zip(wanted_keys, pattern, strict=True) if lacks]
        selected = rows[(lacking == pattern).all(axis=1).to_numpy()]
        finest = min(missing, key=lambda content: content.is_of_image)
        repeats = pd.Series(content_keys(selected, finest)).duplicated().to_numpy()
        shard_sets.append(
            ShardSet.create(folder, selected[~repeats], contents=missing, shard_images=shard_images)
        )
    return _shards_that_hold(shard_sets, wanted_keys)


def _shards_that_hold(
    shard_sets: Sequence[ShardSet], wanted_keys: Mapping[Content, np.ndarray]
) -> list[Shard]:
    shards = []
    for shard_set in shard_sets:
        numbers: set[int] = set()
        for content in set(shard_set.contents) & set(wanted_keys):
            usable = _usable_keys([shard_set], content, wanted_keys)
            places = shard_set.locate(content)
            holds = np.isin(places.index, np.intersect1d(wanted_keys[content], usable))
            numbers |= set(places.shard[holds].astype(int))
        shards += [Shard(shard_set, number) for number in sorted(numbers)]
    return shards


def _usable_keys(
    shard_sets: Sequence[ShardSet], content: Content, wanted_keys: Mapping[Content, np.ndarray]
) -> np.ndarray:
    """Collect the keys of a content that are done, or in shards of nothing but this run's.

    What another run planned and never made (it failed, or asked for more) is not taken up.
    """
    usable_keys = [np.zeros(0, np.uint64)]
    for shard_set in shard_sets:
        if content not in shard_set.contents:
            continue
        places = shard_set.locate(content)
        usable = [
            number
            for number in places.shard.unique()
            if shard_set.is_done(number) or _is_all_wanted(shard_set, number, wanted_keys)
        ]
        usable_keys.append(places.index[places.shard.isin(usable)].to_numpy())
    return np.concatenate(usable_keys)


def _is_all_wanted(
    shard_set: ShardSet, number: int, wanted_keys: Mapping[Content, np.ndarray]
) -> bool:
    if not set(shard_set.contents) <= set(wanted_keys):
        return False
    rows = shard_set.shard_rows(number)
    return all(
        np.isin(content_keys(rows, content), wanted_keys[content]).all()
        for content in shard_set.contents
    )
