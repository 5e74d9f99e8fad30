"""Two or more runs side by side: which scores differ, and whether the peak of a curve moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import xxhash
from tqdm.auto import tqdm

from probekit.parameters import LONGEST_NAME
from probekit.probes.bootstrap import ROUNDING, Curve, bca_interval
from probekit.probes.comparison import compare_layers, curve_difference, holm, plateau_spans
from probekit.probes.labels import LabelledTask, LabelSet
from probekit.probes.peaks import Peak, PeakShift, compare_peaks, find_peak
from probekit.probes.results import HEADLINE, ProbeKey, best_layers
from probekit.report.saved_run import SavedRun, setting_words, write_csv
from probekit.report.sentences import Summary
from probekit.report.style import metric_words

FEWEST_IMAGES = 20  # of fewer, some resamples hold none, and their scores are undefined
PAIRED_SHARE = 0.5  # of the test images of the run with fewer of them
MOVED = 0.05
LEAST_RESAMPLES = 100
ONLY_THE_SCORE = 2  # resamples where none are looked at
FILES = {
    "peaks.csv": (
        "a row per task, pooling and pair of models: scores at the best layers, where both curves "
        "peak, and how far the peak moved"
    ),
    "differences.csv": "a row per task, pooling, pair of models and layer: both scores, and more",
}


class ModelPair(NamedTuple):
    """A model of the first run, and what it is compared with in another run.

    Attributes
    ----------
    run : SavedRun
        The other run.
    base_model, model : str
        The model in the first run and that in the other one.
    """

    run: SavedRun
    base_model: str
    model: str

    @property
    def name(self) -> str:
        """What the pair is called in sentences."""
        if self.base_model == self.model:
            return self.model
        return f"{self.base_model} → {self.model}"


class _Sample(NamedTuple):
    """The test examples of a task that count in two runs.

    `keep_a` and `keep_b` mark them among all test examples of a run.
    """

    keep_a: np.ndarray
    keep_b: np.ndarray
    names_a: np.ndarray
    names_b: np.ndarray
    shared_images: int
    trained_images: int
    is_paired: bool

    @property
    def images_a(self) -> int:
        return len(set(self.names_a[self.keep_a]))

    @property
    def images_b(self) -> int:
        return len(set(self.names_b[self.keep_b]))


class Verdict(NamedTuple):
    """Whether a pair of curves stays within a limit; `line` says so in words."""

    is_failure: bool
    line: str


@dataclass(frozen=True)
class RunComparison:
    """How the first of several runs compares with each of the others.

    Attributes
    ----------
    runs : tuple of SavedRun
        The first one is the base.
    probe : str
        The kind of probe whose curves are compared.
    peaks : DataFrame
        One row per task, pooling and pair of models: `score_a` and `score_b` at each run's `best_a`
        and `best_b` (chosen on its validation images), and their `difference` (b less a) with
        `lo`, `hi` and `p`. For both runs `peak_…`, the layer with the highest test score, with
        the interval of its place (`peak_…_lo`, `peak_…_hi`), the layers between which the
        resamples peak (`peak_…_resampled_lo`, `_hi`), and whether it is a place at all
        (`peak_…_is_place`); `plateau_…`; what always yes or always no would score (`guess_…`), and
        whether the score at `best_…` is not shown to be higher: its 95 % interval begins no higher
        (`is_guess_…`). How far the peak `moved`, in layers of the
        first run, with `moved_lo`, `moved_hi`, `moved_p` (where it is small and the interval holds
        0, the curves peak at different layers, in which direction is open), and `moved_p_holm`,
        corrected for the number of rows. How many test images counted: `images_…`, `shared_images`,
        `left_out_images`, and whether they are `paired`, see :func:`compare_runs`.
    differences : DataFrame
        One row per task, pooling, pair of models and layer of the first run: `score_a`, `score_b`
        with intervals, `difference` (b less a) with `lo`, `hi`, `p`, and `p_holm`, corrected for
        the number of layers. `layer_b` is at the same relative depth.
    curves : DataFrame
        One row per task, pooling, pair of models, run and layer: `value`, `lo`, `hi`.
    left_out : tuple of str
        What could not be compared, and why: curves without enough images, and models, tasks and
        poolings that only one run has.
    """

    runs: tuple[SavedRun, ...]
    probe: str
    peaks: pd.DataFrame
    differences: pd.DataFrame
    curves: pd.DataFrame
    left_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the folder that the page goes to."""
        return "-vs-".join(run.name for run in self.runs)

    def table(self) -> pd.DataFrame:
        """Return the peaks in few columns, for a screen."""
        rows = []
        for row in self.peaks.itertuples():
            rows.append(
                {
                    "task": row.task,
                    "pooling": row.pooling,
                    "models": _pair_name(row),
                    "runs": f"{row.run_a} → {row.run_b}",
                    "score": f"{row.score_a:.3f} → {row.score_b:.3f}",
                    "difference": f"{_signed(row.difference)} [{_signed(row.lo)}, "
                    f"{_signed(row.hi)}]",
                    "peak": f"{row.peak_a} → {row.peak_b}",
                    "moved by": f"{_steps(row.moved)} [{_steps(row.moved_lo)}, "
                    f"{_steps(row.moved_hi)}]",
                    "p (moved)": "< 0.001" if row.moved_p < 0.001 else f"{row.moved_p:.3f}",
                }
            )
        return pd.DataFrame(rows)

    def summary(self) -> Summary:
        """Say of each pair of curves whether the peak moved and the score changed."""
        paragraphs = Summary(_paragraph(row) for row in self.peaks.itertuples())
        if self.left_out:
            paragraphs.append("Not compared: " + "; ".join(self.left_out) + ".")
        return paragraphs

    def verdicts(
        self, *, peak_may_move: float | None = None, score_may_fall: float | None = None
    ) -> list[Verdict]:
        """Hold each pair of curves against limits.

        Parameters
        ----------
        peak_may_move : float, optional
            How many layers of the first run a peak may move, either way. It is too far where the
            whole interval lies beyond, and both runs score better than a guess.
        score_may_fall : float, optional
            How far the score at the best layer may fall. It is too low where the whole interval of
            the difference lies beyond.

        Raises
        ------
        ValueError
            A limit is negative.
        """
        verdicts = []
        for name, limit in (("peak_may_move", peak_may_move), ("score_may_fall", score_may_fall)):
            if limit is not None and not limit >= 0:
                raise ValueError(f"{name}={limit}: take a number from 0 on")
        for row in self.peaks.itertuples():
            if peak_may_move is not None:
                verdicts.append(_judge_peak(row, peak_may_move))
            if score_may_fall is not None:
                verdicts.append(_judge_score(row, score_may_fall))
        return verdicts

    @cached_property
    def different_settings(self) -> dict[str, str]:
        """The settings in which the runs differ, and their values by run."""
        by_run = {run.name: _settings_of(run) for run in self.runs}
        names = dict.fromkeys(name for settings in by_run.values() for name in settings)
        different = {}
        for name in names:
            values = {run: settings.get(name, "none") for run, settings in by_run.items()}
            if len(set(values.values())) > 1:
                different[name] = "; ".join(f"{run}: {value}" for run, value in values.items())
        return different

    def write_page(self, folder: Path | None = None) -> Path:
        """Write a page with figures, sentences and tables.

        Parameters
        ----------
        folder : Path, optional
            ``figures/<run>-vs-<run>`` of the home unless it is named.

        Returns
        -------
        Path
            The file ``index.html``.
        """
        from probekit.report.page import write_page
        from probekit.report.run_comparison_figures import comparison_figures

        if folder is None:
            folder = self.runs[0].home.figures / self.name
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(self.peaks, folder / "peaks.csv")
        write_csv(self.differences, folder / "differences.csv")
        base, *others = (run.name for run in self.runs)
        lead = (
            f"What differs between {base} and {' or '.join(others)}? Light probes ({self.probe}) "
            "on each layer: do they score higher or lower, and did the peak move to another layer? "
            f"{_sample_words(self.peaks)}"
        )
        settings = self.different_settings or {"settings": "the runs differ in none"}
        return write_page(
            comparison_figures(self),
            folder,
            title=f"Side by side: {', '.join([base, *others[:-1]])} and {others[-1]}",
            lead=lead,
            summary=self.summary(),
            settings={f"differs: {name}": value for name, value in settings.items()},
            files=FILES,
            first_figure="peaks",
            questions={
                task: self.runs[0].results.tasks[task].question
                for task in dict.fromkeys(self.peaks.task)
            },
        )


def compare_runs(
    runs: Sequence[SavedRun],
    *,
    models: Sequence[tuple[str, str]] = (),
    tasks: Sequence[str] = (),
    poolings: Sequence[str] = (),
    probe: str = "logreg",
    resamples: int = 2000,
) -> RunComparison:
    """Compare the first run with each of the others.

    Compared are the curves of the decoder's layers that both have: of the same task, pooling and
    kind of probe (its first seed), trained models, without controls.

    Parameters
    ----------
    runs : sequence of SavedRun
        At least two.
    models : sequence of pairs of str
        A model of the first run and the model of the others that it is compared with. By default
        models of the same name; where no name is the same and both runs have one model, these two.
    tasks, poolings : sequence of str
        Those to compare; all that the runs share unless some are named. Each must be in the first
        run and in another one.
    probe : str
        The kind of probe.
    resamples : int
        Bootstrap resamples of the test images.

    Returns
    -------
    RunComparison
        Where at least half of the test images (of the run with fewer), and at least 20, are in both
        runs with the same prompts and labels, these examples alone count, and all differences are
        paired.
        Otherwise each run's test examples count, and images that both have are resampled together.
        Test images that the other run has among its training or validation images never count.

    Raises
    ------
    ValueError
        The runs have nothing in common that could be compared, among them nothing of a task or
        pooling that was named, or models cannot be matched.
    """
    _check_runs(runs)
    if resamples < LEAST_RESAMPLES:
        raise ValueError(
            f"resamples={resamples}: take at least {LEAST_RESAMPLES}, for 95 % intervals"
        )
    base, *others = runs
    curves_to_compare = []
    left_out: list[str] = []
    for run in others:
        pairs = _match_models(base, run, models=models)
        if not models:
            left_out += _unmatched_models(base, run)
        for pair in pairs:
            of_base, of_run = (
                _wanted_keys(one, model, tasks=tasks, poolings=poolings, probe=probe)
                for one, model in ((base, pair.base_model), (run, pair.model))
            )
            curves_to_compare += [
                (pair, key, key._replace(model=pair.model))
                for key in of_base
                if key._replace(model=pair.model) in of_run
            ]
            left_out += _unmatched_curves(base, of_base, other=run, keys_of_other=of_run)
            left_out += _unmatched_curves(run, of_run, other=base, keys_of_other=of_base)
    for kind, names_wanted in (("task", tasks), ("pooling", poolings)):
        compared = {getattr(key, kind) for _, key, _ in curves_to_compare}
        missing = [name for name in dict.fromkeys(names_wanted) if name not in compared]
        if missing:
            raise ValueError(
                f"{kind} {', '.join(missing)} cannot be compared"
                f"{_nothing_words(runs, probe=probe, left_out=left_out)}"
            )
    # Curves of one task are neighbours, and so are those that have the same base.
    tasks_in_order = list(base.results.tasks)
    places = {key: place for place, key in enumerate(base.results.predictions)}
    curves_to_compare.sort(
        key=lambda curve: (tasks_in_order.index(curve[1].task), places[curve[1]])
    )
    names = _image_names(runs) if curves_to_compare else {}
    comparisons = []
    for pair, key_a, key_b in curves_to_compare:
        try:
            comparisons.append(
                _compare_curves(base, pair, key_a, key_b, names=names, resamples=resamples)
            )
        except _NotComparable as reason:
            left_out.append(f"{key_a.task} of {pair.run.name} ({reason})")
    if not comparisons:
        raise ValueError(
            f"{' and '.join(run.name for run in runs)} have no curves that can be compared"
            f"{_nothing_words(runs, probe=probe, left_out=left_out)}"
        )
    peaks, differences, curves = (
        pd.concat(tables, ignore_index=True) for tables in zip(*comparisons, strict=True)
    )
    peaks.insert(peaks.columns.get_loc("moved_p") + 1, "moved_p_holm", holm(peaks.moved_p))
    return RunComparison(
        tuple(runs), probe, peaks, differences, curves, tuple(dict.fromkeys(left_out))
    )


class _NotComparable(Exception):
    """Two curves have no examples by which they could be compared."""


def _check_runs(runs: Sequence[SavedRun]) -> None:
    names = [run.name for run in runs]
    if len(set(names)) < len(names) or len(names) < 2:
        raise ValueError(f"runs {', '.join(names)}: name at least two, each once")
    if len("-vs-".join(names).encode()) > LONGEST_NAME:
        raise ValueError(
            f"the names of {len(names)} runs are too long for one folder: compare fewer at a time"
        )


# ---------------------------------------------------------------------------------- what is matched


def _models_of(run: SavedRun) -> list[str]:
    return list(
        dict.fromkeys(key.model for key in run.results.predictions if key.control == "none")
    )


def _match_models(
    base: SavedRun, run: SavedRun, *, models: Sequence[tuple[str, str]]
) -> list[ModelPair]:
    of_base = _models_of(base)
    of_run = _models_of(run)
    if models:
        unknown = [a for a, _ in models if a not in of_base]
        unknown += [b for _, b in models if b not in of_run]
        if unknown:
            raise ValueError(
                f"no model {', '.join(unknown)}: {base.name} has {', '.join(of_base)}; "
                f"{run.name} has {', '.join(of_run)}"
            )
        return [ModelPair(run, a, b) for a, b in models]
    shared = [model for model in of_base if model in of_run]
    if shared:
        return [ModelPair(run, model, model) for model in shared]
    if len(of_base) == len(of_run) == 1:
        return [ModelPair(run, of_base[0], of_run[0])]
    raise ValueError(
        f"no model is in both runs: {base.name} has {', '.join(of_base)}; {run.name} has "
        f"{', '.join(of_run)}: say which are compared, as in --models {of_base[0]}={of_run[0]}"
    )


def _unmatched_models(base: SavedRun, run: SavedRun) -> list[str]:
    """Name the models that only one of two runs has, where models are matched by name."""
    of_base = _models_of(base)
    of_run = _models_of(run)
    if not set(of_base) & set(of_run):
        return []
    words = []
    for one, models, other, models_of_other in (
        (base, of_base, run, of_run),
        (run, of_run, base, of_base),
    ):
        words += [
            f"the model {model} of {one.name} ({other.name} has no model of this name)"
            for model in models
            if model not in models_of_other
        ]
    return words


def _wanted_keys(
    run: SavedRun, model: str, *, tasks: Sequence[str], poolings: Sequence[str], probe: str
) -> list[ProbeKey]:
    """Return the keys of a model's curves that are to be compared."""
    return [
        key
        for key in run.results.predictions
        if (key.model, key.control, key.probe) == (model, "none", probe)
        and (not tasks or key.task in tasks)
        and (not poolings or key.pooling in poolings)
    ]


def _unmatched_curves(
    run: SavedRun, keys: Sequence[ProbeKey], *, other: SavedRun, keys_of_other: Sequence[ProbeKey]
) -> list[str]:
    """Name the tasks of a model that its counterpart in another run lacks, or their poolings."""
    curves_of_other = {(key.task, key.pooling) for key in keys_of_other}
    tasks_of_other = {key.task for key in keys_of_other}
    unmatched: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        if (key.task, key.pooling) not in curves_of_other:
            unmatched.setdefault((key.task, key.model), []).append(key.pooling)
    words = []
    for (task, model), poolings in unmatched.items():
        curves = task if task not in tasks_of_other else f"{task}, {' and '.join(poolings)} pooling"
        words.append(f"{curves}, of {model} in {run.name} ({other.name} has no such curve)")
    return words


def _nothing_words(runs: Sequence[SavedRun], *, probe: str, left_out: Sequence[str]) -> str:
    """Say what the runs have instead, and what else was left out for which reason."""
    parts = []
    for run in runs:
        keys = [key for key in run.results.predictions if key.control == "none"]
        tasks = ", ".join(dict.fromkeys(key.task for key in keys))
        poolings = ", ".join(dict.fromkeys(key.pooling for key in keys))
        probes = ", ".join(dict.fromkeys(key.probe for key in keys))
        parts.append(f"{run.name} has the tasks {tasks}, poolings {poolings}, probes {probes}")
    parts += dict.fromkeys(f"not compared: {reason}" for reason in left_out)
    return f" with the probe {probe}: {'; '.join(parts)}"


# ---------------------------------------------------------------------- images that the runs share


def _image_names(runs: Sequence[SavedRun]) -> dict[str, pd.Series]:
    """Return for each run, by its name, what each example's image is called in all of them.

    Images are the same where they are the same file. Unless the runs have all files in common,
    files with the same bytes are the same image, too: those of two copies of a dataset, or of an
    image that only one run has under a second path.
    """
    files = {}
    for run in runs:
        paths = {file: str(run.home.resolve(file)) for file in run.examples.file.unique() if file}
        files[run.name] = run.examples.file.map(paths).fillna("")
    if len({frozenset(of_run) for of_run in files.values()}) == 1:
        return files
    unique = dict.fromkeys(file for of_run in files.values() for file in of_run if file)
    digests = {}
    for file in tqdm(unique, desc="which images are the same", unit="image"):
        path = Path(file)
        digests[file] = xxhash.xxh3_128_hexdigest(path.read_bytes()) if path.exists() else file
    return {name: of_run.map(digests).fillna("") for name, of_run in files.items()}


def _sample(base: SavedRun, run: SavedRun, task: str, *, names: dict[str, pd.Series]) -> _Sample:
    """Choose the test examples of a task that count."""
    parts = []
    for one, other in ((base, run), (run, base)):
        examples = one.examples
        is_test = ((examples.task == task) & (examples.split == "test")).to_numpy()
        image_n = names[one.name].to_numpy()[is_test]
        is_chosen_on = (other.examples.split != "test").to_numpy()
        trained = set(names[other.name].to_numpy()[is_chosen_on])
        is_new = np.array([image not in trained for image in image_n])
        rows = examples[is_test]
        keys = [
            (image, prompt, tuple(labels))
            for image, prompt, labels in zip(image_n, rows.prompt, rows["labels"], strict=True)
        ]
        parts.append((image_n, is_new, keys))
    (names_a, new_a, keys_a), (names_b, new_b, keys_b) = parts
    trained_images = len({*names_a[~new_a], *names_b[~new_b]})
    shared = set(keys_a) & set(keys_b)
    shared_a = np.array([key in shared for key in keys_a]) & new_a
    shared_b = np.array([key in shared for key in keys_b]) & new_b
    shared_images = len(set(names_a[shared_a]))
    fewer = min(len(set(names_a[new_a])), len(set(names_b[new_b])))
    is_paired = shared_images >= max(FEWEST_IMAGES, PAIRED_SHARE * fewer)
    sample = _Sample(
        keep_a=shared_a if is_paired else new_a,
        keep_b=shared_b if is_paired else new_b,
        names_a=names_a,
        names_b=names_b,
        shared_images=shared_images,
        trained_images=trained_images,
        is_paired=is_paired,
    )
    if min(sample.images_a, sample.images_b) < FEWEST_IMAGES:
        raise _NotComparable(
            f"{fewer} of its test images are new to both runs, and {FEWEST_IMAGES} are needed: "
            "build both with the same seed and numbers of images"
        )
    return sample


# -------------------------------------------------------------------------------------- the curves


def _compare_curves(
    base: SavedRun,
    pair: ModelPair,
    key_a: ProbeKey,
    key_b: ProbeKey,
    *,
    names: dict[str, pd.Series],
    resamples: int,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return one row of peaks, the differences by layer, and the scores of both curves."""
    task = key_a.task
    info_a = base.results.tasks[task]
    info_b = pair.run.results.tasks[task]
    if (info_a.kind, info_a.classes) != (info_b.kind, info_b.classes):
        raise _NotComparable("its classes differ: name the same categories for both")
    metric = HEADLINE[info_a.kind]
    sample = _sample(base, pair.run, task, names=names)
    labels_a = LabelledTask.from_examples(base.examples, task).true
    labels_b = LabelledTask.from_examples(pair.run.examples, task).true
    both_learn_c = labels_a.mask_nc.amax(0) * labels_b.mask_nc.amax(0)
    curves = []
    guesses = []
    for run, key, labels, keep, image_n in (
        (base, key_a, labels_a, sample.keep_a, sample.names_a),
        (pair.run, key_b, labels_b, sample.keep_b, sample.names_b),
    ):
        kept = _restrict(labels, keep=keep, image_n=image_n, class_c=both_learn_c)
        if not kept.select("test").mask_nc.any():
            raise _NotComparable(
                "its test examples have no answer that the probes of both runs could learn: build "
                "both with more images, or the same categories"
            )
        p_lnc = run.results.predictions[key][:, keep].astype(np.float32)
        curves.append(kept.curve(p_lnc, split="test", metric=metric, resamples=resamples))
        always = np.stack([np.zeros_like(p_lnc[0]), np.ones_like(p_lnc[0])])
        of_always = kept.curve(always, split="test", metric=metric, resamples=ONLY_THE_SCORE)
        guesses.append(float(of_always.score_l.max()))
    a, b = curves
    keys = {
        "task": task,
        "pooling": key_a.pooling,
        "metric": metric,
        "run_a": base.name,
        "model_a": pair.base_model,
        "run_b": pair.run.name,
        "model_b": pair.model,
    }
    peaks = _peak_row(
        a,
        b,
        best_a=_best_layer(base, key_a),
        best_b=_best_layer(pair.run, key_b),
        guesses=guesses,
    )
    counts = {
        "images_a": sample.images_a,
        "images_b": sample.images_b,
        "shared_images": sample.shared_images,
        "left_out_images": sample.trained_images,
        "paired": sample.is_paired,
    }
    scores = pd.concat(
        [
            _score_rows(a).assign(run=base.name, model=pair.base_model),
            _score_rows(b).assign(run=pair.run.name, model=pair.model),
        ]
    )
    return (
        pd.DataFrame([keys | peaks | counts]),
        _difference_rows(a, b).assign(**keys)[[*keys, *DIFFERENCE_COLUMNS]],
        scores.assign(**keys),
    )


def _restrict(
    labels: LabelSet, *, keep: np.ndarray, image_n: np.ndarray, class_c: torch.Tensor
) -> LabelSet:
    """Return the labels of the kept test examples, whose images have names that runs share."""
    test = labels.split["test"]
    all_image_n = np.full(len(labels.image_n), "", dtype=object)
    all_image_n[test.numpy()] = image_n
    return replace(
        labels,
        image_n=all_image_n.astype(str),
        mask_nc=labels.mask_nc * class_c,
        split={"test": test[torch.from_numpy(keep)]},
    )


def _best_layer(run: SavedRun, key: ProbeKey) -> int:
    """Return the layer of a curve that its run chose on validation images."""
    metrics = run.results.metrics
    rows = metrics[
        (metrics.model == key.model)
        & (metrics.control == key.control)
        & (metrics.pooling == key.pooling)
        & (metrics.stage == "lm")
    ]
    best = best_layers(rows, {key.task: run.results.tasks[key.task]}, probe=key.probe)
    return int(best["best layer"].iloc[0].partition(".")[2])


def _layer_names(layers: int) -> list[str]:
    return [f"lm.{k:02d}" for k in range(layers)]


def _peak_row(
    a: Curve, b: Curve, *, best_a: int, best_b: int, guesses: Sequence[float]
) -> dict[str, object]:
    try:
        shift: PeakShift = compare_peaks(a, b)
    except ValueError as error:  # a curve without a score must not end the comparison of others
        raise _NotComparable(str(error)) from error
    difference = curve_difference(b.select([best_b]), a.select([best_a]), layers=[""]).iloc[0]
    row: dict[str, object] = {
        "best_a": f"lm.{best_a:02d}",
        "best_b": f"lm.{best_b:02d}",
        "score_a": a.score_l[best_a],
        "score_b": b.score_l[best_b],
        "difference": difference.difference,
        "lo": difference.lo,
        "hi": difference.hi,
        "p": difference.p,
        "moved": shift.shift,
        "moved_lo": shift.lo,
        "moved_hi": shift.hi,
        "moved_p": shift.p,
        "moved_resampled_lo": shift.resampled_lo,
        "moved_resampled_hi": shift.resampled_hi,
    }
    for side, curve, best, guess in (("a", a, best_a, guesses[0]), ("b", b, best_b, guesses[1])):
        peak: Peak = find_peak(curve)
        # The highest of many test scores lies above a guess by luck; one chosen elsewhere does not.
        lower, _ = bca_interval(curve.select([best]))
        names = _layer_names(peak.layers)
        row |= {
            f"peak_{side}": names[peak.layer],
            f"peak_{side}_lo": names[peak.lo],
            f"peak_{side}_hi": names[peak.hi],
            f"peak_{side}_resampled_lo": names[peak.resampled_lo],
            f"peak_{side}_resampled_hi": names[peak.resampled_hi],
            f"peak_{side}_is_place": peak.is_place,
            f"plateau_{side}": ", ".join(plateau_spans(compare_layers(curve, names))),
            f"layers_{side}": peak.layers,
            f"guess_{side}": guess,
            f"is_guess_{side}": bool(lower[0] <= guess + ROUNDING),
        }
    return row


DIFFERENCE_COLUMNS = [
    "layer_a",
    "layer_b",
    "depth",
    "score_a",
    "score_b",
    "difference",
    "lo",
    "hi",
    "p",
    "p_holm",
]


def _difference_rows(a: Curve, b: Curve) -> pd.DataFrame:
    """Subtract curve a from curve b at the same relative depth."""
    depth_a = np.linspace(0, 1, len(a.score_l))
    nearest_b = np.rint(depth_a * (len(b.score_l) - 1)).astype(int)
    at_depth = b.select(nearest_b)
    rows = curve_difference(at_depth, a, layers=_layer_names(len(a.score_l)))
    names_b = _layer_names(len(b.score_l))
    return rows.rename(columns={"layer": "layer_a"}).assign(
        layer_b=[names_b[k] for k in nearest_b],
        depth=depth_a,
        score_a=a.score_l,
        score_b=at_depth.score_l,
    )


def _score_rows(curve: Curve) -> pd.DataFrame:
    lower, upper = bca_interval(curve)
    count = len(curve.score_l)
    return pd.DataFrame(
        {
            "layer": _layer_names(count),
            "depth": np.linspace(0, 1, count),
            "value": curve.score_l,
            "lo": lower,
            "hi": upper,
        }
    )


# --------------------------------------------------------------------------------------- the words


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _steps(value: float) -> str:
    """Write a number of layers with its sign, and half layers where depths differ."""
    if abs(value) < 0.05:
        return "0"
    number = f"{value:+.0f}" if float(value).is_integer() else f"{value:+.1f}"
    return number.replace("-", "−")


def _pair_name(row) -> str:
    return row.model_a if row.model_a == row.model_b else f"{row.model_a} → {row.model_b}"


def _curve_name(row) -> str:
    return f"{row.task}, {row.pooling} pooling, {_pair_name(row)} ({row.run_a} → {row.run_b})"


def _paragraph(row) -> str:
    """Say what became of one curve; the page shows the first sentence."""
    sentences = [
        f"{_curve_name(row)}: {_moved_words(row)}.",
        _score_words(row),
        _places_words(row),
        _images_words(row),
    ]
    return " ".join(sentences)


def _p_words(p: float) -> str:
    """Write a p-value; a bootstrap knows of none that is smaller."""
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p:.3f}"


def _between(row) -> str:
    """Say between which numbers of layers a peak moved, and whose layers where depths differ."""
    layers = "layers" if row.layers_a == row.layers_b else f"layers of {row.run_a}"
    if row.moved_lo == row.moved_hi:
        return f"by {_steps(row.moved_lo)} {layers}"
    return f"between {_steps(row.moved_lo)} and {_steps(row.moved_hi)} {layers}"


def _place(row, side: str) -> str:
    first = getattr(row, f"peak_{side}_lo")
    last = getattr(row, f"peak_{side}_hi")
    return f"at {first}" if first == last else f"between {first} and {last}"


def _moved_words(row) -> str:
    between = _between(row)
    images = min(row.images_a, row.images_b)
    has_direction = row.moved_lo > 0 or row.moved_hi < 0
    if row.moved_p <= MOVED and has_direction:
        text = (
            f"the peak moved by {_steps(row.moved)} layers, from {row.peak_a} to {row.peak_b} "
            f"({between}, {_p_words(row.moved_p)})"
        )
    elif row.moved_p <= MOVED:
        text = (
            "they peak at different layers, in which direction is open "
            f"({between}, {_p_words(row.moved_p)})"
        )
    else:
        text = (
            f"the peak did not move as far as {images:,} images can tell: {between} "
            f"({_p_words(row.moved_p)})"
        )
    doubts = _doubts(row)
    return f"{text}; {doubts}" if doubts else text


def _guessing_runs(row) -> list[str]:
    sides = ((row.run_a, row.is_guess_a), (row.run_b, row.is_guess_b))
    return [run for run, is_guess in sides if is_guess]


def _doubts(row) -> str:
    """Say why a movement, or none, means little; "" where it means something."""
    guessing = _guessing_runs(row)
    if guessing:
        level = row.guess_b if row.is_guess_b else row.guess_a
        return (
            f"it means nothing, as {' and '.join(guessing)} scores no better than a guess "
            f"({level:.3f})"
        )
    sides = ((row.run_a, row.peak_a_is_place), (row.run_b, row.peak_b_is_place))
    flat = [run for run, is_place in sides if not is_place]
    if flat:
        curves = "the curve of" if len(flat) == 1 else "the curves of"
        return f"{curves} {' and '.join(flat)} may peak nearly anywhere, so this says little"
    return ""


def _score_words(row) -> str:
    change = "differ" if row.lo > 0 or row.hi < 0 else "do not clearly differ"
    return (
        f"At the best layers (chosen on validation images) the {metric_words(row.metric)} is "
        f"{row.score_a:.3f} at {row.best_a} and {row.score_b:.3f} at {row.best_b}; they {change}: "
        f"{_signed(row.difference)} (95\u00a0% interval {_signed(row.lo)} to {_signed(row.hi)})."
    )


def _places_words(row) -> str:
    return (
        f"On the test images {row.run_a} scores highest at {row.peak_a}, and peaks "
        f"{_place(row, 'a')} (plateau: {row.plateau_a}); {row.run_b} at {row.peak_b}, "
        f"{_place(row, 'b')} (plateau: {row.plateau_b})."
    )


def _images_words(row) -> str:
    if row.paired:
        text = f"Both are scored on the same examples of {row.shared_images:,} test images, paired."
    else:
        text = (
            f"Not paired: {row.shared_images:,} test images are in both runs with the same prompts "
            f"and labels, so {row.images_a:,} images of {row.run_a} are compared with "
            f"{row.images_b:,} of {row.run_b}, and intervals are wider."
        )
    if row.left_out_images:
        text += (
            f" {row.left_out_images:,} test images of one run do not count, since the other one "
            "trained or chose its layers on them."
        )
    return text


def _sample_words(peaks: pd.DataFrame) -> str:
    shared = f"{peaks.shared_images.min():,}"
    if peaks.shared_images.min() < peaks.shared_images.max():
        shared += f" to {peaks.shared_images.max():,}"
    if peaks.paired.all():
        return f"The runs share {shared} test images with the same prompts: scores are paired."
    if not peaks.paired.any():
        return (
            f"The runs share {shared} test images with the same prompts, which is too few: "
            "intervals are not paired."
        )
    return f"The runs share {shared} test images with the same prompts; not all scores are paired."


def _judge_peak(row, limit: float) -> Verdict:
    shift = PeakShift(
        row.moved, row.moved_lo, row.moved_hi, row.moved_p, row.moved_lo, row.moved_hi
    )
    between = _between(row)
    most = "1 layer" if limit == 1 else f"{limit:g} layers"
    guessing = _guessing_runs(row)
    if guessing:
        return Verdict(
            False,
            f"open   {_curve_name(row)}: {' and '.join(guessing)} scores no better than a guess, "
            "so the place of its peak means nothing",
        )
    if shift.is_beyond(limit):
        return Verdict(
            True, f"FAILED {_curve_name(row)}: the peak moved more than {most}, {between}"
        )
    if -limit <= row.moved_lo and row.moved_hi <= limit:
        return Verdict(
            False, f"fine   {_curve_name(row)}: the peak stayed within {most}, {between}"
        )
    return Verdict(
        False,
        f"open   {_curve_name(row)}: the peak is not shown to have moved more than {most}, "
        f"{between}; more test images would say more",
    )


def _judge_score(row, limit: float) -> Verdict:
    between = f"{_signed(row.lo)} to {_signed(row.hi)}"
    metric = metric_words(row.metric)
    if row.hi < -limit:
        return Verdict(
            True, f"FAILED {_curve_name(row)}: {metric} fell by more than {limit:g}, {between}"
        )
    if row.lo >= -limit:
        return Verdict(
            False, f"fine   {_curve_name(row)}: {metric} did not fall by {limit:g}, {between}"
        )
    return Verdict(
        False,
        f"open   {_curve_name(row)}: {metric} is not shown to have fallen by more than {limit:g}, "
        f"{between}; more test images would say more",
    )


def _settings_of(run: SavedRun) -> dict[str, str]:
    """Return what a run was made with; models by their number, as their names may differ."""
    settings = {
        name: value
        for name, value in run.settings.items()
        if name.startswith(("data: ", "probes: "))
    }
    plain = [
        store
        for store in run.results.stores
        if store["record"]["control"] == "none" and not store["meta"]["untrained"]
    ]
    for number, store in enumerate(plain, 1):
        which = f" {number}" if len(plain) > 1 else ""
        meta = store["meta"]
        values = {
            **meta["settings"],
            "device": meta["device"],
            "activations": store["record"]["folder"],
            "stages": store["record"]["stages"],
            "poolings": store["record"]["poolings"],
        }
        settings |= {
            f"model{which}: {name}": setting_words(name, value) for name, value in values.items()
        }
        settings |= {f"versions{which}: {name}": value for name, value in meta["versions"].items()}
    return settings
