import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from probekit.probes.logreg import feature_spread, solve_logreg


def problem(kind, n=300, d=40):
    """Features (n, d) and labels (n,)."""
    rng = np.random.default_rng(0)
    x_nd = rng.normal(size=(n, d))
    if kind == "collinear":
        x_nd[:, d // 2 :] = x_nd[:, : d // 2] + 1e-3 * rng.normal(size=(n, d // 2))
    if kind == "wide":
        x_nd = rng.normal(size=(60, 200))
    if kind == "tiny":
        x_nd = rng.normal(size=(4, 3))
    if kind == "constant":
        x_nd[:, 3] = 0
    score_n = 2 * x_nd @ rng.normal(size=x_nd.shape[1]) / x_nd.shape[1] ** 0.5
    noise_scale = 0 if kind == "separable" else 1
    y_n = score_n + noise_scale * rng.normal(size=len(x_nd)) > 0
    return x_nd.astype(np.float32), y_n.astype(np.float32)


def as_layer(x_nd):
    return torch.from_numpy(x_nd)[None]


def as_column(values):
    return torch.from_numpy(np.asarray(values, np.float32))[:, None]


def solve_one(x_nd, y_n, strengths, **options):
    """The solution of one layer and column in which everything counts."""
    mask_nk = torch.ones(len(y_n), 1)
    return solve_logreg(
        as_layer(x_nd), as_column(y_n), mask_nk=mask_nk, strengths=strengths, **options
    )


def reference(x_nd, y_n, strength):
    model = LogisticRegression(C=strength, tol=1e-9, max_iter=10_000)
    return model.fit(x_nd.astype(float), y_n)


def objective(x_nd, y_n, *, weight, intercept, strength):
    logit_n = x_nd.astype(float) @ weight + intercept
    loss = np.mean(np.logaddexp(0, logit_n) - y_n * logit_n)
    return loss + np.sum(weight**2) / (2 * strength * len(x_nd))


@pytest.mark.parametrize("kind", ["easy", "separable", "collinear", "constant", "wide", "tiny"])
def test_every_strength_reaches_the_optimum_of_scikit_learn(kind):
    x_nd, y_n = problem(kind)
    strengths = [1e-4, 1e-2, 1.0]
    solution = solve_one(x_nd, y_n, strengths)
    assert solution.converged_lsk.all()
    assert (solution.gradient_norm_lsk <= 1e-5).all()
    p_ns = solution.logits(as_layer(x_nd)).sigmoid().numpy()[0, :, :, 0]
    for s, strength in enumerate(strengths):
        model = reference(x_nd, y_n, strength)
        best = objective(
            x_nd,
            y_n,
            weight=model.coef_[0],
            intercept=model.intercept_[0],
            strength=strength,
        )
        weight = solution.weight_ldsk[0, :, s, 0].double().numpy()
        intercept = float(solution.intercept_lsk[0, s, 0])
        reached = objective(x_nd, y_n, weight=weight, intercept=intercept, strength=strength)
        assert reached <= best * (1 + 1e-4)
        np.testing.assert_allclose(p_ns[:, s], model.predict_proba(x_nd)[:, 1], atol=1e-3)
        tolerance = 2e-3 * np.abs(model.coef_).max() + 1e-6
        np.testing.assert_allclose(weight, model.coef_[0], atol=tolerance)


def several_problems():
    """Three layers, labels that each of them carries, and a mask."""
    problems = [problem(kind, n=200, d=20) for kind in ("easy", "separable", "collinear")]
    x_lnd = torch.from_numpy(np.stack([x_nd for x_nd, _ in problems]))
    y_nk = torch.cat([as_column(y_n) for _, y_n in problems], 1)
    mask = np.random.default_rng(3).random(y_nk.shape) < 0.7
    return x_lnd, y_nk, torch.from_numpy(mask.astype(np.float32))


def test_a_problem_does_not_depend_on_what_is_solved_beside_it():
    x_lnd, y_nk, mask_nk = several_problems()
    strengths = [1e-3, 1.0]
    together = solve_logreg(x_lnd, y_nk, mask_nk=mask_nk, strengths=strengths)
    p_lnsk = together.logits(x_lnd).sigmoid()
    for layer in range(3):
        for s, strength in enumerate(strengths):
            for k in range(3):
                x_layer = x_lnd[[layer]]
                alone = solve_logreg(
                    x_layer, y_nk[:, [k]], mask_nk=mask_nk[:, [k]], strengths=[strength]
                )
                p_n = alone.logits(x_layer).sigmoid()[0, :, 0, 0]
                torch.testing.assert_close(p_n, p_lnsk[layer, :, s, k], atol=5e-4, rtol=0)


def test_groups_of_problems_that_fit_in_memory_have_the_same_answer():
    x_lnd, y_nk, mask_nk = several_problems()
    strengths = [1e-3, 1.0]
    p = []
    for memory_gb in (2.0, 1e-5):
        solution = solve_logreg(
            x_lnd, y_nk, mask_nk=mask_nk, strengths=strengths, memory_gb=memory_gb
        )
        p.append(solution.logits(x_lnd).sigmoid())
    torch.testing.assert_close(p[1], p[0], atol=5e-4, rtol=0)


def test_parts_of_a_solution_are_its_columns_and_strengths():
    x_nd, y_n = problem("easy")
    x_lnd = torch.from_numpy(np.stack([x_nd, 2 * x_nd]))
    y_nk = torch.cat([as_column(y_n), 1 - as_column(y_n)], 1)
    mask_nk = torch.ones_like(y_nk)
    solution = solve_logreg(x_lnd, y_nk, mask_nk=mask_nk, strengths=[1e-3, 1.0])
    logits = solution.logits(x_lnd)
    column = solution.select_columns(slice(1, 2))
    torch.testing.assert_close(column.logits(x_lnd), logits[..., 1:])
    assert torch.equal(column.steps_lsk, solution.steps_lsk[..., 1:])
    selected = solution.select_strengths(torch.tensor([1, 0]))
    expected = torch.stack([logits[0, :, 1], logits[1, :, 0]])
    torch.testing.assert_close(selected.logits(x_lnd)[:, :, 0], expected)
    norms = torch.stack([solution.gradient_norm_lsk[0, 1], solution.gradient_norm_lsk[1, 0]])
    assert torch.equal(selected.gradient_norm_lsk[:, 0], norms)


def test_losses_count_what_the_mask_counts_and_choose_the_strength():
    x_lnd, y_nk, mask_nk = several_problems()
    solution = solve_logreg(x_lnd, y_nk, mask_nk=mask_nk, strengths=[1e-3, 1.0])
    p_lnsk = solution.logits(x_lnd).double().sigmoid()
    label = y_nk[:, None].bool()
    expected = -torch.where(label, p_lnsk, 1 - p_lnsk).log() * mask_nk[:, None]
    losses = solution.losses(x_lnd, y_nk, mask_nk)
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-4)
    assert solution.best_strengths(x_lnd, y_nk, mask_nk).tolist() == [1, 1, 1]
    assert solution.best_strengths(x_lnd, 1 - y_nk, mask_nk).tolist() == [0, 0, 0]


def test_each_column_is_fitted_on_the_examples_that_count_for_it():
    x_nd, y_n = problem("easy")
    rng = np.random.default_rng(1)
    y_nk = np.stack([y_n, 1 - y_n, y_n], 1)
    mask_nk = (rng.random(y_nk.shape) < 0.4).astype(np.float32)
    solution = solve_logreg(
        as_layer(x_nd),
        torch.from_numpy(y_nk),
        mask_nk=torch.from_numpy(mask_nk),
        strengths=[0.1],
    )
    p_nk = solution.logits(as_layer(x_nd))[0, :, 0].sigmoid()
    for k in range(3):
        rows = mask_nk[:, k] == 1
        model = reference(x_nd[rows], y_nk[rows, k], 0.1)
        np.testing.assert_allclose(p_nk[:, k], model.predict_proba(x_nd)[:, 1], atol=1e-3)


def test_one_kind_of_label_is_expected_again_but_not_for_certain():
    x_nd, _ = problem("easy")
    n = len(x_nd)
    y_nk = torch.tensor([0.0, 1.0, 0.0]).repeat(n, 1)
    mask_nk = torch.tensor([1.0, 1.0, 0.0]).repeat(n, 1)
    solution = solve_logreg(as_layer(x_nd), y_nk, mask_nk=mask_nk, strengths=[1.0])
    p_nk = solution.logits(as_layer(x_nd))[0, :, 0].sigmoid()
    expected = np.tile([1 / (n + 2), (n + 1) / (n + 2), 0.5], (n, 1))
    np.testing.assert_allclose(p_nk, expected, rtol=1e-4)
    assert solution.converged_lsk.all()


def test_the_seed_of_the_start_does_not_change_the_answer():
    x_nd, y_n = problem("easy")
    first = solve_one(x_nd, y_n, [1.0], seed=0).weight_ldsk
    second = solve_one(x_nd, y_n, [1.0], seed=1).weight_ldsk
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-2)
    assert not torch.equal(first, second)  # it did start elsewhere


def test_problems_that_did_not_converge_are_marked():
    x_nd, y_n = problem("easy")
    given_up = solve_one(x_nd, y_n, [1.0], max_steps=1)
    assert not given_up.converged_lsk.any()
    assert (given_up.gradient_norm_lsk > 1e-5).all()
    assert (given_up.steps_lsk == 1).all()
    solved = solve_one(x_nd, y_n, [1.0])
    steps = int(solved.steps_lsk)
    assert 1 < steps < 60
    assert not solve_one(x_nd, y_n, [1.0], max_steps=steps - 1).converged_lsk.any()
    assert solve_one(x_nd, y_n, [1.0], max_steps=steps).converged_lsk.all()


def test_copies_of_features_and_hardly_any_regularisation_do_not_stop_it():
    x_nd, y_n = problem("easy", n=1000)
    x_nd = np.concatenate([x_nd, x_nd, x_nd[:, :5] * 1e-3], 1)
    solution = solve_one(x_nd, y_n, [1e3, 1e5])
    assert solution.converged_lsk.all()
    p_n = solution.logits(as_layer(x_nd))[0, :, 0, 0].sigmoid()
    expected = reference(x_nd, y_n, 1e3).predict_proba(x_nd)[:, 1]
    np.testing.assert_allclose(p_n, expected, atol=1e-3)


def test_constant_features_are_zero_after_standardisation():
    x_lnd = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0)) * 3 + 100
    x_lnd[:, :, 1] = 0.1
    x_lnd[1, :, 2] = 1e6
    mean_ld, scale_ld = feature_spread(x_lnd)
    standardised = (x_lnd - mean_ld[:, None]) / scale_ld[:, None]
    varies = torch.tensor([[True, False, True, True], [True, False, False, True]])
    std_ld = standardised.std(1, correction=0)
    torch.testing.assert_close(std_ld, varies.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(standardised.mean(1), torch.zeros(2, 4), atol=1e-3, rtol=0)
