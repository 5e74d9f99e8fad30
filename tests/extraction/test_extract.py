import gc
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from probekit import paths
from probekit.extraction import extract, loading, shards, store, worker
from probekit.extraction.extract import ExtractionSettings
from probekit.images import load_rgb
from probekit.models import forward
from probekit.models.load import load_vlm
from probekit.tasks import input_controls
from tests.conftest import REPOSITORY


def test_extraction_is_read_back_layer_by_layer(data, examples):
    settings = ExtractionSettings("tiny-qwen2-vl", poolings=("mean", "last"), shard_images=25)
    done = extract.extract(settings, examples, "cpu")
    assert done["lm.03", "last"].shape == (len(examples), 128) and done["lm.03", "last"].dtype == np.float32
    assert done.meta["layers"]["lm"][0] == "lm.00" and done.dtypes == {"F16": 9 * 2 * 3}
    assert "{prompt}" in done.meta["prompt"] and done.meta["versions"]["torch"]
    with pytest.raises(KeyError, match=r"layer lm\.30 is not stored: this run has lm\.00"):
        done["lm.30", "mean"]
    with pytest.raises(KeyError, match="pooling max is not stored"):
        done["lm.00", "max"]


def test_settings_and_weights_name_the_folder(data):
    base = ExtractionSettings("tiny-qwen2-vl", dtype="float32")
    others = [replace(base, longest_side=64), replace(base, untrained=True), replace(base, sharing="off"),
              replace(base, model="tiny-fast-vlm")]
    assert len({extract.folder_of(s) for s in (base, *others)}) == 5
    for same in (replace(base, batch_tokens=99), replace(base, poolings=("last",)), replace(base, workers=0)):
        assert extract.folder_of(same) == extract.folder_of(base)


@pytest.fixture
def computed(monkeypatch):
    """What is computed from now on: (rows, wants) of each shard."""
    seen, honest = [], worker.finish_shard

    def watched(part, i, *rest):
        seen.append((len(part.shard_rows(i)), part.wants))
        return honest(part, i, *rest)

    monkeypatch.setattr(worker, "finish_shard", watched)
    return seen


def test_only_what_is_missing_is_computed(data, examples, computed):
    settings = ExtractionSettings("tiny-qwen2-vl", shard_images=25)
    captions = examples[examples.task == "caption"]
    some = captions[captions.image_id.isin(captions.image_id.unique()[:20])]
    extract.extract(settings, some, "cpu")
    assert computed == [(40, ("lm/mean",))]
    computed.clear()
    extract.extract(settings, captions, "cpu")  # more images
    assert sum(rows for rows, _ in computed) == 80
    computed.clear()
    whole = extract.extract(settings, examples, "cpu")  # more tasks
    assert sum(rows for rows, _ in computed) == len(examples) - 120
    computed.clear()
    both = extract.extract(replace(settings, poolings=("mean", "last")), examples, "cpu")  # another pooling
    assert {wants for _, wants in computed} == {("lm/last",)} and sum(rows for rows, _ in computed) == len(examples)
    computed.clear()
    stages = replace(settings, poolings=("mean", "text_mean"), stages=("lm", "vision", "projector"))
    seen = extract.extract(stages, examples, "cpu")
    assert ("lm/text_mean", "projector/mean", "vision/mean") in {wants for _, wants in computed}
    computed.clear()
    extract.extract(replace(settings, stages=("vision",)), examples, "cpu")
    assert not computed
    afresh = extract.extract(replace(stages, poolings=("mean", "text_mean", "last"), sharing="off"), examples, "cpu")
    for store_, pooling in ((whole, "mean"), (both, "last"), (seen, "text_mean")):
        for layer in store_.layers_with(pooling):
            a, b = store_[layer, pooling], afresh[layer, pooling]
            assert np.abs(a - b).max() <= 2e-3 * np.abs(b).max(), (layer, pooling)


def test_what_another_run_planned_and_could_not_make_is_not_taken_up(data, examples, computed, tmp_path):
    settings, few = ExtractionSettings("tiny-qwen2-vl", shard_images=25), examples.head(40)
    extract.extract(settings, few, "cpu")
    with pytest.raises(ValueError, match="needs more tokens than the shortest example has"):
        extract.extract(replace(settings, poolings=("token:500",)), examples, "cpu")
    broken = few.copy()
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    broken.loc[broken.image_id == broken.image_id.iloc[-1], "file"] = str(tmp_path / "broken.jpg")
    with pytest.raises(OSError, match="broken"):
        extract.extract(replace(settings, poolings=("mean", "last")), broken, "cpu")
    computed.clear()
    extract.extract(replace(settings, poolings=("mean", "last")), few.head(20), "cpu")
    assert sum(rows for rows, _ in computed) == 20
    extract.extract(settings, examples, "cpu")


def test_bad_settings_are_named_before_anything_is_loaded(data, examples):
    for change, told in (({"dtype": "fp16"}, "dtype=.*float16"), ({"stages": ("llm",)}, "stages=.*projector"),
                         ({"shard_images": 0}, "from 1"), ({"poolings": ("median",)}, "unknown pooling")):
        with pytest.raises(ValueError, match=told):
            extract.extract(replace(ExtractionSettings("tiny-qwen2-vl"), **change), examples, "cpu")


def test_a_prompt_that_is_too_large_names_the_mend(data, examples, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward, "run", full)
    with pytest.raises(MemoryError, match=r"one prompt with its image, .* take a smaller longest_side"):
        extract.extract(ExtractionSettings("tiny-qwen2-vl"), examples, "cpu")


def test_vision_alone_does_not_run_the_decoder(data, examples, monkeypatch):
    settings = ExtractionSettings("tiny-qwen2-vl", stages=("vision", "projector"), sharing="off")
    honest = load_vlm

    def without_decoder(*arguments):
        vlm = honest(*arguments)
        vlm.stack.register_forward_pre_hook(lambda *seen: pytest.fail("the decoder runs"))
        return vlm

    monkeypatch.setattr("probekit.extraction.worker.load_vlm", without_decoder)
    done = extract.extract(settings, examples, "cpu")
    assert done.layers == ["vision.00", "vision.01", "vision.02", "vision.03", "projector"]
    assert done["projector", "mean"].shape == (len(examples), 128)
    assert len(np.unique(done["vision.03", "mean"], axis=0)) == examples.file.nunique()


def test_a_changed_image_is_extracted_again(data, examples, computed, tmp_path):
    rows = examples.head(8).copy()
    copies = {file: tmp_path / Path(file).name for file in rows.file.unique()}
    for file, copy in copies.items():
        copy.write_bytes(paths.Home.find().resolve(file).read_bytes())
    rows["file"] = [str(copies[file]) for file in rows.file]
    extract.extract(ExtractionSettings("tiny-qwen2-vl"), rows, "cpu")
    computed.clear()
    changed = tmp_path / Path(rows.file.iloc[0]).name
    changed.write_bytes(changed.read_bytes() + b"\0")
    extract.extract(ExtractionSettings("tiny-qwen2-vl"), rows, "cpu")
    assert sum(n for n, _ in computed) == (rows.file == str(changed)).sum()
    changed.unlink()
    with pytest.raises(FileNotFoundError, match="is gone: run 01_build_data"):
        extract.extract(ExtractionSettings("tiny-qwen2-vl"), rows, "cpu")


def test_a_damaged_shard_is_seen_and_made_again(data, examples):
    settings = ExtractionSettings("tiny-qwen2-vl", shard_images=25)
    done = extract.extract(settings, examples, "cpu")
    before, path = done["lm.05", "mean"], sorted(done.folder.glob("part-*/shard-*"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileNotFoundError, match="100 of 240 examples have no lm/mean"):
        store.Activations.open(done.record, examples)
    again = extract.extract(settings, examples, "cpu")
    assert path.read_bytes() == whole and np.array_equal(again["lm.05", "mean"], before)


def test_shards_without_their_record_are_made_again(data, examples):
    settings = ExtractionSettings("tiny-qwen2-vl", shard_images=25)
    done = extract.extract(settings, examples.head(60), "cpu")
    before = done["lm.05", "mean"]
    (done.folder / "meta.json").unlink()
    assert np.array_equal(extract.extract(settings, examples.head(60), "cpu")["lm.05", "mean"], before)


def test_no_model_is_loaded_when_all_is_there(data, examples, monkeypatch):
    settings = ExtractionSettings("tiny-qwen2-vl", shard_images=25)
    extract.extract(settings, examples, "cpu")
    monkeypatch.setattr("probekit.extraction.worker.load_vlm", lambda *a, **k: pytest.fail("loaded"))
    extract.extract(settings, examples, "cpu")


def test_killed_and_resumed_equals_uninterrupted(examples, tmp_path):
    examples.to_parquet(tmp_path / "examples.parquet")
    code = ("import sys, pandas as pd; from pathlib import Path; from probekit import paths, extract;"
            "paths.Home.find().data = Path(sys.argv[1]);"
            "extract.extract(extract.Extraction('tiny-qwen2-vl', shard_images=6, batch_tokens=900),"
            f"pd.read_parquet({str(tmp_path / 'examples.parquet')!r}), 'cpu')")

    def start(folder):
        return subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)

    def shards(folder):
        return sorted(folder.glob("activations/*/*/part-*/shard-*.safetensors"))

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
    """Change what forward passes return, of some ways or of all."""

    def set_to(change, *ways):
        def changed(vlm, prepared, poolings, stages=("lm",), way="plain", honest=forward.run_pooled):
            states = {key: values.clone() for key, values in honest(vlm, prepared, poolings, stages, way).items()}
            if way in ways or not ways:
                change(states)
            return states

        monkeypatch.setattr(forward, "run", changed)

    return set_to


def test_values_that_are_not_finite_name_layer_and_example(data, examples, spoil):
    spoil(lambda states: states["lm.04/mean"][0].fill_(np.nan))
    with pytest.raises(FloatingPointError, match=r"tiny-qwen2-vl, lm\.04/mean: not finite .*\.jpg with 'This image"):
        extract.extract(ExtractionSettings("tiny-qwen2-vl", sharing="off"), examples, "cpu")


def test_prompts_that_are_not_seen_stop_the_run_after_its_first_shard(data, examples, spoil):
    spoil(lambda states: [values.fill_(1) for values in states.values()])
    with pytest.raises(ValueError, match=r"the same for examples with different prompts.*chance.*chat template"):
        extract.extract(ExtractionSettings("tiny-qwen2-vl", sharing="off", shard_images=1), examples, "cpu")
    assert not list(data.glob("activations/*/*/part-*/shard-*.safetensors"))
    one_each = examples.groupby("image_id").head(1)
    with pytest.raises(ValueError, match="the same for examples with different prompts"):
        extract.extract(ExtractionSettings("tiny-fast-vlm", sharing="off"), one_each, "cpu")


def test_shared_and_plain_extractions_agree(data, examples):
    poolings = ("mean", "max", "cls", "last", "image_mean", "text_mean")
    ours, reference = (extract.extract(ExtractionSettings("tiny-qwen2-vl", poolings=poolings, sharing=way), examples, "cpu")
                       for way in ("on", "off"))
    assert ours.meta["sharing"]["way"] == "shared" and reference.meta["sharing"]["way"] == "plain"
    assert "largest difference to plain passes" in ours.meta["sharing"]["words"]
    for layer in ours.layers:
        for pooling in poolings:
            a, b = ours[layer, pooling], reference[layer, pooling]
            assert np.abs(a - b).max() <= 2e-3 * np.abs(b).max(), (layer, pooling)  # both are stored in float16


def test_sharing_that_is_not_exact_is_seen(data, examples, spoil):
    spoil(lambda states: states["lm.03/last"].mul_(1.01), "shared")
    done = extract.extract(ExtractionSettings("tiny-qwen2-vl"), examples.head(40), "cpu")
    assert done.meta["sharing"]["way"] == "encoded" and "shared: differs by" in done.meta["sharing"]["words"]
    assert "lm.03/last" in done.meta["sharing"]["words"]
    with pytest.raises(ValueError, match="take out of auto, on, off"):
        extract.extract(ExtractionSettings("tiny-qwen2-vl", sharing="sure"), examples, "cpu")
    with pytest.raises(ValueError, match="take sharing="):
        extract.extract(ExtractionSettings("tiny-qwen2-vl", sharing="on"), examples.head(50), "cpu")


def test_batches_fill_their_budget_and_hold_whole_images(examples, vlm):
    rows = shards.rows_of(examples)
    works = list(loading.ahead(vlm.prompt_processor, None, [rows], 2))
    assert [work.image for work in works] == list(range(60))
    assert np.array_equal(np.concatenate([work.rows for work in works]), np.arange(len(rows)))
    for way in ("shared", "plain"):
        sizes = [sum(work.tokens(way) for work in batch)
                 for batch in loading.batches(works, lambda: 3000, lambda w=way: w)]
        assert max(sizes) <= 3000 and len(sizes) > 2 and min(sizes[:-1]) > 1500


def test_what_a_worker_cannot_read_is_named_as_it_is(examples, vlm, tmp_path):
    rows = shards.rows_of(examples.head(40))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    rows.loc[rows.file == rows.file.iloc[-1], ["file", "size"]] = str(tmp_path / "broken.jpg"), 10
    with pytest.raises(OSError, match=r"broken\.jpg") as caught:
        list(loading.ahead(vlm.prompt_processor, None, [rows], 1))
    assert "Traceback" not in str(caught.value)


def test_one_model_is_gone_before_the_next_is_loaded(data, examples, monkeypatch):
    honest, alive = load_vlm, []

    def watched(*arguments, **named):
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        vlm = honest(*arguments, **named)
        alive.extend(weakref.ref(p) for p in vlm.model.parameters())
        return vlm

    monkeypatch.setattr(worker, "load_vlm", watched)
    for name in ("tiny-qwen2-vl", "tiny-fast-vlm"):
        extract.extract(ExtractionSettings(name, workers=2), examples.head(80), "cpu")
    assert len(alive) > 200


def test_controls_of_the_inputs_are_extracted_beside_the_examples(data, examples, computed):
    some = examples[examples.image_id.isin(examples.image_id.unique()[:12])].reset_index(drop=True)
    settings = ExtractionSettings("tiny-qwen2-vl", poolings=("mean", "image_mean"), stages=("lm", "vision"))
    plain, blind, mute, wrong = extract.extract_all(settings, some, input_controls.INPUT_CONTROLS, "cpu")
    assert [one.control for one in (plain, blind, mute, wrong)] == ["none", *input_controls.INPUT_CONTROLS]
    assert blind.stages == ("lm",) and blind.poolings == ("mean",) and len(blind["lm.08", "mean"]) == len(some)
    vlm = load_vlm("tiny-qwen2-vl", device="cpu")
    other = input_controls.change_inputs(some, "wrong_image")
    for i in (0, 5, len(some) - 1):
        row, file = some.iloc[i], other.file[i]
        picture = load_rgb(paths.Home.find().resolve(file))
        expected = {"lm/blind": forward.run_pooled(vlm, [vlm.prompt_processor.prepare(None, [row.prompt])], ["mean"]),
                    "lm/wrong": forward.run_pooled(vlm, [vlm.prompt_processor.prepare(picture, [row.prompt])], ["mean"]),
                    "lm/mute": forward.run_pooled(vlm, [vlm.prompt_processor.prepare(load_rgb(paths.Home.find().resolve(row.file)), [""])],
                                           ["mean"])}
        for one, name in ((blind, "lm/blind"), (wrong, "lm/wrong"), (mute, "lm/mute")):
            np.testing.assert_allclose(one["lm.05", "mean"][i], expected[name]["lm.05/mean"][0], atol=1e-2)
    assert not np.allclose(plain["lm.05", "mean"], wrong["lm.05", "mean"], atol=1e-2)
    again = store.Activations.open(wrong.record, some)
    assert again.control == "wrong_image" and np.array_equal(again["lm.05", "mean"], wrong["lm.05", "mean"])
    assert len({one.key for one in (plain, blind, mute, wrong)}) == 4
    rows = sum(n for n, _ in computed)
    assert rows == len(some[["file", "prompt"]].drop_duplicates()) + some.prompt.nunique() + 12 + len(
        other[["file", "prompt"]].merge(some[["file", "prompt"]], how="left", indicator=True).query(
            "_merge == 'left_only'").drop_duplicates())
    computed.clear()
    extract.extract_all(settings, some, input_controls.INPUT_CONTROLS, "cpu")
    assert computed == []


def test_without_an_image_the_model_reads_what_its_tokenizer_says(data):
    for name in ("tiny-qwen2-vl", "tiny-fast-vlm"):
        vlm = load_vlm(name, device="cpu")
        prompts = ["This image contains: a red circle.", "", "two"]
        one = vlm.prompt_processor.prepare(None, prompts)
        assert not any(mask.any() for mask in one.image_masks) and not one.image
        text = vlm.processor.tokenizer.decode(one.tokens[0]["input_ids"])
        assert prompts[0] in text and "image_pad" not in text and "<image>" not in text
        together = forward.run_pooled(vlm, [one], ["mean", "last"])
        for k in range(3):
            ids = torch.from_numpy(one.tokens[k]["input_ids"])[None]
            states = vlm.model(input_ids=ids, output_hidden_states=True).hidden_states
            torch.testing.assert_close(together["lm.05/mean"][k], states[5][0].mean(0), atol=1e-5, rtol=1e-4)


def test_no_image_needs_something_to_read(data, examples):
    settings = ExtractionSettings("tiny-qwen2-vl", poolings=("image_mean",))
    with pytest.raises(ValueError, match="no_image needs the stage lm"):
        extract.extract_all(settings, examples, ["no_image"], "cpu")
