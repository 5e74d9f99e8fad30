"""What was read of a dataset, what was corrected or left out, and why.

Readers note each kind of record once. Records read are records used plus records left out.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

REPORT_COLUMNS = ["source", "kind", "outcome", "count", "reason", "first"]
# What can be said of records: how many there were, what became of some of them.
OUTCOMES = ("read", "corrected", "left out", "used")


class ReadingReport:
    """Collects what became of the records of a dataset.

    A row says: of the `kind` (images, captions, instances, categories, statements) in `source`,
    `count` had this `outcome` (out of :data:`OUTCOMES`), for this `reason`; the `first` of them.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str, int, str, str]] = []

    def note(
        self,
        source: str | Path,
        kind: str,
        *,
        outcome: str,
        count: int,
        reason: str = "",
        first: object = "",
    ) -> None:
        """Add a row, unless `count` is 0 and says nothing that "read" does not."""
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome={outcome!r}: take one of {', '.join(OUTCOMES)}")
        if count or outcome in ("read", "used"):
            self._rows.append((str(source), kind, outcome, int(count), reason, str(first)))

    def table(self) -> pd.DataFrame:
        """Return the rows, with the columns :data:`REPORT_COLUMNS`."""
        return pd.DataFrame(self._rows, columns=REPORT_COLUMNS)

    def lines(self) -> list[str]:
        """Return a line for each correction, and for what was left out."""
        table = self.table()
        return report_lines(table[table.outcome.isin(["corrected", "left out"])])


def report_lines(report: pd.DataFrame) -> list[str]:
    """Return a line for each row of a report that has a reason."""
    lines = []
    for source, kind, outcome, count, reason, first in report.itertuples(index=False, name=None):
        example = f", such as {first}" if first else ""
        lines.append(f"{source}: {count:,} {kind} {outcome}: {reason}{example}")
    return lines
