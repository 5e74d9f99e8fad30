import re
import shutil
import time
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import probekit as pk
from probekit.models.token_grid import NoTokenGrid
from probekit.probes.results import ProbeKey, StateKey
from probekit.report import saved_run as saved_run_module
from probekit.report.explorer import Explorer, ModelChoice
from probekit.workflow import interventions_folder, open_activations

UNTRAINED = ModelChoice("tiny-qwen2-vl", "untrained", "mean")


@pytest.fixture
def explorer(small_home):
    """On the first caption, at the last layer."""
    explorer = Explorer("small", home=small_home)
    explorer.task_dropdown.value = "caption"
    return explorer


def press(explorer, *keys):
    """Press keys as the browser reports them: all of them at once, by how often."""
    presses = dict(explorer.keys.presses)
    for key in keys:
        presses[key] = presses.get(key, 0) + 1
    explorer.keys.presses = presses


def pixels(jpeg):
    return np.asarray(Image.open(BytesIO(jpeg)).convert("RGB")).astype(int)


def test_sliders_change_picture_curve_and_neighbours(explorer):
    photo = explorer.photo.value
    curve = explorer.curve.value
    neighbours = explorer.neighbours.value
    assert Image.open(BytesIO(photo)).size == (640, 480)
    explorer.layer_slider.value = 3
    assert explorer.curve.value != curve
    assert explorer.neighbours.value != neighbours
    assert explorer.photo.value == photo  # a caption's heat has no place
    explorer.example_slider.value = 5
    assert explorer.photo.value != photo
    assert f"{float(explorer.p_lnc[3, 5, 0]):.2f}" in explorer.details.value
    assert explorer.message.value == ""


def test_another_model_pooling_and_probe(explorer):
    assert explorer.layer_slider.max == 8
    assert len(explorer.model_dropdown.options) == 4
    explorer.probe_dropdown.value = "linear"
    explorer.model_dropdown.value = ModelChoice("tiny-qwen2-vl", "untrained", "last")
    assert explorer.message.value == ""
    assert explorer.state == StateKey("tiny-qwen2-vl", "untrained", "last", "caption")
    labels = [label for label, _ in explorer.model_dropdown.options]
    assert "tiny-qwen2-vl (untrained), last" in labels


def test_a_category_example_shows_what_is_asked_about_it_and_where(explorer):
    explorer.task_dropdown.value = "category"
    row = explorer.rows.iloc[0]
    classes = explorer.saved.results.tasks["category"].classes
    counted = [name for name, mask in zip(classes, row["mask"], strict=True) if mask]
    assert all(name in explorer.details.value for name in counted)
    assert explorer.curve.value.count("<polyline") == len(counted) == 3
    shown = explorer.saved.categories_of(row.image_id)
    assert explorer.heat_category_dropdown.value in shown
    assert all(name in explorer.details.value for name in shown)
    assert "of the tokens" in explorer.heat_share.value
    assert explorer.heat_category_dropdown.value in explorer.heat_share.value


def test_heat_and_boxes_can_be_taken_off_the_photo(explorer):
    explorer.task_dropdown.value = "category"
    photo = explorer.photo.value
    share = explorer.heat_share.value
    explorer.layer_slider.value = 2
    assert explorer.photo.value != photo
    assert explorer.heat_share.value != share
    explorer.boxes_checkbox.value = False
    explorer.heat_checkbox.value = False
    file = explorer.saved.test_examples("category").file[0]
    original = Image.open(explorer.saved.home.resolve(file)).convert("RGB").resize((640, 480))
    assert np.abs(pixels(explorer.photo.value) - np.asarray(original).astype(int)).mean() < 3


@pytest.mark.slow
def test_heat_that_is_not_stored_is_made_when_it_is_wanted(explorer):
    explorer.task_dropdown.value = "category"
    stored = explorer.heat_map
    explorer.example_slider.value = len(explorer.rows) - 1
    assert explorer.heat_map is None
    assert "tick “run the model" in explorer.heat_share.value
    explorer.run_model_checkbox.value = True
    assert explorer.heat_map.logit_ltc.shape == stored.logit_ltc.shape
    assert "of the tokens" in explorer.heat_share.value
    assert explorer.message.value == ""


def test_the_lens_draws_its_heat_over_the_same_photo(explorer):
    explorer.task_dropdown.value = "category"
    probe = explorer.heat_map
    photo = explorer.photo.value
    explorer.heat_reader_dropdown.value = "lens"
    assert explorer.message.value == ""
    assert explorer.heat_map.logit_ltc.shape == probe.logit_ltc.shape
    assert not np.allclose(explorer.heat_map.logit_ltc, probe.logit_ltc, atol=0.1)
    np.testing.assert_array_equal(explorer.heat_map.cells_t4, probe.cells_t4)
    assert "of the tokens" in explorer.heat_share.value
    assert explorer.photo.value != photo
    explorer.probe_dropdown.value = "linear"  # the lens needs no probe
    assert explorer.heat_map is not None


def test_another_model_has_other_heat(explorer):
    explorer.task_dropdown.value = "category"
    trained = explorer.heat_map
    explorer.model_dropdown.value = UNTRAINED
    assert explorer.message.value == ""
    assert not np.allclose(explorer.heat_map.logit_ltc, trained.logit_ltc, atol=0.1)


def test_only_logreg_probes_of_some_poolings_have_heat(explorer):
    explorer.task_dropdown.value = "category"
    explorer.probe_dropdown.value = "linear"
    assert explorer.heat_map is None
    assert "by logreg probes on states pooled as mean" in explorer.heat_share.value


def test_examples_are_found_by_a_word(explorer):
    word = explorer.rows.prompt[4].split()[4].strip(".,")
    explorer.search_box.value = word
    count = f"{len(explorer.places)} of {len(explorer.rows)}"
    assert explorer.match_count.value.startswith(count)
    assert 4 in explorer.places
    assert all(word.lower() in explorer.rows.prompt[k].lower() for k in explorer.places)


def test_a_search_without_a_match_says_so(explorer):
    explorer.search_box.value = "no such words"
    assert "search for other words" in explorer.message.value
    explorer.search_box.value = ""
    assert explorer.message.value == ""


def test_the_most_surprising_example_comes_first(explorer):
    explorer.example_slider.value = 2
    explorer.order_dropdown.value = "most surprising"
    assert explorer.message.value == ""
    assert explorer.example_slider.value == 0
    p_n = explorer.p_lnc[-1, :, 0].astype(float)
    distance_n = np.abs(p_n - [labels[0] for labels in explorer.rows["labels"]])
    assert distance_n[explorer.place] == pytest.approx(distance_n.max())


def test_examples_are_found_by_what_their_image_shows(explorer):
    category = explorer.image_category_dropdown.options[1]
    explorer.image_category_dropdown.value = category
    instances = explorer.saved.instances
    images = set(instances.image_id[instances.category == category])
    assert len(explorer.places)
    assert set(explorer.rows.image_id[explorer.places]) <= images


def test_an_exception_is_shown_and_the_next_choice_works(explorer):
    predictions = explorer.saved.results.predictions
    copy = dict(predictions)
    predictions.clear()
    explorer.example_slider.value = 2
    assert "KeyError" in explorer.message.value
    assert "no logreg probe of tiny-qwen2-vl, mean, caption" in explorer.message.value
    predictions.update(copy)
    explorer.example_slider.value = 1
    assert explorer.message.value == ""


def test_one_change_draws_once(explorer, monkeypatch):
    drawn = []
    monkeypatch.setattr(explorer, "_show_neighbours", lambda *args: drawn.append(args))
    explorer.layer_slider.value = 1
    explorer.example_slider.value = 4
    explorer.task_dropdown.value = "category"  # sets the sliders, too
    explorer.search_box.value = "types"
    assert len(drawn) == 4


def test_a_run_that_cannot_be_opened_leaves_the_one_that_is_shown(explorer):
    explorer.run_dropdown.options = [*explorer.run_dropdown.options, "nowhere"]
    explorer.run_dropdown.value = "nowhere"
    assert "run 01_build_data" in explorer.message.value
    assert explorer.run_dropdown.value == "small"
    explorer.layer_slider.value = 2
    assert explorer.message.value == ""


def test_text_from_a_dataset_is_not_read_as_html(explorer):
    explorer.rows["prompt"] = "is <b>this</b> right?"
    explorer.layer_slider.value = 1
    assert "is &lt;b&gt;this&lt;/b&gt; right?" in explorer.details.value
    assert "<b>this</b>" not in explorer.neighbours.value


@pytest.mark.slow
def test_a_model_without_a_known_grid_says_so_and_shows_the_rest(explorer, monkeypatch):
    def refuse(*args, **options):
        raise NoTokenGrid("its tokens lie <nowhere>")

    monkeypatch.setattr(saved_run_module, "check_token_grid", refuse)
    explorer.task_dropdown.value = "category"
    explorer.example_slider.value = len(explorer.rows) - 1
    explorer.run_model_checkbox.value = True
    assert "lie &lt;nowhere&gt;" in explorer.heat_share.value
    assert explorer.message.value == ""
    assert explorer.rows.prompt.iloc[-1] in explorer.details.value


def test_what_the_model_says_stands_beside_the_probe(explorer):
    key = ProbeKey("tiny-qwen2-vl", "none", "last", "caption", "lens")
    said_nc = explorer.saved.results.predictions[key][-1]
    np.testing.assert_array_equal(explorer.said_nc, said_nc)
    p_yes = float(said_nc[explorer.place, 0])
    words = f"{'yes' if p_yes >= 0.5 else 'no'} ({max(p_yes, 1 - p_yes):.2f})"
    assert f"<b>{words.replace(' ', '</b> ')}" in explorer.details.value
    assert explorer.curve.value.count("<polyline") == 2  # the probe, and the lens
    explorer.order_dropdown.value = "known, but answered wrongly"
    labels = np.array(explorer.rows["labels"].tolist())[:, 0]
    known = np.where(labels, explorer.p_lnc[-1, :, 0], 1 - explorer.p_lnc[-1, :, 0])
    said = np.where(labels, said_nc[:, 0], 1 - said_nc[:, 0])
    assert explorer.place == np.argmax(known - said)
    explorer.task_dropdown.value = "category"
    assert explorer.said_nc is None
    assert explorer.order_dropdown.value == "as drawn"
    answers = re.findall(r"<b>(?:yes|no)</b> \(\d.\d\d\)", explorer.details.value)
    assert len(answers) == 2  # to what it was asked about this image elsewhere: both captions
    captions = explorer.saved.test_examples("caption")
    of_image = captions.image_id == explorer.rows.image_id[explorer.place]
    for said, asked in explorer.answers:
        (prompt,) = [one for one in captions.prompt[of_image] if asked in one]
        place = captions.index[captions.prompt == prompt][0]
        p_yes = float(said_nc[place, 0])
        assert said.p == pytest.approx(max(p_yes, 1 - p_yes))


def test_only_what_was_probed_can_be_chosen(explorer):
    """The pooling that answers are read from is probed for tasks with answers alone."""
    for _, choice in explorer.model_dropdown.options:
        explorer.model_dropdown.value = choice
        for task in explorer.task_dropdown.options:
            explorer.task_dropdown.value = task
            for probe in explorer.probe_dropdown.options:
                explorer.probe_dropdown.value = probe
                assert explorer.message.value == ""
    assert "lens" not in explorer.probe_dropdown.options


@pytest.fixture
def intervened_home(small_home):
    """The home of the run "small", with interventions."""
    activations = open_activations("small", home=small_home)
    pk.intervene(
        activations,
        layers=[8],
        erase=["mean_difference"],
        doses=[],
        routes=[],
        inputs=[],
        images=4,
        fit_images=30,
        resamples=20,
        device="cpu",
        home=small_home,
    )
    yield small_home
    shutil.rmtree(interventions_folder("small", small_home))


def test_a_concept_is_erased_while_the_model_answers(intervened_home):
    explorer = Explorer("small", home=intervened_home)
    explorer.task_dropdown.value = "caption"
    assert explorer.erase_controls.layout.display is None
    assert explorer.erased_answer.value == ""
    explorer.erase_dropdown.value = "last"
    answers = set()
    for place in range(explorer.example_slider.max + 1):
        explorer.example_slider.value = place
        assert "then it says" in explorer.erased_answer.value
        assert "mean difference, lm.08" in explorer.erased_answer.value
        answers.add("<b>yes</b>" in explorer.erased_answer.value)
    assert len(answers) == 1  # the same to everything
    explorer.layer_slider.value = 3
    assert "lm.03" in explorer.erased_answer.value
    explorer.erase_dropdown.value = "image"
    began = time.perf_counter()
    explorer.layer_slider.value = 2
    assert time.perf_counter() - began < 3  # 0.3 s on an idle machine
    explorer.layer_slider.value = 0
    explorer.erase_dropdown.value = "last"
    assert "do not differ" in explorer.erased_answer.value
    explorer.task_dropdown.value = "category"
    assert explorer.erase_controls.layout.display == "none"
    explorer.task_dropdown.value = "caption"
    explorer.model_dropdown.value = UNTRAINED
    assert explorer.erase_controls.layout.display == "none"
    assert explorer.message.value == ""


def test_without_interventions_nothing_can_be_erased(explorer):
    assert explorer.erase_controls.layout.display == "none"
    assert explorer.saved.erasures("tiny-qwen2-vl", "caption") == {}


# ------------------------------------------------------------------------------------- first view


def test_it_opens_on_a_clear_example_of_a_local_task(small_home):
    explorer = Explorer("small", home=small_home)
    assert explorer.state == StateKey("tiny-qwen2-vl", "none", "mean", "category")
    assert explorer.layer_slider.value == 8
    row = explorer.rows.iloc[explorer.place]
    category = explorer.heat_category_dropdown.value
    c = explorer.task.classes.index(category)
    assert row.labels[c] == row["mask"][c] == 1
    assert len(explorer.saved.boxes(row.image_id, category)) > 0
    assert explorer.heat_map is not None
    p_lc = explorer.p_lnc[:, explorer.place]
    assert p_lc[-1, c] > p_lc[0, c]
    assert np.all((p_lc[-1] >= 0.5) == row.labels, where=row["mask"] > 0)
    again = Explorer("small", home=small_home)
    assert again.place == explorer.place
    assert again.photo.value == explorer.photo.value


# ------------------------------------------------------------------------------------------- keys


def test_keys_move_the_sliders_and_stop_at_their_ends(explorer):
    curve = explorer.curve.value
    press(explorer, "ArrowDown", "ArrowDown")
    assert explorer.layer_slider.value == 6
    assert explorer.curve.value != curve
    press(explorer, "ArrowUp")
    assert explorer.layer_slider.value == 7
    press(explorer, "ArrowUp", "ArrowUp", "ArrowUp")
    assert explorer.layer_slider.value == 8
    press(explorer, "ArrowLeft")
    assert explorer.example_slider.value == 0
    press(explorer, "ArrowRight", "ArrowRight", "ArrowLeft")
    assert explorer.example_slider.value == 1
    assert explorer.rows.prompt[1].split()[-4] in explorer.details.value


def test_keys_tick_what_is_drawn(explorer):
    explorer.task_dropdown.value = "category"
    boxes = {"h": explorer.heat_checkbox, "b": explorer.boxes_checkbox}
    boxes["t"] = explorer.borders_checkbox
    for key, checkbox in boxes.items():
        photo = explorer.photo.value
        before = checkbox.value
        press(explorer, key)
        assert checkbox.value != before
        assert explorer.photo.value != photo
        press(explorer, key, key)  # on and off again, faster than the kernel answers
        assert checkbox.value != before
        press(explorer, key)
        assert explorer.photo.value == photo


def test_an_exception_after_a_key_is_shown(explorer):
    predictions = explorer.saved.results.predictions
    copy = dict(predictions)
    predictions.clear()
    press(explorer, "ArrowRight")
    assert "KeyError" in explorer.message.value
    assert explorer.message.layout.display is None
    predictions.update(copy)
    press(explorer, "ArrowRight")
    assert explorer.message.value == ""
    assert explorer.message.layout.display == "none"


# ----------------------------------------------------------------------------- what explains itself


def test_the_legend_names_the_largest_heat_of_the_layer(explorer):
    explorer.task_dropdown.value = "category"
    c = explorer.task.classes.index(explorer.heat_category_dropdown.value)
    for layer in (8, 3):
        explorer.layer_slider.value = layer
        largest = explorer.heat_map.heat_ltc[layer, :, c].max()
        assert f"{largest:.3g}\n<span>log-odds" in explorer.heat_legend.value
    explorer.heat_reader_dropdown.value = "lens"
    assert "log-probability" in explorer.heat_legend.value
    explorer.heat_checkbox.value = False
    assert explorer.heat_legend.value == ""
    explorer.task_dropdown.value = "caption"
    assert explorer.heat_legend.value == ""


def test_words_that_the_wrong_caption_lacks_are_marked(explorer):
    row = explorer.rows.iloc[explorer.place]
    same_image = explorer.rows[explorer.rows.image_id == row.image_id]
    (wrong,) = [other for _, other in same_image.iterrows() if not other.labels[0]]
    assert row.labels[0] == 1
    marked = " ".join(re.findall(r"<mark>(.*?)</mark>", explorer.details.value)).split()
    bare = {word.strip(".").lower() for word in wrong.prompt.split()}
    of_right, of_wrong = row.prompt.split(), wrong.prompt.split()
    only_right = [word for word in of_right if word.strip(".").lower() not in bare]
    assert only_right
    assert set(only_right) <= set(marked)
    assert set(marked) <= {*of_right, *of_wrong}
    assert not {"image", "contains:", "Is"} & set(marked)
    assert "wrong would be" in explorer.details.value
    explorer.task_dropdown.value = "category"
    assert "<mark>" not in explorer.details.value


def test_the_checkbox_to_run_the_model_is_there_where_it_does_something(explorer):
    assert explorer.run_model_checkbox.layout.display == "none"
    explorer.task_dropdown.value = "category"
    assert explorer.run_model_checkbox.layout.display == "none"
    explorer.example_slider.value = len(explorer.rows) - 1
    assert explorer.run_model_checkbox.layout.display is None
