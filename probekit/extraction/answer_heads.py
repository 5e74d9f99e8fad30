"""What answers are read with, beside the shards: a few rows of the output embedding, and a norm."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from probekit import paths
from probekit.extraction.folder import ActivationFolder
from probekit.extraction.shards import shard_note, tensor_digest
from probekit.models.output_head import AnswerHead

ANSWER_POOLING = "last"  # after this token the answer begins
VERSION = 1  # of what is taken from a model: another one is made anew
ANSWER_HEADS = "answers-"  # how the names of their files begin


def collect_words(tables: Iterable[pd.DataFrame]) -> tuple[str, ...]:
    """Return all words of the answers of tables, sorted; none without the column `answers`."""
    words: set[str] = set()
    for table in tables:
        if "answers" not in table:
            continue
        of_tasks = table.drop_duplicates("task") if "task" in table else table
        for answers in of_tasks.answers:
            if isinstance(answers, (list, tuple, np.ndarray)):  # tables without answers have NaN
                words.update(str(word) for of_answer in answers for word in of_answer)
    return tuple(sorted(words))


def answer_head_file(words: Sequence[str]) -> str:
    """Return the name of the file for some words, from the model's folder."""
    return f"{ANSWER_HEADS}{paths.fingerprint(VERSION, list(words))}.safetensors"


def write_answer_head(folder: ActivationFolder, words: Sequence[str], head: AnswerHead) -> None:
    """Write what the answers of a model are read with."""
    arrays, note = head.to_tensors()
    digests = {name: tensor_digest(array) for name, array in arrays.items()}
    metadata = {"probekit": json.dumps({"head": note, "digests": digests})}
    folder.write(answer_head_file(words), lambda file: save_file(arrays, file, metadata=metadata))


def load_answer_head(folder: ActivationFolder, words: Sequence[str]) -> AnswerHead:
    """Read what :func:`write_answer_head` wrote.

    Raises
    ------
    FileNotFoundError
        It was not written.
    ValueError
        It is damaged; the message names the fix.
    """
    name = answer_head_file(words)
    if not folder.exists(name):
        raise FileNotFoundError(
            f"{folder.url} has nothing to read the answers {', '.join(words)} with: run 02_extract "
            "for this run, it makes no sound shard again"
        )
    try:
        return open_answer_head(folder, name)
    except ValueError as error:
        folder.forget_copy(name)
        raise ValueError(
            f"{folder.url}/{name} {error}: delete it, then 02_extract makes just that again"
        ) from error


def open_answer_head(folder: ActivationFolder, name: str) -> AnswerHead:
    """Read the file of an answer head.

    Raises
    ------
    ValueError
        It is damaged; the message says how.
    """
    try:
        arrays = {}
        with safe_open(folder.local_copy(name), framework="numpy") as file:
            note = shard_note(file)
            for key in file.keys():  # noqa: SIM118  # it is no dictionary
                arrays[key] = file.get_tensor(key)
        digests = {key: tensor_digest(array) for key, array in arrays.items()}
        is_as_written = digests == note["digests"]
        head = AnswerHead.from_tensors(arrays, note["head"])
    except (OSError, SafetensorError, LookupError, TypeError) as error:
        raise ValueError(f"cannot be read ({error})") from error
    if not is_as_written:
        raise ValueError("is not what was written")
    return head
