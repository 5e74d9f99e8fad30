import gc
import json
import signal
import subprocess
import sys
import time
import weakref
from itertools import pairwise

import numpy as np
import pytest
from conftest import REPOSITORY

from probekit import extract, forward, store
from probekit.extract import Extraction


def test_shards_keep_images_together(examples):
    bounds = extract.shard_bounds(examples, 25)
    assert bounds[0] == 0 and bounds[-1] == len(examples) and len(bounds) == 4
    images = [set(examples.image_id.iloc[a:b]) for a, b in pairwise(bounds)]
    assert [len(s) for s in images] == [25, 25, 10] and len(set.union(*images)) == 60


def test_extraction_is_read_back_layer_by_layer(data, examples):
    settings = Extraction("tiny-qwen2-vl", poolings=("mean", "last"), shard_images=25)
    done = extract.extract(settings, examples, "cpu")
    assert done["lm.03", "last"].shape == (len(examples), done.meta["width"])
    assert done.meta["n"] == len(examples) and done.meta["layers"][0] == "lm.00"
    assert "{prompt}" in done.meta["prompt"] and done.meta["versions"]["torch"]
    with pytest.raises(KeyError, match=r"layer lm\.30 is not stored: this run has lm\.00"):
        done["lm.30", "mean"]
    with pytest.raises(KeyError, match="pooling max is not stored"):
        done["lm.00", "max"]


def test_settings_examples_and_weights_name_the_folder(data, examples):
    base = Extraction("tiny-qwen2-vl")
    others = [Extraction("tiny-qwen2-vl", poolings=("last",)), Extraction("tiny-qwen2-vl", longest_side=64),
              Extraction("tiny-qwen2-vl", untrained=True), Extraction("tiny-fast-vlm")]
    folders = {extract.folder_of(s, examples) for s in (base, base, *others)}
    assert len(folders) == 5
    assert extract.folder_of(Extraction("tiny-qwen2-vl", batch_tokens=99), examples) in folders
    assert extract.folder_of(base, examples.head(20)) not in folders


def test_a_damaged_shard_is_seen_and_made_again(data, examples):
    settings = Extraction("tiny-qwen2-vl", shard_images=25)
    done = extract.extract(settings, examples, "cpu")
    before, path = done["lm.05", "mean"], store.shard_path(done.folder, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileNotFoundError, match="1 of 3 shards"):
        store.Store(done.folder)
    again = extract.extract(settings, examples, "cpu")
    assert path.read_bytes() == whole and np.array_equal(again["lm.05", "mean"], before)


def test_shards_without_their_record_are_made_again(data, examples):
    settings = Extraction("tiny-qwen2-vl", shard_images=25)
    done = extract.extract(settings, examples.head(60), "cpu")
    before = done["lm.05", "mean"]
    (done.folder / "meta.json").unlink()
    assert np.array_equal(extract.extract(settings, examples.head(60), "cpu")["lm.05", "mean"], before)


def test_no_model_is_loaded_when_all_is_there(data, examples, monkeypatch):
    settings = Extraction("tiny-qwen2-vl", shard_images=25)
    extract.extract(settings, examples, "cpu")
    monkeypatch.setattr("probekit.models.load_vlm", lambda *a, **k: pytest.fail("loaded"))
    extract.extract(settings, examples, "cpu")


def test_killed_and_resumed_equals_uninterrupted(examples, tmp_path):
    examples.to_parquet(tmp_path / "examples.parquet")
    code = ("import sys, pandas as pd; from pathlib import Path; from probekit import paths, extract;"
            "paths.DATA = Path(sys.argv[1]);"
            "extract.extract(extract.Extraction('tiny-qwen2-vl', shard_images=6, batch_tokens=900),"
            f"pd.read_parquet({str(tmp_path / 'examples.parquet')!r}), 'cpu')")

    def start(folder):
        return subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)

    def shards(folder):
        return sorted(folder.glob("activations/*/*/shard-*.safetensors"))

    victim = start(tmp_path / "killed")
    while not shards(tmp_path / "killed"):
        assert victim.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    left = len(shards(tmp_path / "killed"))
    assert 1 <= left < 10
    kept = shards(tmp_path / "killed")[0]
    written = kept.stat().st_mtime_ns
    assert start(tmp_path / "killed").wait() == 0 and start(tmp_path / "whole").wait() == 0
    one, two = shards(tmp_path / "killed"), shards(tmp_path / "whole")
    assert len(one) == 10 and kept.stat().st_mtime_ns == written
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


@pytest.fixture
def spoil(monkeypatch):
    """Change what forward passes return."""

    def set_to(change, *ways):
        for way in ways:
            def changed(*arguments, honest=getattr(forward, way)):
                states = {key: values.clone() for key, values in honest(*arguments).items()}
                change(states)
                return states

            monkeypatch.setattr(forward, way, changed)

    return set_to


def test_values_that_are_not_finite_name_layer_and_example(data, examples, spoil):
    spoil(lambda states: states["lm.04/mean"][0].fill_(np.nan), "plain", "shared")
    with pytest.raises(FloatingPointError, match=r"tiny-qwen2-vl, lm\.04/mean: not finite .*\.jpg"):
        extract.extract(Extraction("tiny-qwen2-vl"), examples, "cpu")


def test_features_that_are_all_the_same_stop_the_run(data, examples, spoil):
    spoil(lambda states: [values.fill_(1) for values in states.values()], "plain", "shared")
    with pytest.raises(ValueError, match="the same for all"):
        extract.extract(Extraction("tiny-qwen2-vl"), examples, "cpu")


def test_shared_and_plain_extractions_agree(data, examples):
    poolings = ("mean", "max", "cls", "last", "image_mean", "text_mean")
    ours, reference = (extract.extract(Extraction("tiny-qwen2-vl", poolings=poolings, sharing=way), examples, "cpu")
                       for way in ("on", "off"))
    assert ours.meta["sharing"]["used"] and not reference.meta["sharing"]["used"]
    assert "largest difference to plain passes" in ours.meta["sharing"]["words"]
    for layer in ours.layers:
        for pooling in poolings:
            a, b = ours[layer, pooling], reference[layer, pooling]
            assert np.abs(a - b).max() <= 2e-3 * np.abs(b).max(), (layer, pooling)  # both are stored in float16


def test_sharing_that_is_not_exact_is_seen(data, examples, spoil):
    spoil(lambda states: states["lm.03/last"].mul_(1.01), "shared")
    done = extract.extract(Extraction("tiny-qwen2-vl"), examples.head(40), "cpu")
    assert not done.meta["sharing"]["used"] and "not exact" in done.meta["sharing"]["words"]
    assert "lm.03/last" in done.meta["sharing"]["words"]
    with pytest.raises(ValueError, match="take \"auto\""):
        extract.extract(Extraction("tiny-qwen2-vl", sharing="sure"), examples, "cpu")
    with pytest.raises(ValueError, match="take sharing="):
        extract.extract(Extraction("tiny-qwen2-vl", sharing="on"), examples.head(40), "cpu")


def test_one_model_is_gone_before_the_next_is_loaded(data, examples, monkeypatch):
    from probekit import models

    honest, alive = models.load_vlm, []

    def watched(*arguments, **named):
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        vlm = honest(*arguments, **named)
        alive.extend(weakref.ref(p) for p in vlm.model.parameters())
        return vlm

    monkeypatch.setattr(models, "load_vlm", watched)
    for name in ("tiny-qwen2-vl", "tiny-fast-vlm"):
        extract.extract(Extraction(name), examples.head(40), "cpu")
    assert len(alive) > 200


def test_large_values_are_kept_in_float32(tmp_path):
    states = {"lm.00/mean": np.full((2, 3), 1e6, np.float32), "lm.01/mean": np.full((2, 3), 0.5, np.float32)}
    path = store.write_shard(tmp_path, 0, states, 0)
    (tmp_path / "meta.json").write_text(json.dumps(
        {"shard_starts": [0], "layers": ["lm.00", "lm.01"], "settings": {"poolings": ["mean"]}}))
    read = store.Store(tmp_path)
    assert np.array_equal(read["lm.00", "mean"], states["lm.00/mean"])
    assert np.array_equal(read["lm.01", "mean"], states["lm.01/mean"])
    assert store.is_done(tmp_path, 0, 0) and not store.is_done(tmp_path, 0, 5)
    assert not list(tmp_path.glob(".*part")) and path.exists()
