"""Which image tokens lie in the boxes of the asked object, and as many that do not."""

from __future__ import annotations

import zlib
from collections.abc import Hashable
from dataclasses import replace

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from probekit import paths
from probekit.images import load_rgb
from probekit.interventions.settings import OBJECT_ROUTE
from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage
from probekit.models.token_grid import NoTokenGrid, TokenGrid, box_coverage, check_token_grid
from probekit.probes.localisation import relative_boxes
from probekit.tasks.base import asked_categories
from probekit.tasks.changed_images import select_asked

# Names of the marks.
OBJECT = "object"
ELSEWHERE = "elsewhere"
# A token whose cell is covered by as much lies in the boxes.
COVERED = 0.5
CHECKED_IMAGES = 8
NO_OBJECT = "no test image shows an annotated object that this task asks about"


def find_object_boxes(
    examples: pd.DataFrame, instances: pd.DataFrame
) -> dict[Hashable, np.ndarray]:
    """Find the boxes of the objects that a task asks about.

    Parameters
    ----------
    examples : DataFrame
        Of one task, with the column `asked`.
    instances : DataFrame
        See :func:`probekit.tasks.building.load_instances`.

    Returns
    -------
    dict of hashable to ndarray
        By `image_id` (b, 4) left, top, right, bottom, in shares of the image: of all objects that
        any example of the image asks about. Images without any are missing.
    """
    boxes = {}
    instances_by_image = dict(list(instances.groupby("image_id")))
    for image_id, rows in examples.groupby("image_id"):
        asked = set().union(*asked_categories(rows))
        of_image = instances_by_image.get(image_id, instances.head(0))
        of_image = select_asked(of_image, tuple(asked))
        if len(of_image):
            boxes[image_id] = relative_boxes(of_image)
    return boxes


class ObjectMarker:
    """Marks image tokens in the boxes of objects, and as many random ones elsewhere.

    Parameters
    ----------
    vlm : Vlm
    examples : DataFrame
        Those that are worked on, of one task.
    boxes : dict of hashable to ndarray
        See :func:`find_object_boxes`.
    longest_side : int or None
        That images are reduced to.
    home : Home
        Where relative files start.
    seed : int
        Of the random tokens.

    Attributes
    ----------
    refusal : str
        Why tokens cannot be marked; "" where they can.
    """

    def __init__(
        self,
        vlm: Vlm,
        examples: pd.DataFrame,
        boxes: dict[Hashable, np.ndarray],
        *,
        longest_side: int | None,
        home: paths.Home,
        seed: int,
    ) -> None:
        self._grid = TokenGrid(vlm)
        self._examples = examples
        self._boxes = boxes
        self._longest_side = longest_side
        self._home = home
        self._seed = seed
        self.refusal = "" if boxes else NO_OBJECT
        if boxes:
            rows = examples.drop_duplicates("image_id").head(CHECKED_IMAGES)
            images = [self._load(file) for file in rows.file]
            try:
                check_token_grid(vlm, images, prompt=rows.prompt.iloc[0])
            except NoTokenGrid as error:
                self.refusal = str(error)

    def _load(self, file: str) -> Image.Image:
        return load_rgb(self._home.resolve(file), self._longest_side)

    def mark(self, prepared: PreparedImage, row: int) -> PreparedImage:
        """Return an image with its marks.

        They are empty where it has no boxes, where none of its tokens lies in them, or where it is
        not known where its tokens lie.

        Parameters
        ----------
        prepared : PreparedImage
        row : int
            Number of one of its examples.
        """
        count = int(prepared.image_masks[0].sum())
        inside_i = np.zeros(count, bool)
        elsewhere_i = np.zeros(count, bool)
        example = self._examples.iloc[row]
        boxes_b4 = self._boxes.get(example.image_id)
        if boxes_b4 is not None and not self.refusal:
            size = self._load(example.file).size
            seed = zlib.crc32(f"{self._seed} {example.file}".encode())
            try:
                cells_i4 = self._grid(prepared, size)
            except NoTokenGrid as error:
                tqdm.write(f"{example.file} is left out of {OBJECT_ROUTE}: {error}")
            else:
                inside_i, elsewhere_i = choose_tokens(cells_i4, boxes_b4, seed=seed)
        return replace(prepared, marks={OBJECT: inside_i, ELSEWHERE: elsewhere_i})


def choose_tokens(
    cells_i4: np.ndarray, boxes_b4: np.ndarray, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the tokens in boxes, and as many random ones elsewhere.

    Parameters
    ----------
    cells_i4 : ndarray
        (i, 4) where each of the image's tokens lies, see
        :class:`probekit.models.token_grid.TokenGrid`.
    boxes_b4 : ndarray
        (b, 4) likewise, in shares of the image.
    seed : int

    Returns
    -------
    inside_i, elsewhere_i : ndarray of bool
        (i,) As many of both. The token that is covered most is inside, even where it is covered by
        less than :data:`COVERED`. Empty where none is covered, or where fewer are elsewhere.
    """
    coverage_i = np.nan_to_num(box_coverage(cells_i4, boxes_b4))
    inside_i = (coverage_i > 0) & (coverage_i >= min(COVERED, coverage_i.max()))
    outside = np.flatnonzero(~inside_i)
    elsewhere_i = np.zeros_like(inside_i)
    count = int(inside_i.sum())
    if count > len(outside):
        return elsewhere_i, elsewhere_i.copy()
    elsewhere_i[np.random.default_rng(seed).choice(outside, count, replace=False)] = True
    return inside_i, elsewhere_i
