"""JupyterLab and the saved page in a real browser, with real key presses."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

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


# ------------------------------------------------------------------------------ the page of a run

SHOWN_FIGURES = "[...document.querySelectorAll('figure')].filter(figure => figure.offsetParent)"
ALL_SHOWN_ARE_DRAWN = f"() => {SHOWN_FIGURES}.every(figure => figure.querySelector('.drawn'))"


@pytest.fixture(scope="module")
def opened_page(demo):
    """The page of the run, from disk without a network, and the addresses that it asks for."""
    with lab.open_browser(offline=True, color_scheme="light") as page:
        problems = collect_problems(page)
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        open_page(page, demo)
        yield page, problems, requests


@pytest.fixture
def run_page(opened_page):
    """The page of the run, light and wide; errors and requests fail the test."""
    page, problems, requests = opened_page
    page.set_viewport_size({"width": 1500, "height": 1250})
    page.emulate_media(color_scheme="light")
    yield page
    assert problems == []
    assert not [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]


def open_page(page, demo: Path, address: str = "") -> None:
    page.goto("about:blank")
    page.goto((demo / "figures" / "small" / "index.html").as_uri() + address)
    page.wait_for_function(ALL_SHOWN_ARE_DRAWN)


def tabs_of(page, label: str):
    """The tabs of the list that has this label and is to be seen."""
    return page.locator(f"[role=tablist][aria-label^='{label}']:visible [role=tab]")


def every_tab(page):
    """Choose each task, and in it each kind of figure; their names, once all is drawn."""
    tasks = tabs_of(page, "What figures")
    for place in range(tasks.count()):
        tasks.nth(place).click()
        kinds = tabs_of(page, "Kinds of figures")
        for kind in range(max(1, kinds.count())):
            if kinds.count():
                kinds.nth(kind).click()
            page.wait_for_function(ALL_SHOWN_ARE_DRAWN)
            yield tasks.nth(place).inner_text(), kind


def visible_figures(page) -> list[str]:
    return page.evaluate(f"() => {SHOWN_FIGURES}.map(figure => figure.dataset.name)")


def test_each_figure_is_loaded_by_its_tab_and_fits_on_a_phone(run_page, demo):
    open_page(run_page, demo)
    run_page.set_viewport_size({"width": 420, "height": 900})
    loaded = "[...document.querySelectorAll('script')].filter(s => s.src.includes('explorer_'))"
    assert run_page.evaluate(f"() => {loaded}.length") == 0
    first = visible_figures(run_page)[0]
    assert first == "caption_known_and_said"
    seen = {first}
    for tab in every_tab(run_page):
        names = visible_figures(run_page)
        assert names[0] == first
        assert not seen & set(names[1:])  # each figure stands behind one tab
        seen |= set(names)
        assert run_page.evaluate("document.documentElement.scrollWidth") <= 420, tab
        widths = f"{SHOWN_FIGURES}.map(figure => figure.querySelector('.main-svg').clientWidth)"
        assert max(run_page.evaluate(f"() => {widths}")) <= 420, tab
    assert len(seen) == run_page.locator("figure").count() > 20
    assert run_page.evaluate(f"() => {loaded}.length") == 2
    titles = run_page.locator("#figure-caption_known_and_said :is(.xtitle, .x2title)")
    lefts = {round(box["x"]) for box in (title.bounding_box() for title in titles.all()) if box}
    assert len(lefts) == 1 < titles.count()  # panels stand one under the other


def test_arrow_keys_move_between_tabs(run_page):
    tasks = tabs_of(run_page, "What figures")
    tasks.first.click()
    run_page.keyboard.press("ArrowRight")
    assert tasks.nth(1).get_attribute("aria-selected") == "true"
    assert tasks.nth(1).evaluate("tab => tab === document.activeElement")
    assert tasks.first.get_attribute("tabindex") == "-1"
    panel = run_page.locator(f"#{tasks.nth(1).get_attribute('aria-controls')}")
    assert panel.is_visible()
    run_page.keyboard.press("Home")
    assert not panel.is_visible()
    run_page.keyboard.press("ArrowLeft")
    assert tasks.last.get_attribute("aria-selected") == "true"
    run_page.wait_for_function(ALL_SHOWN_ARE_DRAWN)


def wait_for_layer(page, layer: str) -> None:
    """Wait until the slider of a model's examples stands at a layer."""
    output = "document.querySelector('#figure-explorer_tiny-fast-vlm output')"
    page.wait_for_function(f"() => {output}?.textContent === '{layer}'")


def test_links_open_a_figure_and_the_state_of_an_example(run_page, demo):
    open_page(run_page, demo, "#figure=category_scores")
    assert "category_scores" in visible_figures(run_page)
    assert run_page.locator("#figure-category_scores .title").evaluate(
        "title => title === document.activeElement"
    )
    open_page(run_page, demo, "#task=caption&model=tiny-fast-vlm&layer=3")
    explorer = run_page.locator("#figure-explorer_tiny-fast-vlm")
    wait_for_layer(run_page, "3")
    chosen = "select => select.selectedOptions[0].textContent"
    assert explorer.locator("select").evaluate(chosen).startswith("caption: ")

    explorer.locator("select").select_option(index=1)
    slider = explorer.locator("input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    run_page.wait_for_function("() => location.hash.endsWith('layer=4')")
    address = run_page.evaluate("location.hash")
    title = explorer.locator(".title").inner_text()
    heat = image_source(explorer.locator(".hm image").first)
    slider.press("ArrowRight")
    run_page.wait_for_function("() => location.hash.endsWith('layer=5')")
    assert image_source(explorer.locator(".hm image").first) != heat

    open_page(run_page, demo, address)
    wait_for_layer(run_page, "4")
    explorer = run_page.locator("#figure-explorer_tiny-fast-vlm")
    assert explorer.locator(".title").inner_text() == title
    assert image_source(explorer.locator(".hm image").first) == heat
    legend = explorer.locator(".legendtext").all_text_contents()
    assert not any("trace" in name for name in legend)

    task = run_page.locator(".overview a[href='#figure=caption_accuracy']").first
    for _ in range(2):  # the second click finds the address as it is
        run_page.locator(".skip").focus()
        task.click()
        run_page.wait_for_function(
            "() => document.activeElement.closest('#figure-caption_accuracy')"
        )

    open_page(run_page, demo, "#figure=nothing")
    assert "no such figure" in run_page.locator("#status").inner_text()


def test_curves_of_controls_are_shown_and_hidden_beside_the_choice_of_an_axis(run_page, demo):
    height = "document.querySelector('#figure-caption_accuracy .plot')._fullLayout._size.h"
    open_page(run_page, demo, "#figure=caption_accuracy&view=depth&controls=1")
    run_page.wait_for_function("() => document.activeElement.closest('#figure-caption_accuracy')")
    figure = run_page.locator("#figure-caption_accuracy")
    pressed = figure.locator(".controls [aria-pressed=true]")
    entries = figure.locator(".legendtext")
    assert pressed.all_inner_texts() == ["depth", "controls"]
    with_controls = entries.count()
    height_before = run_page.evaluate(height)
    figure.get_by_role("button", name="controls").click()
    run_page.wait_for_function("() => location.hash.endsWith('caption_accuracy&view=depth')")
    assert pressed.all_inner_texts() == ["depth"]
    assert entries.count() < with_controls
    assert run_page.evaluate(height) == pytest.approx(height_before, abs=2)
    figure.get_by_role("button", name="controls").click()
    run_page.wait_for_function("() => location.hash.endsWith('view=depth&controls=1')")
    assert entries.count() == with_controls
    assert run_page.evaluate(height) == pytest.approx(height_before, abs=2)


def test_a_figure_whose_file_is_missing_says_so_and_can_be_tried_again(opened_page, demo):
    page, problems, _ = opened_page
    file = demo / "figures" / "small" / "caption_codelength.js"
    moved = file.rename(file.with_suffix(".moved"))
    try:
        page.goto(file.with_suffix(".html").as_uri())
        for _ in range(2):
            page.evaluate("say('')")
            page.locator("[data-action=csv]").click()
            page.wait_for_function("() => document.querySelector('#status').textContent")
            assert "caption_codelength.js is missing" in page.locator("#status").inner_text()
    finally:
        moved.rename(file)
    assert len(save(page, page.locator("[data-action=csv]"))) > 8
    assert all("ERR_FILE_NOT_FOUND" in problem for problem in problems)
    problems.clear()
    open_page(page, demo)  # as the tests after it expect


def test_a_table_and_a_file_have_the_numbers_of_a_figure(run_page, demo):
    metrics = pd.read_csv(demo / "figures" / "small" / "metrics.csv", keep_default_na=False)
    is_curve = (
        (metrics.task == "caption") & (metrics.metric == "accuracy") & (metrics.stage == "lm")
    )
    is_curve &= (metrics.split == "test") & (metrics["class"] == "") & (metrics.probe == "logreg")
    is_curve &= (metrics.control == "none") & (metrics.pooling == "mean")
    curve = metrics[is_curve & (metrics.model == "tiny-qwen2-vl")]

    open_page(run_page, demo, "#figure=caption_accuracy")
    figure = run_page.locator("#figure-caption_accuracy")
    rows = save(run_page, figure.get_by_text("CSV", exact=True))
    layer = "decoder layer (0 = input embeddings)"
    assert {"series", layer, "accuracy (test)", "lo", "hi", "n"} <= set(rows)
    of_model = rows[rows.series == "tiny-qwen2-vl"]
    assert list(of_model[layer]) == list(range(9))
    for shown, column in (("accuracy (test)", "value"), ("lo", "lo"), ("hi", "hi"), ("n", "n")):
        np.testing.assert_allclose(of_model[shown], curve[column].astype(float), atol=2e-5)

    of_curves = rows[~rows.series.str.contains("chance|guess")]
    assert of_curves[["lo", "hi", "n"]].notna().all(axis=None)
    assert "tiny-qwen2-vl untrained" in set(rows.series)  # though its curve is hidden

    figure.locator("summary").click()
    table = figure.locator(".numbers table")
    assert table.locator("thead th").all_inner_texts() == list(rows)
    assert table.locator("tbody tr").count() == len(rows)
    first_cells = table.locator("tbody tr").first.locator("td").all_inner_texts()
    assert [cell for cell in first_cells if cell] == [
        str(value) if isinstance(value, str) else f"{value:.6g}"
        for value in rows.iloc[0]
        if not pd.isna(value)
    ]

    open_page(run_page, demo, "#figure=caption_transfer")
    cells = save(run_page, run_page.locator("#figure-caption_transfer [data-action=csv]"))
    transfer = pd.read_csv(demo / "figures" / "small" / "transfer.csv")
    assert len(cells) == 2 * 9 * 9  # a row for each cell of both models
    assert cells.iloc[:, -1].between(0, 1).all()
    is_drawn = (transfer.probe_task == "caption") & (transfer.task == "caption")
    is_drawn &= transfer.pooling == "mean"
    highest = transfer.value[is_drawn & (transfer.control == "none")].max()
    assert cells.iloc[:, -1].max() == pytest.approx(highest, abs=1e-4)

    for name in ("caption_stages", "caption_slices"):  # x is only where a point is drawn
        open_page(run_page, demo, f"#figure={name}")
        rows = save(run_page, run_page.locator(f"#figure-{name} [data-action=csv]"))
        assert "at" in rows
        assert not {"x", ""} & set(rows)
    rows = save(run_page, run_page.locator("#figure-caption_known_and_said [data-action=csv]"))
    assert "known, not said" not in set(rows.series)  # a difference
    assert run_page.evaluate("plain('a < b<br><b>c</b> > <image>')") == "a < b c > <image>"


def save(page, button) -> pd.DataFrame:
    """Press a button that saves a CSV file, and read the file."""
    with page.expect_download() as download:
        button.click()
    return pd.read_csv(download.value.path())


def test_a_figure_can_be_saved_as_a_picture_for_a_paper(run_page):
    figure = run_page.locator("#figure-caption_known_and_said")
    with run_page.expect_download() as download:
        figure.get_by_text("PNG", exact=True).click()
    assert download.value.suggested_filename == "caption_known_and_said.png"
    assert Image.open(download.value.path()).width == 2000
    with run_page.expect_download() as download:
        figure.get_by_text("SVG", exact=True).click()
    svg = Path(download.value.path()).read_text(encoding="utf-8")
    assert "Known and said" in svg  # the title, which the page shows as text


def test_column_heads_sort_the_overview(run_page):
    def column() -> list[float]:
        cells = run_page.locator(".overview tbody tr td:nth-child(6)").all_inner_texts()
        return [float(cell.split()[0]) for cell in cells]

    head = run_page.locator(".overview th", has_text="score")
    before = column()
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column() == sorted(before)
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column() == sorted(before, reverse=True)
    says = run_page.locator(".overview th", has_text="the model says").locator("button")
    for _ in range(2):  # what was not measured comes last in both directions
        says.click()
        cells = run_page.locator(".overview tbody tr td:nth-child(9)").all_inner_texts()
        assert cells.index("–") == sum(cell != "–" for cell in cells)


def test_the_page_can_be_dark_and_its_links_lead_to_files(run_page, demo):
    light = background_colour(run_page)
    run_page.locator("#theme").click()
    wait_until_drawn(run_page)
    dark = background_colour(run_page)
    assert light != dark
    assert re.findall(r"\d+", dark)[:3] == ["21", "23", "28"]
    run_page.locator("#theme").click()
    wait_until_drawn(run_page)
    assert background_colour(run_page) == light
    links = run_page.locator("a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    for name in links:
        assert name.startswith("#") or (demo / "figures" / "small" / name).exists()
    run_page.goto((demo / "figures" / "small" / "caption_accuracy.html").as_uri())
    run_page.wait_for_function(ALL_SHOWN_ARE_DRAWN)


def test_axe_finds_nothing_serious(run_page, demo):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    open_page(run_page, demo)
    run_page.evaluate("document.getElementById('in-words').open = true")
    run_page.evaluate("document.querySelector('figure .numbers').open = true")
    for scheme, tab in (("light", "single-examples"), ("dark", "category_list-used")):
        run_page.emulate_media(color_scheme=scheme)
        run_page.evaluate(f"location.hash = 'tab={tab}'")
        run_page.locator(f"#panel-{tab}").wait_for()
        run_page.wait_for_function(ALL_SHOWN_ARE_DRAWN)
        found = axe.run(run_page, options={"preload": False}).response["violations"]
        serious = [rule["id"] for rule in found if rule["impact"] in ("serious", "critical")]
        assert serious == [], tab


def test_printing_leaves_the_page_as_it_was(run_page):
    picture = run_page.locator("#figure-caption_known_and_said .main-svg").first
    before = picture.bounding_box()
    run_page.evaluate("dispatchEvent(new Event('beforeprint'))")
    wait_until_drawn(run_page)
    assert picture.bounding_box()["width"] < 720  # pixels of a sheet of paper
    run_page.evaluate("dispatchEvent(new Event('afterprint'))")
    wait_until_drawn(run_page)
    after = picture.bounding_box()
    assert (after["width"], after["height"]) == (before["width"], before["height"])


def image_source(image) -> str | None:
    """The data of an image in an SVG picture."""
    return image.get_attribute("href") or image.get_attribute("xlink:href")


def background_colour(page) -> str:
    """The background of the first figure, as the browser paints it."""
    plot = page.locator("figure .main-svg").first
    return plot.evaluate("svg => getComputedStyle(svg).backgroundColor")
