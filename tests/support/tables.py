"""Small tables that several tests share."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd


def with_task_info(
    table: pd.DataFrame, kind: str, classes: Sequence[str] = ("match",), question: str = "?"
) -> pd.DataFrame:
    """The examples with the columns that say what their task is."""
    return table.assign(kind=kind, classes=[list(classes)] * len(table), question=question)
