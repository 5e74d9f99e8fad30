import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probekit import paths
from probekit.data.coco import read_coco
from probekit.data.scenes import write_scenes
from probekit.tasks import building, objects
from probekit.tasks.base import BuildSettings, task_infos
from probekit.tasks.building import build_examples, load_examples, load_instances
from probekit.tasks.captions import caption_task, clean_caption
from probekit.tasks.registry import TASKS
from tests.conftest import REAL_COCO, needs_real_coco
from tests.support.selections import binary_labels, select

SIZES = {"train": 40, "validation": 10, "test": 10}


def labels_and_masks(examples: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return np.array(examples.labels.tolist()), np.array(examples["mask"].tolist())


@pytest.fixture
def build_count(monkeypatch) -> list:
    """One entry for each time that images are selected, which is whenever a table is built."""
    calls = []
    select_images = building.select_images

    def count_and_select(*arguments, **options):
        calls.append(arguments)
        return select_images(*arguments, **options)

    monkeypatch.setattr(building, "select_images", count_and_select)
    return calls


# ---------------------------------------------------------------------------- the examples table


def test_splits_share_no_image_and_the_examples_of_an_image_stay_together(examples):
    assert (examples.groupby("image_id").split.nunique() == 1).all()
    image_counts = examples.groupby("split").image_id.nunique().to_dict()
    assert image_counts == {"train": 36, "validation": 12, "test": 12}
    changes = examples.image_id.ne(examples.image_id.shift()).sum()
    assert changes == examples.image_id.nunique()


def test_labels_of_captions_say_whether_they_are_the_image_s(examples, scene_folder):
    captions = read_coco(scene_folder).captions
    own_captions = captions.groupby("image_id").caption.agg(
        lambda texts: {clean_caption(text) for text in texts}
    )
    rows = examples[examples.task == "caption"]
    for row in rows.itertuples():
        caption = row.prompt.removeprefix("This image contains: ").removesuffix(".\nIs this right?")
        assert (caption in own_captions[row.image_id]) == bool(row.labels[0])
    label_nc, mask_nc = labels_and_masks(rows)
    assert label_nc.mean() == 0.5
    assert mask_nc.all()


def test_a_caption_alone_says_nothing(examples):
    rows = examples[examples.task == "caption"]
    labels = pd.Series(binary_labels(rows), rows.index)
    assert (labels.groupby([rows.split, rows.prompt]).mean() == 0.5).all()


@pytest.mark.parametrize("task", ["category", "category_list"])
def test_labels_of_categories_follow_the_instances(examples, scene_folder, task):
    instances = read_coco(scene_folder).instances
    shown = set(zip(instances.image_id, instances.category, strict=True))
    classes = task_infos(examples)[task].classes
    rows = examples[examples.task == task]
    label_nc, mask_nc = labels_and_masks(rows)
    truth = [[(image, name) in shown for name in classes] for image in rows.image_id]
    np.testing.assert_array_equal(label_nc, truth)
    asked_count = mask_nc.sum(1)
    present_count = (label_nc * mask_nc).sum(1)
    assert asked_count.max() == 3
    assert (asked_count == 3).mean() > 0.95
    assert present_count.max() == 2
    assert (present_count > 0).mean() > 0.95


def test_the_list_names_every_category_in_changing_order(examples):
    classes = sorted(task_infos(examples)["category_list"].classes)
    prompts = examples[examples.task == "category_list"].prompt
    lists = prompts.str.removeprefix(objects.PROMPT + " ").str.split(", ")
    assert all(sorted(names) == classes for names in lists)
    assert prompts.nunique() > 0.9 * len(prompts)


def test_the_same_settings_make_the_same_table(scene_folder, tmp_path):
    settings = BuildSettings(str(scene_folder), train=20, validation=5, test=5)
    first = build_examples(settings, tmp_path / "first")
    second = build_examples(settings, tmp_path / "second")
    pd.testing.assert_frame_equal(first, second)
    assert building.table_fingerprint(first) == building.table_fingerprint(second)
    other_seed = build_examples(replace(settings, seed=1), tmp_path / "other")
    assert set(other_seed.image_id) != set(first.image_id)
    assert building.table_fingerprint(first) != building.table_fingerprint(other_seed)


def test_files_are_named_from_the_home(scene_folder, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(scene_folder, home / "data" / "coco" / "mine")
    settings = BuildSettings("data/coco/mine", **SIZES)
    examples = build_examples(settings, home / "tables", home=home)
    assert examples.file.str.startswith("data/coco/mine/scenes/").all()
    moved = tmp_path / "moved"
    home.rename(moved)
    files = load_examples(moved / "tables").file
    assert all(paths.Home.find(moved).resolve(file).exists() for file in files)


def test_the_instances_of_the_images_are_kept_with_the_sizes_of_images(scene_folder, tmp_path):
    settings = BuildSettings(str(scene_folder), train=20, validation=5, test=5)
    examples = build_examples(settings, tmp_path)
    instances = load_instances(tmp_path)
    dataset = read_coco(scene_folder)
    is_drawn = dataset.instances.image_id.isin(examples.image_id)
    assert len(instances) == is_drawn.sum()
    sizes = dataset.images.loc[instances.image_id, ["width", "height"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(instances[["width", "height"]].reset_index(drop=True), sizes)


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": 100}, "60 with captions"),
        ({"categories": ("cup", "unicorn")}, r"unknown categories .'unicorn'"),
        ({"tasks": ("riddle",)}, r"unknown tasks .'riddle'"),
        ({"tasks": ()}, r"tasks=\[\]: take one or more of caption"),
        ({"tasks": ("caption", "caption")}, "two tasks of the name 'caption'"),
        ({"labels_from": "tags"}, "labels_from='tags': expected str out of instances, captions"),
        ({"captions": 6}, "captions=6: expected int from 1 to 5"),
        ({"smallest": 1.0}, "smallest=1.0: expected float from 0 to below 1: a share"),
    ],
)
def test_settings_that_make_no_sense_are_named(scene_folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build_examples(BuildSettings(str(scene_folder), **{**SIZES, **settings}), tmp_path)
    assert not (tmp_path / "examples.parquet").exists()


def test_examples_that_were_not_built_name_the_notebook(tmp_path):
    for load in (load_examples, load_instances):
        with pytest.raises(FileNotFoundError, match="run 01_build_data"):
            load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["object", "object_popular", "object_adversarial"])
def test_a_task_that_finds_nothing_to_ask_names_the_fix(scene_folder, tmp_path, name):
    settings = BuildSettings(str(scene_folder), tasks=(name,), categories=("cup",), **SIZES)
    with pytest.raises(
        ValueError, match=r"nothing to ask in train, validation, test.*more categories"
    ):
        build_examples(settings, tmp_path, dataset=read_coco(scene_folder))


def test_unreadable_images_stop_the_build_or_are_left_out(scene_folder, tmp_path):
    folder = tmp_path / "coco"
    shutil.copytree(scene_folder, folder)
    (folder / "scenes" / "000000000003.jpg").write_bytes(b"")
    settings = BuildSettings(str(folder), **SIZES)
    with pytest.raises(ValueError, match=r"000000000003\.jpg"):
        build_examples(settings, tmp_path / "out")
    examples = build_examples(replace(settings, max_bad=0.05), tmp_path / "out")
    assert 3 not in set(examples.image_id)
    assert examples.image_id.nunique() == 59
    left_out = (tmp_path / "out" / "left_out_images.csv").read_text(encoding="utf-8")
    assert "000000000003.jpg" in left_out


# ---------------------------------------------------------------------------- categories, labels


@pytest.mark.slow
@needs_real_coco
@pytest.mark.parametrize(("categories", "count"), [("all", 80), ("frequent40", 40)])
def test_real_coco_builds_with_all_and_with_frequent_categories(tmp_path, categories, count):
    settings = BuildSettings(
        str(REAL_COCO), train=200, validation=50, test=50, categories=categories
    )
    examples = build_examples(settings, tmp_path)
    assert len(task_infos(examples)["category"].classes) == count
    label_nc, mask_nc = labels_and_masks(examples[examples.task == "category"])
    assert (mask_nc.sum(1) == 3).mean() > 0.98
    assert (label_nc * mask_nc).sum() / mask_nc.sum() == 0.5


def test_frequent_categories_are_those_that_most_training_images_show(scene_folder, monkeypatch):
    monkeypatch.setattr(building, "FREQUENT", 3)
    selection = select(scene_folder, categories="frequent40", **SIZES)
    all_categories = select(scene_folder, **SIZES).shows_nc
    is_train = (selection.images.split == "train").to_numpy()
    counts = all_categories[is_train].sum()
    assert len(selection.shows_nc.columns) == 3
    assert counts[selection.shows_nc.columns].min() >= counts.nlargest(3).min()
    pd.testing.assert_frame_equal(
        selection.shows_nc, all_categories[list(selection.shows_nc.columns)]
    )


def test_labels_from_captions_leave_the_annotated_categories_as_they_are(scene_folder):
    sizes = {"train": 60, "validation": 0, "test": 0}
    usual = select(scene_folder, **sizes)
    by_words = select(scene_folder, labels_from="captions", categories=("cup",), **sizes)
    assert usual.annotated_nc.equals(usual.shows_nc)
    assert by_words.annotated_nc.equals(usual.annotated_nc)
    assert list(by_words.shows_nc.columns) == ["cup"]
    assert not by_words.shows_nc.cup.equals(by_words.annotated_nc.cup)


def test_labels_from_captions_are_compared_with_the_instances(scene_folder, tmp_path):
    settings = BuildSettings(str(scene_folder), tasks=("category_dense",), **SIZES)
    by_instances = build_examples(settings, tmp_path / "instances")
    by_words = build_examples(replace(settings, labels_from="captions"), tmp_path / "captions")
    shown_nc, _ = labels_and_masks(by_instances)
    named_nc, _ = labels_and_masks(by_words)
    assert (named_nc <= shown_nc).all()
    assert named_nc.sum() < shown_nc.sum()
    agreement = pd.read_csv(tmp_path / "captions" / "caption_words.csv", index_col="category")
    assert agreement.precision["all"] == 1
    assert agreement.recall["all"] == pytest.approx(named_nc.sum() / shown_nc.sum())


# -------------------------------------------------------------------- when a table is built again


def test_a_table_is_read_back_until_the_annotations_change(scene_folder, tmp_path, build_count):
    folder = tmp_path / "coco"
    shutil.copytree(scene_folder, folder)
    settings = BuildSettings(str(folder), tasks=("caption", "category_dense"), **SIZES)
    first = build_examples(settings, tmp_path / "out")
    write_scenes(folder, n=60, seed=7)  # they are there already: nothing is touched
    pd.testing.assert_frame_equal(build_examples(settings, tmp_path / "out"), first)
    assert len(build_count) == 1
    changes = [
        ("captions_scenes.json", '"caption": "', '"caption": "Look: ', "caption"),
        ("instances_scenes.json", '"category_id": 1,', '"category_id": 2,', "category_dense"),
    ]
    for name, old, new, task in changes:
        file = folder / "annotations" / name
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(old, new), encoding="utf-8")
        changed = build_examples(settings, tmp_path / "out")
        is_task = changed.task == task
        before = first[first.task == task][["prompt", "labels"]].astype(str)
        after = changed[is_task][["prompt", "labels"]].astype(str)
        assert not after.reset_index(drop=True).equals(before.reset_index(drop=True))
    assert len(build_count) == 3


def test_a_build_that_was_cut_off_is_done_again(scene_folder, tmp_path, build_count, monkeypatch):
    settings = BuildSettings(str(scene_folder), tasks=("caption",), **SIZES)
    first = build_examples(settings, tmp_path)
    (tmp_path / "examples.parquet").unlink()

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "_caption_agreement", stop)
        with pytest.raises(KeyboardInterrupt):
            build_examples(settings, tmp_path)
    pd.testing.assert_frame_equal(build_examples(settings, tmp_path), first)
    assert len(build_count) == 3


MANY_TASK = '''
import pandas as pd

from probekit.tasks.base import Task, example_rows
from probekit.tasks.registry import TASKS

QUESTION = "Are there more than two objects in this image?"


def many_task(selection, rng):
    """Ask as many images with more than two objects as with fewer."""
    parts = []
    for images in selection.images_by_split():
        instances = selection.instances
        count = instances.image_id.value_counts().reindex(images.index, fill_value=0)
        many = images[count > 2]
        few = images[count <= 2]
        n = min(len(many), len(few))
        for label, group in ((1, many), (0, few)):
            drawn = group.iloc[rng.permutation(len(group))[:n]]
            parts.append(example_rows(drawn, [QUESTION] * n, [label] * n))
    return pd.concat(parts)


TASKS["many"] = Task("binary", many_task, QUESTION, needs="instances")
'''


def run_module(file: Path, code: str) -> None:
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_task_of_ones_own_runs(scene_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "many", TASKS["caption"])  # taken out again after the test
    settings = BuildSettings(str(scene_folder), tasks=("caption", "many"), **SIZES)
    run_module(tmp_path / "mine.py", MANY_TASK)
    examples = build_examples(settings, tmp_path / "out")
    many = examples[examples.task == "many"]
    counts = read_coco(scene_folder).instances.image_id.value_counts()
    assert len(many) > 20
    np.testing.assert_array_equal(binary_labels(many), (counts[many.image_id] > 2).astype(int))
    assert binary_labels(many).mean() == 0.5
    other_code = MANY_TASK.replace("count > 2", "count > 3").replace("count <= 2", "count <= 3")
    run_module(tmp_path / "mine.py", other_code)
    other_examples = build_examples(settings, tmp_path / "out")
    other = other_examples[other_examples.task == "many"]
    np.testing.assert_array_equal(binary_labels(other), (counts[other.image_id] > 3).astype(int))


def test_what_was_typed_in_is_built_again_each_time(
    scene_folder, tmp_path, monkeypatch, build_count
):
    typed = eval("lambda selection, rng: ask(selection, rng)", {"ask": caption_task})
    monkeypatch.setitem(TASKS, "typed", replace(TASKS["caption"], build=typed))
    settings = BuildSettings(str(scene_folder), tasks=("typed",), **SIZES)
    first = build_examples(settings, tmp_path / "out")
    second = build_examples(settings, tmp_path / "out")
    assert len(build_count) == 2
    assert building.table_fingerprint(first) == building.table_fingerprint(second)


def test_too_few_images_are_explained_by_what_was_left_out(scene_folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    files = sorted(scene_folder.rglob("*.jpg"))[:20]
    lines = ["file_name,text"]
    for i, file in enumerate(files):
        shutil.copy(file, photos / file.name)
        lines.append(f"{file.name},Thing number {i}.")
    lines[3] = "misspelt.jpg,Thing number 2."
    (photos / "metadata.csv").write_text("\n".join(lines))
    settings = BuildSettings(
        str(photos), train=10, validation=5, test=5, tasks=("caption",), max_bad=0.2
    )
    with pytest.raises(ValueError, match=r"20 images are asked for.* such as misspelt\.jpg"):
        build_examples(settings, tmp_path / "tasks")


def test_examples_name_the_categories_that_they_ask_about(scene_folder, tmp_path):
    tasks = ("caption", "object", "count", "relation", "attribute", "category")
    settings = BuildSettings(str(scene_folder), train=30, validation=15, test=15, tasks=tasks)
    examples = build_examples(settings, tmp_path)
    assert set(examples.task) == set(tasks)
    for row in examples.itertuples():
        if row.task == "caption":
            assert list(row.asked) == []
        elif row.task == "category":
            counting = [name for name, counts in zip(row.classes, row.mask, strict=True) if counts]
            assert list(row.asked) == counting
        else:
            assert len(row.asked) == (2 if row.task == "relation" else 1)
            assert all(name in row.prompt.rpartition("\n")[2] for name in row.asked)
