"""What is erased where: the concepts of tasks, and edits fitted on training images."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from probekit.extraction.store import Activations
from probekit.interventions import edits
from probekit.interventions.edits import AffineEdit, Concept, NoEdit
from probekit.interventions.settings import OTHER_TASK, RANDOM, STEER, Intervention
from probekit.models.replay import Change
from probekit.tasks.base import TaskInfo

Edit = AffineEdit | edits.SameNormEdit
# How the tokens of a site are pooled where an edit is fitted.
POOLING_OF_SITE = {"image": "image_mean", "text": "suffix_mean", "last": "last"}
# The sites of the tokens that are edited together.
PARTS_OF_SITE = {"all": ("image", "text")}


@dataclass(frozen=True)
class ConceptNames:
    """Which task's labels are erased from which tokens, to watch the answers to one task.

    Tokens of the image come before the question. In a causal model they cannot know its answer, but
    what there is in the image: so the categories are erased there, all of them.

    Attributes
    ----------
    erased : dict of str to str
        The task whose labels are erased, by site; a site that has none is missing.
    others : dict of str to str
        The task that serves as a control, by site: of the same kind where there is one, else those
        of its classes that are the most balanced, as many as are erased.
    """

    erased: dict[str, str]
    others: dict[str, str]

    @classmethod
    def of(cls, task: str, infos: Mapping[str, TaskInfo]) -> ConceptNames:
        """Choose concepts for a task out of those of a run."""
        plain_name = infos[task].variant_of or task
        strangers = {
            name: info.kind
            for name, info in infos.items()
            if name != plain_name and not info.variant_of
        }
        categories = next((name for name, kind in strangers.items() if kind == "multilabel"), "")
        other = next(
            (name for name, kind in strangers.items() if kind == infos[task].kind), categories
        )
        erased = {"text": task, "last": task}
        if categories:
            erased["image"] = categories
        return cls(erased, {"text": other, "last": other} if other else {})

    def erased_words(self, site: str, control: str) -> str:
        """Say whose labels are erased from a site's tokens; "" for a random subspace."""
        if control == RANDOM:
            return ""
        tasks = self.others if control == OTHER_TASK else self.erased
        parts = PARTS_OF_SITE.get(site, (site,))
        return " and ".join(dict.fromkeys(tasks[part] for part in parts if part in tasks))

    @property
    def tasks(self) -> list[str]:
        """All tasks whose training examples are needed."""
        return list(dict.fromkeys([*self.erased.values(), *self.others.values()]))


@dataclass
class FittedEdits:
    """Edits of every layer, fitted on states of training examples when they are first needed.

    Attributes
    ----------
    activations : Activations
        Of training examples of all tasks, with the poolings of the sites.
    concepts : ConceptNames
    layers : sequence of str
        Names of the decoder's layers.
    device : str
        Where edits are fitted.
    seed : int
        Of random subspaces.
    """

    activations: Activations
    concepts: ConceptNames
    layers: Sequence[str]
    device: str
    seed: int
    _edits: dict[tuple[Intervention, str], Edit | NoEdit] = field(default_factory=dict)
    _concepts: dict[tuple[int, str, str], Concept] = field(default_factory=dict)
    _erasures: dict[tuple[int, str, str, bool], AffineEdit] = field(default_factory=dict)

    def fit(self, planned: Sequence[Intervention]) -> None:
        """Fit all that is planned, one layer after the other."""
        by_layer: dict[int, list[Intervention]] = {}
        for one in planned:
            if one.name in (*edits.ERASURES, STEER):
                by_layer.setdefault(one.layer, []).append(one)
        for of_layer in tqdm(by_layer.values(), desc="fitting edits", unit="layer"):
            for one in of_layer:
                for site in PARTS_OF_SITE.get(one.site, (one.site,)):
                    with contextlib.suppress(NoEdit):  # it is raised again where it is needed
                        self._edit(one, site)

    def changes(self, intervention: Intervention, *, device: str) -> dict[str, Change]:
        """Return what an intervention does to which tokens.

        Parameters
        ----------
        intervention : Intervention
            Of states.
        device : str
            Of the model.

        Raises
        ------
        NoEdit
            It cannot be done.
        """
        sites = PARTS_OF_SITE.get(intervention.site, (intervention.site,))
        return {site: self._edit(intervention, site).to(device) for site in sites}

    def _edit(self, intervention: Intervention, site: str) -> Edit:
        """Return an edit, which is fitted once; that it cannot be fitted is kept, too."""
        key = (intervention, site)
        if key not in self._edits:
            if any(layer != intervention.layer for layer, _, _ in self._concepts):
                self._concepts.clear()  # states of one layer are held at a time
            try:
                self._edits[key] = self._fit(intervention, site)
            except NoEdit as error:
                self._edits[key] = error
        edit = self._edits[key]
        if isinstance(edit, NoEdit):
            raise NoEdit(str(edit))
        return edit

    def _fit(self, intervention: Intervention, site: str) -> Edit:
        layer, name, _, dose, control = intervention
        tasks = self.concepts.others if control == OTHER_TASK else self.concepts.erased
        if site not in tasks and control == OTHER_TASK:
            raise NoEdit("the run has nothing else that these tokens could know")
        if site not in tasks:
            raise NoEdit(
                "tokens of the image come before the question, and cannot know its answer: add a "
                "task with categories, such as category, and those are erased there"
            )
        if name == STEER:
            return edits.steer(self._concept(layer, site, tasks[site]), dose=dose or 0.0)
        erasure = self._erasure(layer, name, site, control)
        if control != RANDOM:
            return erasure
        seed = zlib.crc32(f"{self.seed} {layer} {name} {site}".encode())
        return edits.random_edit(erasure, seed=seed)

    def _erasure(self, layer: int, name: str, site: str, control: str) -> AffineEdit:
        key = (layer, name, site, control == OTHER_TASK)
        if key not in self._erasures:
            concept = self._concept(layer, site, self.concepts.erased[site])
            if control == OTHER_TASK:
                other = self._concept(layer, site, self.concepts.others[site])
                concept = other.most_balanced(concept.z_nc.shape[1])
            self._erasures[key] = edits.ERASURES[name](concept)
        return self._erasures[key]

    def _concept(self, layer: int, site: str, task: str) -> Concept:
        key = (layer, site, task)
        if key not in self._concepts:
            examples = self.activations.examples
            rows = np.flatnonzero((examples.task == task).to_numpy())
            x_nd = self.activations[self.layers[layer], POOLING_OF_SITE[site]][rows]
            y_nc, mask_nc = _labels(examples.iloc[rows])
            self._concepts[key] = Concept.of(
                torch.from_numpy(x_nd).to(self.device, torch.float64),
                y_nc.to(self.device),
                mask_nc.to(self.device),
            )
        return self._concepts[key]


def _labels(examples: pd.DataFrame) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, c) labels of examples, and whether they count."""
    y_nc = torch.tensor(np.array(examples["labels"].tolist()), dtype=torch.float64)
    mask_nc = torch.tensor(np.array(examples["mask"].tolist()), dtype=torch.float64)
    return y_nc, mask_nc


def select_training(examples: pd.DataFrame, tasks: Sequence[str], *, images: int) -> pd.DataFrame:
    """Return the training examples of some tasks, of the first images that all splits draw from.

    Parameters
    ----------
    examples : DataFrame
    tasks : sequence of str
    images : int
        The most that are taken.
    """
    rows = examples[(examples.split == "train") & examples.task.isin(tasks)]
    chosen = rows.image_id.drop_duplicates().head(images)
    return rows[rows.image_id.isin(chosen)].reset_index(drop=True)
