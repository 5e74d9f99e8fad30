"""What a run takes, before it runs: examples of a sample of its images, the rest is arithmetic."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from probekit import paths
from probekit.data import layouts, scenes
from probekit.extraction.planning import Estimate, estimate_extraction
from probekit.extraction.settings import ExtractionSettings
from probekit.tasks.balance import TooFewImages
from probekit.tasks.base import BuildSettings
from probekit.tasks.building import SPLITS, build_examples
from probekit.workflow import (
    extraction_settings,
    split_controls,
    tables_with_controls,
    tuples_for_lists,
)

# Parameters of the notebooks that are settings of what they run.
BUILD_PARAMETERS = (
    "tasks",
    "categories",
    "seed",
    "labels_from",
    "smallest",
    "captions",
    "similarity",
)
EXTRACTION_PARAMETERS = (
    "dtype",
    "longest_side",
    "sharing",
    "poolings",
    "stages",
    "shard_images",
    "batch_tokens",
    "workers",
    "trust_remote_code",
)


@dataclass(frozen=True)
class Sample:
    """Examples of some of a run's images.

    Attributes
    ----------
    examples : DataFrame
    images : int
        How many they were built from; tasks may have left some out.
    all_images : int
        How many the run has.
    """

    examples: pd.DataFrame
    images: int
    all_images: int


def build_sample(
    parameters: dict, *, images: int, folder: Path, home: paths.Home | None = None
) -> Sample:
    """Build examples of about so many of a run's images.

    Parameters
    ----------
    parameters : dict
        Of notebook 01_build_data.
    images : int
        Where tasks find nothing to ask about so few, twice as many are taken.
    folder : Path
        Temporary.
    home : Home or None

    Raises
    ------
    FileNotFoundError, ValueError
        As notebook 01 raises them.
    """
    home = paths.Home.find(home)
    split_sizes = {split: parameters[split] for split in SPLITS}
    all_images = sum(split_sizes.values())
    if min(split_sizes.values()) < 1:
        sizes_text = ", ".join(f"{split}={size}" for split, size in split_sizes.items())
        raise ValueError(f"{sizes_text}: each split needs images")
    sample_sizes = {
        split: min(size, max(1, round(size * images / all_images)))
        for split, size in split_sizes.items()
    }
    sampled = sum(sample_sizes.values())
    draws_scenes = parameters["dataset"] == "scenes"
    dataset_folder = str(parameters["dataset"])
    if draws_scenes:
        dataset_folder = str(folder / f"scenes-{images}")
        scenes.write_scenes(dataset_folder, n=sampled, seed=parameters["seed"])
    settings = tuples_for_lists({name: parameters[name] for name in BUILD_PARAMETERS})
    build = BuildSettings(
        dataset_folder,
        coco_splits=tuple(parameters["coco_splits"]),
        max_bad=1.0,
        **sample_sizes,
        **settings,
    )
    dataset = layouts.read_dataset(home.resolve(dataset_folder), build.coco_splits)
    if all_images > len(dataset.images) and not draws_scenes:
        raise ValueError(
            f"{all_images:,} images are asked for, {dataset_folder} has {len(dataset.images):,}"
        )
    try:
        examples = build_examples(build, folder / f"tasks-{images}", dataset=dataset, home=home)
    except TooFewImages as error:
        if images >= all_images:
            raise
        print(f"of {sampled} sampled images, {error}: taking twice as many", file=sys.stderr)
        return build_sample(parameters, images=2 * images, folder=folder, home=home)
    return Sample(examples, sampled, all_images)


def extractions(parameters: dict) -> list[tuple[ExtractionSettings, tuple[str, ...]]]:
    """Return what the parameters of 02_extract ask for.

    Returns
    -------
    list of (ExtractionSettings, tuple of str)
        Settings by model, and the controls of the inputs that go with each: trained models first,
        then those with random weights, which have none.

    Raises
    ------
    ValueError
        No model is named, or a control that is none.
    """
    if not parameters["models"]:
        raise ValueError("models=[]: name at least one")
    of_inputs, _ = split_controls(parameters["controls"])
    settings = {name: parameters[name] for name in EXTRACTION_PARAMETERS}
    wanted = [(extraction_settings(model, settings), of_inputs) for model in parameters["models"]]
    for model in parameters["untrained"]:
        wanted.append((extraction_settings(model, settings | {"untrained": True}), ()))
    return wanted


def estimate_run(
    build_parameters: dict,
    extraction_parameters: dict,
    *,
    sampled_images: int = 32,
    operations_per_second: float | None = None,
    home: paths.Home | None = None,
) -> list[Estimate]:
    """Estimate the extraction of each model of a run.

    Parameters
    ----------
    build_parameters, extraction_parameters : dict
        Of 01_build_data and of 02_extract.
    sampled_images : int
    operations_per_second : float or None
        That a device keeps up; None runs the sample here.
    home : Home or None
    """
    wanted = extractions(extraction_parameters)
    estimates = []
    with tempfile.TemporaryDirectory() as temporary:
        sample = build_sample(
            build_parameters, images=sampled_images, folder=Path(temporary), home=home
        )
        for settings, controls in wanted:
            estimate = estimate_extraction(
                settings,
                tables_with_controls(sample.examples, controls),
                images=sample.all_images,
                sampled_images=sample.images,
                operations_per_second=operations_per_second,
                device=extraction_parameters["device"],
                home=home,
            )
            estimates.append(estimate)
    return estimates
