import numpy as np
import pytest
import torch

from probekit.probes import codelength
from probekit.probes.labels import LabelSet


def study(strength, n=600, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, (n, 1)).astype(np.float32)
    x = rng.normal(size=(1, n, 5)).astype(np.float32)
    x[0, :, 0] += strength * (2 * y[:, 0] - 1)
    parts = {"train": torch.arange(n // 2), "validation": torch.arange(n // 2, 3 * n // 4),
             "test": torch.arange(3 * n // 4, n)}
    image = np.repeat(np.arange(n // 2), 2)
    return torch.from_numpy(x), LabelSet("none", "binary", ["match"], image, torch.from_numpy(y),
                                       torch.ones(n, 1), parts)


def bits(strength):
    x, labels = study(strength)
    table = codelength.table(codelength.online(x, labels, [0.01, 1.0], 1.0), labels, ["lm.00"], 200)
    return table.set_index("metric").loc["codelength"]


def test_noise_costs_a_bit_a_label_and_a_signal_less():
    noise, weak, clear = bits(0), bits(1), bits(3)
    assert 0.97 < noise.value < 1.15 and 0.3 < weak.value < 0.8 and clear.value < 0.2
    assert weak.lo < weak.value < weak.hi and weak.n == 300


def test_an_image_is_in_one_block_and_every_example_in_one():
    image = np.repeat(np.arange(1000), 3)
    parts = codelength.blocks(image, 0)
    assert sorted(np.concatenate(parts)) == list(range(3000))
    assert all(not set(image[a]) & set(image[b]) for i, a in enumerate(parts) for b in parts[:i])
    ends = np.cumsum([len(part) for part in parts])
    assert ends[-1] == 3000 and ends[-2] == 1500 and ends[-3] == 750 and ends[0] == 24  # 8 images


def test_it_is_the_sum_over_blocks_of_what_probes_trained_before_them_say():
    x, labels = study(1.0, 64)
    found = codelength.online(x, labels, [0.1], 1.0)
    parts = codelength.blocks(labels.image_n[labels.split["train"].numpy()], 0)
    assert (found[0, parts[0]] == 1).all()
    from sklearn.linear_model import LogisticRegression

    y = labels.y_nc[:, 0].numpy()
    for k in range(1, len(parts)):
        known = np.concatenate(parts[:k])
        p = LogisticRegression(C=0.1, tol=1e-8).fit(x[0, known], y[known]).predict_proba(x[0, parts[k]])
        wanted = -np.log2(p[np.arange(len(p)), y[parts[k]].astype(int)])
        assert found[0, parts[k]] == pytest.approx(wanted, abs=2e-3)


def test_many_rare_classes_of_noise_cost_about_a_bit_a_label_too():
    rng = np.random.default_rng(1)
    n, c = 800, 40
    labels = LabelSet("none", "multilabel", [str(k) for k in range(c)], np.arange(n),
                    torch.from_numpy(rng.integers(0, 2, (n, c)).astype(np.float32)),
                    torch.from_numpy((rng.random((n, c)) < 0.075).astype(np.float32)),  # three an image
                    {"train": torch.arange(500), "validation": torch.arange(500, 650), "test": torch.arange(650, n)})
    x = torch.from_numpy(rng.normal(size=(1, n, 6)).astype(np.float32))
    bits = codelength.online(x, labels, [1e-3, 0.1], 1.0)
    assert 0.95 < bits.sum() / float(labels.mask_nc[:500].sum()) < 1.12
