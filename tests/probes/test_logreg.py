import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from probekit.probes.logreg import (
    TOLERANCE,
    Features,
    choose_logreg,
    feature_spread,
    log_losses,
    solve_logreg,
)


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


def several_sets():
    """Three layers, two sets of labels of three columns, and what counts in each split."""
    x_lnd, y_nk, mask_nk = several_problems()
    y_nsk = torch.stack([y_nk, 1 - y_nk.roll(7, 0)], 1)
    is_train = torch.arange(len(y_nk)) < 140
    train_nsk = (mask_nk * is_train[:, None])[:, None].repeat(1, 2, 1)
    train_nsk[::5, 1] = 0  # the second set has fewer examples
    validation_nsk = (mask_nk * ~is_train[:, None])[:, None].repeat(1, 2, 1)
    return x_lnd, y_nsk, train_nsk, validation_nsk


@pytest.mark.parametrize("strengths", [(1.0, 1e-4, 1e-2), (0.1,), (1e-6, 1e-5, 1e-4)])
@pytest.mark.parametrize("memory_gb", [2.0, 1e-5])
def test_the_choice_is_that_of_fitting_every_strength(strengths, memory_gb):
    x_lnd, y_nsk, train_nsk, validation_nsk = several_sets()
    features = Features(x_lnd, torch.arange(140))
    choice = choose_logreg(
        features,
        y_nsk,
        train_nsk=train_nsk,
        validation_nsk=validation_nsk,
        strengths=strengths,
        memory_gb=memory_gb,
    )
    assert choice.solution.converged_lsk.all()
    solution = features.turn_back(choice.solution)
    for number in range(2):
        every = solve_logreg(
            x_lnd, y_nsk[:, number], mask_nk=train_nsk[:, number], strengths=strengths
        )
        losses = log_losses(every.logits(x_lnd), y_nsk[:, [number]], validation_nsk[:, [number]])
        best_l = losses.sum((1, 3)).argmin(1)
        assert torch.equal(choice.strength_ls[:, number], best_l)
        for layer, best in enumerate(best_l):
            expected = every.weight_ldsk[layer, :, best]
            found = solution.weight_ldsk[layer, :, number]
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-2)
            norm = choice.solution.gradient_norm_lsk[layer, number]
            assert (norm <= TOLERANCE).all()
    logits = solution.logits(x_lnd)
    turned = choice.solution.logits(features.z_lne)
    torch.testing.assert_close(turned, logits, atol=1e-3, rtol=1e-3)


def test_the_search_ends_once_the_loss_has_risen_twice():
    x_lnd, y_nsk, train_nsk, validation_nsk = several_sets()
    rng = torch.Generator().manual_seed(0)
    y_nsk[:, 1] = (torch.rand(y_nsk[:, 1].shape, generator=rng) < 0.5).float()
    strengths = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
    choice = choose_logreg(
        Features(x_lnd),
        y_nsk,
        train_nsk=train_nsk,
        validation_nsk=validation_nsk,
        strengths=strengths,
    )
    expected = (choice.strength_ls + 1 + 2).clamp(max=len(strengths))
    assert torch.equal(choice.tried_ls, expected)
    assert (choice.tried_ls[:, 1] < choice.tried_ls[:, 0]).any()


def test_equal_losses_are_no_fall_so_that_the_strongest_is_chosen():
    x_lnd = torch.zeros(1, 40, 3)
    y_nsk = (torch.arange(40) % 2).float()[:, None, None]
    choice = choose_logreg(
        Features(x_lnd),
        y_nsk,
        train_nsk=torch.ones_like(y_nsk),
        validation_nsk=torch.ones_like(y_nsk),
        strengths=[1.0, 1e-3, 10.0, 1e-2],
    )
    assert choice.strength_ls.item() == 1
    assert choice.tried_ls.item() == 4


def test_a_flat_beginning_does_not_end_the_search():
    x_lnd, y_nsk, train_nsk, validation_nsk = several_sets()
    choice = choose_logreg(
        Features(x_lnd),
        y_nsk,
        train_nsk=train_nsk,
        validation_nsk=validation_nsk,
        strengths=[1e-14, 1e-13, 1e-12, 1e-12, 1.0],
    )
    assert (choice.strength_ls[:, 0] == 4).all()


def test_rough_solutions_lose_almost_nothing():
    x_lnd, y_nsk, train_nsk, validation_nsk = several_sets()
    features = Features(x_lnd)
    choices = [
        choose_logreg(
            features,
            y_nsk,
            train_nsk=train_nsk,
            validation_nsk=validation_nsk,
            strengths=[1e-3, 1.0, 100.0],
            tolerance=tolerance,
        )
        for tolerance in (None, 1e-5)
    ]
    assert torch.equal(choices[0].strength_ls, choices[1].strength_ls)
    rough, exact = (
        log_losses(choice.solution.logits(features.z_lne), y_nsk, train_nsk).sum((1, 3))
        for choice in choices
    )
    torch.testing.assert_close(rough, exact, atol=0, rtol=1e-2)
    assert not torch.equal(rough, exact)


@pytest.mark.parametrize("n", [15, 200])  # fewer examples than features, and more
def test_principal_axes_keep_distances_and_have_no_covariance(n):
    g = torch.Generator().manual_seed(1)
    x_lnd = torch.randn(2, n, 20, generator=g) @ torch.randn(2, 20, 20, generator=g) + 5
    rows = torch.arange(n - 3)
    z_lne = Features(x_lnd, rows).z_lne
    assert z_lne.shape[2] == min(20, len(rows))
    z_rows = z_lne[:, rows]
    torch.testing.assert_close(z_rows.mean(1), torch.zeros(2, z_lne.shape[2]), atol=1e-4, rtol=0)
    expected = torch.cdist(x_lnd[:, rows], x_lnd[:, rows])
    torch.testing.assert_close(torch.cdist(z_rows, z_rows), expected, atol=5e-2, rtol=1e-3)
    for covariance in z_rows.mT @ z_rows / len(rows):
        off_diagonal = covariance - covariance.diag().diag()
        assert off_diagonal.abs().max() < 1e-4 * covariance.max()


def test_losses_count_what_the_mask_counts():
    _, y_nsk, train_nsk, _ = several_sets()
    logits = torch.randn(3, *y_nsk.shape, generator=torch.Generator().manual_seed(0))
    p = logits.double().sigmoid()
    expected = -torch.where(y_nsk.bool(), p, 1 - p).log() * train_nsk
    losses = log_losses(logits, y_nsk, train_nsk)
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-4)


def test_some_sets_of_a_solution_are_selected():
    x_nd, y_n = problem("easy")
    solution = solve_one(x_nd, y_n, [1e-3, 1.0, 1e-2])
    for found, values in zip(solution.select_sets(slice(1, 2)), solution, strict=True):
        assert torch.equal(found[..., 0, :], values[..., 1, :])


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
