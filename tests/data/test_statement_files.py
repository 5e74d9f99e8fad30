"""Files of statements: every format is read, faults are named by row, images are matched."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest

from probekit.data.coco import read_coco
from probekit.data.image_names import match_names
from probekit.data.report import ReadingReport
from probekit.data.statement_files import (
    find_statement_files,
    read_statements,
    usable_statements,
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


def test_vsr_is_read(tmp_path):
    row = {
        "image": "000000000007.jpg",
        "image_link": "http://images.cocodataset.org/train2017/000000000007.jpg",
        "caption": "The cup is left of the car.",
        "label": 0,
        "relation": "left of",
        "annotator_id": 2,
        "vote_true_validator_id": [1],
    }
    table = read_statements(write(tmp_path, "some.jsonl", json.dumps(row)))
    expected = [["000000000007.jpg", "The cup is left of the car.", 0, True]]
    assert table.to_numpy().tolist() == expected


def test_winoground_becomes_four_statements_per_row(tmp_path):
    row = {
        "id": 0,
        "image_0": "ex_0_img_0",
        "image_1": "ex_0_img_1",
        "caption_0": "a cup on a car",
        "caption_1": "a car on a cup",
        "tag": "",
    }
    file = write(tmp_path, "examples.jsonl", json.dumps(row))
    assert read_statements(file).to_numpy().tolist() == [
        ["ex_0_img_0", "a cup on a car", 1, True],
        ["ex_0_img_0", "a car on a cup", 0, True],
        ["ex_0_img_1", "a car on a cup", 1, True],
        ["ex_0_img_1", "a cup on a car", 0, True],
    ]
    images = pd.DataFrame({"file": ["/d/ex_0_img_0.png", "/d/ex_0_img_1.png"]}, index=[4, 5])
    usable = usable_statements(file, images, ReadingReport())
    assert usable.image_id.tolist() == [4, 4, 5, 5]


@pytest.mark.parametrize("column", ["text", "Statement", "question", "prompt"])
@pytest.mark.parametrize("label", ["label", "Answer"])
def test_a_text_is_a_whole_prompt_however_its_column_is_called(tmp_path, column, label):
    file = write(tmp_path, "some.csv", f"image;{column};{label}\n1.jpg;{QUESTION};No\n")
    assert read_statements(file).to_numpy().tolist() == [["1.jpg", QUESTION, 0, False]]


@pytest.mark.parametrize(
    ("written", "label"),
    [
        *((text, 1) for text in ("yes", "Yes ", "TRUE", "1", "1.0", True, 1, 1.0)),
        *((text, 0) for text in ("no", "NO", "False", "0", "0.0", False, 0, 0.0)),
    ],
)
def test_labels_mean_yes_or_no(tmp_path, written, label):
    row = {"image": "1.jpg", "text": "x", "label": written}
    assert read_statements(write(tmp_path, "some.json", json.dumps(row))).label.tolist() == [label]


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
            "image,sentence1,sentence2,label\n1.jpg,x,y,yes\n",
            "has no text: it has the columns image, sentence1, sentence2, label, .*statement",
        ),
        ("a.csv", "image,caption,question,label\n1.jpg,x,y,yes\n", "both name the text and differ"),
        ("a.csv", "image,text,label\n1.jpg,x,-1\n", "row 1: label is none of yes, no"),
        (
            "a.csv",
            "image,text,label\n1.jpg,x,yes\n1.jpg,y,maybe\n",
            "row 2: label is none of yes, no",
        ),
        ("a.csv", "image,text,label\n1.jpg,,yes\n", "row 1: text is empty"),
        ("a.jsonl", '{"image": "1.jpg", "text"', "cannot be read"),
        ("a.json", "[1, 2]", "row 1 is no object"),
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
    third = write(folder, "third.TXT", "")
    assert find_statement_files("some", home=tmp_path) == {"first": first, "second": second}
    assert find_statement_files("some/third.TXT", home=tmp_path) == {"third": third}
    assert find_statement_files("some/third.csv", home=tmp_path) == {}


def test_two_files_of_one_task_are_refused(tmp_path):
    write(tmp_path, "first.csv", "")
    write(tmp_path, "first.json", "")
    write(tmp_path, ".first.csv", "")
    with pytest.raises(ValueError, match=r"first\.csv and .*first\.json would be one task"):
        find_statement_files(str(tmp_path))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"some\.csv does not exist"):
        read_statements(tmp_path / "some.csv")


# --------------------------------------------------------------------------------------- matching


def test_images_are_found_by_name_by_path_and_by_number():
    files = ["/d/train/7.jpg", "/d/val/7.jpg", "/d/val/000000000012.jpg"]
    images = pd.DataFrame({"file": files}, index=[1, 2, 3])
    names = pd.Series(
        [
            "val/7.jpg",
            "./train/7.jpg",
            "COCO_val2014_000000000012.jpg",
            "000000000012.jpg",
            "8.jpg",
            "../../etc/passwd",
            "000000000002.jpg",  # the id of an image is not the number in its name
        ]
    )
    image_ids = names.map(match_names(names, images).image_of.get)
    assert image_ids.dropna().tolist() == [2, 1, 3, 3]
    with pytest.raises(ValueError, match=r"7\.jpg is the name of 2 images: write the folders"):
        match_names(pd.Series(["7.jpg"]), images)


def test_what_is_left_out_is_counted_and_said(tmp_path, capsys):
    rows = "1.jpg,x,yes\n1.JPG,y,yes\n1.jpg,z,yes\n1.jpg,z,no\n3.jpg,x,no\n2.jpg,Café,no\n"
    file = tmp_path / "some.csv"
    file.write_bytes(f"image,text,label\n{rows}".encode("cp1252"))
    images = pd.DataFrame({"file": ["/d/1.jpg", "/d/2.jpg"]}, index=[7, 8])
    report = ReadingReport()
    statements = usable_statements(file, images, report)
    assert statements.image_id.tolist() == [7, 7, 7, 8]
    assert statements.text.tolist() == ["x", "z", "z", "Café"]
    counts = report.table().groupby(["kind", "outcome"])["count"].sum()
    assert counts["statements"].to_dict() == {"corrected": 6, "left out": 2, "read": 6, "used": 4}
    assert "1 statements are said to be both true and false" in capsys.readouterr().out
    said = "\n".join(report.lines())
    assert "2 statements left out: the name fits no image of the dataset" in said
    assert "such as 1.JPG, 3.jpg" in said
    assert "is not UTF-8, and is read as cp1252" in said


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
        ("nothing.csv", [], r"unknown tasks .*/nothing\.csv does not exist"),
        ("caption.jsonl", range(10), "two tasks of the name 'caption'"),
        ("other.jsonl", range(900, 910), r"none of the images that .*other\.jsonl names"),
        ("same.jsonl", [4] * 9, "label of all 9 statements of .*same.jsonl is no"),
        ("few.jsonl", [1], "task few finds nothing to ask in"),
    ],
)
def test_names_that_clash_or_fit_nothing_are_refused(
    scene_folder, tmp_path, name, image_ids, message
):
    file = tmp_path / name
    if image_ids:
        content = pope(image_ids)
        file.write_text(content.replace("yes", "no") if name == "same.jsonl" else content)
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
            image_ids = table.image.map(match_names(table.image, images).image_of.get).dropna()
            assert image_ids.isin(images.index).all()
            n_statements[file.stem] = len(table)
            n_matched += len(image_ids)
    assert n_statements["swap_obj"] == 490
    assert n_statements["add_att"] == 1384
    assert n_statements["coco_pope_random"] == 3000
    assert n_matched > 1000
