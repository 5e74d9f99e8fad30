"""A decoder that provably uses one direction of its image tokens in one block, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from probekit.interventions.concepts import ConceptNames, FittedEdits
from probekit.interventions.edits import random_edit
from probekit.interventions.object_tokens import ELSEWHERE, OBJECT
from probekit.interventions.running import Reader, do_one
from probekit.interventions.scores import Done, TaskScores
from probekit.interventions.settings import (
    OTHER_TASK,
    RANDOM,
    Intervention,
    InterventionSettings,
    plan_interventions,
)
from probekit.models.forward import run_pooled
from probekit.models.load import Vlm, load_vlm
from probekit.models.output_head import AnswerHead, FinalNorm
from probekit.models.processor import PreparedImage
from probekit.models.replay import KeptPass
from probekit.probes.labels import LabelSet
from tests.support.architectures import save_checkpoint

MOVING_BLOCK = 1  # its output is layer 2: there the last token has what the image tokens had
POOLINGS = ("image_mean", "suffix_mean", "last")
PROMPT = "Is there a dog?"
TASK = "planted"
CATEGORIES = "seen"


@dataclass
class PlantedModel:
    """A tiny LLaVA whose blocks do nothing, but one, which copies a direction to later tokens.

    Attributes
    ----------
    vlm : Vlm
        Its image tokens are what stands in ``pixel_values``.
    template : PreparedImage
        An image with the prompt.
    used_d, unused_d, said_d : ndarray
        Orthonormal: the direction that is read off image tokens, one that nobody reads, and that
        which is written to later tokens, along which the answer is yes or no.
    """

    vlm: Vlm
    template: PreparedImage
    used_d: np.ndarray
    unused_d: np.ndarray
    said_d: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> PlantedModel:
        """Make the model; :meth:`plant` gives it its directions."""
        vlm = load_vlm(str(save_checkpoint("llava", folder)), device="cpu", dtype="float32")
        image = Image.new("RGB", (56, 56))
        template = vlm.prompt_processor.prepare(image, [PROMPT])
        tokens = int(template.image_masks[0].sum())

        width = vlm.width

        class PlantedLlava(type(vlm.model)):
            """Its image tokens are the first numbers of its pixels."""

            def get_image_features(self, pixel_values: torch.Tensor, **options: object) -> Any:
                flat = pixel_values.flatten(1)[:, : tokens * width]
                return SimpleNamespace(pooler_output=list(flat.unflatten(1, (tokens, width))))

        vlm.model.__class__ = PlantedLlava
        empty = np.zeros(vlm.width)
        return cls(vlm, template, empty, empty, empty)

    @torch.no_grad()
    def plant(self, seed: int) -> None:
        """Draw new directions, and write them into the weights."""
        rng = np.random.default_rng(seed)
        directions = np.linalg.qr(rng.normal(size=(self.vlm.width, 3)))[0].T
        self.used_d, self.unused_d, self.said_d = directions
        for number, block in enumerate(self.vlm.blocks):
            block.mlp.down_proj.weight.zero_()
            attention = block.self_attn
            attention.o_proj.weight.zero_()
            if number == MOVING_BLOCK:
                attention.q_proj.weight.zero_()  # all tokens get the same attention
                attention.v_proj.weight.zero_()
                attention.v_proj.weight[0] = torch.from_numpy(self.used_d)
                attention.o_proj.weight[:, 0] = 10 * torch.from_numpy(self.said_d)

    def head(self) -> AnswerHead:
        """Return what reads yes along the direction that is said, and no against it."""
        rows_vd = np.stack([-self.said_d, self.said_d]).astype(np.float32)
        return AnswerHead(rows_vd=rows_vd, token_ids=(0, 1), norm=FinalNorm("none"))

    def draw(
        self,
        rng: np.random.Generator,
        n: int,
        *,
        noise: float = 1.0,
        object_tokens: int | None = None,
    ) -> tuple[list[PreparedImage], np.ndarray, np.ndarray]:
        """Draw n images with a label each that is used, and one that is not.

        Only the first `object_tokens` hold them, where that is named, and are marked as the
        object's.
        """
        width = self.vlm.width
        tokens = int(self.template.image_masks[0].sum())
        # As many of each pair of labels, so that neither says anything of the other.
        used_n, unused_n = rng.permutation(np.tile([[0, 0], [0, 1], [1, 0], [1, 1]], (n // 4, 1))).T
        token_ntd = rng.normal(size=(n, tokens, width)) * noise
        holding = object_tokens or tokens
        share_t = (np.arange(tokens) < holding)[:, None] * tokens / holding  # the mean stays
        token_ntd += (2 * used_n - 1)[:, None, None] * share_t * self.used_d
        token_ntd += (2 * unused_n - 1)[:, None, None] * share_t * self.unused_d
        marks = {}
        if object_tokens:
            order = np.concatenate(
                [np.arange(object_tokens), object_tokens + rng.permutation(tokens - object_tokens)]
            )
            numbers = np.argsort(order) // object_tokens
            marks = {OBJECT: numbers == 0, ELSEWHERE: numbers == 1}
        pixels = self.template.image_inputs["pixel_values"]
        prepared = []
        for token_td in token_ntd:
            values = torch.zeros_like(pixels).flatten()
            values[: tokens * width] = torch.from_numpy(token_td.ravel())
            inputs = {"pixel_values": values.reshape(pixels.shape)}
            prepared.append(replace(self.template, image_inputs=inputs, marks=marks))
        return prepared, used_n, unused_n


@dataclass
class TrainingStates:
    """Stands in for activations: the states of the same training examples for several tasks."""

    states: dict[str, torch.Tensor]
    labels_n: np.ndarray
    tasks: tuple[str, ...] = (TASK, CATEGORIES)

    @property
    def examples(self) -> pd.DataFrame:
        of_task = {
            "labels": [[int(label)] for label in self.labels_n],
            "mask": [[1]] * len(self.labels_n),
        }
        tables = [pd.DataFrame(of_task).assign(task=task) for task in self.tasks]
        return pd.concat(tables, ignore_index=True)

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        return np.tile(self.states["/".join(key)].numpy(), (len(self.tasks), 1))


class _RandomEdits(FittedEdits):
    """Takes another random subspace where a concept would be erased."""

    def _edit(self, intervention: Intervention, site: str) -> Any:
        edit = super()._edit(intervention._replace(control="none"), site)
        is_control = intervention.control == RANDOM
        return random_edit(edit, seed=2 * self.seed + is_control + 1000 * intervention.layer)


def study(
    model: PlantedModel,
    settings: InterventionSettings,
    *,
    seed: int,
    is_used: bool = True,
    erases: bool = True,
    train_images: int = 160,
    images: int = 100,
    noise: float = 1.0,
    object_tokens: int | None = None,
) -> pd.DataFrame:
    """Do interventions on images that are drawn anew, and score them.

    With `is_used` the task asks about the label that the model uses; else about the other one,
    which its image tokens hold just as well. Without `erases`, random subspaces stand in for what
    would be erased: then nothing differs from its control.
    """
    vlm = model.vlm
    model.plant(seed)
    rng = np.random.default_rng([seed, 1])
    train, *train_labels = model.draw(rng, train_images, noise=noise)
    test, *test_labels = model.draw(rng, images, noise=noise, object_tokens=object_tokens)
    which = 0 if is_used else 1
    concepts = ConceptNames({"text": TASK, "last": TASK, "image": CATEGORIES}, {})
    states = run_pooled(vlm, train, poolings=POOLINGS, way="shared")
    fitted = FittedEdits if erases else _RandomEdits
    edits = fitted(TrainingStates(states, train_labels[which]), concepts, vlm.layers, "cpu", seed)
    kept = KeptPass(vlm, test, way="shared")
    reader = Reader(model.head(), [[0], [1]], None, vlm)
    planned = plan_interventions(settings, blocks=len(vlm.blocks), is_binary=True)
    planned = [one for one in planned if one.control != OTHER_TASK]
    done = []
    for one in planned:
        readings = do_one(kept, one, edits, reader, why_no_cut="")
        reason = readings if isinstance(readings, str) else ""
        done.append(Done(one, None if reason else readings, reason))
    y_nc = torch.from_numpy(test_labels[which][:, None]).float()
    labels = LabelSet(
        name="none",
        kind="binary",
        classes=["match"],
        image_n=np.arange(images),
        y_nc=y_nc,
        mask_nc=torch.ones_like(y_nc),
        split={},
    )
    nothing, *changed = done
    scores = TaskScores(labels, resamples=settings.resamples)
    return scores.table(nothing.readings, changed, layers=vlm.layers)
