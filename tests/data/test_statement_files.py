"""Files of statements: every format is read, faults are named by row, images are matched."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest

from probekit.data.coco import read_coco
from probekit.data.statement_files import (
    find_statement_files,
    match_statements,
    read_statements,
)
from probekit.tasks import captions
from probekit.tasks.base import BuildSettings, task_infos
from probekit.tasks.building import build_examples
from tests.conftest import REAL_COCO, REPOSITORY, needs_real_coco

PUBLISHED = REPOSITORY.parent / "shared" / "benchmarks"
QUESTION = "Is there a cup in the image?"
SPLIT_SIZES = {"train": 20, "validation": 10, "test": 10}


def write(folder: Path, name: str, content: str) -> Path:
    file = folder / name
    file.write_text(content)
    return file


def sugarcrepe(image_ids: Iterable[int]) -> str:
    rows = {
        str(i): {
            "filename": f"{image_id:012d}.jpg",
            "caption": f"A cup {i}.",
            "negative_caption": f"A car {i}.",
        }
        for i, image_id in enumerate(image_ids)
    }
    return json.dumps(rows)


def pope(image_ids: Iterable[int]) -> str:
    rows = []
    for i, image_id in enumerate(image_ids):
        name = f"COCO_val2014_{image_id:012d}.jpg"
        label = "yes" if i % 2 else "no"
        rows.append({"question_id": i, "image": name, "label": label, "text": QUESTION})
    return "\n".join(map(json.dumps, rows))


# ---------------------------------------------------------------------------------------- reading


def test_sugarcrepe_becomes_two_captions_per_row(tmp_path):
    table = read_statements(write(tmp_path, "some.json", sugarcrepe([3, 4])))
    assert table.to_numpy().tolist() == [
        ["000000000003.jpg", "A cup 0.", 1, True],
        ["000000000003.jpg", "A car 0.", 0, True],
        ["000000000004.jpg", "A cup 1.", 1, True],
        ["000000000004.jpg", "A car 1.", 0, True],
    ]
    assert table.columns.tolist() == ["image", "text", "label", "is_caption"]


def test_pope_is_read(tmp_path):
    table = read_statements(write(tmp_path, "some.json", pope([1, 2])))
    assert table.to_numpy().tolist() == [
        ["COCO_val2014_000000000001.jpg", QUESTION, 0, False],
        ["COCO_val2014_000000000002.jpg", QUESTION, 1, False],
    ]


def test_a_table_is_read(tmp_path):
    content = 'image,text,label\n1.jpg,"A cup, red",TRUE\n1.jpg,None,0\n'
    table = read_statements(write(tmp_path, "some.csv", content))
    assert table.to_numpy().tolist() == [
        ["1.jpg", "A cup, red", 1, False],
        ["1.jpg", "None", 0, False],
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # editors of Windows add a mark
def test_a_single_object_is_read(tmp_path, encoding):
    file = tmp_path / "some.jsonl"
    file.write_text('{"image": "1.jpg", "text": "x", "label": true}', encoding=encoding)
    assert read_statements(file).label.tolist() == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "image,text\n1.jpg,x\n", "has no label"),
        ("a.csv", "image,text,label\n", "has no rows"),
        (
            "a.csv",
            "image,text,label\n1.jpg,x,yes\n1.jpg,y,maybe\n",
            "row 2: label is none of yes, no",
        ),
        ("a.csv", "image,text,label\n1.jpg,,yes\n", "row 1: text is empty"),
        ("a.jsonl", '{"image": "1.jpg", "text"', "cannot be read"),
        ("a.json", "[1, 2]", "has no image, text, label"),
        ("a.csv", "", "cannot be read"),
        (
            "a.csv",
            "image,text,label\n1.jpg,a cup, red,yes\n2.jpg,a cup, blue,no\n",
            r"a\.csv cannot be read .*quotation",
        ),
        (
            "a.jsonl",
            '{"image": "1.jpg", "text": "x", "label": 1}\n'
            '{"image": "2.jpg", "text": null, "label": 1}',
            "row 2: text is empty",
        ),
        ("a.jsonl", '{"image": null, "text": "x", "label": 1}', "row 1: image is empty"),
        (
            "a.jsonl",
            '{"image": "1.jpg", "text": "x", "label": 1}\n{"image": "2.jpg", "text": "x"}',
            "row 2: label is empty",
        ),
        (
            "a.json",
            '{"0": {"filename": "1.jpg", "caption": "x", "negative_caption": "y"},'
            ' "1": {"filename": "1.jpg", "caption": "x"}}',
            "row 2: negative_caption is empty",
        ),
        (
            "a.json",
            '{"0": {"filename": "1.jpg", "caption": " ", "negative_caption": "y"}}',
            "row 1: caption is empty",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_statements(write(tmp_path, name, content))


def test_files_are_found_by_name_or_by_folder(tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    first = write(folder, "first.csv", "")
    second = write(folder, "second.json", "")
    write(folder, "README.md", "")
    assert find_statement_files("some", home=tmp_path) == {"first": first, "second": second}
    assert find_statement_files("some/first.csv", home=tmp_path) == {"first": first}
    assert find_statement_files("some/README.md", home=tmp_path) == {}
    assert find_statement_files("some/third.csv", home=tmp_path) == {}


# --------------------------------------------------------------------------------------- matching


def statements_about(*names: str) -> pd.DataFrame:
    return pd.DataFrame({"image": names, "text": "x", "label": 1, "is_caption": False})


def test_images_are_found_by_name_by_path_and_by_number():
    files = ["/d/train/7.jpg", "/d/val/7.jpg", "/d/val/000000000012.jpg"]
    images = pd.DataFrame({"file": files}, index=[1, 2, 3])
    statements = statements_about(
        "val/7.jpg",
        "./train/7.jpg",
        "COCO_val2014_000000000012.jpg",
        "000000000012.jpg",
        "8.jpg",
        "../../etc/passwd",
        "000000000002.jpg",  # the id of an image is not the number in its name
    )
    assert match_statements(statements, images).image_id.tolist() == [2, 1, 3, 3]
    with pytest.raises(ValueError, match=r"7\.jpg is the name of 2 images: write the folders"):
        match_statements(statements_about("7.jpg"), images)


# ---------------------------------------------------------------------------------- as tasks


def test_files_become_tasks_about_the_images_they_name(scene_folder, tmp_path):
    folder = tmp_path / "crepe"
    folder.mkdir()
    write(folder, "swap_obj.json", sugarcrepe(range(10, 40)))
    write(folder, "swap_att.json", sugarcrepe(range(20, 50)))
    questions = write(tmp_path, "questions.jsonl", pope([*range(15, 45), 9999]))
    tasks = ("caption", str(folder), str(questions))
    settings = BuildSettings(str(scene_folder), tasks=tasks, **SPLIT_SIZES)
    examples = build_examples(settings, tmp_path / "out")
    assert list(task_infos(examples)) == ["caption", "swap_att", "swap_obj", "questions"]
    assert set(examples.image_id) == set(range(10, 50))  # those that statements name come first
    assert (examples.groupby("image_id").split.nunique() == 1).all()
    assert examples.groupby("task").size().to_dict() == {
        "caption": 80,
        "swap_att": 60,
        "swap_obj": 60,
        "questions": 30,
    }
    prompts = examples.groupby("task").prompt.agg(set)
    assert prompts["questions"] == {QUESTION}
    assert captions.PROMPT.format(caption="A cup 3") in prompts["swap_obj"]

    write(tmp_path, "questions.jsonl", pope(range(15, 35)))  # another content is another table
    examples = build_examples(settings, tmp_path / "out")
    assert (examples.task == "questions").sum() == 20


@pytest.mark.parametrize(
    ("name", "image_ids", "message"),
    [
        ("nothing.csv", [], "unknown tasks"),
        ("caption.jsonl", range(10), "two tasks of the name 'caption'"),
        ("other.jsonl", range(900, 910), r"none of the images that .*other\.jsonl names"),
        ("few.jsonl", [1], "task few finds nothing to ask in"),
    ],
)
def test_names_that_clash_or_fit_nothing_are_refused(
    scene_folder, tmp_path, name, image_ids, message
):
    file = tmp_path / name
    if image_ids:
        file.write_text(pope(image_ids))
    settings = BuildSettings(str(scene_folder), tasks=(str(file),), **SPLIT_SIZES)
    with pytest.raises(ValueError, match=message):
        build_examples(settings, tmp_path / "out")


@needs_real_coco
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no published benchmarks at {PUBLISHED}")
def test_published_files_are_read():
    images = read_coco(REAL_COCO).images
    n_statements = {}
    n_matched = 0
    for folder in ("sugar-crepe", "pope"):
        for file in sorted((PUBLISHED / folder).glob("*.json")):
            table = read_statements(file)
            assert table.label.mean() == 0.5
            assert table.is_caption.eq(folder == "sugar-crepe").all()
            matched = match_statements(table, images)
            assert matched.image_id.isin(images.index).all()
            n_statements[file.stem] = len(table)
            n_matched += len(matched)
    assert n_statements["swap_obj"] == 490
    assert n_statements["add_att"] == 1384
    assert n_statements["coco_pope_random"] == 3000
    assert n_matched > 1000
