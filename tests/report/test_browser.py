"""JupyterLab and the saved page in a real browser, with real key presses."""

import re

import pytest

from tests.support import lab

pytest.importorskip("playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not lab.CHROME, reason="no Chrome or Chromium on this machine"),
]


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
