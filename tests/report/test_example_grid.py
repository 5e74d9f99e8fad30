import numpy as np
import pandas as pd
from PIL import Image

from probekit.report.example_grid import MOST_PROMPTS, example_grid, right_answer


def make_example(kind: str, classes: list[str], labels: list[int], mask: list[int], **columns):
    table = pd.DataFrame(
        {"kind": [kind], "classes": [classes], "labels": [np.array(labels)], "mask": [mask]}
    )
    return table.assign(**columns)


def row_of(table: pd.DataFrame):
    return next(table.itertuples())


def test_the_right_answer_of_every_kind_of_task():
    assert right_answer(row_of(make_example("binary", ["match"], [1], [1]))) == "yes"
    assert right_answer(row_of(make_example("binary", ["match"], [0], [1]))) == "no"
    assert right_answer(row_of(make_example("binary", ["match"], [1], [0]))) == "does not count"
    several = make_example("multilabel", ["cup", "kite", "car"], [1, 0, 1], [1, 1, 0])
    assert right_answer(row_of(several)) == "cup: yes, kite: no"
    one = make_example("one_of", ["red", "blue"], [0, 1], [1, 1])
    assert right_answer(row_of(one)) == "blue"


def test_each_image_has_a_card_with_what_is_asked_about_it(tmp_path):
    tables = []
    for i in range(3):
        file = tmp_path / f"{i}.png"
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(file)
        for k in range(MOST_PROMPTS + 2 * (i == 0)):
            columns = {"file": str(file), "image_id": i, "task": "caption"}
            prompt = f"<b>prompt</b> {k} of image {i}"
            tables.append(make_example("binary", ["m"], [1], [1], prompt=prompt, **columns))
    without_image = make_example(
        "binary", ["m"], [1], [1], prompt="no image", file="", image_id=9, task="caption"
    )
    html = example_grid(pd.concat([without_image, *tables], ignore_index=True), images=2).data
    assert html.count("<img") == 2
    assert "prompt&lt;/b&gt; 0 of image 0" in html
    assert "<b>prompt" not in html
    assert f"{MOST_PROMPTS} of image 0" not in html
    assert "and 2 more" in html
    assert "of image 2" not in html
    assert "no image" not in html
