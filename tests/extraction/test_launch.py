"""Several runners on the same shards: side by side, on a Ray cluster, and when some of them die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd
import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from probekit.extraction import launch
from probekit.extraction.extracting import extract_tables
from probekit.extraction.jobs import plan_job
from probekit.extraction.launch import Launcher, rank_from_environment
from probekit.extraction.runner import ShardStates
from probekit.extraction.settings import ExtractionSettings
from probekit.paths import Home
from tests.conftest import REPOSITORY
from tests.support.processes import PROCESSES

SHARDS = 30
LOCAL = Launcher()
RAY_VARIABLES = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "1",  # a dead head is given up sooner
    "RAY_enable_worker_prestart": "0",  # no workers that would only idle
    "RAY_prestart_worker_first_driver": "0",
}


@pytest.fixture(scope="module")
def base(examples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    examples.to_parquet(folder / "examples.parquet")
    return folder


def work(
    home: Path,
    *,
    together: int = 1,
    sleep: float = 0,
    launcher: Launcher = LOCAL,
    environment: dict | None = None,
) -> None:
    """Make shards, once as many processes as work together are ready; log each that is made."""
    sys.stderr = (home / "stderr.txt").open("a")
    os.environ.update(RAY_VARIABLES | (environment or {}))
    torch.set_num_threads(1)
    original = ShardStates.write

    def write_and_log(states, vlm):
        time.sleep(sleep)
        original(states, vlm)
        with (home / "made.txt").open("a") as log:
            log.write(f"{states.shard.name} {os.getpid()}\n")

    ShardStates.write = write_and_log
    examples = pd.read_parquet(home.parent / "examples.parquet")
    settings = ExtractionSettings("tiny-qwen2-vl", shard_images=2, batch_tokens=900)
    (home / f"ready-{os.getpid()}").touch()
    while len(list(home.glob("ready-*"))) < together:
        time.sleep(0.01)
    if launcher.world_size > 1:
        job = plan_job(settings, {"none": examples}, device="cpu", home=home)
        launcher.make_shards(job)
    else:
        extract_tables(settings, {"none": examples}, device="cpu", launcher=launcher, home=home)
    if launcher.engine == "local" and launcher.copies:
        get_reusable_executor().shutdown()  # a process like this one would wait until they idle


def start(home: Path, **options) -> BaseProcess:
    home.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=work, args=(home,), kwargs=options)
    process.start()
    return process


def wait(process: BaseProcess, seconds: float | None = None) -> int | None:
    """Return the exit status of a process."""
    process.join(seconds)
    return process.exitcode


def shard_bytes(home: Path) -> dict[str, bytes]:
    files = sorted(home.glob("data/activations/*/*/shards-*/shard-*.safetensors"))
    return {file.name: file.read_bytes() for file in files}


def made(home: Path) -> list[list[str]]:
    """Shard and process, in the order of the making."""
    log = home / "made.txt"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(condition, process: BaseProcess | None = None, seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        assert process is None or process.is_alive(), "ended too early"
        time.sleep(0.02)


def is_complete(home: Path, expected: dict[str, bytes]) -> bool:
    return shard_bytes(home) == expected and not list(home.rglob("*.part"))


@pytest.fixture(scope="module")
def alone(base) -> dict[str, bytes]:
    """The shards as one process makes them."""
    assert wait(start(base / "alone")) == 0
    assert len(shard_bytes(base / "alone")) == SHARDS
    return shard_bytes(base / "alone")


@pytest.mark.slow
def test_two_copies_on_a_cpu_make_the_same_shards(base, alone):
    home = base / "copies"
    assert wait(start(home, launcher=Launcher(copies=2))) == 0
    assert is_complete(home, alone)
    assert made(home) == []  # the copies did, in processes of their own


@pytest.mark.slow
def test_ranks_share_the_work_and_leave_the_same_bytes(base, alone):
    home = base / "ranks"
    ranks = [start(home, together=2, launcher=Launcher(rank=rank, world_size=2)) for rank in (0, 1)]
    assert [wait(process) for process in ranks] == [0, 0]
    assert is_complete(home, alone)
    process_of = dict(made(home))
    assert len(made(home)) == SHARDS
    for rank, process in enumerate(ranks):
        numbers = [
            int(name[-17:-12]) for name, pid in process_of.items() if pid == str(process.pid)
        ]
        assert {number % 2 for number in numbers} == {rank}


@pytest.mark.slow
def test_two_that_work_on_the_same_folder_leave_the_same_bytes(base, alone):
    home = base / "both"
    both = [start(home, together=2) for _ in range(2)]
    assert [wait(process) for process in both] == [0, 0]
    assert is_complete(home, alone)


@pytest.mark.slow
def test_whoever_comes_next_makes_what_a_killed_rank_left(base, alone):
    home = base / "killed"
    victim = start(home, launcher=Launcher(rank=1, world_size=2), sleep=0.1)
    wait_for(lambda: len(made(home)) >= 2, victim)
    victim.kill()
    victim.join()
    left = {file: file.stat().st_mtime_ns for file in home.rglob("shard-*.safetensors")}
    assert 2 <= len(left) < SHARDS // 2
    assert wait(start(home)) == 0
    assert is_complete(home, alone)
    assert {file: file.stat().st_mtime_ns for file in left} == left
    assert len(made(home)) <= SHARDS + 1  # one was perhaps written and not yet logged


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of these tests' own."""
    pytest.importorskip("ray")
    try:
        start_ray()
    except subprocess.CalledProcessError:  # its parts have 15 seconds, too few on a busy machine
        run_ray("stop", "--force")
        start_ray()
    yield "127.0.0.1:6391"
    run_ray("stop", "--force")


def start_ray() -> None:
    run_ray(
        "start",
        "--head",
        "--node-ip-address=127.0.0.1",
        "--port=6391",
        "--num-cpus=2",
        "--no-monitor",
        "--include-log-monitor=false",
        "--include-dashboard=false",
        "--disable-usage-stats",
    )


def run_ray(*words: str) -> None:
    command = str(Path(sys.executable).with_name("ray"))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | RAY_VARIABLES
    subprocess.run([command, *words], env=environment, check=True, capture_output=True)


def find_ray_runners() -> list[int]:
    """Return the process numbers of Ray's actors that hold a runner, by their titles."""
    runners = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if title.startswith(b"ray::") and b"_RayRunner" in title:
            runners.append(int(process.name))
    return runners


@pytest.mark.slow
def test_ray_says_what_went_wrong_in_the_same_words(data, examples, cluster, monkeypatch, tmp_path):
    ray = pytest.importorskip("ray")
    for name, value in (RAY_VARIABLES | {"RAY_ADDRESS": cluster}).items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "copied.png"
    file.write_bytes(Home.find().resolve(examples.file[0]).read_bytes())
    table = examples.head(6).assign(file=str(file))
    settings = ExtractionSettings("tiny-qwen2-vl", shard_images=1)
    job = plan_job(settings, {"none": table}, device="cpu")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"on Ray, ValueError: .*copied.png is gone or has changed"
    ):
        launch.run_on_ray(job, [0])
    ray.shutdown()


@pytest.mark.slow
def test_ray_makes_the_same_shards_though_a_worker_is_killed_and_ends_with_its_head(
    base, alone, cluster
):
    environment = {"RAY_ADDRESS": cluster}
    home = base / "ray"
    process = start(home, launcher=Launcher("ray", copies=2), environment=environment)
    wait_for(lambda: len(shard_bytes(home)) >= 2, process)
    os.kill(find_ray_runners()[0], signal.SIGKILL)
    assert wait(process, 400) == 0
    assert is_complete(home, alone)

    home = base / "headless"
    process = start(home, launcher=Launcher("ray", copies=1), environment=environment)
    wait_for(lambda: len(shard_bytes(home)) >= 2, process)
    run_ray("stop", "--force")
    assert wait(process, 400) != 0
    left = {file: file.stat().st_mtime_ns for file in home.rglob("shard-*.safetensors")}
    assert 2 <= len(left) < SHARDS
    assert shard_bytes(home).items() <= alone.items()
    assert wait(start(home)) == 0
    assert is_complete(home, alone)
    assert {file: file.stat().st_mtime_ns for file in left} == left


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_NTASKS": "2"}, (3, 4, 1)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        ({"SLURM_NTASKS": "8"}, (0, 8, 0)),  # a shell of salloc
        (
            {
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_MIN": "5",
            },
            (2, 4, 0),
        ),
        (
            {
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_ID": "6",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (3, 4, 0),
        ),
        (  # --array 5,9
            {
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_ARRAY_TASK_ID": "9",
                "SLURM_ARRAY_TASK_MIN": "5",
            },
            (4, 5, 0),
        ),
        (
            {
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": "1",
                "SLURM_LOCALID": "1",
            },
            (5, 8, 1),
        ),
    ],
)
def test_ranks_are_read_from_torchrun_and_slurm(variables, expected, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "RANK")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rank_from_environment() == expected


def test_a_launcher_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="engine='spark': take out of local, ray"):
        Launcher("spark")
    with pytest.raises(ValueError, match="a rank is below the world size"):
        Launcher(rank=2, world_size=2)
