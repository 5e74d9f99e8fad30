"""The page of a saved run: its figures, sentences, single examples, settings and tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from probekit.paths import read_json
from probekit.report.figures import Figure, first_figure
from probekit.report.page import write_page
from probekit.report.page_explorer import page_explorers
from probekit.report.saved_run import SavedRun


def write_run_page(
    run: SavedRun, figures: Mapping[str, Figure], folder: Path, *, probe: str = "logreg"
) -> Path:
    """Write the page of a run with its tables.

    Parameters
    ----------
    run : SavedRun
        The run.
    figures : mapping of str to Figure
        Figures to show, such as ``run.results.figures()``; single examples are added.
    folder : Path
        Made where it does not exist.
    probe : str
        The kind of probe that the figures show.

    Returns
    -------
    Path
        The file ``index.html``.
    """
    images = run.examples.groupby("split").image_id.nunique()
    lead = (
        "Where in the depth does a vision-language model know what an image shows? A light probe "
        f"({probe}) on each layer of a frozen model: {images.train:,} training, "
        f"{images.validation:,} validation, {images.test:,} test images."
    )
    build = read_json(run.home.data / "tasks" / run.name / "build.json")
    return write_page(
        {**figures, **page_explorers(run)},
        folder,
        title=f"What each layer knows: {run.name}",
        lead=lead,
        summary=run.results.summary(probe=probe),
        settings=run.settings,
        files=run.write_tables(folder, probe=probe),
        overview=run.results.overview(probe=probe),
        first_figure=first_figure(figures),
        questions={task: info.question for task, info in run.results.tasks.items()},
        reading=build.get("report"),  # an older build has none
    )
