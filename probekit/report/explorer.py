"""The explorer in JupyterLab: one example, one layer, what the probe makes of it there, and where in the image."""

from __future__ import annotations

import html
import traceback
from collections.abc import Callable

import ipywidgets as w
import numpy as np

from probekit.models.token_grid import NoTokenGrid
from probekit.probes.localisation import POOLINGS, HeatMap, shares
from probekit.report import pictures, saved_run
from probekit.report.example_search import ORDERS, find
from probekit.report.style import PALETTE

TABLE = ("<style>.probekit td,.probekit th{padding:1px 14px 1px 0;text-align:left;line-height:1.35}"
         ".probekit{border-collapse:collapse}.probekit-near{display:flex;gap:8px}"
         ".probekit-near div{width:104px;font-size:11px;line-height:1.25;overflow-wrap:anywhere}</style>")
ANY = "any"


class NothingFound(ValueError):
    """No example has the words and the category that were asked for."""


class Explorer:
    """Choose run, model, task, example and layer; see image, prompt, labels, the probability by layer, and the heat.

    Parameters
    ----------
    run : name of a run; others can be chosen

    Attributes
    ----------
    view : the widget to display
    """

    def __init__(self, run: str):
        self.data, self._quiet = saved_run.SavedRun.open(run), False
        self._make()
        self._wire()
        self._fill()
        self.layer.value = self.layer.max
        self._show_layer()

    # ------------------------------------------------------------------------------------------------------- widgets

    def _make(self) -> None:
        wide, narrow = w.Layout(width="98%"), w.Layout(width="250px")
        self.run = w.Dropdown(description="run", options=[*dict.fromkeys([self.data.name, *saved_run.names()])],
                              layout=narrow)
        self.model, self.task, self.probe = (w.Dropdown(description=name, layout=narrow)
                                             for name in ("model", "task", "probe"))
        self.order = w.Dropdown(description="order", options=list(ORDERS), layout=narrow)
        self.category = w.Dropdown(description="shows", options=[ANY], layout=narrow)
        self.search = w.Text(description="search", placeholder="words in the prompt", continuous_update=False,
                             layout=narrow)
        self.found = w.Label()
        self.example, self.layer = (w.IntSlider(description=name, min=0, max=0, layout=wide)
                                    for name in ("example", "layer"))
        self.image, self.near = w.Image(format="jpeg", layout=w.Layout(width="100%")), w.Image(format="jpeg")
        self.where = w.Dropdown(description="category", options=[], layout=w.Layout(width="210px"))
        self.warm, self.boxes, self.live = (
            w.Checkbox(value=value, description=name, indent=False, layout=w.Layout(width="auto"))
            for name, value in (("heat", True), ("boxes", True), ("run the model where none is kept", False)))
        self.seen = w.VBox([w.HBox([self.where, self.warm, self.boxes]), self.live])
        self.words, self.curve, self.share, self.trouble, self.near_words = (w.HTML() for _ in range(5))
        left = w.VBox([self.image, self.seen, self.share], layout=w.Layout(flex="0 0 400px"))
        right = w.VBox([self.example, self.layer, self.curve, self.words], layout=w.Layout(flex="1 1 380px"))
        self.view = w.VBox([
            w.HBox([self.run, self.model, self.task, self.probe], layout=w.Layout(flex_flow="row wrap")),
            w.HBox([self.order, self.category, self.search, self.found], layout=w.Layout(flex_flow="row wrap")),
            self.trouble, w.HBox([left, right]), w.HTML("<b>Nearest in this layer</b>"), self.near, self.near_words])

    def _wire(self) -> None:
        self.run.observe(self._shown(self._open), "value")
        for chooser in (self.model, self.task, self.probe):
            chooser.observe(self._shown(self._choose), "value")
        for chooser in (self.order, self.category, self.search):
            chooser.observe(self._shown(self._find), "value")
        self.example.observe(self._shown(self._show_example), "value")
        self.layer.observe(self._shown(self._show_layer), "value")
        self.live.observe(self._shown(self._show_example), "value")
        for chooser in (self.where, self.warm, self.boxes):
            chooser.observe(self._shown(self._show_layer), "value")

    def _shown(self, work: Callable[[], None]) -> Callable:
        """Run `work` on a change, without what it changes itself calling back; an exception is shown in the notebook,
        where it would vanish otherwise.
        """

        def callback(change) -> None:
            if self._quiet:
                return
            self._quiet = True
            try:
                work()
                self.trouble.value = ""
            except NothingFound as nothing:
                self.trouble.value = f"<i>{nothing}</i>"
            except Exception:
                self.trouble.value = f"<pre style='color:#b00020'>{html.escape(traceback.format_exc())}</pre>"
            finally:
                self._quiet = False

        return callback

    # ------------------------------------------------------------------------------------------------ what is chosen

    @property
    def key(self) -> str:
        return f"{self.model.value}|{self.task.value}"

    @property
    def p_lnc(self) -> np.ndarray:
        found = self.data.results.predictions.get(f"{self.key}|{self.probe.value}")
        if found is None:
            raise KeyError(f"no {self.probe.value} probe of {_model_words(self.model.value)}, {self.task.value}")
        return found

    @property
    def place(self) -> int:
        """Of the chosen example among the test examples of its task."""
        if not len(self.places):
            raise NothingFound("no example is like that: take other words, or another category")
        return int(self.places[self.example.value])

    def _open(self) -> None:
        try:
            self.data = saved_run.SavedRun.open(self.run.value)
        finally:  # where it cannot be opened, the one that is shown stays
            self.run.value = self.data.name
        self._fill()

    def _fill(self) -> None:
        """What a run has to choose from."""
        self._quiet, keys = True, [key.split("|") for key in self.data.results.predictions]
        models = list(dict.fromkeys("|".join(key[:3]) for key in keys))
        if not models:
            raise ValueError(f"{self.data.name} has no predictions of decoder layers: extract with the stage lm")
        several = len({model.split("|")[2] for model in models}) > 1
        _offer(self.model, [(_model_words(model, several), model) for model in models])
        _offer(self.task, list(dict.fromkeys(key[3] for key in keys)))
        _offer(self.probe, sorted({key[4] for key in keys}, key=lambda name: name != "logreg"))
        _offer(self.category, [ANY, *sorted(self.data.instances.category.unique())])
        self._choose()
        self._quiet = False

    @property
    def about(self) -> dict:
        """Kind and classes of the chosen task."""
        return self.data.tasks[self.task.value]

    def _choose(self) -> None:
        local = self.about.kind == "multilabel"
        self.seen.layout.display = None if local else "none"
        if local and self.where.options != tuple(self.about.classes):
            _offer(self.where, self.about.classes)
        self.rows = self.data.tests(self.task.value)
        self.asked = [np.flatnonzero(mask) for mask in self.rows["mask"]]
        self.layer.max = len(self.p_lnc) - 1
        self._find()

    def _find(self) -> None:
        shown = self.data.instances
        images = None if self.category.value == ANY else set(
            shown.image_id[shown.category == self.category.value])
        self.places = find(self.rows, self.p_lnc, self.order.value, self.search.value, images)
        self.found.value = f"{len(self.places):,} of {len(self.rows):,} examples"
        self.example.value, self.example.max = 0, max(0, len(self.places) - 1)
        self._show_example()

    # ---------------------------------------------------------------------------------------------------- what is seen

    def _show_example(self) -> None:
        row, task, pooling = self.rows.iloc[self.place], self.about, self.model.value.rpartition("|")[2]
        local, self.there = task.kind == "multilabel", self.data.shown(row.image_id)
        if local and self.where.value not in self.there:
            asked = [task.classes[k] for k in self.asked[self.place] if row.labels[k]]
            known = [name for name in self.there if name in task.classes]
            self.where.value = next(iter([*asked, *known]), task.classes[0])
        self._heat: HeatMap | None = None
        self._why_cold = "" if local else "Image tokens stand before the text: only category tasks have heat."
        if local and (pooling not in POOLINGS or self.probe.value != "logreg"):
            self._why_cold = f"Heat is of logreg probes on states pooled as {' or '.join(POOLINGS)}."
        elif local:
            try:
                self._heat = self.data.heat(self.key, row, self.live.value)
                self._why_cold = "No heat is kept for this example: tick “run the model where none is kept”."
            except NoTokenGrid as error:
                self._why_cold = html.escape(str(error))
        self._show_layer()

    def _show_layer(self) -> None:
        row, place, layer = self.rows.iloc[self.place], self.place, self.layer.value
        self._show_photo(row, layer)  # first what takes the browser longest
        asked, task = self.asked[place], self.about
        names = [task.classes[k] for k in asked]
        p_lc, labels = self.p_lnc[:, place, asked].astype(float), np.array(row.labels)[asked]
        self.curve.value = pictures.curve_svg(p_lc, names, layer, labels)
        told = "".join(
            f"<tr><td>{_swatch(c)}{html.escape(name)}</td><td>{'yes' if y else 'no'}</td>"
            f"<td>{p:.2f}</td><td>{'✓' if (p >= 0.5) == bool(y) else '✗'}</td></tr>"
            for c, (name, y, p) in enumerate(zip(names, labels, p_lc[layer], strict=True)))
        head = f"<tr><th>scored</th><th>truth</th><th>p(yes), lm.{layer:02d}</th><th>right?</th></tr>"
        self.words.value = (f"{TABLE}<p style='line-height:1.35'><b>Prompt</b> {html.escape(row.prompt)}<br>"
                            f"<b>In the image</b> {html.escape(', '.join(self.there)) or 'nothing that is asked'}</p>"
                            f"<table class='probekit'>{head}{told}</table>")
        self._show_near(place, layer)

    def _show_photo(self, row, layer: int) -> None:
        task, name, heat, cells = self.about, self.where.value, None, None
        local, told = task.kind == "multilabel", self._why_cold
        boxes = self.data.boxes(row.image_id, name) if local else np.zeros((0, 4))
        if self._heat is not None:
            of = task.classes.index(name)
            values, cells = self._heat.above_ltc[layer, :, of], self._heat.cell_t4
            heat = values / max(values.max(), 1e-9) if self.warm.value else None
            share = shares(self._heat, boxes)
            told = (f"<b>{share[0][layer, of]:.0%}</b> of the heat of {html.escape(name)} at lm.{layer:02d} is in its "
                    f"boxes, which hold {share[1]:.0%} of the tokens."
                    if share else f"No box here tells {html.escape(name)} from the rest of the image.")
        self.share.value = told
        image = pictures.overlaid(pictures.photo(row.file), heat, cells, boxes if self.boxes.value else boxes[:0])
        self.image.value = pictures.jpeg(image)

    def _show_near(self, place: int, layer: int) -> None:
        found = self.data.results.neighbours.get(self.key)
        near = self.rows.iloc[found[layer, place]] if found is not None else self.rows.iloc[:0]
        own = self.rows.iloc[place]
        strip = pictures.thumbnails(near.file.tolist())
        self.near.value = pictures.jpeg(strip)
        self.near.layout.width = f"{strip.width}px" if len(near) else "0"
        self.near_words.value = "<div class='probekit-near'>" + "".join(
            f"<div>{self._truth(row)}{'<br><i>same image</i>' if row.image_id == own.image_id else ''}</div>"
            for row in near.itertuples()) + "</div>"

    def _truth(self, row) -> str:
        """What a neighbour is, in few words: of a global task its label and prompt, of a local one what it shows."""
        task = self.about
        if task.kind == "binary":
            return f"<b>{'yes' if row.labels[0] else 'no'}</b> {html.escape(row.prompt[:90])}"
        return html.escape(", ".join(name for name, y in zip(task.classes, row.labels, strict=True) if y))


def _offer(chooser: w.Dropdown, options: list) -> None:
    """Other options, and the first of them chosen."""
    chooser.options = options
    chooser.index = 0


def _swatch(c: int) -> str:
    return f"<span style='color:{PALETTE[c % len(PALETTE)]}'>■</span> "


def _model_words(key: str, pooling_too: bool = True) -> str:
    model, control, pooling = key.split("|")
    return f"{model}{'' if control == 'none' else f' ({control})'}{f', {pooling}' if pooling_too else ''}"
