"""Images in which the asked object, all but it, or as much elsewhere is greyed.

Is an object read off the object itself, or off what surrounds it? An example keeps its prompt and
its labels; what it loses is a part of its image.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xxhash
from PIL import Image
from pycocotools import mask as run_lengths
from tqdm.auto import tqdm

from probekit import paths
from probekit.data.dataset import Dataset
from probekit.images import load_rgb
from probekit.tasks.base import asked_categories

IMAGE_CHANGES = ("only_object", "no_object", "no_box", "same_area")
GREY = 128
# Of an object that covers more of an image as much cannot be greyed elsewhere.
LARGEST_SHARE = 0.5
# So much of the object's area must be greyed elsewhere.
SMALLEST_MOVED = 0.9
# Places along the shorter side of an image that an area may be moved to.
PLACES = 60
# Share of an object's box and of its outline's that both must have in common.
SAME_BOX = 0.5


class NotChanged(ValueError):
    """Why an image cannot be changed, in a few words."""


@dataclass(frozen=True)
class ChangedImages:
    """Examples with changed images.

    Attributes
    ----------
    examples : DataFrame
        The examples whose image could be changed, once for each change, with the file of the
        changed image in `file`, and the columns `change` and `row`: the number of the example among
        those that were given.
    left_out : Series
        By (task, reason), the number of images that were not changed.
    """

    examples: pd.DataFrame
    left_out: pd.Series


class ImageChanger:
    """Changes images and writes them.

    Parameters
    ----------
    instances : DataFrame
        See :func:`probekit.tasks.building.load_instances`.
    dataset : Dataset or None
        With outlines, see :func:`probekit.tasks.building.load_outlines`; objects that have none
        are greyed by their boxes.
    folder : Path
        Where changed images go, as PNG files.
    home : Home
        Where relative files start.
    """

    def __init__(
        self, instances: pd.DataFrame, dataset: Dataset | None, *, folder: Path, home: paths.Home
    ) -> None:
        self._instances = dict(list(instances.groupby("image_id")))
        self._outlined = {}
        self._sizes = pd.DataFrame()
        if dataset is not None:
            self._outlined = dict(list(dataset.instances.groupby("image_id")))
            self._sizes = dataset.images[["width", "height"]]
        self._folder = folder
        self._home = home

    def change(self, examples: pd.DataFrame, changes: Sequence[str]) -> ChangedImages:
        """Change the images of examples that ask about objects.

        All examples that a task has of an image get the same changed image, those about an object
        that is not there as well: a model cannot tell them apart by the grey.

        Parameters
        ----------
        examples : DataFrame
            n examples, with the column `asked`.
        changes : sequence of str
            ``"only_object"``
                All but the objects that the task asks about and the image shows is grey.
            ``"no_object"``
                They are grey. Where outlines are known, they still show the object's shape.
            ``"no_box"``
                Their boxes are grey, which leaves no outline.
            ``"same_area"``
                As many pixels of the same shape are grey, elsewhere in the image.

        Returns
        -------
        ChangedImages

        Raises
        ------
        OSError
            An image cannot be read or written.
        """
        rows = examples.assign(row=np.arange(len(examples)))
        tables = []
        left_out = []
        files_by_region: dict[tuple[str, tuple[str, ...]], dict[str, Path]] = {}
        groups = rows.groupby(["task", "image_id"], sort=False)
        for (task, image_id), group in tqdm(groups, desc="changing images", unit="image"):
            source = group.file.iloc[0]
            asked = tuple(sorted(set().union(*asked_categories(group))))
            try:
                if (source, asked) not in files_by_region:
                    files = self._write(image_id, source, asked, changes=changes)
                    files_by_region[source, asked] = files
            except NotChanged as error:
                left_out.append((task, str(error)))
                continue
            files = files_by_region[source, asked]
            for change, file in files.items():
                tables.append(group.assign(file=self._home.relative(file), change=change))
        changed = pd.concat(tables, ignore_index=True) if tables else rows.head(0)
        counts = pd.Series(left_out, dtype=object).value_counts()
        return ChangedImages(changed.reset_index(drop=True), counts)

    def _write(
        self, image_id: Hashable, source: str, asked: Sequence[str], *, changes: Sequence[str]
    ) -> dict[str, Path]:
        """Return the file of each change of one image, and write those that are not there."""
        instances = self._instances.get(image_id)
        if instances is None:
            raise NotChanged("no object is annotated in it")
        names = sorted(set(asked).intersection(instances.category[~instances.tiny]))
        if not names:
            raise NotChanged("it shows none of the objects that are asked about")
        pixels_hw3 = np.array(load_rgb(self._home.resolve(source)))
        size = pixels_hw3.shape[1::-1]
        mask_hw = self._object_mask(image_id, names, size=size)
        grey = find_grey(mask_hw, seed=zlib.crc32(repr((source, names)).encode()))
        grey["no_box"] = _box_mask(instances[instances.category.isin(names)], size=size)
        key = xxhash.xxh3_64_hexdigest(pixels_hw3.tobytes() + mask_hw.tobytes())
        files = {}
        for change in changes:
            files[change] = self._folder / f"{image_id}-{key}-{change}.png"
            if not files[change].exists():
                changed_hw3 = np.where(grey[change][..., None], np.uint8(GREY), pixels_hw3)
                _write_png(files[change], changed_hw3)
        return files

    def _object_mask(
        self, image_id: Hashable, names: Sequence[str], *, size: tuple[int, int]
    ) -> np.ndarray:
        """(h, w) True at the pixels of the objects of some categories."""
        mask_hw = np.zeros(size[::-1], bool)
        for name in names:
            of_name = self._instances[image_id]
            of_name = of_name[of_name.category == name]
            outlined_hw = self._outline_mask(image_id, name, size=size)
            mask_hw |= _box_mask(of_name, size=size) if outlined_hw is None else outlined_hw
        return mask_hw

    def _outline_mask(
        self, image_id: Hashable, name: str, *, size: tuple[int, int]
    ) -> np.ndarray | None:
        """(h, w) True inside the outlines of a category; None where one of them is not known."""
        outlined = self._outlined.get(image_id)
        if outlined is None or "outline" not in outlined:
            return None
        outlined = outlined[outlined.category == name]
        annotated = tuple(self._sizes.loc[image_id].tolist())
        if outlined.empty or not _is_scaled(annotated, size):
            return None
        painted_hw = np.zeros(annotated[::-1], bool)
        for instance in outlined.to_dict("records"):
            mask_hw = paint_outline(instance, size=annotated)
            if mask_hw is None:
                return None
            painted_hw |= mask_hw
        return np.array(Image.fromarray(painted_hw).resize(size, Image.Resampling.NEAREST))


def find_grey(mask_hw: np.ndarray, *, seed: int) -> dict[str, np.ndarray]:
    """Find which pixels are greyed where an object, all but it, or as much elsewhere is.

    Parameters
    ----------
    mask_hw : ndarray of bool
        (h, w) True at the object.
    seed : int
        Of the place that its area is moved to.

    Returns
    -------
    dict of str to ndarray
        (h, w) True where a pixel is greyed.

    Raises
    ------
    NotChanged
        As much cannot be greyed elsewhere.
    """
    if mask_hw.mean() > LARGEST_SHARE:
        raise NotChanged(f"the object covers more than {LARGEST_SHARE:.0%} of it")
    stride = max(1, min(mask_hw.shape) // PLACES)
    coarse_hw = mask_hw[::stride, ::stride]
    # How much a mask and its moved copy have in common, for all moves at once.
    spectrum = np.fft.rfft2(coarse_hw)
    overlap_hw = np.fft.irfft2(spectrum * spectrum.conj(), s=coarse_hw.shape).round()
    moves = np.argwhere(overlap_hw == overlap_hw.min())
    rows, columns = stride * moves[np.random.default_rng(seed).integers(len(moves))]
    moved_hw = np.roll(mask_hw, (rows, columns), axis=(0, 1)) & ~mask_hw
    if moved_hw.sum() < SMALLEST_MOVED * mask_hw.sum():
        raise NotChanged("there is no room elsewhere for as large an area")
    return {"only_object": ~mask_hw, "no_object": mask_hw, "same_area": moved_hw}


def paint_outline(instance: Mapping[str, Any], *, size: tuple[int, int]) -> np.ndarray | None:
    """Paint the outline of an object.

    Parameters
    ----------
    instance : mapping
        Its `outline`, and its box `x`, `y`, `w`, `h`, in the pixels of `size`.
    size : tuple of int
        Annotated width and height.

    Returns
    -------
    ndarray of bool or None
        (h, w) True inside; None where there is no outline that fits the box.
    """
    width, height = size
    outline = instance["outline"]
    try:
        if isinstance(outline, dict):
            encoded = outline
            if isinstance(outline["counts"], list):
                encoded = run_lengths.frPyObjects(outline, height, width)
        else:
            polygons = [polygon.ravel().tolist() for polygon in outline if len(polygon) > 2]
            encoded = run_lengths.merge(run_lengths.frPyObjects(polygons, height, width))
        mask_hw = run_lengths.decode(encoded).astype(bool)
    except Exception:  # whatever the library raises, the box is there
        return None
    if mask_hw.shape != (height, width) or not mask_hw.any():
        return None
    of_box = _box_mask(pd.DataFrame([instance]), size=size)
    rows, columns = np.flatnonzero(mask_hw.any(1)), np.flatnonzero(mask_hw.any(0))
    of_outline = np.zeros_like(mask_hw)
    of_outline[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    if (of_box & of_outline).sum() < SAME_BOX * (of_box | of_outline).sum():
        return None
    return mask_hw


def _box_mask(instances: pd.DataFrame, *, size: tuple[int, int]) -> np.ndarray:
    width, height = size
    mask_hw = np.zeros((height, width), bool)
    for one in instances.itertuples():
        top, left = max(0, int(one.y)), max(0, int(one.x))
        mask_hw[top : int(np.ceil(one.y + one.h)), left : int(np.ceil(one.x + one.w))] = True
    return mask_hw


def _is_scaled(annotated: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Tell whether a file shows what was annotated, larger or smaller, but not turned."""
    width, height = size
    return min(annotated) > 0 and abs(annotated[0] * height / annotated[1] - width) <= 1


def _write_png(file: Path, pixels_hw3: np.ndarray) -> None:
    image = Image.fromarray(pixels_hw3)
    paths.write_atomic(file, lambda part: image.save(part, format="PNG", compress_level=1))
