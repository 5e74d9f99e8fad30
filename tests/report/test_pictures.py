import xml.etree.ElementTree as ElementTree
from io import BytesIO

import numpy as np
from PIL import Image

from probekit.report import pictures

SVG = "{http://www.w3.org/2000/svg}"
LEFT_AND_RIGHT = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1.0]])


def parse_curve(p_lc, names, **options):
    return ElementTree.fromstring(pictures.curve_svg(np.array(p_lc), names, **options))


def test_the_curve_puts_probability_one_on_top():
    svg = parse_curve([[0.0], [1.0]], ["match"], labels=[1], layer=1)
    points = svg.find(f"{SVG}polyline").get("points").split()
    (x_of_first, y_of_zero), (x_of_last, y_of_one) = (
        [float(number) for number in point.split(",")] for point in points
    )
    assert x_of_first < x_of_last
    assert y_of_one < y_of_zero


def test_the_curve_has_a_line_per_class_dashed_where_the_truth_is_no():
    p_lc = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]
    svg = parse_curve(p_lc, ["cup", "a <b>"], labels=[1, 0], layer=2)
    lines = svg.findall(f"{SVG}polyline")
    assert [line.get("stroke-dasharray") is not None for line in lines] == [False, True]
    titles = [title.text for title in svg.iter(f"{SVG}title")]
    assert titles[:2] == ["cup, layer 0: 0.100", "cup, layer 1: 0.300"]
    assert titles[-1] == "a <b>, layer 2: 0.600"
    radii = [circle.get("r") for circle in svg.findall(f"{SVG}circle")]
    assert radii == ["3", "3", "6"] * 2


def test_a_raster_is_the_mean_of_the_cells_that_cover_a_point():
    cells_t4 = np.array([*LEFT_AND_RIGHT, [0, 0, 1, 0.5]])
    raster = pictures.rasterise(np.array([1.0, 3.0, 5.0]), cells_t4, width=4, height=2)
    np.testing.assert_allclose(raster, [[3, 3, 4, 4], [1, 1, 3, 3]])


def test_heat_is_bright_where_it_is():
    grey = Image.new("RGB", (80, 40), (128, 128, 128))
    hot = pictures.draw_heat(grey, np.array([0.0, 1.0]), LEFT_AND_RIGHT)
    brightness_hw = np.asarray(hot).sum(axis=2)
    assert brightness_hw[:, :40].max() < brightness_hw[:, 40:].min()
    assert np.asarray(grey).max() == 128  # the photo itself stays as it is


def test_boxes_are_outlines():
    grey = Image.new("RGB", (80, 40), (128, 128, 128))
    boxed = np.asarray(pictures.draw_boxes(grey, np.array([[0.25, 0.25, 0.75, 0.75]])))
    assert (boxed[10, 20:60] == 255).all()
    assert (boxed[20, 40] == 128).all()
    assert np.asarray(grey).max() == 128


def test_a_jpeg_has_the_size_of_its_image():
    encoded = pictures.encode_jpeg(Image.new("RGB", (80, 40)))
    assert Image.open(BytesIO(encoded)).size == (80, 40)


def test_thumbnails_are_the_middles_of_their_images(tmp_path):
    files = []
    for name, width, height in (("wide", 300, 100), ("high", 60, 200)):
        image = Image.new("RGB", (width, height), "white")
        x = width // 2
        y = height // 2
        image.paste((200, 0, 0), (x - 20, y - 20, x + 20, y + 20))
        files.append(tmp_path / f"{name}.jpg")
        image.save(files[-1])
    strip = pictures.thumbnail_strip(files)
    side = pictures.THUMBNAIL_SIDE
    stride = side + pictures.THUMBNAIL_GAP
    assert strip.size == (stride + side, side)
    for x in (side // 2, stride + side // 2):
        red, green, _ = strip.getpixel((x, side // 2))
        assert red > 150
        assert green < 60
