"""MS COCO from its servers: the annotation archive once, then only the images that are sampled."""

from __future__ import annotations

import json
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import requests
from tqdm.auto import tqdm
from urllib3.exceptions import HTTPError

from probekit import paths
from probekit.images import load_rgb

ARCHIVE = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
ARCHIVE_BYTES = 253_000_000  # about, where the server does not say
IMAGE_BYTES = 160_000  # of a COCO photograph, on average
CHUNK = 1 << 18
KINDS = ("captions", "instances")
PLAIN = {"Accept-Encoding": "identity"}  # what arrives is read as it is, and counted
LOCAL = threading.local()


@dataclass(frozen=True)
class Server:
    """How to talk to a server.

    Attributes
    ----------
    archive : address of the zip file that holds ``annotations/{captions,instances}_<split>.json``
    workers : images that are fetched at a time
    timeout : seconds without a byte before a try is given up; an image may take ten times as long
    tries : of each file; between them 1, 2, 4, ... times `pause` seconds
    """

    archive: str = ARCHIVE
    workers: int = 16
    timeout: float = 30.0
    tries: int = 5
    pause: float = 1.0


class NotThere(OSError):
    """The server says that there is no such file: another try would not help."""


def download_coco(folder: str | Path, wanted: Mapping[str, int], seed: int = 0, server: Server = Server()
                ) -> pd.DataFrame:
    """Fetch a sample of COCO into `folder`, in COCO's own layout; what is there and sound is not fetched again.

    The annotation files that are left hold the sampled images alone, so that the folder can be used as it is. The
    sample of a seed grows: more images of a split are those that are there, and others.

    Annotation files that are there already only grow: what they list stays as it stands, and images of the sample
    that they do not list are added. Files that list anything but images of the archive that are on disk (or in the
    sample), with its categories, are not touched: that is an error.

    Parameters
    ----------
    wanted : split, such as "val2017", to the number of images (all, where there are fewer)

    Returns
    -------
    DataFrame
        Images that could not be had: `split`, `file`, `reason`; they are not added to the annotations.
        ``attrs["there"]`` holds how many images the annotations of each split list now.

    Raises
    ------
    ValueError
        A number below 1; an archive that lacks a split, or names a file that would lie outside of the folder; an
        annotation file that cannot be added to; a link that leads out of the folder.
    OSError
        The archive cannot be had.
    """
    folder = paths.Home.find().resolve(folder)
    _check(folder, wanted)
    there = {split: _listed(folder, split) for split in wanted}
    archive = folder / "archives" / _safe_name(server.archive.rpartition("/")[2])
    if not archive.exists():
        bytes_ = _bytes_of(server) + sum(wanted.values()) * IMAGE_BYTES
        tqdm.write(f"at most about {bytes_ / 1e9:.2f} GB to fetch into {folder}: annotations, then images")
    _sound_archive(archive, server)
    plans = {split: _plan(archive, folder / split, n, seed, there[split]) for split, n in wanted.items()}
    lost = _images(folder, [(split, image) for split, (images, _) in plans.items() for image in images], server)
    for split, (_, more) in plans.items():
        out = set(lost.image_id[lost.split == split])
        left = [_grown(folder / "annotations" / f"{kind}_{split}.json", there[split].get(kind), more[kind], out)
                for kind in KINDS]
        lost.attrs.setdefault("there", {})[split] = left[0]
    return lost


def _check(folder: Path, wanted: Mapping[str, int]) -> None:
    for split, n in wanted.items():
        if n < 1:
            raise ValueError(f"{n} images of {split} are asked for: take 1 or more")
    for name in ("annotations", "archives", *wanted):
        if not (folder / name).resolve().is_relative_to(folder):
            raise ValueError(f"{folder / name} leads out of the folder, to {(folder / name).resolve()}, where nothing "
                             "is written: name that one's parent with --folder, or put a folder in place of the link")


def _images(folder: Path, jobs: list[tuple[str, dict]], server: Server) -> pd.DataFrame:
    """Fetch images; those that could not be had."""
    missing = [job for job in jobs if not (folder / job[0] / _safe_name(job[1]["file_name"])).exists()]
    tqdm.write(f"{len(jobs):,} images, {len(jobs) - len(missing):,} of them there; to fetch about "
               f"{len(missing) * IMAGE_BYTES / 1e9:.2f} GB into {folder}")
    failed = []
    with ThreadPoolExecutor(server.workers) as pool, tqdm(total=len(jobs), desc="images", unit="image") as bar:
        for (split, image), reason in zip(jobs, pool.map(lambda job: _image(folder, *job, server), jobs), strict=True):
            bar.update()
            if reason:
                failed.append({"split": split, "image_id": image["id"], "file": image["file_name"], "reason": reason})
    return pd.DataFrame(failed, columns=["split", "image_id", "file", "reason"])


def _safe_name(name: str) -> str:
    """A plain file name, or an error: nothing is written outside of the folder."""
    if not re.fullmatch(r"\w[\w.\-]*", name, re.ASCII):
        raise ValueError(f"{name!r} is no plain file name: this is not an official COCO file")
    return name


# ------------------------------------------------------------------------------------------------------- annotations


def _sound_archive(archive: Path, server: Server) -> None:
    """The archive on disk, all of it: what an earlier call has fetched of it is continued."""
    if archive.exists():
        return
    part = archive.with_name(archive.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)

    def fetch() -> None:
        if not zipfile.is_zipfile(part):  # else all of it came, and was not yet looked through
            receive()
        try:
            with zipfile.ZipFile(part) as opened:
                broken = opened.testzip()
        except zipfile.BadZipFile as error:
            part.unlink()
            raise OSError(f"not a zip file ({error})") from None
        if broken:
            part.unlink()
            raise OSError(f"{broken} is damaged")

    def receive() -> None:
        have = part.stat().st_size if part.exists() else 0
        asked = {"Range": f"bytes={have}-"} if have else {}
        with _get(server.archive, server, asked) as answer:
            goes_on = answer.status_code == 206
            whole = int(answer.headers.get("Content-Length", 0)) + have * goes_on
            with part.open("ab" if goes_on else "wb") as file, tqdm(
                    total=whole or None, initial=have * goes_on, desc=archive.name, unit="B", unit_scale=True) as bar:
                for chunk in _arriving(answer):
                    file.write(chunk)
                    bar.update(len(chunk))
        if whole and part.stat().st_size < whole:
            raise OSError(f"{part.stat().st_size:,} of {whole:,} bytes came")

    _tried(fetch, server, server.archive)
    part.rename(archive)


def _bytes_of(server: Server) -> int:
    """The size of the archive, as the server says."""
    try:
        answer = requests.head(server.archive, headers=PLAIN, timeout=server.timeout, allow_redirects=True)
        answer.raise_for_status()
        return int(answer.headers["Content-Length"])
    except (OSError, KeyError, ValueError):  # if it is not to be had at all, that is said when it is fetched
        return ARCHIVE_BYTES


def _of_archive(archive: Path, split: str) -> dict[str, dict]:
    """Captions and instances of a split."""
    with zipfile.ZipFile(archive) as opened:
        names = {Path(name).name: name for name in opened.namelist()}
        for kind in KINDS:
            if f"{kind}_{split}.json" not in names:
                known = sorted(name.removeprefix("captions_").removesuffix(".json") for name in names
                               if name.startswith("captions_"))
                raise ValueError(f"{archive.name} has no {kind}_{split}.json: take splits out of {', '.join(known)}")
        return {kind: json.loads(opened.read(names[f"{kind}_{split}.json"])) for kind in KINDS}


def _sampled(told: dict, n: int, seed: int) -> set[int]:
    """Ids of n images that have captions, drawn with a seed."""
    with_captions = {a["image_id"] for a in told["annotations"]}
    ids = np.array(sorted(image["id"] for image in told["images"] if image["id"] in with_captions))
    return set(np.random.default_rng(seed).permutation(ids)[:n].tolist())


def _plan(archive: Path, pictures: Path, n: int, seed: int, there: Mapping[str, dict]
          ) -> tuple[list[dict], dict[str, dict]]:
    """The images of the sample, and by kind what annotation files that list `there` do not have of it."""
    every = _of_archive(archive, pictures.name)
    sample = _sampled(every["captions"], n, seed)
    listed = {kind: {image["id"] for image in there[kind]["images"]} if kind in there else set() for kind in KINDS}
    known = {(image["id"], image["file_name"]) for image in every["captions"]["images"]}
    for kind, content in there.items():
        _refuse_others(pictures, kind, content, every[kind], known, sample)
    more = {kind: _only(every[kind], sample.union(*listed.values()) - listed[kind]) for kind in KINDS}
    return [image for image in every["captions"]["images"] if image["id"] in sample], more


def _refuse_others(pictures: Path, kind: str, content: dict, official: dict, known: set, sample: set[int]) -> None:
    file, images = pictures.parent / "annotations" / f"{kind}_{pictures.name}.json", content["images"]
    foreign = [image["file_name"] for image in images if (image["id"], image["file_name"]) not in known]
    absent = [image["file_name"] for image in images
              if image["id"] not in sample and not (pictures / Path(image["file_name"]).name).exists()]
    names, usual = ({c["id"]: c["name"] for c in of.get("categories", [])} for of in (content, official))
    for wrong, reason in ((foreign, "which are not in the archive"), (absent, f"which are not in {pictures}")):
        if wrong:
            raise ValueError(f"{file} lists {len(wrong):,} images ({wrong[0]}, ...) {reason}: nothing is added to it; "
                             "name another folder with --folder")
    if names != usual:
        raise ValueError(f"{file} has other categories than the archive: nothing is added to it; name another folder "
                         "with --folder")


def _only(content: dict, ids: set[int]) -> dict:
    return content | {"images": [image for image in content["images"] if image["id"] in ids],
                      "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}


def _listed(folder: Path, split: str) -> dict[str, dict]:
    """What the annotation files of a split hold, by kind, where they are there."""
    found = {}
    for kind in KINDS:
        file = folder / "annotations" / f"{kind}_{split}.json"
        if file.exists():
            try:
                found[kind] = json.loads(file.read_bytes())
                _ = found[kind]["annotations"], [(image["id"], image["file_name"]) for image in found[kind]["images"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file} cannot be read as COCO's annotations ({type(error).__name__}: {error}), so "
                                 "nothing is added to it: name another folder with --folder") from None
    return found


def _grown(file: Path, there: dict | None, more: dict, lost: set[int]) -> int:
    """Add to an annotation file the images that are not lost; how many it lists then."""
    more = _only(more, {image["id"] for image in more["images"]} - lost)
    content = more if there is None else more | there | {
        key: there[key] + more[key] for key in ("images", "annotations")}
    if there is None or more["images"]:  # else it stays as it is, its time too
        paths.write_atomic(file, lambda part: part.write_text(json.dumps(content)))
    return len(content["images"])


# ------------------------------------------------------------------------------------------------------------ images


def _image(folder: Path, split: str, image: dict, server: Server) -> str | None:
    """Fetch one image and check it; the reason where it cannot be had."""
    file = folder / split / _safe_name(image["file_name"])
    size = image["width"], image["height"]

    def fetch() -> None:
        with _get(image["coco_url"], server) as answer:
            body = b"".join(_arriving(answer, 10 * server.timeout))
            told = int(answer.headers.get("Content-Length", len(body)))
        if len(body) < told:
            raise OSError(f"{len(body):,} of {told:,} bytes came")

        def write(part: Path) -> None:
            part.write_bytes(body)
            found = load_rgb(part).size
            if found != size:
                raise OSError(f"it has {found[0]} x {found[1]} pixels, its annotation says {size[0]} x {size[1]}")

        paths.write_atomic(file, write)

    if file.exists():
        try:
            if load_rgb(file).size == size:
                return None
        except OSError:
            pass  # damaged: fetched again
    try:
        _tried(fetch, server, image["coco_url"])
    except OSError as error:
        return str(error)
    return None


def _get(url: str, server: Server, headers: Mapping[str, str] | None = None) -> requests.Response:
    """An answer that is to be read in chunks.

    Raises
    ------
    OSError
        No connection, or an error of the server; :class:`NotThere` where it has no such file.
    """
    if not url.startswith(("http://", "https://")):
        raise NotThere(f"{url} is no web address")
    if not hasattr(LOCAL, "session"):
        LOCAL.session = requests.Session()  # one a thread
    answer = LOCAL.session.get(url, headers={**PLAIN, **(headers or {})}, timeout=server.timeout, stream=True)
    if answer.status_code in (401, 403, 404, 410):
        answer.close()
        raise NotThere(f"the server answers {answer.status_code} {answer.reason}")
    answer.raise_for_status()
    return answer


def _arriving(answer: requests.Response, seconds: float = float("inf")) -> Iterator[bytes]:
    """What arrives, as it arrives: a server that sends a byte now and then is found out."""
    start = time.monotonic()
    while chunk := answer.raw.read1(CHUNK):
        yield chunk
        if time.monotonic() - start > seconds:
            raise OSError(f"not all came within {seconds:g} seconds")


def _tried(work: Callable[[], None], server: Server, what: str) -> None:
    """Do `work`, again where the network fails."""
    for k in range(server.tries):
        try:
            return work()
        except NotThere as error:
            raise OSError(f"{what}: {error}") from None
        except (OSError, HTTPError) as error:  # what requests raises is an OSError
            last = error
            time.sleep(server.pause * 2**k if k + 1 < server.tries else 0)
    raise OSError(f"{what}: {last} ({server.tries} tries)")
