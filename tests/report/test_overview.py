import pandas as pd
import pytest

from probekit.probes.results import find_curve
from probekit.report.overview import (
    control_notes,
    overview_columns,
    overview_for_people,
    overview_table,
)
from probekit.tasks.base import TaskInfo


@pytest.fixture(scope="module")
def overview(table, tasks):
    return overview_table(table, tasks)


@pytest.fixture(scope="module")
def results(saved_run):
    return saved_run.results


def test_there_is_a_row_for_each_task_and_trained_model(overview):
    assert list(zip(overview.task, overview.model, strict=True)) == [
        ("caption", "small"),
        ("caption", "large"),
        ("category", "small"),
        ("category", "large"),
    ]
    assert set(overview["best layer"]) == {"lm.03"}
    assert list(overview.value) == pytest.approx([0.8] * 4)
    assert list(overview.plateau) == ["lm.03", "lm.03 to lm.06"] * 2
    assert list(overview["plateau layers"]) == [1, 4] * 2


def test_a_control_is_at_chance_unless_its_interval_lies_above_it(table, tasks, overview):
    assert set(overview["untrained is"]) == {"at chance", ""}
    is_untrained = table.control == "untrained"
    raised = table.assign(lo=table.lo.mask(is_untrained, 0.501))
    above = overview_table(raised, tasks)
    assert list(above["untrained is"]) == ["above chance", "", "above chance", ""]
    assert list(overview_for_people(above)["untrained model"]) == ["above chance: 0.50", "–"] * 2
    assert list(overview_for_people(overview)["untrained model"]) == ["✓", "–"] * 2
    (note,) = control_notes(above)
    assert note.startswith("Untrained model above chance: random weights")
    assert control_notes(overview) == []


def test_the_numbers_are_those_of_the_metrics_table(results):
    overview = results.overview()
    assert set(overview.pooling) == {"mean", "last"}
    for row in overview.to_dict("records"):
        rows = results.metrics
        for column in ("task", "model", "pooling"):
            rows = rows[rows[column] == row[column]]
        for metric, name in ((row["metric"], "value"), ("selectivity", "selectivity")):
            curve = find_curve(rows, probe="logreg", metric=metric).set_index("layer")
            at_best = curve.loc[row["best layer"]]
            assert row[name] == at_best.value
        curve = find_curve(rows, probe="logreg", metric="accuracy", control="untrained")
        assert row["untrained"] in set(curve.value)


def test_what_the_model_says_is_its_answer_where_it_has_one(results):
    overview = results.overview().set_index("task")
    answer = results.answers().set_index("control").loc["none"]
    assert set(overview.loc["caption", "answer"]) == {answer["answer"]}
    assert overview.loc[["category"], "answer"].isna().all()
    people = overview_for_people(results.overview()).set_index("task")
    shown = f"{answer['answer']:.2f} [{answer['answer lo']:.2f}, {answer['answer hi']:.2f}]"
    assert set(people.loc["caption", "the model says"].str.partition("]")[0] + "]") == {shown}
    assert set(people.loc[["category"], "the model says"]) == {"–"}


def test_the_table_and_the_sentences_agree(results):
    overview = results.overview()
    for row, paragraph in zip(overview.to_dict("records"), results.summary(), strict=True):
        assert f"the one on {row['best layer']} (chosen" in paragraph
        assert f"is among {row['plateau']} ({row['plateau layers']:.0f} of" in paragraph
        for control, words in (("untrained", "ntrained model"), ("control_task", "ontrol task")):
            sentence = f"{words} {row[control]:.3f} ({row[f'{control} lo']:.3f} to"
            assert sentence in paragraph
            is_above = f"{row[f'{control} hi']:.3f}), above chance" in paragraph
            assert (row[f"{control} is"] == "above chance") == is_above


def test_people_read_a_score_and_its_interval_in_one_cell(overview):
    people = overview_for_people(overview)
    assert set(people["score"]) == {"0.80 [0.75, 0.85]"}
    assert list(people["measured by"]) == ["accuracy"] * 2 + ["macro-F1"] * 2
    assert "pooling" not in people
    assert people.map(lambda cell: isinstance(cell, str)).all(axis=None)


def test_rows_are_sorted_by_numbers_and_not_by_their_words(overview):
    lower = overview.assign(value=[0.9, 0.1, 1.0, 0.25])
    score = next(column for column in overview_columns(lower) if column.heading == "score")
    assert score.keys == [0.9, 0.1, 1.0, 0.25]
    missing = overview.assign(value=[0.9, None, 1.0, 0.25])
    score = next(column for column in overview_columns(missing) if column.heading == "score")
    assert score.keys[1] is None


def test_no_better_than_a_guess_is_said_of_yes_or_no_alone(table, tasks):
    low = overview_table(table.assign(lo=table.lo.clip(upper=0.4)), tasks)
    assert list(low["is a guess"]) == [True, True, False, False]
    assert overview_for_people(low)["score"].str.endswith("no better than a guess").tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_other_wordings_of_a_question_have_no_row(table, tasks):
    reworded = {**tasks, "caption_short": TaskInfo("binary", ("match",), "?", variant_of="caption")}
    more = pd.concat([table, table[table.task == "caption"].assign(task="caption_short")])
    assert set(overview_table(more, reworded).task) == set(tasks)


def test_a_run_without_plateaus_has_none(table, tasks):
    assert set(overview_table(table.assign(plateau=pd.NA), tasks).plateau) == {""}


def test_a_kind_of_probe_that_is_missing_is_named(results):
    with pytest.raises(ValueError, match="mlp"):
        results.overview(probe="mlp")
