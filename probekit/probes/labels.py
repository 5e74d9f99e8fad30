"""The labels that probes are trained on: a task's true labels, and those of controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from probekit.probes import bootstrap, controls, metrics
from probekit.tasks.base import task_infos
from probekit.tasks.building import SPLITS


class LabelKey(NamedTuple):
    """Names the labels that a probe was trained on, and the seed.

    Attributes
    ----------
    control : str
        ``"none"`` for the true labels, or a control of the labels.
    seed : int
        That of the control's labels, and of the probe.
    """

    control: str
    seed: int


class LabelArrays(NamedTuple):
    """The labels of the n examples of one split.

    Attributes
    ----------
    y_nc : ndarray
        (n, c) labels, 0 or 1.
    mask_nc : ndarray
        (n, c) 1 where an entry counts.
    image_n : ndarray
        (n,) which image each example shows.
    """

    y_nc: np.ndarray
    mask_nc: np.ndarray
    image_n: np.ndarray


@dataclass(frozen=True)
class LabelSet:
    """One set of labels for the n examples of a task.

    Attributes
    ----------
    name : str
        ``"none"`` for the true labels, or a name out of
        :data:`probekit.probes.controls.LABEL_CONTROLS`.
    kind : str
        Of the task, see :class:`probekit.tasks.base.TaskInfo`.
    classes : list of str
        Names of the c classes.
    image_n : ndarray
        (n,) which image each example shows.
    y_nc : Tensor
        (n, c) float32 labels, 0 or 1.
    mask_nc : Tensor
        (n, c) float32, 1 where an entry counts.
    split : dict of str to Tensor
        The row numbers of each split.
    device : str
        Where probabilities are scored by them.
    """

    name: str
    kind: str
    classes: list[str]
    image_n: np.ndarray
    y_nc: torch.Tensor
    mask_nc: torch.Tensor
    split: dict[str, torch.Tensor]
    device: str = "cpu"

    def select(self, split: str) -> LabelArrays:
        """Return the labels of one split as arrays."""
        rows = self.split[split].numpy()
        return LabelArrays(self.y_nc[rows].numpy(), self.mask_nc[rows].numpy(), self.image_n[rows])

    def score(
        self,
        p_lnc: np.ndarray,
        *,
        split: str,
        layers: Sequence[str],
        resamples: int,
        by_class: bool = False,
        threshold_lc: np.ndarray | None = None,
    ) -> pd.DataFrame:
        """Score the probabilities of a split's examples.

        Parameters
        ----------
        p_lnc : ndarray
            (l, n, c) probabilities of label 1 for the n examples of the split.
        split : str
            The split.
        layers : sequence of str
            Names of the l layers.
        resamples, by_class, threshold_lc
            See :func:`probekit.probes.metrics.score_table`.

        Returns
        -------
        DataFrame
            That of :func:`probekit.probes.metrics.score_table`, with the column `split`.
        """
        y_nc, mask_nc, image_n = self.select(split)
        table = metrics.score_table(
            p_lnc,
            y_nc,
            mask_nc=mask_nc,
            image_n=image_n,
            classes=self.classes,
            layers=layers,
            binary=self.kind == "binary",
            resamples=resamples,
            by_class=by_class,
            threshold_lc=threshold_lc,
            device=self.device,
        )
        return table.assign(split=split)

    def curve(
        self, p_lnc: np.ndarray, *, split: str, metric: str, resamples: int
    ) -> bootstrap.Curve:
        """Return a metric of all layers as a curve that can be compared with others.

        Parameters
        ----------
        p_lnc : ndarray
            (l, n, c) probabilities of label 1 for the n examples of the split.
        split : str
            The split.
        metric : str
            A metric over all classes, see :func:`probekit.probes.metrics.score_counts`.
        resamples : int
            Number of bootstrap samples.
        """
        y_nc, mask_nc, image_n = self.select(split)
        counts = metrics.count_by_image(
            p_lnc, y_nc, mask_nc=mask_nc, image_n=image_n, device=self.device
        )

        def score(total: torch.Tensor) -> torch.Tensor:
            scores = metrics.score_counts(total, binary=self.kind == "binary")
            return scores[metrics.ScoreKey(metric)]

        return bootstrap.bootstrap_curve(
            counts, np.unique(image_n), score=score, resamples=resamples
        )


@dataclass(frozen=True)
class LabelledTask:
    """One task of an examples table: its rows there, and its true labels.

    Attributes
    ----------
    name : str
        Name of the task.
    rows : ndarray
        (n,) numbers of its rows in the examples table.
    prompts : ndarray
        (n,) their prompts.
    split_n : ndarray
        (n,) their splits.
    true : LabelSet
        Their labels. Entries of a category that does not have both answers in training do not
        count: no probe can learn it.
    """

    name: str
    rows: np.ndarray
    prompts: np.ndarray
    split_n: np.ndarray
    true: LabelSet

    @classmethod
    def from_examples(
        cls, examples: pd.DataFrame, name: str, *, device: str = "cpu"
    ) -> LabelledTask:
        """Take one task from an examples table.

        Parameters
        ----------
        examples : DataFrame
            See :mod:`probekit.tasks.building`.
        name : str
            Name of the task.
        device : str
            Where probabilities are scored by its labels.

        Raises
        ------
        ValueError
            A split has no examples of this task, or no category has both answers in training.
        """
        rows = np.flatnonzero((examples.task == name).to_numpy())
        table = examples.iloc[rows]
        info = task_infos(table)[name]
        split_n = table.split.to_numpy()
        split = _split_rows(split_n, name)
        y_nc = torch.tensor(np.array(table["labels"].tolist()), dtype=torch.float32)
        mask_nc = torch.tensor(np.array(table["mask"].tolist()), dtype=torch.float32)
        train = split["train"]
        mask_nc = mask_nc * _learnable_classes(y_nc[train], mask_nc[train], kind=info.kind)
        if not mask_nc.any():
            raise ValueError(
                f"task {name} has no category with both answers in training: take more images or "
                "more categories in 01_build_data"
            )
        true = LabelSet(
            name="none",
            kind=info.kind,
            classes=list(info.classes),
            image_n=table.image_id.to_numpy(),
            y_nc=y_nc,
            mask_nc=mask_nc,
            split=split,
            device=device,
        )
        return cls(name, rows, table.prompt.to_numpy(), split_n, true)

    @cached_property
    def text_probabilities(self) -> dict[str, np.ndarray]:
        """Probabilities (n,) of label 1 from the prompts alone, by the name of the baseline.

        One entry for each of :data:`probekit.probes.controls.TEXT_BASELINES`; none unless the task
        is binary.
        """
        if self.true.kind != "binary":
            return {}
        y_n = self.true.y_nc[:, 0].numpy()
        train_n = self.split_n == "train"
        return {
            name: controls.bag_of_words(self.prompts, y_n, train_n=train_n, longest=longest)
            for name, longest in controls.TEXT_BASELINES.items()
        }

    def labels(self, control: str, seed: int = 0) -> LabelSet:
        """Return the labels of a control, see :func:`probekit.probes.controls.control_labels`.

        Parameters
        ----------
        control : str
            A name out of :data:`probekit.probes.controls.LABEL_CONTROLS`, or ``"none"`` for the
            true labels.
        seed : int
            Seed of the control's labels.

        Raises
        ------
        ValueError
            The task cannot have this control; the message says why.
        """
        if control == "none":
            return self.true
        y_nc, mask_nc, split_n = controls.control_labels(
            control,
            self.true.y_nc.numpy(),
            mask_nc=self.true.mask_nc.numpy(),
            prompts=self.prompts,
            split_n=self.split_n,
            kind=self.true.kind,
            seed=seed,
        )
        return replace(
            self.true,
            name=control,
            y_nc=torch.from_numpy(y_nc),
            mask_nc=torch.from_numpy(mask_nc),
            split=_split_rows(split_n, f"{self.name} ({controls.CONTROL_WORDS[control]})"),
        )


def _learnable_classes(y_nc: torch.Tensor, mask_nc: torch.Tensor, *, kind: str) -> torch.Tensor:
    """Return (c,) 1 for the classes that count in training, else 0.

    Categories must have both answers there.
    """
    if kind != "multilabel":
        return mask_nc.amax(0)
    has_yes_c = (mask_nc * y_nc).amax(0)
    has_no_c = (mask_nc * (1 - y_nc)).amax(0)
    return has_yes_c * has_no_c


def _split_rows(split_n: np.ndarray, name: str) -> dict[str, torch.Tensor]:
    rows = {split: torch.from_numpy(np.flatnonzero(split_n == split)) for split in SPLITS}
    empty = [split for split, numbers in rows.items() if len(numbers) == 0]
    if empty:
        raise ValueError(
            f"task {name} has no examples in {', '.join(empty)}: take more images in 01_build_data"
        )
    return rows
