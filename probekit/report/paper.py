"""Figures that can be made ready for a paper: as wide as its column, with its letters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probekit.report.style import HALF_PAGE, LEGEND_FONT_SIZE, LIGHT, legend_height

# Widths in millimetres, those of most journals in two columns.
WIDTHS = {"column": 85.0, "page": 178.0}
PAPER_FONT = "Helvetica, Arial, sans-serif"
SMALLEST_FONT = 6.0  # points
FORMATS = ("pdf", "svg", "png")
PIXELS_PER_POINT = 96 / 72
PIXELS_PER_MM = 96 / 25.4
DOTS_PER_INCH = 300  # of a PNG
LINE_SCALE = 0.5
SMALLEST_LINE = 0.6  # pixels
# Plotly's named dashes are as long in thin lines as in thick ones.
PAPER_DASHES = {
    "dash": "4px 2px",
    "dot": "1px 2px",
    "dashdot": "4px 2px 1px 2px",
    "longdash": "7px 2px",
    "longdashdot": "7px 2px 1px 2px",
}
SMALLEST_MARKER = 4.0  # pixels
LOWEST_PANEL = 140.0  # pixels
MOST_IN_A_ROW = 4  # panels side by side


class LayerFigure(go.Figure):
    """A plotly figure that can be made ready for a paper and saved as a file."""

    def for_paper(
        self,
        width: str | float = "column",
        *,
        height: float | None = None,
        font_size: float = 8,
        font: str = PAPER_FONT,
        title: bool = False,
    ) -> LayerFigure:
        """Return a copy for print: its size in millimetres, its letters in points, thin lines.

        It has no buttons, sliders or hidden curves, a white background, and its legend below the
        panels.

        Parameters
        ----------
        width : str or float
            ``"column"`` (85 mm), ``"page"`` (178 mm), or millimetres.
        height : float, optional
            In millimetres; unless it is given, panels keep about their shape.
        font_size : float
            Of titles of axes, in points, at least 7; all other text is one point smaller.
        font : str
            Names of fonts, the first one that there is is taken.
        title : bool
            Keep the title, which otherwise belongs into the caption.

        Returns
        -------
        LayerFigure
            Save it with :meth:`save`.

        Raises
        ------
        ValueError
            The width, the height or the size of letters is none that can be drawn.
        """
        width_px = _millimetres(width) * PIXELS_PER_MM
        if font_size - 1 < SMALLEST_FONT:
            raise ValueError(
                f"font_size {font_size} leaves text below {SMALLEST_FONT:g} points: take at least "
                f"{SMALLEST_FONT + 1:g}"
            )
        large = font_size * PIXELS_PER_POINT
        small = (font_size - 1) * PIXELS_PER_POINT

        paper = LayerFigure(self)
        paper.data = [trace for trace in paper.data if trace.visible in (None, True)]
        legend_px = legend_height(paper, width=width_px, font_size=small)
        top = 0.8 * large + 1.4 * small * _lines_of_panel_titles(paper)
        title_lines = 0
        if title and paper.layout.title.text:
            subtitle = paper.layout.title.subtitle.text
            title_lines = 1 + (1 + subtitle.count("<br>") if subtitle else 0)
            top += 1.5 * large * title_lines
        below = 3.6 * large
        if height is None:
            height_px = top + self._plot_height(width_px) + below + legend_px
        else:
            height_px = height * PIXELS_PER_MM
            if height_px < top + below + legend_px + LOWEST_PANEL / 2:
                least = (top + below + legend_px + LOWEST_PANEL / 2) / PIXELS_PER_MM
                raise ValueError(
                    f"height {height:g} mm leaves no room for the curves: take at least "
                    f"{least:.0f} mm"
                )

        paper.update_layout(
            template=LIGHT,
            paper_bgcolor="white",
            plot_bgcolor="white",
            width=width_px,
            height=height_px,
            meta={"width": width_px},
            autosize=False,
            margin={"l": 4, "r": 12, "t": top, "b": below, "pad": 0},
            font={"family": font, "size": small, "color": "black"},
            legend={"font": {"size": small}, "itemwidth": 30, "tracegroupgap": 0},
        )
        paper.layout.updatemenus = ()
        paper.layout.sliders = ()
        if title_lines:
            paper.update_layout(
                title={
                    "font": {"size": large},
                    "pad": {"t": 0.4 * large},
                    "subtitle": {"font": {"size": small}},
                }
            )
        else:
            paper.layout.title = None
        axis = {
            "title": {"font": {"size": large}, "standoff": 0.5 * small},
            "tickfont": {"size": small},
            "ticklen": 3,
            "tickwidth": SMALLEST_LINE,
            "gridwidth": SMALLEST_LINE,
        }
        paper.update_xaxes(**axis)
        paper.update_yaxes(**axis)
        paper.update_annotations(font={"size": small})
        if paper.layout.coloraxis.colorbar.thickness:
            bar = {"tickfont": {"size": small}, "title": {"font": {"size": large}}, "thickness": 8}
            paper.update_layout(coloraxis={"colorbar": bar})
        for trace in paper.data:
            _make_thin(trace)
        for shape in paper.layout.shapes:
            shape.line.width = _scaled(shape.line.width, SMALLEST_LINE)
            shape.line.dash = _short_dash(shape.line.dash)
        return paper

    def _plot_height(self, width_px: float) -> float:
        """Return the height in pixels that the panels have in a figure of another width."""
        drawn_width = (self.layout.meta or {}).get("width", HALF_PAGE)
        margin = self.layout.margin
        legend_px = legend_height(self, width=drawn_width, font_size=LEGEND_FONT_SIZE)
        drawn = (self.layout.height or 430) - (margin.t or 60) - (margin.b or 60) - legend_px
        return max(drawn * width_px / drawn_width, LOWEST_PANEL * _panel_rows(self))

    def save(self, file: str | Path) -> Path:
        """Draw the figure into a file: PDF, SVG or PNG (300 dots per inch), by its name.

        Parameters
        ----------
        file : str or Path
            Replaced where it exists; its folder is made.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        ValueError
            The name ends otherwise.
        RuntimeError
            There is no Chrome that draws it.
        """
        # The page imports this module.
        from probekit.report.page import PICTURES_NEED, draw_pictures

        file = Path(file)
        if file.suffix.lower().removeprefix(".") not in FORMATS:
            endings = ", ".join(f".{ending}" for ending in FORMATS)
            raise ValueError(f"{file.name!r} is no name of a picture: let it end in {endings}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        still = go.Figure(self)
        if not still.layout.width:
            still.update_layout(width=(still.layout.meta or {}).get("width", HALF_PAGE))
        still.update_layout(meta={"width": still.layout.width}, height=still.layout.height or 430)
        still.layout.updatemenus = ()
        still.layout.sliders = ()
        scale = DOTS_PER_INCH / 96 if file.suffix.lower() == ".png" else 1
        reason = draw_pictures({file: still}, scale)
        if not file.exists() or file.stat().st_size == 0:
            raise RuntimeError(
                f"{file} could not be drawn ({reason or 'Chrome drew nothing'}): {PICTURES_NEED}"
            )
        return file


def panels(rows: int = 1, columns: int = 1, **options: Any) -> LayerFigure:
    """Return a figure with panels.

    Parameters
    ----------
    rows, columns : int
        How many.
    **options
        See :func:`plotly.subplots.make_subplots`.
    """
    return make_subplots(rows, columns, figure=LayerFigure(), **options)


def panel_grid(
    names: Sequence[str], *, horizontal_spacing: float = 0.04
) -> tuple[LayerFigure, list[dict[str, int]]]:
    """Return a figure with a panel for each name, at most four in a row, with one scale of y.

    Parameters
    ----------
    names : sequence of str
        Titles of the panels.
    horizontal_spacing : float
        Between two panels, as a share of the figure.

    Returns
    -------
    figure : LayerFigure
    places : list of dict
        The `row` and `col` of each panel, from 1 on.
    """
    count = max(1, len(names))
    rows = -(-count // MOST_IN_A_ROW)
    columns = -(-count // rows)
    figure = panels(
        rows,
        columns,
        # A place without a name has no axes.
        specs=[
            [{} if row * columns + column < count else None for column in range(columns)]
            for row in range(rows)
        ],
        subplot_titles=list(names),
        shared_yaxes="all",
        horizontal_spacing=horizontal_spacing,
        vertical_spacing=0.27 / rows,
    )
    places = [{"row": k // columns + 1, "col": k % columns + 1} for k in range(len(names))]
    return figure, places


def _millimetres(width: str | float) -> float:
    if isinstance(width, str):
        if width not in WIDTHS:
            raise ValueError(
                f"no width {width!r}: take one of {', '.join(WIDTHS)}, or millimetres as a number"
            )
        return WIDTHS[width]
    if not 30 <= width <= 1000:
        raise ValueError(
            f"a width of {width:g} mm: take 30 to 1000 mm, or one of {', '.join(WIDTHS)}"
        )
    return float(width)


def _axes(figure: go.Figure, letter: str) -> list[Any]:
    return [figure.layout[name] for name in figure.layout if name.startswith(f"{letter}axis")]


def _panel_rows(figure: go.Figure) -> int:
    return max(1, len({tuple(axis.domain or ()) for axis in _axes(figure, "y")}))


def _lines_of_panel_titles(figure: go.Figure) -> int:
    """Return how many lines of text stand on the upper edge of the panels."""
    lines = [
        1 + text.text.count("<br>")
        for text in figure.layout.annotations
        if text.yref == "paper" and text.yanchor == "bottom" and text.y > 0.99
    ]
    return max(lines, default=0)


def _scaled(width: float | None, least: float) -> float:
    return max(least, LINE_SCALE * (2 if width is None else width))


def _short_dash(dash: str | None) -> str | None:
    """Return a dash for thin lines; lengths in pixels are halved."""
    if dash is None or "px" not in dash:
        return PAPER_DASHES.get(dash or "", dash)
    lengths = [float(length.removesuffix("px")) for length in dash.split()]
    return " ".join(f"{max(1, LINE_SCALE * length):g}px" for length in lengths)


def _make_thin(trace: Any) -> None:
    """Make lines, markers and error bars as thin as print has them."""
    if trace.type != "scatter":
        return
    if trace.line.width != 0:
        trace.line.width = _scaled(trace.line.width, SMALLEST_LINE)
    trace.line.dash = _short_dash(trace.line.dash)
    size = trace.marker.size
    if size is not None and not isinstance(size, Sequence):
        trace.marker.size = max(SMALLEST_MARKER, 0.55 * size)
    if trace.marker.line.width:
        trace.marker.line.width = _scaled(trace.marker.line.width, SMALLEST_LINE)
    if trace.textfont.size:
        trace.textfont.size = SMALLEST_FONT * PIXELS_PER_POINT
    for bar in (trace.error_x, trace.error_y):
        if bar.thickness:
            bar.thickness = _scaled(bar.thickness, SMALLEST_LINE)
            bar.width = 1.5
