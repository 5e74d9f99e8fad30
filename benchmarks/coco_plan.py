"""What it takes to read all of COCO: 118,287 images x 10 prompts x 5 models, on 1, 8 and 64 GPUs.

    python benchmarks/coco_plan.py [--images 118287] [--prompts 10] [--json PATH]

Arithmetic on the checkpoints' published shapes, for photographs of 640 x 480 pixels and prompts of 25 tokens: nothing
is loaded or run. Operations are those of :mod:`probekit.extraction.planning`; a GPU is taken to keep up 35 % of an H100's dense
half-precision rate (989 TFLOP/s), images to be spread in shards of 200, a model to be loaded in 60 s.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig

from probekit.extraction.planning import Shape, encoder
from probekit.models import architectures, load
from probekit.models.processor import PreparedImage

RATE, SHARD, LOAD, BEFORE, PROMPT = 0.35 * 989e12, 200, 60, 5, 25
GPUS = (1, 8, 64)
QWEN2 = {"vocab_size": 152_000, "max_position_embeddings": 32_768, "tie_word_embeddings": True}
SMALL = QWEN2 | {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                 "num_attention_heads": 14, "num_key_value_heads": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}


def qwen2_vl(hidden: int, intermediate: int, heads: int, kept: int) -> dict:
    text = QWEN2 | MROPE | {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 28,
                            "num_attention_heads": heads, "num_key_value_heads": kept}
    return {"text_config": text, "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4,
                                                   "hidden_size": hidden, "patch_size": 14, "temporal_patch_size": 2}}


def siglip(size: int, width: int = 1152) -> dict:
    return {"model_type": "siglip_vision_model", "hidden_size": width, "intermediate_size": 4304, "patch_size": 14,
            "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": size, "vision_use_head": False}


MODELS = {  # type and config; shape of the pixels and number of image tokens of a photograph of 640 x 480
    "Qwen2-VL-2B": ("qwen2_vl", qwen2_vl(1536, 8960, 12, 2), (34 * 46, 1176), 17 * 23),
    "Qwen2-VL-7B": ("qwen2_vl", qwen2_vl(3584, 18944, 28, 4), (34 * 46, 1176), 17 * 23),
    "FastVLM-0.5B": ("fast_vlm", {"text_config": SMALL, "vision_config": {
        "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg",
        "hidden_size": 3072, "model_args": {"inference_mode": True}}}, (1, 3, 1024, 1024), 256),
    "Gemma-3-4B": ("gemma3", {"vision_config": siglip(896), "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}}, (1, 3, 896, 896), 256),
    "LLaVA-OneVision-0.5B": ("llava_onevision", {"vision_config": siglip(384), "text_config": SMALL},
                             (5, 3, 384, 384), 729 + 41 * 54 + 41),  # a view of the whole, four tiles without margins
}


def row(name: str, images: int, prompts: int) -> dict:
    kind, config, pixels, image_tokens = MODELS[name]
    config = AutoConfig.for_model(kind, **config)
    with torch.device("meta"):
        full = load.auto_class(config).from_config(config, dtype=torch.bfloat16)
    vlm = load.Vlm(name, architectures.remove_head(full), processor=None, device="meta", dtype="bfloat16")
    shape, head = Shape.of(vlm), BEFORE + image_tokens
    tiles = pixels if kind != "llava_onevision" else (1, *pixels[1:])
    one = encoder(vlm, PreparedImage({"pixel_values": torch.empty(tiles, device="meta")}, [], [
        np.ones(image_tokens, bool)])) * pixels[0] // tiles[0]
    shared = one + shape.decoder(head) + prompts * shape.decoder(PROMPT, head)
    plain = prompts * (one + shape.decoder(head + PROMPT))
    found = {"model": name, "image tokens": image_tokens, "TFLOP an image": shared / 1e12, "unshared": plain / 1e12,
             "GB weights": 2 * shape.parameters / 1e9,
             "GB on disk": images * prompts * len(vlm.layers) * vlm.width * 2 / 1e9}
    shards = int(np.ceil(images / SHARD))
    for k in GPUS:
        found[f"hours on {k}"] = (np.ceil(shards / k) * SHARD * shared / RATE + LOAD) / 3600
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = pd.DataFrame([row(name, options.images, options.prompts) for name in MODELS])
    whole = table.drop(columns=["model", "image tokens", "GB weights"]).sum()
    print(table.round(2).to_string(index=False), "\n\nall five:", whole.round(2).to_string(), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(table.to_dict("records"), indent=1) + "\n")


if __name__ == "__main__":
    main()
