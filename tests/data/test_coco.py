"""COCO's layout: what is read, and what is refused by name."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probekit.data.coco import read_coco, split_names
from probekit.images import unreadable_images
from tests.conftest import REAL_COCO, needs_real_coco

BOX = {"id": 0, "image_id": 0, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 12}
CUP = {"id": 9, "name": "cup"}


def annotation_file(folder: Path, kind: str, split: str = "some") -> Path:
    return folder / "annotations" / f"{kind}_{split}.json"


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))


def write_image(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (60, 40), "red").save(file)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images of the split "some", with a caption each; a box in the first."""
    names = ("red.jpg", "grey.jpg", "blue.jpg")
    images = []
    captions = []
    for i, name in enumerate(names):
        write_image(tmp_path / "some" / name)
        images.append({"id": i, "file_name": name, "width": 60, "height": 40})
        captions.append({"id": i, "image_id": i, "caption": f"picture {i}."})
    (tmp_path / "annotations").mkdir()
    write_json(annotation_file(tmp_path, "captions"), {"images": images, "annotations": captions})
    instances = {"images": images, "annotations": [BOX], "categories": [CUP]}
    write_json(annotation_file(tmp_path, "instances"), instances)
    return tmp_path


def test_tables_hold_what_the_files_say(folder):
    dataset = read_coco(folder)
    assert dataset.images.index.tolist() == [0, 1, 2]
    assert dataset.images.coco_split.unique().tolist() == ["some"]
    assert dataset.images.file.tolist() == [
        str(folder / "some" / name) for name in ("red.jpg", "grey.jpg", "blue.jpg")
    ]
    assert dataset.images[["width", "height"]].to_numpy().tolist() == [[60, 40]] * 3
    assert dataset.captions.to_numpy().tolist() == [[i, f"picture {i}."] for i in range(3)]
    assert dataset.instances.iloc[0].tolist() == [0, "cup", 1, 2, 3, 4, 12, 0, None]
    assert dataset.categories == ("cup",)


def test_reading_is_silent(folder, capsys):
    read_coco(folder)
    assert capsys.readouterr().out == ""


def test_what_is_missing_or_broken_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_coco(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="captions_other"):
        read_coco(folder, ["other"])
    instances_file = annotation_file(folder, "instances")
    instances_file.write_text('{"images": [')
    with pytest.raises(ValueError, match="instances_some"):
        read_coco(folder)
    instances_file.unlink()
    with pytest.raises(FileNotFoundError, match="instances_some"):
        read_coco(folder)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("captions", [1, 2]),
        ("captions", {"images": []}),
        ("captions", {"images": [{"id": 1}], "annotations": []}),
        (
            "instances",
            {"categories": [CUP], "annotations": [{"image_id": 1, "bbox": [1, 1, 1, 1]}]},
        ),
        ("instances", {"categories": None, "annotations": []}),
    ],
)
def test_what_is_no_annotation_file_is_named(folder, kind, content):
    write_json(annotation_file(folder, kind), content)
    message = rf"{kind}_some\.json is not a readable COCO annotation file"
    with pytest.raises(ValueError, match=message):
        read_coco(folder)


@pytest.mark.parametrize(
    ("kind", "rows", "key", "value", "message"),
    [
        ("captions", "annotations", "caption", 7, "caption 7 is not text"),
        ("captions", "images", "width", "60", "width '60' is not a whole number"),
        ("captions", "images", "height", True, "height True is not a whole number"),
        ("captions", "images", "id", 10**400, "image_id 10+ is not a whole number"),
        ("instances", "annotations", "area", float("nan"), "area nan is not a finite number"),
        ("instances", "annotations", "bbox", [1, 2, 3, 1e999], "h inf is not a finite number"),
        ("instances", "categories", "name", None, "category (None|nan) is not text"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(folder, kind, rows, key, value, message):
    file = annotation_file(folder, kind)
    content = json.loads(file.read_text())
    content[rows][0][key] = value
    write_json(file, content)
    with pytest.raises(ValueError, match=message):
        read_coco(folder)


def test_outlines_are_not_held_in_memory(folder):
    file = annotation_file(folder, "instances")
    outline = np.random.default_rng(0).integers(0, 64000, 100) / 100
    box = BOX | {"segmentation": [outline.tolist()]}
    write_json(file, {"categories": [CUP], "annotations": [box] * 1000})
    tracemalloc.start()
    assert len(read_coco(folder).instances) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * file.stat().st_size  # with outlines it is more than 5 times


def files_if_renamed(folder: Path, *names: str) -> list[str]:
    """Return where the images lie if the annotations give them other names."""
    file = annotation_file(folder, "captions")
    content = json.loads(file.read_text())
    for image, name in zip(content["images"], names, strict=False):
        image["file_name"] = name
    write_json(file, content)
    files = read_coco(folder).images.file[: len(names)]
    return [file.removeprefix(str(folder)) for file in files]


def test_images_lie_in_folders_of_their_split_and_never_outside(folder):
    write_image(folder / "some" / "000" / "frame.jpg")
    write_image(folder / "some" / "001" / "frame.jpg")
    write_image(folder / "secret.jpg")
    names = ["000/frame.jpg", "001/frame.jpg", "val2017/grey.jpg"]
    assert files_if_renamed(folder, *names) == [
        "/some/000/frame.jpg",
        "/some/001/frame.jpg",
        "/some/grey.jpg",
    ]
    for name in ("../secret.jpg", str(folder / "secret.jpg"), "000/../../secret.jpg"):
        assert files_if_renamed(folder, name) == ["/some/secret.jpg"]


def test_two_images_of_one_file_are_refused(folder):
    message = r"captions_some\.json: several images have the file .*some/grey\.jpg: give each"
    with pytest.raises(ValueError, match=message):
        files_if_renamed(folder, "a/grey.jpg", "b/grey.jpg")


def test_splits_are_joined_unless_they_share_an_image(folder):
    for kind in ("captions", "instances"):
        file = annotation_file(folder, kind)
        shutil.copy(file, annotation_file(folder, kind, "twin"))
    assert split_names(folder) == ["some", "twin"]
    with pytest.raises(ValueError, match="image id 0 is in more than one"):
        read_coco(folder)
    for kind in ("captions", "instances"):
        file = annotation_file(folder, kind, "twin")
        content = json.loads(file.read_text())
        for image in content["images"]:
            image["id"] += 3
        for annotation in content["annotations"]:
            annotation["image_id"] += 3
        write_json(file, content)
    dataset = read_coco(folder)
    assert dataset.images.coco_split.to_dict() == dict(enumerate(["some"] * 3 + ["twin"] * 3))
    assert dataset.captions.image_id.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.instances.image_id.tolist() == [0, 3]
    assert read_coco(folder, ["twin"]).images.index.tolist() == [3, 4, 5]


@needs_real_coco
def test_real_photographs():
    dataset = read_coco(REAL_COCO)
    assert len(dataset.images) == 300
    assert len(dataset.categories) == 80
    assert dataset.captions.groupby("image_id").size().min() >= 5
    assert dataset.instances.image_id.isin(dataset.images.index).all()
    assert unreadable_images(dataset.images).empty
