"""The runner: which way a model goes, what fits the memory, what must not be written."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from probekit.extraction import loading, runner
from probekit.extraction.shards import TensorKey
from probekit.models import forward, sharing
from probekit.models.load import load_vlm


@pytest.fixture
def change_states(monkeypatch):
    """Change what forward passes return, going some ways or all."""
    original = forward.run_pooled

    def install(change, *ways):
        def run_changed(vlm, prepared, **options):
            states = original(vlm, prepared, **options)
            if not ways or options.get("way", "plain") in ways:
                states = {key: values.clone() for key, values in states.items()}
                change(states)
            return states

        monkeypatch.setattr(forward, "run_pooled", run_changed)
        monkeypatch.setattr(sharing, "run_pooled", run_changed)

    return install


@pytest.mark.slow
def test_values_that_are_not_finite_name_layer_and_example(extract, examples, change_states):
    change_states(lambda states: states["lm.04/mean"][0].fill_(np.nan))
    message = r"tiny-qwen2-vl, lm\.04/mean: not finite .*\.jpg with 'This image"
    with pytest.raises(FloatingPointError, match=message):
        extract(examples, sharing="off")


@pytest.mark.slow
def test_prompts_that_are_not_seen_stop_the_run_at_its_first_shard(
    extract, data, examples, change_states
):
    def forget_prompts(states):
        for values in states.values():
            values.fill_(1)

    change_states(forget_prompts)
    message = r"the same for examples with different prompts.*chance.*chat template"
    with pytest.raises(ValueError, match=message):
        extract(examples, sharing="off", shard_images=1)
    assert not list(data.glob("activations/*/*/shards-*/shard-*.safetensors"))
    one_each = examples.groupby("image_id").head(1)
    with pytest.raises(ValueError, match="the same for examples with different prompts"):
        extract(one_each, "tiny-fast-vlm", sharing="off")


@pytest.mark.slow
def test_sharing_that_is_not_exact_is_noticed(extract, examples, change_states):
    change_states(lambda states: states["lm.03/last"].mul_(1.01), "shared")
    verdict = extract(examples.head(40)).meta["sharing"]["cpu float32"]
    assert verdict["way"] == "encoded"
    assert "shared: differs by" in verdict["reason"]
    assert "lm.03/last" in verdict["reason"]
    with pytest.raises(ValueError, match="take sharing="):
        extract(examples.head(50), sharing="on")


@pytest.mark.slow
def test_an_error_that_only_the_last_images_have_is_noticed(extract, examples, monkeypatch):
    tried = []
    original = forward.run_pooled

    def spoil_last_images(vlm, prepared, **options):
        states = original(vlm, prepared, **options)
        if options.get("way") == "shared":
            tried.append(len(prepared))
            if len(tried) > 1:
                states = {key: values + values.std(0) for key, values in states.items()}
        return states

    monkeypatch.setattr(sharing, "run_pooled", spoil_last_images)
    verdict = extract(examples.head(60), shard_images=4).meta["sharing"]["cpu float32"]
    assert len(tried) == 2
    assert verdict["way"] == "encoded"
    assert "shared: differs by" in verdict["reason"]


@pytest.mark.slow
def test_a_verdict_of_an_earlier_run_is_tried_again(extract, examples, change_states):
    extract(examples.head(20))
    change_states(lambda states: states["lm.03/last"].mul_(1.1), "shared")
    with pytest.raises(ValueError, match=r"the way 'shared', which is not exact .*sharing=.off"):
        extract(examples.head(40))


@pytest.mark.slow
def test_a_verdict_is_kept_for_its_device(extract, examples, data):
    few = examples.head(20)
    folder = extract(few).folder
    meta = folder.read_meta()
    verdict = meta["sharing"].pop("cpu float32")
    meta["sharing"]["NVIDIA A100 float32"] = {"way": "plain", "reason": "as it was there"}
    folder.write_meta(meta)
    now = extract(examples.head(40)).meta["sharing"]
    assert now["cpu float32"]["way"] == verdict["way"] == "shared"
    assert now["NVIDIA A100 float32"]["reason"] == "as it was there"


@pytest.mark.slow
def test_meta_names_the_settings_of_each_job(extract, examples):
    extract(examples.head(20), poolings=("mean",), batch_tokens=999)
    meta = extract(examples.head(20), poolings=("last",), batch_tokens=777).meta
    assert meta["settings"]["model"] == "tiny-qwen2-vl"
    assert "poolings" not in meta["settings"]
    jobs = [(job["poolings"], job["batch_tokens"]) for job in meta["jobs"]]
    assert jobs == [(["mean"], 999), (["last"], 777)]


@pytest.mark.slow
def test_a_layer_that_does_not_run_stops_the_shard_with_its_name(
    extract, examples, data, monkeypatch
):
    original = forward.run_pooled

    def lose_a_layer(vlm, prepared, **options):
        states = original(vlm, prepared, **options)
        if not prepared[0].image_inputs:
            states = {key: values for key, values in states.items() if "lm.03" not in key}
        return states

    monkeypatch.setattr(forward, "run_pooled", lose_a_layer)
    few = examples.head(12)
    tables = {"no_image": few.assign(file="")}
    message = r"lm\.03/mean: this layer did not run for \d+ of \d+ rows, the first is no image"
    with pytest.raises(ValueError, match=message):
        extract(few, tables=tables)


@pytest.mark.slow
def test_prompts_without_an_image_run_alone_where_their_batch_is_wrong(
    extract, examples, monkeypatch
):
    original = forward.run_pooled
    few = examples.head(12)
    expected = extract(few, tables={"no_image": few.assign(file="")}).controls["no_image"]
    expected_nd = expected["lm.03", "mean"]

    def pad_wrongly(vlm, prepared, **options):
        states = original(vlm, prepared, **options)
        if len(prepared) > 1 and not prepared[0].image_inputs and options.get("way") != "alone":
            states = {key: values + values.std(0) for key, values in states.items()}
        return states

    monkeypatch.setattr(forward, "run_pooled", pad_wrongly)
    monkeypatch.setattr(sharing, "run_pooled", pad_wrongly)
    again = extract(few, tables={"no_image": few.assign(file="")}, longest_side=4000)
    values_nd = again.controls["no_image"]["lm.03", "mean"]
    np.testing.assert_allclose(values_nd, expected_nd, atol=2e-3 * np.abs(expected_nd).max())


@pytest.mark.slow
def test_a_prompt_that_is_too_large_names_the_fix(extract, examples, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward, "run_pooled", fail)
    monkeypatch.setattr(sharing, "run_pooled", fail)
    with pytest.raises(MemoryError, match=r"one prompt with its image, .* take a smaller longest"):
        extract(examples)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved_and_the_states_stay_the_same(
    extract, examples, monkeypatch, tmp_path
):
    few = examples.head(60)
    expected = extract(few)["lm.05", "mean"]
    original = forward.run_pooled
    tried = []

    def run_small(vlm, prepared, **options):
        tried.append(sum(len(row["input_ids"]) for image in prepared for row in image.tokens))
        if tried[-1] > 400:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(vlm, prepared, **options)

    monkeypatch.setattr(forward, "run_pooled", run_small)
    monkeypatch.setattr(sharing, "run_pooled", run_small)
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path / "other"))
    halved = extract(few)["lm.05", "mean"]
    assert max(tried) > 400
    np.testing.assert_allclose(halved, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_one_model_is_gone_before_the_next_is_loaded(extract, examples, monkeypatch):
    parameters: list[weakref.ref] = []

    def load_and_watch(*args, **kwargs):
        gc.collect()
        assert not any(reference() is not None for reference in parameters)
        vlm = load_vlm(*args, **kwargs)
        parameters.extend(weakref.ref(parameter) for parameter in vlm.model.parameters())
        return vlm

    monkeypatch.setattr(runner, "load_vlm", load_and_watch)
    for model in ("tiny-qwen2-vl", "tiny-fast-vlm"):
        extract(examples.head(80), model, workers=2)
    assert len(parameters) > 200


def test_a_stage_that_a_model_lacks_is_left_out_or_refused(extract, examples):
    with pytest.raises(ValueError, match=r'no stage vision .*: take stages=\["lm"\]'):
        extract(examples.head(8), "tiny-fast-vlm", stages=("vision",))


@pytest.mark.slow
def test_what_was_computed_is_written_whatever_goes_wrong_next_to_it(
    extract, data, examples, monkeypatch
):
    write = runner.ShardStates.write

    def spoil_the_third(states, vlm):
        if states.shard.number == 2:
            states.states[TensorKey("lm.03", "mean")][1, 5] = np.nan
        write(states, vlm)

    monkeypatch.setattr(runner.ShardStates, "write", spoil_the_third)
    with pytest.raises(FloatingPointError, match=r"lm\.03/mean: not finite for 1 of"):
        extract(examples, shard_images=6)
    made = sorted(data.glob("activations/*/*/shards-*/shard-*.safetensors"))
    assert [file.name[6:11] for file in made] == ["00000", "00001", "00003"]


@pytest.mark.slow
def test_an_image_that_cannot_be_read_does_not_cost_the_shard_before(
    extract, data, examples, monkeypatch
):
    load_rgb = loading.load_rgb
    images = examples.drop_duplicates("image_id").file.tolist()

    def fail_on_one(path, longest_side):
        if str(path) == images[12]:  # the first of the third shard
            raise OSError(f"{path} cannot be read")
        return load_rgb(path, longest_side)

    monkeypatch.setattr(loading, "load_rgb", fail_on_one)
    with pytest.raises(OSError, match="cannot be read"):
        extract(examples, shard_images=6, sharing="off")
    made = sorted(data.glob("activations/*/*/shards-*/shard-*.safetensors"))
    assert [file.name[6:11] for file in made] == ["00000", "00001"]
