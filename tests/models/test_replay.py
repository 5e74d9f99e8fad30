"""Passes that run again: nothing changes but what is changed, and what comes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from probekit.images import load_rgb
from probekit.models import replay_check
from probekit.models.attention import AttentionCut, NoCut
from probekit.models.batches import batch_images, batch_tokens
from probekit.models.forward import run_pooled
from probekit.models.native import forward_options
from probekit.models.replay import TOKEN_SETS, KeptPass, NoReplay
from probekit.models.replay_check import check_replay

WAYS = ("shared", "plain")


@pytest.fixture(scope="module")
def kept(vlm, prepared):
    return {way: KeptPass(vlm, prepared, way=way) for way in WAYS}


@pytest.fixture(scope="module")
def turn_back(vlm):
    """Mirrors states at a plane."""
    direction_d = torch.randn(vlm.width, generator=torch.Generator().manual_seed(0))
    direction_d = direction_d / direction_d.norm()
    return lambda hidden: hidden - 2 * (hidden @ direction_d)[..., None] * direction_d


def run_with_hook(vlm, prepared, layer, mask_nt, change):
    """The last states of a plain pass whose layer a hook of torch changes."""

    def change_output(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(mask_nt[..., None], change(hidden), hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def change_input(module, args, kwargs):
        return (torch.where(mask_nt[..., None], change(args[0]), args[0]), *args[1:]), kwargs

    if layer:
        handle = vlm.blocks[layer - 1].register_forward_hook(change_output)
    else:
        handle = vlm.blocks[0].register_forward_pre_hook(change_input, with_kwargs=True)
    rows = [row for image in prepared for row in image.tokens]
    images = batch_images(vlm, prepared, counts=[len(image.tokens) for image in prepared])
    with torch.inference_mode():
        output = vlm.model(
            **batch_tokens(vlm, rows),
            **images,
            **forward_options(vlm.config, len(rows), device=vlm.device),
        ).last_hidden_state
    handle.remove()
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return output[torch.arange(len(rows)), lengths - 1]


@pytest.mark.parametrize("way", WAYS)
def test_a_kept_pass_has_the_states_of_a_plain_one(vlm, prepared, kept, way):
    expected = run_pooled(vlm, prepared, poolings=["last"])
    for number, layer in enumerate(vlm.layers):
        states_nd = kept[way].last_states(number)
        torch.testing.assert_close(states_nd, expected[f"{layer}/last"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sites", [("image",), ("text",), ("last",), ("image", "text")])
def test_an_edit_does_what_a_hook_in_a_plain_pass_does(vlm, prepared, kept, turn_back, way, sites):
    last = len(vlm.blocks)
    mask_nt = sum(kept["plain"].token_sets[site] for site in sites).bool()
    for layer in (0, 1, 5, last - 1):
        expected_nd = run_with_hook(vlm, prepared, layer, mask_nt, turn_back)
        states = kept[way].rerun(layer, dict.fromkeys(sites, turn_back))
        assert sorted(states) == list(range(layer, last + 1))
        torch.testing.assert_close(states[last], expected_nd, rtol=1e-5, atol=1e-5)
        assert (states[last] - kept[way].last_states(last)).abs().max() > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left_behind(vlm, kept, turn_back, way):
    before = kept[way].rerun(2, {"text": turn_back})
    kept[way].rerun(1, dict.fromkeys(("image", "text"), turn_back))
    text_nt = kept[way].token_sets["text"]
    image_nt = kept[way].token_sets["image"]
    kept[way].rerun(0, {}, cut=AttentionCut(range(3), text_nt, image_nt))
    again = kept[way].rerun(2, {"text": turn_back})
    for layer, states_nd in before.items():
        assert torch.equal(states_nd, again[layer])
    assert vlm.stack.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(block) for block in vlm.blocks)


def test_token_sets_are_those_of_the_prompts(vlm, prepared, kept):
    masks = [mask for image in prepared for mask in image.image_masks]
    for way in WAYS:
        sets = kept[way].token_sets
        assert set(sets) == set(TOKEN_SETS)
        for n, mask_t in enumerate(masks):
            after_image = len(mask_t) - 1 - int(np.flatnonzero(mask_t)[-1])
            assert int(sets["image"][n].sum()) == mask_t.sum()
            assert int(sets["text"][n].sum()) == after_image
            assert int(sets["last"][n].sum()) == 1


@pytest.mark.parametrize("way", WAYS)
def test_without_attention_to_the_image_it_does_not_matter_which_it_is(vlm, examples, way):
    files = examples.file.unique()[:2]
    prompts = examples.prompt[examples.file == files[0]].tolist()[:2]
    states = []
    for file in files:
        prepared = [vlm.prompt_processor.prepare(load_rgb(file), prompts)]
        one = KeptPass(vlm, prepared, way=way)
        text_nt = one.token_sets["text"]
        cut = AttentionCut(range(len(vlm.blocks)), text_nt, one.token_sets["image"])
        states.append(one.rerun(0, {}, cut=cut)[len(vlm.blocks)])
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


def test_both_ways_cut_the_same(vlm, kept):
    for looking, seen, blocks in (("text", "image", range(2, 4)), ("last", "text", range(3))):
        states = []
        for way in WAYS:
            sets = kept[way].token_sets
            cut = AttentionCut(blocks, sets[looking], sets[seen])
            states.append(kept[way].rerun(blocks.start, {}, cut=cut)[len(vlm.blocks)])
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
        moved = states[0] - kept["shared"].last_states(len(vlm.blocks))
        assert moved.abs().max() > 1e-3


def test_attention_that_does_not_go_through_the_interface_is_named(vlm, kept, monkeypatch):
    sets = kept["plain"].token_sets
    cut = AttentionCut(range(2), sets["text"], sets["image"])
    monkeypatch.setattr(vlm.stack.config, "_attn_implementation", "eager")
    with pytest.raises(NoCut, match="'eager'"):
        kept["plain"].rerun(0, {}, cut=cut)


def test_a_model_that_is_not_the_same_again_is_refused(vlm, prepared, monkeypatch):
    assert check_replay(vlm, prepared).way == "shared"
    rerun = KeptPass.rerun

    def rerun_wrongly(self, layer, changes, **options):
        states = rerun(self, layer, changes, **options)
        return {number: values_nd + 1 for number, values_nd in states.items()}

    monkeypatch.setattr(replay_check.KeptPass, "rerun", rerun_wrongly)
    verdict = check_replay(vlm, prepared)
    assert verdict.way == "" and "changing nothing changes" in verdict.reason


@pytest.mark.parametrize(("deviations", "way"), [(0.03, "shared"), (0.2, "")])
def test_half_precision_may_round_otherwise_where_fewer_tokens_run(
    vlm, prepared, monkeypatch, deviations, way
):
    # Of Qwen2-VL-2B on a GPU 0.03 standard deviations were seen, after 28 blocks.
    rerun = KeptPass.rerun
    draw = torch.Generator().manual_seed(0)

    def rerun_with_noise(self, layer, changes, **options):
        states = rerun(self, layer, changes, **options)
        return {
            number: values_nd
            + deviations * values_nd.std(0) * torch.randn(values_nd.shape, generator=draw)
            for number, values_nd in states.items()
        }

    monkeypatch.setattr(replay_check.KeptPass, "rerun", rerun_with_noise)
    monkeypatch.setattr(vlm, "dtype", "bfloat16")
    assert check_replay(vlm, prepared).way == way


def test_blocks_that_do_not_run_are_named(vlm, prepared, monkeypatch):
    monkeypatch.setattr(vlm, "blocks", torch.nn.ModuleList([*vlm.blocks, torch.nn.Identity()]))
    with pytest.raises(NoReplay, match="8 of its 9 blocks ran"):
        KeptPass(vlm, prepared, way="plain")


@pytest.mark.parametrize("way", WAYS)
def test_image_tokens_that_do_not_look_either_are_cut_in_both_ways(vlm, prepared, way):
    count = int(prepared[0].image_masks[0].sum())
    mark_i = np.arange(count) % 3 == 0
    marked = [replace(image, marks={"object": mark_i}) for image in prepared]
    states = []
    for one in (way, "plain"):
        kept = KeptPass(vlm, marked, way=one)
        sets = kept.token_sets
        assert int(sets["object"].sum()) == mark_i.sum() * len(sets["object"])
        assert not (sets["object"] & ~sets["image"]).any()
        cut = AttentionCut(range(1, 4), sets["image_span"] | sets["text"], sets["object"])
        states.append(kept.rerun(1, {}, cut=cut)[len(vlm.blocks)])
        text_alone = AttentionCut(range(1, 4), sets["text"], sets["object"])
        differs = (states[-1] - kept.rerun(1, {}, cut=text_alone)[len(vlm.blocks)]).abs().max()
        assert differs > 1e-4  # what image tokens tell each other matters
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
