"""Small tables that several tests share, and activations with a planted signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import xxhash

from probekit.models.output_head import AnswerHead

DECODER_LAYERS = ("lm.00", "lm.01", "lm.02", "lm.03")
WIDTH = 16


def with_task_info(
    table: pd.DataFrame, kind: str, classes: Sequence[str] = ("match",), question: str = "?"
) -> pd.DataFrame:
    """The examples with the columns that say what their task is."""
    return table.assign(kind=kind, classes=[list(classes)] * len(table), question=question)


@dataclass(frozen=True)
class MemoryActivations:
    """Activations in memory, with those parts of `extraction.store.Activations` that probes use.

    `states` has the layers in their order: (layer, pooling) to (n, d) float32.
    """

    examples: pd.DataFrame
    states: dict[tuple[str, str], np.ndarray]
    model: str = "planted"
    control: str = "none"
    untrained: bool = False
    answer_pooling: str = ""
    answer_head: AnswerHead | None = None

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        return self.states[key]

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(layer for layer, _ in self.states))

    @property
    def poolings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(pooling for _, pooling in self.states))

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.partition(".")[0] for layer in self.layers))

    def layers_with(self, pooling: str) -> list[str]:
        return [layer for layer in self.layers if (layer, pooling) in self.states]

    @property
    def meta(self) -> dict:
        layers = {
            stage: [layer for layer in self.layers if layer.startswith(f"{stage}.")]
            for stage in self.stages
        }
        return {"model": self.model, "untrained": self.untrained, "layers": layers}

    @property
    def record(self) -> dict:
        return {"model": self.model, "control": self.control, "untrained": self.untrained}

    @property
    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128()
        for key, x_nd in self.states.items():
            digest.update(str(key).encode())
            digest.update(np.ascontiguousarray(x_nd).tobytes())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        return f"{self.model}-{'untrained' if self.untrained else 'trained'}-{self.control}"

    def with_examples(self, **columns: object) -> MemoryActivations:
        """The same states, of examples with other columns."""
        return replace(self, examples=self.examples.assign(**columns))


def planted_activations(
    *, layer: str | None = "lm.02", images: int = 400, seed: int = 0
) -> MemoryActivations:
    """Activations of which one layer alone carries the label of a binary task.

    Each image has two examples: one with its own text, one with the text of another image of its
    split.
    """
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, 2 * images)
    signal = np.outer(2 * y - 1, rng.normal(size=WIDTH)) * 0.5
    states = {}
    for name in DECODER_LAYERS:
        noise = rng.normal(size=(2 * images, WIDTH))
        states[name, "mean"] = (noise + (name == layer) * signal).astype(np.float32)
    sizes = [images // 2, images // 4, images // 4]
    split = rng.permutation(np.repeat(["train", "validation", "test"], sizes))
    image = np.arange(images)
    text_of_other = np.empty(images, int)
    for name in set(split):
        text_of_other[split == name] = np.roll(image[split == name], 1)
    texts = np.stack([image, text_of_other], 1).ravel()
    examples = pd.DataFrame(
        {
            "image_id": np.repeat(image, 2),
            "split": np.repeat(split, 2),
            "task": "caption",
            "file": [f"{i}.jpg" for i in np.repeat(image, 2)],
            "prompt": [f"text {i}?" for i in texts],
            "labels": [[int(label)] for label in y],
            "mask": [[1]] * (2 * images),
        }
    )
    return MemoryActivations(with_task_info(examples, "binary"), states)


def planted_categories(*, images: int = 500, class_count: int = 6) -> MemoryActivations:
    """Activations of a multilabel task: of two layers the second one carries all labels.

    Three classes are asked about for each image.
    """
    rng = np.random.default_rng(0)
    frequency = np.linspace(0.5, 0.15, class_count)
    y = (rng.random((images, class_count)) < frequency).astype(int)
    y[np.arange(images), rng.integers(0, class_count, images)] = 1
    three_of_all = [1] * 3 + [0] * (class_count - 3)
    mask = np.stack([rng.permutation(three_of_all) for _ in range(images)])
    noise = rng.normal(size=(images, WIDTH))
    signal = rng.normal(size=(images, WIDTH)) * 0.5
    signal = signal + (2 * y - 1) @ rng.normal(size=(class_count, WIDTH))
    states = {
        ("lm.00", "mean"): noise.astype(np.float32),
        ("lm.01", "mean"): signal.astype(np.float32),
    }
    examples = pd.DataFrame(
        {
            "image_id": np.arange(images),
            "split": rng.choice(["train", "validation", "test"], images, p=[0.6, 0.2, 0.2]),
            "task": "category",
            "file": [f"{i}.jpg" for i in range(images)],
            "prompt": "which?",
            "labels": y.tolist(),
            "mask": mask.tolist(),
        }
    )
    classes = [chr(ord("a") + k) for k in range(class_count)]
    return MemoryActivations(with_task_info(examples, "multilabel", classes), states)
