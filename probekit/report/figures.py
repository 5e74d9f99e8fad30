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
    "Bands are 95 % bootstrap intervals over test images. Highlighted layers cannot be told apart "
    "from the best one (99 % confidence). Dashed lines are controls, which should lie at chance or "
    "bound what a score means."
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
            "The local logreg probe, applied to every image token, and the lens: which category's "
            "word each image token would say through the model's own final norm and output "
            "embedding. Heat is how far a token's score for a category lies above the "
            "image's mean; drawn is the share of it that lies in the boxes of that category's "
            "instances, over all pairs of test image and category (bands: 95 % over images). The "
            "grey line is the share of tokens in the boxes. Dotted: categories that the image does "
            "not show, in the same boxes: any object stands out from its background, and only what "
            "lies above that line is about the category. Dashed: random weights.",
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
            f"{info.question} Blue: what a probe reads off each layer's last token. Orange: what "
            "the model itself answers to the same test images, and dashed what it would score if "
            "it said yes from another probability on (chosen on validation): a model that says "
            "yes to everything may still know better. Dotted, with its 95 % interval: how far the "
            "best probe (chosen on validation) is above the answer. Green: what each layer would "
            "answer through the model's own final norm and output embedding (the logit lens); it "
            "underestimates early layers, so the probe is mostly the upper curve. Green, dashed: "
            "the tuned lens, which first maps a layer's states to the last one's by what training "
            "examples show. Grey: the controls of the probe, and a guess.",
            section,
        )
        is_decided = (table.metric == "decided") & (table.probe == LENS)
        if ((table.task == task) & is_decided).any():
            figures[f"{task}_decided"] = Figure(
                curves.layer_curves(table, task, "decided", probe=LENS, relative=relative),
                "The share of test examples whose final answer is on top, through the lens, from "
                "this layer on. It says when an answer is settled, right or wrong.",
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
                "Blue: what a probe reads off each layer's last token. Orange: what the model says "
                "when it is left alone. The other lines: what it says once the concept is erased "
                "from a layer's tokens, from image tokens all categories (they come before the "
                "question), from text tokens and the last one the right answer. Grey: one random "
                "subspace for each, moved by as much. Where a line falls below the grey band, what "
                "was erased there is used. Where it does not fall, the model may use it elsewhere, "
                "or read it off another direction.",
                section,
            )
            figures[f"{task}_effects"] = Figure(
                used.effect_heatmap(table, task),
                "Accuracy of the answer less that of the model left alone. A star: it takes more "
                "than the random subspace on the same test images (5 %, corrected for the number "
                "of layers, Holm). Empty cells are what could not be done; the table says why.",
                section,
            )
        is_read = (rows.metric == "probe_accuracy") & rows.intervention.isin(used.ERASURE_WORDS)
        if is_read.any():
            figures[f"{task}_rebuilt"] = Figure(
                used.rebuilt_figure(table, task),
                "Row: the layer where the concept was erased; column: the layer whose logreg probe "
                "then reads the last token. A row that darkens to the right was rebuilt from "
                "tokens that still have it.",
                section,
            )
        if (rows.intervention == used.CUT).any():
            figures[f"{task}_routes"] = Figure(
                used.routes_figure(table, task),
                "The answer while some tokens no longer see others, in a window of blocks that "
                "begins where the point is. Where a line dips, that is the way by which the answer "
                "comes. The object’s tokens lie in the boxes of what is asked about; read them "
                "against as many other image tokens, both on the images that have such boxes.",
                section,
            )
        if ((rows.intervention == used.STEER) & (rows.metric == "says_yes")).any():
            figures[f"{task}_doses"] = Figure(
                used.doses_figure(table, task),
                "How often the model says yes after multiples of the direction from the mean state "
                "of no to that of yes were added, in standard deviations of the training states; a "
                "line per layer. A direction that steers the answer need not be the one by which "
                "the model finds it.",
                section,
            )
    for task in used.tasks_on_inputs(table):
        figures[f"{task}_surroundings"] = Figure(
            used.surroundings_figure(table, task),
            "Probes that were trained on whole images, and the model’s answer where it has one, on "
            "the same test images: whole; with the asked object greyed, or its box; with all else "
            "greyed; with the object’s area greyed elsewhere. A curve that stands with the box "
            "greyed reads the surroundings. A curve that falls with the box and stands with the "
            "object greyed reads the shape of the grey. How far grey disturbs by itself is what "
            "the area elsewhere takes; boxes are larger.",
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
            "The same things asked about the same test images in other words. Left: the logreg "
            "probe of the plain wording, on the states of each wording (standardised by their own "
            "mean and spread), scored by what it was trained for. Middle: what the model answers, "
            "and what a probe of that very wording scores, at its best layer. Right: the share of "
            "examples that are judged in another way than in the plain wording: the opposite "
            "answer to a negated question judges in the same way. Where orange lies far to the "
            "right of blue, the answer hangs on the wording, and what is known does not. Bands and "
            "bars are 95 % intervals.",
            "In other words",
        )
    return figures


def _slices_figure(results: ProbeResults, slices: pd.DataFrame, task: str, *, probe: str) -> Figure:
    """Draw the scores of a task in slices of its test examples."""
    return Figure(
        slices_figure(slices, task, probe=probe),
        "The test examples in slices: by the area of what is asked about (COCO's bounds, 32² and "
        "96² pixels), by the number of instances in the image, by the length of the caption (or "
        "prompt), and by whether some training image shows the same categories, or the same "
        "category in its colour, together. Drawn is what varies. Circles: the probe at its best "
        "layer, which all validation images chose. Diamonds: the model's answer. Recall is the "
        "share of right answers where all answers of a slice are yes, or all no (not shown): read "
        "these beside each other: a model that always says no is right about all that is not "
        "there. "
        "Bars are 95 % intervals over the slice's images. Slices differ in more than their names "
        "say: small things also stand in crowded images.",
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
            "Debiased linear CKA (Kornblith et al., 2019) of the same test images: 1 where the "
            "states of two layers are alike up to rotation and scale, 0 where they have nothing "
            "to do with each other. Blocks are stretches of layers that change little.",
            section,
        ),
        "effective_rank": Figure(
            curves.rank_curves(results.ranks),
            "The participation ratio of the covariance's eigenvalues: how many equally large "
            "directions would vary as much. Low where a few directions hold most of the variance. "
            "Bands are 95 % bootstrap intervals over test images.",
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
            "Left: both kinds of semantics by layer, both by accuracy, with chance at one half "
            "where labels are balanced; stars are where each peaks. Right: each point is a layer, "
            "at its scores in both. A path that leads up and to the right gains both; where it "
            "turns left or down, one is traded for the other.",
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
            "The same question with wrong captions of several kinds, from easy to hard: of any "
            "other image (caption), the most similar one of another image, one of an image with "
            "the same categories, and the right one with two words swapped. Dotted: what the "
            "captions alone give away, by their words and word order; only what lies above it "
            "needs the image.",
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
            table, task, name, probe=probe, published=published, relative=relative
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
            "and can only be learnt by heart: what a layer gives beyond what the probe could "
            "memorise.",
            section,
        )
    if has_codelength:
        figures[f"{task}_codelength"] = Figure(
            draw_metric("codelength"),
            "How many bits a label takes, given the states: each block of training labels is sent "
            "with a probe that has seen the blocks before it. The uniform code takes 1; lower is "
            "easier to extract.",
            section,
        )
    if rows.pooling[rows.probe == probe].nunique() > 1:
        figures[f"{task}_poolings"] = Figure(
            comparisons.pooling_curves(table, task, metric, probe=probe),
            "How tokens become one vector: the same probe on each pooling. Bands are 95 % "
            "intervals.",
            section,
        )
    if rows.stage.nunique() > 1:
        figures[f"{task}_stages"] = Figure(
            comparisons.stage_curves(table, task, metric, probe=probe),
            "From the image's patches to the last decoder layer: image encoder and projector see "
            "the image alone, so they can know which categories are there, but nothing of a "
            "caption.",
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
        "Each cell is one layer's probe on the test images; darker is better.",
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
        "How many answers are right and wrong, and which way. Oranges that differ in height are a "
        "probe that prefers yes, or no.",
        section,
    )
    if len(results.transfer) and (results.transfer.probe_task == task).any():
        figures[f"{task}_transfer"] = Figure(
            heatmaps.transfer_heatmap(results.transfer, task),
            "Logreg probes. Row: the layer that a probe was trained on; column: the layer whose "
            "states it reads, standardised by their own mean and spread. Blocks of one colour are "
            "layers that share one code; where only the diagonal is dark, each layer writes it "
            "anew.",
            section,
        )
    for loss_probe in _probes_with_losses(results, task):
        name = "losses" if loss_probe == "linear" else f"losses_{loss_probe}"
        figures[f"{task}_{name}"] = Figure(
            curves.loss_curves(
                results.losses, table, task, metric=HEADLINE[info.kind], probe=loss_probe
            ),
            "Move the slider through the layers. Training loss is measured with dropout, while "
            "the weights change; validation loss after each epoch. A curve that still falls at "
            "the last epoch is a probe that has not converged. The slider begins at the best layer "
            "of the first model, on validation.",
            section,
        )
    return figures


def _probes_with_losses(results: ProbeResults, task: str) -> list[str]:
    losses = results.losses
    if len(losses) == 0:
        return []
    return list(losses.probe[losses.task == task].unique())
