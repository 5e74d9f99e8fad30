"""The worked adapters and the toy go the whole way: check, extraction, probes, answers, page."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import probekit as pk
from probekit.images import load_rgb
from probekit.models.batches import input_shape
from probekit.models.conformance import check_model
from probekit.models.forward import run_pooled
from probekit.models.load import load_vlm
from probekit.models.sharing import choose_way
from tests.conftest import REPOSITORY

ADAPTERS = {
    "LaVit": str(REPOSITORY / "docs" / "adapters" / "lavit.py:LaVit"),
    "MoeLlava": str(REPOSITORY / "docs" / "adapters" / "moe_llava.py:MoeLlava"),
}
# What each leaves out.
LEFT_OUT = {"LaVit": {"vision"}, "MoeLlava": set()}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_passes_its_check(name):
    findings = check_model(ADAPTERS[name]).set_index("check")
    assert set(findings.index[findings.result == "–"]) == LEFT_OUT[name], findings.to_string()
    assert set(findings.result) <= {"✓", "–"}, findings.to_string()
    assert {"sharing, float32", "sharing, bfloat16", "sharing, float16"} <= set(findings.index)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_goes_the_whole_way(name, data, examples):
    """Sixty scenes become scores, answers and figures."""
    few = examples[examples.task.isin(["caption", "object"])].assign(run="adapters")
    activations = pk.extract(
        ADAPTERS[name], few, poolings=["mean"], stages=["lm", "projector"], device="cpu"
    )
    assert activations.meta["sharing"]["cpu float32"]["way"] == "shared"
    results = pk.probe(activations, probes=["logreg"], resamples=20)
    assert set(results.metrics.stage) == {"lm", "projector"}
    assert {"answer", "lens"} <= set(results.metrics.probe)
    assert results.figures()


@pytest.mark.parametrize("name", ADAPTERS)
def test_untrained_weights_are_those_of_the_seed(name):
    first, again, other = [
        load_vlm(ADAPTERS[name], device="cpu", untrained=True, seed=seed) for seed in (0, 0, 1)
    ]
    weights = [vlm.model.projector.state_dict() for vlm in (first, again, other)]
    for key, values in weights[0].items():
        assert torch.equal(values, weights[1][key])
        assert not torch.equal(values, weights[2][key])


# -------------------------------------------------------------------------------------------- LaVIT


@pytest.fixture(scope="module")
def lavit():
    return load_vlm(ADAPTERS["LaVit"], device="cpu")


@pytest.fixture(scope="module")
def scenes(scene_folder) -> list[Image.Image]:
    return [load_rgb(file) for file in sorted(scene_folder.rglob("*.jpg"))[:12]]


def test_images_have_as_many_tokens_as_they_show(lavit, scenes):
    prepared = [lavit.prompt_processor.prepare(scene, ["Is there a dog?"]) for scene in scenes]
    counts = [int(one.image_masks[0].sum()) for one in prepared]
    assert len(set(counts)) > 3
    for one, count in zip(prepared, counts, strict=True):
        places = one.image_inputs["places"]
        assert len(places) == len(one.image_inputs["features"]) == count
        assert len(lavit.adapter.token_grid(one, (320, 240))) == count
        assert places.diff().gt(0).all()


def test_states_of_images_with_other_numbers_of_tokens_are_those_by_hand(lavit, scenes):
    """Alone, in batches, and shared: pooled over each image's own tokens."""
    prompts = ["Is there a dog?", "Is there a cat, or another animal that is as small?"]
    prepared = [lavit.prompt_processor.prepare(scene, prompts) for scene in scenes]
    shapes = {input_shape(one) for one in prepared}
    assert len(shapes) > 3
    poolings = ["image_mean", "text_mean", "last"]
    for one in prepared[:4]:
        shared = run_pooled(lavit, [one], poolings=poolings, way="shared")
        states = []
        hook = lavit.stack.register_forward_hook(lambda *given, to=states: to.append(given[2]))
        for k, row in enumerate(one.tokens):
            ids = torch.from_numpy(row["input_ids"])[None]
            x = lavit.model.decoder.embed_tokens(ids)
            is_image = one.image_masks[k]
            x[0, is_image] = lavit.model.projector(one.image_inputs["features"])
            lavit.model.decoder(inputs_embeds=x)
            hidden_td = states[-1][0]
            expected = {
                "image_mean": hidden_td[is_image].mean(0),
                "text_mean": hidden_td[~is_image].mean(0),
                "last": hidden_td[-1],
            }
            for pooling, values_d in expected.items():
                read_d = shared[f"lm.04/{pooling}"][k]
                torch.testing.assert_close(read_d, values_d, atol=1e-4, rtol=1e-4)
        hook.remove()


def test_images_of_one_number_of_tokens_share_a_batch(lavit, scenes):
    by_shape: dict[tuple, list] = {}
    for k in range(4):
        for scene in scenes:
            turned = scene.rotate(90 * k)
            one = lavit.prompt_processor.prepare(turned, ["Is there a dog?", "A cat?"])
            by_shape.setdefault(input_shape(one), []).append(one)
    batch = max(by_shape.values(), key=len)
    assert len(batch) > 1
    verdict, _ = choose_way(
        lavit, batch, poolings=["image_mean"], stages=["lm", "projector"], ways=("shared",)
    )
    assert verdict.way == "shared"


def test_the_merger_adds_what_is_dropped(lavit):
    """Kept patches depend on dropped ones, and on earlier kept ones, not on later ones."""
    torch.manual_seed(0)
    x_pd = torch.randn(6, 64)
    kept_p = torch.tensor([True, False, True, False, True, False])
    merger = lavit.model.merger
    merged = merger(x_pd, kept_p)
    assert merged.shape == (3, 64)
    for place, changed in ((1, [True, True, True]), (4, [False, False, True])):
        other_pd = x_pd.clone()
        other_pd[place] = torch.randn(64)
        differs = (merger(other_pd, kept_p) - merged).abs().amax(1) > 1e-6
        assert differs.tolist() == changed


# ---------------------------------------------------------------------------------------- MoE-LLaVA


def test_a_mixture_is_the_weighted_sum_of_its_experts():
    vlm = load_vlm(ADAPTERS["MoeLlava"], device="cpu")
    mixtures = [block.mlp for block in vlm.blocks[::2]]
    mixture = mixtures[0]
    hidden_ntd = torch.randn(2, 5, 64)
    mixed_ntd = mixture(hidden_ntd)
    for n, t in np.ndindex(2, 5):
        hidden_d = hidden_ntd[n, t]
        share_e = mixture.router(hidden_d).softmax(-1)
        best = share_e.argsort(descending=True)[:2].tolist()
        total = sum(share_e[e] for e in best)
        expected_d = sum(share_e[e] / total * mixture.experts.experts[e](hidden_d) for e in best)
        torch.testing.assert_close(mixed_ntd[n, t], expected_d, atol=1e-5, rtol=1e-4)


def test_the_share_of_tokens_by_expert_is_what_routers_choose(noise_images_for_experts):
    """Pooled in plain passes and after a shared prefix, by hand from each router."""
    vlm = load_vlm(ADAPTERS["MoeLlava"], device="cpu")
    prompts = ["Is there a dog?", "Is there a cat, or another animal that is as small?"]
    prepared = [vlm.prompt_processor.prepare(image, prompts) for image in noise_images_for_experts]
    assert vlm.layers_of_stage["experts"] == ("experts.01", "experts.03")
    poolings = ["mean", "image_mean", "last"]
    options = {"poolings": poolings, "stages": ["lm", "experts"]}
    shared = run_pooled(vlm, prepared, way="shared", **options)
    plain = run_pooled(vlm, prepared, way="plain", **options)
    row = 0
    for one in prepared:
        for k, tokens in enumerate(one.tokens):
            for layer, block in (("experts.01", vlm.blocks[0]), ("experts.03", vlm.blocks[2])):
                chosen = []
                hook = block.mlp.experts.register_forward_pre_hook(
                    lambda module, args, to=chosen: to.append(args[1])
                )
                run_pooled(vlm, [one.with_prompt(k)], poolings=["last"])
                hook.remove()
                share_te = torch.zeros(len(tokens["input_ids"]), 4)
                for t, experts in enumerate(chosen[0].tolist()):
                    share_te[t, experts] += 0.5
                is_image = torch.from_numpy(one.image_masks[k])
                expected = {
                    "mean": share_te.mean(0),
                    "image_mean": share_te[is_image].mean(0),
                    "last": share_te[-1],
                }
                for pooling, values_e in expected.items():
                    for states in (shared, plain):
                        read_e = states[f"{layer}/{pooling}"][row]
                        torch.testing.assert_close(read_e, values_e, atol=1e-6, rtol=1e-6)
            row += 1


@pytest.fixture
def noise_images_for_experts() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)) for _ in range(2)]


def test_routing_is_probed_like_states(data, examples):
    few = examples[examples.task == "caption"].assign(run="experts")
    activations = pk.extract(
        ADAPTERS["MoeLlava"],
        few,
        poolings=["mean", "text_mean"],
        stages=["lm", "experts"],
        answers=False,
        device="cpu",
    )
    share_ne = activations["experts.03", "text_mean"]
    assert share_ne.shape == (len(few), 4)
    np.testing.assert_allclose(share_ne.sum(1), 1, atol=2e-3)
    results = pk.probe(activations, probes=["logreg"], resamples=20)
    assert set(results.metrics.layer[results.metrics.stage == "experts"]) == {
        "experts.01",
        "experts.03",
    }
    assert any(name.endswith("_stages") for name in results.figures())
