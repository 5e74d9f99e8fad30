from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from probekit.report.explorer import Explorer


@pytest.fixture
def explorer(small_run):
    return Explorer("small")


def test_sliders_change_picture_curve_and_neighbours(explorer):
    picture, curve, near = explorer.image.value, explorer.curve.value, explorer.near.value
    assert Image.open(BytesIO(picture)).size == (320, 240)
    explorer.layer.value = 3
    assert explorer.curve.value != curve and explorer.near.value != near
    assert explorer.image.value == picture  # a caption's heat has no place
    explorer.example.value = 5
    assert explorer.image.value != picture
    assert f"{float(explorer.p_lnc[3, 5, 0]):.2f}" in explorer.words.value and explorer.trouble.value == ""


def test_another_model_pooling_and_probe(explorer):
    assert explorer.layer.max == 8
    explorer.probe.value = "linear"
    explorer.model.value = "tiny-qwen2-vl|untrained|last"
    assert explorer.trouble.value == "" and explorer.key == "tiny-qwen2-vl|untrained|last|caption"
    assert len(explorer.model.options) == 4


def test_a_category_example_shows_what_it_was_asked_and_where(explorer):
    explorer.task.value = "category"
    row = explorer.rows.iloc[0]
    classes = explorer.data.tasks["category"]["classes"]
    asked = [c for c, m in zip(classes, row["mask"], strict=True) if m]
    assert all(name in explorer.words.value for name in asked)
    assert explorer.curve.value.count("<polyline") == len(asked) == 3
    own = set(explorer.data.instances.category[explorer.data.instances.image_id == row.image_id])
    assert explorer.where.value in own and all(name in explorer.words.value for name in own)
    warm, told = explorer.image.value, explorer.share.value
    assert "of the tokens" in told and explorer.where.value in told
    explorer.layer.value = 2
    assert explorer.image.value != warm and explorer.share.value != told
    explorer.boxes.value = False
    explorer.warm.value = False
    plain = np.asarray(Image.open(BytesIO(explorer.image.value))).astype(int)
    honest = np.asarray(Image.open(explorer.data.tests("category").file[0]).convert("RGB")).astype(int)
    assert np.abs(plain - honest).mean() < 3


def test_heat_that_is_not_kept_is_made_when_asked_for(explorer):
    explorer.task.value = "category"
    explorer.example.value = 3
    stored = explorer._heat
    explorer.example.value = len(explorer.rows) - 1
    assert explorer._heat is None and "tick “run the model" in explorer.share.value
    explorer.live.value = True
    assert explorer._heat.logit_ltc.shape == stored.logit_ltc.shape and "of the tokens" in explorer.share.value
    explorer.data.kept.names.clear()
    explorer.example.value = 3  # made anew, it is what was stored
    np.testing.assert_allclose(explorer._heat.logit_ltc, stored.logit_ltc, atol=0.02, rtol=2e-3)
    explorer.model.value = "tiny-qwen2-vl|untrained|mean"
    assert explorer.trouble.value == "" and not np.allclose(explorer._heat.logit_ltc, stored.logit_ltc, atol=0.1)


def test_examples_are_searched_filtered_and_ordered(explorer):
    word = explorer.rows.prompt[4].split()[4].strip(".,")
    explorer.search.value = word
    assert explorer.found.value.startswith(f"{len(explorer.places)} of {len(explorer.rows)}")
    assert 4 in explorer.places and all(word.lower() in explorer.rows.prompt[k].lower() for k in explorer.places)
    explorer.search.value = "no such words"
    assert "take other words" in explorer.trouble.value
    explorer.search.value = ""
    explorer.order.value = "most surprising"
    assert explorer.trouble.value == "" and explorer.example.value == 0
    p = explorer.p_lnc[-1, :, 0].astype(float)
    wrong = np.abs(p - [labels[0] for labels in explorer.rows.labels])
    assert wrong[explorer.place] == pytest.approx(wrong.max())
    explorer.category.value = explorer.category.options[1]
    shown = explorer.data.instances[explorer.data.instances.category == explorer.category.value].image_id
    assert len(explorer.places) and set(explorer.rows.image_id[explorer.places]) <= set(shown)


def test_an_exception_is_shown_and_the_next_choice_works(explorer):
    kept = dict(explorer.data.results.predictions)
    explorer.data.results.predictions.clear()
    explorer.example.value = 2
    assert "KeyError" in explorer.trouble.value and "no logreg probe" in explorer.trouble.value
    explorer.data.results.predictions.update(kept)
    explorer.example.value = 1
    assert explorer.trouble.value == ""


def test_one_change_draws_once(explorer, monkeypatch):
    drawn = []
    monkeypatch.setattr(explorer, "_show_near", lambda *arguments: drawn.append(arguments))
    explorer.layer.value = 1
    explorer.example.value = 4
    explorer.task.value = "category"  # sets the sliders, too
    explorer.search.value = "types"
    assert len(drawn) == 4


def test_a_run_that_cannot_be_opened_leaves_the_one_that_is_shown(explorer):
    explorer.run.options = [*explorer.run.options, "nowhere"]
    explorer.run.value = "nowhere"
    assert "run 01_build_data" in explorer.trouble.value and explorer.run.value == "small"
    explorer.layer.value = 2
    assert explorer.trouble.value == ""


def test_a_model_without_a_known_grid_says_so_and_shows_the_rest(explorer, monkeypatch):
    from probekit.models.token_grid import NoTokenGrid
    from probekit.probes import localisation

    def broken(*arguments):
        raise NoTokenGrid("its tokens lie nowhere")

    monkeypatch.setattr(localisation, "check", broken)
    explorer.task.value = "category"
    explorer.example.value = len(explorer.rows) - 1
    explorer.live.value = True
    assert "lie nowhere" in explorer.share.value and explorer.trouble.value == ""
    assert explorer.rows.prompt.iloc[-1] in explorer.words.value
