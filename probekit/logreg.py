r"""L2-regularised logistic regression, many problems at once, solved to convergence.

Problem p minimises over w and b

.. math:: \frac{1}{n_p} \sum_i m_{ip}\, \log(1 + e^{-\tilde y_{ip} (x_i w + b)})
          + \frac{1}{2 C_p n_p} \lVert w \rVert^2, \qquad n_p = \sum_i m_{ip}, \qquad \tilde y = 2 y - 1

which is scikit-learn's `LogisticRegression(C=C_p)` on the rows with m = 1, its objective divided by C n. All problems
share x, so each step is a few matrix products with the problems as columns: Newton's method, its systems solved by
conjugate gradients in the eigenbasis of x'x, where the Hessian of a logistic problem is nearly diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Solution:
    """Weights (d, p), intercepts (p,), gradient norms (p,) at the end, and which problems converged (p,)."""

    weight_dp: torch.Tensor
    intercept_p: torch.Tensor
    gradient_p: torch.Tensor
    converged_p: torch.Tensor

    def logits(self, x_nd: torch.Tensor) -> torch.Tensor:
        """(n, p) log-odds of label 1."""
        return x_nd @ self.weight_dp + self.intercept_p


def solve(x_nd: torch.Tensor, y_np: torch.Tensor, mask_np: torch.Tensor, c_p: torch.Tensor,
          seeds: Sequence[int] = (0,), tolerance: float = TOLERANCE, steps: int = 60) -> Solution:
    """Solve p problems on the same features; a problem with one kind of label only gets a constant answer.

    Parameters
    ----------
    x_nd : (n, d) float32, standardised
    y_np, mask_np : (n, p) labels 0 or 1, and 1 where an example counts
    c_p : (p,) inverse strengths C, scikit-learn's
    seeds : of the random starting points, one for each of len(seeds) equal parts of the problems; what a problem
        converges to does not depend on it
    tolerance : largest gradient norm of a converged problem (its objective is a mean over examples)
    """
    n = len(x_nd)
    counts = mask_np.sum(0)
    positive = (mask_np * y_np).sum(0)
    constant = (positive == 0) | (positive == counts)
    scale_p = 1 / counts.clamp(min=1)
    spectrum, basis = torch.linalg.eigh((x_nd.T @ x_nd / n).double())
    basis = basis.to(x_nd.dtype)
    z_nd = torch.cat([x_nd @ basis, torch.ones_like(x_nd[:, :1])], 1)
    ridge_dp = (scale_p / c_p).expand(z_nd.shape[1], -1).clone()
    ridge_dp[-1] = 0
    problem = _Problem(z_nd, y_np, mask_np * scale_p, ridge_dp, torch.cat([spectrum.clamp(min=0), torch.ones(1)
                       .to(spectrum)]).to(x_nd.dtype))
    part = (len(ridge_dp), ridge_dp.shape[1] // len(seeds))
    starts = [torch.randn(part, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    w_dp = 0.01 * torch.cat(starts, 1).to(z_nd)
    gradient_p = torch.full_like(scale_p, torch.inf)
    for _ in range(steps):
        gradient_dp, curvature_np = problem.derivatives(w_dp)
        gradient_p = gradient_dp.norm(dim=0)
        if bool(((gradient_p <= tolerance) | constant).all()):
            break
        step_dp = problem.newton_step(gradient_dp, curvature_np)
        w_dp = problem.line_search(w_dp, step_dp, gradient_dp)
    w_dp[:, constant] = 0
    w_dp[-1, constant] = torch.where(positive == 0, -10.0, 10.0)[constant] * (counts > 0)[constant]
    return Solution(basis @ w_dp[:-1], w_dp[-1], gradient_p, (gradient_p <= tolerance) | constant)


@dataclass(frozen=True)
class _Problem:
    z_nd: torch.Tensor  # rotated features, a column of ones at the end
    y_np: torch.Tensor
    weight_np: torch.Tensor  # mask / n_p
    ridge_dp: torch.Tensor
    spectrum_d: torch.Tensor

    def loss(self, w_dp: torch.Tensor) -> torch.Tensor:
        logits = self.z_nd @ w_dp
        each = torch.nn.functional.softplus(logits) - self.y_np * logits
        return (self.weight_np * each).sum(0) + 0.5 * (self.ridge_dp * w_dp**2).sum(0)

    def derivatives(self, w_dp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient (d, p), and the curvature of each example's loss (n, p)."""
        p = torch.sigmoid(self.z_nd @ w_dp)
        gradient = self.z_nd.T @ (self.weight_np * (p - self.y_np)) + self.ridge_dp * w_dp
        return gradient, self.weight_np * p * (1 - p)

    def newton_step(self, gradient_dp: torch.Tensor, curvature_np: torch.Tensor, rounds: int = 40) -> torch.Tensor:
        """Solve H step = -gradient by preconditioned conjugate gradients, all columns side by side."""
        diagonal = self.spectrum_d[:, None] * curvature_np.sum(0) + self.ridge_dp
        diagonal = diagonal.clamp(min=1e-8)
        size = gradient_dp.norm(dim=0)
        enough = size * torch.minimum(torch.full_like(size, 0.1), size.sqrt())
        step, rest = torch.zeros_like(gradient_dp), -gradient_dp
        scaled = rest / diagonal
        direction, power = scaled, (rest * scaled).sum(0)
        for _ in range(rounds):
            open_p = rest.norm(dim=0) > enough
            if not bool(open_p.any()):
                break
            curved = self.z_nd.T @ (curvature_np * (self.z_nd @ direction)) + self.ridge_dp * direction
            length = torch.where(open_p, power / (direction * curved).sum(0).clamp(min=1e-30), 0)
            step = step + length * direction
            rest = rest - length * curved
            scaled = rest / diagonal
            power, before = (rest * scaled).sum(0), power
            direction = scaled + power / before.clamp(min=1e-30) * direction
        return step

    def line_search(self, w_dp: torch.Tensor, step_dp: torch.Tensor, gradient_dp: torch.Tensor) -> torch.Tensor:
        """Take the step, halved per problem until its loss falls (Armijo, with room for float32's rounding)."""
        start, slope = self.loss(w_dp), (step_dp * gradient_dp).sum(0)
        length = torch.ones_like(start)
        for _ in range(20):
            loss = self.loss(w_dp + length * step_dp)
            worse = ~(loss <= start + 1e-4 * length * slope + 1e-6 * start.abs())
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        return w_dp + length * step_dp
