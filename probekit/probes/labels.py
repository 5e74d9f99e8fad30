"""The labels that probes are trained on: a task's own, and those of controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from probekit.probes import bootstrap, controls, metrics
from probekit.tasks.base import task_infos

SPLITS = ("train", "validation", "test")
HEADLINE = {"binary": "accuracy", "multilabel": "f1_macro", "one_of": "f1_macro"}  # what a kind of task is judged by


@dataclass(frozen=True)
class LabelSet:
    """One set of labels for the n examples of a task.

    Attributes
    ----------
    name : "none" (the true labels), or a name out of :data:`probekit.probes.controls.LABEL_CONTROLS`
    y_nc, mask_nc : labels 0 or 1, and 1 where an entry counts
    split : row numbers by split
    """

    name: str
    kind: str
    classes: list[str]
    image_n: np.ndarray
    y_nc: torch.Tensor
    mask_nc: torch.Tensor
    split: dict[str, torch.Tensor]

    def of(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """LabelSet, mask and images of a split."""
        rows = self.split[split].numpy()
        return self.y_nc[rows].numpy(), self.mask_nc[rows].numpy(), self.image_n[rows]

    def score(self, p_lnc: np.ndarray, split: str, layers: Sequence[str], resamples: int, by_class: bool = False,
              threshold_lc: np.ndarray | None = None) -> pd.DataFrame:
        """:func:`probekit.probes.metrics.table` of probabilities for a split."""
        return metrics.table(p_lnc, *self.of(split), self.classes, list(layers), self.kind == "binary", resamples, 0,
                             by_class, threshold_lc).assign(split=split)

    def curve(self, p_lnc: np.ndarray, split: str, metric: str, resamples: int) -> bootstrap.Curve:
        """A metric of all layers, to be compared with other curves."""
        counts = metrics.image_counts(p_lnc, *self.of(split))
        return bootstrap.bootstrap_curve(counts, np.unique(self.of(split)[2]),
                                lambda total: metrics.scores(total, self.kind == "binary")[metric, None], resamples)


@dataclass(frozen=True)
class LabelledTask:
    """One task of a run: its rows in the examples table, and its labels.

    Entries of a category that training examples are not asked for with both answers do not count: no probe can learn
    it.
    """

    name: str
    rows: np.ndarray
    prompts: np.ndarray
    split_n: np.ndarray
    true: LabelSet

    @classmethod
    def of(cls, examples: pd.DataFrame, name: str) -> LabelledTask:
        """
        Raises
        ------
        ValueError
            A split has no examples of this task, or no category has both answers in training.
        """
        about = task_infos(examples)[name]
        rows = np.flatnonzero((examples.task == name).to_numpy())
        table = examples.iloc[rows]
        split = table.split.to_numpy()
        y, mask = (torch.tensor(np.array(table[column].tolist()), dtype=torch.float32) for column in ("labels", "mask"))
        numbers = _numbers(split, name)
        mask *= _learnable(y[numbers["train"]], mask[numbers["train"]], about.kind)
        if not mask.any():
            raise ValueError(f"task {name} has no category with both answers in training: take more images or more "
                             "categories in 01_build_data")
        return cls(name, rows, table.prompt.to_numpy(), split, LabelSet(
            "none", about.kind, list(about.classes), table.image_id.to_numpy(), y, mask, numbers))

    @cached_property
    def p_texts_n(self) -> dict[str, np.ndarray]:
        """(n,) what the prompts of a binary task alone say, for each of :data:`probekit.probes.controls.TEXT_BASELINES`."""
        if self.true.kind != "binary":
            return {}
        y = self.true.y_nc[:, 0].numpy()
        return {name: controls.bag_of_words(self.prompts, y, self.split_n == "train", longest)
                for name, longest in controls.TEXT_BASELINES.items()}

    def labels(self, control: str, seed: int = 0) -> LabelSet:
        """The labels of a control, see :func:`probekit.probes.controls.labels`; "none" has the true ones."""
        if control == "none":
            return self.true
        own = self.true
        y, mask, split = controls.labels(control, own.y_nc.numpy(), own.mask_nc.numpy(), self.prompts, self.split_n,
                                         own.kind, seed)
        return LabelSet(control, own.kind, own.classes, own.image_n, torch.from_numpy(y), torch.from_numpy(mask),
                      _numbers(split, f"{self.name} ({controls.CONTROL_WORDS[control]})"))


def _learnable(y_nc: torch.Tensor, mask_nc: torch.Tensor, kind: str) -> torch.Tensor:
    """(c,) 1 for classes that count in training, and of categories those that count with both answers; else 0."""
    if kind != "multilabel":
        return mask_nc.amax(0)
    return (mask_nc * y_nc).amax(0) * (mask_nc * (1 - y_nc)).amax(0)


def _numbers(split_n: np.ndarray, name: str) -> dict[str, torch.Tensor]:
    found = {split: torch.from_numpy(np.flatnonzero(split_n == split)) for split in SPLITS}
    empty = [split for split, numbers in found.items() if not len(numbers)]
    if empty:
        raise ValueError(f"task {name} has no examples in {', '.join(empty)}: take more images in 01_build_data")
    return found
