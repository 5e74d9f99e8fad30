"""A sample of MS COCO from its servers: the annotation archive once, then the sampled images."""

from __future__ import annotations

import json
import math
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import requests
from requests.adapters import HTTPAdapter
from tqdm.auto import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from probekit import paths
from probekit.images import load_rgb

ARCHIVE = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
ARCHIVE_BYTES = 253_000_000  # roughly, for a server that does not tell
IMAGE_BYTES = 160_000  # of a COCO photograph, on average
CHUNK_BYTES = 1 << 18
LONGEST_PAUSE = 120  # seconds
KINDS = ("captions", "instances")
# Else a server may compress, and the bytes that arrive are not those of the file.
UNCOMPRESSED = {"Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Server:
    """How to talk to a server.

    Attributes
    ----------
    archive : str
        Address of the zip file that holds ``annotations/{captions,instances}_<split>.json``.
    workers : int
        Number of images that are fetched at the same time.
    timeout : float
        Seconds without a byte before a try is given up. A whole image may take ten times as long.
    tries : int
        How often a request is sent until it is answered, and how often a file is fetched until it
        arrives whole.
    pause : float
        Seconds. The pauses between tries are 2, 4, 8, ... times this, up to
        :data:`LONGEST_PAUSE`; a request without an answer is first repeated at once. A server that
        sends ``Retry-After`` sets the pause itself, up to the same limit.
    """

    archive: str = ARCHIVE
    _: KW_ONLY
    workers: int = 16
    timeout: float = 30.0
    tries: int = 5
    pause: float = 1.0


@dataclass(frozen=True)
class Download:
    """What :func:`download_coco` did.

    Attributes
    ----------
    images : dict of str to int
        By split, how many images its annotations list now.
    failed : DataFrame
        ``split``, ``image_id``, ``file``, ``reason`` of the images that could not be fetched. They
        are not added to the annotations.
    """

    images: dict[str, int]
    failed: pd.DataFrame


class BrokenBody(OSError):
    """A file did not arrive whole or is not what it should be: fetching it again may help."""


def download_coco(
    folder: str | Path,
    wanted: Mapping[str, int],
    *,
    seed: int = 0,
    server: Server = Server(),
    home: str | Path | paths.Home | None = None,
) -> Download:
    """Download a sample of COCO, in COCO's layout.

    What is on disk and intact is not fetched again. The annotation files list the sampled images
    alone, so that the folder can be used as it is. The sample of a seed grows: more images of a
    split are the same ones and others.

    Annotation files that exist already only grow: what they list stays as it is, and images of the
    sample that they do not list are added.

    Parameters
    ----------
    folder : str or Path
        Receives ``<split>/*.jpg``, ``annotations`` and ``archives``.
    wanted : mapping of str to int
        Number of images by split, such as ``{"val2017": 2000}``; all if the split has fewer.
    seed : int
        Of the sample.
    server : Server
        Where to download from, and how patiently.
    home : str, Path or Home, optional
        Where a relative `folder` starts, see :meth:`probekit.paths.Home.find`.

    Returns
    -------
    Download
        How many images there are, and which could not be fetched.

    Raises
    ------
    ValueError
        A number is below 1; the archive lacks a split or names a file outside of the folder; a
        link leads out of the folder; or an existing annotation file cannot be added to, because it
        cannot be read, has other categories than the archive, or lists images that are not in the
        archive or neither on disk nor in the sample.
    OSError
        The archive cannot be fetched.
    """
    folder = paths.Home.find(home).resolve(folder)
    _check_request(folder, wanted)
    existing = {split: _read_existing(folder, split) for split in wanted}
    archive = folder / "archives" / _check_name(server.archive.rpartition("/")[2])
    with _open_session(server) as session:
        if not archive.exists():
            n_bytes = _archive_bytes(server) + sum(wanted.values()) * IMAGE_BYTES
            tqdm.write(
                f"at most about {n_bytes / 1e9:.2f} GB to fetch into {folder}: annotations, "
                "then images"
            )
            _fetch_archive(archive, server=server, session=session)
        plans = {
            split: _plan_split(
                folder, split, n, seed=seed, archive=archive, existing=existing[split]
            )
            for split, n in wanted.items()
        }
        failed = _fetch_images(folder, plans, server=server, session=session)
    images = {}
    for split, plan in plans.items():
        failed_ids = set(failed.image_id[failed.split == split])
        contents = {
            kind: _extend_annotations(
                _annotation_file(folder, kind, split),
                existing[split].get(kind),
                additions=plan.additions[kind],
                failed_ids=failed_ids,
            )
            for kind in KINDS
        }
        images[split] = len(contents["captions"]["images"])
    return Download(images, failed)


def _check_request(folder: Path, wanted: Mapping[str, int]) -> None:
    for split, n in wanted.items():
        if n < 1:
            raise ValueError(f"{n} images of {split} are asked for: take 1 or more")
    for name in ("annotations", "archives", *wanted):
        target = (folder / name).resolve()
        if not target.is_relative_to(folder):
            raise ValueError(
                f"{folder / name} leads out of the folder, to {target}, where nothing is written: "
                "name the parent of that with --folder, or replace the link by a folder"
            )


def _check_name(name: str) -> str:
    """Return a plain file name; refuse any other, so that nothing is written out of the folder."""
    if not re.fullmatch(r"\w[\w.\-]*", name, re.ASCII):
        raise ValueError(f"{name!r} is no plain file name: this is not an official COCO file")
    return name


def _annotation_file(folder: Path, kind: str, split: str) -> Path:
    return folder / "annotations" / f"{kind}_{split}.json"


# ------------------------------------------------------------------------------------ connections


def _open_session(server: Server) -> requests.Session:
    """Return a session that repeats requests which are not answered, or with 429 or 5xx."""
    retry = Retry(
        total=server.tries - 1,
        backoff_factor=server.pause,
        backoff_max=LONGEST_PAUSE,
        retry_after_max=LONGEST_PAUSE,
        status_forcelist=(429, *range(500, 600)),
        raise_on_status=False,
    )
    adapter = HTTPAdapter(max_retries=retry, pool_maxsize=server.workers)
    session = requests.Session()
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    session.headers.update(UNCOMPRESSED)
    return session


def _read_chunks(response: requests.Response, seconds: float = math.inf) -> Iterator[bytes]:
    deadline = time.monotonic() + seconds
    try:
        # Unlike read, read1 returns what has arrived: a server that sends a byte now and then
        # meets the deadline.
        while chunk := response.raw.read1(CHUNK_BYTES):
            yield chunk
            if time.monotonic() > deadline:
                raise BrokenBody(f"it did not arrive within {seconds:g} seconds")
    except HTTPError as error:
        raise BrokenBody(error.args[0]) from error


def _retry_broken(fetch: Callable[[], None], url: str, server: Server) -> None:
    """Fetch a file until it arrives whole; the session repeats requests, but not broken bodies."""
    for number in range(server.tries):
        if number:
            time.sleep(min(server.pause * 2**number, LONGEST_PAUSE))
        try:
            return fetch()
        except BrokenBody as error:
            fault = error
    raise OSError(f"{url}: {fault} ({server.tries} tries)")


# ---------------------------------------------------------------------------------------- archive


def _archive_bytes(server: Server) -> int:
    """Return the size of the archive, as the server says, in bytes."""
    try:
        response = requests.head(
            server.archive, headers=UNCOMPRESSED, timeout=server.timeout, allow_redirects=True
        )
        response.raise_for_status()
        return int(response.headers["Content-Length"])
    except (OSError, KeyError, ValueError):  # fetching it will tell if there is none
        return ARCHIVE_BYTES


def _fetch_archive(archive: Path, *, server: Server, session: requests.Session) -> None:
    """Fetch the archive, and go on where an earlier call stopped."""
    part = archive.with_name(f"{archive.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    fetch = partial(_complete_archive, part, server=server, session=session)
    _retry_broken(fetch, server.archive, server)
    part.rename(archive)


def _complete_archive(part: Path, *, server: Server, session: requests.Session) -> None:
    if not zipfile.is_zipfile(part):  # else all of it arrived, but was not checked yet
        _fetch_rest(part, server=server, session=session)
    try:
        with zipfile.ZipFile(part) as opened:
            damaged = opened.testzip()
        fault = f"{damaged} is damaged" if damaged else None
    except (zipfile.BadZipFile, zlib.error) as error:
        fault = f"not an intact zip file ({error})"
    if fault:
        part.unlink()
        raise BrokenBody(fault)


def _fetch_rest(part: Path, *, server: Server, session: requests.Session) -> None:
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    with session.get(
        server.archive, headers=headers, timeout=server.timeout, stream=True
    ) as response:
        response.raise_for_status()
        if response.status_code != 206:  # the server sends all of it, whatever the range is
            start = 0
        length = response.headers.get("Content-Length")
        progress = tqdm(
            total=start + int(length) if length else None,
            initial=start,
            desc=part.stem,
            unit="B",
            unit_scale=True,
        )
        with part.open("ab" if start else "wb") as file, progress:
            for chunk in _read_chunks(response):
                file.write(chunk)
                progress.update(len(chunk))


# ------------------------------------------------------------------------------------ annotations


@dataclass(frozen=True)
class _Plan:
    """What is to be fetched for a split.

    Attributes
    ----------
    images : list of dict
        The sample, as the archive lists it.
    additions : dict of str to dict
        By kind, what the archive says about images that the annotation file is to list and does
        not list yet.
    """

    images: list[dict]
    additions: dict[str, dict]


def _read_existing(folder: Path, split: str) -> dict[str, dict]:
    """Return the content of a split's annotation files by kind, as far as they exist."""
    contents = {}
    for kind in KINDS:
        file = _annotation_file(folder, kind, split)
        if not file.exists():
            continue
        try:
            content = json.loads(file.read_bytes())
            # Looked at here, so that a fault is that of this file.
            _ = content["annotations"]
            _ = [(image["id"], image["file_name"]) for image in content["images"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} cannot be read as COCO's annotations ({type(error).__name__}: {error}), "
                "so nothing is added to it: name another folder with --folder"
            ) from None
        contents[kind] = content
    return contents


def _plan_split(
    folder: Path, split: str, n: int, *, seed: int, archive: Path, existing: Mapping[str, dict]
) -> _Plan:
    official = _read_archive(archive, split)
    sample_ids = _sample_ids(official["captions"], n, seed)
    listed_ids: dict[str, set[int]] = {kind: set() for kind in KINDS}
    for kind, content in existing.items():
        listed_ids[kind] = {image["id"] for image in content["images"]}
        _check_extensible(
            _annotation_file(folder, kind, split),
            content,
            official=official[kind],
            image_folder=folder / split,
            sample_ids=sample_ids,
        )
    needed_ids = sample_ids.union(*listed_ids.values())
    additions = {
        kind: _select_images(official[kind], needed_ids - listed_ids[kind]) for kind in KINDS
    }
    return _Plan(_select_images(official["captions"], sample_ids)["images"], additions)


def _read_archive(archive: Path, split: str) -> dict[str, dict]:
    """Return the official annotations of a split by kind."""
    contents = {}
    with zipfile.ZipFile(archive) as opened:
        members = {Path(member).name: member for member in opened.namelist()}
        for kind in KINDS:
            member = members.get(f"{kind}_{split}.json")
            if member is None:
                splits = sorted(
                    name.removeprefix("captions_").removesuffix(".json")
                    for name in members
                    if name.startswith("captions_")
                )
                raise ValueError(
                    f"{archive.name} has no {kind}_{split}.json: choose from the splits "
                    f"{', '.join(splits)}"
                )
            contents[kind] = json.loads(opened.read(member))
    return contents


def _sample_ids(captions: dict, n: int, seed: int) -> set[int]:
    """Return the ids of n random images that have captions; those of a smaller n are among them."""
    with_captions = {annotation["image_id"] for annotation in captions["annotations"]}
    ids = sorted(image["id"] for image in captions["images"] if image["id"] in with_captions)
    return set(np.random.default_rng(seed).permutation(np.array(ids))[:n].tolist())


def _check_extensible(
    file: Path, content: dict, *, official: dict, image_folder: Path, sample_ids: set[int]
) -> None:
    """Refuse to add to an annotation file of another dataset, or one whose images are missing."""
    official_images = {(image["id"], image["file_name"]) for image in official["images"]}
    foreign = []
    missing = []
    for image in content["images"]:
        name = image["file_name"]
        if (image["id"], name) not in official_images:
            foreign.append(name)
        if image["id"] not in sample_ids and not (image_folder / Path(name).name).exists():
            missing.append(name)
    if foreign:
        fault = f"lists {len(foreign):,} images ({foreign[0]}, ...) which are not in the archive"
    elif missing:
        fault = f"lists {len(missing):,} images ({missing[0]}, ...) which are not in {image_folder}"
    elif _category_names(content) != _category_names(official):
        fault = "has other categories than the archive"
    else:
        return
    raise ValueError(f"{file} {fault}: nothing is added to it; name another folder with --folder")


def _category_names(content: dict) -> dict[int, str]:
    return {category["id"]: category["name"] for category in content.get("categories", [])}


def _select_images(content: dict, ids: set[int]) -> dict:
    """Return only what an annotation file says about some images."""
    images = [image for image in content["images"] if image["id"] in ids]
    annotations = [
        annotation for annotation in content["annotations"] if annotation["image_id"] in ids
    ]
    return content | {"images": images, "annotations": annotations}


def _extend_annotations(
    file: Path, existing: dict | None, *, additions: dict, failed_ids: set[int]
) -> dict:
    """Add to an annotation file the images that were fetched, and return what it holds now."""
    fetched_ids = {image["id"] for image in additions["images"]} - failed_ids
    additions = _select_images(additions, fetched_ids)
    if existing is None:
        content = additions
    elif fetched_ids:
        content = {
            **additions,
            **existing,
            "images": existing["images"] + additions["images"],
            "annotations": existing["annotations"] + additions["annotations"],
        }
    else:  # the file stays as it is, its time too
        return existing
    text = json.dumps(content)
    paths.write_atomic(file, lambda part: part.write_text(text, encoding="utf-8"))
    return content


# ----------------------------------------------------------------------------------------- images


def _fetch_images(
    folder: Path, plans: Mapping[str, _Plan], *, server: Server, session: requests.Session
) -> pd.DataFrame:
    """Fetch the images of all samples; return those that could not be fetched."""
    jobs = [(split, image) for split, plan in plans.items() for image in plan.images]
    files = [folder / split / _check_name(image["file_name"]) for split, image in jobs]
    n_missing = sum(not file.exists() for file in files)
    tqdm.write(
        f"{len(files):,} images, {len(files) - n_missing:,} of them on disk; to fetch about "
        f"{n_missing * IMAGE_BYTES / 1e9:.2f} GB into {folder}"
    )
    fetch = partial(_fetch_image, server=server, session=session)
    with ThreadPoolExecutor(server.workers) as pool:
        results = pool.map(fetch, files, [image for _, image in jobs])
        reasons = list(tqdm(results, total=len(jobs), desc="images", unit="image"))
    failed = [
        (split, image["id"], image["file_name"], reason)
        for (split, image), reason in zip(jobs, reasons, strict=True)
        if reason
    ]
    return pd.DataFrame(failed, columns=["split", "image_id", "file", "reason"])


def _fetch_image(
    file: Path, image: dict, *, server: Server, session: requests.Session
) -> str | None:
    """Fetch an image unless it is on disk and intact; return the reason if that fails."""
    size = (image["width"], image["height"])
    if file.exists() and _image_fault(file, size) is None:
        return None
    url = image["coco_url"]
    fetch = partial(_fetch_image_once, file, url, size=size, server=server, session=session)
    try:
        _retry_broken(fetch, url, server)
    except OSError as error:
        return str(error)
    return None


def _fetch_image_once(
    file: Path, url: str, *, size: tuple[int, int], server: Server, session: requests.Session
) -> None:
    with session.get(url, timeout=server.timeout, stream=True) as response:
        response.raise_for_status()
        body = b"".join(_read_chunks(response, 10 * server.timeout))

    def write_checked(part: Path) -> None:
        part.write_bytes(body)
        fault = _image_fault(part, size)
        if fault:
            raise BrokenBody(fault)

    paths.write_atomic(file, write_checked)


def _image_fault(file: Path, size: tuple[int, int]) -> str | None:
    """Return what is wrong with an image file, or None if it is intact and of the right size."""
    try:
        image = load_rgb(file)
    except OSError as error:
        return str(error)
    if image.size == size:
        return None
    width, height = size
    return f"it has {image.width} x {image.height} pixels, its annotation says {width} x {height}"
