"""Settings of an extraction, and the folder that they name."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

from probekit import parameters, paths
from probekit.extraction.shards import OF_PROMPTS, STAGES, Content
from probekit.models.adapters import find_adapter
from probekit.models.checkpoints import resolve_commit
from probekit.models.load import IMAGE_ADAPTERS, best_dtype, read_dtype
from probekit.models.pooling import TEXT_POOLINGS, check_pooling
from probekit.models.presets import locate, short_name

SHARING_WAYS = {
    "auto": ("shared", "encoded", "plain"),
    "on": ("shared",),
    "off": ("plain",),
}  # for each setting of `sharing` what is tried, the cheapest first

PROMPT_VERSION = 2  # of how prompts are wrapped where a checkpoint has no chat template

SMALLEST_BATCH_TOKENS = 2048  # what a CPU gets: small batches stay in its cache
USUAL_BATCH_TOKENS = 8192
LARGEST_BATCH_TOKENS = 16_384
BYTES_PER_TOKEN = 1e6  # of a GPU's memory, most of which is for weights


@dataclass(frozen=True)
class ExtractionSettings:
    """Settings of one extraction.

    Attributes
    ----------
    model : str
        Hub id, ``id@revision``, checkpoint folder, the name of a preset, or an adapter
        (``my_vlm.py:MyVlm``).
    revision, dtype, untrained, seed, trust_remote_code
        As for :func:`probekit.models.load.load_vlm`.
    longest_side : int or None
        Pixels that bound an image before the processor sees it; None leaves it to the checkpoint.
    sharing : {"auto", "on", "off"}
        Run each image once for all its prompts: as far as a check finds it exact, always (an error
        where it is not exact), never.
    poolings : tuple of str
        See :mod:`probekit.models.pooling`.
    stages : tuple of str
        ``"lm"``, and where wanted ``"experts"`` (in mixtures of experts, which of them a token is
        routed to), ``"vision"`` and ``"projector"``, whose states are pooled over the image's
        patches.
    shard_images : int or None
        Images per shard, the unit of work, of writing and of resuming. None takes 500 with a GPU,
        where small last batches of a shard cost more, and 200 without.
    batch_tokens : int or None
        Tokens that a batch of whole images with their prompts is filled up to. None takes 2,048 to
        16,384 with a GPU, by its memory, and 2,048 without, where small batches stay in the
        cache.
    workers : int or None
        Processes that decode and preprocess images ahead of the model; 0 does it in between. None
        takes 8 with a GPU (fewer with fewer cores), and 0 without, where they would take the
        model's cores.
    answers : bool
        Also keep what the model's own answers are read with, for tables that have a column
        `answers`: the pooling ``last`` of the decoder, and the answers' rows of the output
        embedding.
    """

    model: str
    _: KW_ONLY
    revision: str | None = None
    dtype: str | None = None
    untrained: bool = False
    seed: int = 0
    longest_side: int | None = None
    sharing: str = "auto"
    poolings: tuple[str, ...] = ("mean",)
    stages: tuple[str, ...] = ("lm",)
    shard_images: int | None = None
    batch_tokens: int | None = None
    workers: int | None = None
    trust_remote_code: bool = False
    answers: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", read_dtype(self.dtype))

    @property
    def contents(self) -> list[Content]:
        """What is to be stored of each stage; text is no part of an image."""
        contents = [Content(stage, pooling) for stage in self.stages for pooling in self.poolings]
        return [one for one in contents if not one.is_of_image or one.pooling not in TEXT_POOLINGS]

    @property
    def token_budget(self) -> int:
        """`batch_tokens`, once it is filled in."""
        return _filled_in(self.batch_tokens)

    @property
    def images_per_shard(self) -> int:
        """`shard_images`, once it is filled in."""
        return _filled_in(self.shard_images)

    def check(self) -> None:
        """Refuse settings that make no sense.

        Raises
        ------
        ValueError
            The message names the setting and what can be chosen.
        """
        parameters.read_settings(
            type(self), {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        )
        if not self.poolings:
            raise ValueError("poolings=(): name at least one, such as mean")
        for pooling in self.poolings:
            check_pooling(pooling)
        if self.sharing not in SHARING_WAYS:
            raise ValueError(f"sharing={self.sharing!r}: take out of {', '.join(SHARING_WAYS)}")
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise ValueError(
                f"stages={unknown or list(self.stages)}: take out of {', '.join(STAGES)}"
            )

    def fill_in(self, device: str, home: paths.Home) -> ExtractionSettings:
        """Return the settings with defaults that suit the device, and the commit on the hub.

        Raises
        ------
        ValueError
            The device is a GPU that this machine does not have, and no dtype is named.
        """
        is_absent_gpu = device.startswith("cuda") and not torch.cuda.is_available()
        if is_absent_gpu and not self.dtype:
            raise ValueError(
                "this machine has no GPU that says which dtype suits it: name one, such as "
                "dtype=bfloat16"
            )
        is_cpu = torch.device(device).type == "cpu"
        default_workers = 0 if is_cpu else min(8, (os.cpu_count() or 2) - 1)
        commit = resolve_commit(
            self.model, self.revision, trust_remote_code=self.trust_remote_code, home=home
        )
        return replace(
            self,
            dtype=self.dtype or best_dtype(device),
            revision=commit,
            shard_images=self.shard_images or (200 if is_cpu else 500),
            batch_tokens=self.batch_tokens or suitable_batch_tokens(device),
            workers=default_workers if self.workers is None else self.workers,
        )

    def without_image(self) -> ExtractionSettings:
        """Return the settings for prompts without an image: poolings of the decoder's text.

        Raises
        ------
        ValueError
            Nothing is left.
        """
        poolings = tuple(
            pooling
            for pooling in self.poolings
            if pooling != "image_mean" and not pooling.startswith("token:")
        )
        if "lm" not in self.stages or not poolings:
            raise ValueError(
                "prompts without an image need the stage lm, and a pooling besides image_mean and "
                "token:<i>"
            )
        stages = tuple(stage for stage in self.stages if stage in OF_PROMPTS)
        return replace(self, stages=stages, poolings=poolings)

    @property
    def naming(self) -> dict[str, Any]:
        """Those settings that decide the hidden states, and so name the folder."""
        names = ("model", "revision", "dtype", "untrained", "seed", "longest_side")
        naming = {name: getattr(self, name) for name in (*names, "trust_remote_code")}
        return naming | {"plain_passes": self.sharing == "off"}

    @property
    def of_job(self) -> dict[str, Any]:
        """Those settings that may differ between the jobs of one folder."""
        return {name: value for name, value in asdict(self).items() if name not in self.naming}

    def folder_name(self, home: paths.Home) -> str:
        """Return ``<model>/<fingerprint>``, the folder of a checkpoint run with these settings.

        Images, prompts, poolings and stages do not matter, nor does a patch release of
        transformers. The settings must be filled in.
        """
        adapter = find_adapter(self.model, home)
        source = Path("" if adapter else locate(self.model, home=home))
        weights = []
        if adapter is not None:
            weights = [
                (file.name, file.stat().st_size, _sampled_hash(file))
                for file in adapter.weight_files()
            ]
        if source.is_absolute():  # a hub id has its commit instead
            folders = (source, *[source / adapter for adapter in IMAGE_ADAPTERS.values()])
            files = sorted(file for one in folders for file in one.glob("*") if file.is_file())
            weights = [
                (str(file.relative_to(source)), file.stat().st_size, _sampled_hash(file))
                for file in files
            ]
        release = ".".join(version("transformers").split(".")[:2])
        deciding = self.naming | {"transformers": release, "prompts": PROMPT_VERSION}
        suffix = "-untrained" if self.untrained else ""
        return f"{short_name(self.model, home=home)}{suffix}/{paths.fingerprint(deciding, weights)}"


def _filled_in(value: int | None) -> int:
    if value is None:
        raise ValueError("these settings are not filled in yet: see ExtractionSettings.fill_in")
    return value


def suitable_batch_tokens(device: str) -> int:
    """Return how many tokens a batch has by default.

    A GPU's whole memory decides, not what is free of it: that changes, and the last digits of
    states would change with it.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return SMALLEST_BATCH_TOKENS
    if kind != "cuda" or not torch.cuda.is_available():
        return USUAL_BATCH_TOKENS
    _, total_bytes = torch.cuda.mem_get_info(device)
    tokens = SMALLEST_BATCH_TOKENS
    while tokens < LARGEST_BATCH_TOKENS and 2 * tokens * BYTES_PER_TOKEN <= total_bytes:
        tokens *= 2
    return tokens


def _sampled_hash(file: Path, *, pieces: int = 128, piece_bytes: int = 1 << 15) -> str:
    """Hash 4 MiB spread over a file: it tells checkpoints apart without reading gigabytes."""
    size = file.stat().st_size
    digest = xxhash.xxh3_128()
    last_start = max(0, size - piece_bytes)
    starts = sorted({round(k * last_start / (pieces - 1)) for k in range(pieces)})
    with file.open("rb") as handle:
        for start in starts:
            handle.seek(start)
            digest.update(handle.read(piece_bytes))
    return digest.hexdigest()
