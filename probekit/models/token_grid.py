"""Where in the image each image token lies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from PIL import Image

from probekit.models.batches import input_shape
from probekit.models.forward import read_layers
from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage

WHOLE_IMAGE = np.array([0.0, 0.0, 1.0, 1.0])
RASTER = 256  # points in each direction that coverage is measured on


class NoTokenGrid(ValueError):
    """It is not known where in the image the tokens of this model lie."""


class TokenGrid:
    """Finds where the image tokens of a model lie, once for each size of images.

    Parameters
    ----------
    vlm : Vlm
    """

    def __init__(self, vlm: Vlm) -> None:
        self.vlm = vlm
        self._cells_by_size: dict[tuple, np.ndarray] = {}

    def __call__(self, prepared: PreparedImage, size: tuple[int, int]) -> np.ndarray:
        """Find the part of the image that each image token stands for.

        How the checkpoint's image processor stretches, crops, pads or tiles is not assumed: it is
        given an image whose colours say where they are, and what comes out is read.

        Parameters
        ----------
        prepared : PreparedImage
            The image with a prompt.
        size : tuple of int
            Its width and height in pixels.

        Returns
        -------
        ndarray
            (t, 4) left, top, right, bottom, as fractions of the image.

        Raises
        ------
        NoTokenGrid
            Its image tokens are no regular grid on what the image encoder gets.
        """
        if not self.vlm.is_native:  # an adapter may choose its tokens by what the image shows
            return _find_cells(self.vlm, prepared, size)
        key = (size, input_shape(prepared))
        if key not in self._cells_by_size:
            self._cells_by_size[key] = _find_cells(self.vlm, prepared, size)
        return self._cells_by_size[key]


def _find_cells(vlm: Vlm, prepared: PreparedImage, size: tuple[int, int]) -> np.ndarray:
    token_count = int(prepared.image_masks[0].sum())
    if not vlm.is_native:
        return _cells_of_adapter(vlm, prepared, size, token_count)
    patch_grids = prepared.image_inputs.get("image_grid_thw")
    pixels = _find_pixels(prepared)
    cells_t4: np.ndarray | None = None
    if patch_grids is not None:
        cells_t4 = _cells_of_patch_grid(patch_grids, token_count)
    elif pixels is not None and pixels.ndim in (4, 5):
        cells_t4 = _cells_of_tiles(vlm, pixels, token_count, size)
    if cells_t4 is None:
        shapes = {name: tuple(value.shape) for name, value in prepared.image_inputs.items()}
        raise NoTokenGrid(
            f"where the {token_count} image tokens of {vlm.name} lie in the image is not known "
            f"(its image encoder gets {shapes})"
        )
    return cells_t4


def _cells_of_adapter(
    vlm: Vlm, prepared: PreparedImage, size: tuple[int, int], token_count: int
) -> np.ndarray:
    if getattr(vlm.adapter, "token_grid", None) is None:
        raise NoTokenGrid(f"the adapter of {vlm.name} has no token_grid, so there are no heat maps")
    cells_t4 = np.asarray(vlm.adapter.token_grid(prepared, size), float)
    if cells_t4.shape != (token_count, 4):
        raise NoTokenGrid(
            f"token_grid of {vlm.name} gives {cells_t4.shape}, and there are {token_count} image "
            "tokens: (image tokens, 4) is needed"
        )
    return cells_t4


def _cells_of_patch_grid(patch_grids: torch.Tensor, token_count: int) -> np.ndarray | None:
    """Divide an image that is given whole, in patches that are merged into tokens."""
    rows, columns = [int(count) for count in patch_grids[0][-2:]]
    merge = round((rows * columns / token_count) ** 0.5)
    if len(patch_grids) != 1 or rows * columns != token_count * merge**2:
        return None
    return _divide(WHOLE_IMAGE, rows=rows // merge, columns=columns // merge)


def _cells_of_tiles(
    vlm: Vlm, pixels: torch.Tensor, token_count: int, size: tuple[int, int]
) -> np.ndarray | None:
    """Divide an image that is given as one or more tiles, each with the same number of tokens."""
    tile_count = pixels.shape[:-3].numel()
    height, width = pixels.shape[-2:]
    columns = round((token_count / tile_count * width / height) ** 0.5)
    rows = token_count // tile_count // max(1, columns)
    if columns == 0 or rows * columns * tile_count != token_count:
        return None
    spans = _find_tile_spans(vlm, size, tile_count)
    return np.concatenate([_divide(span, rows=rows, columns=columns) for span in spans])


def _find_pixels(prepared: PreparedImage) -> torch.Tensor | None:
    inputs = prepared.image_inputs
    return inputs.get("pixel_values", inputs.get("pixel_values_images"))


def _divide(span: np.ndarray, *, rows: int, columns: int) -> np.ndarray:
    """(rows times columns, 4) the cells, row by row, of a grid that covers `span`."""
    left, top, right, bottom = span
    x = np.linspace(left, right, columns + 1)
    y = np.linspace(top, bottom, rows + 1)
    corners = [
        np.tile(x[:-1], rows),
        np.repeat(y[:-1], columns),
        np.tile(x[1:], rows),
        np.repeat(y[1:], columns),
    ]
    return np.stack(corners, axis=1)


def _find_tile_spans(vlm: Vlm, size: tuple[int, int], tile_count: int) -> np.ndarray:
    """(tiles, 4) the part of the image that each tile shows; beyond 0 and 1 where it is padded."""
    width, height = size
    places = np.zeros((height, width, 3), np.uint8)  # red grows to the right, green downwards
    places[..., 0] = np.linspace(0, 255, width).round()
    places[..., 1] = np.linspace(0, 255, height).round()[:, None]
    dark = _process_tiles(vlm, np.zeros_like(places))
    bright = _process_tiles(vlm, np.full_like(places, 255))
    coloured = _process_tiles(vlm, places)
    if len(coloured) != tile_count:
        raise NoTokenGrid(
            f"the image processor of {vlm.name} makes other tiles of another image of the same size"
        )
    is_image = np.abs(bright - dark) > 1e-3  # padding has the same colour in all three
    fractions = np.full(coloured.shape, np.nan)
    np.divide(coloured - dark, bright - dark, out=fractions, where=is_image)
    spans = []
    for tile in fractions:
        left, right = _find_ends(tile[0], axis=1)
        top, bottom = _find_ends(tile[1], axis=0)
        spans.append([left, top, right, bottom])
    return np.array(spans)


def _process_tiles(vlm: Vlm, image_hw3: np.ndarray) -> np.ndarray:
    """(tiles, channels, height, width) what the image encoder gets of an image."""
    prepared = vlm.prompt_processor.prepare(Image.fromarray(image_hw3), ["?"])
    pixels = _find_pixels(prepared)
    if pixels is None:
        raise NoTokenGrid(f"the image processor of {vlm.name} gives no pixels")
    return pixels.float().flatten(0, -4).numpy()


def _find_ends(fraction_hw: np.ndarray, *, axis: int) -> tuple[float, float]:
    """Find where a tile begins and ends along an axis, from what place each pixel shows."""
    lines = np.moveaxis(fraction_hw, axis, 0)
    places = np.flatnonzero(np.isfinite(lines).any(1))
    if len(places) < 2:
        raise NoTokenGrid("a tile does not show the image")
    centres = (places + 0.5) / len(lines)
    slope, start = np.polyfit(centres, np.nanmedian(lines[places], axis=1), 1)
    return start, start + slope


@torch.inference_mode()
def check_token_grid(vlm: Vlm, images: Sequence[Image.Image], *, prompt: str) -> None:
    """Change one quarter of each image after the other: the tokens there must change the most.

    The mean over the images decides. Tokens that lie outside of an image do not count.

    Parameters
    ----------
    vlm : Vlm
    images : sequence of PIL.Image.Image
    prompt : str

    Raises
    ------
    NoTokenGrid
        They do not, as with learnt queries, each of which looks at the whole image.
    """
    grid = TokenGrid(vlm)
    large_enough = [image.resize((max(image.width, 64), max(image.height, 64))) for image in images]
    prepared = [vlm.prompt_processor.prepare(image, [prompt]) for image in large_enough]
    cells = [grid(one, image.size) for one, image in zip(prepared, large_enough, strict=True)]
    originals = [_embed_image(vlm, one) for one in prepared]
    for is_right, is_lower in product((False, True), repeat=2):
        inside_means = []
        outside_means = []
        for image, cells_t4, original_td in zip(large_enough, cells, originals, strict=True):
            changed = _scramble_quarter(image, is_right=is_right, is_lower=is_lower)
            of_changed = vlm.prompt_processor.prepare(changed, [prompt])
            in_both = _match_cells(cells_t4, grid(of_changed, changed.size))
            changed_td = _embed_image(vlm, of_changed)[in_both[:, 1]]
            change_t = (changed_td - original_td[in_both[:, 0]]).norm(dim=1)
            cells_t4 = cells_t4[in_both[:, 0]]
            x_t = cells_t4[:, [0, 2]].mean(1)
            y_t = cells_t4[:, [1, 3]].mean(1)
            in_image_t = (x_t > 0) & (x_t < 1) & (y_t > 0) & (y_t < 1)
            in_quarter_t = ((x_t > 0.5) == is_right) & ((y_t > 0.5) == is_lower)
            inside_t = in_quarter_t & in_image_t
            outside_t = ~in_quarter_t & in_image_t
            if not (inside_t.any() and outside_t.any()):  # where a model drops tokens
                continue
            inside_means.append(float(change_t[inside_t].mean()))
            outside_means.append(float(change_t[outside_t].mean()))
        if not inside_means:
            raise NoTokenGrid(
                f"{vlm.name} has too few tokens at the same places of two images to check them"
            )
        if not np.mean(inside_means) > np.mean(outside_means):
            raise NoTokenGrid(
                f"image tokens of {vlm.name} do not lie where its image processor suggests"
            )


def _match_cells(cells_t4: np.ndarray, others_t4: np.ndarray) -> np.ndarray:
    """(cells in both, 2) places of equal cells: some models choose which tokens an image has."""
    if np.array_equal(cells_t4, others_t4):
        return np.arange(len(cells_t4))[:, None].repeat(2, 1)
    places = {tuple(cell): place for place, cell in enumerate(others_t4.tolist())}
    pairs = [
        (place, places[tuple(cell)])
        for place, cell in enumerate(cells_t4.tolist())
        if tuple(cell) in places
    ]
    return np.array(pairs, int).reshape(-1, 2)


def _scramble_quarter(image: Image.Image, *, is_right: bool, is_lower: bool) -> Image.Image:
    """Return the image with noise in one quarter."""
    pixels = np.array(image)
    middle_row = image.height // 2
    middle_column = image.width // 2
    rows = slice(middle_row, None) if is_lower else slice(None, middle_row)
    columns = slice(middle_column, None) if is_right else slice(None, middle_column)
    rng = np.random.default_rng(0)
    pixels[rows, columns] = rng.integers(0, 256, pixels[rows, columns].shape, np.uint8)
    return Image.fromarray(pixels)


def _embed_image(vlm: Vlm, prepared: PreparedImage) -> torch.Tensor:
    """(t, d) what enters the decoder at the image tokens."""
    hidden_by_layer: dict[str, torch.Tensor] = {}

    def take(layer: str, hidden_ntd: torch.Tensor) -> None:
        hidden_by_layer.setdefault(layer, hidden_ntd[0])

    read_layers(vlm, [prepared], take)
    image_t = torch.from_numpy(prepared.image_masks[0]).to(vlm.device)
    return hidden_by_layer["lm.00"][image_t].float()


def box_coverage(cells_t4: np.ndarray, boxes_b4: np.ndarray) -> np.ndarray:
    """Measure which fraction of each cell lies in any of the boxes.

    Parameters
    ----------
    cells_t4 : ndarray
        (t, 4) left, top, right, bottom, as fractions of the image. What a cell has outside of the
        image does not count.
    boxes_b4 : ndarray
        (b, 4) likewise.

    Returns
    -------
    ndarray
        (t,) from 0 to 1; nan for a cell that lies outside of the image altogether.
    """
    points = (np.arange(RASTER) + 0.5) / RASTER
    in_boxes = np.zeros((RASTER, RASTER))
    for left, top, right, bottom in boxes_b4:
        rows = (points >= top) & (points < bottom)
        columns = (points >= left) & (points < right)
        in_boxes[np.ix_(rows, columns)] = 1
    # total[y, x] is the number of points in boxes above y and to the left of x.
    total = np.pad(in_boxes.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    corners_t4 = np.clip(np.round(cells_t4 * RASTER), 0, RASTER).astype(int)
    x0, y0, x1, y1 = corners_t4.T
    area_t = (x1 - x0) * (y1 - y0)
    inside_t = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
    return np.divide(inside_t, area_t, out=np.full(len(area_t), np.nan), where=area_t > 0)
