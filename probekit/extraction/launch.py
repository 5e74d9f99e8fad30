"""Who makes the shards of a job: this process, one of several that were started side by side, or a Ray cluster.

All of them start :class:`probekit.extraction.worker.Worker` on the same shards, and claims keep them off each other's: any number
may work on one folder at once, and what one leaves behind another takes up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from probekit.extraction.shards import meta_of
from probekit.extraction.verify import wrong
from probekit.extraction.worker import Job, Worker


def here(job: Job, places: Sequence[int], copies: int | None = None) -> list[int]:
    """Make shards in this process; returns the places of those that it made."""
    worker = Worker(job)
    try:
        return worker(places)
    finally:
        worker.release()


def place_among() -> tuple[int, int, int]:
    """Rank, world size and rank on this machine, as torchrun, a SLURM array or srun say; 0, 1, 0 where none does."""
    def told(name: str, default: int) -> int:
        return int(os.environ.get(name) or default)

    if "RANK" in os.environ:
        return told("RANK", 0), told("WORLD_SIZE", 1), told("LOCAL_RANK", 0)
    steps, step, local = told("SLURM_NTASKS", 1), told("SLURM_PROCID", 0), told("SLURM_LOCALID", 0)
    count = told("SLURM_ARRAY_TASK_COUNT", 1)
    task = (told("SLURM_ARRAY_TASK_ID", 0) - told("SLURM_ARRAY_TASK_MIN", 0)) // told("SLURM_ARRAY_TASK_STEP", 1)
    return task * steps + step, max(count * steps, task * steps + step + 1), local  # an array may have gaps


# Ray shows what it passes on to all who see its dashboard: keys and tokens are for each machine to have
PASSED = ("PROBEKIT_HOME", "PYTHONPATH", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "AWS_ENDPOINT_URL")


class _Copy:
    """What a Ray actor holds: one copy of the model."""

    def __init__(self, job: Job):
        self.worker = Worker(job)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            made, failed = self.worker(batch["item"].tolist()), ""
        except Exception as error:  # Ray keeps the words of an error to itself
            made, failed = [-1], f"{type(error).__name__}: {error}"
        return {"made": np.array(made, int), "failed": np.array([failed] * len(made), object)}


def on_ray(job: Job, places: Sequence[int], copies: int | None = None) -> list[int]:
    """Make shards on the Ray cluster of ``RAY_ADDRESS``, or on one started here: one model copy a GPU.

    All machines must see the data folder under the same path, or share activations through `url`, images by their path.

    Parameters
    ----------
    copies : of the model at once; None takes one a GPU, or one in all where there is none
    """
    import ray

    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    start = {} if "RAY_ADDRESS" in os.environ else {"address": "local", "include_dashboard": False}
    ray.init(ignore_reinit_error=True, runtime_env={"env_vars": passed | {"TQDM_DISABLE": "1"}}, **start)
    ray.data.DataContext.get_current().enable_progress_bars = False
    there = ray.cluster_resources()
    gpus, cpus = there.get("GPU", 0), int(there.get("CPU", 1))
    if gpus and job.device == "cpu":
        raise ValueError(f"the cluster has {gpus:.0f} GPUs, this machine none: say device=cuda, and the dtype that "
                         "suits them (dtype=bfloat16)")
    copies = copies or int(gpus) or 1
    most = int(max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]))  # of a single machine
    needs = {"num_gpus": 1} if gpus else {"num_cpus": max(1, min(most, cpus // copies))}
    data = ray.data.from_items([int(place) for place in places], override_num_blocks=len(places))
    pool = ray.data.ActorPoolStrategy(size=min(copies, len(places)))
    made = data.map_batches(_Copy, fn_constructor_args=(job,), batch_size=1, compute=pool, **needs)
    found = []
    for row in tqdm(made.iter_rows(), total=len(places), desc=f"{job.folder.parent.name} on Ray", unit="shard"):
        if row["failed"]:
            raise ValueError(f"on Ray, {row['failed']}")
        found.append(int(row["made"]))
    return found


ENGINES = {"local": here, "ray": on_ray}


@dataclass(frozen=True)
class Launch:
    """Who makes the shards of a job.

    Attributes
    ----------
    engine : out of :data:`ENGINES`
    copies : of the model, with Ray
    url : a folder that fsspec can open (``s3://...``), where machines without a common disk share activations
    rank, world_size : of this process among several; each begins with a share of its own
    """

    engine: str = "local"
    copies: int | None = None
    url: str | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r}: take out of {', '.join(ENGINES)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"--rank {self.rank} --world-size {self.world_size}: ranks go from 0, world sizes from 1, "
                             "and a rank is below the world size")

    def make(self, job: Job) -> list[int]:
        """Have all that is missing of a job made, by whomever; returns the places of what was made from here.

        Waits for what others are making, and takes over what they leave behind.
        """
        made: list[int] = []
        waiting = False
        while missing := job.missing():
            own = missing[self.rank :: self.world_size]
            more = ENGINES[self.engine](job, own + sorted(set(missing) - set(own), reverse=True), self.copies)
            made += more
            if not more and (missing := job.missing()):
                if not waiting:
                    tqdm.write(f"waiting for {len(missing)} shards that others make in {job.folder}")
                waiting = True
                time.sleep(2)
                for part, i in (job.shards[place] for place in missing):  # by one that goes on watching
                    job.shared.free(part.shard(i))
        return made

    def finish(self, job: Job) -> None:
        """:meth:`make`, and bring all of it here."""
        self.make(job)
        if meta_of(job.folder) is None:
            worker = Worker(job)
            worker.load()
            worker.release()
        lacking = [(part, i) for part, i in job.shards if not part.is_done(i)]
        with ThreadPoolExecutor(8) as pool:
            fetched = pool.map(lambda shard: job.shared.pull(shard[0].shard(shard[1])), lacking)
            list(tqdm(fetched, total=len(lacking), desc="fetching", unit="shard", disable=not lacking))
        for part, i in lacking:
            reason = part.lacks(i) or wrong(part, i, meta_of(job.folder))
            if reason:
                part.shard(i).unlink(missing_ok=True)
                raise ValueError(f"{job.url}: {part.folder.name}/{part.shard(i).name} {reason}: delete it there, then "
                                 "run 02_extract again")
