import xml.etree.ElementTree as ElementTree
from base64 import b64decode
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


def grid(columns, rows):
    """Cells of a regular grid, row by row."""
    lefts, tops = np.meshgrid(np.arange(columns) / columns, np.arange(rows) / rows)
    left_t, top_t = lefts.ravel(), tops.ravel()
    return np.stack([left_t, top_t, left_t + 1 / columns, top_t + 1 / rows], axis=1)


def test_a_raster_has_each_tokens_value_at_its_centre_and_is_smooth_between():
    values_t = np.array([0.0, 1.0, 0.3, 0.0, 0.8, 0.1])
    raster = pictures.interpolate(values_t, grid(3, 2), width=63, height=42)
    np.testing.assert_allclose(raster[10::21, 10::21].ravel(), values_t, atol=0.02)
    assert raster.min() >= 0
    assert raster.max() <= 1
    assert np.abs(np.diff(raster, axis=1)).max() < 0.09  # cells would jump by 1
    assert np.abs(np.diff(raster, axis=0)).max() < 0.09


def test_equal_tokens_give_an_even_raster_wherever_they_lie():
    overlapping = np.array([*LEFT_AND_RIGHT, [0, 0, 1, 0.5], [0.3, 0.1, 0.9, 1.2]])
    raster = pictures.interpolate(np.full(4, 2.0), overlapping, width=17, height=11)
    np.testing.assert_allclose(raster, 2, rtol=1e-5)


def test_a_raster_is_zero_where_there_is_no_token():
    left_half = np.array([[0, 0, 0.5, 1], [1.0, 0, 1.5, 1]])  # the other one is outside
    raster = pictures.interpolate(np.array([1.0, 9.0]), left_half, width=10, height=2)
    np.testing.assert_allclose(raster[:, :5], 1)
    np.testing.assert_allclose(raster[:, 6:], 0)


def test_heat_is_bright_where_it_is():
    grey = Image.new("RGB", (80, 40), (128, 128, 128))
    hot = pictures.draw_heat(grey, np.array([0.0, 1.0]), LEFT_AND_RIGHT)
    brightness_hw = np.asarray(hot).sum(axis=2)
    assert (np.diff(brightness_hw[20, 8:72]) >= 0).all()
    assert brightness_hw[:, :20].max() + 100 < brightness_hw[:, 60:].min()
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
    side = pictures.THUMBNAIL_SIDE
    for file in files:
        url = pictures.thumbnail_url(file)
        thumbnail = Image.open(BytesIO(b64decode(url.removeprefix("data:image/jpeg;base64,"))))
        assert thumbnail.size == (side, side)
        red, green, _ = thumbnail.getpixel((side // 2, side // 2))
        assert red > 150
        assert green < 60


def test_the_largest_box_has_the_name():
    grey = Image.new("RGB", (200, 100), (128, 128, 128))
    boxes_b4 = np.array([[0.05, 0.1, 0.3, 0.5], [0.4, 0.1, 0.95, 0.9]])
    plain = np.asarray(pictures.draw_boxes(grey, boxes_b4)).astype(int)
    named = np.asarray(pictures.draw_boxes(grey, boxes_b4, name="cup")).astype(int)
    changed = np.abs(named - plain).max(axis=2) > 0
    assert changed[:, 80:].any()
    assert not changed[:, :79].any()


def test_borders_lie_between_tokens():
    grey = Image.new("RGB", (90, 60), (128, 128, 128))
    lined = np.asarray(pictures.draw_borders(grey, grid(3, 2)))[..., 0]
    assert (lined[:, 30] > 140).all()
    assert (lined[30] > 140).all()
    assert (lined[5:25, 5:25] == 128).all()
    assert np.asarray(grey).max() == 128


def test_a_photo_is_made_as_large_as_it_is_shown(tmp_path):
    file = tmp_path / "small.png"
    Image.new("RGB", (32, 24), "red").save(file)
    assert pictures.load_photo(file).size == (32, 24)
    assert pictures.load_photo(file, enlarge=True).size == (640, 480)
