import pandas as pd
import pytest

from probekit.tasks import input_controls


@pytest.fixture
def examples():
    """Two prompts on each of 24 images."""
    rows = []
    for image in range(24):
        split = ("train", "validation", "test")[image % 3]
        for k in range(2):
            row = {"image_id": image, "file": f"{image}.jpg", "split": split}
            rows.append({**row, "prompt": f"text {k} of {image}", "labels": [k], "mask": [1]})
    return pd.DataFrame(rows)


def test_controls_of_the_inputs_change_the_inputs_alone(examples):
    changed_column = {"no_image": "file", "no_text": "prompt", "wrong_image": "file"}
    for name in input_controls.INPUT_CONTROLS:
        changed = input_controls.change_inputs(examples, name)
        columns = [column for column in examples if column != changed_column[name]]
        pd.testing.assert_frame_equal(changed[columns], examples[columns])
    assert set(input_controls.change_inputs(examples, "no_image").file) == {""}
    assert set(input_controls.change_inputs(examples, "no_text").prompt) == {""}
    assert input_controls.change_inputs(examples, "none") is examples


def test_a_wrong_image_is_another_one_of_the_same_split_for_all_prompts_of_an_image(examples):
    changed = input_controls.change_inputs(examples, "wrong_image")
    assert (changed.file != examples.file).all()
    assert (changed.groupby("image_id").file.nunique() == 1).all()
    split_of_file = examples.groupby("file").split.first()
    assert (split_of_file[changed.file].to_numpy() == changed.split).all()
    assert sorted(changed.file.unique()) == sorted(examples.file.unique())


def test_a_single_image_of_a_split_has_no_wrong_image(examples):
    is_lonely = (examples.split != "test") | (examples.image_id == 2)
    with pytest.raises(ValueError, match="second image in test"):
        input_controls.change_inputs(examples[is_lonely], "wrong_image")


def test_an_unknown_control_is_named(examples):
    with pytest.raises(ValueError, match="unknown control of the inputs 'no_picture'"):
        input_controls.change_inputs(examples, "no_picture")
