"""What is done to a model: layers, tokens, edits and routes, and every single intervention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from probekit.interventions.edits import ERASURES
from probekit.tasks.changed_images import IMAGE_CHANGES

SITES = ("image", "text", "last", "all")
# Which tokens no longer see which: the looking ones come last. The object's are the image tokens in
# the boxes of what a task asks about.
OBJECT_ROUTE = "object>all"
ROUTES = ("image>text", "image>last", "text>last", OBJECT_ROUTE)
# Controls on the same images: a random subspace, and what is known of another task.
RANDOM = "random"
OTHER_TASK = "other_task"
# Names of interventions beside those of the erasures.
NOTHING = "none"  # the model alone
STEER = "steer"
CUT = "cut"
WINDOW_SHARE = 0.1  # of the depth, that a route is cut in


@dataclass(frozen=True, kw_only=True)
class InterventionSettings:
    """Settings of the interventions.

    Attributes
    ----------
    watch : tuple of str
        Tasks whose answers are watched; empty takes those that have answers and are no variants.
    layers : tuple of int
        Numbers of the layers that are edited; empty takes all of them.
    tokens : tuple of str
        Out of :data:`SITES`: the ``"image"``'s tokens, the ``"text"`` after them, the ``"last"``
        one, and ``"all"``, which is image and text together.
    erase : tuple of str
        Out of :data:`probekit.interventions.edits.ERASURES`.
    doses : tuple of float
        Standard deviations of the direction that are added, to the last token or, where that is not
        among `tokens`, to the text.
    routes : tuple of str
        Out of :data:`ROUTES`: attention that is cut.
    window : int or None
        Blocks that a route is cut in; None takes a tenth of the depth.
    inputs : tuple of str
        Out of :data:`probekit.tasks.changed_images.IMAGE_CHANGES`: how images are changed for the
        tasks that ask about objects.
    images : int
        Test images.
    fit_images : int
        Training images that edits are fitted on.
    resamples : int
        Bootstrap samples of the intervals.
    seed : int
        Of random subspaces.
    """

    watch: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ("image", "text", "last")
    erase: tuple[str, ...] = ("leace", "mean_difference")
    doses: tuple[float, ...] = (-8.0, -4.0, -2.0, 2.0, 4.0, 8.0)
    routes: tuple[str, ...] = ROUTES
    window: int | None = None
    inputs: tuple[str, ...] = IMAGE_CHANGES
    images: int = 100
    fit_images: int = 1000
    resamples: int = 2000
    seed: int = 0

    def check(self) -> None:
        """Check that every name is one of those that can be chosen.

        Raises
        ------
        ValueError
            The message names what can be chosen.
        """
        for name, choices in (
            ("tokens", SITES),
            ("erase", tuple(ERASURES)),
            ("routes", ROUTES),
            ("inputs", IMAGE_CHANGES),
        ):
            unknown = [one for one in getattr(self, name) if one not in choices]
            if unknown:
                raise ValueError(f"{name}={unknown}: take out of {', '.join(choices)}")
        if not self.erase and not self.routes and not self.doses and not self.inputs:
            raise ValueError(
                "erase=[], doses=[], routes=[] and inputs=[]: name something that is to be done"
            )
        if self.erase and not self.tokens:
            raise ValueError(f"tokens=[]: name at least one out of {', '.join(SITES)}")
        if self.doses and not _steered_site(self.tokens):
            raise ValueError(
                f"doses={list(self.doses)} are added to the last token or to the text, and "
                f"tokens={list(self.tokens)}: add last or text, or take doses=[]"
            )


class Intervention(NamedTuple):
    """One change of a model.

    Attributes
    ----------
    layer : int
        Number of the layer whose states are changed, or of the one that enters the first block
        whose attention is cut.
    name : str
        An erasure, ``"steer"`` or ``"cut"``; ``"none"`` for the model alone.
    site : str
        Out of :data:`SITES`, or of :data:`ROUTES`.
    dose : float or None
        Standard deviations of a direction; blocks of a cut; None of an erasure.
    control : str
        ``"none"``, or ``"random"`` and ``"other_task"``: as much of something else, of a cut as
        many other image tokens.
    """

    layer: int
    name: str
    site: str
    dose: float | None = None
    control: str = "none"


def plan_interventions(
    settings: InterventionSettings, *, blocks: int, is_binary: bool, asks_objects: bool = True
) -> list[Intervention]:
    """List what is done to a model for one task, layer by layer; first of all, nothing.

    Parameters
    ----------
    settings : InterventionSettings
    blocks : int
        Of its decoder.
    is_binary : bool
        Whether the task's answers are no and yes, between which there is one direction.
    asks_objects : bool
        Whether it asks about objects; else :data:`OBJECT_ROUTE` is left out.

    Raises
    ------
    ValueError
        It has no such layer.
    """
    layers = settings.layers or tuple(range(blocks + 1))
    unknown = [layer for layer in layers if not 0 <= layer <= blocks]
    if unknown:
        raise ValueError(
            f"layers={list(settings.layers)}: this model has layers 0 to {blocks}, and no "
            f"{', '.join(map(str, unknown))}"
        )
    planned = [Intervention(0, NOTHING, "")]
    for layer in sorted(set(layers)):
        for site in settings.tokens:
            for name in settings.erase:
                planned.append(Intervention(layer, name, site))
                planned.append(Intervention(layer, name, site, control=RANDOM))
            if settings.erase:
                planned.append(Intervention(layer, settings.erase[0], site, control=OTHER_TASK))
        if is_binary and settings.doses:
            site = _steered_site(settings.tokens)
            planned += [Intervention(layer, STEER, site, dose) for dose in settings.doses if site]
    window = min(blocks, settings.window or max(1, round(WINDOW_SHARE * blocks)))
    for start in range(blocks - window + 1):
        routes = [one for one in settings.routes if asks_objects or one != OBJECT_ROUTE]
        planned += [Intervention(start, CUT, route, window) for route in routes]
        if OBJECT_ROUTE in routes:
            planned.append(Intervention(start, CUT, OBJECT_ROUTE, window, RANDOM))
    return sorted(dict.fromkeys(planned), key=lambda one: one.layer)  # each once


def _steered_site(tokens: Sequence[str]) -> str:
    return next((site for site in ("last", "text") if site in tokens), "")
