import json

import pandas as pd
import pytest

from probekit.report.figures import Figure
from probekit.report.overview import overview_for_people
from probekit.report.run_page import write_run_page


@pytest.fixture(scope="module")
def folder(saved_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run_page")
    figure = Figure(saved_run.results.plot("accuracy"), "Accuracy by layer.", "caption")
    write_run_page(saved_run, {"caption_accuracy": figure}, folder)
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_says_what_the_run_found_and_what_it_was_made_with(saved_run, html):
    assert "36 training, 12 validation, 12 test images" in html
    for paragraph in saved_run.results.summary():
        assert paragraph.partition(". ")[2] in html
    for row in overview_for_people(saved_run.results.overview()).to_dict("records"):
        assert row["score"].partition(" [")[0] in html
    assert "longest_side" not in html  # nothing was set
    assert "None" not in html
    assert "transformers" in html
    assert "caption_accuracy.html" in html
    assert "explorer_tiny-qwen2-vl.html" in html


def test_the_tables_are_beside_the_page(saved_run, folder, html):
    metrics = pd.read_csv(folder / "metrics.csv")
    assert len(metrics) == len(saved_run.results.metrics)
    sources = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert set(metrics.settings) == set(sources)
    for name in ("overview.csv", "metrics.csv", "losses.csv", "transfer.csv", "settings.json"):
        assert f'href="{name}"' in html
        assert (folder / name).exists()
