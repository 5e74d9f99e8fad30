"""What a model says to one example while something is erased: for the explorer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.special import softmax

from probekit.images import load_rgb
from probekit.interventions.edits import NoEdit
from probekit.interventions.running import Reader, do_one
from probekit.interventions.settings import Intervention
from probekit.interventions.study import ModelStudy, NoInterventions
from probekit.models.replay import KeptPass


class LiveAnswers:
    """A model that answers single examples of one task while a concept is erased.

    It is loaded, checked, and stays until it is released. The pass of the latest example is kept.

    Parameters
    ----------
    study : ModelStudy
    task : str

    Raises
    ------
    NoInterventions
        Its answers to this task cannot be watched.
    OSError, ValueError
        The model cannot be loaded again.
    """

    def __init__(self, study: ModelStudy, task: str) -> None:
        head = study.head()
        question = next((one for one in study.questions(head) if one.name == task), None)
        if question is None:
            raise NoInterventions(f"its answers to {task} were not watched by 04_intervene")
        self._edits = study.fit(question)
        self._longest_side = study.extraction["longest_side"]
        self._home = study.home
        self._is_binary = question.labels.kind == "binary"
        self._vlm = study.load()
        try:
            self._way = study.check(self._vlm, question).way
        except BaseException:
            self._vlm.release()
            raise
        self._reader = Reader(head, question.tokens, None, self._vlm)
        self._latest: tuple[tuple[str, str], KeptPass] | None = None

    def ask(self, example: pd.Series, *, layer: int, name: str, site: str) -> np.ndarray:
        """Return (c,) probabilities of the classes, once a concept is erased.

        Parameters
        ----------
        example : Series
            With `file`, `prompt` and `mask`.
        layer : int
            Number of the layer.
        name : str
            Out of :data:`probekit.interventions.edits.ERASURES`.
        site : str
            Out of :data:`probekit.interventions.settings.SITES`.

        Raises
        ------
        NoEdit
            There is nothing to erase, or no answer after it.
        """
        kept = self._keep(example)
        erased = do_one(
            kept, Intervention(layer, name, site), self._edits, self._reader, why_no_cut=""
        )
        if isinstance(erased, str):
            raise NoEdit(erased)
        logits_a = erased.answers_na[0]
        if self._is_binary:
            return softmax(logits_a)[1:]
        return softmax(np.where(np.asarray(example["mask"]) > 0, logits_a, -np.inf))

    def release(self) -> None:
        """Drop the model."""
        self._latest = None
        self._vlm.release()

    def _keep(self, example: pd.Series) -> KeptPass:
        key = (example.file, example.prompt)
        if self._latest is None or self._latest[0] != key:
            image = load_rgb(self._home.resolve(example.file), self._longest_side)
            prepared = self._vlm.prompt_processor.prepare(image, [example.prompt])
            self._latest = (key, KeptPass(self._vlm, [prepared], way=self._way))
        return self._latest[1]
