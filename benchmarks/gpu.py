"""What a GPU makes of extraction and probes at the study's size, in one command.

    python benchmarks/gpu.py [--device cuda] [--dtype bfloat16] [--models NAME ...] [--images 512]
                             [--prompts-per-image 3] [--layers 4] [--quick] [--json PATH]

The models have the shapes of Qwen2-VL-2B and FastVLM-0.5B with random weights, and read drawn
scenes of 640 x 480 pixels; nothing is downloaded. Their tokenizers are those of the demo models, so
prompts have other numbers of tokens than with the published ones. For each model, in one process:

ours    an extraction: decoding and preprocessing in worker processes, forward passes, pooling,
        copies to the host, writing shards
floor   the bare forward passes over the same batches, inputs on the device beforehand
plain   the study's way: every image encoded for every prompt, batches of 8, output_hidden_states,
        a head, pooling afterwards; over an eighth of the images

`busy` is the share of its time that the device computes, as its driver counts it, `floor_share` the
time of the floor over that of ours. An extraction takes some seconds to begin, whatever its size:
`further_images_per_s` leaves them out, it is what seven eighths of the images took on top of the
first eighth.

Then the probes of the study's size, 24,000 images and --layers of 1,536, by part, see
``paper_scale.py``.

--quick takes tiny models, 8 images, and probes of 480, to try the command on a CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from extract import make_examples, run_floor, run_ours, run_plain
from measuring import high_water_mb, save_json
from paper_scale import run_probes, study_settings, write_activations
from transformers import AutoConfig, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from probekit.models.architectures import LanguageHead, remove_head
from probekit.models.load import Vlm, auto_class
from probekit.models.native import NativeAdapter
from probekit.models.presets import locate

VOCABULARY = 151_936
QWEN2_VL_2B: dict[str, dict[str, Any]] = {
    "text_config": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "vocab_size": VOCABULARY,
        "layer_types": ["full_attention"] * 28,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "hidden_size": 1536,
        "patch_size": 14,
    },
}
FAST_VLM_05B: dict[str, dict[str, Any]] = {
    "text_config": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "vocab_size": VOCABULARY,
        "layer_types": ["full_attention"] * 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "vision_config": {"hidden_size": 3072, "model_args": {"inference_mode": True}},
}
FAST_VLM_PIXELS = 1024
BUSY_EVERY_S = 0.1


def set_qwen2_vl_pixels(config: Any, processor: Any) -> None:
    processor.image_processor.patch_size = 14
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}


def set_fast_vlm_pixels(config: Any, processor: Any) -> None:
    config.image_seq_length = (FAST_VLM_PIXELS // 64) ** 2
    square = {"height": FAST_VLM_PIXELS, "width": FAST_VLM_PIXELS}
    processor.image_processor.size = square
    processor.image_processor.crop_size = square
    processor.patch_size = 64


class FullSize(NamedTuple):
    """What makes a published model's config and processor of a demo model's."""

    demo: str
    configs: dict[str, dict[str, Any]]
    set_pixels: Callable[[Any, Any], None]


MODELS = {
    "qwen2-vl-2b": FullSize("tiny-qwen2-vl", QWEN2_VL_2B, set_qwen2_vl_pixels),
    "fastvlm-0.5b": FullSize("tiny-fast-vlm", FAST_VLM_05B, set_fast_vlm_pixels),
}


def make_checkpoint(model: FullSize, folder: Path, *, quick: bool) -> None:
    """Write a config and a processor, without weights."""
    source = locate(model.demo)
    config = AutoConfig.from_pretrained(source)
    processor = AutoProcessor.from_pretrained(source)
    if not quick:
        for part, values in model.configs.items():
            getattr(config, part).update(values)
        model.set_pixels(config, processor)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def draw_weights(name: str, checkpoint: Path, *, dtype: str, device: str) -> Vlm:
    """Make a model with random weights on the device, where they are drawn fast."""
    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device(device):
        full_model = auto_class(config).from_config(config, dtype=getattr(torch, dtype))
    full_model.eval().requires_grad_(False).to(device)
    head = LanguageHead.of(full_model)
    processor = AutoProcessor.from_pretrained(checkpoint)
    return Vlm(
        name,
        NativeAdapter(name, remove_head(full_model), processor=processor),
        device=device,
        dtype=dtype,
        head=head,
    )


class BusyMeter:
    """Asks the driver of a GPU, while in its context, how much of the time it computes."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._is_possible = device.startswith("cuda")
        self._percents: list[int] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._is_over.wait(BUSY_EVERY_S):
            try:
                self._percents.append(torch.cuda.utilization(self._device))
            except (ModuleNotFoundError, RuntimeError):  # without nvidia-ml-py, or its driver
                return

    def __enter__(self) -> BusyMeter:
        if self._is_possible:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        if self._is_possible:
            self._thread.join()

    @property
    def share(self) -> float:
        """NaN where the driver was not asked."""
        return float(np.mean(self._percents)) / 100 if self._percents else np.nan


def measure_extraction(vlm: Vlm, checkpoint: Path, examples: pd.DataFrame) -> dict[str, float]:
    images = examples.image_id.nunique()
    few = examples[examples.image_id < max(1, images // 8)]
    is_gpu = vlm.device.startswith("cuda")
    run_ours(vlm, checkpoint, few)  # warm up: kernels are chosen, pinned memory is taken
    few_s = run_ours(vlm, checkpoint, few).seconds
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(vlm.device)
    with BusyMeter(vlm.device) as busy:
        ours = run_ours(vlm, checkpoint, examples)
    peak_gpu_gb = torch.cuda.max_memory_allocated(vlm.device) / 1e9 if is_gpu else np.nan
    floor_s = run_floor(vlm, checkpoint, examples)
    plain = run_plain(vlm, few)
    plain_images_per_s = few.image_id.nunique() / plain.seconds
    further_images = images - few.image_id.nunique()
    further_s = ours.seconds - few_s
    return {
        "images_per_s": images / ours.seconds,
        "further_images_per_s": further_images / further_s if further_s > 0 else np.nan,
        "floor_images_per_s": images / floor_s,
        "plain_images_per_s": plain_images_per_s,
        "speedup": images / ours.seconds / plain_images_per_s,
        "floor_share": floor_s / ours.seconds,
        "busy": busy.share,
        "peak_gpu_gb": peak_gpu_gb,
        "peak_host_mb": high_water_mb(),
    }


def measure_probes(root: str, *, images: int, layers: int, device: str) -> dict[str, float]:
    """Seconds by part for each layer of random activations, and the memory they take."""
    is_gpu = device.startswith("cuda")
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    examples = write_activations(root, images=images, layers=layers)
    with BusyMeter(device) as busy:
        measured = run_probes(root, examples, study_settings(), device)
    seconds = measured["seconds"]
    result = {f"{part}_s_per_layer": value / layers for part, value in seconds.items()}
    peak_gpu_gb = torch.cuda.max_memory_allocated(device) / 1e9 if is_gpu else np.nan
    return result | {"layers": layers, "busy": busy.share, "peak_gpu_gb": peak_gpu_gb}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--prompts-per-image", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4, help="of the probes")
    parser.add_argument("--quick", action="store_true", help="tiny models and few images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    disable_progress_bar()
    images = 8 if options.quick else options.images
    is_gpu = options.device.startswith("cuda")
    card = torch.cuda.get_device_name(options.device) if is_gpu else options.device
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        examples = make_examples(root, images, options.prompts_per_image)
        for name in options.models:
            checkpoint = root / name
            make_checkpoint(MODELS[name], checkpoint, quick=options.quick)
            vlm = draw_weights(name, checkpoint, dtype=options.dtype, device=options.device)
            parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
            measured = measure_extraction(vlm, checkpoint, examples)
            rows[name] = {"parameters_m": parameters / 1e6} | measured
            vlm.release()
    with tempfile.TemporaryDirectory() as root_of_probes:
        probes = measure_probes(
            root_of_probes,
            images=480 if options.quick else 24_000,
            layers=options.layers,
            device=options.device,
        )
    print(f"{card}, {options.dtype}, {images} images, {options.prompts_per_image} prompts each")
    print(pd.DataFrame(rows).to_string(float_format="{:.3g}".format))
    result = {"card": card, "dtype": options.dtype, "images": images}
    result |= {"extraction": rows, "probes": probes}
    print(json.dumps(result, indent=1))
    save_json(options.json, result)


if __name__ == "__main__":
    main()
