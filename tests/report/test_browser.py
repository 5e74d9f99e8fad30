"""JupyterLab and the saved page in a real browser, with real key presses."""

import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.conftest import small_parameters
from tests.support import lab

pytest.importorskip("playwright")
pytestmark = pytest.mark.skipif(not lab.CHROME, reason="no Chrome or Chromium on this machine")


@pytest.fixture(scope="module")
def jupyter(demo):
    from probekit.cli import notebooks

    known = {book.stem: notebooks.declared(book) for book in notebooks.notebooks()}
    chosen = small_parameters() | {"run": "small"}
    lab.prepare(demo / "lab", {stem: {k: v for k, v in chosen.items() if k in names} for stem, names in known.items()})
    with lab.served(demo / "lab", demo) as url:
        yield url


def picture(handle) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(handle.screenshot())).convert("RGB")).astype(int)


def settled(page) -> None:
    page.wait_for_timeout(900)


def test_every_notebook_runs_in_jupyterlab(jupyter, demo):
    with lab.browser() as page:
        for path in sorted((demo / "lab").glob("0*.ipynb")):
            assert lab.run_all(page, jupyter, path.name) == [], path.name


def test_keys_move_the_sliders_and_what_they_show(jupyter, tmp_path):
    with lab.browser() as page:
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        assert lab.run_all(page, jupyter, "05_inspect_examples.ipynb") == []
        image = lab.show(page, "img.widget-image")
        page.locator(".widget-dropdown", has=page.locator(".widget-label", has_text="task")).locator(
            "select").select_option("category")
        settled(page)
        layer, example = lab.slider(page, "layer"), lab.slider(page, "example")
        curve = page.locator("svg[viewBox='0 0 560 300']").first
        warm, drawn, told = picture(image), curve.inner_html(), page.locator(".probekit").first.inner_text()
        layer.focus()
        for _ in range(4):
            layer.press("ArrowLeft")
        settled(page)
        assert curve.inner_html() != drawn and page.locator(".probekit").first.inner_text() != told
        assert np.abs(picture(image) - warm).mean() > 1  # the heat of another layer
        before, drawn = picture(image), curve.inner_html()
        example.focus()
        example.press("ArrowRight")
        settled(page)
        assert np.abs(picture(image) - before).mean() > 5 and curve.inner_html() != drawn
        moves = lab.latencies(page, layer, "ArrowRight", 3)
        assert all({"picture", "curve"} <= set(move) for move in moves), moves
        search = page.locator(".widget-text", has=page.locator(".widget-label", has_text="search")).locator("input")
        search.fill("nothing is like this")
        search.press("Enter")
        page.get_by_text("no example is like that").first.wait_for(timeout=5000)  # an exception is shown, not swallowed
        page.screenshot(path=tmp_path / "explorer.png")
        assert problems == []


def test_the_saved_page_works_from_disk_without_a_network(demo):
    with lab.browser(offline=True, color_scheme="light") as page:
        problems = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto((demo / "figures" / "small" / "index.html").as_uri())
        figures = page.locator("figure").count()
        page.wait_for_function(f"() => document.querySelectorAll('.main-svg .cartesianlayer').length >= {figures}")
        assert figures > 20
        explorer = page.locator("figure[id^=explorer]").first
        explorer.scroll_into_view_if_needed()
        title, heat = explorer.locator(".gtitle").text_content(), explorer.locator(".hm image").first
        there = heat.get_attribute("href") or heat.get_attribute("xlink:href")
        explorer.locator(".slider-rail-touch-rect").click(position={"x": 30, "y": 5})
        settled(page)
        assert (heat.get_attribute("href") or heat.get_attribute("xlink:href")) != there
        explorer.locator(".updatemenu-header").click()
        explorer.locator(".updatemenu-dropdown-button").nth(1).click()
        settled(page)
        assert explorer.locator(".gtitle").text_content() != title
        assert not any("trace" in name for name in explorer.locator(".legendtext").all_text_contents())
        paper = page.locator("figure .main-svg").first.evaluate("svg => getComputedStyle(svg).backgroundColor")
        page.locator("#theme").click()
        settled(page)
        dark = page.locator("figure .main-svg").first.evaluate("svg => getComputedStyle(svg).backgroundColor")
        assert paper != dark and re.findall(r"\d+", dark)[:3] == ["21", "23", "28"]
        for name in page.locator("table a").evaluate_all("links => links.map(link => link.getAttribute('href'))"):
            assert (demo / "figures" / "small" / name).exists()
        assert problems == []
