"""COCO as any exporter may write it: each record is read as it is meant, or counted as left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from probekit.data.coco import read_coco

SIZE = (64, 48)
IMAGES = 4
UNLISTED = 77
MISSING = object()  # the field is not written

Record = dict[str, Any]


class Spelled(NamedTuple):
    """A record as it is written, and what it means: None where it cannot be read."""

    written: Record
    meaning: tuple | None


class Exported(NamedTuple):
    """What an exporter writes, by kind of record."""

    layout: str
    encoding: str
    images: list[Spelled]
    captions: list[Spelled]
    instances: list[Spelled]


def one_of(*values: object) -> st.SearchStrategy:
    return st.sampled_from(values)


def number(value: int) -> st.SearchStrategy:
    return one_of(value, float(value), str(value))


def write(**fields: object) -> Record:
    return {name: value for name, value in fields.items() if value is not MISSING}


@st.composite
def image_records(draw, image_id: int) -> Spelled:
    """An image; one without a file name cannot be read."""
    file_name = f"{image_id:04d}.png"
    is_readable = draw(st.integers(0, 9)) > 0
    no_size = one_of(MISSING, None, 0, -1, "0")
    written = write(
        id=draw(number(image_id)),
        file_name=draw(one_of(file_name, f"a\\b\\{file_name}"))
        if is_readable
        else draw(one_of(MISSING, None, 3)),
        width=draw(number(SIZE[0]) | no_size),
        height=draw(number(SIZE[1]) | no_size),
        license=draw(one_of(MISSING, None, "CC")),
    )
    return Spelled(written, (image_id, file_name) if is_readable else None)


IMAGE_IDS = st.integers(1, IMAGES) | st.just(UNLISTED)


@st.composite
def caption_records(draw) -> Spelled:
    """A caption; what has no words, and what is no text, is left out."""
    image_id = draw(IMAGE_IDS)
    caption = draw(one_of("a dog", "Ein Hund läuft.", "一只狗", "7", "two\u2028lines"))
    readable = draw(st.integers(0, 9)) > 1
    written = write(
        id=draw(one_of(MISSING, 1, "x")),
        image_id=draw(number(image_id)),
        caption=caption if readable else draw(one_of(MISSING, None, 3, "", " . ", "!?")),
    )
    return Spelled(written, (image_id, caption) if readable else None)


@st.composite
def instance_records(draw) -> Spelled:
    """An object; one without a box, or of no category, cannot be read."""
    image_id = draw(IMAGE_IDS)
    category = draw(st.integers(1, 3))
    x, y = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    w, h = draw(st.integers(3, 20)), draw(st.integers(3, 20))
    area = draw(st.integers(2, 9) | one_of(MISSING, None, 0))
    iscrowd = draw(one_of(0, 1, False, True, None, MISSING))
    written = write(
        image_id=draw(number(image_id)),
        category_id=draw(number(category)),
        bbox=[x, float(y), str(w), h],
        area=area,
        iscrowd=iscrowd,
        segmentation=draw(one_of(MISSING, [], [[1, 2, 3, 4]])),
        attributes=draw(one_of(MISSING, None, [], {"occluded": True})),
    )
    meaning = (
        image_id,
        f"name {category}",
        (x, y, w, h),
        w * h if area in (MISSING, None, 0) else area,
        int(iscrowd in (1, True)),
    )
    fault = draw(st.integers(0, 11))
    if fault == 0:
        written["bbox"] = draw(one_of([1, 2, 3], None, "x", [0, 0, -1, 5], [0, 0, "wide", 5]))
    elif fault == 1:
        written["category_id"] = draw(one_of(99, None, [1]))
    return Spelled(written, meaning if fault > 1 else None)


EXPORTED = st.builds(
    Exported,
    layout=one_of("two files", "captions alone", "instances alone", "one file", "beside images"),
    encoding=one_of("utf-8", "utf-8-sig"),
    images=st.tuples(*[image_records(image_id) for image_id in range(1, IMAGES + 1)]).map(list),
    captions=st.lists(caption_records(), max_size=6),
    instances=st.lists(instance_records(), max_size=6),
)


def written(records: list[Spelled]) -> list[Record]:
    return [record.written for record in records]


def write_files(folder: Path, exported: Exported) -> None:
    """Write the files of a layout."""
    images = written(exported.images)
    categories = [{"id": number, "name": f"name {number}"} for number in (1, 2, 3)]
    captions = {"images": images, "annotations": written(exported.captions)}
    instances = {
        "images": images,
        "annotations": written(exported.instances),
        "categories": categories,
    }
    both = instances | {"annotations": written([*exported.captions, *exported.instances])}
    files = {
        "two files": {
            "annotations/captions_some.json": captions,
            "annotations/instances_some.json": instances,
        },
        "captions alone": {"annotations/captions_some.json": captions},
        "instances alone": {"annotations/instances_some.json": instances},
        "one file": {"export.json": both},
        "beside images": {"some/_annotations.coco.json": both},
    }
    for name, content in files[exported.layout].items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding=exported.encoding)


def all_fail(records: list[Spelled], *, wordless: bool = False) -> bool:
    """Tell whether a list has records and none can be read: captions without words can."""
    readable = [
        record
        for record in records
        if record.meaning or (wordless and isinstance(record.written.get("caption"), str))
    ]
    return bool(records) and not readable


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("picture") / "one.png"
    Image.new("RGB", SIZE).save(file)
    return file.read_bytes()


@pytest.mark.slow
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(exported=EXPORTED)
def test_each_record_is_read_as_it_is_meant_or_counted(exported, picture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    image_folder = folder / ("images" if exported.layout == "one file" else "some")
    image_folder.mkdir()
    for number in range(1, IMAGES + 1):
        (image_folder / f"{number:04d}.png").write_bytes(picture + bytes([number]))
    has_captions = exported.layout != "instances alone"
    has_instances = exported.layout != "captions alone"
    write_files(folder, exported)
    captions = exported.captions if has_captions else []
    instances = exported.instances if has_instances else []
    unreadable = (
        all_fail(exported.images) or all_fail(captions, wordless=True) or all_fail(instances)
    )
    if unreadable:
        event("refused")
        with pytest.raises(ValueError, match=r"some\.json|export\.json|_annotations\.coco\.json"):
            read_coco(folder)
        return
    event("read")
    dataset = read_coco(folder)
    images = dict(record.meaning for record in exported.images if record.meaning)
    assert {image: Path(file).name for image, file in dataset.images.file.items()} == images
    assert (dataset.images[["width", "height"]] == SIZE).all(axis=None)
    assert list(dataset.captions.itertuples(index=False, name=None)) == [
        record.meaning for record in captions if record.meaning and record.meaning[0] in images
    ]
    read_instances = [
        (row.image_id, row.category, (row.x, row.y, row.w, row.h), row.area, row.iscrowd)
        for row in dataset.instances.itertuples()
    ]
    assert read_instances == [
        record.meaning for record in instances if record.meaning and record.meaning[0] in images
    ]
    counts = dataset.report.groupby(["kind", "outcome"])["count"].sum()
    for kind, table in (("captions", dataset.captions), ("instances", dataset.instances)):
        left_out = counts.get((kind, "left out"), 0)
        assert counts.get((kind, "read"), 0) == len(table) + left_out
