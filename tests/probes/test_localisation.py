import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from probekit.models import batches, forward
from probekit.models.token_grid import TokenGrid
from probekit.probes import localisation
from probekit.probes.weights import ProbeWeights

HALVES = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1.0]])


def scene(width=160, height=120):
    small = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def random_linear(vlm, classes=3):
    rng = np.random.default_rng(1)
    shape = len(vlm.layers), vlm.width
    return ProbeWeights(rng.normal(size=(*shape, classes)).astype(np.float32),
                  rng.normal(size=(shape[0], classes)).astype(np.float32), rng.normal(size=shape).astype(np.float32),
                  rng.uniform(0.5, 2, shape).astype(np.float32))


def test_heat_is_the_probe_of_every_token_in_whatever_batch(vlm):
    linear = random_linear(vlm)
    prompts = ["Which?", "Which of these things are there, do you think?"]
    prepared = [vlm.prompt_processor.prepare(scene().rotate(90 * k), [prompt]) for k, prompt in enumerate(prompts)]
    cells = [TokenGrid(vlm)(one, scene().size) for one in prepared]
    together = localisation.heat(vlm, prepared, linear, cells)
    for one, cell, both in zip(prepared, cells, together, strict=True):
        alone, = localisation.heat(vlm, [one], linear, [cell])
        np.testing.assert_allclose(alone.logit_ltc, both.logit_ltc, atol=2e-3)
        pooled = forward.run_pooled(vlm, [one], poolings=["image_mean"])  # log-odds of the mean are the mean of the log-odds
        for k, layer in enumerate(vlm.layers):
            weight, intercept = linear.raw_weights(k)
            expected = pooled[f"{layer}/image_mean"][0].double() @ weight.double() + intercept
            np.testing.assert_allclose(both.logit_ltc[k].mean(0), expected, atol=1e-3, rtol=1e-3)
    tokens = batches.batch_tokens(vlm, [prepared[0].tokens[0]])
    with torch.inference_mode():
        hidden = vlm.model(**tokens, **batches.batch_images(vlm, prepared[:1]), use_cache=False,
                           output_hidden_states=True).hidden_states[3][0, torch.from_numpy(prepared[0].image_masks[0])]
    weight, intercept = linear.raw_weights(3)
    np.testing.assert_allclose(together[0].logit_ltc[3], hidden @ weight + intercept, atol=2e-3)


def planted_heat(cells=HALVES):
    logits = np.zeros((2, 2, 3))
    logits[0, :, 0] = [4, 0]  # layer 0: all of class 0's heat on the left
    logits[1, :, 0] = [0, 4]
    logits[:, :, 1] = [0, 1]
    return localisation.HeatMap(logits, cells)


def test_shares_of_planted_heat():
    left = np.array([[0, 0, 0.5, 1.0]])
    share, area = localisation.shares(planted_heat(), left)
    np.testing.assert_allclose(share, [[1, 0, 0], [0, 0, 0]])
    assert area == 0.5
    assert localisation.shares(planted_heat(), np.array([[0, 0, 1, 1.0]])) is None  # a box around everything tells nothing
    assert localisation.shares(planted_heat(), np.zeros((0, 4))) is None
    beside = planted_heat(np.array([[-0.5, 0, 0, 1], [0, 0, 1, 1.0]]))  # heat on padding is nowhere
    np.testing.assert_allclose(localisation.shares(beside, left)[0][:, 1], 0.5, atol=1e-6)


def test_pairs_are_of_what_is_shown_in_boxes_and_could_be_learnt():
    row = {"category": "cup", "x": 0, "y": 0, "w": 50, "h": 100, "width": 100, "height": 100, "iscrowd": 0}
    classes, all_learnt = ["cup", "car", "kite"], np.arange(3)

    def pairs(rows, learnt=all_learnt):
        return [*localisation._pairs(planted_heat(), pd.DataFrame(rows), classes, learnt)]

    told, = pairs([row])
    np.testing.assert_allclose(told["heat_in_boxes"], [1, 0])
    np.testing.assert_allclose(told["others_in_boxes"], [0, 0])
    np.testing.assert_allclose(told["area_in_boxes"], 0.5)
    np.testing.assert_allclose(told["localisation"], [1, 0])
    assert len(pairs([row, row | {"category": "car", "x": 50}])) == 2
    assert pairs([row | {"iscrowd": 1}]) == []  # nobody knows where a crowd ends
    assert pairs([row], np.array([1, 2])) == []  # no probe could learn it
    right, = pairs([row | {"x": 50}, row | {"category": "kite", "iscrowd": 1}])  # a crowd of kites is not absent
    np.testing.assert_allclose(right["others_in_boxes"], [1, 1])


def test_what_has_no_heat_is_passed_over_with_a_word(small_run, tmp_path, monkeypatch, capsys):
    from probekit.extraction.store import Activations
    from probekit.models.token_grid import NoTokenGrid

    examples, whole = small_run.examples, small_run.results
    stores = [Activations.open(one["record"], examples) for one in whole.stores]

    def heat(task, results=whole, keep=3):
        return localisation.add_localisation(stores, examples, small_run.instances, task, results, tmp_path, keep, 50, "cpu")

    for task in ("caption", "no_such_task"):
        assert heat(task) is whole
    assert "no task 'caption' about categories" in capsys.readouterr().out
    without = dataclasses.replace(whole, linear={})
    assert heat("category", without).heat == {} and "no logreg probes" in capsys.readouterr().out

    def broken(*arguments):
        raise NoTokenGrid("its tokens lie nowhere")

    monkeypatch.setattr(localisation, "check", broken)
    assert heat("category").heat == {} and "lie nowhere" in capsys.readouterr().out
    monkeypatch.setattr(localisation, "load_vlm", None)
    assert heat("category").heat == {} and "lie nowhere" in capsys.readouterr().out  # it is not loaded for that again
    monkeypatch.setattr(localisation, "load_vlm", lambda *arguments: (_ for _ in ()).throw(OSError("no weights here")))
    with pytest.raises(OSError, match=r'no weights here.*localise="" leaves it out'):
        heat("category", keep=4)


def test_the_table_averages_pairs_and_finds_the_layer():
    rng = np.random.default_rng(0)
    n, image = 120, np.repeat(np.arange(60), 2)
    own = rng.uniform(0.1, 0.3, (n, 4)) + np.array([0, 0, 0.4, 0])
    others = rng.uniform(0.1, 0.3, (n, 4))
    found = {"heat_in_boxes": own, "others_in_boxes": others, "area_in_boxes": np.full((n, 4), 0.2),
             "localisation": own - others}
    table = localisation.table(found, image, [f"lm.{k:02d}" for k in range(4)], 500)
    assert set(table.metric) == set(localisation.METRICS) and (table.n == n).all()
    heat = table[table.metric == "heat_in_boxes"].reset_index()
    np.testing.assert_allclose(heat.value, own.mean(0))
    assert (heat.lo < heat.value).all() and (heat.value < heat.hi).all() and heat.hi[2] - heat.lo[2] < 0.05
    gain = table[table.metric == "localisation"]
    assert gain[gain.plateau.astype(bool)].layer.tolist() == ["lm.02"]
    assert (gain.lo.iloc[[0, 1, 3]] < 0.02).all()


def test_boxes_are_shares_of_the_image():
    one = pd.DataFrame([{"x": 10, "y": 20, "w": 30, "h": 40, "width": 100, "height": 80}])
    np.testing.assert_allclose(localisation.boxes_of(one), [[0.1, 0.25, 0.4, 0.75]])
