import re
import shutil
from xml.etree import ElementTree

import pytest

from probekit.report import page
from probekit.report.curves import layer_curves
from probekit.report.paper import SMALLEST_FONT, LayerFigure
from tests.report.conftest import TASKS

MM = 96 / 25.4
NEEDS_CHROME = pytest.mark.skipif(
    not shutil.which("chromium"), reason="no chromium on this machine"
)


@pytest.fixture
def figure(table):
    return layer_curves(table, "caption", TASKS["caption"], "accuracy")


@pytest.mark.parametrize(("width", "millimetres"), [("column", 85), ("page", 178), (120, 120)])
def test_a_figure_for_paper_has_its_width_in_millimetres(figure, width, millimetres):
    paper = figure.for_paper(width)
    assert isinstance(paper, LayerFigure)
    assert paper.layout.width == pytest.approx(millimetres * MM)
    assert not paper.layout.updatemenus
    assert paper.layout.title.text is None
    assert paper.layout.paper_bgcolor == "white"
    assert all(trace.visible is not False for trace in paper.data)
    assert figure.layout.updatemenus  # the figure itself stays as it is
    assert figure.layout.title.text


def test_its_height_can_be_set_and_leaves_room_for_the_curves(figure):
    assert figure.for_paper(height=70).layout.height == pytest.approx(70 * MM)
    with pytest.raises(ValueError, match=r"height 10 mm leaves no room.* at least \d+ mm"):
        figure.for_paper(height=10)


def test_its_title_can_be_kept(figure):
    paper = figure.for_paper(title=True)
    assert paper.layout.title.text == figure.layout.title.text
    assert paper.layout.margin.t > figure.for_paper().layout.margin.t


def test_lines_and_markers_are_thinner(figure):
    screen, paper = (
        next(trace for trace in drawn.data if trace.name == "large")
        for drawn in (figure, figure.for_paper())
    )
    assert paper.line.width < screen.line.width
    assert paper.marker.size < screen.marker.size
    assert list(paper.y) == list(screen.y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": "colunm"}, "no width 'colunm': take one of column, page"),
        ({"width": 5}, "a width of 5 mm: take 30 to 1000 mm"),
        ({"font_size": 6}, "font_size 6 leaves text below 6 points: take at least 7"),
    ],
)
def test_what_cannot_be_printed_is_refused(figure, options, message):
    with pytest.raises(ValueError, match=message):
        figure.for_paper(**options)


def test_a_file_of_another_kind_is_refused(figure, tmp_path):
    with pytest.raises(ValueError, match=r"let it end in \.pdf, \.svg, \.png"):
        figure.save(tmp_path / "figure.docx")


def test_without_a_chrome_the_error_names_the_fix(figure, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "draw_pictures", lambda pictures, scale: "no Chrome was found")
    with pytest.raises(RuntimeError, match=r"no Chrome was found.*pip install kaleido"):
        figure.save(tmp_path / "figure.pdf")


@NEEDS_CHROME
def test_saved_files_are_as_wide_as_a_column_and_have_no_small_letters(figure, tmp_path):
    paper = figure.for_paper(width="column")
    pdf = paper.save(tmp_path / "new" / "figure.pdf").read_bytes()
    box = re.search(rb"MediaBox ?\[([\d. ]+)\]", pdf)
    left, bottom, right, top = map(float, box.group(1).split())
    assert right - left == pytest.approx(85 / 25.4 * 72, abs=0.1)
    assert top - bottom == pytest.approx(paper.layout.height * 72 / 96, abs=0.8)

    svg = paper.save(tmp_path / "figure.svg")
    root = ElementTree.parse(svg).getroot()
    assert float(root.get("width")) == pytest.approx(85 * MM, abs=1)
    sizes = [
        float(size)
        for text in root.iter("{http://www.w3.org/2000/svg}text")
        for size in re.findall(r"font-size: ([\d.]+)px", text.get("style", ""))
    ]
    assert len(sizes) > 10
    assert min(sizes) >= SMALLEST_FONT * 96 / 72
