"""The explorer of notebook 06 in a real JupyterLab, with its side panel, and real key presses."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from probekit.report.explorer import LENS_HEAT
from tests.support import lab

pytest.importorskip("playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not lab.CHROME, reason="no Chrome or Chromium on this machine"),
]

SCREEN = {"width": 1280, "height": 800}
SLOWEST_MOVE = 1000  # milliseconds; what it takes alone on a machine is for benchmarks/explorer.py
COUNT_CELLS = "() => jupyterapp.shell.currentWidget.content.widgets.length"
TOO_WIDE = """explorer => {
  const boxes = [explorer, ...explorer.querySelectorAll('.widget-box, .jp-OutputArea')];
  return boxes.filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.className);
}"""


@pytest.fixture(scope="module")
def page(jupyter):
    """Notebook 6 after all its cells have run; the tests go on from one another."""
    with lab.open_browser() as page:
        page.set_viewport_size(SCREEN)
        errors = lab.run_notebook(page, jupyter, "06_inspect_examples.ipynb", interface="lab")
        assert errors == []
        lab.show_explorer(page)
        yield page


@pytest.fixture
def explorer(page):
    """The explorer, and afterwards a look at what went wrong in the page meanwhile."""
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page.locator(".probekit-explorer")
    assert problems == []


def pixels(element) -> np.ndarray:
    """What an element looks like on the screen."""
    screenshot = Image.open(BytesIO(element.screenshot())).convert("RGB")
    return np.asarray(screenshot).astype(int)


def wait_until_drawn(page) -> None:
    page.wait_for_timeout(900)


def press(page, *keys) -> None:
    for key in keys:
        page.keyboard.press(key)
    wait_until_drawn(page)


@pytest.mark.parametrize("task", ["caption", "category"])
def test_all_of_it_is_on_one_screen(page, explorer, task):
    lab.choose_option(page, "task", task)
    wait_until_drawn(page)
    panel = page.locator(".jp-WindowedPanel-outer").first.bounding_box()
    assert panel["height"] < 700
    assert explorer.bounding_box()["height"] <= panel["height"] - 10
    assert explorer.evaluate(TOO_WIDE) == []
    photo = page.locator("img.probekit-photo").bounding_box()
    assert photo["width"] > 500
    assert photo["height"] > 350


def test_keys_change_the_layer_the_example_and_what_is_drawn(page, explorer):
    lab.choose_option(page, "task", "category")
    wait_until_drawn(page)
    photo = page.locator("img.probekit-photo")
    curve = page.locator(".probekit-curve")
    details = page.locator(".probekit-details")
    photo.click()

    before = pixels(photo), curve.inner_html(), details.inner_text()
    assert lab.read_slider(page, "layer") == 8
    press(page, "ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp")
    assert lab.read_slider(page, "layer") == 6
    assert np.abs(pixels(photo) - before[0]).mean() > 1  # the heat of another layer
    assert curve.inner_html() != before[1]
    assert details.inner_text() != before[2]

    example = lab.read_slider(page, "example")
    before = pixels(photo)
    press(page, "ArrowRight", "ArrowRight", "ArrowLeft")
    assert lab.read_slider(page, "example") == example + 1
    assert np.abs(pixels(photo) - before).mean() > 5

    for key in "hbt":
        before = pixels(photo)
        press(page, key)
        assert np.abs(pixels(photo) - before).max() > 30
        press(page, key)
        assert np.abs(pixels(photo) - before).max() < 30

    before = pixels(photo)
    lab.choose_option(page, "by", LENS_HEAT)
    wait_until_drawn(page)
    assert np.abs(pixels(photo) - before).mean() > 0.5
    press(page, "ArrowLeft")  # keys work on after a choice
    assert lab.read_slider(page, "example") == example


def test_keys_and_the_notebook_stay_apart(page, explorer):
    cells = page.evaluate(COUNT_CELLS)
    page.locator("img.probekit-photo").click()
    press(page, "a", "b", "b", "d", "d", "x", "ArrowUp")
    assert page.evaluate(COUNT_CELLS) == cells
    search = lab.find_widget(page, "text", "search").locator("input")
    layer = lab.read_slider(page, "layer")
    search.click()
    press(page, "h", "b", "t", "ArrowDown")
    assert search.input_value() == "hbt"
    assert lab.read_slider(page, "layer") == layer
    search.fill("")
    press(page, "Escape")  # back to the explorer
    layer = lab.read_slider(page, "layer")
    press(page, "ArrowDown")
    assert lab.read_slider(page, "layer") == layer - 1
    press(page, "Escape")  # back to the notebook, where “b” inserts a cell, and “z” takes it back
    press(page, "b")
    assert page.evaluate(COUNT_CELLS) == cells + 1
    press(page, "z")
    assert page.evaluate(COUNT_CELLS) == cells


def test_a_key_changes_the_picture_soon(page, explorer):
    lab.show_explorer(page)
    lab.choose_option(page, "task", "category")
    wait_until_drawn(page)
    moves = lab.measure_key_presses(page, explorer, "ArrowDown", times=2)
    moves += lab.measure_key_presses(page, explorer, "ArrowRight", times=2)
    assert len(moves) == 4
    for move in moves:
        assert {"photo", "curve"} <= set(move)
        assert max(move.values()) < SLOWEST_MOVE


def test_erasing_and_searching(page, explorer):
    lab.choose_option(page, "task", "caption")
    lab.choose_option(page, "erase here", "from last token")
    page.get_by_text("then it says").first.wait_for(timeout=30_000)
    search = lab.find_widget(page, "text", "search").locator("input")
    search.fill("nothing is like this")
    search.press("Enter")
    page.get_by_text("no example matches").first.wait_for(timeout=5000)
