"""The runner: which way a model goes, what fits the memory, what must not be written."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from probekit.extraction import runner
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
    verdict = extract(examples.head(40)).meta["sharing"]
    assert verdict["way"] == "encoded"
    assert "shared: differs by" in verdict["reason"]
    assert "lm.03/last" in verdict["reason"]
    with pytest.raises(ValueError, match="take sharing="):
        extract(examples.head(50), sharing="on")


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
