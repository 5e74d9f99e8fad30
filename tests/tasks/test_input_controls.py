import numpy as np
import pandas as pd
import pytest

from probekit.tasks.input_controls import INPUT_CONTROLS, change_inputs


@pytest.mark.parametrize("control", INPUT_CONTROLS)
def test_a_control_changes_one_input_and_nothing_else(examples, control):
    changed = change_inputs(examples, control)
    input_name = "prompt" if control == "no_text" else "file"
    others = [name for name in examples.columns if name != input_name]
    pd.testing.assert_frame_equal(changed[others], examples[others])
    assert (changed[input_name] != examples[input_name]).all()


def test_inputs_that_are_taken_away_are_empty(examples):
    assert set(change_inputs(examples, "no_image").file) == {""}
    assert set(change_inputs(examples, "no_text").prompt) == {""}
    assert change_inputs(examples, "none") is examples


def test_a_wrong_image_is_another_one_of_the_same_split_for_all_prompts_of_an_image(examples):
    wrong = change_inputs(examples, "wrong_image")
    assert (wrong.file != examples.file).all()
    assert (wrong.groupby("image_id").file.nunique() == 1).all()
    split_by_file = examples.groupby("file").split.first()
    assert (split_by_file[wrong.file].to_numpy() == wrong.split).all()
    assert sorted(wrong.file.unique()) == sorted(examples.file.unique())


def test_wrong_images_depend_on_the_seed_alone(examples):
    first = change_inputs(examples, "wrong_image", seed=1).file
    assert first.equals(change_inputs(examples, "wrong_image", seed=1).file)
    assert not first.equals(change_inputs(examples, "wrong_image", seed=2).file)


def test_an_image_alone_in_its_split_and_an_unknown_control_are_refused(examples):
    test_images = examples.image_id[examples.split == "test"].unique()
    one_test_image = examples[~examples.image_id.isin(test_images[1:])]
    assert np.unique(one_test_image.split).tolist() == ["test", "train", "validation"]
    with pytest.raises(ValueError, match="second image in test"):
        change_inputs(one_test_image, "wrong_image")
    with pytest.raises(ValueError, match="'no_sound': take one of no_image"):
        change_inputs(examples, "no_sound")
