"""The figures of several runs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probekit.report.figures import Figure
from probekit.report.style import (
    DEPTH_AXIS,
    FULL_PAGE,
    GREY,
    HALF_PAGE,
    LAYER_AXIS,
    PALETTE,
    SYMBOLS,
    apply_style,
    band,
    layer_number,
    legend_entry,
    make_room_for_legend,
    metric_words,
    task_words,
    tick_step,
    title_by_layer,
)

if TYPE_CHECKING:
    from probekit.report.run_comparison import RunComparison

RUN_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
ROW_HEIGHT = 34  # pixels of a curve in the figure of peaks
LONGEST_TITLE = 46  # characters of a panel's title

PEAKS_CAPTION = (
    "Left: where each curve peaks. The thin line reaches over all layers that may truly be the "
    "best one (95 % interval). The thick one reaches over the layers at which 95 % of the "
    "resamples of the test images peak: it is narrower, and guarantees nothing. Filled: the layer "
    "with the highest test score. Open: the layer that the run chose on validation images. Right: "
    "how far the peak of the other run lies from that of the first one; to the right is deeper. "
    "Where the interval holds 0, no movement in one direction is shown; the curves may still peak "
    "at different layers, where one has two peaks on either side of the other's, and the summary "
    "says so. A line over nearly all layers belongs to a flat curve: its peak is not a place."
)
CURVES_CAPTION = (
    "Test scores by layer, on the examples that are compared. A colour per model, a dash per run. "
    "Bands are 95 % intervals over test images."
)
DIFFERENCES_CAPTION = (
    "The other run less the first one, layer by layer, with 95 % intervals of the difference. "
    "Where the same examples count in both runs these are paired, so they are narrower than the "
    "bands of the curves suggest. Layers are compared at the same relative depth. Filled: "
    "different from 0 after correction for the number of layers."
)


def comparison_figures(comparison: RunComparison) -> dict[str, Figure]:
    """Draw where the peaks lie, and for each task the curves and their differences.

    Parameters
    ----------
    comparison : RunComparison
        See :func:`probekit.report.run_comparison.compare_runs`.

    Returns
    -------
    dict of str to Figure
        By name, in the order of the page.
    """
    figures = {"peaks": Figure(peaks_figure(comparison), PEAKS_CAPTION, "Peaks")}
    for task in dict.fromkeys(comparison.peaks.task):
        figures[f"{task}_curves"] = Figure(
            run_curves(comparison, task), CURVES_CAPTION, "Scores by layer", task
        )
        figures[f"{task}_differences"] = Figure(
            difference_curves(comparison, task), DIFFERENCES_CAPTION, "Differences by layer", task
        )
    return figures


def peaks_figure(comparison: RunComparison) -> go.Figure:
    """Draw the interval of each curve's peak, and that of how far it moved."""
    table = comparison.peaks
    relative = _is_relative(comparison)
    dashes = _run_dashes(comparison)
    colours = _colours(comparison)
    figure = make_subplots(
        1,
        2,
        column_widths=[0.6, 0.4],
        horizontal_spacing=0.06,
        shared_yaxes=True,
        subplot_titles=["where the curve peaks", "how far it moved"],
    )
    labels = []
    place = 0.0
    base_drawn = set()
    for row in table.itertuples():
        group = (row.task, row.pooling, row.model_a)
        sides = [("b", row.run_b, row.model_b)]
        if group not in base_drawn:
            sides.insert(0, ("a", row.run_a, row.model_a))
            place += 0.5  # a gap between groups
        base_drawn.add(group)
        for side, run, model in sides:
            labels.append((place, f"{row.task}, {row.pooling}, {model}, <b>{run}</b>"))
            colour = colours[row.model_a]
            for trace in _peak_traces(
                row, side, y=place, colour=colour, symbol=_symbol(dashes, run), relative=relative
            ):
                figure.add_trace(trace, row=1, col=1)
            if side == "b":
                for trace in _shift_traces(row, y=place, colour=colour):
                    figure.add_trace(trace, row=1, col=2)
            place += 1
    figure.add_vline(x=0, line={"color": GREY, "width": 1.5, "dash": "dot"}, row=1, col=2)
    for name, line in (
        ("95 % interval", {"color": GREY, "width": 2}),
        ("95 % of the resamples", {"color": GREY, "width": 7}),
    ):
        figure.add_trace(legend_entry(name, line=line))
    for name, symbol in (("highest on test", "circle"), ("best on validation", "circle-open")):
        marker = {"color": GREY, "size": 10, "symbol": symbol}
        figure.add_trace(legend_entry(name, mode="markers", marker=marker))
    height = 190 + int(ROW_HEIGHT * place)
    apply_style(
        figure, title="Where the peaks lie", height=height, width=FULL_PAGE, panel_titles=True
    )
    figure.update_yaxes(
        tickvals=[at for at, _ in labels],
        ticktext=[text for _, text in labels],
        range=[place - 0.3, -0.3],
        col=1,
    )
    figure.update_yaxes(range=[place - 0.3, -0.3], showgrid=False)
    figure.update_yaxes(showticklabels=False, col=2)
    layers = int(max(table.layers_a.max(), table.layers_b.max()))
    if relative:
        figure.update_xaxes(title=DEPTH_AXIS, range=[-0.03, 1.03], col=1)
    else:
        figure.update_xaxes(
            title=LAYER_AXIS, range=[-0.5, layers - 0.5], dtick=tick_step(layers), col=1
        )
    furthest = max(1.0, table.moved_lo.abs().max(), table.moved_hi.abs().max())
    return figure.update_xaxes(
        title="layers of the first run (to the right: deeper)",
        range=[-furthest - 0.7, furthest + 0.7],
        dtick=max(1, round(furthest / 4)),
        tickangle=0,
        col=2,
    )


def run_curves(comparison: RunComparison, task: str) -> go.Figure:
    """Draw the scores of a task by layer: a colour per model, a dash per run."""
    rows = comparison.curves[comparison.curves.task == task]
    metric = rows.metric.iloc[0]
    relative = _is_relative(comparison)
    dashes = _run_dashes(comparison)
    colours = _colours(comparison)
    figure, panels = _panels(rows)
    in_legend = set()
    for column, pooling in enumerate(panels, 1):
        of_panel = rows[rows.pooling == pooling]
        drawn = set()
        for (base_model, _, run, model), curve in of_panel.groupby(
            ["model_a", "run_b", "run", "model"], sort=False
        ):
            # The first run's curve is there once per other run, of the examples that both share.
            if (run, model) in drawn:
                continue
            drawn.add((run, model))
            x = curve.depth if relative else layer_number(curve.layer)
            name = f"{run}: {model}"
            colour = colours[base_model]
            details = np.stack([curve.layer, curve.lo, curve.hi], axis=-1)
            figure.add_trace(
                band(x, curve.lo, curve.hi, colour=colour, opacity=0.12, legendgroup=name),
                row=1,
                col=column,
            )
            figure.add_scatter(
                x=x,
                y=curve.value,
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 2.5, "dash": dashes[run]},
                marker={"size": 7, "symbol": _symbol(dashes, run)},
                legendgroup=name,
                showlegend=name not in in_legend,
                customdata=details,
                hovertemplate=(
                    f"<b>{name}</b>, %{{customdata[0]}}<br>{metric_words(metric)} %{{y:.3f}} "
                    "[%{customdata[1]:.3f}, %{customdata[2]:.3f}]<extra></extra>"
                ),
                row=1,
                col=column,
            )
            in_legend.add(name)
    return _finish(
        figure,
        panels,
        title=title_by_layer(metric),
        axis=f"{metric_words(metric)} (test)",
        relative=relative,
        layers=rows.layer.nunique(),
    )


def difference_curves(comparison: RunComparison, task: str) -> go.Figure:
    """Draw how far the scores of a task differ by layer, a panel per pooling."""
    rows = comparison.differences[comparison.differences.task == task]
    metric = rows.metric.iloc[0]
    relative = _is_relative(comparison)
    dashes = _run_dashes(comparison)
    colours = _colours(comparison)
    figure, panels = _panels(rows)
    in_legend = set()
    for column, pooling in enumerate(panels, 1):
        of_panel = rows[rows.pooling == pooling]
        for (model_a, run_b, _), curve in of_panel.groupby(
            ["model_a", "run_b", "model_b"], sort=False
        ):
            x = curve.depth if relative else layer_number(curve.layer_a)
            run_a = curve.run_a.iloc[0]
            name = f"{run_b} − {run_a}"
            if len(colours) > 1:
                name += f": {model_a}"
            colour = colours[model_a]
            differs = curve.p_holm <= 0.05
            details = np.stack(
                [curve.layer_a, curve.layer_b, curve.lo, curve.hi, curve.p_holm], axis=-1
            )
            figure.add_trace(
                band(x, curve.lo, curve.hi, colour=colour, opacity=0.18, legendgroup=name),
                row=1,
                col=column,
            )
            figure.add_scatter(
                x=x,
                y=curve.difference,
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 2.5, "dash": dashes[run_b]},
                marker={
                    "size": 8,
                    "symbol": _symbol(dashes, run_b),
                    "color": np.where(differs, colour, "white"),
                    "line": {"color": colour, "width": 1.5},
                },
                legendgroup=name,
                showlegend=name not in in_legend,
                customdata=details,
                hovertemplate=(
                    f"<b>{name}</b><br>%{{customdata[1]}} − %{{customdata[0]}}: %{{y:+.3f}} "
                    "[%{customdata[2]:+.3f}, %{customdata[3]:+.3f}]"
                    "<br>corrected p = %{customdata[4]:.3f}<extra></extra>"
                ),
                row=1,
                col=column,
            )
            in_legend.add(name)
        figure.add_hline(y=0, line={"color": GREY, "width": 1.5, "dash": "dot"}, row=1, col=column)
    return _finish(
        figure,
        panels,
        title=f"Difference in {metric_words(metric)} — {task_words(task)}",
        axis=f"difference in {metric_words(metric)}",
        relative=relative,
        layers=rows.layer_a.nunique(),
    )


def _panels(rows: pd.DataFrame) -> tuple[go.Figure, list[str]]:
    poolings = list(dict.fromkeys(rows.pooling))
    titles = [f"{pooling} pooling" for pooling in poolings] if len(poolings) > 1 else None
    figure = make_subplots(
        1, len(poolings), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.05
    )
    return figure, poolings


def _finish(
    figure: go.Figure, panels: list[str], *, title: str, axis: str, relative: bool, layers: int
) -> go.Figure:
    several = len(panels) > 1
    if not several:
        title += f" ({panels[0]} pooling)"
    apply_style(
        figure,
        title=title,
        height=460 if several else 430,
        width=FULL_PAGE if several else HALF_PAGE,
        panel_titles=several,
    )
    if not several:
        make_room_for_legend(figure)
    if relative:
        figure.update_xaxes(title=DEPTH_AXIS)
    else:
        figure.update_xaxes(title=LAYER_AXIS, dtick=tick_step(layers))
    return figure.update_yaxes(title=axis, col=1)


def _peak_traces(
    row, side: str, *, y: float, colour: str, symbol: str, relative: bool
) -> list[go.Scatter]:
    last = max(1, getattr(row, f"layers_{side}") - 1)

    def at(column: str) -> float:
        number = int(getattr(row, column).partition(".")[2])
        return number / last if relative else number

    peak = f"peak_{side}"
    ends = (at(f"{peak}_lo"), at(f"{peak}_hi"))
    resampled = (at(f"{peak}_resampled_lo"), at(f"{peak}_resampled_hi"))
    words = (
        f"highest at {getattr(row, peak)}, best on validation {getattr(row, f'best_{side}')}"
        f"<br>95 % interval {getattr(row, f'{peak}_lo')} to {getattr(row, f'{peak}_hi')}"
        f"<br>plateau {getattr(row, f'plateau_{side}')}"
    )
    return [
        *_interval_traces(ends, resampled, y=y, colour=colour),
        go.Scatter(
            x=[at(f"best_{side}")],
            y=[y],
            mode="markers",
            marker={"color": colour, "size": 16, "symbol": "circle-open", "line": {"width": 2}},
            showlegend=False,
            hoverinfo="skip",
        ),
        _point(at(peak), y=y, colour=colour, words=words),
    ]


def _shift_traces(row, *, y: float, colour: str) -> list[go.Scatter]:
    words = (
        f"moved by {row.moved:+.3g} layers<br>95 % interval {row.moved_lo:+.3g} to "
        f"{row.moved_hi:+.3g}<br>p = {row.moved_p:.3f}"
    )
    return [
        *_interval_traces(
            (row.moved_lo, row.moved_hi),
            (row.moved_resampled_lo, row.moved_resampled_hi),
            y=y,
            colour=colour,
        ),
        _point(row.moved, y=y, colour=colour, words=words),
    ]


def _interval_traces(
    ends: tuple[float, float], resampled: tuple[float, float], *, y: float, colour: str
) -> list[go.Scatter]:
    traces = []
    for xs, width, opacity in ((ends, 2, 1.0), (resampled, 7, 0.45)):
        traces.append(
            go.Scatter(
                x=xs,
                y=[y, y],
                mode="lines",
                line={"color": colour, "width": width},
                opacity=opacity,
                showlegend=False,
                hoverinfo="skip",
            )
        )
    return traces


def _point(x: float, *, y: float, colour: str, words: str) -> go.Scatter:
    return go.Scatter(
        x=[x],
        y=[y],
        mode="markers",
        marker={"color": colour, "size": 9},
        showlegend=False,
        hovertemplate=f"{words}<extra></extra>",
    )


def _is_relative(comparison: RunComparison) -> bool:
    """Whether the models differ in depth, so that layers have no common numbers."""
    table = comparison.peaks
    return len({*table.layers_a, *table.layers_b}) > 1


def _run_dashes(comparison: RunComparison) -> dict[str, str]:
    return {
        run.name: RUN_DASHES[number % len(RUN_DASHES)] for number, run in enumerate(comparison.runs)
    }


def _symbol(dashes: dict[str, str], run: str) -> str:
    return SYMBOLS[list(dashes).index(run) % len(SYMBOLS)]


def _colours(comparison: RunComparison) -> dict[str, str]:
    """Return one colour per model of the first run; what it is compared with has the same."""
    models = dict.fromkeys(comparison.peaks.model_a)
    return {model: PALETTE[number % len(PALETTE)] for number, model in enumerate(models)}
