"""What parameters may be, through the calls of the front door."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import probekit as pk
from probekit.extraction.settings import ExtractionSettings
from probekit.models.presets import short_name
from probekit.parameters import PARAMETERS, Remark, read_settings
from probekit.probes.probing import ProbeSettings
from probekit.tasks.base import BuildSettings
from probekit.workflow import check_models, probe_settings, results_folder


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../out", "a/b", "/tmp/out", "a\\b", " a", "ä" * 99]
)
def test_a_run_is_named_like_one_folder(data, name):
    for call in (
        lambda: pk.build_examples("scenes", run=name),
        lambda: pk.open_run(name),
        lambda: results_folder(name),
    ):
        with pytest.raises(ValueError, match=r"^run=.*names one folder"):
            call()
    assert not list(data.parent.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": 0}, "train=0: expected int from 1"),
        ({"validation": -1}, "validation=-1: expected int from 1"),
        ({"test": 2.5}, "test=2.5: expected int from 1"),
        ({"train": True}, "train=True: expected int from 1"),
        ({"train": "12"}, "train='12': expected int from 1"),
        ({"max_bad": 5}, "0.05 for 5 percent"),
        ({"max_bad": float("nan")}, "max_bad=nan: expected float from 0 to 1"),
        ({"categories": (True, "dog")}, 'write "no" in quotes'),
        ({"tasks": ["caption", ""]}, "'', expected list of str that are not empty"),
        ({"trian": 5}, "did you mean 'train'"),
    ],
)
def test_a_build_refuses_what_makes_no_sense_before_it_draws(data, settings, message):
    with pytest.raises(ValueError, match=message):
        pk.build_examples("scenes", **settings)
    assert not data.exists()


def test_an_empty_dataset_is_no_folder(data):
    with pytest.raises(ValueError, match="dataset='': expected str"):
        pk.build_examples("")


def test_extraction_and_probes_read_what_is_meant_and_refuse_the_rest(examples, data):
    with pytest.raises(ValueError, match="longest_side=0: expected int from 1, or null"):
        pk.extract("tiny-qwen2-vl", examples, longest_side=0)
    with pytest.raises(ValueError, match="untrained='yes': expected bool"):
        pk.extract("tiny-qwen2-vl", examples, untrained="yes")
    with pytest.raises(ValueError, match=r"there is no setting 'pooling'.*did you mean 'poolings'"):
        pk.extract("tiny-qwen2-vl", examples, pooling=["mean"])
    with pytest.raises(ValueError, match="epochs=0: expected int from 1"):
        probe_settings({}, epochs=0)
    with pytest.warns(Remark, match="seeds=3 is read as a list of one") as caught:
        assert probe_settings({"seeds": 3}).seeds == (3,)
    assert caught[0].filename == __file__


def test_what_is_right_is_taken_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = read_settings(
            ProbeSettings, {"seeds": np.arange(2), "strengths": [1, 0.5], "memory_gb": 2}
        )
        assert values == {"seeds": (0, 1), "strengths": (1, 0.5), "memory_gb": 2}
        assert read_settings(BuildSettings, {"categories": "all"}) == {"categories": "all"}


@pytest.mark.parametrize("settings_class", [BuildSettings, ExtractionSettings, ProbeSettings])
def test_every_setting_is_in_the_table_and_its_default_is_allowed(settings_class):
    positional = {"folder": "x"} if settings_class is BuildSettings else {"model": "x"}
    settings = settings_class(**({} if settings_class is ProbeSettings else positional))
    names = set(vars(settings)) - set(positional) - {"training"}
    assert names <= set(PARAMETERS)
    values = {name: getattr(settings, name) for name in names}
    assert read_settings(settings_class, values) == values


def test_models_of_a_run_are_named_once_and_untrained_ones_are_among_them(data):
    both = ("tiny-qwen2-vl", "tiny-fast-vlm")
    assert check_models(list(both), ["tiny-qwen2-vl"]) == (both, ("tiny-qwen2-vl",))
    with pytest.raises(ValueError, match="name at least one"):
        check_models([], [])
    with pytest.raises(ValueError, match="tiny-fast-vlm is no model of this run"):
        check_models(["tiny-qwen2-vl"], ["tiny-fast-vlm"])
    with pytest.raises(ValueError, match="both called llava in tables"):
        check_models(["one/llava", "another/llava"], [])
    with pytest.raises(ValueError, match="both called Qwen2-VL-2B-Instruct in tables"):
        check_models(["qwen2-vl-2b", "qwen2-vl-2b"], [])
    revisions = ("qwen2-vl-2b", "qwen2-vl-2b@main")
    assert check_models(list(revisions), []) == (revisions, ())


def test_checkpoints_of_one_name_are_refused_or_get_longer_names(tmp_path):
    folders = {}
    for name in ("a/final", "b/final", "a/checkpoint-500", "b/checkpoint-500"):
        folders[name] = tmp_path / name
        folders[name].mkdir(parents=True)
        (folders[name] / "config.json").touch()
    assert short_name(str(folders["a/checkpoint-500"])) == "a-checkpoint-500"
    check_models([str(folder) for name, folder in folders.items() if name != "b/final"], [])
    with pytest.raises(ValueError, match=r"a/final and .*b/final are both called final"):
        check_models([str(folders["a/final"]), str(folders["b/final"])], [])
