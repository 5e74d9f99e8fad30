"""Claims on a folder that several workers share, and mirrors of it."""

import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from probekit.extraction import shared
from probekit.extraction.shared import Shared


@pytest.fixture
def path(tmp_path):
    return tmp_path / "part-1" / "shard-00000.safetensors"


def given(folder, path, url=None, n=16) -> list[Shared]:
    """Those of n workers that ask at once who are given a claim."""
    workers = [Shared(folder, url) for _ in range(n)]
    with ThreadPoolExecutor(n) as pool:
        return [one for one, has in zip(workers, pool.map(lambda worker: worker.claim(path), workers), strict=True)
                if has]


def test_one_of_many_is_given_a_claim_until_it_gives_it_up(tmp_path, path):
    first = Shared(tmp_path)
    assert first.claim(path) and not given(tmp_path, path)
    first.finished(path)
    for _ in range(20):
        assert not list(tmp_path.rglob("*claim*"))
        winner, = given(tmp_path, path)
        winner.finished(path)
    winner, = given(tmp_path, path)
    for number in range(20):
        winner.give_up(path)
        winner, = given(tmp_path, path)
        assert len(list(tmp_path.rglob("*claim*"))) == number + 2  # no number comes twice before it is finished


def test_a_claim_whose_process_is_gone_is_taken_over_by_one(tmp_path, path):
    code = ("import sys; from pathlib import Path; from probekit.shared import Shared;"
            "assert Shared(Path(sys.argv[1])).claim(Path(sys.argv[2])); print('has it', flush=True); sys.stdin.read()")
    owner = subprocess.Popen([sys.executable, "-c", code, tmp_path, path], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    owner.stdout.readline()
    assert not given(tmp_path, path)
    owner.kill()  # not yet waited for: a zombie
    time.sleep(0.2)
    winner, = given(tmp_path, path)
    owner.wait()
    second = Shared(tmp_path)
    assert not second.claim(path)  # this process lives
    assert sorted(p.name[-1] for p in tmp_path.rglob("*claim*")) == ["0", "1"]
    winner.finished(path)
    assert not list(tmp_path.rglob("*claim*"))


def test_a_claim_of_another_machine_is_taken_over_when_it_stands_still(tmp_path, path, monkeypatch):
    monkeypatch.setattr(shared, "ABANDONED", 0.3)
    path.parent.mkdir()
    claim = path.with_name(path.name + ".claim-0")

    def sign(beat):
        claim.write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "started": 0, "beat": beat}))

    mine = Shared(tmp_path)
    for beat in range(4):
        sign(beat)
        assert not mine.claim(path)
        time.sleep(0.2)
    time.sleep(0.2)
    assert mine.claim(path)
    mine.finished(path)
    assert not claim.exists()


@pytest.mark.parametrize("sign", ["", '{"host": "elsewhere", "pid": 1, "started": 0, "beat": 7}'])
def test_who_waits_takes_a_claim_over_whose_owner_died_unseen(tmp_path, path, monkeypatch, sign):
    monkeypatch.setattr(shared, "ABANDONED", 0.3)
    path.parent.mkdir()
    path.with_name(path.name + ".claim-0").write_text(sign)  # empty: killed between creating and writing it
    start = time.monotonic()
    while not Shared(tmp_path).claim(path):  # each try may be another worker's
        assert time.monotonic() - start < 5
        time.sleep(0.05)
    assert time.monotonic() - start > 0.3


def test_a_claim_gives_signs_of_life(tmp_path, path, monkeypatch):
    monkeypatch.setattr(shared, "BEAT", 0.05)
    own = Shared(tmp_path)
    assert own.claim(path)
    claim = path.with_name(path.name + ".claim-0")
    seen = set()
    for _ in range(20):
        seen.add(claim.read_text())
        time.sleep(0.05)
    own.finished(path)
    time.sleep(0.2)
    assert len(seen - {""}) > 5 and not claim.exists()


@pytest.fixture
def bucket(monkeypatch):
    """An S3 server on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_DEFAULT_REGION", "us-east-1"),
                        ("AWS_ENDPOINT_URL", f"http://{host}:{port}")):
        monkeypatch.setenv(name, value)
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    name = uuid.uuid4().hex
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}/activations"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_an_object_store_gives_a_claim_to_one(tmp_path, path, bucket):
    first = Shared(tmp_path, bucket)
    assert first.claim(path) and not given(tmp_path, path, bucket)
    first.give_up(path)
    winner, = given(tmp_path, path, bucket, 8)
    winner.finished(path)
    assert not winner._claims(path) and not list(tmp_path.iterdir())
    winner.check()


def test_a_store_with_other_errors_for_what_is_there_leaves_it_there(tmp_path, path, monkeypatch):
    first, second = Shared(tmp_path), Shared(tmp_path)
    honest = second.fs.open
    assert first.claim(path)
    claim = path.with_name(path.name + ".claim-0")
    monkeypatch.setattr(second, "_claims", lambda path: [])  # seen before the first one had it

    def refused(name, mode):
        try:
            return honest(name, mode)
        except FileExistsError:
            raise OSError("412 precondition failed") from None

    monkeypatch.setattr(second.fs, "open", refused)
    before = claim.read_bytes()
    assert not second.claim(path) and claim.read_bytes() == before

    def full(name, mode):
        file = honest(name, mode)
        if mode == "xb":
            file.close()
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(second.fs, "open", full)
    first.finished(path)
    with pytest.raises(OSError, match="make room and run this again"):
        second.claim(path)
    assert not claim.exists()


@pytest.mark.parametrize("kind", ["s3", "folder"])
def test_two_machines_without_a_common_disk_share_their_work(kind, request, tmp_path, examples, monkeypatch):
    from probekit import paths
    from probekit.extraction import extract, worker
    from probekit.extraction.extract import ExtractionSettings
    from probekit.extraction.launch import Launch

    url = request.getfixturevalue("bucket") if kind == "s3" else str(tmp_path / "common")
    settings, launch, made = ExtractionSettings("tiny-qwen2-vl", shard_images=12, batch_tokens=900), Launch(url=url), []

    def watched(part, i, *rest, honest=worker.finish_shard):
        made.append((paths.Home.find().data.name, i))
        return honest(part, i, *rest)

    monkeypatch.setattr(worker, "finish_shard", watched)
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path / "one"))
    job, _ = extract.plan(settings, examples, (), "cpu", url)
    first = worker.Worker(job)
    assert first([3, 1]) == [3, 1] and job.missing() == [0, 2, 4]
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path / "two"))
    two = extract.extract_all(settings, examples, (), "cpu", launch)[0]
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path / "one"))
    one = extract.extract_all(settings, examples, (), "cpu", launch)[0]
    assert made == [("one", 3), ("one", 1), ("two", 0), ("two", 2), ("two", 4)]
    files = [sorted(store.folder.glob("part-*/shard-*.safetensors")) for store in (one, two)]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]] and len(files[0]) == 5
    assert one.meta["sharing"] == two.meta["sharing"] and one.meta["sharing"]["way"] == "shared"


@pytest.mark.parametrize("url", ["gs://nowhere/x", "quatsch://x"])
def test_a_mirror_that_cannot_be_used_says_what_to_check(url, data, examples):
    from probekit.extraction import extract

    with pytest.raises(ValueError, match=r"cannot be used .*check address and credentials, .*package is installed"):
        extract.plan(extract.ExtractionSettings("tiny-qwen2-vl"), examples, (), "cpu", url)


def test_a_mirror_that_lets_two_create_a_file_is_refused(tmp_path, monkeypatch):
    own = Shared(tmp_path, f"file://{tmp_path}/common")
    own.check()
    assert not list((tmp_path / "common").iterdir())
    honest = own.fs.open
    monkeypatch.setattr(own.fs, "open", lambda path, mode: honest(path, mode.replace("x", "w")))
    with pytest.raises(ValueError, match="take another mirror"):
        own.check()


def test_a_damaged_shard_in_a_mirror_is_named(tmp_path, data, examples, monkeypatch):
    from probekit.extraction import extract
    from probekit.extraction.launch import Launch

    settings, launch = extract.ExtractionSettings("tiny-qwen2-vl", shard_images=30), Launch(url=f"file://{tmp_path}/common")
    extract.extract_all(settings, examples, (), "cpu", launch)
    shard = next((tmp_path / "common").rglob("shard-00001.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-99] ^= 1
    shard.write_bytes(content)
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"shard-00001.safetensors lm.\d+/mean is not what was written: delete it"):
        extract.extract_all(settings, examples, (), "cpu", launch)
    shard.unlink()
    extract.extract_all(settings, examples, (), "cpu", launch)


def test_what_was_extracted_before_there_was_a_mirror_is_brought_there(tmp_path, examples, monkeypatch):
    from probekit.extraction import extract
    from probekit.extraction.extract import ExtractionSettings
    from probekit.extraction.launch import Launch

    settings, url = ExtractionSettings("tiny-qwen2-vl", shard_images=12), f"file://{tmp_path}/common"
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path / "one"))
    extract.extract(settings, examples, "cpu")
    extract.extract_all(settings, examples, (), "cpu", Launch(url=url))
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path / "two"))
    monkeypatch.setattr("probekit.extraction.worker.load_vlm", lambda *a, **k: pytest.fail("loaded"))
    extract.extract_all(settings, examples, (), "cpu", Launch(url=url))
