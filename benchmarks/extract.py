"""Extraction against the published study's way, and against the least that must be computed.

    python benchmarks/extract.py [--model 40M] [--images 48] [--prompts-per-image 3 10]
                                 [--dtype float32] [--device cpu] [--quick] [--json PATH]

One process, the same random Qwen2-VL-shaped model, images and prompts for all:

plain   the study's way: the model and a head of its size, output_hidden_states, every image
        encoded for every prompt, batches of 8, mean pooling afterwards
ours    an extraction: preprocessing, forward passes, pooling, writing shards
floor   bare forward passes of the base model over exactly the tokens that must be computed (each
        image and prefix once, each prompt's own tokens once), inputs prepared beforehand, nothing
        read and nothing written

Ours and the floor run twice, in turn: the floor is held against the faster, plain against the mean
of ours. No time includes loading the model. Ours includes what it does once, whatever the number of
images: the check which way the model goes, on batches of the first and the last images. The
vocabulary is chosen so that the head has the share of the parameters that it has in Qwen2-VL-2B
(about 15 %).
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from measuring import high_water_mb, run_in_new_process, save_json
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.utils.logging import disable_progress_bar

from probekit.data.scenes import draw_scene, sample_scene, write_captions
from probekit.extraction import runner
from probekit.extraction.extracting import extract_tables
from probekit.extraction.loading import WorkItem, fill_batches, prepare_images
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.shards import model_inputs
from probekit.extraction.store import Activations
from probekit.images import load_rgb
from probekit.models.batches import batch_images, batch_tokens, shared_prefix_length
from probekit.models.load import Vlm, load_vlm
from probekit.models.native import cache_arguments
from probekit.models.presets import locate
from probekit.paths import Home


class Size(NamedTuple):
    """Widths and numbers of blocks of a model."""

    width: int
    layers: int
    vision_width: int
    vision_layers: int


SIZES = {
    "tiny": Size(128, 3, 80, 2),
    "40M": Size(512, 10, 320, 8),
    "200M": Size(1024, 14, 640, 12),
    "500M": Size(1280, 20, 896, 20),
}
PLAIN_BATCH = 8


def make_model(size: Size, folder: Path) -> None:
    """Save a random Qwen2-VL, which cuts photographs into patches as the real checkpoints do."""
    source = locate("tiny-qwen2-vl")
    config = AutoConfig.from_pretrained(source)
    processor = AutoProcessor.from_pretrained(source)
    config.vision_config.update(
        {
            "depth": size.vision_layers,
            "embed_dim": size.vision_width,
            "num_heads": size.vision_width // 80,
            "patch_size": 14,
            "hidden_size": size.width,
        }
    )
    config.text_config.update(
        {
            "hidden_size": size.width,
            "intermediate_size": 4 * size.width,
            "num_hidden_layers": size.layers,
            "vocab_size": 16_384,
            "num_attention_heads": size.width // 64,
            "num_key_value_heads": max(1, size.width // 256),
            "max_position_embeddings": 32_768,
            "layer_types": ["full_attention"] * size.layers,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [8, 12, 12],
            },
        }
    )
    processor.image_processor.patch_size = 14
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def make_examples(folder: Path, images: int, prompts_per_image: int) -> pd.DataFrame:
    """Draw pictures of 640 x 480 pixels, each with its prompts."""
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    rows = []
    for i in range(images):
        rng = np.random.default_rng([1, i])
        scene = sample_scene(rng)
        file = photos / f"{i}.jpg"
        if not file.exists():
            draw_scene(scene).resize((640, 480)).save(file, quality=90)
        for prompt in make_prompts(prompts_per_image, rng):
            rows.append({"image_id": i, "file": str(file), "prompt": prompt, "task": "caption"})
    return pd.DataFrame(rows)


def make_prompts(count: int, rng: np.random.Generator) -> list[str]:
    prompts: dict[str, None] = {}  # in order, each once
    for _ in range(2 * count):
        for caption in write_captions(sample_scene(rng), rng):
            prompts[f"This image contains: {caption[:-1]}.\nIs this right?"] = None
    assert len(prompts) >= count
    return list(prompts)[:count]


class Timed(NamedTuple):
    """What a way takes, and the mean-pooled states (n, l, d) that it finds."""

    seconds: float
    states_nld: np.ndarray


@torch.inference_mode()
def run_plain(vlm: Vlm, examples: pd.DataFrame) -> Timed:
    """The study's way, with the head that it computes and nobody reads."""
    head = vlm.stack.get_input_embeddings().weight  # of its size
    pooled = []
    start = time.perf_counter()
    for first in range(0, len(examples), PLAIN_BATCH):
        rows = examples.iloc[first : first + PLAIN_BATCH]
        inputs = vlm.processor(
            images=[load_rgb(file) for file in rows.file],
            text=[vlm.prompt_processor.wrap(prompt) for prompt in rows.prompt],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        inputs = vlm.to_device(inputs)
        output = vlm.model(**inputs, output_hidden_states=True, use_cache=False)
        torch.nn.functional.linear(output.last_hidden_state, head)
        mask_nt1 = inputs["attention_mask"][..., None].float()
        layers = [
            (hidden_ntd.float() * mask_nt1).sum(1) / mask_nt1.sum(1)
            for hidden_ntd in output.hidden_states
        ]
        pooled.append(torch.stack(layers, 1).cpu())
    seconds = time.perf_counter() - start
    return Timed(seconds, torch.cat(pooled).numpy())


def extract_with(
    vlm: Vlm, checkpoint: Path | str, examples: pd.DataFrame, home: Path | str, **settings
) -> Activations:
    """Extract by a model that is loaded already."""
    with (
        patch.object(runner, "load_vlm", lambda *arguments, **options: vlm),
        patch.object(Vlm, "release"),
    ):
        return extract_tables(
            ExtractionSettings(str(checkpoint), dtype=vlm.dtype, **settings),
            {"none": examples},
            device=vlm.device,
            home=Home.find(home),
        )


def run_ours(vlm: Vlm, checkpoint: Path, examples: pd.DataFrame) -> Timed:
    """An extraction into an empty home, of a model that is loaded already."""
    with tempfile.TemporaryDirectory() as home:
        start = time.perf_counter()
        activations = extract_with(vlm, checkpoint, examples, home)
        seconds = time.perf_counter() - start
        layers = [activations[layer, "mean"] for layer in activations.layers]
    return Timed(seconds, np.stack(layers, 1))


@torch.inference_mode()
def run_floor(vlm: Vlm, checkpoint: Path, examples: pd.DataFrame) -> float:
    """Seconds of the bare forward passes, in the batches that extraction makes."""
    home = Home.find()
    settings = ExtractionSettings(str(checkpoint), dtype=vlm.dtype).fill_in(vlm.device, home)
    items = prepare_images(
        vlm.prompt_processor,
        [model_inputs(examples, home)],
        longest_side=None,
        home=home,
        workers=settings.workers or 0,
    )
    batches = fill_batches(items, token_budget=lambda: settings.token_budget, way=lambda: "shared")
    ready = [FloorBatch.of(vlm, batch) for batch in batches]
    vlm.record_sync_point()()
    start = time.perf_counter()
    for batch in ready:
        batch.run(vlm)
    vlm.record_sync_point()()
    return time.perf_counter() - start


class FloorBatch(NamedTuple):
    """Inputs of a batch: prefixes with their images, then the suffixes of all prompts."""

    prefix_inputs: dict[str, torch.Tensor]
    suffix_tokens: dict[str, torch.Tensor]
    owner_n: torch.Tensor
    prefix_length: int

    @classmethod
    def of(cls, vlm: Vlm, items: list[WorkItem]) -> FloorBatch:
        prepared = [item.prepared for item in items]
        length = shared_prefix_length(prepared)
        prefixes = []
        suffixes = []
        owners = []
        for i, image in enumerate(prepared):
            prefixes.append({key: value[:length] for key, value in image.tokens[0].items()})
            for row in image.tokens:
                suffixes.append({key: row[key][length:] for key in ("input_ids", "attention_mask")})
                owners.append(i)
        prefix_inputs = batch_tokens(vlm, prefixes) | batch_images(vlm, prepared)
        return cls(
            vlm.to_device(prefix_inputs),
            vlm.to_device(batch_tokens(vlm, suffixes)),
            torch.tensor(owners, device=vlm.device),
            length,
        )

    def run(self, vlm: Vlm) -> None:
        cache = DynamicCache(config=vlm.stack.config)
        vlm.model(**self.prefix_inputs, **cache_arguments(vlm.model, cache))
        cache.reorder_cache(self.owner_n)
        suffix_mask = self.suffix_tokens["attention_mask"]
        prefix_mask = suffix_mask.new_ones(len(self.owner_n), self.prefix_length)
        vlm.stack(
            input_ids=self.suffix_tokens["input_ids"],
            attention_mask=torch.cat([prefix_mask, suffix_mask], 1),
            **cache_arguments(vlm.stack, cache),
        )


def largest_relative_difference(states_nld: np.ndarray, reference_nld: np.ndarray) -> float:
    """Relative to the largest value of each layer."""
    difference_l = np.abs(states_nld - reference_nld).max((0, 2))
    return float((difference_l / np.abs(reference_nld).max((0, 2))).max())


def compare_ways(vlm: Vlm, checkpoint: Path, examples: pd.DataFrame) -> dict[str, float]:
    ours_seconds = []
    floor_seconds = []
    for _ in range(2):
        ours = run_ours(vlm, checkpoint, examples)
        ours_seconds.append(ours.seconds)
        floor_seconds.append(run_floor(vlm, checkpoint, examples))
    gc.collect()
    plain = run_plain(vlm, examples)
    return {
        "plain_s": plain.seconds,
        "ours_s": sum(ours_seconds) / 2,
        "floor_s": min(floor_seconds),
        "speedup": plain.seconds / (sum(ours_seconds) / 2),
        "over_floor": min(ours_seconds) / min(floor_seconds),
        "max_rel_diff": largest_relative_difference(ours.states_nld, plain.states_nld),
    }


class Model(NamedTuple):
    """What a process loads."""

    checkpoint: Path
    dtype: str
    device: str

    def load(self) -> Vlm:
        return load_vlm(str(self.checkpoint), dtype=self.dtype, device=self.device)


def measure_peak_mb(model: Model, folder: Path, images: int) -> float:
    """Peak memory of a process that only extracts, with three prompts per image."""
    return run_in_new_process(run_ours_and_measure, model, make_examples(folder, images, 3))


def run_ours_and_measure(model: Model, examples: pd.DataFrame) -> float:
    run_ours(model.load(), model.checkpoint, examples)
    return high_water_mb()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="40M", choices=SIZES)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--prompts-per-image", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="12 images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    disable_progress_bar()
    images = 12 if options.quick else options.images
    result: dict[str, float] = {}
    comparisons = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(SIZES[options.model], folder)
        model = Model(folder, options.dtype, options.device)
        vlm = model.load()
        run_ours(vlm, folder, make_examples(folder, 2, 2))  # warm up
        for k in options.prompts_per_image:
            comparison = compare_ways(vlm, folder, make_examples(folder, images, k))
            comparisons.append(comparison | {"prompts_per_image": k})
            result |= {
                f"speedup_{k}": comparison["speedup"],
                f"over_floor_{k}": comparison["over_floor"],
            }
        result["peak_rss_mb"] = measure_peak_mb(model, folder, images)
        result["peak_rss_mb_double"] = measure_peak_mb(model, folder, 2 * images)
    table = pd.DataFrame(comparisons).set_index("prompts_per_image")
    result["over_floor"] = float(table.over_floor.max())
    result["max_rel_diff"] = float(table.max_rel_diff.max())
    result["images_per_s"] = images / comparisons[0]["ours_s"]
    print(table.to_string(float_format="{:.3g}".format))
    print(json.dumps(result, indent=1))
    save_json(options.json, result)


if __name__ == "__main__":
    main()
