"""The download against a server that fails, stalls, drips, truncates, lies and answers 404."""

import gzip
import io
import json
import shutil
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from probekit.cli.main import main
from probekit.data import coco, download
from probekit.data.download import Server
from probekit.images import unreadable_images

SIZE = (40, 30)


def jpeg(number: int, size=SIZE) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


class Bad(BaseHTTPRequestHandler):
    """``/images/<number>/<how>.jpg`` answers as `how` says; counts what is asked for."""

    def do_GET(self):
        server, path = self.server, self.path.strip("/").split("/")
        server.asked[self.path] += 1
        if path[0] == "archive.zip":
            return self.archive()
        number, how, times = int(path[1]), path[2].removesuffix(".jpg"), server.asked[self.path]
        body = jpeg(number, (50, 50) if how == "wrong" else SIZE)
        if how == "absent":
            return self.send_error(404)
        if how == "fails" and times < 3:
            return self.send_error(503)
        if how == "stalls" and times < 2:
            time.sleep(1.5)
        if how == "noise":
            body = b"<html>not an image</html>"
        self.send_response(200)
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if how == "truncates" and times < 3:
            body = body[: len(body) // 2]
        if how == "drips":
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.1)
        self.wfile.write(body)
        return None

    def do_HEAD(self):
        self.send_response(200)
        if self.path == "/archive.zip":
            self.send_header("Content-Length", str(self.server.told or len(self.server.archive)))
        self.end_headers()

    def archive(self):
        body, start = self.server.archive, 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:] if asked or not self.server.cut else body[: len(body) // 2])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), Bad)
    http.asked, http.cut, http.told = Counter(), False, None
    http.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.shutdown()


def put(server, hows, name="{number:012d}.jpg", split="val2017"):
    """An archive of annotations with an image for each of `hows`, two captions and a box each."""
    images = [{"id": k, "file_name": name.format(number=k), "width": SIZE[0], "height": SIZE[1],
               "coco_url": f"{server.url}/images/{k}/{how}.jpg"} for k, how in enumerate(hows)]
    captions = [{"id": k, "image_id": k // 2, "caption": "a cup"} for k in range(2 * len(hows))]
    boxes = [{"id": k, "image_id": k, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
             for k in range(len(hows))]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for kind, rows, extra in (("captions", captions, {}), ("instances", boxes, {"categories": [
                {"id": 1, "name": "cup", "supercategory": "thing"}]})):
            text = json.dumps({"images": images, "annotations": rows} | extra)
            archive.writestr(f"annotations/{kind}_{split}.json", text)
        archive.writestr("../../escaped.json", "{}")
    server.archive = buffer.getvalue()
    return Server(f"{server.url}/archive.zip", workers=4, timeout=0.5, tries=3, pause=0.01)


def test_what_can_be_had_is_had_and_the_rest_is_named(server, tmp_path):
    hows = ["ok", "fails", "stalls", "truncates", "absent", "wrong", "noise", "ok", "drips"]
    lost = download.download_coco(tmp_path / "coco", {"val2017": 9}, server=put(server, hows))
    reasons = lost.set_index("image_id").reason
    assert set(reasons.index) == {4, 5, 6, 8}
    assert "404" in reasons[4] and "50 x 50 pixels" in reasons[5] and "cannot be read" in reasons[6]
    assert "within 5 seconds" in reasons[8]
    assert server.asked["/images/4/absent.jpg"] == 1 and server.asked["/images/3/truncates.jpg"] == 3
    data = coco.read_coco(tmp_path / "coco")
    assert set(data.images.index) == {0, 1, 2, 3, 7} and len(data.captions) == 10 and len(data.instances) == 5
    assert not len(unreadable_images(data.images))
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("escaped*"))
    assert {path.name for path in tmp_path.iterdir()} == {"coco"}


def test_a_second_call_fetches_what_is_missing_or_damaged_alone(server, tmp_path):
    source = put(server, ["ok"] * 30)
    download.download_coco(tmp_path, {"val2017": 12}, server=source)
    first = set(coco.read_coco(tmp_path).images.index)
    damaged = sorted((tmp_path / "val2017").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:200])
    server.asked.clear()
    download.download_coco(tmp_path, {"val2017": 20}, server=source)
    assert sum(server.asked.values()) == 8 + 1 and not server.asked["/archive.zip"]
    more = coco.read_coco(tmp_path).images
    assert first < set(more.index) and len(more) == 20 and not len(unreadable_images(more))
    told = download._of_archive(tmp_path / "archives" / "archive.zip", "val2017")["captions"]
    assert download._sampled(told, 12, seed=0) == first != download._sampled(told, 12, seed=1)


def test_a_sound_image_of_another_size_is_fetched_again(server, tmp_path):
    source = put(server, ["ok"] * 3)
    (tmp_path / "val2017").mkdir()
    wrong = tmp_path / "val2017" / f"{1:012d}.jpg"
    wrong.write_bytes(jpeg(1, (50, 50)))
    assert not len(download.download_coco(tmp_path, {"val2017": 3}, server=source))
    assert wrong.read_bytes() == jpeg(1) and server.asked["/images/1/ok.jpg"] == 1


def notes(folder, kind="captions"):
    return folder / "annotations" / f"{kind}_val2017.json"


def test_annotations_that_are_there_only_grow(server, tmp_path):
    source = put(server, ["ok"] * 30)
    download.download_coco(tmp_path, {"val2017": 20}, server=source)
    for kind in ("captions", "instances"):  # a user's corrections
        notes(tmp_path, kind).write_text(notes(tmp_path, kind).read_text().replace("a cup", "two cups")
                                         .replace("[1, 1, 9, 9]", "[2, 2, 5, 5]"))
    before = coco.read_coco(tmp_path)
    lost = download.download_coco(tmp_path, {"val2017": 5}, server=source)
    assert lost.attrs["there"] == {"val2017": 20} and notes(tmp_path).read_text().count("two cups") == 40
    lost = download.download_coco(tmp_path, {"val2017": 20}, seed=1, server=source)
    data = coco.read_coco(tmp_path)
    assert lost.attrs["there"] == {"val2017": len(data.images)} and 20 < len(data.images) <= 30
    assert set(before.images.index) < set(data.images.index) and not len(unreadable_images(data.images))
    assert set(data.instances.image_id) == set(data.images.index) and len(data.instances) == len(data.images)
    for now, then in ((data.captions, before.captions), (data.instances, before.instances)):  # as they were corrected
        assert now[: len(then)].equals(then) and len(now) * 20 == len(then) * len(data.images)


def test_a_file_of_one_kind_alone_is_completed(server, tmp_path):
    source = put(server, ["ok"] * 10)
    download.download_coco(tmp_path, {"val2017": 6}, server=source)
    notes(tmp_path, "instances").unlink()
    download.download_coco(tmp_path, {"val2017": 2}, server=source)
    data = coco.read_coco(tmp_path)
    assert len(data.images) == 6 and set(data.instances.image_id) == set(data.images.index)


def emptied(folder):
    next(iter(sorted((folder / "val2017").iterdir()))).unlink()


def other_names(folder):
    notes(folder).write_text(notes(folder).read_text().replace(".jpg", ".png"))


def other_ids(folder):
    content = json.loads(notes(folder).read_text())
    notes(folder).write_text(json.dumps(content | {"images": [i | {"id": i["id"] + 99} for i in content["images"]]}))


def other_categories(folder):
    notes(folder, "instances").write_text(notes(folder, "instances").read_text().replace('"cup"', '"mug"'))


def cut(folder):
    notes(folder).write_text(notes(folder).read_text()[:-5])


def listed(folder):
    notes(folder).write_text("[1, 2]")


@pytest.mark.parametrize(("change", "told"), [
    (other_names, "lists 12 images .* not in the archive"), (other_ids, "lists 12 images .* not in the archive"),
    (emptied, "lists 1 images .* which are not in .*val2017"), (other_categories, "other categories"),
    (cut, "cannot be read"), (listed, "cannot be read")])
def test_annotations_of_other_images_are_not_touched(server, tmp_path, change, told):
    source = put(server, ["ok"] * 30)
    download.download_coco(tmp_path, {"val2017": 12}, server=source)
    change(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"{told}.*--folder"):
        download.download_coco(tmp_path, {"val2017": 1}, seed=3, server=source)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["val2017", "annotations", "archives"])
def test_a_link_is_not_followed_out_of_the_folder(server, tmp_path, name):
    source = put(server, ["ok"] * 3)
    folder, outside = tmp_path / "coco", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match=r"leads out of the folder.*--folder"):
        download.download_coco(folder, {"val2017": 3}, server=source)
    assert not list(outside.iterdir())
    (folder / name).unlink()
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    assert not len(download.download_coco(tmp_path / "link", {"val2017": 3}, server=source))


def test_how_much_it_is_is_said_before_anything_is_fetched(server, tmp_path, monkeypatch):
    source, said = put(server, ["ok"] * 3), []
    monkeypatch.setattr(download.tqdm, "write", lambda text: said.append((text, sum(server.asked.values()))))
    server.told = 5_000_000_000
    download.download_coco(tmp_path / "one", {"val2017": 10_000}, server=source)
    assert "6.60 GB" in said[0][0] and said[0][1] == 0
    monkeypatch.setattr(Bad, "do_HEAD", lambda self: self.send_error(501))
    said.clear()
    download.download_coco(tmp_path / "two", {"val2017": 10_000}, server=source)
    assert "1.85 GB" in said[0][0]


def test_a_cut_archive_goes_on_where_it_stopped(server, tmp_path):
    source = put(server, ["ok"] * 3)
    server.cut = True  # without a range only half of it comes
    download.download_coco(tmp_path, {"val2017": 3}, server=source)
    assert server.asked["/archive.zip"] == 2 and len(coco.read_coco(tmp_path).images) == 3


def test_a_broken_archive_and_an_unknown_split_are_named(server, tmp_path):
    source = put(server, ["ok"] * 3)
    whole, server.archive = server.archive, b"not a zip file at all"
    with pytest.raises(OSError, match="not a zip file"):
        download.download_coco(tmp_path, {"val2017": 3}, server=source)
    server.archive = whole  # nothing of the broken one is kept
    with pytest.raises(ValueError, match="take splits out of val2017"):
        download.download_coco(tmp_path, {"train2017": 3}, server=source)


NAMES = ["../{number}.jpg", "/tmp/{number}.jpg", "a/{number}.jpg", "..", "C:\\{number}.jpg", ""]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_folder(server, tmp_path, name):
    source = put(server, ["ok"] * 3, name)
    with pytest.raises(ValueError, match="no plain file name"):
        download.download_coco(tmp_path / "coco", {"val2017": 3}, server=source)
    assert {path.name for path in tmp_path.iterdir()} == {"coco"}
    assert {path.name for path in (tmp_path / "coco").iterdir()} == {"archives"}


def test_an_address_that_is_no_web_address_is_not_opened(server, tmp_path):
    source = put(server, ["ok"])
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(0))
    server.archive = server.archive.replace(b"http://127.0.0.1", b"file:///12.0.0.1")  # as long, for the zip's sums
    with pytest.raises(OSError, match="is no web address"):
        download._get(f"file://{secret}", source)


def test_the_command_says_what_it_did(server, tmp_path, capsys):
    source = put(server, ["ok", "ok", "absent", "ok"])
    command = ["download", "coco", "--split", "val2017", "--images", "4", "--folder", str(tmp_path / "coco"),
               "--archive", source.archive]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "3 images" in told.out and "404" in told.err
    command[command.index("4")] = "5000"
    assert main(command) == 1 and "3 images of val2017" in capsys.readouterr().out  # what is there, not what was asked
    shutil.rmtree(tmp_path / "coco")
    server.archive = b""
    assert main([*command[:-1], f"{server.url}/images/0/absent.jpg"]) == 2
    assert "404" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "told"), [
    (["--images", "-1"], "-1 images of val2017 are asked for: take 1 or more"), (["--images", "0"], "0 images"),
    (["--images", "1", "--train", "-2"], "-2 images of train2017"),
    (["--split", "train2017", "--images", "5", "--train", "2"], "say --images alone"),
    (["--split", "../val2017"], "leads out of the folder")])
def test_numbers_that_mean_nothing_are_refused(server, tmp_path, capsys, options, told):
    source = put(server, ["ok"])
    assert main(["download", "coco", *options, "--folder", str(tmp_path / "coco"), "--archive", source.archive]) == 2
    assert told in capsys.readouterr().err and not server.asked


def test_an_archive_that_was_fetched_but_not_yet_looked_through_is_not_asked_for_again(server, tmp_path):
    source = put(server, ["ok"] * 2)
    part = tmp_path / "archives" / "archive.zip.part"
    part.parent.mkdir()
    part.write_bytes(server.archive)
    assert not len(download.download_coco(tmp_path, {"val2017": 2}, server=source))
    assert server.asked["/archive.zip"] == 0 and not part.exists()
