"""Are the shards what was written, and are all of them there? Looks at every byte, which resuming does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from probekit import paths
from probekit.extraction import shards
from probekit.extraction.shards import Part

STATES = ("sound", "damaged", "missing")


def verify(folder: str | Path) -> pd.DataFrame:
    """Look through all shards below a folder.

    Parameters
    ----------
    folder : ``data/activations``, a model's folder there, or one of its folders of settings

    Returns
    -------
    DataFrame
        One row a shard, and one for each record that cannot be read: `folder` (of the model's settings), `file`,
        `state` (out of :data:`STATES`) and `reason`. Missing shards were planned, and not yet made or lost; records are
        written anew by 02_extract, and their shards stay.

    Raises
    ------
    FileNotFoundError
        No activations are there.
    """
    top = paths.Home.find().resolve(folder)
    found = sorted({record.parent.parent for record in top.rglob("part-*/part.json")}
                   | {shard.parent.parent for shard in top.rglob("part-*/shard-*.safetensors")})
    if not found:
        raise FileNotFoundError(f"{top} holds no activations: name data/activations, or a folder in it")
    rows = [row for own in found for row in _folder(own)]
    return pd.DataFrame(rows, columns=["folder", "file", "state", "reason"])


def _folder(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    name, meta = paths.Home.find().relative(folder), shards.meta_of(folder)
    if meta is None:
        yield name, "meta.json", "missing", "is missing, damaged, or of another version"
    planned: set[Path] = set()
    for part in Part.all_of(folder):
        numbers = range(len(part.starts) - 1)
        for i in tqdm(numbers, desc=f"{folder.parent.name} {part.folder.name}", unit="shard", delay=2):
            planned.add(part.shard(i))
            reason = part.lacks(i) or wrong(part, i, meta)
            state = ("damaged" if part.shard(i).exists() else "missing") if reason else "sound"
            yield name, f"{part.folder.name}/{part.shard(i).name}", state, reason
    unknown = sorted({*folder.glob("part-*/shard-*.safetensors")} - planned)
    for own in sorted({file.parent for file in unknown}):
        count = sum(file.parent == own for file in unknown)
        yield name, f"{own.name}/part.json", "missing", f"or its rows.parquet is damaged or gone, with {count} shards"


def wrong(part: Part, i: int, meta: dict | None) -> str:
    """What is wrong with the content of a shard that can be opened; "" where nothing is."""
    rows = part.shard_rows(i)
    size = {True: len(rows), False: rows.file.nunique()}
    try:
        with safe_open(part.shard(i), framework="numpy") as shard:
            keys, hashes = set(shard.keys()), shards.note_of(shard).get("sha256", {})
            for key in sorted(keys):
                values = shard.get_tensor(key)
                if shards.digest(values) != hashes.get(key):
                    return f"{key} is not what was written"
                if values.ndim != 2 or len(values) != size[key.startswith("lm.")]:
                    return f"{key} has the shape {values.shape}, for {size[key.startswith('lm.')]} rows"
                if not np.isfinite(values).all():
                    return f"{key} is not finite"
    except (OSError, SafetensorError) as error:
        return f"cannot be read ({error})"
    wanted = {f"{layer}/{pooling}" for want in part.wants for stage, _, pooling in [want.partition("/")]
              for layer in (meta["layers"][stage] if meta else ())}
    lacking = sorted(wanted - keys)
    return f"lacks {lacking[0]}" + f" and {len(lacking) - 1} more" * (len(lacking) > 1) if lacking else ""


def remove(table: pd.DataFrame) -> int:
    """Delete the damaged shards of :func:`verify`'s table, which 02_extract makes again; returns their number."""
    damaged = table[table.state == "damaged"]
    for row in damaged.itertuples():
        (paths.Home.find().resolve(row.folder) / row.file).unlink(missing_ok=True)
    return len(damaged)


def told(table: pd.DataFrame, removed: bool = False) -> str:
    """What was found and what to run again, in words; `removed`: damaged shards have been taken away."""
    bad, counts = table[table.state != "sound"], table[table.file.str.contains("shard-")].state.value_counts()
    lines = [f"{row.folder}/{row.file} {row.reason} ({row.state})" for row in bad.itertuples()]
    lines.append("shards: " + ", ".join(f"{counts.get(state, 0):,} {state}" for state in STATES))
    wrong = set(bad.folder)
    if wrong:
        runs = [file.stem for file in sorted((paths.Home.find().data / "activations").glob("*.json"))
                if wrong & {store["folder"] for store in paths.read_json(file)["stores"]}]
        whose = f"of the runs {', '.join(runs)}" if runs else "that made them (no run names these folders)"
        away = "the damaged ones are taken away: " if removed else "take the damaged ones away (--remove), then "
        lines.append(f"{away * bool(counts.get('damaged', 0))}run 02_extract {whose} again (python -m probekit run "
                     "--params … --from 02): it makes just what is not there")
    return "\n".join(lines)
