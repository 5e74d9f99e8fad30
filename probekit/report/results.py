"""The results of a run, with what people do with them first: read, plot and compare."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

import pandas as pd

from probekit.probes.results import ProbeResults, best_layers, select_curve
from probekit.report.curves import layer_curves, scored_split
from probekit.report.figures import Figure, run_figures
from probekit.report.known_and_said import (
    answer_table,
    known_and_said_figure,
    models_with_answers,
)
from probekit.report.overview import overview_table
from probekit.report.paper import LayerFigure
from probekit.report.sentences import Summary, compare_pairs, summarise
from probekit.report.slices import NO_SLICES, slice_table, slices_figure
from probekit.report.used import (
    surroundings_figure,
    tasks_of,
    tasks_on_inputs,
    used_figure,
)
from probekit.report.wordings import wording_table, wordings_figure
from probekit.tasks.variants import wording_families


@dataclass(frozen=True, repr=False)
class Results(ProbeResults):
    """Probe results together with the examples that were probed.

    Overview, summary and slices are computed once for the same arguments: change no table in place,
    but make other results with :func:`dataclasses.replace`.

    Attributes
    ----------
    examples : DataFrame
        The examples, labels and all.
    interventions : DataFrame
        Of :func:`probekit.workflow.intervene`; empty where nothing was done to the models.
    instances : DataFrame
        The instances of the images, see :func:`probekit.tasks.building.load_instances`; may be
        empty.
    metrics, losses, transfer, predictions, neighbours, weights, heat, tasks, stores
        See :class:`probekit.probes.results.ProbeResults`.
    """

    examples: pd.DataFrame = field(default_factory=pd.DataFrame)
    interventions: pd.DataFrame = field(default_factory=pd.DataFrame)
    instances: pd.DataFrame = field(default_factory=pd.DataFrame)
    _computed: dict[Hashable, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(
        cls,
        results: ProbeResults,
        examples: pd.DataFrame,
        interventions: pd.DataFrame | None = None,
        instances: pd.DataFrame | None = None,
    ) -> Results:
        """Put probe results and their examples together.

        Parameters
        ----------
        results : ProbeResults
            Results of one or several models.
        examples : DataFrame
            The examples that were probed.
        interventions : DataFrame or None
            What was done to the models, if anything.
        instances : DataFrame or None
            The instances of the images, if there are any.
        """
        parts = {part.name: getattr(results, part.name) for part in fields(ProbeResults)}
        further = {
            "examples": examples,
            "interventions": pd.DataFrame() if interventions is None else interventions,
            "instances": pd.DataFrame() if instances is None else instances,
        }
        return cls(**parts, **further)

    def __repr__(self) -> str:
        lines = [f"Results with {len(self.metrics):,} scores"]
        for column in ("task", "model", "control", "pooling", "probe"):
            names = dict.fromkeys(self.metrics[column])
            lines.append(f"  {column + 's':9} {', '.join(names)}")
        return "\n".join(lines)

    def _once(self, compute: Callable[..., Any], *sources: Any, **options: Hashable) -> Any:
        """Return a copy of what `compute` makes of these results' `sources` with `options`."""
        key = (compute, *options.items())
        if key not in self._computed:
            self._computed[key] = compute(*sources, **options)
        return copy(self._computed[key])

    def summary(self, *, probe: str = "logreg") -> Summary:
        """Describe each task, model and pooling in a paragraph, with what to doubt.

        Parameters
        ----------
        probe : str
            The kind of probe.

        Returns
        -------
        Summary
            A list of paragraphs; Markdown in a notebook, text when printed.
        """
        return self._once(summarise, self.metrics, self.tasks, probe=probe)

    def overview(self, *, probe: str = "logreg") -> pd.DataFrame:
        """Put best layers, plateaus, answers and controls into one table, with all numbers.

        See :func:`probekit.report.overview.overview_table`, and
        :func:`probekit.report.overview.overview_for_people` for a table to look at.
        """
        return self._once(overview_table, self.metrics, self.tasks, probe=probe)

    def curve(
        self, metric: str, *, probe: str = "logreg", split: str | None = None
    ) -> pd.DataFrame:
        """Return one metric of the decoder's layers as a table.

        Parameters
        ----------
        metric, probe : str
            What to select.
        split : str, optional
            The split it was measured on; test unless it is named, train for codelengths.

        Returns
        -------
        DataFrame
            One row per task, model, control, pooling and layer, see
            :func:`probekit.probes.results.select_curve`.

        Raises
        ------
        ValueError
            There are no such scores.
        """
        split = split or scored_split(metric)
        return select_curve(self.metrics, probe=probe, metric=metric, split=split)

    def best_layers(self, *, probe: str = "logreg") -> pd.DataFrame:
        """Choose each task's, model's and pooling's best layer on validation; return test scores.

        See :func:`probekit.probes.results.best_layers`.
        """
        return best_layers(self.metrics, self.tasks, probe=probe)

    def compare(self, *, probe: str = "logreg", resamples: int = 2000) -> pd.DataFrame:
        """Compare models, untrained twins, poolings and tasks with each other at their best layers.

        See :func:`probekit.report.sentences.compare_pairs`.

        Raises
        ------
        ValueError
            These results have no examples.
        """
        self._need_examples("a comparison needs")
        return compare_pairs(self, self.examples, probe=probe, resamples=resamples)

    def _need_examples(self, who: str) -> None:
        if len(self.examples) == 0:
            raise ValueError(
                f"these results have no examples, which {who}: make them with "
                "Results.of(results, examples)"
            )

    def plot(
        self,
        metric: str,
        *,
        task: str | None = None,
        probe: str = "logreg",
        pooling: str | None = None,
        published: bool = False,
        relative: bool = False,
    ) -> LayerFigure:
        """Draw a metric of a task by layer, with intervals, plateaus and controls.

        Parameters
        ----------
        metric : str
            Such as ``"accuracy"``, ``"f1_macro"``, ``"selectivity"``, ``"codelength"``; or
            ``"known_and_said"`` for the probe beside the lens and the model's answer, or
            ``"wordings"`` for a question in all its wordings, ``"used"`` for what the model says
            once a layer has lost it, ``"surroundings"`` for images without the asked object, or
            ``"slices"`` for the share of right answers in slices of the test examples.
        task : str, optional
            The first task that has this metric unless it is named.
        probe : str
            The kind of probe.
        pooling : str, optional
            The first pooling unless it is named.
        published : bool
            Add the published study's numbers, where it has them for this task and metric.
        relative : bool
            Begin with relative depth on the axis instead of layers.

        Returns
        -------
        LayerFigure
            A plotly figure; ``.for_paper()`` makes it ready for print, see
            :class:`probekit.report.paper.LayerFigure`.

        Raises
        ------
        ValueError
            There is no such metric, task, probe or pooling; the message lists what there is.
        """
        if metric == "known_and_said":
            return self._plot_known_and_said(task, probe=probe)
        if metric == "wordings":
            return self._plot_wordings(task, probe=probe)
        if metric == "used":
            return self._plot_used(task)
        if metric == "surroundings":
            return self._plot_surroundings(task, pooling=pooling)
        if metric == "slices":
            return self._plot_slices(task, probe=probe)
        rows = self.metrics
        rows = rows[(rows["class"] == "") & (rows.split == scored_split(metric))]
        wanted = {"metric": metric, "task": task, "probe": probe, "pooling": pooling}
        selected: list[str] = []
        for column, name in wanted.items():
            names = list(dict.fromkeys(rows[column]))
            if name is None:
                name = names[0]
            if name not in names:
                of = f" of {', '.join(selected)}" if selected else ""
                raise ValueError(
                    f"no {column} {name!r} in these results{of}: take one of {', '.join(names)}"
                )
            selected.append(name)
            rows = rows[rows[column] == name]
        _, task, probe, pooling = selected
        return layer_curves(
            self.metrics,
            task,
            self.tasks[task],
            metric,
            probe=probe,
            pooling=pooling,
            published=published,
            relative=relative,
        )

    def _plot_known_and_said(self, task: str | None, *, probe: str) -> LayerFigure:
        answered = [name for name in self.tasks if models_with_answers(self.metrics, name)]
        if task is None and answered:
            task = answered[0]
        if task not in answered:
            raise ValueError(
                f"no answers of a trained model to {task or 'any task'} in these results: "
                + (f"take one of {', '.join(answered)}" if answered else "extract with answers")
            )
        return known_and_said_figure(self.metrics, task, self.tasks[task], probe=probe)

    def _plot_wordings(self, task: str | None, *, probe: str) -> LayerFigure:
        families = wording_families(self.tasks)
        refusal = (
            f"{task or 'each task'} is in these results without another wording, or without the "
            "plain one"
        )
        task = _choose_task(task, list(families), refusal, remedy="add both to tasks")
        return wordings_figure(self.metrics, self.transfer, self.tasks, task, probe=probe)

    def _plot_used(self, task: str | None) -> LayerFigure:
        refusal = f"no interventions on answers to {task or 'any task'} in these results"
        task = _choose_task(task, tasks_of(self.interventions), refusal, remedy="run 04_intervene")
        return used_figure(self.interventions, task)

    def _plot_surroundings(self, task: str | None, *, pooling: str | None) -> LayerFigure:
        refusal = f"no scores of {task or 'any task'} on changed images in these results"
        tasks = tasks_on_inputs(self.interventions)
        task = _choose_task(task, tasks, refusal, remedy="run 04_intervene")
        return surroundings_figure(self.interventions, task, pooling=pooling)

    def _plot_slices(self, task: str | None, *, probe: str) -> LayerFigure:
        table = self.slices(task=task, probe=probe)
        if table.empty:
            raise ValueError(f"no slices of {task or 'any task'} in these results: {NO_SLICES}")
        return slices_figure(table, table.task.iloc[0], probe=probe)

    def slices(
        self,
        *,
        task: str | None = None,
        probe: str = "logreg",
        metric: str | None = None,
        resamples: int = 2000,
    ) -> pd.DataFrame:
        """Score the best layers, and what the models answer, in slices of the test examples.

        Slices are by the area of what is asked about, the instances in the image, the length of
        the text, and whether the training images show the same things together. See
        :func:`probekit.report.slices.slice_table`.

        Raises
        ------
        ValueError
            These results have no examples, or there is no such task or metric.
        """
        self._need_examples("slices need")
        if task is not None and task not in self.tasks:
            raise ValueError(
                f"no task {task!r} in these results: take one of {', '.join(self.tasks)}"
            )
        return self._once(
            slice_table,
            self,
            self.examples,
            self.instances,
            task=task,
            probe=probe,
            metric=metric,
            resamples=resamples,
        )

    def wordings(self, *, probe: str = "logreg") -> pd.DataFrame:
        """Set the wordings of each question beside each other.

        See :func:`probekit.report.wordings.wording_table`.
        """
        return wording_table(self.metrics, self.transfer, self.tasks, probe=probe)

    def answers(self, *, probe: str = "logreg") -> pd.DataFrame:
        """Set what the models say beside what their best layers know.

        See :func:`probekit.report.known_and_said.answer_table`.
        """
        return answer_table(self.metrics, self.tasks, probe=probe)

    def figures(
        self, *, probe: str = "logreg", published: bool = False, relative: bool = False
    ) -> dict[str, Figure]:
        """Draw every figure that the tables have something for.

        See :func:`probekit.report.figures.run_figures`.
        """
        return run_figures(
            self,
            probe=probe,
            published=published,
            relative=relative,
            interventions=self.interventions,
            slices=self.slices(probe=probe) if len(self.examples) else None,
        )


def _choose_task(task: str | None, tasks: Sequence[str], refusal: str, *, remedy: str) -> str:
    """Return the task that is named, or else the first one; refuse one that is not there."""
    if task is None and tasks:
        return tasks[0]
    if task is None or task not in tasks:
        fix = f"take one of {', '.join(tasks)}" if tasks else remedy
        raise ValueError(f"{refusal}: {fix}")
    return task
