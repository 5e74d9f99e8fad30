"""A real JupyterLab, driven in a real browser."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import papermill

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

REPOSITORY = Path(__file__).resolve().parents[2]
CHROME = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")

HAS_KERNEL = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
KERNEL_IS_READY = "() => jupyterapp.shell.currentWidget.sessionContext.ready"
RUN_ALL_CELLS = "() => {jupyterapp.commands.execute('notebook:run-all-cells')}"
ALL_CELLS_HAVE_RUN = """() => {
  const panel = jupyterapp.shell.currentWidget;
  const cells = [...panel.content.model.cells].filter(cell => cell.type === 'code');
  const isIdle = panel.sessionContext.session?.kernel?.status === 'idle';
  return isIdle && cells.every(cell => cell.executionCount);
}"""
ERRORS_OF_CELLS = """() => {
  const cells = [...jupyterapp.shell.currentWidget.content.model.cells];
  const outputs = cells.flatMap(cell => cell.outputs ? cell.outputs.toJSON() : []);
  return outputs.filter(output => output.output_type === 'error').map(output => output.evalue);
}"""

# Notes for each key press how many milliseconds later the changed photo and curve are painted.
WATCH_KEY_PRESSES = """() => {
  window.moves = [];
  let pressed = null;
  let move = {};
  const note = (name) => requestAnimationFrame(() => {
    if (pressed !== null && !(name in move)) move[name] = performance.now() - pressed;
  });
  const startMove = () => {
    pressed = performance.now();
    move = {};
    moves.push(move);
  };
  const watch = (target, name) => {
    const onChange = () => {
      const isLoading = target.matches('img') && !target.complete;
      if (isLoading) target.addEventListener('load', () => note(name), {once: true});
      else note(name);
    };
    const all = {attributes: true, childList: true, subtree: true, characterData: true};
    new MutationObserver(onChange).observe(target, all);
  };
  addEventListener('keydown', startMove, true);
  const curve = document.querySelector('.probekit-curve');
  watch(document.querySelector('img.probekit-photo'), 'photo');
  watch(curve.closest('.widget-html-content'), 'curve');
}"""


def prepare_notebooks(folder: Path, parameters: dict[str, dict]) -> None:
    """Write copies of the notebooks with other parameters (by notebook), not executed."""
    folder.mkdir(parents=True, exist_ok=True)
    for notebook in sorted((REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        papermill.execute_notebook(
            str(notebook),
            str(folder / notebook.name),
            parameters.get(notebook.stem, {}),
            prepare_only=True,
            progress_bar=False,
        )


def find_free_port() -> int:
    """A port that nothing listens on."""
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@contextmanager
def serve_notebooks(folder: Path, home: Path) -> Iterator[str]:
    """The address of a JupyterLab that serves a folder; its kernels have this home."""
    config = folder / ".jupyter"
    page_config = config / "labconfig" / "page_config.json"
    page_config.parent.mkdir(parents=True, exist_ok=True)
    # Without the question whether to show news, which would lie over the page.
    page_config.write_text(
        '{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}',
        encoding="utf-8",
    )
    environment = {
        **os.environ,
        "PROBEKIT_HOME": str(home),
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "JUPYTER_CONFIG_DIR": str(config),
    }
    port = find_free_port()
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        f"--ServerApp.root_dir={folder}",
        "--ServerApp.token=",
        "--ServerApp.password=",
        "--LabApp.expose_app_in_browser=True",
    ]
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(url)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def wait_for_server(url: str, seconds: float = 120) -> None:
    """Return as soon as the server answers.

    Raises
    ------
    TimeoutError
        It does not.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/api", timeout=2)
            return
        except OSError:
            time.sleep(0.25)
    raise TimeoutError(f"JupyterLab does not answer at {url}")


@contextmanager
def open_browser(**options) -> Iterator[Page]:
    """A page of a headless Chrome; options are those of playwright's new_context."""
    from playwright.sync_api import sync_playwright

    viewport = {"width": 1500, "height": 1250}
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(
            executable_path=CHROME, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chrome.new_context(viewport=viewport, **options).new_page()
        chrome.close()


def run_notebook(
    page: Page, url: str, name: str, seconds: float = 240, *, interface: str = "doc"
) -> list[str]:
    """Open a notebook, run all its cells, and return the errors that they show.

    The interface is "doc", the notebook alone, or "lab", with files and tabs beside it.
    """
    page.goto(f"{url}/{interface}/tree/{name}")
    page.wait_for_function(HAS_KERNEL, timeout=60_000)
    page.evaluate(KERNEL_IS_READY)
    page.evaluate(RUN_ALL_CELLS)
    page.wait_for_function(ALL_CELLS_HAVE_RUN, timeout=1000 * seconds, polling=250)
    return page.evaluate(ERRORS_OF_CELLS)


def scroll_to(page: Page, selector: str) -> Locator:
    """Scroll until an element exists, which JupyterLab makes when it comes into view."""
    panel = page.locator(".jp-WindowedPanel-outer").first
    for _ in range(60):
        if page.locator(selector).count():
            break
        panel.hover()
        page.mouse.wheel(0, 500)
        page.wait_for_timeout(150)
    element = page.locator(selector).first
    element.scroll_into_view_if_needed()
    return element


def find_widget(page: Page, kind: str, label: str) -> Locator:
    """A widget of the explorer, such as the "slider" or the "dropdown" with this label."""
    labels = page.locator(".widget-label", has_text=label)
    return page.locator(f".widget-{kind}", has=labels)


def show_explorer(page: Page) -> Locator:
    """Scroll until the explorer's top is at the top of the notebook, and return the explorer."""
    explorer = scroll_to(page, ".probekit-explorer")
    explorer.locator(".probekit-curve").wait_for()
    explorer.evaluate("explorer => explorer.scrollIntoView({block: 'start'})")
    return explorer


def read_slider(page: Page, label: str) -> int:
    """The value of the slider with this label."""
    return int(find_widget(page, "slider", label).locator(".widget-readout").inner_text())


def choose_option(page: Page, label: str, value: str) -> None:
    """Choose an option of the dropdown with this label."""
    find_widget(page, "dropdown", label).locator("select").select_option(value)


def measure_key_presses(
    page: Page, explorer: Locator, key: str, *, times: int
) -> list[dict[str, float]]:
    """Milliseconds from each key press to the changed photo and curve, as the page sees them."""
    explorer.focus()
    page.evaluate("() => {if (window.moves) moves.length = 0}")
    page.evaluate(f"() => {{if (!window.moves) ({WATCH_KEY_PRESSES})()}}")
    for _ in range(times):
        page.keyboard.press(key)
        page.wait_for_timeout(400)
    return page.evaluate("() => moves")
