"""Figures as files: a page that needs no network and no kernel, and pictures for papers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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

    Returns
    -------
    Path
        The file ``index.html``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    sections = []
    for name, group in groupby(figures.items(), key=_section_of):
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
        light_theme=_theme_values(LIGHT),
        dark_theme=_theme_values(DARK),
    )
    return write_atomic(folder / "index.html", lambda part: part.write_text(page, encoding="utf-8"))


def _section_of(item: tuple[str, Figure]) -> str:
    _, figure = item
    return figure.section


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
        One line that says what was written, or what is missing.
    """
    stills = [_without_controls(figure.figure) for figure in figures.values()] * len(formats)
    files = [folder / f"{name}.{suffix}" for suffix in formats for name in figures]
    try:
        plotly.io.write_images(
            stills,
            files,
            scale=scale,
            width=[still.layout.meta["width"] for still in stills],
            height=[still.layout.height for still in stills],
        )
    except (ValueError, RuntimeError) as error:  # a missing kaleido, and a missing Chrome
        reason = str(error).strip().splitlines()[0]
        return (
            f"no pictures ({reason}): they need kaleido (pip install kaleido, or "
            "pip install -e '.[export]' in the checkout) and a Chrome"
        )
    if "png" in formats:
        for name in figures:
            _reduce_colours(folder / f"{name}.png")
    format_words = " and ".join(suffix.upper() for suffix in formats)
    return f"{len(figures)} pictures in {folder}, as {format_words}"


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
