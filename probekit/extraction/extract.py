"""From examples to activations: the only step that needs the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from probekit import paths
from probekit.extraction import store
from probekit.extraction.launch import Launch
from probekit.extraction.shards import Part
from probekit.extraction.shared import Shared
from probekit.extraction.worker import ExtractionSettings, Job
from probekit.models.load import best_device, best_dtype
from probekit.models.presets import locate, resolve_commit, short_name
from probekit.probes import controls
from probekit.tasks import input_controls


def resolved(settings: ExtractionSettings, device: str) -> ExtractionSettings:
    """The settings with what they leave open filled in: what suits the device, the commit on the hub."""
    if device.startswith("cuda") and not torch.cuda.is_available() and not settings.dtype:
        raise ValueError("this machine has no GPU that says which dtype suits it: name one, such as dtype=bfloat16")
    tokens, workers = (2048, 0) if device == "cpu" else (8192, min(4, (os.cpu_count() or 2) - 1))
    return replace(settings, dtype=settings.dtype or best_dtype(device),
                   revision=resolve_commit(settings.model, settings.revision, settings.trust_remote_code),
                   batch_tokens=settings.batch_tokens or tokens,
                   workers=workers if settings.workers is None else settings.workers)


def folder_of(settings: ExtractionSettings) -> Path:
    """The folder of all that this checkpoint says with these (resolved) settings, whatever the images and prompts."""
    source = Path(locate(settings.model))
    files = sorted(f for f in source.glob("*") if f.is_file()) if source.is_absolute() else []  # a hub id has none
    weights = [(f.name, f.stat().st_size, _sampled_hash(f)) for f in files]
    decides = {name: getattr(settings, name) for name in ("model", "revision", "dtype", "untrained", "seed",
                                                          "longest_side", "trust_remote_code")}
    decides |= {"transformers": version("transformers")}
    name = short_name(settings.model) + ("-untrained" if settings.untrained else "")
    return paths.Home.find().data / "activations" / name / paths.fingerprint(decides, settings.sharing == "off", weights)


def _sampled_hash(file: Path, pieces: int = 128, piece: int = 1 << 15) -> str:
    """Hash of 4 MiB spread over a file: tells checkpoints apart without reading gigabytes."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as handle:
        for at in sorted({round(k * max(0, size - piece) / (pieces - 1)) for k in range(pieces)}):
            handle.seek(at)
            digest.update(handle.read(piece))
    return digest.hexdigest()


def extract(settings: ExtractionSettings, examples: pd.DataFrame, device: str | None = None) -> store.Activations:
    """The store of the examples alone, see :func:`extract_all`."""
    return extract_all(settings, examples, (), device)[0]


def extract_all(settings: ExtractionSettings, examples: pd.DataFrame, control: Sequence[str], device: str | None = None,
                launch: Launch = Launch()) -> list[store.Activations]:
    """Extract all examples, shard by shard; what is already on disk, of whatever run, is not computed again.

    The model is loaded only where something is missing, and released at the end. Shards that others are making on the
    same folder are waited for.

    Parameters
    ----------
    examples : columns `file`, `prompt`, and for controls `image_id` and `split`
    control : names out of :data:`probekit.tasks.input_controls.INPUT_CONTROLS`; an image that several of them ask about still runs once
    device : see :func:`probekit.models.load.load_vlm`
    launch : who makes the shards, see :mod:`probekit.extraction.launch`

    Returns
    -------
    The store of the examples, and one for each control.
    """
    job, views = plan(settings, examples, control, device, launch.url)
    launch.finish(job)
    return [store.Activations(job.folder, table, own.stages, own.poolings, name) for name, table, own in views]


def plan(settings: ExtractionSettings, examples: pd.DataFrame, control: Sequence[str], device: str | None = None,
         url: str | None = None) -> tuple[Job, list[tuple[str, pd.DataFrame, ExtractionSettings]]]:
    """What is to be extracted as a job, and (control, what the model is given, settings) for each view on it."""
    settings.check()
    controls.check_controls(control, input_controls.INPUT_CONTROLS)
    of_text = tuple(p for p in settings.poolings if p != "image_mean" and not p.startswith("token:"))
    if "no_image" in control and ("lm" not in settings.stages or not of_text):
        raise ValueError("no_image needs the stage lm, and a pooling besides image_mean and token:<i>")
    device = device or best_device()
    settings = resolved(settings, device)
    folder = folder_of(settings)
    if url:
        url = f"{url.rstrip('/') if '://' in url else paths.Home.find().resolve(url)}/{folder.parent.name}/{folder.name}"
        try:
            shared = Shared(folder, url)
            shared.check()
            shared.pull_plans()
        except Exception as error:  # each protocol has errors of its own
            raise ValueError(f"mirror={url!r} cannot be used ({type(error).__name__}: {error}): check address and "
                             "credentials, and that its protocol's package is installed (s3fs, gcsfs, ...)") from error
    blind = replace(settings, stages=("lm",), poolings=of_text)
    views = [(name, input_controls.change_inputs(examples, name), blind if name == "no_image" else settings)
             for name in ("none", *control)]
    shards: dict[Path, tuple[Part, int]] = {}
    for own in dict.fromkeys(own for _, _, own in views):
        rows = pd.concat([shards.rows_of(table) for _, table, taken in views if taken == own])
        shards |= {part.shard(i): (part, i) for part, i in shards.plan(folder, rows, own.wants, own.shard_images)}
    job = Job(settings, folder, device, tuple(shards.values()), url)
    job.push()
    return job, views


def extractions(models: Sequence[str], untrained: Sequence[str] = (), control: Sequence[str] = (), **settings
                ) -> list[tuple[ExtractionSettings, tuple[str, ...]]]:
    """What the parameters of 02_extract ask for: settings by model, and the controls of the inputs that go with each.

    Parameters
    ----------
    untrained : those of the models that are read with random weights, too
    control : controls of the inputs; those of the labels are of no concern here
    settings : of :class:`Extraction`, the same for all
    """
    controls.check_controls(control)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    own = tuple(name for name in control if name in input_controls.INPUT_CONTROLS)
    trained = [(ExtractionSettings(model, **given), own) for model in models]
    return trained + [(ExtractionSettings(model, untrained=True, **given), ()) for model in models if model in untrained]


def asked_by(parameters: dict[str, object]) -> list[tuple[ExtractionSettings, tuple[str, ...]]]:
    """:func:`extractions` of the parameters that 02_extract declares."""
    if not parameters["models"]:
        raise ValueError("models=[]: name at least one")
    own = {one.name for one in fields(ExtractionSettings)} - {"model", "untrained"}
    return extractions(parameters["models"], parameters["untrained"], parameters["controls"],
                       **{name: value for name, value in parameters.items() if name in own})


def jobs(parameters: dict[str, object], examples: pd.DataFrame) -> list[Job]:
    """The jobs, one a model, that 02_extract does with these parameters of its."""
    return [plan(settings, examples, control, parameters["device"], parameters["mirror"])[0]
            for settings, control in asked_by(parameters)]
