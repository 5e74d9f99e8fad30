"""From examples to activations, with the demo models."""

from __future__ import annotations

import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probekit.extraction.extracting import extract_tables
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.shards import Content
from probekit.extraction.store import Activations
from probekit.images import load_rgb
from probekit.models import forward
from probekit.models.load import load_vlm
from probekit.paths import Home
from probekit.tasks.input_controls import INPUT_CONTROLS, change_inputs
from tests.support.processes import PROCESSES

SHARD_PATTERN = "activations/*/*/shards-*/shard-*.safetensors"


def first_images(examples, count):
    images = examples.image_id.unique()[:count]
    return examples[examples.image_id.isin(images)].reset_index(drop=True)


@pytest.mark.slow
def test_extraction_is_read_back_layer_by_layer(extract, examples):
    activations = extract(examples, poolings=("mean", "last"), shard_images=25)
    values = activations["lm.03", "last"]
    assert values.shape == (len(examples), 128)
    assert values.dtype == np.float32
    assert activations.meta["layers"]["lm"][0] == "lm.00"
    assert activations.tensor_dtypes == {"F16": 9 * 2 * 3}
    assert "{prompt}" in activations.meta["prompt"]
    assert activations.meta["versions"]["torch"]
    with pytest.raises(KeyError, match=r"layer lm\.30 is not stored: this run has lm\.00"):
        activations["lm.30", "mean"]
    with pytest.raises(KeyError, match="pooling max is not stored"):
        activations["lm.00", "max"]


@pytest.mark.slow
def test_labels_travel_with_the_activations(extract, examples):
    activations = extract(first_images(examples, 4))
    assert list(activations.examples.labels) == list(first_images(examples, 4).labels)


@pytest.mark.slow
def test_only_what_is_missing_is_computed(extract, examples, computed):
    captions = examples[examples.task == "caption"].reset_index(drop=True)
    settings = {"shard_images": 25}
    extract(first_images(captions, 20), **settings)
    assert computed == [(40, (Content("lm", "mean"),))]
    computed.clear()
    extract(captions, **settings)  # more images
    assert sum(rows for rows, _ in computed) == 80
    computed.clear()
    whole = extract(examples, **settings)  # more tasks
    assert sum(rows for rows, _ in computed) == len(examples) - 120
    computed.clear()
    both = extract(examples, poolings=("mean", "last"), **settings)  # another pooling
    assert {contents for _, contents in computed} == {(Content("lm", "last"),)}
    assert sum(rows for rows, _ in computed) == len(examples)
    computed.clear()
    stages = {"poolings": ("mean", "text_mean"), "stages": ("lm", "vision", "projector")}
    staged = extract(examples, **stages, **settings)
    assert (
        Content("lm", "text_mean"),
        Content("projector", "mean"),
        Content("vision", "mean"),
    ) in {contents for _, contents in computed}
    computed.clear()
    extract(examples, stages=("vision",), **settings)
    assert not computed
    plain = extract(
        examples,
        poolings=("mean", "text_mean", "last"),
        stages=("lm", "vision", "projector"),
        sharing="off",
        **settings,
    )
    for activations, pooling in ((whole, "mean"), (both, "last"), (staged, "text_mean")):
        for layer in activations.layers_with(pooling):
            expected = plain[layer, pooling]
            gap = np.abs(activations[layer, pooling] - expected).max()
            assert gap <= 2e-3 * np.abs(expected).max(), (layer, pooling)


@pytest.mark.slow
def test_what_another_run_planned_and_could_not_make_is_not_taken_up(
    extract, examples, computed, tmp_path
):
    few = examples.head(40)
    extract(few, shard_images=25)
    with pytest.raises(ValueError, match="needs more tokens than the shortest example has"):
        extract(examples, poolings=("token:500",), shard_images=25)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    broken = few.copy()
    is_last_image = broken.image_id == broken.image_id.iloc[-1]
    broken.loc[is_last_image, "file"] = str(tmp_path / "broken.jpg")
    with pytest.raises(OSError, match="broken"):
        extract(broken, poolings=("mean", "last"), shard_images=25)
    computed.clear()
    extract(few.head(20), poolings=("mean", "last"), shard_images=25)
    assert sum(rows for rows, _ in computed) == 20
    extract(examples, shard_images=25)


@pytest.mark.slow
def test_a_changed_image_is_extracted_again(extract, examples, computed, tmp_path):
    rows = examples.head(8).copy()
    copies = {file: tmp_path / Path(file).name for file in rows.file.unique()}
    for file, copy in copies.items():
        copy.write_bytes(Home.find().resolve(file).read_bytes())
    rows["file"] = [str(copies[file]) for file in rows.file]
    extract(rows)
    computed.clear()
    changed = Path(rows.file.iloc[0])
    changed.write_bytes(changed.read_bytes() + b"\0")
    extract(rows)
    assert sum(count for count, _ in computed) == (rows.file == str(changed)).sum()
    changed.unlink()
    with pytest.raises(FileNotFoundError, match="is gone: run 01_build_data"):
        extract(rows)


@pytest.mark.slow
def test_a_damaged_shard_is_noticed_and_made_again(extract, examples, capsys):
    activations = extract(examples, shard_images=25)
    before = activations["lm.05", "mean"]
    path = sorted(activations.folder.path.glob("shards-*/shard-*"))[1]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileNotFoundError, match="100 of 240 examples have no lm/mean"):
        Activations.open(activations.record, examples)
    capsys.readouterr()
    again = extract(examples, shard_images=25)
    assert "25/25 images" in capsys.readouterr().err  # progress is about what is missing
    assert path.read_bytes() == content
    np.testing.assert_array_equal(again["lm.05", "mean"], before)


@pytest.mark.slow
def test_a_flipped_bit_is_refused_where_it_is_read(extract, examples):
    activations = extract(examples.head(60), shard_images=25)
    path = next(activations.folder.path.glob("shards-*/shard-*"))
    content = bytearray(path.read_bytes())
    content[-999] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged, its lm\.08/mean .* --remove takes away"):
        for layer in activations.layers:
            activations[layer, "mean"]


@pytest.mark.slow
def test_a_lost_record_is_written_anew_and_shards_stay(extract, examples):
    activations = extract(examples.head(60), shard_images=25)
    before = {path: path.stat().st_mtime_ns for path in activations.folder.path.rglob("shard-*")}
    (activations.folder.path / "meta.json").unlink()
    again = extract(examples.head(60), shard_images=25)
    assert again.meta["model"] == "tiny-qwen2-vl"
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_no_model_is_loaded_when_nothing_is_missing(extract, examples, no_loading):
    extract(examples.head(60), shard_images=25)
    no_loading()
    extract(examples.head(60), shard_images=25)


@pytest.mark.slow
def test_vision_alone_does_not_run_the_decoder(extract, examples, monkeypatch):
    def load_without_decoder(*args, **kwargs):
        vlm = load_vlm(*args, **kwargs)
        vlm.stack.register_forward_pre_hook(lambda *_: pytest.fail("the decoder runs"))
        return vlm

    monkeypatch.setattr("probekit.extraction.runner.load_vlm", load_without_decoder)
    activations = extract(examples, stages=("vision", "projector"), sharing="off")
    blocks = [f"vision.0{k}" for k in range(4)]
    assert activations.layers == [*blocks, "projector"]
    assert activations["projector", "mean"].shape == (len(examples), 128)
    assert len(np.unique(activations["vision.03", "mean"], axis=0)) == examples.file.nunique()


def extract_small_shards(table: Path, home: Path) -> None:
    """Extract a file of examples."""
    settings = ExtractionSettings("tiny-qwen2-vl", shard_images=6, batch_tokens=900)
    sys.stderr = table.with_name(f"{home.name}.txt").open("a")
    extract_tables(settings, {"none": pd.read_parquet(table)}, device="cpu", home=home)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(examples, tmp_path):
    table = tmp_path / "examples.parquet"
    examples.to_parquet(table)

    def start(home: Path) -> BaseProcess:
        process = PROCESSES.Process(target=extract_small_shards, args=(table, home))
        process.start()
        return process

    def run(home: Path) -> None:
        process = start(home)
        process.join()
        assert process.exitcode == 0

    def list_shards(home: Path) -> list[Path]:
        return sorted((home / "data").glob(SHARD_PATTERN))

    killed = tmp_path / "killed"
    whole = tmp_path / "whole"
    victim = start(killed)
    while not list_shards(killed):
        assert victim.is_alive(), "ended before it could be killed"
        time.sleep(0.02)
    victim.kill()
    victim.join()
    kept = {path: path.stat().st_mtime_ns for path in list_shards(killed)}
    assert 1 <= len(kept) < 10
    run(killed)
    run(whole)
    assert len(list_shards(killed)) == 10
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    resumed_bytes = [path.read_bytes() for path in list_shards(killed)]
    assert resumed_bytes == [path.read_bytes() for path in list_shards(whole)]


@pytest.mark.slow
def test_shared_and_plain_extractions_agree(extract, examples):
    poolings = ("mean", "max", "cls", "last", "image_mean", "text_mean")
    shared = extract(examples, poolings=poolings, sharing="on")
    plain = extract(examples, poolings=poolings, sharing="off")
    assert shared.meta["sharing"]["cpu float32"]["way"] == "shared"
    assert plain.meta["sharing"]["cpu float32"]["way"] == "plain"
    reason = shared.meta["sharing"]["cpu float32"]["reason"]
    assert "largest difference to plain passes" in reason
    for layer in shared.layers:
        for pooling in poolings:
            expected = plain[layer, pooling]
            gap = np.abs(shared[layer, pooling] - expected).max()
            assert gap <= 2e-3 * np.abs(expected).max(), (layer, pooling)  # stored in float16


@pytest.mark.slow
def test_controls_of_the_inputs_are_extracted_beside_the_examples(extract, examples, computed):
    some = first_images(examples, 12)
    tables = {name: change_inputs(some, name) for name in INPUT_CONTROLS}
    settings = {"poolings": ("mean", "image_mean"), "stages": ("lm", "vision")}
    activations = extract(some, tables=tables, **settings)
    controls = activations.controls
    assert list(controls) == list(INPUT_CONTROLS)
    assert [view.control for view in controls.values()] == list(INPUT_CONTROLS)
    no_image = controls["no_image"]
    assert no_image.stages == ("lm",)
    assert no_image.poolings == ("mean",)
    assert len(no_image["lm.08", "mean"]) == len(some)
    vlm = load_vlm("tiny-qwen2-vl", device="cpu")
    for i in (0, 5, len(some) - 1):
        for name, view in controls.items():
            row = view.examples.iloc[i]
            image = load_rgb(Home.find().resolve(row.file)) if row.file else None
            prepared = vlm.prompt_processor.prepare(image, [row.prompt])
            states = forward.run_pooled(vlm, [prepared], poolings=["mean"])
            expected = states["lm.05/mean"][0]
            np.testing.assert_allclose(view["lm.05", "mean"][i], expected, atol=1e-2, err_msg=name)
    wrong_image = controls["wrong_image"]
    assert not np.allclose(activations["lm.05", "mean"], wrong_image["lm.05", "mean"], atol=1e-2)
    reopened = Activations.open(wrong_image.record, change_inputs(some, "wrong_image"))
    np.testing.assert_array_equal(reopened["lm.05", "mean"], wrong_image["lm.05", "mean"])
    assert len({view.fingerprint for view in (activations, *controls.values())}) == 4
    pairs = [table[["file", "prompt"]] for table in (some, *tables.values())]
    distinct = len({tuple(pair) for table in pairs for pair in table.itertuples(index=False)})
    assert sum(rows for rows, _ in computed) == distinct
    computed.clear()
    extract(some, tables=tables, **settings)
    assert computed == []


def test_prompts_without_an_image_need_something_to_read(extract, examples):
    few = examples.head(4)
    with pytest.raises(ValueError, match="need the stage lm, and a pooling besides image_mean"):
        extract(few, tables={"no_image": few.assign(file="")}, poolings=("image_mean",))


@pytest.mark.slow
def test_activations_behind_a_url_are_read_on_another_machine(
    examples, tmp_path, object_store, monkeypatch, no_loading
):
    few = first_images(examples, 10)
    settings = ExtractionSettings("tiny-qwen2-vl", shard_images=4)
    root = f"{object_store}/elsewhere"
    views = []
    for home in ("one", "other"):
        view = extract_tables(
            settings, {"none": few}, device="cpu", root=root, home=Home.find(tmp_path / home)
        )
        views.append(view)
        no_loading()  # the second machine finds all of it
    np.testing.assert_array_equal(views[0]["lm.04", "mean"], views[1]["lm.04", "mean"])
    assert not list((tmp_path / "one").rglob("shards-*"))
    assert list((tmp_path / "other" / "data" / "cache").iterdir())
    reopened = Activations.open(views[1].record, few, home=Home.find(tmp_path / "third"))
    np.testing.assert_array_equal(reopened["lm.04", "mean"], views[0]["lm.04", "mean"])
