import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from probekit.results import Results
from probekit.widgets import Explorer, curve_svg


@pytest.fixture
def explorer(examples):
    rng = np.random.default_rng(0)
    tests = examples[examples.split == "test"]
    predictions = {}
    for model in ("one|none", "one|untrained", "two|none"):
        for task, about in examples.attrs["tasks"].items():
            shape = (9 if model[:3] == "one" else 6, (tests.task == task).sum(), len(about["classes"]))
            predictions[f"{model}|mean|{task}|logreg"] = rng.random(shape).astype(np.float16)
    return Explorer(Results(None, None, predictions), examples)


def test_sliders_change_picture_and_curve(explorer):
    picture, curve = explorer.image.value, explorer.curve.value
    assert Image.open(BytesIO(picture)).size == (320, 240)
    explorer.layer.value = 3
    assert explorer.curve.value != curve and explorer.image.value == picture
    explorer.example.value = 5
    assert explorer.image.value != picture
    p = explorer.p_lnc[3, 5, 0]
    assert f"{float(p):.2f}" in explorer.words.value


def test_another_model_has_its_own_layers(explorer):
    explorer.layer.value = 8
    explorer.model.value = "two|none|mean"
    assert explorer.layer.max == 5 and explorer.layer.value == 5
    assert explorer.trouble.value == ""


def test_a_category_example_shows_what_it_was_asked(explorer, examples):
    explorer.task.value = "category"
    row = explorer.tests["category"].iloc[0]
    asked = [c for c, m in zip(examples.attrs["tasks"]["category"]["classes"], row["mask"], strict=True) if m]
    assert all(name in explorer.words.value for name in asked)
    assert explorer.curve.value.count("<polyline") == len(asked) == 3


def test_an_exception_is_shown(explorer):
    explorer.predictions.clear()
    explorer.example.value = 2
    assert "KeyError" in explorer.trouble.value and "no logreg probe" in explorer.trouble.value


def test_the_curve_puts_probability_one_on_top():
    svg = curve_svg(np.array([[0.0], [1.0]]), ["a <b>"], 1, np.array([1]))
    (_, low), (_, high) = (map(float, p.split(",")) for p in re.search(r'points="([^"]+)"', svg)[1].split())
    assert high < low and "a &lt;b&gt;" in svg
