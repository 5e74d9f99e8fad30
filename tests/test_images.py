"""Image files: those of every mode become RGB, those that cannot be decoded are named."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from probekit.images import IMAGE_FORMATS, load_rgb, unreadable_images

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
    unreadable = unreadable_images(images)
    assert unreadable.image_id.tolist() == [5, 6, 8, 9]
    assert unreadable.file.tolist() == [files[image_id] for image_id in (5, 6, 8, 9)]
    assert unreadable.reason.str.startswith("cannot be read as an image: ").all()
    assert unreadable_images(images.loc[[3]]).empty


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
