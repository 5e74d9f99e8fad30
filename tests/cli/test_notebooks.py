"""The notebooks through their real entry point, at a small size."""

import nbformat
import pandas as pd

from tests.conftest import DEMO_MODELS, REAL_COCO, call, needs_real_coco


def test_all_notebooks_run_and_leave_their_artefacts(demo):
    table = pd.read_csv(demo / "figures" / "small" / "metrics.csv")
    assert set(table.model) == set(DEMO_MODELS)
    assert set(table.task) == {"caption", "category", "category_list"}
    assert set(table.control) == {"none", "untrained", "no_image", "wrong_image", "shuffled", "control_task",
                                  "majority", "name_alone", "bag_of_words", "word_order"}
    assert set(table.probe) == {"logreg", "linear"}
    for _, rows in table[table.stage == "lm"].groupby(["model", "control"]):
        assert rows.layer.nunique() == 9
    assert set(table.stage) == {"lm", "vision", "projector"}
    page = (demo / "figures" / "small" / "index.html").read_text()
    assert page.count("<figure") == 32  # 30 of the tables, and an explorer for each model
    assert "heat_in_boxes" in set(table.metric)
    executed = sorted((demo / "data" / "runs").glob("*/0*.ipynb"))
    assert [p.stem[:2] for p in executed] == ["01", "02", "03", "04", "05"]
    for path in executed:
        assert path.stat().st_size < 3e6
        assert nbformat.read(path, 4).metadata.papermill["exception"] is None


def test_a_second_run_reuses_what_is_there_from_any_folder(demo, tmp_path):
    shards = sorted(demo.glob("data/activations/*/*/part-*/shard-*"))
    before = {p: p.stat().st_mtime_ns for p in shards}
    assert len(before) == 2 * 9 + 3  # 3 of images, 6 of prompts without one, which the untrained model is not asked
    done = call(demo, cwd=tmp_path, run="small")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for p in sorted(demo.glob("data/activations/*/*/part-*/shard-*"))} == before
    assert not list(tmp_path.iterdir())


def test_from_starts_in_the_middle(demo):
    done = call(demo, "--from", "04", run="small", probe="linear")
    assert done.returncode == 0, done.stderr[-3000:]
    newest = max((demo / "data" / "runs").iterdir())
    assert [p.stem[:2] for p in sorted(newest.glob("*.ipynb"))] == ["04", "05"]
    assert "A light probe (linear)" in (demo / "figures" / "small" / "index.html").read_text()


def test_a_failing_cell_is_shown_with_the_partial_notebook(home):
    done = call(home, run="broken", dataset="data/coco/nowhere")
    assert done.returncode == 1
    assert "folders.read" in done.stderr and "does not exist" in done.stderr
    path = done.stderr.strip().rpartition(": ")[2]
    assert path.endswith("01_build_data.ipynb") and nbformat.read(path, 4).cells


@needs_real_coco
def test_real_photographs_go_the_whole_way(home):
    done = call(home, run="photos", dataset=REAL_COCO, train=120, validation=40, test=40, models="[tiny-qwen2-vl]",
                controls="[wrong_image, shuffled]", codelength="no", strengths="[0.001, 0.1]", stages="[lm]")
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(home / "figures" / "photos" / "metrics.csv")
    test = table[(table.split == "test") & (table.metric == "accuracy") & table["class"].isna() & (table.stage == "lm")]
    assert test.groupby(["task", "probe"]).layer.nunique().eq(9).all() and test.value.between(0, 1).all()
    assert set(table[table.task == "category"]["class"].dropna()) >= {"person", "dog", "car"}
    names = {path.stem for path in (home / "figures" / "photos").glob("*.html")}
    assert names >= {"global_and_local", "category_classes", "category_localisation", "explorer_tiny-qwen2-vl"}
