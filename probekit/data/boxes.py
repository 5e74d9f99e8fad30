"""Boxes of objects as exporters write them, in pixels of their images.

====================================================  ===========================================
boxes of a file                                       what they are
====================================================  ===========================================
x, y, w, h inside of their images                     read as they are
all numbers at most 1, and some broken                shares of width and height
many beyond their images, and none as corners         corners x, y, x, y
many beyond their images, and none around centres     centre x, centre y, w, h
some beyond their images                              cut off at the border; left out if all of it
                                                      lies beyond
====================================================  ===========================================
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
import pandas as pd

from probekit.data.report import ReadingReport
from probekit.images import TURNED, ImageSize

BOX = ["x", "y", "w", "h"]
ROUNDING = 1.0  # pixels that a box may reach beyond its image
MANY = 0.05  # share of boxes beyond their images from which they may be corners


def normalise_boxes(
    instances: pd.DataFrame, images: pd.DataFrame, *, source: str, report: ReadingReport
) -> pd.DataFrame:
    """Return the objects of a file with boxes in pixels, and areas where there are none.

    Parameters
    ----------
    instances : DataFrame
        ``image_id``, ``x``, ``y``, ``w``, ``h``, ``area`` (0: none) and others. Every image is
        known.
    images : DataFrame
        Indexed by ``image_id``, with ``width`` and ``height``; 0 where the size is not known.
    source : str
        Name of the file, for the report.
    report : ReadingReport
        Receives what is corrected or left out.

    Returns
    -------
    DataFrame
        As `instances`, without those whose box lies beyond its image.
    """
    if instances.empty:
        return instances
    size_n2 = images.loc[instances.image_id, ["width", "height"]].to_numpy(float)
    is_sized_n = (size_n2 > 0).all(1)
    box_n4 = instances[BOX].to_numpy(float)
    changed_n4 = box_n4
    if _are_shares(box_n4, is_sized_n):
        changed_n4 = box_n4 * np.tile(size_n2, 2)
        _note(report, source, "their boxes are shares of the image's width and height", instances)
    elif is_sized_n.any() and _reach_beyond(box_n4, size_n2)[is_sized_n].mean() > MANY:
        from_corners_n4 = np.hstack([box_n4[:, :2], box_n4[:, 2:] - box_n4[:, :2]])
        from_centres_n4 = np.hstack([box_n4[:, :2] - box_n4[:, 2:] / 2, box_n4[:, 2:]])
        if _are_boxes(from_corners_n4[is_sized_n], size_n2[is_sized_n]):
            changed_n4 = from_corners_n4
            _note(report, source, "their boxes are two corners, not x, y, width, height", instances)
        elif _are_boxes(from_centres_n4[is_sized_n], size_n2[is_sized_n]):
            changed_n4 = from_centres_n4
            _note(report, source, "their boxes are given by centre, width and height", instances)
    is_beyond_n = is_sized_n & _reach_beyond(changed_n4, size_n2)
    start_n2 = np.clip(changed_n4[:, :2], 0, size_n2)
    end_n2 = np.clip(changed_n4[:, :2] + changed_n4[:, 2:], 0, size_n2)
    is_outside_n = is_beyond_n & (end_n2 <= start_n2).any(1)
    is_cut_n = is_beyond_n & ~is_outside_n
    _note(report, source, "their boxes reach beyond the image: cut off", instances[is_cut_n])
    cut_n4 = np.hstack([start_n2, end_n2 - start_n2])
    changed_n4 = np.where(is_cut_n[:, None], cut_n4, changed_n4)
    outside = instances[is_outside_n]
    _note(report, source, "their boxes lie outside of the image", outside, outcome="left out")
    is_changed_n = (changed_n4 != box_n4).any(1)
    if is_changed_n.any():
        instances = instances.copy()
        instances[BOX] = changed_n4
    return _fill_areas(instances, source=source, report=report)[~is_outside_n]


def _are_shares(box_n4: np.ndarray, is_sized_n: np.ndarray) -> bool:
    """Tell whether all boxes are in shares of their images: up to 1, and not whole numbers."""
    is_share = (box_n4 >= 0).all() and (box_n4 <= 1).all()
    return bool(is_share and is_sized_n.all() and (box_n4 % 1 > 0).any())


def _are_boxes(box_n4: np.ndarray, size_n2: np.ndarray) -> bool:
    """Tell whether all make sense as x, y, w, h inside of their images."""
    return bool((box_n4[:, 2:] >= 0).all() and not _reach_beyond(box_n4, size_n2).any())


def _reach_beyond(box_n4: np.ndarray, size_n2: np.ndarray) -> np.ndarray:
    end_n2 = box_n4[:, :2] + box_n4[:, 2:]
    return ((box_n4[:, :2] < -ROUNDING) | (end_n2 > size_n2 + ROUNDING)).any(1)


def _fill_areas(instances: pd.DataFrame, *, source: str, report: ReadingReport) -> pd.DataFrame:
    """Take w times h where there is no area, or where all areas are shares of their images."""
    box_area_n = (instances.w * instances.h).to_numpy(float)
    area_n = instances.area.to_numpy(float)
    are_shares = bool((area_n <= 1).all() and (box_area_n > 4).any())
    lacks_n = (area_n == 0) | are_shares
    lacks_n &= box_area_n > 0
    if not lacks_n.any():
        return instances
    _note(report, source, "without an area in pixels: that of the box is taken", instances[lacks_n])
    filled = np.where(lacks_n, box_area_n, area_n)
    return instances.assign(area=filled)


def _note(
    report: ReadingReport,
    source: str,
    reason: str,
    instances: pd.DataFrame,
    *,
    outcome: str = "corrected",
) -> None:
    if len(instances):
        report.note(
            source,
            "instances",
            outcome=outcome,
            count=len(instances),
            reason=reason,
            first=_describe(instances),
        )


def _describe(instances: pd.DataFrame) -> str:
    first = instances.iloc[0]
    box = ", ".join(f"{first[name]:g}" for name in BOX)
    return f"{first.category} at [{box}] in image {first.image_id}"


class FittedBoxes(NamedTuple):
    """Images and objects in the pixels of the files.

    Attributes
    ----------
    images : DataFrame
        With the width and height of the files.
    instances : DataFrame
        With boxes in these pixels.
    reasons : dict
        By ``image_id``, why the boxes of an image cannot be placed.
    """

    images: pd.DataFrame
    instances: pd.DataFrame
    reasons: dict[Hashable, str]


def fit_to_files(
    images: pd.DataFrame,
    instances: pd.DataFrame,
    *,
    sizes: pd.DataFrame,
    report: ReadingReport,
) -> FittedBoxes:
    """Bring boxes into the pixels of the files, where annotations state another size.

    ========================================  =====================================================
    annotated size                            what the boxes are
    ========================================  =====================================================
    that of the file                          read as they are
    that of the file before EXIF turns it     turned along
    with width and height exchanged           read as they are, if they fit the file
    of the same shape, larger or smaller      scaled
    any other                                 not known: a reason to leave the image out
    ========================================  =====================================================

    Parameters
    ----------
    images : DataFrame
        Indexed by ``image_id``, with the annotated ``width`` and ``height``.
    instances : DataFrame
        Objects in these images.
    sizes : DataFrame
        Indexed by ``image_id``: ``width``, ``height`` and ``orientation`` of the files.
    report : ReadingReport
        Receives which images are annotated with another size.
    """
    sizes = sizes.loc[images.index]
    differs = (images[["width", "height"]] != sizes[["width", "height"]]).any(axis=1)
    reasons: dict[Hashable, str] = {}
    corrected: dict[str, list] = {}
    boxes_n4 = instances[BOX].to_numpy(dtype=float, copy=True)
    rows_of = instances.reset_index(drop=True).groupby("image_id").indices
    for image_id in images.index[differs]:
        annotated = ImageSize(*images.loc[image_id, ["width", "height"]].tolist())
        size = ImageSize(*sizes.loc[image_id, ["width", "height", "orientation"]].tolist())
        rows = rows_of.get(image_id, [])
        fitted = _fit_boxes(boxes_n4[rows], annotated, size)
        if fitted is None:
            reasons[image_id] = (
                f"has {size.width} x {size.height} pixels, and its boxes are those of an image of "
                f"{annotated.width} x {annotated.height}: take the image that was annotated"
            )
            continue
        boxes_n4[rows], words = fitted
        corrected.setdefault(words, []).append(image_id)
    for words, image_ids in corrected.items():
        report.note(
            "image files",
            "images",
            outcome="corrected",
            count=len(image_ids),
            reason=words,
            first=f"image {image_ids[0]}",
        )
    if corrected:
        instances = instances.copy()
        instances[BOX] = boxes_n4
    images = images.assign(width=sizes.width, height=sizes.height)
    return FittedBoxes(images, instances, reasons)


def _fit_boxes(
    box_n4: np.ndarray, annotated: ImageSize, size: ImageSize
) -> tuple[np.ndarray, str] | None:
    """Return boxes in the pixels of a file, and in words what was done; None if it is not known."""
    if not len(box_n4):
        return box_n4, "without boxes, annotated with another size than the file has"
    if size.orientation in TURNED and annotated[:2] == size.stored:
        return _turn(box_n4, size), "annotated before EXIF turns them: boxes are turned along"
    if annotated[:2] == (size.height, size.width):
        file_n2 = np.array([[size.width, size.height]], dtype=float)
        if _reach_beyond(box_n4, file_n2).any():
            return None
        return (
            box_n4,
            "their annotated size has width and height exchanged: that of the file is taken",
        )
    factors = size.width / annotated.width, size.height / annotated.height
    # Sides of a copy are rounded to whole pixels.
    errors = (
        abs(annotated.width * factors[1] - size.width),
        abs(annotated.height * factors[0] - size.height),
    )
    if min(errors) > 1:
        return None
    return box_n4 * np.tile(factors, 2), "larger or smaller than annotated: boxes are scaled"


def _turn(box_n4: np.ndarray, size: ImageSize) -> np.ndarray:
    """Turn boxes of the stored pixels as EXIF's orientation turns the image."""
    x_n, y_n, w_n, h_n = box_n4.T
    from_left_n = y_n if size.orientation in (5, 8) else size.width - y_n - h_n
    from_top_n = x_n if size.orientation in (5, 6) else size.height - x_n - w_n
    return np.stack([from_left_n, from_top_n, h_n, w_n], 1)
