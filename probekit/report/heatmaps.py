"""Pictures with a cell or a bar for each layer: scores, categories, confusion, and probes on other layers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probekit.probes.results import select_curve, stage_of
from probekit.report import style as look
from probekit.report.style import FULL, SCORES, TASK_WORDS, WORDS, layer_number

COUNTS = {"tp": ("yes, rightly", "#0072B2"), "tn": ("no, rightly", "#56B4E9"), "fp": ("yes, wrongly", "#D55E00"),
          "fn": ("no, wrongly", "#E69F00")}


def score_heatmap(table: pd.DataFrame, task: str, metrics: list[str], probe: str = "logreg") -> go.Figure:
    """Several metrics (rows) by layer (columns), a panel a model; the untrained control is left out."""
    kept = table[(table.control == "none") & (table.task == task)]
    rows = pd.concat([select_curve(kept, probe, metric) for metric in metrics])
    models, pooling = list(dict.fromkeys(rows.model)), rows.pooling.iloc[0]
    figure = make_subplots(len(models), 1, subplot_titles=models, vertical_spacing=0.34 / len(models))
    for i, model in enumerate(models, 1):
        part = rows[(rows.model == model) & (rows.pooling == pooling)]
        grid = part.pivot_table(index="metric", columns="layer", values="value").loc[metrics[::-1]]
        figure.add_heatmap(
            z=grid.to_numpy(), x=layer_number(grid.columns.to_series()), y=[WORDS[m] for m in grid.index],
            row=i, col=1, coloraxis="coloraxis", xgap=2, ygap=2,
            texttemplate="%{z:.2f}" if grid.shape[1] <= 14 else None,
            hovertemplate=f"<b>{model}</b>, layer %{{x}}<br>%{{y}} %{{z:.3f}}<extra></extra>",
        )
    named = look.pooling_named(rows, pooling)
    look.style(figure, f"Precision, recall and F1 by layer — {TASK_WORDS.get(task, task)}{named}",
               150 + 170 * len(models), FULL)
    figure.update_xaxes(dtick=look.ticks(rows.layer.nunique()), showgrid=False)
    figure.update_xaxes(title=look.LAYER_AXIS, row=len(models), col=1)
    return _coloured(figure, min(0.5, rows.value.min()), 1, "score").update_layout(margin={"l": 150})


def _coloured(figure: go.Figure, low: float, high: float, title: str) -> go.Figure:
    """One scale of colours for all panels."""
    return figure.update_layout(coloraxis={"colorscale": SCORES, "cmin": low, "cmax": high,
                                           "colorbar": {"thickness": 12, "title": {"text": title, "side": "right"}}})


def class_heatmap(table: pd.DataFrame, task: str, probe: str = "logreg", what: str = "category") -> go.Figure:
    """F1 of each class (rows, the best known on top) by layer (columns), a panel a model."""
    rows = table[(table.task == task) & (table.control == "none") & (table.split == "test") & (table.probe == probe)
                 & (table["class"] != "") & (table.stage == stage_of(table))]
    named = look.pooling_named(rows, rows.pooling.iloc[0])
    rows = rows[(rows.pooling == rows.pooling.iloc[0]) & (rows.seed == rows.seed.min())]
    wide = rows.pivot_table(index=["model", "class", "layer"], columns="metric", values="value").reset_index()
    wide["support"] = wide.tp + wide.fn
    best = wide.groupby(["model", "class"]).f1.max().groupby("class").mean().dropna().sort_values(kind="stable")
    models, names = list(dict.fromkeys(rows.model)), list(best.index)
    figure = make_subplots(1, len(models), subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.03)
    for i, model in enumerate(models, 1):
        part = {name: wide[wide.model == model].pivot_table(index="class", columns="layer", values=name).reindex(names)
                for name in ("f1", "precision", "recall", "support")}
        told = np.stack([part[name].to_numpy() for name in ("precision", "recall", "support")], -1)
        figure.add_heatmap(
            z=part["f1"].to_numpy(), x=layer_number(part["f1"].columns.to_series()), y=names, row=1, col=i, xgap=1,
            ygap=1, coloraxis="coloraxis", customdata=told,
            hovertemplate=f"<b>%{{y}}</b>, {model}, layer %{{x}}<br>F1 %{{z:.3f}}<br>precision %{{customdata[0]:.3f}}, "
                          "recall %{customdata[1]:.3f}<br>asked about and there: %{customdata[2]:,.0f}<extra></extra>")
    line = 24 if len(names) <= 24 else 15
    look.style(figure, f"F1 of each {what} by layer — {TASK_WORDS.get(task, task)}{named}",
               150 + line * len(names), FULL)
    figure.update_yaxes(dtick=1, showgrid=False, tickfont={"size": 12 if len(names) <= 24 else 10})
    figure.update_xaxes(title=look.LAYER_AXIS, dtick=look.ticks(rows.layer.nunique()), showgrid=False)
    return _coloured(figure, 0, 1, "F1")


def confusion_counts(table: pd.DataFrame, task: str, probe: str = "logreg") -> go.Figure:
    """Right and wrong answers by layer, stacked, a panel a model; of a multilabel task over all that is asked."""
    rows = table[(table.task == task) & (table.control == "none") & (table.split == "test") & (table.probe == probe)
                 & table.metric.isin([*COUNTS]) & (table.stage == stage_of(table)) & (table["class"] != "no")]
    named = look.pooling_named(rows, rows.pooling.iloc[0])
    rows = rows[(rows.pooling == rows.pooling.iloc[0]) & (rows.seed == rows.seed.min())]
    total = rows.groupby(["model", "layer", "metric"], sort=False).value.sum().unstack()
    models = list(dict.fromkeys(rows.model))
    figure = make_subplots(1, len(models), subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.05)
    for i, model in enumerate(models, 1):
        part = total.loc[model]
        for metric, (words, colour) in COUNTS.items():
            share = part[metric] / part.sum(1)
            figure.add_bar(x=layer_number(part.index.to_series()), y=part[metric], name=words, marker={"color": colour},
                           legendgroup=metric, showlegend=i == 1, row=1, col=i, customdata=share,
                           hovertemplate=f"<b>{model}</b>, layer %{{x}}<br>{words}: %{{y:,.0f}} (%{{customdata:.1%}})"
                                         "<extra></extra>")
    look.style(figure, f"Right and wrong answers by layer — {TASK_WORDS.get(task, task)}{named}", 450, FULL, True)
    figure.update_layout(barmode="stack", bargap=0.15)
    figure.update_xaxes(title=look.LAYER_AXIS, dtick=look.ticks(rows.layer.nunique()))
    return figure.update_yaxes(title="test labels", col=1)


def transfer_heatmap(transfer: pd.DataFrame, task: str) -> go.Figure:
    """The score of each layer's probe (rows) on the states of each layer (columns), a panel a model.

    See :func:`probekit.probes.transfer.relate`.
    """
    every = transfer[(transfer.task == task) & (transfer.control == "none")]
    rows = every[every.pooling == every.pooling.iloc[0]]
    models, metric = list(dict.fromkeys(rows.model)), rows.metric.iloc[0]
    figure = make_subplots(1, len(models), subplot_titles=models, horizontal_spacing=0.1)
    for i, model in enumerate(models, 1):
        grid = rows[rows.model == model].pivot_table(index="probe_layer", columns="layer", values="value")
        place = layer_number(grid.columns.to_series())
        figure.add_heatmap(
            z=grid.to_numpy(), x=place, y=place, row=1, col=i, coloraxis="coloraxis", xgap=1, ygap=1,
            hovertemplate=f"<b>{model}</b><br>the probe of layer %{{y}} on the states of layer %{{x}}<br>"
                          f"{WORDS[metric]} %{{z:.3f}}<extra></extra>")
    look.style(figure, f"Does a layer’s probe work on another? — {TASK_WORDS.get(task, task)}"
               f"{look.pooling_named(every, rows.pooling.iloc[0])}", 500, FULL)
    step = look.ticks(rows.layer.nunique())
    figure.update_xaxes(title="states of layer", dtick=step, showgrid=False, constrain="domain")
    figure.update_yaxes(dtick=step, showgrid=False)
    figure.update_yaxes(title="probe of layer", col=1)
    return _coloured(figure, rows.value.min(), rows.value.max(), WORDS[metric])
