import importlib.util
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

from probekit.data import coco, scenes
from probekit.tasks import building, captions, objects, registry
from probekit.tasks.base import Task, task_infos, task_source
from tests.conftest import REAL_COCO, REPOSITORY, needs_real_coco


def arrays(table):
    return np.array(table.labels.tolist()), np.array(table["mask"].tolist())


def test_clean_caption():
    assert captions.clean("  A dog ,\n a cat..  ") == "A dog, a cat"
    assert captions.clean("Two cups.") == "Two cups"
    assert captions.clean("Is it,, really?") == "Is it, really"
    assert captions.clean("What?? A cat!!") == "What? A cat"
    assert captions.clean("No. 5 bus") == "No. 5 bus"


def test_splits_share_no_image_and_images_stay_together(examples):
    assert (examples.groupby("image_id").split.nunique() == 1).all()
    assert examples.groupby("split").image_id.nunique().to_dict() == {"train": 36, "validation": 12, "test": 12}
    runs = examples.image_id.ne(examples.image_id.shift()).sum()
    assert runs == examples.image_id.nunique()


def test_captions_are_right_and_wrong_as_said(examples, scene_folder):
    data = coco.read_coco(scene_folder)
    own = data.captions.groupby("image_id").caption.agg(lambda c: {captions.clean(t) for t in c})
    rows = examples[examples.task == "caption"]
    for row in rows.itertuples():
        caption = row.prompt.removeprefix("This image contains: ").removesuffix(".\nIs this right?")
        assert (caption in own[row.image_id]) == bool(row.labels[0])
    y, mask = arrays(rows)
    assert y.mean() == 0.5 and mask.all()


def test_a_caption_alone_says_nothing(examples):
    rows = examples[examples.task == "caption"]
    share = rows.assign(y=[y[0] for y in rows.labels]).groupby(["split", "prompt"]).y.mean()
    assert (share == 0.5).all()


def test_categories_follow_the_instances(examples, scene_folder):
    data = coco.read_coco(scene_folder)
    classes = list(task_infos(examples)["category"].classes)
    there = set(zip(data.instances.image_id, data.instances.category, strict=True))
    for task in ("category", "category_list"):
        rows = examples[examples.task == task]
        y, mask = arrays(rows)
        truth = [[(i, c) in there for c in classes] for i in rows.image_id]
        assert np.array_equal(y, truth)
        assert mask.sum(1).max() == 3 and (mask.sum(1) == 3).mean() > 0.95
        assert (y * mask).sum(1).max() == 2 and ((y * mask).sum(1) > 0).mean() > 0.95


def test_the_list_names_every_category_in_changing_order(examples):
    classes = set(task_infos(examples)["category_list"].classes)
    prompts = examples[examples.task == "category_list"].prompt
    lists = prompts.str.removeprefix(objects.PROMPT + " ").str.split(", ")
    assert all(set(names) == classes for names in lists)
    assert prompts.nunique() > 0.9 * len(prompts)


def test_the_asked_categories_do_not_give_their_labels_away():
    rng = np.random.default_rng(0)
    often = np.geomspace(0.5, 0.02, 20)  # as uneven as COCO: the first category is in every second image
    labels = (rng.random((3000, 20)) < often).astype(int)
    labels = labels[labels.any(1)]
    mask = objects.balanced_mask(labels, rng)
    yes, asked = (labels * mask).sum(0), mask.sum(0)
    assert (2 * yes == asked).all() and asked.sum() > 2.9 * len(labels)


def test_the_same_settings_make_the_same_table(scene_folder, tmp_path):
    build = building.BuildSettings(str(scene_folder), train=20, validation=5, test=5)
    one, two = (building.build_examples(build, tmp_path / name) for name in "ab")
    assert one.equals(two) or pd.testing.assert_frame_equal(one, two) is None
    other = building.build_examples(building.BuildSettings(str(scene_folder), train=20, validation=5, test=5, seed=1), tmp_path / "c")
    assert set(other.image_id) != set(one.image_id)


def test_wrong_settings_are_named(scene_folder, tmp_path):
    def build(**changed):
        settings = {"train": 20, "validation": 5, "test": 5} | changed
        return building.build_examples(building.BuildSettings(str(scene_folder), **settings), tmp_path)

    with pytest.raises(ValueError, match="60 with captions"):
        build(train=100)
    with pytest.raises(ValueError, match=r"unknown categories .'unicorn'"):
        build(categories=("cup", "unicorn"))
    with pytest.raises(ValueError, match=r"unknown tasks .'riddle'"):
        build(tasks=("riddle",))
    with pytest.raises(FileNotFoundError, match="01_build_data"):
        building.load_examples(tmp_path / "nowhere")


def test_bad_images_stop_the_build_or_are_left_out(scene_folder, tmp_path):
    folder = tmp_path / "coco"
    shutil.copytree(scene_folder, folder)
    broken = folder / "scenes" / "000000000003.jpg"
    broken.write_bytes(b"")
    settings = {"train": 40, "validation": 10, "test": 10}
    with pytest.raises(ValueError, match=r"000000000003\.jpg"):
        building.build_examples(building.BuildSettings(str(folder), **settings), tmp_path / "out")
    table = building.build_examples(building.BuildSettings(str(folder), max_bad=0.05, **settings), tmp_path / "out")
    assert 3 not in set(table.image_id) and table.image_id.nunique() == 59
    assert "000000000003.jpg" in (tmp_path / "out" / "left_out_images.csv").read_text()


@needs_real_coco
def test_real_coco_builds_with_all_and_with_frequent_categories(tmp_path):
    for categories, count in (("all", 80), ("frequent40", 40)):
        build = building.BuildSettings(str(REAL_COCO), train=200, validation=50, test=50, categories=categories)
        table = building.build_examples(build, tmp_path / categories)
        assert len(task_infos(table)["category"].classes) == count
        y, mask = arrays(table[table.task == "category"])
        assert (mask.sum(1) == 3).mean() > 0.98 and (y * mask).sum() / mask.sum() == 0.5


@needs_real_coco
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 20, 40, 80])
def test_a_category_s_name_says_nothing_about_its_label_however_few_are_asked(count):
    data = coco.read_coco(REAL_COCO)
    often = tuple(data.instances.drop_duplicates(["image_id", "category"]).category.value_counts().index[:count])
    build = building.BuildSettings(str(REAL_COCO), train=200, validation=50, test=50, tasks=("category",), categories=often)
    chosen = building.choose(build, data)[0]
    rows = objects.category_task(chosen, np.random.default_rng(0))
    for _, part in rows.groupby("split"):
        y, mask = arrays(part)
        assert mask.any(1).all() and ((y * mask).sum(0) * 2 == mask.sum(0)).all()
    y, mask = arrays(rows)
    shown = chosen.shows_nc[list(often)].sum()
    assert mask.sum() >= 1.6 * np.minimum(shown, 300 - shown).max()  # most of what the data allow


def test_labels_from_captions_leave_the_annotated_categories_as_they_are(scene_folder):
    data = coco.read_coco(scene_folder)
    made = [building.choose(building.BuildSettings(str(scene_folder), train=60, validation=0, test=0, **settings), data)[0]
            for settings in ({}, {"labels_from": "captions", "categories": ("cup",)})]
    assert made[0].annotated_nc.equals(made[1].annotated_nc) and made[0].annotated_nc.equals(made[0].shows_nc)
    assert list(made[1].shows_nc.columns) == ["cup"] and not made[1].shows_nc.cup.equals(made[1].annotated_nc.cup)


def test_what_no_category_can_be_asked_for_names_the_mend(scene_folder, tmp_path):
    data = coco.read_coco(scene_folder)
    for name in ("object", "object_popular", "object_adversarial"):
        build = building.BuildSettings(str(scene_folder), train=40, validation=10, test=10, tasks=(name,), categories=("cup",))
        with pytest.raises(ValueError, match=r"nothing to ask in train, validation, test.*more categories"):
            building.build_examples(build, tmp_path, data)


def test_the_task_of_the_readme_runs(scene_folder, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "def many_task" in block)
    assert len(code.splitlines()) < 40
    monkeypatch.setattr(building, "TASKS", registry.TASKS.copy())
    build = building.BuildSettings(str(scene_folder), train=40, validation=10, test=10, tasks=("caption", "many"))

    def made(text: str) -> pd.DataFrame:
        (tmp_path / "mine.py").write_text(text)
        spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return building.build_examples(build, tmp_path / "out")

    table = made(code)
    own = table[table.task == "many"]
    counts = coco.read_coco(scene_folder).instances.image_id.value_counts()
    assert len(own) > 20 and [y[0] for y in own.labels] == (counts[own.image_id] > 2).astype(int).tolist()
    assert np.mean([y[0] for y in own.labels]) == 0.5
    other = made(code.replace("count > 2", "count > 3").replace("count <= 2", "count <= 3"))
    assert other.labels[other.task == "many"].tolist() != own.labels.tolist()  # not read back: its code is another


def test_a_table_of_other_annotations_is_not_read_back(scene_folder, tmp_path, monkeypatch):
    folder = tmp_path / "coco"
    shutil.copytree(scene_folder, folder)
    build = building.BuildSettings(str(folder), train=40, validation=10, test=10, tasks=("caption", "category_dense"))
    first, times = building.build_examples(build, tmp_path / "out"), []
    monkeypatch.setattr(building, "choose", lambda *given, own=building.choose: times.append(1) or own(*given))
    scenes.write_scenes(folder, n=60, seed=7)  # they are there: nothing is touched
    assert building.build_examples(build, tmp_path / "out").equals(first) and not times
    for kind, old, new, task in (("captions", '"caption": "', '"caption": "Look: ', "caption"),
                                 ("instances", '"category_id": 1,', '"category_id": 2,', "category_dense")):
        file = folder / "annotations" / f"{kind}_scenes.json"
        file.write_text(file.read_text().replace(old, new))
        other = building.build_examples(build, tmp_path / "out")
        columns = ["prompt", "labels"]
        own, before = (table.loc[table.task == task, columns].astype(str) for table in (other, first))
        assert not own.reset_index(drop=True).equals(before.reset_index(drop=True))
    assert len(times) == 2


def test_words_and_settings_of_a_task_count():
    usual = registry.TASKS["caption"]
    kept = [usual, replace(usual, question="?"), replace(usual, kind="one_of"), replace(usual, classes=("a", "b")),
            *(replace(usual, build=partial(usual.build, negatives=name)) for name in ("similar", "swapped")),
            replace(usual, build=objects.object_task)]
    assert len({str(task_source(task)) for task in kept}) == len(kept)


def test_a_constant_beside_a_task_counts(tmp_path):
    def of(text):
        (tmp_path / "mine.py").write_text(text)
        spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        return task_source(Task("binary", module.task, "?"))

    code = "KNOWN = 1\ndef task(chosen, rng): return KNOWN\n"
    assert of(code) == of(code) != of(code.replace("1", "2"))


def test_what_was_typed_in_is_built_anew(scene_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.TASKS, "typed", replace(registry.TASKS["caption"], build=eval("lambda *given: ask(*given)", {
        "ask": captions.caption_task})))
    build, times = building.BuildSettings(str(scene_folder), train=40, validation=10, test=10, tasks=("typed",)), []
    monkeypatch.setattr(building, "choose", lambda *given, own=building.choose: times.append(1) or own(*given))
    first, again = (building.build_examples(build, tmp_path / "out") for _ in range(2))
    assert len(times) == 2 and building.table_fingerprint(first) == building.table_fingerprint(again)


def test_labels_from_captions_are_what_the_study_had(scene_folder, tmp_path):
    settings = {"train": 40, "validation": 10, "test": 10, "tasks": ("category_dense",)}
    by_words = building.build_examples(building.BuildSettings(str(scene_folder), labels_from="captions", **settings), tmp_path / "a")
    truth = building.build_examples(building.BuildSettings(str(scene_folder), **settings), tmp_path / "b")
    (said, _), (there, _) = arrays(by_words), arrays(truth)
    assert (said <= there).all() and said.sum() < there.sum()
    told = pd.read_csv(tmp_path / "a" / "caption_words.csv", index_col="category").loc["all"]
    assert told.precision == 1 and told.recall == pytest.approx(said.sum() / there.sum())
    with pytest.raises(ValueError, match="take instances or captions"):
        building.build_examples(building.BuildSettings(str(scene_folder), labels_from="tags", **settings), tmp_path / "a")
    with pytest.raises(ValueError, match="1 to 5 right captions"):
        building.build_examples(building.BuildSettings(str(scene_folder), captions=6, **settings), tmp_path / "a")
