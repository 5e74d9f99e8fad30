"""Names of checkpoints, and where they are found."""

from __future__ import annotations

import shutil

import pytest

from probekit import paths
from probekit.models.checkpoints import resolve_commit
from probekit.models.presets import locate, pinned_revision, short_name


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


@pytest.mark.parametrize(
    "page, revision",
    [
        ("https://huggingface.co/org/model", None),
        ("https://hf.co/org/model/", None),
        ("https://huggingface.co/org/model/tree/refs/pr/1", "refs/pr/1"),
    ],
)
def test_a_page_of_the_hub_names_a_checkpoint(page, revision):
    assert locate(page) == "org/model"
    assert pinned_revision(page) == revision


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


@pytest.mark.parametrize("name", ["gpt2", "clip", "llama", "bert"])
def test_a_name_like_no_other_is_refused(name):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint with the name {name}.*hub id"):
        locate(name)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_type_is_not_a_checkpoint(name):
    with pytest.raises(FileNotFoundError, match=rf"{name} is a type of models.*owner/name"):
        locate(name)


def test_a_folder_of_checkpoints_names_those_inside(tmp_path):
    for name in ("checkpoint-500", "checkpoint-900"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"did you mean .*checkpoint-500 or .*point-900\?"):
        locate(str(tmp_path))
