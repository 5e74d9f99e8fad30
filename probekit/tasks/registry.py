"""The tasks by name, and the tasks that files of statements define."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from probekit import paths
from probekit.data import statement_files
from probekit.tasks import captions, objects, spatial
from probekit.tasks.base import Task, Variant
from probekit.tasks.statements import statement_task
from probekit.tasks.variants import statement_variants, vary_task

CAPTION_QUESTION = "Does this caption belong to this image?"
OBJECT_QUESTION = "Is this object in the image?"
CATEGORY_QUESTION = "Which categories are there"

CAPTION_VARIANTS = {
    "reworded": Variant("Does this caption describe the image: {caption}?"),
    **statement_variants(
        "This image contains: {caption}", "This image does not contain: {caption}"
    ),
}
OBJECT_VARIANTS = {
    "unlisted": Variant("Is there a {category} in this image?"),
    "reworded": Variant("Objects: {categories}.\nDoes this image show a {category}?"),
    "statement": Variant(
        "Objects: {categories}.\nThere is a {category} in this image.\nIs this right?"
    ),
    **statement_variants(
        "There is a {category} in this image",
        "There is no {category} in this image",
        before="Objects: {categories}.\n",
    ),
}
COMPARISON_VARIANTS = {
    "statement": Variant("The {a} is {how} the {b} in this image.\nIs this right?"),
    **statement_variants(
        "The {a} is {how} the {b} in this image", "The {a} is not {how} the {b} in this image"
    ),
}

TASKS = {
    "caption": Task("binary", captions.caption_task, CAPTION_QUESTION, variants=CAPTION_VARIANTS),
    "caption_similar": Task(
        "binary",
        partial(captions.caption_task, negatives="similar"),
        f"{CAPTION_QUESTION} (or a similar one?)",
        variants=CAPTION_VARIANTS,
    ),
    "caption_same_categories": Task(
        "binary",
        partial(captions.caption_task, negatives="same_categories"),
        f"{CAPTION_QUESTION} (or one with the same categories?)",
        needs="categories",
        variants=CAPTION_VARIANTS,
    ),
    "caption_swapped": Task(
        "binary",
        partial(captions.caption_task, negatives="swapped"),
        f"{CAPTION_QUESTION} (or are two words exchanged?)",
        variants=CAPTION_VARIANTS,
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
    "object": Task(
        "binary",
        objects.object_task,
        OBJECT_QUESTION,
        needs="categories",
        variants=OBJECT_VARIANTS,
    ),
    "object_popular": Task(
        "binary",
        partial(objects.object_task, absent="popular"),
        f"{OBJECT_QUESTION} (absent ones are frequent)",
        needs="categories",
        variants=OBJECT_VARIANTS,
    ),
    "object_adversarial": Task(
        "binary",
        partial(objects.object_task, absent="adversarial"),
        f"{OBJECT_QUESTION} (absent ones go with what is there)",
        needs="categories",
        variants=OBJECT_VARIANTS,
    ),
    "relation": Task(
        "binary",
        spatial.relation_task,
        "Is the one left of, right of, above, below the other?",
        needs="instances",
        variants=COMPARISON_VARIANTS,
    ),
    "size": Task(
        "binary",
        spatial.size_task,
        "Is the one larger, or smaller, than the other?",
        needs="instances",
        variants=COMPARISON_VARIANTS,
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


def find_task(name: str) -> Task | None:
    """Return a task of :data:`TASKS`, or a variant of one, such as ``"object_negated"``.

    None where there is no such task.
    """
    if name in TASKS:
        return TASKS[name]
    for base, task in TASKS.items():
        variant = name.removeprefix(f"{base}_")
        if variant != name and variant in task.variants:
            return vary_task(base, task, variant)
    return None


def find_caption(prompt: str) -> str | None:
    """Return the caption that a prompt asks about, None where it is not one of those prompts."""
    templates = [captions.PROMPT, *(variant.prompt for variant in CAPTION_VARIANTS.values())]
    for template in templates:
        before, _, after = template.partition("{caption}")
        match = re.fullmatch(f"{re.escape(before)}(.*){re.escape(after)}", prompt, re.DOTALL)
        if match is not None:
            return match[1]
    return None


def find_tasks(
    names: Sequence[str], home: str | Path | paths.Home | None = None
) -> dict[str, Task]:
    """Return tasks by name: of :data:`TASKS`, variants, and one for each file of statements.

    Parameters
    ----------
    names : sequence of str
        Names of tasks and of their variants, and files or folders of statements.
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
        task = find_task(name)
        if task is not None:
            new_tasks = {name: task}
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
        bases = [base for base in sorted(TASKS, reverse=True) if name.startswith(f"{base}_")]
        base = bases[0] if bases and name.isidentifier() else ""
        if base and TASKS[base].variants:
            raise ValueError(
                f"unknown tasks ['{name}']: {base} has the variants "
                f"{', '.join(f'{base}_{variant}' for variant in TASKS[base].variants)}"
            )
        raise ValueError(
            f"unknown tasks ['{name}']: take names out of {', '.join(TASKS)}, or a file of "
            f"statements ({', '.join(statement_files.SUFFIXES)}) or a folder of them "
            f"({paths.Home.find(home).resolve(name)} does not exist, or holds none)"
        )
    return {stem: statement_task(stem, file) for stem, file in files.items()}
