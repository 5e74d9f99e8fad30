"""Which figures a run has, in which order, and how to read each."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from probekit.probes.results import HEADLINE, ProbeResults
from probekit.report import comparisons, curves, heatmaps
from probekit.report.style import WORDS
from probekit.tasks.base import TaskInfo


class Figure(NamedTuple):
    """A figure, how to read it, and under which heading it stands."""

    figure: go.Figure
    caption: str
    section: str


BANDS = ("Bands are 95 % bootstrap intervals over test images. Highlighted layers cannot be told from the best one "
         "(99 % confidence). Dashed lines are controls, which should lie at chance or bound what a score means.")


def run_figures(whole: ProbeResults, tasks: dict[str, TaskInfo], probe: str = "logreg", published: bool = False,
                relative: bool = False) -> dict[str, Figure]:
    """Every figure that a run's tables have something for: name to :class:`Figure`, first what they all come to.

    Parameters
    ----------
    tasks : kind and classes by task, see :func:`probekit.tasks.base.task_infos`
    published : overlay the published study's numbers
    relative : begin with relative depth on the axis
    """
    table, figures = whole.metrics, {}
    if {"binary", "multilabel"} <= {about.kind for about in tasks.values()}:
        figures["global_and_local"] = Figure(comparisons.global_and_local(table, tasks, probe), (
            "Left: both kinds of semantics by layer, both by accuracy, with chance at one half where labels are "
            "balanced; stars are where each peaks. Right: each point is a layer, at its scores in both. A way that "
            "leads up and to the right gains both; where it turns left or down, one is traded for the other."),
            "Global and local")
    asked = [name for name in tasks if name.startswith("caption")]
    if len(asked) > 1:
        figures["negatives"] = Figure(comparisons.task_curves(table, asked, probe), (
            "The same question with wrong captions of several kinds, from easy to hard: of any other image (caption), "
            "the most similar of another one, of one with the same categories, and the right one with two words "
            "exchanged. Dotted: what the captions alone say, by their words and word order; only what lies above it "
            "needs the image."),
            "Global and local")
    for task, about in tasks.items():
        figures |= _of_task(table, whole, task, about, probe, published, relative)
    for task in dict.fromkeys(table.task[table.metric == "heat_in_boxes"]):
        figures[f"{task}_localisation"] = Figure(curves.localisation_curves(table, task, relative), (
            "The local logreg probe asked of every image token. Heat is what a token says for a category above the "
            "image's mean; drawn is the share of it that lies in the boxes of that category's instances, over all "
            "pairs of test image and category (bands: 95 % over images). The grey line is the share of tokens in the "
            "boxes. Dotted: probes of categories that the image does not show, in the same boxes: an object stands out "
            "from its background, whatever it is, and only what lies above that is about the category. Dashed: random "
            "weights."),
            "Where in the image")
    return figures


def _of_task(table: pd.DataFrame, whole: ProbeResults, task: str, about: TaskInfo, probe: str, published: bool, relative: bool
             ) -> dict[str, Figure]:
    own = table[table.task == task]
    parts = _scores(table, own, task, about, probe, published, relative)
    parts |= _details(table, own, whole, task, about, probe)
    return {f"{task}_{name}": Figure(figure, caption, f"{task}: {about['question']}")
            for name, (figure, caption) in parts.items()}


def _scores(table: pd.DataFrame, own: pd.DataFrame, task: str, about: TaskInfo, probe: str, published: bool, relative: bool
            ) -> dict[str, tuple[go.Figure, str]]:
    """What the probes of a task score, layer by layer."""
    metric, binary, found = HEADLINE[about.kind], about.kind == "binary", {}

    def curve(name: str, **options) -> go.Figure:
        return curves.layer_curves(table, task, name, probe, relative=relative, **options)

    found[metric] = (curve(metric, published=published, chance=0.5 if binary else None),
                     f"{about['question']} The {WORDS[metric]} of a probe on each layer. {BANDS}")
    if not binary:  # where the guesses from the training labels can be drawn, too
        found["accuracy"] = (curve("accuracy", published=published, chance=0.5),
                             f"The share of right answers over everything that is asked. {BANDS}")
    if not binary and published:  # what the study calls macro-F1 is micro-F1
        found["f1_micro"] = (curve("f1_micro", published=True),
                             "F1 over the pooled counts of all categories, which is what the study reports.")
    if ((own.probe == probe) & (own.metric == "selectivity")).any():
        found["selectivity"] = (curve("selectivity"), (
            "Accuracy minus that of the same probe on a control task, whose labels are arbitrary and can only be "
            "learnt by heart: what a layer gives beyond what the probe could memorise."))
    if (own.metric == "codelength").any() and probe == "logreg":
        found["codelength"] = (curve("codelength", split="train"), (
            "How many bits a label takes, given the states: each block of training labels is sent with a probe that "
            "has seen the blocks before it. The uniform code takes 1; lower is easier to extract."))
    if own.pooling.nunique() > 1:
        found["poolings"] = (comparisons.pooling_curves(table, task, metric, probe),
                             "How tokens become one vector: the same probe on each pooling. Bands are 95 % intervals.")
    if own.stage.nunique() > 1:
        found["stages"] = (comparisons.stage_curves(table, task, metric, probe), (
            "From the image's patches to the last decoder layer: image encoder and projector see the image alone, so "
            "they can know which categories are there, but nothing of a caption."))
    return found


def _details(table: pd.DataFrame, own: pd.DataFrame, whole: ProbeResults, task: str, about: TaskInfo, probe: str
             ) -> dict[str, tuple[go.Figure, str]]:
    """What is behind the scores: classes, kinds of errors, other layers, training."""
    binary, found = about.kind == "binary", {}
    metrics = [f"{name}_{'positive' if binary else 'macro'}" for name in ("precision", "recall", "f1")]
    found["scores"] = (heatmaps.score_heatmap(table, task, metrics, probe),
                       "Each cell is one layer's probe on the test images; darker is better.")
    if not binary:
        what = "category" if about.kind == "multilabel" else "answer"
        found["classes"] = (heatmaps.class_heatmap(table, task, probe, what), (
            f"One row for each {what}, the best known on top; hover for precision, recall and how many labels that "
            "rests on. With few labels a cell is noise."))
    found["confusion"] = (heatmaps.confusion_counts(table, task, probe), (
        "How many answers are right and wrong, and which way. Oranges that differ in height are a probe that prefers "
        "yes, or no."))
    if len(whole.transfer) and (whole.transfer.task == task).any():
        found["transfer"] = (heatmaps.transfer_heatmap(whole.transfer, task), (
            "Logreg probes. Row: the layer that a probe was trained on; column: the layer whose states it reads, "
            "standardised as their own. Blocks of one colour are layers that keep the same code; a dark diagonal "
            "alone is layers that each write it anew."))
    losses = whole.losses[whole.losses.task == task] if len(whole.losses) else whole.losses
    for kind in losses.probe.unique() if len(losses) else ():
        figure = curves.loss_curves(whole.losses, table, task, HEADLINE[about.kind], kind)
        found["losses" + f"_{kind}" * (kind != "linear")] = (figure, (
            "Move the slider through the layers. Training loss is measured with dropout, while the weights change; "
            "validation loss after each epoch. A curve that still falls at the last epoch is a probe that has not "
            "converged. The slider opens at the best layer of the first model, on validation."))
    return found
