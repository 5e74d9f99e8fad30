"""Selections of images, and what the examples of a task ask about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from probekit.data.coco import read_coco
from probekit.data.dataset import Dataset
from probekit.data.report import ReadingReport
from probekit.tasks.base import BuildSettings, Selection
from probekit.tasks.building import select_images


def select(folder: Path, *, dataset: Dataset | None = None, **settings) -> Selection:
    """Draw images from a COCO folder; `settings` are attributes of BuildSettings."""
    if dataset is None:
        dataset = read_coco(folder)
    selection, _ = select_images(
        BuildSettings(str(folder), **settings), dataset, report=ReadingReport()
    )
    return selection


def most_shown_categories(selection: Selection, count: int) -> Selection:
    """The same images, asked about the categories that most of them show."""
    names = selection.annotated_nc.sum().nlargest(count).index
    return replace(
        selection,
        shows_nc=selection.annotated_nc[names],
        unclear_nc=selection.annotated_unclear_nc[names],
    )


def binary_labels(examples: pd.DataFrame) -> np.ndarray:
    """The only label of each example, shape (n,)."""
    return np.array([labels[0] for labels in examples.labels])
