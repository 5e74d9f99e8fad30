"""The activations of a run: a view on shards, read one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from probekit import paths
from probekit.extraction.answer_heads import collect_words, load_answer_head
from probekit.extraction.folder import ActivationFolder, open_folder
from probekit.extraction.shards import (
    Content,
    Shard,
    ShardSet,
    TensorKey,
    content_keys,
    model_inputs,
    shard_note,
    tensor_digest,
)
from probekit.models.output_head import AnswerHead
from probekit.models.pooling import TEXT_POOLINGS

RowPlaces = slice | torch.Tensor


@dataclass(frozen=True)
class Activations:
    """Pooled hidden states of a model: ``activations["lm.12", "mean"]`` is (n, d) float32.

    Rows are those of :attr:`examples`, labels and all: whoever has the activations needs nothing
    else.

    Attributes
    ----------
    folder : ActivationFolder
        The model's.
    examples : DataFrame, n rows
        What the model was given (`file`, `prompt`), and the other columns of the caller's table.
    stages, poolings : tuple of str
        What can be read.
    control : str
        ``"none"``, or the control of the inputs that changed what the model was given.
    home : Home
        Where relative files start.
    controls : mapping of str to Activations
        Those of the same examples with changed inputs, by control.
    answer_pooling : str
        The pooling that was added for the model's own answers; ``""`` where none was.

    Raises
    ------
    FileNotFoundError
        Some of them have not been extracted.
    """

    folder: ActivationFolder
    examples: pd.DataFrame
    stages: tuple[str, ...]
    poolings: tuple[str, ...]
    control: str = "none"
    home: paths.Home = field(default_factory=paths.Home.find)
    controls: Mapping[str, Activations] = field(default_factory=dict)
    answer_pooling: str = ""

    def __post_init__(self) -> None:
        for content in self.contents:
            missing = self._places[content].shard.isna().sum()
            if missing:
                raise FileNotFoundError(
                    f"{missing:,} of {len(self.examples):,} examples have no "
                    f"{content.stage}/{content.pooling} in {self.folder.url}: run 02_extract for "
                    "this run, it computes only those"
                )

    def __repr__(self) -> str:
        return (
            f"Activations({self.name}: {len(self.layers)} layers × {', '.join(self.poolings)} × "
            f"{len(self.examples):,} examples)"
        )

    def __len__(self) -> int:
        return len(self.examples)

    @classmethod
    def open(
        cls, record: Mapping, examples: pd.DataFrame, *, home: paths.Home | None = None
    ) -> Activations:
        """Open what a :attr:`record` names.

        Parameters
        ----------
        record : mapping
        examples : DataFrame
            What the model was given; for a control of the inputs the changed table.
        home : Home or None
        """
        home = paths.Home.find(home)
        return cls(
            open_folder(record["folder"], home),
            examples,
            tuple(record["stages"]),
            tuple(record["poolings"]),
            control=record["control"],
            home=home,
            answer_pooling=record["answer_pooling"],
        )

    @property
    def record(self) -> dict:
        """What :meth:`open` needs besides the examples, for a JSON file."""
        return {
            "folder": self.folder.name_from(self.home),
            "stages": self.stages,
            "poolings": self.poolings,
            "control": self.control,
            "answer_pooling": self.answer_pooling,
        }

    @property
    def name(self) -> str:
        """Model, settings and control: what tables made from these activations are filed under."""
        return f"{self.folder.model_name}-{self.folder.settings_name}-{self.control}"

    @property
    def fingerprint(self) -> str:
        """What these activations are: the model, the images as they are on disk, the prompts."""
        return paths.fingerprint(self.record, self._rows.to_csv(index=False))

    @cached_property
    def meta(self) -> dict:
        """What ``meta.json`` says of the model.

        Raises
        ------
        FileNotFoundError
            It is missing, damaged, or of another format.
        """
        meta = self.folder.read_meta()
        if meta is None:
            raise FileNotFoundError(
                f"{self.folder.url}/meta.json is missing, damaged, or of another format: run "
                "02_extract again for this run, it makes no sound shard again"
            )
        return meta

    @cached_property
    def answer_head(self) -> AnswerHead:
        """What the answers to these examples are read with.

        Raises
        ------
        FileNotFoundError
            It was not extracted.
        ValueError
            It is damaged.
        """
        return load_answer_head(self.folder, collect_words([self.examples]))

    # -------------------------------------------------------------------------------- what there is

    @property
    def contents(self) -> list[Content]:
        """Stage and pooling of all that can be read; text is no part of an image."""
        return [
            Content(stage, pooling) for stage in self.stages for pooling in self.poolings_of(stage)
        ]

    def poolings_of(self, stage: str) -> list[str]:
        """Return the poolings of a stage: text is no part of an image, and says no answer."""
        if stage == "lm":
            return list(self.poolings)
        left_out = [self.answer_pooling]
        if Content(stage, "").is_of_image:
            left_out += TEXT_POOLINGS
        return [pooling for pooling in self.poolings if pooling not in left_out]

    @property
    def layers(self) -> list[str]:
        """Names of the layers, stage by stage in the order of the depth."""
        return [layer for stage in self.stages for layer in self.meta["layers"][stage]]

    def layers_with(self, pooling: str) -> list[str]:
        """Return the layers that have a pooling."""
        return [
            layer for layer in self.layers if pooling in self.poolings_of(layer.partition(".")[0])
        ]

    @property
    def tensor_dtypes(self) -> dict[str, int]:
        """How many tensors of these shards are on disk in which type."""
        counts: dict[str, int] = {}
        for shard in self._shards:
            with safe_open(self.folder.local_copy(shard.name), framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118  # it is no dictionary
                    dtype = file.get_slice(key).get_dtype()
                    counts[dtype] = counts.get(dtype, 0) + 1
        return counts

    @property
    def megabytes(self) -> float:
        """Size on disk of the shards that are read."""
        sizes = [self.folder.local_copy(shard.name).stat().st_size for shard in self._shards]
        return round(sum(sizes) / 1e6, 1)

    # -------------------------------------------------------------------------------------- reading

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        """Return one layer with one pooling, (n, d) float32, without reading the others.

        Raises
        ------
        KeyError
            No such layer or pooling; the message says which there are.
        ValueError
            What is on disk is not what was written.
        """
        key = TensorKey(*key)
        self._check_key(key)
        values_nd: torch.Tensor | None = None
        for read in self._reads[key.content]:
            tensor = self._read_tensor(read.shard, key)
            if values_nd is None:
                values_nd = torch.empty(len(self.examples), tensor.shape[1])
            rows = tensor[read.rows]
            values_nd[read.examples] = (
                rows.float() if isinstance(read.examples, torch.Tensor) else rows
            )
        if values_nd is None:
            raise ValueError("there are no examples, so there is nothing to read")
        return values_nd.numpy()

    def _check_key(self, key: TensorKey) -> None:
        if key.layer not in self.layers:
            raise KeyError(
                f"layer {key.layer} is not stored: this run has {', '.join(self.layers)}; take one "
                "of these"
            )
        poolings = self.poolings_of(key.stage)
        if key.pooling not in poolings:
            raise KeyError(
                f"pooling {key.pooling} is not stored: this run has {', '.join(poolings)}; run "
                "02_extract with poolings that include it"
            )

    def _read_tensor(self, shard: Shard, key: TensorKey) -> torch.Tensor:
        path = self.folder.local_copy(shard.name)
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(key.tensor_name)
            digests = shard_note(file).get("digests", {})
        if tensor_digest(tensor.numpy()) != digests.get(key.tensor_name):
            self.folder.forget_copy(shard.name)
            raise ValueError(
                f"{self.folder.url}/{shard.name} is damaged, its {key.tensor_name} is not what was "
                f"written: python -m probekit verify {self.record['folder']} --remove takes away "
                "what is damaged, then 02_extract makes just that again"
            )
        return tensor

    @cached_property
    def _rows(self) -> pd.DataFrame:
        return model_inputs(self.examples, self.home)

    @cached_property
    def _shard_sets(self) -> list[ShardSet]:
        return ShardSet.list_all(self.folder)

    @property
    def _shards(self) -> list[Shard]:
        places = pd.concat(self._places.values())
        pairs = places[["shard_set", "shard"]].drop_duplicates()
        return [Shard(self._shard_sets[int(k)], int(i)) for k, i in pairs.itertuples(index=False)]

    @cached_property
    def _done(self) -> list[list[int]]:
        """Numbers of the shards that are done, of each set."""
        return [
            [i for i in range(shard_set.shard_count) if shard_set.is_done(i)]
            for shard_set in self._shard_sets
        ]

    @cached_property
    def _places(self) -> dict[Content, pd.DataFrame]:
        return {content: self._find_places(content) for content in self.contents}

    def _find_places(self, content: Content) -> pd.DataFrame:
        """Tell `shard_set`, `shard` and `row` of each example (n rows); NaN where not done."""
        tables = [pd.DataFrame(columns=["shard", "row", "shard_set"])]
        for k, shard_set in enumerate(self._shard_sets):
            if content in shard_set.contents:
                places = shard_set.locate(content)
                tables.append(places[places.shard.isin(self._done[k])].assign(shard_set=k))
        stored = pd.concat(tables[1:] or tables)
        stored = stored[~stored.index.duplicated()]
        return stored.reindex(content_keys(self._rows, content)).reset_index(drop=True)

    @cached_property
    def _reads(self) -> dict[Content, list[_Read]]:
        reads = {}
        for content, places in self._places.items():
            reads[content] = [
                _plan_read(Shard(self._shard_sets[int(k)], int(i)), places_of_shard)
                for (k, i), places_of_shard in places.groupby(["shard_set", "shard"])
            ]
        return reads


class _Read(NamedTuple):
    """Which rows of a shard's tensors go to which examples."""

    shard: Shard
    rows: RowPlaces
    examples: RowPlaces


def _plan_read(shard: Shard, places: pd.DataFrame) -> _Read:
    """Neighbours are read as slices, which need no copy."""
    examples = places.index.to_numpy()
    rows = places.row.to_numpy(np.int64)
    if (np.diff(examples) == 1).all() and (np.diff(rows) == 1).all():
        return _Read(
            shard,
            slice(int(rows[0]), int(rows[-1]) + 1),
            slice(int(examples[0]), int(examples[-1]) + 1),
        )
    return _Read(shard, torch.tensor(rows), torch.tensor(examples))
