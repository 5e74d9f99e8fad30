"""Figures as files: a page that needs no network and no kernel, and pictures for papers."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
import plotly.io
from PIL import Image
from plotly.offline import get_plotlyjs

from probekit.paths import write_atomic
from probekit.report.figures import Figure
from probekit.report.style import DARK, LIGHT
from probekit.report.templates import render

PLOTLY_CONFIG = {"displaylogo": False, "responsive": True}
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
    name: str
    html: str
    caption: str


class _Section(NamedTuple):
    name: str
    figures: list[_PageFigure]

    @property
    def short_name(self) -> str:
        return self.name.partition(":")[0]

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.short_name.lower()).strip("-")


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
) -> Path:
    """Write ``index.html``, which shows all figures in light or dark, and a page for each figure.

    The pages need no network and no kernel.

    Parameters
    ----------
    figures : mapping of str to Figure
        By name; those of one section are neighbours.
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

    Returns
    -------
    Path
        The file ``index.html``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    sections = []
    for name, group in groupby(figures.items(), key=lambda item: item[1].section):
        section_figures = [_write_figure(key, figure, folder) for key, figure in group]
        sections.append(_Section(name, section_figures))
    page = render(
        "page.html.jinja",
        title=title,
        lead=lead,
        summary=[_Paragraph.of(text) for text in summary],
        sections=sections,
        settings=settings,
        files=files,
        reading=reading,
        light_theme=_theme_values(LIGHT),
        dark_theme=_theme_values(DARK),
    )
    return write_atomic(folder / "index.html", lambda part: part.write_text(page, encoding="utf-8"))


def _write_figure(name: str, figure: Figure, folder: Path) -> _PageFigure:
    file = folder / f"{name}.html"
    figure.figure.write_html(file, include_plotlyjs="directory", config=PLOTLY_CONFIG)
    html = figure.figure.to_html(full_html=False, include_plotlyjs=False, config=PLOTLY_CONFIG)
    return _PageFigure(name, html, figure.caption)


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
