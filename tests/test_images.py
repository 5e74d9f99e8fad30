"""Image files: those of every mode become RGB, those that cannot be decoded are named."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from probekit.images import (
    EXIF_ORIENTATION,
    IMAGE_FORMATS,
    check_images,
    image_size,
    load_rgb,
)

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


def encode(kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("GIF", "P")],
)
def test_images_of_every_mode_become_rgb(tmp_path, kind, mode):
    file = tmp_path / "some.jpg"
    file.write_bytes(encode(kind, mode))
    image = load_rgb(file)
    assert image.mode == "RGB"
    assert image.size == (60, 40)
    assert np.asarray(image).std() > 20


def grey_levels(tmp_path, values: np.ndarray) -> np.ndarray:
    file = tmp_path / "grey.tif"
    Image.fromarray(values.reshape(40, 60)).save(file)
    return np.asarray(load_rgb(file))[:, :, 0].ravel()


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 65535, 2400).astype(np.uint16),
        np.linspace(0, 65535, 2400).astype(np.int32),
        np.linspace(0, 1, 2400).astype(np.float32),
        np.linspace(0, 255, 2400).astype(np.float32),
    ],
    ids=["16 bit", "32 bit", "up to 1", "up to 255"],
)
def test_more_levels_of_grey_keep_their_range(tmp_path, values):
    levels = grey_levels(tmp_path, values)
    assert np.abs(levels - np.linspace(0, 255, 2400)).max() <= 1


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, np.nan], [0.0, 1e6]])
def test_grey_without_a_known_white_is_refused(tmp_path, values):
    with pytest.raises(OSError, match=r"grey\.tif .*convert it to 8 bits"):
        grey_levels(tmp_path, np.resize(np.array(values, np.float32), 2400))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    file = tmp_path / "disc.png"
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[10:20, 10:20, 3] = 255
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.new("P", (60, 40), 0)
        image.putpalette([0, 0, 0] * 256)
        image.paste(1, (10, 10, 20, 20))
        image.save(file, transparency=0)
    else:
        image.convert(mode).save(file)
    is_white_hw = (np.asarray(load_rgb(file)) == 255).all(-1)
    assert is_white_hw.sum() == 40 * 60 - 100
    assert not is_white_hw[10:20, 10:20].any()


def test_images_are_seen_as_a_viewer_shows_them(tmp_path):
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (60, 40)).save(file, exif=exif)
    assert load_rgb(file).size == (40, 60)
    size = image_size(file)
    assert size == (40, 60, 6)
    assert size.stored == (60, 40)


def test_strips_are_named(tmp_path):
    file = tmp_path / "strip.png"
    Image.new("RGB", (1000, 4)).save(file)
    checked = check_images(pd.DataFrame({"file": [str(file)]}))
    assert "strip of 1000 x 4 pixels" in checked.reason[0]


def test_longest_side_bounds_large_images_and_leaves_small_ones(tmp_path):
    file = tmp_path / "some.jpg"
    file.write_bytes(encode("JPEG"))
    assert load_rgb(file, longest_side=30).size == (30, 20)
    assert load_rgb(file, longest_side=300).size == (60, 40)


def test_unreadable_images_are_named_with_a_reason(tmp_path):
    contents = {
        3: encode("JPEG"),
        5: b"",
        6: encode("JPEG")[:400],
        8: b"not an image",
        9: None,
    }
    files = {}
    for image_id, content in contents.items():
        file = tmp_path / f"{image_id}.jpg"
        files[image_id] = str(file)
        if content is not None:
            file.write_bytes(content)
    images = pd.DataFrame({"file": files})
    checked = check_images(images)
    assert checked.file.tolist() == list(files.values())
    reasons = checked.reason.dropna()
    assert reasons.index.tolist() == [5, 6, 8, 9]
    assert reasons.str.startswith("cannot be read as an image: ").all()
    assert reasons[9].endswith("there is no such file")


@pytest.mark.slow
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(IMAGE_FORMATS),
    length=st.none() | st.integers(0, 9000),
    changes=st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 255)), max_size=20),
    start=st.sampled_from([b"", b"%!PS", b"\x00"]),
)
def test_any_bytes_are_an_image_or_a_clear_error(tmp_path, kind, length, changes, start):
    content = bytearray(encode(kind))
    for position, value in changes:
        content[position % len(content)] = value
    file = tmp_path / "some.jpg"
    file.write_bytes(start + bytes(content[:length]))
    try:
        image = load_rgb(file)
    except OSError as error:
        assert f"{file} cannot be read as an image: " in str(error)  # noqa: PT017 (an image is as good)
    else:
        assert image.mode == "RGB"
        assert 0 < image.width * image.height < 180_000_000
