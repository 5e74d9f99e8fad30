import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from probekit.probes import logreg
from probekit.probes.codelength import codelength_table, image_blocks, online_codelength
from probekit.probes.labels import LabelSet


def planted(signal, n=600, seed=0):
    """States of one layer, whose first feature carries the label; two examples per image."""
    rng = np.random.default_rng(seed)
    y_nc = rng.integers(0, 2, (n, 1)).astype(np.float32)
    x_lnd = rng.normal(size=(1, n, 5)).astype(np.float32)
    x_lnd[0, :, 0] += signal * (2 * y_nc[:, 0] - 1)
    labels = LabelSet(
        name="none",
        kind="binary",
        classes=["match"],
        image_n=np.repeat(np.arange(n // 2), 2),
        y_nc=torch.from_numpy(y_nc),
        mask_nc=torch.ones(n, 1),
        split={
            "train": torch.arange(n // 2),
            "validation": torch.arange(n // 2, 3 * n // 4),
            "test": torch.arange(3 * n // 4, n),
        },
    )
    return torch.from_numpy(x_lnd), labels


def measure(signal):
    x_lnd, labels = planted(signal)
    bits_ln = online_codelength(
        logreg.Features(x_lnd), labels, strengths=[0.01, 1.0], memory_gb=1.0
    )
    table = codelength_table(bits_ln, labels, layers=["lm.00"], resamples=200)
    return table.set_index("metric")


def test_noise_costs_a_bit_per_label_and_a_signal_less():
    noise = measure(0).loc["codelength"]
    weak = measure(1).loc["codelength"]
    clear = measure(3).loc["codelength"]
    assert 0.97 < noise.value < 1.15
    assert 0.3 < weak.value < 0.8
    assert clear.value < 0.2
    assert weak.lo < weak.value < weak.hi
    assert weak.n == 300


def test_compression_is_one_over_the_codelength():
    rows = measure(1)
    codelength = rows.loc["codelength", ["value", "lo", "hi"]].astype(float)
    compression = rows.loc["compression", ["value", "hi", "lo"]].astype(float)
    np.testing.assert_allclose(compression.to_numpy(), 1 / codelength.to_numpy())


def test_an_image_is_in_one_block_and_every_example_in_one():
    image_n = np.repeat(np.arange(1000), 3)
    blocks = image_blocks(image_n, seed=0)
    assert sorted(np.concatenate(blocks)) == list(range(3000))
    images_of_blocks = [set(image_n[block]) for block in blocks]
    assert sum(len(images) for images in images_of_blocks) == 1000
    ends = np.cumsum([len(block) for block in blocks])
    assert ends[0] == 24  # 8 images, the smallest portion that is taken
    assert ends[-3:].tolist() == [750, 1500, 3000]
    again = image_blocks(image_n, seed=1)
    assert set(image_n[again[0]]) != images_of_blocks[0]


def test_few_images_still_make_blocks():
    for images in (1, 3, 8, 9):
        blocks = image_blocks(np.repeat(np.arange(images), 2))
        assert sorted(np.concatenate(blocks)) == list(range(2 * images))


def test_a_block_costs_the_log_loss_of_the_probe_trained_on_the_blocks_before_it():
    x_lnd, labels = planted(1.0, n=160)
    bits_ln = online_codelength(logreg.Features(x_lnd), labels, strengths=[0.1], memory_gb=1.0)
    train = labels.split["train"].numpy()
    blocks = image_blocks(labels.image_n[train])
    assert len(blocks) > 2
    assert (bits_ln[0, blocks[0]] == 1).all()
    x_nd = x_lnd[0, train].numpy()
    y_n = labels.y_nc[train, 0].numpy().astype(int)
    for k in range(1, len(blocks)):
        before = np.concatenate(blocks[:k])
        probe = LogisticRegression(C=0.1, tol=1e-8).fit(x_nd[before], y_n[before])
        p_nc = probe.predict_proba(x_nd[blocks[k]])
        p_of_label = p_nc[np.arange(len(p_nc)), y_n[blocks[k]]]
        assert bits_ln[0, blocks[k]] == pytest.approx(-np.log2(p_of_label), abs=2e-3)


def test_the_strength_is_the_one_with_the_lowest_validation_loss():
    """With labels that only validation inverts, the weakest probe has the lowest loss."""
    x_lnd, labels = planted(1.0)
    labels.y_nc[labels.split["validation"]] = 1 - labels.y_nc[labels.split["validation"]]
    both = online_codelength(logreg.Features(x_lnd), labels, strengths=[1e-3, 1.0], memory_gb=1.0)
    weakest = online_codelength(logreg.Features(x_lnd), labels, strengths=[1e-3], memory_gb=1.0)
    np.testing.assert_allclose(both, weakest, atol=5e-3)


def test_many_rare_classes_of_noise_cost_about_a_bit_per_label_too():
    rng = np.random.default_rng(1)
    n = 800
    c = 40
    y_nc = rng.integers(0, 2, (n, c)).astype(np.float32)
    mask_nc = (rng.random((n, c)) < 0.075).astype(np.float32)  # three per image
    labels = LabelSet(
        name="none",
        kind="multilabel",
        classes=[str(k) for k in range(c)],
        image_n=np.arange(n),
        y_nc=torch.from_numpy(y_nc),
        mask_nc=torch.from_numpy(mask_nc),
        split={
            "train": torch.arange(500),
            "validation": torch.arange(500, 650),
            "test": torch.arange(650, n),
        },
    )
    x_lnd = torch.from_numpy(rng.normal(size=(1, n, 6)).astype(np.float32))
    bits_ln = online_codelength(
        logreg.Features(x_lnd), labels, strengths=[1e-3, 0.1], memory_gb=1.0
    )
    assert 0.95 < bits_ln.sum() / mask_nc[:500].sum() < 1.12


def test_probes_that_do_not_converge_are_counted(monkeypatch):
    choose = logreg.choose_logreg

    def stop_early(*arguments, **options):
        return choose(*arguments, **options, max_steps=1)

    monkeypatch.setattr(logreg, "choose_logreg", stop_early)
    x_lnd, labels = planted(1.0, n=64)
    with pytest.warns(UserWarning, match=r"1 of 1 probes of the codelength did not converge"):
        online_codelength(logreg.Features(x_lnd), labels, strengths=[1.0, 100.0], memory_gb=1.0)
