"""How the scores of a run differ between slices of the test examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from tqdm.auto import tqdm

from probekit.answers.scores import ANSWER, said_probabilities
from probekit.extraction.answer_heads import ANSWER_POOLING
from probekit.probes.labels import LabelledTask
from probekit.probes.results import ProbeKey, ProbeResults, StateKey, best_layers
from probekit.probes.slices import COLUMNS, find_covariates, metrics_of, score_slices
from probekit.report.paper import LayerFigure, panels
from probekit.report.style import (
    FULL_PAGE,
    GREY,
    HALF_PAGE,
    SYMBOLS,
    ModelLook,
    apply_style,
    capitalise,
    legend_entry,
    metric_words,
    model_looks,
    pooling_note,
    task_words,
    with_alpha,
)

SOURCE_COLUMNS = ["model", "control", "pooling", "task", "probe", "layer"]
COVARIATE_WORDS = {
    "area": "area of what is asked about",
    "objects": "instances in the image",
    "words": "length of the text",
    "combination": "shown together: seen in training?",
}
NO_SLICES = "its test examples do not differ in what slices are made by, or it has no such probes"
OPEN = "-open"  # the symbol of a model's answer; its probes have the filled one
PANELS_PER_ROW = 2
PANEL_HEIGHT = 300
# All points of a slice lie within this share of the distance to the next slice.
SPREAD = 0.6


def slice_table(
    results: ProbeResults,
    examples: pd.DataFrame,
    instances: pd.DataFrame,
    *,
    task: str | None = None,
    probe: str = "logreg",
    metric: str | None = None,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Score probes at their best layers, and what the models answer, in slices of the test images.

    Parameters
    ----------
    results : ProbeResults
        Results of a whole run; no model runs.
    examples : DataFrame
        The examples that were probed.
    instances : DataFrame
        The instances of their images; without any only the length of the texts is left.
    task : str, optional
        All tasks unless it is named.
    probe : str
        The kind of probe.
    metric : str, optional
        See :func:`probekit.probes.slices.score_slices`.
    resamples : int
        Number of bootstrap samples of the images of a slice.

    Returns
    -------
    DataFrame
        One row per model, control ("none", "untrained"), pooling, task, probe (``"answer"`` for
        what the model says), covariate and slice. `layer` is the probe's best one, chosen on all
        validation images. The other columns are those of
        :func:`probekit.probes.slices.score_slices`.
    """
    tables = []
    for name in results.tasks if task is None else [task]:
        kind = results.tasks[name].kind
        if task is None and metric is not None and metric not in metrics_of(kind):
            tqdm.write(f"{name} has no {metric}: no slices of it")
            continue
        sources = _best_sources(results, name, probe=probe)
        if not sources:
            continue
        scores = score_slices(
            np.stack(list(sources.values())),
            LabelledTask.from_examples(examples, name).true,
            find_covariates(examples, instances, name),
            metric=metric,
            resamples=resamples,
        )
        named = pd.DataFrame(list(sources), columns=SOURCE_COLUMNS)
        tables.append(named.join(scores.set_index("source"), how="inner"))
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return table.reindex(columns=[*SOURCE_COLUMNS, *COLUMNS])


def _best_sources(
    results: ProbeResults, task: str, *, probe: str
) -> dict[tuple[str, ...], np.ndarray]:
    """Return (n, c) the test probabilities of the best probes and of the answers to a task.

    By model, control, pooling, task, probe and layer.
    """
    keys = [key for key in results.predictions if (key.task, key.probe) == (task, probe)]
    if not keys:
        return {}
    best = best_layers(results.metrics, {task: results.tasks[task]}, probe=probe)
    layers = best.set_index(["model", "control", "pooling"])["best layer"]
    sources: dict[tuple[str, ...], np.ndarray] = {}
    for key in keys:
        layer = layers[key.model, key.control, key.pooling]
        if layer.startswith("lm."):  # predictions are of decoder layers
            number = int(layer.partition(".")[2])
            sources[(*key, layer)] = results.predictions[key][number]
    for model, control in dict.fromkeys((key.model, key.control) for key in keys):
        state = StateKey(model, control, ANSWER_POOLING, task)
        said_nc = said_probabilities(results, state)
        if said_nc is not None:
            sources[(*ProbeKey(*state, ANSWER), _answer_layer(results, state))] = said_nc
    return sources


def _answer_layer(results: ProbeResults, state: StateKey) -> str:
    """Return the layer that an answer comes from, the last one."""
    counts = [
        len(p_lnc) for key, p_lnc in results.predictions.items() if key.state[:2] == state[:2]
    ]
    return f"lm.{max(counts) - 1:02d}"


# -------------------------------------------------------------------------------------- the figure


def slices_figure(table: pd.DataFrame, task: str, *, probe: str = "logreg") -> LayerFigure:
    """Draw the scores of a task in slices of its test examples, a panel per covariate.

    Parameters
    ----------
    table : DataFrame
        Of :func:`slice_table`.
    task : str
        The task.
    probe : str
        The kind of probe.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        The table has no slices of this task.
    """
    rows = table[(table.task == task) & (table.control == "none")]
    rows = rows[rows.probe.isin([probe, ANSWER])]
    if rows.empty:
        raise ValueError(f"no slices of {task} in this table: {NO_SLICES}")
    pooling = _one_pooling(rows)
    note = pooling_note(rows[rows.probe == probe], pooling)
    rows = rows[(rows.pooling == pooling) | (rows.probe == ANSWER)]
    covariates = list(dict.fromkeys(rows.covariate))
    columns = min(PANELS_PER_ROW, len(covariates))
    panel_rows = -(-len(covariates) // columns)
    figure = panels(
        panel_rows,
        columns,
        subplot_titles=[capitalise(COVARIATE_WORDS[name]) for name in covariates],
        horizontal_spacing=0.1,
        vertical_spacing=0.3 / panel_rows,
    )
    looks = model_looks(table)
    sources = list(dict.fromkeys(zip(rows.model, rows.probe, strict=True)))
    sources.sort(key=lambda source: list(looks).index(source[0]))
    for place, name in enumerate(covariates):
        panel = {"row": place // columns + 1, "col": place % columns + 1}
        of_covariate = rows[rows.covariate == name]
        _add_panel(figure, of_covariate, sources, looks=looks, panel=panel)
    figure.add_traces(_legend(sources, looks))
    apply_style(
        figure,
        title="In slices of the test examples",
        subtitle=f"{task_words(task)}{note}",
        height=174 + PANEL_HEIGHT * panel_rows,
        width=FULL_PAGE if columns > 1 else HALF_PAGE,
        panel_titles=True,
    )
    return figure


def _one_pooling(rows: pd.DataFrame) -> str:
    """Return what answers are read from where probes have it, else their first pooling."""
    poolings = list(dict.fromkeys(rows.pooling[rows.probe != ANSWER]))
    return ANSWER_POOLING if ANSWER_POOLING in poolings else poolings[0]


def _add_panel(
    figure: LayerFigure,
    rows: pd.DataFrame,
    sources: Sequence[tuple[str, str]],
    *,
    looks: dict[str, ModelLook],
    panel: dict[str, int],
) -> None:
    slices = rows.drop_duplicates("slice").reset_index(drop=True)
    places = {name: place for place, name in enumerate(slices.slice)}
    metric = rows.metric.iloc[0]
    offsets = (np.arange(len(sources)) - (len(sources) - 1) / 2) * SPREAD / max(1, len(sources))
    for (model, probe), offset in zip(sources, offsets, strict=True):
        points = rows[(rows.model == model) & (rows.probe == probe) & rows.value.notna()]
        name = "the model’s answer" if probe == ANSWER else f"{probe} probe"
        colour, symbol, _ = looks[model]
        figure.add_scatter(
            x=points.slice.map(places).astype(float) + offset,
            y=points.value,
            mode="markers",
            name=f"{model}, {name}",
            showlegend=False,
            marker={
                "color": colour,
                "size": 9,
                "symbol": symbol + OPEN if probe == ANSWER else symbol,
            },
            error_y={
                "type": "data",
                "symmetric": False,
                "array": points.hi - points.value,
                "arrayminus": points.value - points.lo,
                "color": with_alpha(colour, 0.6),
                "thickness": 1.5,
                "width": 3,
            },
            customdata=points[["slice", "layer", "lo", "hi", "n", "images"]],
            hovertemplate=(
                f"<b>{model}</b>, {name}, %{{customdata[1]}}<br>%{{customdata[0]}}: "
                f"{metric_words(metric)} %{{y:.3f}} [%{{customdata[2]:.3f}}, "
                "%{customdata[3]:.3f}]<br>n = %{customdata[4]:,} of %{customdata[5]:,} images"
                "<extra></extra>"
            ),
            **panel,
        )
    figure.update_xaxes(
        range=[-0.5, len(slices) - 0.5],
        tickvals=list(places.values()),
        ticktext=[_tick(row) for row in slices.itertuples()],
        showgrid=False,
        **panel,
    )
    figure.update_yaxes(title=f"{metric_words(metric)} (test)", **panel)
    if metric != "log_loss":
        figure.update_yaxes(range=[-0.03, 1.03], tick0=0, dtick=0.25, **panel)


def _tick(row: Any) -> str:
    reason = f"<br>{row.reason.partition(':')[0]}" if row.reason else ""
    return f"{row.slice}<br>n = {row.n:,}{reason}"


def _legend(sources: Sequence[tuple[str, str]], looks: dict[str, ModelLook]) -> list[go.Scatter]:
    """Return an entry for each model and for filled and open symbols; no point has one itself."""
    entries = []
    for model in dict.fromkeys(model for model, _ in sources):
        marker = {"color": looks[model].colour, "symbol": looks[model].symbol, "size": 9}
        entries.append(legend_entry(model, mode="markers", marker=marker))
    symbols = {"probe at its best layer": SYMBOLS[0]}
    if any(probe == ANSWER for _, probe in sources):
        symbols["the model’s answer"] = SYMBOLS[0] + OPEN
    for name, symbol in symbols.items():
        marker = {"color": GREY, "size": 9, "symbol": symbol}
        entries.append(legend_entry(name, mode="markers", marker=marker))
    return entries
