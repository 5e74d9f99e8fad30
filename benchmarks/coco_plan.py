"""What it takes to read all of COCO: 118,287 images x 10 prompts x 5 models, on 1, 8 and 64 GPUs.

    python benchmarks/coco_plan.py [--images 118287] [--prompts 10] [--json PATH]

Arithmetic on the checkpoints' published shapes, for photographs of 640 x 480 pixels and prompts of
25 tokens: nothing is loaded or run. Operations are those of :mod:`probekit.extraction.planning`. A
GPU is taken to keep up 35 % of an H100's dense half-precision rate (989 TFLOP/s), images to be
spread in shards of 200, a model to be loaded in 60 s.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from measuring import save_json
from transformers import AutoConfig

from probekit.extraction.planning import ModelSize, count_encoder_operations
from probekit.models.architectures import remove_head
from probekit.models.load import Vlm, auto_class
from probekit.models.native import NativeAdapter
from probekit.models.processor import PreparedImage

OPERATIONS_PER_S = 0.35 * 989e12
SHARD_IMAGES = 200
LOADING_S = 60
TOKENS_BEFORE_IMAGE = 5
PROMPT_TOKENS = 25
GPU_COUNTS = (1, 8, 64)

QWEN2 = {"vocab_size": 152_000, "max_position_embeddings": 32_768, "tie_word_embeddings": True}
QWEN2_0_5B = QWEN2 | {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
FASTVIT = {
    "model_type": "timm_wrapper",
    "architecture": "fastvit_mci3",
    "do_pooling": True,
    "global_pool": "avg",
    "hidden_size": 3072,
    "model_args": {"inference_mode": True},
}
GEMMA3_4B = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}


def qwen2_vl(hidden: int, *, intermediate: int, heads: int, key_heads: int) -> dict:
    text_config = QWEN2 | {
        "rope_parameters": MROPE,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 28,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
    }
    vision_config = {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "hidden_size": hidden,
        "patch_size": 14,
        "temporal_patch_size": 2,
    }
    return {"text_config": text_config, "vision_config": vision_config}


def siglip(image_size: int) -> dict:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "patch_size": 14,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": image_size,
        "vision_use_head": False,
    }


class Checkpoint(NamedTuple):
    """A model, and what it makes of a photograph of 640 x 480 pixels.

    Attributes
    ----------
    name, model_type : str
    config : dict
    pixels : tuple of int
        Shape of `pixel_values` of one run of the encoder.
    image_tokens : int
    encoder_runs : int
        Per photograph.
    """

    name: str
    model_type: str
    config: dict
    pixels: tuple[int, ...]
    image_tokens: int
    encoder_runs: int = 1


PHOTO_PATCHES = (34 * 46, 1176)  # of 14 x 14 pixels, and the numbers of a patch
CHECKPOINTS = (
    Checkpoint(
        "Qwen2-VL-2B",
        "qwen2_vl",
        qwen2_vl(1536, intermediate=8960, heads=12, key_heads=2),
        PHOTO_PATCHES,
        17 * 23,
    ),
    Checkpoint(
        "Qwen2-VL-7B",
        "qwen2_vl",
        qwen2_vl(3584, intermediate=18_944, heads=28, key_heads=4),
        PHOTO_PATCHES,
        17 * 23,
    ),
    Checkpoint(
        "FastVLM-0.5B",
        "fast_vlm",
        {"text_config": QWEN2_0_5B, "vision_config": FASTVIT},
        (1, 3, 1024, 1024),
        256,
    ),
    Checkpoint(
        "Gemma-3-4B",
        "gemma3",
        {"text_config": GEMMA3_4B, "vision_config": siglip(896)},
        (1, 3, 896, 896),
        256,
    ),
    Checkpoint(
        "LLaVA-OneVision-0.5B",
        "llava_onevision",
        {"text_config": QWEN2_0_5B, "vision_config": siglip(384)},
        (1, 3, 384, 384),
        729 + 41 * 54 + 41,  # a view of the whole, and four tiles without their margins
        encoder_runs=5,
    ),
)


def make_skeleton(checkpoint: Checkpoint) -> Vlm:
    """The model with weights that have shapes and no values."""
    config = AutoConfig.for_model(checkpoint.model_type, **checkpoint.config)
    with torch.device("meta"):
        full_model = auto_class(config).from_config(config, dtype=torch.bfloat16)
    adapter = NativeAdapter(checkpoint.name, remove_head(full_model), processor=None)
    return Vlm(checkpoint.name, adapter, device="meta", dtype="bfloat16")


def plan(checkpoint: Checkpoint, *, images: int, prompts: int) -> dict:
    vlm = make_skeleton(checkpoint)
    size = ModelSize.of(vlm)
    pixels = torch.empty(checkpoint.pixels, device="meta")
    photo = PreparedImage(
        {"pixel_values": pixels}, tokens=[], image_masks=[np.ones(checkpoint.image_tokens, bool)]
    )
    encoder = checkpoint.encoder_runs * count_encoder_operations(vlm, photo)
    prefix_tokens = TOKENS_BEFORE_IMAGE + checkpoint.image_tokens
    prefix = size.decoder_operations(prefix_tokens)
    suffix = size.decoder_operations(PROMPT_TOKENS, cached_tokens=prefix_tokens)
    whole_prompt = size.decoder_operations(prefix_tokens + PROMPT_TOKENS)
    shared = encoder + prefix + prompts * suffix
    unshared = prompts * (encoder + whole_prompt)
    row = {
        "model": checkpoint.name,
        "image tokens": checkpoint.image_tokens,
        "TFLOP per image": shared / 1e12,
        "unshared": unshared / 1e12,
        "GB weights": 2 * size.parameters / 1e9,
        "GB on disk": images * prompts * len(vlm.layers) * vlm.width * 2 / 1e9,
    }
    shards = int(np.ceil(images / SHARD_IMAGES))
    for count in GPU_COUNTS:
        shards_per_gpu = np.ceil(shards / count)
        seconds = shards_per_gpu * SHARD_IMAGES * shared / OPERATIONS_PER_S + LOADING_S
        row[f"hours on {count}"] = seconds / 3600
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [
        plan(checkpoint, images=options.images, prompts=options.prompts)
        for checkpoint in CHECKPOINTS
    ]
    table = pd.DataFrame(rows)
    total = table.drop(columns=["model", "image tokens", "GB weights"]).sum()
    print(table.round(2).to_string(index=False))
    print(f"\nall five:\n{total.round(2).to_string()}")
    save_json(options.json, rows)


if __name__ == "__main__":
    main()
