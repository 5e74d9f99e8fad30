"""What this machine has, and how to mend what it lacks."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from probekit import paths


def _packages(*names: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in names)


def _python() -> tuple[bool, str, str]:
    return sys.version_info >= (3, 10), sys.version.split()[0], "install Python 3.10 or newer"


def _torch() -> tuple[bool, str, str]:
    mend = "torch and torchvision must be a matching pair: pip install -U torch torchvision"
    try:
        import torchvision.ops  # noqa: F401 (fails where the pair does not match)

        return True, _packages("torch", "torchvision", "transformers", "timm"), mend
    except (ImportError, RuntimeError) as error:
        return False, str(error).splitlines()[0], mend


def _device() -> tuple[bool, str, str]:
    from probekit.models.load import best_device, best_dtype

    device = best_device()
    return device != "cpu", f"{device} in {best_dtype(device)}", "CPU only: fine for the demo; large models want a GPU"


def _coco() -> tuple[bool, str, str]:
    from probekit.data.coco import LAYOUT, split_names

    folders = sorted(p for p in (paths.Home.find().data / "coco").glob("*") if not p.name.startswith("scenes-"))
    holds = {p: split_names(p) for p in [paths.Home.find().data / "coco", *folders]}
    found = [f"{paths.Home.find().relative(p)} ({', '.join(splits)})" for p, splits in holds.items() if splits]
    mend = f"put COCO into data/coco ({LAYOUT}), or use the drawn scenes"
    return bool(found), "; ".join(found) or "none (drawn scenes only)", mend


def _cache() -> tuple[bool, str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    there = next(p for p in [Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents] if p.exists())
    free = shutil.disk_usage(there).free / 1e9
    return free > 10, f"{HF_HUB_CACHE}, {free:.0f} GB free", "make room, or set HF_HOME to a folder on a larger disk"


def _chrome() -> tuple[bool, str, str]:
    found = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser", "chrome"))), None)
    return bool(found), found or "none", "optional, for PNG files: install Chrome or Chromium"


def _widgets() -> tuple[bool, str, str]:
    try:
        return True, _packages("jupyterlab", "ipywidgets", "anywidget", "papermill", "plotly"), ""
    except PackageNotFoundError as error:
        return False, f"{error} is missing", "pip install -e ."


CHECKS = {"Python": _python, "torch": _torch, "device": _device, "COCO": _coco, "model cache": _cache,
          "Chrome": _chrome, "widgets": _widgets}


def report() -> list[str]:
    """One line a check: whether it is fine, what was found, and the mend where it is not."""
    lines = []
    for name, check in CHECKS.items():
        try:
            fine, found, mend = check()
        except Exception as error:  # a doctor that dies of the illness is no help
            fine, found, mend = False, f"{type(error).__name__}: {str(error)[:200]}", "pip install -e . again"
        lines.append(f"{'ok  ' if fine else 'note'}  {name:<12} {found}{'' if fine else f'  ▸ {mend}'}")
    return lines
