"""A folder that several workers share, on disk or in an object store: who makes what, and what is there.

A worker claims a piece of work by creating ``<name>.claim-0``, which a file system lets one of them do and no other
(POSIX and NFS by O_EXCL, S3 and others by a conditional put), and writes it anew every few seconds. A claim that stands
still, or whose process is gone from this machine, is taken over by creating ``<name>.claim-1``, which again one alone
can. Who has a claim looks once more whether the work is done before it begins: so nothing is made twice.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import fsspec
import psutil
from fsspec.implementations.local import LocalFileSystem

from probekit import paths

BEAT = 5.0  # seconds between two signs of life
ABANDONED = 60.0  # seconds without one after which a claim is taken over
SEEN: dict[str, tuple[bytes, float]] = {}  # others' claims: the last sign, and when it was first seen here


class Shared:
    """A folder of this machine, and where it is shared with others: itself, or a mirror that fsspec can open.

    Parameters
    ----------
    folder : on this machine
    url : the mirror, e.g. ``"s3://bucket/activations/<model>/<fingerprint>"``; None where `folder` itself is shared
    """

    def __init__(self, folder: Path, url: str | None = None):
        self.folder, self.mirrored = folder, url is not None
        self.fs, self.root = fsspec.core.url_to_fs(url or str(folder))
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()
        self._beating: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------------ files

    def has(self, path: Path) -> bool:
        """Is a file of the folder in the mirror? There files appear whole."""
        return self.mirrored and self.fs.exists(self._at(path))

    def there(self, pattern: str) -> set[Path]:
        """The files of the folder that the mirror has, e.g. of the pattern ``"part-*/shard-*.safetensors"``."""
        if not self.mirrored:
            return set()
        self.fs.invalidate_cache()
        return {self.folder / found[len(self.root) + 1 :] for found in self.fs.glob(f"{self.root}/{pattern}")}

    def push(self, path: Path) -> None:
        """Put a file of the folder into the mirror."""
        if not self.mirrored:
            return
        self.fs.makedirs(self._parent(path), exist_ok=True)
        if isinstance(self.fs, LocalFileSystem):
            paths.write_atomic(Path(self._at(path)), lambda part: shutil.copyfile(path, part))
        else:
            self.fs.put_file(str(path), self._at(path))

    def pull(self, path: Path) -> None:
        """Get a file from the mirror, where it is there."""
        if self.has(path):
            paths.write_atomic(path, lambda part: self.fs.get_file(self._at(path), str(part)))

    def pull_plans(self) -> None:
        """Get what others say of the model and of the rows they extract; not their shards."""
        for path in self.there("meta.json") | self.there("part-*/rows.parquet") | self.there("part-*/part.json"):
            if not path.exists():
                self.pull(path)

    def _at(self, path: Path) -> str:
        return f"{self.root}/{path.relative_to(self.folder).as_posix()}"

    def _parent(self, path: Path) -> str:
        return self._at(path).rpartition("/")[0]

    # ----------------------------------------------------------------------------------------------------- claims

    def claim(self, path: Path) -> bool:
        """Take the making of a file, unless someone has it; gives signs of life until :meth:`release`."""
        at = self._at(path)
        self.fs.makedirs(self._parent(path), exist_ok=True)
        self.fs.invalidate_cache()
        taken = self.fs.glob(f"{at}.claim-*")
        last = max((int(name.rpartition("-")[2]) for name in taken), default=-1)
        if last >= 0 and not self._abandoned(f"{at}.claim-{last}"):
            return False
        try:  # pipe_file(mode="create") looks first and writes then: two could succeed
            with self.fs.open(f"{at}.claim-{last + 1}", "xb") as file:
                file.write(self._sign(0))
        except FileExistsError:
            return False
        with self._lock:
            self._held[at] = last + 1
            if self._beating is None:
                self._beating = threading.Thread(target=self._beat, daemon=True)
                self._beating.start()
        return True

    def release(self, path: Path) -> None:
        """Give a claim up; what it was about is made, or left to others."""
        with self._lock:
            last = self._held.pop(self._at(path), -1)
            for number in range(last, -1, -1):
                name = f"{self._at(path)}.claim-{number}"
                if self.fs.exists(name):
                    self.fs.rm_file(name)

    def free(self, path: Path) -> None:
        """Take away a claim whose owner is gone."""
        if self.claim(path):
            self.release(path)

    def release_all(self) -> None:
        for at in [*self._held]:
            self.release(self.folder / at[len(self.root) + 1 :])

    def _abandoned(self, claim: str) -> bool:
        try:
            sign = self.fs.cat_file(claim)
        except FileNotFoundError:  # given up just now
            return False
        try:
            told = json.loads(sign)
        except ValueError:  # being written just now, or its owner died at that
            told = {"host": None}
        if told["host"] == _host() and not _lives(told["pid"], told["started"]):
            return True
        before, since = SEEN.get(claim, (None, 0.0))
        if sign != before:  # judged by this machine's clock alone
            SEEN[claim] = sign, time.monotonic()
            return False
        return time.monotonic() - since > ABANDONED

    def _beat(self) -> None:
        for beat in range(1, 1 << 62):
            time.sleep(BEAT)
            with self._lock:
                if not self._held:
                    self._beating = None
                    return
                for at, number in self._held.items():
                    try:
                        self.fs.pipe_file(f"{at}.claim-{number}", self._sign(beat))
                    except Exception:  # whatever a network makes of a bad moment; the next sign is not far
                        continue

    @staticmethod
    def _sign(beat: int) -> bytes:
        own = psutil.Process()
        return json.dumps({"host": _host(), "pid": own.pid, "started": own.create_time(), "beat": beat}).encode()


def _host() -> str:
    """This machine since it was started; a container has a name of its own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else os.name}"


def _lives(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 10  # the clock it is told by may be set
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
