"""Interventions on a real run: what is done, what is not done again, and what cannot be done."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import probekit as pk
from probekit.interventions import running, study
from probekit.interventions.running import NOT_FINITE, Readings
from probekit.interventions.scores import Done, TaskScores
from probekit.interventions.settings import Intervention
from probekit.models.replay_check import ReplayVerdict
from probekit.probes.labels import LabelSet
from probekit.report import used
from probekit.report.saved_run import SavedRun
from probekit.workflow import interventions_folder, open_activations

FEW = {
    "layers": [0, 5, 8],
    "images": 6,
    "fit_images": 20,
    "inputs": [],
    "resamples": 20,
    "device": "cpu",
}
KEYS = ["layer", "intervention", "site", "dose", "control", "metric", "read_layer"]


@pytest.fixture
def activations(small_run):
    return open_activations("small")


def answers(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table.metric == "accuracy") & table.value.notna()]


def test_every_intervention_has_its_rows(activations, small_run):
    table = pk.intervene(activations, **FEW)
    assert set(table.model) == {"tiny-qwen2-vl"}  # the untrained twin is passed over
    assert set(table.task) == {"caption"}
    assert not table.duplicated(KEYS).any()
    done = answers(table)
    assert set(done.intervention) == {"none", "leace", "mean_difference", "steer", "cut"}
    erased = done[done.intervention == "leace"]
    assert set(erased.site) == {"image", "text", "last"}
    assert set(erased.control) == {"none", "random", "other_task"}
    named = erased.groupby(["control", "site"]).erased.unique()
    assert named["none", "image"].tolist() == ["category"]
    assert named["none", "text"].tolist() == ["caption"]
    assert named["other_task", "text"].tolist() == ["category"]
    assert named["random", "text"].tolist() == [""]
    assert set(done.site[done.intervention == "cut"]) == {"image>text", "image>last", "text>last"}
    assert done.layer[done.intervention == "cut"].nunique() == 8
    rebuilt = table[(table.metric == "probe_accuracy") & (table.intervention == "leace")]
    assert (rebuilt.read_layer >= rebuilt.layer).all()
    assert (done.n == 12).all()  # two captions of each image
    # What the last layer loses in the last token, the answer loses, whatever happens elsewhere.
    at_end = table[(table.layer == "lm.08") & (table.metric == "margin_effect")]
    at_end = at_end[at_end.control == "none"].set_index(["intervention", "site"]).value
    assert at_end["leace", "last"] < 0
    assert at_end["leace", "image"] == 0
    reopened = SavedRun.open("small").results
    pd.testing.assert_frame_equal(reopened.interventions, table)
    names = set(reopened.figures())
    assert {f"caption_{one}" for one in ("used", "effects", "rebuilt", "routes", "doses")} <= names
    assert reopened.plot("used").layout.title.text.startswith("Known, said and used")


def test_the_model_alone_says_what_the_results_hold(activations, small_run):
    table = pk.intervene(activations, **FEW | {"images": 12, "erase": [], "doses": []})
    alone = table[table.intervention == "none"].set_index(["metric", "read_layer"]).value
    metrics = small_run.results.metrics
    rows = metrics[(metrics.task == "caption") & (metrics.control == "none")]
    rows = rows[(rows.split == "test") & (rows.metric == "accuracy") & (rows["class"] == "")]
    said = rows[(rows.probe == "answer") & (rows.model == "tiny-qwen2-vl")]
    assert alone["accuracy", np.nan] == pytest.approx(said.value.iloc[0])
    known = rows[(rows.probe == "logreg") & (rows.pooling == "last") & (rows.stage == "lm")]
    for layer, value in zip(known.layer, known.value, strict=True):
        assert alone["probe_accuracy", layer] == pytest.approx(value)


def test_what_is_done_is_not_done_again_and_a_killed_run_goes_on(activations, monkeypatch):
    monkeypatch.setattr(running, "SHARD_IMAGES", 2)
    wanted = FEW | {"routes": [], "doses": [], "layers": [3, 4]}
    calls = []
    do_one = running.do_one

    def counted(*arguments, **options):
        if len(calls) == 40:  # in the second shard
            raise KeyboardInterrupt
        calls.append(arguments)
        return do_one(*arguments, **options)

    monkeypatch.setattr(running, "do_one", counted)
    with pytest.raises(KeyboardInterrupt):
        pk.intervene(activations, **wanted)
    monkeypatch.setattr(running, "do_one", do_one)
    folder = interventions_folder("small")
    done = {file: file.stat().st_mtime_ns for file in folder.rglob("shard-*-lm.0[34]-*")}
    assert done
    table = pk.intervene(activations, **wanted)
    assert all(file.stat().st_mtime_ns == when for file, when in done.items())
    monkeypatch.setattr(study, "reload_model", None)  # nothing is left to run
    pd.testing.assert_frame_equal(pk.intervene(activations, **wanted), table)
    with pytest.raises(TypeError):  # another layer has to run
        pk.intervene(activations, **wanted | {"layers": [2, 3, 4]})


def test_a_damaged_file_is_named_and_made_again_once_it_is_gone(activations):
    wanted = FEW | {"erase": [], "doses": [], "routes": ["text>last"], "seed": 9}
    table = pk.intervene(activations, **wanted)
    file = max(interventions_folder("small").rglob("shard-*"), key=lambda one: one.stat().st_mtime)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*: delete it, then 04"):
        pk.intervene(activations, **wanted)
    file.unlink()
    pd.testing.assert_frame_equal(pk.intervene(activations, **wanted), table)


def test_probes_are_left_out_where_there_are_none(activations, monkeypatch, capsys):
    def fail(*arguments):
        raise FileNotFoundError("no results here")

    monkeypatch.setattr("probekit.probes.results.ProbeResults.read", fail)
    table = pk.intervene(activations, **FEW | {"erase": [], "doses": [], "routes": ["text>last"]})
    assert "answers alone are watched, and no probes: no results here" in capsys.readouterr().out
    assert "probe_accuracy" not in set(table.metric)
    assert len(answers(table))


def test_a_model_that_changes_when_nothing_is_changed_is_left_out(activations, monkeypatch, capsys):
    verdict = ReplayVerdict("", "changing nothing changes a lot")
    monkeypatch.setattr(study, "check_replay", lambda vlm, prepared: verdict)
    table = pk.intervene(activations, **FEW | {"seed": 5})
    assert table.empty
    assert "no interventions on tiny-qwen2-vl: changing nothing" in capsys.readouterr().out


def test_attention_that_cannot_be_cut_leaves_the_rest(activations, monkeypatch, capsys):
    verdict = ReplayVerdict("shared", why_no_cut="attention is elsewhere")
    monkeypatch.setattr(study, "check_replay", lambda vlm, prepared: verdict)
    table = pk.intervene(activations, **FEW | {"doses": [], "erase": ["leace"], "seed": 6})
    cut = table[table.intervention == "cut"]
    assert cut.value.isna().all()
    assert set(cut.reason) == {"attention is elsewhere"}
    assert len(answers(table[table.intervention == "leace"]))
    assert "attention is not cut, attention is elsewhere" in capsys.readouterr().out


def test_states_that_are_not_finite_are_one_empty_cell(activations):
    table = pk.intervene(activations, **FEW | {"erase": [], "routes": [], "doses": [1.0, 1e38]})
    steered = table[table.intervention == "steer"]
    assert set(steered.reason[steered.dose == 1e38].dropna()) >= {NOT_FINITE}
    assert len(answers(steered[steered.dose == 1.0]))


def test_a_table_of_other_activations_is_not_shown(activations, small_run, capsys):
    pk.intervene(activations, **FEW | {"erase": [], "doses": [], "routes": ["text>last"]})
    assert len(SavedRun.open("small").results.interventions)
    folder = interventions_folder("small")
    record = json.loads((folder / study.RECORD).read_text(encoding="utf-8"))
    record["folders"] = ["data/activations/another/0123456789ab"]
    (folder / study.RECORD).write_text(json.dumps(record), encoding="utf-8")
    assert SavedRun.open("small").results.interventions.empty
    assert "is of other examples or activations: run 04_intervene" in capsys.readouterr().out


def test_where_nothing_can_be_erased_there_is_no_figure(activations):
    examples = activations[0].examples
    without = examples[examples.task == "caption"].reset_index(drop=True)
    views = [replace(activations[0], examples=without)]
    table = pk.intervene(views, **FEW | {"tokens": ["image"], "doses": [], "routes": []})
    assert table.reason.str.contains("add a task with categories").any()
    assert used.erasures_of(table) == []
    with pytest.raises(ValueError, match="no erasure for caption"):
        used.used_figure(table, "caption")


def test_one_of_many_rows_may_stand_anywhere(activations):
    wanted = FEW | {"erase": ["leace"], "doses": [], "routes": [], "tokens": ["last"]}
    table = pk.intervene(activations, **wanted)
    shuffled = activations[0].examples.sample(frac=1, random_state=0).reset_index(drop=True)
    mixed = pk.intervene([replace(activations[0], examples=shuffled)], **wanted | {"images": 12})
    straight = pk.intervene(activations, **wanted | {"images": 12})
    keys = ["layer", "intervention", "control", "metric", "read_layer"]
    both = [one.set_index(keys).value.dropna() for one in (mixed, straight)]
    for metric in ("accuracy", "margin"):
        of_metric = [one[one.index.get_level_values("metric") == metric] for one in both]
        alone = [one[one.index.get_level_values("intervention") == "none"] for one in of_metric]
        assert alone[0].tolist() == pytest.approx(alone[1].tolist())
    assert len(table)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"layers": [99]}, r"layers=\[99\]: this model has layers 0 to 8"),
        ({"watch": ["category"]}, "category is no task of this run that has answers; it has cap"),
        ({"tokens": ["eyes"]}, r"tokens=\['eyes'\]: take out of image, text, last, all"),
        ({"tokens": []}, "tokens=.*name at least one"),
        ({"erase": ["hope"]}, r"erase=\['hope'\]: take out of leace, mean_difference, logreg"),
        ({"routes": ["image"]}, r"routes=\['image'\]: take out of image>text"),
        ({"inputs": ["blur"]}, r"inputs=\['blur'\]: take out of only_object"),
        ({"erase": [], "doses": [], "routes": []}, "name something that is to be done"),
        ({"tokens": ["image"]}, "are added to the last token or to the text"),
        ({"dose": 3}, "there is no setting 'dose'"),
    ],
)
def test_what_makes_no_sense_is_refused(activations, wanted, message):
    with pytest.raises(ValueError, match=message):
        pk.intervene(activations, **FEW | wanted)


def test_a_cut_of_one_block_in_a_deep_model_is_a_tenth():
    from probekit.interventions.settings import InterventionSettings, plan_interventions

    planned = plan_interventions(InterventionSettings(), blocks=28, is_binary=True)
    cuts = [one for one in planned if one.name == "cut"]
    assert {one.dose for one in cuts} == {3}
    assert {one.layer for one in cuts} == set(range(26))
    only_layers = plan_interventions(
        InterventionSettings(erase=("leace",), doses=(), routes=()), blocks=28, is_binary=False
    )
    assert {one.layer for one in only_layers} == set(range(29))


def test_scores_of_several_answers_leave_out_those_that_do_not_count():
    y_nc = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]).float()
    mask_nc = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]]).float()
    labels = LabelSet(
        name="none",
        kind="one_of",
        classes=["red", "green", "blue"],
        image_n=np.arange(4),
        y_nc=y_nc,
        mask_nc=mask_nc,
        split={},
    )
    no_probes = np.zeros((4, 4, 0), np.float32)
    # The third example has no right answer that counts; the fourth's largest one does not count.
    alone = Readings(np.array([[2.0, 1, 0], [2, 1, 0], [0, 0, 9], [1, 0, 9]]), no_probes)
    changed = Readings(np.array([[0.0, 1, 0], [0, 1, 0], [0, 0, 9], [0, 1, 9]]), no_probes)
    done = [Done(Intervention(2, "leace", "text"), changed, "")]
    table = TaskScores(labels, resamples=50).table(alone, done, layers=["a", "b", "c", "d"])
    values = table.set_index(["intervention", "metric"]).value
    assert values["none", "accuracy"] == pytest.approx(2 / 3)
    assert values["leace", "accuracy"] == pytest.approx(1 / 3)
    assert values["leace", "effect"] == pytest.approx(-1 / 3)
    assert set(table.n) == {3}
    assert "says_yes" not in set(table.metric)
