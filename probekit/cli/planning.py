"""What a run takes, before it runs: examples of a sample of its images, the rest is arithmetic."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from probekit import paths
from probekit.data import layouts, scenes
from probekit.extraction.launch import Launcher
from probekit.extraction.planning import Estimate, estimate_extraction
from probekit.extraction.settings import ExtractionSettings
from probekit.interventions.costs import InterventionEstimate, estimate_interventions
from probekit.interventions.settings import InterventionSettings
from probekit.parameters import read_parameters, read_settings
from probekit.probes.probing import PROBES, ProbeSettings
from probekit.tasks.balance import TooFewImages
from probekit.tasks.base import BuildSettings
from probekit.tasks.building import SPLITS, build_examples
from probekit.tasks.registry import find_tasks
from probekit.workflow import (
    check_models,
    extraction_settings,
    intervention_settings,
    probe_settings,
    split_controls,
    tables_with_controls,
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


def build_sample(parameters: dict, *, images: int, folder: Path) -> Sample:
    """Build examples of about so many of a run's images.

    Parameters
    ----------
    parameters : dict
        Of notebook 01_build_data.
    images : int
        Where tasks find nothing to ask about so few, twice as many are taken.
    folder : Path
        Temporary.

    Raises
    ------
    FileNotFoundError, ValueError
        As notebook 01 raises them.
    """
    home = paths.Home.find()
    parameters = read_parameters(parameters)
    split_sizes = {split: parameters[split] for split in SPLITS}
    all_images = sum(split_sizes.values())
    sample_sizes = {
        split: min(size, max(1, round(size * images / all_images)))
        for split, size in split_sizes.items()
    }
    sampled = sum(sample_sizes.values())
    draws_scenes = parameters["dataset"] == "scenes"
    dataset_folder = parameters["dataset"]
    if draws_scenes:
        dataset_folder = str(folder / f"scenes-{images}")
        scenes.write_scenes(dataset_folder, n=sampled, seed=parameters["seed"])
    settings = _settings_in(parameters, BuildSettings) | {"max_bad": 1.0, **sample_sizes}
    build = BuildSettings(dataset_folder, **read_settings(BuildSettings, settings))
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
        return build_sample(parameters, images=2 * images, folder=folder)
    return Sample(examples, sampled, all_images)


def _settings_in(parameters: dict, settings_class: type) -> dict:
    """Return those parameters of a notebook that are settings of what it runs."""
    names = {field.name for field in fields(settings_class)}
    return {name: value for name, value in parameters.items() if name in names}


def extractions(parameters: dict) -> list[tuple[ExtractionSettings, tuple[str, ...]]]:
    """Return what the parameters of 02_extract ask for.

    Returns
    -------
    list of (ExtractionSettings, tuple of str)
        Settings by model, and the controls of the inputs that go with each: trained models first,
        then those with random weights, which have none.

    Raises
    ------
    FileNotFoundError, ValueError
        No model is named, there is no such model or control, or an untrained model is none of the
        run's.
    """
    models, untrained = check_models(parameters["models"], parameters["untrained"])
    of_inputs, _ = split_controls(parameters["controls"])
    # A run lists its untrained models; of an extraction it is a flag.
    settings = _settings_in(parameters, ExtractionSettings) | {"untrained": False}
    wanted = [(extraction_settings(model, settings), of_inputs) for model in models]
    for model in untrained:
        wanted.append((extraction_settings(model, settings | {"untrained": True}), ()))
    return wanted


def check_steps(parameters: dict[str, dict]) -> None:
    """Refuse what a step of a run would refuse, before any of them runs.

    Parameters
    ----------
    parameters : dict of str to dict
        The parameters of each notebook that is to run, by its name, such as "01_build_data".

    Raises
    ------
    FileNotFoundError, ValueError
        A setting makes no sense, or there is no such task, model, control or probe; the message
        names the fix.
    """
    if "01_build_data" in parameters:
        find_tasks(parameters["01_build_data"]["tasks"])
    if "02_extract" in parameters:
        extraction = parameters["02_extract"]
        for settings, _ in extractions(extraction):
            settings.check()
        Launcher(extraction["engine"], copies=extraction["copies"])
    if "03_probe" in parameters:
        probing = parameters["03_probe"]
        _, of_labels = split_controls(probing["controls"])
        of_probes = _settings_in(probing, ProbeSettings) | {"controls": of_labels}
        probe_settings(of_probes).check()
    if "04_intervene" in parameters:
        intervention_settings(_settings_in(parameters["04_intervene"], InterventionSettings))
    if "05_layer_plots" in parameters:
        probe = parameters["05_layer_plots"]["probe"]
        if probe not in PROBES:
            raise ValueError(f"probe={probe!r}: take one of {', '.join(PROBES)}")


class RunEstimate(NamedTuple):
    """What the models of a run take.

    Attributes
    ----------
    extractions : list of Estimate
        Trained models first, then those with random weights.
    interventions : list of InterventionEstimate
        On the trained ones, for each task.
    """

    extractions: list[Estimate]
    interventions: list[InterventionEstimate]

    @property
    def operations_per_hour(self) -> dict[str, float]:
        """What extraction keeps up, by model; NaN where its operations are not known."""
        rates = {}
        for one in self.extractions:
            operations = one.operations if one.way == "shared" else one.plain_operations
            rates[one.model] = operations / one.hours
        return rates


def estimate_run(
    build_parameters: dict,
    extraction_parameters: dict,
    intervention_parameters: dict,
    *,
    sampled_images: int = 32,
    operations_per_second: float | None = None,
) -> RunEstimate:
    """Estimate extraction and interventions of each model of a run.

    Parameters
    ----------
    build_parameters, extraction_parameters, intervention_parameters : dict
        Of 01_build_data, 02_extract and 04_intervene.
    sampled_images : int
    operations_per_second : float or None
        That a device keeps up; None runs the sample here.
    """
    wanted = extractions(extraction_parameters)
    intervening = intervention_settings(_settings_in(intervention_parameters, InterventionSettings))
    estimates = []
    interventions = []
    with tempfile.TemporaryDirectory() as temporary:
        sample = build_sample(build_parameters, images=sampled_images, folder=Path(temporary))
        for settings, controls in wanted:
            estimate = estimate_extraction(
                settings,
                tables_with_controls(sample.examples, controls),
                images=sample.all_images,
                sampled_images=sample.images,
                operations_per_second=operations_per_second,
                device=extraction_parameters["device"],
            )
            estimates.append(estimate)
            if not settings.untrained:
                interventions += estimate_interventions(
                    intervening, settings, sample.examples, images=build_parameters["test"]
                )
    return RunEstimate(estimates, interventions)
