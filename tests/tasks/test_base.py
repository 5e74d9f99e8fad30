import importlib.util
from dataclasses import FrozenInstanceError, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

from probekit.tasks.base import BuildSettings, Task, example_rows, task_infos, task_source
from probekit.tasks.objects import object_task
from probekit.tasks.registry import TASKS


def test_rows_without_a_mask_count_and_binary_labels_get_a_class_of_their_own():
    images = pd.DataFrame({"file": ["a", "b"], "split": "test", "width": 1}, index=[7, 7])
    rows = example_rows(images, ["x", "y"], [True, False])
    assert rows.index.tolist() == [7, 7]
    assert rows.columns.tolist() == ["file", "split", "prompt", "labels", "mask", "asked"]
    assert rows.labels.tolist() == [[1], [0]]
    assert rows["mask"].tolist() == [[1], [1]]
    assert rows.asked.tolist() == [[], []]
    rows = example_rows(images, ["x", "y"], [[1, 0], [0, 0]], masks=np.eye(2, dtype=bool))
    assert rows["mask"].tolist() == [[1, 0], [0, 1]]


def test_settings_are_named_and_cannot_be_changed():
    with pytest.raises(TypeError):
        BuildSettings("folder", ("train2017",))
    with pytest.raises(FrozenInstanceError):
        BuildSettings("folder").seed = 3


def test_task_infos_survive_what_is_done_to_the_table(examples):
    infos = task_infos(examples)
    assert list(infos) == ["caption", "category", "category_list"]
    assert infos["caption"].classes == ("match",)
    shuffled = examples.sample(frac=1, random_state=0).reset_index(drop=True)
    assert task_infos(shuffled.merge(shuffled[["image_id"]].drop_duplicates())) == {
        name: infos[name] for name in shuffled.task.unique()
    }


def test_a_table_that_does_not_say_what_its_tasks_are_is_refused(examples):
    with pytest.raises(ValueError, match="no column kind, question"):
        task_infos(examples.drop(columns=["kind", "question"]))
    mixed = examples.assign(task="one name")
    with pytest.raises(ValueError, match="rows of task one name differ in kind or classes"):
        task_infos(mixed)


def test_every_word_and_setting_of_a_task_counts():
    task = TASKS["caption"]
    tasks = [
        task,
        replace(task, question="?"),
        replace(task, kind="one_of"),
        replace(task, classes=("a", "b")),
        replace(task, answers=[("false",), ("true",)]),
        replace(task, build=partial(task.build, negatives="similar")),
        replace(task, build=partial(task.build, negatives="swapped")),
        replace(task, build=object_task),
    ]
    assert len({str(task_source(one)) for one in tasks}) == len(tasks)


def test_the_whole_file_of_a_user_s_task_counts(tmp_path):
    file = tmp_path / "mine.py"

    def source_of(code: str) -> list:
        file.write_text(code, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("mine", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return task_source(Task("binary", module.task, "?"))

    code = "LIMIT = 1\ndef task(selection, rng): return LIMIT\n"
    assert source_of(code) == source_of(code)
    assert source_of(code) != source_of(code.replace("1", "2"))
