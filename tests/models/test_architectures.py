"""Every layer of every architecture that the README names, on tiny random models.

``python tests/test_architectures.py`` writes what is found into ``probekit/architectures.csv`` and the README.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from probekit.extraction.extract import ExtractionSettings, extract
from probekit.models import architectures, forward, presets, sharing, token_grid
from probekit.models.load import describe_model, load_vlm
from tests.conftest import REPOSITORY
from tests.support.architectures import ROWS, make

POOLINGS = ("mean", "max", "last", "cls")
PROMPTS = [["Is there a dog? one", "Is there a dog? A much longer prompt, of more words", "Is there a dog?!"],
           ["Is there a cat?", "Is there a dog? yes, or no"]]
NOT_NORMED = ("gemma3n",)  # the last hidden state that they return, which is not compared
MARKS = "<!-- architectures: written by tests/test_architectures.py -->\n", "<!-- end -->\n"


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (100, 120, 3), np.uint8)) for _ in PROMPTS]


def gap(ours: dict, reference: dict) -> float:
    """Largest difference relative to a layer's largest value."""
    assert ours.keys() >= reference.keys()
    return max(float((ours[key] - values).abs().max() / values.abs().max()) for key, values in reference.items())


def stated(vlm) -> int:
    """Number of decoder blocks that the config states."""
    return architectures.depth_of(vlm.stack.config)


def reference_states(vlm, prepared) -> list[torch.Tensor] | None:
    """transformers' own hidden states of one prompt, (1, t, d) each."""
    tokens = {key: torch.from_numpy(np.ascontiguousarray(values))[None] for key, values in prepared.tokens[0].items()}
    with torch.inference_mode():
        start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if architectures.reads_with_encoder(
            vlm.config) else {}
        output = vlm.model(**tokens, **vlm.place(prepared.image_inputs), **start, output_hidden_states=True, use_cache=False)
    inner = getattr(output, "language_model_outputs", None)
    key = "encoder_hidden_states" if start else "hidden_states"
    return getattr(output, key, None) or getattr(inner, key, None)


def found(name: str, folder: Path) -> dict[str, str | int]:
    """Check one architecture; a row of the table."""
    vlm = load_vlm(str(make(name, folder)), device="cpu", dtype="float32")
    prepared = [vlm.prompt_processor.prepare(image, prompts) for image, prompts in zip(pictures(), PROMPTS, strict=True)]
    assert len(vlm.blocks) == stated(vlm) == len(vlm.layers) - 1
    states = reference_states(vlm, prepared[0])
    assert len(states) == len(vlm.layers)
    vlm = load_vlm(str(folder), device="cpu", dtype="float32")  # some keep what they were asked for
    read = forward.run_pooled(vlm, [prepared[0].with_prompt(0)], ["mean", "max", "token:3"])
    for layer, hidden in list(zip(vlm.layers, states, strict=True))[: -1 if name in NOT_NORMED else None]:
        one_td = architectures.merge_streams(hidden, vlm.special, vlm.width)[0]
        expected = {"mean": one_td.mean(0), "max": one_td.max(0).values, "token:3": one_td[3]}
        assert gap(read, {f"{layer}/{pooling}": values[None] for pooling, values in expected.items()}) < 1e-5
    choice, _ = sharing.choose_way(vlm, prepared, POOLINGS, ("lm",), ("shared", "encoded", "plain"))
    batched = "plain" if choice.way != "alone" else "alone"
    stages = ("lm", *(stage for stage, layers in vlm.layers_of_stage.items() if layers and stage != "lm"))
    alone = forward.run_pooled(vlm, prepared, POOLINGS, stages, "alone")
    assert gap(forward.run_pooled(vlm, prepared, POOLINGS, stages, batched), alone) < 1e-5
    assert gap(forward.run_pooled(vlm, prepared, POOLINGS, stages, choice.way), alone) < 5e-5
    claimed = [layer for stage in stages for layer in vlm.layers_of_stage[stage]]
    assert {key.rpartition("/")[0] for key in alone} == {*claimed}
    last = alone[f"{vlm.layers[-1]}/mean"]
    assert (last[0] - last[3]).abs().max() > 1e-3 and (last[0] - last[1]).abs().max() > 1e-3
    seen = alone.get(f"{vlm.vision_layers[-1] if vlm.vision else 'projector'}/mean")
    assert seen is None or (len(seen) == 2 and (seen[0] - seen[1]).abs().max() > 1e-4)  # it sees images
    described = describe_model(str(folder)).set_index("stage")
    for stage in stages:
        assert described.layers[stage] == len(vlm.layers_of_stage[stage])
        if stage != "projector":
            assert described.width[stage] == alone[f"{vlm.layers_of_stage[stage][0]}/mean"].shape[1]
    shared = "exact" if choice.way == "shared" else "no: " + _reason(choice.reason, "shared")
    return {"architecture": name, "layers": f"{stated(vlm)} blocks, {len(vlm.layers)} layers",
            "image tokens": int(prepared[0].image_masks[0].sum()),
            "batches": "padded right" if batched == "plain" else "one prompt each", "sharing": shared,
            "encoder once": "yes" if choice.way in ("shared", "encoded") else "no",
            "vision": f"{len(vlm.vision[1])} blocks" if vlm.vision else f"no: {vlm.special.no_vision or 'no stack'}",
            "projector": "yes" if "projector" in stages else "no", "heat map": _heat_map(vlm)}


def _heat_map(vlm) -> str:
    """Is it known where in the image the image tokens lie? Checked by changing a quarter of the image."""
    blocks = np.random.default_rng(0).integers(0, 255, (4, 6, 8, 3)).astype(np.uint8)  # pictures with large shapes
    try:
        token_grid.check_token_grid(vlm, [Image.fromarray(block).resize((320, 240)) for block in blocks], "Is there a dog?")
    except token_grid.NoTokenGrid:
        return "no"
    return "yes"


def _reason(words: str, way: str) -> str:
    told = words.partition(f"not {way}: ")[2].partition("; not ")[0]
    return "not exact" if told.startswith("differs") else told.partition("(")[2].rstrip(")") or told


TABLE = pd.read_csv(presets.CHECKED, keep_default_na=False).set_index("architecture")


@pytest.mark.parametrize("name", ROWS)
def test_layers_padding_sharing_and_stages(name, tmp_path):
    row = found(name, tmp_path)
    told = TABLE.loc[row.pop("architecture")]
    assert {key: str(value) for key, value in row.items()} == {key: str(value) for key, value in told.items()}


def test_one_prompt_an_image_does_not_settle_how_many_are_run(tmp_path, data):
    """Where the image encoder reads the prompt, sharing is wrong, but with one prompt an image it looks right."""
    for i, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{i}.png")
    rows = pd.DataFrame([{"file": str(tmp_path / f"{i}.png"), "prompt": prompt}
                         for i, prompts in enumerate(PROMPTS) for prompt in prompts])
    settings = ExtractionSettings(str(make("instructblip", tmp_path / "model")))
    extract(settings, rows.groupby("file").head(1).reset_index(drop=True), "cpu")
    vlm = load_vlm(settings.model, device="cpu")
    mixed = [vlm.prompt_processor.prepare(image, prompts) for image, prompts in zip(pictures(), PROMPTS, strict=True)]
    mixed[1] = mixed[1].with_prompt(0)  # the one with several prompts is the one to look at
    assert sharing.choose_way(vlm, mixed, ("mean",), ("lm",), ("shared", "plain"))[0].way == "plain"
    ours = extract(settings, rows, "cpu")
    plain = extract(replace(settings, sharing="off"), rows, "cpu")
    assert ours.meta["sharing"]["way"] == "plain"
    for layer in ours.layers:
        a, b = ours[layer, "mean"], plain[layer, "mean"]
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()


def test_a_stage_that_a_model_lacks_is_named(tmp_path, data):
    pictures()[0].save(tmp_path / "0.png")
    rows = pd.DataFrame({"file": str(tmp_path / "0.png"), "prompt": ["a", "b"]})
    settings = ExtractionSettings(str(make("mllama", tmp_path / "model")), stages=("vision",))
    with pytest.raises(ValueError, match=r'mllama\) has no stage vision .* take stages=\["lm"\]'):
        extract(settings, rows, "cpu")
    assert extract(replace(settings, stages=("lm", "vision")), rows, "cpu").layers == [f"lm.0{k}" for k in range(4)]


def test_every_preset_is_of_a_checked_type():
    assert len(ROWS) >= 40 and list(TABLE.index) == list(ROWS)
    assert {preset.type for preset in presets.PRESETS.values()} <= set(ROWS)
    text = presets.list_models()
    assert all(name in text for name in [*presets.PRESETS, *presets.NOT_IN_TRANSFORMERS])


def test_the_readme_has_the_table():
    text = (REPOSITORY / "README.md").read_text()
    assert text.partition(MARKS[0])[2].partition(MARKS[1])[0] == markdown(TABLE.reset_index())


def markdown(table: pd.DataFrame) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.astype(str).to_numpy()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write() -> None:
    rows = []
    for name in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(found(name, Path(folder)))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(presets.CHECKED, index=False)
    readme = REPOSITORY / "README.md"
    before, mark, rest = readme.read_text().partition(MARKS[0])
    readme.write_text(before + mark + markdown(table) + MARKS[1] + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    write()
