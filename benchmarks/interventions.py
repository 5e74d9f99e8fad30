"""What interventions cost beside the forward passes that they cannot do without.

    python benchmarks/interventions.py [--model tiny-qwen2-vl] [--device cpu] [--dtype float32]
                                       [--images 36] [--layers 9] [--rounds 5] [--quick]
                                       [--json PATH]

Every intervention that 04_intervene does by default, on drawn scenes with two captions each, at so
many evenly spaced layers. Beside them the bare forward passes: the image with its prompts once,
then for each intervention the blocks after its layer alone, on the tokens that it touches and those
after them, with keys and values that are there. No hooks, no edits, nothing read. Both are done in
turn, --rounds times, and the shortest time of each counts. --model names a demo model, or
qwen2-vl-2b or fastvlm-0.5b for random weights of that size, see ``gpu.py``.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import load_with_head
from measuring import build_scene_examples, save_json
from torch import nn
from transformers import DynamicCache

from probekit.extraction.loading import fill_batches, prepare_images
from probekit.extraction.shards import model_inputs
from probekit.interventions.concepts import ConceptNames, FittedEdits
from probekit.interventions.running import Reader, do_one
from probekit.interventions.settings import (
    CUT,
    NOTHING,
    OTHER_TASK,
    Intervention,
    InterventionSettings,
    plan_interventions,
)
from probekit.models.batches import batch_images, batch_tokens
from probekit.models.forward import run_pooled
from probekit.models.load import Vlm
from probekit.models.native import cache_arguments
from probekit.models.output_head import take_answer_head
from probekit.models.processor import PreparedImage
from probekit.models.replay import KeptPass
from probekit.paths import Home
from tests.support.planted_use import TrainingStates

POOLINGS = ("image_mean", "suffix_mean", "last")
TASK = "caption"


class BarePasses:
    """The forward passes of a batch, without anything around them.

    Keys and values of what stands before are made beforehand, and so are the states that enter.
    """

    def __init__(self, vlm: Vlm, prepared: Sequence[PreparedImage]) -> None:
        self.vlm = vlm
        self.prefix = prepared[0].prefix_length
        rows = [row for image in prepared for row in image.tokens]
        self.n = len(rows)
        self.images = len(prepared)
        self.length = max(len(row["input_ids"]) for row in rows)
        firsts = [
            {name: values[: self.prefix] for name, values in image.tokens[0].items()}
            for image in prepared
        ]
        self.prefix_inputs = vlm.to_device(batch_tokens(vlm, firsts))
        self.prefix_inputs |= vlm.to_device(batch_images(vlm, prepared))
        self.stacks = [self._truncate(layer) for layer in range(len(vlm.blocks))]
        self.caches = {tokens: self._fill(tokens) for tokens in (self.prefix, self.length - 1)}

    def _truncate(self, layer: int) -> nn.Module:
        """The decoder without the blocks before a layer."""
        stack = copy.copy(self.vlm.stack)
        stack._modules = dict(stack._modules)
        name = next(name for name, child in stack.named_children() if child is self.vlm.blocks)
        stack._modules[name] = nn.ModuleList(self.vlm.blocks[layer:])
        return stack

    def _fill(self, tokens: int) -> DynamicCache:
        cache = DynamicCache(config=self.vlm.stack.config)
        self._run(self.vlm.stack, self._states(self.n, tokens), cache, 0)
        return cache

    def _states(self, rows: int, tokens: int) -> torch.Tensor:
        dtype = getattr(torch, self.vlm.dtype)
        return torch.randn(rows, tokens, self.vlm.width, device=self.vlm.device, dtype=dtype)

    def _run(
        self, stack: nn.Module, states_ntd: torch.Tensor, cache: DynamicCache, start: int
    ) -> None:
        rows, tokens, _ = states_ntd.shape
        place_t = torch.arange(start, start + tokens, device=self.vlm.device)
        with torch.inference_mode():
            stack(
                inputs_embeds=states_ntd,
                attention_mask=torch.ones(rows, start + tokens, device=self.vlm.device),
                position_ids=place_t.expand(rows, -1),
                **cache_arguments(stack, cache),
            )

    def _after(self, layer: int, start: int, states_ntd: torch.Tensor) -> None:
        cache = copy.copy(self.caches[start])
        cache.layers = [copy.copy(one) for one in cache.layers]
        self._run(self.stacks[layer], states_ntd, cache, start)

    def run(self, planned: Sequence[Intervention]) -> float:
        """Run what all interventions need; return the seconds of the passes."""
        vlm = self.vlm
        last = self._states(self.n, 1)
        text = self._states(self.n, self.length - self.prefix)
        prefix = self._states(self.images, self.prefix)
        begin = time.perf_counter()
        with torch.inference_mode():
            cache = DynamicCache(config=vlm.stack.config)
            vlm.model(**self.prefix_inputs, **cache_arguments(vlm.model, cache))
        self._after(0, self.prefix, text)
        for one in planned:
            changed = one.site.rpartition(">")[2] if one.name == CUT else one.site
            if one.name == NOTHING or one.layer == len(vlm.blocks):
                continue
            if changed == "last":
                self._after(one.layer, self.length - 1, last)
                continue
            if changed == "image":
                empty = DynamicCache(config=vlm.stack.config)
                self._run(self.stacks[one.layer], prefix, empty, 0)
            self._after(one.layer, self.prefix, text)
        vlm.record_sync_point()()
        return time.perf_counter() - begin


def intervene_on(
    batch: Sequence[PreparedImage],
    vlm: Vlm,
    planned: Sequence[Intervention],
    edits: FittedEdits,
    reader: Reader,
) -> list[Intervention]:
    """Do all interventions on a batch, and read them; return those that cannot be done."""
    kept = KeptPass(vlm, batch, way="shared")
    return [
        one for one in planned if isinstance(do_one(kept, one, edits, reader, why_no_cut=""), str)
    ]


def measure(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    vlm, _ = load_with_head(arguments.model, root, dtype=arguments.dtype, device=arguments.device)
    images = arguments.images
    examples = build_scene_examples(root, 3 * images, held_out=images, seed=0, tasks=(TASK,))
    home = Home.find()
    batches = {}
    for split in ("train", "test"):
        table = examples[examples.split == split].reset_index(drop=True)
        items = prepare_images(
            vlm.prompt_processor,
            [model_inputs(table, home)],
            longest_side=None,
            home=home,
            dtype=vlm.dtype,
        )
        batches[split] = [
            [item.prepared for item in batch]
            for batch in fill_batches(items, token_budget=lambda: 8192, way=lambda: "shared")
        ]
    head = take_answer_head(vlm, ("no", "yes"), batches["train"][0][0].with_prompt(0))
    vlm.head = None
    states = [run_pooled(vlm, batch, poolings=POOLINGS, way="shared") for batch in batches["train"]]
    joined = {key: torch.cat([one[key] for one in states]).cpu() for key in states[0]}
    labels = np.random.default_rng(0).integers(0, 2, len(joined[f"{vlm.layers[0]}/last"]))
    concepts = ConceptNames({"image": TASK, "text": TASK, "last": TASK}, {})
    edits = FittedEdits(
        TrainingStates(joined, labels, (TASK,)), concepts, vlm.layers, device="cpu", seed=0
    )
    reader = Reader(head, head.answer_tokens((("no",), ("yes",))), None, vlm)
    layers = np.linspace(0, len(vlm.blocks), arguments.layers).round().astype(int)
    planned = [
        one
        for one in plan_interventions(
            InterventionSettings(layers=tuple(layers.tolist())),
            blocks=len(vlm.blocks),
            is_binary=True,
            asks_objects=False,
        )
        if one.control != OTHER_TASK
    ]
    left_out: set[str] = set()
    mine = bare = 0.0
    for batch in batches["test"]:
        refused = intervene_on(batch, vlm, planned, edits, reader)  # edits are fitted once
        done = [one for one in planned if one not in refused]
        left_out |= {f"{one.name} {one.site} lm.{one.layer:02d}" for one in refused}
        passes = BarePasses(vlm, batch)
        of_batch = []
        for _ in range(arguments.rounds):
            begin = time.perf_counter()
            intervene_on(batch, vlm, done, edits, reader)
            vlm.record_sync_point()()
            of_batch.append((time.perf_counter() - begin, passes.run(done)))
        shortest = np.min(of_batch, axis=0)
        mine += shortest[0]
        bare += shortest[1]
    return {
        "model": vlm.name,
        "device": vlm.device,
        "test_images": images,
        "interventions": len(planned),
        "seconds": round(mine, 2),
        "bare_seconds": round(bare, 2),
        "ratio": round(mine / bare, 3),
        "left_out": sorted(left_out),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-qwen2-vl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--images", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.rounds, arguments.layers = 6, 1, 2
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    for name, value in result.items():
        print(f"{name}: {value}")
    save_json(arguments.json, result)


if __name__ == "__main__":
    main()
