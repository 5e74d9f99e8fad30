"""Boxes whose annotated image has another size than the file."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from probekit.data.boxes import BOX, fit_to_files
from probekit.data.report import ReadingReport
from probekit.images import EXIF_ORIENTATION, check_images, load_rgb

STORED = (60, 40)


def write_turned(file, *, box, orientation: int) -> None:
    """A white picture that is red in a box of its stored pixels."""
    x, y, w, h = box
    picture = Image.new("RGB", STORED, "white")
    picture.paste((255, 0, 0), (x, y, x + w, y + h))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    picture.save(file, exif=exif)


def fit(file, box, annotated):
    images = pd.DataFrame({"file": [str(file)], "width": annotated[0], "height": annotated[1]})
    instances = pd.DataFrame([[0, *box]], columns=["image_id", *BOX])
    report = ReadingReport()
    fitted = fit_to_files(images, instances, sizes=check_images(images), report=report)
    return fitted, report.table()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_the_stored_picture_are_turned_with_it(tmp_path, orientation):
    file = tmp_path / "turned.png"
    write_turned(file, box=(10, 5, 20, 15), orientation=orientation)
    fitted, report = fit(file, (10, 5, 20, 15), STORED)
    assert fitted.images[["width", "height"]].iloc[0].tolist() == [40, 60]
    is_red_hw = np.asarray(load_rgb(file))[:, :, 1] == 0
    rows, columns = np.nonzero(is_red_hw)
    expected = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert fitted.instances[BOX].iloc[0].tolist() == expected
    assert report.outcome.tolist() == ["corrected"]


def test_boxes_of_the_picture_as_it_is_seen_stay(tmp_path):
    file = tmp_path / "turned.png"
    write_turned(file, box=(10, 5, 20, 15), orientation=6)
    fitted, report = fit(file, (1, 2, 3, 4), (40, 60))
    assert fitted.instances[BOX].iloc[0].tolist() == [1, 2, 3, 4]
    assert report.empty


@pytest.mark.parametrize(
    ("annotated", "box", "expected"),
    [
        ((60, 40), [1, 2, 3, 4], [1, 2, 3, 4]),
        ((120, 80), [10, 20, 30, 40], [5, 10, 15, 20]),
        ((40, 60), [1, 2, 3, 4], [1, 2, 3, 4]),  # width and height exchanged
        ((40, 60), [1, 45, 3, 10], None),
        ((70, 40), [1, 2, 3, 4], None),
    ],
)
def test_boxes_of_another_size_are_scaled_or_refused(tmp_path, annotated, box, expected):
    file = tmp_path / "plain.png"
    Image.new("RGB", (60, 40)).save(file)
    fitted, _ = fit(file, box, annotated)
    if expected is None:
        assert "has 60 x 40 pixels" in fitted.reasons[0]
        return
    assert not fitted.reasons
    assert fitted.instances[BOX].iloc[0].tolist() == expected
    assert fitted.images[["width", "height"]].iloc[0].tolist() == [60, 40]
