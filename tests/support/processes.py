"""Processes that are forked from one that has done nothing but import, so they start at once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

# Left to itself, glibc keeps freed memory or not as threads happen to run, and the same work peaks
# 10 % higher or lower. A process that starts with these gives large blocks back at once.
STEADY_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}

PROCESSES = multiprocessing.get_context("forkserver")

# What loading a model imports takes the longest.
PROCESSES.set_forkserver_preload(
    [
        "probekit.extraction.extracting",
        "probekit.probes.probing",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.processing_auto",
        "transformers.models.qwen2_vl.modeling_qwen2_vl",
        "transformers.models.qwen2_vl.processing_qwen2_vl",
    ]
)


def run_script(words: list[str], environment: dict[str, str], output: Path) -> None:
    """Go on as ``python words``, with the output of both kinds in a file; for a process of its own.

    The first word is the absolute path of the script, whose folder is looked in for modules.
    """
    import torch

    os.environ.clear()
    os.environ.update(environment)
    with output.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
