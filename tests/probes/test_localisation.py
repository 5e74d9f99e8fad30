from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from probekit.extraction import reloading
from probekit.extraction.store import Activations
from probekit.models import batches, forward
from probekit.models.token_grid import NoTokenGrid, TokenGrid
from probekit.probes import localisation
from probekit.probes.results import ProbeKey
from probekit.probes.token_readers import ProbeReader
from probekit.probes.weights import ProbeWeights

# Two tokens: the left and the right half of the image.
HALVES = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1.0]])
LEFT = np.array([[0, 0, 0.5, 1.0]])


# ---- one image ----


def make_image(width=160, height=120):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def random_weights(vlm, class_count=3):
    rng = np.random.default_rng(1)
    layer_count = len(vlm.layers)
    return ProbeWeights(
        weight_ldc=rng.normal(size=(layer_count, vlm.width, class_count)).astype(np.float32),
        intercept_lc=rng.normal(size=(layer_count, class_count)).astype(np.float32),
        mean_ld=rng.normal(size=(layer_count, vlm.width)).astype(np.float32),
        scale_ld=rng.uniform(0.5, 2, (layer_count, vlm.width)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def weights(vlm):
    return random_weights(vlm)


@pytest.fixture(scope="module")
def prepared(vlm):
    """Two images, with prompts of different lengths."""
    prompts = ["Which?", "Which of these things are there, do you think?"]
    return [
        vlm.prompt_processor.prepare(make_image().rotate(90 * k), [prompt])
        for k, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def cells(vlm, prepared):
    grid = TokenGrid(vlm)
    return [grid(one, make_image().size) for one in prepared]


@pytest.fixture(scope="module")
def heat_maps(vlm, weights, prepared, cells):
    reader = ProbeReader(weights, vlm)
    by_image = localisation.compute_heat(vlm, prepared, readers=[reader], cells=cells)
    return [heat_map for (heat_map,) in by_image]


def test_heat_does_not_depend_on_the_batch(vlm, weights, prepared, cells, heat_maps):
    for one, cells_t4, heat_map in zip(prepared, cells, heat_maps, strict=True):
        reader = ProbeReader(weights, vlm)
        ((alone,),) = localisation.compute_heat(vlm, [one], readers=[reader], cells=[cells_t4])
        np.testing.assert_allclose(alone.logit_ltc, heat_map.logit_ltc, atol=2e-3)


def test_heat_is_laid_out_as_files_are_written(heat_maps):
    """safetensors writes the memory of an array, in whatever order its numbers lie there."""
    assert all(heat_map.logit_ltc.flags["C_CONTIGUOUS"] for heat_map in heat_maps)


def test_log_odds_of_the_mean_are_the_mean_of_those_of_the_tokens(
    vlm, weights, prepared, heat_maps
):
    for one, heat_map in zip(prepared, heat_maps, strict=True):
        pooled = forward.run_pooled(vlm, [one], poolings=["image_mean"])
        for k, layer in enumerate(vlm.layers):
            weight_dc, intercept_c = weights.raw_weights(k)
            state_d = pooled[f"{layer}/image_mean"][0].double()
            expected_c = state_d @ weight_dc.double() + intercept_c
            mean_c = heat_map.logit_ltc[k].mean(0)
            np.testing.assert_allclose(mean_c, expected_c, atol=1e-3, rtol=1e-3)


def test_heat_is_the_probe_of_the_hidden_states_of_the_image_tokens(
    vlm, weights, prepared, heat_maps
):
    tokens = batches.batch_tokens(vlm, [prepared[0].tokens[0]])
    images = batches.batch_images(vlm, prepared[:1])
    with torch.inference_mode():
        output = vlm.model(**tokens, **images, use_cache=False, output_hidden_states=True)
    is_image_token = torch.from_numpy(prepared[0].image_masks[0])
    weight_dc, intercept_c = weights.raw_weights(3)
    expected_tc = output.hidden_states[3][0, is_image_token] @ weight_dc + intercept_c
    np.testing.assert_allclose(heat_maps[0].logit_ltc[3], expected_tc, atol=2e-3)


def planted_heat(cells_t4=HALVES):
    """Two layers, two tokens, three classes; class 2 has no heat."""
    logit_ltc = np.zeros((2, 2, 3))
    logit_ltc[0, :, 0] = [4, 0]  # at layer 0 all heat of class 0 is on the left
    logit_ltc[1, :, 0] = [0, 4]
    logit_ltc[:, :, 1] = [0, 1]
    return localisation.HeatMap(logit_ltc, cells_t4)


def test_box_shares_of_planted_heat():
    shares = localisation.box_shares(planted_heat(), LEFT)
    np.testing.assert_allclose(shares.heat_lc, [[1, 0, 0], [0, 0, 0]])
    assert shares.area == 0.5


def test_boxes_around_everything_or_nothing_tell_nothing():
    everything = np.array([[0, 0, 1, 1.0]])
    assert localisation.box_shares(planted_heat(), everything) is None
    assert localisation.box_shares(planted_heat(), np.zeros((0, 4))) is None


def test_heat_on_padding_is_nowhere():
    beside_the_image = np.array([[-0.5, 0, 0, 1], [0, 0, 1, 1.0]])
    shares = localisation.box_shares(planted_heat(beside_the_image), LEFT)
    np.testing.assert_allclose(shares.heat_lc[:, 1], 0.5, atol=1e-6)


def test_boxes_are_shares_of_the_image():
    instance = {"x": 10, "y": 20, "w": 30, "h": 40, "width": 100, "height": 80}
    boxes = localisation.relative_boxes(pd.DataFrame([instance]))
    np.testing.assert_allclose(boxes, [[0.1, 0.25, 0.4, 0.75]])


# ---- pairs of image and category ----

CLASSES = ["cup", "car", "kite"]
CUP = {
    "category": "cup",
    "x": 0,
    "y": 0,
    "w": 50,
    "h": 100,
    "width": 100,
    "height": 100,
    "iscrowd": 0,
}


def score_categories(*instances, readable=(0, 1, 2)):
    table = pd.DataFrame(list(instances)).assign(image_id=1)
    shown = localisation._shown_by_image(table)[1]
    scores = localisation._score_categories(
        planted_heat(), shown, classes=CLASSES, readable=readable
    )
    return list(scores)


def test_a_category_in_boxes_is_scored_against_absent_ones():
    (scores,) = score_categories(CUP)
    np.testing.assert_allclose(scores["heat_in_boxes"], [1, 0])
    np.testing.assert_allclose(scores["others_in_boxes"], [0, 0])
    np.testing.assert_allclose(scores["area_in_boxes"], 0.5)
    np.testing.assert_allclose(scores["localisation"], [1, 0])
    assert len(score_categories(CUP, CUP | {"category": "car", "x": 50})) == 2


def test_a_crowd_is_neither_scored_nor_absent():
    assert score_categories(CUP | {"iscrowd": 1}) == []
    kites = CUP | {"category": "kite", "iscrowd": 1}
    (scores,) = score_categories(CUP | {"x": 50}, kites)
    np.testing.assert_allclose(scores["others_in_boxes"], [1, 1])  # of cars alone


def test_a_category_that_cannot_be_read_is_not_scored():
    assert score_categories(CUP, readable=(1, 2)) == []


def test_the_table_averages_pairs_and_finds_the_layer():
    rng = np.random.default_rng(0)
    n = 120
    heat_nl = rng.uniform(0.1, 0.3, (n, 4)) + np.array([0, 0, 0.4, 0])
    others_nl = rng.uniform(0.1, 0.3, (n, 4))
    scores = {
        "heat_in_boxes": heat_nl,
        "others_in_boxes": others_nl,
        "area_in_boxes": np.full((n, 4), 0.2),
        "localisation": heat_nl - others_nl,
    }
    layers = [f"lm.{k:02d}" for k in range(4)]
    table = localisation.localisation_table(
        scores, np.repeat(np.arange(60), 2), layers=layers, resamples=500
    )
    assert set(table.metric) == set(localisation.METRICS)
    assert (table.n == n).all()
    heat = table[table.metric == "heat_in_boxes"].reset_index()
    np.testing.assert_allclose(heat.value, heat_nl.mean(0))
    assert (heat.lo < heat.value).all()
    assert (heat.value < heat.hi).all()
    assert heat.hi[2] - heat.lo[2] < 0.05
    gain = table[table.metric == "localisation"].set_index("layer")
    assert gain.index[gain.plateau.astype(bool)].tolist() == ["lm.02"]
    assert (gain.lo.drop("lm.02") < 0.02).all()


# ---- a run ----


@pytest.fixture
def localise(small_run, tmp_path):
    """Call add_localisation for the small run, with a folder of results of the test's own."""
    record = small_run.results.stores[0]["record"]
    activations = Activations.open(record, small_run.examples)

    def call(task="category", *, results=small_run.results, keep=3):
        return localisation.add_localisation(
            activations,
            results=results,
            instances=small_run.instances,
            task=task,
            folder=tmp_path,
            keep=keep,
            resamples=50,
            device="cpu",
        )

    return call


def test_only_local_tasks_have_heat(small_run, localise, capsys):
    for task in ("caption", "no_such_task"):
        assert localise(task) is small_run.results
    assert "no task 'caption' about categories" in capsys.readouterr().out


def test_without_probes_of_decoder_layers_the_lens_is_left(small_run, localise, capsys):
    without_probes = replace(small_run.results, weights={})
    heat = localise(results=without_probes).heat
    assert {(key.probe, key.pooling) for key in heat} == {("lens", "none")}
    assert "no logreg probes" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_whose_tokens_have_no_place_is_passed_over_once(localise, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise NoTokenGrid("its tokens lie nowhere")

    monkeypatch.setattr(localisation, "check_token_grid", fail)
    assert localise().heat == {}
    assert "lie nowhere" in capsys.readouterr().out
    monkeypatch.setattr(localisation, "reload_model", None)  # it is not loaded for that again
    assert localise().heat == {}
    assert "lie nowhere" in capsys.readouterr().out


def test_a_model_that_is_gone_names_the_setting_that_leaves_it_out(localise, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no weights here")

    monkeypatch.setattr(reloading, "load_vlm", fail)
    with pytest.raises(OSError, match=r'no weights here.*localise="" leaves it out'):
        localise()


def test_stored_heat_is_that_of_the_first_test_images(small_run):
    key = ProbeKey("tiny-qwen2-vl", "none", "mean", "category", "logreg")
    stored = localisation.StoredHeat(small_run.results.heat)
    assert key in stored.files
    is_test = (small_run.examples.task == "category") & (small_run.examples.split == "test")
    image_ids = small_run.examples.image_id[is_test].tolist()
    heat_map = stored.get(key, image_ids[0])
    probes = small_run.results.probe_weights(model=key.model, pooling="mean", task=key.task)
    layer_count, _, class_count = probes.weight_ldc.shape
    assert heat_map.logit_ltc.shape == (layer_count, len(heat_map.cells_t4), class_count)
    assert stored.get(key, image_ids[7]) is not None
    assert stored.get(key, image_ids[8]) is None  # eight are kept
    assert stored.get(key._replace(task="caption"), image_ids[0]) is None
    gone = localisation.StoredHeat({key: "data/gone.safetensors"})
    assert gone.get(key, image_ids[0]) is None


def test_localisation_adds_its_metrics_beside_those_of_the_probes(small_run):
    metrics = small_run.results.metrics
    rows = metrics[metrics.metric == "localisation"]
    assert set(rows.control) == {"none", "untrained"}
    readers = set(zip(rows.probe, rows.pooling, strict=True))
    assert readers == {("logreg", "mean"), ("lens", "none")}  # of "last" tokens no mean is taken
    assert set(rows.settings) <= set(metrics.settings[metrics.metric == "accuracy"])
    layers = metrics.layer[(metrics.metric == "accuracy") & (metrics.stage == "lm")]
    for _, of_reader in rows.groupby("probe"):
        assert set(of_reader.layer) == set(layers)
