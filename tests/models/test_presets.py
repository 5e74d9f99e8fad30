"""Names of checkpoints, and where they are found."""

from __future__ import annotations

import shutil

import pytest

from probekit import paths
from probekit.models.presets import locate, pinned_revision, resolve_commit, short_name


def test_a_hub_id_stays_one():
    assert locate("qwen2-vl-2b") == "Qwen/Qwen2-VL-2B-Instruct"
    assert locate("org/model") == "org/model"


def test_a_revision_stands_behind_an_id():
    assert locate("org/model@abc") == "org/model"
    assert pinned_revision("org/model@abc") == "abc"
    assert locate("qwen2-vl-2b@main") == "Qwen/Qwen2-VL-2B-Instruct"
    assert pinned_revision("qwen2-vl-2b@main") == "main"
    assert pinned_revision("qwen2-vl-2b@main", "other") == "other"
    assert len(pinned_revision("qwen2-vl-2b")) == 40
    assert short_name("org/model@refs/pr/1") == "model@refs-pr-1"
    assert short_name("org/model") == "model"


def test_a_folder_may_have_an_at_sign_in_its_name(tmp_path):
    folder = tmp_path / "a@b"
    folder.mkdir()
    (folder / "config.json").touch()
    assert locate(str(folder)) == str(folder)
    assert pinned_revision(str(folder)) is None
    assert short_name(str(folder)) == "a@b"


def test_demo_models_are_found_from_any_home(tmp_path, data):
    in_checkout = paths.CHECKOUT / "data" / "models" / "tiny-qwen2-vl"
    assert locate("tiny-qwen2-vl") == str(in_checkout)
    assert locate("tiny-qwen2-vl", home=tmp_path / "elsewhere") == str(in_checkout)
    assert resolve_commit("tiny-qwen2-vl") is None
    with pytest.raises(FileNotFoundError, match="is not a checkpoint folder"):
        locate("data/models/tiny-qwen2-vl")  # a folder that is not a preset starts at the home


def test_the_homes_own_copy_of_a_demo_model_goes_first(tmp_path, data):
    copy = data / "models" / "tiny-qwen2-vl"
    shutil.copytree(paths.CHECKOUT / "data" / "models" / "tiny-qwen2-vl", copy)
    assert locate("tiny-qwen2-vl") == str(copy)
    assert locate("data/models/tiny-qwen2-vl") == str(copy)
    assert locate("tiny-qwen2-vl", home=tmp_path / "elsewhere") != str(copy)


def test_a_name_that_is_unknown_gets_a_suggestion():
    with pytest.raises(FileNotFoundError, match=r"did you mean tiny-qwen2-vl\? .*hub id"):
        locate("tiny-qwen-vl")


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        locate(str(tmp_path))
