from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter

from probekit.probes.results import ProbeResults, best_layers, select_curve
from probekit.report import results as results_module
from probekit.report.overview import overview_table
from probekit.report.results import Results
from probekit.report.sentences import summarise
from probekit.report.slices import slice_table
from tests.support.figures import curves_by_name


@pytest.fixture(scope="module")
def results(saved_run):
    return saved_run.results


@pytest.fixture(scope="module")
def drawn(probe_results):
    """Results with known values and without examples."""
    return Results.of(probe_results, pd.DataFrame())


def test_results_hold_what_they_are_made_of(probe_results):
    examples = pd.DataFrame({"task": ["caption"]})
    results = Results.of(probe_results, examples)
    for field in fields(ProbeResults):
        assert getattr(results, field.name) is getattr(probe_results, field.name)
    assert results.examples is examples
    assert isinstance(replace(results, metrics=results.metrics[:1]), Results)


def test_plot_takes_the_first_task_and_pooling_that_have_the_metric(drawn):
    figure = drawn.plot("accuracy")
    assert "does the caption belong?" in figure.layout.title.subtitle.text
    np.testing.assert_allclose(curves_by_name(figure)["small"].y, [0.5, 0.6, 0.7, 0.8])
    only_local = drawn.plot("f1_macro", task="category")
    assert "which categories?" in only_local.layout.title.subtitle.text


def test_plot_passes_over_tasks_that_lack_the_metric(results):
    figure = results.plot("heat_in_boxes")
    assert "which categories?" in figure.layout.title.subtitle.text


def test_plot_draws_the_pooling_and_the_probe_that_are_named(results):
    figure = results.plot("accuracy", probe="linear", pooling="last")
    rows = results.metrics
    rows = rows[(rows.pooling == "last") & (rows.task == "caption") & (rows.control == "none")]
    curve = select_curve(rows, probe="linear", metric="accuracy")
    np.testing.assert_allclose(curves_by_name(figure)["tiny-qwen2-vl"].y, curve.value)


def test_plot_draws_codelengths_which_are_those_of_training_labels(results):
    curves = curves_by_name(results.plot("codelength"))
    assert len(curves["tiny-qwen2-vl"].y) == 9


def test_plot_can_overlay_the_study_and_begin_with_relative_depth(drawn):
    curves = curves_by_name(drawn.plot("accuracy", published=True, relative=True))
    assert "Qwen2-VL-2B, published accuracy" in curves
    assert max(curves["small"].x) == 1


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("acuracy", {}, r"no metric 'acuracy' in these results: take one of accuracy, f1_macro"),
        (
            "accuracy",
            {"task": "captions"},
            r"no task 'captions' in these results of accuracy: take one of caption, category$",
        ),
        (
            "accuracy",
            {"probe": "mlp"},
            r"no probe 'mlp' .* of accuracy, caption: take one of logreg, linear$",
        ),
        (
            "accuracy",
            {"pooling": "max"},
            r"no pooling 'max' .* accuracy, caption, logreg: take one of mean$",
        ),
        ("f1_positive", {"task": "category"}, r"no task 'category' .*: take one of caption$"),
    ],
)
def test_plot_refuses_what_is_not_there_and_lists_what_is(drawn, metric, options, message):
    with pytest.raises(ValueError, match=message):
        drawn.plot(metric, **options)


@pytest.mark.slow
def test_the_summary_folds_out_in_a_notebook_and_is_text_in_print(results):
    summary = results.summary()
    assert len(summary) == 6  # three tasks, two poolings
    formats, _ = DisplayFormatter().format(summary)
    assert formats["text/html"].startswith("<details>")
    assert formats["text/html"].count("<p>") == len(summary)
    assert str(summary) == "\n\n".join(summary)


def test_tables_are_computed_once_for_the_same_arguments(results, monkeypatch):
    results = replace(results)
    calls = []

    def count(compute):
        def counted(*sources, **options):
            calls.append((compute.__name__, *options.values()))
            return compute(*sources, **options)

        return counted

    for compute in (overview_table, slice_table, summarise):
        monkeypatch.setattr(results_module, compute.__name__, count(compute))
    for _ in range(2):
        results.overview()
        results.overview(probe="linear")
        results.summary()
        results.slices(task="caption", resamples=50)
        results.slices(task="caption", resamples=60)
    assert calls == [
        ("overview_table", "logreg"),
        ("overview_table", "linear"),
        ("summarise", "logreg"),
        ("slice_table", "caption", "logreg", None, 50),
        ("slice_table", "caption", "logreg", None, 60),
    ]
    assert not results.overview().equals(results.overview(probe="linear"))
    fewer = replace(
        results,
        metrics=results.metrics[results.metrics.task == "category"],
        tasks={"category": results.tasks["category"]},
    )
    assert set(fewer.overview().task) == {"category"}


def test_a_table_that_is_changed_leaves_the_next_one_as_it_is(results):
    for compute in (results.overview, lambda: results.slices(resamples=50)):
        first = compute()
        expected = first.copy()
        first["value"] = 0.0
        first.loc[0, "task"] = "changed"
        pd.testing.assert_frame_equal(compute(), expected)
    paragraphs = results.summary()
    paragraphs.clear()
    assert len(results.summary()) == 6


def test_a_curve_is_a_table_of_the_decoders_layers(results):
    accuracy = results.curve("accuracy", probe="linear")
    pd.testing.assert_frame_equal(
        accuracy, select_curve(results.metrics, probe="linear", metric="accuracy")
    )
    validation = results.curve("accuracy", split="validation")
    assert not validation.value.equals(results.curve("accuracy").value)
    assert results.curve("codelength").value.notna().all()


def test_best_layers_are_those_of_the_tables(results):
    expected = best_layers(results.metrics, results.tasks, probe="linear")
    pd.testing.assert_frame_equal(results.best_layers(probe="linear"), expected)


def test_a_comparison_pairs_what_differs_in_one_thing(results):
    table = results.compare(resamples=50)
    untrained = table[
        table.a.str.startswith("caption, tiny-qwen2-vl, mean,")
        & table.b.str.startswith("caption, tiny-qwen2-vl (untrained), mean,")
    ]
    assert len(untrained) == 1
    for row in table.itertuples():
        a = row.a.split(", ")[:3]
        b = row.b.split(", ")[:3]
        assert sum(x != y for x, y in zip(a, b, strict=True)) == 1


def test_a_comparison_without_examples_names_the_fix(drawn):
    with pytest.raises(ValueError, match=r"Results\.of\(results, examples\)"):
        drawn.compare()


def test_results_say_in_short_what_they_hold(drawn):
    words = repr(drawn)
    assert "small, large" in words
    assert "logreg, linear" in words
    assert len(words) < 300
