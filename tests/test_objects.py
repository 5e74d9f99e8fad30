from collections import Counter

import numpy as np
import pytest

from probekit import coco, controls, objects, scenes, tasks


def shows(n=600, c=20, seed=0):
    """Objects in pairs that go together, from frequent to rare; each image shows some and lacks some."""
    rng = np.random.default_rng(seed)
    chance = np.repeat(np.geomspace(0.6, 0.02, c // 2), 2)
    first = rng.random((n, c // 2)) < chance[::2]
    both = np.repeat(first, 2, axis=1) & (rng.random((n, c)) < 0.8)
    both[~both.any(1), 0] = True
    return both


@pytest.mark.parametrize("absent", objects.SAMPLINGS)
def test_every_object_is_asked_as_often_there_as_not(absent):
    there = shows()
    present, missing = objects.asked(there, absent, np.random.default_rng(1))
    rows = np.arange(len(there))
    assert there[rows, present].all() and not there[rows, missing].any()
    assert Counter(present.tolist()) == Counter(missing.tolist())


def test_samplings_are_what_they_say():
    there = shows()
    often, rng = there.mean(0), np.random.default_rng(1)
    together = there.T.astype(float) @ there / there.sum(0)
    rate, close = {}, {}
    for absent in objects.SAMPLINGS:
        _, missing = objects.asked(there, absent, rng)
        rate[absent] = often[missing].mean()
        close[absent] = np.mean([together[k, there[i]].max() for i, k in enumerate(missing)])
    assert rate["popular"] > 1.1 * rate["random"]
    assert close["adversarial"] > close["popular"] + 0.05
    with pytest.raises(ValueError, match="take one of random, popular, adversarial"):
        objects.asked(there, "rare", rng)


@pytest.mark.parametrize("name", ["object", "object_popular", "object_adversarial"])
def test_the_name_alone_is_at_chance(name, tmp_path):
    folder = scenes.write(tmp_path / "scenes", n=300, seed=3)
    chosen = tasks.choose(tasks.Build(str(folder), train=180, validation=60, test=60), coco.read(folder))[0]
    rows = tasks.TASKS[name].build(chosen, np.random.default_rng(0))
    y, train = np.array([labels[0] for labels in rows.labels]), (rows.split == "train").to_numpy()
    right = (controls.bag_of_words(rows.prompt.to_numpy(), y, train) >= 0.5) == y
    assert abs(right[~train].mean() - 0.5) <= 3 * (0.25 / (~train).sum()) ** 0.5
    listed = rows.prompt.iloc[0].partition(".\n")[0].removeprefix("Objects: ").split(", ")
    assert sorted(listed) == sorted(chosen.shows_nc.columns)
    assert rows.prompt.iloc[0].partition(".")[0] != rows.prompt.iloc[1].partition(".")[0]  # shuffled for each image
