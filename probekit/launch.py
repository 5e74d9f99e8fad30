"""Who makes the shards of a job: this process, one of several that were started side by side, or a Ray cluster.

All of them start :class:`probekit.worker.Worker` on the same shards, and claims keep them off each other's: any number
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

from probekit.parts import meta_of
from probekit.worker import Job, Worker


def here(job: Job, places: Sequence[int], copies: int | None = None) -> list[int]:
    """Make shards in this process; returns the places of those that it made."""
    worker = Worker(job)
    try:
        return worker(places)
    finally:
        worker.release()


def ranked(job: Job, rank: int, world_size: int) -> list[int]:
    """Make this rank's share of the missing shards, then those of others that nobody has begun."""
    missing = job.missing()
    own = missing[rank::world_size]
    return here(job, own + sorted(set(missing) - set(own), reverse=True))


def place_among() -> tuple[int, int, int]:
    """Rank, world size and rank on this machine, as torchrun, a SLURM array or srun say; 0, 1, 0 where none does."""
    told = os.environ
    if "RANK" in told:
        return int(told["RANK"]), int(told["WORLD_SIZE"]), int(told.get("LOCAL_RANK", 0))
    if "SLURM_ARRAY_TASK_COUNT" in told:
        first = int(told.get("SLURM_ARRAY_TASK_MIN", 0))
        return int(told["SLURM_ARRAY_TASK_ID"]) - first, int(told["SLURM_ARRAY_TASK_COUNT"]), 0
    if int(told.get("SLURM_NTASKS", 1)) > 1:
        return int(told["SLURM_PROCID"]), int(told["SLURM_NTASKS"]), int(told.get("SLURM_LOCALID", 0))
    return 0, 1, 0


class _Copy:
    """What a Ray actor holds: one copy of the model."""

    def __init__(self, job: Job):
        self.worker = Worker(job)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"made": np.array(self.worker(batch["item"].tolist()), int)}


def on_ray(job: Job, places: Sequence[int], copies: int | None = None) -> list[int]:
    """Make shards on the Ray cluster of ``RAY_ADDRESS``, or on one started here: one model copy a GPU.

    All machines must see the data folder under the same path, or share activations through `url`, images by their path.

    Parameters
    ----------
    copies : of the model at once; None takes one a GPU, or one in all where there is none
    """
    import ray

    passed = {name: value for name, value in os.environ.items()
              if name in ("PROBEKIT_HOME", "PYTHONPATH") or name.startswith(("HF_", "AWS_", "GOOGLE_"))}
    start = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}
    ray.init(ignore_reinit_error=True, runtime_env={"env_vars": passed | {"TQDM_DISABLE": "1"}}, **start)
    ray.data.DataContext.get_current().enable_progress_bars = False
    there = ray.cluster_resources()
    gpus, cpus = there.get("GPU", 0), int(there.get("CPU", 1))
    copies = copies or int(gpus) or 1
    needs = {"num_gpus": 1} if gpus else {"num_cpus": max(1, cpus // copies)}
    data = ray.data.from_items([int(place) for place in places], override_num_blocks=len(places))
    pool = ray.data.ActorPoolStrategy(size=min(copies, len(places)))
    made = data.map_batches(_Copy, fn_constructor_args=(job,), batch_size=1, compute=pool, **needs)
    try:
        rows = tqdm(made.iter_rows(), total=len(places), desc=f"{job.folder.parent.name} on Ray", unit="shard")
        return [int(row["made"]) for row in rows]
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None


ENGINES = {"local": here, "ray": on_ray}


@dataclass(frozen=True)
class Launch:
    """Who makes the shards of a job.

    Attributes
    ----------
    engine : out of :data:`ENGINES`
    copies : of the model, with Ray
    url : a folder that fsspec can open (``s3://...``), where machines without a common disk share activations
    """

    engine: str = "local"
    copies: int | None = None
    url: str | None = None

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r}: take out of {', '.join(ENGINES)}")

    def finish(self, job: Job) -> None:
        """Have all that is missing of a job made, and bring it here; waits for what others are making."""
        waiting = False
        while missing := job.missing():
            if not ENGINES[self.engine](job, missing, self.copies):
                if not waiting:
                    tqdm.write(f"waiting for {len(missing)} shards that others make in {job.folder}")
                waiting = True
                time.sleep(2)
                for part, i in (job.shards[place] for place in missing):  # by one that goes on watching
                    job.shared.free(part.shard(i))
        if meta_of(job.folder) is None:
            worker = Worker(job)
            worker.load()
            worker.release()
        lacking = [(part, i) for part, i in job.shards if not part.is_done(i)]
        with ThreadPoolExecutor(8) as pool:
            fetched = pool.map(lambda shard: job.shared.pull(shard[0].shard(shard[1])), lacking)
            list(tqdm(fetched, total=len(lacking), desc="fetching", unit="shard", disable=not lacking))
        for part, i in lacking:
            if not part.is_done(i):
                raise ValueError(f"{job.url}: {part.folder.name}/{part.shard(i).name} {part.lacks(i)}: delete it there "
                                 f"and {part.shard(i)} here, then run 02_extract again")
