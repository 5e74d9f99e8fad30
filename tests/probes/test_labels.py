import numpy as np
import pandas as pd
import pytest

from probekit.probes.labels import LabelledTask
from tests.support.tables import planted_activations, with_task_info


def category_examples(train_labels):
    """Two training images with these labels of four classes, one image in each other split."""
    labels = [*train_labels, [1, 0, 1, 0], [0, 1, 0, 1]]
    examples = pd.DataFrame(
        {
            "image_id": range(len(labels)),
            "split": [*["train"] * len(train_labels), "validation", "test"],
            "task": "category",
            "prompt": "which?",
            "labels": labels,
            "mask": [[1, 1, 1, 1]] * len(labels),
        }
    )
    return with_task_info(examples, "multilabel", "abcd")


def test_a_category_with_one_answer_in_training_does_not_count():
    examples = category_examples([[1, 1, 0, 0], [1, 0, 1, 0]])
    task = LabelledTask.from_examples(examples, "category")
    assert (task.true.mask_nc == np.array([0, 1, 1, 0])).all()


def test_an_answer_that_is_masked_in_training_does_not_make_a_category_learnable():
    examples = category_examples([[1, 1, 0, 0], [1, 0, 1, 0]])
    examples.at[0, "mask"] = [1, 0, 1, 1]
    task = LabelledTask.from_examples(examples, "category")
    assert (task.true.mask_nc.amax(0) == np.array([0, 0, 1, 0])).all()


def test_a_task_without_any_learnable_category_is_named():
    examples = category_examples([[1, 1, 0, 0], [1, 1, 0, 0]])
    message = r"task category has no category with both answers.*more categories"
    with pytest.raises(ValueError, match=message):
        LabelledTask.from_examples(examples, "category")


def test_a_task_takes_its_rows_of_the_table():
    captions = planted_activations(images=8).examples
    categories = category_examples([[1, 1, 0, 0], [1, 0, 1, 0]])
    examples = pd.concat([captions[:5], categories, captions[5:]], ignore_index=True)
    task = LabelledTask.from_examples(examples, "category")
    assert task.rows.tolist() == [5, 6, 7, 8]
    y_nc, mask_nc, image_n = task.true.select("test")
    assert y_nc.tolist() == [[0, 1, 0, 1]]
    assert mask_nc.tolist() == [[0, 1, 1, 0]]
    assert image_n.tolist() == [3]
    assert task.text_probabilities == {}
