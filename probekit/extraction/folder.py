"""The folder of one model's activations: on this machine, or behind any URL that fsspec opens."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from probekit import paths

FORMAT = 3  # of meta.json, plan.json and the shards


class ActivationFolder:
    """Files of one model with one setting: ``<root>/<model>/<fingerprint>/...``.

    Files appear whole or not at all. Behind a URL they are read through fsspec's file cache, so
    each shard travels once per machine.

    Parameters
    ----------
    url : str
        An absolute path, or a URL such as ``s3://bucket/activations/<model>/<fingerprint>``.
    cache : Path
        Where files from behind a URL are kept on this machine.

    Raises
    ------
    ValueError
        The URL cannot be opened; the message names the fix.
    """

    def __init__(self, url: str, *, cache: Path) -> None:
        self.url = url
        self.cache = cache
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except Exception as error:  # each protocol has errors of its own
            raise ValueError(
                f"activations at {url} cannot be opened ({type(error).__name__}: {error}): check "
                "the address and your credentials, and install its protocol's package (s3fs, "
                "gcsfs, ...)"
            ) from error
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self._listing: set[str] = set()
        self._listed_at = -np.inf

    def __repr__(self) -> str:
        return f"ActivationFolder({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActivationFolder) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __getstate__(self) -> dict:
        return {"url": self.url, "cache": self.cache}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["url"], cache=state["cache"])  # type: ignore[misc]  # as unpickling does

    @property
    def model_name(self) -> str:
        """The name of the model's folder, with ``-untrained`` where the weights are random."""
        return self.root.rstrip("/").split("/")[-2]

    @property
    def settings_name(self) -> str:
        """The fingerprint of the settings that decide the hidden states."""
        return self.root.rstrip("/").split("/")[-1]

    @property
    def path(self) -> Path:
        """The folder on this machine.

        Raises
        ------
        ValueError
            It lies behind a URL.
        """
        if not self.is_local:
            raise ValueError(f"{self.url} is not a folder on this machine")
        return Path(self.root)

    def name_from(self, home: paths.Home) -> str:
        """Return the folder as records name it: by its path from a home, or by its URL."""
        return home.relative(self.url) if self.is_local else self.url

    # ------------------------------------------------------------------------------------ reading

    def list_files(self) -> set[str]:
        """Return the names of all whole files, relative to the folder."""
        try:
            paths_found = self.fs.find(self.root, maxdepth=2)
        except FileNotFoundError:
            return set()
        names = {path[len(self.root.rstrip("/")) + 1 :] for path in paths_found}
        return {name for name in names if not name.rpartition("/")[2].startswith(".")}

    def exists(self, name: str) -> bool:
        """Tell whether a file is there; behind a URL, as of a second ago at most."""
        if self.is_local:
            return Path(self._address(name)).exists()
        if name not in self._listing and time.monotonic() - self._listed_at > 1:
            self._listing = self.list_files()
            self._listed_at = time.monotonic()
        return name in self._listing

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a small file, which is never cached.

        Raises
        ------
        FileNotFoundError
            It is not there.
        """
        return self.fs.cat_file(self._address(name))

    def local_copy(self, name: str) -> Path:
        """Return a path on this machine with the content of a file that is written once."""
        if self.is_local:
            return Path(self._address(name))
        with self._cached().open(self._address(name), mode="rb") as file:
            return Path(file.name)

    def forget_copy(self, name: str) -> None:
        """Drop this machine's copy of a file behind a URL, so that it is fetched anew."""
        if not self.is_local and self._cached()._check_file(self._address(name)):
            self._cached().pop_from_cache(self._address(name))

    def _cached(self) -> fsspec.AbstractFileSystem:
        return fsspec.filesystem(
            "filecache",
            fs=self.fs,
            cache_storage=str(self.cache),
            check_files=False,
            same_names=False,
        )

    # ------------------------------------------------------------------------------------ writing

    def write(self, name: str, fill: Callable[[Path], object]) -> None:
        """Let `fill` write a file, which then appears whole under its name.

        Half-written files that killed processes left beside it go. Where one of them belongs to a
        process that is writing this file right now, that process takes the whole one for its own.

        Raises
        ------
        OSError
            The disk or a quota is full; the message names the fix.
        """
        if self.is_local:
            self._write_locally(Path(self._address(name)), fill)
            return
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "file"
            fill(file)
            try:
                self._upload(file, name)
            except Exception as error:
                raise paths.with_hint(error, self._address(name)) from error
        self.forget_copy(name)
        self._listing.add(name)

    def _write_locally(self, path: Path, fill: Callable[[Path], object]) -> None:
        try:
            paths.write_atomic(path, fill)
        except FileNotFoundError:
            if not path.exists():  # else another process was faster and removed this one's half
                raise
        for leftover in path.parent.glob(f".{path.name}.*.part"):
            leftover.unlink(missing_ok=True)

    def _upload(self, file: Path, name: str) -> None:
        address = self._address(name)
        self.fs.makedirs(address.rpartition("/")[0], exist_ok=True)
        with (
            self.fs.transaction,  # the file appears when the block ends
            file.open("rb") as source,
            self.fs.open(address, "wb") as target,
        ):
            shutil.copyfileobj(source, target, length=1 << 24)

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is fine."""
        self.forget_copy(name)
        self._listing.discard(name)
        if self.fs.exists(self._address(name)):
            self.fs.rm_file(self._address(name))

    def _address(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    # ---------------------------------------------------------------------- the model's record

    def write_meta(self, meta: dict) -> None:
        """Write ``meta.json``: which model this is, and with what it was run."""
        text = json.dumps({"format": FORMAT} | meta, indent=1) + "\n"
        self.write("meta.json", lambda file: file.write_text(text, encoding="utf-8"))

    def read_meta(self) -> dict | None:
        """Return what ``meta.json`` says; None where it is gone, damaged, or of another format."""
        try:
            meta = json.loads(self.read_bytes("meta.json"))
            return meta if meta["format"] == FORMAT else None
        except (OSError, ValueError, LookupError, TypeError):
            return None


def open_folder(folder: str | Path, home: paths.Home) -> ActivationFolder:
    """Open a folder of activations by its URL, its absolute path, or its path from the home."""
    url = str(folder)
    if "://" not in url:
        url = str(home.resolve(url))
    return ActivationFolder(url, cache=home.data / "cache")
