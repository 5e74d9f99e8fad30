"""Models that transformers does not have: the route, the check, and the faults that it finds."""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import probekit as pk
from probekit import workflow
from probekit.cli.main import main
from probekit.extraction import runner
from probekit.extraction.settings import ExtractionSettings
from probekit.models import adapters
from probekit.models.conformance import check_model
from probekit.models.forward import run_pooled
from probekit.models.hooks import tap_experts
from probekit.models.load import cast_weights, load_skeleton, load_vlm, stage_table
from probekit.models.presets import short_name
from probekit.models.replay import KeptPass, NoReplay
from probekit.paths import Home
from tests.conftest import REPOSITORY
from tests.docs.documents import Document

MODELS = Document(REPOSITORY / "docs" / "models.md")

# Faults to plant into the toy: the check that names it, words of its note, what is replaced.
FAULTS = {
    "mask ignored": (
        "mask",
        "the mask is ignored",
        "causal & mask[:, None, None].bool()",
        "causal",
    ),
    "positions off by one": (
        "sharing, float32",
        "look at the positions in forward_suffix",
        "self.places.weight[start : mask.shape[1]]",
        "self.places.weight[start + (start > 0) : mask.shape[1] + (start > 0)]",
    ),
    "image tokens miscounted": (
        "image tokens",
        "15 are marked: token 15 is not",
        'return PreparedImage.of_ids(ids, image_id=IMAGE_ID, image_inputs={"pixels": pixels})',
        'made = PreparedImage.of_ids(ids, image_id=IMAGE_ID, image_inputs={"pixels": pixels})\n'
        "        [mask.__setitem__(15, False) for mask in made.image_masks]\n"
        "        return made",
    ),
    "no final norm": (
        "final norm",
        "final_norm is to be norm",
        "self.blocks, self.final_norm = self.model.blocks, self.model.norm",
        "self.blocks, self.final_norm = self.model.blocks, self.model.blocks[-1]",
    ),
    "wrong final norm": (
        "final norm",
        "does not read what leaves the last block",
        "self.blocks, self.final_norm = self.model.blocks, self.model.norm",
        "self.blocks, self.final_norm = self.model.blocks, self.model.blocks[-1].norm_2",
    ),
    "a norm that never runs": (
        "layers",
        "lm.04 came 0 times",
        "self.blocks, self.final_norm = self.model.blocks, self.model.norm",
        "self.blocks, self.final_norm = self.model.blocks, nn.LayerNorm(32)",
    ),
    "another image's cache": (
        "sharing, float32",
        "look at owner_n",
        "past = [(key[owner_n], value[owner_n]) for key, value in cache]",
        "past = [(key[owner_n * 0], value[owner_n * 0]) for key, value in cache]",
    ),
    "another image in a batch": (
        "batches",
        "from lm.00 on: look at the positions or the images",
        "self.patches(pixels).flatten(2)",
        "self.patches(pixels.flip(0)).flatten(2)",
    ),
    "prompt left out": (
        "inputs",
        "the prompt is left out",
        "self.tokenizer(prompt, add",
        'self.tokenizer("Is there?", add',
    ),
    "drawn at random": (
        "inputs",
        "it draws at random",
        "resize((32, 32)))[None]",
        "resize((32, 32)))[None] + torch.rand(1)",
    ),
    "other logits": (
        "answers",
        "its logits are not those",
        "forward = logits",
        "forward = logits\n"
        "    def logits(self, tokens, images):\n"
        "        return self.forward(tokens, images) ** 3",
    ),
}


@pytest.fixture
def toy(tmp_path) -> Path:
    """The file of the documents' toy."""
    file = tmp_path / "toy_vlm.py"
    file.write_text(MODELS.worked_examples()["toy"], encoding="utf-8")
    return file


@pytest.fixture
def examples_of_scenes(examples):
    """The examples of one task."""
    return examples[examples.task == "caption"].assign(run="toy")


# ---------------------------------------------------------------------------------------- the route


def test_a_class_of_a_file_goes_the_whole_way(toy, data, examples_of_scenes, capsys):
    activations = pk.extract(
        f"{toy}:ToyVlm", examples_of_scenes, controls=["no_image"], poolings=["mean"], device="cpu"
    )
    assert activations.layers == [f"lm.{k:02d}" for k in range(5)]
    printed = capsys.readouterr()
    assert "ToyVlm has no image_features, which switches off the stage projector" in (
        printed.out + printed.err
    )
    code_hash = adapters.find_adapter(f"{toy}:ToyVlm").hash_code()
    meta = activations.meta
    assert meta["model"] == meta["type"] == "ToyVlm"
    assert meta["revision"] == meta["settings"]["revision"] == code_hash
    assert meta["adapter"] == {"file": str(toy), "hash": code_hash}
    results = pk.probe(activations, probes=["logreg"], resamples=20)
    assert set(results.metrics.model) == {"ToyVlm"}
    assert set(results.metrics.control) >= {"none", "no_image"}
    said = results.answers().scores if hasattr(results.answers(), "scores") else results.answers()
    assert len(said)


def test_states_are_those_of_a_pass_by_hand(toy, scene_folder):
    from probekit.images import load_rgb

    vlm = load_vlm(f"{toy}:ToyVlm", device="cpu")
    image = load_rgb(next(scene_folder.rglob("*.jpg")))
    prepared = vlm.prompt_processor.prepare(image, ["Is there a dog?", "A cat?"])
    states = run_pooled(vlm, [prepared], poolings=["last"], way="shared")
    entering = []
    vlm.model.norm.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    for k, row in enumerate(prepared.tokens):
        ids = torch.from_numpy(row["input_ids"])[None]
        with torch.inference_mode():
            vlm.model(ids, torch.ones_like(ids), prepared.image_inputs["pixels"])
        expected_d = vlm.model.norm(entering[-1][0, -1])
        torch.testing.assert_close(states["lm.04/last"][k], expected_d, atol=1e-5, rtol=1e-4)


def test_changed_code_is_another_model(toy, data):
    home = Home.find()
    settings = ExtractionSettings(f"{toy}:ToyVlm").fill_in("cpu", home)
    before = settings.folder_name(home)
    assert before.startswith("ToyVlm/")
    toy.write_text(toy.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    after = ExtractionSettings(f"{toy}:ToyVlm").fill_in("cpu", home)
    assert after.folder_name(home) != before
    with pytest.raises(ValueError, match="is not the code that was asked for"):
        load_vlm(f"{toy}:ToyVlm", revision=settings.revision, device="cpu")


def test_weights_that_a_class_names_are_part_of_the_folder(toy, data):
    text = toy.read_text(encoding="utf-8")
    toy.write_text(text.replace("class ToyVlm:\n", 'class ToyVlm:\n    weights = "w"\n'), "utf-8")
    home = Home.find()
    settings = ExtractionSettings(f"{toy}:ToyVlm").fill_in("cpu", home)
    with pytest.raises(FileNotFoundError, match="of the weights of ToyVlm"):
        settings.folder_name(home)
    (toy.parent / "w").mkdir()
    (toy.parent / "w" / "a.bin").write_bytes(b"1")
    before = settings.folder_name(home)
    (toy.parent / "w" / "a.bin").write_bytes(b"2")
    assert settings.folder_name(home) != before


def test_an_installed_module_is_named_by_its_entry_point(toy, monkeypatch):
    monkeypatch.syspath_prepend(str(toy.parent))
    point = EntryPoint("my-toy", "toy_vlm:ToyVlm", adapters.GROUP)
    monkeypatch.setattr(adapters, "entry_points", lambda group: [point])
    assert short_name("my-toy") == "my-toy"
    vlm = load_vlm("my-toy", device="cpu")
    assert vlm.name == "my-toy"
    assert vlm.revision == adapters.find_adapter(f"{toy}:ToyVlm").hash_code()


def test_the_code_that_runs_is_the_code_that_is_hashed(toy, monkeypatch):
    """An edit of equal length, within the second to which Python's cache of code is exact."""
    text = toy.read_text(encoding="utf-8")
    states = []
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for state in (1, 2):
        toy.write_text(f"{text}\nSTATE = {state}\n", encoding="utf-8")
        os.utime(toy, (10**9, 10**9))
        made_of = adapters.find_adapter(f"{toy}:ToyVlm").load_class()
        states.append(sys.modules[made_of.__module__].STATE)
    assert states == [1, 2]
    assert not (toy.parent / "__pycache__").exists()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The file of the class of the entry point my-toy; its module is another file."""
    package = tmp_path / "installed_toy"
    package.mkdir()
    (package / "__init__.py").write_text("from installed_toy.inside import ToyVlm", "utf-8")
    (package / "inside.py").write_text(MODELS.worked_examples()["toy"], "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("my-toy", "installed_toy:ToyVlm", adapters.GROUP)
    monkeypatch.setattr(adapters, "entry_points", lambda group: [point])
    monkeypatch.setattr(adapters, "_IMPORTED", {}, raising=False)
    yield package / "inside.py"
    for name in ("installed_toy", "installed_toy.inside"):
        sys.modules.pop(name, None)


def test_installed_code_that_changes_needs_a_new_kernel(installed):
    before = adapters.find_adapter("my-toy").hash_code()
    assert before != adapters.find_adapter(f"{installed}:ToyVlm").hash_code()  # there are two files
    installed.write_text(installed.read_text("utf-8") + "# changed", "utf-8")
    with pytest.raises(ValueError, match=r"has changed since it was imported.*restart the kernel"):
        load_vlm("my-toy", device="cpu")


@pytest.mark.parametrize(
    ("name", "other"),
    [("qwen2-vl-2b", "a preset"), ("owner/toy", "an id on"), ("taken", "the checkpoint folder")],
)
def test_an_entry_point_takes_no_name_of_something_else(name, other, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").touch()
    point = EntryPoint(name, "toy_vlm:ToyVlm", adapters.GROUP)
    monkeypatch.setattr(adapters, "entry_points", lambda group: [point])
    with pytest.raises(ValueError, match=f"two things are called {name}: {other}"):
        adapters.find_adapter(name, tmp_path)


def test_a_relative_file_starts_at_the_home(toy, tmp_path, monkeypatch):
    """Never where one is: kernels and workers are elsewhere."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"at the home, .*or whole: {toy}:ToyVlm"):
        adapters.find_adapter("toy_vlm.py:ToyVlm", home)
    with pytest.raises(FileNotFoundError) as failure:
        adapters.find_adapter("none.py:ToyVlm", tmp_path)
    assert str(failure.value).count(str(tmp_path / "none.py")) == 1
    toy.rename(home / "toy_vlm.py")
    assert adapters.find_adapter("toy_vlm.py:ToyVlm", home).file == home / "toy_vlm.py"


def test_names_that_transformers_uses_are_free(toy, noise_images):
    taken = ("config", "processor", "special_case", "forward_arguments", "vision")
    text = toy.read_text(encoding="utf-8")
    lines = "".join(f"    {name} = {{'a': 1}}\n" for name in (*taken, "features_method"))
    toy.write_text(text.replace("class ToyVlm:\n", f"class ToyVlm:\n{lines}"), "utf-8")
    vlm = load_vlm(f"{toy}:ToyVlm", device="cpu")
    prepared = [vlm.prompt_processor.prepare(noise_images[0], ["Is there a dog?"])]
    assert "lm.04/mean" in run_pooled(vlm, prepared, poolings=["mean"], way="shared")
    assert vlm.type == "ToyVlm"
    assert vlm.vision is None
    with pytest.raises(NoReplay, match="no decoder of transformers"):
        KeptPass(vlm, prepared, way="plain")
    assert not vlm.is_native


def test_a_revision_that_is_asked_for_counts(toy, data):
    settings = ExtractionSettings(f"{toy}:ToyVlm", revision="code-0000000000000000")
    with pytest.raises(ValueError, match="is not the code that was asked for"):
        settings.fill_in("cpu", Home.find())


def test_workers_that_are_not_forked_prepare_no_images_of_an_adapter(toy, monkeypatch):
    run = runner.Runner.__new__(runner.Runner)
    run.job = SimpleNamespace(settings=SimpleNamespace(workers=3))
    run._vlm = load_vlm(f"{toy}:ToyVlm", device="cpu")
    for forks, workers in ((True, 3), (False, 0)):
        monkeypatch.setattr(runner, "FORKS", forks)
        assert run._workers == workers


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("nowhere.py:ToyVlm", FileNotFoundError, "there is no file .*nowhere.py"),
        ("{toy}:Other", ValueError, "has no class Other: it has Block"),
        ("{toy}:Block", TypeError, "width"),
    ],
)
def test_what_is_not_there_is_named(toy, model, error, message):
    with pytest.raises(error, match=message):
        load_vlm(model.format(toy=toy), device="cpu")


def test_a_class_that_lacks_something_is_refused(tmp_path):
    file = tmp_path / "half.py"
    file.write_text("class Half:\n    model = 1\n    blocks = 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"Half of .* lacks final_norm, prepare, forward"):
        load_vlm(f"{file}:Half", device="cpu")


def test_random_weights_are_asked_for_by_name(toy):
    with pytest.raises(ValueError, match="add untrained=False to its __init__"):
        load_vlm(f"{toy}:ToyVlm", device="cpu", untrained=True)
    text = toy.read_text(encoding="utf-8")
    toy.write_text(text.replace("__init__(self):\n        self.model", INIT), encoding="utf-8")
    vlm = load_vlm(f"{toy}:ToyVlm", device="cpu", untrained=True)
    assert vlm.adapter.is_untrained


INIT = "__init__(self, untrained=False):\n        self.is_untrained = untrained\n        self.model"


def test_the_seed_decides_what_is_drawn(toy):
    first, again, other = [
        load_vlm(f"{toy}:ToyVlm", device="cpu", seed=seed).model.head.weight for seed in (0, 0, 1)
    ]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_passes_of_an_adapter_do_not_run_again(toy, noise_images):
    vlm = load_vlm(f"{toy}:ToyVlm", device="cpu")
    prepared = [vlm.prompt_processor.prepare(noise_images[0], ["Is there a dog?"])]
    with pytest.raises(NoReplay, match="no decoder of transformers"):
        KeptPass(vlm, prepared, way="plain")


def test_it_is_described_without_an_extraction(toy, capsys):
    assert main(["models", f"{toy}:ToyVlm"]) == 0
    assert "ToyVlm: ToyVlm" in capsys.readouterr().out
    vlm = load_skeleton(f"{toy}:ToyVlm", with_processor=True).vlm
    assert stage_table(vlm).width.tolist() == [32]


def test_a_plan_takes_the_dtype_of_the_class(toy):
    text = toy.read_text(encoding="utf-8")
    toy.write_text(text.replace("ToyModel()\n", "ToyModel().bfloat16()\n"), encoding="utf-8")
    vlm = load_skeleton(f"{toy}:ToyVlm").vlm
    assert vlm.dtype == "bfloat16"
    assert {one.dtype for one in vlm.model.parameters()} == {torch.bfloat16}


def test_two_classes_of_one_name_are_to_be_renamed(toy, data):
    copy = toy.with_name("copy.py")
    copy.write_bytes(toy.read_bytes())
    with pytest.raises(ValueError, match=r"both called ToyVlm.*rename a folder or a class"):
        workflow.check_models([f"{toy}:ToyVlm", f"{copy}:ToyVlm"], [])


def test_computed_buffers_keep_their_precision():
    rotary = torch.nn.Module()
    rotary.register_buffer("frequencies", torch.ones(2), persistent=False)
    norm = torch.nn.LayerNorm(4)
    norm.register_buffer("means", torch.ones(2))
    norm.register_buffer("zeros", torch.zeros(2), persistent=False)
    model = cast_weights(torch.nn.Sequential(rotary, norm), torch.bfloat16)
    assert rotary.frequencies.dtype == torch.float32
    assert norm.weight.dtype == norm.means.dtype == norm.zeros.dtype == torch.bfloat16
    assert {name for name, _ in model.named_buffers()} == {"0.frequencies", "1.means", "1.zeros"}
    assert "1.means" in model.state_dict()
    assert "1.zeros" not in model.state_dict()


# ---------------------------------------------------------------------------------------- the check


def test_the_toy_passes_its_check(toy, capsys):
    assert main(["models", f"{toy}:ToyVlm", "--check"]) == 0
    printed = capsys.readouterr().out
    assert "✗" not in printed
    for line in MODELS.text.partition("### The check")[2].splitlines():
        mark = line.strip()[:1]
        if line.startswith("    ") and mark in ("✓", "–"):
            assert f"{mark} {line.strip()[2:].partition('  ')[0]}" in printed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(toy, fault):
    check, words, original, planted = FAULTS[fault]
    text = toy.read_text(encoding="utf-8")
    assert text.count(original) == 1
    toy.write_text(text.replace(original, planted), encoding="utf-8")
    findings = check_model(f"{toy}:ToyVlm", dtypes=["float32"])
    failed = findings[findings.result == "✗"]
    assert check in set(failed.check), findings.to_string()
    assert words in failed.set_index("check").note[check]


BYTES = (
    'image_inputs={"pixels": pixels}',
    'image_inputs={"pixels": (pixels * 255).byte()}',
    "self.patches(pixels)",
    "self.patches(pixels / 255)",
)


def test_images_of_whole_numbers_can_be_checked(toy):
    text = toy.read_text(encoding="utf-8").replace(*BYTES[:2]).replace(*BYTES[2:])
    toy.write_text(text, encoding="utf-8")
    findings = check_model(f"{toy}:ToyVlm", dtypes=[]).set_index("check")
    assert "✗" not in set(findings.result), findings.to_string()
    assert findings.note["image tokens"] == "16 marked, and these change with the image"
    sized = text.replace("(32, 32)", "(32, 32 + 8 * (image.getpixel((0, 0))[0] % 2))")
    sized = sized.replace("[IMAGE_ID] * 16", "[IMAGE_ID] * (pixels[0, 0].numel() // 64)")
    toy.write_text(sized, encoding="utf-8")
    findings = check_model(f"{toy}:ToyVlm", dtypes=[]).set_index("check")
    assert findings.result["image tokens"] == "–", findings.to_string()
    assert "of another shape for another image" in findings.note["image tokens"]


def test_a_checkpoint_can_be_checked_too():
    findings = check_model("tiny-qwen2-vl", dtypes=["float32"])
    assert set(findings.result) == {"✓"}


# ----------------------------------------------------------------------------- mixtures of experts


@pytest.mark.parametrize("shape", [(6,), (2, 3, 2)])
def test_choices_of_another_shape_are_refused(shape):
    mixture = torch.nn.Identity()
    mixture.num_experts = 4
    mixture.forward = lambda x, index, weights: x
    vlm = SimpleNamespace(name="toy", experts={"experts.01": mixture})
    taken = []
    with (
        tap_experts(vlm, lambda *share: taken.append(share), rows=2),
        pytest.raises(ValueError, match="leave the stage experts out"),
    ):
        mixture(torch.ones(1), torch.zeros(shape, dtype=torch.long), None)
    assert not taken


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe", "aria", "qwen3_5_moe"])
def test_routing_of_native_mixtures_is_read(name, checkpoint, noise_images):
    """The shares of a pass of all tokens are those of the experts' own arguments."""
    vlm = load_vlm(str(checkpoint(name)), device="cpu", dtype="float32")
    prepared = [vlm.prompt_processor.prepare(noise_images[0], ["Is there a dog?", "A cat?"])]
    layers = vlm.layers_of_stage["experts"]
    states = run_pooled(vlm, prepared, poolings=["mean", "last"], stages=["experts"], way="shared")
    assert {key.partition("/")[0] for key in states if key.startswith("experts")} == set(layers)
    for layer, module in vlm.experts.items():
        chosen = []
        hook = module.register_forward_pre_hook(lambda module, args, to=chosen: to.append(args[1]))
        run_pooled(vlm, [prepared[0].with_prompt(1)], poolings=["last"])
        hook.remove()
        count_e = torch.bincount(chosen[0].flatten(), minlength=module.num_experts)
        share_e = count_e / count_e.sum()
        torch.testing.assert_close(states[f"{layer}/mean"][1], share_e, atol=1e-5, rtol=1e-5)
        assert set(states[f"{layer}/last"][1].nonzero()[:, 0].tolist()) == set(
            chosen[0][-1].tolist()
        )
