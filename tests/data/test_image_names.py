"""Names that tables give to images: matched where one image is meant, listed where none is."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.data.image_names import match_names
from probekit.data.report import ReadingReport

COMPOSED = unicodedata.normalize("NFC", "café.jpg")
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


def images_of(*files: str) -> pd.DataFrame:
    return pd.DataFrame({"file": [f"/d/{file}" for file in files]}, index=range(len(files)))


@pytest.mark.parametrize(
    ("name", "file", "rule"),
    [
        ("1.jpg", "1.jpg", ""),
        (" 1.jpg#3 ", "1.jpg", ""),
        ("./val/1.jpg", "val/1.jpg", ""),
        ("val\\1.jpg", "val/1.jpg", ""),
        ("../val/x/../1.jpg", "val/1.jpg", ""),
        ("/d/val/1.jpg", "val/1.jpg", ""),
        (COMPOSED, DECOMPOSED, "Unicode form"),
        (DECOMPOSED, COMPOSED, "Unicode form"),
        ("caf%C3%A9.jpg", DECOMPOSED, "percent signs"),
        ("my photo.jpg", "my%20photo.jpg", "percent signs"),
        ("IMG_1.JPG", "img_1.jpg", "capitals"),
        ("VAL/1.jpg", "val/1.jpg", "capitals"),
        ("1", "1.jpg", "ending"),
        ("1.png", "1.JPEG", "ending"),
        ("a.b", "a.b.jpg", "ending"),
        ("COCO_val2014_000000000012.jpg", "000000000012.jpg", "COCO release"),
        ("val2014/COCO_val2014_000000000012.jpg", "000000000012.jpg", "COCO release"),
        ("photos\\1.jpg", "1.jpg", "folders"),
        ("/home/me/photos/1.JPG", "1.jpg", "folders, capitals"),
        ("https://x.y/photos/1.jpg", "images/1.jpg", "folders"),
    ],
)
def test_a_name_is_matched_by_the_first_rule_that_fits(name, file, rule):
    matches = match_names([name], images_of("other.jpg", file))
    assert matches.image_of == {name: 1}
    assert list(matches.differing) == [rule] * bool(rule)
    assert not matches.unmatched
    report = ReadingReport()
    matches.note(report, Path("a.csv"))
    assert len(report.lines()) == bool(rule)
    for line in report.lines():
        assert f"1 names of images corrected: they differ from the files' in: {rule}" in line
        assert f"{name}, read as {Path(file).name}" in line


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["2.jpg"], ["1.jpg"]),
        (["val/1.jpg"], ["train/1.jpg"]),  # another split's image of this name
        (["../../etc/passwd", "..", "", ".", "/", "\0.jpg"], ["1.jpg"]),
        (["000000000012.jpg"], ["12.jpg"]),
        (["A.jpg"], ["a.jpg", "a.JPG"]),
        (["1"], ["1.jpg", "1.png"]),
        (["a.JPG", "A.jpg"], ["a.jpg"]),  # one of them is of an image that is missing
        (["photos/1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["a.b"], ["a.jpg"]),
    ],
)
def test_what_fits_nothing_or_several_is_listed(names, files):
    matches = match_names(names, images_of(*files))
    assert matches.image_of == {}
    assert matches.unmatched == names


def test_a_name_means_no_image_that_another_name_fits_better():
    matches = match_names(["1.png", "1.jpg"], images_of("1.jpg"))
    assert matches.image_of == {"1.jpg": 0}
    assert matches.unmatched == ["1.png"]


def test_a_name_that_is_exactly_that_of_several_images_is_refused():
    with pytest.raises(ValueError, match=r"^1\.jpg is the name of 2 images: write the folders"):
        match_names(["1.jpg"], images_of("a/1.jpg", "b/1.jpg"))


def test_names_of_a_table_start_at_its_folder():
    images = images_of("a/1.jpg", "b/1.jpg", "b/2.jpg", "1.jpg")
    assert match_names(["1.jpg"], images, folder=Path("/d/b")).image_of == {"1.jpg": 1}
    assert match_names(["1.jpg"], images, folder=Path("/d")).image_of == {"1.jpg": 3}
    assert match_names(["../b/1.jpg"], images, folder=Path("/d/a")).image_of == {"../b/1.jpg": 1}
    assert match_names(["2.jpg"], images, folder=Path("/d/a")).unmatched == ["2.jpg"]
    assert match_names(["2.jpg"], images, folder=Path("/d/tables")).image_of == {"2.jpg": 2}


LETTERS = st.sampled_from(["a", "A", "é", "e\u0301", "%C3%A9", "/", "\\", ".", ".jpg", ".png", " "])
NAMES = st.lists(st.lists(LETTERS, min_size=1, max_size=5).map("".join), max_size=6, unique=True)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(names=NAMES, files=NAMES)
def test_every_name_is_matched_or_listed(names, files):
    try:
        matches = match_names(names, images_of(*(file.strip("/") + "x.jpg" for file in files)))
    except ValueError as error:
        assert "is the name of" in str(error)  # noqa: PT017 (matches are as good as an error)
        return
    assert {*matches.image_of, *matches.unmatched} == set(names)
    assert len(matches.image_of) + len(matches.unmatched) == len(names)
    assert sum(map(len, matches.differing.values())) <= len(matches.image_of)
