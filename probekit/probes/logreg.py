r"""L2-regularised logistic regression, many problems at once, solved to convergence.

A problem has the features x of a layer, a column of labels y (0 or 1) with a mask m, and an inverse
strength of regularisation C. It minimises over the weights w and the intercept b

.. math:: \frac{1}{n_p} \sum_i m_i \log(1 + e^{-\tilde y_i (x_i w + b)})
          + \frac{1}{2 C n_p} \lVert w \rVert^2,
          \qquad n_p = \sum_i m_i, \qquad \tilde y = 2 y - 1

This is the objective of scikit-learn's ``LogisticRegression(C=C)`` on the rows with m = 1, divided
by C n_p, so both have the same optimum.

Why a solver of our own: a sweep fits thousands of problems (layers x strengths x classes) to the
same few feature matrices. Those of a layer share x, so that each step is two matrix products with
the problems side by side as columns. ``benchmarks/probe.py`` measured it 38 times faster than a
loop over scikit-learn's ``LogisticRegression``, with the same optimum.

The method is Newton's; its linear systems are solved by preconditioned conjugate gradients (Nocedal
and Wright, chapter 7). The preconditioner is a Cholesky factor of x'x / n + r I, where r is a
problem's ratio of regularisation to curvature. Problems with a similar r share a factor: there is
one for each power of :data:`RATIO` that occurs.

References
----------
J. Nocedal and S. J. Wright, *Numerical Optimization*, 2nd edition, Springer, 2006: algorithms 5.3
(preconditioned conjugate gradients) and 7.1 (line search Newton-CG), equation 3.4 (sufficient
decrease, Armijo).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

TOLERANCE = 1e-5
"""Largest gradient norm of a problem that counts as converged."""

RATIO = 16.0
"""Problems share a preconditioner if their r have the same power of this, rounded."""

NARROW = 12
"""Columns: on CPUs a product with 2 to 11 columns takes longer than one with 12."""

CONJUGATE_ROUNDS = 60
"""Rounds of conjugate gradients in a Newton step, at most."""

SIDE_BY_SIDE = 1_000_000
"""Entries of x of layers that are solved together on CPUs; larger layers are faster one by one."""


class Solution(NamedTuple):
    """Solved problems of l layers, s strengths and k columns of labels.

    Attributes
    ----------
    weight_ldsk : Tensor
        (l, d, s, k) weights.
    intercept_lsk : Tensor
        (l, s, k) intercepts.
    gradient_norm_lsk : Tensor
        (l, s, k) norms of the gradient of the objective at the end.
    converged_lsk : Tensor
        (l, s, k) whether that norm is within the tolerance.
    steps_lsk : Tensor
        (l, s, k) Newton steps that were taken.
    """

    weight_ldsk: torch.Tensor
    intercept_lsk: torch.Tensor
    gradient_norm_lsk: torch.Tensor
    converged_lsk: torch.Tensor
    steps_lsk: torch.Tensor

    def logits(self, x_lnd: torch.Tensor) -> torch.Tensor:
        """Return the log-odds (l, n, s, k) of label 1 for features (l, n, d)."""
        weight = self.weight_ldsk
        product = (x_lnd @ weight.flatten(2)).unflatten(2, weight.shape[2:])
        return product + self.intercept_lsk[:, None]

    def losses(
        self, x_lnd: torch.Tensor, y_nk: torch.Tensor, mask_nk: torch.Tensor
    ) -> torch.Tensor:
        """Return the log loss of every example, strength and column.

        Parameters
        ----------
        x_lnd : Tensor
            (l, n, d) features.
        y_nk : Tensor
            (n, k) labels, 0 or 1.
        mask_nk : Tensor
            (n, k) 1 where an entry counts, else 0.

        Returns
        -------
        Tensor
            (l, n, s, k) in nats; 0 where an entry does not count.
        """
        logits = self.logits(x_lnd)
        return (functional.softplus(logits) - y_nk[:, None] * logits) * mask_nk[:, None]

    def best_strengths(
        self, x_lnd: torch.Tensor, y_nk: torch.Tensor, mask_nk: torch.Tensor
    ) -> torch.Tensor:
        """Return (l,) which strength has each layer's lowest log loss, summed over all columns.

        The parameters are those of :meth:`losses`.
        """
        return self.losses(x_lnd, y_nk, mask_nk).sum((1, 3)).argmin(1)

    def select_columns(self, columns: slice) -> Solution:
        """Return the problems of some of the columns of labels."""
        return Solution(*(values[..., columns] for values in self))

    def select_strengths(self, strength_l: torch.Tensor) -> Solution:
        """Return one strength for each layer, by its number; s is then 1."""
        layers = torch.arange(len(strength_l), device=strength_l.device)
        return Solution(
            weight_ldsk=self.weight_ldsk[layers, :, strength_l][:, :, None],
            intercept_lsk=self.intercept_lsk[layers, strength_l][:, None],
            gradient_norm_lsk=self.gradient_norm_lsk[layers, strength_l][:, None],
            converged_lsk=self.converged_lsk[layers, strength_l][:, None],
            steps_lsk=self.steps_lsk[layers, strength_l][:, None],
        )


def feature_spread(x_lnd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure the mean and standard deviation of each feature.

    Parameters
    ----------
    x_lnd : Tensor
        (l, n, d) features of the training examples.

    Returns
    -------
    mean_ld : Tensor
        (l, d) means.
    scale_ld : Tensor
        (l, d) standard deviations; infinite for a constant feature, so that it is 0 wherever it is
        divided by its scale.
    """
    mean_ld = x_lnd.mean(1)
    std_ld = x_lnd.std(1, correction=0)
    rounding_ld = 1e-7 * x_lnd.abs().amax(1)
    return mean_ld, torch.where(std_ld > rounding_ld, std_ld, torch.inf)


def solve_logreg(
    x_lnd: torch.Tensor,
    y_nk: torch.Tensor,
    *,
    mask_nk: torch.Tensor,
    strengths: Sequence[float],
    seed: int = 0,
    tolerance: float = TOLERANCE,
    max_steps: int = 60,
    memory_gb: float = 2.0,
) -> Solution:
    """Fit l x s x k logistic regressions, see :mod:`probekit.probes.logreg` for the objective.

    Parameters
    ----------
    x_lnd : Tensor
        (l, n, d) float32 features, standardised.
    y_nk : Tensor
        (n, k) float32 labels, 0 or 1; on the device of x.
    mask_nk : Tensor
        (n, k) float32, 1 where an entry counts, else 0.
    strengths : sequence of float
        The s inverse strengths C, scikit-learn's.
    seed : int
        Seed of the random starting point. What a problem converges to does not depend on it.
    tolerance : float
        Largest norm of the gradient of a problem that counts as converged. The objective is a mean
        over examples.
    max_steps : int
        Newton steps before a problem is given up; `Solution.converged_lsk` then says so.
    memory_gb : float
        Bound on what is held besides x; columns are solved in groups that fit.

    Returns
    -------
    Solution
        A column with a single kind of label has the log-odds log((yes + 1) / (no + 1)) everywhere,
        with the counts of its labels, and counts as converged.

    Notes
    -----
    The solver is written by hand since it fits all problems of a layer side by side:
    ``benchmarks/probe.py`` measured it 38 times faster than a loop over scikit-learn's
    ``LogisticRegression`` for the same optimum.
    """
    n, d = x_lnd.shape[1:]
    if x_lnd.is_cuda:
        layers_together = int(memory_gb * 1e9 / (40 * d * d))  # some ten float32 factors each
    else:
        layers_together = SIDE_BY_SIDE // (n * d)
    parts = [
        _solve_layers(
            x_part,
            y_nk,
            mask_nk,
            strengths,
            seed=seed,
            tolerance=tolerance,
            max_steps=max_steps,
            memory_gb=memory_gb,
        )
        for x_part in x_lnd.split(max(1, layers_together))
    ]
    return Solution(*(torch.cat(of_layers) for of_layers in zip(*parts, strict=True)))


def _solve_layers(
    x_lnd: torch.Tensor,
    y_nk: torch.Tensor,
    mask_nk: torch.Tensor,
    strengths: Sequence[float],
    *,
    seed: int,
    tolerance: float,
    max_steps: int,
    memory_gb: float,
) -> Solution:
    """Solve layers side by side, the problems in groups of columns that fit in memory.

    The p = s x k problems are numbered strength by strength.
    """
    n_layers, n, d = x_lnd.shape
    n_strengths = len(strengths)
    k = y_nk.shape[1]
    features = _Features(x_lnd)
    generator = torch.Generator().manual_seed(seed)
    start_dp = 0.01 * torch.randn(d + 1, n_strengths * k, generator=generator).to(x_lnd)
    c_p = torch.tensor(strengths).repeat_interleave(k).to(x_lnd)
    column_p = torch.arange(k).repeat(n_strengths)
    group_size = max(1, int(memory_gb * 1e9 / (12 * 4 * n_layers * max(n, d))))

    groups = []
    for group in torch.arange(len(c_p)).split(group_size):
        columns = column_p[group]
        groups.append(
            _solve_problems(
                features,
                y_nk[:, columns.to(y_nk.device)],
                mask_nk[:, columns.to(mask_nk.device)],
                c_p[group],
                start_dp[:, group].expand(n_layers, -1, -1),
                tolerance=tolerance,
                max_steps=max_steps,
            )
        )

    shape = (n_strengths, k)
    w_ldsk = torch.cat([group.w_ldp for group in groups], -1).unflatten(-1, shape)
    norms = torch.cat([group.gradient_norm_lp for group in groups], -1)
    converged = torch.cat([group.converged_lp for group in groups], -1)
    steps = torch.cat([group.steps_lp for group in groups], -1)
    return Solution(
        weight_ldsk=w_ldsk[:, :-1],
        intercept_lsk=w_ldsk[:, -1],
        gradient_norm_lsk=norms.unflatten(-1, shape),
        converged_lsk=converged.unflatten(-1, shape),
        steps_lsk=steps.unflatten(-1, shape),
    )


class _Features:
    """The features of l layers, their Gram matrices and the Cholesky factors used so far.

    Weights (l, d + 1, p) have the intercept as their last row.
    """

    def __init__(self, x_lnd: torch.Tensor):
        self.x_lnd = x_lnd
        self.xt_ldn = x_lnd.transpose(1, 2)
        self.mean_ld = x_lnd.mean(1)
        self.gram_ldd = self.xt_ldn @ x_lnd / x_lnd.shape[1]
        self.factors: dict[int, torch.Tensor] = {}

    def times(self, w_ldp: torch.Tensor) -> torch.Tensor:
        """Return x w + b, (l, n, p)."""
        return _product(self.x_lnd, w_ldp[:, :-1]).add_(w_ldp[:, -1:])

    def transposed_times(self, r_lnp: torch.Tensor) -> torch.Tensor:
        """Return x' r with the sum of r below it, (l, d + 1, p)."""
        return torch.cat([_product(self.xt_ldn, r_lnp), r_lnp.sum(1, keepdim=True)], 1)

    def factor(self, power: int) -> torch.Tensor:
        """Return the Cholesky factor of the Gram matrix with RATIO**power of regularisation.

        Where that much is lost in float32's rounding, so that there is no factor, it is that of the
        next power: a preconditioner need not be exact. Its shape is (l, d + 1, d + 1).
        """
        if power not in self.factors:
            gram = functional.pad(self.gram_ldd, (0, 1, 0, 1))
            gram[:, -1, :-1] = self.mean_ld
            gram[:, :-1, -1] = self.mean_ld
            ridge = torch.full_like(gram[0, 0], RATIO**power)
            ridge[-1] = 1.0  # the intercept's column of ones has x'x / n = 1
            factor, failed = torch.linalg.cholesky_ex(gram + ridge.diag())
            if bool(failed.any()):
                factor = self.factor(power + 1)
            self.factors[power] = factor
        return self.factors[power]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    p = b.shape[-1]
    if 1 < p < NARROW and not a.is_cuda:
        return (a @ functional.pad(b, (0, NARROW - p)))[..., :p]
    return a @ b


@dataclass(frozen=True)
class _SolvedProblems:
    w_ldp: torch.Tensor
    gradient_norm_lp: torch.Tensor
    converged_lp: torch.Tensor
    steps_lp: torch.Tensor


def _solve_problems(
    features: _Features,
    y_np: torch.Tensor,
    mask_np: torch.Tensor,
    c_p: torch.Tensor,
    start_ldp: torch.Tensor,
    *,
    tolerance: float,
    max_steps: int,
) -> _SolvedProblems:
    """Solve p problems in all layers side by side.

    A problem leaves the matrix products once it has converged in all layers.
    """
    count_p = mask_np.sum(0)
    positive_p = (mask_np * y_np).sum(0)
    constant_p = (positive_p == 0) | (positive_p == count_p)
    constant_logit_p = ((positive_p + 1) / (count_p - positive_p + 1)).log()
    solved_ldp = torch.zeros_like(start_ldp)
    solved_ldp[:, -1, constant_p] = constant_logit_p[constant_p]
    gradient_norm_lp = torch.zeros_like(start_ldp[:, 0])
    steps_lp = torch.zeros_like(gradient_norm_lp, dtype=torch.int64)

    active = torch.nonzero(~constant_p).ravel()
    problems = _Problems(
        features=features,
        y_np=y_np,
        weight_np=mask_np / count_p.clamp(min=1),
        ridge_p=1 / (c_p * count_p.clamp(min=1)),
    ).select(active)
    w_ldp = start_ldp[..., active]
    logits_lnp = features.times(w_ldp)
    for step in range(max_steps + 1):
        gradient_ldp, curvature_lnp = problems.derivatives(w_ldp, logits_lnp)
        gradient_norm_lp[:, active] = gradient_ldp.norm(dim=1)
        running = (gradient_norm_lp[:, active] > tolerance).any(0)
        if step == max_steps or not bool(running.any()):
            solved_ldp[..., active] = w_ldp
            break
        if not bool(running.all()):
            solved_ldp[..., active[~running]] = w_ldp[..., ~running]
            active = active[running]
            problems = problems.select(running)
            w_ldp = w_ldp[..., running]
            logits_lnp = logits_lnp[..., running]
            gradient_ldp = gradient_ldp[..., running]
            curvature_lnp = curvature_lnp[..., running]
        change_ldp, change_logits_lnp = problems.newton_step(
            gradient_ldp, curvature_lnp, tolerance=tolerance
        )
        length_l1p = problems.line_search(
            w_ldp,
            logits_lnp,
            change_ldp=change_ldp,
            change_logits_lnp=change_logits_lnp,
            gradient_ldp=gradient_ldp,
        )
        w_ldp = w_ldp + length_l1p * change_ldp
        logits_lnp = logits_lnp + length_l1p * change_logits_lnp
        steps_lp[:, active] += 1
    return _SolvedProblems(
        w_ldp=solved_ldp,
        gradient_norm_lp=gradient_norm_lp,
        converged_lp=(gradient_norm_lp <= tolerance) | constant_p,
        steps_lp=steps_lp,
    )


@dataclass(frozen=True)
class _Problems:
    """The p problems that are being solved.

    Attributes
    ----------
    features : _Features
        Of all l layers.
    y_np : Tensor
        (n, p) labels.
    weight_np : Tensor
        (n, p) weight of each example in the mean, mask / n_p.
    ridge_p : Tensor
        (p,) weight of the penalty, 1 / (C n_p).
    """

    features: _Features
    y_np: torch.Tensor
    weight_np: torch.Tensor
    ridge_p: torch.Tensor

    def select(self, columns: torch.Tensor) -> _Problems:
        """Return some of the problems, by number or by a boolean mask."""
        return _Problems(
            features=self.features,
            y_np=self.y_np[:, columns],
            weight_np=self.weight_np[:, columns],
            ridge_p=self.ridge_p[columns],
        )

    def penalty_gradient(self, w_ldp: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the penalty; the intercept has none."""
        gradient_ldp = self.ridge_p * w_ldp
        gradient_ldp[:, -1] = 0
        return gradient_ldp

    def loss(self, w_ldp: torch.Tensor, logits_lnp: torch.Tensor) -> torch.Tensor:
        """Return the objectives, (l, p)."""
        loss_lnp = functional.softplus(logits_lnp) - self.y_np * logits_lnp
        penalty_lp = 0.5 * (self.penalty_gradient(w_ldp) * w_ldp).sum(1)
        return (self.weight_np * loss_lnp).sum(1) + penalty_lp

    def derivatives(
        self, w_ldp: torch.Tensor, logits_lnp: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient (l, d + 1, p) and the curvature of each example's loss (l, n, p)."""
        p_lnp = logits_lnp.sigmoid()
        loss_gradient_ldp = self.features.transposed_times(self.weight_np * (p_lnp - self.y_np))
        gradient_ldp = loss_gradient_ldp + self.penalty_gradient(w_ldp)
        curvature_lnp = self.weight_np * p_lnp * (1 - p_lnp)
        return gradient_ldp, curvature_lnp

    def preconditioner(self, curvature_lp: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function that nearly divides (l, d + 1, p) by curvature * x'x / n + ridge.

        The curvature is the sum over examples.
        """
        curvature_lp = curvature_lp.clamp(min=1e-12)
        ratio_p = self.ridge_p / curvature_lp.mean(0)
        power_p = ratio_p.log().div(math.log(RATIO)).round().clamp(-20, 20).int()
        groups = []
        for power in power_p.unique().tolist():
            columns = torch.nonzero(power_p == power).ravel()
            groups.append((self.features.factor(power), columns))

        def divide(rest_ldp: torch.Tensor) -> torch.Tensor:
            if len(groups) == 1:
                factor, _ = groups[0]
                return torch.cholesky_solve(rest_ldp, factor) / curvature_lp[:, None]
            quotient_ldp = torch.empty_like(rest_ldp)
            for factor, columns in groups:
                quotient_ldp[..., columns] = torch.cholesky_solve(rest_ldp[..., columns], factor)
            return quotient_ldp / curvature_lp[:, None]

        return divide

    def newton_step(
        self, gradient_ldp: torch.Tensor, curvature_lnp: torch.Tensor, *, tolerance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve H step = -gradient by preconditioned conjugate gradients, all columns side by side.

        A column rests once its residual is a tenth of the gradient (less, the smaller the gradient
        is). When half of the columns rest, they leave the matrix products.

        Returns
        -------
        step_ldp : Tensor
            (l, d + 1, p) the step.
        change_lnp : Tensor
            (l, n, p) what it adds to the logits.
        """
        norm_lp = gradient_ldp.norm(dim=1)
        target_lp = (norm_lp * norm_lp.sqrt().clamp(max=0.1)).clamp(min=0.3 * tolerance)
        step_ldp = torch.zeros_like(gradient_ldp)
        change_lnp = torch.zeros_like(curvature_lnp)
        n_columns = step_ldp.shape[-1]

        active = torch.arange(n_columns, device=step_ldp.device)
        problems = self
        residual = -gradient_ldp
        divide = problems.preconditioner(curvature_lnp.sum(1))
        scaled = divide(residual)
        direction = scaled
        energy = (residual * scaled).sum(1)
        for _ in range(CONJUGATE_ROUNDS):
            direction_logits = self.features.times(direction)
            curved = self.features.transposed_times(curvature_lnp * direction_logits)
            curved = curved + problems.penalty_gradient(direction)
            running = residual.norm(dim=1) > target_lp
            ratio = energy / (direction * curved).sum(1).clamp(min=1e-30)
            length = torch.where(running, ratio, 0)[:, None]
            if len(active) == n_columns:
                step_ldp += length * direction
                change_lnp += length * direction_logits
            else:
                step_ldp[..., active] += length * direction
                change_lnp[..., active] += length * direction_logits
            residual = residual - length * curved
            running = (residual.norm(dim=1) > target_lp).any(0)
            if not bool(running.any()):
                break
            if int(running.sum()) * 2 <= len(running) > NARROW:
                active = active[running]
                problems = problems.select(running)
                residual = residual[..., running]
                direction = direction[..., running]
                energy = energy[..., running]
                target_lp = target_lp[..., running]
                curvature_lnp = curvature_lnp[..., running]
                divide = problems.preconditioner(curvature_lnp.sum(1))
            scaled = divide(residual)
            previous_energy = energy
            energy = (residual * scaled).sum(1)
            direction = scaled + (energy / previous_energy.clamp(min=1e-30))[:, None] * direction
        return step_ldp, change_lnp

    def line_search(
        self,
        w_ldp: torch.Tensor,
        logits_lnp: torch.Tensor,
        *,
        change_ldp: torch.Tensor,
        change_logits_lnp: torch.Tensor,
        gradient_ldp: torch.Tensor,
    ) -> torch.Tensor:
        """Return the share of the step to take, (l, 1, p): halved until the loss falls enough.

        That is Armijo's condition, with room for float32's rounding.
        """
        start_lp = self.loss(w_ldp, logits_lnp)
        slope_lp = (change_ldp * gradient_ldp).sum(1)
        length_lp = torch.ones_like(start_lp)
        for _ in range(20):
            loss_lp = self.loss(
                w_ldp + length_lp[:, None] * change_ldp,
                logits_lnp + length_lp[:, None] * change_logits_lnp,
            )
            limit_lp = start_lp + 1e-4 * length_lp * slope_lp + 1e-6 * start_lp.abs()
            too_long = ~(loss_lp <= limit_lp)
            if not bool(too_long.any()):
                break
            length_lp = torch.where(too_long, length_lp / 2, length_lp)
        return length_lp[:, None]
