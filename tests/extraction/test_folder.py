"""Folders of activations on this machine, in a memory file system, and in an object store."""

from __future__ import annotations

import pickle
import uuid

import pytest

from probekit.extraction.folder import ActivationFolder, open_folder
from probekit.paths import Home


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path) -> str:
    unique = uuid.uuid4().hex
    if request.param == "local":
        return str(tmp_path / "activations" / "model" / unique)
    if request.param == "memory":
        return f"memory://activations/model/{unique}"
    return f"{request.getfixturevalue('object_store')}/activations/model/{unique}"


def write_text(folder: ActivationFolder, name: str, text: str) -> None:
    folder.write(name, lambda file: file.write_text(text))


@pytest.mark.slow
def test_what_is_written_is_read_back_and_listed(url, tmp_path):
    folder = ActivationFolder(url, cache=tmp_path / "cache")
    assert folder.list_files() == set()
    assert folder.read_meta() is None
    write_text(folder, "shards-1/shard-00000.safetensors", "numbers")
    folder.write_meta({"model": "model"})
    assert folder.list_files() == {"meta.json", "shards-1/shard-00000.safetensors"}
    assert folder.local_copy("shards-1/shard-00000.safetensors").read_text() == "numbers"
    assert folder.read_meta()["model"] == "model"
    assert folder.exists("meta.json")
    assert not folder.exists("plan.json")
    assert folder.model_name == "model"


def test_a_write_that_fails_leaves_nothing(url, tmp_path):
    folder = ActivationFolder(url, cache=tmp_path / "cache")

    def fail(file):
        file.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        folder.write("shards-1/shard-00000.safetensors", fail)
    assert folder.list_files() == set()


def test_two_processes_may_write_the_same_file_at_once(url, tmp_path):
    folder = ActivationFolder(url, cache=tmp_path / "cache")
    name = "shards-1/shard-00000.safetensors"

    def fill_while_another_finishes(file):
        file.write_text("numbers")
        write_text(folder, name, "numbers")

    folder.write(name, fill_while_another_finishes)
    assert folder.list_files() == {name}
    assert folder.read_bytes(name) == b"numbers"
    if folder.is_local:
        assert not list(folder.path.rglob("*.part"))


def test_a_file_behind_a_url_travels_once_and_anew_after_it_was_replaced(url, tmp_path):
    folder = ActivationFolder(url, cache=tmp_path / "cache")
    name = "shards-1/shard-00000.safetensors"
    write_text(folder, name, "first")
    assert folder.local_copy(name).read_text() == "first"
    if not folder.is_local:
        other = ActivationFolder(url, cache=tmp_path / "other")
        write_text(other, name, "second")
        assert folder.local_copy(name).read_text() == "first"
        folder.forget_copy(name)
        assert folder.local_copy(name).read_text() == "second"
    write_text(folder, name, "third")
    assert folder.local_copy(name).read_text() == "third"
    folder.remove(name)
    folder.remove(name)
    assert not folder.exists(name)


def test_a_folder_can_be_sent_to_another_process(url, tmp_path):
    folder = ActivationFolder(url, cache=tmp_path / "cache")
    write_text(folder, "a/b", "text")
    copy = pickle.loads(pickle.dumps(folder))
    assert copy == folder
    assert copy.read_bytes("a/b") == b"text"


def test_relative_folders_start_at_the_home(tmp_path):
    folder = open_folder("data/activations/model/settings", Home.find(tmp_path))
    assert folder.path == tmp_path / "data" / "activations" / "model" / "settings"


@pytest.mark.parametrize("url", ["gs://nowhere/x/y", "quatsch://x/y/z"])
def test_a_url_that_cannot_be_opened_says_what_to_check(url, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be opened .*install its protocol's package"):
        ActivationFolder(url, cache=tmp_path)
