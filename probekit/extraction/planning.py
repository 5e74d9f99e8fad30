"""What an extraction takes, before it runs: examples, tokens, operations, bytes, memory, hours.

The prompts of a sample are prepared; the rest is arithmetic:

decoder
    2 × (parameters of its blocks that a token meets) × tokens + 4 × layers × heads × head size ×
    (pairs of tokens that attention compares: new ones with all)
encoder
    counted on weights without values where its shapes do not depend on values, else the same
    formula with patches for tokens
bytes
    2 per number (float16), of every layer and pooling, per example (decoder) or image (encoder)
memory
    the weights, and for each token of a batch its keys and values and the largest of what a block
    holds
time
    that of the sample on this device, run in two parts to separate the time to begin from the time
    per image; or operations / (operations per second that are named)
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from probekit import paths
from probekit.extraction.folder import ActivationFolder, open_folder
from probekit.extraction.jobs import Job, adapt_settings, wanted_contents
from probekit.extraction.loading import WorkItem, prepare_images, workers_for
from probekit.extraction.runner import Runner
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.shards import (
    OF_PROMPTS,
    Content,
    Shard,
    count_units,
    model_inputs,
    plan_shards,
    unit_numbers,
)
from probekit.models.batches import input_shape
from probekit.models.load import Vlm, best_device, load_skeleton, stage_width
from probekit.models.presets import PRESETS, read_checked_architectures
from probekit.models.processor import PreparedImage

BYTES_PER_NUMBER = {"float32": 4, "bfloat16": 2, "float16": 2}
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ACTIVE_EXPERT_COUNTS = ("num_experts_per_tok", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that operations and memory follow from.

    Attributes
    ----------
    parameters : int
        Of the model without its head.
    active_parameters : int
        Of the decoder's blocks that a token meets (of experts, those that it is sent to).
    operations_per_pair : int
        For each pair of tokens that attention compares, over all layers.
    bytes_per_token : int
        In a batch, for two bytes per number: keys and values of all layers, and the widest of a
        block.
    """

    parameters: int
    active_parameters: int
    operations_per_pair: int
    bytes_per_token: int

    @classmethod
    def of(cls, vlm: Vlm) -> ModelSize:
        """Read them off a config and the shapes of the weights; of an adapter, off its width."""
        text: Any
        if not vlm.is_native:
            text = SimpleNamespace(num_attention_heads=1, hidden_size=vlm.width)
        else:
            text = vlm.config.get_text_config(decoder=True)
        layers = len(vlm.blocks)
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        cached = 2 * layers * key_heads * head_size
        intermediate = getattr(text, "intermediate_size", 0) or 0
        widest = 3 * max(intermediate, 4 * text.hidden_size) + 6 * text.hidden_size
        return cls(
            parameters=sum(parameter.numel() for parameter in vlm.model.parameters()),
            active_parameters=_count_active_parameters(vlm, text),
            operations_per_pair=4 * layers * heads * head_size,
            bytes_per_token=2 * (cached + widest),
        )

    def decoder_operations(self, tokens: int, *, cached_tokens: int = 0) -> int:
        """Return the operations of new tokens that come after cached ones."""
        pairs = tokens * (tokens + cached_tokens)
        return 2 * self.active_parameters * tokens + self.operations_per_pair * pairs


def _count_active_parameters(vlm: Vlm, text_config) -> int:
    matrices = [
        (name, parameter.numel())
        for name, parameter in vlm.blocks.named_parameters()
        if parameter.ndim > 1
    ]
    total = sum(count for _, count in matrices)
    of_experts = sum(count for name, count in matrices if ".experts." in name)
    experts = _first_integer(text_config, EXPERT_COUNTS) or 1
    active_experts = _first_integer(text_config, ACTIVE_EXPERT_COUNTS) or experts
    return total - of_experts + of_experts * active_experts // experts


def _first_integer(config, names: Sequence[str]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value:
            return value
    return None


# ------------------------------------------------------------------------------------------ encoder


def count_encoder_operations(vlm: Vlm, prepared: PreparedImage) -> int | None:
    """Count the operations of the image encoder for one image; None where that takes running it."""
    inputs = {}
    for key, value in prepared.image_inputs.items():
        is_float = value.is_floating_point()
        inputs[key] = value.to("meta", torch.bfloat16) if is_float else value
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vlm.model.get_image_features(**inputs)
        return counter.get_total_flops()
    except Exception:  # whatever an encoder makes of weights without values
        return _count_by_patches(vlm, prepared)


def _count_by_patches(vlm: Vlm, prepared: PreparedImage) -> int | None:
    config = getattr(vlm.config, "vision_config", None)
    patch_size = getattr(config, "patch_size", None)
    pixels = prepared.image_inputs.get("pixel_values")
    if vlm.vision is None or not isinstance(patch_size, int) or pixels is None:
        return None
    frames = getattr(config, "temporal_patch_size", 1)
    patches = pixels.numel() // (3 * patch_size**2 * frames)
    image_tokens = int(prepared.image_masks[0].sum())
    module, blocks = vlm.vision
    width = next(
        parameter.shape[-1] for name, parameter in blocks[0].named_parameters() if "norm" in name
    )
    block_parameters = set(blocks.parameters())
    operations = 4 * len(blocks) * width * patches**2
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            continue
        if parameter in block_parameters or "patch_embed" in name:
            operations += 2 * parameter.numel() * patches
        elif "embed" not in name:  # what makes image tokens of patches
            operations += 2 * parameter.numel() * image_tokens
    return operations


# ---------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Estimate:
    """What extracting some images with one model takes.

    Attributes
    ----------
    model : str
    images, examples : int
    tokens, plain_tokens : int
        Each image once for all its prompts, and with every prompt.
    operations, plain_operations : float
        Likewise; NaN where the encoder's is not known without running it.
    disk_gb, weights_gb, batch_gb : float
        Gigabytes of activations, of weights in memory, of a batch in memory.
    shards : int
    way : str
        How the hours are counted, out of :data:`probekit.models.forward.WAYS`.
    hours : float
        Without `start_s`.
    start_s : float
        Seconds to load the model and to begin; 0 where nothing was run.
    """

    model: str
    images: int
    examples: int
    tokens: int
    plain_tokens: int
    operations: float
    plain_operations: float
    disk_gb: float
    weights_gb: float
    batch_gb: float
    shards: int
    way: str
    hours: float
    start_s: float


def estimate_extraction(
    settings: ExtractionSettings,
    tables: Mapping[str, pd.DataFrame],
    *,
    images: int,
    sampled_images: int,
    operations_per_second: float | None = None,
    device: str | None = None,
    home: paths.Home | None = None,
) -> Estimate:
    """Estimate what extracting `images` images takes, from tables about a sample of them.

    Parameters
    ----------
    settings : ExtractionSettings
    tables : mapping of str to DataFrame
        As for :func:`probekit.extraction.extracting.extract_tables`.
    images : int
        How many there are in all.
    sampled_images : int
        How many the tables were built from; some may have been left out of them.
    operations_per_second : float or None
        That the device keeps up; None loads the model and measures on the sample.
    device : str or None
    home : Home or None
    """
    settings.check()
    home = paths.Home.find(home)
    device = device or best_device()
    settings = settings.fill_in(device, home)
    skeleton = load_skeleton(
        settings.model,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        with_processor=True,
        home=home,
    )
    vlm = skeleton.vlm
    inputs = [model_inputs(table, home) for table in tables.values()]
    rows = pd.concat(inputs).drop_duplicates().reset_index(drop=True)
    contents = {one for table in tables.values() for one in wanted_contents(settings, table)}
    size = ModelSize.of(vlm)
    if not set(OF_PROMPTS) & set(settings.stages):
        size = replace(size, active_parameters=0, operations_per_pair=0)
    items = list(
        prepare_images(vlm.prompt_processor, [rows], longest_side=settings.longest_side, home=home)
    )
    ratio = images / sampled_images
    tokens = {way: ratio * sum(item.count_tokens(way) for item in items) for way in WAYS_COUNTED}
    operations = _count_operations(vlm, size, items)
    if operations_per_second:
        way = _expected_way(settings, vlm)
        seconds = ratio * operations[way] / operations_per_second
        start_s = 0.0
    else:
        way, start_s, per_image_s = measure_sample(settings, rows, device=device, home=home)
        seconds = ratio * count_units(rows) * per_image_s
    number_bytes = BYTES_PER_NUMBER[settings.dtype or "float32"]
    return Estimate(
        model=f"{vlm.name} (untrained)" if settings.untrained else vlm.name,
        images=images,
        examples=round(len(rows) * ratio),
        tokens=round(tokens["shared"]),
        plain_tokens=round(tokens["plain"]),
        operations=ratio * operations["shared"],
        plain_operations=ratio * operations["plain"],
        disk_gb=ratio * _count_disk_bytes(contents, vlm, rows) / 1e9,
        weights_gb=size.parameters * number_bytes / 1e9,
        batch_gb=settings.token_budget * size.bytes_per_token * number_bytes / 2 / 1e9,
        shards=int(np.ceil(ratio * count_units(rows) / settings.images_per_shard)),
        way=way,
        hours=seconds / 3600,
        start_s=start_s,
    )


WAYS_COUNTED = ("shared", "plain")


def _count_operations(vlm: Vlm, size: ModelSize, items: Sequence[WorkItem]) -> dict[str, float]:
    """Operations of the sample, going each way."""
    encoder_operations: dict[tuple, float] = {}
    for item in items:
        shape = input_shape(item.prepared)
        if shape not in encoder_operations:
            encoder_operations[shape] = _encoder_operations_or_nan(vlm, item.prepared)
    totals = dict.fromkeys(WAYS_COUNTED, 0.0)
    for item in items:
        per_image = encoder_operations[input_shape(item.prepared)]
        lengths = [len(row["input_ids"]) for row in item.prepared.tokens]
        prefix = item.prepared.prefix_length
        decoder_plain = sum(size.decoder_operations(length) for length in lengths)
        decoder_shared = size.decoder_operations(prefix)
        for length in lengths:
            decoder_shared += size.decoder_operations(length - prefix, cached_tokens=prefix)
        totals["plain"] += len(lengths) * per_image + decoder_plain
        totals["shared"] += per_image + decoder_shared
    return totals


def _encoder_operations_or_nan(vlm: Vlm, prepared: PreparedImage) -> float:
    if not prepared.image_inputs:
        return 0.0
    operations = count_encoder_operations(vlm, prepared)
    return np.nan if operations is None else float(operations)


def _count_disk_bytes(contents: Collection[Content], vlm: Vlm, rows: pd.DataFrame) -> int:
    """Count the bytes of states in float16."""
    total = 0
    for content in contents:
        layers = vlm.layers_of_stage[content.stage]
        if not layers:
            continue
        count = rows.file.nunique() if content.is_of_image else len(rows)
        total += 2 * count * len(layers) * stage_width(vlm, content.stage)
    return total


def _expected_way(settings: ExtractionSettings, vlm: Vlm) -> str:
    preset = PRESETS.get(settings.model)
    architecture = preset.type if preset else vlm.type
    sharing = read_checked_architectures().sharing.get(architecture)
    if not vlm.is_native:
        sharing = "no" if vlm.why_not_shared else "exact"
    return "shared" if sharing == "exact" and settings.sharing != "off" else "plain"


class TimedRun(NamedTuple):
    """A number of images with their prompts, and the seconds that they took."""

    images: int
    seconds: float


class SampleTimes(NamedTuple):
    """What extracting a sample took.

    Attributes
    ----------
    way : str
        That the model goes, out of :data:`probekit.models.forward.WAYS`.
    start_s : float
        Seconds to load the model and to begin, whatever the number of images.
    per_image_s : float
        Seconds for each image with its prompts, or prompt without an image.
    """

    way: str
    start_s: float
    per_image_s: float


def measure_sample(
    settings: ExtractionSettings, rows: pd.DataFrame, *, device: str, home: paths.Home
) -> SampleTimes:
    """Extract a quarter of a sample, then the rest, into a temporary folder.

    Parameters
    ----------
    settings : ExtractionSettings
        Filled in.
    rows : DataFrame
        As :func:`probekit.extraction.shards.model_inputs` returns them.
    device : str
    home : Home
    """
    unit = unit_numbers(rows)
    is_first = unit <= unit.max() // 4
    parts = [part for part in (rows[is_first], rows[~is_first]) if len(part)]
    # As many in both parts, or the second one would be faster.
    workers = workers_for(count_units(parts[0]), settings.workers or 0)
    settings = replace(settings, workers=workers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = open_folder(Path(temporary) / "model" / "settings", home)
        shards_of_parts = [_plan_part(folder, part, settings) for part in parts]
        shards = tuple(chain.from_iterable(shards_of_parts))
        runner = Runner(Job(settings, folder, device, shards, home))
        try:
            start = time.perf_counter()
            runner.load()
            load_s = time.perf_counter() - start
            runs = []
            first = 0
            for part, shards_of_part in zip(parts, shards_of_parts, strict=True):
                places = range(first, first + len(shards_of_part))
                first = places.stop
                start = time.perf_counter()
                runner.make_shards(places)
                runs.append(TimedRun(count_units(part), time.perf_counter() - start))
            way = runner.way
        finally:
            runner.release()
    begin_s, per_image_s = fit_times(runs[0], runs[-1])
    return SampleTimes(way, load_s + begin_s, per_image_s)


def _plan_part(
    folder: ActivationFolder, rows: pd.DataFrame, settings: ExtractionSettings
) -> list[Shard]:
    """Plan the shards of rows with an image, and of those without, which have no image's stages."""
    shards: list[Shard] = []
    for of_kind in (rows[rows.file != ""], rows[rows.file == ""]):
        if of_kind.empty:
            continue
        contents = adapt_settings(settings, of_kind).contents
        shards += plan_shards(
            folder, of_kind, contents=contents, shard_images=settings.images_per_shard
        )
    return shards


def fit_times(few: TimedRun, more: TimedRun) -> tuple[float, float]:
    """Estimate what any run takes, and what each image takes.

    Parameters
    ----------
    few, more : TimedRun
        The second one has seen more of what is slow at first.

    Returns
    -------
    tuple of float
        Seconds to begin, and seconds per image. Where one of them would be negative: 0, and the
        mean of the second run.
    """
    if few.images < more.images:
        per_image_s = (more.seconds - few.seconds) / (more.images - few.images)
        begin_s = few.seconds - few.images * per_image_s
        if per_image_s > 0 and begin_s >= 0:
            return begin_s, per_image_s
    return 0.0, more.seconds / more.images


# -------------------------------------------------------------------------------------- description


def hours_by_workers(table: pd.DataFrame, most_workers: int) -> pd.DataFrame:
    """Return the hours of all models by number of workers, each with a device of its own.

    Whole shards, one model after the other.

    Parameters
    ----------
    table : DataFrame
        One row per model, columns as the attributes of :class:`Estimate`.
    most_workers : int
    """
    powers_of_two = {1 << k for k in range(most_workers.bit_length())}
    counts = sorted(powers_of_two | {most_workers})
    hours = []
    for count in counts:
        rounds = np.ceil(table.shards / count) / table.shards
        hours.append(float((rounds * table.hours + table.start_s / 3600).sum()))
    return pd.DataFrame({"workers": counts, "hours": hours})


def describe_estimates(
    estimates: Sequence[Estimate], *, most_workers: int, operations_per_second: float | None
) -> str:
    """Say the estimates in words: one column per model, and hours by number of workers."""
    table = pd.DataFrame(estimates)
    lines = {
        "images": [_say(value) for value in table.images],
        "examples": [_say(value) for value in table.examples],
        "tokens": [_say(value / 1e6, ",.2f", " M") for value in table.tokens],
        "tokens, unshared": [_say(value / 1e6, ",.2f", " M") for value in table.plain_tokens],
        "operations": [_say(value / 1e12, ",.4g", " TFLOP") for value in table.operations],
        "operations, unshared": [
            _say(value / 1e12, ",.4g", " TFLOP") for value in table.plain_operations
        ],
        "activations on disk": [_say(value, ",.3f", " GB") for value in table.disk_gb],
        "weights in memory": [_say(value, ",.3f", " GB") for value in table.weights_gb],
        "a batch in memory, about": [_say(value, ",.3f", " GB") for value in table.batch_gb],
        "hours": [f"{_say(row.hours, ',.3g')} ({row.way})" for row in table.itertuples()],
    }
    models = pd.DataFrame(lines, index=table.model.to_numpy()).T.to_string()
    if operations_per_second:
        basis = f"at {operations_per_second:.3g} operations per second"
    else:
        basis = "as the sample took here, without loading"
    hours = hours_by_workers(table, most_workers)
    hours_text = hours.to_string(index=False, float_format="{:.3g}".format)
    return f"{models}\n\nhours: {basis}; probing comes on top, see docs/cost.md\n\n{hours_text}"


def _say(value: float, form: str = ",.0f", unit: str = "") -> str:
    return "unknown" if pd.isna(value) else format(value, form) + unit
