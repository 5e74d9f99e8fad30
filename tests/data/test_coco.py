"""COCO's layout: what is read, and what is refused by name."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from probekit.data.coco import read_coco, split_names
from probekit.images import check_images
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
    annotation_file(folder, "captions").unlink()
    instances_file.unlink()
    with pytest.raises(FileNotFoundError, match="no captions_<split>"):
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
        ("captions", "annotations", "caption", 7, "caption 7 is no text"),
        ("captions", "images", "width", "wide", "width 'wide' is no number of pixels"),
        ("captions", "images", "height", True, "height True is no number of pixels"),
        ("captions", "images", "id", 10**400, "id 10+ is neither a whole number nor text"),
        ("instances", "annotations", "area", float("nan"), "area nan is no number of square"),
        ("instances", "annotations", "bbox", [1, 2, 3, 1e999], "does not have four finite numbers"),
        ("instances", "annotations", "bbox", [], "does not have four numbers"),
        ("instances", "annotations", "category_id", None, "category_id None is neither"),
        ("instances", "categories", "name", None, "name None is no text"),
        ("instances", "categories", "name", " ", "name .* has neither a letter nor a digit"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(folder, kind, rows, key, value, message):
    file = annotation_file(folder, kind)
    content = json.loads(file.read_text())
    content[rows][0][key] = value
    write_json(file, content)
    with pytest.raises(ValueError, match=rf"{kind}_some\.json .*max_bad=1.0%(?s:.)*{message}"):
        read_coco(folder, max_bad=0.01)


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
    for kind in ("captions", "instances"):
        file = annotation_file(folder, kind)
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


# ------------------------------------------------------------------------- as exporters write it


def change(folder: Path, kind: str, edit) -> None:
    file = annotation_file(folder, kind)
    content = json.loads(file.read_text())
    edit(content)
    write_json(file, content)


def outcomes(dataset, kind: str) -> list[tuple[str, int]]:
    rows = dataset.report[dataset.report.kind == kind]
    return list(zip(rows.outcome, rows["count"], strict=True))


VALUES_READ = {
    "320.0": lambda c: c["images"][0].update(width=60.0, height="40"),
    "false": lambda c: c["annotations"][0].update(iscrowd=False),
    "no crowd": lambda c: c["annotations"][0].update(iscrowd=None),
    "ids as text": lambda c: [a.update(image_id="0", category_id="9") for a in c["annotations"]],
    "no area": lambda c: c["annotations"][0].pop("area"),
    "area 0": lambda c: c["annotations"][0].update(area=0),
    "relative area": lambda c: c["annotations"][0].update(area=12 / 2400),
    "attributes": lambda c: c["annotations"][0].update(attributes=[]),
    "box as text": lambda c: c["annotations"][0].update(bbox=["1", "2.0", "3e0", " 4 "]),
    "corners": lambda c: c["annotations"].append(BOX | {"id": 1, "bbox": [50, 30, 55, 38]}),
    "centres": lambda c: c["annotations"].append(BOX | {"id": 1, "bbox": [55, 30, 10, 8]}),
}
FIRST_BOX = {"corners": [1, 2, 4, 6], "centres": [2.5, 4, 3, 4]}


@pytest.mark.parametrize("name", VALUES_READ)
def test_what_can_only_mean_one_thing_is_read(folder, name):
    if name in FIRST_BOX:
        change(folder, "instances", lambda c: c["annotations"][0].update(bbox=FIRST_BOX[name]))
    change(folder, "instances", VALUES_READ[name])
    dataset = read_coco(folder)
    assert dataset.instances.iloc[0].tolist() == [0, "cup", 1, 2, 3, 4, 12, 0, None]


@pytest.mark.parametrize(
    "ids", [["12e4", "120000", "120000.0"], ["123456789012345678", "123456789012345679", "1"]]
)
def test_ids_as_text_that_look_alike_stay_apart(folder, ids):
    def rename(content: dict) -> None:
        for image in content["images"]:
            image["id"] = ids[image["id"]]
        for row in content["annotations"]:
            row["image_id"] = ids[row["image_id"]]

    for kind in ("captions", "instances"):
        change(folder, kind, rename)
    dataset = read_coco(folder)
    assert list(map(str, dataset.images.index)) == ids
    assert dataset.captions.caption.tolist() == ["picture 0.", "picture 1.", "picture 2."]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_any_encoding_of_json_is_read(folder, encoding):
    expected = read_coco(folder).captions
    for file in (folder / "annotations").glob("*.json"):
        file.write_text(file.read_text(encoding="utf-8"), encoding=encoding)
    pd.testing.assert_frame_equal(read_coco(folder).captions, expected)


def test_shares_of_the_image_are_boxes_in_pixels(folder):
    box = [1 / 60, 2 / 40, 3 / 60, 4 / 40]
    change(folder, "instances", lambda c: c["annotations"][0].update(bbox=box))
    dataset = read_coco(folder)
    assert dataset.instances[["x", "y", "w", "h"]].iloc[0].tolist() == pytest.approx([1, 2, 3, 4])
    assert ("corrected", 1) in outcomes(dataset, "instances")


def test_a_box_beyond_its_image_is_cut_off_or_left_out(folder):
    boxes = [[0, 0, 10, 10]] * 40 + [[50, 30, 40, 5], [70, 50, 5, 5]]
    rows = [BOX | {"id": i, "bbox": box} for i, box in enumerate(boxes)]
    change(folder, "instances", lambda c: c.update(annotations=rows))
    dataset = read_coco(folder)
    assert len(dataset.instances) == 41
    assert dataset.instances[["x", "y", "w", "h"]].iloc[-1].tolist() == [50, 30, 10, 5]
    assert outcomes(dataset, "instances") == [("read", 42), ("corrected", 1), ("left out", 1)]


def test_sizes_that_no_annotation_states_are_those_of_the_files(folder):
    for kind, size in (("captions", {"width": -1, "height": 0}), ("instances", {"width": None})):
        change(folder, kind, lambda c, size=size: [image.update(size) for image in c["images"]])
    dataset = read_coco(folder)
    assert dataset.images[["width", "height"]].to_numpy().tolist() == [[60, 40]] * 3


def test_one_bad_record_among_many_is_left_out_and_counted(folder):
    rows = [BOX | {"id": i} for i in range(200)]
    rows[7] = {"id": 7, "image_id": 0, "category_id": 9}
    change(folder, "instances", lambda c: c.update(annotations=rows))
    dataset = read_coco(folder, max_bad=0.01)
    assert len(dataset.instances) == 199
    left_out = dataset.report[dataset.report.outcome == "left out"].iloc[0]
    assert left_out["count"] == 1
    assert left_out["first"] == "record 8 (id 7): bbox is missing"


def test_captions_without_words_are_left_out(folder):
    change(folder, "captions", lambda c: c["annotations"][0].update(caption=" . "))
    dataset = read_coco(folder)
    assert dataset.captions.image_id.tolist() == [1, 2]
    assert outcomes(dataset, "captions") == [("read", 3), ("left out", 1)]


def test_one_file_may_have_boxes_and_captions(folder):
    both = {}
    for kind in ("captions", "instances"):
        content = json.loads(annotation_file(folder, kind).read_text())
        both |= content | {"annotations": both.get("annotations", []) + content["annotations"]}
    expected = read_coco(folder)
    for kind in ("captions", "instances"):
        write_json(annotation_file(folder, kind), both)
    together = read_coco(folder)
    annotation_file(folder, "captions").unlink()
    alone = read_coco(folder)
    for dataset in (together, alone):
        assert dataset.captions.equals(expected.captions)
        assert dataset.instances.equals(expected.instances)


def test_layouts_of_exporters(folder):
    expected = read_coco(folder)
    annotation_file(folder, "captions").unlink()
    cvat = folder / "annotations" / "instances_default.json"
    annotation_file(folder, "instances").rename(cvat)
    (folder / "images").mkdir()
    (folder / "some").rename(folder / "images" / "default")
    dataset = read_coco(folder)
    assert dataset.instances.equals(expected.instances)
    assert all(Path(file).is_file() for file in dataset.images.file)
    (folder / "images" / "default").rename(folder / "train")
    cvat.rename(folder / "train" / "_annotations.coco.json")
    dataset = read_coco(folder, ["train"])
    assert dataset.instances.equals(expected.instances)
    assert dataset.captions.empty
    assert all(Path(file).is_file() for file in dataset.images.file)


def test_a_root_that_no_box_belongs_to_is_no_category(folder):
    root = {"id": 0, "name": "my-dataset", "supercategory": "none"}
    change(folder, "instances", lambda c: c["categories"].insert(0, root))
    assert read_coco(folder).categories == ("cup",)


def test_categories_of_all_splits_are_joined_and_ids_that_begin_anew_are_numbered_on(folder):
    for kind in ("captions", "instances"):
        content = json.loads(annotation_file(folder, kind).read_text())
        for image in content["images"]:
            image["file_name"] = f"other_{image['file_name']}"
        if kind == "instances":
            content["categories"] = [{"id": 9, "name": "plate"}, {"id": 10, "name": "cup"}]
        write_json(annotation_file(folder, kind, "more"), content)
    (folder / "more").mkdir()
    for name, colour in (("red", "green"), ("grey", "black"), ("blue", "white")):
        Image.new("RGB", (60, 40), colour).save(folder / "more" / f"other_{name}.jpg")
    dataset = read_coco(folder, ["some", "more"])
    assert dataset.categories == ("cup", "plate")
    assert dataset.images.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.instances.category.tolist() == ["cup", "plate"]
    assert dataset.instances.image_id.tolist() == [0, 3]
    assert dataset.images.file[3].endswith("more/other_red.jpg")


def test_instances_of_other_images_than_the_captions_are_refused(folder):
    def move(content):
        for image in content["images"]:
            image["id"] += 5000
        content["annotations"][0]["image_id"] += 5000

    change(folder, "instances", move)
    with pytest.raises(ValueError, match="take the two files of the same split"):
        read_coco(folder)


@needs_real_coco
def test_real_photographs():
    dataset = read_coco(REAL_COCO)
    assert len(dataset.images) == 300
    assert len(dataset.categories) == 80
    assert dataset.captions.groupby("image_id").size().min() >= 5
    assert dataset.instances.image_id.isin(dataset.images.index).all()
    assert check_images(dataset.images).reason.isna().all()
