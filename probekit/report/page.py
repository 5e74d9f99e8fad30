"""Figures as files: a page that needs no network and no kernel, and pictures for papers."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go
import plotly.io
from PIL import Image
from plotly.offline import get_plotlyjs

from probekit.paths import write_atomic
from probekit.report.figures import ALL_TASKS, SINGLE_EXAMPLES, Figure
from probekit.report.overview import control_notes, overview_columns
from probekit.report.style import DARK, LIGHT
from probekit.report.templates import render

ROW_HEADS = ("run", "task", "model", "pooling")  # columns that name a row of the overview
PAGE_PARTS = ("page.css", "page.js")  # files that lie beside every page
LONGEST_PICTURE = 60.0  # seconds without a further picture, after which Chrome is given up
LONGEST_ENDING = 10.0  # seconds to wait for what is left of it
PICTURES_NEED = (
    "they need a Chrome that starts, kaleido and psutil (pip install kaleido psutil, or "
    "pip install -e '.[export]' in the checkout)"
)


class _Paragraph(NamedTuple):
    """A paragraph of the summary; the page shows its first sentence and unfolds the rest."""

    subject: str
    first_sentence: str
    rest: str

    @classmethod
    def of(cls, text: str) -> _Paragraph:
        first, stop, rest = text.partition(". ")
        subject, _, first_sentence = first.partition(":")
        if not first_sentence:
            subject, first_sentence = "", first
        return cls(subject, first_sentence + stop, rest)


class _PageFigure(NamedTuple):
    """What the page says of a figure before it is drawn."""

    name: str
    title: str
    caption: str
    height: int
    model: str  # of single examples, else empty


class _Tab(NamedTuple):
    """Figures of one kind, behind a tab."""

    anchor: str
    name: str
    figures: list[_PageFigure]


class _Group(NamedTuple):
    """Figures of one task, or of all of them, by kind."""

    anchor: str
    name: str
    question: str
    tabs: list[_Tab]


class _Cell(NamedTuple):
    """A cell of the overview: what stands there, what rows are sorted by, and where it leads."""

    text: str
    interval: str
    key: float | str | None
    note: str
    link: str
    is_head: bool  # names the row


def write_page(
    figures: Mapping[str, Figure],
    folder: Path,
    *,
    title: str,
    lead: str,
    summary: Sequence[str],
    settings: Mapping[str, object] | None = None,
    files: Mapping[str, str] | None = None,
    reading: Sequence[Mapping[str, object]] | None = None,
    overview: pd.DataFrame | None = None,
    first_figure: str | None = None,
    questions: Mapping[str, str] | None = None,
) -> Path:
    """Write ``index.html``, which loads figures once they are looked at, and a page for each one.

    The pages need no network and no kernel. A figure is a file ``<name>.js`` that a page loads when
    the figure is to be seen.

    Parameters
    ----------
    figures : mapping of str to Figure
        By name; the page has a tab for each group, and in it one for each section.
    folder : Path
        Made where it does not exist.
    title : str
        Title of the page.
    lead : str
        The question that the page answers, in a sentence or two.
    summary : sequence of str
        Paragraphs, such as :func:`probekit.report.sentences.summarise` makes.
    settings : mapping, optional
        What the run was made with, by name.
    files : mapping of str to str, optional
        What each table in the folder holds, by file name.
    reading : sequence of mapping, optional
        Rows of a table, all with the same names: what was read of the dataset, and what was not.
    overview : DataFrame, optional
        Of :func:`probekit.report.overview.overview_table`: the page opens with it, and the summary
        folds out below.
    first_figure : str, optional
        Name of the figure that stands above the tabs; the first one unless it is named.
    questions : mapping of str to str, optional
        What a task asks, by its name, which is a group of figures.

    Returns
    -------
    Path
        The file ``index.html``.

    Raises
    ------
    ValueError
        There is no figure called `first_figure`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if first_figure is None:
        first_figure = next(iter(figures), None)
    elif first_figure not in figures:
        raise ValueError(
            f"no figure {first_figure!r} to begin the page with: take one of {', '.join(figures)}"
        )
    (folder / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    themes = {"light": _theme_values(LIGHT), "dark": _theme_values(DARK)}
    (folder / "themes.js").write_text(f"const THEMES = {json.dumps(themes)};\n", encoding="utf-8")
    for file in PAGE_PARTS:
        (folder / file).write_bytes((Path(__file__).parent / file).read_bytes())
    page_figures = {name: _write_figure(name, figure, folder) for name, figure in figures.items()}
    page = render(
        "page.html.jinja",
        title=title,
        lead=lead,
        summary=[_Paragraph.of(text) for text in summary],
        first=None if first_figure is None else page_figures[first_figure],
        groups=_sort_into_tabs(figures, page_figures, first=first_figure, questions=questions),
        settings=settings,
        files=files,
        reading=reading,
        headings=[] if overview is None else _headings(overview),
        rows=[] if overview is None else _cells(overview, figures),
        notes=[] if overview is None else control_notes(overview),
    )
    return write_atomic(folder / "index.html", lambda part: part.write_text(page, encoding="utf-8"))


def _write_figure(name: str, figure: Figure, folder: Path) -> _PageFigure:
    """Write what plotly needs for a figure, and a page that shows it alone."""
    content = json.loads(plotly.io.to_json(figure.figure))
    content["layout"].pop("template", None)  # the page's theme takes its place
    script = f"showFigure({json.dumps(name)}, {json.dumps(content, separators=(',', ':'))});\n"
    write_atomic(folder / f"{name}.js", lambda part: part.write_text(script, encoding="utf-8"))
    layout = content["layout"]
    page_figure = _PageFigure(
        name,
        _title_words(layout) or name,
        figure.caption,
        layout.get("height", 450),
        layout.get("meta", {}).get("model", ""),
    )
    page = render("figure.html.jinja", figure=page_figure)
    write_atomic(folder / f"{name}.html", lambda part: part.write_text(page, encoding="utf-8"))
    return page_figure


def _title_words(layout: Mapping) -> str:
    """Return the title of a figure and its subtitle, which names the task, in one line."""
    title = layout.get("title", {})
    lines = [title.get("text"), title.get("subtitle", {}).get("text")]
    return " – ".join(line.replace("<br>", " ") for line in lines if line)


def _sort_into_tabs(
    figures: Mapping[str, Figure],
    page_figures: Mapping[str, _PageFigure],
    *,
    first: str | None,
    questions: Mapping[str, str] | None,
) -> list[_Group]:
    """Return the groups of figures and the kinds within them, without the figure above the tabs."""
    names: dict[str, dict[str, list[_PageFigure]]] = {}
    for name, figure in figures.items():
        if name != first:
            sections = names.setdefault(figure.group or ALL_TASKS, {})
            sections.setdefault(figure.section, []).append(page_figures[name])
    last = {ALL_TASKS: 1, SINGLE_EXAMPLES: 2}
    groups = []
    taken: set[str] = set()
    for group_name in sorted(names, key=lambda name: last.get(name, 0)):
        anchor = _anchor(group_name, taken)
        tabs = [
            _Tab(_anchor(f"{anchor}-{section}", taken), section, of_section)
            for section, of_section in names[group_name].items()
        ]
        question = (questions or {}).get(group_name, "")
        groups.append(_Group(anchor, group_name, question, tabs))
    return groups


def _anchor(words: str, taken: set[str]) -> str:
    """Return what an id on the page can be made of, with a number where it is taken already."""
    stem = re.sub(r"\W+", "-", words.lower()).strip("-") or "tab"
    anchor = stem
    number = 1
    while anchor in taken:
        number += 1
        anchor = f"{stem}-{number}"
    taken.add(anchor)
    return anchor


def _headings(overview: pd.DataFrame) -> list[str]:
    return [column.heading for column in overview_columns(overview)]


def _cells(overview: pd.DataFrame, figures: Mapping[str, Figure]) -> list[list[_Cell]]:
    """Return the cells of the overview by row; a task leads to the curve of its scores."""
    columns = []
    for column in overview_columns(overview):
        cells = []
        for place, (text, key, note) in enumerate(
            zip(column.texts, column.keys, column.notes, strict=True)
        ):
            value, bracket, interval = text.partition(" [")
            curve = f"{overview.task.iloc[place]}_{overview.metric.iloc[place]}"
            link = curve if column.heading == "task" and curve in figures else ""
            is_head = column.heading in ROW_HEADS
            cells.append(_Cell(value, bracket.strip() + interval, key, note, link, is_head))
        columns.append(cells)
    return [list(row) for row in zip(*columns, strict=True)]


def _theme_values(template: str) -> dict:
    return json.loads(plotly.io.to_json(plotly.io.templates[template]))


def write_images(
    figures: Mapping[str, Figure],
    folder: Path,
    *,
    formats: Sequence[str] = ("png", "svg"),
    scale: float = 2,
) -> str:
    """Save every figure as pictures, where there is a Chrome that draws them.

    Pictures are as wide as half a page (640 pixels, so that text of 14 pixels has 5 points in a
    column of 85 mm) or, where a figure has several panels, as a whole page (1,000 pixels).

    Parameters
    ----------
    figures : mapping of str to Figure
        By name, which becomes the name of the file.
    folder : Path
        An existing folder.
    formats : sequence of str
        Formats that kaleido writes.
    scale : float
        Pixels of a PNG per pixel of the figure.

    Returns
    -------
    str
        One line that says what was written, and names what could not be.
    """
    stills = {name: _without_controls(figure.figure) for name, figure in figures.items()}
    pictures = {folder / f"{name}.{suffix}": stills[name] for suffix in formats for name in figures}
    for file in pictures:
        file.unlink(missing_ok=True)
    reason = draw_pictures(pictures, scale)
    lost = _lost(pictures)
    if 1 < len(lost) < len(pictures):
        # Pictures are drawn in their order: what Chrome ended or froze at is the first that lacks.
        first, *others = lost
        reason = draw_pictures({file: pictures[file] for file in others}, scale) or reason
        lost = [first, *_lost(others)]
    if len(lost) == len(pictures):
        return f"no pictures ({reason or 'Chrome drew none'}): {PICTURES_NEED}"
    format_words = " and ".join(suffix.upper() for suffix in formats)
    if not lost:
        return f"{len(figures)} pictures in {folder}, as {format_words}"
    names = ", ".join(file.name for file in lost)
    return (
        f"{len(pictures) - len(lost)} of {len(pictures)} pictures in {folder}, without {names}: "
        f"{reason or 'Chrome could not draw them'}; the page shows all figures"
    )


def draw_pictures(pictures: Mapping[Path, go.Figure], scale: float) -> str:
    """Write pictures as far as Chrome comes, and return why it stopped: "" where it did not.

    Chrome may freeze, and kaleido then waits for good: a thread waits for it instead, and Chrome is
    ended once no further picture appears for :data:`LONGEST_PICTURE` seconds.

    Parameters
    ----------
    pictures : mapping of Path to Figure
        By file; the width in pixels is that of a figure's `meta`, the height its own.
    scale : float
        Pixels of a PNG per pixel of the figure.
    """
    errors: list[Exception] = []

    def write() -> None:
        try:
            plotly.io.write_images(
                list(pictures.values()),
                list(pictures),
                scale=scale,
                width=[still.layout.meta["width"] for still in pictures.values()],
                height=[still.layout.height for still in pictures.values()],
            )
        except Exception as error:  # kaleido's, its browser's, asyncio's, the disk's
            errors.append(error)

    try:
        import psutil
    except ImportError as error:
        return str(error)
    this_process = psutil.Process()
    older_children = set(this_process.children(recursive=True))
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    written = 0
    deadline = time.monotonic() + LONGEST_PICTURE
    try:
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(0.1)
            if _count_written(pictures) > written:
                written = _count_written(pictures)
                deadline = time.monotonic() + LONGEST_PICTURE
        if thread.is_alive():
            return f"Chrome drew nothing for {LONGEST_PICTURE:.0f} s"
    finally:
        if thread.is_alive():
            for child in set(this_process.children(recursive=True)) - older_children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            thread.join(LONGEST_ENDING)
    return _first_line(errors[0]) if errors else ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_written(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _count_written(files: Iterable[Path]) -> int:
    return sum(_is_written(file) for file in files)


def _lost(files: Iterable[Path]) -> list[Path]:
    """Return the files that are missing or broken, and remove what is left of them."""
    lost = []
    for file in files:
        try:
            if not _is_written(file):
                raise FileNotFoundError(file)
            if file.suffix == ".png":
                _reduce_colours(file)
        except OSError:
            lost.append(file)
            file.unlink(missing_ok=True)
    return lost


def _without_controls(figure: go.Figure) -> go.Figure:
    """Return a copy without buttons and slider; its title says where the slider stood."""
    figure = go.Figure(figure)
    if figure.layout.sliders:
        slider = figure.layout.sliders[0]
        step = slider.steps[slider.active or 0]
        figure.layout.title.text += f", {slider.currentvalue.prefix or ''}{step.label}"
        figure.update_layout(margin={"b": 60})
    figure.layout.sliders = ()
    figure.layout.updatemenus = ()
    return figure


def _reduce_colours(file: Path) -> None:
    """Make a PNG of flat colours a quarter as large, with 256 of them."""
    with Image.open(file) as image:
        reduced = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    reduced.save(file, optimize=True)
