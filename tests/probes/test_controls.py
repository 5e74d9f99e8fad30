import numpy as np
import pandas as pd
import pytest

from probekit.probes import controls
from probekit.probes.labels import LabelledTask
from tests.support.tables import with_task_info


def make_examples(images=60):
    """A binary task with two prompts per image, and a multilabel task of four classes."""
    rng = np.random.default_rng(0)
    split_n = np.repeat(["train", "validation", "test"], [images // 2, images // 4, images // 4])
    caption_rows = []
    category_rows = []
    for image, split in enumerate(split_n):
        of_split = np.flatnonzero(split_n == split)
        place = np.flatnonzero(of_split == image)[0]
        other = of_split[(place + 1) % len(of_split)]
        common = {"image_id": image, "file": f"{image}.jpg", "split": split}
        for text in (image, other):
            caption_rows.append(
                {
                    **common,
                    "task": "caption",
                    "prompt": f"caption {text}",
                    "labels": [int(text == image)],
                    "mask": [1],
                }
            )
        shown = rng.integers(0, 2, 4)
        shown[rng.integers(4)] = 1
        category_rows.append(
            {
                **common,
                "task": "category",
                "prompt": "which?",
                "labels": shown.tolist(),
                "mask": [1, *rng.integers(0, 2, 3).tolist()],
            }
        )
    captions = with_task_info(pd.DataFrame(caption_rows), "binary")
    categories = with_task_info(pd.DataFrame(category_rows), "multilabel", "abcd")
    return pd.concat([captions, categories], ignore_index=True)


def caption_task(images=60):
    return LabelledTask.from_examples(make_examples(images), "caption")


def category_task(images=60):
    return LabelledTask.from_examples(make_examples(images), "category")


def test_shuffled_labels_are_the_same_labels_elsewhere():
    task = category_task()
    shuffled = task.labels("shuffled")
    counts_nc = task.true.mask_nc.numpy() > 0
    assert not counts_nc.all()
    for rows in task.true.split.values():
        true_nc = task.true.y_nc[rows].numpy()
        shuffled_nc = shuffled.y_nc[rows].numpy()
        assert (true_nc != shuffled_nc).any()
        assert (true_nc == shuffled_nc)[~counts_nc[rows]].all()
        for c in range(4):  # a class is as frequent as before where it counts
            counts_n = counts_nc[rows, c]
            assert true_nc[counts_n, c].sum() == shuffled_nc[counts_n, c].sum()
    other_seed = task.labels("shuffled", seed=1)
    assert not (other_seed.y_nc == shuffled.y_nc).all()


def test_the_control_task_of_captions_scores_known_captions_with_their_other_image():
    task = caption_task(200)
    control = task.labels("control_task")
    labels_by_prompt = pd.Series(control.y_nc[:, 0].numpy()).groupby(task.prompts)
    assert (labels_by_prompt.nunique() == 1).all()
    assert 0.3 < labels_by_prompt.first().mean() < 0.7
    train_rows = control.split["train"].numpy()
    train_prompts = set(task.prompts[train_rows])
    true_train_rows = set(task.true.split["train"].tolist())
    for split in ("validation", "test"):
        rows = control.split[split].numpy()
        assert set(task.prompts[rows]) <= train_prompts
        assert set(rows) <= true_train_rows
        assert not set(rows) & set(train_rows)


def test_the_control_task_of_one_answer_is_a_function_of_the_prompt():
    rng = np.random.default_rng(0)
    examples = pd.DataFrame(
        {
            "image_id": range(300),
            "split": np.repeat(["train", "validation", "test"], 100),
            "task": "count",
            "prompt": [f"Number of {k % 12}:" for k in range(300)],
            "labels": np.eye(4, dtype=int)[rng.integers(4, size=300)].tolist(),
            "mask": [[1, 1, 1, 1]] * 300,
        }
    )
    task = LabelledTask.from_examples(with_task_info(examples, "one_of", "1234"), "count")
    control = task.labels("control_task")
    labels_by_prompt = pd.DataFrame(control.y_nc.numpy()).groupby(task.prompts)
    assert (labels_by_prompt.nunique() == 1).all(axis=None)
    assert 0.2 < labels_by_prompt.first().to_numpy().mean() < 0.8
    assert (control.mask_nc == task.true.mask_nc).all()
    assert set(control.split["test"].tolist()) < set(task.true.split["train"].tolist())


def test_the_control_task_of_categories_is_a_function_of_the_rarest_other_one():
    task = category_task()
    control = task.labels("control_task")
    y_nc = task.true.y_nc.numpy()
    rarest_first = np.argsort(y_nc[task.true.split["train"]].sum(0), kind="stable")
    labels_by_type: dict[tuple[int, int], set[float]] = {}
    for i, c in np.ndindex(y_nc.shape):
        others = [int(k) for k in rarest_first if y_nc[i, k] and k != c]
        assert control.mask_nc[i, c] == (task.true.mask_nc[i, c] if others else 0)
        if others:
            labels = labels_by_type.setdefault((others[0], c), set())
            labels.add(float(control.y_nc[i, c]))
    assert all(len(labels) == 1 for labels in labels_by_type.values())
    assert set.union(*labels_by_type.values()) == {0.0, 1.0}
    for split, rows in task.true.split.items():
        assert (control.split[split] == rows).all()


def test_the_control_task_says_nothing_about_the_truth():
    task = category_task(400)
    correlations = []
    for seed in range(40):
        control = task.labels("control_task", seed)
        counts_nc = control.mask_nc.numpy() > 0
        truth = task.true.y_nc.numpy()[counts_nc]
        random = control.y_nc.numpy()[counts_nc]
        correlations.append(np.corrcoef(truth, random)[0, 1])
    assert abs(np.mean(correlations)) < 0.06


def test_too_few_prompts_have_no_control_task():
    examples = make_examples()
    examples["prompt"] = examples.prompt.where(examples.task != "caption", "the same")
    task = LabelledTask.from_examples(examples, "caption")
    with pytest.raises(ValueError, match="at least 10 different prompts in training"):
        task.labels("control_task")


def test_prompts_that_hardly_repeat_have_no_control_task():
    examples = make_examples()
    rows = np.flatnonzero(examples.task == "caption")
    examples.loc[rows[:-6], "prompt"] = [f"caption {k}" for k in rows[:-6]]
    task = LabelledTask.from_examples(examples, "caption")
    with pytest.raises(ValueError, match="20 examples whose prompt occurs there more than once"):
        task.labels("control_task")


def test_guesses_are_the_shares_of_the_training_labels():
    y_nc = np.array([[1, 0], [1, 1], [0, 1], [1, 1]])
    mask_nc = np.array([[1, 1], [1, 0], [1, 0], [1, 0]])
    majority = controls.guess("majority", y_nc, mask_nc=mask_nc, n=3)
    assert np.allclose(majority, 3 / 5)
    name_alone = controls.guess("name_alone", y_nc, mask_nc=mask_nc, n=3)
    assert np.allclose(name_alone, [[3 / 4, 0]] * 3)


def test_word_order_tells_what_a_bag_of_words_cannot():
    y_n = np.arange(200) % 2
    train_n = np.arange(200) < 100
    phrases = ["cat on a dog", "dog on a cat"]
    prompts = np.array([f"is {k // 2} the {phrases[k % 2]}" for k in range(200)])
    accuracy = {}
    for name, longest in controls.TEXT_BASELINES.items():
        p_n = controls.bag_of_words(prompts, y_n, train_n=train_n, longest=longest)
        accuracy[name] = ((p_n >= 0.5) == y_n)[~train_n].mean()
    assert accuracy == {"bag_of_words": 0.5, "word_order": 1.0}


@pytest.mark.parametrize(
    "phrases",
    [
        ["一只猫在草地{}上", "一只狗在草地{}上"],
        ["犬がボールを{}追う", "猫がボールを{}追う"],
        ["แมววิ่ง{}ในสวน", "หมาวิ่ง{}ในสวน"],
        ["एक बिल्ली {}", "एक बिल्ला {}"],
        ["大人和小狗{}", "小人和大狗{}"],  # the same characters, other pairs of them
    ],
)
def test_a_leak_of_words_is_seen_in_every_script(phrases):
    y_n = np.arange(200) % 2
    train_n = np.arange(200) < 100
    digits = "零一二三四五六七八九"
    numbers = ["".join(digits[int(d)] for d in str(k // 2)) for k in range(200)]
    prompts = np.array([phrases[k % 2].format(numbers[k]) for k in range(200)])
    p_n = controls.bag_of_words(prompts, y_n, train_n=train_n)
    assert ((p_n >= 0.5) == y_n)[~train_n].mean() == 1.0


def test_unknown_controls_are_named():
    with pytest.raises(ValueError, match=r"unknown controls .'no_picture'"):
        controls.check_controls(["no_picture"])
