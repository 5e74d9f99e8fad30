import numpy as np
import pandas as pd
import pytest

from probekit.probes import controls
from probekit.probes.labels import LabelledTask
from probekit.tasks import input_controls
from tests.support.tables import with_task_info


def table(images=60):
    rng = np.random.default_rng(0)
    split = np.repeat(["train", "validation", "test"], [images // 2, images // 4, images // 4])
    rows = []
    for i in range(images):
        group = np.flatnonzero(split == split[i])
        other = group[(np.flatnonzero(group == i)[0] + 1) % len(group)]
        rows += [{"image_id": i, "file": f"{i}.jpg", "split": split[i], "prompt": f"caption {of}", "task": "caption",
                  "labels": [int(of == i)], "mask": [1]} for of in (i, other)]
        shows = rng.integers(0, 2, 4)
        shows[rng.integers(4)] = 1
        rows.append({"image_id": i, "file": f"{i}.jpg", "split": split[i], "prompt": "which?", "task": "category",
                     "labels": shows.tolist(), "mask": [1, *rng.integers(0, 2, 3).tolist()]})
    examples = pd.DataFrame(rows)
    caption = examples.task == "caption"
    return pd.concat([with_task_info(examples[caption], "binary"),
                      with_task_info(examples[~caption], "multilabel", "abcd")]).sort_index()


def test_controls_of_the_inputs_change_the_inputs_alone():
    examples = table()
    for name in input_controls.INPUT_CONTROLS:
        changed = input_controls.change_inputs(examples, name)
        columns = [c for c in examples if c != {"no_text": "prompt"}.get(name, "file")]
        pd.testing.assert_frame_equal(changed[columns], examples[columns])
    assert set(input_controls.change_inputs(examples, "no_image").file) == {""}
    assert set(input_controls.change_inputs(examples, "no_text").prompt) == {""}
    assert input_controls.change_inputs(examples, "none") is examples


def test_a_wrong_image_is_another_one_of_the_same_split_for_all_prompts_of_an_image():
    examples = table()
    wrong = input_controls.change_inputs(examples, "wrong_image")
    assert (wrong.file != examples.file).all()
    assert (wrong.groupby("image_id").file.nunique() == 1).all()
    split_of = examples.groupby("file").split.first()
    assert (split_of[wrong.file].to_numpy() == wrong.split).all()
    assert sorted(wrong.file.unique()) == sorted(examples.file.unique())
    one = examples[examples.split != "test"]
    lonely = pd.concat([one, examples[examples.image_id == examples.image_id.max()]])
    with pytest.raises(ValueError, match="second image in test"):
        input_controls.change_inputs(lonely, "wrong_image")


def test_shuffled_labels_are_the_same_labels_elsewhere():
    task = LabelledTask.of(table(), "category")
    shuffled = task.labels("shuffled")
    asked = task.true.mask_nc.numpy() > 0
    assert not asked.all()
    for rows in task.true.split.values():
        own, other = task.true.y_nc[rows].numpy(), shuffled.y_nc[rows].numpy()
        assert (own != other).any() and (own == other)[~asked[rows]].all()
        for c in range(4):  # a class is there as often as before, among those that are asked for it
            assert own[asked[rows, c], c].sum() == other[asked[rows, c], c].sum()
    assert not (task.labels("shuffled", 1).y_nc == shuffled.y_nc).all()


def test_the_control_task_of_captions_scores_known_captions_with_their_other_image():
    task = LabelledTask.of(table(200), "caption")
    control = task.labels("control_task")
    label = pd.Series(control.y_nc[:, 0].numpy()).groupby(task.prompts)
    assert (label.nunique() == 1).all() and 0.3 < label.first().mean() < 0.7
    known = set(task.prompts[control.split["train"].numpy()])
    original_train = set(task.true.split["train"].tolist())
    for split in ("validation", "test"):
        rows = control.split[split].numpy()
        assert set(task.prompts[rows]) <= known and set(rows.tolist()) <= original_train
        assert not set(rows) & set(control.split["train"].tolist())


def test_the_control_task_of_one_answer_is_a_function_of_the_question():
    rng = np.random.default_rng(0)
    examples = pd.DataFrame({"image_id": range(300), "split": np.repeat(["train", "validation", "test"], 100),
                             "task": "count", "prompt": [f"Number of {k % 12}:" for k in range(300)],
                             "labels": np.eye(4, dtype=int)[rng.integers(4, size=300)].tolist(),
                             "mask": [[1, 1, 1, 1]] * 300})
    examples = with_task_info(examples, "one_of", "1234")
    task = LabelledTask.of(examples, "count")
    control = task.labels("control_task")
    drawn = pd.DataFrame(control.y_nc.numpy()).groupby(task.prompts)
    assert (drawn.nunique() == 1).all(axis=None) and 0.2 < drawn.first().to_numpy().mean() < 0.8
    assert (control.mask_nc == task.true.mask_nc).all()  # every example counts
    assert set(control.split["test"].tolist()) < set(task.true.split["train"].tolist())


def test_the_control_task_of_categories_is_a_function_of_the_rarest_other_one():
    task = LabelledTask.of(table(), "category")
    control = task.labels("control_task")
    y, count = task.true.y_nc.numpy(), task.true.y_nc[task.true.split["train"]].sum(0).numpy()
    label: dict[tuple[int, int], set] = {}
    for i in range(len(y)):
        for c in range(4):
            others = [k for k in np.argsort(count, kind="stable") if y[i, k] and k != c]
            assert control.mask_nc[i, c] == (task.true.mask_nc[i, c] if others else 0)
            if others:
                label.setdefault((int(others[0]), c), set()).add(float(control.y_nc[i, c]))
    assert all(len(values) == 1 for values in label.values())
    assert {0.0, 1.0} == set.union(*label.values())
    assert all((control.split[name] == rows).all() for name, rows in task.true.split.items())


def test_the_control_task_says_nothing_about_the_truth():
    task, agree = LabelledTask.of(table(400), "category"), []
    for seed in range(40):
        control = task.labels("control_task", seed)
        counted = control.mask_nc.numpy() > 0
        truth, drawn = (t.numpy()[counted] for t in (task.true.y_nc, control.y_nc))
        agree.append(np.corrcoef(truth, drawn)[0, 1])
    assert abs(np.mean(agree)) < 0.06


def test_too_few_prompts_have_no_control_task():
    examples = table()
    examples["prompt"] = examples.prompt.where(examples.task != "caption", "the same")
    with pytest.raises(ValueError, match="at least 10 different prompts in training"):
        LabelledTask.of(examples, "caption").labels("control_task")


def test_prompts_that_hardly_come_back_have_no_control_task():
    examples = table()
    rows = np.flatnonzero(examples.task == "caption")
    examples.loc[rows[:-6], "prompt"] = [f"caption {k}" for k in rows[:-6]]
    with pytest.raises(ValueError, match="20 examples whose prompt is asked once more"):
        LabelledTask.of(examples, "caption").labels("control_task")


def test_a_category_that_has_one_answer_in_training_is_not_scored():
    examples = table()
    rows = np.flatnonzero((examples.task == "category") & (examples.split == "train"))
    for k in rows:
        examples.at[k, "labels"] = [1, *examples.labels[k][1:3], 0]
    task = LabelledTask.of(examples, "category")
    assert (task.true.mask_nc.amax(0) == np.array([0, 1, 1, 0])).all()
    for k in rows:
        examples.at[k, "labels"] = [1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"task category has no category with both answers.*more categories"):
        LabelledTask.of(examples, "category")


def test_baselines_are_the_shares_of_the_training_labels():
    y = np.array([[1, 0], [1, 1], [0, 1], [1, 1]])
    mask = np.array([[1, 1], [1, 0], [1, 0], [1, 0]])
    assert np.allclose(controls.baseline("majority", y, mask, 3), 3 / 5)
    assert np.allclose(controls.baseline("name_alone", y, mask, 3), [[3 / 4, 0]] * 3)


def test_word_order_tells_what_a_bag_of_words_cannot():
    y, train = np.arange(200) % 2, np.arange(200) < 100
    prompts = np.array([f"is {k // 2} the {'dog on a cat' if k % 2 else 'cat on a dog'}" for k in range(200)])
    right = {name: ((controls.bag_of_words(prompts, y, train, longest) >= 0.5) == y)[~train].mean()
             for name, longest in controls.TEXT_BASELINES.items()}
    assert right == {"bag_of_words": 0.5, "word_order": 1.0}


def test_unknown_controls_are_named():
    with pytest.raises(ValueError, match=r"unknown controls .'no_picture'"):
        controls.check_controls(["no_picture"])
