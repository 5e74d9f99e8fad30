import json
import re
import shutil
import subprocess
import time
from urllib.parse import unquote

import pytest
from PIL import Image

from probekit.report import page
from probekit.report.curves import layer_curves, loss_curves
from probekit.report.figures import Figure
from probekit.report.overview import overview_table
from probekit.report.page import write_images, write_page
from probekit.report.style import FULL_PAGE, HALF_PAGE
from tests.report.conftest import TASKS

SUMMARY = ["caption, a <model>: of 4 layers one is best. It is <late>.", "one <sentence>"]


@pytest.fixture(scope="module")
def figures(table, losses):
    return {
        "curves": Figure(
            layer_curves(table, "caption", TASKS["caption"], "accuracy"),
            "A & B",
            "caption: Right, or <wrong>?",
        ),
        "losses": Figure(
            loss_curves(losses, table, "caption", metric="accuracy"), "Losses.", "Training"
        ),
    }


@pytest.fixture(scope="module")
def folder(figures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_page(
        figures,
        folder / "new",
        title="A <title>",
        lead="A question, “asked” & answered?",
        summary=SUMMARY,
        settings={"data: folder": "scenes <60>"},
        files={"metrics.csv": "a row per <layer>"},
        reading=[
            {"source": "a.json", "outcome": "read", "count": 60},
            {"source": "a.json", "outcome": "left out", "count": "<3>"},
        ],
    )
    return folder / "new"


@pytest.fixture(scope="module")
def html(folder):
    """The page without scripts."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_text_is_escaped(html):
    assert "<h1>A &lt;title&gt;</h1>" in html
    assert "A question, “asked” &amp; answered?" in html
    assert "A &amp; B" in html
    assert "<td>data: folder</td><td>scenes &lt;60&gt;</td>" in html
    assert '<td><a href="metrics.csv">metrics.csv</a></td><td>a row per &lt;layer&gt;</td>' in html


def test_a_paragraph_shows_its_first_sentence_and_unfolds_the_rest(html):
    first = "<b>caption, a &lt;model&gt;:</b> of 4 layers one is best. "
    rest = "It is &lt;late&gt;."
    assert f"<details><summary>{first}</summary><p>{rest}</p></details>" in html
    assert "<p>one &lt;sentence&gt;</p>" in html


def test_every_link_and_every_tab_leads_somewhere(folder, html):
    anchors = set(re.findall(r'<a [^>]*href="#([^"]+)"', html))
    panels = set(re.findall('aria-controls="([^"]+)"', html))
    labels = set(re.findall('aria-labelledby="([^"]+)"', html))
    assert anchors == {"figures"}
    ids = re.findall(' id="([^"]+)"', html)
    assert anchors | panels | labels <= set(ids)
    assert len(ids) == len(set(ids))
    for name in ("curves", "losses"):
        assert f'<a href="{name}.html">' in html
        alone = (folder / f"{name}.html").read_text(encoding="utf-8")
        title = re.search(r"<h1 class=.title.>(.*?)</h1>", alone)[1]
        assert " – global: does the caption belong?" in title  # the subtitle, which names the task
        assert f'href="index.html#figure={name}"' in alone
        for file in re.findall(r'(?:src|href)="([\w.]+)"', alone):
            assert (folder / file).exists()


def test_a_figure_is_a_file_and_not_in_the_page(folder, figures):
    script = (folder / "curves.js").read_text(encoding="utf-8")
    start = 'showFigure("curves", '
    assert script.startswith(start)
    content = json.loads(script.removeprefix(start).rstrip().removesuffix(");"))
    assert len(content["data"]) == len(figures["curves"].figure.data)
    assert "template" not in content["layout"]  # the page's theme takes its place
    assert (folder / "index.html").stat().st_size < 20_000


def test_figures_stand_behind_tabs_of_their_task_and_kind(figures, tmp_path):
    losses = figures["losses"]
    sorted_figures = {
        "one": losses._replace(section="Training", group="caption"),
        "two": losses._replace(section="Training", group="category"),
        "three": losses._replace(section="Scores", group="caption"),
        "four": losses._replace(section="Training", group="caption"),
        "all": losses._replace(section="Likeness"),
    }
    file = write_page(
        sorted_figures,
        tmp_path,
        title="t",
        lead="l",
        summary=[],
        first_figure="two",
        questions={"caption": "Does it <belong>?"},
    )
    html = file.read_text(encoding="utf-8")
    tabs = re.findall(r'role="tab" id="tab-([^"]+)".*?aria-selected="(\w+)"', html)
    assert tabs == [
        ("caption", "true"),
        ("all-tasks", "false"),
        ("caption-training", "true"),
        ("caption-scores", "false"),
    ]
    order = re.findall('<figure id="figure-([^"]+)"', html)
    assert order == ["two", "one", "four", "three", "all"]
    training = html.partition('id="panel-caption-training"')[2].partition('id="panel-caption-sco')[
        0
    ]
    assert re.findall('data-name="([^"]+)"', training) == ["one", "four"]
    assert "Does it &lt;belong&gt;?" in html


def test_names_with_odd_characters_have_a_tab_and_links_of_their_own(figures, tmp_path):
    curves = figures["curves"]
    names = {"C++ 100%": "C++", "C# a&b": "C#", "c": "c", "?": "?"}
    odd = {name: curves._replace(group=group) for name, group in names.items()}
    file = write_page(odd, tmp_path, title="t", lead="l", summary=[], first_figure="?")
    html = file.read_text(encoding="utf-8")
    ids = re.findall(' id="((?:tab|panel)-[^"]+)"', html)
    assert len(ids) == len(set(ids)) == 9  # a panel within each of three, which has no tab
    for link in ("C%2B%2B%20100%25", "C%23%20a%26b"):
        assert f'href="{link}.html"' in html
        alone = (tmp_path / f"{unquote(link)}.html").read_text(encoding="utf-8")
        assert f'href="index.html#figure={link}"' in alone


def test_a_first_figure_that_is_not_there_is_refused(figures, tmp_path):
    with pytest.raises(ValueError, match="take one of curves, losses"):
        write_page(figures, tmp_path, title="t", lead="l", summary=[], first_figure="none")


def test_the_page_opens_with_the_overview(figures, table, tasks, tmp_path):
    overview = overview_table(table, tasks).assign(model="a <model>")
    curves = {"caption_accuracy": figures["curves"]}
    file = write_page(curves, tmp_path, title="t", lead="l", summary=SUMMARY, overview=overview)
    html = file.read_text(encoding="utf-8")
    opening, _, rest = html.partition("</table>")
    assert html.index("<table") < html.index("In words") < html.index("<figure")
    assert re.findall(r'<button type="button">([\w -]+)</button></th>', opening)[:3] == [
        "task",
        "model",
        "best layer",
    ]
    assert opening.count("<tr>") == 1 + len(overview)
    assert "a &lt;model&gt;" in opening
    (key, *_) = re.findall(
        r'data-key="([\d.]+)">0.80 <span class="interval">\[0.75, 0.85\]<', opening
    )
    assert float(key) == pytest.approx(0.8)
    heads = re.findall('<th scope="row".*?</th>', opening, flags=re.DOTALL)
    assert len(heads) == 2 * len(overview)  # task and model
    assert re.search(r'note">accuracy 0.\d+ \[', opening)  # of a control, to be read by all
    assert opening.count('<a href="#figure=caption_accuracy">') == 2  # a row for each model
    assert "<b>caption, a &lt;model&gt;:</b>" in rest  # the sentences, folded


def test_what_was_read_is_a_table_that_unfolds(html):
    table = html.partition('<details id="reading">')[2].partition("</details>")[0]
    assert re.findall("<th>(.*?)</th>", table) == ["source", "outcome", "count"]
    rows = [["a.json", "read", "60"], ["a.json", "left out", "&lt;3&gt;"]]
    assert re.findall("<td>(.*?)</td>", table) == rows[0] + rows[1]


def test_headings_of_what_a_page_lacks_are_left_out(figures, tmp_path):
    file = write_page(figures, tmp_path, title="t", lead="l", summary=[])
    html = file.read_text(encoding="utf-8")
    assert 'id="settings"' not in html
    assert 'id="tables"' not in html
    assert 'id="reading"' not in html
    assert 'id="in-words"' not in html
    file = write_page({}, tmp_path / "none", title="t", lead="l", summary=["no figures"])
    assert "<figure" not in file.read_text(encoding="utf-8")


def test_pages_need_no_network(folder):
    assert (folder / "plotly.min.js").stat().st_size > 1e6
    for file in folder.glob("*.html"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"""(src|href)=["']https?:""", text)
        assert 'src="plotly.min.js"' in text
        for name in re.findall(r'<(?:script src|link rel="stylesheet" href)="([^"]+)"', text):
            assert (folder / name).exists()


needs_chrome = pytest.mark.skipif(
    not shutil.which("chromium"), reason="no chromium on this machine"
)


@pytest.mark.slow
@needs_chrome
def test_pictures_show_the_figure(figures, tmp_path):
    message = write_images(figures, tmp_path)
    assert message.startswith("2 pictures")
    assert "PNG and SVG" in message
    for name, width in (("curves", HALF_PAGE), ("losses", FULL_PAGE)):
        image = Image.open(tmp_path / f"{name}.png").convert("RGB")
        assert image.size == (2 * width, 2 * figures[name].figure.layout.height)
        colours = image.resize((200, 80)).getcolors(maxcolors=16_000)
        assert len(colours) > 50
        svg = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert "<svg" in svg
        assert "relative depth" not in svg  # buttons are for the page
    assert "decoder layer 03" in (tmp_path / "losses.svg").read_text(encoding="utf-8")
    assert figures["losses"].figure.layout.sliders  # the figure itself is left as it was


def test_without_a_chrome_one_line_says_what_is_missing(figures, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("\nKaleido requires Google Chrome to be installed.\nSee its docs.")

    monkeypatch.setattr("plotly.io.write_images", fail)
    message = write_images(figures, tmp_path)
    assert "requires Google Chrome" in message
    assert "pip install kaleido" in message
    assert "install 'probekit" not in message  # which is another project on the package index
    assert "\n" not in message


def write_stand_ins(lost=(), error=None, waits=()):
    """A writer in place of plotly's, which loses some files, raises, or never comes back."""

    def write(stills, files, **options):
        for file in files:
            if file.name in waits:
                time.sleep(60)
            if file.name in lost:
                file.touch()  # as kaleido claims a name
            elif file.suffix == ".png":
                Image.new("RGB", (8, 8)).save(file)
            else:
                file.write_text("<svg/>", encoding="utf-8")
        if error:
            raise error

    return write


@pytest.mark.parametrize(
    ("lost", "error"),
    [
        (["losses.png"], None),
        (["losses.svg"], None),
        (["curves.png", "losses.svg"], None),
        (["losses.png"], RuntimeError("")),
        (["losses.png"], OSError("the browser is gone")),
    ],
)
def test_a_picture_that_chrome_loses_is_named_and_the_others_are_written(
    figures, tmp_path, monkeypatch, lost, error
):
    monkeypatch.setattr("plotly.io.write_images", write_stand_ins(lost, error))
    for file in lost:
        (tmp_path / file).write_text("of an earlier run", encoding="utf-8")
    message = write_images(figures, tmp_path)
    assert "\n" not in message
    assert f"without {', '.join(lost)}: " in message
    wanted = {f"{name}.{suffix}" for name in figures for suffix in ("png", "svg")}
    assert {file.name for file in tmp_path.iterdir()} == wanted - set(lost)
    if error:
        assert (str(error) or "RuntimeError") in message


def test_a_frozen_chrome_is_given_up_and_the_pictures_after_it_are_drawn(
    figures, tmp_path, monkeypatch
):
    monkeypatch.setattr("plotly.io.write_images", write_stand_ins(waits=["losses.png"]))
    monkeypatch.setattr(page, "LONGEST_PICTURE", 0.5)
    monkeypatch.setattr(page, "LONGEST_ENDING", 0.1)
    message = write_images(figures, tmp_path)
    assert "3 of 4 pictures" in message
    assert "without losses.png: Chrome drew nothing for" in message
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {"curves.png", "curves.svg", "losses.svg"}


def test_no_process_of_a_frozen_chrome_is_left(figures, tmp_path, monkeypatch):
    started = []

    def freeze(stills, files, **options):
        started.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        started[0].wait()

    monkeypatch.setattr("plotly.io.write_images", freeze)
    monkeypatch.setattr(page, "LONGEST_PICTURE", 0.5)
    assert write_images(figures, tmp_path).startswith("no pictures (Chrome drew nothing for")
    assert started[0].wait(10) != 0
