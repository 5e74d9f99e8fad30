"""probekit: what each layer of a vision-language model knows.

>>> import probekit as pk
>>> examples = pk.build_examples(
...     "data/coco", tasks=["caption"], train=2000, validation=500, test=500
... )
>>> activations = pk.extract("qwen2-vl-2b", examples, poolings=["mean", "last"])
>>> activations["lm.12", "mean"]  # (n examples, d)
>>> results = pk.probe(activations)
>>> results.plot("accuracy")
>>> used = pk.intervene(activations)

Letters for shapes, used in every docstring: n examples, l layers, t tokens, d width, c classes, s
seeds or strengths, b images or resamples, k suffixes of one image, p problems solved together (of
probes) or patches (of image encoders). A tensor whose rank is not obvious carries them in its name:
`hidden_ntd`.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probekit.extraction.store import Activations
    from probekit.models.load import load_vlm
    from probekit.probes.estimators import LayerwiseLogisticRegression
    from probekit.report.explorer import Explorer
    from probekit.report.results import Results
    from probekit.tasks.base import Task, example_rows
    from probekit.tasks.registry import TASKS
    from probekit.workflow import build_examples, extract, intervene, open_run, probe

__version__ = "0.2.0"

# Threads that wait for each other sleep instead of spinning, which takes the cores from whatever
# else runs on the machine. It is read when torch is imported, and changes no number.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Imported when they are used: torch and transformers take seconds.
_HOMES = {
    "build_examples": "probekit.workflow",
    "extract": "probekit.workflow",
    "probe": "probekit.workflow",
    "intervene": "probekit.workflow",
    "open_run": "probekit.workflow",
    "load_vlm": "probekit.models.load",
    "Activations": "probekit.extraction.store",
    "Results": "probekit.report.results",
    "Explorer": "probekit.report.explorer",
    "LayerwiseLogisticRegression": "probekit.probes.estimators",
    "TASKS": "probekit.tasks.registry",
    "Task": "probekit.tasks.base",
    "example_rows": "probekit.tasks.base",
}

__all__ = [
    "TASKS",
    "Activations",
    "Explorer",
    "LayerwiseLogisticRegression",
    "Results",
    "Task",
    "build_examples",
    "example_rows",
    "extract",
    "intervene",
    "load_vlm",
    "open_run",
    "probe",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'probekit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
