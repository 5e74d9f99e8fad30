"""The explorer in JupyterLab: one example, and what a layer's probe makes of it, and where."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import pandas as pd
from markupsafe import Markup

from probekit.answers.reading import LENS, TUNED_LENS
from probekit.answers.scores import Said, lens_probabilities, said_probabilities
from probekit.interventions.edits import NoEdit
from probekit.interventions.study import NoInterventions
from probekit.models.output_head import NoAnswers
from probekit.models.token_grid import NoTokenGrid
from probekit.paths import Home
from probekit.probes.localisation import NOT_POOLED, POOLINGS, HeatMap, box_shares
from probekit.probes.results import ProbeKey, StateKey
from probekit.report import pictures
from probekit.report.example_search import (
    KNOWN_NOT_SAID,
    ORDERS,
    clear_example,
    find_counterpart,
    find_examples,
)
from probekit.report.explorer_keys import ExplorerKeys
from probekit.report.marked_words import Ends, common_ends, mark_words, shorten
from probekit.report.saved_run import SavedRun, list_runs
from probekit.report.style import PALETTE
from probekit.report.templates import render
from probekit.report.used import ERASURE_WORDS, SITE_WORDS
from probekit.tasks.base import TaskInfo

ANY_CATEGORY = "any"
HEAT_PROBE = "logreg"
LENSES = (LENS, TUNED_LENS)
# Who reads the image tokens for the heat.
PROBE_HEAT, LENS_HEAT = "this probe", "lens"
LONGEST_NEIGHBOUR_TEXT = 90  # characters
MOST_ANSWERS = 2  # of an image that are shown where the example itself has none
KEYS = (
    ("← →", "example"),
    ("↑ ↓", "layer"),
    ("h", "heat"),
    ("b", "boxes"),
    ("t", "borders of tokens"),
    ("Esc", "back to the notebook"),
)


class NoMatch(ValueError):
    """No example has the words and the category that were searched for."""


class ModelChoice(NamedTuple):
    """What the dropdown "model" chooses between.

    Attributes
    ----------
    model, control, pooling : str
        As in :class:`probekit.probes.results.StateKey`.
    """

    model: str
    control: str
    pooling: str


class _ProbedClass(NamedTuple):
    """A row of the table of what the probes of a layer say."""

    colour: str
    name: str
    is_yes: bool
    p: float

    @property
    def is_right(self) -> bool:
        return (self.p >= 0.5) == self.is_yes


class _Answer(NamedTuple):
    """What the model says, and what it was asked: empty where that is the prompt on the screen."""

    said: Said
    asked: str


class _Neighbour(NamedTuple):
    """A few words about a similar example."""

    url: str
    label: str
    words: str
    is_same_image: bool


class Explorer:
    """A widget to look at single examples: image, prompt, answers by layer, heat, neighbours.

    It opens on a clear example, not on a typical one: of the first model and its first local task
    with stored heat, at the last layer, the example that
    :func:`probekit.report.example_search.clear_example` chooses. There the last layer's probes are
    right, an object that is truly there lies in a box, and the product of two numbers is largest:
    how far the probability of this object rises from the first layer to the last, and how much of
    its heat is in its boxes. Where no example is like that, it opens on the first one.

    While it has the focus, keys work as its last line says.

    Parameters
    ----------
    run : str
        Name of a run; the others of the home can be chosen.
    home : str, Path or Home, optional
        See :meth:`probekit.paths.Home.find`.

    Attributes
    ----------
    view : VBox
        The widget to display.
    saved : SavedRun
        The run that is shown.
    """

    def __init__(self, run: str, *, home: str | Path | Home | None = None) -> None:
        self.saved = SavedRun.open(run, home)
        self.rows = pd.DataFrame()  # test examples of the task
        self.template = Ends("", "")  # what all their prompts begin and end with
        self.places = np.zeros(0, int)  # row numbers of the examples that match
        self.heat_map: HeatMap | None = None  # of the example that is shown
        self.no_heat_reason = ""  # as HTML
        # What the model says to the example that is shown, or on its image; None: not looked up.
        self.answers: list[_Answer] | None = None
        self._asked_elsewhere: dict[str, tuple[pd.DataFrame, Ends]] = {}  # by task
        self._known_boxes: dict[tuple[int, str], np.ndarray] = {}
        self._is_updating = False
        self._make_widgets()
        self._connect_widgets()
        self._offer_choices()

    # -------------------------------------------------------------------------------- widgets

    def _make_widgets(self) -> None:
        runs = dict.fromkeys([self.saved.name, *list_runs(self.saved.home)])

        def dropdown(name: str, options: Sequence[str] = ()) -> widgets.Dropdown:
            return widgets.Dropdown(description=name, options=list(options))

        def checkbox(name: str, value: bool) -> widgets.Checkbox:
            return widgets.Checkbox(description=name, value=value, indent=False)

        self.run_dropdown = dropdown("run", list(runs))
        self.model_dropdown = dropdown("model")
        self.task_dropdown = dropdown("task")
        self.probe_dropdown = dropdown("probe")
        self.order_dropdown = dropdown("order", ORDERS)
        self.image_category_dropdown = dropdown("shows", [ANY_CATEGORY])
        self.search_box = widgets.Text(
            description="search", placeholder="words in the prompt", continuous_update=False
        )
        self.match_count = widgets.Label()
        self.example_slider = widgets.IntSlider(description="example", min=0, max=0)
        self.layer_slider = widgets.IntSlider(description="layer", min=0, max=0)
        self.photo = widgets.Image(format="jpeg")
        self.heat_category_dropdown = dropdown("of")
        self.heat_checkbox = checkbox("heat", True)
        self.heat_reader_dropdown = dropdown("by", [PROBE_HEAT, LENS_HEAT])
        self.boxes_checkbox = checkbox("boxes", True)
        self.borders_checkbox = checkbox("tokens", False)
        self.run_model_checkbox = checkbox("run the model where none is stored", False)
        self.heat_legend = widgets.HTML()
        self.heat_share = widgets.HTML()
        self.erase_dropdown = dropdown("erase here")
        self.erase_dropdown.options = [("nothing", "")]
        self.erased_answer = widgets.HTML()
        self.curve = widgets.HTML()
        self.details = widgets.HTML()
        self.message = widgets.HTML()
        self.neighbours = widgets.HTML()
        self.keys = ExplorerKeys()
        key_line = widgets.HTML(render("explorer_keys.html.jinja", keys=KEYS))

        filters = _box(
            widgets.HBox,
            "filters",
            self.run_dropdown,
            self.model_dropdown,
            self.task_dropdown,
            self.probe_dropdown,
            self.order_dropdown,
            self.image_category_dropdown,
            self.search_box,
        )
        sliders = _box(
            widgets.HBox, "sliders", self.example_slider, self.match_count, self.layer_slider
        )
        self.heat_controls = [
            self.heat_checkbox,
            self.heat_category_dropdown,
            self.heat_reader_dropdown,
            self.borders_checkbox,
        ]
        drawing = _box(
            widgets.HBox,
            "drawing",
            self.heat_checkbox,
            self.heat_category_dropdown,
            self.heat_reader_dropdown,
            self.boxes_checkbox,
            self.borders_checkbox,
        )
        self.photo.add_class("probekit-photo")
        left = _box(
            widgets.VBox,
            "left",
            self.photo,
            drawing,
            self.heat_legend,
            self.heat_share,
            self.run_model_checkbox,
        )
        self.erase_controls = _box(widgets.HBox, "erase", self.erase_dropdown, self.erased_answer)
        self.details.add_class("probekit-details")
        right = _box(widgets.VBox, "right", self.curve, self.details, self.erase_controls)
        self.view = _box(
            widgets.VBox,
            "explorer",
            filters,
            sliders,
            self.message,
            _box(widgets.HBox, "main", left, right),
            self.neighbours,
            key_line,
            self.keys,
        )

    def _connect_widgets(self) -> None:
        self._react(self._open_run, [self.run_dropdown])
        self._react(
            self._choose_probe, [self.model_dropdown, self.task_dropdown, self.probe_dropdown]
        )
        self._react(
            self._find_examples,
            [self.order_dropdown, self.image_category_dropdown, self.search_box],
        )
        self._react(
            self._show_example,
            [self.example_slider, self.heat_reader_dropdown, self.run_model_checkbox],
        )
        self._react(
            self._show_layer,
            [
                self.layer_slider,
                self.heat_category_dropdown,
                self.heat_checkbox,
                self.boxes_checkbox,
                self.borders_checkbox,
            ],
        )
        self._react(self._show_erased_answer, [self.erase_dropdown])
        self.keys.observe(self._press_keys, "presses")

    def _press_keys(self, change: dict[str, dict[str, int]]) -> None:
        """Do what keys stand for that were pressed since the last time, some of them repeatedly."""
        before = change["old"]
        counts = {key: count - before.get(key, 0) for key, count in change["new"].items()}

        def move(slider: widgets.IntSlider, forward: str, backward: str) -> None:
            steps = counts.get(forward, 0) - counts.get(backward, 0)
            slider.value = min(max(slider.value + steps, slider.min), slider.max)

        move(self.example_slider, "ArrowRight", "ArrowLeft")
        move(self.layer_slider, "ArrowUp", "ArrowDown")
        toggles = {"h": self.heat_checkbox, "b": self.boxes_checkbox, "t": self.borders_checkbox}
        for key, checkbox in toggles.items():
            if counts.get(key, 0) % 2:
                checkbox.value = not checkbox.value

    def _react(
        self, reaction: Callable[[], None], changed_widgets: Sequence[widgets.Widget]
    ) -> None:
        """Call `reaction` when a user changes one of the widgets, not when a reaction changes it.

        An exception is shown above the photo: it would vanish in the browser's log.
        """

        def callback(change: object) -> None:
            if self._is_updating:
                return
            self._is_updating = True
            try:
                reaction()
                self.message.value = ""
            except NoMatch as error:
                self.message.value = _fill("<i>{}</i>", str(error))
            except Exception:
                self.message.value = _fill(
                    "<pre class='probekit-error'>{}</pre>", traceback.format_exc()
                )
            finally:
                _show(self.message, bool(self.message.value))
                self._is_updating = False

        for widget in changed_widgets:
            widget.observe(callback, "value")

    # ------------------------------------------------------------------------- what is chosen

    @property
    def state(self) -> StateKey:
        """The states that the chosen probes read."""
        choice: ModelChoice = self.model_dropdown.value
        return StateKey(*choice, self.task_dropdown.value)

    @property
    def task(self) -> TaskInfo:
        """Kind, classes and question of the chosen task."""
        return self.saved.results.tasks[self.task_dropdown.value]

    @property
    def p_lnc(self) -> np.ndarray:
        """(l, n, c) probabilities of the chosen probes for the task's test examples."""
        key = ProbeKey(*self.state, self.probe_dropdown.value)
        if key not in self.saved.results.predictions:
            name = _model_words(self.model_dropdown.value, with_pooling=True)
            raise KeyError(f"no {key.probe} probe of {name}, {key.task}")
        return self.saved.results.predictions[key]

    @property
    def _probe_keys(self) -> list[ProbeKey]:
        return [key for key in self.saved.results.predictions if key.probe not in LENSES]

    @property
    def _erasures(self) -> dict[str, list[str]]:
        """What 04_intervene erased, and where, for the chosen model and task."""
        if self.state.control != "none":  # those with random weights are left alone
            return {}
        return self.saved.erasures(self.state.model, self.state.task)

    @property
    def heat_key(self) -> ProbeKey:
        """Who reads the image tokens for the heat: the chosen probes, or the lens."""
        state = self.state
        if self.heat_reader_dropdown.value == LENS_HEAT:
            return ProbeKey(state.model, state.control, NOT_POOLED, state.task, LENS)
        return ProbeKey(*state, self.probe_dropdown.value)

    @property
    def _can_have_heat(self) -> bool:
        key = self.heat_key
        return key.probe == LENS or (key.probe == HEAT_PROBE and key.pooling in POOLINGS)

    @property
    def said_nc(self) -> np.ndarray | None:
        """(n, c) probabilities of what the model says; None without answers."""
        return said_probabilities(self.saved.results, self.state)

    @property
    def place(self) -> int:
        """Row number of the chosen example among the test examples of its task."""
        if len(self.places) == 0:
            raise NoMatch("no example matches: search for other words, or another category")
        return int(self.places[self.example_slider.value])

    def _open_run(self) -> None:
        try:
            self.saved = SavedRun.open(self.run_dropdown.value, self.saved.home)
        finally:  # a run that cannot be opened leaves the one that is shown
            self.run_dropdown.value = self.saved.name
        self._offer_choices()

    def _offer_choices(self) -> None:
        """Offer what a run has to choose from, and show its first example."""
        keys = self._probe_keys
        if not keys:
            raise ValueError(
                f"{self.saved.name} has no predictions of decoder layers: extract with the stage lm"
            )
        models = dict.fromkeys(ModelChoice(key.model, key.control, key.pooling) for key in keys)
        with_pooling = len({choice.pooling for choice in models}) > 1
        model_options = [(_model_words(choice, with_pooling), choice) for choice in models]
        categories = sorted(self.saved.instances.category.unique())
        self._known_boxes = {}
        self._asked_elsewhere = {}
        self._is_updating = True
        _set_options(self.model_dropdown, model_options)
        _set_options(self.image_category_dropdown, [ANY_CATEGORY, *categories])
        tasks = [key.task for key in keys if ModelChoice(*key[:3]) == model_options[0][1]]
        _set_options(self.task_dropdown, [self._first_task(tasks)])
        self._choose_probe()
        self.layer_slider.value = self.layer_slider.max
        self._choose_clear_example()
        self._show_example()
        self._is_updating = False

    def _first_task(self, tasks: Sequence[str]) -> str:
        """Return the first local task whose heat is stored, else the first task."""
        model: ModelChoice = self.model_dropdown.value
        with_heat = [
            task
            for task in tasks
            if ProbeKey(*StateKey(*model, task), HEAT_PROBE) in self.saved.stored_heat.files
        ]
        return [*with_heat, *tasks][0]

    def _choose_clear_example(self) -> None:
        """Choose the example to begin with, see the class; without one, the first stays chosen."""
        if self.task.kind != "multilabel":
            return
        in_boxes_nc = np.zeros(self.p_lnc.shape[1:])
        for place in range(len(self.rows)):
            row = self.rows.iloc[place]
            heat_map = self.saved.stored_heat.get(self.heat_key, row.image_id)
            if heat_map is None:
                continue
            for c in np.flatnonzero(np.array(row.labels) * row["mask"]):
                boxes_b4 = self.saved.boxes(row.image_id, self.task.classes[c])
                shares = box_shares(heat_map, boxes_b4)
                if shares is not None:
                    in_boxes_nc[place, c] = shares.heat_lc[-1, c]
        y_nc = np.array(self.rows.labels.tolist())
        mask_nc = np.array(self.rows["mask"].tolist())
        clear = clear_example(self.p_lnc, in_boxes_nc, y_nc=y_nc, mask_nc=mask_nc)
        if clear is not None:
            place, category_number = clear
            self.example_slider.value = place
            self.heat_category_dropdown.value = self.task.classes[category_number]

    def _choose_probe(self) -> None:
        chosen = self.model_dropdown.value
        of_model = [
            key for key in self._probe_keys if (key.model, key.control, key.pooling) == chosen
        ]
        _keep_option(self.task_dropdown, list(dict.fromkeys(key.task for key in of_model)))
        probes = {key.probe for key in of_model if key.task == self.task_dropdown.value}
        heat_probe_first = sorted(probes, key=lambda probe: (probe != HEAT_PROBE, probe))
        _keep_option(self.probe_dropdown, heat_probe_first)
        orders = [*ORDERS] if self.said_nc is None else [*ORDERS, KNOWN_NOT_SAID]
        _keep_option(self.order_dropdown, orders)
        erasures = self._erasures
        _show(self.erase_controls, bool(erasures))
        sites = next(iter(erasures.values()), [])
        _keep_option(
            self.erase_dropdown,
            [("nothing", ""), *((f"from {SITE_WORDS[site]}", site) for site in sites)],
        )
        is_local = self.task.kind == "multilabel"
        for control in self.heat_controls:
            _show(control, is_local)
        if is_local and self.heat_category_dropdown.options != tuple(self.task.classes):
            _set_options(self.heat_category_dropdown, list(self.task.classes))
        self.rows = self.saved.test_examples(self.task_dropdown.value)
        self.template = common_ends(self.rows.prompt.tolist())
        self.layer_slider.max = len(self.p_lnc) - 1
        self._find_examples()

    def _find_examples(self) -> None:
        image_ids = None
        category = self.image_category_dropdown.value
        if category != ANY_CATEGORY:
            instances = self.saved.instances
            image_ids = set(instances.image_id[instances.category == category])
        self.places = find_examples(
            self.rows,
            self.p_lnc,
            said_nc=self.said_nc,
            order=self.order_dropdown.value,
            text=self.search_box.value,
            image_ids=image_ids,
        )
        self.match_count.value = f"{len(self.places):,} of {len(self.rows):,} examples"
        self.example_slider.value = 0
        self.example_slider.max = max(0, len(self.places) - 1)
        self._show_example()

    # -------------------------------------------------------------------------- what is shown

    def _show_example(self) -> None:
        row = self.rows.iloc[self.place]
        if self.task.kind == "multilabel":
            self._choose_heat_category(row)
        self._find_heat(row)
        self.answers = None
        self._show_layer()

    def _choose_heat_category(self, row: pd.Series) -> None:
        """Keep the chosen category where the image shows it, else take one that it shows."""
        shown = self.saved.categories_of(row.image_id)
        if self.heat_category_dropdown.value in shown:
            return
        classes = self.task.classes
        truly_yes = [classes[c] for c in np.flatnonzero(row["mask"]) if row.labels[c]]
        shown_classes = [name for name in shown if name in classes]
        candidates = [*truly_yes, *shown_classes, classes[0]]
        self.heat_category_dropdown.value = candidates[0]

    def _find_heat(self, row: pd.Series) -> None:
        """Set the heat map of an example, or the reason why there is none."""
        self.heat_map = None
        is_stored = True
        if self.task.kind != "multilabel":
            self.no_heat_reason = (
                "Image tokens stand before the text: only category tasks have heat."
            )
        elif not self._can_have_heat:
            poolings = " or ".join(POOLINGS)
            self.no_heat_reason = (
                f"Heat is read by the lens, and by {HEAT_PROBE} probes on states pooled as "
                f"{poolings}."
            )
        else:
            self.no_heat_reason = (
                "No heat is stored for this example: tick “run the model where none is stored”."
            )
            is_stored = self.saved.stored_heat.get(self.heat_key, row.image_id) is not None
            try:
                self.heat_map = self.saved.heat_map(
                    self.heat_key, row, run_model=self.run_model_checkbox.value
                )
            except (NoTokenGrid, NoAnswers) as error:
                self.no_heat_reason = _fill("{}", str(error))
        _show(self.run_model_checkbox, not is_stored)

    def _find_answers(self, row: pd.Series) -> list[_Answer]:
        """Look up what the model says to an example, else what it says of its image elsewhere."""
        said_nc = self.said_nc
        if said_nc is not None:
            return [_Answer(Said.of(said_nc[self.place], row, self.task), "")]
        for task, info in self.saved.results.tasks.items():
            said_nc = said_probabilities(self.saved.results, self.state._replace(task=task))
            if said_nc is None or info.kind != "binary":
                continue
            if task not in self._asked_elsewhere:
                rows = self.saved.test_examples(task)
                self._asked_elsewhere[task] = rows, common_ends(rows.prompt.tolist())
            rows, template = self._asked_elsewhere[task]
            answers = []
            for place in np.flatnonzero(rows.image_id == row.image_id)[:MOST_ANSWERS]:
                example = rows.iloc[place]
                asked = template.strip_from(example.prompt)
                answers.append(_Answer(Said.of(said_nc[place], example, info), asked))
            return answers
        return []

    def _show_layer(self) -> None:
        place = self.place
        row = self.rows.iloc[place]
        layer = self.layer_slider.value
        self._show_photo(row, layer)  # first what takes the browser longest
        self._show_answers(row, place, layer)
        self._explain_heat(row, layer)
        self._show_erased_answer()
        self._show_neighbours(row, place, layer)

    def _show_photo(self, row: pd.Series, layer: int) -> None:
        photo = pictures.load_photo(self.saved.home.resolve(row.file), enlarge=True)
        if self.heat_map is not None and self.heat_checkbox.value:
            c = self.task.classes.index(self.heat_category_dropdown.value)
            heat_t = self.heat_map.heat_ltc[layer, :, c]
            heat_t = heat_t / max(heat_t.max(), 1e-9)
            photo = pictures.draw_heat(photo, heat_t, self.heat_map.cells_t4)
        if self.heat_map is not None and self.borders_checkbox.value:
            photo = pictures.draw_borders(photo, self.heat_map.cells_t4)
        if self.boxes_checkbox.value:
            for category in self._boxed_categories(row):
                boxes_b4 = self._boxes(row, category)
                photo = pictures.draw_boxes(photo, boxes_b4, name=category)
        self.photo.value = pictures.encode_jpeg(photo)

    def _boxes(self, row: pd.Series, category: str) -> np.ndarray:
        """Return the boxes (b, 4) of a category in an example's image; they are looked up once."""
        key = (row.image_id, category)
        if key not in self._known_boxes:
            self._known_boxes[key] = self.saved.boxes(*key)
        return self._known_boxes[key]

    def _boxed_categories(self, row: pd.Series) -> list[str]:
        """Return whose boxes are drawn: the chosen category, or what the prompt names."""
        if self.task.kind == "multilabel":
            return [self.heat_category_dropdown.value]
        prompt = row.prompt.lower()
        shown = self.saved.categories_of(row.image_id)
        return [name for name in shown if name in row.asked or name.lower() in prompt]

    def _explain_heat(self, row: pd.Series, layer: int) -> None:
        """Say what the colours of the heat mean, and how much of it is in boxes."""
        self.heat_legend.value = ""
        if self.heat_map is None:
            self.heat_share.value = self.no_heat_reason
            return
        category = self.heat_category_dropdown.value
        c = self.task.classes.index(category)
        boxes_b4 = self._boxes(row, category)
        self.heat_share.value = _share_words(
            self.heat_map, boxes_b4, category=category, c=c, layer=layer
        )
        if self.heat_checkbox.value:
            self.heat_legend.value = render(
                "explorer_legend.html.jinja",
                colours=pictures.css_heat_scale(),
                largest=self.heat_map.heat_ltc[layer, :, c].max(),
                unit="log-probability" if self.heat_key.probe == LENS else "log-odds",
            )

    def _show_answers(self, row: pd.Series, place: int, layer: int) -> None:
        counted = np.flatnonzero(row["mask"])
        names = [self.task.classes[c] for c in counted]
        labels = np.array(row.labels)[counted]
        p_lc = self.p_lnc[:, place, counted].astype(float)
        lens_lnc = lens_probabilities(self.saved.results, self.state)
        lens_lc = None if lens_lnc is None else lens_lnc[:, place, counted].astype(float)
        self.curve.value = pictures.curve_svg(
            p_lc, names, labels=labels, layer=layer, lens_lc=lens_lc
        )
        if self.answers is None:
            self.answers = self._find_answers(row)
        probed = []
        for number, (name, label) in enumerate(zip(names, labels, strict=True)):
            colour = PALETTE[number % len(PALETTE)]
            probed.append(_ProbedClass(colour, name, bool(label), p_lc[layer, number]))
        counterpart = find_counterpart(self.rows, place)
        other_prompt = row.prompt if counterpart is None else counterpart.prompt
        self.details.value = render(
            "explorer_details.html.jinja",
            prompt=mark_words(row.prompt, other_prompt),
            other=None if counterpart is None else shorten(mark_words(other_prompt, row.prompt)),
            is_right=bool(row.labels[0]),
            categories=self.saved.categories_of(row.image_id),
            layer_name=f"lm.{layer:02d}",
            probed=probed,
            answers=self.answers,
            has_lens=lens_lc is not None,
        )

    def _show_erased_answer(self) -> None:
        """Say what the model says once the concept is erased at this layer."""
        site = self.erase_dropdown.value
        self.erased_answer.value = ""
        if not site or not self._erasures:
            return
        layer = self.layer_slider.value
        erasure = next(iter(self._erasures))
        where = f"{ERASURE_WORDS[erasure]}, lm.{layer:02d}"
        self.erased_answer.value = "<i>asking the model …</i>"
        try:
            said = self.saved.answer_without(
                self.rows.iloc[self.place],
                model=self.state.model,
                layer=layer,
                erasure=erasure,
                site=site,
            )
        except (NoEdit, NoInterventions) as error:
            self.erased_answer.value = _fill("{}: {}", where, str(error))
            return
        except Exception:
            self.erased_answer.value = ""
            raise
        self.erased_answer.value = _fill(
            "then it says <b>{}</b> ({:.2f}), {} <small>({})</small>",
            said.words,
            said.p,
            "right" if said.is_right else "wrong",
            where,
        )

    def _show_neighbours(self, row: pd.Series, place: int, layer: int) -> None:
        neighbours_lnk = self.saved.results.neighbours.get(self.state)
        if neighbours_lnk is None:
            neighbours = self.rows.iloc[:0]
        else:
            neighbours = self.rows.iloc[neighbours_lnk[layer, place]]
        self.neighbours.value = render(
            "explorer_neighbours.html.jinja",
            layer_name=f"lm.{layer:02d}",
            neighbours=[
                self._describe_neighbour(
                    neighbour, is_same_image=neighbour.image_id == row.image_id
                )
                for _, neighbour in neighbours.iterrows()
            ],
        )

    def _describe_neighbour(self, row: pd.Series, *, is_same_image: bool) -> _Neighbour:
        """Take a binary task's label and what its prompt asks, or the classes that are there."""
        url = pictures.thumbnail_url(self.saved.home.resolve(row.file))
        if self.task.kind == "binary":
            label = "yes" if row.labels[0] else "no"
            prompt = self.template.strip_from(row.prompt)
            return _Neighbour(url, label, prompt[:LONGEST_NEIGHBOUR_TEXT], is_same_image)
        names = [name for name, label in zip(self.task.classes, row.labels, strict=True) if label]
        return _Neighbour(url, "", ", ".join(names), is_same_image)


def _show(widget: widgets.Widget, is_shown: bool) -> None:
    """Show a widget, or take it out of the explorer with the space that it needs."""
    widget.layout.display = None if is_shown else "none"


def _box(kind: type[widgets.Box], name: str, *children: widgets.Widget) -> widgets.Box:
    """Return a box whose look `explorer.css` describes under ``.probekit-<name>``."""
    box = kind(list(children))
    box.add_class(f"probekit-{name}")
    return box


def _set_options(dropdown: widgets.Dropdown, options: list) -> None:
    """Offer other options, with the first of them chosen."""
    dropdown.options = options
    dropdown.index = 0


def _keep_option(dropdown: widgets.Dropdown, options: list) -> None:
    """Offer other options; the chosen one stays where it is among them, else it is the first."""
    if dropdown.options == tuple(options):
        return
    chosen = dropdown.value
    dropdown.options = options
    values = [option[1] if isinstance(option, tuple) else option for option in options]
    dropdown.value = chosen if chosen in values else values[0]


def _model_words(choice: ModelChoice, with_pooling: bool) -> str:
    words = choice.model
    if choice.control != "none":
        words += f" ({choice.control})"
    if with_pooling:
        words += f", {choice.pooling}"
    return words


def _share_words(
    heat_map: HeatMap, boxes_b4: np.ndarray, *, category: str, c: int, layer: int
) -> str:
    """Say as HTML how much of the heat of class `c` lies in its boxes."""
    if not heat_map.heat_ltc[..., c].any():
        return _fill("Nothing reads {} off single tokens here.", category)
    shares = box_shares(heat_map, boxes_b4)
    if shares is None:
        return _fill("No box here separates {} from the rest of the image.", category)
    return _fill(
        "<b>{share:.0%}</b> of the heat of {category} at lm.{layer:02d} is in its boxes, which "
        "hold {area:.0%} of the tokens.",
        share=shares.heat_lc[layer, c],
        category=category,
        layer=layer,
        area=shares.area,
    )


def _fill(html: str, *values: object, **named_values: object) -> str:
    """Return HTML with values in its braces, text escaped."""
    return str(Markup(html).format(*values, **named_values))
