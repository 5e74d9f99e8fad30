"""Every layer of every architecture that docs/models.md names, on tiny random models.

``python -m tests.models.test_architectures`` measures them all, and writes the table into
``probekit/models/architectures.csv`` and ``docs/models.md``.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoConfig

from probekit.models import presets
from probekit.models.architectures import (
    REFUSED,
    SpecialCase,
    count_blocks,
    find_special_case,
    has_text_encoder,
    merge_streams,
)
from probekit.models.forward import States, run_pooled
from probekit.models.load import Vlm, load_skeleton, load_vlm, stage_table
from probekit.models.processor import PreparedImage
from probekit.models.replay import KeptPass
from probekit.models.replay_check import ReplayVerdict, check_replay
from probekit.models.sharing import SharingVerdict, choose_way
from probekit.models.token_grid import NoTokenGrid, check_token_grid
from tests.conftest import REPOSITORY
from tests.support.architectures import RECIPES, save_checkpoint

DOCUMENT = REPOSITORY / "docs" / "models.md"
TABLE_BEGIN = "<!-- architectures: written by tests/models/test_architectures.py -->\n"
TABLE_END = "<!-- end -->\n"

POOLINGS = ("mean", "max", "last", "cls", "token:3")
PROMPTS = (
    (
        "Is there a dog? one",
        "Is there a dog? A much longer prompt, of more words",
        "Is there a dog?!",
    ),
    (
        "Is there a cat?",
        "Is there a dog? yes, or no",
    ),
)
# Architectures for which transformers' last hidden state is not that after the final norm.
WITHOUT_FINAL_NORM = ("gemma3n",)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_layers_padding_sharing_and_stages(name, checkpoint):
    row = measure_architecture(name, checkpoint(name))
    expected = presets.read_checked_architectures().loc[name]
    assert {column: str(value) for column, value in row.items()} == {
        "architecture": name,
        **expected.astype(str).to_dict(),
    }


def test_the_document_has_the_table_that_was_measured():
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text.partition(TABLE_BEGIN)[2].partition(TABLE_END)[0]
    assert table == format_markdown(presets.read_checked_architectures().reset_index())


def test_every_preset_is_of_a_checked_type():
    architectures = presets.read_checked_architectures()
    assert list(architectures.index) == list(RECIPES)
    for preset in presets.PRESETS.values():
        assert preset.type in RECIPES
    text = presets.list_models()
    for name in [*presets.PRESETS, *presets.NOT_IN_TRANSFORMERS, *RECIPES]:
        assert name in text


def test_parallel_streams_are_averaged():
    streams_sntd = torch.arange(48.0).reshape(2, 1, 3, 8)
    expected = (streams_sntd[0] + streams_sntd[1]) / 2
    for axis in (0, 2, -1):
        case = SpecialCase(stream_axis=axis)
        merged = merge_streams(streams_sntd.movedim(0, axis), case, width=8)
        assert torch.equal(merged, expected)
        side_by_side = torch.cat(list(streams_sntd), -1)
        assert torch.equal(merge_streams(side_by_side, case, width=8), expected)
    assert merge_streams(expected, SpecialCase(), width=8) is expected


@pytest.mark.parametrize("model_type", REFUSED)
def test_an_architecture_that_cannot_be_read_is_refused_in_one_line(model_type):
    config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"type {model_type} cannot be read: .*lists those that"):
        find_special_case(config)


def test_it_is_refused_before_anything_but_its_config_is_read(tmp_path):
    AutoConfig.for_model("git").save_pretrained(tmp_path)
    for load in (load_vlm, load_skeleton):
        with pytest.raises(ValueError, match="type git cannot be read"):
            load(str(tmp_path))


def test_streams_that_stand_side_by_side_are_those_of_the_config(checkpoint):
    """Each is as wide as the embeddings, which are repeated for them."""
    vlm = load_vlm(str(checkpoint("qwen4_exp")), device="cpu")
    assert vlm.width == vlm.model.get_input_embeddings().embedding_dim
    hidden = torch.cat([torch.full((1, 2, vlm.width), float(k)) for k in range(4)], -1)
    merged = merge_streams(hidden, vlm.special_case, width=vlm.width)
    assert torch.equal(merged, torch.full((1, 2, vlm.width), 1.5))


# --------------------------------------------------------------------------------- one architecture


def measure_architecture(name: str, folder: Path) -> dict[str, str | int]:
    """Check that an architecture is read as it should be; return its row of the table."""
    vlm = load_vlm(str(folder), device="cpu", dtype="float32")
    untouched_model = copy.deepcopy(vlm.model)  # some models keep on doing what they did once
    rng = np.random.default_rng(0)
    prepared = []
    for prompts in PROMPTS:
        image = Image.fromarray(rng.integers(0, 255, (100, 120, 3), np.uint8))
        prepared.append(vlm.prompt_processor.prepare(image, prompts))
    stages = [stage for stage, layers in vlm.layers_of_stage.items() if layers]
    alone = run_pooled(vlm, prepared, poolings=POOLINGS, stages=stages, way="alone")
    verdict, states = choose_way(
        vlm, prepared, poolings=POOLINGS, stages=stages, ways=("shared", "encoded", "plain")
    )
    assert largest_difference(states, alone) < 5e-5
    if verdict.way == "plain":
        assert largest_difference(states, alone) < 1e-5
    elif verdict.way != "alone":
        plain = run_pooled(vlm, prepared, poolings=POOLINGS, stages=stages, way="plain")
        assert largest_difference(plain, alone) < 1e-5
    for row in prepared[0].tokens:
        assert ("mm_token_type_ids" in row) == ("mm_token_type_ids" in vlm.forward_arguments)
    check_stages(vlm, alone, stages)
    check_that_the_head_is_gone(vlm)
    check_that_prompt_and_image_are_seen(vlm, alone)
    check_description(vlm, alone, stages, folder)
    check_hidden_states(vlm, untouched_model, prepared[0], alone, name)
    heat_map = has_token_grid(vlm)
    replay = check_replay(vlm, prepared)
    if replay.way == "shared":
        check_that_edits_agree(vlm, prepared)
    sharing = "exact"
    if verdict.way != "shared":
        sharing = f"no: {why_not_shared(verdict)}"
    vision = f"no: {vlm.special_case.why_no_vision or 'no stack'}"
    if vlm.vision is not None:
        vision = f"{len(vlm.vision.blocks)} blocks"
    return {
        "architecture": name,
        "layers": f"{len(vlm.blocks)} blocks, {len(vlm.layers)} layers",
        "image tokens": int(prepared[0].image_masks[0].sum()),
        "batches": "one prompt each" if verdict.way == "alone" else "padded right",
        "sharing": sharing,
        "encoder once": "yes" if verdict.way in ("shared", "encoded") else "no",
        "vision": vision,
        "projector": "yes" if "projector" in stages else "no",
        "heat map": "yes" if heat_map else "no",
        "edits": edits_words(replay),
        "attention cut": f"no: {replay.why_no_cut}" if replay.why_no_cut else "yes",
    }


def largest_difference(states: States, expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest value of its layer and pooling."""
    assert states.keys() >= expected.keys()
    differences = []
    for key, values in expected.items():
        difference = (states[key] - values).abs().max() / values.abs().max()
        assert difference.isfinite(), key
        differences.append(float(difference))
    return max(differences)


def check_stages(vlm: Vlm, alone: States, stages: Sequence[str]) -> None:
    """There is one layer per block and one more, and every layer that is announced was read."""
    assert len(vlm.blocks) == count_blocks(vlm.stack.config) == len(vlm.layers) - 1
    announced = {layer for stage in stages for layer in vlm.layers_of_stage[stage]}
    assert {key.rpartition("/")[0] for key in alone} == announced


def check_that_the_head_is_gone(vlm: Vlm) -> None:
    """No module computes the whole vocabulary."""
    vocabulary_size = len(vlm.processor.tokenizer)
    for name, module in vlm.model.named_modules():
        is_head = isinstance(module, torch.nn.Linear) and module.out_features == vocabulary_size
        assert not is_head, name


def check_that_prompt_and_image_are_seen(vlm: Vlm, alone: States) -> None:
    """The last layer depends on the prompt and on the image, and the image encoder on the image."""
    last_nd = alone[f"{vlm.layers[-1]}/mean"]
    first_prompt, other_prompt, _, other_image, _ = last_nd
    assert (first_prompt - other_prompt).abs().max() > 1e-3
    assert (first_prompt - other_image).abs().max() > 1e-3
    last_vision_layer = vlm.vision_layers[-1] if vlm.vision else "projector"
    encoded_bd = alone.get(f"{last_vision_layer}/mean")
    if encoded_bd is not None:
        assert len(encoded_bd) == 2
        assert (encoded_bd[0] - encoded_bd[1]).abs().max() > 1e-4


def check_description(vlm: Vlm, alone: States, stages: Sequence[str], folder: Path) -> None:
    """What is said of a model without its weights is what can be read of it."""
    skeleton = load_skeleton(str(folder)).vlm
    assert skeleton.config.model_type == vlm.config.model_type
    table = stage_table(skeleton).set_index("stage")
    assert list(table.index) == list(stages)
    for stage in stages:
        layers = vlm.layers_of_stage[stage]
        assert table.layers[stage] == len(layers)
        if stage != "projector":
            assert table.width[stage] == alone[f"{layers[0]}/mean"].shape[1]


def check_hidden_states(
    vlm: Vlm, model: torch.nn.Module, prepared: PreparedImage, alone: States, name: str
) -> None:
    """The layers are transformers' own hidden states, in their order."""
    hidden_states = compute_hidden_states(vlm, model, prepared)
    assert len(hidden_states) == len(vlm.layers)
    compared = list(zip(vlm.layers, hidden_states, strict=True))
    if name in WITHOUT_FINAL_NORM:
        compared.pop()
    for layer, hidden in compared:
        hidden_td = merge_streams(hidden, vlm.special_case, width=vlm.width)[0]
        expected = {
            "mean": hidden_td.mean(0),
            "max": hidden_td.max(0).values,
            "last": hidden_td[-1],
            "cls": hidden_td[0],
            "token:3": hidden_td[3],
        }
        assert expected.keys() == set(POOLINGS)
        for pooling, values_d in expected.items():
            read = {pooling: alone[f"{layer}/{pooling}"][0]}
            assert largest_difference(read, {pooling: values_d}) < 1e-5, (layer, pooling)


def compute_hidden_states(
    vlm: Vlm, model: torch.nn.Module, prepared: PreparedImage
) -> Sequence[torch.Tensor]:
    """transformers' own hidden states of an image with its first prompt, (1, t, d) each."""
    inputs = {}
    for key, values in prepared.tokens[0].items():
        inputs[key] = torch.from_numpy(np.ascontiguousarray(values))[None]
    inputs |= vlm.to_device(prepared.image_inputs)
    states_name = "hidden_states"
    if has_text_encoder(vlm.config):
        states_name = "encoder_hidden_states"
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        output = model(**inputs, output_hidden_states=True, use_cache=False)
    hidden_states = getattr(output, states_name, None)
    if hidden_states is None:  # BLIP-2 and its kin return their language model's output as a part
        hidden_states = getattr(output.language_model_outputs, states_name)
    return hidden_states


def check_that_edits_agree(vlm: Vlm, prepared: Sequence[PreparedImage]) -> None:
    """An edit does the same where only what it touches runs again, and in plain passes."""
    direction_d = torch.randn(vlm.width, generator=torch.Generator().manual_seed(0))
    direction_d = direction_d / direction_d.norm()

    def turn_back(hidden: torch.Tensor) -> torch.Tensor:
        return hidden - 2 * (hidden @ direction_d)[..., None] * direction_d + direction_d

    shared = KeptPass(vlm, prepared, way="shared")
    plain = KeptPass(vlm, prepared, way="plain")
    for layer in range(len(vlm.blocks)):
        for sites in (["image"], ["text"], ["last"], ["image", "text"]):
            changes = dict.fromkeys(sites, turn_back)
            last_nd = shared.rerun(layer, changes)[len(vlm.blocks)]
            expected_nd = plain.rerun(layer, changes)[len(vlm.blocks)]
            assert largest_difference({"": last_nd}, {"": expected_nd}) < 1e-5, (layer, sites)


def edits_words(replay: ReplayVerdict) -> str:
    """How an architecture is edited, in the words of the table."""
    words = {"shared": "what they touch runs again", "plain": "whole prompts run again"}
    return words.get(replay.way, f"no: {replay.reason}")


def has_token_grid(vlm: Vlm) -> bool:
    """Tell whether it is known where in the image the image tokens lie."""
    blocks = np.random.default_rng(0).integers(0, 255, (2, 6, 8, 3)).astype(np.uint8)
    images = [Image.fromarray(pixels).resize((320, 240)) for pixels in blocks]
    try:
        check_token_grid(vlm, images, prompt="Is there a dog?")
    except NoTokenGrid:
        return False
    return True


def why_not_shared(verdict: SharingVerdict) -> str:
    """The reason against the way "shared", in the words of the table."""
    reason = verdict.reason.partition("not shared: ")[2].partition("; not ")[0]
    if reason.startswith("differs"):
        return "not exact"
    message = reason.partition("(")[2].rstrip(")")  # of an error, behind its type
    return message or reason


# --------------------------------------------------------------------------------------- the table


def format_markdown(table: pd.DataFrame) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.astype(str).to_numpy()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_table() -> None:
    """Measure all architectures and write the table, for programs and for readers."""
    rows = []
    for name in tqdm(RECIPES, unit="architecture"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure_architecture(name, save_checkpoint(name, Path(folder))))
    table = pd.DataFrame(rows)
    table.to_csv(presets.ARCHITECTURES_CSV, index=False)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, begin, rest = text.partition(TABLE_BEGIN)
    after = rest.partition(TABLE_END)[2]
    text = before + begin + format_markdown(table) + TABLE_END + after
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_table()
