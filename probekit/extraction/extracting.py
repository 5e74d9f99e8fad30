"""From tables of (file, prompt) to activations: the only step that needs the model."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from probekit import paths
from probekit.extraction.jobs import Job, adapt_settings, added_pooling, plan_job
from probekit.extraction.launch import Launcher
from probekit.extraction.runner import Runner
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.store import Activations


def extract_tables(
    settings: ExtractionSettings,
    tables: Mapping[str, pd.DataFrame],
    *,
    device: str | None = None,
    launcher: Launcher = Launcher(),
    root: str | None = None,
    home: paths.Home | None = None,
) -> Activations:
    """Extract what a model holds of some tables, shard by shard.

    What is on disk, of whatever run, is not computed again. The model is loaded only where
    something is missing, and released at the end.

    Parameters
    ----------
    settings : ExtractionSettings
    tables : mapping of str to DataFrame
        ``"none"`` is the table of examples; others, by the name of a control of the inputs, have
        the same rows with other files or prompts. Columns besides `file` and `prompt` travel along.
        An image that several tables show still runs once.
    device : str or None
        See :func:`probekit.models.load.load_vlm`.
    launcher : Launcher
        Who makes the shards.
    root : str or None
        Folder or URL of all activations; None takes ``data/activations`` of the home.
    home : Home or None

    Returns
    -------
    Activations
        Of the examples, with those of the controls in :attr:`Activations.controls`.

    Raises
    ------
    ValueError, OSError, MemoryError, ArithmeticError
        A setting makes no sense, a model or an image cannot be read, something does not fit the
        memory, a hidden state is not finite; the message names it and the fix.
    """
    home = paths.Home.find(home)
    job = plan_job(settings, tables, device=device, root=root, home=home)
    launcher.make_shards(job)
    # Lost, or new words, while all shards are there.
    if job.folder.read_meta() is None or job.lacks_answer_head:
        runner = Runner(job)
        runner.load()
        runner.release()
    return open_views(job, tables)


def open_views(job: Job, tables: Mapping[str, pd.DataFrame]) -> Activations:
    """Open the finished shards of a job as the activations of its tables."""
    controls = {
        name: _open_view(job, name, table, {}) for name, table in tables.items() if name != "none"
    }
    return _open_view(job, "none", tables["none"], controls)


def _open_view(
    job: Job, name: str, table: pd.DataFrame, controls: Mapping[str, Activations]
) -> Activations:
    adapted = adapt_settings(job.settings, table)
    pooling = added_pooling(job.settings, table)
    return Activations(
        job.folder,
        table.reset_index(drop=True),
        adapted.stages,
        (*adapted.poolings, pooling) if pooling else adapted.poolings,
        control=name,
        home=job.home,
        controls=controls,
        answer_pooling=pooling,
    )
