"""Where artefacts live, how settings name them, and how they are written: whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(os.environ.get("PROBEKIT_HOME", Path(__file__).resolve().parent.parent)).resolve()
DATA = ROOT / "data"
FIGURES = ROOT / "figures"
NOTEBOOKS = ROOT / "notebooks"


def resolve(path: str | Path) -> Path:
    """Absolute path of `path`; a relative one starts at the project's root, never at the working directory."""
    return (ROOT / Path(path).expanduser()).resolve()


def relative(path: Path) -> str:
    """`path` as text from the project's root where it lies inside, absolute elsewhere."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def fingerprint(*parts) -> str:
    """12 hexadecimal digits that name these settings (dataclasses, arrays, and whatever JSON can hold)."""
    plain = [dataclasses.asdict(p) if dataclasses.is_dataclass(p) else p for p in parts]
    text = json.dumps(plain, sort_keys=True, default=lambda array: array.tolist())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def versions(*packages: str) -> dict[str, str]:
    """Which version of each package, and of this one, is installed."""
    return {name: version(name) for name in ("probekit", *packages)}


def write_atomic(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside `path`, flush it to disk, then rename it: no half file is ever visible.

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
        raise with_mend(error, path) from None
    finally:
        part.unlink(missing_ok=True)
    return path


def with_mend(error: Exception, path: object) -> Exception:
    """An error of writing a file, in words that say what to do where the disk or the user's share of it is full."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if not full and "No space left" not in str(error) and "quota exceeded" not in str(error).lower():
        return error
    return OSError(errno.ENOSPC, f"no space left for {path}: make room and run this again, it goes on where it stopped")


def write_json(path: Path, content: dict) -> Path:
    return write_atomic(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))


def read_json(path: Path) -> dict:
    """Read a JSON file; one that is missing or broken is an error that says which and what to do."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: run the notebook that writes it first") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it and make it again") from None
