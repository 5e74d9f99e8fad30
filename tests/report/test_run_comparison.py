import types

import numpy as np
import pandas as pd
import pytest

from probekit.cli.main import main
from probekit.paths import Home
from probekit.probes.results import COLUMNS, ProbeKey, ProbeResults
from probekit.report import run_comparison
from probekit.report.results import Results
from probekit.report.run_comparison import RunComparison, compare_runs
from probekit.report.run_comparison_figures import comparison_figures
from probekit.tasks.base import task_infos

SPLITS = {"train": 40, "validation": 40, "test": 300}


def make_examples(*, first=0, folder="scenes", prompt="Right, {}?"):
    """Two questions about each image, one with the answer yes; images are numbered from `first`."""
    rows = []
    number = first
    for split, count in SPLITS.items():
        for _ in range(count):
            for label in (0, 1):
                rows.append(
                    {
                        "image_id": number,
                        "file": f"data/{folder}/{number}.jpg",
                        "split": split,
                        "task": "caption",
                        "item": len(rows),
                        "prompt": prompt.format(label),
                        "labels": [label],
                        "mask": [1],
                        "kind": "binary",
                        "classes": ["match"],
                        "question": "Right?",
                    }
                )
            number += 1
    return pd.DataFrame(rows)


def answers(examples, *, peak, layers, seed):
    """Probabilities (l, n, 1) of test examples: right most often at the layer `peak`.

    What is hard depends on the example alone, so runs on the same examples are paired.
    """
    test = examples[examples.split == "test"]
    y_n = np.array(test["labels"].tolist())[:, 0]
    hard_n = [
        np.random.default_rng([7, *row]).random() for row in zip(test.image_id, y_n, strict=True)
    ]
    noise_ln = np.random.default_rng(seed).normal(scale=0.05, size=(layers, len(test)))
    share_l = 0.9 - 0.25 * abs(np.linspace(0, 1, layers) - peak / (layers - 1))
    is_right_ln = share_l[:, None] > hard_n + noise_ln
    return np.where(is_right_ln, y_n, 1 - y_n)[..., None].astype(np.float16) * 0.8 + 0.1


def make_run(name, *, peak, model="vlm", layers=12, examples=None, root="/home", seed=0):
    """A saved run whose curve peaks at a layer, without a disk."""
    if examples is None:
        examples = make_examples()
    p_lnc = answers(examples, peak=peak, layers=layers, seed=seed)
    rows = []
    for split in ("validation", "test"):
        for k in range(layers):
            row = {"layer": f"lm.{k:02d}", "split": split, "value": -abs(k - peak), "n": 600}
            rows.append(row)
    metrics = pd.DataFrame(rows).assign(
        model=model,
        stage="lm",
        pooling="mean",
        task="caption",
        probe="logreg",
        control="none",
        metric="accuracy",
        seed=0,
        **{"class": ""},
    )
    key = ProbeKey(model, "none", "mean", "caption", "logreg")
    results = ProbeResults(
        metrics=metrics.reindex(columns=COLUMNS),
        losses=pd.DataFrame(),
        predictions={key: p_lnc},
        tasks=task_infos(examples),
    )
    return types.SimpleNamespace(
        name=name,
        home=Home.find(root),
        results=Results.of(results, examples),
        examples=examples,
        settings={"data: train": str(SPLITS["train"]), "probes: seeds": f"[{seed}]"},
    )


BASE = make_run("base", peak=4)
MOVED = make_run("tuned", peak=8, model="vlm-tuned", seed=1)


@pytest.fixture(scope="module")
def moved() -> RunComparison:
    return compare_runs([BASE, MOVED], resamples=500)


# ---- what is matched and paired ----


def test_a_peak_that_moved_is_found_on_the_shared_images(moved):
    row = moved.peaks.iloc[0]
    assert row.paired
    assert (row.shared_images, row.images_a, row.images_b) == (300, 300, 300)
    assert (row.model_a, row.model_b) == ("vlm", "vlm-tuned")  # one model each
    assert (row.best_a, row.best_b) == ("lm.04", "lm.08")
    assert row.moved_lo <= 4 <= row.moved_hi
    assert row.moved_lo > 1
    assert row.moved_p < 0.05
    assert "the peak moved by +" in str(moved.summary())


def test_differences_are_those_of_the_scores(moved):
    rows = moved.differences
    assert len(rows) == 12
    np.testing.assert_allclose(rows.difference, rows.score_b - rows.score_a)
    assert ((rows.lo <= rows.difference) & (rows.difference <= rows.hi)).all()
    assert rows.difference.iloc[4] < 0 < rows.difference.iloc[8]
    y_n = np.array(BASE.examples["labels"].tolist())[BASE.examples.split == "test", 0]
    (p_lnc,) = BASE.results.predictions.values()
    np.testing.assert_allclose(rows.score_a, ((p_lnc[..., 0] > 0.5) == y_n).mean(1))


def test_two_peaks_about_the_other_one_leave_the_direction_open():
    base = make_run("base", peak=5)
    other = make_run("other", peak=5)
    test = base.examples[base.examples.split == "test"]
    y_n = np.array(test["labels"].tolist())[:, 0]
    hard_n = np.random.default_rng(0).random(len(test))
    for run, best in ((base, [2, 8]), (other, [5])):
        (p_lnc,) = run.results.predictions.values()
        for k in range(len(p_lnc)):
            is_right_n = hard_n < (0.9 if k in best else 0.6)
            p_lnc[k, :, 0] = np.where(is_right_n, y_n, 1 - y_n)
    comparison = compare_runs([base, other], resamples=300)
    row = comparison.peaks.iloc[0]
    assert (row.moved_lo, row.moved_hi) == (-3, 3)
    assert row.moved_p < 0.05
    assert "moved" not in str(comparison.summary())
    assert "they peak at different layers, in which direction is open" in str(comparison.summary())


def test_the_same_curve_twice_has_not_moved():
    again = make_run("again", peak=4)
    comparison = compare_runs([BASE, again], resamples=300)
    row = comparison.peaks.iloc[0]
    assert (row.difference, row.lo, row.hi) == (0, 0, 0)
    assert (row.moved, row.moved_p) == (0, 1)
    assert "did not move as far as 300 images can tell" in str(comparison.summary())


def test_images_that_the_other_run_trained_on_do_not_count():
    # The other run begins 100 images later: of its 300 test images 200 are tested in the first run,
    # and its training and validation images lie among the first one's test images.
    later = make_run("later", peak=4, examples=make_examples(first=100), seed=2)
    row = compare_runs([BASE, later], resamples=300).peaks.iloc[0]
    assert row.left_out_images == 80
    assert row.paired
    assert (row.shared_images, row.images_a, row.images_b) == (200, 200, 200)


def test_runs_that_share_no_prompts_are_compared_without_pairs():
    apart = make_run("apart", peak=8, examples=make_examples(prompt="So, {}?"), seed=1)
    comparison = compare_runs([BASE, apart], resamples=300)
    row = comparison.peaks.iloc[0]
    assert not row.paired
    assert (row.shared_images, row.images_a, row.images_b) == (0, 300, 300)
    assert row.moved_p < 0.05
    assert "Not paired: 0 test images are in both runs" in str(comparison.summary())


def test_runs_without_images_that_are_new_to_both_are_refused():
    # Each run's test images are in the training or validation split of the other one.
    swapped = BASE.examples.assign(
        split=BASE.examples.split.map({"train": "test", "validation": "test", "test": "train"})
    )
    swapped.loc[swapped.index[-40:], "split"] = "validation"
    other = make_run("other", peak=4, examples=swapped)
    with pytest.raises(ValueError, match="0 of its test images are new to both runs"):
        compare_runs([BASE, other])


def test_few_shared_images_do_not_hide_that_each_run_has_enough(monkeypatch):
    # Of 25 new images in each run 15 are shared: more than half, and too few alone.
    monkeypatch.setitem(SPLITS, "test", 25)
    base = make_run("base", peak=4)
    examples = make_examples()
    test_images = examples[examples.split == "test"].image_id.unique()
    is_other = examples.image_id.isin(test_images[15:])
    examples["prompt"] = examples.prompt.where(~is_other, "So?")
    other = make_run("other", peak=4, examples=examples)
    row = compare_runs([base, other], resamples=100).peaks.iloc[0]
    assert not row.paired
    assert (row.shared_images, row.images_a, row.images_b) == (15, 25, 25)


def with_task(run, task, *, examples):
    """Return the run with a second task, which has the same probabilities."""
    (key,) = run.results.predictions
    metrics = run.results.metrics
    results = ProbeResults(
        metrics=pd.concat([metrics, metrics.assign(task=task)]),
        losses=pd.DataFrame(),
        predictions=run.results.predictions
        | {key._replace(task=task): run.results.predictions[key]},
        tasks=task_infos(examples),
    )
    both = types.SimpleNamespace(**vars(run))
    both.results = Results.of(results, examples)
    both.examples = examples
    return both


def test_a_task_without_a_score_leaves_the_others(monkeypatch):
    # The test examples of the second task have no answer that counts.
    of_task = BASE.examples.assign(task="object")
    of_task["mask"] = [[int(split != "test")] for split in of_task.split]
    examples = pd.concat([BASE.examples, of_task], ignore_index=True)
    runs = [with_task(run, "object", examples=examples) for run in (BASE, MOVED)]
    comparison = compare_runs(runs, resamples=100)
    assert comparison.peaks.task.tolist() == ["caption"]
    (reason,) = comparison.left_out
    assert reason.startswith("object of tuned (its test examples have no answer")

    compare_peaks = run_comparison.compare_peaks
    calls = []

    def fails_once(a, b):
        calls.append(a)
        score_l = a.score_l * (np.nan if len(calls) == 1 else 1)
        return compare_peaks(a._replace(score_l=score_l), b)

    monkeypatch.setattr(run_comparison, "compare_peaks", fails_once)
    examples = pd.concat([BASE.examples, BASE.examples.assign(task="object")], ignore_index=True)
    runs = [with_task(run, "object", examples=examples) for run in (BASE, MOVED)]
    comparison = compare_runs(runs, resamples=100)
    assert comparison.peaks.task.tolist() == ["object"]
    (reason,) = comparison.left_out
    assert reason.startswith("caption of tuned (a layer has no score in some resample")


def test_what_only_one_run_has_is_listed_and_never_dropped_where_it_was_named():
    examples = pd.concat([BASE.examples, BASE.examples.assign(task="object")], ignore_index=True)
    base = with_task(BASE, "object", examples=examples)
    of_caption = next(iter(base.results.predictions))
    of_max = of_caption._replace(pooling="max")
    base.results.predictions[of_max] = base.results.predictions[of_caption]
    plain = make_run("plain", peak=4)
    plain.results.predictions[of_caption._replace(model="second")] = np.zeros(0)
    comparison = compare_runs([base, plain], resamples=100)
    assert comparison.left_out == (
        "the model second of plain (base has no model of this name)",
        "object, of vlm in base (plain has no such curve)",
        "caption, max pooling, of vlm in base (plain has no such curve)",
    )
    assert "Not compared: the model second of plain" in str(comparison.summary())
    for names, words in (
        ({"tasks": ["caption", "objct"]}, "task objct cannot be compared.*tasks caption, object"),
        ({"tasks": ["caption", "object"]}, "task object cannot be compared.*plain has no such"),
        ({"poolings": ["mean", "max"]}, "pooling max cannot be compared.*plain has no such curve"),
    ):
        with pytest.raises(ValueError, match=words):
            compare_runs([base, plain], resamples=100, **names)
    # A third run may lack what the second one has.
    again = with_task(make_run("again", peak=4), "object", examples=examples)
    comparison = compare_runs([base, again, plain], tasks=["object"], resamples=100)
    assert comparison.peaks.run_b.tolist() == ["again"]
    assert "object, of vlm in base (plain has no such curve)" in comparison.left_out


def test_copies_of_a_dataset_are_recognised_by_their_bytes(tmp_path):
    runs = []
    for folder in ("one", "two"):
        examples = make_examples(folder=folder)
        for file in examples.file.unique():
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.stem)
        runs.append(make_run(folder, peak=4, examples=examples, root=tmp_path))
    row = compare_runs(runs, resamples=300).peaks.iloc[0]
    assert row.paired
    assert row.shared_images == 300


def test_one_common_path_does_not_hide_that_other_images_are_copies(tmp_path):
    # The second run has its training images under the first run's paths, but its test images are
    # copies of images that the first run trained on.
    base_examples = make_examples(folder="one")
    examples = make_examples(folder="one")
    is_test = examples.split == "test"
    number_n = examples.image_id - examples.image_id[is_test].min()
    examples["file"] = examples.file.where(~is_test, "data/two/" + number_n.astype(str) + ".jpg")
    for table in (base_examples, examples):
        for file in table.file.unique():
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.stem)
    runs = [
        make_run("base", peak=4, examples=base_examples, root=tmp_path),
        make_run("other", peak=4, examples=examples, root=tmp_path),
    ]
    row = compare_runs(runs, resamples=100).peaks.iloc[0]
    assert row.left_out_images == 80


def test_models_of_a_scale_series_are_compared_by_relative_depth():
    deep = make_run("deep", peak=16, layers=23, model="large", seed=3)
    comparison = compare_runs([BASE, MOVED, deep], resamples=300)
    of_deep = comparison.differences[comparison.differences.run_b == "deep"]
    assert of_deep.layer_b.tolist() == [f"lm.{2 * k:02d}" for k in range(12)]
    row = comparison.peaks[comparison.peaks.run_b == "deep"].iloc[0]
    assert row.moved_lo <= 4 <= row.moved_hi  # 16 of 22 is 8 of 11
    assert (
        "relative depth" in comparison_figures(comparison)["peaks"].figure.layout.xaxis.title.text
    )


def test_models_are_matched_by_name_or_as_they_are_named():
    same = make_run("same", peak=4)
    same.results.predictions.update(
        make_run("x", peak=8, model="second", seed=1).results.predictions
    )
    assert compare_runs([BASE, same], resamples=100).peaks.model_b.tolist() == ["vlm"]
    two = make_run("two", peak=4, model="first")
    two.results.predictions.update(MOVED.results.predictions)
    with pytest.raises(ValueError, match=r"no model is in both runs.*--models vlm=first"):
        compare_runs([BASE, two])
    with pytest.raises(ValueError, match="no model third: base has vlm; two has first, vlm-tuned"):
        compare_runs([BASE, two], models=[("vlm", "third")])
    named = compare_runs([BASE, two], models=[("vlm", "first")], resamples=100)
    assert named.peaks.model_b.tolist() == ["first"]


def test_what_cannot_be_compared_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="at least two"):
        compare_runs([BASE])
    with pytest.raises(ValueError, match="each once"):
        compare_runs([BASE, BASE])
    with pytest.raises(ValueError, match="probe mlp: base has the tasks caption, poolings mean"):
        compare_runs([BASE, MOVED], probe="mlp")
    with pytest.raises(ValueError, match="resamples=1: take at least 100"):
        compare_runs([BASE, MOVED], resamples=1)


def test_settings_that_differ_are_listed(moved):
    assert moved.different_settings == {"probes: seeds": "base: [0]; tuned: [1]"}


# ---- limits ----


def test_limits_fail_only_where_the_whole_interval_lies_beyond(moved):
    row = moved.peaks.iloc[0]
    (verdict,) = moved.verdicts(peak_may_move=1)
    assert verdict.is_failure
    assert verdict.line.startswith("FAILED caption, mean pooling, vlm → vlm-tuned")
    (verdict,) = moved.verdicts(peak_may_move=row.moved_lo)
    assert not verdict.is_failure
    assert verdict.line.startswith("open")
    (verdict,) = moved.verdicts(peak_may_move=row.moved_hi)
    assert verdict.line.startswith("fine")
    (verdict,) = moved.verdicts(score_may_fall=0.3)
    assert verdict.line.startswith("fine")
    with pytest.raises(ValueError, match="score_may_fall=-1"):
        moved.verdicts(score_may_fall=-1)


def test_a_score_that_fell_is_a_failure_and_one_that_rose_is_not():
    worse = make_run("worse", peak=4)
    (key,) = worse.results.predictions
    p_lnc = worse.results.predictions[key]
    p_lnc[:, ::5] = 1 - p_lnc[:, ::5]  # a fifth of the answers is turned round
    fell = compare_runs([BASE, worse], resamples=300).verdicts(score_may_fall=0.02)
    rose = compare_runs([worse, BASE], resamples=300).verdicts(score_may_fall=0.02)
    assert fell[0].is_failure
    assert not rose[0].is_failure


def test_a_run_that_guesses_has_no_peak_that_could_move():
    guessing = make_run("guessing", peak=4)
    (key,) = guessing.results.predictions
    p_lnc = guessing.results.predictions[key]
    p_lnc[:] = 0.1
    p_lnc[8, :20] = 0.9  # which says yes to a few, at random
    comparison = compare_runs([BASE, guessing], resamples=300)
    row = comparison.peaks.iloc[0]
    assert (row.guess_a, row.guess_b) == (0.5, 0.5)
    assert (row.is_guess_a, row.is_guess_b) == (False, True)
    assert "guessing scores no better than a guess (0.500)" in str(comparison.summary())
    (verdict,) = comparison.verdicts(peak_may_move=0)
    assert not verdict.is_failure


def test_luck_at_the_highest_of_many_layers_is_no_better_than_a_guess():
    guessing = make_run("guessing", peak=4)
    (key,) = guessing.results.predictions
    p_lnc = guessing.results.predictions[key]
    p_lnc[:] = np.random.default_rng(3).random(p_lnc.shape)
    y_n = np.array(guessing.examples["labels"].tolist())[guessing.examples.split == "test", 0]
    p_lnc[8, :100, 0] = y_n[:100]  # the highest test score, though not on validation images
    row = compare_runs([BASE, guessing], resamples=100).peaks.iloc[0]
    assert (row.best_b, row.peak_b) == ("lm.04", "lm.08")
    assert row.is_guess_b
    assert not row.is_guess_a


# ---- the page and the command ----


def test_the_page_shows_both_runs_and_leaves_tables(moved, tmp_path):
    page = moved.write_page(tmp_path / "page")
    text = page.read_text(encoding="utf-8")
    assert "Side by side: base and tuned" in text
    assert "differs: probes: seeds" in text
    peaks = pd.read_csv(tmp_path / "page" / "peaks.csv")
    assert peaks.moved_lo.tolist() == moved.peaks.moved_lo.tolist()
    assert len(pd.read_csv(tmp_path / "page" / "differences.csv")) == 12
    curves = moved_traces(moved, "caption_curves")
    assert [trace.line.dash for trace in curves] == ["solid", "dash"]
    assert len({trace.line.color for trace in curves}) == 1


def moved_traces(comparison, name):
    figure = comparison_figures(comparison)[name].figure
    return [trace for trace in figure.data if trace.mode == "lines+markers"]


def test_the_command_says_by_its_exit_code_whether_a_peak_moved(monkeypatch, tmp_path, capsys):
    runs = {"base": BASE, "tuned": MOVED}
    monkeypatch.setattr("probekit.workflow.open_run", runs.__getitem__)
    monkeypatch.setattr(BASE, "home", Home.find(tmp_path))
    arguments = ["compare", "base", "tuned", "--resamples", "100"]
    assert main(arguments) == 0
    assert (tmp_path / "figures" / "base-vs-tuned" / "index.html").exists()
    assert main([*arguments, "--peak-may-move", "1"]) == 1
    assert "FAILED caption" in capsys.readouterr().out
    assert main([*arguments, "--peak-may-move", "11"]) == 0
    assert main([*arguments, "--models", "vlm"]) == 2
    assert "--models vlm: name two models" in capsys.readouterr().err
    assert main([*arguments, "--task", "nothing"]) == 2
