"""All that is on disk of a run, opened together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from probekit.answers.scores import Said
from probekit.extraction.reloading import reload_model
from probekit.extraction.store import Activations
from probekit.images import load_rgb
from probekit.interventions.live import LiveAnswers
from probekit.interventions.study import ModelStudy, read_settings, read_table
from probekit.models.load import Vlm
from probekit.models.token_grid import NoTokenGrid, TokenGrid, check_token_grid
from probekit.paths import Home, read_json, write_atomic, write_json
from probekit.probes.localisation import (
    CHECKED_IMAGES,
    HeatMap,
    StoredHeat,
    compute_heat,
    relative_boxes,
)
from probekit.probes.results import LENS, ProbeKey, ProbeResults
from probekit.probes.token_readers import LensReader, ProbeReader, TokenReader
from probekit.report.results import Results
from probekit.report.used import erasures_of
from probekit.tasks import building

if TYPE_CHECKING:
    from probekit.report.run_comparison import RunComparison

TABLE_CONTENTS = {
    "metrics": (
        "a row per model, stage, layer, pooling, task, probe, control, split, metric, class and "
        "seed"
    ),
    "losses": "a row per probe trained with Adam, epoch and split",
    "interventions": ("a row per model, task, layer, intervention, site, dose, control and metric"),
    "transfer": "the score of each layer's probe on the states of other layers and wordings",
}
OVERVIEW_CONTENT = (
    "a row per task, model and pooling: best layer, plateau, selectivity, answer, and each control"
)
CHOSEN_BY_DEVICE = ("device", "dtype")  # settings that nobody has to set
SLICES_CONTENT = (
    "a row per model, pooling, task, probe at its best layer or answer, covariate and slice of the "
    "test examples"
)


def list_runs(home: str | Path | Home | None = None) -> list[str]:
    """Return the names of the runs that have probe results, the newest first.

    Parameters
    ----------
    home : str, Path or Home, optional
        See :meth:`probekit.paths.Home.find`.
    """
    files = (Home.find(home).data / "probes").glob("*/results.json")
    by_age = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.parent.name for file in by_age]


class _LiveModel(NamedTuple):
    """A model that answers while something is erased."""

    name: str
    task: str
    answers: LiveAnswers


class _LoadedModel(NamedTuple):
    """A model that makes heat maps which are not stored; `has_head` for the lens."""

    name: str
    control: str
    has_head: bool
    vlm: Vlm
    grid: TokenGrid
    readers: dict[ProbeKey, TokenReader]


@dataclass
class SavedRun:
    """A run with probe results.

    Attributes
    ----------
    name : str
        Name of the run.
    home : Home
        Where its files are. Files in the examples start here.
    results : Results
        The results and the examples.
    stored_heat : StoredHeat
        The heat maps of the test images that were kept.
    """

    name: str
    home: Home
    results: Results
    stored_heat: StoredHeat
    _model: _LoadedModel | None = field(default=None, init=False, repr=False)
    _live: _LiveModel | None = field(default=None, init=False, repr=False)

    @classmethod
    def open(cls, name: str, home: str | Path | Home | None = None) -> SavedRun:
        """Open a run.

        Parameters
        ----------
        name : str
            Name of the run.
        home : str, Path or Home, optional
            See :meth:`probekit.paths.Home.find`.

        Raises
        ------
        FileNotFoundError, ValueError
            A step of the run has not been done, or belongs to another examples table.
        """
        home = Home.find(home)
        examples = building.load_examples(home.data / "tasks" / name)
        fingerprint = building.table_fingerprint(examples)
        probe_results = ProbeResults.read(home.data / "probes" / name, fingerprint)
        return cls(
            name=name,
            home=home,
            results=Results.of(
                probe_results,
                examples,
                read_table(
                    home.data / "interventions" / name,
                    fingerprint,
                    activation_folders=[
                        store["record"]["folder"] for store in probe_results.stores
                    ],
                ),
                building.load_instances(home.data / "tasks" / name),
            ),
            stored_heat=StoredHeat(probe_results.heat, home),
        )

    @property
    def examples(self) -> pd.DataFrame:
        """The examples of the run, all splits."""
        return self.results.examples

    @property
    def instances(self) -> pd.DataFrame:
        """The instances of the run's images, see :func:`probekit.tasks.building.load_instances`."""
        return self.results.instances

    @cached_property
    def settings(self) -> dict[str, str]:
        """What the run was made with: step and name of each setting, and its value in words."""
        build = read_json(self.home.data / "tasks" / self.name / "build.json")["settings"]
        settings = {f"data: {name}": setting_words(name, value) for name, value in build.items()}
        for store in self.results.stores:
            record = store["record"]
            meta = store["meta"]
            if record["control"] != "none":
                continue
            model = f"{meta['model']} (untrained)" if meta["untrained"] else meta["model"]
            extraction = {
                **meta["settings"],
                "device": meta["device"],
                "stages": record["stages"],
                "poolings": record["poolings"],
            }
            settings[f"extraction: {model}"] = setting_words("extraction", extraction)
            version_words = [f"{name} {value}" for name, value in meta["versions"].items()]
            settings[f"versions: {model}"] = ", ".join(version_words)
        for name, value in self.results.stores[0]["settings"].items():
            settings[f"probes: {name}"] = setting_words(name, value)
        return settings

    def compare(
        self,
        *others: SavedRun | str,
        models: Sequence[tuple[str, str]] = (),
        tasks: Sequence[str] = (),
        poolings: Sequence[str] = (),
        probe: str = "logreg",
        resamples: int = 2000,
    ) -> RunComparison:
        """Compare this run with others: scores by layer, and whether the peak moved.

        Parameters
        ----------
        *others : SavedRun or str
            Other runs; a name is one of the same home.
        models, tasks, poolings, probe, resamples
            See :func:`probekit.report.run_comparison.compare_runs`.

        Returns
        -------
        RunComparison
            With `peaks` and `differences` as tables, `summary()` and `write_page()`.

        Raises
        ------
        FileNotFoundError, ValueError
            There is no such run, or nothing that can be compared.
        """
        from probekit.report.run_comparison import compare_runs

        runs = [SavedRun.open(run, self.home) if isinstance(run, str) else run for run in others]
        return compare_runs(
            [self, *runs],
            models=models,
            tasks=tasks,
            poolings=poolings,
            probe=probe,
            resamples=resamples,
        )

    def write_tables(self, folder: Path, *, probe: str = "logreg") -> dict[str, str]:
        """Write the tables as CSV files with five digits per number, and what they come from.

        Parameters
        ----------
        folder : Path
            Made where it does not exist.
        probe : str
            The kind of probe whose best layers are in the overview and the table of slices.

        Returns
        -------
        dict of str to str
            What each file holds, by its name.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(self.results.overview(probe=probe), folder / "overview.csv")
        contents = {"overview.csv": OVERVIEW_CONTENT}
        for name, words in TABLE_CONTENTS.items():
            if name == "interventions" and self.results.interventions.empty:
                (folder / "interventions.csv").unlink(missing_ok=True)
                continue
            write_csv(getattr(self.results, name), folder / f"{name}.csv")
            contents[f"{name}.csv"] = words
        write_csv(self.results.slices(probe=probe), folder / "slices.csv")
        contents["slices.csv"] = SLICES_CONTENT
        sources = {}
        for store in self.results.stores:
            names = ("record", "meta", "settings", "versions")
            sources[store["fingerprint"]] = {name: store[name] for name in names}
        write_json(folder / "settings.json", sources)
        contents["settings.json"] = (
            "what the column settings of the tables stands for, and versions of libraries"
        )
        return contents

    def test_examples(self, task: str) -> pd.DataFrame:
        """Return the test examples of a task, in the order of its predictions."""
        examples = self.examples
        rows = examples[(examples.task == task) & (examples.split == "test")]
        return rows.reset_index(drop=True)

    def boxes(self, image_id: int, category: str) -> np.ndarray:
        """Return the boxes of an image's instances of a category, crowds left out.

        Returns
        -------
        ndarray, (b, 4)
            Left, top, right, bottom, in shares of the image.
        """
        instances = self._instances_of(image_id)
        is_single = instances.iscrowd == 0
        return relative_boxes(instances[(instances.category == category) & is_single])

    def categories_of(self, image_id: int) -> list[str]:
        """Return the categories that an image has instances of, in alphabetical order."""
        return sorted(set(self._instances_of(image_id).category))

    def _instances_of(self, image_id: int) -> pd.DataFrame:
        return self._instances_by_image.get(image_id, self.instances[:0])

    @cached_property
    def _instances_by_image(self) -> dict[int, pd.DataFrame]:
        test_images = self.examples.image_id[self.examples.split == "test"]
        instances = self.instances[self.instances.image_id.isin(test_images)]
        return dict(iter(instances.groupby("image_id")))

    def heat_map(
        self, key: ProbeKey, example: pd.Series, *, run_model: bool = True
    ) -> HeatMap | None:
        """Return what is read off each image token of a test example.

        Parameters
        ----------
        key : ProbeKey
            Who reads them: logreg probes, or the lens, see
            :attr:`probekit.probes.results.ProbeResults.heat`.
        example : Series
            A row of :meth:`test_examples`.
        run_model : bool
            Run the model over this example where its heat is not stored; the model is loaded once.

        Returns
        -------
        HeatMap or None
            None where no heat is stored and the model is not to run.

        Raises
        ------
        NoTokenGrid
            It is not known where in the image the model's tokens lie.
        NoAnswers
            The lens has no words to read.
        """
        stored = self.stored_heat.get(key, example.image_id)
        if stored is not None or not run_model:
            return stored
        model = self._load_model(key, prompt=example.prompt)
        longest_side = self._extraction_settings(key)["longest_side"]
        image = load_rgb(self.home.resolve(example.file), longest_side)
        prepared = model.vlm.prompt_processor.prepare(image, [example.prompt])
        if key not in model.readers and key.probe == LENS:
            classes = self.results.tasks[key.task].classes
            model.readers[key] = LensReader.of(model.vlm, classes, prepared)
        elif key not in model.readers:
            model.readers[key] = ProbeReader(self.results.weights[key], model.vlm)
        reader = model.readers[key]
        cells = [model.grid(prepared, image.size)]
        ((heat_map,),) = compute_heat(model.vlm, [prepared], readers=[reader], cells=cells)
        return heat_map

    def erasures(self, model: str, task: str) -> dict[str, list[str]]:
        """Return what was erased while a model answered a task, and from which sites."""
        table = self.results.interventions
        if table.empty:
            return {}
        rows = table[(table.model == model) & (table.task == task) & table.value.notna()]
        return {
            name: list(dict.fromkeys(rows.site[rows.intervention == name]))
            for name in erasures_of(rows)
        }

    def answer_without(
        self, example: pd.Series, *, model: str, layer: int, erasure: str, site: str
    ) -> Said:
        """Ask a model about a test example while a concept is erased from one of its layers.

        The model is loaded once, and stays.

        Parameters
        ----------
        example : Series
            A row of :meth:`test_examples`.
        model : str
        layer : int
            Number of the layer.
        erasure, site : str
            As in the table of interventions.

        Raises
        ------
        NoEdit, NoInterventions
            It cannot be done.
        """
        live = self._live
        if live is None or live[:2] != (model, example.task):
            self._release_models()
            live = _LiveModel(model, example.task, LiveAnswers(self._study(model), example.task))
            self._live = live
        p_c = live.answers.ask(example, layer=layer, name=erasure, site=site)
        return Said.of(p_c, example, self.results.tasks[example.task])

    def _release_models(self) -> None:
        """Drop what is loaded: there is one at a time."""
        if self._model is not None:
            self._model.vlm.release()
            self._model = None
        if self._live is not None:
            self._live.answers.release()
            self._live = None

    def _study(self, model: str) -> ModelStudy:
        folder = self.home.data / "interventions" / self.name
        wanted = ("none", model, False)
        for store in self.results.stores:
            meta = store["meta"]
            if (store["record"]["control"], meta["model"], meta["untrained"]) == wanted:
                return ModelStudy(
                    Activations.open(store["record"], self.examples, home=self.home),
                    read_settings(folder),
                    None,
                    self.instances,
                    folder,
                    None,
                    self.home,
                )
        raise KeyError(f"no activations of {model} in this run")

    def _load_model(self, key: ProbeKey, *, prompt: str) -> _LoadedModel:
        """Return the model of a key; one is kept at a time."""
        model = self._model
        needs_head = key.probe == LENS
        is_same = model is not None and (model.name, model.control) == (key.model, key.control)
        if model is not None and is_same and (model.has_head or not needs_head):
            return model
        self._release_models()
        settings = self._extraction_settings(key)
        vlm = reload_model(settings, home=self.home, with_head=needs_head)
        test_files = self.examples.file[self.examples.split == "test"].unique()
        images = [load_rgb(self.home.resolve(file)) for file in test_files[:CHECKED_IMAGES]]
        try:
            check_token_grid(vlm, images, prompt=prompt)
        except NoTokenGrid:
            vlm.release()
            raise
        self._model = _LoadedModel(key.model, key.control, needs_head, vlm, TokenGrid(vlm), {})
        return self._model

    def _extraction_settings(self, key: ProbeKey) -> dict[str, Any]:
        wanted = ("none", key.model, key.control == "untrained")
        for store in self.results.stores:
            meta = store["meta"]
            if (store["record"]["control"], meta["model"], meta["untrained"]) == wanted:
                return meta["settings"]
        raise KeyError(f"no activations of {key.model} in this run")


def setting_words(name: str, value: object) -> str:
    """Return the value of a setting as people write it, without Python's brackets and quotes.

    Parameters
    ----------
    name : str
        Name of the setting.
    value : object
        What a JSON file holds: yes or no, a number, text, a list or a mapping of those, or None,
        which is an empty text but for what is then chosen by the device.
    """
    if value is None:
        return "chosen by device" if name in CHOSEN_BY_DEVICE else ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(setting_words(name, item) for item in value)
    if isinstance(value, dict):
        words = {key: setting_words(key, item) for key, item in value.items()}
        return "; ".join(f"{key}: {text}" for key, text in words.items() if text)
    return str(value)


def write_csv(table: pd.DataFrame, file: Path) -> None:
    """Write a table as a CSV file with five digits per number."""
    write = partial(table.to_csv, index=False, float_format=_five_digits, encoding="utf-8")
    write_atomic(file, write)


def _five_digits(value: float) -> str:
    return f"{value:.5g}" if abs(value) < 1e5 else f"{value:.0f}"
