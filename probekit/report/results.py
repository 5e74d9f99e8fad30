"""The results of a run, with what people do with them first: read, plot and compare."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go

from probekit.probes.results import ProbeResults, best_layers, select_curve
from probekit.report.curves import layer_curves, scored_split
from probekit.report.figures import Figure, run_figures
from probekit.report.sentences import Summary, compare_pairs, summarise


@dataclass(frozen=True, repr=False)
class Results(ProbeResults):
    """Probe results together with the examples that were probed.

    Attributes
    ----------
    examples : DataFrame
        The examples, labels and all.
    metrics, losses, transfer, predictions, neighbours, weights, heat, tasks, stores
        See :class:`probekit.probes.results.ProbeResults`.
    """

    examples: pd.DataFrame = field(default_factory=pd.DataFrame)

    @classmethod
    def of(cls, results: ProbeResults, examples: pd.DataFrame) -> Results:
        """Put probe results and their examples together.

        Parameters
        ----------
        results : ProbeResults
            Results of one or several models.
        examples : DataFrame
            The examples that were probed.
        """
        return cls(**{**vars(results), "examples": examples})

    def __repr__(self) -> str:
        lines = [f"Results with {len(self.metrics):,} scores"]
        for column in ("task", "model", "control", "pooling", "probe"):
            names = dict.fromkeys(self.metrics[column])
            lines.append(f"  {column + 's':9} {', '.join(names)}")
        return "\n".join(lines)

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
        return summarise(self.metrics, self.tasks, probe=probe)

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
        if len(self.examples) == 0:
            raise ValueError(
                "these results have no examples, which a comparison needs: make them with "
                "Results.of(results, examples)"
            )
        return compare_pairs(self, self.examples, probe=probe, resamples=resamples)

    def plot(
        self,
        metric: str,
        *,
        task: str | None = None,
        probe: str = "logreg",
        pooling: str | None = None,
        published: bool = False,
        relative: bool = False,
    ) -> go.Figure:
        """Draw a metric of a task by layer, with intervals, plateaus and controls.

        Parameters
        ----------
        metric : str
            Such as ``"accuracy"``, ``"f1_macro"``, ``"selectivity"``, ``"codelength"``.
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
        Figure
            A plotly figure.

        Raises
        ------
        ValueError
            There is no such metric, task, probe or pooling; the message lists what there is.
        """
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
            metric,
            probe=probe,
            pooling=pooling,
            published=published,
            relative=relative,
        )

    def figures(
        self, *, probe: str = "logreg", published: bool = False, relative: bool = False
    ) -> dict[str, Figure]:
        """Draw every figure that the tables have something for.

        See :func:`probekit.report.figures.run_figures`.
        """
        return run_figures(self, probe=probe, published=published, relative=relative)
