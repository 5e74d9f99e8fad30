"""Tables of captions, whatever stands in them: every row is used, or left out for a reason."""

from __future__ import annotations

import csv

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probekit.data.caption_tables import read_captions
from probekit.data.report import ReadingReport

IMAGES = pd.DataFrame({"file": ["a.jpg", "b.png", "val/c.jpg", "caf\u00e9.jpg"]})
# Names, and the number of the image that they may mean.
NAMES = {
    "a.jpg": 0,
    "A.JPG": 0,
    "a": 0,
    "b.png": 1,
    "b.jpg#0": 1,
    "c.jpg": 2,
    "val\\c.jpg": 2,
    "cafe\u0301.jpg": 3,
    "x.jpg": None,
    "": None,
}
# Fields, and the captions in them.
CAPTIONS = {
    "a cup": ["a cup"],
    "a car, red": ["a car, red"],
    '["a", "b"]': ["a", "b"],
    "[a]": ["[a]"],
    "": [],
    " . ": [],
    "一只狗": ["一只狗"],
}
ROWS = st.tuples(st.sampled_from(sorted(NAMES)), st.sampled_from(sorted(CAPTIONS)))
TABLES = st.lists(st.lists(ROWS, min_size=1, max_size=6), max_size=2)


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(tables=TABLES, max_bad=st.sampled_from([0.0, 1.0]))
def test_rows_are_used_or_left_out_for_a_reason(tmp_path, tables, max_bad):
    files = []
    for k, rows in enumerate(tables):
        files.append(tmp_path / f"{k}.csv")
        with files[-1].open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([("image", "caption"), *rows])
    report = ReadingReport()
    images = IMAGES.assign(file=[str(tmp_path / file) for file in IMAGES.file])
    try:
        captions = read_captions(tmp_path, files, images, max_bad=max_bad, report=report)
    except ValueError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017 (captions are as good as an error)
        return
    rows_of_report = report.table()
    rows_of_report = rows_of_report[rows_of_report.kind == "captions"]
    counts = rows_of_report.groupby(["source", "outcome"])["count"].sum()
    for file, rows in zip(files, tables, strict=True):
        filled = [field for name, field in rows if name or field.strip()]
        assert counts[str(file), "read"] == sum(max(1, len(CAPTIONS[one])) for one in filled)
        left_out = counts.get((str(file), "left out"), 0)
        assert counts[str(file), "read"] == counts[str(file), "used"] + left_out
    assert rows_of_report[rows_of_report.outcome == "used"]["count"].sum() == len(captions)
    meant = {
        (NAMES[name], text) for rows in tables for name, field in rows for text in CAPTIONS[field]
    }
    assert set(captions.itertuples(index=False, name=None)) <= meant
    if max_bad == 0 and captions.image_id.nunique() < len(images):
        assert not rows_of_report.reason.str.contains("name fits no image").any()
