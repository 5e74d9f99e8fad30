"""Tasks that ask the statements of a file, see :mod:`probekit.data.statement_files`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from probekit.tasks import captions
from probekit.tasks.base import Selection, Task, example_rows


def statement_task(name: str, file: Path) -> Task:
    """Return the task that asks each statement of a file about the image that it names.

    Parameters
    ----------
    name : str
        Name of the task, under which :attr:`Selection.statements` holds the file's statements.
    file : Path
        The file of statements.
    """

    def build(selection: Selection, rng: np.random.Generator) -> pd.DataFrame:
        statements = selection.statements[name]
        statements = statements[statements.image_id.isin(selection.images.index)]
        _check_labels(file, statements)
        prompts = []
        for statement in statements.itertuples():
            prompt = statement.text
            if statement.is_caption:
                prompt = captions.PROMPT.format(caption=captions.clean_caption(prompt))
            prompts.append(prompt)
        return example_rows(
            selection.images.loc[statements.image_id], prompts, statements.label.to_numpy()
        )

    return Task("binary", build, f"Is this statement of {file.name} true?")


def _check_labels(file: Path, statements: pd.DataFrame) -> None:
    labels = statements.label.unique()
    if len(labels) == 1 and len(statements) > 1:
        answer = "yes" if labels[0] else "no"
        raise ValueError(
            f"the label of all {len(statements):,} statements of {file} is {answer}, so there is "
            "nothing to tell apart: add statements with the other label, or leave the file out"
        )
