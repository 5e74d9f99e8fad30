from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from probekit.probes import logreg
from probekit.probes.adam import AdamSettings, train_adam
from probekit.probes.codelength import online_codelength
from probekit.probes.fitting import FittedProbes, fit_adam, fit_logreg, fit_mean_difference
from probekit.probes.labels import LabelledTask, LabelSet
from probekit.probes.weights import ProbeWeights

N = 160
D = 6
LAYERS = ["lm.00", "lm.01", "lm.02"]
CLASSES = ["cat", "dog"]
STRENGTHS = [1e-3, 0.1, 10.0]
SPLIT = {
    "train": torch.arange(80),
    "validation": torch.arange(80, 120),
    "test": torch.arange(120, N),
}


@pytest.fixture(scope="module")
def x_lnd():
    """States (l, n, d) of other means and scales in each layer."""
    rng = np.random.default_rng(0)
    x_lnd = rng.normal(size=(len(LAYERS), N, D)) * rng.uniform(0.5, 5, (len(LAYERS), 1, D)) + 3
    return torch.from_numpy(x_lnd.astype(np.float32))


@pytest.fixture(scope="module")
def task(x_lnd):
    """A task whose labels the second layer carries; a tenth of the entries does not count."""
    rng = np.random.default_rng(1)
    x_nd = (x_lnd[1] - x_lnd[1].mean(0)) / x_lnd[1].std(0)
    score_nc = x_nd.numpy() @ rng.normal(size=(D, 2)) + rng.normal(size=(N, 2))
    true = LabelSet(
        name="none",
        kind="multilabel",
        classes=CLASSES,
        image_n=np.arange(N),
        y_nc=torch.from_numpy((score_nc > 0).astype(np.float32)),
        mask_nc=torch.from_numpy((rng.random((N, 2)) < 0.9).astype(np.float32)),
        split=SPLIT,
    )
    return LabelledTask(
        name="category",
        rows=np.arange(N),
        prompts=np.array(["which?"] * N),
        split_n=np.repeat(["train", "validation", "test"], [80, 40, 40]),
        true=true,
    )


@pytest.fixture(scope="module")
def control(task):
    """Other labels, that train on every second training example and validate on the others."""
    split = SPLIT | {"train": SPLIT["train"][::2], "validation": SPLIT["train"][1::2]}
    y_nc = task.true.y_nc[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    return replace(task.true, name="control_task", y_nc=y_nc, split=split)


def fit(x_lnd, task, label_sets, **options):
    return fit_logreg(
        x_lnd,
        task,
        label_sets=label_sets,
        strengths=STRENGTHS,
        layers=LAYERS,
        memory_gb=1.0,
        **options,
    )


@pytest.fixture(scope="module")
def fitted(x_lnd, task, control):
    return fit(x_lnd, task, [task.true, control])


def test_each_set_of_labels_takes_its_examples_and_its_best_strength(fitted, x_lnd, task, control):
    """As scikit-learn does it class by class, on features standardised as the task's are."""
    train = SPLIT["train"]
    for probes, labels in zip(fitted, [task.true, control], strict=True):
        rows = labels.split["validation"]
        for layer in range(len(LAYERS)):
            part = x_lnd[layer, train]
            x_nd = ((x_lnd[layer] - part.mean(0)) / part.std(0, correction=0)).double().numpy()
            losses = []
            p = []
            for strength in STRENGTHS:
                p_nc = np.empty((N, 2))
                for c in range(2):
                    counts = labels.mask_nc[labels.split["train"], c] == 1
                    counting_rows = labels.split["train"][counts].numpy()
                    model = LogisticRegression(C=strength, tol=1e-9, max_iter=10_000)
                    model.fit(x_nd[counting_rows], labels.y_nc[counting_rows, c])
                    p_nc[:, c] = model.predict_proba(x_nd)[:, 1]
                label_nc = labels.y_nc[rows].bool().numpy()
                p_of_label = np.where(label_nc, p_nc[rows], 1 - p_nc[rows])
                losses.append(-(np.log(p_of_label) * labels.mask_nc[rows].numpy()).sum())
                p.append(p_nc)
            best = int(np.argmin(losses))
            assert probes.strengths.strength[layer] == STRENGTHS[best]
            for split in ("validation", "test"):
                expected = p[best][labels.split[split]]
                np.testing.assert_allclose(probes.probabilities[split][layer], expected, atol=1e-3)
    assert fitted[0].strengths.layer.tolist() == LAYERS
    assert (fitted[0].strengths.gradient_norm <= logreg.TOLERANCE).all()


def test_the_weights_are_those_of_the_true_labels_probes(fitted, x_lnd, task):
    assert list(fitted[0].weights) == LAYERS
    assert not fitted[1].weights
    weights = ProbeWeights.concatenate(list(fitted[0].weights.values()))
    assert weights.learnable_classes.tolist() == [0, 1]
    for layer in range(len(LAYERS)):
        x_nd = x_lnd[layer, SPLIT["test"]].numpy()
        logits_nc = weights.logits_on(layer, x_nd)[layer]
        expected = fitted[0].probabilities["test"][layer]
        np.testing.assert_allclose(logits_nc.sigmoid(), expected, atol=1e-5)


def test_a_class_without_both_labels_has_no_weights(x_lnd, task):
    y_nc = task.true.y_nc.clone()
    y_nc[:, 0] = 1
    labels = replace(task.true, y_nc=y_nc)
    probes = fit(x_lnd, replace(task, true=labels), [labels])[0]
    weights = ProbeWeights.concatenate(list(probes.weights.values()))
    assert weights.learnable_classes.tolist() == [1]


def test_groups_of_layers_are_put_back_together(fitted, x_lnd, task):
    whole = fit(x_lnd, task, [task.true], measure_codelength=True)[0]
    parts = []
    for layers in (slice(0, 1), slice(1, 3)):
        parts.extend(
            fit_logreg(
                x_lnd[layers],
                task,
                label_sets=[task.true],
                strengths=STRENGTHS,
                layers=LAYERS[layers],
                memory_gb=1.0,
                measure_codelength=True,
            )
        )
    together = FittedProbes.concatenate(parts)
    for split in ("validation", "test"):
        np.testing.assert_allclose(
            together.probabilities[split], whole.probabilities[split], atol=1e-3
        )
    assert together.strengths.layer.tolist() == LAYERS
    assert list(together.weights) == LAYERS
    np.testing.assert_allclose(together.bits_ln, whole.bits_ln, atol=5e-2)
    assert fitted[0].bits_ln is None


def test_the_codelength_is_that_of_standardised_states(x_lnd, task):
    probes = fit(x_lnd, task, [task.true], measure_codelength=True)[0]
    mean_ld, scale_ld = logreg.feature_spread(x_lnd[:, SPLIT["train"]])
    standardised_lnd = (x_lnd - mean_ld[:, None]) / scale_ld[:, None]
    bits_ln = online_codelength(
        logreg.Features(standardised_lnd, SPLIT["train"]),
        task.true,
        strengths=STRENGTHS,
        memory_gb=1.0,
    )
    np.testing.assert_array_equal(probes.bits_ln, bits_ln)


def test_the_worst_problem_that_did_not_converge_is_named(x_lnd, task, control, monkeypatch):
    choose = logreg.choose_logreg

    def leave_one_unconverged(*arguments, **options):
        choice = choose(*arguments, **options)
        choice.solution.converged_lsk[1, 1, 1] = False
        choice.solution.gradient_norm_lsk[1, 1, 1] = 0.5
        choice.strength_ls[1, 1] = 2
        return choice

    monkeypatch.setattr(logreg, "choose_logreg", leave_one_unconverged)
    message = (
        r"in 1 of 18 problems; the worst: category, lm\.01, control task, class 'dog', C=10, "
        r"gradient norm 5\.0e-01"
    )
    with pytest.warns(UserWarning, match=message):
        fit(x_lnd, task, [task.true, control, task.true])


def test_adam_probes_of_several_sets_are_those_of_each_alone(x_lnd, task, control):
    settings = AdamSettings(epochs=2, hidden=4)
    label_sets = [task.true, control, task.true]
    seeds = [3, 3, 5]
    fitted = fit_adam(x_lnd, label_sets, seeds=seeds, settings=settings, layers=LAYERS)
    for probes, labels, seed in zip(fitted, label_sets, seeds, strict=True):
        alone = train_adam(
            x_lnd,
            labels.y_nc,
            mask_snc=labels.mask_nc,
            train=labels.split["train"],
            validation=labels.split["validation"],
            kind="multilabel",
            seeds=(seed,),
            settings=settings,
        )
        for split in ("validation", "test"):
            expected = alone.probabilities(x_lnd[:, labels.split[split]])[:, 0]
            np.testing.assert_allclose(probes.probabilities[split], expected, atol=1e-6)
        losses = probes.losses.set_index(["layer", "epoch", "split"]).loss
        assert set(probes.losses.seed) == {seed}
        assert losses["lm.01", 2, "validation"] == pytest.approx(float(alone.losses[1, 0, 1, 1]))
        assert losses["lm.02", 1, "train"] == pytest.approx(float(alone.losses[2, 0, 0, 0]))
        assert len(losses) == len(LAYERS) * 2 * 2
    assert isinstance(fitted[0].strengths, pd.DataFrame)
    assert fitted[0].strengths.empty


def test_mean_differences_are_those_of_the_counting_examples(x_lnd, task):
    control = task.labels("shuffled", 0)
    label_sets = [task.true, control]
    fitted = fit_mean_difference(x_lnd, task, label_sets=label_sets, layers=LAYERS)
    for labels, probes in zip(label_sets, fitted, strict=True):
        train = labels.split["train"]
        for layer in range(len(LAYERS)):
            x_nd = x_lnd[layer].double()
            for c in range(2):
                counts_n = labels.mask_nc[train, c] > 0
                yes_n = labels.y_nc[train, c] > 0
                yes_nd = x_nd[train][counts_n & yes_n]
                no_nd = x_nd[train][counts_n & ~yes_n]
                delta_d = yes_nd.mean(0) - no_nd.mean(0)
                within_n = torch.cat([yes_nd - yes_nd.mean(0), no_nd - no_nd.mean(0)]) @ delta_d
                middle_d = (yes_nd.mean(0) + no_nd.mean(0)) / 2
                logits_n = (
                    (x_nd - middle_d) @ delta_d * (delta_d @ delta_d) / within_n.var(correction=0)
                )
                for split in ("validation", "test"):
                    np.testing.assert_allclose(
                        probes.probabilities[split][layer, :, c],
                        logits_n[labels.split[split]].sigmoid(),
                        atol=1e-4,
                    )
    weights = fitted[0].weights[LAYERS[1]]
    logits_nc = weights.logits_on(0, x_lnd[1, SPLIT["test"]].numpy())[0]
    np.testing.assert_allclose(logits_nc.sigmoid(), fitted[0].probabilities["test"][1], atol=1e-5)
    assert not fitted[1].weights


def test_a_class_without_both_labels_has_no_mean_difference(x_lnd, task):
    y_nc = task.true.y_nc.clone()
    y_nc[:, 0] = 1
    labels = replace(task.true, y_nc=y_nc)
    one_sided = replace(task, true=labels)
    (probes,) = fit_mean_difference(x_lnd, one_sided, label_sets=[labels], layers=LAYERS)
    weights = ProbeWeights.concatenate(list(probes.weights.values()))
    assert weights.learnable_classes.tolist() == [1]
    np.testing.assert_array_equal(probes.probabilities["test"][..., 0], 0.5)
