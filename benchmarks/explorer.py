"""How soon the explorer answers: from a key press on a slider to the changed picture and curve, in a real JupyterLab.

    python benchmarks/explorer.py [--run demo] [--moves 30] [--screenshot FOLDER] [--json PATH]

Chrome, JupyterLab and kernel run on this machine. What is timed is what a person waits for: the page itself notes when
the key goes down, when the photo with the heat of the new layer or example has loaded, and when the curve is drawn.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import lab  # noqa: E402

from probekit import paths  # noqa: E402


def choose(page, name: str, value: str) -> None:
    box = page.locator(".widget-dropdown", has=page.locator(".widget-label", has_text=name))
    box.locator("select").select_option(value)
    page.wait_for_timeout(1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="demo")
    parser.add_argument("--moves", type=int, default=30)
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not lab.CHROME:
        sys.exit("no Chrome or Chromium: install one")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        lab.prepare(Path(folder), {"05_inspect_examples": {"run": options.run}})
        with lab.served(Path(folder), paths.Home.find().root) as url, lab.browser() as page:
            errors = lab.run_all(page, url, "05_inspect_examples.ipynb")
            if errors:
                sys.exit(f"05_inspect_examples failed: {errors}")
            lab.show(page, "img.widget-image")
            choose(page, "task", "category")
            for name, keys in (("layer", ("ArrowLeft", "ArrowRight")), ("example", ("ArrowRight", "ArrowLeft"))):
                handle, moves = lab.slider(page, name), []
                for key in keys * (options.moves // 16 + 1):
                    moves += lab.latencies(page, handle, key, 8)
                for what in ("picture", "curve"):
                    found[f"{name}_{what}_ms"] = np.array([move[what] for move in moves if what in move])
            if options.screenshot:
                page.locator(".jp-OutputArea-output .widget-vbox").first.screenshot(
                    path=options.screenshot / "explorer_heat.png")
    told = {name: {"median": round(float(np.median(ms)), 1), "p90": round(float(np.quantile(ms, 0.9)), 1),
                   "n": len(ms)} for name, ms in found.items()}
    for name, row in told.items():
        print(f"{name:20} median {row['median']:6.1f}   90 % within {row['p90']:6.1f}   of {row['n']}")
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
