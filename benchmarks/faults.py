"""What goes wrong, how often it was tried, what was lost, and what the user reads.

    python benchmarks/faults.py [--kills 50] [--images 60] [--json PATH]

Drawn scenes go through a demo model in shards of three images, once undisturbed. Then each fault is
made to happen, and the run is started again. Nothing but the shards that a fault hits may be made
again, and in the end all shards must be those of the undisturbed run, byte for byte, or this fails.
A full disk is a small tmpfs, which needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from measuring import PROCESSES, build_scene_examples, list_shards, read_shards, save_json
from PIL import Image

from probekit.data.coco import read_coco
from probekit.data.scenes import write_scenes
from probekit.extraction import shards
from probekit.extraction.extracting import extract_tables
from probekit.extraction.folder import open_folder
from probekit.extraction.runner import ShardStates
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.shards import TensorKey
from probekit.extraction.store import Activations
from probekit.extraction.verify import describe_faults, remove_damaged, verify_activations
from probekit.models import forward, sharing
from probekit.paths import Home
from probekit.tasks.base import BuildSettings
from probekit.tasks.building import build_examples

SETTINGS = ExtractionSettings("tiny-qwen2-vl", shard_images=3, batch_tokens=900, workers=0)
SLOW_WRITE = 0.05  # seconds, so that many processes are killed while they write


class FaultRow(NamedTuple):
    """A row of the table that this benchmark makes."""

    fault: str
    times: int
    lost: str
    message: str


class Outcome(NamedTuple):
    """The names of the shards that a run made, and the error that ended it."""

    made: list[str]
    error: str


@dataclass(frozen=True)
class Bench:
    """The undisturbed run, and what every fault is tried on.

    Attributes
    ----------
    root : Path
        Each fault has a home of its own in here.
    examples : DataFrame
    expected : dict of str to bytes
        The shards of the undisturbed run.
    """

    root: Path
    examples: pd.DataFrame
    expected: dict[str, bytes]

    def home(self, name: str) -> Home:
        """The home of a fault, by its name."""
        return Home.find(self.root / name)

    def copy_undisturbed(self, name: str) -> Home:
        """Make a home that holds the whole undisturbed run."""
        home = self.home(name)
        shutil.copytree(self.home("undisturbed").root, home.root)
        return home

    def run(self, home: Home) -> Outcome:
        """Extract what is missing in a home."""
        before = modification_times(home)
        error_text = ""
        try:
            extract_tables(SETTINGS, {"none": self.examples}, device="cpu", home=home)
        except (OSError, ValueError, ArithmeticError, MemoryError) as error:
            error_text = f"{type(error).__name__}: {error}"
        after = modification_times(home)
        made = [path.name for path in after if before.get(path) != after[path]]
        return Outcome(made, error_text)

    def check_complete(self, home: Home) -> None:
        """Fail unless a home holds the shards of the undisturbed run and no half-written file."""
        stored = read_shards(home)
        different = [name for name in self.expected if stored.get(name) != self.expected[name]]
        assert stored.keys() == self.expected.keys(), stored.keys() ^ self.expected.keys()
        assert not different, different
        leftovers = list(home.root.rglob("*.part"))
        assert not leftovers, leftovers


def modification_times(home: Home) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in list_shards(home)}


# ------------------------------------------------------------------------------- processes that die


def work(root: str, table: str, log: str, start_line: Barrier) -> None:
    """Extract in a process of its own, writing slowly; log the shards that are begun."""
    begin = ShardStates.__init__
    save_file = shards.save_file

    def log_and_begin(states, shard):
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{Path(shard.name).name}\n")
        begin(states, shard)

    def save_slowly(tensors, file, metadata):
        save_file(tensors, file, metadata=metadata)
        time.sleep(SLOW_WRITE)

    sys.stdout = io.StringIO()
    sys.stderr = io.StringIO()
    torch.set_num_threads(1)
    examples = pd.read_parquet(table)
    start_line.wait(timeout=120)
    with (
        patch.object(ShardStates, "__init__", log_and_begin),
        patch.object(shards, "save_file", save_slowly),
    ):
        extract_tables(SETTINGS, {"none": examples}, device="cpu", home=Home.find(root))


def start_process(bench: Bench, home: Home, start_line: Barrier) -> BaseProcess:
    table = str(bench.root / "examples.parquet")
    arguments = (str(home.root), table, str(log_of(home)), start_line)
    process = PROCESSES.Process(target=work, args=arguments)
    process.start()
    return process


def log_of(home: Home) -> Path:
    return home.root.with_name(f"{home.root.name}-begun.txt")


def start_alone(bench: Bench, home: Home) -> BaseProcess:
    """Start a process, and come back when it begins to extract."""
    log_of(home).write_text("", encoding="utf-8")
    start_line = PROCESSES.Barrier(2)
    process = start_process(bench, home, start_line)
    start_line.wait(timeout=120)
    return process


def time_whole_run(bench: Bench, home: Home) -> float:
    process = start_alone(bench, home)
    start = time.perf_counter()
    process.join()
    seconds = time.perf_counter() - start
    assert process.exitcode == 0
    bench.check_complete(home)
    shutil.rmtree(home.root)
    return seconds


def kill_at_random_moments(bench: Bench, kills: int) -> FaultRow:
    """kill -9 while loading, computing or writing, again and again until all is done; then anew."""
    home = bench.home("killed")
    rng = np.random.default_rng(0)
    whole_run_seconds = [time_whole_run(bench, home) for _ in range(2)]
    done_counts = []
    lost_counts = []
    half_written = 0
    completed = 0
    while len(lost_counts) < kills:
        before = modification_times(home)
        process = start_alone(bench, home)
        process.join(rng.uniform(0, min(whole_run_seconds)))
        if process.is_alive():
            process.kill()
            process.join()
        after = modification_times(home)
        if process.exitcode == -signal.SIGKILL:
            done = {path.name for path in after}
            begun = set(log_of(home).read_text(encoding="utf-8").split())
            done_counts.append(len(done))
            lost_counts.append(len(begun - done))
            half_written += bool(list(home.root.rglob(".shard-*.part")))
        else:
            assert process.exitcode == 0
        assert before.items() <= after.items(), "a shard was made twice"
        for path in after:
            assert path.read_bytes() == bench.expected[path.name], f"{path} is not whole"
        if len(after) == len(bench.expected):
            bench.check_complete(home)
            shutil.rmtree(home.root)
            completed += 1
    bench.run(home)
    bench.check_complete(home)
    assert max(lost_counts) <= 2, lost_counts
    one, two = lost_counts.count(1), lost_counts.count(2)
    lost = (
        f"the shard that is computed ({one + two} times), and the one being written ({two} times)"
    )
    message = (
        f"(killed with {min(done_counts)} to {max(done_counts)} of {len(bench.expected)} shards "
        f"done, {half_written} times with a half-written one, in {completed + 1} runs)"
    )
    return FaultRow("kill -9 at a random moment", kills, lost, message)


def launch_twice(bench: Bench) -> FaultRow:
    """Two launchers that know nothing of each other begin the same run at the same moment."""
    home = bench.home("twice")
    start_line = PROCESSES.Barrier(2)
    processes = [start_process(bench, home, start_line) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    bench.check_complete(home)
    begun = log_of(home).read_text(encoding="utf-8").split()
    twice = len(begun) - len(bench.expected)
    lost = f"nothing (of {len(bench.expected)} shards, {twice} were made twice)"
    return FaultRow("two launchers on one folder", 1, lost, "")


def fill_the_disk(bench: Bench) -> FaultRow:
    """Extract into a tmpfs that holds a few of the shards; then make room."""
    home = bench.home("small")
    home.root.mkdir()
    kilobytes = sum(len(content) for content in bench.expected.values()) // 2048
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(home.root)]
    is_root = os.geteuid() == 0
    if not is_root or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        return FaultRow("disk full", 0, "not tried: a tmpfs cannot be mounted here", "")
    try:
        first = bench.run(home)
        assert 0 < len(first.made) < len(bench.expected), first
        assert "make room" in first.error, first
        subprocess.run(["mount", "-o", "remount,size=1g", str(home.root)], check=True)
        second = bench.run(home)
        assert not set(first.made) & set(second.made)
        bench.check_complete(home)
    finally:
        subprocess.run(["umount", str(home.root)], check=True)
    return FaultRow("disk full", 1, "the shard that is written", first.error)


# ------------------------------------------------------------------------------- shards that change


class ShardFault(NamedTuple):
    """A change of a shard, and how many shards it spoils."""

    name: str
    change: Callable[[Path], object]
    spoilt: int = 1


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def exchange_with_next(path: Path) -> None:
    other = path.with_name("shard-00001.safetensors")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def flip_bit_of_content(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-999] ^= 4
    path.write_bytes(content)


def flip_bit_of_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"first_row")] ^= 4
    path.write_bytes(content)


def change_shards(bench: Bench) -> list[FaultRow]:
    """Shards that are not what was written are noticed by their header, or where they are read."""
    other_model = bench.home("other model")
    settings = replace(SETTINGS, untrained=True)
    extract_tables(settings, {"none": bench.examples}, device="cpu", home=other_model)

    def replace_by_other_model(path: Path) -> None:
        (other,) = [other for other in list_shards(other_model) if other.name == path.name]
        shutil.copy(other, path)

    faults = [
        ShardFault("shard truncated", truncate),
        ShardFault("shard empty", empty),
        ShardFault("shard deleted", Path.unlink),
        ShardFault("shard of another model", replace_by_other_model),
        ShardFault("two shards exchanged", exchange_with_next, spoilt=2),
        ShardFault("bit flipped in a shard's header", flip_bit_of_header),
    ]
    rows = [change_shard(bench, fault) for fault in faults]
    rows.append(change_content(bench))
    return rows


def change_shard(bench: Bench, fault: ShardFault) -> FaultRow:
    home = bench.copy_undisturbed(fault.name)
    first = list_shards(home)[0]
    fault.change(first)
    message = verify_message(home, first.name, spoilt=fault.spoilt)
    made = bench.run(home).made
    assert len(made) == fault.spoilt, made
    check_sound(bench, home)
    lost = "that shard" if fault.spoilt == 1 else "these shards"
    return FaultRow(fault.name, 1, lost, message)


def change_content(bench: Bench) -> FaultRow:
    """A header does not tell what the numbers are: reading them does, and a verification."""
    name = "bit flipped in a shard's numbers"
    home = bench.copy_undisturbed(name)
    first = list_shards(home)[0]
    flip_bit_of_content(first)
    verify_message(home, first.name, spoilt=1)
    assert bench.run(home) == Outcome([], "")
    message = read_damaged(open_view(bench, home))
    assert remove_damaged(verify_activations("data/activations", home=home), home=home) == 1
    assert bench.run(home).made == [first.name]
    check_sound(bench, home)
    return FaultRow(name, 1, "that shard", message)


def verify_message(home: Home, file_name: str, *, spoilt: int) -> str:
    """What a verification says of a file; it must name as many as are spoilt."""
    table = verify_activations("data/activations", home=home)
    assert (table.state != "sound").sum() == spoilt, table
    lines = describe_faults(table).splitlines()
    return next(line for line in lines if file_name in line)


def check_sound(bench: Bench, home: Home) -> None:
    bench.check_complete(home)
    table = verify_activations("data/activations", home=home)
    assert (table.state == "sound").all(), table


def open_view(bench: Bench, home: Home) -> Activations:
    folder = open_folder(list_shards(home)[0].parents[1], home)
    return Activations(folder, bench.examples, ("lm",), ("mean",), home=home)


def read_damaged(view: Activations) -> str:
    try:
        for layer in view.layers:
            view[layer, "mean"]
    except ValueError as error:
        return str(error)
    raise AssertionError("a flipped bit was read as if nothing were wrong")


# ------------------------------------------------------------------------------ records that change


class RecordFault(NamedTuple):
    """A record and what it says instead; None for a record that is gone."""

    name: str
    file: str
    content: bytes | None


def change_records(bench: Bench) -> list[FaultRow]:
    """Shards stay where what describes them is gone, older, damaged, or of another run."""
    older_meta = json.dumps({"model": "tiny-qwen2-vl", "sharing": None}).encode()
    older_plan = json.dumps({"contents": ["lm/mean"], "starts": [0, len(bench.examples)]}).encode()
    (rows_file,) = bench.home("undisturbed").root.rglob("rows.parquet")
    other_rows = pd.read_parquet(rows_file).iloc[::-1].reset_index(drop=True).to_parquet()
    meta = "meta.json"
    plan = "shards-*/plan.json"
    rows = "shards-*/rows.parquet"
    faults = [
        RecordFault("meta.json missing", meta, None),
        RecordFault("meta.json older", meta, older_meta),
        RecordFault("meta.json damaged", meta, b"{"),
        RecordFault("plan.json missing", plan, None),
        RecordFault("plan.json older", plan, older_plan),
        RecordFault("plan.json damaged", plan, b"{"),
        RecordFault("rows.parquet missing", rows, None),
        RecordFault("rows.parquet damaged", rows, b"PAR1"),
        RecordFault("rows.parquet of another run", rows, other_rows),
    ]
    return [change_record(bench, fault) for fault in faults]


def change_record(bench: Bench, fault: RecordFault) -> FaultRow:
    home = bench.copy_undisturbed(fault.name)
    folder = list_shards(home)[0].parents[1]
    (file,) = folder.glob(fault.file)
    file.unlink()
    if fault.content is not None:
        file.write_bytes(fault.content)
    message = verify_message(home, file.name.replace("rows.parquet", "plan.json"), spoilt=1)
    assert bench.run(home) == Outcome([], "")
    check_sound(bench, home)
    return FaultRow(fault.name, 1, "nothing", message)


# --------------------------------------------------------------------------- the model and the data


def run_out_of_memory(bench: Bench) -> FaultRow:
    """A device that holds 400 tokens: batches run in halves until they fit."""
    home = bench.home("memory")
    run_pooled = forward.run_pooled
    token_counts = []
    output = io.StringIO()

    def run_small(vlm, prepared, **options):
        tokens = sum(len(row["input_ids"]) for image in prepared for row in image.tokens)
        token_counts.append(tokens)
        if tokens > 400:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return run_pooled(vlm, prepared, **options)

    with (
        patch.object(forward, "run_pooled", run_small),
        patch.object(sharing, "run_pooled", run_small),
        contextlib.redirect_stdout(output),
    ):
        outcome = bench.run(home)
    assert not outcome.error, outcome.error
    assert len(outcome.made) == len(bench.expected)
    assert max(token_counts) > 400
    gap = largest_difference(
        open_view(bench, home), expected=open_view(bench, bench.home("undisturbed"))
    )
    assert gap < 1e-3, gap
    message = next(line for line in output.getvalue().splitlines() if "does not fit" in line)
    times = sum(tokens > 400 for tokens in token_counts)
    lost = f"nothing (largest difference {gap:.0e})"
    return FaultRow("out of memory on a batch", times, lost, message)


def largest_difference(view: Activations, *, expected: Activations) -> float:
    """Relative to the largest value of each layer."""
    differences = []
    for layer in view.layers:
        values = expected[layer, "mean"]
        differences.append(np.abs(view[layer, "mean"] - values).max() / np.abs(values).max())
    return float(max(differences))


def compute_values_that_are_not_finite(bench: Bench) -> list[FaultRow]:
    """NaN and infinity in a layer, for one example."""
    return [compute_value(bench, np.nan), compute_value(bench, np.inf)]


def compute_value(bench: Bench, value: float) -> FaultRow:
    home = bench.home(str(value))
    write = ShardStates.write

    def spoil_and_write(states, vlm):
        if states.shard.number == 6:
            states.states[TensorKey("lm.03", "mean")][1, 5] = value
        write(states, vlm)

    with patch.object(ShardStates, "write", spoil_and_write):
        first = bench.run(home)
    assert len(first.made) >= 6, first
    assert "shard-00006.safetensors" not in first.made, first
    assert "lm.03/mean" in first.error, first
    second = bench.run(home)
    assert not set(first.made) & set(second.made)
    bench.check_complete(home)
    return FaultRow(f"{value} in a layer", 1, "that shard", first.error)


class ImageFault(NamedTuple):
    """What an image file holds, and whether it can be read all the same."""

    name: str
    content: bytes
    is_readable: bool = False


def spoil_images(bench: Bench) -> list[FaultRow]:
    """Images that are none, or that would fill the memory, are named when examples are built."""
    folder = bench.root / "images"
    write_scenes(folder, 20, seed=3)
    file = Path(read_coco(folder).images.file.iloc[4])
    original = file.read_bytes()
    faults = [
        ImageFault("image of zero bytes", b""),
        ImageFault("image truncated", original[:500]),
        ImageFault("image of 30,000 x 30,000 pixels", png_header(30_000)),
        ImageFault("no image (HTML)", b"<html>Not found</html>"),
        ImageFault("PNG named .jpg", png(Image.open(file).size), is_readable=True),
        ImageFault("EPS named .jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    ]
    rows = []
    for fault in faults:
        file.write_bytes(fault.content)
        rows.append(build_with_image(fault, folder=folder, out=bench.root / "tables" / fault.name))
    return rows


def build_with_image(fault: ImageFault, *, folder: Path, out: Path) -> FaultRow:
    settings = BuildSettings(
        str(folder), train=12, validation=4, test=4, tasks=("caption",), max_bad=0.05
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples = build_examples(settings, out)
    left_out = pd.read_csv(out / "left_out_images.csv")
    if fault.is_readable:
        assert left_out.empty
        assert examples.image_id.nunique() == 20
        return FaultRow(fault.name, 1, "nothing", "")
    (reason,) = left_out.reason
    assert examples.image_id.nunique() == 19
    return FaultRow(fault.name, 1, "that image, named", reason)


def png_header(side: int) -> bytes:
    """A PNG of a few bytes that says it has side x side pixels."""
    size = side.to_bytes(4, "big")
    header = size + size + bytes([8, 2, 0, 0, 0])
    chunks = [
        png_chunk(b"IHDR", header),
        png_chunk(b"IDAT", zlib.compress(bytes(99))),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------- all


def set_up(root: Path, images: int) -> Bench:
    """Make the undisturbed run."""
    examples = build_scene_examples(root, images, held_out=images // 6, seed=7, tasks=("caption",))
    examples.to_parquet(root / "examples.parquet")
    undisturbed = Home.find(root / "undisturbed")
    extract_tables(SETTINGS, {"none": examples}, device="cpu", home=undisturbed)
    return Bench(root, examples, read_shards(undisturbed))


def try_all(bench: Bench, kills: int) -> list[FaultRow]:
    rows = [
        kill_at_random_moments(bench, kills),
        launch_twice(bench),
        fill_the_disk(bench),
        *change_shards(bench),
        *change_records(bench),
        run_out_of_memory(bench),
        *compute_values_that_are_not_finite(bench),
        *spoil_images(bench),
    ]
    return [row._replace(message=row.message.replace(f"{bench.root}/", "")) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--images", type=int, default=60, help="24 at least")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        rows = try_all(set_up(Path(temporary), options.images), options.kills)
    for row in rows:
        print(f"{row.times:3} x {row.fault}: lost: {row.lost}")
        if row.message:
            print(f"      {row.message}")
    save_json(options.json, [row._asdict() for row in rows])


if __name__ == "__main__":
    main()
