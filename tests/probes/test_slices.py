import numpy as np
import pandas as pd
import pytest

from probekit.probes.labels import LabelledTask
from probekit.probes.slices import find_covariates, score_slices
from tests.support.tables import with_task_info

CAPTION = "This image contains: {}.\nIs this right?"
SMALL, MEDIUM, LARGE = 20.0**2, 50.0**2, 100.0**2


def instance_table(*rows):
    """Instances of (image, category, area), and of the columns that differ from the usual ones."""
    usual = {"iscrowd": 0, "tiny": False, "colour": None}
    return pd.DataFrame(
        [
            {**usual, "image_id": image, "category": category, "area": area, **further}
            for image, category, area, *rest in rows
            for further in (rest[0] if rest else {},)
        ]
    )


def object_examples(asked, *, labels=None, train=()):
    """A binary task: one test example for each image from 0 on, and training images to compare."""
    images = [*train, *range(len(asked))]
    labels = [1] * len(asked) if labels is None else labels
    examples = pd.DataFrame(
        {
            "image_id": images,
            "split": [*["train"] * len(train), *["test"] * len(asked)],
            "task": "object",
            "prompt": "Is it there?",
            "labels": [*[[0]] * len(train), *([label] for label in labels)],
            "mask": [[1]] * len(images),
            "asked": [*[[]] * len(train), *(list(names) for names in asked)],
        }
    )
    return with_task_info(examples, "binary")


def slices_of(examples, instances, name, task="object"):
    """By entry the name of its slice, None where it is in none."""
    covariates = {found.name: found for found in find_covariates(examples, instances, task)}
    found = covariates[name]
    names = [*found.slices, None]
    return [[names[number] for number in row] for row in found.slice_nc]


def test_the_area_is_that_of_the_largest_clear_instance_of_the_smallest_asked_category():
    instances = instance_table(
        (0, "cup", SMALL),
        (0, "cup", LARGE),
        (1, "cup", LARGE),
        (1, "car", MEDIUM),
        (2, "cup", SMALL),
        (2, "cup", LARGE, {"iscrowd": 1}),
        (3, "cup", LARGE, {"iscrowd": 1}),
        (4, "cup", 4.0, {"tiny": True}),
        (5, "car", SMALL),
        (6, "cup", 32.0**2),
        (7, "cup", 96.0**2),
    )
    asked = [("cup",), ("cup", "car"), ("cup",), ("cup",), ("cup",), ("cup",), ("cup",), ("cup",)]
    found = slices_of(object_examples([*asked, ()]), instances, "area")
    expected = ["large", "medium", "small", None, None, "not shown", "medium", "large", None]
    assert [name for (name,) in found] == expected


def test_each_category_of_a_multilabel_task_has_an_area_of_its_own():
    examples = object_examples([("cup", "car"), ("cup", "car")])
    examples = with_task_info(
        examples.assign(labels=[[1, 1], [0, 1]], mask=[[1, 1]] * 2), "multilabel", ["cup", "car"]
    )
    instances = instance_table((0, "cup", SMALL), (0, "car", LARGE), (1, "car", MEDIUM))
    found = slices_of(examples, instances, "area")
    assert found == [["small", "large"], ["not shown", "medium"]]


def test_instances_are_counted_and_a_crowd_is_many():
    rows = [(image, "cup", MEDIUM) for image in range(1, 7) for _ in range(image)]
    instances = instance_table(*rows, (7, "cup", LARGE, {"iscrowd": 1}))
    found = slices_of(object_examples([()] * 8), instances, "objects")
    names = ["none", "1", "2", "3 to 5", "3 to 5", "3 to 5", "6 or more", "6 or more"]
    assert [name for (name,) in found] == names


def test_words_are_those_of_the_caption_in_slices_of_about_equal_counts():
    captions = [" ".join(["dog"] * count) for count in (3, 4, 5, 6, 7, 8, 9, 10, 11)]
    examples = object_examples([()] * 9).assign(prompt=[CAPTION.format(text) for text in captions])
    found = [name for (name,) in slices_of(examples, pd.DataFrame(), "words")]
    assert found == ["up to 5 words"] * 3 + ["6 to 8 words"] * 3 + ["9 words or more"] * 3


def test_words_that_are_nearly_always_as_many_make_two_slices():
    prompts = ["one two"] + ["one two three"] * 8
    examples = object_examples([()] * 9).assign(prompt=prompts)
    found = [name for (name,) in slices_of(examples, pd.DataFrame(), "words")]
    assert found == ["up to 2 words"] + ["3 words or more"] * 8


def test_a_combination_is_novel_where_no_training_image_shows_it():
    examples = object_examples(
        [("cup",), ("cup",), ("cup",), ("cup",), ("dog",), ()], train=(100, 101)
    )
    red, blue = {"colour": "red"}, {"colour": "blue"}
    instances = instance_table(
        (100, "cup", MEDIUM, red),
        (100, "car", MEDIUM),
        (101, "dog", 4.0, {"tiny": True}),
        (101, "car", MEDIUM),
        (0, "cup", MEDIUM, red),
        (0, "car", MEDIUM),
        (1, "cup", MEDIUM, blue),
        (2, "cup", MEDIUM),
        (2, "dog", MEDIUM),
        (3, "cup", MEDIUM),
        (4, "cup", MEDIUM),
        (5, "dog", MEDIUM),
        (5, "car", MEDIUM),
    )
    found = [name for (name,) in slices_of(examples, instances, "combination")]
    # Image 3 shows a cup alone; a dog and a car stand together in training, if tiny.
    assert found == ["seen", "novel", "novel", None, "not shown", "seen"]


def test_only_combinations_of_what_is_asked_about_count():
    examples = object_examples([("car",), ("cup",)], train=(100,))
    instances = instance_table(
        (100, "car", MEDIUM),
        (100, "cup", MEDIUM),
        (100, "dog", MEDIUM, {"tiny": True}),
        (100, "car", MEDIUM, {"colour": "red"}),
        *((image, category, MEDIUM) for image in (0, 1) for category in ("car", "cup")),
        (0, "cup", MEDIUM, {"colour": "green"}),
        (1, "cup", MEDIUM, {"colour": "green"}),
    )
    found = slices_of(examples, instances, "combination")
    assert found == [["seen"], ["novel"]]
    without = examples.drop(columns="asked")  # as it was in older tables: all of the image counts
    assert not [c for c in find_covariates(without, instances, "object") if c.name == "combination"]


def test_what_does_not_vary_and_what_there_is_no_annotation_of_is_left_out():
    examples = object_examples([("cup",), ("car",)])
    instances = instance_table((0, "cup", MEDIUM), (1, "car", MEDIUM))
    assert find_covariates(examples, instances, "object") == ()
    assert find_covariates(examples, pd.DataFrame(), "object") == ()


# ------------------------------------------------------------------------------------- the scores


def planted_objects(*, images, seed=0):
    """Examples that ask each image about what it shows, in one of three areas, and what not."""
    rng = np.random.default_rng(seed)
    areas = rng.choice([SMALL, MEDIUM, LARGE], images)
    instances = instance_table(*((image, "cup", area) for image, area in enumerate(areas)))
    shown = object_examples([("cup",)] * images)
    absent = object_examples([("car",)] * images, labels=[0] * images)
    others = object_examples([()] * 4, labels=[0, 1, 0, 1]).assign(
        image_id=range(1000, 1004), split=["train", "train", "validation", "validation"]
    )
    return pd.concat([shown, absent, others], ignore_index=True), instances, areas


def score(examples, instances, p_lnc, task="object", **options):
    labels = LabelledTask.from_examples(examples, task).true
    covariates = find_covariates(examples, instances, task)
    return score_slices(p_lnc, labels, covariates, resamples=300, **options)


def test_an_answer_that_is_wrong_for_small_objects_is_low_in_that_slice_and_no_other():
    examples, instances, areas = planted_objects(images=600)
    rng = np.random.default_rng(1)
    truth = {"small": 0.3, "medium": 0.9, "large": 0.9, "not shown": 0.9}
    share_n = np.concatenate([np.where(areas == SMALL, 0.3, 0.9), np.full(600, 0.9)])
    is_right_n = rng.random(1200) < share_n
    y_n = np.repeat([1, 0], 600)
    noisy_n = np.where(is_right_n, y_n, 1 - y_n)
    exact_n = np.where(np.r_[areas == SMALL, np.zeros(600, bool)], 1 - y_n, y_n)
    table = score(examples, instances, np.stack([noisy_n, exact_n])[..., None].astype(float))
    assert set(table.covariate) == {"area"}
    assert set(table.metric) == {"recall"}
    noisy = table[table.source == 0].set_index("slice")
    for name, share in truth.items():
        row = noisy.loc[name]
        assert row.lo <= share <= row.hi, name
        assert row.hi - row.lo < 0.2
    exact = table[table.source == 1].set_index("slice").value
    assert exact.to_dict() == {"small": 0, "medium": 1, "large": 1, "not shown": 1}
    assert noisy.n.sum() == 1200
    assert noisy.n["small"] == noisy.images["small"] == (areas == SMALL).sum()


def test_always_saying_yes_shows_in_what_is_not_there():
    examples, instances, _ = planted_objects(images=100)
    table = score(examples, instances, np.ones((1, 200, 1)))
    assert table.set_index("slice").value.to_dict() == {
        "small": 1,
        "medium": 1,
        "large": 1,
        "not shown": 0,
    }


def test_entries_of_one_example_are_in_different_slices():
    examples, _, areas = planted_objects(images=200)
    examples = examples[examples.asked.map(lambda names: names != ["car"])]
    examples = with_task_info(
        examples.assign(
            labels=[[1, 1]] * 200 + [[0, 0], [1, 1], [0, 0], [1, 1]],
            mask=[[1, 1]] * 204,
            asked=[["cup", "dog"]] * 204,
        ),
        "multilabel",
        ["cup", "dog"],
    )
    instances = instance_table(
        *((image, "cup", SMALL) for image in range(200)),
        *((image, "dog", area) for image, area in enumerate(areas)),
    )
    p_nc = np.tile([0.1, 0.9], (200, 1))  # cups are not found
    table = score(examples, instances, p_nc[None]).set_index(["covariate", "slice"])
    small_dogs = (areas == SMALL).sum()
    assert table.n["area", "small"] == 200 + small_dogs
    assert table.images["area", "small"] == 200
    assert table.value["area", "small"] == pytest.approx(small_dogs / (200 + small_dogs))
    assert table.value["area", "large"] == 1


def test_of_several_answers_the_largest_one_that_counts_is_given():
    examples, instances, areas = planted_objects(images=90)
    examples = examples[examples.asked.map(lambda names: names != ["car"])]
    classes = ["red", "green", "blue"]
    examples = with_task_info(
        examples.assign(labels=[[0, 1, 0]] * 94, mask=[[1, 1, 0]] * 94), "one_of", classes
    )
    p_nc = np.tile([0.1, 0.2, 0.7], (90, 1))  # blue does not count
    p_nc[areas == SMALL] = [0.3, 0.2, 0.5]
    table = score(examples, instances, p_nc[None]).set_index("slice")
    assert set(table.metric) == {"top1_accuracy"}
    assert table.value.to_dict() == {"small": 0, "medium": 1, "large": 1}
    assert table.n.sum() == 90
    with pytest.raises(ValueError, match="one_of have no accuracy: take one of top1_accuracy"):
        score(examples, instances, p_nc[None], metric="accuracy")


def test_slices_of_few_images_or_one_label_have_a_reason_instead_of_a_score():
    examples, _, _ = planted_objects(images=60)
    examples.loc[examples.image_id < 20, "labels"] = examples.labels[:1].repeat(40).to_numpy()
    rows = [(image, "cup", MEDIUM) for image in range(20)]
    rows += [(image, "cup", MEDIUM) for image in range(20, 51) for _ in range(2)]
    rows += [(image, "cup", MEDIUM) for image in range(51, 60) for _ in range(3)]
    table = score(examples, instance_table(*rows), np.full((1, 120, 1), 0.7)).set_index("slice")
    assert set(table.covariate) == {"objects"}
    assert table.reason["1"] == "one label: the right answer is always yes"
    assert table.reason["3 to 5"] == "too few: 9 test images, fewer than 10"
    assert table.reason["2"] == ""
    assert table.value.notna().to_dict() == {"1": False, "2": True, "3 to 5": False}
    assert table.value["2"] == 0.5
    assert table.images.to_dict() == {"1": 20, "2": 31, "3 to 5": 9}


@pytest.mark.parametrize("metric", ["f1_positive", "log_loss", "average_precision"])
def test_another_metric_needs_both_labels(metric):
    examples, instances, _ = planted_objects(images=60)
    table = score(examples, instances, np.full((1, 120, 1), 0.7), metric=metric)
    assert (table.metric == metric).all()
    assert table.value.isna().all()
    assert set(table.reason) == {
        "one label: the right answer is always yes",
        "one label: the right answer is always no",
    }
    doubled = pd.concat([instances, instances[instances.image_id < 30]])
    table = score(examples, doubled, np.full((1, 120, 1), 0.7), metric=metric)
    assert table[table.covariate == "objects"].value.notna().all()


def test_a_metric_that_there_is_not_is_refused():
    examples, instances, _ = planted_objects(images=20)
    with pytest.raises(ValueError, match="have no recal: take one of accuracy, log_loss"):
        score(examples, instances, np.ones((1, 40, 1)), metric="recal")
