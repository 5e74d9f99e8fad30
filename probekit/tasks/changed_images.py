"""Images in which the asked object, all but it, or as much elsewhere is greyed.

Is an object read off the object itself, or off what surrounds it? An example keeps its prompt and
its labels; what it loses is a part of its image.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
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
# An object, or its box, may cover as much of an image: else too little is left of the rest.
LARGEST_SHARE = 0.5
# At least this share of the object's area must find room elsewhere.
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
        self._instances = instances
        self._outlined_by_image: dict[int, pd.DataFrame] = {}
        self._sizes = pd.DataFrame()
        if dataset is not None:
            if "outline" in dataset.instances:
                self._outlined_by_image = dict(list(dataset.instances.groupby("image_id")))
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
            What is grey. The objects are those that the task asks about and the image shows.

            ``"only_object"``
                Everything but the objects.
            ``"no_object"``
                The objects. Where their outlines are known, the grey has their shape.
            ``"no_box"``
                The boxes of the objects.
            ``"same_area"``
                Other pixels, of about the number and shape of the objects. The shape is moved;
                where it fits nowhere else, it goes out on one side and comes in on the other.

        Returns
        -------
        ChangedImages

        Raises
        ------
        OSError
            An image cannot be read or written.
        """
        rows = examples.assign(row=np.arange(len(examples)))
        is_of_these = self._instances.image_id.isin(rows.image_id.unique())
        instances_by_image = dict(list(self._instances[is_of_these].groupby("image_id")))
        no_instances = self._instances.head(0)
        tables = []
        left_out = []
        regions: dict[tuple[str, tuple[str, ...]], _Region | NotChanged] = {}
        groups = rows.groupby(["task", "image_id"], sort=False)
        for (task, image_id), group in tqdm(groups, desc="changing images", unit="image"):
            source = group.file.iloc[0]
            asked = tuple(sorted(set().union(*asked_categories(group))))
            if (source, asked) not in regions:
                instances = instances_by_image.get(image_id, no_instances)
                regions[source, asked] = self._change_one(
                    source, select_asked(instances, asked), changes
                )
            region = regions[source, asked]
            if isinstance(region, NotChanged):
                left_out.append((task, str(region)))
                continue
            for change, file in region.files.items():
                tables.append(group.assign(file=self._home.relative(file), change=change))
        by_box = [one for one in regions.values() if isinstance(one, _Region) and one.is_by_box]
        if by_box:
            tqdm.write(
                f"{len(by_box)} of {len(regions)} images: objects are greyed by their boxes, since "
                "their annotations have no outline that fits"
            )
        changed = pd.concat(tables, ignore_index=True) if tables else rows.head(0)
        counts = pd.Series(left_out, dtype=object).value_counts()
        return ChangedImages(changed.reset_index(drop=True), counts)

    def _change_one(
        self, source: str, instances: pd.DataFrame, changes: Sequence[str]
    ) -> _Region | NotChanged:
        """Write the changes of one image that are not there yet; or return why it has none."""
        if instances.empty:
            return NotChanged("it shows none of the objects that are asked about")
        pixels_hw3 = np.array(load_rgb(self._home.resolve(source)))
        size = pixels_hw3.shape[1::-1]
        box_hw = _box_mask(instances, size=size)
        outlined_hw = self._outline_mask(instances, size=size)
        mask_hw = box_hw if outlined_hw is None else outlined_hw
        if box_hw.mean() > LARGEST_SHARE:
            return NotChanged(f"the object’s box covers more than {LARGEST_SHARE:.0%} of it")
        try:
            grey = find_grey(mask_hw, seed=zlib.crc32(source.encode()))
        except NotChanged as error:
            return error
        grey["no_box"] = box_hw
        files = {}
        for change in changes:
            changed_hw3 = np.where(grey[change][..., None], np.uint8(GREY), pixels_hw3)
            # Named by what it shows: an image that is there need not be written again.
            files[change] = self._folder / f"{xxhash.xxh3_128_hexdigest(changed_hw3.tobytes())}.png"
            if not files[change].exists():
                _write_png(files[change], changed_hw3)
        return _Region(files, is_by_box=outlined_hw is None)

    def _outline_mask(self, instances: pd.DataFrame, *, size: tuple[int, int]) -> np.ndarray | None:
        """(h, w) True inside the outlines of an image's objects; None where one is not known."""
        image_id = instances.image_id.iloc[0]
        outlined = self._outlined_by_image.get(image_id)
        if outlined is None:
            return None
        outlined = outlined[outlined.category.isin(instances.category.unique())]
        if set(outlined.category) != set(instances.category):
            return None
        annotated = tuple(self._sizes.loc[image_id].tolist())
        if not _is_scaled(annotated, size):
            return None
        painted_hw = np.zeros(annotated[::-1], bool)
        for instance in outlined.to_dict("records"):
            mask_hw = paint_outline(instance, size=annotated)
            if mask_hw is None:
                return None
            painted_hw |= mask_hw
        return np.array(Image.fromarray(painted_hw).resize(size, Image.Resampling.NEAREST))


@dataclass(frozen=True)
class _Region:
    """The changed images of one image with its asked objects, and whether outlines were lacking."""

    files: dict[str, Path]
    is_by_box: bool


def select_asked(instances: pd.DataFrame, asked: Sequence[str]) -> pd.DataFrame:
    """Return an image's instances of the categories that are asked about and clear to see.

    Parameters
    ----------
    instances : DataFrame
        Of the image, see :func:`probekit.tasks.building.load_instances`.
    asked : sequence of str
        Categories. Those of which the image shows tiny instances alone are left out; of the others
        all instances are returned, tiny ones too.
    """
    if instances.empty:
        return instances
    clear = set(instances.category[~instances.tiny.astype(bool)])
    return instances[instances.category.isin(clear.intersection(asked))]


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
    stride = max(1, min(mask_hw.shape) // PLACES)
    coarse_hw = mask_hw[::stride, ::stride]
    # How much a mask and its moved copy have in common, for all moves at once.
    spectrum = np.fft.rfft2(coarse_hw)
    overlap_hw = np.fft.irfft2(spectrum * spectrum.conj(), s=coarse_hw.shape).round()
    stays_hw = np.logical_and.outer(
        _moves_inside(np.asarray(coarse_hw.any(1))), _moves_inside(np.asarray(coarse_hw.any(0)))
    )
    rng = np.random.default_rng(seed)
    for allowed_hw in (stays_hw, np.ones_like(stays_hw)):
        moves = np.argwhere(allowed_hw & (overlap_hw == overlap_hw[allowed_hw].min()))
        rows, columns = stride * moves[rng.integers(len(moves))]
        moved_hw = np.roll(mask_hw, (rows, columns), axis=(0, 1)) & ~mask_hw
        if moved_hw.sum() >= SMALLEST_MOVED * mask_hw.sum():
            return {"only_object": ~mask_hw, "no_object": mask_hw, "same_area": moved_hw}
    raise NotChanged("there is no room elsewhere for as large an area")


def _moves_inside(is_used: np.ndarray) -> np.ndarray:
    """Tell which cyclic moves of a line's used places take none of them across its ends."""
    places = np.flatnonzero(is_used)
    moves = np.arange(-places[0], len(is_used) - places[-1])
    is_inside = np.zeros(len(is_used), bool)
    is_inside[moves % len(is_used)] = True
    return is_inside


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
