"""The way of the data in a few calls: examples, activations, results.

What loads torch is imported where it is used: building examples needs none of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from probekit import parameters, paths
from probekit.data.scenes import write_scenes
from probekit.models.presets import short_name
from probekit.probes.controls import check_controls
from probekit.tasks import building
from probekit.tasks.base import BuildSettings
from probekit.tasks.input_controls import INPUT_CONTROLS, change_inputs

if TYPE_CHECKING:
    from probekit.extraction.settings import ExtractionSettings
    from probekit.extraction.store import Activations
    from probekit.interventions.settings import InterventionSettings
    from probekit.probes.probing import ProbeSettings
    from probekit.probes.results import ProbeResults
    from probekit.report.results import Results
    from probekit.report.saved_run import SavedRun

MOST_RESAMPLES_OF_SIMILARITY = 200

HomeLike = str | Path | paths.Home | None


# ---------------------------------------------------------------------------------------- examples


def build_examples(
    dataset: str | Path,
    *,
    run: str | None = None,
    home: HomeLike = None,
    **settings: Any,
) -> pd.DataFrame:
    """Draw images from a dataset, ask tasks about them, and split them by image.

    Parameters
    ----------
    dataset : str or Path
        A folder in COCO's layout or another one of ``data/README.md``, or ``"scenes"``, which draws
        as many scenes as are needed.
    run : str or None
        Name of the run that the examples belong to: activations and results are filed under it.
        None takes a fingerprint of the settings.
    home : str, Path, Home or None
        Where artefacts go; None takes ``PROBEKIT_HOME``, else the checkout, else the working
        directory.
    **settings
        Attributes of :class:`probekit.tasks.base.BuildSettings`: `train`, `validation`, `test`
        (images), `tasks`, `categories`, `seed`, ...

    Returns
    -------
    DataFrame
        One row per example: `image_id, file, split, task, item, prompt, labels, mask`, the
        categories that it asks about (`asked`), what its task is (`kind, classes, question,
        answers, variant_of`), and `run`. It is read back where nothing has changed.

    Raises
    ------
    FileNotFoundError, ValueError
        The dataset is not there or lacks something, a setting makes no sense; the message names the
        fix.
    """
    home = paths.Home.find(home)
    if run is not None:
        parameters.read_parameter("run", run)
    build = build_settings(dataset, settings, home=home)
    run = run or f"run-{paths.fingerprint(build)}"
    examples = building.build_examples(build, examples_folder(run, home), home=home)
    return examples.assign(run=run)


def build_settings(
    dataset: str | Path, settings: dict[str, Any], *, home: HomeLike = None
) -> BuildSettings:
    """Return the settings of an examples table; ``"scenes"`` are drawn where they are not yet.

    Raises
    ------
    ValueError
        There is no such setting, or a value is not allowed.
    """
    home = paths.Home.find(home)
    values = parameters.read_settings(BuildSettings, settings)
    dataset = parameters.read_parameter("dataset", dataset)
    if dataset != "scenes":
        return BuildSettings(home.relative(home.resolve(dataset)), **values)
    sizes = BuildSettings("scenes", **values)
    count = sizes.train + sizes.validation + sizes.test
    folder = home.data / "coco" / f"scenes-{count}-seed{sizes.seed}"
    write_scenes(folder, n=count, seed=sizes.seed)
    return BuildSettings(home.relative(folder), **values)


def examples_folder(run: str, home: HomeLike = None) -> Path:
    """Return the folder of a run's examples.

    Raises
    ------
    ValueError
        The run's name is no name of one folder.
    """
    parameters.read_parameter("run", run)
    return paths.Home.find(home).data / "tasks" / run


def open_examples(run: str, *, home: HomeLike = None) -> pd.DataFrame:
    """Read the examples of a run.

    Raises
    ------
    FileNotFoundError
        They have not been built.
    """
    return building.load_examples(examples_folder(run, home)).assign(run=run)


def run_of(examples: pd.DataFrame) -> str:
    """Return the run that examples belong to.

    Raises
    ------
    ValueError
        They belong to several, or to none.
    """
    runs = examples["run"].unique() if "run" in examples.columns else []
    if len(runs) != 1:
        raise ValueError(
            f"the examples belong to {len(runs)} runs: give them one with "
            'examples = examples.assign(run="name")'
        )
    return str(runs[0])


# ------------------------------------------------------------------------------------- activations


def extract(
    model: str,
    examples: pd.DataFrame,
    *,
    controls: Sequence[str] = (),
    device: str | None = None,
    engine: str = "local",
    copies: int | None = None,
    root: str | None = None,
    home: HomeLike = None,
    **settings: Any,
) -> Activations:
    """Run a frozen model on the examples and pool every layer's hidden states.

    Parameters
    ----------
    model : str
        Hub id, ``id@revision``, checkpoint folder, or the name of a preset.
    examples : DataFrame
        As :func:`build_examples` returns it.
    controls : sequence of str
        Controls of the inputs to extract beside them: no_image, no_text, wrong_image.
    device : str or None
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; None takes the best one.
    engine, copies
        Who makes the shards, see :class:`probekit.extraction.launch.Launcher`.
    root : str or None
        Folder or URL of all activations; None takes ``data/activations`` of the home.
    home : str, Path, Home or None
        See :func:`build_examples`.
    **settings
        Attributes of :class:`probekit.extraction.settings.ExtractionSettings`: `poolings`,
        `stages`, `untrained`, `longest_side`, `dtype`, ...

    Returns
    -------
    Activations
        ``activations["lm.12", "mean"]`` is (n examples, d). The labels travel with them.
    """
    from probekit.extraction.extracting import extract_tables
    from probekit.extraction.launch import Launcher

    controls = parameters.read_parameter("controls", controls)
    parameters.read_parameters({"engine": engine, "copies": copies})
    return extract_tables(
        extraction_settings(model, settings),
        tables_with_controls(examples, controls),
        device=device,
        launcher=Launcher(engine, copies=copies),
        root=root,
        home=paths.Home.find(home),
    )


def extraction_settings(model: str, settings: dict[str, Any]) -> ExtractionSettings:
    """Return the settings of an extraction.

    Raises
    ------
    ValueError
        There is no such setting, or a value is not allowed.
    """
    from probekit.extraction.settings import ExtractionSettings

    model = parameters.read_parameter("model", model)
    return ExtractionSettings(model, **parameters.read_settings(ExtractionSettings, settings))


def check_models(
    models: Sequence[str], untrained: Sequence[str], *, home: HomeLike = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Check the models of a run, and which of them are read with random weights too.

    Parameters
    ----------
    models, untrained : sequence of str
        As 02_extract declares them.
    home : str, Path, Home or None
        See :func:`build_examples`.

    Returns
    -------
    tuple of str, tuple of str
        The same names; a single name is read as a list of one.

    Raises
    ------
    ValueError
        None is named, two have the same name in tables, or an untrained one is none of the run's.
    FileNotFoundError
        There is no such model.
    """
    models = parameters.read_parameter("models", models)
    untrained = parameters.read_parameter("untrained", untrained)
    if not models:
        raise ValueError("models=[]: name at least one")
    trained = _models_by_short_name("models", models, home)
    for name, model in _models_by_short_name("untrained", untrained, home).items():
        if name not in trained:
            raise ValueError(
                f"untrained={list(untrained)}: {model} is no model of this run, and random weights "
                f"are the control of one: take names out of models={list(models)}, or [] for none"
            )
    return tuple(models), tuple(untrained)


def _models_by_short_name(parameter: str, models: Sequence[str], home: HomeLike) -> dict[str, str]:
    """Return models by what tables call them, and refuse two of one name."""
    by_name: dict[str, str] = {}
    for model in models:
        name = short_name(model, home)
        if name in by_name:
            raise ValueError(
                f"{parameter}={list(models)}: {by_name[name]} and {model} are both called {name} "
                "in tables: name each model once, rename a folder or a class, or name hub ids "
                "with their revision (id@revision)"
            )
        by_name[name] = model
    return by_name


def tables_with_controls(
    examples: pd.DataFrame, controls: Sequence[str]
) -> dict[str, pd.DataFrame]:
    """Return the examples as ``"none"``, and with the inputs that each control gives the model.

    Raises
    ------
    ValueError
        No such control of the inputs.
    """
    return {name: change_inputs(examples, name) for name in ("none", *controls)}


def record_activations(
    activations: Iterable[Activations], *, run: str, home: HomeLike = None
) -> Path:
    """Write down which activations a run has, so that :func:`open_activations` finds them.

    Returns
    -------
    Path
        ``data/activations/<run>.json``.
    """
    parameters.read_parameter("run", run)
    records = [view.record for view in with_controls(activations)]
    file = paths.Home.find(home).data / "activations" / f"{run}.json"
    return paths.write_json(file, {"stores": records})


def open_activations(run: str, *, home: HomeLike = None) -> list[Activations]:
    """Open all activations of a run: of each model, and of each control of the inputs.

    Raises
    ------
    FileNotFoundError
        Examples or activations have not been made.
    """
    from probekit.extraction.store import Activations

    home = paths.Home.find(home)
    examples = open_examples(run, home=home)
    record = paths.read_json(home.data / "activations" / f"{run}.json")
    return [
        Activations.open(one, change_inputs(examples, one["control"]), home=home)
        for one in record["stores"]
    ]


def with_controls(activations: Iterable[Activations]) -> list[Activations]:
    """Return activations, each followed by those of its controls."""
    views = []
    for view in activations:
        views += [view, *view.controls.values()]
    return views


# ----------------------------------------------------------------------------------------- results


def probe(
    activations: Activations | Iterable[Activations],
    *,
    localise: str = "",
    heat_images: int = 100,
    epochs: int = 10,
    patience: int | None = None,
    device: str | None = None,
    n_jobs: int = 1,
    home: HomeLike = None,
    **settings: Any,
) -> Results:
    """Train a light probe on every layer, score it with its controls, and save the results.

    Parameters
    ----------
    activations : Activations or several
        Of one or several models, trained or not; their controls of the inputs are probed too.
    localise : str
        A local task whose probes are also asked of every image token; "" leaves it out.
    heat_images : int
        Test images whose heat maps are kept for the explorer.
    epochs, patience
        Of the probes "linear" and "mlp", see :class:`probekit.probes.adam.AdamSettings`.
    device : str or None
        Where probes are trained and scored, and models run once more for `localise`; None takes
        the best one.
    n_jobs : int
        On a CPU, how many models and controls are probed at once, each in a process of its own.
        They share cores and `memory_gb`. Results are the same to rounding.
    home : str, Path, Home or None
        See :func:`build_examples`.
    **settings
        Attributes of :class:`probekit.probes.probing.ProbeSettings`: `probes`, `seeds`,
        `strengths`, `controls` (shuffled, control_task), `codelength`, `resamples`, `memory_gb`.

    Returns
    -------
    Results
        They are in ``data/probes/<run>``, too; what is there already for these settings is read
        back.
    """
    from probekit.probes.fitting import training_device
    from probekit.probes.probing import stored_results
    from probekit.probes.results import ProbeResults
    from probekit.processes import map_in_processes
    from probekit.report.results import Results

    home = paths.Home.find(home)
    views, examples = _views_and_examples(activations)
    run = run_of(examples)
    parameters.read_parameters({"localise": localise, "heat_images": heat_images, "n_jobs": n_jobs})
    folder = results_folder(run, home)
    device_of_probes = training_device(device)
    n_jobs = _jobs_on(device_of_probes, n_jobs)
    if localise:  # heat maps need them
        instances = building.load_instances(examples_folder(run, home))
    else:
        instances = _find_instances(run, home)
    plan = _ProbePlan(
        settings=probe_settings(settings, epochs=epochs, patience=patience),
        folder=folder,
        device=device_of_probes,
        device_of_models=device,
        localise=localise,
        heat_images=heat_images,
        instances=instances,
        n_jobs=n_jobs,
        home=home,
    )
    if n_jobs > 1:
        missing = [
            view
            for view in views
            if stored_results(view, settings=plan.settings, folder=folder) is None
        ]
        missing.sort(key=lambda view: view.control != "none")  # what takes longest goes first
        map_in_processes(plan.write_results, missing, n_jobs=n_jobs)
    parts = [plan.results_of(view) for view in views]
    compared = _compare_models(views, plan.settings, device=device_of_probes)
    results = ProbeResults.join([*parts, compared])
    results.write(folder, building.table_fingerprint(examples))
    return Results.of(results, examples, instances=instances)


def _jobs_on(device: str, n_jobs: int) -> int:
    """Return how many processes work on a device at once."""
    if n_jobs > 1 and device != "cpu":
        tqdm.write(f"n_jobs={n_jobs} is for CPUs: on {device} one model comes after the other")
        return 1
    return n_jobs


@dataclass(frozen=True, kw_only=True)
class _ProbePlan:
    """What is done with the activations of every model and control of a run."""

    settings: ProbeSettings
    folder: Path
    device: str
    device_of_models: str | None
    localise: str
    heat_images: int
    instances: pd.DataFrame
    n_jobs: int
    home: paths.Home

    def write_results(self, view: Activations) -> None:
        """Do what is not on disk; in a process of its own."""
        self.results_of(view)

    def results_of(self, view: Activations) -> ProbeResults:
        """Return probes, answers and heat maps; what is on disk is read back."""
        from probekit.answers.scores import stored_answers
        from probekit.probes.localisation import add_localisation
        from probekit.probes.probing import probe_activations
        from probekit.probes.results import ProbeResults

        probed = probe_activations(
            view,
            settings=self.settings,
            folder=self.folder,
            device=self.device,
            n_jobs=self.n_jobs,
        )
        answers = stored_answers(
            view,
            probed,
            folder=self.folder,
            resamples=self.settings.resamples,
            seed=self.settings.seeds[0],
            device=self.device,
        )
        results = ProbeResults.join([probed, answers])
        if not self.localise or view.control != "none":
            return results
        return add_localisation(
            view,
            results=results,
            instances=self.instances,
            task=self.localise,
            folder=self.folder,
            keep=self.heat_images,
            resamples=self.settings.resamples,
            device=self.device_of_models,
            home=self.home,
        )


def _find_instances(run: str, home: paths.Home) -> pd.DataFrame:
    """Return the instances of a run's images, none where its examples were not built here."""
    try:
        return building.load_instances(examples_folder(run, home))
    except FileNotFoundError:
        return pd.DataFrame(columns=["image_id", "category"])


def _views_and_examples(
    activations: Activations | Iterable[Activations],
) -> tuple[list[Activations], pd.DataFrame]:
    """Return activations with their controls, and the examples as no control has changed them."""
    from probekit.extraction.store import Activations

    views = with_controls([activations] if isinstance(activations, Activations) else activations)
    if not views:
        raise ValueError("there are no activations to probe: extract some first")
    plain = next((view for view in views if view.control == "none"), views[0])
    return views, plain.examples


def intervene(
    activations: Activations | Iterable[Activations],
    *,
    device: str | None = None,
    n_jobs: int = 1,
    home: HomeLike = None,
    **settings: Any,
) -> pd.DataFrame:
    """Change something inside models, see what becomes of their answers, and save the table.

    Parameters
    ----------
    activations : Activations or several
        Of a run's models. Those with random weights and those of controls are passed over.
    device : str or None
        Where models run; None takes the best one.
    n_jobs : int
        On a CPU, how many models at once, each in a process of its own.
    home : str, Path, Home or None
        See :func:`build_examples`.
    **settings
        Attributes of :class:`probekit.interventions.settings.InterventionSettings`: `watch`,
        `layers`, `tokens`, `erase`, `doses`, `routes`, `window`, `inputs`, `images`, ...

    Returns
    -------
    DataFrame
        One row per model, task, layer, intervention, site, dose, control and metric. `layer` is
        that whose states are changed, or that enters the first block of a cut. `value` has the
        interval `lo` to `hi`. The metrics: ``"accuracy"``, ``"margin"`` (logit of the right answer
        less that of all others), ``"says_yes"`` and ``"yes_margin"`` of binary tasks, ``"effect"``
        and ``"margin_effect"`` (less those of the model left alone), ``"over_random"`` and
        ``"margin_over_random"`` (less those with a random subspace), and ``"probe_accuracy"`` of
        the run's ``"logreg"`` probe at `read_layer`, of the `pooling` "last". Rows of the `site`
        ``"pixels"`` are about changed images (`inputs`), beside the same images as they are
        (``"whole_image"``): there probes of all poolings are read, and ``"probe_effect"`` is their
        accuracy less that on whole images. Differences are paired on the test images;
        `p_holm` is corrected for the number of layers. A row without a value has its `reason`. It
        is in ``data/interventions/<run>``, too; what is there already is not done again.
    """
    from probekit.interventions.study import study_models
    from probekit.probes.fitting import training_device
    from probekit.probes.results import ProbeResults
    from probekit.tasks.changed_images import ImageChanger

    home = paths.Home.find(home)
    views, examples = _views_and_examples(activations)
    run = run_of(examples)
    parameters.read_parameters({"n_jobs": n_jobs})
    wanted = intervention_settings(settings)
    fingerprint = building.table_fingerprint(examples)
    plain = [view for view in views if view.control == "none"]
    if any(building.table_fingerprint(view.examples) != fingerprint for view in plain):
        raise ValueError(
            "the activations are of different examples: give those of one run, as "
            "open_activations(run) returns them"
        )
    try:
        results = ProbeResults.read(results_folder(run, home), fingerprint)
    except (FileNotFoundError, ValueError) as error:
        tqdm.write(f"answers alone are watched, and no probes: {error}")
        results = None

    instances = _find_instances(run, home)

    def make_changer() -> ImageChanger:
        built = examples_folder(run, home)
        return ImageChanger(
            instances,
            building.load_outlines(built, home=home) if len(instances) else None,
            folder=interventions_folder(run, home) / "images",
            home=home,
        )

    return study_models(
        views,
        examples,
        wanted,
        results=results,
        instances=instances,
        make_changer=make_changer,
        folder=interventions_folder(run, home),
        examples_fingerprint=fingerprint,
        device=device,
        n_jobs=_jobs_on(training_device(device), n_jobs),
        home=home,
    )


def intervention_settings(settings: dict[str, Any]) -> InterventionSettings:
    """Return the settings of the interventions.

    Raises
    ------
    ValueError
        There is no such setting, or a value is not allowed.
    """
    from probekit.interventions.settings import InterventionSettings

    wanted = InterventionSettings(**parameters.read_settings(InterventionSettings, settings))
    wanted.check()
    return wanted


def interventions_folder(run: str, home: HomeLike = None) -> Path:
    """Return the folder of a run's interventions.

    Raises
    ------
    ValueError
        The run's name is no name of one folder.
    """
    parameters.read_parameter("run", run)
    return paths.Home.find(home).data / "interventions" / run


def _compare_models(
    views: Sequence[Activations], settings: ProbeSettings, *, device: str
) -> ProbeResults:
    """Compare the layers of all trained models, by the first pooling that all of them have."""
    from probekit.probes.probing import control_name
    from probekit.probes.results import ProbeResults
    from probekit.probes.similarity import compare_models

    nothing = ProbeResults(metrics=pd.DataFrame(), losses=pd.DataFrame())
    trained = [view for view in views if control_name(view) == "none" and "lm" in view.stages]
    shared = [
        pooling
        for pooling in (trained[0].poolings if trained else ())
        if all(pooling in view.poolings for view in trained)
    ]
    if not shared:
        return nothing
    try:
        similarity, ranks = compare_models(
            trained,
            pooling=shared[0],
            resamples=min(settings.resamples, MOST_RESAMPLES_OF_SIMILARITY),
            device=device,
        )
    except ValueError as error:
        tqdm.write(f"layers are not compared with each other: {error}")
        return nothing
    fingerprint = paths.fingerprint(settings, [view.fingerprint for view in trained])
    return replace(nothing, similarity=similarity, ranks=ranks).with_settings(fingerprint)


def probe_settings(
    settings: dict[str, Any], *, epochs: int = 10, patience: int | None = None
) -> ProbeSettings:
    """Return the settings of the probes.

    Raises
    ------
    ValueError
        There is no such setting, or a value is not allowed.
    """
    from probekit.probes.adam import AdamSettings
    from probekit.probes.probing import ProbeSettings

    training = parameters.read_parameters({"epochs": epochs, "patience": patience})
    values = parameters.read_settings(ProbeSettings, settings)
    return ProbeSettings(training=AdamSettings(**training), **values)


def results_folder(run: str, home: HomeLike = None) -> Path:
    """Return the folder of a run's results.

    Raises
    ------
    ValueError
        The run's name is no name of one folder.
    """
    parameters.read_parameter("run", run)
    return paths.Home.find(home).data / "probes" / run


def open_run(run: str, *, home: HomeLike = None) -> SavedRun:
    """Open all that is on disk of a run: examples, results, heat maps.

    Raises
    ------
    FileNotFoundError, ValueError
        A step of the run has not been done, or belongs to other examples.
    """
    from probekit.report.saved_run import SavedRun

    parameters.read_parameter("run", run)
    return SavedRun.open(run, home)


def split_controls(controls: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tell controls of the inputs, which are extracted, from those of the labels.

    Raises
    ------
    ValueError
        A name is neither.
    """
    controls = parameters.read_parameter("controls", controls)
    check_controls(controls)
    of_inputs = tuple(name for name in controls if name in INPUT_CONTROLS)
    of_labels = tuple(name for name in controls if name not in INPUT_CONTROLS)
    return of_inputs, of_labels
