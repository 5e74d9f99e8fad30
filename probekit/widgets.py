"""The explorer in JupyterLab: one example, one layer, and what the probe makes of it there."""

from __future__ import annotations

import html
import traceback
from collections.abc import Callable
from io import BytesIO

import ipywidgets as w
import numpy as np
import pandas as pd

from probekit import coco, paths
from probekit.plots import GREY, GRID, INK, PALETTE
from probekit.results import Results

CURVE = (560, 300)  # pixels
TABLE = ("<style>.probekit td,.probekit th{padding:2px 14px 2px 0;text-align:left;line-height:1.3}"
         ".probekit{border-collapse:collapse}</style>")
MARGIN = (58, 14, 18, 40)  # left, right, top, bottom


def curve_svg(p_lc: np.ndarray, names: list[str], layer: int, labels: np.ndarray) -> str:
    """Probability of "yes" by layer as an SVG picture, one line a class, the chosen layer marked.

    Parameters
    ----------
    p_lc : (l, c) probabilities
    names, labels : (c,) what the lines are called, and their true labels
    layer : place of the chosen layer
    """
    (width, height), (left, right, top, bottom) = CURVE, MARGIN
    x = left + np.arange(len(p_lc)) * (width - left - right) / max(1, len(p_lc) - 1)
    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = top + (1 - value) * (height - top - bottom)
        dash = ' stroke-dasharray="4 4"' if value == 0.5 else ""
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" '
                     f'stroke="{GREY if dash else GRID}"{dash}/>'
                     f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    step = max(1, len(p_lc) // 10)
    parts += [f'<text x="{x[k]:.1f}" y="{height - bottom + 18}" text-anchor="middle">{k}</text>'
              for k in range(0, len(p_lc), step)]
    parts.append(f'<rect x="{x[layer] - 5:.1f}" y="{top}" width="10" height="{height - top - bottom}" fill="#ffe8b3"/>'
                 f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">decoder layer</text>'
                     f'<text transform="translate(12 {height / 2}) rotate(-90)" text-anchor="middle">p(yes)</text>')
    for c, name in enumerate(names):
        y = top + (1 - p_lc[:, c]) * (height - top - bottom)
        colour, dash = PALETTE[c % len(PALETTE)], "" if labels[c] else ' stroke-dasharray="6 4"'
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"{dash}/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{6 if k == layer else 3}" fill="{colour}"><title>'
                  f'{html.escape(name)}, layer {k}: {p_lc[k, c]:.3f}</title></circle>'
                  for k, (a, b) in enumerate(zip(x, y, strict=True))]
    return (f'<svg width="100%" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" style="font:12px '
            f'sans-serif;fill:{INK};background:white;max-width:{width}px">{"".join(parts)}</svg>')


class Explorer:
    """Choose model, task, probe, example and layer; see image, prompt, labels and the probability by layer.

    Parameters
    ----------
    results : of a run
    examples : its examples table

    Attributes
    ----------
    view : the widget to display
    """

    def __init__(self, results: Results, examples: pd.DataFrame):
        self.predictions = results.predictions
        keys = [key.split("|") for key in self.predictions]
        self.tests = {name: examples[(examples.task == name) & (examples.split == "test")].reset_index(drop=True)
                      for name in examples.attrs["tasks"]}
        self.about = examples.attrs["tasks"]
        self.model = w.Dropdown(description="model", options=list(dict.fromkeys("|".join(k[:3]) for k in keys)))
        self.model.options = [(_model_words(v), v) for v in self.model.options]
        self.task = w.Dropdown(description="task", options=list(dict.fromkeys(k[3] for k in keys)))
        self.probe = w.Dropdown(description="probe", options=sorted({k[4] for k in keys}, reverse=True))
        wide = w.Layout(width="98%")
        self.example = w.IntSlider(description="example", min=0, max=0, layout=wide)
        self.layer = w.IntSlider(description="layer", min=0, max=0, layout=wide)
        self.image = w.Image(format="jpeg", layout=w.Layout(width="320px", height="auto"))
        self.words, self.curve, self.trouble = w.HTML(), w.HTML(), w.HTML()
        for chooser in (self.model, self.task, self.probe):
            chooser.observe(self._shown(self._choose), "value")
        self.example.observe(self._shown(self._show_example), "value")
        self.layer.observe(self._shown(self._show_layer), "value")
        left = w.VBox([self.image, self.words], layout=w.Layout(flex="0 0 340px"))
        right = w.VBox([self.example, self.layer, self.curve], layout=w.Layout(flex="1 1 360px"))
        self.view = w.VBox([w.HBox([self.model, self.task, self.probe]), w.HBox([left, right]), self.trouble])
        self._choose()
        self.layer.value = self.layer.max

    def _shown(self, work: Callable[[], None]) -> Callable:
        """Run `work` on a change; an exception is shown below the widgets, where it would vanish otherwise."""

        def callback(change) -> None:
            try:
                work()
                self.trouble.value = ""
            except Exception:
                self.trouble.value = f"<pre style='color:#b00020'>{html.escape(traceback.format_exc())}</pre>"

        return callback

    @property
    def p_lnc(self) -> np.ndarray:
        key = f"{self.model.value}|{self.task.value}|{self.probe.value}"
        if key not in self.predictions:
            raise KeyError(f"no {self.probe.value} probe of {_model_words(self.model.value)}, {self.task.value}")
        return self.predictions[key]

    def _choose(self) -> None:
        layers, n, _ = self.p_lnc.shape
        self.example.max, self.layer.max = n - 1, layers - 1
        self._show_example()

    def _show_example(self) -> None:
        row = self.tests[self.task.value].iloc[self.example.value]
        buffer = BytesIO()
        coco.load_rgb(paths.resolve(row.file), longest_side=480).save(buffer, "jpeg", quality=88)
        self.image.value = buffer.getvalue()
        self._show_layer()

    def _show_layer(self) -> None:
        row = self.tests[self.task.value].iloc[self.example.value]
        asked = np.flatnonzero(row["mask"])
        names = [self.about[self.task.value]["classes"][k] for k in asked]
        p_lc = self.p_lnc[:, self.example.value, asked].astype(float)
        labels = np.array(row.labels)[asked]
        self.curve.value = curve_svg(p_lc, names, self.layer.value, labels)
        told = "".join(
            f"<tr><td>{_swatch(c)}{html.escape(name)}</td><td>{'yes' if y else 'no'}</td>"
            f"<td>{p:.2f}</td><td>{'✓' if (p >= 0.5) == bool(y) else '✗'}</td></tr>"
            for c, (name, y, p) in enumerate(zip(names, labels, p_lc[self.layer.value], strict=True)))
        head = "<tr><th>scored</th><th>truth</th><th>p(yes)</th><th>right?</th></tr>"
        self.words.value = (f"{TABLE}<p style='line-height:1.35'><b>Prompt</b> {html.escape(row.prompt)}</p>"
                            f"<table class='probekit'>{head}{told}</table>")


def _swatch(c: int) -> str:
    return f"<span style='color:{PALETTE[c % len(PALETTE)]}'>■</span> "


def _model_words(key: str) -> str:
    model, control, pooling = key.split("|")
    return f"{model}{'' if control == 'none' else f' ({control})'}, {pooling}"
