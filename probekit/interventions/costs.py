"""What interventions take, before they are done: the operations of what runs again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from probekit import paths
from probekit.extraction.loading import prepare_images
from probekit.extraction.planning import ModelSize, count_encoder_operations
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.shards import model_inputs
from probekit.interventions.inputs import PIXELS
from probekit.interventions.settings import (
    CUT,
    NOTHING,
    Intervention,
    InterventionSettings,
    plan_interventions,
)
from probekit.models.load import load_skeleton
from probekit.models.processor import PreparedImage
from probekit.tasks.base import asked_categories, task_infos


@dataclass(frozen=True)
class InterventionEstimate:
    """What the interventions on one model, for one task, take.

    Attributes
    ----------
    model, task : str
    images : int
        Test images.
    interventions : int
        On each of them, the model alone among them.
    operations : float
        If only what a change touches runs again (:class:`probekit.models.replay.KeptPass`); NaN
        where those of the image encoder cannot be known without running it.
    fit_images : int
        Training images that edits are fitted on. Their states are extracted where they are not on
        disk; that is not counted.
    changes_images : bool
        Whether these are changed copies of the test images, on which nothing is fitted.
    """

    model: str
    task: str
    images: int
    interventions: int
    operations: float
    fit_images: int
    changes_images: bool


def estimate_interventions(
    settings: InterventionSettings,
    extraction: ExtractionSettings,
    examples: pd.DataFrame,
    *,
    images: int,
    home: paths.Home | None = None,
) -> list[InterventionEstimate]:
    """Estimate the interventions on a model, from a sample of a run's examples.

    Parameters
    ----------
    settings : InterventionSettings
    extraction : ExtractionSettings
    examples : DataFrame
        All splits of the sample.
    images : int
        How many test images the run has.
    home : Home or None

    Returns
    -------
    list of InterventionEstimate
        One for each task whose answers are watched, and for each whose images are changed.

    Raises
    ------
    ValueError
        The model has no such layer.
    """
    home = paths.Home.find(home)
    vlm = load_skeleton(
        extraction.model,
        revision=extraction.revision,
        trust_remote_code=extraction.trust_remote_code,
        with_processor=True,
        home=home,
    ).vlm
    size = ModelSize.of(vlm)
    blocks = len(vlm.blocks)
    infos = task_infos(examples)
    plain = [name for name, info in infos.items() if not info.variant_of]
    answered = settings.watch or [name for name in plain if infos[name].answers]
    watched = min(settings.images, images)

    def estimate(
        task: str, planned: Sequence[Intervention], *, changes_images: bool
    ) -> list[InterventionEstimate]:
        rows = examples[(examples.task == task) & (examples.split == "test")]
        if rows.empty:
            return []
        items = list(
            prepare_images(
                vlm.prompt_processor,
                [model_inputs(rows, home)],
                longest_side=extraction.longest_side,
                home=home,
            )
        )
        operations = 0.0
        encoded = len(planned) if changes_images else 1
        for item in items:
            encoder = count_encoder_operations(vlm, item.prepared)
            operations += float("nan") if encoder is None else encoded * encoder
            operations += count_operations(size, item.prepared, planned, blocks=blocks)
        operations *= watched / len(items)
        return [
            InterventionEstimate(
                vlm.name,
                task,
                watched,
                len(planned),
                operations,
                settings.fit_images,
                changes_images,
            )
        ]

    asking = set(examples.task[[len(names) > 0 for names in asked_categories(examples)]])
    estimates = []
    for task in answered if extraction.answers else ():
        planned = plan_interventions(
            settings,
            blocks=blocks,
            is_binary=infos[task].kind == "binary",
            asks_objects=task in asking,
        )
        estimates += estimate(task, planned, changes_images=False)
    changed = [Intervention(0, NOTHING, PIXELS)] * len(settings.inputs)
    for task in plain if changed else ():
        if task in asking:
            estimates += estimate(task, changed, changes_images=True)
    return estimates


def count_operations(
    size: ModelSize, prepared: PreparedImage, planned: Sequence[Intervention], *, blocks: int
) -> float:
    """Count the decoder's operations for all interventions on an image with its prompts.

    Parameters
    ----------
    size : ModelSize
    prepared : PreparedImage
    planned : sequence of Intervention
    blocks : int
        Of the decoder.
    """
    prefix = prepared.prefix_length
    lengths = [len(row["input_ids"]) for row in prepared.tokens]
    last = sum(size.decoder_operations(1, cached_tokens=length - 1) for length in lengths)
    middle = sum(
        size.decoder_operations(length - 1 - prefix, cached_tokens=prefix) for length in lengths
    )
    image = size.decoder_operations(prefix)
    total = 0.0
    for one in planned:
        changed = one.site.rpartition(">")[2] if one.name == CUT else one.site
        share = (blocks - one.layer) / blocks
        if one.name == NOTHING or changed in ("image", "all"):
            total += share * (image + middle + last)
        elif changed == "text":
            total += share * (middle + last)
        else:
            total += share * last
    return total


def describe_interventions(
    estimates: Sequence[InterventionEstimate], *, operations_per_hour: dict[str, float]
) -> str:
    """Say the estimates in words, a line each.

    Parameters
    ----------
    estimates : sequence of InterventionEstimate
    operations_per_hour : dict of str to float
        Of each model.
    """
    lines = []
    for one in estimates:
        hours = one.operations / operations_per_hour[one.model]
        effort = f"{one.operations / 1e12:,.4g} TFLOP, {hours:,.3g} hours"
        if math.isnan(one.operations):
            effort = "operations unknown"
        what = f"{one.model}, {one.task}: {one.interventions:,}"
        if one.changes_images:
            lines.append(f"{what} changed copies of each of {one.images:,} test images, {effort}")
        else:
            lines.append(
                f"{what} on each of {one.images:,} test images, {effort}; besides, the states of "
                f"up to {one.fit_images:,} training images"
            )
    return "\n".join(lines)
