import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from probekit.logreg import solve


def features(kind, n=300, d=40):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d))
    if kind == "collinear":
        x[:, d // 2 :] = x[:, : d // 2] + 1e-3 * rng.normal(size=(n, d // 2))
    if kind == "wide":
        x = rng.normal(size=(60, 200))
    if kind == "constant":
        x[:, 3] = 0
    score = x @ rng.normal(size=x.shape[1]) / x.shape[1] ** 0.5 * 2
    y = score > 0 if kind == "separable" else score + rng.normal(size=len(x)) > 0
    return x.astype(np.float32), y.astype(np.float32)


def objective(x, y, w, b, c):
    z = x.astype(float) @ w + b
    return np.mean(np.logaddexp(0, z) - y * z) + np.sum(w**2) / (2 * c * len(x))


@pytest.mark.parametrize("kind", ["easy", "separable", "collinear", "constant", "wide"])
def test_every_strength_reaches_the_optimum_of_scikit_learn(kind):
    x, y = features(kind)
    strengths = [1e-4, 1e-2, 1.0]
    many = [torch.from_numpy(a).repeat(len(strengths), 1).T.contiguous() for a in (y, np.ones_like(y))]
    solution = solve(torch.from_numpy(x), *many, torch.tensor(strengths))
    assert bool(solution.converged_p.all())
    ours = solution.logits(torch.from_numpy(x)).sigmoid().numpy()
    for k, c in enumerate(strengths):
        reference = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(x.astype(float), y)
        best = objective(x, y, reference.coef_[0], reference.intercept_[0], c)
        mine = objective(x, y, solution.weight_dp[:, k].double().numpy(), float(solution.intercept_p[k]), c)
        assert mine <= best * (1 + 1e-4)
        np.testing.assert_allclose(ours[:, k], reference.predict_proba(x)[:, 1], atol=1e-3)


def test_each_class_is_fitted_on_its_own_examples_alone():
    x, y = features("easy")
    rng = np.random.default_rng(1)
    labels = np.stack([y, 1 - y, y], 1)
    mask = (rng.random(labels.shape) < 0.4).astype(np.float32)
    solution = solve(*map(torch.from_numpy, (x, labels, mask)), torch.full((3,), 0.1))
    for k in range(3):
        rows = mask[:, k] == 1
        reference = LogisticRegression(C=0.1, tol=1e-9, max_iter=10_000).fit(x[rows].astype(float), labels[rows, k])
        p = solution.logits(torch.from_numpy(x))[:, k].sigmoid().numpy()
        np.testing.assert_allclose(p, reference.predict_proba(x)[:, 1], atol=1e-3)


def test_one_kind_of_label_gives_that_label_and_none_gives_one_half():
    x, _ = features("easy")
    y = torch.tensor([0.0, 1.0, 0.0]).repeat(len(x), 1)
    mask = torch.tensor([1.0, 1.0, 0.0]).repeat(len(x), 1)
    solution = solve(torch.from_numpy(x), y, mask, torch.ones(3))
    p = solution.logits(torch.from_numpy(x)).sigmoid()
    assert bool((p[:, 0] < 0.01).all()) and bool((p[:, 1] > 0.99).all()) and bool((p[:, 2] == 0.5).all())


def test_the_seed_of_the_start_does_not_change_the_answer():
    x, y = features("easy")
    y = torch.from_numpy(y)[:, None]
    a, b = (solve(torch.from_numpy(x), y, torch.ones_like(y), torch.ones(1), seeds=(s,)).weight_dp for s in (0, 1))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)


def test_what_did_not_converge_is_said():
    x, y = features("easy")
    y = torch.from_numpy(y)[:, None]
    assert not bool(solve(torch.from_numpy(x), y, torch.ones_like(y), torch.ones(1), steps=1).converged_p.any())
