"""The explorer without a kernel: a handful of examples in one plotly figure with a menu and a slider."""

from __future__ import annotations

import base64

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probekit.report import pictures
from probekit.report import style as look
from probekit.report.example_search import ORDERS, find
from probekit.report.figures import Figure
from probekit.report.saved_run import SavedRun
from probekit.report.style import FULL, PALETTE

COLUMNS = 24  # of the raster that heat is drawn on
PHOTO = 400  # pixels


def page_explorers(run: SavedRun) -> dict[str, Figure]:
    """An :func:`explorer` for each trained model of a run that has logreg probes."""
    models = [model for model in dict.fromkeys(key.partition("|")[0] for key in run.results.predictions)
              if _keys(run, model)]
    return {f"explorer_{model}": Figure(explorer(run, model), (
        f"{model}, logreg probes. Choose an example above the photo, and move the slider through the layers. Left: "
        "heat of the category in the title, as this layer's local probe says of each image token, with the category's "
        "boxes. Right: the probability that each probe gives its class; full lines are truly yes, dashed ones truly "
        "no. “Most surprising” examples are surely wrong at the last layer, “earliest decided” ones never change an "
        "answer after an early layer."), "Single examples") for model in models}


def explorer(run: SavedRun, model: str, each: int = 2) -> go.Figure:
    """Photo with heat and boxes (left), probability by layer (right), a slider for the layer, a menu for the example.

    Examples are the first ones of :data:`probekit.report.example_search.ORDERS` but for "as drawn": of the first local task and of
    the first global one.

    Parameters
    ----------
    model : a trained model of the run
    each : examples of each order and task
    """
    shown = [_Example(run, key, place, f"{task}: {order}") for task, key in _keys(run, model)
             for order, place in _chosen(run, task, key, each)]
    curves = max(len(one.names) for one in shown)
    figure = make_subplots(1, 2, column_widths=[0.45, 0.55], horizontal_spacing=0.09)
    figure.add_heatmap(row=1, col=1, colorscale=pictures.HEAT, zmin=0, zmax=1, showscale=False, hoverinfo="skip")
    figure.add_scatter(row=1, col=1, mode="lines", line={"color": "white", "width": 2.5}, hoverinfo="skip",
                       showlegend=False)
    for c in range(curves):
        figure.add_scatter(row=1, col=2, mode="lines+markers", line={"color": PALETTE[c], "width": 2.5},
                           hovertemplate="layer %{x}<br>p(yes) %{y:.3f}<extra></extra>")
    figure.add_scatter(row=1, col=2, mode="lines", line={"color": "#E69F00", "width": 9}, opacity=0.35,
                       hoverinfo="skip", showlegend=False, y=[0, 1])
    states = [one.state(curves) for one in shown]
    first = len(shown[0].p_lc) - 1
    for trace, values in zip(figure.data, states[0][0], strict=True):
        trace.update(values)
    look.style(figure, shown[0].title, 520, FULL)
    figure.update_xaxes(visible=False, row=1, col=1, range=[0, shown[0].ratio], constrain="domain")
    figure.update_yaxes(visible=False, row=1, col=1, range=[0, 1], scaleanchor="x", constrain="domain")
    figure.update_xaxes(title=look.LAYER_AXIS, dtick=look.ticks(first + 1), row=1, col=2)
    figure.update_yaxes(title="p(yes)", range=[-0.03, 1.03], row=1, col=2)
    buttons = [{"label": one.label, "method": "update", "args": [_columns(traces), layout]}
               for one, (traces, layout) in zip(shown, states, strict=True)]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.13, "yanchor": "bottom", "showactive": True}
    figure.update_layout(updatemenus=[menu], margin={"t": 118, "b": 110, "l": 20}, title={"font": {"size": 14}})
    return figure.update_layout({name.replace(".", "_"): value for name, value in states[0][1].items()})


def _keys(run: SavedRun, model: str) -> list[tuple[str, str]]:
    """Task and key of the examples: the first local task, with heat where there is one, and the first global task."""
    keys = [key.rpartition("|")[0] for key in run.results.predictions if key.endswith("|logreg")]
    keys = sorted((key for key in keys if key.startswith(f"{model}|none|")), key=lambda key: key not in run.kept.files)
    found = {}
    for key in keys:
        task = key.rpartition("|")[2]
        found.setdefault(run.tasks[task].kind, (task, key))
    return [found[kind] for kind in ("multilabel", "binary") if kind in found]


def _chosen(run: SavedRun, task: str, key: str, each: int) -> list[tuple[str, int]]:
    """Order and place of the examples, each image once; those with stored heat, where some have it."""
    rows, out, seen = run.tests(task), [], set()
    warm = any(run.kept.get(key, image) is not None for image in rows.image_id.unique())
    for order in [name for name in ORDERS if name != "as drawn"]:
        for place in find(rows, run.results.predictions[f"{key}|logreg"], order):
            row = rows.iloc[place]
            if row.image_id in seen or (warm and run.kept.get(key, row.image_id) is None):
                continue
            seen.add(row.image_id)
            out.append((order, int(place)))
            if sum(name == order for name, _ in out) == each:
                break
    return out


class _Example:
    """One example, and what the figure's traces and layout are for it."""

    def __init__(self, run: SavedRun, key: str, place: int, label: str):
        task = key.rpartition("|")[2]
        row, about = run.tests(task).iloc[place], run.tasks[task]
        asked = np.flatnonzero(row["mask"])
        self.names = [f"{about['classes'][k]}: {'yes' if row.labels[k] else 'no'}" for k in asked]
        self.dashes = ["solid" if row.labels[k] else "dash" for k in asked]
        self.p_lc = run.results.predictions[f"{key}|logreg"][:, place, asked].astype(float)
        self.image = pictures.photo(row.file, PHOTO)
        self.ratio = self.image.width / self.image.height
        self.label = f"{label} — image {row.image_id}"
        self.z, self.boxes, heat = None, np.zeros((0, 4)), ""
        found = run.kept.get(key, row.image_id)
        if found is not None:
            there = [k for k in asked if row.labels[k]] or [*asked]
            k, height = there[0], max(2, round(COLUMNS / self.ratio))
            self.boxes, heat = run.boxes(row.image_id, about.classes[k]), f" · heat of “{about['classes'][k]}”"
            rasters = [pictures.raster(values_t, found.cell_t4, COLUMNS, height)[::-1]
                       for values_t in found.above_ltc[:, :, k]]
            self.z = [(100 * raster / max(raster.max(), 1e-9)).round().astype(int) / 100 for raster in rasters]
        text = row.prompt if len(row.prompt) < 96 else row.prompt[:95] + "…"
        self.title = f"“{text.replace(chr(10), ' ')}”{heat}"

    def state(self, curves: int) -> tuple[list[dict], dict]:
        """Properties of each trace, and the layout, with the last layer chosen."""
        x = np.arange(len(self.p_lc))
        outline = [[], []]
        for left, top, right, bottom in self.boxes:
            outline[0] += [self.ratio * v for v in (left, right, right, left, left)] + [None]
            outline[1] += [1 - v for v in (top, top, bottom, bottom, top)] + [None]
        lines = [{"x": x, "y": self.p_lc[:, c], "name": self.names[c], "line": {"dash": self.dashes[c]},
                  "showlegend": True} if c < len(self.names) else {"x": [None], "y": [None], "name": "",
                                                                    "line": {"dash": "solid"}, "showlegend": False}
                 for c in range(curves)]
        picture = "data:image/jpeg;base64," + base64.b64encode(pictures.jpeg(self.image)).decode()
        steps = [{"label": str(k), "method": "restyle", "args": [self._at(k), [0, curves + 2]]} for k in x]
        slider = {"steps": steps, "active": len(x) - 1, "currentvalue": {"prefix": "layer "}, "pad": {"t": 50}}
        layout = {"title.text": self.title, "sliders": [slider], "xaxis.range": [0, self.ratio], "images": [{
            "source": picture, "xref": "x", "yref": "y", "x": 0, "y": 1, "sizex": self.ratio, "sizey": 1,
            "sizing": "stretch", "layer": "below"}]}
        last = self._at(len(x) - 1)
        heat = {"x": last["x"][0], "y": self._rows(), "z": last["z"][0]}
        drawn = {"x": outline[0] or [None], "y": outline[1] or [None], "showlegend": False}
        return [heat, drawn, *lines, {"x": last["x"][1], "y": [0, 1], "showlegend": False}], layout

    def _rows(self) -> np.ndarray:
        height = len(self.z[0]) if self.z else 1
        return (np.arange(height) + 0.5) / height

    def _at(self, k: int) -> dict[str, list]:
        """What changes with the layer: the heat, and the mark on the curve."""
        columns = (np.arange(COLUMNS) + 0.5) / COLUMNS * self.ratio
        return {"z": [self.z[k] if self.z else [[None] * COLUMNS], None], "x": [columns, [int(k), int(k)]]}


def _columns(traces: list[dict]) -> dict[str, list]:
    """Properties of all traces as plotly's update takes them: a list for each property."""
    names = {f"{name}.{inner}" if isinstance(value, dict) else name for trace in traces
             for name, value in trace.items() for inner in (value if isinstance(value, dict) else [""])}

    def of(trace: dict, name: str):
        outer, _, inner = name.partition(".")
        value = trace.get(outer)
        return value.get(inner) if inner and value else value

    return {name: [of(trace, name) for trace in traces] for name in names}
