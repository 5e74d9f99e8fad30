"""The explorer without a kernel: a few examples in one plotly figure with a menu and a slider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probekit.answers.scores import Said, lens_probabilities, said_probabilities
from probekit.probes.localisation import HeatMap
from probekit.probes.results import ProbeKey, StateKey
from probekit.report import pictures
from probekit.report.example_search import KNOWN_NOT_SAID, SORT_KEYS, find_examples
from probekit.report.figures import SINGLE_EXAMPLES, Figure
from probekit.report.saved_run import SavedRun
from probekit.report.style import FULL_PAGE, LAYER_AXIS, PALETTE, apply_style, tick_step

HEAT_COLUMNS = 24  # of the raster that heat is drawn on
PHOTO_SIDE = 400  # pixels
LONGEST_TITLE = 96  # characters of a prompt
PROBE = "logreg"  # heat is of these probes


def page_explorers(run: SavedRun) -> dict[str, Figure]:
    """Draw an :func:`example_figure` for each trained model of a run that has logreg probes.

    Parameters
    ----------
    run : SavedRun
        The run.

    Returns
    -------
    dict of str to Figure
        By name.
    """
    figures = {}
    for model in dict.fromkeys(key.model for key in run.results.predictions):
        if not _states_to_show(run, model):
            continue
        figures[f"explorer_{model}"] = Figure(
            example_figure(run, model),
            f"{model}, logreg probes. Choose an example above the photo, and move the slider "
            "through the layers. Left: heat of the category in the title, as this layer's local "
            "probe scores each image token, with the category's boxes. Right: the probability "
            "that each probe gives its class; full lines are truly yes, dashed ones truly no. The "
            "thin line is what each layer would answer through the lens; it ends in what the model "
            "says. "
            "“Most surprising” examples are those where the last layer is surest of a wrong "
            "answer; “earliest decided” ones keep their answers from an early layer on; those that "
            "are “known, but answered wrongly” the probe of the last layer gets right, and the "
            "model does not.",
            SINGLE_EXAMPLES,
            SINGLE_EXAMPLES,
        )
    return figures


def example_figure(run: SavedRun, model: str, *, examples_per_order: int = 2) -> go.Figure:
    """Draw some examples: a photo with heat and boxes (left), and probability by layer (right).

    A menu chooses the example, a slider the layer. Examples are the first ones of each sorted
    order (:data:`probekit.report.example_search.SORT_KEYS`), of the first local task and of the
    first global one.

    Parameters
    ----------
    run : SavedRun
        The run.
    model : str
        A trained model of the run.
    examples_per_order : int
        Number of examples of each order and task.

    Returns
    -------
    Figure
        Two panels.
    """
    examples = []
    addresses = []  # by which a link names an example
    for state in _states_to_show(run, model):
        for order, place in _choose_examples(run, state, count=examples_per_order):
            examples.append(_read_example(run, state, place, label=f"{state.task}: {order}"))
            image_id = run.test_examples(state.task).image_id.iloc[place]
            addresses.append({"task": state.task, "order": order, "image": str(image_id)})
    first = examples[0]
    last_layer = len(first.p_lc) - 1
    curve_count = max(len(example.class_names) for example in examples)

    figure = _empty_figure(curve_count)
    traces_of_first = _trace_properties(first, curve_count=curve_count)
    layout_of_first = _layout_properties(first, curve_count=curve_count)
    for trace, properties in zip(figure.data, traces_of_first, strict=True):
        trace.update(properties)
    apply_style(figure, title=first.title, height=520, width=FULL_PAGE)
    figure.update_layout(meta={"width": FULL_PAGE, "model": model, "examples": addresses})
    figure.update_xaxes(visible=False, range=[0, first.width], constrain="domain", row=1, col=1)
    figure.update_yaxes(
        visible=False, range=[0, 1], scaleanchor="x", constrain="domain", row=1, col=1
    )
    figure.update_xaxes(title=LAYER_AXIS, dtick=tick_step(last_layer + 1), row=1, col=2)
    figure.update_yaxes(title="p(yes)", range=[-0.03, 1.03], row=1, col=2)

    buttons = []
    for example in examples:
        traces = _trace_properties(example, curve_count=curve_count)
        layout = _layout_properties(example, curve_count=curve_count)
        button = {
            "label": example.label,
            "method": "update",
            "args": [_by_property(traces), layout],
        }
        buttons.append(button)
    menu = {
        "buttons": buttons,
        "x": 0,
        "xanchor": "left",
        "y": 1.13,
        "yanchor": "bottom",
        "showactive": True,
    }
    figure.update_layout(
        updatemenus=[menu],
        margin={"t": 118, "b": 110, "l": 20},
        title={"font": {"size": 14}},
    )
    flat_layout = {name.replace(".", "_"): value for name, value in layout_of_first.items()}
    return figure.update_layout(flat_layout)


def _empty_figure(curve_count: int) -> go.Figure:
    """Return a figure with the traces: heat, boxes, a curve per class, lens, the layer's mark."""
    figure = make_subplots(1, 2, column_widths=[0.45, 0.55], horizontal_spacing=0.09)
    figure.add_heatmap(
        colorscale=pictures.plotly_heat_scale(),
        zmin=0,
        zmax=1,
        showscale=False,
        zsmooth="best",
        hoverinfo="skip",
        row=1,
        col=1,
    )
    figure.add_scatter(
        mode="lines",
        line={"color": "white", "width": 2.5},
        hoverinfo="skip",
        showlegend=False,
        row=1,
        col=1,
    )
    for c in range(curve_count):
        figure.add_scatter(
            mode="lines+markers",
            line={"color": PALETTE[c], "width": 2.5},
            hovertemplate="layer %{x}<br>p(yes) %{y:.3f}<extra></extra>",
            row=1,
            col=2,
        )
    figure.add_scatter(
        mode="lines",
        line={"color": PALETTE[2], "width": 1.2},
        hovertemplate="layer %{x}<br>lens: p(yes) %{y:.3f}<extra></extra>",
        row=1,
        col=2,
    )
    figure.add_scatter(
        y=[0, 1],
        mode="lines",
        line={"color": "#E69F00", "width": 9},
        opacity=0.35,
        hoverinfo="skip",
        showlegend=False,
        row=1,
        col=2,
    )
    return figure


# ------------------------------------------------------------------------ which examples to show


def _states_to_show(run: SavedRun, model: str) -> list[StateKey]:
    """Return the states of the first local task and of the first global one.

    States with stored heat come before others.
    """
    states = [
        key.state
        for key in run.results.predictions
        if key.model == model and key.control == "none" and key.probe == PROBE
    ]
    first_of_kind: dict[str, StateKey] = {}
    for state in sorted(states, key=lambda state: _heat_key(state) not in run.stored_heat.files):
        kind = run.results.tasks[state.task].kind
        first_of_kind.setdefault(kind, state)
    return [first_of_kind[kind] for kind in ("multilabel", "binary") if kind in first_of_kind]


def _heat_key(state: StateKey) -> ProbeKey:
    return ProbeKey(*state, PROBE)


def _choose_examples(run: SavedRun, state: StateKey, *, count: int) -> list[tuple[str, int]]:
    """Return `count` examples of each order as (order, place among the test examples).

    Each image occurs once. Where some examples have stored heat, only those count.
    """
    rows = run.test_examples(state.task)
    p_lnc = run.results.predictions[ProbeKey(*state, PROBE)]

    def has_heat(image_id: int) -> bool:
        return run.stored_heat.get(_heat_key(state), image_id) is not None

    needs_heat = any(has_heat(image_id) for image_id in rows.image_id.unique())
    selected: list[tuple[str, int]] = []
    used_images = set()
    said_nc = said_probabilities(run.results, state)
    orders = [*SORT_KEYS]
    is_known_not_said_n = np.zeros(len(rows), bool)
    if said_nc is not None and run.results.tasks[state.task].kind == "binary":
        orders.append(KNOWN_NOT_SAID)
        is_yes_n = np.array(rows.labels.tolist())[:, 0] > 0
        is_known_n = (p_lnc[-1, :, 0] >= 0.5) == is_yes_n
        is_known_not_said_n = is_known_n & ((said_nc[:, 0] >= 0.5) != is_yes_n)
    for order in orders:
        count_of_order = 0
        for place in find_examples(rows, p_lnc, said_nc=said_nc, order=order):
            image_id = rows.image_id.iloc[place]
            if image_id in used_images or (needs_heat and not has_heat(image_id)):
                continue
            if order == KNOWN_NOT_SAID and not is_known_not_said_n[place]:
                continue
            used_images.add(image_id)
            selected.append((order, int(place)))
            count_of_order += 1
            if count_of_order == count:
                break
    return selected


# ---------------------------------------------------------------------- what an example looks like


@dataclass(frozen=True)
class _Example:
    """One example as it is drawn.

    Attributes
    ----------
    label, title : str
        Its entry in the menu, and the figure's title.
    photo_url : str
        The photo as a data URL.
    width : float
        Width of the photo where its height is 1.
    class_names : list of str, (c,)
        The classes that count, each with its true label.
    is_yes : list of bool, (c,)
        The true labels.
    p_lc : ndarray, (l, c)
        Probabilities.
    lens_l : ndarray, (l,), or None
        Probability of yes through the lens; None where there is no lens or no one question.
    boxes_b4 : ndarray, (b, 4)
        Boxes of the category whose heat is drawn.
    heat_lhw : list of ndarray (h, w), or None
        By layer, from bottom to top, with two decimals; None without heat.
    """

    label: str
    title: str
    photo_url: str
    width: float
    class_names: list[str]
    is_yes: list[bool]
    p_lc: np.ndarray
    lens_l: np.ndarray | None
    boxes_b4: np.ndarray
    heat_lhw: list[np.ndarray] | None


def _read_example(run: SavedRun, state: StateKey, place: int, *, label: str) -> _Example:
    row = run.test_examples(state.task).iloc[place]
    info = run.results.tasks[state.task]
    counted = np.flatnonzero(row["mask"])
    is_yes = [bool(row.labels[c]) for c in counted]
    class_names = [f"{info.classes[c]}: {'yes' if row.labels[c] else 'no'}" for c in counted]
    photo = pictures.load_photo(run.home.resolve(row.file), PHOTO_SIDE)
    p_lnc = run.results.predictions[ProbeKey(*state, PROBE)]
    title = f"“{_shorten(row.prompt)}”"
    boxes_b4 = np.zeros((0, 4))
    heat_lhw = None
    heat_map = run.stored_heat.get(_heat_key(state), row.image_id)
    if heat_map is not None:
        c = int(counted[np.argmax(is_yes)])  # the first that is truly there, else the first
        category = info.classes[c]
        boxes_b4 = run.boxes(row.image_id, category)
        title += f" · heat of “{category}”"
        heat_lhw = _rasterise_layers(heat_map, c, width=photo.width / photo.height)
    said_nc = said_probabilities(run.results, state)
    if said_nc is not None:
        said = Said.of(said_nc[place], row, info)
        title += f" · the model says {said.words} ({said.p:.2f})"
    lens_lnc = lens_probabilities(run.results, state) if info.kind == "binary" else None
    return _Example(
        label=f"{label} — image {row.image_id}",
        title=title,
        photo_url=pictures.data_url(photo),
        width=photo.width / photo.height,
        class_names=class_names,
        is_yes=is_yes,
        p_lc=p_lnc[:, place, counted].astype(float),
        lens_l=None if lens_lnc is None else lens_lnc[:, place, 0].astype(float),
        boxes_b4=boxes_b4,
        heat_lhw=heat_lhw,
    )


def _shorten(prompt: str) -> str:
    if len(prompt) >= LONGEST_TITLE:
        prompt = prompt[: LONGEST_TITLE - 1] + "…"
    return prompt.replace("\n", " ")


def _rasterise_layers(heat_map: HeatMap, c: int, *, width: float) -> list[np.ndarray]:
    """Draw the heat of class `c` of each layer, the largest value 1, from bottom to top."""
    height = max(2, round(HEAT_COLUMNS / width))
    rasters = []
    for heat_tc in heat_map.heat_ltc:
        raster = pictures.interpolate(
            heat_tc[:, c], heat_map.cells_t4, width=HEAT_COLUMNS, height=height
        )[::-1]
        percent = (100 * raster / max(raster.max(), 1e-9)).round().astype(int)
        rasters.append(percent / 100)
    return rasters


# --------------------------------------------------------------------- what plotly needs for it


def _trace_properties(example: _Example, *, curve_count: int) -> list[dict[str, Any]]:
    """Return the properties of each trace of `_empty_figure`, at the last layer."""
    layers = len(example.p_lc)
    heat_height = len(example.heat_lhw[0]) if example.heat_lhw else 1
    at_last = _at_layer(example, layers - 1)
    heat = {
        "x": at_last.heat_x,
        "y": (np.arange(heat_height) + 0.5) / heat_height,
        "z": at_last.heat_hw,
    }
    box_x, box_y = _box_outlines(example)
    boxes = {"x": box_x or [None], "y": box_y or [None], "showlegend": False}
    curves: list[dict[str, Any]] = []
    for c in range(curve_count):
        if c < len(example.class_names):
            curve = {
                "x": np.arange(layers),
                "y": example.p_lc[:, c],
                "name": example.class_names[c],
                "line": {"dash": "solid" if example.is_yes[c] else "dash"},
                "showlegend": True,
            }
        else:
            curve = {
                "x": [None],
                "y": [None],
                "name": "",
                "line": {"dash": "solid"},
                "showlegend": False,
            }
        curves.append(curve)
    lens: dict[str, Any] = {"x": [None], "y": [None], "name": "", "showlegend": False}
    if example.lens_l is not None:
        lens = {"x": np.arange(layers), "y": example.lens_l, "name": "lens", "showlegend": True}
    layer_mark = {"x": at_last.mark_x, "y": [0, 1], "showlegend": False}
    return [heat, boxes, *curves, lens, layer_mark]


def _layout_properties(example: _Example, *, curve_count: int) -> dict[str, Any]:
    """Return title, photo, and a slider that stands at the last layer."""
    steps = []
    for layer in range(len(example.p_lc)):
        at_layer = _at_layer(example, layer)
        changes = {
            "z": [at_layer.heat_hw, None],
            "x": [at_layer.heat_x, at_layer.mark_x],
        }
        mark_number = curve_count + 3
        step = {"label": str(layer), "method": "restyle", "args": [changes, [0, mark_number]]}
        steps.append(step)
    slider = {
        "steps": steps,
        "active": len(steps) - 1,
        "currentvalue": {"prefix": "layer "},
        "pad": {"t": 50},
    }
    photo = {
        "source": example.photo_url,
        "xref": "x",
        "yref": "y",
        "x": 0,
        "y": 1,
        "sizex": example.width,
        "sizey": 1,
        "sizing": "stretch",
        "layer": "below",
    }
    return {
        "title.text": example.title,
        "sliders": [slider],
        "xaxis.range": [0, example.width],
        "images": [photo],
    }


class _AtLayer(NamedTuple):
    """What changes with the layer: the heat, and the mark on the curve."""

    heat_hw: np.ndarray | list[list[None]]
    heat_x: np.ndarray
    mark_x: list[int]


def _at_layer(example: _Example, layer: int) -> _AtLayer:
    heat_hw = example.heat_lhw[layer] if example.heat_lhw else [[None] * HEAT_COLUMNS]
    heat_x = (np.arange(HEAT_COLUMNS) + 0.5) / HEAT_COLUMNS * example.width
    return _AtLayer(heat_hw, heat_x, [layer, layer])


def _box_outlines(example: _Example) -> tuple[list[float | None], list[float | None]]:
    """Return x and y of the boxes' corners as one line; None lifts the pen."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for left, top, right, bottom in example.boxes_b4:
        xs += [example.width * x for x in (left, right, right, left, left)]
        ys += [1 - y for y in (top, top, bottom, bottom, top)]
        xs.append(None)
        ys.append(None)
    return xs, ys


def _by_property(traces: list[dict[str, Any]]) -> dict[str, list]:
    """Return the properties of all traces as plotly's update takes them: a list per property."""
    flat_traces = []
    for properties in traces:
        flat = {}
        for name, value in properties.items():
            if isinstance(value, dict):
                for inner_name, inner_value in value.items():
                    flat[f"{name}.{inner_name}"] = inner_value
            else:
                flat[name] = value
        flat_traces.append(flat)
    names = dict.fromkeys(name for flat in flat_traces for name in flat)
    return {name: [flat.get(name) for flat in flat_traces] for name in names}
