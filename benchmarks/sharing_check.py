"""Which faults of sharing are noticed before a model is run that way.

    python benchmarks/sharing_check.py [--architectures qwen2_vl llava gemma3] [--device cpu]
                                       [--dtypes float32 bfloat16] [--alarms] [--json PATH]

Tiny random models run as few images and prompts as a run tries (four prompts in float32, eight in
bfloat16). Faults are planted into the way "shared": wrong positions, masked tokens, another image's
cache; plainly, beside a channel a thousand times the others, and beside a constant one. The check
must send the model another way, in float32 and in bfloat16. Without a fault it must not, for any
architecture of the table: `--alarms` counts them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import transformers
from measuring import save_json
from PIL import Image
from tqdm.auto import tqdm

from probekit.models.load import Vlm, load_vlm
from probekit.models.presets import read_checked_architectures
from probekit.models.processor import PreparedImage
from probekit.models.sharing import SharingVerdict, choose_way, take_few

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.architectures import save_checkpoint
from tests.support.planted_faults import FAULTS, OUTLIERS, plant_fault, plant_outlier

ARCHITECTURES = ("qwen2_vl", "llava", "gemma3")
DTYPES = ("float32", "bfloat16")
PROMPTS = (
    ("Is there a dog? one", "Is there a dog? A longer prompt, of more words", "Is there a dog?!"),
    ("Is there a cat?", "Is there a dog? yes, or no"),
    ("Is there a bird in it?", "Is there nothing"),
    ("Is this a street with two cars?", "Is it night?"),
)


def prepare_images(vlm: Vlm) -> list[PreparedImage]:
    """Make images of noise with several prompts, and take of them what a run tries."""
    rng = np.random.default_rng(0)
    prepared = []
    for prompts in PROMPTS:
        image = Image.fromarray(rng.integers(0, 255, (100, 120, 3), np.uint8))
        prepared.append(vlm.prompt_processor.prepare(image, prompts))
    return take_few(prepared, dtype=vlm.dtype)


def judge(vlm: Vlm, prepared: list[PreparedImage]) -> SharingVerdict:
    """The way that the check finds for a model, as it is at present."""
    stages = [stage for stage, layers in vlm.layers_of_stage.items() if layers]
    ways = ("shared", "encoded", "plain")
    return choose_way(vlm, prepared, poolings=("mean",), stages=stages, ways=ways)[0]


def try_faults(vlm: Vlm, architecture: str) -> list[dict]:
    """One row per outlier and fault, and one without a fault."""
    prepared = prepare_images(vlm)
    rows = []
    for outlier in OUTLIERS:
        for fault in (None, *FAULTS):
            with plant_outlier(outlier), plant_fault(vlm, fault):
                verdict = judge(vlm, prepared)
            rows.append(
                {
                    "architecture": architecture,
                    "dtype": vlm.dtype,
                    "channels": outlier,
                    "fault": fault or "none",
                    "way": verdict.way,
                    "is_right": (verdict.way == "shared") == (fault is None),
                    "reason": verdict.reason,
                }
            )
    return rows


def expected_way(architecture: str) -> str:
    """The way that the table of architectures says that a model goes."""
    row = read_checked_architectures().loc[architecture]
    if row["batches"] != "padded right":
        return "alone"
    if row["sharing"] == "exact":
        return "shared"
    return "encoded" if row["encoder once"] == "yes" else "plain"


def count_alarms(names: list[str], dtypes: list[str], *, device: str) -> list[dict]:
    """One row per architecture and dtype: the way that it goes, and the one of the table."""
    rows = []
    for name in tqdm(names, unit="architecture"):
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(name, Path(folder))
            for dtype in dtypes:
                vlm = load_vlm(folder, device=device, dtype=dtype)
                verdict = judge(vlm, prepare_images(vlm))
                expected = expected_way(name)
                rows.append(
                    {
                        "architecture": name,
                        "dtype": dtype,
                        "way": verdict.way,
                        "is_right": verdict.way == expected,
                        "reason": verdict.reason,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--alarms", nargs="*", help="architectures without a fault; none: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for name in options.architectures:
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(name, Path(folder))
            for dtype in options.dtypes:
                rows += try_faults(load_vlm(folder, device=options.device, dtype=dtype), name)
    table = pd.DataFrame(rows)
    print(table.pivot_table("is_right", ["fault", "channels"], "dtype", aggfunc="mean").to_string())
    print(f"{table.is_right.sum()} of {len(table)} settings are judged rightly")
    result = {"faults": rows}
    if options.alarms is not None:
        names = options.alarms or list(read_checked_architectures().index)
        result["alarms"] = count_alarms(names, options.dtypes, device=options.device)
        alarms = pd.DataFrame(result["alarms"])
        print(alarms[~alarms.is_right].to_string())
        print(f"{len(alarms) - alarms.is_right.sum()} of {len(alarms)} go another way")
    save_json(options.json, result)


if __name__ == "__main__":
    main()
