"""What is greyed in images: the pixels of the asked object, all others, or as many elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pycocotools import mask as run_lengths

from probekit.data.dataset import Dataset
from probekit.images import load_rgb
from probekit.paths import Home
from probekit.tasks.base import BuildSettings
from probekit.tasks.building import build_examples, load_instances, load_outlines
from probekit.tasks.changed_images import (
    GREY,
    IMAGE_CHANGES,
    ImageChanger,
    NotChanged,
    find_grey,
    paint_outline,
)
from tests.conftest import REAL_COCO, needs_real_coco

SIZE = (60, 40)  # width, height
TRIANGLE = [np.array([[10, 5], [30, 5], [10, 35]], np.float32)]
BOX = {"x": 10, "y": 5, "w": 20, "h": 30}


def is_grey(file) -> np.ndarray:
    return (np.array(Image.open(file)) == GREY).all(-1)


def changed_by(changer: ImageChanger, examples: pd.DataFrame) -> dict[str, np.ndarray]:
    changed = changer.change(examples, IMAGE_CHANGES)
    files = changed.examples.drop_duplicates("change").set_index("change").file
    return {name: np.array(Image.open(changer._home.resolve(file))) for name, file in files.items()}


@pytest.fixture
def make_changer(tmp_path):
    """A changer of one image of noise with one dog, and the example that asks about it."""
    pixels = np.random.default_rng(0).integers(0, GREY, (*SIZE[::-1], 3), np.uint8)
    file = tmp_path / "noise.png"
    Image.fromarray(pixels).save(file)
    examples = pd.DataFrame(
        {
            "image_id": 7,
            "file": str(file),
            "task": "object",
            "prompt": ["a dog?", "a cat?"],
            "asked": [["dog"], ["cat"]],
        }
    )

    def make(outline: object, annotated: tuple[int, int] = SIZE, **box):
        box = BOX | box
        instance = {"image_id": 7, "category": "dog", "tiny": False, **box}
        images = pd.DataFrame({"width": annotated[0], "height": annotated[1]}, index=[7])
        outlined = pd.DataFrame([instance | {"outline": outline}])
        if annotated != SIZE:
            scale = annotated[0] / SIZE[0]
            outlined[list(BOX)] *= scale
        dataset = Dataset(images, pd.DataFrame(), outlined, ("dog",))
        changer = ImageChanger(
            pd.DataFrame([instance]), dataset, folder=tmp_path / "changed", home=Home.find(tmp_path)
        )
        return changer, examples, pixels

    return make


def test_the_object_all_but_it_or_as_much_elsewhere_is_grey(make_changer):
    changer, examples, pixels = make_changer(TRIANGLE)
    changed = changed_by(changer, examples)
    grey = {name: (values == GREY).all(-1) for name, values in changed.items()}
    expected = paint_outline(BOX | {"outline": TRIANGLE}, size=SIZE)
    assert 250 < expected.sum() < 350
    assert (grey["no_object"] == expected).all()
    assert (grey["only_object"] == ~expected).all()
    assert grey["no_box"][5:35, 10:30].all() and grey["no_box"].sum() == 20 * 30
    assert not (grey["same_area"] & expected).any()
    assert 0.9 * expected.sum() <= grey["same_area"].sum() <= expected.sum()
    for name, values in changed.items():
        assert (values[~grey[name]] == pixels[~grey[name]]).all()


def test_all_questions_about_an_image_get_the_same_pixels(make_changer):
    changer, examples, _ = make_changer(TRIANGLE)
    changed = changer.change(examples, ["no_object"]).examples
    assert changed.prompt.tolist() == ["a dog?", "a cat?"]
    assert changed.file.nunique() == 1
    assert changed.row.tolist() == [0, 1]


def encode(polygons) -> dict:
    """The run lengths of polygons, as COCO has those of crowds."""
    flat = [polygon.ravel().tolist() for polygon in polygons]
    return run_lengths.merge(run_lengths.frPyObjects(flat, SIZE[1], SIZE[0]))


def count_lengths(mask_hw: np.ndarray) -> list[int]:
    """COCO's lengths of runs, column by column, those of zeros first."""
    flat = mask_hw.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *ends, len(flat)]).tolist()
    return lengths if not flat[0] else [0, *lengths]


@pytest.mark.parametrize("kind", ["compressed", "lengths"])
def test_outlines_may_be_run_lengths(kind):
    polygons = paint_outline(BOX | {"outline": TRIANGLE}, size=SIZE)
    outline = encode(TRIANGLE)
    if kind == "lengths":
        outline = {"size": list(SIZE[::-1]), "counts": count_lengths(polygons)}
    assert (paint_outline(BOX | {"outline": outline}, size=SIZE) == polygons).all()


@pytest.mark.parametrize(
    "outline",
    [
        None,
        [],
        [np.zeros((2, 2), np.float32)],
        {"size": [3, 3], "counts": [9]},
        {"counts": "?"},
        "around it",
        [polygon / 60 for polygon in TRIANGLE],  # shares of the image
        [polygon + 25 for polygon in TRIANGLE],  # of something else
    ],
)
def test_without_an_outline_that_fits_the_box_is_grey(make_changer, outline):
    changer, examples, _ = make_changer(outline)
    changed = changed_by(changer, examples)
    grey = (changed["no_object"] == GREY).all(-1)
    assert grey[5:35, 10:30].all() and grey.sum() == 20 * 30


def test_outlines_are_scaled_like_the_image(make_changer):
    changer, examples, _ = make_changer([3 * polygon for polygon in TRIANGLE], (180, 120))
    grey = (changed_by(changer, examples)["no_object"] == GREY).all(-1)
    expected = paint_outline(BOX | {"outline": TRIANGLE}, size=SIZE)
    assert (grey ^ expected).sum() < 30


def test_outlines_of_a_turned_image_are_not_taken(make_changer):
    changer, examples, _ = make_changer(TRIANGLE, SIZE[::-1])
    grey = (changed_by(changer, examples)["no_object"] == GREY).all(-1)
    assert grey.sum() == 20 * 30


def test_what_cannot_be_greyed_elsewhere_is_left_out(make_changer):
    changer, examples, _ = make_changer(None, x=0, y=0, w=60, h=25)
    changed = changer.change(examples, IMAGE_CHANGES)
    assert changed.examples.empty
    covers = "the object’s box covers more than 50% of it"
    assert changed.left_out.to_dict() == {("object", covers): 1}
    asks_about_others = examples.assign(asked=[["cat"], []])
    left_out = changer.change(asks_about_others, IMAGE_CHANGES).left_out
    assert "none of the objects that are asked about" in left_out.index[0][1]
    for asked in (None, np.nan, []):
        joined = examples.assign(asked=[asked, asked])
        assert changer.change(joined, IMAGE_CHANGES).examples.empty


@pytest.mark.parametrize("seed", range(20))
def test_an_area_that_fits_elsewhere_is_moved_in_one_piece(seed):
    mask_hw = np.zeros((90, 120), bool)
    mask_hw[30:60, 10:40] = True
    moved_hw = find_grey(mask_hw, seed=seed)["same_area"]
    rows, columns = np.flatnonzero(moved_hw.any(1)), np.flatnonzero(moved_hw.any(0))
    assert moved_hw.sum() == mask_hw.sum()
    assert np.ptp(rows) == 29 and np.ptp(columns) == 29


def test_an_area_that_fits_in_pieces_alone_is_moved_across_the_border():
    mask_hw = np.zeros((90, 120), bool)
    mask_hw[20:70, 35:85] = True
    moved_hw = find_grey(mask_hw, seed=0)["same_area"]
    assert moved_hw.sum() >= 0.9 * mask_hw.sum() and not (moved_hw & mask_hw).any()


def test_files_are_named_by_what_they_show(make_changer, tmp_path):
    changer, examples, _ = make_changer(TRIANGLE)
    files = set(changer.change(examples, IMAGE_CHANGES).examples.file)
    other, _, _ = make_changer(TRIANGLE, x=9)  # another box, the same outline
    assert len(files - set(other.change(examples, IMAGE_CHANGES).examples.file)) == 1
    outside = examples.assign(image_id="val/../../../etc")
    changer._instances["image_id"] = "val/../../../etc"
    (outlined,) = changer._outlined_by_image.values()
    changer._outlined_by_image = {"val/../../../etc": outlined}
    changer._sizes.index = ["val/../../../etc"]
    changed = changer.change(outside, IMAGE_CHANGES).examples
    assert {changer._home.resolve(file).parent for file in changed.file} == {tmp_path / "changed"}


def test_objects_all_over_the_image_leave_no_room():
    mask_hw = np.random.default_rng(0).random((80, 80)) < 0.4
    with pytest.raises(NotChanged, match="no room"):
        find_grey(mask_hw, seed=0)


def test_scenes_have_outlines_and_building_reads_none_of_them(scene_folder, tmp_path):
    settings = BuildSettings(str(scene_folder), train=30, validation=15, test=15, tasks=("object",))
    home = Home.find(tmp_path)
    examples = build_examples(settings, tmp_path / "tables", home=home)
    assert "outline" not in load_instances(tmp_path / "tables")
    dataset = load_outlines(tmp_path / "tables", home=home)
    assert dataset.instances.outline.map(type).eq(list).all()
    changer = ImageChanger(
        load_instances(tmp_path / "tables"), dataset, folder=tmp_path / "png", home=home
    )
    changed = changer.change(examples[examples.split == "test"], ["no_object"]).examples
    assert len(changed) > 20
    for file, source in zip(changed.file, examples[examples.split == "test"].file, strict=False):
        assert Image.open(home.resolve(file)).size == load_rgb(source).size


@needs_real_coco
def test_photographs_are_changed(tmp_path):
    settings = BuildSettings(str(REAL_COCO), train=60, validation=20, test=20, tasks=("category",))
    home = Home.find(tmp_path)
    examples = build_examples(settings, tmp_path / "tables", home=home)
    instances = load_instances(tmp_path / "tables")
    changer = ImageChanger(
        instances,
        load_outlines(tmp_path / "tables", home=home),
        folder=tmp_path / "png",
        home=home,
    )
    test = examples[examples.split == "test"].reset_index(drop=True)
    changed = changer.change(test, IMAGE_CHANGES)
    assert len(changed.examples) / len(IMAGE_CHANGES) + changed.left_out.sum() == len(test)
    shares = []
    for row, files in changed.examples.groupby("row"):
        grey = {one.change: is_grey(home.resolve(one.file)) for one in files.itertuples()}
        asked = instances[
            (instances.image_id == test.image_id[row]) & instances.category.isin(test.asked[row])
        ]
        boxes = np.zeros_like(grey["no_object"])
        for one in asked.itertuples():
            bottom, right = int(np.ceil(one.y + one.h)), int(np.ceil(one.x + one.w))
            boxes[int(one.y) : bottom, int(one.x) : right] = True
        outside = grey["no_object"] & ~boxes
        shares.append(outside.mean())
        assert grey["no_object"].sum() > 0.2 * boxes.sum()
    assert np.mean(shares) < 0.01  # grey pixels of the photograph itself


def test_annotations_without_outlines_are_read(tmp_path, scene_folder):
    file = next((scene_folder / "annotations").glob("instances_*.json"))
    content = json.loads(file.read_text())
    for place, annotation in enumerate(content["annotations"]):
        annotation["segmentation"] = [None, [], [["a"]], "x", {"counts": 3}][place % 5]
    copied = tmp_path / "annotations"
    copied.mkdir()
    (copied / file.name).write_text(json.dumps(content))
    captions = next((scene_folder / "annotations").glob("captions_*.json"))
    (copied / captions.name).write_bytes(captions.read_bytes())
    for folder in scene_folder.iterdir():
        if folder.name != "annotations":
            (tmp_path / folder.name).symlink_to(folder)
    settings = BuildSettings(str(tmp_path), train=30, validation=15, test=15, tasks=("object",))
    build_examples(settings, tmp_path / "tables", home=tmp_path)
    outlines = load_outlines(tmp_path / "tables", home=Home.find(tmp_path)).instances.outline
    assert not outlines.map(lambda one: isinstance(one, list)).any()
