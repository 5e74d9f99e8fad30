"""The tasks that have a name, and those that files of statements make."""

from __future__ import annotations

from functools import partial

from probekit.data import statement_files
from probekit.tasks import captions, objects, spatial, statements
from probekit.tasks.base import Task

BELONGS, THERE = "Does this caption belong to this image?", "Is this object in the image?"


WHICH = "Which categories are there"


TASKS = {
    "caption": Task("binary", captions.caption_task, BELONGS),
    "caption_similar": Task("binary", partial(captions.caption_task, negatives="similar"),
                            f"{BELONGS} (or a similar one?)"),
    "caption_same_categories": Task("binary", partial(captions.caption_task, negatives="same_categories"),
                                    f"{BELONGS} (or one with the same categories?)", needs="categories"),
    "caption_swapped": Task("binary", partial(captions.caption_task, negatives="swapped"),
                            f"{BELONGS} (or are two words exchanged?)"),
    "category": Task("multilabel", objects.category_task, f"{WHICH} (not listed in the prompt)?", needs="categories"),
    "category_list": Task("multilabel", objects.category_list_task, f"{WHICH} (listed in the prompt)?",
                          needs="categories"),
    "category_dense": Task("multilabel", objects.category_dense_task, f"{WHICH} (all of them asked)?",
                           needs="categories"),
    "object": Task("binary", objects.object_task, THERE, needs="categories"),
    "object_popular": Task("binary", partial(objects.object_task, absent="popular"),
                           f"{THERE} (absent ones are frequent)", needs="categories"),
    "object_adversarial": Task("binary", partial(objects.object_task, absent="adversarial"),
                               f"{THERE} (absent ones go with what is there)", needs="categories"),
    "relation": Task("binary", spatial.relation_task, "Is the one left of, right of, above, below the other?",
                     needs="instances"),
    "size": Task("binary", spatial.size_task, "Is the one larger, or smaller, than the other?", needs="instances"),
    "count": Task("one_of", spatial.count_task, "How many of them are there?", spatial.COUNTS, needs="instances"),
    "attribute": Task("one_of", spatial.attribute_task, "Which colour does it have?", spatial.COLOURS, needs="instances"),
}


def find_tasks(names: tuple[str, ...]) -> dict[str, Task]:
    """Tasks by name: of :data:`TASKS`, and one for each file of statements.

    Raises
    ------
    ValueError
        Neither a task nor a file, two of the same name, or none.
    """
    found: dict[str, Task] = {}
    if not names:
        raise ValueError(f"tasks=[]: take one or more of {', '.join(TASKS)}")
    for name in names:
        of_files = {} if name in TASKS else statement_files.find_statement_files(name)
        if name not in TASKS and not of_files:
            raise ValueError(f"unknown tasks ['{name}']: take names out of {', '.join(TASKS)}, or a file of statements "
                             f"({', '.join(statement_files.KINDS)}) or a folder of them")
        new = {name: TASKS[name]} if name in TASKS else {
            stem: statements.statement_task(stem, file) for stem, file in of_files.items()}
        twice = [stem for stem in new if stem in found or (of_files and stem in TASKS)]
        if twice:
            raise ValueError(f"there are two tasks of the name {twice[0]!r}: name each once, and rename files")
        found |= new
    return found
