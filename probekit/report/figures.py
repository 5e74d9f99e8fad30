"""Which figures a run has, in which order, and how to read each of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from probekit.answers.reading import LENS
from probekit.probes.results import HEADLINE, ProbeResults
from probekit.report import comparisons, curves, heatmaps, used
from probekit.report.known_and_said import known_and_said_figure, models_with_answers
from probekit.report.slices import slices_figure
from probekit.report.style import metric_words
from probekit.report.wordings import wordings_figure
from probekit.tasks.variants import has_plain_wording, wording_families

BAND_NOTE = (
    "Bands: 95 % intervals over test images. Highlighted: layers that are not clearly worse than "
    "the best. Grey: the controls; hover to list them, or press “controls”. One that is above "
    "chance, at its own best layer on validation images, has a line of its own. Only what lies "
    "above them is about the layer."
)

# Groups of figures on the page, beside the tasks.
ALL_TASKS = "All tasks"
SINGLE_EXAMPLES = "Single examples"

# Kinds of figures that are named more than once.
KNOWN_AND_SAID = "Known and said"
SCORES = "Scores"
SLICES = "In slices"
DETAILS = "Behind the scores"


class Figure(NamedTuple):
    """A figure of the report.

    Attributes
    ----------
    figure : plotly Figure
        The drawing.
    caption : str
        How to read it.
    section : str
        What kind of figure it is: the page has a tab for each.
    group : str
        The task that it is about, or another heading above its kind; empty for all tasks.
    """

    figure: go.Figure
    caption: str
    section: str
    group: str = ""


def run_figures(
    results: ProbeResults,
    *,
    probe: str = "logreg",
    published: bool = False,
    relative: bool = False,
    interventions: pd.DataFrame | None = None,
    slices: pd.DataFrame | None = None,
) -> dict[str, Figure]:
    """Draw every figure that a run's tables have something for.

    Parameters
    ----------
    results : ProbeResults
        Results of a whole run.
    probe : str
        Probe whose scores are drawn: ``"logreg"``, ``"linear"`` or ``"mlp"``.
    published : bool
        Add the published study's numbers.
    relative : bool
        Begin with relative depth on the axis instead of layers.
    interventions : DataFrame or None
        Of :func:`probekit.workflow.intervene`; None and an empty one have no figures.
    slices : DataFrame or None
        Of :func:`probekit.report.slices.slice_table`; None and an empty one have no figures.

    Returns
    -------
    dict of str to Figure
        By name, in the order of the page.
    """
    table = results.metrics
    figures = _answer_figures(results, probe=probe, relative=relative)
    if interventions is not None:
        figures |= _used_figures(interventions)
    figures |= _wording_figures(results, probe=probe)
    figures |= _overview_figures(results, probe=probe)
    for task in results.tasks:
        if has_plain_wording(task, results.tasks):  # it is drawn beside that
            continue
        figures |= _score_figures(
            results, task, probe=probe, published=published, relative=relative
        )
        figures |= _detail_figures(results, task, probe=probe)
        if slices is not None and slices.value[slices.task == task].notna().any():
            figures[f"{task}_slices"] = _slices_figure(results, slices, task, probe=probe)
    figures |= _similarity_figures(results)
    for task in dict.fromkeys(table.task[table.metric == "heat_in_boxes"]):
        figures[f"{task}_localisation"] = Figure(
            curves.localisation_curves(table, task, relative=relative),
            "Where the local logreg probe, applied to every image token, sees a category, and "
            "where the lens would say its word. Drawn is the share of that heat in the boxes of "
            "the category (bands: 95 % intervals over images). Grey line: the share of tokens in "
            "the boxes. Dotted: heat of categories that the image does not show, in the same "
            "boxes. Dashed: random weights. Only what lies above these is about the category.",
            "Where in the image",
        )
    return {
        name: figure._replace(group=_task_of(name, results.tasks))
        for name, figure in figures.items()
    }


def first_figure(figures: Mapping[str, Figure]) -> str | None:
    """Return the name of the figure that answers a run's question.

    That is what the models know and say of the first task with answers, or else the first curve of
    scores; None where there is no figure.

    Parameters
    ----------
    figures : mapping of str to Figure
        Such as :func:`run_figures` draws.
    """
    for section in (KNOWN_AND_SAID, SCORES):
        for name, figure in figures.items():
            if figure.section == section:
                return name
    return next(iter(figures), None)


def _task_of(name: str, tasks: Collection[str]) -> str:
    """Return the task that a figure's name begins with, empty for a figure of several tasks."""
    if name == "global_and_local":
        return ""
    return max((task for task in tasks if name.startswith(f"{task}_")), key=len, default="")


def _answer_figures(results: ProbeResults, *, probe: str, relative: bool) -> dict[str, Figure]:
    """Draw what the models say beside what their layers know."""
    section = KNOWN_AND_SAID
    table = results.metrics
    figures = {}
    for task, info in results.tasks.items():
        if has_plain_wording(task, results.tasks) or not models_with_answers(table, task):
            continue
        figures[f"{task}_known_and_said"] = Figure(
            known_and_said_figure(table, task, info, probe=probe),
            f"{info.question} Blue: what a probe reads off each layer’s last token. Orange: the "
            "model’s own answer to the same test images; dashed, where it differs, with a "
            "threshold chosen on validation images. In the titles: how far the best probe lies "
            "above the answer. Green: what each layer would answer (the lens; dashed, the tuned "
            "lens, where there is one). The lens underestimates early layers. Grey: the probe’s "
            "controls, and a guess; thin blue: a control that is above chance, at its own "
            "best layer on validation images.",
            section,
        )
        is_decided = (table.metric == "decided") & (table.probe == LENS)
        if ((table.task == task) & is_decided).any():
            figures[f"{task}_decided"] = Figure(
                curves.layer_curves(table, task, info, "decided", probe=LENS, relative=relative),
                "The share of test examples whose final answer is on top, through the lens, from "
                "this layer on: when an answer is settled, right or wrong. Grey: the controls.",
                section,
            )
    return figures


def _used_figures(table: pd.DataFrame) -> dict[str, Figure]:
    """Draw what becomes of the answers when a layer loses something."""
    section = "Used"
    figures = {}
    for task in used.tasks_of(table):
        rows = table[(table.task == task) & table.value.notna()]
        if used.erasures_of(rows):
            figures[f"{task}_used"] = Figure(
                used.used_figure(table, task),
                "Blue: what a probe reads off each layer’s last token. Orange: the model’s "
                "answer. The other lines: its answer once the concept is erased from these tokens "
                "of a layer. Grey: one random subspace for each, moved by as much. What falls "
                "below the grey band is used. What does not fall may be used elsewhere, or along "
                "another direction.",
                section,
            )
            figures[f"{task}_effects"] = Figure(
                used.effect_heatmap(table, task),
                "Accuracy of the answer less that of the model left alone. A star: it takes more "
                "than the random subspace (5 %, corrected for the number of layers). Empty: could "
                "not be done; the table says why.",
                section,
            )
        is_read = (rows.metric == "probe_accuracy") & rows.intervention.isin(used.ERASURE_WORDS)
        if is_read.any():
            figures[f"{task}_rebuilt"] = Figure(
                used.rebuilt_figure(table, task),
                "Row: the layer where the concept was erased. Column: the layer whose logreg "
                "probe then reads the last token. A row that darkens to the right was rebuilt.",
                section,
            )
        if (rows.intervention == used.CUT).any():
            figures[f"{task}_routes"] = Figure(
                used.routes_figure(table, task),
                "The answer while some tokens no longer see others, in a window of blocks that "
                "begins at the point. Where a line dips, the answer comes that way. Read the "
                "object’s tokens against as many other image tokens.",
                section,
            )
        if ((rows.intervention == used.STEER) & (rows.metric == "says_yes")).any():
            figures[f"{task}_doses"] = Figure(
                used.doses_figure(table, task),
                "How often the model says yes after multiples of the direction from no to yes "
                "were added, in standard deviations of the training states; a line per layer. A "
                "direction that steers the answer need not be the one by which the model finds "
                "it.",
                section,
            )
    for task in used.tasks_on_inputs(table):
        figures[f"{task}_surroundings"] = Figure(
            used.surroundings_figure(table, task),
            "Probes trained on whole images, and the model’s answer where it has one, on changed "
            "test images. A curve that stands with the box greyed reads the surroundings. One "
            "that falls with the box and stands with the object greyed reads the shape of the "
            "grey. How far grey disturbs by itself is what the area elsewhere takes.",
            section,
        )
    return figures


def _wording_figures(results: ProbeResults, *, probe: str) -> dict[str, Figure]:
    """Draw the questions that are asked in several wordings."""
    figures = {}
    table = results.metrics
    has_probes = (table.probe == probe) & (table.stage == "lm") & (table.control == "none")
    for task in wording_families(results.tasks):
        if not (has_probes & (table.task == task)).any():
            continue
        figures[f"{task}_wordings"] = Figure(
            wordings_figure(results.metrics, results.transfer, results.tasks, task, probe=probe),
            "The same questions in other words. Left: the logreg probe of the plain wording, on "
            "the states of each wording. Middle: what the model answers, and each wording’s probe "
            "at its best layer. Right: the share of examples judged in another way than in the "
            "plain wording. Where orange lies far to the right of blue, the answer hangs on the "
            "wording, and what is known does not. Bands and bars: 95 % intervals.",
            "In other words",
        )
    return figures


def _slices_figure(results: ProbeResults, slices: pd.DataFrame, task: str, *, probe: str) -> Figure:
    """Draw the scores of a task in slices of its test examples."""
    return Figure(
        slices_figure(slices, task, probe=probe),
        "The test examples in slices. Filled: the probe at its best layer, chosen on all "
        "validation images. Open: the model’s answer. Bars: 95 % intervals over the slice’s "
        "images. Recall is the share of right answers where all answers of a slice are yes, or "
        "all no: a model that always says no is right about all that is not there. Slices differ "
        "in more than their names say: small things also stand in crowded images.",
        SLICES,
    )


def _similarity_figures(results: ProbeResults) -> dict[str, Figure]:
    """Draw how layers and models resemble each other."""
    section = "Which layers resemble each other"
    if results.similarity.empty:
        return {}
    return {
        "similarity": Figure(
            heatmaps.similarity_heatmap(results.similarity),
            "Debiased linear CKA (Kornblith et al., 2019) on the same test images: 1 where the "
            "states of two layers are alike up to rotation and scale, 0 where they have nothing "
            "to do with each other.",
            section,
        ),
        "effective_rank": Figure(
            curves.rank_curves(results.ranks),
            "The participation ratio of the covariance’s eigenvalues: how many equally large "
            "directions would vary as much. Bands: 95 % intervals over test images. From few "
            "images a line comes out too low, which its band corrects: it may lie above the line.",
            section,
        ),
    }


def _overview_figures(results: ProbeResults, *, probe: str) -> dict[str, Figure]:
    """Draw what compares tasks with each other."""
    section = "Global and local"
    figures = {}
    kinds = {info.kind for info in results.tasks.values()}
    if {"binary", "multilabel"} <= kinds:
        figures["global_and_local"] = Figure(
            comparisons.global_and_local(results.metrics, results.tasks, probe=probe),
            "Left: both kinds of semantics by layer; stars mark the peaks. Right: each point is a "
            "layer, at its scores in both. A path that leads up and to the right gains both; "
            "where it turns left or down, one is traded for the other.",
            section,
        )
    caption_tasks = [
        task
        for task, info in results.tasks.items()
        if task.startswith("caption") and not info.variant_of
    ]
    if len(caption_tasks) > 1:
        figures["negatives"] = Figure(
            comparisons.task_curves(results.metrics, caption_tasks, probe=probe),
            "Wrong captions of several kinds, from easy to hard: of any other image, the most "
            "similar one, one of an image with the same categories, the right one with two words "
            "swapped. Dotted: what the captions alone give away. Only what lies above it needs "
            "the image.",
            section,
        )
    return figures


def _score_figures(
    results: ProbeResults, task: str, *, probe: str, published: bool, relative: bool
) -> dict[str, Figure]:
    """Draw what the probes of a task score, layer by layer."""
    table = results.metrics
    rows = table[table.task == task]
    info = results.tasks[task]
    metric = HEADLINE[info.kind]
    is_binary = info.kind == "binary"
    has_selectivity = ((rows.probe == probe) & (rows.metric == "selectivity")).any()
    has_codelength = (rows.metric == "codelength").any() and probe == "logreg"
    section = SCORES
    figures = {}

    def draw_metric(name: str) -> go.Figure:
        return curves.layer_curves(
            table, task, info, name, probe=probe, published=published, relative=relative
        )

    figures[f"{task}_{metric}"] = Figure(
        draw_metric(metric),
        f"{info.question} The {metric_words(metric)} of a probe on each layer. {BAND_NOTE}",
        section,
    )
    if not is_binary:
        figures[f"{task}_accuracy"] = Figure(
            draw_metric("accuracy"),
            f"The share of right answers over all questions. {BAND_NOTE}",
            section,
        )
    if not is_binary and published:
        figures[f"{task}_f1_micro"] = Figure(
            draw_metric("f1_micro"),
            "F1 over the pooled counts of all categories, which is what the study reports.",
            section,
        )
    if has_selectivity:
        figures[f"{task}_selectivity"] = Figure(
            draw_metric("selectivity"),
            "Accuracy minus that of the same probe on a control task, whose labels are arbitrary "
            "and can only be learnt by heart.",
            section,
        )
    if has_codelength:
        figures[f"{task}_codelength"] = Figure(
            draw_metric("codelength"),
            "How many bits a label takes, given the states: each block of training labels is sent "
            "with a probe that has seen the blocks before it. The uniform code takes 1; less is "
            "easier to extract.",
            section,
        )
    if rows.pooling[rows.probe == probe].nunique() > 1:
        figures[f"{task}_poolings"] = Figure(
            comparisons.pooling_curves(table, task, metric, probe=probe),
            "How tokens become one vector: the same probe on each pooling. Bands: 95 % intervals.",
            section,
        )
    if rows.stage.nunique() > 1:
        figures[f"{task}_stages"] = Figure(
            comparisons.stage_curves(table, task, metric, probe=probe),
            "From the image’s patches to the last layer. Image encoder and projector see the "
            "image alone: they can know which categories are there, but nothing of a caption.",
            section,
        )
    return figures


def _detail_figures(results: ProbeResults, task: str, *, probe: str) -> dict[str, Figure]:
    """Draw what is behind a task's scores: classes, kinds of errors, other layers, training."""
    table = results.metrics
    info = results.tasks[task]
    is_binary = info.kind == "binary"
    section = DETAILS
    figures = {}

    average = "positive" if is_binary else "macro"
    metrics = [f"precision_{average}", f"recall_{average}", f"f1_{average}"]
    figures[f"{task}_scores"] = Figure(
        heatmaps.score_heatmap(table, task, metrics, probe=probe),
        "Each cell is one layer’s probe on the test images; darker is better.",
        section,
    )
    if not is_binary:
        class_word = "category" if info.kind == "multilabel" else "answer"
        figures[f"{task}_classes"] = Figure(
            heatmaps.class_heatmap(table, task, probe=probe, class_word=class_word),
            f"One row for each {class_word}, the best on top; hover for precision, recall and how "
            "many labels that rests on. With few labels a cell is noise.",
            section,
        )
    figures[f"{task}_confusion"] = Figure(
        heatmaps.confusion_counts(table, task, probe=probe),
        "How many answers are right and wrong, and which way. Oranges that differ in height: a "
        "probe that prefers yes, or no.",
        section,
    )
    if len(results.transfer) and (results.transfer.probe_task == task).any():
        figures[f"{task}_transfer"] = Figure(
            heatmaps.transfer_heatmap(results.transfer, task),
            "Logreg probes. Row: the layer that a probe was trained on. Column: the layer whose "
            "states it reads. Blocks of one colour share one code; where only the diagonal is "
            "dark, each layer writes it anew.",
            section,
        )
    for loss_probe in _probes_with_losses(results, task):
        name = "losses" if loss_probe == "linear" else f"losses_{loss_probe}"
        figures[f"{task}_{name}"] = Figure(
            curves.loss_curves(
                results.losses, table, task, metric=HEADLINE[info.kind], probe=loss_probe
            ),
            "Move the slider through the layers. Training loss is measured with dropout, "
            "validation loss after each epoch. A curve that still falls at the last epoch is a "
            "probe that has not converged.",
            section,
        )
    return figures


def _probes_with_losses(results: ProbeResults, task: str) -> list[str]:
    losses = results.losses
    if len(losses) == 0:
        return []
    return list(losses.probe[losses.task == task].unique())
