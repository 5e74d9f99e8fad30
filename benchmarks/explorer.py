"""How soon the explorer answers: from a key press on a slider to the changed photo and curve.

    python benchmarks/explorer.py [--run demo] [--moves 30] [--screenshot FOLDER] [--json PATH]

JupyterLab, its kernel and Chrome run on this machine. What is timed is what a person waits for: the
page itself notes when the key goes down, when the photo with the heat of the new layer or example
has loaded, and when the curve is drawn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from measuring import save_json

from probekit.paths import Home
from tests.support import lab

NOTEBOOK = "06_inspect_examples"
KEYS = {"layer": ("ArrowLeft", "ArrowRight"), "example": ("ArrowRight", "ArrowLeft")}
PRESSES_IN_A_ROW = 8


def measure(run: str, *, moves: int, screenshots: Path | None) -> dict[str, np.ndarray]:
    """Milliseconds of each key press, by the slider and by what changes."""
    milliseconds = defaultdict(list)
    rounds = moves // (2 * PRESSES_IN_A_ROW) + 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lab.prepare_notebooks(folder, {NOTEBOOK: {"run": run}})
        with lab.serve_notebooks(folder, Home.find().root) as url, lab.open_browser() as page:
            errors = lab.run_notebook(page, url, f"{NOTEBOOK}.ipynb")
            if errors:
                sys.exit(f"{NOTEBOOK} failed: {errors}")
            lab.scroll_to(page, "img.widget-image")
            lab.choose_option(page, "task", "category")
            page.wait_for_timeout(1000)
            for slider, keys in KEYS.items():
                handle = lab.slider_handle(page, slider)
                for key in keys * rounds:
                    for move in lab.measure_key_presses(page, handle, key, times=PRESSES_IN_A_ROW):
                        for changed, value in move.items():
                            milliseconds[f"{slider}_{changed}_ms"].append(value)
            if screenshots is not None:
                explorer = page.locator(".jp-OutputArea-output .widget-vbox").first
                explorer.screenshot(path=screenshots / "explorer_heat.png")
    return {name: np.array(values) for name, values in milliseconds.items()}


def main() -> None:
    """Measure, print, and write JSON where it is wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="demo")
    parser.add_argument("--moves", type=int, default=30)
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if lab.CHROME is None:
        sys.exit("no Chrome or Chromium on this machine: install one")
    measured = measure(options.run, moves=options.moves, screenshots=options.screenshot)
    result = {}
    for name, values in measured.items():
        median = round(float(np.median(values)), 1)
        p90 = round(float(np.quantile(values, 0.9)), 1)
        result[name] = {"median": median, "p90": p90, "n": len(values)}
        print(f"{name:20} median {median:6.1f}   90 % within {p90:6.1f}   of {len(values)}")
    save_json(options.json, result)


if __name__ == "__main__":
    main()
