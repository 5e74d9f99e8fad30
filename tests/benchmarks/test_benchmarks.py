"""The benchmarks still run; what they measure on a busy machine is not judged here."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REAL_COCO, REPOSITORY


def measured(tmp_path, *command) -> dict:
    out = tmp_path / "found.json"
    done = subprocess.run([sys.executable, *map(str, command), "--json", str(out)], cwd=REPOSITORY, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def test_extraction_against_the_plain_way(tmp_path):
    found = measured(tmp_path, "benchmarks/extract.py", "--model", "tiny", "--images", 3, "--prompts-per-image", 3)
    assert {"speedup_3", "over_floor", "max_rel_diff", "peak_rss_mb", "peak_rss_mb_double", "images_per_s"} <= {*found}
    assert found["max_rel_diff"] < 1e-3  # stored in float16
    assert found["peak_rss_mb_double"] < 1.1 * found["peak_rss_mb"]


def test_reading_a_layer_against_reading_its_bytes(tmp_path):
    found = measured(tmp_path, "benchmarks/store.py", "--examples", 3000)
    assert found["layer_mb"] > 5 and found["over_raw"] > 0


def test_probes_against_both_loops(tmp_path):
    found = measured(tmp_path, "benchmarks/probe.py", "--quick")
    assert found["max_objective_gap"] < 1e-4 and found["spread_logreg"] <= 0.01
    assert {"speedup_sweep", "speedup_multilabel", "speedup_adam_loop", "peak_rss_mb"} <= {*found}


def test_memory_of_probing(tmp_path):
    found = measured(tmp_path, "benchmarks/memory.py", "--examples", 600, "--layers", 3, "--width", 64)
    assert found["best_layer"] == "lm.02" and found["peak_rss_mb"] < found["before_mb"] + 500


@pytest.mark.skipif(not REAL_COCO.exists(), reason="needs ../shared/coco beside the project")
def test_counts_of_every_task(tmp_path):
    own = tmp_path / "own.csv"
    known = next((REAL_COCO / "val2017").glob("*.jpg")).name
    own.write_text(f"image,text,label\n{known},There is a table.,1\nelsewhere.jpg,There is none.,0\n")
    found = measured(tmp_path, "benchmarks/tasks.py", "--dataset", REAL_COCO, "--images", 60, 30, 30,
                     "--statements", own)
    rows = {row["task"]: row for row in found["tasks"]}
    assert rows["caption"]["train"] == 120 and "colours" in rows["attribute"]["refused"]
    assert found["statements"] == {"own": {"statements": 2, "usable": 1, "images": 1}}
    assert found["agreement"]["precision"] > 0.9 > found["agreement"]["recall"]


def test_faults_cost_the_shard_in_flight_and_nothing_else(tmp_path):
    rows = {row["fault"]: row for row in measured(tmp_path, "benchmarks/faults.py", "--kills", 3)}
    assert rows["kill -9 at a random moment"]["times"] == 3
    assert all(row["lost"] == "nothing" for fault, row in rows.items() if fault.startswith(("meta", "part", "rows")))
    for fault, told in (("disk full", "no space left for"), ("shard truncated", "cannot be opened"),
                        ("two shards exchanged", "belongs somewhere else"), ("bit flipped in a shard", "verify"),
                        ("out of memory on a batch", "halved"), ("nan in a layer", "lm.03/mean: not finite for 1 of"),
                        ("image of 30,000 x 30,000 pixels", "exceeds limit"), ("image truncated", "cannot be read")):
        assert told in rows[fault]["told"] or rows[fault]["lost"].startswith("not tried"), fault
