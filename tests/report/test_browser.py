"""JupyterLab and the saved page in a real browser, with real key presses."""

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probekit.cli.notebooks import declared_parameters, list_notebooks
from probekit.report.explorer import LENS_HEAT
from tests.conftest import small_parameters
from tests.support import lab

pytest.importorskip("playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not lab.CHROME, reason="no Chrome or Chromium on this machine"),
]


@pytest.fixture(scope="module")
def jupyter(demo: Path):
    parameters = small_parameters() | {"run": "small"}
    declared = {file.stem: declared_parameters(file) for file in list_notebooks()}
    of_notebooks = {
        notebook: {name: value for name, value in parameters.items() if name in names}
        for notebook, names in declared.items()
    }
    lab.prepare_notebooks(demo / "lab", of_notebooks)
    with lab.serve_notebooks(demo / "lab", demo) as url:
        yield url


def pixels(element) -> np.ndarray:
    """What an element looks like on the screen."""
    screenshot = Image.open(BytesIO(element.screenshot())).convert("RGB")
    return np.asarray(screenshot).astype(int)


def wait_until_drawn(page) -> None:
    page.wait_for_timeout(900)


def collect_problems(page) -> list[str]:
    """A list that errors of the page are added to as they occur."""
    problems = []

    def note_message(message) -> None:
        if message.type == "error":
            problems.append(message.text)

    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", note_message)
    return problems


def test_every_notebook_runs_in_jupyterlab(jupyter, demo):
    with lab.open_browser() as page:
        for notebook in sorted((demo / "lab").glob("0*.ipynb")):
            assert lab.run_notebook(page, jupyter, notebook.name) == [], notebook.name


def test_keys_move_the_sliders_and_what_they_show(jupyter):
    with lab.open_browser() as page:
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        assert lab.run_notebook(page, jupyter, "06_inspect_examples.ipynb") == []
        photo = lab.scroll_to(page, "img.widget-image")
        lab.choose_option(page, "task", "category")
        wait_until_drawn(page)
        layer = lab.slider_handle(page, "layer")
        example = lab.slider_handle(page, "example")
        curve = page.locator("svg[viewBox='0 0 560 300']").first
        answers = page.locator(".probekit").first

        photo_before = pixels(photo)
        curve_before = curve.inner_html()
        answers_before = answers.inner_text()
        layer.focus()
        for _ in range(4):
            layer.press("ArrowLeft")
        wait_until_drawn(page)
        assert curve.inner_html() != curve_before
        assert answers.inner_text() != answers_before
        assert np.abs(pixels(photo) - photo_before).mean() > 1  # the heat of another layer

        photo_before = pixels(photo)
        lab.choose_option(page, "heat of", LENS_HEAT)
        wait_until_drawn(page)
        assert np.abs(pixels(photo) - photo_before).mean() > 0.5

        photo_before = pixels(photo)
        curve_before = curve.inner_html()
        example.focus()
        example.press("ArrowRight")
        wait_until_drawn(page)
        assert np.abs(pixels(photo) - photo_before).mean() > 5
        assert curve.inner_html() != curve_before

        moves = lab.measure_key_presses(page, layer, "ArrowRight", times=3)
        assert all({"photo", "curve"} <= set(move) for move in moves), moves

        lab.choose_option(page, "task", "caption")
        lab.choose_option(page, "erase here", "from last token")
        page.get_by_text("then it says").first.wait_for(timeout=30_000)

        search = lab.find_widget(page, "text", "search").locator("input")
        search.fill("nothing is like this")
        search.press("Enter")
        page.get_by_text("no example matches").first.wait_for(timeout=5000)
        assert problems == []


def test_the_saved_page_works_from_disk_without_a_network(demo):
    folder = demo / "figures" / "small"
    with lab.open_browser(offline=True, color_scheme="light") as page:
        problems = collect_problems(page)
        page.goto((folder / "index.html").as_uri())
        figure_count = page.locator("figure").count()
        assert figure_count > 20
        plots = "document.querySelectorAll('.main-svg .cartesianlayer')"
        page.wait_for_function(f"() => {plots}.length >= {figure_count}")

        explorer = page.locator("figure[id^=explorer]").first
        explorer.scroll_into_view_if_needed()
        title = explorer.locator(".gtitle")
        title_before = title.text_content()
        heat = explorer.locator(".hm image").first
        heat_before = image_source(heat)
        explorer.locator(".slider-rail-touch-rect").click(position={"x": 30, "y": 5})
        wait_until_drawn(page)
        assert image_source(heat) != heat_before
        explorer.locator(".updatemenu-header").click()
        explorer.locator(".updatemenu-dropdown-button").nth(1).click()
        wait_until_drawn(page)
        assert title.text_content() != title_before
        legend = explorer.locator(".legendtext").all_text_contents()
        assert not any("trace" in name for name in legend)

        light = background_colour(page)
        page.locator("#theme").click()
        wait_until_drawn(page)
        dark = background_colour(page)
        assert light != dark
        assert re.findall(r"\d+", dark)[:3] == ["21", "23", "28"]
        page.locator("#theme").click()
        wait_until_drawn(page)
        assert background_colour(page) == light

        links = page.locator("table a")
        for name in links.evaluate_all("links => links.map(link => link.getAttribute('href'))"):
            assert (folder / name).exists()
        assert problems == []


def image_source(image) -> str | None:
    """The data of an image in an SVG picture."""
    return image.get_attribute("href") or image.get_attribute("xlink:href")


def background_colour(page) -> str:
    """The background of the first figure, as the browser paints it."""
    plot = page.locator("figure .main-svg").first
    return plot.evaluate("svg => getComputedStyle(svg).backgroundColor")
