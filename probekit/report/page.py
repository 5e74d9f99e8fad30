"""Figures as files: a page that shows them all without a network or a kernel, and pictures for papers and slides."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from string import Template

import plotly.graph_objects as go
import plotly.io
from PIL import Image
from plotly.offline import get_plotlyjs

from probekit import paths
from probekit.report.figures import Figure
from probekit.report.style import DARK, LIGHT

CONFIG = {"displaylogo": False, "responsive": True}
PAGE = Path(__file__).with_name("page.html")


def write_page(figures: dict[str, Figure], folder: Path, title: str, lead: str, said: Sequence[str],
               settings: Mapping[str, object] | None = None, files: Mapping[str, str] | None = None) -> Path:
    """Write each figure as its own HTML and ``index.html`` that shows them all, light or dark, without a network.

    Parameters
    ----------
    lead : the question in a sentence or two
    said : paragraphs of the summary (:func:`probekit.report.sentences.summarise`)
    settings : what the run was made with, name to value
    files : tables in the folder, name to what they hold
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plotly.min.js").write_text(get_plotlyjs())
    body, contents = [_heading("What came out"), *map(_folded, said)], ["What came out"]
    for section, group in groupby(figures.items(), lambda item: item[1].section):
        body.append(_heading(section))
        contents.append(section)
        body += [_figure(name, drawn, folder) for name, drawn in group]
    if settings:
        rows = "".join(f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
                       for key, value in settings.items())
        body += [_heading("Settings"), f"<table>{rows}</table>"]
        contents.append("Settings")
    if files:
        links = "".join(f'<tr><td><a href="{name}">{name}</a></td><td>{html.escape(text)}</td></tr>'
                        for name, text in files.items())
        body += [_heading("Tables"), f"<table>{links}</table>"]
        contents.append("Tables")
    links = "".join(f'<a href="#{_anchor(name)}">{html.escape(name.partition(":")[0])}</a>' for name in contents)
    templates = json.dumps([json.loads(plotly.io.to_json(plotly.io.templates[name])) for name in (LIGHT, DARK)])
    page = Template(PAGE.read_text()).substitute(
        title=html.escape(title), lead=html.escape(lead), contents=links, body="\n".join(body), templates=templates)
    return paths.write_atomic(folder / "index.html", lambda part: part.write_text(page))


def _anchor(section: str) -> str:
    return re.sub(r"\W+", "-", section.partition(":")[0].lower()).strip("-")


def _heading(section: str) -> str:
    return f'<h2 id="{_anchor(section)}">{html.escape(section)}</h2>'


def _folded(text: str) -> str:
    """A paragraph's first sentence, with what it is about in bold; a click shows the others."""
    first, stop, rest = text.partition(". ")
    about, colon, told = first.partition(":")
    first = f"<b>{html.escape(about)}{colon}</b>{html.escape(told + stop)}" if told else html.escape(first + stop)
    return f"<details><summary>{first}</summary><p>{html.escape(rest)}</p></details>" if rest else f"<p>{first}</p>"


def _figure(name: str, drawn: Figure, folder: Path) -> str:
    drawn.figure.write_html(folder / f"{name}.html", include_plotlyjs="directory", config=CONFIG)
    inner = drawn.figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)
    return (f'<figure id="{name}">{inner}<figcaption>{html.escape(drawn.caption)} '
            f'<a href="{name}.html">open by itself</a></figcaption></figure>')


def _still(figure: go.Figure) -> go.Figure:
    """A figure without what can only be clicked."""
    figure = go.Figure(figure)
    if figure.layout.sliders:
        told = figure.layout.sliders[0]
        step = told.steps[told.active or 0].label
        figure.layout.title.text += f", {told.currentvalue.prefix or ''}{step}"
        figure.update_layout(margin={"b": 60})
    figure.layout.sliders, figure.layout.updatemenus = (), ()
    return figure


def write_images(figures: dict[str, Figure], folder: Path, formats: Sequence[str] = ("png", "svg"), scale: float = 2
                 ) -> str:
    """Save every figure in each format where a Chrome is found; returns one line that says what happened.

    Pictures are as wide as half a page (640 pixels, so that 14 pixels of text are 5 points in a column of 85 mm) or,
    where a figure has several panels, as a whole one (1,000).
    """
    drawn = [_still(one.figure) for one in figures.values()] * len(formats)
    try:
        plotly.io.write_images(
            drawn, [folder / f"{name}.{kind}" for kind in formats for name in figures], scale=scale,
            width=[figure.layout.meta["width"] for figure in drawn],
            height=[figure.layout.height for figure in drawn])
    except (ValueError, RuntimeError) as error:  # what plotly makes of a missing kaleido, and of a missing Chrome
        return f"no pictures ({str(error).strip().splitlines()[0]}): pip install 'probekit[export]' and a Chrome"
    for name in figures if "png" in formats else ():  # flat colours: 256 of them make a quarter of the size
        file = folder / f"{name}.png"
        Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    return f"{len(figures)} pictures in {folder}, as {' and '.join(kind.upper() for kind in formats)}"
