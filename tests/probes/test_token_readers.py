"""The lens on image tokens: the words that each of them would say, by the model's own head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from probekit.models import batches
from probekit.models.load import load_vlm
from probekit.models.output_head import AnswerHead, FinalNorm, NoAnswers, Spelling, take_answer_head
from probekit.models.token_grid import TokenGrid
from probekit.probes.localisation import compute_heat
from probekit.probes.token_readers import LensReader, ProbeReader
from tests.conftest import DEMO_MODELS
from tests.probes.test_localisation import random_weights

CLASSES = ("cup", "car", "kite")


@pytest.fixture(scope="module", params=DEMO_MODELS)
def vlm(request):
    """A demo model with its output embedding."""
    vlm = load_vlm(request.param, device="cpu", with_head=True)
    yield vlm
    vlm.release()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((160, 120), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def prepared(vlm, image):
    return vlm.prompt_processor.prepare(image, ["Which?"])


def tokens_of(vlm, word: str) -> list[int]:
    """First tokens of the spellings of a word."""
    tokenizer = vlm.processor.tokenizer
    texts = [pad + form for pad in ("", " ") for form in (word, word.capitalize(), word.upper())]
    first_tokens = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in texts]
    return sorted(set(first_tokens))


def test_the_lens_reads_what_the_whole_head_says_of_each_image_token(vlm, image, prepared):
    reader = LensReader.of(vlm, CLASSES, prepared)
    cells = [TokenGrid(vlm)(prepared, image.size)]
    ((heat_map,),) = compute_heat(vlm, [prepared], readers=[reader], cells=cells)
    inputs = batches.batch_tokens(vlm, [prepared.tokens[0]])
    inputs |= batches.batch_images(vlm, [prepared])
    with torch.inference_mode(), vlm.head.in_place():
        output = vlm.head.full_model(**inputs, use_cache=False, output_hidden_states=True)
    is_image_token = torch.from_numpy(prepared.image_masks[0])
    by_class = [set(tokens_of(vlm, word)) for word in CLASSES]
    claimed = [token for tokens in by_class for token in tokens]
    own = [sorted(token for token in tokens if claimed.count(token) == 1) for tokens in by_class]
    norm = take_answer_head(vlm, CLASSES, prepared).norm
    weight_vd = vlm.head.module.weight
    for k in (0, 3, len(vlm.layers) - 1):
        logits_tv = output.logits[0, is_image_token].double()
        if k < len(vlm.layers) - 1:
            hidden_td = output.hidden_states[k][0, is_image_token]
            normed_td = torch.from_numpy(norm(hidden_td.numpy()))
            logits_tv = (normed_td @ weight_vd.T).detach().double()
        p_tv = logits_tv.softmax(-1)
        p_tc = torch.stack([p_tv[:, tokens].sum(-1) for tokens in own], -1)
        expected_tc = (p_tc / p_tc.sum(-1, keepdim=True)).log()
        np.testing.assert_allclose(heat_map.logit_ltc[k], expected_tc, atol=2e-3)


def test_both_readers_read_in_one_pass(vlm, image, prepared):
    weights = random_weights(vlm)
    readers = [ProbeReader(weights, vlm), LensReader.of(vlm, CLASSES, prepared)]
    cells = [TokenGrid(vlm)(prepared, image.size)]
    ((of_probe, of_lens),) = compute_heat(vlm, [prepared], readers=readers, cells=cells)
    ((probe_alone,),) = compute_heat(vlm, [prepared], readers=readers[:1], cells=cells)
    np.testing.assert_array_equal(of_probe.logit_ltc, probe_alone.logit_ltc)
    assert of_lens.logit_ltc.shape == of_probe.logit_ltc.shape
    np.testing.assert_allclose(np.exp(of_lens.logit_ltc).sum(-1), 1, atol=1e-5)


# ---- planted heads ----


class TwoLayers:
    """As much of a model as readers ask for."""

    device = "cpu"
    layers = ("lm.00", "lm.01")


def planted_head(**changes) -> AnswerHead:
    """Words along the first axes; "traffic light" and "traffic cone" begin alike."""
    words = {"cup": (5,), "traffic light": (6, 7), "traffic cone": (6, 8), "kite": (9,)}
    head = AnswerHead(
        spellings=tuple(Spelling(word, 0, ids) for word, ids in words.items()),
        token_ids=(5, 6, 7, 8, 9),
        rows_vd=np.eye(5, 4, dtype=np.float32)[[0, 1, 4, 4, 2]],
        norm=FinalNorm("none"),
    )
    return replace(head, **changes)


PLANTED = ("cup", "traffic light", "traffic cone", "kite")


def test_names_that_begin_alike_are_not_read():
    reader = LensReader(planted_head(), PLANTED, TwoLayers())
    assert reader.readable.tolist() == [0, 3]
    hidden_ntd = torch.tensor([[[4.0, 9.0, 0.0, 0.0], [0.0, 9.0, 4.0, 0.0]]])
    read_tc = reader("lm.00", hidden_ntd)[0].numpy()
    assert read_tc[0, 0] > np.log(0.9)
    assert read_tc[1, 3] > np.log(0.9)
    assert not read_tc[:, [1, 2]].any()


def test_the_norm_comes_before_all_layers_but_the_last():
    norm = FinalNorm("rms", weight_d=np.array([1, 1, 1, 2], np.float32), epsilon=1e-6)
    centred = FinalNorm("layer", bias_d=np.array([0, 0, 5, 0], np.float32), epsilon=1e-6)
    hidden_ntd = torch.tensor([[[100.0, 0.0, 100.0, 0.0]]])
    for one in (norm, centred):
        reader = LensReader(planted_head(norm=one), PLANTED, TwoLayers())
        normed_nd = one(hidden_ntd[0].numpy())
        expected = normed_nd[0, [0, 2]] - np.logaddexp(*normed_nd[0, [0, 2]])
        read = reader("lm.00", hidden_ntd)[0, 0, [0, 3]].numpy()
        np.testing.assert_allclose(read, expected, atol=1e-5)
        last = reader("lm.01", hidden_ntd)[0, 0, [0, 3]].numpy()
        np.testing.assert_allclose(last, np.log(0.5), atol=1e-5)


def test_bias_scale_and_soft_cap_are_those_of_the_head():
    head = planted_head(bias_v=np.array([0, 0, 0, 0, 1], np.float32), scale=0.5, soft_cap=2.0)
    hidden_ntd = torch.tensor([[[3.0, 0.0, 4.0, 0.0]]])
    logits_v = head.token_logits(hidden_ntd[0].numpy(), is_normed=False)[0, [0, 4]]
    read = LensReader(head, PLANTED, TwoLayers())("lm.00", hidden_ntd)[0, 0, [0, 3]].numpy()
    np.testing.assert_allclose(read, logits_v - np.logaddexp(*logits_v), atol=1e-5)


@pytest.mark.parametrize(
    ("head", "classes", "message"),
    [
        (AnswerHead.refused("its checkpoint has no output embedding"), PLANTED, "no output embed"),
        (planted_head(norm=None), PLANTED, "final norm is not one that is known"),
        (planted_head(), ("traffic light", "traffic cone", "cup"), "fewer than two of the classes"),
    ],
)
def test_a_model_without_a_lens_is_refused(head, classes, message):
    with pytest.raises(NoAnswers, match=message):
        LensReader(head, classes, TwoLayers())
