import re
from io import BytesIO

import numpy as np
from PIL import Image

from probekit.report import pictures

CELLS = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1.0]])


def test_the_curve_puts_probability_one_on_top():
    svg = pictures.curve_svg(np.array([[0.0], [1.0]]), ["a <b>"], 1, np.array([1]))
    (_, low), (_, high) = (map(float, p.split(",")) for p in re.search(r'points="([^"]+)"', svg)[1].split())
    assert high < low and "a &lt;b&gt;" in svg


def test_a_raster_is_the_mean_of_the_cells_that_cover_a_point():
    found = pictures.raster(np.array([1.0, 3.0, 5.0]), np.array([*CELLS, [0, 0, 1, 0.5]]), 4, 2)
    np.testing.assert_allclose(found, [[3, 3, 4, 4], [1, 1, 3, 3]])


def test_heat_is_bright_where_it_is_and_boxes_are_drawn():
    grey = Image.new("RGB", (80, 40), (128, 128, 128))
    hot = np.asarray(pictures.overlaid(grey, np.array([0.0, 1.0]), CELLS, np.zeros((0, 4)))).sum(2)
    assert hot[:, :40].max() < hot[:, 40:].min()
    boxed = np.asarray(pictures.overlaid(grey, None, None, np.array([[0.25, 0.25, 0.75, 0.75]])))
    assert (boxed[10, 20:60] == 255).all() and (boxed[20, 40] == 128).all()
    assert np.asarray(grey).max() == 128  # the photo itself stays as it is
    assert Image.open(BytesIO(pictures.jpeg(grey))).size == (80, 40)


def test_thumbnails_are_the_middles_of_their_images(tmp_path):
    for name, size in (("wide", (300, 100)), ("high", (60, 200))):
        image = Image.new("RGB", size, "white")
        image.paste((200, 0, 0), (size[0] // 2 - 20, size[1] // 2 - 20, size[0] // 2 + 20, size[1] // 2 + 20))
        image.save(tmp_path / f"{name}.jpg")
    strip = pictures.thumbnails([str(tmp_path / "wide.jpg"), str(tmp_path / "high.jpg")])
    assert strip.size == (2 * pictures.THUMB + 8, pictures.THUMB)
    middle = pictures.THUMB // 2
    for x in (middle, pictures.THUMB + 8 + middle):
        red, green, _ = strip.getpixel((x, middle))
        assert red > 150 and green < 60
