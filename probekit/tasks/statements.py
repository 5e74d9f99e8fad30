"""The tasks of files of statements, see :mod:`probekit.data.statement_files`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from probekit.tasks import captions
from probekit.tasks.base import Selection, Task, example_rows


def statement_task(name: str, file: Path) -> Task:
    """The task that asks a file's statements of those chosen images that they are about."""

    def build(chosen: Selection, rng: np.random.Generator) -> pd.DataFrame:
        own = chosen.statements[name]
        own = own[own.image_id.isin(chosen.images.index)]
        prompts = [
            captions.PROMPT.format(caption=captions.clean(text)) if is_caption else text
            for text, is_caption in zip(own.text, own.is_caption, strict=True)
        ]
        return example_rows(chosen.images.loc[own.image_id], prompts, own.label)

    return Task("binary", build, f"Is this statement of {file.name} true?")
