"""Downloads from a server that fails, stalls, drips, truncates, lies and answers 404."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
import threading
import time
import zipfile
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probekit.cli.main import main
from probekit.data import download
from probekit.data.coco import read_coco
from probekit.data.download import Server, download_coco
from probekit.images import check_images

SIZE = (40, 30)
OTHER_SIZE = (50, 50)
REFUSALS = {"unavailable": 2, "always_unavailable": math.inf}  # requests that get a 503


def jpeg(number: int, size=SIZE) -> bytes:
    width, height = size
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answer ``/images/<number>/<behaviour>.jpg`` in the way that `behaviour` says."""

    def do_GET(self):
        times = self.server.request_times[self.path]
        times.append(time.monotonic())
        if self.path == "/archive.zip":
            self.send_archive()
            return
        _, number, name = self.path.strip("/").split("/")
        behaviour = name.removesuffix(".jpg")
        if behaviour == "absent":
            self.send_error(404)
        elif len(times) <= REFUSALS.get(behaviour, 0):
            self.send_error(503)
        elif behaviour == "busy" and len(times) < 2:
            self.send_busy()
        else:
            self.send_image(int(number), behaviour, len(times))

    def send_busy(self):
        self.send_response(429)
        self.send_header("Retry-After", "1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_image(self, number: int, behaviour: str, attempt: int):
        if behaviour == "slow_to_answer" and attempt < 2:
            time.sleep(1)
        if behaviour == "not_an_image":
            body = b"<html>not an image</html>"
        else:
            body = jpeg(number, OTHER_SIZE if behaviour == "other_size" else SIZE)
        self.send_response(200)
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        if behaviour == "truncated" and attempt < 3:
            self.wfile.write(body[:half])
        elif behaviour == "stalls" and attempt < 2:
            self.wfile.write(body[:half])
            time.sleep(1)
        elif behaviour == "drips":
            self.drip(body)
        else:
            self.wfile.write(body)

    def drip(self, body: bytes):
        try:
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.02)
        except OSError:  # the client gave up
            self.close_connection = True

    def do_HEAD(self):
        if self.path == "/archive.zip" and self.server.answers_head:
            self.send_response(200)
            length = self.server.stated_length or len(self.server.archive)
            self.send_header("Content-Length", str(length))
            self.end_headers()
        else:
            self.send_error(501)

    def send_archive(self):
        archive = self.server.archive
        requested = None if self.server.ignores_ranges else self.headers.get("Range")
        start = int(requested.removeprefix("bytes=").rstrip("-")) if requested else 0
        self.send_response(206 if requested else 200)
        self.send_header("Content-Length", str(len(archive) - start))
        self.end_headers()
        is_cut = self.server.cuts_archive and not requested
        self.wfile.write(archive[: len(archive) // 2] if is_cut else archive[start:])

    def log_message(self, *arguments):
        pass


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.archive = b""
        self.request_times = defaultdict(list)
        self.answers_head = True
        self.stated_length = None
        self.cuts_archive = False
        self.ignores_ranges = False

    def requests_of(self, path: str) -> int:
        return len(self.request_times[path])

    def offer(
        self, *behaviours: str, name="{number:012d}.jpg", url=None, timeout=0.5, tries=3
    ) -> Server:
        """Offer an archive with an image per behaviour, two captions and a box for each."""
        url = url or f"{self.url}/images/{{number}}/{{behaviour}}.jpg"
        width, height = SIZE
        images = [
            {
                "id": number,
                "file_name": name.format(number=number),
                "width": width,
                "height": height,
                "coco_url": url.format(number=number, behaviour=behaviour),
            }
            for number, behaviour in enumerate(behaviours)
        ]
        captions = [
            {"id": i, "image_id": i // 2, "caption": "a cup"} for i in range(2 * len(images))
        ]
        box = {"category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
        instances = [{"id": i, "image_id": i, **box} for i in range(len(images))]
        categories = [{"id": 1, "name": "cup", "supercategory": "thing"}]
        members = {
            "annotations/captions_val2017.json": {"images": images, "annotations": captions},
            "annotations/instances_val2017.json": {
                "images": images,
                "annotations": instances,
                "categories": categories,
            },
            "../../escaped.json": {},
        }
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in members.items():
                archive.writestr(member, json.dumps(content))
        self.archive = buffer.getvalue()
        return Server(
            f"{self.url}/archive.zip", workers=4, timeout=timeout, tries=tries, pause=0.01
        )


@pytest.fixture
def server():
    faulty_server = FaultyServer()
    serve = threading.Thread(
        target=faulty_server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    serve.start()
    yield faulty_server
    faulty_server.shutdown()
    faulty_server.server_close()


def annotation_file(folder: Path, kind: str = "captions") -> Path:
    return folder / "annotations" / f"{kind}_val2017.json"


def replace_in(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------- images


def test_images_are_fetched_from_a_faulty_server_and_failures_are_named(server, tmp_path):
    behaviours = [
        "fine",
        "unavailable",
        "slow_to_answer",
        "truncated",
        "absent",
        "other_size",
        "not_an_image",
        "stalls",
        "busy",
        "always_unavailable",
    ]
    source = server.offer(*behaviours)
    result = download_coco(tmp_path / "coco", {"val2017": 10}, server=source)
    reasons = result.failed.set_index("image_id").reason
    assert set(reasons.index) == {4, 5, 6, 9}
    assert "404" in reasons[4]
    assert "50 x 50 pixels" in reasons[5]
    assert "cannot be read" in reasons[6]
    assert "503" in reasons[9]
    assert result.images == {"val2017": 6}
    dataset = read_coco(tmp_path / "coco")
    assert set(dataset.images.index) == {0, 1, 2, 3, 7, 8}
    assert len(dataset.captions) == 12
    assert len(dataset.instances) == 6
    assert check_images(dataset.images).reason.isna().all()
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("escaped*"))
    assert {path.name for path in tmp_path.iterdir()} == {"coco"}

    counts = [server.requests_of(f"/images/{i}/{name}.jpg") for i, name in enumerate(behaviours)]
    assert counts == [1, 3, 2, 3, 1, 3, 3, 2, 2, 3]
    first, second = server.request_times["/images/8/busy.jpg"]
    assert second - first >= 1  # as its Retry-After says


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(server, tmp_path):
    source = server.offer("drips", "fine", timeout=0.2, tries=1)
    start = time.monotonic()
    result = download_coco(tmp_path, {"val2017": 2}, server=source)
    assert time.monotonic() - start < 15  # the whole image takes nearly 30
    assert result.failed.image_id.tolist() == [0]
    assert "within 2 seconds" in result.failed.reason[0]


def test_a_server_that_is_not_there_is_named_after_its_tries(tmp_path):
    source = Server("http://127.0.0.1:9/archive.zip", timeout=0.5, tries=2, pause=0.01)
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        download_coco(tmp_path, {"val2017": 1}, server=source)


def test_a_second_call_fetches_only_what_is_missing_or_damaged(server, tmp_path):
    source = server.offer(*["fine"] * 30)
    download_coco(tmp_path, {"val2017": 12}, server=source)
    first_ids = set(read_coco(tmp_path).images.index)
    damaged = min((tmp_path / "val2017").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:200])
    server.request_times.clear()
    download_coco(tmp_path, {"val2017": 20}, server=source)
    assert sum(map(len, server.request_times.values())) == 8 + 1
    assert not server.requests_of("/archive.zip")
    images = read_coco(tmp_path).images
    assert first_ids < set(images.index)
    assert len(images) == 20
    assert check_images(images).reason.isna().all()


def test_the_seed_decides_the_sample(server, tmp_path):
    source = server.offer(*["fine"] * 30)
    samples = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        download_coco(folder, {"val2017": 5}, seed=seed, server=source)
        samples.append(set(read_coco(folder).images.index))
    assert samples[0] == samples[1] != samples[2]


def test_an_intact_image_of_another_size_is_fetched_again(server, tmp_path):
    source = server.offer(*["fine"] * 3)
    (tmp_path / "val2017").mkdir()
    file = tmp_path / "val2017" / f"{1:012d}.jpg"
    file.write_bytes(jpeg(1, OTHER_SIZE))
    assert download_coco(tmp_path, {"val2017": 3}, server=source).failed.empty
    assert file.read_bytes() == jpeg(1)
    assert server.requests_of("/images/1/fine.jpg") == 1


def test_only_web_addresses_are_opened(server, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(0))
    source = server.offer("fine", url=secret.as_uri())
    result = download_coco(tmp_path / "coco", {"val2017": 1}, server=source)
    assert "No connection adapters" in result.failed.reason[0]
    assert not list((tmp_path / "coco").rglob("*.jpg"))


# ------------------------------------------------------------------------------------ annotations


def test_existing_annotations_only_grow(server, tmp_path):
    source = server.offer(*["fine"] * 30)
    download_coco(tmp_path, {"val2017": 20}, server=source)
    replace_in(annotation_file(tmp_path, "captions"), "a cup", "two cups")  # corrections of a user
    replace_in(annotation_file(tmp_path, "instances"), "[1, 1, 9, 9]", "[2, 2, 5, 5]")
    before = read_coco(tmp_path)

    result = download_coco(tmp_path, {"val2017": 5}, server=source)
    assert result.images == {"val2017": 20}
    assert annotation_file(tmp_path).read_text().count("two cups") == 40

    result = download_coco(tmp_path, {"val2017": 20}, seed=1, server=source)
    dataset = read_coco(tmp_path)
    n_images = len(dataset.images)
    assert 20 < n_images <= 30
    assert result.images == {"val2017": n_images}
    assert set(before.images.index) < set(dataset.images.index)
    assert check_images(dataset.images).reason.isna().all()
    assert sorted(dataset.instances.image_id) == sorted(dataset.images.index)
    assert len(dataset.captions) == 2 * n_images
    assert dataset.captions[: len(before.captions)].equals(before.captions)
    assert dataset.instances[: len(before.instances)].equals(before.instances)


def test_a_missing_annotation_file_is_written_for_the_images_of_the_other(server, tmp_path):
    source = server.offer(*["fine"] * 10)
    download_coco(tmp_path, {"val2017": 6}, server=source)
    annotation_file(tmp_path, "instances").unlink()
    download_coco(tmp_path, {"val2017": 2}, server=source)
    dataset = read_coco(tmp_path)
    assert len(dataset.images) == 6
    assert set(dataset.instances.image_id) == set(dataset.images.index)


def remove_an_image(folder):
    min((folder / "val2017").iterdir()).unlink()


def rename_images(folder):
    replace_in(annotation_file(folder), ".jpg", ".png")


def renumber_images(folder):
    content = json.loads(annotation_file(folder).read_text())
    for image in content["images"]:
        image["id"] += 99
    annotation_file(folder).write_text(json.dumps(content))


def rename_categories(folder):
    replace_in(annotation_file(folder, "instances"), '"cup"', '"mug"')


def truncate_annotations(folder):
    annotation_file(folder).write_text(annotation_file(folder).read_text()[:-5])


def write_another_json(folder):
    annotation_file(folder).write_text("[1, 2]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_images, "lists 12 images .* not in the archive"),
        (renumber_images, "lists 12 images .* not in the archive"),
        (remove_an_image, "lists 1 images .* which are not in .*val2017"),
        (rename_categories, "other categories"),
        (truncate_annotations, "cannot be read"),
        (write_another_json, "cannot be read"),
    ],
)
def test_annotations_of_other_images_are_not_touched(server, tmp_path, change, message):
    source = server.offer(*["fine"] * 30)
    download_coco(tmp_path, {"val2017": 12}, server=source)
    change(tmp_path)
    before = contents_of(tmp_path)
    with pytest.raises(ValueError, match=rf"{message}.*--folder"):
        download_coco(tmp_path, {"val2017": 1}, seed=3, server=source)
    assert contents_of(tmp_path) == before


# ---------------------------------------------------------------------------------------- archive


def test_the_size_is_announced_before_anything_is_fetched(server, tmp_path, monkeypatch):
    messages = []

    def record(message):
        messages.append((message, len(server.request_times)))

    monkeypatch.setattr(download.tqdm, "write", record)
    source = server.offer(*["fine"] * 3)
    server.stated_length = 5_000_000_000
    download_coco(tmp_path / "one", {"val2017": 10_000}, server=source)
    message, requests_before = messages[0]
    assert "6.60 GB" in message
    assert requests_before == 0

    messages.clear()
    server.answers_head = False
    download_coco(tmp_path / "two", {"val2017": 10_000}, server=source)
    assert "1.85 GB" in messages[0][0]


def test_a_cut_archive_is_continued_where_it_stopped(server, tmp_path):
    source = server.offer(*["fine"] * 3)
    server.cuts_archive = True  # without a range, only half of it arrives
    download_coco(tmp_path, {"val2017": 3}, server=source)
    assert server.requests_of("/archive.zip") == 2
    assert len(read_coco(tmp_path).images) == 3


def test_a_server_that_ignores_ranges_sends_the_archive_anew(server, tmp_path):
    source = server.offer("fine", "fine")
    server.ignores_ranges = True
    part = tmp_path / "archives" / "archive.zip.part"
    part.parent.mkdir()
    part.write_bytes(server.archive[:100])
    assert download_coco(tmp_path, {"val2017": 2}, server=source).failed.empty
    assert server.requests_of("/archive.zip") == 1
    assert (tmp_path / "archives" / "archive.zip").read_bytes() == server.archive


def test_a_complete_archive_that_was_not_checked_is_not_fetched_again(server, tmp_path):
    source = server.offer("fine", "fine")
    part = tmp_path / "archives" / "archive.zip.part"
    part.parent.mkdir()
    part.write_bytes(server.archive)
    assert download_coco(tmp_path, {"val2017": 2}, server=source).failed.empty
    assert not server.requests_of("/archive.zip")
    assert not part.exists()


def replace_with_text(archive: bytes) -> bytes:
    return b"not a zip file at all"


def damage_checksum(archive: bytes) -> bytes:
    """Change the sum of the first member in the archive's directory."""
    at = archive.index(b"PK\x01\x02") + 16
    return archive[:at] + b"\0\0\0\0" + archive[at + 4 :]


def damage_content(archive: bytes) -> bytes:
    """Overwrite the compressed bytes of the first member."""
    at = archive.index(b"captions_val2017.json") + 40
    return archive[:at] + b"\xff" * 20 + archive[at + 20 :]


@pytest.mark.parametrize("damage", [replace_with_text, damage_checksum, damage_content])
def test_a_broken_archive_is_named_and_not_kept(server, tmp_path, damage):
    source = server.offer(*["fine"] * 3)
    archive = server.archive
    server.archive = damage(archive)
    with pytest.raises(OSError, match=r"archive\.zip: .*(not an intact|damaged).*\(3 tries\)"):
        download_coco(tmp_path, {"val2017": 3}, server=source)
    server.archive = archive
    assert download_coco(tmp_path, {"val2017": 3}, server=source).failed.empty


def test_an_unknown_split_is_named(server, tmp_path):
    source = server.offer(*["fine"] * 3)
    with pytest.raises(ValueError, match="choose from the splits val2017"):
        download_coco(tmp_path, {"train2017": 3}, server=source)


# ------------------------------------------------------------------------------ inside the folder


@pytest.mark.parametrize("name", ["val2017", "annotations", "archives"])
def test_a_link_is_not_followed_out_of_the_folder(server, tmp_path, name):
    source = server.offer(*["fine"] * 3)
    folder = tmp_path / "coco"
    outside = tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match=r"leads out of the folder.*--folder"):
        download_coco(folder, {"val2017": 3}, server=source)
    assert not list(outside.iterdir())

    (folder / name).unlink()
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be a link
    assert download_coco(tmp_path / "link", {"val2017": 3}, server=source).failed.empty


@pytest.mark.parametrize(
    "name",
    ["../{number}.jpg", "/tmp/{number}.jpg", "a/{number}.jpg", "..", "C:\\{number}.jpg", ""],
)
def test_no_file_name_leads_out_of_the_folder(server, tmp_path, name):
    source = server.offer(*["fine"] * 3, name=name)
    with pytest.raises(ValueError, match="no plain file name"):
        download_coco(tmp_path / "coco", {"val2017": 3}, server=source)
    assert {path.name for path in tmp_path.iterdir()} == {"coco"}
    assert {path.name for path in (tmp_path / "coco").iterdir()} == {"archives"}


def test_a_relative_folder_starts_at_the_home(server, tmp_path):
    source = server.offer("fine")
    download_coco("some/coco", {"val2017": 1}, server=source, home=tmp_path)
    assert len(read_coco(tmp_path / "some" / "coco").images) == 1


# ------------------------------------------------------------------------------------ the command


def test_the_command_reports_what_it_did(server, tmp_path, capsys):
    source = server.offer("fine", "fine", "absent", "fine")
    folder = tmp_path / "coco"

    def run(images: int, archive: str) -> int:
        options = ["--split", "val2017", "--images", str(images), "--folder", str(folder)]
        return main(["download", "coco", *options, "--archive", archive])

    assert run(4, source.archive) == 1
    output = capsys.readouterr()
    assert "3 images" in output.out
    assert "404" in output.err
    assert run(5000, source.archive) == 1
    assert "3 images of val2017" in capsys.readouterr().out  # on disk, not asked for
    shutil.rmtree(folder)
    assert run(5000, f"{server.url}/images/0/absent.jpg") == 2
    assert "404" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "-1"], "-1 images of val2017 are asked for: take 1 or more"),
        (["--images", "0"], "0 images"),
        (["--images", "1", "--train", "-2"], "-2 images of train2017"),
        (["--split", "train2017", "--images", "5", "--train", "2"], "say --images alone"),
        (["--split", "../val2017"], "leads out of the folder"),
    ],
)
def test_numbers_without_a_meaning_are_refused(server, tmp_path, capsys, options, message):
    source = server.offer("fine")
    place = ["--folder", str(tmp_path / "coco"), "--archive", source.archive]
    assert main(["download", "coco", *options, *place]) == 2
    assert message in capsys.readouterr().err
    assert not server.request_times
