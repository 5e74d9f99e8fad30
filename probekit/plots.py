"""Layer plots from the metrics table, and the page that shows them all."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from probekit import controls, paths
from probekit.results import select

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's: colour-blind safe
DASHES = {"untrained": "dash", "shuffled": "dot", "control_task": "dashdot", "no_image": "longdash",
          "no_text": "longdashdot", "wrong_image": "2px 6px"}  # one a control
PLATEAU = 0.3  # opacity
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")  # one a pooling
INK, GREY, GRID = "#2b2d42", "#8d99ae", "#e9ecf1"
SCORES = [[0.0, "#f7fbff"], [0.5, "#6baed6"], [1.0, "#08306b"]]
WORDS = {
    "accuracy": "accuracy", "f1_macro": "macro-F1", "f1_micro": "micro-F1", "f1_positive": "F1 of “yes”",
    "precision_positive": "precision of “yes”", "recall_positive": "recall of “yes”",
    "precision_macro": "macro-precision", "recall_macro": "macro-recall", "loss": "loss (nats)",
    "average_precision": "mean average precision", "codelength": "codelength (bits a label)",
    "selectivity": "selectivity", "log_loss": "log loss (nats)",
}
TASK_WORDS = {"caption": "global: does the caption belong?", "category": "local: which categories?",
              "category_list": "local: which categories, listed in the prompt?"}
AXIS = "decoder layer (0 = input embeddings)"


def style(figure: go.Figure, title: str, height: int = 430) -> go.Figure:
    """The one look of all figures."""
    figure.update_layout(
        template="plotly_white", height=height, title={"text": title, "x": 0.01, "xanchor": "left", "y": 0.97},
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 14, "color": INK}, hovermode="closest",
        margin={"l": 64, "r": 24, "t": 92, "b": 56},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"bgcolor": "white", "font_size": 13},
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=GREY, ticks="outside", tickcolor=GREY)
    figure.update_yaxes(gridcolor=GRID, zeroline=False)
    return figure


def colour_of(table: pd.DataFrame) -> dict[str, str]:
    """One colour a model, the same in every figure of a run."""
    return {model: PALETTE[i % len(PALETTE)] for i, model in enumerate(dict.fromkeys(table.model))}


def layer_number(layer: pd.Series) -> pd.Series:
    return layer.str.rpartition(".")[2].astype(int)


def _faded(colour: str, alpha: float) -> str:
    return f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, {alpha})"


# ----------------------------------------------------------------------------------------------------------- figures


def layer_curves(table: pd.DataFrame, task: str, metric: str, probe: str = "logreg", published: bool = False,
                 chance: float | None = None, split: str = "test") -> go.Figure:
    """A metric by layer: one colour a model, its 95 % interval as a band, its plateau highlighted, controls dashed.

    The plateau are the layers that cannot be told from the best one (:func:`probekit.compare.layers`).

    Parameters
    ----------
    table : metrics table (all of it)
    published : overlay the published study's numbers for this task as thin grey lines
    chance : value of the chance line, if one is known
    split : which one's scores; codelengths are those of "train"
    """
    figure, colours = go.Figure(), colour_of(table)
    rows = select(table, probe, metric, split)
    rows = rows[rows.task == task]
    poolings = list(dict.fromkeys(rows.pooling))
    for (model, control, pooling), curve in rows.groupby(["model", "control", "pooling"], sort=False):
        if control in controls.BASELINES:
            continue
        words = f" {controls.WORDS[control].removesuffix(' model')}" if control != "none" else ""
        name = f"{model}{words}{f', {pooling}' if len(poolings) > 1 else ''}"
        symbol = SYMBOLS[poolings.index(pooling) % len(SYMBOLS)]
        _curve(figure, curve, name, control, colours[model], symbol, metric)
    for control in [name for name in DASHES if name in set(rows.control)]:
        figure.add_scatter(x=[None], y=[None], name=controls.WORDS[control], legendgroup=control, mode="lines",
                           line={"dash": DASHES[control], "color": GREY, "width": 2})
    if rows.plateau.notna().any():
        figure.add_scatter(x=[None], y=[None], name="cannot be told from the best layer", mode="lines",
                           line={"color": _faded(GREY, PLATEAU), "width": 14})
    if published:
        _published(figure, task, metric)
    lines = {} if chance is None else {"chance": chance}
    for name in controls.BASELINES if metric in ("accuracy", "log_loss") else ():  # an F1 of guesses says little
        value = rows[rows.control == name].value.max()
        if value == value and not any(abs(value - known) < 0.01 for known in lines.values()):
            lines[controls.WORDS[name]] = value
    for name, value in lines.items():
        place = "bottom right" if name == "chance" else "top right"
        figure.add_hline(y=value, line={"color": GREY, "dash": "dot", "width": 1.5}, annotation_text=name,
                         annotation_font_color=GREY, annotation_position=place)
    style(figure, f"{WORDS[metric][0].upper()}{WORDS[metric][1:]} by layer — {TASK_WORDS.get(task, task)}")
    figure.update_xaxes(title=AXIS, dtick=1 if layer_number(rows.layer).max() <= 12 else 4)
    return figure.update_yaxes(title=WORDS[metric] if metric == "codelength" else f"{WORDS[metric]} ({split})")


def _named(rows: pd.DataFrame) -> str:
    """The pooling that a figure shows, where the run has several and the figure room for one."""
    return f" ({rows.pooling.iloc[0]} pooling)" if rows.pooling.nunique() > 1 else ""


def _curve(figure: go.Figure, curve: pd.DataFrame, name: str, control: str, colour: str, symbol: str, metric: str
           ) -> None:
    x, real = layer_number(curve.layer), control == "none"
    lower = metric in ("codelength", "log_loss")  # is better
    best = curve.value.idxmin() if lower else curve.value.idxmax()
    if real and curve.plateau.notna().any():  # what is connected is highlighted in one stroke
        figure.add_scatter(x=x, y=curve.value.where(curve.plateau.astype(bool)), mode="lines+markers", legendgroup=name,
                           line={"width": 14, "color": _faded(colour, PLATEAU)}, hoverinfo="skip", showlegend=False,
                           marker={"size": 14, "color": _faded(colour, PLATEAU)}, name=f"{name}, plateau")
    if real or control == "untrained":
        figure.add_scatter(x=[*x, *x[::-1]], y=[*curve.hi, *curve.lo[::-1]], fill="toself", mode="lines",
                           line={"width": 0}, fillcolor=_faded(colour, 0.15), hoverinfo="skip", showlegend=False,
                           legendgroup=name if real else control)
    gap = curve.value - curve.value[best]
    told = np.stack([curve.layer, curve.lo, curve.hi, curve.n, gap, np.full(len(curve), curve.layer[best])], -1)
    hover = (f"<b>{name}</b>, %{{customdata[0]}}<br>{WORDS[metric]} %{{y:.3f}} [%{{customdata[1]:.3f}}, "
             "%{customdata[2]:.3f}]<br>n = %{customdata[3]:,.0f}<br>%{customdata[4]:+.3f} to its best, "
             "%{customdata[5]}<extra></extra>")
    line = {"color": colour, "width": 2.5 if real else 1.5, "dash": DASHES.get(control, "solid")}
    figure.add_scatter(x=x, y=curve.value, name=name, mode="lines+markers" if real else "lines", line=line,
                       legendgroup=name if real else control, showlegend=real, customdata=told, hovertemplate=hover,
                       opacity=1 if real else 0.8, marker={"size": 7, "symbol": symbol})


def _published(figure: go.Figure, task: str, metric: str) -> None:
    """The study's own curves; what it calls macro-F1 is micro-F1 (category) and the F1 of "yes" (caption)."""
    kind = {"caption": "caption", "category": "without list", "category_list": "with list"}.get(task)
    column = {"accuracy": "accuracy", "f1_micro" if kind != "caption" else "f1_positive": "f1"}.get(metric)
    if kind is None or column is None:
        return
    rows = pd.read_csv(Path(__file__).with_name("published.csv"))
    rows = rows[(rows.prompt == kind) & ~rows.model.str.startswith("Gemma")]  # a failed run: 0.500 at every layer
    told = WORDS[metric]
    for model, dash in zip(rows.model.unique(), ("solid", "dot"), strict=False):
        curve = rows[rows.model == model].sort_values("layer")
        hover = f"{model}, layer %{{x}}<br>published {told} %{{y:.3f}}<extra></extra>"
        figure.add_scatter(x=curve.layer, y=curve[column], name=f"{model}, published {told}", mode="lines",
                           line={"color": GREY, "width": 1.2, "dash": dash}, hovertemplate=hover)


def score_heatmap(table: pd.DataFrame, task: str, metrics: list[str], probe: str = "logreg") -> go.Figure:
    """Several metrics (rows) by layer (columns), a panel a model; the untrained control is left out."""
    kept = table[(table.control == "none") & (table.task == task)]
    rows = pd.concat([select(kept, probe, metric) for metric in metrics])
    models, pooling = list(dict.fromkeys(rows.model)), rows.pooling.iloc[0]
    figure = make_subplots(len(models), 1, subplot_titles=models, vertical_spacing=0.34 / len(models))
    for i, model in enumerate(models, 1):
        part = rows[(rows.model == model) & (rows.pooling == pooling)]
        grid = part.pivot_table(index="metric", columns="layer", values="value").loc[metrics[::-1]]
        figure.add_heatmap(
            z=grid.to_numpy(), x=layer_number(grid.columns.to_series()), y=[WORDS[m] for m in grid.index],
            row=i, col=1, zmin=min(0.5, rows.value.min()), zmax=1, colorscale=SCORES, xgap=2, ygap=2,
            texttemplate="%{z:.2f}" if grid.shape[1] <= 14 else None,
            showscale=i == 1, colorbar={"thickness": 14},
            hovertemplate=f"<b>{model}</b>, layer %{{x}}<br>%{{y}} %{{z:.3f}}<extra></extra>",
        )
    style(figure, f"Precision, recall and F1 by layer — {TASK_WORDS.get(task, task)}{_named(rows)}",
          150 + 170 * len(models))
    figure.update_xaxes(dtick=1 if rows.layer.nunique() <= 14 else 4, showgrid=False)
    figure.update_xaxes(title=AXIS, row=len(models), col=1)
    return figure.update_layout(margin={"l": 150})


def loss_curves(losses: pd.DataFrame, table: pd.DataFrame, task: str, metric: str, probe: str = "linear") -> go.Figure:
    """Training (solid) and validation (dashed) loss of "linear" or "mlp": each model's best and worst layer.

    Best and worst are judged by `metric` on the validation split; losses are means over the seeds that
    are still trained.
    """
    scores = select(table[(table.task == task) & (table.control == "none")], probe, metric, "validation")
    models, pooling = list(dict.fromkeys(scores.model)), scores.pooling.iloc[0]
    scores, colours = scores[scores.pooling == pooling], colour_of(table)
    chosen = [[(model, scores.layer[ends[end]]) for end in ("idxmax", "idxmin")] for model in models
              for ends in [scores[scores.model == model].value.agg(["idxmax", "idxmin"])]]
    titles = [f"{model}, its {end} layer {layer}" for pair in chosen
              for end, (model, layer) in zip(("best", "worst"), pair, strict=True)]
    figure = make_subplots(len(models), 2, subplot_titles=titles, shared_yaxes="rows", horizontal_spacing=0.05,
                           vertical_spacing=0.3 / len(models))
    kept = losses[(losses.task == task) & (losses.control == "none") & (losses.pooling == pooling)
                  & (losses.probe == probe)]
    for i, pair in enumerate(chosen, 1):
        for j, (model, layer) in enumerate(pair, 1):
            mean = kept[(kept.model == model) & (kept.layer == layer)].groupby(["split", "epoch"]).loss.mean()
            for split, dash in (("train", "solid"), ("validation", "dash")):
                figure.add_scatter(
                    x=mean[split].index, y=mean[split], name=split, row=i, col=j,
                    mode="lines+markers", showlegend=False,
                    line={"dash": dash, "color": colours[model], "width": 2.5},
                    hovertemplate=f"{split}, epoch %{{x}}<br>loss %{{y:.4f}}<extra>{model} {layer}</extra>",
                )
    for split, dash in (("train", "solid"), ("validation", "dash")):
        line = {"dash": dash, "color": GREY, "width": 2.5}
        figure.add_scatter(x=[None], y=[None], name=split, mode="lines", line=line)
    style(figure, f"Loss of the {probe} probe — {TASK_WORDS.get(task, task)}{_named(scores)}", 190 + 230 * len(models))
    figure.update_layout(margin={"t": 120}, legend={"y": 1 + 0.14 / len(models)})
    figure.update_xaxes(title="epoch", row=len(models))
    return figure.update_yaxes(title="loss (nats)", col=1)


def study_figures(table: pd.DataFrame, losses: pd.DataFrame, tasks: dict[str, dict], probe: str = "logreg",
                  published: bool = False) -> dict[str, tuple[go.Figure, str]]:
    """The published study's figures for every task of a run: name to figure and caption."""
    figures = {}
    for task, about in tasks.items():
        binary = about["kind"] == "binary"
        metric, parts = ("accuracy", "positive") if binary else ("f1_macro", "macro")
        if published and not binary:  # what the study calls macro-F1 is micro-F1
            figures[f"{task}_f1_micro"] = (
                layer_curves(table, task, "f1_micro", probe, published),
                f"{about['question']} F1 over the pooled counts of all categories, which is what the study reports.")
        if not binary:  # where the guesses from the training labels can be drawn, too
            figures[f"{task}_accuracy"] = (
                layer_curves(table, task, "accuracy", probe, published, 0.5),
                f"{about['question']} The share of right answers over all categories that are asked.")
        figures[f"{task}_{metric}"] = (
            layer_curves(table, task, metric, probe, published, 0.5 if binary else None),
            f"{about['question']} The {WORDS[metric]} of a probe on each layer; bands are 95 % bootstrap intervals "
            "over test images. Highlighted layers cannot be told from the best one (99 % confidence). Dashed lines are "
            "controls, which should lie at chance or bound what a score means.")
        if (table[table.task == task].metric == "codelength").any() and probe == "logreg":
            figures[f"{task}_codelength"] = (
                layer_curves(table, task, "codelength", probe, split="train"),
                "How many bits a label takes, given the states: each block of training labels is sent with a probe "
                "that has seen the blocks before it. The uniform code takes 1; lower is easier to extract.")
        figures[f"{task}_scores"] = (
            score_heatmap(table, task, [f"{name}_{parts}" for name in ("precision", "recall", "f1")], probe),
            "Each cell is one layer's probe on the test images; darker is better.")
        for kind in losses[losses.task == task].probe.unique() if len(losses) else ():
            figures[f"{task}_losses" + f"_{kind}" * (kind != "linear")] = (
                loss_curves(losses, table, task, metric, kind),
                "Training loss is measured with dropout, while the weights change; validation loss after each epoch. "
                "A curve that still falls at the last epoch is a probe that has not converged. Best and worst are this "
                "probe's own, on validation.")
    return figures


# ------------------------------------------------------------------------------------------------------------ the page

CONFIG = {"displaylogo": False, "responsive": True}
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><script src="plotly.min.js"></script>
<style>
body{{font:16px/1.55 Inter,Helvetica,Arial,sans-serif;color:#2b2d42;
max-width:1080px;margin:2.5rem auto;padding:0 1.2rem}}
h1{{font-size:1.7rem;margin-bottom:.3rem}}.lead{{color:#5c677d;margin-top:0}}
figure{{margin:2.6rem 0;border-top:1px solid #e9ecf1;padding-top:1rem}}
figcaption{{color:#5c677d;font-size:.93rem;max-width:62rem}}a{{color:#0072B2}}</style></head>
<body><h1>{title}</h1><p class="lead">{lead}</p>{body}</body></html>"""


def write_page(figures: dict[str, tuple[go.Figure, str]], folder: Path, title: str, lead: str, said: Sequence[str]
               ) -> Path:
    """Write each figure as its own HTML and ``index.html`` that shows them all, readable without a network.

    Parameters
    ----------
    said : paragraphs of the summary (:func:`probekit.report.summary`)
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plotly.min.js").write_text(get_plotlyjs())
    body = ["<h2>What came out</h2>", *(f"<p>{html.escape(text)}</p>" for text in said),
            '<p>All numbers: <a href="metrics.csv">metrics.csv</a></p>']
    for name, (figure, caption) in figures.items():
        figure.write_html(folder / f"{name}.html", include_plotlyjs="directory", config=CONFIG)
        inner = figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)
        body.append(f'<figure id="{name}">{inner}<figcaption>{html.escape(caption)} '
                    f'<a href="{name}.html">alone</a></figcaption></figure>')
    page = PAGE.format(title=html.escape(title), lead=html.escape(lead), body="\n".join(body))
    return paths.write_atomic(folder / "index.html", lambda part: part.write_text(page))


def write_png(figures: dict[str, tuple[go.Figure, str]], folder: Path, width: int = 1000) -> str:
    """Save every figure as PNG where a Chrome is found; returns one line that says what happened."""
    try:
        plotly.io.write_images([figure for figure, _ in figures.values()], [folder / f"{n}.png" for n in figures],
                               width=width, height=[figure.layout.height for figure, _ in figures.values()], scale=2)
    except (ValueError, RuntimeError) as error:  # what plotly makes of a missing kaleido, and of a missing Chrome
        return f"no PNG files ({str(error).strip().splitlines()[0]}): pip install 'probekit[export]' and a Chrome"
    return f"{len(figures)} PNG files in {folder}"
