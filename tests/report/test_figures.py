from dataclasses import replace

import pandas as pd
import pytest

from probekit.report.figures import KNOWN_AND_SAID, first_figure, run_figures


@pytest.fixture(scope="module")
def figures(saved_run):
    return run_figures(saved_run.results)


@pytest.mark.slow
def test_a_run_has_a_figure_for_all_that_its_tables_have(figures):
    assert {
        "global_and_local",
        "caption_accuracy",
        "caption_selectivity",
        "caption_codelength",
        "caption_poolings",
        "caption_stages",
        "caption_scores",
        "caption_confusion",
        "caption_transfer",
        "caption_losses",
        "category_classes",
        "category_localisation",
        "category_list_f1_macro",
    } <= set(figures)


def test_every_figure_has_a_title_a_caption_and_its_task(figures):
    for name, figure in figures.items():
        assert figure.figure.layout.title.text, name
        assert len(figure.caption) > 40, name
    assert figures["category_list_f1_macro"].group == "category_list"  # and not category
    assert figures["category_f1_macro"].group == "category"
    assert figures["caption_losses"].group == "caption"
    assert figures["global_and_local"].group == figures["similarity"].group == ""


def test_the_first_figure_answers_the_question_of_the_run(figures):
    assert first_figure(figures) == "caption_known_and_said"
    no_answers = {
        name: figure for name, figure in figures.items() if figure.section != KNOWN_AND_SAID
    }
    assert first_figure(no_answers) == "caption_accuracy"
    assert first_figure({}) is None


def test_figures_that_need_what_a_run_lacks_are_left_out(saved_run):
    metrics = saved_run.results.metrics
    is_optional = metrics.metric.isin(["selectivity", "codelength", "heat_in_boxes"])
    is_basic = (metrics.stage == "lm") & (metrics.pooling == "mean") & ~is_optional
    results = replace(
        saved_run.results,
        metrics=metrics[is_basic],
        losses=pd.DataFrame(),
        transfer=pd.DataFrame(),
    )
    figures = run_figures(results)
    assert {"caption_accuracy", "category_classes", "category_list_confusion"} <= set(figures)
    optional = [
        "selectivity",
        "codelength",
        "poolings",
        "stages",
        "transfer",
        "losses",
        "localisation",
    ]
    assert not [name for name in figures if name.rpartition("_")[2] in optional]
