"""Where in the image each image token lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from probekit.models import batches, forward
from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage


class NoTokenGrid(ValueError):
    """It is not known where in the image the tokens of this model lie."""


class TokenGrid:
    """Finds where the image tokens of a model lie; what it has found for a size of images it remembers."""

    def __init__(self, vlm: Vlm):
        self.vlm, self._found = vlm, {}

    def __call__(self, prepared: PreparedImage, size: tuple[int, int]) -> np.ndarray:
        """(t, 4) the part of the image that each image token stands for: left, top, right, bottom, in shares of it.

        How the checkpoint's image processor stretches, crops, pads or tiles is not assumed: it is given a picture whose
        colours say where they are, and what arrives is read.

        Parameters
        ----------
        prepared : the image with a prompt
        size : its width and height in pixels

        Raises
        ------
        NoTokenGrid
            Image tokens are no regular grid on what the image encoder gets.
        """
        key = size, batches.input_shape(prepared)
        if key not in self._found:
            self._found[key] = _cells(self.vlm, prepared, size)
        return self._found[key]


def _cells(vlm: Vlm, prepared: PreparedImage, size: tuple[int, int]) -> np.ndarray:
    t, pixels = int(prepared.image_masks[0].sum()), _pixels(prepared)
    grid = prepared.image_inputs.get("image_grid_thw")
    if grid is not None:  # patches of the whole image, neighbours merged into a token
        rows, columns = (int(v) for v in grid[0][-2:])
        merge = round((rows * columns / t) ** 0.5)
        if len(grid) == 1 and rows * columns == t * merge**2:
            return _regular(rows // merge, columns // merge, np.array([0.0, 0.0, 1.0, 1.0]))
    elif pixels is not None and pixels.ndim in (4, 5):
        tiles, height, width = pixels.shape[:-3].numel(), *pixels.shape[-2:]
        columns = round((t / tiles * width / height) ** 0.5)
        rows = t // tiles // max(1, columns)
        if columns and rows * columns * tiles == t:
            return np.concatenate([_regular(rows, columns, span) for span in _spans(vlm, size, tiles)])
    shapes = {key: tuple(value.shape) for key, value in prepared.image_inputs.items()}
    raise NoTokenGrid(f"where the {t} image tokens of {vlm.name} lie in the image is not known (its encoder gets {shapes}): "
                 "there is no heat map for it")


def _pixels(prepared: PreparedImage) -> torch.Tensor | None:
    return prepared.image_inputs.get("pixel_values", prepared.image_inputs.get("pixel_values_images"))


def _regular(rows: int, columns: int, span: np.ndarray) -> np.ndarray:
    """Cells of a grid that covers `span` (left, top, right, bottom), row by row."""
    left, top, right, bottom = span
    x, y = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    corners = [np.tile(x[:-1], rows), np.repeat(y[:-1], columns), np.tile(x[1:], rows), np.repeat(y[1:], columns)]
    return np.stack(corners, 1)


def _spans(vlm: Vlm, size: tuple[int, int], tiles: int) -> np.ndarray:
    """(tiles, 4) what part of the image each tile shows; beyond 0 and 1 where it is padded."""
    width, height = size
    place = np.zeros((height, width, 3), np.uint8)
    place[..., 0] = np.linspace(0, 255, width).round()
    place[..., 1] = np.linspace(0, 255, height).round()[:, None]
    told = []
    for picture in (np.zeros_like(place), np.full_like(place, 255), place):
        made = vlm.prompt_processor.prepare(Image.fromarray(picture), ["?"])
        told.append(_pixels(made).float().flatten(0, -4).numpy())
    dark, bright, place = told
    if len(place) != tiles:
        raise NoTokenGrid(f"the image processor of {vlm.name} makes other tiles of another image of the same size")
    shown = np.abs(bright - dark) > 1e-3  # what is the same for both is padding
    share = np.divide(place - dark, bright - dark, out=np.full(place.shape, np.nan), where=shown)
    return np.array([[*_ends(tile[0], 1), *_ends(tile[1], 0)] for tile in share])[:, [0, 2, 1, 3]]


def _ends(share_hw: np.ndarray, axis: int) -> tuple[float, float]:
    """Where a tile begins and ends along an axis, from what share of the image each of its pixels shows."""
    lines = np.moveaxis(share_hw, axis, 0)
    known = np.flatnonzero(np.isfinite(lines).any(1))
    if len(known) < 2:
        raise NoTokenGrid("a tile does not show the image")
    slope, start = np.polyfit((known + 0.5) / len(lines), np.nanmedian(lines[known], axis=1), 1)
    return start, start + slope


@torch.inference_mode()
def check_token_grid(vlm: Vlm, images: Sequence[Image.Image], prompt: str) -> None:
    """Change one quarter of each image after the other, and see that the tokens that lie there change the most.

    Judged by the mean over the images; tokens that lie outside of an image do not count.

    Raises
    ------
    NoTokenGrid
        They do not, as with learnt queries, each of which looks at the whole image.
    """
    grid, quarters = TokenGrid(vlm), {(right, lower): [] for right in (False, True) for lower in (False, True)}
    for image in images:
        image = image.resize((max(image.width, 64), max(image.height, 64)))
        prepared = vlm.prompt_processor.prepare(image, [prompt])
        cells_t4, before = grid(prepared, image.size), _embedded(vlm, prepared)
        x, y = cells_t4[:, [0, 2]].mean(1), cells_t4[:, [1, 3]].mean(1)
        seen = (x > 0) & (x < 1) & (y > 0) & (y < 1)
        for (right, lower), found in quarters.items():
            pixels = np.array(image)
            rows, columns = (slice(side // 2, None) if far else slice(None, side // 2)
                             for side, far in ((image.height, lower), (image.width, right)))
            pixels[rows, columns] = np.random.default_rng(0).integers(0, 256, pixels[rows, columns].shape, np.uint8)
            changed = (_embedded(vlm, vlm.prompt_processor.prepare(Image.fromarray(pixels), [prompt])) - before).norm(dim=1)
            inside = ((x > 0.5) == right) & ((y > 0.5) == lower)
            found.append([float(changed[mask].mean()) for mask in (inside & seen, ~inside & seen)])
    for found in quarters.values():
        near, far = np.mean(found, 0)
        if not near > far:
            raise NoTokenGrid(f"image tokens of {vlm.name} do not lie where its image processor suggests: there is no heat "
                         "map for it")


def _embedded(vlm: Vlm, prepared: PreparedImage) -> torch.Tensor:
    """(t, d) what enters the decoder at the image tokens."""
    found: dict[str, torch.Tensor] = {}
    forward.read_layers(vlm, [prepared], lambda layer, hidden_ntd: found.setdefault(layer, hidden_ntd[0]))
    return found["lm.00"][torch.from_numpy(prepared.image_masks[0]).to(vlm.device)].float()


def box_coverage(cells_t4: np.ndarray, boxes_b4: np.ndarray, fine: int = 256) -> np.ndarray:
    """(t,) which share of each cell lies in any of the boxes (left, top, right, bottom, in shares of the image).

    Measured on a raster of `fine` x `fine` points; what a cell has outside of the image does not count. nan for a cell
    that lies outside altogether.
    """
    at = (np.arange(fine) + 0.5) / fine
    inside = np.zeros((fine, fine))
    for left, top, right, bottom in boxes_b4:
        inside[np.ix_((at >= top) & (at < bottom), (at >= left) & (at < right))] = 1
    total = np.pad(inside.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    x0, y0, x1, y1 = (np.clip(np.round(cells_t4 * fine), 0, fine).astype(int)).T
    area = (x1 - x0) * (y1 - y0)
    return np.divide(total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0], area,
                     out=np.full(len(area), np.nan), where=area > 0)
