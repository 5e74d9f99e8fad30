"""Whether a model can be read as the protocol says: what users run on an adapter of their own.

Each check plants or changes one thing and looks at what comes of it, so that a fault has a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from probekit import paths
from probekit.models.batches import batch_images, batch_tokens, input_shape
from probekit.models.devices import is_out_of_memory
from probekit.models.forward import States, read_layers, run_pooled
from probekit.models.hooks import tap_decoder
from probekit.models.load import Vlm, load_vlm
from probekit.models.output_head import TOLERANCES, take_answer_head
from probekit.models.processor import PreparedImage
from probekit.models.protocol import SWITCHED_OFF
from probekit.models.sharing import choose_way
from probekit.models.token_grid import NoTokenGrid, check_token_grid
from probekit.models.unchecked import check_pass

PASSED = "✓"
FAILED = "✗"
LEFT_OUT = "–"
PROMPTS = (
    ("Is there a dog?", "Is there a dog in this picture, or a cat beside it?", "Is there a cat?!"),
    ("Is there a tree?", "Are there two of them, one to the left of the other?"),
)
WORDS = ("yes", "no")
# How far two float32 passes of the same tokens may be apart, as a share of the largest value.
SAME = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1e-1}
DTYPES = ("float32", "bfloat16", "float16")


class Finding(NamedTuple):
    """What one check found: `result` is ✓, ✗, or – where there is nothing to check."""

    check: str
    result: str
    note: str


class _LeftOut(Exception):
    """Why there is nothing to check."""


def check_model(
    model: str,
    *,
    device: str = "cpu",
    dtypes: Sequence[str] = DTYPES,
    home: str | Path | paths.Home | None = None,
) -> pd.DataFrame:
    """Check a model against the protocol that it is read through.

    Parameters
    ----------
    model : str
        See :func:`probekit.models.load.load_vlm`: an adapter, or a checkpoint.
    device : str
    dtypes : sequence of str
        In which sharing is tried; the rest is checked in float32.
    home : str, Path or Home, optional
        See :meth:`probekit.paths.Home.find`.

    Returns
    -------
    DataFrame
        Columns as the fields of :class:`Finding`, a row per check.
    """
    try:
        vlm = load_vlm(model, dtype="float32", device=device, with_head=True, home=home)
    except Exception as error:
        return pd.DataFrame([Finding("loads", FAILED, f"{type(error).__name__}: {error}")])
    findings = [Finding("loads", PASSED, f"{len(vlm.blocks)} blocks, width {vlm.width}")]
    trial = _Trial(vlm)
    for name, check in trial.checks().items():
        findings.append(_find(name, check))
        if name in trial.needed and findings[-1].result == FAILED:
            return pd.DataFrame(findings)
    shares = not vlm.why_not_shared
    vlm.release()
    for dtype in dtypes[: None if shares else 1]:
        findings.append(_find(f"sharing, {dtype}", _sharing_in(model, dtype, device, home)))
    return pd.DataFrame(findings)


def _find(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, PASSED, check())
    except _LeftOut as reason:
        return Finding(name, LEFT_OUT, str(reason))
    except Exception as error:  # whatever an adapter raises is a finding
        if is_out_of_memory(error):
            raise
        is_ours = isinstance(error, (AssertionError, ValueError))
        words = str(error) if is_ours and str(error) else f"{type(error).__name__}: {error}"
        return Finding(name, FAILED, " ".join(words.split()))


def _sharing_in(
    model: str, dtype: str, device: str, home: str | Path | paths.Home | None
) -> Callable[[], str]:
    def check() -> str:
        vlm = load_vlm(model, dtype=dtype, device=device, home=home)
        try:
            return _Trial(vlm).sharing()
        finally:
            vlm.release()

    return check


class _Trial:
    """A model with two prepared images; each method is a check, and raises what is wrong."""

    # Without these there is nothing that others could be run on.
    needed = ("inputs", "layers")

    def __init__(self, vlm: Vlm) -> None:
        self.vlm = vlm
        rng = np.random.default_rng(0)
        coarse = [rng.integers(0, 255, (8, 10, 3)).astype(np.uint8) for _ in PROMPTS]
        self.images = [Image.fromarray(pixels).resize((320, 256)) for pixels in coarse]

    def checks(self) -> dict[str, Callable[[], str]]:
        """Return the checks by name, in their order."""
        return {
            "inputs": self.inputs,
            "layers": self.layers,
            "final norm": self.final_norm,
            "image tokens": self.image_tokens,
            "mask": self.mask,
            "prompt and image seen": self.prompt_and_image,
            "without an image": self.without_image,
            "batches": self.batches,
            "answers": self.answers,
            "projector": lambda: self.stage("projector", "image_features"),
            "vision": lambda: self.stage("vision", "vision_blocks"),
            "heat map": self.heat_map,
        }

    def _prepare(self) -> list[PreparedImage]:
        return [
            self.vlm.prompt_processor.prepare(image, prompts)
            for image, prompts in zip(self.images, PROMPTS, strict=True)
        ]

    def _of_one_shape(self) -> list[PreparedImage]:
        """Return both images, or the first with one that differs in nothing but its prompts."""
        first, second = self._prepare()
        if input_shape(first) == input_shape(second):
            return [first, second]
        other = self.vlm.prompt_processor.prepare(self.images[0], PROMPTS[1])
        return [first, other]

    def _with_other_image(self, prepared: PreparedImage) -> PreparedImage:
        """Return the first image with other values: as they come, or the second one's numbers."""
        if any(values.is_floating_point() for values in prepared.image_inputs.values()):
            return prepared.with_inputs(_other_values)
        second = self._prepare()[1]
        if _sizes(second) != _sizes(prepared):
            raise _LeftOut(
                "its image inputs are whole numbers, of another shape for another image: what "
                "changes with the image is not known"
            )
        return replace(prepared, image_inputs=second.image_inputs)

    # ----------------------------------------------------------------------------------- the inputs

    def inputs(self) -> str:
        """Prepare twice: equal inputs, and other tokens for other prompts."""
        once, again = self._prepare(), self._prepare()
        for one, two in zip(once, again, strict=True):
            for name, values in one.image_inputs.items():
                if not torch.equal(values, two.image_inputs[name]):
                    raise ValueError(
                        f"preparing an image twice gives two different {name}: it draws at random"
                    )
            ids = [row["input_ids"].tolist() for row in one.tokens]
            if ids != [row["input_ids"].tolist() for row in two.tokens]:
                raise ValueError("preparing twice gives different token ids: it draws at random")
            if any(ids.count(row) > 1 for row in ids):
                raise ValueError("different prompts become the same tokens: the prompt is left out")
        counts = [int(one.image_masks[0].sum()) for one in once]
        return f"{counts[0]} and {counts[1]} image tokens of two images"

    def layers(self) -> str:
        """Look whether a pass hands over each layer once, with a state for each token."""
        check_pass(self.vlm, self._prepare()[0].with_prompt(0))
        return f"{self.vlm.layers[0]} to {self.vlm.layers[-1]}"

    def image_tokens(self) -> str:
        """Change the image: what enters the first block changes at the marked tokens alone."""
        prepared = self._prepare()[0].with_prompt(0)
        original_td = self._states(prepared)[self.vlm.layers[0]]
        changed_td = self._states(self._with_other_image(prepared))[self.vlm.layers[0]]
        changes_t = (changed_td != original_td).any(-1).cpu().numpy()
        marked_t = prepared.image_masks[0]
        if (changes_t & ~marked_t).any():
            place = int(np.flatnonzero(changes_t & ~marked_t)[0])
            raise ValueError(
                f"{changes_t.sum()} tokens change with the image, and {marked_t.sum()} are marked: "
                f"token {place} is not, so the image's tokens are miscounted"
            )
        if (marked_t & ~changes_t).any():
            place = int(np.flatnonzero(marked_t & ~changes_t)[0])
            raise ValueError(
                f"{marked_t.sum()} tokens are marked, and {changes_t.sum()} change with the image: "
                f"token {place} does not, so the image's tokens are miscounted"
            )
        return f"{marked_t.sum()} marked, and these change with the image"

    # ----------------------------------------------------------------------------------- the passes

    def final_norm(self) -> str:
        """Hold the last layer against the last block's output, and against the logits."""
        vlm = self.vlm
        prepared = self._prepare()[0].with_prompt(0)
        before: list[torch.Tensor] = []
        handle = vlm.blocks[-1].register_forward_hook(
            lambda module, args, output: before.append(_first_tensor(output))
        )
        try:
            last_td = self._states(prepared)[vlm.layers[-1]]
        finally:
            handle.remove()
        if not set(vlm.blocks) & set(vlm.stack.modules()):
            with torch.inference_mode():
                expected_td = _first_tensor(vlm.stack(before[-1]))[0]
            if not torch.allclose(expected_td, last_td, atol=1e-5, rtol=1e-4):
                raise ValueError("final_norm does not read what leaves the last block")
        if vlm.head is None:
            return "it reads what leaves the last block; without answers no more can be checked"
        tokens, images = self._batch(prepared)
        with torch.inference_mode():
            logits_v = vlm.head.logits(tokens, images)[0, -1].float()
            if _fits(vlm.head.module, last_td[-1], logits_v, vlm.dtype):
                return "the model's logits are those of the last layer"
            inside_blocks = {part for block in vlm.blocks for part in block.modules()}
            for name, module in vlm.model.named_modules():
                if module in inside_blocks or not _looks_like_norm(module):
                    continue
                if _fits(vlm.head.module, _try(module, last_td[-1:])[0], logits_v, vlm.dtype):
                    raise ValueError(
                        f"another norm comes after the last layer: final_norm is to be {name}"
                    )
        return "its logits are scaled or capped: see the check of answers"

    def mask(self) -> str:
        """Change a token where the attention mask is 0: the last token stays as it is."""
        prepared = self._prepare()[0].with_prompt(1)
        tokens, images = self._batch(prepared)
        place = int(np.flatnonzero(~prepared.image_masks[0])[-3])
        others = tokens["input_ids"][0, place + 1 :].unique()
        tokens["attention_mask"][0, place] = 0
        states = []
        for other in (others[0], others[-1]):
            ids = tokens["input_ids"].clone()
            ids[0, place] = other
            states.append(self._last_states({**tokens, "input_ids": ids}, images))
        for layer, last_d in states[0].items():
            if _apart(states[1][layer], last_d) > SAME[self.vlm.dtype]:
                raise ValueError(
                    f"a token whose attention mask is 0 is seen by another one at {layer}: the "
                    "mask is ignored"
                )
        return "tokens whose attention mask is 0 are not seen"

    def prompt_and_image(self) -> str:
        """Change the prompt, and the image: the last token changes."""
        prepared = self._prepare()[0]
        last = self.vlm.layers[-1]
        first_td = self._states(prepared.with_prompt(0))[last]
        if torch.equal(self._states(prepared.with_prompt(2))[last][-1], first_td[-1]):
            raise ValueError(
                "another prompt leaves the last token as it is: the prompt is not seen"
            )
        changed = self._with_other_image(prepared.with_prompt(0))
        if torch.equal(self._states(changed)[last][-1], first_td[-1]):
            raise ValueError("another image leaves the last token as it is: the image is not seen")
        return "the last token changes with both"

    def without_image(self) -> str:
        """Prompts run without an image."""
        prepared = self.vlm.prompt_processor.prepare(None, PROMPTS[0])
        run_pooled(self.vlm, [prepared], poolings=["mean", "last"])
        return "prompts run without an image"

    def batches(self) -> str:
        """Compare a batch of prompts of different lengths with each prompt alone."""
        prepared = self._of_one_shape()
        verdict, _ = choose_way(
            self.vlm, prepared, poolings=["mean", "last"], stages=["lm"], ways=("plain",)
        )
        if verdict.way == "plain":
            return "as each prompt alone"
        poolings = ["mean", "last"]
        several = run_pooled(self.vlm, prepared, poolings=poolings, way="plain")
        alone = run_pooled(self.vlm, prepared, poolings=poolings, way="alone")
        layers = [key for key in alone if _apart(several[key], alone[key]) > SAME["float32"]]
        first = layers[0].partition("/")[0] if layers else "some layer"
        why = "the positions or the images of the batch" if first == "lm.00" else "the mask"
        raise ValueError(
            f"prompts in one batch differ from each alone, from {first} on: look at {why} "
            f"({verdict.reason})"
        )

    def sharing(self) -> str:
        """Compare prompts that go on from a shared prefix with plain passes."""
        vlm = self.vlm
        if vlm.why_not_shared:
            raise _LeftOut(f"{vlm.why_not_shared}; no {SWITCHED_OFF['forward_prefix']}")
        prepared = self._of_one_shape()
        verdict, _ = choose_way(
            vlm, prepared, poolings=["mean", "last"], stages=["lm"], ways=("shared",)
        )
        if verdict.way == "shared":
            return verdict.reason.partition(", ")[2]
        raise ValueError(f"{self._why_not_shared(prepared)} ({verdict.reason.partition('; ')[2]})")

    def _why_not_shared(self, prepared: list[PreparedImage]) -> str:
        """Name what a suffix does wrong, by the smallest batch that shows it."""
        one_prompt = [prepared[0].with_prompt(1)]
        if not self._shares(one_prompt):
            return (
                "one prompt by itself differs from a plain pass: look at the positions in "
                "forward_suffix (the first is the length of the prefix), and at the cache"
            )
        if not self._shares(prepared[:1]):
            return (
                "prompts of different lengths after one image differ from plain passes: look at "
                "the mask in forward_suffix, and at which rows of the cache belong to a prompt"
            )
        return (
            "prompts of several images differ from plain passes: look at owner_n in forward_suffix"
        )

    def _shares(self, prepared: list[PreparedImage]) -> bool:
        shared = run_pooled(self.vlm, prepared, poolings=["last"], way="shared")
        alone = run_pooled(self.vlm, prepared, poolings=["last"], way="alone")
        return all(
            _apart(shared[key], values) <= SAME[self.vlm.dtype] for key, values in alone.items()
        )

    # --------------------------------------------------------------------------------- what is more

    def answers(self) -> str:
        """Compare the logits of words with those of the whole model."""
        if self.vlm.head is None:
            raise _LeftOut("without output_embedding, logits and tokenizer there are no answers")
        head = take_answer_head(self.vlm, WORDS, self._prepare()[0].with_prompt(0))
        if head.refusal:
            raise ValueError(head.refusal)
        lens = "" if head.norm else "; its final norm is not one that is known: no lens"
        return f"logits of yes and no are the model's, within {head.largest_error:.1e}{lens}"

    def stage(self, stage: str, member: str) -> str:
        """Read a stage of the image encoder."""
        if not self.vlm.layers_of_stage[stage]:
            raise _LeftOut(f"no {member}, which switches off {SWITCHED_OFF[member]}")
        states: States = run_pooled(
            self.vlm, self._of_one_shape(), poolings=["mean"], stages=["lm", stage]
        )
        read = [key for key in states if key.startswith(stage)]
        if len(read) != len(self.vlm.layers_of_stage[stage]):
            raise ValueError(
                f"{len(read)} of {len(self.vlm.layers_of_stage[stage])} layers are read in a pass: "
                f"forward is to run {member} of the adapter itself"
            )
        return f"{', '.join(dict.fromkeys((read[0], read[-1])))} of an image encoder's pass"

    def heat_map(self) -> str:
        """Change one quarter of the image: the tokens there change the most."""
        if not self.vlm.is_native and getattr(self.vlm.adapter, "token_grid", None) is None:
            raise _LeftOut("no token_grid, which switches off heat maps")
        try:
            check_token_grid(self.vlm, self.images, prompt=PROMPTS[0][0])
        except NoTokenGrid as error:
            if not self.vlm.is_native:
                raise ValueError(str(error)) from error
            raise _LeftOut(str(error)) from error
        return "image tokens lie where the grid says"

    # ---------------------------------------------------------------------------------------- tools

    def _batch(
        self, prepared: PreparedImage
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        tokens = self.vlm.to_device(batch_tokens(self.vlm, [prepared.tokens[0]]))
        return tokens, self.vlm.to_device(batch_images(self.vlm, [prepared]))

    def _states(self, prepared: PreparedImage) -> dict[str, torch.Tensor]:
        """(t, d) of each layer of a pass with one prompt."""
        states: dict[str, torch.Tensor] = {}

        def keep(layer: str, hidden_ntd: torch.Tensor) -> None:
            states[layer] = hidden_ntd[0].clone()

        read_layers(self.vlm, [prepared], keep)
        return states

    @torch.inference_mode()
    def _last_states(
        self, tokens: dict[str, torch.Tensor], images: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """(d,) of each layer's last token."""
        states: dict[str, torch.Tensor] = {}

        def keep(layer: str, hidden_ntd: torch.Tensor) -> None:
            states[layer] = hidden_ntd[0, -1].clone()

        with tap_decoder(self.vlm, keep):
            self.vlm.adapter.forward(tokens, images)
        return states


def _other_values(values: torch.Tensor) -> torch.Tensor:
    """Return an image's input with other values; numbers of things stay."""
    if not values.is_floating_point():
        return values
    return values.flip(-1) * 0.7 + values.roll(1, -1) * 0.5 + 0.3


def _sizes(prepared: PreparedImage) -> tuple:
    shapes = {name: values.shape for name, values in prepared.image_inputs.items()}
    return int(prepared.image_masks[0].sum()), shapes


def _first_tensor(output: object) -> torch.Tensor:
    hidden = getattr(output, "last_hidden_state", output)
    return hidden[0] if isinstance(hidden, tuple) else hidden  # type: ignore[return-value]


def _apart(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest value."""
    largest = expected.abs().max().clamp(min=1e-30)
    return float(((values - expected).abs().max() / largest).nan_to_num(torch.inf))


def _fits(head: nn.Module, last_d: torch.Tensor, logits_v: torch.Tensor, dtype: str) -> bool:
    """Tell whether the logits of a state are the model's, up to a scale."""
    weight_vd: Any = head.weight
    if last_d.shape != weight_vd.shape[1:]:
        return False
    raw_v = (last_d @ weight_vd.T).float()
    bias = getattr(head, "bias", None)
    raw_v = raw_v if bias is None else raw_v + bias.float()
    scale = (raw_v @ logits_v) / (raw_v @ raw_v).clamp(min=1e-30)
    return _apart(scale * raw_v, logits_v) <= TOLERANCES[dtype]


def _looks_like_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _try(module: nn.Module, hidden_1d: torch.Tensor) -> torch.Tensor:
    try:
        return module(hidden_1d)
    except (RuntimeError, TypeError, ValueError):  # of another width, or not of states
        return hidden_1d.new_zeros(1, 0)


def describe_findings(table: pd.DataFrame) -> str:
    """Return the table of a check as text, and in a last line what is to be done."""
    width = max(len(check) for check in table.check)
    lines = [f"{row.result} {row.check:<{width}}  {row.note}" for row in table.itertuples()]
    failed = table.check[table.result == FAILED].tolist()
    if failed:
        lines.append(f"not yet: {', '.join(failed)}")
    else:
        lines.append("it can be extracted")
    return "\n".join(lines)
