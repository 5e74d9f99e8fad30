"""How soon the explorer answers: from a key press to the changed photo and curve.

    python benchmarks/explorer.py [--run demo] [--moves 20] [--screenshot FOLDER] [--json PATH]

JupyterLab, its kernel and Chrome run on this machine, in a window of 1280 x 800 pixels. What is
timed is what a person waits for: the page itself notes when the key goes down, and when the photo
with the heat of the new layer or example has been painted, and the curve. `--screenshot` writes
`explorer.png` as the README has it: the explorer as it opens, in 256 colours.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from io import BytesIO
from pathlib import Path

import numpy as np
from measuring import save_json
from PIL import Image

from probekit.paths import Home
from tests.support import lab

NOTEBOOK = "06_inspect_examples"
SCREEN = {"width": 1280, "height": 800}
KEYS = {"layer": ("ArrowDown", "ArrowUp"), "example": ("ArrowRight", "ArrowLeft")}
MOST_PRESSES_IN_A_ROW = 5  # of layers, which come to an end


def measure(run: str, *, moves: int, screenshots: Path | None) -> dict[str, np.ndarray]:
    """Milliseconds of each key press, by what it moves and by what changes."""
    milliseconds = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lab.prepare_notebooks(folder, {NOTEBOOK: {"run": run}})
        with lab.serve_notebooks(folder, Home.find().root) as url, lab.open_browser() as page:
            page.set_viewport_size(SCREEN)
            errors = lab.run_notebook(page, url, f"{NOTEBOOK}.ipynb", interface="lab")
            if errors:
                sys.exit(f"{NOTEBOOK} failed: {errors}")
            explorer = lab.show_explorer(page)
            page.wait_for_timeout(2000)  # until JupyterLab itself has finished
            if screenshots is not None:
                screenshot = Image.open(BytesIO(page.screenshot())).convert("RGB")
                palette = screenshot.quantize(256, kmeans=1)
                reduced = screenshot.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
                reduced.save(screenshots / "explorer.png", optimize=True)
            for moved, keys in KEYS.items():
                for done in range(0, moves, MOST_PRESSES_IN_A_ROW):
                    key = keys[done // MOST_PRESSES_IN_A_ROW % 2]
                    times = min(MOST_PRESSES_IN_A_ROW, moves - done)
                    for move in lab.measure_key_presses(page, explorer, key, times=times):
                        for changed, value in move.items():
                            milliseconds[f"{moved}_{changed}_ms"].append(value)
    return {name: np.array(values) for name, values in milliseconds.items()}


def main() -> None:
    """Measure, print, and write JSON where it is wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="demo")
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if lab.CHROME is None:
        sys.exit("no Chrome or Chromium on this machine: install one")
    measured = measure(options.run, moves=options.moves, screenshots=options.screenshot)
    result = {}
    for name, values in measured.items():
        median = round(float(np.median(values)), 1)
        slowest = round(float(values.max()), 1)
        result[name] = {"median": median, "slowest": slowest, "n": len(values)}
        print(f"{name:20} median {median:6.1f}   slowest {slowest:6.1f}   of {len(values)}")
    save_json(options.json, result)


if __name__ == "__main__":
    main()
