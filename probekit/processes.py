"""Several processes at once on a CPU, where what one of them does cannot fill the cores."""

from __future__ import annotations

import re
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from joblib import Parallel, delayed, parallel_config
from tqdm.auto import tqdm

Item = TypeVar("Item")
Value = TypeVar("Value")

# Seconds between two looks at what the processes have written.
POLL_SECONDS = 0.3
# The drawn part of a bar, as in `` 45%|████      | 9/20``; and a bar that took no two seconds.
DRAWN = re.compile(r"(?<=%)\|.*\|")
SHORT_BAR = re.compile(r"100%.*\[00:0[01]<")


def map_in_processes(
    function: Callable[[Item], Value], items: Sequence[Item], *, n_jobs: int
) -> list[Value]:
    """Call a function with each item, `n_jobs` at once, each in a process of its own.

    Small layers are bound by Python and not by arithmetic: several processes then divide the cores
    better than the threads of one. The processes share the threads of this one among them. They are
    kept for the next call, and end with this process. A bar shows how far each is, and the lines
    that they write appear here.

    Parameters
    ----------
    function : callable
        Of a module, so that another process can import it.
    items : sequence
        Sent to the processes, as are the values that come back.
    n_jobs : int
        With 1, or with a single item, all is done in this process.

    Returns
    -------
    list
        What `function` returns, in the order of `items`.

    Raises
    ------
    Exception
        What `function` raises; the other processes are stopped.
    MemoryError
        A process was killed.
    """
    n_jobs = min(n_jobs, len(items))
    if n_jobs <= 1:
        return [function(item) for item in items]
    threads = max(1, torch.get_num_threads() // n_jobs)
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(bar_format="{desc}", desc=f"starting {n_jobs} processes", leave=False) as bar,
    ):
        outputs = [_Output(Path(folder) / str(number)) for number in range(len(items))]
        calls = [
            delayed(partial(_call, function, item, output.file))()
            for item, output in zip(items, outputs, strict=True)
        ]
        is_over = threading.Event()
        follower = threading.Thread(target=_follow, args=(outputs, bar, is_over), daemon=True)
        follower.start()
        try:
            # No shared memory for large arrays: a container has 64 MB of it.
            with parallel_config("loky", max_nbytes=None, inner_max_num_threads=threads):
                return Parallel(n_jobs)(calls)
        except BrokenProcessPool as error:
            raise MemoryError(
                f"one of {n_jobs} processes was killed, most likely for want of memory: run this "
                "again with fewer at once (n_jobs, copies); what is on disk is not done again"
            ) from error
        finally:
            is_over.set()
            follower.join()


def _call(function: Callable[[Item], Value], item: Item, file: Path) -> Value:
    """Call a function, and write what it prints to two files; in a process of its own."""
    with (
        _stream_file(file, "stdout").open("a", encoding="utf-8", buffering=1) as stdout,
        _stream_file(file, "stderr").open("a", encoding="utf-8", buffering=1) as stderr,
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        return function(item)


def _stream_file(file: Path, stream: str) -> Path:
    return file.with_suffix(f".{stream}")


class _Output:
    """What the call with one item has printed, and how far it is.

    Attributes
    ----------
    file : Path
        Without the ending for each stream.
    progress : str
        The text of its bar, "" before it has one and after its end.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.progress = ""
        self._read_bytes = {"stdout": 0, "stderr": 0}

    def pass_on(self, written: set[str]) -> None:
        """Write new lines to this process's streams, and keep the text of the bar.

        What another process has `written` already is not repeated.
        """
        for name, start in self._read_bytes.items():
            file = _stream_file(self.file, name)
            if not file.exists():
                continue
            with file.open("rb") as opened:
                opened.seek(start)
                complete, line_break, rest = opened.read().rpartition(b"\n")
            self._read_bytes[name] += len(complete + line_break)
            for line in complete.decode("utf-8").split("\n"):
                text = _without_drawing(line)
                if text and text not in written and not SHORT_BAR.search(text):
                    tqdm.write(text, file=getattr(sys, name))
                    written.add(text)
            if name == "stderr":
                self.progress = _without_drawing(rest.decode("utf-8", errors="replace"))


def _without_drawing(line: str) -> str:
    """Return what the last bar of a line says beside its drawing, or the line itself."""
    return DRAWN.sub("", line.rstrip().rpartition("\r")[2]).rstrip()


def _follow(outputs: Sequence[_Output], bar: tqdm, is_over: threading.Event) -> None:
    written: set[str] = set()
    while True:
        is_last = is_over.wait(POLL_SECONDS)
        for output in outputs:
            output.pass_on(written)
        progress = " · ".join(output.progress for output in outputs if output.progress)
        if progress:
            bar.set_description_str(progress)
        if is_last:
            return
