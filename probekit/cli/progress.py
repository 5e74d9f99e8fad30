"""What a batch run shows of its notebooks, which run in kernels: bars, notes and warnings.

The library reports with ``tqdm.auto`` and ``warnings``, as everywhere. In a kernel these become
messages: the state of tqdm's widgets (a text on each side of a bar), and what is written to stdout
and stderr. They are kept in the executed notebook, and read here on their way.
"""

from __future__ import annotations

import html
import logging
import os
import queue
import re
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from jupyter_client.manager import AsyncKernelManager
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.log import logger
from tqdm import tqdm

ENGINE = "probekit"  # the name of the engine below, for papermill

# Seconds between two lines about progress where they stay, such as in a log.
LINE_SECONDS = 10

# Seconds from which on a bar that has ended gets a line that stays.
LONG_BAR_SECONDS = 2

INDENT = " " * 6
WIDTH = 80  # of a terminal that does not say it
BAR_OF_TQDM = ["HTMLModel", "FloatProgressModel", "HTMLModel"]
BAR_ENDINGS = ("success", "danger")
HEADING = re.compile(r"#+ (?:\d+ · )?(.+)")  # without the number of the notebook
WARNING = re.compile(r"(?P<file>.+?):(?P<line>\d+): (?P<kind>\w*(Warning|Remark)): (?P<text>.*)")


class Screen:
    """Lines that stay, and one about the present: in place on a terminal, now and then in a file.

    Parameters
    ----------
    stream : text file
        Usually stderr.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line: tqdm | None = None
        self._next_line = time.monotonic() + LINE_SECONDS
        self._shown = ""
        if stream.isatty():
            self._line = tqdm(file=stream, bar_format="{desc}", leave=False, dynamic_ncols=True)

    @property
    def width(self) -> int | None:
        """Columns that a line in place may take; None where lines stay."""
        if self._line is None:
            return None
        return (self._line.format_dict["ncols"] or WIDTH) - 1  # the last column would wrap

    def write(self, line: str) -> None:
        """Write a line that stays."""
        tqdm.write(line, file=self._stream)
        self._stream.flush()

    def write_below(self, line: str) -> None:
        """Write a line that stays, indented; on a terminal no word is cut."""
        if self.width is None:
            self.write(INDENT + line)
            return
        text = textwrap.fill(
            line,
            self.width,
            initial_indent=INDENT,
            subsequent_indent=INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        self.write(text)

    def show(self, text: str) -> None:
        """Show what goes on now."""
        if text == self._shown:
            return
        if self._line is not None:
            self._line.set_description_str(text)
            self._shown = text
        elif time.monotonic() >= self._next_line:
            self.write(text)
            self._shown = text
            self._next_line = time.monotonic() + LINE_SECONDS

    def close(self) -> None:
        """Take the line about the present away."""
        if self._line is not None:
            self._line.close()


@dataclass
class _Bar:
    """Widgets of a bar of tqdm.

    Attributes
    ----------
    sides : list of str
        Numbers of the widgets that hold the text on its left and right.
    started : float
        Seconds of the monotonic clock.
    """

    sides: list[str]
    started: float = field(default_factory=time.monotonic)

    def text(self, widgets: Mapping[str, Mapping[str, Any]]) -> str:
        """Return what stands beside the bar: ``tiny-qwen2-vl: 45% 9/20 [00:03<00:04]``."""
        sides = (html.unescape(widgets[side].get("value", "")) for side in self.sides)
        return " ".join(" ".join(sides).split())  # tqdm pads with spaces of the width of a digit


class NotebookProgress:
    """Follows the messages of one notebook's kernel. One thread feeds it, another one shows it.

    Parameters
    ----------
    name : str
        Of the notebook.
    number, count : int
        Which notebook of how many, from 1.
    """

    def __init__(self, name: str, *, number: int, count: int) -> None:
        self.name = name
        self.place = f"[{number}/{count}]"
        self.started = time.monotonic()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._cell = "starting a kernel"
        self._step = self._cell
        self._bars: dict[str, _Bar] = {}  # by the number of each of their widgets
        self._running: list[_Bar] = []  # the one that moved last at the end
        self._partial = {"stdout": "", "stderr": ""}
        self._notes: list[str] = []
        self._cell_has_bar = False
        self._warnings: set[str] = set()
        self._is_after_warning = False

    # ------------------------------------------------------------------------------------- showing

    def refresh(self, screen: Screen) -> None:
        """Show what has come since the last call."""
        while not self._lines.empty():
            screen.write_below(self._lines.get())
        screen.show(self.describe(screen.width))

    def describe(self, width: int | None) -> str:
        """Say in one line, of at most `width` columns, where the notebook stands."""
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        text = f"{self.place} {self.name} {minutes}:{seconds:02d}  {self._step}"
        if width is None or len(text) <= width:
            return text
        text = f"{self.place} {minutes}:{seconds:02d} "
        description, colon, numbers = self._step.rpartition(": ")
        room = width - len(text) - len(colon + numbers)
        if len(description) > room:
            description = description[: max(0, room - 1)] + "…"
        return (text + description + colon + numbers)[:width]

    # ----------------------------------------------------------------------------------- following

    def start_cell(self, description: str) -> None:
        """Begin a cell; as long as it has no bar, its description is shown."""
        for name in ("stdout", "stderr"):  # what ended without a line break
            self._read(name, "\n" if self._partial[name] else "")
        self._running.clear()
        self._notes.clear()
        self._cell_has_bar = False
        self._cell = description
        self._step = description

    def receive(self, message: Mapping[str, Any], widgets: Mapping[str, Mapping[str, Any]]) -> None:
        """Take a message of the kernel, and the widgets' state after it."""
        content = message["content"]
        if message["msg_type"] == "stream":
            self._read(content["name"], content["text"])
        elif message["msg_type"] in ("comm_open", "comm_msg"):
            self._follow_bar(content["comm_id"], content["data"].get("state", {}), widgets)

    def _follow_bar(
        self, number: str, state: Mapping[str, Any], widgets: Mapping[str, Mapping[str, Any]]
    ) -> None:
        children = state.get("children")
        if not isinstance(children, list):  # another library's widgets may call anything so
            children = []
        children = [str(child).removeprefix("IPY_MODEL_") for child in children]
        if [widgets.get(child, {}).get("_model_name") for child in children] == BAR_OF_TQDM:
            self._bars |= dict.fromkeys(children, _Bar([children[0], children[2]]))
            number = children[1]
        bar = self._bars.get(number)
        if bar is None:
            return
        self._show_notes()
        if bar in self._running:
            self._running.remove(bar)
        if state.get("bar_style") not in BAR_ENDINGS:
            self._running.append(bar)
        elif time.monotonic() - bar.started >= LONG_BAR_SECONDS:
            self._lines.put(bar.text(widgets))
        self._step = self._running[-1].text(widgets) if self._running else self._cell

    def _read(self, name: str, text: str) -> None:
        *lines, rest = (self._partial[name] + text).split("\n")
        for line in lines:
            line = line.rstrip().rpartition("\r")[2]
            if not line:
                continue
            if name == "stderr":
                self._read_warning(line)
            elif self._cell_has_bar:
                self._lines.put(line)
            else:
                self._notes.append(line)
        self._partial[name] = rest
        if "\r" in rest.rstrip():  # a bar of tqdm without widgets
            self._show_notes()
            self._step = rest.rstrip().rpartition("\r")[2]

    def _show_notes(self) -> None:
        """Show what the cell has printed: it has a bar, so it is one that works for long.

        What other cells print is for readers of the notebook.
        """
        self._cell_has_bar = True
        for note in self._notes:
            self._lines.put(note)
        self._notes.clear()

    def _read_warning(self, line: str) -> None:
        is_source = self._is_after_warning and line.startswith("  ")
        warning = WARNING.fullmatch(line)
        self._is_after_warning = warning is not None
        if is_source:  # the line of code that Python shows below a warning
            return
        if warning is not None:
            line = f"{warning['kind']}: {warning['text']}"
            if warning["kind"] != "Remark":
                line += f" ({os.path.basename(warning['file'])}:{warning['line']})"
        if line not in self._warnings:
            self._warnings.add(line)
            self._lines.put(line)


# ------------------------------------------------------------------------------- papermill's engine


class _ReportingClient(PapermillNotebookClient):
    """Executes a notebook, and shows its messages to a :class:`NotebookProgress`."""

    def __init__(
        self, manager: NotebookExecutionManager, *, progress: NotebookProgress, **options: Any
    ) -> None:
        super().__init__(manager, **options)
        self._progress = progress

    def process_message(
        self, msg: dict[str, Any], cell: NotebookNode, cell_index: int
    ) -> NotebookNode | None:
        if msg["msg_type"] == "execute_input":
            self._progress.start_cell(_describe_cell(self.nb.cells, cell_index))
        output = super().process_message(msg, cell, cell_index)
        self._progress.receive(msg, self.widget_state)
        return output


class _ReportingEngine(NBClientEngine):
    """papermill's usual engine with the client above; the kernel runs, and is ended with it."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: NotebookExecutionManager,
        kernel_name: str,
        *,
        progress: NotebookProgress,
        start_timeout: int,
        kernel_manager: AsyncKernelManager,
        **unused: Any,
    ) -> NotebookNode:
        return _ReportingClient(
            nb_man,
            km=kernel_manager,
            progress=progress,
            kernel_name=kernel_name,
            startup_timeout=start_timeout,
            timeout=None,
            log=logger,
        ).execute(cleanup_kc=True)


papermill_engines.register(ENGINE, _ReportingEngine)
logger.addHandler(logging.NullHandler())  # a kernel's death is said once, by who waits for it


def _describe_cell(cells: list[NotebookNode], index: int) -> str:
    """Say which code cell it is, and below which heading: ``cell 4 of 8, What came out``."""
    number = sum(cell.cell_type == "code" for cell in cells[: index + 1])
    count = sum(cell.cell_type == "code" for cell in cells)
    text = f"cell {number} of {count}"
    for cell in reversed(cells[:index]):
        heading = HEADING.match(cell.source) if cell.cell_type == "markdown" else None
        if heading:
            return f"{text}, {heading[1]}"
    return text
