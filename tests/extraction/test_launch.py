"""Several workers on the same shards: side by side, on a Ray cluster, and when some of them die."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from probekit import paths
from probekit.cli.main import main
from probekit.extraction import extract, launch, shared
from probekit.extraction.launch import Launch, place_among
from probekit.extraction.worker import Worker
from probekit.tasks import building
from tests.conftest import REPOSITORY

SHARDS = 60
RAY = {"RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}  # a dead head is given up sooner
WORKER = """
import json, os, sys, time
from pathlib import Path
import pandas as pd
from probekit import paths
from probekit.extraction import extract
from probekit.extraction import worker
from probekit.extraction.launch import Launch
folder, how = Path(sys.argv[1]), json.loads(sys.argv[2])
paths.Home.find().data = folder

def watched(part, i, *rest, honest=worker.finish_shard):
    time.sleep(how.get("sleep", 0))
    done = honest(part, i, *rest)
    with (folder / "made.txt").open("a") as log:
        log.write(f"{part.shard(i).name} {os.getpid()}\\n")
    return done

worker.finish_shard = watched
if __name__ == "__main__":
    examples = pd.read_parquet(folder.parent / "examples.parquet")
    settings = extract.Extraction("tiny-qwen2-vl", shard_images=1, batch_tokens=900)
    (folder / f"ready-{os.getpid()}").touch()
    while len([*folder.glob("ready-*")]) < how.get("together", 1):
        time.sleep(0.01)
    if "rank" in how:
        Launch(rank=how["rank"], world_size=2).make(extract.plan(settings, examples, (), "cpu")[0])
    else:
        extract.extract_all(settings, examples, (), "cpu", Launch(**how.get("launch", {})))
"""


@pytest.fixture(scope="module")
def base(examples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    examples.to_parquet(folder / "examples.parquet")
    (folder / "work.py").write_text(WORKER)
    return folder


def start(folder: Path, **how) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | RAY
    environment |= how.pop("environment", {})
    return subprocess.Popen([sys.executable, folder.parent / "work.py", folder, json.dumps(how)], env=environment,
                            stderr=(folder / "stderr.txt").open("a"), stdout=subprocess.DEVNULL, cwd=folder)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("activations/*/*/part-*/shard-*.safetensors"))}


def made(folder: Path) -> list[list[str]]:
    """(shard, process) in the order of the making."""
    log = folder / "made.txt"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        assert process is None or process.poll() is None, "ended too early"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(base) -> dict[str, bytes]:
    """The shards as one process makes them."""
    assert start(base / "alone").wait() == 0
    assert len(shards(base / "alone")) == SHARDS
    return shards(base / "alone")


def complete(folder: Path, expected: dict[str, bytes]) -> bool:
    return shards(folder) == expected and not list(folder.rglob("*.claim-*")) and not list(folder.rglob("*.part"))


def test_two_processes_side_by_side_share_the_work(base, alone):
    both = [start(base / "both", rank=rank, together=2, sleep=0.05) for rank in (0, 1)]
    assert [process.wait() for process in both] == [0, 0]
    assert complete(base / "both", alone)
    by = dict(made(base / "both"))
    assert len(made(base / "both")) == len(by) == SHARDS and len(set(by.values())) == 2
    first = [name for name, pid in made(base / "both") if pid == str(both[1].pid)][:3]
    assert [int(name[6:11]) % 2 for name in first] == [1, 1, 1]  # its own share first


def test_what_a_killed_process_had_begun_another_takes_up(base, alone):
    folder = base / "killed"
    one, two = (start(folder, together=2, sleep=0.05) for _ in range(2))
    wait_for(lambda: {pid for _, pid in made(folder)} == {str(one.pid), str(two.pid)}, one)
    one.send_signal(signal.SIGKILL)
    one.wait()
    before = len(made(folder))
    assert before < SHARDS
    assert two.wait() == 0 and complete(folder, alone)
    names = [name for name, _ in made(folder)]
    assert sorted(set(names)) == sorted(alone) and len(names) - SHARDS <= 1  # written, but not yet noted


@pytest.mark.parametrize("name", ["plain", "odd [1]*{a,b}?"])
def test_what_another_machine_left_when_it_died_is_taken_over(base, alone, name, monkeypatch):
    folder = base / name
    monkeypatch.setenv("PROBEKIT_HOME", str(folder))
    job, _ = extract.plan(extract.ExtractionSettings("tiny-qwen2-vl", shard_images=1, batch_tokens=900),
                          pd.read_parquet(base / "examples.parquet"), (), "cpu")
    for part, i in job.shards[:5]:
        part.shard(i).with_name(f"{part.shard(i).name}.claim-0").write_text(json.dumps(
            {"host": "node17", "pid": 1, "started": 0, "sign": "a"}))
    monkeypatch.setattr(shared, "ABANDONED", 3)
    assert len(Launch(rank=1, world_size=2).make(job)) == SHARDS and complete(folder, alone)


def test_a_shard_that_another_finished_between_the_look_and_the_claim_is_not_made_again(data, examples, monkeypatch):
    job, _ = extract.plan(extract.ExtractionSettings("tiny-qwen2-vl", shard_images=30), examples, (), "cpu")
    other = Worker(job)
    honest = shared.Shared.claim

    def overtaken(self, path):
        monkeypatch.setattr(shared.Shared, "claim", honest)
        assert other([0]) == [0]
        return self.claim(path)

    monkeypatch.setattr(shared.Shared, "claim", overtaken)
    assert Worker(job)([0]) == [] and not list(data.rglob("*.claim-*"))


def at_work(folder: Path) -> int:
    """A process that has a claim now."""
    while True:
        for claim in folder.rglob("*.claim-*"):
            try:
                return json.loads(claim.read_text())["pid"]
            except (FileNotFoundError, ValueError):  # given up, or being written
                continue


@pytest.fixture
def cluster(base):
    """A Ray cluster of its own that can be started and killed."""
    pytest.importorskip("ray")
    command = [str(Path(sys.executable).with_name("ray"))]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | RAY

    def run(*words):
        return subprocess.run([*command, *words], env=environment, check=True, capture_output=True, text=True)

    def begin():
        run("start", "--head", "--node-ip-address=127.0.0.1", "--port=6391", "--num-cpus=2",
            "--include-dashboard=false", "--disable-usage-stats")
        return "127.0.0.1:6391"

    yield begin, lambda: run("stop", "--force")
    run("stop", "--force")


def test_ray_makes_the_same_shards_though_a_worker_and_then_its_head_are_killed(base, alone, cluster):
    begin, end = cluster
    folder, how = base / "ray", {"launch": {"engine": "ray", "copies": 2}}
    first = start(folder, **how, environment={"RAY_ADDRESS": begin()})
    wait_for(lambda: len(shards(folder)) >= 2, first)
    os.kill(at_work(folder), signal.SIGKILL)
    wait_for(lambda: len(shards(folder)) >= 10, first)
    end()
    left = {path: path.stat().st_mtime_ns for path in folder.rglob("shard-*.safetensors")}
    assert first.wait(120) != 0
    assert 10 <= len(left) < SHARDS and shards(folder).items() <= alone.items()
    second = start(folder, **how, environment={"RAY_ADDRESS": begin()})
    assert second.wait(180) == 0
    assert complete(folder, alone) and all(path.stat().st_mtime_ns == at for path, at in left.items())


@pytest.mark.parametrize(("told", "expected"), [
    ({}, (0, 1, 0)),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_NTASKS": "2"}, (3, 4, 1)),
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, (5, 8, 1)),
    ({"SLURM_NTASKS": "8"}, (0, 8, 0)),  # a shell of salloc
    ({"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5"}, (2, 4, 0)),
    ({"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "0",
      "SLURM_ARRAY_TASK_STEP": "2"}, (3, 4, 0)),
    ({"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "5"}, (4, 5, 0)),  # 5,9
    ({"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
      "SLURM_LOCALID": "1"}, (5, 8, 1)),
])
def test_ranks_are_told_by_torchrun_and_slurm(told, expected, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RANK"))]:
        monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert place_among() == expected


def test_ray_says_what_went_wrong_as_the_others_do(data, examples, monkeypatch):
    pytest.importorskip("ray")
    for name, value in RAY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = data / "copied.png"
    file.write_bytes(Path(paths.Home.find().resolve(examples.file[0])).read_bytes())
    table = examples.head(6).assign(file=str(file))
    job, _ = extract.plan(extract.ExtractionSettings("tiny-qwen2-vl", shard_images=1), table, (), "cpu")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"on Ray, ValueError: .*copied.png has changed since"):
        launch.on_ray(job, [0])
    import ray

    ray.shutdown()


def test_an_unknown_engine_names_those_that_are_known():
    with pytest.raises(ValueError, match="engine='spark': take out of local, ray"):
        Launch("spark")


@pytest.mark.parametrize("launcher", [
    [launch.here], [launch.place_among, Launch.make], [launch.on_ray, launch._Copy]])
def test_launchers_are_short(launcher):
    assert sum(len(inspect.getsource(part).splitlines()) for part in launcher) < 60


def test_a_rank_is_a_command(data, scene_folder, capsys):
    demo = ["extract", "--params", str(REPOSITORY / "notebooks" / "params" / "demo.yaml"), "-p", "run=mine",
            "-p", "models=[tiny-qwen2-vl]", "-p", "untrained=[]", "-p", "controls=[]", "-p", "shard_images=10",
            "-p", "stages=[lm]"]
    assert main(demo) == 2
    assert "run 01_build_data for this run first" in capsys.readouterr().err
    building.build_examples(building.BuildSettings(str(scene_folder), train=36, validation=12, test=12), data / "tasks" / "mine")
    assert main([*demo, "--rank", "2", "--world-size", "2"]) == 2
    assert "a rank is below the world size" in capsys.readouterr().err
    assert main([*demo, "--rank", "1", "--world-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "rank 1 of 2 made 6 shards" in out and "-p run=mine -p 'models=[tiny-qwen2-vl]'" in out
    assert main([*demo, "-p", "engine=ray"]) == 2
    assert "say python -m probekit run, or engine=local" in capsys.readouterr().err
    assert len(list(data.glob("activations/*/*/part-*/shard-*"))) == 6
