"""Other wordings of a task's question: the same images, the same things, other prompts.

Small models fail at negations (NegBench, Alhamoud et al., 2025, https://arxiv.org/abs/2501.09425),
and what they answer may hang on the form of the answer. A variant shows how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from probekit.tasks.base import Task, TaskInfo, Variant

TRUE_OR_FALSE = (("false",), ("true",))
ONE_OR_ZERO = (("0",), ("1",))
# The letter that stands for no, then the one that stands for yes.
A_IS_YES = (("B",), ("A",))
B_IS_YES = (("A",), ("B",))


def statement_variants(statement: str, opposite: str, *, before: str = "") -> dict[str, Variant]:
    """Return the variants of a question that can be put as a statement.

    Parameters
    ----------
    statement : str
        A template of what is true where the label of the task is 1, without a full stop.
    opposite : str
        A template of what is true where it is 0.
    before : str
        What stands before either of them.

    Returns
    -------
    dict of str to Variant
        ``negated``; ``true_false`` and ``one_zero``, which ask for other words; ``a_b`` and
        ``b_a``, whose choices stand in one order and in the other.
    """
    states = f"{before}{statement}.\n"
    return {
        "negated": Variant(f"{before}{opposite}.\nIs this right?", negated=True),
        "true_false": Variant(f"{states}Is this true or false?", answers=TRUE_OR_FALSE),
        "one_zero": Variant(
            f"{states}Answer 1 if this is right, and 0 if it is wrong.", answers=ONE_OR_ZERO
        ),
        "a_b": Variant(f"{states}Is this right?\nA: yes\nB: no\nAnswer A or B.", answers=A_IS_YES),
        "b_a": Variant(f"{states}Is this right?\nA: no\nB: yes\nAnswer A or B.", answers=B_IS_YES),
    }


def vary_task(name: str, task: Task, variant: str) -> Task:
    """Return a task in one of its variants.

    Parameters
    ----------
    name : str
        Of the task.
    task : Task
    variant : str
        One of its :attr:`Task.variants`.

    Raises
    ------
    ValueError
        It is negated, and the task is not binary.
    """
    wording = task.variants[variant]
    if wording.negated and task.kind != "binary":
        raise ValueError(
            f"variant {variant} of {name} is negated, but only the answer to a binary task has an "
            f"opposite, and {name} is {task.kind}"
        )
    return replace(
        task,
        build=partial(task.build, prompt=wording.prompt),
        question=f"{task.question} ({variant.replace('_', ' ')})",
        answers=task.answers if wording.answers is None else wording.answers,
        variants={},
        variant_of=name,
        negated=wording.negated,
    )


def wording_families(infos: Mapping[str, TaskInfo]) -> dict[str, list[str]]:
    """Return the tasks that ask the same question in several wordings, the plain one first.

    Parameters
    ----------
    infos : mapping of str to TaskInfo
        What each task is.

    Returns
    -------
    dict of str to list of str
        By the name of the task that has variants. Where the task itself is not one of `infos`,
        there is nothing to hold its variants against, and they are left out.
    """
    families: dict[str, list[str]] = {name: [name] for name in infos}
    for name, info in infos.items():
        if has_plain_wording(name, infos):
            families[info.variant_of].append(name)
    return {base: names for base, names in families.items() if len(names) > 1}


def has_plain_wording(name: str, infos: Mapping[str, TaskInfo]) -> bool:
    """Tell whether a task asks in other words what another one of these asks."""
    return infos[name].variant_of in infos


def pair_examples(examples: pd.DataFrame, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    """Find the examples in which two tasks ask the same image about the same thing.

    Parameters
    ----------
    examples : DataFrame
        With the column `item`, which numbers what a task and its variants ask about.
    first, second : str
        Two wordings of one question, see :func:`wording_families`.

    Returns
    -------
    first_n, second_n : ndarray of int
        (n,) numbers of the examples, among those of their own task.

    Raises
    ------
    ValueError
        The same item of both is about different images, or examples have no items.
    """
    if "item" not in examples:
        raise ValueError(
            "the examples have no column item, by which wordings are compared: take the table "
            "that build_examples returns"
        )
    numbered = []
    for name in (first, second):
        table = examples.loc[examples.task == name, ["item", "image_id"]].reset_index(drop=True)
        table = table.dropna(subset="item").drop_duplicates("item")
        numbered.append(table.reset_index(names="number"))
    pairs = numbered[0].merge(numbered[1], on="item")
    if not (pairs.image_id_x == pairs.image_id_y).all():
        raise ValueError(
            f"{first} and {second} have items of the same number about different images: build "
            "them in one call"
        )
    return pairs.number_x.to_numpy(), pairs.number_y.to_numpy()
