import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from probekit.probes.logreg import solve


def features(kind, n=300, d=40):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d))
    if kind == "collinear":
        x[:, d // 2 :] = x[:, : d // 2] + 1e-3 * rng.normal(size=(n, d // 2))
    if kind == "wide":
        x = rng.normal(size=(60, 200))
    if kind == "tiny":
        x = rng.normal(size=(4, 3))
    if kind == "constant":
        x[:, 3] = 0
    score = x @ rng.normal(size=x.shape[1]) / x.shape[1] ** 0.5 * 2
    y = score > 0 if kind == "separable" else score + rng.normal(size=len(x)) > 0
    return x.astype(np.float32), y.astype(np.float32)


def objective(x, y, w, b, c):
    z = x.astype(float) @ w + b
    return np.mean(np.logaddexp(0, z) - y * z) + np.sum(w**2) / (2 * c * len(x))


def column(values):
    return torch.from_numpy(np.asarray(values, np.float32))[:, None]


@pytest.mark.parametrize("kind", ["easy", "separable", "collinear", "constant", "wide", "tiny"])
def test_every_strength_reaches_the_optimum_of_scikit_learn(kind):
    x, y = features(kind)
    strengths = [1e-4, 1e-2, 1.0]
    solution = solve(torch.from_numpy(x)[None], column(y), torch.ones(len(y), 1), strengths)
    assert bool(solution.converged_lsk.all())
    ours = solution.logits(torch.from_numpy(x)[None]).sigmoid().numpy()[0, :, :, 0]
    for k, c in enumerate(strengths):
        reference = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(x.astype(float), y)
        best = objective(x, y, reference.coef_[0], reference.intercept_[0], c)
        weight, intercept = solution.weight_ldsk[0, :, k, 0].double().numpy(), float(solution.intercept_lsk[0, k, 0])
        assert objective(x, y, weight, intercept, c) <= best * (1 + 1e-4)
        np.testing.assert_allclose(ours[:, k], reference.predict_proba(x)[:, 1], atol=1e-3)
        np.testing.assert_allclose(weight, reference.coef_[0], atol=2e-3 * np.abs(reference.coef_).max() + 1e-6)


def test_layers_strengths_and_columns_together_are_each_alone():
    """Whatever is solved beside a problem, in however small groups, its probabilities stay."""
    kinds = [features(kind) for kind in ("easy", "separable", "collinear")]
    x = torch.from_numpy(np.stack([x for x, _ in kinds]))
    rng = np.random.default_rng(3)
    y = torch.cat([column(y) for _, y in kinds], 1)
    mask = torch.from_numpy((rng.random(y.shape) < 0.7).astype(np.float32))
    strengths = [1e-3, 1.0]
    together = solve(x, y, mask, strengths).logits(x).sigmoid()
    torch.testing.assert_close(solve(x, y, mask, strengths, memory_gb=1e-5).logits(x).sigmoid(), together, atol=5e-4,
                               rtol=0)
    for layer in range(3):
        for s, c in enumerate(strengths):
            for k in range(3):
                alone = solve(x[[layer]], y[:, [k]], mask[:, [k]], [c]).logits(x[[layer]]).sigmoid()
                torch.testing.assert_close(alone[0, :, 0, 0], together[layer, :, s, k], atol=5e-4, rtol=0)


def test_parts_of_a_solution_are_its_columns_and_strengths():
    x, y = features("easy")
    x = torch.from_numpy(np.stack([x, 2 * x]))
    labels = torch.cat([column(y), 1 - column(y)], 1)
    solution = solve(x, labels, torch.ones_like(labels), [1e-3, 1.0])
    whole = solution.logits(x)
    torch.testing.assert_close(solution.columns(slice(1, 2)).logits(x), whole[..., 1:])
    picked = solution.at(torch.tensor([1, 0])).logits(x)
    torch.testing.assert_close(picked[:, :, 0], torch.stack([whole[0, :, 1], whole[1, :, 0]]))


def test_each_class_is_fitted_on_its_own_examples_alone():
    x, y = features("easy")
    rng = np.random.default_rng(1)
    labels = np.stack([y, 1 - y, y], 1)
    mask = (rng.random(labels.shape) < 0.4).astype(np.float32)
    x_lnd = torch.from_numpy(x)[None]
    p_nk = solve(x_lnd, torch.from_numpy(labels), torch.from_numpy(mask), [0.1]).logits(x_lnd)[0, :, 0].sigmoid()
    for k in range(3):
        rows = mask[:, k] == 1
        reference = LogisticRegression(C=0.1, tol=1e-9, max_iter=10_000).fit(x[rows].astype(float), labels[rows, k])
        np.testing.assert_allclose(p_nk[:, k], reference.predict_proba(x)[:, 1], atol=1e-3)


def test_one_kind_of_label_is_expected_again_but_not_for_certain():
    x, _ = features("easy")
    y = torch.tensor([0.0, 1.0, 0.0]).repeat(len(x), 1)
    mask = torch.tensor([1.0, 1.0, 0.0]).repeat(len(x), 1)
    solution = solve(torch.from_numpy(x)[None], y, mask, [1.0])
    p = solution.logits(torch.from_numpy(x)[None])[0, :, 0].sigmoid()
    n = len(x)
    np.testing.assert_allclose(p, np.tile([1 / (n + 2), (n + 1) / (n + 2), 0.5], (n, 1)), rtol=1e-4)


def test_the_seed_of_the_start_does_not_change_the_answer():
    x, y = features("easy")
    a, b = (solve(torch.from_numpy(x)[None], column(y), torch.ones(len(y), 1), [1.0], seed=s).weight_ldsk
            for s in (0, 1))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)
    assert not torch.equal(a, b)  # it did start elsewhere


def test_what_did_not_converge_is_said():
    x, y = features("easy")
    found = solve(torch.from_numpy(x)[None], column(y), torch.ones(len(y), 1), [1.0], steps=1)
    assert not bool(found.converged_lsk.any())


def test_copies_of_features_and_hardly_any_regularisation_do_not_stop_it():
    x, y = features("easy", n=2000)
    x = np.concatenate([x, x, x[:, :5] * 1e-3], 1)
    solution = solve(torch.from_numpy(x)[None], column(y), torch.ones(len(y), 1), [1e3, 1e5])
    assert bool(solution.converged_lsk.all())
    reference = LogisticRegression(C=1e3, tol=1e-9, max_iter=10_000).fit(x.astype(float), y).predict_proba(x)[:, 1]
    np.testing.assert_allclose(solution.logits(torch.from_numpy(x)[None])[0, :, 0, 0].sigmoid(), reference, atol=1e-3)
