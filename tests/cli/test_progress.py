"""What a batch run shows: the bars, notes and warnings of a kernel, in place or line by line."""

from __future__ import annotations

import io
import re

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from probekit.cli import progress as module
from probekit.cli.notebooks import _KernelOfThisPython
from probekit.cli.progress import ENGINE, NotebookProgress, Screen

QUICK = "print('for readers of the notebook')"
LONG = """
import time, warnings
from tqdm.auto import tqdm
from probekit.parameters import remark

tqdm.write("before the bar")
with tqdm(total=4, desc="a model", unit="image", mininterval=0) as bar:
    for i in range(4):
        warnings.warn("out of memory", RuntimeWarning)
        bar.update()
        time.sleep(0.05)
remark("read as something else")
print("without the end of a line", end="")
"""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A notebook that has run in a kernel, all lines that its progress shows, and its steps."""
    folder = tmp_path_factory.mktemp("followed")
    cells = [new_markdown_cell("# 2 · A title"), new_code_cell(QUICK)]
    cells += [new_markdown_cell("## Long work"), new_code_cell(LONG), new_code_cell("pass")]
    notebook = new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": ""}
    nbformat.write(notebook, folder / "in.ipynb")
    steps = []

    class Watched(NotebookProgress):
        def receive(self, message, widgets):
            super().receive(message, widgets)
            steps.append(self.describe(None))

    progress = Watched("02_extract", number=2, count=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LONG_BAR_SECONDS", 0)
        executed = papermill.execute_notebook(
            folder / "in.ipynb",
            folder / "out.ipynb",
            engine_name=ENGINE,
            progress=progress,
            kernel_name="python3",
            kernel_manager=_KernelOfThisPython.start(folder, ["warnings", "no.such.module"]),
            progress_bar=False,
        )
    stream = io.StringIO()
    progress.refresh(Screen(stream))
    return executed, stream.getvalue().splitlines(), steps


def test_bars_are_followed_with_rate_and_time_left(followed):
    _, lines, steps = followed
    running = [step for step in steps if re.search(r"a model: 50% 2/4 \[00:\d\d<.+image/s", step)]
    assert running
    assert running[0].startswith("[2/6] 02_extract 0:0")
    ended = [line for line in lines if line.startswith("      a model: 100% 4/4 [")]
    assert len(ended) == 1


def test_without_a_bar_the_cell_and_its_heading_are_shown(followed):
    _, _, steps = followed
    assert any(step.endswith("  cell 1 of 3, A title") for step in steps)
    assert any(step.endswith("  cell 2 of 3, Long work") for step in steps)


def test_warnings_are_shown_once_and_notes_of_cells_with_a_bar(followed):
    _, lines, _ = followed
    texts = [line.strip() for line in lines if "a model" not in line]
    warnings = [text for text in texts if text.startswith("RuntimeWarning: out of memory (")]
    assert len(warnings) == 1
    texts.remove(warnings[0])
    assert sorted(texts) == [
        "Remark: read as something else",
        "before the bar",
        "without the end of a line",
    ]


def test_the_executed_notebook_keeps_bar_and_text(followed):
    executed, _, _ = followed
    text = "".join(output.get("text", "") for output in executed.cells[3].outputs)
    assert "before the bar" in text
    assert text.count(": RuntimeWarning: ") == 1  # Python shows it once
    view = "application/vnd.jupyter.widget-view+json"
    views = [output for output in executed.cells[3].outputs if view in output.get("data", {})]
    assert len(views) == 1
    assert (
        views[0].data[view]["model_id"]
        in executed.metadata.widgets[view.replace("view", "state")]["state"]
    )


def test_a_bar_of_plain_text_is_followed_too():
    progress = NotebookProgress("02_extract", number=2, count=6)
    for text in ("\r 10%|# | 1/10 [00:01<00:09]", "\r 20%|## | 2/10 [00:02<00:08]"):
        message = {"msg_type": "stream", "content": {"name": "stderr", "text": text}}
        progress.receive(message, {})
    assert progress.describe(None).endswith("20%|## | 2/10 [00:02<00:08]")


@pytest.mark.parametrize("children", [3, None, [None, {"a": 1}], ["IPY_MODEL_b"] * 3])
def test_widgets_that_are_no_bars_do_no_harm(children):
    progress = NotebookProgress("02_extract", number=2, count=6)
    content = {"comm_id": "a", "data": {"state": {"children": children}}}
    progress.receive({"msg_type": "comm_open", "content": content}, {"a": {}})
    progress.receive({"msg_type": "comm_msg", "content": {"comm_id": "a", "data": {}}}, {"a": {}})
    assert progress.describe(None).endswith("starting a kernel")


@pytest.mark.parametrize("width", [20, 60, 79, 119])
def test_a_line_in_place_fits_and_keeps_its_numbers_where_they_fit(width):
    progress = NotebookProgress("02_extract", number=2, count=6)
    progress.start_cell("probing a-model-with-a-long-name (wrong_image): 45% 9/20 [00:03<00:04]")
    line = progress.describe(width)
    assert len(line) <= width
    assert width < 60 or line.endswith(": 45% 9/20 [00:03<00:04]")


def test_a_file_gets_a_line_now_and_then(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    screen = Screen(stream)
    for second in range(35):
        screen.show(f"step {second}")
    screen.close()
    assert 2 <= len(stream.getvalue().splitlines()) <= 4
    assert "\r" not in stream.getvalue()


def test_a_terminal_shows_the_present_below_what_stays():
    stream = Terminal()
    screen = Screen(stream)
    screen.show("step 1")
    screen.write("a note")
    screen.show("step 2")
    screen.close()
    shown = stream.getvalue()
    assert shown.count("\n") == 1
    assert shown.index("step 1") < shown.index("a note\n") < shown.rindex("step 2")
    assert not shown.rpartition("\r")[2].strip()  # the last line is taken away


def test_a_terminal_cuts_no_word_of_a_note():
    stream = Terminal()
    screen = Screen(stream)
    words = ["each", "image", "runs", "once", "for", "all", "its", "prompts"] * 4
    screen.write_below(" ".join(words))
    screen.close()
    lines = [line.rpartition("\r")[2] for line in stream.getvalue().split("\n")[:-1]]
    assert len(lines) > 1
    assert " ".join(lines).split() == words
    assert all(len(line) <= screen.width for line in lines)
