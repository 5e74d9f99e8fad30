"""A model of full size with random weights: time, memory, bytes; and what a study costs on GPUs.

    python benchmarks/full_size.py CONFIG.json --tokenizer FOLDER --photos FOLDER [--device cpu]
                                   [--dtype float32] [--json PATH]

CONFIG.json is the config of a Qwen2-VL or FastVLM checkpoint, the tokenizer one of the Qwen2
family. Weights are drawn at random, so the numbers say what it costs and nothing about what a model
knows.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from measuring import list_shards, save_json
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from probekit.extraction.extracting import open_views
from probekit.extraction.jobs import plan_job
from probekit.extraction.loading import WorkItem, prepare_images
from probekit.extraction.runner import Runner
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.shards import model_inputs
from probekit.models.forward import run_pooled
from probekit.models.load import Vlm
from probekit.paths import Home


class Gpu(NamedTuple):
    """Dense half-precision rate and memory of a maker's data sheet."""

    name: str
    tflop_per_s: float
    memory_gb: float


GPUS = (Gpu("H100 SXM", 989, 80), Gpu("RTX 4090", 165, 24), Gpu("T4", 65, 16))
# Share of that rate which large matrix products with attention in between usually reach.
UTILISATION = 0.35
STUDY_IMAGES = 22_000
# What Qwen2-VL adds to Qwen2's tokens, in this order.
QWEN2_VL_TOKENS = (
    "object_ref_start",
    "object_ref_end",
    "box_start",
    "box_end",
    "quad_start",
    "quad_end",
    "vision_start",
    "vision_end",
    "vision_pad",
    "image_pad",
    "video_pad",
)
PROMPTS = (
    "This image contains the following types of object:",
    "This image contains: a man rides a brown horse.",
    "This image contains: two cups of coffee on a wooden table.",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def assemble_checkpoint(
    config_file: Path, *, tokenizer: Path, preprocessor: Path | None, folder: Path
) -> None:
    """Write the config, and a processor of its family with a real tokenizer; no weights."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    words = AutoTokenizer.from_pretrained(tokenizer)
    if config["model_type"] == "qwen2_vl":
        processor = make_qwen2_vl_processor(words, preprocessor)
        assert words.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    else:
        processor = make_fast_vlm_processor(words)
        config["image_token_index"] = words.convert_tokens_to_ids("<image>")
    processor.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def make_qwen2_vl_processor(words, preprocessor: Path | None) -> Qwen2VLProcessor:
    settings = json.loads(preprocessor.read_text(encoding="utf-8")) if preprocessor else {}
    settings = {key: value for key, value in settings.items() if not key.endswith("_type")}
    special_tokens = [f"<|{name}|>" for name in QWEN2_VL_TOKENS]
    words.add_special_tokens({"additional_special_tokens": special_tokens})
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**settings),
        words,
        Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE.replace("IMAGE", image),
    )


def make_fast_vlm_processor(words) -> LlavaProcessor:
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    square = {"height": 1024, "width": 1024}
    return LlavaProcessor(
        CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False),
        words,
        patch_size=64,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "<image>"),
    )


def measure(checkpoint: Path, photos: list[Path], *, dtype: str, device: str, home: Home) -> dict:
    """Extract all photos with the prompts, and count the operations of one of them."""
    rows = [{"file": str(photo), "prompt": prompt} for photo in photos for prompt in PROMPTS]
    examples = pd.DataFrame(rows)
    settings = ExtractionSettings(str(checkpoint), dtype=dtype, untrained=True, batch_tokens=2048)
    job = plan_job(settings, {"none": examples}, device=device, home=home)
    runner = Runner(job)
    start = time.perf_counter()
    runner.make_shards(range(len(job.shards)))
    seconds = time.perf_counter() - start
    activations = open_views(job, {"none": examples})
    last_layer = activations.layers[-1]
    inputs = model_inputs(examples, home)
    items = prepare_images(runner.vlm.prompt_processor, [inputs], longest_side=None, home=home)
    item = next(items)
    start = time.perf_counter()
    operations = count_operations(runner.vlm, item)
    image_seconds = time.perf_counter() - start
    shard_bytes = sum(file.stat().st_size for file in list_shards(home))
    return {
        "parameters": sum(parameter.numel() for parameter in runner.vlm.model.parameters()),
        "layers": len(activations.layers),
        "width": activations[last_layer, "mean"].shape[1],
        "image_tokens": int(item.prepared.image_masks[0].sum()),
        "tokens_per_image": item.count_tokens("shared"),
        "seconds_with_loading": seconds,
        "seconds_per_image": image_seconds,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "bytes_per_example": shard_bytes / len(examples),
        "tflop_per_image": operations / 1e12,
        "sharing": next(iter(activations.meta["sharing"].values()))["reason"],
    }


def count_operations(vlm: Vlm, item: WorkItem) -> int:
    """Count the operations of an image with its prompts while it runs."""
    # The CPU's own attention is not counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_pooled(vlm, [item.prepared], poolings=["mean"], way="shared")
    return counter.get_total_flops()


def estimate_study(result: dict) -> pd.DataFrame:
    """Minutes: images x operations per image / (operations per second x utilisation)."""
    weights_gb = result["parameters"] * 2 / 1e9
    disk_gb = STUDY_IMAGES * len(PROMPTS) * result["bytes_per_example"] / 1e9
    rows = []
    for gpu in GPUS:
        images_per_s = gpu.tflop_per_s * UTILISATION / result["tflop_per_image"]
        rows.append(
            {
                "device": gpu.name,
                "TFLOP/s": gpu.tflop_per_s,
                "images/s": images_per_s,
                "minutes": STUDY_IMAGES / images_per_s / 60,
                "weights GB": weights_gb,
                "fits": weights_gb < 0.8 * gpu.memory_gb,
                "GB on disk": disk_gb,
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="of the Qwen2 family")
    parser.add_argument("--preprocessor", type=Path, help="preprocessor_config.json of Qwen2-VL")
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEG files")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    photos = sorted(options.photos.glob("*.jpg"))[: options.images]
    if not photos:
        raise SystemExit(f"there is no *.jpg in {options.photos}")
    with tempfile.TemporaryDirectory() as temporary:
        home = Home.find(temporary)
        checkpoint = home.root / "checkpoint"
        assemble_checkpoint(
            options.config,
            tokenizer=options.tokenizer,
            preprocessor=options.preprocessor,
            folder=checkpoint,
        )
        result = measure(checkpoint, photos, dtype=options.dtype, device=options.device, home=home)
    table = estimate_study(result)
    print(json.dumps(result, indent=1))
    print(table.round(2).to_string(index=False))
    save_json(options.json, result | {"cost": table.to_dict("records")})


if __name__ == "__main__":
    main()
