"""What an extraction takes, before it runs: examples, tokens, operations, bytes, memory, hours.

Some images are drawn as notebook 01 would, their examples are built and their prompts prepared; the rest is arithmetic:

    decoder   2 x (parameters of its blocks that a token meets) x tokens + 4 x layers x heads x head size x (pairs of
              tokens that attention compares: new ones with all)
    encoder   counted on weights without values where its shapes do not depend on values, else the same formula, with
              patches for tokens
    bytes     2 a number (float16), of every layer and pooling, an example (decoder) or an image (encoder)
    memory    the weights, and for each token of a batch its keys and values and the largest of what a block holds
    time      that of the sample's own shards on this device, or operations / (operations a second that are named)
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from probekit import paths
from probekit.data import layouts, scenes
from probekit.extraction import extract, loading, shards
from probekit.extraction.extract import ExtractionSettings
from probekit.extraction.worker import Job, Worker
from probekit.models import batches
from probekit.models.architectures import width_of
from probekit.models.load import Vlm, best_device, load_skeleton
from probekit.models.presets import CHECKED, PRESETS
from probekit.models.processor import PreparedImage
from probekit.tasks import building, input_controls
from probekit.tasks.balance import TooFew
from probekit.tasks.base import BuildSettings

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that operations and memory follow from, out of its config and the shapes of its weights.

    Attributes
    ----------
    parameters : of the model without its head
    active : parameters of the decoder's blocks that a token meets (of experts, those that it is sent to)
    pair : operations for each pair of tokens that attention compares, over all layers
    token_bytes : in a batch, for two bytes a number: keys and values of all layers, and the widest of a block
    """

    parameters: int
    active: int
    pair: int
    token_bytes: int

    @classmethod
    def of(cls, vlm: Vlm) -> Shape:
        text = vlm.config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        kept = getattr(text, "num_key_value_heads", None) or heads
        experts = next((n for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
                        if isinstance(n := getattr(text, name, None), int) and n), 1)
        asked = next((k for name in ("num_experts_per_tok", "moe_k", "top_k_experts")
                      if isinstance(k := getattr(text, name, None), int)), experts)
        named = [(name, p.numel()) for name, p in vlm.blocks.named_parameters() if p.ndim > 1]
        expert = sum(n for name, n in named if ".experts." in name)
        active = sum(n for _, n in named) - expert + expert * asked // experts
        wide = max(getattr(text, "intermediate_size", 0) or 0, 4 * text.hidden_size)
        layers = len(vlm.blocks)
        return cls(sum(p.numel() for p in vlm.model.parameters()), active, 4 * layers * heads * size,
                   2 * (2 * layers * kept * size + 3 * wide + 6 * text.hidden_size))

    def decoder(self, tokens: int, before: int = 0) -> int:
        """Operations of new tokens that come after others."""
        return 2 * self.active * tokens + self.pair * tokens * (tokens + before)


def encoder(vlm: Vlm, prepared: PreparedImage) -> int | None:
    """Operations of the image encoder for one image; None where they cannot be told without running it."""
    pictures = {key: value.to("meta") if value.is_floating_point() else value for key, value in prepared.image.items()}
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vlm.model.get_image_features(**{key: value.to(torch.bfloat16) if value.is_floating_point() else value
                                            for key, value in pictures.items()})
        return counter.get_total_flops()
    except Exception:  # whatever an encoder makes of weights without values
        return _by_patches(vlm, prepared)


def _by_patches(vlm: Vlm, prepared: PreparedImage) -> int | None:
    config = getattr(vlm.config, "vision_config", None)
    side, pixels = getattr(config, "patch_size", None), prepared.image.get("pixel_values")
    if vlm.vision is None or not isinstance(side, int) or pixels is None:
        return None
    patches = pixels.numel() // (3 * side**2 * getattr(config, "temporal_patch_size", 1))
    module, blocks = vlm.vision
    width = next(p.shape[-1] for name, p in blocks[0].named_parameters() if "norm" in name)
    within = {*blocks.parameters()}
    found = 4 * len(blocks) * width * patches**2
    for name, p in module.named_parameters():
        if p.ndim > 1 and (p in within or "patch_embed" in name):
            found += 2 * p.numel() * patches
        elif p.ndim > 1 and "embed" not in name:  # what makes image tokens of patches
            found += 2 * p.numel() * int(prepared.image_masks[0].sum())
    return found


# ------------------------------------------------------------------------------------------------------------- a sample


def sample(parameters: dict, n: int, folder: Path) -> tuple[pd.DataFrame, int]:
    """Examples of about n of a run's images, built into `folder`, and the number of all its images.

    Raises
    ------
    FileNotFoundError, ValueError
        As notebook 01. Where tasks find nothing to ask about so few images, more are taken.
    """
    splits = {name: parameters[name] for name in building.SPLITS}
    whole = sum(splits.values())
    if min(splits.values()) < 1:
        raise ValueError(f"{', '.join(f'{name}={size}' for name, size in splits.items())}: each split needs images")
    few = {name: min(size, max(1, round(size * n / whole))) for name, size in splits.items()}
    dataset = parameters["dataset"]
    if dataset == "scenes":
        dataset = scenes.write_scenes(folder / f"scenes-{n}", sum(few.values()), parameters["seed"])
    categories = parameters["categories"]
    build = BuildSettings(str(dataset), tuple(parameters["coco_splits"]), **few, tasks=tuple(parameters["tasks"]),
                  categories=categories if isinstance(categories, str) else tuple(categories), max_bad=1.0,
                  **{name: parameters[name] for name in ("seed", "labels_from", "smallest", "captions", "similarity")})
    data = layouts.read_dataset(paths.Home.find().resolve(dataset), build.coco_splits)
    if whole > len(data.images) and parameters["dataset"] != "scenes":
        raise ValueError(f"{whole:,} images are asked for, {dataset} has {len(data.images):,}")
    try:
        examples = building.build_examples(build, folder / f"tasks-{n}", data)
        examples.attrs["sampled"] = sum(few.values())
        return examples, whole
    except TooFew as error:
        if n >= whole:
            raise
        print(f"of {sum(few.values())} sampled images, {error}: taking twice as many", file=sys.stderr)
    return sample(parameters, 2 * n, folder)


def rows_of(examples: pd.DataFrame, control: Sequence[str]) -> pd.DataFrame:
    """What a model is given for the examples and their controls, each once."""
    given = [shards.rows_of(input_controls.change_inputs(examples, name)) for name in ("none", *control)]
    return pd.concat(given).drop_duplicates().reset_index(drop=True)


# -------------------------------------------------------------------------------------------------------------- a model


def estimate(settings: ExtractionSettings, control: Sequence[str], examples: pd.DataFrame, images: int, flops: float | None,
             device: str | None = None) -> dict[str, object]:
    """What extracting `images` images takes of which `examples` are a sample.

    Parameters
    ----------
    flops : operations a second that the device keeps up; None measures on the sample, for which the model is loaded

    Returns
    -------
    dict
        `model, type, images, examples, tokens` (each image once for all its prompts), `plain tokens, operations,
        plain operations, way` (how the hours are counted), `GB on disk, GB weights, GB batch, hours, load_s, shards`.
    """
    settings.check()
    device = device or best_device()
    settings = extract.resolved(settings, device)
    vlm, _ = load_skeleton(settings.model, settings.revision, settings.trust_remote_code, processor=True)
    rows, shape = rows_of(examples, control), Shape.of(vlm)
    shape = shape if "lm" in settings.stages else replace(shape, active=0, pair=0)
    ratio = images / examples.attrs.get("sampled", examples.image_id.nunique())  # tasks leave some images out
    works = [*loading.ahead(vlm.prompt_processor, settings.longest_side, [rows], 0)]
    encoders = {batches.input_shape(work.prepared): work.prepared for work in works if work.prepared.image}
    encoders = {shape: encoder(vlm, prepared) for shape, prepared in encoders.items()}
    kind = PRESETS[settings.model].type if settings.model in PRESETS else vlm.config.model_type
    exact = pd.read_csv(CHECKED, keep_default_na=False).set_index("architecture").sharing.get(kind)
    found = {"model": vlm.name + " (untrained)" * settings.untrained, "type": vlm.config.model_type, "images": images,
             "examples": round(len(rows) * ratio)}
    for name, way in (("", "shared"), ("plain ", "plain")):
        found[f"{name}tokens"] = round(ratio * sum(work.tokens(way) for work in works))
        found[f"{name}operations"] = ratio * sum(
            _operations(shape, work, encoders.get(batches.input_shape(work.prepared), 0), way) for work in works)
    on_disk = [2 * len(settings.poolings) * (rows.file.nunique() if stage != "lm" else len(rows)) * len(layers) * (
        vlm.width if stage != "vision" else width_of(vlm.vision[1])) for stage, layers in vlm.layers_of_stage.items()
        if stage in settings.stages and layers]
    shard_count = int(np.ceil(ratio * (shards.units_of(rows).max() + 1) / settings.shard_images))
    size = SIZES[settings.dtype]
    found |= {"GB on disk": ratio * sum(on_disk) / 1e9, "GB weights": shape.parameters * size / 1e9, "shards": shard_count,
              "GB batch": settings.batch_tokens * shape.token_bytes * size / 2 / 1e9}
    if flops:
        way = "shared" if exact == "exact" and settings.sharing != "off" else "plain"
        seconds, load = found["operations" if way == "shared" else "plain operations"] / flops, 0.0
    else:
        way, seconds, load = measured(settings, rows, device)
        seconds *= ratio
    return found | {"way": way, "hours": seconds / 3600, "load_s": load}


def _operations(shape: Shape, work: loading.Work, image: int | None, way: str) -> float:
    lengths, head = [len(row["input_ids"]) for row in work.prepared.tokens], work.prepared.prefix_length
    if image is None:
        return np.nan
    if way == "plain":
        return len(lengths) * image + sum(shape.decoder(t) for t in lengths)
    return image + shape.decoder(head) + sum(shape.decoder(t - head, head) for t in lengths)


def measured(settings: ExtractionSettings, rows: pd.DataFrame, device: str) -> tuple[str, float, float]:
    """The way that the model goes, seconds for these rows, and seconds for loading it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model" / "settings"
        planned = shards.plan(folder, rows, settings.wants, settings.shard_images)
        worker = Worker(Job(settings, folder, device, tuple(planned)))
        start = time.perf_counter()
        worker.load()
        began = time.perf_counter()
        try:
            worker(range(len(planned)))
            return worker.passes.way, time.perf_counter() - began, began - start
        finally:
            worker.release()


def estimates(data: dict, extraction: dict, flops: float | None = None, n: int = 32) -> pd.DataFrame:
    """A row of :func:`estimate` for each model of a run, of `n` sampled images.

    Parameters
    ----------
    data, extraction : parameters of 01_build_data and of 02_extract
    """
    asked = extract.asked_by(extraction)
    with tempfile.TemporaryDirectory() as temporary:
        examples, images = sample(data, n, Path(temporary))
        return pd.DataFrame([estimate(settings, control, examples, images, flops, extraction["device"])
                             for settings, control in asked])


def by_workers(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """Hours of all models by number of workers, each with a device of its own: whole shards, one model after the other.

    Parameters
    ----------
    table : of :func:`estimates`
    """
    counts = sorted({1 << k for k in range(most.bit_length())} | {most})
    hours = [sum(np.ceil(row.shards / k) / row.shards * row.hours + row.load_s / 3600 for row in table.itertuples())
             for k in counts]
    return pd.DataFrame({"workers": counts, "hours": hours})


def told(table: pd.DataFrame, most: int, flops: float | None) -> str:
    """The estimates in words: a column a model, and hours by number of workers."""
    def number(value: object, unit: float = 1.0, form: str = ",.0f") -> str:
        return "unknown" if pd.isna(value) else format(value / unit, form)

    lines = {"images": [number(x) for x in table.images], "examples": [number(x) for x in table.examples],
             "tokens": [number(x, 1e6, ",.2f") + " M" for x in table.tokens],
             "tokens, unshared": [number(x, 1e6, ",.2f") + " M" for x in table["plain tokens"]],
             "operations": [number(x, 1e12, ",.4g") + " TFLOP" for x in table.operations],
             "operations, unshared": [number(x, 1e12, ",.4g") + " TFLOP" for x in table["plain operations"]],
             "activations on disk": [number(x, 1, ",.3f") + " GB" for x in table["GB on disk"]],
             "weights in memory": [number(x, 1, ",.3f") + " GB" for x in table["GB weights"]],
             "a batch in memory, about": [number(x, 1, ",.3f") + " GB" for x in table["GB batch"]],
             "hours": [f"{number(row.hours, 1, ',.3g')} ({row.way})" for row in table.itertuples()]}
    how = f"at {flops:.3g} operations a second" if flops else "as the sample took here, without loading"
    models = pd.DataFrame(lines, index=table.model.to_numpy()).T.to_string()
    hours = by_workers(table, most).to_string(index=False, float_format="{:.3g}".format)
    return f"{models}\n\nhours: {how}; probing comes on top, see the README\n\n{hours}"
