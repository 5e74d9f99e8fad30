import io
import json
import shutil
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from probekit.data import coco
from probekit.images import load_rgb, unreadable_images
from tests.conftest import REAL_COCO, needs_real_coco

PICTURE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


def jpeg(mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).convert(mode).save(buffer, "JPEG" if mode != "RGBA" else "PNG")
    return buffer.getvalue()


FILES = {"rgb": jpeg(), "grey": jpeg("L"), "cmyk": jpeg("CMYK"), "rgba": jpeg("RGBA"), "empty": b"",
         "truncated": jpeg()[:400], "text": b"not an image", "absent": None}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "annotations").mkdir()
    for name, content in FILES.items():
        if content is not None:
            (tmp_path / "some" / f"{name}.jpg").write_bytes(content)
    images = [{"id": i, "file_name": f"{n}.jpg", "width": 60, "height": 40} for i, n in enumerate(FILES)]
    told = [{"id": i, "image_id": i, "caption": f"picture {i}."} for i in range(len(FILES))]
    found = [{"id": 0, "image_id": 0, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 12}]
    for kind, rows in (("captions", told), ("instances", found)):
        content = {"images": images, "annotations": rows}
        content |= {"categories": [{"id": 9, "name": "cup"}]} if kind == "instances" else {}
        (tmp_path / "annotations" / f"{kind}_some.json").write_text(json.dumps(content))
    return tmp_path


def test_bad_images_are_named_and_odd_ones_become_rgb(folder):
    data = coco.read_coco(folder)
    bad = unreadable_images(data.images)
    assert {f.rpartition("/")[2] for f in bad.file} == {f"{n}.jpg" for n in ("empty", "truncated", "text", "absent")}
    assert (bad.reason.str.len() > 10).all()
    for name in ("rgb", "grey", "cmyk", "rgba"):
        image = load_rgb(folder / "some" / f"{name}.jpg")
        assert image.mode == "RGB" and image.size == (60, 40)
        assert np.asarray(image).std() > 20


def test_longest_side_bounds_large_images_and_leaves_small_ones(folder):
    assert load_rgb(folder / "some" / "rgb.jpg", longest_side=30).size == (30, 20)
    assert load_rgb(folder / "some" / "rgb.jpg", longest_side=300).size == (60, 40)


def test_reading_is_silent(folder, capsys):
    coco.read_coco(folder)
    assert capsys.readouterr().out == ""


def test_what_is_missing_or_broken_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        coco.read_coco(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="captions_other"):
        coco.read_coco(folder, ["other"])
    (folder / "annotations" / "instances_some.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="instances_some"):
        coco.read_coco(folder)
    (folder / "annotations" / "instances_some.json").unlink()
    with pytest.raises(FileNotFoundError, match="instances_some"):
        coco.read_coco(folder)


@pytest.mark.parametrize(("kind", "content"), [
    ("captions", [1, 2]), ("captions", {"images": []}), ("captions", {"images": [{"id": 1}], "annotations": []}),
    ("instances", {"categories": [{"id": 1, "name": "cup"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 1, 1]}]}),
    ("instances", {"categories": None, "annotations": []}),
])
def test_what_is_no_annotation_file_is_named(folder, kind, content):
    (folder / "annotations" / f"{kind}_some.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{kind}_some\.json is not a readable COCO annotation file"):
        coco.read_coco(folder)


def test_outlines_are_not_held_in_memory(folder):
    path = folder / "annotations" / "instances_some.json"
    outline = np.random.default_rng(0).integers(0, 64000, 100) / 100
    found = {"id": 0, "image_id": 0, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 12, "segmentation": [[*outline]]}
    path.write_text(json.dumps({"categories": [{"id": 9, "name": "cup"}], "annotations": [found] * 2000}))
    tracemalloc.start()
    assert len(coco.read_coco(folder).instances) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * path.stat().st_size  # with them it is more than 5 times


def renamed(folder, *names):
    """The images that there are now, with other names in the annotations."""
    file = folder / "annotations" / "captions_some.json"
    told = json.loads(file.read_text())
    for image, name in zip(told["images"], names, strict=False):
        image["file_name"] = name
    file.write_text(json.dumps(told))
    return [path.removeprefix(str(folder)) for path in coco.read_coco(folder).images.file[: len(names)]]


def test_images_lie_in_folders_of_their_split_and_never_outside(folder):
    for k in (0, 1):
        (folder / "some" / f"00{k}").mkdir()
        (folder / "some" / f"00{k}" / "frame.jpg").write_bytes(FILES["rgb"])
    (folder / "secret.jpg").write_bytes(FILES["rgb"])
    names = ["000/frame.jpg", "001/frame.jpg", "val2017/grey.jpg", "../secret.jpg", str(folder / "secret.jpg"),
             "000/../../secret.jpg"]
    assert renamed(folder, *names) == ["/some/000/frame.jpg", "/some/001/frame.jpg", "/some/grey.jpg",
                                       *["/some/secret.jpg"] * 3]
    with pytest.raises(ValueError, match=r"several images have the file .*some/grey.jpg: give each"):
        renamed(folder, "a/grey.jpg", "b/grey.jpg")


def test_splits_that_share_an_image_are_refused(folder):
    for kind in ("captions", "instances"):
        shutil.copy(folder / "annotations" / f"{kind}_some.json", folder / "annotations" / f"{kind}_twin.json")
    assert coco.split_names(folder) == ["some", "twin"]
    with pytest.raises(ValueError, match="more than one"):
        coco.read_coco(folder)


@needs_real_coco
def test_real_photographs():
    data = coco.read_coco(REAL_COCO)
    assert len(data.images) == 300 and len(data.categories) == 80
    assert data.captions.groupby("image_id").size().min() >= 5
    assert data.instances.image_id.isin(data.images.index).all()
    assert len(unreadable_images(data.images)) == 0
