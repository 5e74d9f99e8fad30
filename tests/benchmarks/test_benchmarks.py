"""The benchmarks still run; times and speedups on a busy machine are not judged here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.conftest import REAL_COCO, REPOSITORY, needs_real_coco
from tests.support import lab
from tests.support.processes import PROCESSES, STEADY_MEMORY, run_script

pytestmark = pytest.mark.slow

TOKENIZER = REPOSITORY.parent / "shared" / "tokenizers" / "qwen2"


@pytest.fixture
def run(tmp_path):
    """Run a benchmark and read the JSON file that it writes."""

    def run_benchmark(name: str, *arguments: object, **environment: str):
        file = tmp_path / "result.json"
        output = tmp_path / "output.txt"
        script = REPOSITORY / "benchmarks" / f"{name}.py"
        words = [str(word) for word in (script, *arguments, "--json", file)]
        server_variables = STEADY_MEMORY | {"OMP_NUM_THREADS": "1"}
        with patch.dict(os.environ, server_variables):  # the first process starts the forkserver
            variables = dict(os.environ) | environment
            process = PROCESSES.Process(target=run_script, args=(words, variables, output))
            process.start()
        process.join()
        assert process.exitcode == 0, output.read_text(encoding="utf-8")[-3000:]
        return json.loads(file.read_text(encoding="utf-8"))

    return run_benchmark


# -------------------------------------------------------------------------------------- extraction


def test_extraction_finds_the_states_of_the_study_in_a_memory_that_does_not_grow(run):
    result = run("extract", "--model", "tiny", "--images", 5, "--prompts-per-image", 3)
    assert result["max_rel_diff"] < 1e-3  # stored in float16
    assert result["peak_rss_mb_double"] < 1.1 * result["peak_rss_mb"]


def test_probes_at_the_studys_size_are_timed_by_part(run):
    result = run("paper_scale", "--images", 480, "--layers", 1, "--probes", "logreg")
    assert result["logreg_s_per_layer"] > 0
    assert result["score_s_per_layer"] > 0
    assert result["examples"] == 4 * 480


def test_the_gpu_benchmark_runs_on_a_cpu_too(run):
    result = run("gpu", "--device", "cpu", "--dtype", "float32", "--quick", "--layers", 1)
    assert list(result["extraction"]) == ["qwen2-vl-2b", "fastvlm-0.5b"]
    for measured in result["extraction"].values():
        assert measured["images_per_s"] > 0


def test_what_answers_cost_and_how_near_they_are(run):
    result = run("answers", "--quick")
    assert result["with_over_without"] > 0
    assert result["read_seconds"] < result["read_and_score_seconds"]
    assert len(result["logit_differences"]) == 2
    assert all(difference < 1e-5 for difference in result["logit_differences"].values())


def test_faults_cost_the_shards_in_flight_and_nothing_else(run):
    rows = {row["fault"]: row for row in run("faults", "--kills", 3, "--images", 30)}
    assert rows["kill -9 at a random moment"]["times"] == 3
    records = [row for fault, row in rows.items() if fault.startswith(("meta", "plan", "rows"))]
    assert [row["lost"] for row in records] == ["nothing"] * 9
    messages = {
        "shard truncated": "cannot be opened",
        "two shards exchanged": "belongs somewhere else",
        "bit flipped in a shard's numbers": "python -m probekit verify",
        "out of memory on a batch": "it runs in halves",
        "nan in a layer": "lm.03/mean: not finite for 1 of",
        "image of 30,000 x 30,000 pixels": "exceeds limit",
        "image truncated": "cannot be read",
    }
    if rows["disk full"]["times"]:  # a tmpfs needs root
        messages["disk full"] = "no space left for"
    for fault, message in messages.items():
        assert message in rows[fault]["message"], fault


def test_faults_of_sharing_are_noticed(run):
    arguments = ["--architectures", "llava", "--dtypes", "float32", "--alarms", "llava", "mllama"]
    result = run("sharing_check", *arguments)
    assert len(result["faults"]) == 18
    for row in (*result["faults"], *result["alarms"]):
        assert row["is_right"], row


def test_launchers_make_the_same_shards(run):
    names = ["one process", "two processes"]
    rows = run("launch", "--images", 100, "--launchers", *names)
    assert [row["launcher"] for row in rows] == names
    assert [row["shards"] for row in rows] == [2, 2]


def test_a_layer_is_read_as_it_is_on_disk(run):
    result = run("store", "--examples", 2500)
    assert result["layer_mb"] == pytest.approx(2500 * 1536 * 2 / 1e6)


def test_memory_does_not_grow_with_the_examples(run):
    growth = run("growth", "--images", 20, "--times", 1, 2)["growth"]
    for step in ("extracting", "reading", "probing"):
        assert growth[step]["examples"] == 2
        assert growth[step]["mb"] < 1.1


def test_the_plan_of_all_of_coco_adds_up(run):
    rows = run("coco_plan", "--images", 20_000, "--prompts", 10)
    assert len(rows) == 5
    for row in rows:
        assert row["TFLOP per image"] < row["unshared"] < 10 * row["TFLOP per image"]
        assert row["hours on 64"] < row["hours on 8"] < row["hours on 1"]
    row = rows[0]
    assert row["model"] == "Qwen2-VL-2B"
    assert row["GB on disk"] == pytest.approx(20_000 * 10 * 29 * 1536 * 2 / 1e9)
    assert row["GB weights"] == pytest.approx(4.42, abs=0.01)
    seconds = 20_000 * row["TFLOP per image"] / (0.35 * 989) + 60
    assert row["hours on 1"] == pytest.approx(seconds / 3600)


@needs_real_coco
@pytest.mark.skipif(not TOKENIZER.is_dir(), reason=f"no tokenizer at {TOKENIZER}")
def test_a_model_of_any_size_is_measured(run, tmp_path):
    config = {
        "model_type": "qwen2_vl",
        "image_token_id": 151_655,
        "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653,
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 64},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    photos = REAL_COCO / "val2017"
    result = run("full_size", file, "--tokenizer", TOKENIZER, "--photos", photos, "--images", 3)
    assert result["layers"] == 4
    assert result["width"] == 64
    assert result["bytes_per_example"] == pytest.approx(4 * 64 * 2, rel=0.6)
    assert "each image runs once for all its prompts" in result["sharing"]
    minutes = {row["device"]: row["minutes"] for row in result["cost"]}
    assert minutes["T4"] / minutes["H100 SXM"] == pytest.approx(989 / 65)


# ------------------------------------------------------------------------------------------ probes


def test_probes_reach_the_optimum_of_scikit_learn(run):
    result = run("probe", "--quick")
    assert result["max_objective_gap"] < 1e-4
    assert result["accuracy_logreg"] > 0.8


def test_probing_keeps_its_memory_and_finds_the_layer_that_carries_the_label(run):
    result = run("memory", "--examples", 600, "--layers", 3, "--width", 64)
    assert result["best_layer"] == "lm.02"
    assert result["peak_rss_mb"] < result["before_mb"] + 500


def test_statistics_recover_what_was_planted(run):
    result = run("compare", "--studies", 2)
    for shares in result["probes"].values():
        assert shares["accuracy, planted"] > 0.8
        assert shares["others"] < 0.55
    assert result["planted"]["1000 images, +0.12"]["plateau, alpha 0.01"] == 1
    for shares in result["alarms"].values():
        assert shares["outside plateau"] == 0
    assert result["peaks"]["clear, +3, 1000 images"]["movement"] == 1
    assert result["peaks"]["flat, 300 images"]["says moved"] == 0
    for shares in result["coverage"].values():
        assert shares["gap"] > 0.9


# ------------------------------------------------------------------------------------------- tasks


@needs_real_coco
def test_counts_of_every_task(run, tmp_path):
    photo = next((REAL_COCO / "val2017").glob("*.jpg"))
    statements = tmp_path / "mine.csv"
    statements.write_text(
        f"image,text,label\n{photo.name},There is a table.,1\nelsewhere.jpg,There is none.,0\n",
        encoding="utf-8",
    )
    result = run(
        "tasks", "--dataset", REAL_COCO, "--images", 60, 30, 30, "--statements", statements
    )
    rows = {row["task"]: row for row in result["tasks"]}
    assert rows["caption"]["train"] == 120
    assert "colours" in rows["attribute"]["refused"]
    assert result["statements"] == {"mine": {"statements": 2, "usable": 1, "images": 1}}
    assert result["agreement"]["precision"] > 0.9 > result["agreement"]["recall"]


def test_similar_captions_leave_few_out(run):
    result = run("similar", "--images", 300, "--captions", 2)
    assert result["captions"] == 600
    assert result["left_out"] < 0.1


# ------------------------------------------------------------------------------------------ report


@pytest.mark.skipif(not lab.CHROME, reason="no Chrome or Chromium on this machine")
def test_the_explorer_answers_key_presses(run, small_home: Path):
    pytest.importorskip("playwright")
    result = run("explorer", "--run", "small", "--moves", 1, PROBEKIT_HOME=str(small_home))
    for times in result.values():
        assert times["n"] > 0


def test_interventions_are_timed_beside_bare_passes(run):
    result = run("interventions", "--quick")
    assert result["ratio"] > 0
    assert result["interventions"] > 20
    assert all("lm.00" in one for one in result["left_out"])
