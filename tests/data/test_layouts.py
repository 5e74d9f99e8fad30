"""Datasets in other layouts than COCO's: captions are matched to images, faults are named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from probekit.data.dataset import Dataset
from probekit.data.layouts import dataset_state, read_dataset
from probekit.tasks.base import BuildSettings
from probekit.tasks.building import build_examples
from probekit.tasks.registry import TASKS

NUMBERS = range(1000, 1030)
CAPTIONS = ["A red cup.", "A blue car, and a kite"]
SPLIT_SIZES = {"train": 18, "validation": 6, "test": 6}


@pytest.fixture
def photos(scene_folder, tmp_path) -> Path:
    """A folder of 30 images, 1000.jpg to 1029.jpg, and nothing else."""
    for i, number in enumerate(NUMBERS):
        shutil.copy(scene_folder / "scenes" / f"{i:012d}.jpg", tmp_path / f"{number}.jpg")
    return tmp_path


def caption_lines(line: str, header: str = "") -> str:
    """Return a table with two lines per image, filled with its number and a caption."""
    lines = [header] if header else []
    for number in NUMBERS:
        for i, caption in enumerate(CAPTIONS):
            lines.append(line.format(number=number, i=i, caption=f"{caption} {number}"))
    return "\n".join(lines)


FLICKR8K = caption_lines('{number}.jpg,"{caption}"', header="image,caption")


def check_captions(dataset: Dataset, n_images: int = 30, n_captions: int = 2) -> None:
    assert len(dataset.images) == n_images
    assert dataset.images.width.eq(320).all()
    assert dataset.images.height.eq(240).all()
    assert dataset.instances.empty
    assert dataset.categories == ()
    counts = dataset.captions.groupby("image_id").size()
    assert len(counts) == n_images
    assert counts.eq(n_captions).all()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.txt", FLICKR8K),
        (
            "results.csv",
            caption_lines(
                '{number}.jpg| {i}| {caption} "so" .', header="image_name| comment_number| comment"
            ),
        ),
        ("Flickr.token", caption_lines("{number}.jpg#{i}\t{caption}")),
        ("metadata.csv", caption_lines('{number}.jpg,"{caption}"', header="file_name,text")),
        (
            "metadata.csv",  # a label of a class, not of a statement
            caption_lines('{number}.jpg,"{caption}",1', header="file_name,text,label"),
        ),
    ],
)
def test_tables_of_text_are_read(photos, name, content):
    (photos / name).write_text(content)
    dataset = read_dataset(photos)
    check_captions(dataset)
    files = dataset.images.file[dataset.captions.image_id]
    for file, caption in zip(files, dataset.captions.caption, strict=True):
        assert Path(file).stem in caption


@pytest.mark.parametrize(
    ("name", "rows", "start"),
    [
        ("metadata.jsonl", [{"file_name": f"{n}.jpg", "captions": CAPTIONS} for n in NUMBERS], ""),
        (
            "metadata.jsonl",
            [{"file_name": f"{n}.jpg", "text": caption} for n in NUMBERS for caption in CAPTIONS],
            "",
        ),
        (
            "captions.jsonl",
            [{"image": f"{n}.jpg", "captions": CAPTIONS} for n in NUMBERS],
            "\ufeff",
        ),
    ],
)
def test_tables_of_json_are_read(photos, name, rows, start):
    (photos / name).write_text(start + "\n".join(map(json.dumps, rows)))
    dataset = read_dataset(photos)
    check_captions(dataset)
    assert set(dataset.captions.caption) == set(CAPTIONS)


def test_splits_of_an_image_folder(photos):
    for split, numbers in (("train", NUMBERS[:20]), ("test", NUMBERS[20:])):
        (photos / split).mkdir()
        rows = []
        for number in numbers:
            (photos / f"{number}.jpg").rename(photos / split / f"{number}.jpg")
            rows.append(json.dumps({"file_name": f"{number}.jpg", "captions": CAPTIONS}))
        (photos / split / "metadata.jsonl").write_text("\n".join(rows))
    check_captions(read_dataset(photos))
    check_captions(read_dataset(photos, ["test"]), n_images=10)
    with pytest.raises(ValueError, match=r"no folders val: .* coco_splits from test, train"):
        read_dataset(photos, ["val"])


@pytest.fixture
def twins(scene_folder, tmp_path) -> Path:
    """Images of the same three names in the folders train and test."""
    for split, first in (("train", 0), ("test", 20)):
        (tmp_path / split).mkdir()
        for i in range(3):
            scene = scene_folder / "scenes" / f"{first + i:012d}.jpg"
            shutil.copy(scene, tmp_path / split / f"{i}.jpg")
    return tmp_path


@pytest.mark.parametrize(("splits", "n_captions"), [(None, 6), (["test"], 3)])
def test_the_folders_in_a_name_say_which_image_is_meant(twins, splits, n_captions):
    names = [f"{split}/{i}.jpg" for i in range(3) for split in ("train", "test")]
    lines = ["image,caption", *(f"{name},of {name}" for name in names)]
    (twins / "captions.csv").write_text("\n".join(lines))
    dataset = read_dataset(twins, splits)
    files = dataset.images.file[dataset.captions.image_id]
    expected = [f"of {file.removeprefix(f'{twins}/')}" for file in files]
    assert dataset.captions.caption.tolist() == expected
    assert len(expected) == n_captions


@pytest.mark.parametrize("splits", [None, ["test"]])
def test_a_name_that_two_images_have_is_refused(twins, splits):
    (twins / "captions.csv").write_text("image,caption\n1.jpg,of which?\n")
    message = r"captions\.csv: 1\.jpg is the name of 2 images: write the folders"
    with pytest.raises(ValueError, match=message):
        read_dataset(twins, splits)


@pytest.mark.parametrize(
    "text",
    [
        "This is Flickr30k, as we received it.\n\nIt has images, captions, and more.\n",
        "1000.jpg\n1001.jpg\n",
    ],
)
def test_other_texts_beside_the_images_do_not_matter(photos, text):
    (photos / "README.txt").write_text(text)
    with pytest.raises(ValueError, match=r"README\.txt .*(put it elsewhere|quotation marks)"):
        read_dataset(photos)  # alone, it might be meant as a table of captions
    (photos / "statements.csv").write_text("image,text,label\n1000.jpg,Is there a cup?,yes\n")
    assert read_dataset(photos).captions.empty
    (photos / "captions.txt").write_text(FLICKR8K)
    check_captions(read_dataset(photos))


@pytest.mark.parametrize(
    ("rows", "caption_column"),
    [
        ([{"file_name": "1000.jpg", "text": None}, {"file_name": "1001.jpg"}], "text"),
        ([{"file_name": "1000.jpg", "captions": [None, ""]}], "captions"),
        ([{"text": "a cup"}], "text"),
    ],
)
def test_a_row_that_lacks_something_is_passed_over(photos, rows, caption_column):
    complete = {"file_name": "1002.jpg", caption_column: "a cup"}
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*rows, complete])))
    assert read_dataset(photos).captions.to_numpy().tolist() == [[2, "a cup"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "captions.csv",
            caption_lines("{number}.jpg,{caption},{caption}", header="image,caption"),
            "quotation marks",
        ),
        ("metadata.jsonl", '{"file_name": "1000.jpg", "te', "one JSON object per line"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(photos, name, content, message):
    (photos / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*{message}"):
        read_dataset(photos)


# --------------------------------------------------------------------- several tables, and no table


@pytest.mark.parametrize("other", ["Flickr8k.lemma.token.txt", "A.lemma.csv"])
def test_lemmas_beside_captions_are_left_out_with_a_line(photos, capsys, other):
    lemmas = FLICKR8K if other.endswith("csv") else caption_lines("{number}.jpg#{i}\t{caption}")
    (photos / other).write_text(lemmas.replace("A red cup", "red cup"))
    (photos / "Flickr8k.token.txt").write_text(caption_lines("{number}.jpg#{i}\t{caption}"))
    dataset = read_dataset(photos)
    check_captions(dataset)
    assert dataset.captions.caption.str.startswith("A ").all()
    said = capsys.readouterr().out
    assert f"{other}: 60 captions left out: they are lemmas" in said
    assert dataset.report.groupby("outcome")["count"].sum()["read"] == 30 + 120


def test_the_lists_of_flickr8k_are_no_captions(photos, capsys):
    pairs = "".join(f"{n}.jpg\t{n + 1}.jpg#2\t0.0\t0\t3\n" for n in NUMBERS)
    (photos / "CrowdFlowerAnnotations.txt").write_text(pairs)
    (photos / "Flickr_8k.trainImages.txt").write_text("".join(f"{n}.jpg\n" for n in NUMBERS))
    (photos / "readme.txt").write_text("If you use this, please cite us, and write: a, b\n")
    (photos / "Flickr8k.token.txt").write_text(caption_lines("{number}.jpg#{i}\t{caption}"))
    check_captions(read_dataset(photos))
    said = capsys.readouterr().out
    assert "3 tables and texts left out: they have no captions, such as CrowdFlower" in said


def test_all_tables_of_captions_are_read(photos, capsys):
    lines = FLICKR8K.splitlines()
    (photos / "train.csv").write_text("\n".join(lines[:41]))
    (photos / "val.csv").write_text("\n".join([lines[0], *lines[41:]]))
    check_captions(read_dataset(photos))
    assert capsys.readouterr().out == ""
    (photos / "all.tsv").write_text(FLICKR8K.replace(",", "\t", 1).replace(".jpg,", ".jpg\t"))
    check_captions(read_dataset(photos))
    assert (
        "train.csv: 40 captions left out: another table has captions of the image, too"
        in capsys.readouterr().out
    )


def test_tables_that_contradict_each_other_are_refused(photos):
    (photos / "captions.csv").write_text(FLICKR8K)
    (photos / "captions.de.csv").write_text("image,caption\n1003.jpg,Eine rote Tasse\n")
    message = r"captions\.csv and .*captions\.de\.csv have different captions .*\(1 of them, .*1003"
    with pytest.raises(ValueError, match=message):
        read_dataset(photos)


def test_captions_of_an_unreadable_table_are_not_passed_over(photos):
    (photos / "a.csv").write_text(FLICKR8K)
    (photos / "b.csv").write_text("image,caption\n1003.jpg,a cup, red\n")
    with pytest.raises(ValueError, match=r"b\.csv cannot be read .*row 1 has 3 fields"):
        read_dataset(photos)


def test_karpathys_json_is_read(photos):
    rows = [
        {
            "filepath": "val2014",
            "filename": f"{number}.jpg",
            "imgid": number,
            "split": "train",
            "sentences": [{"raw": caption, "tokens": caption.split()} for caption in CAPTIONS],
        }
        for number in NUMBERS
    ]
    (photos / "dataset_flickr30k.json").write_text(json.dumps({"images": rows, "dataset": "x"}))
    check_captions(read_dataset(photos))


def test_a_table_about_other_images_is_named(photos, capsys):
    (photos / "a.csv").write_text("image,caption\n1.jpg,x\n")
    with pytest.raises(ValueError, match=r"a\.csv names none of the 30 images .*\(1\.jpg\)"):
        read_dataset(photos)
    (photos / "b.csv").write_text(FLICKR8K)
    check_captions(read_dataset(photos, max_bad=0))
    assert "a.csv: 1 captions left out: the name fits no image" in capsys.readouterr().out


@pytest.mark.parametrize("write_list", [json.dumps, str])
def test_a_list_in_a_field_is_several_captions(photos, write_list):
    field = write_list(CAPTIONS).replace('"', '""')
    (photos / "metadata.csv").write_text(
        "file_name,captions\n" + "".join(f'{number}.jpg,"{field}"\n' for number in NUMBERS)
    )
    dataset = read_dataset(photos)
    check_captions(dataset)
    assert set(dataset.captions.caption) == set(CAPTIONS)


def test_tables_may_lie_in_a_folder_of_their_own(photos):
    (photos / "text").mkdir()
    (photos / "text" / "captions.txt").write_text(FLICKR8K)
    (photos / "text" / "README.txt").write_text("Captions, and images")
    (photos / "README.txt").write_text("Captions, and images")
    check_captions(read_dataset(photos))


@pytest.mark.parametrize("place", ["", "train"])
def test_texts_beside_images_are_their_captions(photos, place):
    (photos / place).mkdir(exist_ok=True)
    before = dataset_state(photos)
    for number in NUMBERS:
        image = (photos / f"{number}.jpg").rename(photos / place / f"{number}.jpg")
        lines = [f"{caption} {number}" for caption in CAPTIONS]
        image.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert dataset_state(photos) != before
    dataset = read_dataset(photos)
    check_captions(dataset)
    first = dataset.captions[dataset.captions.image_id == 0]
    assert first.caption.tolist() == [f"{caption} 1000" for caption in CAPTIONS]


def test_boxes_in_texts_beside_images_are_no_captions(photos):
    for number in NUMBERS:
        (photos / f"{number}.txt").write_text("0 0.5 0.5 0.2 0.3\n1 0.1 0.2 0.1 0.1\n")
    assert read_dataset(photos).captions.empty
    (photos / "captions.csv").write_text(FLICKR8K, encoding="utf-8")
    check_captions(read_dataset(photos))


def test_a_text_beside_two_images_of_its_name_is_left_out_and_counted(photos, capsys):
    shutil.copy(photos / "1000.jpg", photos / "1000.jpeg")
    for number in NUMBERS:
        (photos / f"{number}.txt").write_text(f"A cup {number}", encoding="utf-8")
    assert len(read_dataset(photos).captions) == 29
    assert "1 captions left out: the name fits no image, or several" in capsys.readouterr().out


def test_texts_and_a_table_that_say_different_things_are_refused(photos):
    (photos / "captions.csv").write_text(FLICKR8K, encoding="utf-8")
    (photos / "1000.txt").write_text("Something else.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"have different captions of the same images .*1000.jpg"):
        read_dataset(photos)


def test_images_in_formats_that_are_not_read_are_named(photos, capsys):
    (photos / "captions.csv").write_text(FLICKR8K, encoding="utf-8")
    for number in range(1003, 1030):
        (photos / f"{number}.jpg").rename(photos / f"{number}.heic")
    dataset = read_dataset(photos)
    assert len(dataset.images) == 3
    assert "27 images left out: their formats are not read" in capsys.readouterr().out
    counts = dataset.report[dataset.report.kind == "images"].groupby("outcome")["count"].sum()
    assert counts.to_dict() == {"read": 30, "left out": 27}
    for number in range(1000, 1003):
        (photos / f"{number}.jpg").rename(photos / f"{number}.HEIC")
    with pytest.raises(FileNotFoundError, match=r"the 30 images .* convert them to JPEG or PNG"):
        read_dataset(photos)


def test_metadata_may_point_to_another_folder(photos):
    (photos / "meta").mkdir()
    (photos / "meta" / "metadata.csv").write_text(
        caption_lines('../{number}.jpg,"{caption}"', header="file_name,text")
    )
    check_captions(read_dataset(photos))


def test_images_behind_links_are_read_once(photos, tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    (shared / "Images").symlink_to(photos)
    (shared / "Images again").symlink_to(photos)
    (shared / "captions.csv").write_text(FLICKR8K)
    (photos / "back").symlink_to(shared)  # a ring
    check_captions(read_dataset(shared))
    (shared / "real").mkdir()
    (shared / "real" / "x.jpg").symlink_to(photos / "1000.jpg")
    (shared / "a link").symlink_to(shared / "real")
    files = [Path(file) for file in read_dataset(shared).images.file]
    assert [file for file in files if file.name == "x.jpg"] == [shared / "real" / "x.jpg"]


def test_hidden_files_are_no_images(photos):
    (photos / "._1000.jpg").write_bytes(b"made by a Mac")
    (photos / ".ipynb_checkpoints").mkdir()
    shutil.copy(photos / "1000.jpg", photos / ".ipynb_checkpoints" / "1000-checkpoint.jpg")
    assert len(read_dataset(photos).images) == 30


# -------------------------------------------------------------------------- names, rows, and counts


def with_other_names(photos: Path, first_names: list[str]) -> None:
    lines = FLICKR8K.splitlines()
    for k, name in enumerate(first_names):
        for i in (1 + 2 * k, 2 + 2 * k):
            lines[i] = lines[i].replace(f"{NUMBERS[k]}.jpg", name)
    (photos / "captions.csv").write_text("\n".join(lines), encoding="utf-8")


def test_names_that_differ_are_matched_and_counted(photos, capsys):
    with_other_names(photos, [f"{number}.JPG" for number in NUMBERS[:10]])
    check_captions(read_dataset(photos, max_bad=0))
    said = capsys.readouterr().out
    assert "10 names of images corrected: they differ from the files' in: capitals" in said
    assert "1000.JPG, read as 1000.jpg" in said


def test_names_that_fit_nothing_stop_where_images_lose_their_captions(photos, capsys):
    with_other_names(photos, [f"picture {number}" for number in NUMBERS[:10]])
    message = (
        r"10 of the names .*picture 1000, .*, and 10 of 30 images have no caption \(1000\.jpg,"
    )
    with pytest.raises(ValueError, match=message):
        read_dataset(photos, max_bad=0.3)
    dataset = read_dataset(photos, max_bad=0.34)
    assert dataset.captions.image_id.nunique() == 20
    line = "20 captions left out: the name fits no image, or several, such as picture 1000, "
    assert line in capsys.readouterr().out


def test_names_of_images_that_are_elsewhere_do_not_stop(photos, capsys):
    for number in NUMBERS[12:]:
        (photos / f"{number}.jpg").unlink()
    (photos / "captions.csv").write_text(FLICKR8K)
    check_captions(read_dataset(photos, max_bad=0), n_images=12)
    assert "36 captions left out: the name fits no image" in capsys.readouterr().out


def test_rows_that_lack_something_are_counted(photos, capsys):
    lines = FLICKR8K.splitlines()
    lines[1] = "1000.jpg,"
    lines[3] = "1001.jpg, ."
    lines[5] = ",A cup without an image"
    (photos / "captions.csv").write_text("\n".join(lines))
    assert len(read_dataset(photos).captions) == 57
    said = capsys.readouterr().out
    assert "2 captions left out: the row has no caption, such as 1000.jpg, 1001.jpg" in said
    assert "1 captions left out: the row names no image" in said
    (photos / "captions.csv").write_text("image,caption\n1000.jpg,\n1001.jpg, .\n")
    message = r"captions\.csv has no captions: none of its 2 rows has both image and caption"
    with pytest.raises(ValueError, match=message):
        read_dataset(photos)


def test_an_encoding_that_is_guessed_is_said(photos, capsys):
    (photos / "captions.csv").write_bytes(FLICKR8K.replace("cup", "Café").encode("cp1252"))
    assert read_dataset(photos).captions.caption.str.contains("Café").sum() == 30
    assert "the file is not UTF-8, and is read as cp1252" in capsys.readouterr().out


def test_what_is_missing_is_named(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: name a folder"):
        read_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no images: expected annotations"):
        read_dataset(tmp_path / "empty")
    (photos / "metadata.csv").write_text("picture,words\n1000.jpg,x\n")
    with pytest.raises(
        ValueError, match=r"has the columns picture, words, and needs one of .*file_name"
    ):
        read_dataset(photos)
    (photos / "metadata.csv").write_text("file_name,text\n7.png,x\n")
    with pytest.raises(ValueError, match="names none of the 30 images"):
        read_dataset(photos)


def test_an_image_that_cannot_be_opened_has_no_size(photos):
    (photos / "1003.jpg").write_bytes(b"not an image")
    images = read_dataset(photos).images
    assert images[images.width == 0].file.tolist() == [str(photos / "1003.jpg")]


def test_the_state_changes_with_captions_and_images(photos):
    captions_file = photos / "captions.txt"
    captions_file.write_text(FLICKR8K)
    states = [dataset_state(photos)]
    assert dataset_state(photos) == states[0]
    captions_file.write_text(FLICKR8K.replace("red cup", "old cup"))
    states.append(dataset_state(photos))
    shutil.copy(photos / "1000.jpg", photos / "2000.jpg")
    states.append(dataset_state(photos))
    assert states[0] != states[1] != states[2]
    assert dataset_state(photos / "nowhere") == []


# ------------------------------------------------------------------------------- tasks on such data


def build(folder: Path, *tasks: str, out: Path, **settings):
    return build_examples(BuildSettings(str(folder), tasks=tasks, **SPLIT_SIZES, **settings), out)


def test_caption_tasks_need_captions_alone(photos, tmp_path):
    (photos / "captions.txt").write_text(FLICKR8K)
    examples = build(photos, "caption", "caption_similar", out=tmp_path / "out")
    counts = examples.groupby(["task", "split"]).size()
    assert counts["caption"].to_dict() == {"test": 12, "train": 36, "validation": 12}


@pytest.mark.parametrize(
    "task", sorted(TASKS.keys() - {"caption", "caption_similar", "caption_swapped"})
)
def test_a_task_about_what_the_dataset_lacks_is_refused(photos, tmp_path, task):
    (photos / "captions.txt").write_text(FLICKR8K)
    lacking = "instances" if task in ("relation", "size", "count", "attribute") else "categories"
    message = f"task {task} asks about {lacking}, and .* has none: take"
    with pytest.raises(ValueError, match=message):
        build(photos, "caption", task, out=tmp_path / "out")


def test_categories_can_be_named_for_captions(photos, tmp_path):
    (photos / "captions.txt").write_text(FLICKR8K)
    with pytest.raises(ValueError, match=r"has none: name them, as in categories: \["):
        build(photos, "object", out=tmp_path / "out", labels_from="captions")
    examples = build(
        photos,
        "category_dense",
        out=tmp_path / "out",
        labels_from="captions",
        categories=("cup", "car"),
    )
    assert examples.labels.map(list).tolist() == [[1, 0]] * 30


def test_a_build_stops_where_names_are_lost_unless_it_may_lose_them(photos, tmp_path):
    with_other_names(photos, ["x.jpg"])
    settings = BuildSettings(str(photos), train=15, validation=5, test=5, tasks=("caption",))
    with pytest.raises(ValueError, match=r"1 of the names .*x\.jpg.* more than max_bad=1\.0%"):
        build_examples(settings, tmp_path / "out")
    examples = build_examples(replace(settings, max_bad=0.1), tmp_path / "out")
    assert "1000.jpg" not in {Path(file).name for file in examples.file}


def test_examples_are_built_again_when_captions_change(photos, tmp_path):
    captions_file = photos / "captions.txt"
    captions_file.write_text(FLICKR8K)
    first = build(photos, "caption", out=tmp_path / "out")
    captions_file.write_text(FLICKR8K.replace("red cup", "old cup"))
    second = build(photos, "caption", out=tmp_path / "out")
    assert first.prompt.str.contains("red cup").any()
    assert not second.prompt.str.contains("red cup").any()


def test_statements_need_images_alone(photos, tmp_path):
    lines = ["image,text,label"]
    for number in NUMBERS:
        lines += [f"{number}.jpg,Is there a cup?,{label}" for label in ("yes", "no")]
    statements = photos / "statements.csv"
    statements.write_text("\n".join(lines))
    assert len(build(photos, str(statements), out=tmp_path / "out")) == 60
