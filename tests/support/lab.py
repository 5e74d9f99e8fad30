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

import papermill

REPOSITORY = Path(__file__).resolve().parents[2]
CHROME = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
ERRORS = """() => [...jupyterapp.shell.currentWidget.content.model.cells].flatMap(cell =>
  (cell.outputs ? cell.outputs.toJSON() : []).filter(o => o.output_type === 'error').map(o => o.evalue))"""
DONE = """() => {const panel = jupyterapp.shell.currentWidget;
  const code = [...panel.content.model.cells].filter(cell => cell.type === 'code');
  return panel.sessionContext.session?.kernel?.status === 'idle' && code.every(cell => cell.executionCount)}"""
WATCH = """() => {
  window.moves = []; let pressed = null, seen = {};
  const done = (name) => {if (pressed !== null && !(name in seen)) seen[name] = performance.now() - pressed};
  addEventListener('keydown', () => {pressed = performance.now(); seen = {}; moves.push(seen)}, true);
  const watch = (target, name) => new MutationObserver(() => {
    const image = target.matches('img') ? target : null;
    if (image && !image.complete) image.addEventListener('load', () => done(name), {once: true}); else done(name);
  }).observe(target, {attributes: true, childList: true, subtree: true, characterData: true});
  watch(document.querySelector('.jp-OutputArea-output img.widget-image'), 'picture');
  watch(document.querySelector('.jp-OutputArea-output svg[viewBox]').closest('.widget-html-content'), 'curve');
}"""


def prepare(folder: Path, parameters: dict[str, dict]) -> list[Path]:
    """Copies of the notebooks with other parameters (by notebook), not executed."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for book in sorted((REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        papermill.execute_notebook(str(book), str(folder / book.name), parameters.get(book.stem, {}),
                                   prepare_only=True, progress_bar=False)
        out.append(folder / book.name)
    return out


@contextmanager
def served(folder: Path, home: Path) -> Iterator[str]:
    """Address of a JupyterLab that serves `folder`; its kernels take `home` for the project's folder."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / ".jupyter" / "labconfig"
    config.mkdir(parents=True, exist_ok=True)
    (config / "page_config.json").write_text(  # no question about news over the page
        '{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    environment = os.environ | {"PROBEKIT_HOME": str(home), "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1",
                                "JUPYTER_CONFIG_DIR": str(config.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ServerApp.token=", "--allow-root",
         "--ServerApp.password=", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/api", timeout=2)
                break
            except OSError:
                time.sleep(0.25)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def browser(width: int = 1500, height: int = 1250, **options) -> Iterator:
    """A page of a headless Chrome."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=CHROME, args=["--no-sandbox", "--disable-gpu"])
        yield chrome.new_context(viewport={"width": width, "height": height}, **options).new_page()
        chrome.close()


def run_all(page, url: str, name: str, timeout: float = 240) -> list[str]:
    """Open a notebook alone and run all its cells; the errors that its cells show."""
    page.goto(f"{url}/doc/tree/{name}")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel",
                           timeout=60_000)
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.ready")
    page.evaluate("() => {jupyterapp.commands.execute('notebook:run-all-cells')}")
    page.wait_for_function(DONE, timeout=1000 * timeout, polling=250)
    return page.evaluate(ERRORS)


def show(page, selector: str):
    """Scroll until something can be seen; JupyterLab draws what is in view alone."""
    panel = page.locator(".jp-WindowedPanel-outer").first
    for _ in range(60):
        if page.locator(selector).count():
            break
        panel.hover()
        page.mouse.wheel(0, 500)
        page.wait_for_timeout(150)
    found = page.locator(selector).first
    found.scroll_into_view_if_needed()
    return found


def slider(page, name: str):
    """The handle of the explorer's slider of this name."""
    return page.locator(".widget-slider", has=page.locator(".widget-label", has_text=name)).locator(".noUi-handle")


def latencies(page, handle, key: str, times: int) -> list[dict[str, float]]:
    """Milliseconds from each key press to the changed picture and curve, as the page itself sees them."""
    handle.focus()
    page.evaluate("() => {if (window.moves) moves.length = 0}")
    page.evaluate(f"() => {{if (!window.moves) ({WATCH})()}}")
    for _ in range(times):
        handle.press(key)
        page.wait_for_timeout(400)
    return page.evaluate("() => moves")
