"""The tasks by name, and the tasks that files of statements define."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from probekit import paths
from probekit.data import statement_files
from probekit.tasks import captions, objects, spatial
from probekit.tasks.base import Task
from probekit.tasks.statements import statement_task

CAPTION_QUESTION = "Does this caption belong to this image?"
OBJECT_QUESTION = "Is this object in the image?"
CATEGORY_QUESTION = "Which categories are there"

TASKS = {
    "caption": Task("binary", captions.caption_task, CAPTION_QUESTION),
    "caption_similar": Task(
        "binary",
        partial(captions.caption_task, negatives="similar"),
        f"{CAPTION_QUESTION} (or a similar one?)",
    ),
    "caption_same_categories": Task(
        "binary",
        partial(captions.caption_task, negatives="same_categories"),
        f"{CAPTION_QUESTION} (or one with the same categories?)",
        needs="categories",
    ),
    "caption_swapped": Task(
        "binary",
        partial(captions.caption_task, negatives="swapped"),
        f"{CAPTION_QUESTION} (or are two words exchanged?)",
    ),
    "category": Task(
        "multilabel",
        objects.category_task,
        f"{CATEGORY_QUESTION} (not listed in the prompt)?",
        needs="categories",
    ),
    "category_list": Task(
        "multilabel",
        objects.category_list_task,
        f"{CATEGORY_QUESTION} (listed in the prompt)?",
        needs="categories",
    ),
    "category_dense": Task(
        "multilabel",
        objects.category_dense_task,
        f"{CATEGORY_QUESTION} (all of them asked)?",
        needs="categories",
    ),
    "object": Task("binary", objects.object_task, OBJECT_QUESTION, needs="categories"),
    "object_popular": Task(
        "binary",
        partial(objects.object_task, absent="popular"),
        f"{OBJECT_QUESTION} (absent ones are frequent)",
        needs="categories",
    ),
    "object_adversarial": Task(
        "binary",
        partial(objects.object_task, absent="adversarial"),
        f"{OBJECT_QUESTION} (absent ones go with what is there)",
        needs="categories",
    ),
    "relation": Task(
        "binary",
        spatial.relation_task,
        "Is the one left of, right of, above, below the other?",
        needs="instances",
    ),
    "size": Task(
        "binary",
        spatial.size_task,
        "Is the one larger, or smaller, than the other?",
        needs="instances",
    ),
    "count": Task(
        "one_of",
        spatial.count_task,
        "How many of them are there?",
        classes=spatial.COUNTS,
        answers=spatial.COUNT_ANSWERS,
        needs="instances",
    ),
    "attribute": Task(
        "one_of",
        spatial.attribute_task,
        "Which colour does it have?",
        classes=spatial.COLOURS,
        answers=[(colour,) for colour in spatial.COLOURS],
        needs="instances",
    ),
}


def find_tasks(
    names: Sequence[str], home: str | Path | paths.Home | None = None
) -> dict[str, Task]:
    """Return tasks by name: those of :data:`TASKS`, and one for each file of statements.

    Parameters
    ----------
    names : sequence of str
        Names of tasks, and files or folders of statements.
    home : str, Path or Home, optional
        Where relative paths start, see :meth:`probekit.paths.Home.find`.

    Raises
    ------
    ValueError
        A name is neither a task nor a file, two tasks have the same name, or there are no names.
    """
    if not names:
        raise ValueError(f"tasks=[]: take one or more of {', '.join(TASKS)}")
    tasks: dict[str, Task] = {}
    for name in names:
        if name in TASKS:
            new_tasks = {name: TASKS[name]}
            taken_names = set(tasks)
        else:
            new_tasks = _tasks_from_files(name, home)
            taken_names = {*tasks, *TASKS}
        for task_name in new_tasks:
            if task_name in taken_names:
                raise ValueError(
                    f"there are two tasks of the name {task_name!r}: name each task once, and "
                    "rename the file"
                )
        tasks.update(new_tasks)
    return tasks


def _tasks_from_files(name: str, home: str | Path | paths.Home | None) -> dict[str, Task]:
    files = statement_files.find_statement_files(name, home)
    if not files:
        raise ValueError(
            f"unknown tasks ['{name}']: take names out of {', '.join(TASKS)}, or a file of "
            f"statements ({', '.join(statement_files.SUFFIXES)}) or a folder of them "
            f"({paths.Home.find(home).resolve(name)} does not exist, or holds none)"
        )
    return {stem: statement_task(stem, file) for stem, file in files.items()}
