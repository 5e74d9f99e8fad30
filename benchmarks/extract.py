"""Extraction against the plain way of the published study, and against the least that must be computed.

    python benchmarks/extract.py [--model 40M] [--images 48] [--prompts-per-image 3 10] [--quick] [--json PATH]

One process, the same random Qwen2-VL-shaped model, images and prompts for all:

plain   the study's way: the full model with its head, output_hidden_states, every image encoded for every prompt,
        batches of 8, mean pooling afterwards
ours    probekit.extract: preprocessing, forward passes, pooling, writing shards
floor   bare forward passes of the base model over exactly the tokens that must be computed (each image and prefix
        once, each prompt's own tokens once), inputs prepared beforehand, nothing read and nothing written

Ours and the floor run twice, in turn: the floor is held against the faster, plain against the mean of ours.
What probekit does once, whatever the number of images, is in its time: one prompt more, for the check of the way that
the model goes. The vocabulary is chosen so that the head has the share of the parameters that it has in Qwen2-VL-2B
(about 15 %).
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.utils.logging import disable_progress_bar

from probekit import paths
from probekit.data import scenes
from probekit.extraction import extract, loading, shards, store, worker
from probekit.images import load_rgb
from probekit.models import batches, forward, load

SIZES = {  # decoder width, layers, vision width, depth
    "tiny": (256, 6, 160, 4), "40M": (512, 10, 320, 8), "200M": (1024, 14, 640, 12), "500M": (1280, 20, 896, 20),
}


def make_model(size: str, folder: Path) -> Path:
    """Save a random Qwen2-VL of this size, which cuts photographs into patches as the real checkpoints do."""
    width, layers, vision, depth = SIZES[size]
    source = paths.Home.find().data / "models" / "tiny-qwen2-vl"
    config, processor = AutoConfig.from_pretrained(source), AutoProcessor.from_pretrained(source)
    config.vision_config.update({"depth": depth, "embed_dim": vision, "num_heads": vision // 80 or 1, "patch_size": 14,
                                 "hidden_size": width})
    config.text_config.update({
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "vocab_size": 16_384,
        "num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 256),
        "max_position_embeddings": 32768, "layer_types": ["full_attention"] * layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    })
    processor.image_processor.patch_size = 14
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_examples(folder: Path, images: int, k: int) -> pd.DataFrame:
    """Pictures of 640 x 480 pixels, each with k prompts."""
    rows = []
    (folder / "photos").mkdir(exist_ok=True)
    for i in range(images):
        rng = np.random.default_rng([1, i])
        scene = scenes.sample_scene(rng)
        file = folder / "photos" / f"{i}.jpg"
        if not file.exists():
            scenes.draw_scene(scene).resize((640, 480)).save(file, quality=90)
        texts = [text for _ in range(2 * k) for text in scenes.captions(scenes.sample_scene(rng), rng)]
        prompts = list(dict.fromkeys(f"This image contains: {text[:-1]}.\nIs this right?" for text in texts))[:k]
        assert len(prompts) == k
        rows += [{"image_id": i, "file": str(file), "prompt": text, "task": "caption"} for text in prompts]
    return pd.DataFrame(rows)


@torch.inference_mode()
def run_plain(folder: Path, examples: pd.DataFrame, dtype: str) -> tuple[float, np.ndarray]:
    """Seconds, and (n, l, d) mean-pooled states."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    vlm = load.load_vlm(str(folder), dtype=dtype, device="cpu")  # for its processor and chat template alone
    found, start = [], time.perf_counter()
    for at in range(0, len(examples), 8):
        rows = examples.iloc[at : at + 8]
        given = vlm.processor(images=[load_rgb(file) for file in rows.file], padding=True, padding_side="right",
                              text=[vlm.prompt_processor.wrap(prompt) for prompt in rows.prompt], return_tensors="pt")
        states = model(**vlm.place(given), output_hidden_states=True, use_cache=False).hidden_states
        mask = given["attention_mask"][..., None].float()
        found.append(torch.stack([(s.float() * mask).sum(1) / mask.sum(1) for s in states], 1))
    return time.perf_counter() - start, torch.cat(found).numpy()


def run_ours(folder: Path, examples: pd.DataFrame, dtype: str) -> tuple[float, np.ndarray]:
    """Seconds without loading the model, as the plain way is timed; (n, l, d)."""
    paths.Home.find().data = Path(tempfile.mkdtemp(dir=folder))  # nothing is found there already
    honest, loading_took = worker.load_vlm, []

    def timed(*arguments):
        start = time.perf_counter()
        vlm = honest(*arguments)
        loading_took.append(time.perf_counter() - start)
        return vlm

    worker.load_vlm = timed
    start = time.perf_counter()
    done: store.Activations = extract.extract(extract.ExtractionSettings(str(folder), dtype=dtype), examples, "cpu")
    seconds = time.perf_counter() - start - loading_took[0]
    worker.load_vlm = honest
    return seconds, np.stack([done[layer, "mean"] for layer in done.layers], 1)


@torch.inference_mode()
def run_floor(folder: Path, examples: pd.DataFrame, dtype: str) -> float:
    """Seconds of the bare forward passes, in the batches that extraction makes."""
    vlm = load.load_vlm(str(folder), dtype=dtype, device="cpu")
    ready = []
    works = loading.ahead(vlm.prompt_processor, None, [shards.rows_of(examples)], 0)
    for batch in loading.batches(works, lambda: 2048, lambda: "shared"):
        prepared = [work.prepared for work in batch]
        p, rows = batches.shared_prefix_length(prepared), [row for one in prepared for row in one.tokens]
        before = batches.batch_tokens(vlm, [{key: value[:p] for key, value in one.tokens[0].items()} for one in prepared])
        own = batches.batch_tokens(vlm, [{key: row[key][p:] for key in ("input_ids", "attention_mask")} for row in rows])
        owner = torch.tensor([i for i, one in enumerate(prepared) for _ in one.tokens])
        ready.append((before | batches.batch_images(vlm, prepared), own, owner, p))
    start = time.perf_counter()
    for given, own, owner, p in ready:
        cache = DynamicCache(config=vlm.stack.config)
        vlm.model(**given, **forward.caching(vlm.model, cache))
        cache.reorder_cache(owner)
        mask = torch.cat([own["attention_mask"].new_ones(len(owner), p), own["attention_mask"]], 1)
        vlm.stack(input_ids=own["input_ids"], attention_mask=mask, **forward.caching(vlm.stack, cache))
    return time.perf_counter() - start


def high_water_mb() -> float:
    """Peak memory of this process; getrusage would also count what its parent held when it started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def peak_rss(folder: Path, images: int, k: int, dtype: str) -> float:
    """Peak memory in MB of a process that only extracts."""
    code = ("import sys; sys.path.insert(0, 'benchmarks'); import extract as b; from pathlib import Path;"
            f"f = Path({str(folder)!r}); b.run_ours(f, b.make_examples(f, {images}, {k}), {dtype!r});"
            "print(b.high_water_mb())")
    root = Path(__file__).resolve().parent.parent
    return float(subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True,
                                text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="40M", choices=SIZES)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--prompts-per-image", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="fewer images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.images = 12
    disable_progress_bar()
    result: dict[str, float] = {"max_rel_diff": 0.0}
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_model(options.model, Path(temporary))
        run_ours(folder, make_examples(folder, 2, 2), options.dtype)  # warm up
        for k in options.prompts_per_image:
            examples = make_examples(folder, options.images, k)
            rounds = [(run_ours(folder, examples, options.dtype), run_floor(folder, examples, options.dtype))
                      for _ in range(2)]
            states, taken = rounds[0][0][1], [seconds for (seconds, _), _ in rounds]
            ours, floor = sum(taken) / 2, min(seconds for _, seconds in rounds)
            gc.collect()
            plain, reference = run_plain(folder, examples, options.dtype)
            gap = (np.abs(states - reference).max((0, 2)) / np.abs(reference).max((0, 2))).max()
            result["max_rel_diff"] = max(result["max_rel_diff"], float(gap))
            over = min(taken) / floor
            result |= {f"speedup_{k}": plain / ours, f"over_floor_{k}": over}
            result["over_floor"] = max(result.get("over_floor", 0), over)
            result.setdefault("images_per_s", options.images / ours)
            print(f"{k} prompts an image: plain {plain:.1f} s, ours {ours:.1f} s, floor {floor:.1f} s: "
                  f"{plain / ours:.2f} times faster, {over:.2f} of the floor, "
                  f"largest relative difference {gap:.1e}", flush=True)
        for name, images in (("peak_rss_mb", options.images), ("peak_rss_mb_double", 2 * options.images)):
            result[name] = peak_rss(folder, images, 3, options.dtype)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
