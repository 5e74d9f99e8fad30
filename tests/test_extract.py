import json
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from probekit import coco, extract, paths, store
from probekit.extract import Extraction


@pytest.fixture(scope="module")
def ragged(examples):
    """Five examples with prompts of very different lengths."""
    rows = examples.groupby("task").head(2).head(5)
    return [coco.load_rgb(paths.resolve(file)) for file in rows.file], rows.prompt.tolist()


def test_hooks_read_what_transformers_returns(vlm, ragged):
    inputs = vlm.prepare(*ragged)
    pooled = extract.pooled_states(vlm, inputs, ["mean", "last", "cls"])
    with torch.inference_mode():
        states = vlm.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == len(vlm.layers)
    for layer, hidden_ntd in zip(vlm.layers, states, strict=True):
        for i, mask in enumerate(inputs["attention_mask"].bool()):
            real = hidden_ntd[i][mask]
            for pooling, expected in (("mean", real.mean(0)), ("last", real[-1]), ("cls", real[0])):
                np.testing.assert_allclose(pooled[f"{layer}/{pooling}"][i], expected, rtol=2e-4, atol=2e-5)


def test_a_batch_changes_nothing(vlm, ragged):
    together = extract.pooled_states(vlm, vlm.prepare(*ragged), ["mean", "last", "max"])
    for i, (image, prompt) in enumerate(zip(*ragged, strict=True)):
        alone = extract.pooled_states(vlm, vlm.prepare([image], [prompt]), ["mean", "last", "max"])
        for key, values in alone.items():
            np.testing.assert_allclose(together[key][i], values[0], rtol=1e-3, atol=1e-4, err_msg=key)


def test_first_token_knows_nothing_and_the_rest_does(vlm, ragged):
    pooled = extract.pooled_states(vlm, vlm.prepare(*ragged), ["cls", "mean"])
    last = vlm.layers[-1]
    assert np.ptp(pooled[f"{last}/cls"], axis=0).max() < 1e-4
    assert np.ptp(pooled[f"{last}/mean"], axis=0).max() > 1e-2


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


def test_no_model_is_loaded_when_all_is_there(data, examples, monkeypatch):
    settings = Extraction("tiny-qwen2-vl", shard_images=25)
    extract.extract(settings, examples, "cpu")
    monkeypatch.setattr("probekit.models.load_vlm", lambda *a, **k: pytest.fail("loaded"))
    extract.extract(settings, examples, "cpu")


def test_killed_and_resumed_equals_uninterrupted(examples, tmp_path):
    examples.to_parquet(tmp_path / "examples.parquet")
    code = ("import sys, pandas as pd; from pathlib import Path; from probekit import paths, extract;"
            "paths.DATA = Path(sys.argv[1]);"
            "extract.extract(extract.Extraction('tiny-qwen2-vl', shard_images=6, batch=4),"
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


def test_values_that_are_not_finite_name_layer_and_example(data, examples, monkeypatch):
    honest = extract.pooled_states

    def spoiled(vlm, inputs, poolings):
        states = honest(vlm, inputs, poolings)
        states["lm.04/mean"][0, 0] = np.nan
        return states

    monkeypatch.setattr(extract, "pooled_states", spoiled)
    with pytest.raises(FloatingPointError, match=r"tiny-qwen2-vl, lm\.04/mean: not finite .*\.jpg"):
        extract.extract(Extraction("tiny-qwen2-vl"), examples, "cpu")


def test_features_that_are_all_the_same_stop_the_run(data, examples, monkeypatch):
    honest = extract.pooled_states

    def deaf(vlm, inputs, poolings):
        return {key: np.ones_like(values) for key, values in honest(vlm, inputs, poolings).items()}

    monkeypatch.setattr(extract, "pooled_states", deaf)
    with pytest.raises(ValueError, match="the same for all"):
        extract.extract(Extraction("tiny-qwen2-vl"), examples, "cpu")


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
