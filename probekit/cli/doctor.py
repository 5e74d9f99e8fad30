"""What this machine has, and how to fix what it lacks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from probekit.paths import Home

CHROME_NAMES = ("google-chrome", "chromium", "chromium-browser", "chrome")
ENOUGH_CACHE_GB = 10
REINSTALL = "pip install -e . again, in the checkout"


class Finding(NamedTuple):
    """What a check found: whether it is fine, what is there, and the fix where it is not."""

    is_fine: bool
    text: str
    fix: str


def _versions(*packages: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in packages)


def check_python() -> Finding:
    """Look at Python's version."""
    is_fine = sys.version_info >= (3, 10)
    return Finding(is_fine, sys.version.split()[0], "install Python 3.10 or newer")


def check_torch() -> Finding:
    """Look whether torch and torchvision fit together."""
    fix = "torch and torchvision must be a matching pair: pip install -U torch torchvision"
    try:
        import torchvision.ops  # noqa: F401  # it fails where the pair does not match

        text = _versions("torch", "torchvision", "transformers", "timm")
    except (ImportError, RuntimeError) as error:
        return Finding(False, str(error).splitlines()[0], fix)
    return Finding(True, text, fix)


def check_device() -> Finding:
    """Look for a GPU."""
    from probekit.models.load import best_device, best_dtype

    device = best_device()
    fix = "CPU only: fine for the demo; large models want a GPU"
    return Finding(device != "cpu", f"{device} in {best_dtype(device)}", fix)


def check_coco() -> Finding:
    """Look for MS COCO in ``data/coco``."""
    from probekit.data.coco import LAYOUT, split_names

    home = Home.find()
    top = home.data / "coco"
    candidates = [top, *sorted(top.glob("*"))]
    descriptions = []
    for folder in candidates:
        if folder.name.startswith("scenes-"):
            continue
        splits = split_names(folder)
        if splits:
            descriptions.append(f"{home.relative(folder)} ({', '.join(splits)})")
    text = "; ".join(descriptions) or "none (drawn scenes only)"
    fix = f"put COCO into data/coco ({LAYOUT}), or use the drawn scenes"
    return Finding(bool(descriptions), text, fix)


def check_model_cache() -> Finding:
    """Look how much room the cache of the model hub has."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    existing = next(folder for folder in [cache, *cache.parents] if folder.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    fix = "make room, or set HF_HOME to a folder on a larger disk"
    return Finding(free_gb > ENOUGH_CACHE_GB, f"{HF_HUB_CACHE}, {free_gb:.0f} GB free", fix)


def check_chrome() -> Finding:
    """Look for a Chrome, which PNG and SVG files of figures need."""
    for name in CHROME_NAMES:
        path = shutil.which(name)
        if path:
            return Finding(True, path, "")
    return Finding(False, "none", "optional, for PNG files: install Chrome or Chromium")


def check_widgets() -> Finding:
    """Look for JupyterLab and its widgets."""
    try:
        text = _versions("jupyterlab", "ipywidgets", "anywidget", "papermill", "plotly")
    except PackageNotFoundError as error:
        return Finding(False, f"{error} is missing", REINSTALL)
    return Finding(True, text, "")


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": check_python,
    "torch": check_torch,
    "device": check_device,
    "COCO": check_coco,
    "model cache": check_model_cache,
    "Chrome": check_chrome,
    "widgets": check_widgets,
}


def report_lines() -> list[str]:
    """Return one line per check: is it fine, what was found, and the fix where it is not."""
    lines = []
    for name, check in CHECKS.items():
        try:
            finding = check()
        except Exception as error:  # a doctor that dies of the illness is no help
            finding = Finding(False, f"{type(error).__name__}: {str(error)[:200]}", REINSTALL)
        status = "ok" if finding.is_fine else "note"
        fix = "" if finding.is_fine else f"  ▸ {finding.fix}"
        lines.append(f"{status:<4}  {name:<12} {finding.text}{fix}")
    return lines
