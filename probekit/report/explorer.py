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
from probekit.report.example_search import KNOWN_NOT_SAID, ORDERS, find_examples
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
LONGEST_NEIGHBOUR_PROMPT = 90  # characters


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


class _AnswerRow(NamedTuple):
    """A row of the table of answers."""

    colour: str
    name: str
    is_yes: bool
    p: float

    @property
    def is_right(self) -> bool:
        return (self.p >= 0.5) == self.is_yes


class _Neighbour(NamedTuple):
    """A few words about a similar example."""

    label: str
    words: str
    is_same_image: bool


class Explorer:
    """A widget to look at single examples: image, prompt, answers by layer, heat, neighbours.

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
        self.places = np.zeros(0, int)  # row numbers of the examples that match
        self.heat_map: HeatMap | None = None  # of the example that is shown
        self.no_heat_reason = ""  # as HTML
        self._is_updating = False
        self._make_widgets()
        self._connect_widgets()
        self._offer_choices()
        self.layer_slider.value = self.layer_slider.max
        self._show_layer()

    # -------------------------------------------------------------------------------- widgets

    def _make_widgets(self) -> None:
        full_width = widgets.Layout(width="98%")
        column_width = widgets.Layout(width="250px")
        content_width = widgets.Layout(width="auto")
        runs = dict.fromkeys([self.saved.name, *list_runs(self.saved.home)])

        def dropdown(name: str, options: list[str] | None = None) -> widgets.Dropdown:
            return widgets.Dropdown(description=name, options=options or [], layout=column_width)

        def checkbox(name: str, value: bool) -> widgets.Checkbox:
            return widgets.Checkbox(
                description=name, value=value, indent=False, layout=content_width
            )

        self.run_dropdown = dropdown("run", list(runs))
        self.model_dropdown = dropdown("model")
        self.task_dropdown = dropdown("task")
        self.probe_dropdown = dropdown("probe")
        self.order_dropdown = dropdown("order", list(ORDERS))
        self.image_category_dropdown = dropdown("shows", [ANY_CATEGORY])
        self.search_box = widgets.Text(
            description="search",
            placeholder="words in the prompt",
            continuous_update=False,
            layout=column_width,
        )
        self.match_count = widgets.Label()
        self.example_slider = widgets.IntSlider(
            description="example", min=0, max=0, layout=full_width
        )
        self.layer_slider = widgets.IntSlider(description="layer", min=0, max=0, layout=full_width)
        self.photo = widgets.Image(format="jpeg", layout=widgets.Layout(width="100%"))
        self.heat_category_dropdown = widgets.Dropdown(
            description="category", options=[], layout=widgets.Layout(width="210px")
        )
        self.heat_checkbox = checkbox("heat", True)
        self.heat_reader_dropdown = widgets.Dropdown(
            description="heat of",
            options=[PROBE_HEAT, LENS_HEAT],
            layout=widgets.Layout(width="210px"),
        )
        self.boxes_checkbox = checkbox("boxes", True)
        self.run_model_checkbox = checkbox("run the model where none is stored", False)
        self.heat_share = widgets.HTML()
        self.erase_dropdown = widgets.Dropdown(
            description="erase here",
            options=[("nothing", "")],
            layout=widgets.Layout(width="250px"),
        )
        self.erased_answer = widgets.HTML()
        self.erase_controls = widgets.HBox([self.erase_dropdown, self.erased_answer])
        self.curve = widgets.HTML()
        self.details = widgets.HTML()
        self.message = widgets.HTML()
        self.neighbour_photos = widgets.Image(format="jpeg")
        self.neighbour_words = widgets.HTML()

        wrapping = widgets.Layout(flex_flow="row wrap")
        first_row = widgets.HBox(
            [self.run_dropdown, self.model_dropdown, self.task_dropdown, self.probe_dropdown],
            layout=wrapping,
        )
        second_row = widgets.HBox(
            [self.order_dropdown, self.image_category_dropdown, self.search_box, self.match_count],
            layout=wrapping,
        )
        drawing_choices = widgets.HBox(
            [self.heat_category_dropdown, self.heat_checkbox, self.boxes_checkbox]
        )
        self.heat_controls = widgets.VBox(
            [drawing_choices, self.heat_reader_dropdown, self.run_model_checkbox]
        )
        left = widgets.VBox(
            [self.photo, self.heat_controls, self.heat_share],
            layout=widgets.Layout(flex="0 0 400px"),
        )
        right = widgets.VBox(
            [
                self.example_slider,
                self.layer_slider,
                self.curve,
                self.erase_controls,
                self.details,
            ],
            layout=widgets.Layout(flex="1 1 380px"),
        )
        self.view = widgets.VBox(
            [
                first_row,
                second_row,
                self.message,
                widgets.HBox([left, right]),
                widgets.HTML("<b>Nearest in this layer</b>"),
                self.neighbour_photos,
                self.neighbour_words,
            ]
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
            ],
        )

        self._react(self._show_erased_answer, [self.erase_dropdown])

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
                    "<pre style='color:#b00020'>{}</pre>", traceback.format_exc()
                )
            finally:
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
        self._is_updating = True
        _set_options(self.model_dropdown, model_options)
        _set_options(self.image_category_dropdown, [ANY_CATEGORY, *categories])
        self._choose_probe()
        self._is_updating = False

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
        self.erase_controls.layout.display = None if erasures else "none"
        sites = next(iter(erasures.values()), [])
        _keep_option(
            self.erase_dropdown,
            [("nothing", ""), *((f"from {SITE_WORDS[site]}", site) for site in sites)],
        )
        is_local = self.task.kind == "multilabel"
        self.heat_controls.layout.display = None if is_local else "none"
        if is_local and self.heat_category_dropdown.options != tuple(self.task.classes):
            _set_options(self.heat_category_dropdown, list(self.task.classes))
        self.rows = self.saved.test_examples(self.task_dropdown.value)
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
            try:
                self.heat_map = self.saved.heat_map(
                    self.heat_key, row, run_model=self.run_model_checkbox.value
                )
            except (NoTokenGrid, NoAnswers) as error:
                self.no_heat_reason = _fill("{}", str(error))

    def _show_layer(self) -> None:
        place = self.place
        row = self.rows.iloc[place]
        layer = self.layer_slider.value
        self._show_photo(row, layer)  # first what takes the browser longest
        self._show_answers(row, place, layer)
        self._show_erased_answer()
        self._show_neighbours(row, place, layer)

    def _show_photo(self, row: pd.Series, layer: int) -> None:
        photo = pictures.load_photo(self.saved.home.resolve(row.file))
        category = self.heat_category_dropdown.value
        boxes_b4 = np.zeros((0, 4))
        if self.task.kind == "multilabel":
            boxes_b4 = self.saved.boxes(row.image_id, category)
        if self.heat_map is None:
            self.heat_share.value = self.no_heat_reason
        else:
            c = self.task.classes.index(category)
            self.heat_share.value = _share_words(
                self.heat_map, boxes_b4, category=category, c=c, layer=layer
            )
            if self.heat_checkbox.value:
                heat_t = self.heat_map.heat_ltc[layer, :, c]
                heat_t = heat_t / max(heat_t.max(), 1e-9)
                photo = pictures.draw_heat(photo, heat_t, self.heat_map.cells_t4)
        if self.boxes_checkbox.value:
            photo = pictures.draw_boxes(photo, boxes_b4)
        self.photo.value = pictures.encode_jpeg(photo)

    def _show_answers(self, row: pd.Series, place: int, layer: int) -> None:
        counted = np.flatnonzero(row["mask"])
        names = [self.task.classes[c] for c in counted]
        labels = np.array(row.labels)[counted]
        p_lc = self.p_lnc[:, place, counted].astype(float)
        lens_lnc = lens_probabilities(self.saved.results, self.state)
        lens_lc = None if lens_lnc is None else lens_lnc[:, place, counted].astype(float)
        said_nc = self.said_nc
        said = None if said_nc is None else Said.of(said_nc[place], row, self.task)
        self.curve.value = pictures.curve_svg(
            p_lc, names, labels=labels, layer=layer, lens_lc=lens_lc
        )
        answers = []
        for number, (name, label) in enumerate(zip(names, labels, strict=True)):
            colour = PALETTE[number % len(PALETTE)]
            answers.append(_AnswerRow(colour, name, bool(label), p_lc[layer, number]))
        self.details.value = render(
            "explorer_details.html.jinja",
            prompt=row.prompt,
            categories=self.saved.categories_of(row.image_id),
            layer_name=f"lm.{layer:02d}",
            answers=answers,
            said=said,
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
        strip = pictures.thumbnail_strip(
            [self.saved.home.resolve(file) for file in neighbours.file]
        )
        self.neighbour_photos.value = pictures.encode_jpeg(strip)
        self.neighbour_photos.layout.width = f"{strip.width}px" if len(neighbours) else "0"
        self.neighbour_words.value = render(
            "explorer_neighbours.html.jinja",
            neighbours=[
                self._describe_neighbour(
                    neighbour, is_same_image=neighbour.image_id == row.image_id
                )
                for _, neighbour in neighbours.iterrows()
            ],
        )

    def _describe_neighbour(self, row: pd.Series, *, is_same_image: bool) -> _Neighbour:
        """Take a binary task's label and prompt, or the classes that are truly there."""
        if self.task.kind == "binary":
            label = "yes" if row.labels[0] else "no"
            return _Neighbour(label, row.prompt[:LONGEST_NEIGHBOUR_PROMPT], is_same_image)
        names = [name for name, label in zip(self.task.classes, row.labels, strict=True) if label]
        return _Neighbour("", ", ".join(names), is_same_image)


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
