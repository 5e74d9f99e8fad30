"""Figures with a cell or a bar per layer: scores, classes, right and wrong answers, transfer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from probekit.probes.results import default_stage, select_curve
from probekit.report.paper import LayerFigure, panel_grid, panels
from probekit.report.style import (
    FULL_PAGE,
    LAYER_AXIS,
    PANEL_LAYER_AXIS,
    SCORE_COLOURS,
    apply_style,
    first_pooling,
    layer_number,
    metric_words,
    pooling_note,
    task_words,
    tick_step,
)

HATCHED = {
    "shape": "/",
    "fillmode": "overlay",
    "fgcolor": "white",
    "fgopacity": 0.7,
    "solidity": 0.15,
    "size": 7,
}
# Words, colour and pattern of each kind of answer; in grey, wrong ones differ by their pattern.
ANSWERS = {
    "tp": ("yes, rightly", "#0072B2", {}),
    "tn": ("no, rightly", "#56B4E9", {}),
    "fp": ("yes, wrongly", "#D55E00", HATCHED),
    "fn": ("no, wrongly", "#E69F00", HATCHED),
}
MOST_LARGE_ROWS = 24  # of a heat map whose rows have room for a text of full size


def score_heatmap(
    table: pd.DataFrame, task: str, metrics: Sequence[str], *, probe: str = "logreg"
) -> LayerFigure:
    """Draw several metrics (rows) by layer (columns), a panel per model, without controls.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table.
    task : str
        Task to draw.
    metrics : sequence of str
        Metrics from top to bottom.
    probe : str
        The kind of probe.

    Returns
    -------
    Figure
        A panel per model, one below the other.
    """
    trained = table[(table.control == "none") & (table.task == task)]
    curves = [select_curve(trained, probe=probe, metric=metric) for metric in metrics]
    rows = pd.concat(curves)
    models = list(dict.fromkeys(rows.model))
    pooling = rows.pooling.iloc[0]
    figure = panels(len(models), 1, subplot_titles=models, vertical_spacing=0.34 / len(models))
    from_bottom = list(metrics)[::-1]
    for panel, model in enumerate(models, 1):
        part = rows[(rows.model == model) & (rows.pooling == pooling)]
        grid = part.pivot_table(index="metric", columns="layer", values="value").loc[from_bottom]
        numbers_fit = grid.shape[1] <= 14
        hover = f"<b>{model}</b>, layer %{{x}}<br>%{{y}} %{{z:.3f}}<extra></extra>"
        figure.add_heatmap(
            z=grid.to_numpy(),
            x=layer_number(grid.columns.to_series()),
            y=[metric_words(metric) for metric in from_bottom],
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
            texttemplate="%{z:.2f}" if numbers_fit else None,
            hovertemplate=hover,
            row=panel,
            col=1,
        )
    apply_style(
        figure,
        title="Precision, recall and F1 by layer",
        subtitle=task_words(task) + pooling_note(rows, pooling),
        height=150 + 170 * len(models),
        width=FULL_PAGE,
        panel_titles=True,
    )
    figure.update_xaxes(dtick=tick_step(rows.layer.nunique()), showgrid=False)
    figure.update_xaxes(title=LAYER_AXIS, row=len(models), col=1)
    _share_colours(figure, low=min(0.5, rows.value.min()), high=1, title="score")
    return figure.update_yaxes(title=None)


def similarity_heatmap(similarity: pd.DataFrame) -> LayerFigure:
    """Draw how layers resemble each other: a panel per model, and per pair of models.

    Parameters
    ----------
    similarity : DataFrame
        :attr:`probekit.probes.results.ProbeResults.similarity`.

    Returns
    -------
    Figure
        Panels side by side, three in a row.
    """
    pairs = list(similarity.groupby(["model", "other_model"], sort=False))
    columns = min(3, len(pairs))
    panel_rows = -(-len(pairs) // columns)
    figure = panels(
        panel_rows,
        columns,
        subplot_titles=[
            model if model == other else f"{model}<br>and {other}" for (model, other), _ in pairs
        ],
        horizontal_spacing=0.1,
        vertical_spacing=0.2 / panel_rows,
    )
    for place, ((model, other), of_pair) in enumerate(pairs):
        panel = {"row": place // columns + 1, "col": place % columns + 1}
        grids = {
            name: of_pair.pivot_table(index="layer", columns="other_layer", values=name)
            for name in ("cka", "lo", "hi")
        }
        hover = (
            f"layer %{{y}} of {model}<br>layer %{{x}} of {other}<br>CKA %{{z:.3f}} "
            "[%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>"
        )
        figure.add_heatmap(
            z=grids["cka"].to_numpy(),
            x=layer_number(grids["cka"].columns.to_series()),
            y=layer_number(grids["cka"].index.to_series()),
            customdata=np.stack([grids["lo"], grids["hi"]], axis=-1),
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertemplate=hover,
            **panel,
        )
        step = max(2, tick_step(len(grids["cka"])))
        is_same = model == other
        figure.update_xaxes(
            title="layer" if is_same else other,
            dtick=step,
            showgrid=False,
            constrain="domain",
            **panel,
        )
        figure.update_yaxes(
            title="layer" if is_same else model, dtick=step, showgrid=False, **panel
        )
    apply_style(
        figure,
        title="Which layers resemble each other?",
        subtitle="debiased linear CKA",
        height=140 + 330 * panel_rows,
        width=FULL_PAGE,
        panel_titles=True,
    )
    return _share_colours(figure, low=0, high=1, title="CKA")


def _share_colours(figure: LayerFigure, *, low: float, high: float, title: str) -> LayerFigure:
    """Give all panels one scale of colours."""
    colour_bar = {"title": {"text": title}}
    axis = {"colorscale": SCORE_COLOURS, "cmin": low, "cmax": high, "colorbar": colour_bar}
    return figure.update_layout(coloraxis=axis)


def _test_rows(table: pd.DataFrame, task: str, *, probe: str) -> pd.DataFrame:
    """Return a task's test rows, class by class, of the stage that figures show."""
    return table[
        (table.task == task)
        & (table.control == "none")
        & (table.split == "test")
        & (table.probe == probe)
        & (table.stage == default_stage(table))
    ]


def _first_pooling_and_seed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows.pooling == rows.pooling.iloc[0]) & (rows.seed == rows.seed.min())]


def class_heatmap(
    table: pd.DataFrame, task: str, *, probe: str = "logreg", class_word: str = "category"
) -> LayerFigure:
    """Draw F1 of each class (rows, the best on top) by layer (columns), a panel per model.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table.
    task : str
        Task with several classes.
    probe : str
        The kind of probe.
    class_word : str
        What a class is called in the title.

    Returns
    -------
    Figure
        A panel per model, at most four side by side.
    """
    rows = _test_rows(table, task, probe=probe)
    rows = rows[rows["class"] != ""]
    subtitle = task_words(task) + pooling_note(rows, rows.pooling.iloc[0])
    rows = _first_pooling_and_seed(rows)
    scores = rows.pivot_table(
        index=["model", "class", "layer"], columns="metric", values="value"
    ).reset_index()
    scores["support"] = scores.tp + scores.fn
    best_by_model = scores.groupby(["model", "class"]).f1.max()
    best = best_by_model.groupby("class").mean().dropna().sort_values(kind="stable")
    classes = list(best.index)
    models = list(dict.fromkeys(rows.model))

    figure, places = panel_grid(models, horizontal_spacing=0.03)
    for place, model in zip(places, models, strict=True):
        of_model = scores[scores.model == model]
        grids = {}
        for metric in ("f1", "precision", "recall", "support"):
            grid = of_model.pivot_table(index="class", columns="layer", values=metric)
            grids[metric] = grid.reindex(classes)
        details = np.stack(
            [grids[name].to_numpy() for name in ("precision", "recall", "support")], axis=-1
        )
        hover = (
            f"<b>%{{y}}</b>, {model}, layer %{{x}}<br>F1 %{{z:.3f}}"
            "<br>precision %{customdata[0]:.3f}, recall %{customdata[1]:.3f}"
            "<br>asked about and there: %{customdata[2]:,.0f}<extra></extra>"
        )
        figure.add_heatmap(
            z=grids["f1"].to_numpy(),
            x=layer_number(grids["f1"].columns.to_series()),
            y=classes,
            xgap=1,
            ygap=1,
            coloraxis="coloraxis",
            customdata=details,
            hovertemplate=hover,
            **place,
        )
    rows_are_large = len(classes) <= MOST_LARGE_ROWS
    row_height = 24 if rows_are_large else 15
    apply_style(
        figure,
        title=f"F1 of each {class_word} by layer",
        subtitle=subtitle,
        height=150 + (row_height * len(classes) + 100) * places[-1]["row"] - 100,
        width=FULL_PAGE,
        panel_titles=True,
    )
    text_size = 12 if rows_are_large else 10
    figure.update_yaxes(dtick=1, showgrid=False, tickfont={"size": text_size})
    step = tick_step(rows.layer.nunique())
    figure.update_xaxes(title=PANEL_LAYER_AXIS, dtick=step, showgrid=False)
    return _share_colours(figure, low=0, high=1, title="F1")


def confusion_counts(table: pd.DataFrame, task: str, *, probe: str = "logreg") -> LayerFigure:
    """Draw right and wrong answers by layer, stacked, a panel per model.

    The answers of a task with several classes are counted over all that it asks about.

    Parameters
    ----------
    table : DataFrame
        The whole metrics table.
    task, probe : str
        What to draw.

    Returns
    -------
    Figure
        A panel per model, at most four side by side.
    """
    rows = _test_rows(table, task, probe=probe)
    # A binary task has the classes "yes" and "no", which have the same answers.
    rows = rows[rows.metric.isin(list(ANSWERS)) & (rows["class"] != "no")]
    subtitle = task_words(task) + pooling_note(rows, rows.pooling.iloc[0])
    rows = _first_pooling_and_seed(rows)
    counts = rows.groupby(["model", "layer", "metric"], sort=False).value.sum().unstack()
    models = list(dict.fromkeys(rows.model))
    figure, places = panel_grid(models, horizontal_spacing=0.05)
    for place, model in zip(places, models, strict=True):
        of_model = counts.loc[model]
        for metric, (words, colour, pattern) in ANSWERS.items():
            hover = (
                f"<b>{model}</b>, layer %{{x}}"
                f"<br>{words}: %{{y:,.0f}} (%{{customdata:.1%}})<extra></extra>"
            )
            figure.add_bar(
                x=layer_number(of_model.index.to_series()),
                y=of_model[metric],
                name=words,
                marker={
                    "color": colour,
                    "pattern": pattern,
                },
                legendgroup=metric,
                showlegend=model == models[0],
                customdata=of_model[metric] / of_model.sum(axis=1),
                hovertemplate=hover,
                **place,
            )
    apply_style(
        figure,
        title="Right and wrong answers by layer",
        subtitle=subtitle,
        height=100 + 350 * places[-1]["row"],
        width=FULL_PAGE,
        panel_titles=True,
    )
    figure.update_layout(barmode="stack", bargap=0.15)
    figure.update_xaxes(title=PANEL_LAYER_AXIS, dtick=tick_step(rows.layer.nunique()))
    return figure.update_yaxes(title="labels (test)", col=1)


def transfer_heatmap(transfer: pd.DataFrame, task: str) -> LayerFigure:
    """Draw the score of each layer's probe (rows) on each layer's states (columns), per model.

    Parameters
    ----------
    transfer : DataFrame
        :attr:`probekit.probes.results.ProbeResults.transfer`.
    task : str
        Task to draw.

    Returns
    -------
    Figure
        A panel per model, at most four side by side.
    """
    trained = transfer[(transfer.task == task) & (transfer.control == "none")]
    trained = trained[trained.probe_task == task]
    rows, pooling_words = first_pooling(trained)
    models = list(dict.fromkeys(rows.model))
    metric = rows.metric.iloc[0]
    figure, places = panel_grid(models, horizontal_spacing=0.1)
    for place, model in zip(places, models, strict=True):
        of_model = rows[rows.model == model]
        grid = of_model.pivot_table(index="probe_layer", columns="layer", values="value")
        numbers = layer_number(grid.columns.to_series())
        hover = (
            f"<b>{model}</b><br>the probe of layer %{{y}} on the states of layer %{{x}}"
            f"<br>{metric_words(metric)} %{{z:.3f}}<extra></extra>"
        )
        figure.add_heatmap(
            z=grid.to_numpy(),
            x=numbers,
            y=numbers,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertemplate=hover,
            **place,
        )
    apply_style(
        figure,
        title="Does a layer’s probe work on another layer?",
        subtitle=f"{task_words(task)}{pooling_words}",
        height=100 + 400 * places[-1]["row"],
        width=FULL_PAGE,
        panel_titles=True,
    )
    step = tick_step(rows.layer.nunique())
    figure.update_xaxes(title="states of layer", dtick=step, showgrid=False, constrain="domain")
    # Models may differ in depth.
    figure.update_yaxes(dtick=step, showgrid=False, matches=None, showticklabels=True)
    figure.update_yaxes(title="probe of layer", col=1)
    low = min(0.5, rows.value.min())
    return _share_colours(figure, low=low, high=1, title=metric_words(metric))
