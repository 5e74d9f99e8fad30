"""Every layer of every architecture that the README names, on tiny random models.

``python tests/test_architectures.py`` writes what is found into ``probekit/architectures.csv`` and the README.
"""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ROWS, make
from conftest import REPOSITORY
from PIL import Image

from probekit import architectures, forward, presets
from probekit.models import describe, load_vlm

POOLINGS = ("mean", "max", "last", "cls")
PROMPTS = [["Is there a dog? one", "Is there a dog? A much longer prompt, of more words", "Is there a dog?!"],
           ["Is there a cat?", "Is there a dog? yes, or no"]]
NO_REFERENCE = {"gemma3n": "its last hidden state is not normed, and in four streams",
                "phi4_multimodal": "its hidden states can only be asked for once"}
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
        output = vlm.model(**tokens, **vlm.place(prepared.image), **start, output_hidden_states=True, use_cache=False)
    inner = getattr(output, "language_model_outputs", None)
    key = "encoder_hidden_states" if start else "hidden_states"
    return getattr(output, key, None) or getattr(inner, key, None)


def found(name: str, folder: Path) -> dict[str, str | int]:
    """Check one architecture; a row of the table."""
    vlm = load_vlm(str(make(name, folder)), device="cpu", dtype="float32")
    prepared = [vlm.preparer.prepare(image, prompts) for image, prompts in zip(pictures(), PROMPTS, strict=True)]
    assert len(vlm.blocks) == stated(vlm) == len(vlm.layers) - 1
    if name not in NO_REFERENCE:
        states = reference_states(vlm, prepared[0])
        assert len(states) == len(vlm.layers)
        read = forward.run(vlm, [prepared[0].only(0)], ["mean"])
        assert gap(read, {f"{layer}/mean": architectures.merge_streams(hidden, vlm.special, vlm.width).mean(1)
                          for layer, hidden in zip(vlm.layers, states, strict=True)}) < 1e-5
        vlm = load_vlm(str(folder), device="cpu", dtype="float32")
    choice, _ = forward.choose(vlm, prepared, POOLINGS, ("lm",), ("shared", "encoded", "plain"))
    batched = "plain" if choice.way != "alone" else "alone"
    stages = ("lm", *(stage for stage, layers in vlm.layers_of_stage.items() if layers and stage != "lm"))
    alone = forward.run(vlm, prepared, POOLINGS, stages, "alone")
    assert gap(forward.run(vlm, prepared, POOLINGS, stages, batched), alone) < 1e-5
    assert gap(forward.run(vlm, prepared, POOLINGS, stages, choice.way), alone) < 5e-5
    last = alone[f"{vlm.layers[-1]}/mean"]
    assert (last[0] - last[3]).abs().max() > 1e-3 and (last[0] - last[1]).abs().max() > 1e-3
    seen = alone.get(f"{vlm.vision_layers[-1] if vlm.vision else 'projector'}/mean")
    assert seen is None or (len(seen) == 2 and (seen[0] - seen[1]).abs().max() > 1e-4)  # it sees images
    described = describe(str(folder)).set_index("stage")
    for stage in stages:
        assert described.layers[stage] == len(vlm.layers_of_stage[stage])
        if stage != "projector":
            assert described.width[stage] == alone[f"{vlm.layers_of_stage[stage][0]}/mean"].shape[1]
    shared = "exact" if choice.way == "shared" else "no: " + _reason(choice.words, "shared")
    return {"architecture": name, "layers": f"{stated(vlm)} blocks, {len(vlm.layers)} layers",
            "image tokens": int(prepared[0].shown[0].sum()),
            "batches": "padded right" if batched == "plain" else "one prompt each", "sharing": shared,
            "encoder once": "yes" if choice.way in ("shared", "encoded") else "no",
            "vision": f"{len(vlm.vision[1])} blocks" if vlm.vision else "no stack of blocks",
            "projector": "yes" if "projector" in stages else "no"}


def _reason(words: str, way: str) -> str:
    told = words.partition(f"not {way}: ")[2].partition("; not ")[0]
    return "not exact" if told.startswith("differs") else told.partition("(")[2].rstrip(")") or told


TABLE = pd.read_csv(presets.CHECKED, keep_default_na=False).set_index("architecture")


@pytest.mark.parametrize("name", ROWS)
def test_layers_padding_sharing_and_stages(name, tmp_path):
    row = found(name, tmp_path)
    told = TABLE.loc[row.pop("architecture")]
    assert {key: str(value) for key, value in row.items()} == {key: str(value) for key, value in told.items()}


def test_every_preset_is_of_a_checked_type():
    assert len(ROWS) >= 40 and list(TABLE.index) == list(ROWS)
    assert {preset.type for preset in presets.PRESETS.values()} <= set(ROWS)
    text = presets.known()
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
