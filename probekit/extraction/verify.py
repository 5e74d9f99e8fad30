"""Are the shards what was written, and are all there? Looks at every byte; resuming does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from probekit import paths
from probekit.extraction.answer_heads import ANSWER_HEADS, open_answer_head
from probekit.extraction.folder import ActivationFolder, open_folder
from probekit.extraction.shards import ShardSet, TensorKey, shard_note, tensor_digest

STATES = ("sound", "damaged", "missing")


class FileState(NamedTuple):
    """What was found of one file."""

    folder: str
    file: str
    state: str
    reason: str


def verify_activations(folder: str, *, home: paths.Home | None = None) -> pd.DataFrame:
    """Look through all shards below a folder.

    Parameters
    ----------
    folder : str
        The root of all activations, a model's folder there, or one of its folders of settings; a
        path or a URL.
    home : Home or None
        Where relative paths start.

    Returns
    -------
    DataFrame
        One row per shard, one per file that answers are read with, and one per record that cannot
        be read: `folder` (of the model's
        settings), `file`, `state` (out of :data:`STATES`) and `reason`. Missing shards were planned
        and not made yet, or lost; records are written anew by 02_extract, and their shards stay.

    Raises
    ------
    FileNotFoundError
        No activations are there.
    """
    home = paths.Home.find(home)
    model_folders = _find_model_folders(folder, home)
    if not model_folders:
        raise FileNotFoundError(
            f"{open_folder(folder, home).url} holds no activations: name data/activations, or a "
            "folder in it"
        )
    states = [
        state for model_folder in model_folders for state in _verify_folder(model_folder, home)
    ]
    return pd.DataFrame(states, columns=list(FileState._fields))


def _find_model_folders(folder: str, home: paths.Home) -> list[ActivationFolder]:
    top = open_folder(folder, home)
    try:
        files = top.fs.find(top.root)
    except FileNotFoundError:
        return []
    folders = set()
    for file in files:
        parent, _, name = file.rpartition("/")
        is_shard = name.startswith("shard-") and name.endswith(".safetensors")
        if is_shard or name == "plan.json":
            folders.add(parent.rpartition("/")[0])
    prefix = "" if top.is_local else f"{top.url.partition('://')[0]}://"
    return [open_folder(prefix + one, home) for one in sorted(folders)]


def _verify_folder(folder: ActivationFolder, home: paths.Home) -> Iterator[FileState]:
    name = folder.name_from(home)
    meta = folder.read_meta()
    if meta is None:
        yield FileState(name, "meta.json", "missing", "is missing, damaged, or of another format")
    planned: set[str] = set()
    for shard_set in ShardSet.list_all(folder):
        description = f"{folder.model_name} {shard_set.name}"
        numbers = range(shard_set.shard_count)
        for i in tqdm(numbers, desc=description, unit="shard", delay=2):
            file = shard_set.shard_name(i)
            planned.add(file)
            reason = shard_set.find_fault(i) or find_content_fault(shard_set, i, meta)
            state = "sound"
            if reason:
                state = "damaged" if folder.exists(file) else "missing"
            yield FileState(name, file, state, reason)
    yield from _shards_without_plan(folder, name, planned)
    for file in sorted(folder.list_files()):
        if file.startswith(ANSWER_HEADS):
            try:
                open_answer_head(folder, file)
                yield FileState(name, file, "sound", "")
            except ValueError as error:
                yield FileState(name, file, "damaged", str(error))


def _shards_without_plan(
    folder: ActivationFolder, name: str, planned: set[str]
) -> Iterator[FileState]:
    files = [file for file in folder.list_files() if file.startswith("shards-")]
    files = [file for file in files if file.endswith(".safetensors")]
    unknown_sets = [file.partition("/")[0] for file in sorted(files) if file not in planned]
    for shard_set in sorted(set(unknown_sets)):
        count = unknown_sets.count(shard_set)
        reason = f"or its rows.parquet is damaged or gone, with {count} shards"
        yield FileState(name, f"{shard_set}/plan.json", "missing", reason)


def find_content_fault(shard_set: ShardSet, i: int, meta: dict | None) -> str:
    """Say what is wrong with the content of a shard that is there; ``""`` where nothing is."""
    header_fault = shard_set.find_header_fault(i)
    if header_fault:
        return header_fault
    rows = shard_set.shard_rows(i)
    try:
        with safe_open(
            shard_set.folder.local_copy(shard_set.shard_name(i)), framework="numpy"
        ) as shard:
            digests = shard_note(shard).get("digests", {})
            names = sorted(shard.keys())
            for name in names:
                fault = _find_tensor_fault(name, shard.get_tensor(name), rows, digests)
                if fault:
                    return fault
    except (OSError, SafetensorError) as error:
        return f"cannot be read ({error})"
    missing = sorted(_expected_tensors(shard_set, meta) - set(names))
    if not missing:
        return ""
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"lacks {missing[0]}{others}"


def _find_tensor_fault(name: str, values: np.ndarray, rows: pd.DataFrame, digests: dict) -> str:
    is_of_image = TensorKey.of(name).content.is_of_image
    expected = rows.file.nunique() if is_of_image else len(rows)
    if tensor_digest(values) != digests.get(name):
        return f"{name} is not what was written"
    if values.ndim != 2 or len(values) != expected:
        return f"{name} has the shape {values.shape}, for {expected} rows"
    if not np.isfinite(values).all():
        return f"{name} is not finite"
    return ""


def _expected_tensors(shard_set: ShardSet, meta: dict | None) -> set[str]:
    if meta is None:
        return set()
    return {
        TensorKey(layer, content.pooling).tensor_name
        for content in shard_set.contents
        for layer in meta["layers"][content.stage]
    }


def remove_damaged(table: pd.DataFrame, *, home: paths.Home | None = None) -> int:
    """Delete the damaged shards in :func:`verify_activations`'s table; 02_extract makes them.

    Returns
    -------
    int
        How many there were.
    """
    home = paths.Home.find(home)
    damaged = table[table.state == "damaged"]
    for row in damaged.itertuples():
        open_folder(row.folder, home).remove(row.file)
    return len(damaged)


def describe_faults(table: pd.DataFrame, *, runs: Sequence[str] = (), removed: bool = False) -> str:
    """Say what was found and what to run again.

    Parameters
    ----------
    table : DataFrame
        As :func:`verify_activations` returns it.
    runs : sequence of str
        Names of the runs that read the damaged folders, see :func:`runs_that_read`.
    removed : bool
        Whether damaged shards have been taken away.
    """
    faults = table[table.state != "sound"]
    is_shard = table.file.str.contains("shard-")
    counts = table[is_shard].state.value_counts()
    lines = [f"{row.folder}/{row.file} {row.reason} ({row.state})" for row in faults.itertuples()]
    lines.append("shards: " + ", ".join(f"{counts.get(state, 0):,} {state}" for state in STATES))
    if len(faults):
        lines.append(_advice(runs, has_damaged="damaged" in counts, removed=removed))
    return "\n".join(lines)


def _advice(runs: Sequence[str], *, has_damaged: bool, removed: bool) -> str:
    whose = (
        f"of the runs {', '.join(runs)}" if runs else "that made them (no run names these folders)"
    )
    run_again = (
        f"run 02_extract {whose} again (python -m probekit run --params … --from 02): it makes "
        "just what is missing"
    )
    if not has_damaged:
        return run_again
    if removed:
        return f"the damaged ones are taken away: {run_again}"
    return f"take the damaged ones away (--remove), then {run_again}"


def runs_that_read(folders: set[str], *, home: paths.Home | None = None) -> list[str]:
    """Return the runs whose records in ``data/activations/<run>.json`` name one of some folders."""
    home = paths.Home.find(home)
    runs = []
    for file in sorted((home.data / "activations").glob("*.json")):
        recorded = {record["folder"] for record in paths.read_json(file)["stores"]}
        if folders & recorded:
            runs.append(file.stem)
    return runs
