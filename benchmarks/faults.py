"""What goes wrong, how often it was tried, what was lost, and what the user is told.

    python benchmarks/faults.py [--kills 50] [--json PATH]

Drawn scenes go through a demo model in shards of three images, once undisturbed; then each fault is made to happen, and
the run is started again. Nothing but the shard that a fault hits may be made again, and in the end all shards must be
those of the undisturbed run, byte for byte, or this fails. A full disk is a small tmpfs, which wants root.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from probekit import paths
from probekit.data import coco, scenes
from probekit.extraction import extract, shards, store, verify, worker
from probekit.models import forward
from probekit.tasks import building

SETTINGS = extract.ExtractionSettings("tiny-qwen2-vl", shard_images=3, batch_tokens=900, workers=0)
SCENES = 60


@dataclass
class Bench:
    """The undisturbed run, and how faults are held against it."""

    root: Path
    examples: pd.DataFrame
    reference: dict[str, bytes]

    def fresh(self, name: str) -> list[Path]:
        """A data folder with all shards in it; returns them."""
        paths.Home.find().data = self.root / name
        shutil.copytree(self.root / "undisturbed", paths.Home.find().data)
        return shard_files()

    def again(self, change: Callable = lambda: None) -> tuple[list[str], str]:
        """Extract again; the shards that were made, and what the user was told where it stopped."""
        before = {path: path.stat().st_mtime_ns for path in shard_files()}
        told = ""
        try:
            change()
            extract.extract(SETTINGS, self.examples, "cpu")
        except (OSError, ValueError, ArithmeticError, MemoryError) as error:
            told = f"{type(error).__name__}: {error}"
        return [path.name for path in shard_files() if before.get(path) != path.stat().st_mtime_ns], told

    def whole(self) -> None:
        """Fail unless all shards are those of the undisturbed run."""
        found = {path.name: path.read_bytes() for path in shard_files()}
        assert found == self.reference, sorted(set(self.reference) ^ set(found)) or "other bytes"
        left = [*paths.Home.find().data.rglob("*.part"), *paths.Home.find().data.rglob("*.claim-*")]
        assert not left, left


def shard_files() -> list[Path]:
    return sorted(paths.Home.find().data.glob("activations/*/*/part-*/shard-*.safetensors"))


def row(fault: str, times: int, lost: str, told: str) -> dict:
    return {"fault": fault, "times": times, "lost": lost, "told": told}


# ------------------------------------------------------------------------------------------------------ processes die


def _work(folder: str, table: str, began) -> None:
    paths.Home.find().data = Path(folder)
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"

    def noted(passes, part, i, *rest, honest=worker.extract_shard):
        with Path(table).with_name("begun.txt").open("a") as log:
            log.write(f"{part.shard(i).name}\n")
        return honest(passes, part, i, *rest)

    def slowly(*states, honest=worker.finish_shard):  # so that many are killed while they write
        time.sleep(0.05)
        return honest(*states)

    worker.extract_shard, worker.finish_shard = noted, slowly
    began.set()
    extract.extract(SETTINGS, pd.read_parquet(table), "cpu")


def killed(bench: Bench, kills: int) -> list[dict]:
    """kill -9 at random moments of loading, computing and writing, again and again until all is there; then anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["probekit.extraction.extract", "probekit.extraction.worker"])
    paths.Home.find().data, rng = bench.root / "killed", np.random.default_rng(0)
    seconds, done, finished, shard_counts, lost = None, 0, 0, [], []
    begun = bench.root / "begun.txt"
    while done < kills:
        before = {path: path.stat().st_mtime_ns for path in shard_files()}
        began = context.Event()
        begun.write_text("")
        process = context.Process(target=_work, args=(str(paths.Home.find().data), str(bench.root / "examples.parquet"), began))
        process.start()
        began.wait()
        start = time.perf_counter()
        process.join(None if seconds is None else rng.uniform(0, seconds))  # the first ones show how long it takes
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            done += 1
            shard_counts.append(len(shard_files()))
            lost.append(len({*begun.read_text().split()} - {path.name for path in shard_files()}))
        else:
            assert process.exitcode == 0
            seconds = time.perf_counter() - start if finished < 2 else seconds
        for path in shard_files():
            assert path.read_bytes() == bench.reference[path.name], f"{path} is not whole"
            assert before.get(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, f"{path} was made twice"
        if len(shard_files()) == len(bench.reference):
            finished += 1
            seconds = seconds if finished > 1 else None  # the second one is free of what is loaded once
            shutil.rmtree(paths.Home.find().data)
    bench.again()
    bench.whole()
    assert max(lost) <= 1, lost
    told = (f"(killed with {min(shard_counts)} to {max(shard_counts)} of {len(bench.reference)} shards there, over "
            f"{finished + 1} runs)")
    return [row("kill -9 at a random moment", done, f"the shard in flight ({sum(lost)} times there was one)", told)]


def full_disk(bench: Bench, _: int) -> list[dict]:
    """A tmpfs that holds a few of the shards; then room is made."""
    paths.Home.find().data = bench.root / "small"
    paths.Home.find().data.mkdir()
    size = sum(map(len, bench.reference.values())) // 2048
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(paths.Home.find().data)]
    if os.geteuid() or subprocess.run(mounted, capture_output=True, check=False).returncode:
        return [row("disk full", 0, "not tried: a tmpfs cannot be mounted here", "")]
    try:
        made, told = bench.again()
        assert 0 < len(made) < len(bench.reference) and "make room" in told, (made, told)
        subprocess.run(["mount", "-o", "remount,size=1g", str(paths.Home.find().data)], check=True)
        later, _ = bench.again()
        assert not set(made) & set(later)
        bench.whole()
    finally:
        subprocess.run(["umount", str(paths.Home.find().data)], check=True)
    return [row("disk full", 1, "the shard in flight", told)]


# ------------------------------------------------------------------------------------------------------- files change


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-999] ^= 4
    path.write_bytes(content)


def _flip_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"first_row")] ^= 4
    path.write_bytes(content)


def _other_run(path: Path) -> None:
    shutil.copy(path.parents[5] / "elsewhere" / path.name, path)


def _exchange(path: Path) -> None:
    other = path.with_name("shard-00001.safetensors")
    own = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(own)


def changed_shards(bench: Bench, _: int) -> list[dict]:
    """Shards that are not what was written: found by their beginning, or where they are read."""
    rows = []
    for name, change, expected in (
            ("shard truncated", _cut, 1), ("shard empty", lambda path: path.write_bytes(b""), 1),
            ("shard deleted", Path.unlink, 1), ("shard of another model", _other_run, 1),
            ("two shards exchanged", _exchange, 2), ("bit flipped in a shard", _flip, 1),
            ("bit flipped in its header", _flip_header, 1)):
        first, told = bench.fresh(name)[0], ""
        change(first)
        table = verify.verify(paths.Home.find().data)
        assert (table.state != "sound").sum() == expected, table
        told = next(line for line in verify.told(table).splitlines() if first.name in line)
        if change is _flip:  # its beginning is as it should be
            assert bench.again() == ([], "")
            told = _refused(bench)
            assert verify.remove(table) == 1
        made, _ = bench.again()
        assert len(made) == expected, made
        bench.whole()
        assert (verify.verify(paths.Home.find().data).state == "sound").all()
        rows.append(row(name, 1, "that shard" if expected == 1 else "these shards", _short(told)))
    return rows


def _refused(bench: Bench) -> str:
    folder = shard_files()[0].parents[1]
    view = store.Activations(folder, bench.examples, ("lm",), ("mean",))
    try:
        for layer in view.layers:
            view[layer, "mean"]
    except ValueError as error:
        return str(error)
    raise AssertionError("a flipped bit was read as if nothing were wrong")


def changed_records(bench: Bench, _: int) -> list[dict]:
    """What says what the shards are is missing, older, or damaged: shards stay."""
    rows = []
    old = json.dumps({"model": "tiny-qwen2-vl", "sharing": None})
    other = bench.root / "other.parquet"
    rows_there, = (bench.root / "undisturbed").rglob("rows.parquet")
    pd.read_parquet(rows_there).iloc[::-1].reset_index(drop=True).to_parquet(other)
    for name, file, content in (("meta.json missing", "meta.json", None), ("meta.json older", "meta.json", old),
                                ("meta.json damaged", "meta.json", "{"), ("part.json damaged", "part-*/part.json", "{"),
                                ("rows.parquet damaged", "part-*/rows.parquet", "PAR1"),
                                ("rows.parquet of another run", "part-*/rows.parquet", other)):
        folder = bench.fresh(name)[0].parents[1]
        record, = folder.glob(file)
        record.unlink()
        if content is not None:
            record.write_bytes(content.encode() if isinstance(content, str) else content.read_bytes())
        told = verify.told(verify.verify(folder)).splitlines()[0]
        made, error = bench.again()
        assert (made, error) == ([], ""), (made, error)
        bench.whole()
        assert shards.meta_of(folder)
        rows.append(row(name, 1, "nothing", _short(told)))
    return rows


# -------------------------------------------------------------------------------------------------- the model, the data


def out_of_memory(bench: Bench, _: int) -> list[dict]:
    """A device that holds 400 tokens: batches are halved until they fit."""
    paths.Home.find().data, honest, tokens, heard = bench.root / "memory", forward.run_pooled, [], io.StringIO()

    def small(vlm, prepared, *rest):
        tokens.append(sum(len(one["input_ids"]) for image in prepared for one in image.tokens))
        if tokens[-1] > 400:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return honest(vlm, prepared, *rest)

    forward.run_pooled = small
    try:
        with contextlib.redirect_stdout(heard):
            made, told = bench.again()
    finally:
        forward.run_pooled = honest
    assert not told and len(made) == len(bench.reference) and max(tokens) > 400, told
    examples = bench.examples
    ours = store.Activations(shard_files()[0].parents[1], examples, ("lm",), ("mean",))
    theirs = store.Activations(bench.root / "undisturbed" / shard_files()[0].parents[1].relative_to(paths.Home.find().data), examples,
                         ("lm",), ("mean",))
    gap = max(np.abs(ours[layer, "mean"] - theirs[layer, "mean"]).max() / np.abs(theirs[layer, "mean"]).max()
              for layer in ours.layers)
    assert gap < 1e-3, gap
    line = next(text for text in heard.getvalue().splitlines() if "halved" in text)
    return [row("out of memory on a batch", sum(k > 400 for k in tokens), f"nothing (largest difference {gap:.0e})",
                line)]


def not_finite(bench: Bench, _: int) -> list[dict]:
    """NaN and infinity in a layer, for one example."""
    rows = []
    for value in (np.nan, np.inf):
        paths.Home.find().data, honest = bench.root / str(value), worker.extract_shard

        def broken(passes, part, i, *rest, value=value, honest=honest):
            states = honest(passes, part, i, *rest)
            if i == 6:
                states["lm.03/mean"][1, 5] = value
            return states

        worker.extract_shard = broken
        try:
            made, told = bench.again()
        finally:
            worker.extract_shard = honest
        assert len(made) >= 6 and "shard-00006.safetensors" not in made and "lm.03/mean" in told, (made, told)
        assert not set(made) & set(bench.again()[0])
        bench.whole()
        rows.append(row(f"{value} in a layer", 1, "the shard in flight", told))
    return rows


def bad_images(bench: Bench, _: int) -> list[dict]:
    """Images that are none, or that would fill the memory: named when examples are built."""
    folder, rows = bench.root / "bad", []
    for name, content, fine in (
            ("image of zero bytes", b"", False), ("image truncated", None, False),
            ("image of 30,000 x 30,000 pixels", _huge(), False), ("no image (HTML)", b"<html>Not found</html>", False),
            ("PNG named .jpg", _png(), True), ("EPS named .jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", False)):
        shutil.rmtree(folder, ignore_errors=True)
        scenes.write_scenes(folder, 20, 3)
        file = Path(coco.read_coco(folder).images.file.iloc[4])
        file.write_bytes(file.read_bytes()[:500] if content is None else content)
        build = building.BuildSettings(str(folder), train=12, validation=4, test=4, tasks=("caption",), max_bad=0.05)
        out = bench.root / "tables" / name
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            examples = building.build_examples(build, out)
        left_out = pd.read_csv(out / "left_out_images.csv")
        assert len(left_out) == (not fine) and examples.image_id.nunique() == 19 + fine
        rows.append(row(name, 1, "nothing" if fine else "that image, named", "" if fine else left_out.reason[0]))
    return rows


def _huge() -> bytes:
    """A PNG of a few bytes that says it has 30,000 x 30,000 pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128), "red").save(buffer, "PNG")
    return buffer.getvalue()


def _short(text: str) -> str:
    return text.replace(f"{paths.Home.find().data}/", "").replace(str(paths.Home.find().relative(paths.Home.find().data)) + "/", "")


FAULTS = (killed, full_disk, changed_shards, changed_records, out_of_memory, not_finite, bad_images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), pd.DataFrame(), {})
        build = building.BuildSettings(str(scenes.write_scenes(bench.root / "scenes", SCENES, 7)), train=40, validation=10, test=10,
                            tasks=("caption",))
        bench.examples = building.build_examples(build, bench.root / "tables" / "all")
        bench.examples.to_parquet(bench.root / "examples.parquet")
        paths.Home.find().data = bench.root / "undisturbed"
        extract.extract(SETTINGS, bench.examples, "cpu")
        bench.reference = {path.name: path.read_bytes() for path in shard_files()}
        paths.Home.find().data = bench.root / "other"
        extract.extract(extract.replace(SETTINGS, untrained=True), bench.examples, "cpu")
        (bench.root / "elsewhere").mkdir()
        for path in shard_files():
            shutil.copy(path, bench.root / "elsewhere")
        for fault in FAULTS:
            with contextlib.redirect_stdout(io.StringIO()):
                rows += fault(bench, options.kills)
    table = pd.DataFrame(rows)
    print(table.assign(told=table.told.str[:150]).to_string(index=False, justify="left"))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
