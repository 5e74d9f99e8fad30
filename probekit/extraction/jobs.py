"""What is asked of a model: one job per model and setting, the same for all who work on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from probekit import paths
from probekit.extraction.answer_heads import ANSWER_POOLING, answer_head_file, collect_words
from probekit.extraction.folder import ActivationFolder, open_folder
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.shards import Content, Shard, model_inputs, plan_shards
from probekit.models.load import best_device

ACTIVATIONS = "data/activations"  # below the home


@dataclass(frozen=True)
class Job:
    """The shards that hold what a run needs of a model.

    Attributes
    ----------
    settings : ExtractionSettings
        Filled in.
    folder : ActivationFolder
        The model's.
    device : str
        See :func:`probekit.models.load.load_vlm`.
    shards : tuple of Shard
        Done or not.
    home : Home
        Where relative image files and checkpoint folders start.
    answer_words : tuple of str
        All words of the answers that are to be read; none where answers are left out.
    """

    settings: ExtractionSettings
    folder: ActivationFolder
    device: str
    shards: tuple[Shard, ...]
    home: paths.Home
    answer_words: tuple[str, ...] = ()

    @property
    def lacks_answer_head(self) -> bool:
        """Whether what answers are read with is wanted and not on disk yet."""
        return bool(self.answer_words) and not self.folder.exists(
            answer_head_file(self.answer_words)
        )

    def missing_shards(self) -> list[int]:
        """Return the places in `shards` of those that are not done."""
        return [place for place, shard in enumerate(self.shards) if not shard.is_done]


def plan_job(
    settings: ExtractionSettings,
    tables: Mapping[str, pd.DataFrame],
    *,
    device: str | None = None,
    root: str | None = None,
    home: paths.Home | None = None,
) -> Job:
    """Plan what is to be extracted; what is on disk, of whatever run, is part of it.

    Parameters
    ----------
    settings : ExtractionSettings
    tables : mapping of str to DataFrame
        As for :func:`probekit.extraction.extracting.extract_tables`.
    device : str or None
        None takes the best there is.
    root : str or None
        Folder or URL of all activations; None takes ``data/activations`` of the home.
    home : Home or None

    Raises
    ------
    ValueError
        A setting makes no sense.
    FileNotFoundError
        An image is gone.
    """
    settings.check()
    home = paths.Home.find(home)
    device = device or best_device()
    settings = settings.fill_in(device, home)
    root = (root or ACTIVATIONS).rstrip("/")
    folder = open_folder(f"{root}/{settings.folder_name(home)}", home)
    rows_by_contents: dict[tuple[Content, ...], list[pd.DataFrame]] = {}
    for table in tables.values():
        contents = tuple(wanted_contents(settings, table))
        rows_by_contents.setdefault(contents, []).append(model_inputs(table, home))
    shards: dict[str, Shard] = {}
    for contents, row_tables in rows_by_contents.items():
        planned = plan_shards(
            folder,
            pd.concat(row_tables, ignore_index=True),
            contents=contents,
            shard_images=settings.images_per_shard,
        )
        shards |= {shard.name: shard for shard in planned}
    with_images = [table for table in tables.values() if bool((table.file != "").any())]
    words = collect_words(with_images) if reads_answers(settings) else ()
    return Job(settings, folder, device, tuple(shards.values()), home, answer_words=words)


def reads_answers(settings: ExtractionSettings) -> bool:
    """Tell whether answers are wanted, and can be read: off the decoder alone."""
    return settings.answers and "lm" in settings.stages


def adapt_settings(settings: ExtractionSettings, table: pd.DataFrame) -> ExtractionSettings:
    """Return the settings that suit a table: poolings of image tokens need an image."""
    has_no_image = bool((table.file == "").all()) and len(table) > 0
    return settings.without_image() if has_no_image else settings


def added_pooling(settings: ExtractionSettings, table: pd.DataFrame) -> str:
    """Return the pooling of the decoder that is added for a table's answers; ``""`` for none."""
    if not reads_answers(settings) or not collect_words([table]):
        return ""
    return "" if ANSWER_POOLING in settings.poolings else ANSWER_POOLING


def wanted_contents(settings: ExtractionSettings, table: pd.DataFrame) -> list[Content]:
    """Return what is to be stored of a table."""
    contents = adapt_settings(settings, table).contents
    pooling = added_pooling(settings, table)
    return [*contents, Content("lm", pooling)] if pooling else contents
