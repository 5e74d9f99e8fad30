"""Where artefacts live, how settings name them, and how they are written: whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import xxhash

DISTRIBUTION = "probekit-vlm"  # the name that the package is installed under
CHECKOUT = Path(__file__).resolve().parents[1]
FIRST_NOTEBOOK = "01_build_data.ipynb"
NUMBERED_NOTEBOOKS = "[0-9][0-9]_*.ipynb"


@dataclass(frozen=True)
class Home:
    """The folder that probekit works in: ``data``, ``figures``, and in a checkout ``notebooks``.

    Attributes
    ----------
    root : Path
        Absolute. Paths in tables and parameters that are not absolute start here, never at the
        working directory.
    """

    root: Path

    @classmethod
    def find(cls, home: str | Path | Home | None = None) -> Home:
        """Return the named home, else ``PROBEKIT_HOME``, the checkout, the working directory.

        The checkout is the one that this package lies in, else the one around the working
        directory.
        """
        if isinstance(home, Home):
            return home
        named = home or os.environ.get("PROBEKIT_HOME")
        if named:
            return cls(Path(named).expanduser().resolve())
        return cls(find_checkout() or Path.cwd())

    @property
    def data(self) -> Path:
        """The folder of datasets, examples, activations and results."""
        return self.root / "data"

    @property
    def figures(self) -> Path:
        """The folder that pages and pictures are written to, one folder per run."""
        return self.root / "figures"

    @property
    def notebooks(self) -> Path:
        """The folder of the numbered notebooks: this home's own, else the checkout's."""
        own = self.root / "notebooks"
        checkout = find_checkout()
        if checkout is None or any(own.glob(NUMBERED_NOTEBOOKS)):
            return own
        return checkout / "notebooks"

    def resolve(self, path: str | Path) -> Path:
        """Return the absolute path of `path`; a relative one starts at the home."""
        return (self.root / Path(path).expanduser()).resolve()

    def relative(self, path: str | Path) -> str:
        """Return `path` as text from the home where it lies inside, absolute elsewhere."""
        path = Path(path)
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


def find_checkout() -> Path | None:
    """Return the checkout that this package lies in, else the one around the working directory."""
    working = Path.cwd()
    for folder in (CHECKOUT, working, *working.parents):
        if (folder / "notebooks" / FIRST_NOTEBOOK).is_file():
            return folder
    return None


def fingerprint(*settings: object) -> str:
    """Return 12 hexadecimal digits that name these settings.

    Parameters
    ----------
    *settings
        Dataclasses, arrays, and whatever JSON can hold.
    """
    plain = [_plain(one) for one in settings]
    text = json.dumps(plain, sort_keys=True, default=lambda array: array.tolist())
    return xxhash.xxh3_128_hexdigest(text.encode())[:12]


def _plain(setting: object) -> object:
    if dataclasses.is_dataclass(setting) and not isinstance(setting, type):
        return dataclasses.asdict(setting)
    return setting


def versions(*packages: str) -> dict[str, str]:
    """Return which version of each package, and of this one, is installed."""
    installed = {name: version(name) for name in packages}
    return {"probekit": version(DISTRIBUTION)} | installed


def write_atomic(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside `path`, flush it, then rename it: no half file is visible.

    Raises
    ------
    OSError
        The disk is full, or cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        write(part)
        with part.open("r+b") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    except Exception as error:
        raise with_hint(error, path) from None
    finally:
        part.unlink(missing_ok=True)
    return path


def with_hint(error: Exception, path: object) -> Exception:
    """Return an error of writing `path`; where a disk or quota is full, it names the fix."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    if not full and "No space left" not in text and "quota exceeded" not in text.lower():
        return error
    return OSError(
        errno.ENOSPC,
        f"no space left for {path}: make room and run this again, it goes on where it stopped",
    )


def write_json(path: Path, content: dict) -> Path:
    """Write a JSON file whole or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    return write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    """Read a JSON file.

    Raises
    ------
    FileNotFoundError, ValueError
        It is missing or broken; the message says which file and what to do.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist: run the notebook that writes it first"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): delete it and make it again"
        ) from None
