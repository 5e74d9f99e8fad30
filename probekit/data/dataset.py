"""A dataset as tables, whatever layout it had on disk."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Dataset:
    """Tables of a COCO folder.

    Attributes
    ----------
    images : DataFrame, indexed by `image_id`: `coco_split`, `file` (path), `width`, `height` in pixels
    captions : DataFrame: `image_id`, `caption`
    instances : DataFrame: `image_id`, `category`, `x`, `y`, `w`, `h` in pixels, `area`, `iscrowd`, and `colour`
        where it is known (drawn scenes)
    categories : names in the order of their COCO ids
    """

    images: pd.DataFrame
    captions: pd.DataFrame
    instances: pd.DataFrame
    categories: tuple[str, ...]
