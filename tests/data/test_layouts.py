import json
import shutil

import pytest

from probekit.data import layouts
from probekit.tasks import building, registry

SAID = ["A red cup.", "A blue car, and a kite"]


@pytest.fixture
def photos(scene_folder, tmp_path):
    for k in range(30):
        shutil.copy(scene_folder / "scenes" / f"{k:012d}.jpg", tmp_path / f"{1000 + k}.jpg")
    return tmp_path


def check(data, count=30, each=2):
    assert len(data.images) == count and len(data.instances) == 0 and data.categories == ()
    told = data.captions.groupby("image_id").caption.agg(list)
    assert len(told) == count and (told.map(len) == each).all()
    assert data.images.width.eq(320).all() and data.images.height.eq(240).all()


def table(separator, header, line):
    return "\n".join([header, *(line.format(k=1000 + k, c=c, text=f"{text} {k}", s=separator)
                                for k in range(30) for c, text in enumerate(SAID))])


@pytest.mark.parametrize(("name", "content"), [
    ("captions.txt", table(",", "image,caption", '{k}.jpg,"{text}"')),
    ("results.csv", table("|", "image_name| comment_number| comment", '{k}.jpg| {c}| {text} "so" .')),
    ("Flickr.token", table("\t", "", "{k}.jpg#{c}\t{text}").lstrip()),
    ("metadata.csv", table(",", "file_name,text", '{k}.jpg,"{text}"')),
    ("metadata.jsonl", "\n".join(json.dumps({"file_name": f"{1000 + k}.jpg", "captions": SAID}) for k in range(30))),
    ("metadata.jsonl", "\n".join(json.dumps({"file_name": f"{1000 + k}.jpg", "text": text})
                                 for k in range(30) for text in SAID)),
    ("captions.jsonl", "\ufeff" + "\n".join(json.dumps({"image": f"{1000 + k}.jpg", "captions": SAID})
                                             for k in range(30))),
    ("metadata.csv", table(",", "file_name,text,label", '{k}.jpg,"{text}",1')),  # of a class, not right or wrong
])
def test_common_forms_are_read(photos, name, content):
    (photos / name).write_text(content)
    check(layouts.read_dataset(photos))


def test_splits_of_an_image_folder(photos):
    for split, low, high in (("train", 0, 20), ("test", 20, 30)):
        (photos / split).mkdir()
        for k in range(low, high):
            (photos / f"{1000 + k}.jpg").rename(photos / split / f"{1000 + k}.jpg")
        (photos / split / "metadata.jsonl").write_text("\n".join(
            json.dumps({"file_name": f"{1000 + k}.jpg", "captions": SAID}) for k in range(low, high)))
    check(layouts.read_dataset(photos))
    check(layouts.read_dataset(photos, ["test"]), 10)
    with pytest.raises(ValueError, match=r"no folders val: .* take coco_splits out of test, train"):
        layouts.read_dataset(photos, ["val"])


@pytest.fixture
def twins(scene_folder, tmp_path):
    """Images of the same names in the folders train and test."""
    for split, first in (("train", 0), ("test", 20)):
        (tmp_path / split).mkdir()
        for k in range(3):
            shutil.copy(scene_folder / "scenes" / f"{first + k:012d}.jpg", tmp_path / split / f"{k}.jpg")
    return tmp_path


def test_the_folders_in_a_name_say_which_image_is_meant(twins):
    names = [f"{split}/{k}.jpg" for k in range(3) for split in ("train", "test")]
    (twins / "captions.csv").write_text("image,caption\n" + "\n".join(f"{name},of {name}" for name in names))
    for splits in (None, ["test"]):
        data = layouts.read_dataset(twins, splits)
        files = data.images.file[data.captions.image_id]
        ends = [str(file).removeprefix(f"{twins}/") for file in files]
        assert data.captions.caption.tolist() == [f"of {end}" for end in ends] and len(ends) == (3 if splits else 6)
    (twins / "captions.csv").write_text("image,caption\n1.jpg,of which?\n")
    for splits in (None, ["test"]):
        with pytest.raises(ValueError, match=r"captions\.csv: 1\.jpg is the name of 2 images: write the folders"):
            layouts.read_dataset(twins, splits)


@pytest.mark.parametrize("text", ["This is Flickr30k, as it was given to us.\n\nIt has images, captions, and more.\n",
                                  "1000.jpg\n1001.jpg\n"])
def test_other_texts_beside_the_images_do_not_matter(photos, text):
    (photos / "README.txt").write_text(text)
    with pytest.raises(ValueError, match=r"README\.txt .*(put it elsewhere|quotation marks)"):
        layouts.read_dataset(photos)  # it might be meant for one
    (photos / "own.csv").write_text("image,text,label\n1000.jpg,Is there a cup?,yes\n")
    assert layouts.read_dataset(photos).captions.empty
    (photos / "captions.txt").write_text(table(",", "image,caption", '{k}.jpg,"{text}"'))
    check(layouts.read_dataset(photos))


@pytest.mark.parametrize("rows", [[{"file_name": "1000.jpg", "text": None}, {"file_name": "1001.jpg"}],
                                  [{"file_name": "1000.jpg", "captions": [None, ""]}], [{"text": "a cup"}]])
def test_a_row_that_lacks_something_says_nothing(photos, rows):
    known = {"file_name": "1002.jpg", "captions" if "captions" in rows[0] else "text": "a cup"}
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*rows, known])))
    assert layouts.read_dataset(photos).captions.to_numpy().tolist() == [[2, "a cup"]]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("captions.csv", table(",", "image,caption", "{k}.jpg,{text},{text}"), "quotation marks"),
    ("metadata.jsonl", '{"file_name": "1000.jpg", "te', "one JSON object a line"),
])
def test_a_table_that_cannot_be_read_is_named(photos, name, content, message):
    (photos / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*{message}"):
        layouts.read_dataset(photos)


def test_tasks_run_on_it_where_coco_is_not(photos, tmp_path):
    (photos / "captions.txt").write_text(table(",", "image,caption", '{k}.jpg,"{text}"'))
    settings = {"folder": str(photos), "train": 18, "validation": 6, "test": 6}
    made = building.build_examples(building.BuildSettings(tasks=("caption", "caption_similar"), **settings), tmp_path / "out")
    assert made.groupby(["task", "split"]).size().unstack().loc["caption"].tolist() == [12, 36, 12]
    for name in sorted(set(registry.TASKS) - {"caption", "caption_similar", "caption_swapped"}):
        needs = "instances" if name in ("relation", "size", "count", "attribute") else "categories"
        with pytest.raises(ValueError, match=f"task {name} asks about {needs}, and .* has none: take"):
            building.build_examples(building.BuildSettings(tasks=("caption", name), **settings), tmp_path / "out")
    unnamed = building.BuildSettings(tasks=("object",), labels_from="captions", **settings)
    with pytest.raises(ValueError, match=r"has none: name them, as in categories: \["):
        building.build_examples(unnamed, tmp_path / "out")
    named = building.BuildSettings(tasks=("category_dense",), categories=("cup", "car"), labels_from="captions", **settings)
    assert building.build_examples(named, tmp_path / "out").labels.map(list).tolist() == [[1, 0]] * 30


def test_what_a_folder_holds_is_known_before_it_is_read(photos, tmp_path):
    (photos / "captions.txt").write_text(table(",", "image,caption", '{k}.jpg,"{text}"'))
    build = building.BuildSettings(str(photos), train=18, validation=6, test=6, tasks=("caption",))
    first = building.build_examples(build, tmp_path / "out")
    (photos / "captions.txt").write_text((photos / "captions.txt").read_text().replace("red cup", "old cup"))
    second = building.build_examples(build, tmp_path / "out")
    assert first.prompt.str.contains("red cup").any() and not second.prompt.str.contains("red cup").any()
    before = layouts.dataset_state(photos)
    assert layouts.dataset_state(photos) == before
    shutil.copy(photos / "1000.jpg", photos / "2000.jpg")
    assert layouts.dataset_state(photos) != before and layouts.dataset_state(photos / "nowhere") == []


def test_statements_need_images_alone(photos, tmp_path):
    (photos / "own.csv").write_text("image,text,label\n" + "\n".join(
        f"{1000 + k}.jpg,Is there a cup?,{['yes', 'no'][c]}" for k in range(30) for c in range(2)))
    build = building.BuildSettings(str(photos), train=18, validation=6, test=6, tasks=(str(photos / "own.csv"),))
    assert len(building.build_examples(build, tmp_path / "out")) == 60


def test_what_is_missing_is_named(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: name a folder"):
        layouts.read_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no images: expected annotations"):
        layouts.read_dataset(tmp_path / "empty")
    (photos / "metadata.csv").write_text("picture,words\n1000.jpg,x\n")
    with pytest.raises(ValueError, match="has the columns picture, words: one of file_name"):
        layouts.read_dataset(photos)
    (photos / "metadata.csv").write_text("file_name,text\n7.png,x\n")
    with pytest.raises(ValueError, match="names none of the 30 images"):
        layouts.read_dataset(photos)
