"""Full-size shapes with random weights through the whole way: time, memory, bytes; and what a study costs on GPUs.

    python benchmarks/full_size.py CONFIG.json --tokenizer FOLDER --photos FOLDER [--json PATH]

CONFIG.json is the config of a Qwen2-VL or FastVLM checkpoint, the tokenizer one of the Qwen2 family. Weights are drawn
at random, so the numbers say what it costs and nothing about what a model knows.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import pandas as pd
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

from probekit import paths
from probekit.extraction import extract, loading, shards, worker
from probekit.models import forward, load

DEVICES = {  # dense half-precision TFLOP/s and memory GB of the makers' data sheets; T4 in float16
    "H100 SXM": (989, 80), "RTX 4090": (165, 24), "T4": (65, 16),
}
UTILISATION = 0.35  # of the data sheet's rate: what large matrix products with attention in between usually reach
QWEN2_VL = ("object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end vision_pad "
            "image_pad video_pad")  # what Qwen2-VL adds to Qwen2's tokens, in this order
PROMPTS = ("This image contains the following types of object:", "This image contains: a man rides a brown horse.",
           "This image contains: two cups of coffee on a wooden table.")


def assemble(config: Path, tokenizer: Path, preprocessor: Path | None, folder: Path) -> Path:
    """A folder with the config, and a processor of its family with a real tokenizer; no weights."""
    values = json.loads(config.read_text())
    words = AutoTokenizer.from_pretrained(tokenizer)
    if values["model_type"] == "qwen2_vl":
        settings = json.loads(preprocessor.read_text()) if preprocessor else {}
        settings = {key: value for key, value in settings.items() if not key.endswith("_type")}
        words.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in QWEN2_VL.split()]})
        assert words.convert_tokens_to_ids("<|image_pad|>") == values["image_token_id"]
        shown = "<|vision_start|><|image_pad|><|vision_end|>"
        processor = Qwen2VLProcessor(Qwen2VLImageProcessor(**settings), words, Qwen2VLVideoProcessor(),
                                     chat_template=template(shown))
    else:
        words.add_special_tokens({"additional_special_tokens": ["<image>"]})
        values["image_token_index"] = words.convert_tokens_to_ids("<image>")
        square = {"height": 1024, "width": 1024}
        processor = LlavaProcessor(CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False), words,
                                   patch_size=64, vision_feature_select_strategy="full",
                                   chat_template=template("<image>"))
    processor.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def template(shown: str) -> str:
    return ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == "
            "'image' %}" + shown + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def measure(folder: Path, photos: list[Path], dtype: str) -> dict:
    """Extract all photos with the prompts, and count the operations of one of them."""
    examples = pd.DataFrame([{"image_id": i, "file": str(file), "prompt": f"{prompt}", "task": "caption"}
                             for i, file in enumerate(photos) for prompt in PROMPTS])
    settings = extract.ExtractionSettings(str(folder), dtype=dtype, untrained=True, batch_tokens=2048)
    honest, kept = worker.load_vlm, []
    worker.load_vlm = lambda *arguments: kept.append(honest(*arguments)) or kept[0]
    load.Vlm.release, released = lambda self: None, load.Vlm.release  # one initialisation is enough
    start = time.perf_counter()
    done = extract.extract(settings, examples, "cpu")
    whole = time.perf_counter() - start
    vlm = kept[0]
    work = next(iter(loading.ahead(vlm.prompt_processor, None, [shards.rows_of(examples)], 0)))
    counter = FlopCounterMode(display=False)
    start = time.perf_counter()
    with counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own attention is not counted
        forward.run_pooled(vlm, [work.prepared], poolings=["mean"], way="shared")
    one = time.perf_counter() - start
    shard = sum(file.stat().st_size for file in done.folder.glob("part-*/shard-*"))
    found = {
        "parameters": sum(p.numel() for p in vlm.model.parameters()), "layers": len(done.layers),
        "width": done[done.layers[-1], "mean"].shape[1], "image_tokens": int(work.prepared.image_masks[0].sum()),
        "tokens_an_image": work.tokens("shared"), "seconds_with_loading": whole, "seconds_an_image": one,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "bytes_an_example": shard / len(examples),
        "tflop_an_image": counter.get_total_flops() / 1e12, "sharing": done.meta["sharing"]["words"],
    }
    worker.load_vlm, load.Vlm.release = honest, released
    return found


def cost(found: dict, images: int = 22_000) -> pd.DataFrame:
    """Minutes by arithmetic: images x FLOP an image / (FLOP/s x utilisation)."""
    rows = []
    for device, (tflops, memory) in DEVICES.items():
        rate = tflops * UTILISATION / found["tflop_an_image"]
        rows.append({"device": device, "TFLOP/s": tflops, "images/s": rate, "minutes": images / rate / 60,
                     "weights GB": found["parameters"] * 2 / 1e9, "fits": found["parameters"] * 2 / 1e9 < 0.8 * memory,
                     "GB on disk": images * len(PROMPTS) * found["bytes_an_example"] / 1e9})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer of the Qwen2 family")
    parser.add_argument("--preprocessor", type=Path, help="preprocessor_config.json of the Qwen2-VL family")
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEG files")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    photos = sorted(options.photos.glob("*.jpg"))[: options.images]
    if not photos:
        raise SystemExit(f"no *.jpg in {options.photos}")
    with tempfile.TemporaryDirectory() as temporary:
        paths.Home.find().data = Path(temporary)
        folder = assemble(options.config, options.tokenizer, options.preprocessor, Path(temporary) / "checkpoint")
        found = measure(folder, photos, options.dtype)
    table = cost(found)
    print(json.dumps(found, indent=1), table.round(2).to_string(index=False), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(found | {"cost": table.to_dict("records")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
