"""All interventions on one model: fitted, checked, run where they are not on disk, and scored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from probekit import paths
from probekit.extraction import loading
from probekit.extraction.answer_heads import ANSWER_POOLING
from probekit.extraction.extracting import extract_tables
from probekit.extraction.reloading import reload_model
from probekit.extraction.settings import ExtractionSettings, suitable_batch_tokens
from probekit.extraction.shards import model_inputs
from probekit.extraction.store import Activations
from probekit.interventions.concepts import (
    PARTS_OF_SITE,
    POOLING_OF_SITE,
    ConceptNames,
    FittedEdits,
    select_training,
)
from probekit.interventions.inputs import FEWEST_IMAGES, change_test_images, score_inputs
from probekit.interventions.object_tokens import ObjectMarker, find_object_boxes
from probekit.interventions.running import Reader, Readings, Work, run_interventions
from probekit.interventions.scores import COLUMNS, Done, TaskScores, complete
from probekit.interventions.settings import (
    NOTHING,
    OBJECT_ROUTE,
    InterventionSettings,
    plan_interventions,
)
from probekit.models.load import Vlm
from probekit.models.output_head import AnswerHead, NoAnswers
from probekit.models.replay import why_no_replay
from probekit.models.replay_check import ReplayVerdict, check_replay
from probekit.models.sharing import take_few
from probekit.probes.fitting import training_device
from probekit.probes.labels import LabelledTask, LabelSet
from probekit.probes.probing import control_name
from probekit.probes.results import ProbeKey, ProbeResults
from probekit.probes.weights import ProbeWeights
from probekit.processes import map_in_processes
from probekit.tasks.base import task_infos
from probekit.tasks.changed_images import ImageChanger

# Of what the files hold: those of another version are made again.
VERSION = 2
PROBE = "logreg"
TABLE = "interventions.parquet"
RECORD = "interventions.json"
# How many times the tokens of an extraction's batch are run through most of a model at once, and
# the bytes of states of all layers that are kept for that.
RERUN_PART = 4
KEPT_BYTES = 2_000_000_000


class NoInterventions(ValueError):
    """Why a model's answers cannot be watched, in one line."""


@dataclass(frozen=True)
class Question:
    """A task whose answers are watched.

    Attributes
    ----------
    name : str
    labels : LabelSet
        Of its test examples alone.
    examples : DataFrame
        Its test examples, rows of one image side by side.
    tokens : list of list of int
        Of each answer, see :meth:`probekit.models.output_head.AnswerHead.answer_tokens`.
    concepts : ConceptNames
    boxes : dict of hashable to ndarray
        Of the objects that it asks about, see
        :func:`probekit.interventions.object_tokens.find_object_boxes`.
    """

    name: str
    labels: LabelSet
    examples: pd.DataFrame
    tokens: list[list[int]]
    concepts: ConceptNames
    boxes: dict[Hashable, np.ndarray]


@dataclass(frozen=True)
class ModelStudy:
    """The interventions on one model.

    Attributes
    ----------
    activations : Activations
        Of the trained model, with all examples of the run.
    settings : InterventionSettings
    results : ProbeResults or None
        Whose probes are read after interventions; None for answers alone.
    instances : DataFrame
        See :func:`probekit.tasks.building.load_instances`.
    folder : Path
        Of all files of the run's interventions.
    device : str or None
        Of the model.
    home : Home
    """

    activations: Activations
    settings: InterventionSettings
    results: ProbeResults | None
    instances: pd.DataFrame
    folder: Path
    device: str | None
    home: paths.Home

    @property
    def layers(self) -> list[str]:
        """Names of the decoder's layers."""
        return [layer for layer in self.activations.layers if layer.startswith("lm.")]

    def run(self) -> pd.DataFrame:
        """Do what is not on disk yet, and score everything.

        Returns
        -------
        DataFrame
            See :func:`probekit.workflow.intervene`; empty where nothing can be done, which a line
            says.
        """
        model = self.activations.meta["model"]
        try:
            head = self.head()
            questions = self.questions(head)
        except NoInterventions as error:
            tqdm.write(f"no interventions on {model}: {error}")
            return pd.DataFrame()
        works = {one.name: self._work(one) for one in questions}
        if any(work.missing() for work in works.values()):
            try:
                self._run_missing(questions, works, head)
            except NoInterventions as error:
                tqdm.write(f"no interventions on {model}: {error}")
                return pd.DataFrame()
        return pd.concat(
            [self._score(one, works[one.name]) for one in questions], ignore_index=True
        )

    # --------------------------------------------------------------------------- what is watched

    def head(self) -> AnswerHead:
        """Return what the answers are read with.

        Raises
        ------
        NoInterventions
            They cannot be read.
        """
        view = self.activations
        if ANSWER_POOLING not in view.poolings or not self.layers:
            raise NoInterventions(
                "its answers were not extracted: run 02_extract with answers, and the stage lm"
            )
        try:
            head = view.answer_head
        except FileNotFoundError as error:
            raise NoInterventions(str(error)) from error
        if head.refusal:
            raise NoInterventions(head.refusal)
        return head

    def questions(self, head: AnswerHead) -> list[Question]:
        """Return the tasks whose answers are watched.

        Raises
        ------
        NoInterventions
            There are none.
        ValueError
            A task that is named has no answers.
        """
        examples = self.activations.examples
        infos = task_infos(examples)
        answered = [name for name, info in infos.items() if info.answers]
        unknown = [name for name in self.settings.watch if name not in answered]
        if unknown:
            raise ValueError(
                f"watch={list(self.settings.watch)}: {', '.join(unknown)} is no task of this run "
                f"that has answers; it has {', '.join(answered) or 'none'}"
            )
        plain = [name for name in answered if not infos[name].variant_of]
        questions = []
        for name in self.settings.watch or plain:
            try:
                tokens = head.answer_tokens(infos[name].answers)
                labelled = LabelledTask.from_examples(examples, name)
            except (NoAnswers, ValueError) as error:
                tqdm.write(f"no interventions on answers to {name}: {error}")
                continue
            places = labelled.true.split["test"].numpy()
            file_n = pd.factorize(examples.file.iloc[labelled.rows[places]])[0]
            order = np.argsort(file_n, kind="stable")  # rows of one image side by side
            places = places[order[file_n[order] < self.settings.images]]
            watched = examples.iloc[labelled.rows[places]].reset_index(drop=True)
            questions.append(
                Question(
                    name,
                    _select(labelled.true, places),
                    watched,
                    tokens,
                    ConceptNames.of(name, infos),
                    find_object_boxes(watched, self.instances),
                )
            )
        if not questions:
            raise NoInterventions("the run has no task whose answers can be read")
        return questions

    def _weights(self, task: str) -> ProbeWeights | None:
        if self.results is None:
            return None
        model = self.activations.meta["model"]
        key = ProbeKey(model, "none", ANSWER_POOLING, task, PROBE)
        return self.results.weights.get(key)

    def _work(self, question: Question) -> Work:
        settings = self.settings
        planned = plan_interventions(
            settings,
            blocks=len(self.layers) - 1,
            is_binary=question.labels.kind == "binary",
        )
        weights = self._weights(question.name)
        of_weights = [] if weights is None else [getattr(weights, f.name) for f in fields(weights)]
        fit_table = self._fit_table(question.concepts)
        fingerprint = paths.fingerprint(
            VERSION,
            self.activations.folder.name_from(self.home),
            # Images as they are on disk, prompts, and the labels that edits are fitted to.
            model_inputs(question.examples, self.home).to_csv(index=False),
            model_inputs(fit_table, self.home).to_csv(index=False),
            fit_table["labels"].tolist(),
            fit_table["mask"].tolist(),
            settings.seed,
            of_weights,
            {str(image): boxes.tolist() for image, boxes in question.boxes.items()},
            paths.versions("transformers"),  # by which attention can be cut, or not
        )
        folder = self.folder / f"{self.activations.name}-{question.name}"
        return Work(folder, question.examples, planned, fingerprint)

    def _fit_table(self, concepts: ConceptNames) -> pd.DataFrame:
        return select_training(
            self.activations.examples, concepts.tasks, images=self.settings.fit_images
        )

    # ------------------------------------------------------------------------------- what is run

    @property
    def extraction(self) -> dict[str, Any]:
        """The settings that the model was extracted with."""
        meta = self.activations.meta
        return meta["jobs"][-1] | meta["settings"]

    def _run_missing(
        self, questions: Sequence[Question], works: Mapping[str, Work], head: AnswerHead
    ) -> None:
        fitted = {one.name: self.fit(one) for one in questions}
        settings = dict(self.extraction)
        vlm = self.load()
        try:
            settings["batch_tokens"] = self._batch_tokens(vlm)
            for one in questions:
                verdict = self.check(vlm, one)
                reader = Reader(head, one.tokens, self._weights(one.name), vlm)
                run_interventions(
                    works[one.name],
                    vlm,
                    fitted[one.name],
                    reader,
                    verdict,
                    self._marker(vlm, one),
                    settings=settings,
                    home=self.home,
                )
        finally:
            vlm.release()

    def _marker(self, vlm: Vlm, question: Question) -> ObjectMarker | None:
        if OBJECT_ROUTE not in self.settings.routes:
            return None
        return ObjectMarker(
            vlm,
            question.examples,
            question.boxes,
            longest_side=self.extraction["longest_side"],
            home=self.home,
            seed=self.settings.seed,
        )

    def load(self) -> Vlm:
        """Load the model again."""
        return reload_model(self.extraction, home=self.home, device=self.device)

    def _batch_tokens(self, vlm: Vlm) -> int:
        """Return how many tokens a batch has, of which most interventions run but a part."""
        tokens = min(self.extraction["batch_tokens"], suitable_batch_tokens(vlm.device))
        bytes_per_token = len(vlm.layers) * vlm.width * getattr(torch, vlm.dtype).itemsize
        return max(1, min(RERUN_PART * tokens, KEPT_BYTES // bytes_per_token))

    def fit(self, question: Question) -> FittedEdits:
        """Get the states of training examples, which are extracted where they are not yet."""
        sites = [part for site in self.settings.tokens for part in PARTS_OF_SITE.get(site, (site,))]
        poolings = tuple(dict.fromkeys(POOLING_OF_SITE[site] for site in sites))
        return FittedEdits(
            self._extract(self._fit_table(question.concepts), poolings),
            question.concepts,
            self.layers,
            device=training_device(self.device),
            seed=self.settings.seed,
        )

    def _extract(self, examples: pd.DataFrame, poolings: Sequence[str]) -> Activations:
        """Extract what the decoder holds of other examples, as those of the run were extracted."""
        names = {field.name for field in fields(ExtractionSettings)}
        values = {name: value for name, value in self.extraction.items() if name in names}
        values |= {"poolings": tuple(poolings), "stages": ("lm",)}
        return extract_tables(
            ExtractionSettings(values.pop("model"), **values),
            {"none": examples},
            device=self.device,
            root=self.activations.folder.url.rsplit("/", 2)[0],
            home=self.home,
        )

    def score_inputs(self, examples: pd.DataFrame, changed: pd.DataFrame) -> pd.DataFrame:
        """Score probes and answers on changed examples.

        Parameters
        ----------
        examples : DataFrame
            Of the run.
        changed : DataFrame
            See :func:`probekit.interventions.inputs.change_test_images`.
        """
        model = self.activations.meta["model"]
        weights = {
            key: one
            for key, one in (self.results.weights if self.results is not None else {}).items()
            if (key.model, key.control, key.probe) == (model, "none", PROBE)
        }
        if not weights:
            tqdm.write(
                f"{model} has no {PROBE} probes: its answers alone are scored on changed images"
            )
            answered = [name for name, info in task_infos(changed).items() if info.answers]
            changed = changed[changed.task.isin(answered)].reset_index(drop=True)
        if changed.empty:
            return pd.DataFrame()
        extracted = self._extract(changed, self.activations.poolings)
        return score_inputs(examples, extracted, weights, resamples=self.settings.resamples)

    def check(self, vlm: Vlm, question: Question) -> ReplayVerdict:
        """Find out how passes of the model run again, on a question's first images.

        Raises
        ------
        NoInterventions
            Its passes cannot run again, or changing nothing would change its states.
        """
        items = loading.prepare_images(
            vlm.prompt_processor,
            [model_inputs(question.examples, self.home)],
            longest_side=self.extraction["longest_side"],
            home=self.home,
        )
        few = take_few((item.prepared for item in items), dtype=vlm.dtype)
        refusal = why_no_replay(vlm)
        if refusal:
            raise NoInterventions(refusal)
        verdict = check_replay(vlm, few)
        if not verdict.way:
            raise NoInterventions(f"changing nothing would change it: {verdict.reason}")
        if verdict.reason:
            tqdm.write(f"{vlm.name} runs its prompts from their start: {verdict.reason}")
        if verdict.why_no_cut and self.settings.routes:
            tqdm.write(f"{vlm.name}: attention is not cut, {verdict.why_no_cut}")
        return verdict

    # ----------------------------------------------------------------------------- what came out

    def _score(self, question: Question, work: Work) -> pd.DataFrame:
        done = []
        for layer, interventions in work.by_layer.items():
            readings, reasons = work.read(layer)
            done += [Done(*one) for one in zip(interventions, readings, reasons, strict=True)]
        nothing, *done = done
        if nothing.readings is None:
            raise ValueError(f"{self.activations.name}, left alone: {nothing.reason}")
        scores = TaskScores(question.labels, resamples=self.settings.resamples)
        of_all = [one for one in done if one.intervention.site != OBJECT_ROUTE]
        tables = [scores.table(nothing.readings, of_all, layers=self.layers)]
        of_objects = [one for one in done if one.intervention.site == OBJECT_ROUTE]
        if of_objects:
            tables.append(self._score_object_route(question, nothing.readings, of_objects))
        table = pd.concat(tables, ignore_index=True)
        return complete(
            table,
            model=self.activations.meta["model"],
            task=question.name,
            erased=question.concepts.erased_words,
        )

    def _score_object_route(
        self, question: Question, alone: Readings, done: Sequence[Done]
    ) -> pd.DataFrame:
        """Score what is cut from objects, on the examples whose image has tokens in their boxes."""
        read = [one.readings.answers_na for one in done if one.readings is not None]
        is_read_n = np.isfinite(np.stack(read)).all((0, 2)) if read else np.array([], bool)
        rows = np.flatnonzero(is_read_n)
        if len(np.unique(question.labels.image_n[rows])) < FEWEST_IMAGES:
            few = "fewer than two test images have such tokens, and as many others"
            rows = np.arange(len(question.examples))
            done = [one._replace(readings=None, reason=one.reason or few) for one in done]
        selected = [
            one._replace(readings=one.readings and one.readings.select(rows)) for one in done
        ]
        scores = TaskScores(_select(question.labels, rows), resamples=self.settings.resamples)
        table = scores.table(alone.select(rows), selected, layers=self.layers)
        return table[table.intervention != NOTHING]


def _select(labels: LabelSet, places: np.ndarray) -> LabelSet:
    """Return the labels of some examples, in this order."""
    return replace(
        labels,
        image_n=labels.image_n[places],
        y_nc=labels.y_nc[places],
        mask_nc=labels.mask_nc[places],
        split={},
    )


def study_models(
    views: Sequence[Activations],
    examples: pd.DataFrame,
    settings: InterventionSettings,
    *,
    results: ProbeResults | None,
    instances: pd.DataFrame,
    make_changer: Callable[[], ImageChanger],
    folder: Path,
    examples_fingerprint: str,
    device: str | None,
    n_jobs: int,
    home: paths.Home,
) -> pd.DataFrame:
    """Do the interventions on all trained models of a run, and write the table.

    Parameters
    ----------
    views : sequence of Activations
        Those of controls and of untrained models are passed over.
    examples : DataFrame
        Of the run, those of all views.
    settings : InterventionSettings
    results : ProbeResults or None
    instances : DataFrame
        Of the run's images, see :func:`probekit.tasks.building.load_instances`.
    make_changer : callable
        Reads what it takes to change images.
    folder : Path
    examples_fingerprint : str
        Of the run's examples, which the table belongs to.
    device : str or None
    n_jobs : int
        How many models at once, see :func:`probekit.workflow.intervene`.
    home : Home

    Returns
    -------
    DataFrame
        See :func:`probekit.workflow.intervene`.
    """
    studies = [
        ModelStudy(view, settings, results, instances, folder, device, home)
        for view in views
        if control_name(view) == "none"
    ]
    for study in studies:  # what a model refuses is said before any of them runs
        if study.layers:
            plan_interventions(settings, blocks=len(study.layers) - 1, is_binary=True)
    changed = pd.DataFrame()
    if settings.inputs and studies:
        changed = change_test_images(
            examples, make_changer, changes=settings.inputs, images=settings.images
        )
    if n_jobs > 1 and _is_repeated(folder, settings):  # all is read back
        n_jobs = 1
    study_one = partial(_study_one, examples=examples, changed=changed)
    by_study = map_in_processes(study_one, studies, n_jobs=n_jobs)
    tables = [table for table, _ in by_study] + [on_inputs for _, on_inputs in by_study]
    filled = [table for table in tables if len(table)]
    table = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=COLUMNS)
    (folder / RECORD).unlink(missing_ok=True)
    paths.write_atomic(folder / TABLE, table.to_parquet)
    record = {
        "examples": examples_fingerprint,
        "settings": asdict(settings),
        "folders": [study.activations.folder.name_from(home) for study in studies],
    }
    paths.write_json(folder / RECORD, record)
    return table


def _study_one(
    study: ModelStudy, *, examples: pd.DataFrame, changed: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables of one model: of interventions, and of changed images."""
    table = study.run()
    if changed.empty or not study.layers:
        return table, pd.DataFrame()
    return table, study.score_inputs(examples, changed)


def _is_repeated(folder: Path, settings: InterventionSettings) -> bool:
    return (folder / RECORD).exists() and read_settings(folder) == settings


def read_table(
    folder: Path, examples_fingerprint: str, *, activation_folders: Collection[str]
) -> pd.DataFrame:
    """Read the table of a run's interventions.

    Parameters
    ----------
    folder : Path
    examples_fingerprint : str
    activation_folders : collection of str
        Those of the run's results.

    Returns
    -------
    DataFrame
        Empty where there is none, or it is of other examples or activations, which a line says.
    """
    if not (folder / RECORD).exists():
        return pd.DataFrame(columns=COLUMNS)
    record = paths.read_json(folder / RECORD)
    is_of_run = set(record["folders"]) <= set(activation_folders)
    if record["examples"] != examples_fingerprint or not is_of_run:
        tqdm.write(f"{folder} is of other examples or activations: run 04_intervene again")
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_parquet(folder / TABLE)


def read_settings(folder: Path) -> InterventionSettings:
    """Read the settings that a run's interventions were done with."""
    recorded: dict[str, Any] = paths.read_json(folder / RECORD)["settings"]
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()
    }
    return InterventionSettings(**values)
