"""Processes that are forked from one that has done nothing but import, so they start at once."""

from __future__ import annotations

import multiprocessing

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
