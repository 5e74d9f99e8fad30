"""On a GPU: the states and scores of the CPU, and nothing waits, is read too early, or is lost."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import probekit
from probekit import workflow
from probekit.extraction.extracting import extract_tables
from probekit.extraction.loading import fill_batches, prepare_images
from probekit.extraction.settings import ExtractionSettings
from probekit.extraction.shards import model_inputs
from probekit.extraction.store import Activations
from probekit.models import forward
from probekit.models.load import load_vlm
from probekit.models.sharing import choose_way
from probekit.paths import Home
from probekit.probes.labels import LabelledTask
from probekit.probes.transfer import nearest_examples
from tests.conftest import DEMO_MODELS, SPLIT_SIZES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
POOLINGS = ("mean", "max", "last", "image_mean", "token:3")
STAGES = ("lm", "vision", "projector")
# Of the largest value of a layer: what float32 sums in another order differ by.
ROUNDING = 1e-4
PACKAGE = Path(probekit.__file__).parent


@pytest.fixture(params=DEMO_MODELS)
def model(request) -> str:
    return request.param


@pytest.fixture
def extract_on(examples, model, tmp_path):
    """Extract the examples of the scenes on a device, each time into an empty home."""
    homes = iter(range(100))

    def extract(device: str, **settings) -> Activations:
        options = {"dtype": "float32", "poolings": POOLINGS, "stages": STAGES} | settings
        home = Home.find(tmp_path / str(next(homes)))
        return extract_tables(
            ExtractionSettings(model, **options), {"none": examples}, device=device, home=home
        )

    return extract


def assert_same_states(found: Activations, expected: Activations, tolerance: float) -> None:
    for pooling in expected.poolings:
        for layer in expected.layers_with(pooling):
            values_nd = expected[layer, pooling]
            difference = np.abs(found[layer, pooling] - values_nd).max()
            assert difference <= tolerance * np.abs(values_nd).max(), (layer, pooling)


def batches_of(vlm, examples: pd.DataFrame, tokens: int):
    home = Home.find()
    rows = model_inputs(examples, home)
    items = prepare_images(
        vlm.prompt_processor, [rows], longest_side=None, home=home, dtype=vlm.dtype
    )
    for batch in fill_batches(items, token_budget=lambda: tokens, way=lambda: "shared"):
        yield [item.prepared for item in batch]


def test_the_states_are_those_of_the_cpu(extract_on):
    on_gpu = extract_on("cuda", workers=2)
    assert on_gpu.meta["sharing"][f"{torch.cuda.get_device_name()} float32"]["way"] == "shared"
    assert_same_states(on_gpu, extract_on("cpu"), tolerance=1e-3)  # on disk they are in float16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shared_passes_are_exact(model, examples, dtype, monkeypatch):
    # cuDNN convolves float32 in TF32, in another way for other numbers of images.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vlm = load_vlm(model, dtype=dtype, device="cuda")
    # A token before the image is the same in all examples: there is only rounding to compare.
    poolings = [name for name in POOLINGS if name != "token:3"]
    for prepared in batches_of(vlm, examples, tokens=4000):
        options = {"poolings": poolings, "stages": ("lm",)}
        verdict, states = choose_way(vlm, prepared, ways=["shared"], **options)
        assert verdict.way == "shared", verdict.reason
        if dtype != "float32":
            continue
        for key, alone in forward.run_pooled(vlm, prepared, way="alone", **options).items():
            assert (states[key] - alone).abs().max() <= ROUNDING * alone.abs().max(), key


def test_nothing_is_read_before_it_is_there(extract_on, monkeypatch):
    expected = extract_on("cuda")
    run_pooled = forward.run_pooled

    def run_late(*args, **options):
        torch.cuda._sleep(100_000_000)  # cycles: some fifty milliseconds before each batch
        return run_pooled(*args, **options)

    monkeypatch.setattr(forward, "run_pooled", run_late)
    assert_same_states(extract_on("cuda"), expected, tolerance=0)


def test_the_hot_path_does_not_wait_for_the_device(model, examples):
    """Whatever waits in a pass is transformers' own."""
    vlm = load_vlm(model, dtype="bfloat16", device="cuda")
    waiting: Counter[str] = Counter()
    batches = list(batches_of(vlm, examples, tokens=2000))
    for way in ("shared", "plain"):
        for stages in (("lm",), STAGES):
            forward.run_pooled(vlm, batches[0], poolings=POOLINGS, stages=stages, way=way)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    for prepared in batches[1:]:
                        states = forward.run_pooled(
                            vlm, prepared, poolings=POOLINGS, stages=stages, way=way
                        )
                        for values in states.values():
                            values.to("cpu", non_blocking=True)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            waiting.update(
                f"{warning.filename}:{warning.lineno}"
                for warning in caught
                if "called a synchronizing CUDA operation" in str(warning.message)
            )
    print(len(batches) - 1, "batches:", dict(waiting))
    ours = [place for place in waiting if Path(place).is_relative_to(PACKAGE)]
    assert not ours


def test_a_batch_that_does_not_fit_runs_in_parts(extract_on, capsys):
    expected = extract_on("cuda", sharing="off", workers=0)
    _, total_bytes = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 120e6
    torch.cuda.set_per_process_memory_fraction(limit / total_bytes)
    try:
        found = extract_on("cuda", sharing="off", workers=0, batch_tokens=1_000_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "does not fit the memory of cuda" in "".join(capsys.readouterr())
    assert_same_states(found, expected, tolerance=1e-3)


def test_weights_go_to_the_device_without_a_copy_on_the_host(model, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    vlm = load_vlm(model, dtype="bfloat16", device="cuda:0")
    tensors = [*vlm.model.parameters(), *vlm.model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}


def test_probes_have_the_scores_of_the_cpu(scene_folder, tmp_path):
    examples = workflow.build_examples(scene_folder, run="small", home=tmp_path, **SPLIT_SIZES)
    activations = workflow.extract("tiny-qwen2-vl", examples, device="cuda", home=tmp_path)
    tables = {}
    similarities = []
    for device in ("cpu", "cuda"):
        results = workflow.probe(
            activations,
            device=device,
            probes=["logreg", "linear", "mlp"],
            strengths=[0.01, 1.0],
            epochs=3,
            resamples=50 + (device == "cuda"),  # other settings, so nothing is read back
            localise="category",
            home=tmp_path,
        )
        tables[device] = results.metrics
        similarities.append(results.similarity.cka)
    keys = ["probe", "pooling", "task", "control", "layer", "metric", "class", "split", "seed"]
    merged = tables["cpu"].merge(tables["cuda"], on=keys, suffixes=("", "_cuda"))
    assert len(merged) == len(tables["cpu"]) == len(tables["cuda"])
    difference = (merged.value - merged.value_cuda).abs()
    print(merged.assign(difference=difference).groupby(["probe", "metric"]).difference.max())
    # The seeds of the others draw other numbers on another device.
    is_the_same = merged.probe.isin(["logreg", "answer", "lens", "tuned_lens"])
    assert difference[is_the_same].max() < 1e-3
    np.testing.assert_allclose(*similarities, rtol=1e-3, atol=1e-4)


def test_equal_probabilities_have_the_same_scores(examples):
    for name in ("caption", "category"):
        tables = []
        for device in ("cpu", "cuda"):
            task = LabelledTask.from_examples(examples, name, device=device)
            y_nc = task.true.select("test").y_nc
            p_lnc = np.random.default_rng(0).random((3, *y_nc.shape)).astype(np.float32)
            table = task.true.score(
                p_lnc, split="test", layers=["a", "b", "c"], resamples=300, by_class=True
            )
            tables.append(table)
        pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-6)


def test_neighbours_are_those_of_the_cpu():
    x_nd = np.random.default_rng(0).normal(size=(1500, 32)).astype(np.float32)
    of_cpu, of_gpu = (nearest_examples(x_nd, device=device) for device in ("cpu", "cuda"))
    assert (of_cpu == of_gpu).mean() > 0.999  # the last bit decides between two that are as near


def intervene_on(model: str, device: str, scene_folder: Path, root: Path, **settings):
    """The table of some interventions, in a home of their own."""
    home = Home.find(root / device)
    examples = workflow.build_examples(scene_folder, run="small", home=home, **SPLIT_SIZES)
    activations = workflow.extract(model, examples, device=device, home=home, **settings)
    table = workflow.intervene(
        activations,
        layers=[0, 5, 8],
        images=8,
        fit_images=30,
        resamples=50,
        device=device,
        home=home,
    )
    keys = ["layer", "intervention", "site", "dose", "control", "metric", "read_layer"]
    return table.set_index(keys).value


def test_interventions_do_what_they_do_on_the_cpu(model, scene_folder, tmp_path):
    expected, found = [
        intervene_on(model, device, scene_folder, tmp_path, dtype="float32")
        for device in ("cpu", "cuda")
    ]
    assert found.index.equals(expected.index)
    margins = expected.index.get_level_values("metric") == "margin"
    np.testing.assert_allclose(found[margins], expected[margins], atol=0.02)


def test_interventions_in_half_precision_change_nothing_where_nothing_is_changed(
    model, scene_folder, tmp_path
):
    table = intervene_on(model, "cuda", scene_folder, tmp_path, dtype="bfloat16")
    assert {"leace", "cut", "steer"} <= set(table.index.get_level_values("intervention"))
