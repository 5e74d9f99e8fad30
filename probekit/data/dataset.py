"""A dataset as tables, whatever layout it has on disk."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from probekit.data.report import REPORT_COLUMNS


@dataclass(frozen=True)
class Dataset:
    """Images, their captions, and the objects that are annotated in them.

    Attributes
    ----------
    images : DataFrame
        One row per image, indexed by ``image_id``: ``coco_split``, ``file`` (path), and ``width``
        and ``height`` in pixels.
    captions : DataFrame
        One row per caption: ``image_id``, ``caption``.
    instances : DataFrame
        One row per object: ``image_id``, ``category``, its box ``x``, ``y``, ``w``, ``h`` in
        pixels, ``area`` in square pixels, ``iscrowd``, and ``colour`` (of drawn scenes only); where
        it was asked for also ``outline``: a list of polygons (t, 2) in pixels, or a run-length
        encoding of COCO's, None without one.
    categories : tuple of str
        Names, in the order of their COCO ids.
    report : DataFrame
        What was read, corrected and left out, see :class:`probekit.data.report.ReadingReport`.
    """

    images: pd.DataFrame
    captions: pd.DataFrame
    instances: pd.DataFrame
    categories: tuple[str, ...]
    report: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=REPORT_COLUMNS))
