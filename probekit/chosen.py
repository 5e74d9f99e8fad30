"""What tasks are built from, and what a task is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Chosen:
    """What a task is built from: images with their `split`, their captions, and which categories each one shows."""

    images: pd.DataFrame
    captions: pd.Series
    shows_nc: pd.DataFrame
    seed: int


@dataclass(frozen=True)
class Task:
    """`kind` is ``"binary"`` or ``"multilabel"``; `build(chosen, rng)` returns the rows."""

    kind: str
    build: Callable[[Chosen, np.random.Generator], pd.DataFrame]
    question: str
