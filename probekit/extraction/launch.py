"""Who makes the shards of a job: this process, one of several side by side, or a Ray cluster.

All of them start a :class:`probekit.extraction.runner.Runner` on the same shards. A shard that is
there is skipped, one that appears twice is the same file: so nothing is locked, and whoever comes
next goes on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from probekit.extraction.jobs import Job
from probekit.extraction.runner import Runner
from probekit.processes import map_in_processes

# Ray shows what it passes on to all who see its dashboard: keys and tokens are for each machine to
# have.
PASSED_VARIABLES = (
    "PROBEKIT_HOME",
    "PYTHONPATH",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "AWS_ENDPOINT_URL",
)
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Launcher:
    """Who makes the shards of a job.

    Attributes
    ----------
    engine : {"local", "ray"}
    copies : int or None
        Of the model at once. With Ray None takes one per GPU, or one in all without GPUs. Here
        they are processes that divide the cores of a CPU, and None takes one.
    rank, world_size : int
        This process among several that were started side by side, with the engine "local".
    """

    engine: str = "local"
    _: KW_ONLY
    copies: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r}: take out of {', '.join(ENGINES)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"--rank {self.rank} --world-size {self.world_size}: ranks go from 0, world sizes "
                "from 1, and a rank is below the world size"
            )

    def make_shards(self, job: Job) -> list[int]:
        """Make this process's share of what is missing of a job.

        Returns
        -------
        list of int
            The places in ``job.shards`` of those that were made from here.
        """
        if self.engine == "ray":
            return run_on_ray(job, job.missing_shards(), copies=self.copies)
        share = range(self.rank, len(job.shards), self.world_size)
        missing = [place for place in share if not job.shards[place].is_done]
        copies = min(self.copies or 1, len(missing))
        if copies > 1 and job.device != "cpu":
            tqdm.write(f"copies={copies} are for CPUs and for Ray: one is loaded on {job.device}")
            copies = 1
        shares = [missing[copy::copies] for copy in range(copies)]
        made_by_copy = map_in_processes(partial(_make_shards_here, job), shares, n_jobs=copies)
        return [place for made in made_by_copy for place in made]


def _make_shards_here(job: Job, places: Sequence[int]) -> list[int]:
    runner = Runner(job)
    try:
        return runner.make_shards(places)
    finally:
        runner.release()


# ------------------------------------------------------------------------------------------- ranks


class Rank(NamedTuple):
    """A process among several: its number, how many there are, its number on this machine."""

    rank: int
    world_size: int
    local_rank: int


def rank_from_environment() -> Rank:
    """Read the rank that torchrun, a SLURM array or srun gives this process; else (0, 1, 0)."""
    if "RANK" in os.environ:  # torchrun
        return Rank(_integer("RANK", 0), _integer("WORLD_SIZE", 1), _integer("LOCAL_RANK", 0))
    steps = _integer("SLURM_NTASKS", 1)
    step = _integer("SLURM_PROCID", 0)
    array_count = _integer("SLURM_ARRAY_TASK_COUNT", 1)
    array_offset = _integer("SLURM_ARRAY_TASK_ID", 0) - _integer("SLURM_ARRAY_TASK_MIN", 0)
    array_number = array_offset // _integer("SLURM_ARRAY_TASK_STEP", 1)
    rank = array_number * steps + step
    world_size = max(array_count * steps, rank + 1)  # an array may have gaps
    return Rank(rank, world_size, _integer("SLURM_LOCALID", 0))


def _integer(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


# --------------------------------------------------------------------------------------------- Ray


class _RayRunner:
    """What a Ray actor holds: one copy of the model."""

    def __init__(self, job: Job) -> None:
        self.runner = Runner(job)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        places = batch["item"].tolist()
        error_text = ""
        try:
            made = self.runner.make_shards(places)
        except Exception as error:  # Ray keeps the words of an error to itself
            made = [-1]
            error_text = f"{type(error).__name__}: {error}"
        errors = np.array([error_text] * len(made), object)
        return {"made": np.array(made, int), "error": errors}


def run_on_ray(job: Job, places: Sequence[int], *, copies: int | None = None) -> list[int]:
    """Make shards on the Ray cluster of ``RAY_ADDRESS``, or on one that is started here.

    Ray Data assigns shards to a pool of actors and retries those of an actor that died. All
    machines see the home under the same path, or share activations through a URL and images by
    their path.

    Parameters
    ----------
    job : Job
    places : sequence of int
        Of shards in the job.
    copies : int or None
        Of the model at once; None takes one per GPU, or one in all where there is none.

    Returns
    -------
    list of int
        The places of those that were made.

    Raises
    ------
    ValueError
        A shard cannot be made, or the cluster has GPUs that this machine lacks and no device is
        named.
    """
    if not places:
        return []
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("engine=ray needs Ray: pip install -e '.[ray]' in the checkout") from error
    _connect(ray)
    actor_needs, copies = _divide_cluster(ray, job, copies)
    numbers = ray.data.from_items([int(place) for place in places], override_num_blocks=len(places))
    results = numbers.map_batches(
        _RayRunner,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(copies, len(places))),
        **actor_needs,
    )
    made = []
    name = f"{job.folder.model_name} on Ray"
    for row in tqdm(results.iter_rows(), total=len(places), desc=name, unit="shard"):
        if row["error"]:
            raise ValueError(f"on Ray, {row['error']}")
        made.append(int(row["made"]))
    return made


def _connect(ray) -> None:
    passed = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
    runtime = {"env_vars": passed | {"TQDM_DISABLE": "1"}}
    options: dict[str, Any] = {"ignore_reinit_error": True, "runtime_env": runtime}
    if "RAY_ADDRESS" not in os.environ:
        options |= {"address": "local", "include_dashboard": False}
    ray.init(**options)
    ray.data.DataContext.get_current().enable_progress_bars = False


def _divide_cluster(ray, job: Job, copies: int | None) -> tuple[dict[str, Any], int]:
    """Tell what an actor needs of the cluster, and how many actors there are."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    cpus = int(resources.get("CPU", 1))
    if gpus and job.device == "cpu":
        raise ValueError(
            f"the cluster has {gpus} GPUs, this machine none: say device=cuda, and the dtype that "
            "suits them (dtype=bfloat16)"
        )
    copies = copies or gpus or 1
    if gpus:
        return {"num_gpus": 1}, copies
    alive = [node for node in ray.nodes() if node["Alive"]]
    largest_machine = int(max(node["Resources"].get("CPU", 1) for node in alive))
    return {"num_cpus": max(1, min(largest_machine, cpus // copies))}, copies
