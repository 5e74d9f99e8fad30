"""A folder that several workers share, on disk or in an object store: who makes what, and what is there.

A worker claims a piece of work by creating ``<name>.claim-0``, which a file system lets one of them do and no other
(POSIX and NFS by O_EXCL, S3 and others by a conditional put), and writes it anew every few seconds. A claim that was
given up, that stands still, or whose process is gone from this machine, is taken over by creating ``<name>.claim-1``,
which again one alone can. No number is used again before the work is done; then its claims are taken away, and who
comes late looks once more whether it is done before beginning: so nothing is made twice.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from contextlib import suppress
from fnmatch import fnmatch
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
        try:
            found = [file[len(self.root) + 1 :] for file in self.fs.find(self.root, maxdepth=2)]
        except FileNotFoundError:
            return set()
        return {self.folder / name for name in found if fnmatch(name, pattern)}

    def check(self) -> None:
        """Raise ValueError where the mirror would let two workers have the same claim."""
        probe = f"{self.root}/{uuid.uuid4().hex}.probe"
        self.fs.makedirs(self.root, exist_ok=True)
        try:
            for _ in range(2):
                with self.fs.open(probe, "xb") as file:
                    file.write(b"probe")
        except FileExistsError:
            return
        finally:
            if self.fs.exists(probe):
                self.fs.rm_file(probe)
        raise ValueError(f"{self.root} does not say when a file is there already, so two workers could make the same "
                         "shard: take another mirror (a folder, or an object store with conditional puts, such as S3)")

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
        """Take the making of a file, unless someone has it; gives signs of life until it is finished or given up."""
        at = self._at(path)
        self.fs.makedirs(self._parent(path), exist_ok=True)
        last = max(self._claims(path), default=-1)
        if last >= 0 and not self._abandoned(f"{at}.claim-{last}"):
            return False
        own, sign = f"{at}.claim-{last + 1}", self._sign()
        try:  # pipe_file(mode="create") looks first and writes then: two could succeed
            with self.fs.open(own, "xb") as file:
                file.write(sign)
        except FileExistsError:
            return False
        except Exception as error:
            there = self.fs.cat_file(own) if self.fs.exists(own) else None
            if there and there != sign:  # some stores have other errors for what is there already
                return False
            if there is not None:  # created here, and not written
                self.fs.rm_file(own)
            raise paths.with_hint(error, own) from None
        with self._lock:
            self._held[at] = last + 1
            if self._beating is None:
                self._beating = threading.Thread(target=self._beat, daemon=True)
                self._beating.start()
        return True

    def finished(self, path: Path) -> None:
        """What a claim was about is made: take the claims on it away, those of others, too."""
        with self._lock:
            self._held.pop(self._at(path), None)
            for number in self._claims(path):
                with suppress(FileNotFoundError):
                    self.fs.rm_file(f"{self._at(path)}.claim-{number}")

    def give_up(self, path: Path) -> None:
        """Leave what a claim is about to others."""
        with self._lock:
            number = self._held.pop(self._at(path))
            with suppress(OSError):  # of a full disk, say: it will stand still
                self.fs.pipe_file(f"{self._at(path)}.claim-{number}", b"{}")

    def give_up_all(self) -> None:
        for at in [*self._held]:
            self.give_up(self.folder / at[len(self.root) + 1 :])

    def free(self, path: Path) -> None:
        """Say of a claim whose owner is gone that it is given up."""
        if self.claim(path):
            self.give_up(path)

    def _claims(self, path: Path) -> list[int]:
        """The numbers of the claims on a file."""
        self.fs.invalidate_cache()
        try:
            there = self.fs.ls(self._parent(path), detail=False)
        except FileNotFoundError:
            return []
        start = f"{path.name}.claim-"
        names = [name.rstrip("/").rpartition("/")[2] for name in there]
        return [int(name.removeprefix(start)) for name in names if name.startswith(start)]

    def _abandoned(self, claim: str) -> bool:
        try:
            sign = self.fs.cat_file(claim)
        except FileNotFoundError:  # finished just now
            return False
        try:
            told = json.loads(sign)
        except ValueError:  # being written just now, or its owner died at that
            told = {"host": None}
        if not told or (told["host"] == _host() and not _lives(told["pid"], told["started"])):
            return True
        before, since = SEEN.get(claim, (None, 0.0))
        if sign != before:  # judged by this machine's clock alone
            SEEN[claim] = sign, time.monotonic()
            return False
        return time.monotonic() - since > ABANDONED

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            with self._lock:
                if not self._held:
                    self._beating = None
                    return
                for at, number in self._held.items():
                    try:
                        self.fs.pipe_file(f"{at}.claim-{number}", self._sign())
                    except Exception:  # whatever a network makes of a bad moment; the next sign is not far
                        continue

    @staticmethod
    def _sign() -> bytes:
        """No two are the same."""
        own = psutil.Process()
        return json.dumps({"host": _host(), "pid": own.pid, "started": own.create_time(), "sign": uuid.uuid4().hex}
                          ).encode()


def _host() -> str:
    """What a process's number is known by: this machine since it was started, and the container."""
    boot, numbers = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return " ".join([socket.gethostname(), boot.read_text().strip() if boot.exists() else os.name,
                     os.readlink(numbers) if numbers.is_symlink() else ""])


def _lives(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 10  # the clock it is told by may be set
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
