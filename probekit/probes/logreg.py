r"""L2-regularised logistic regression, many problems at once, solved to convergence.

A problem has a layer's features x, a column of labels y with a mask m, and a strength C. It minimises over w and b

.. math:: \frac{1}{n_p} \sum_i m_i \log(1 + e^{-\tilde y_i (x_i w + b)}) + \frac{1}{2 C n_p} \lVert w \rVert^2,
          \qquad n_p = \sum_i m_i, \qquad \tilde y = 2 y - 1

which is scikit-learn's `LogisticRegression(C=C)` on the rows with m = 1, its objective divided by C n. All problems of
a layer share x, so each step is two matrix products with the problems as columns: Newton's method, its systems solved
by conjugate gradients. The preconditioner is a Cholesky factor of x'x / n + r I, which problems with a similar ratio r
of regularisation to curvature share: a factor for each power of :data:`RATIO` that occurs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

TOLERANCE = 1e-5
RATIO = 16.0
NARROW = 12  # columns; on CPUs a product with 2 to 11 takes longer than one with 12
TOGETHER = 1_000_000  # entries of layers that are solved side by side on CPUs: larger ones are faster by themselves


@dataclass(frozen=True)
class Solution:
    """l layers, s strengths, k columns of labels: weights, intercepts, gradient norms at the end, what converged."""

    weight_ldsk: torch.Tensor
    intercept_lsk: torch.Tensor
    gradient_lsk: torch.Tensor
    converged_lsk: torch.Tensor

    def logits(self, x_lnd: torch.Tensor) -> torch.Tensor:
        """(l, n, s, k) log-odds of label 1."""
        weight = self.weight_ldsk
        return (x_lnd @ weight.flatten(2)).unflatten(2, weight.shape[2:]) + self.intercept_lsk[:, None]

    def columns(self, part: slice) -> Solution:
        """Some of the columns."""
        return Solution(*(values[..., part] for values in vars(self).values()))

    def at(self, strength_l: torch.Tensor) -> Solution:
        """One strength for each layer, by its number."""
        layers = torch.arange(len(strength_l), device=strength_l.device)
        others = self.intercept_lsk, self.gradient_lsk, self.converged_lsk
        return Solution(self.weight_ldsk[layers, :, strength_l][:, :, None],
                        *(values[layers, strength_l][:, None] for values in others))


def solve(x_lnd: torch.Tensor, y_nk: torch.Tensor, mask_nk: torch.Tensor, strengths: Sequence[float],
          seed: int = 0, tolerance: float = TOLERANCE, steps: int = 60, memory_gb: float = 2.0
          ) -> Solution:
    """Solve l x s x k problems; one with a single kind of label has the answer log((yes + 1) / (no + 1)) everywhere.

    Parameters
    ----------
    x_lnd : (l, n, d) float32, standardised
    y_nk, mask_nk : labels 0 or 1, and 1 where an example counts
    strengths : inverse strengths C, scikit-learn's
    seed : of the random starting point; what a problem converges to does not depend on it
    tolerance : largest gradient norm of a converged problem (its objective is a mean over examples)
    memory_gb : bound on what is held besides x; columns are solved in groups that fit
    """
    n, d = x_lnd.shape[1:]
    layers = int(memory_gb * 1e9 / (40 * d * d)) if x_lnd.is_cuda else TOGETHER // (n * d)  # some ten factors each
    parts = [_solve_layers(x, y_nk, mask_nk, strengths, seed, tolerance, steps, memory_gb)
             for x in x_lnd.split(max(1, layers))]
    return Solution(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def _solve_layers(x_lnd: torch.Tensor, y_nk: torch.Tensor, mask_nk: torch.Tensor, strengths: Sequence[float],
                  seed: int, tolerance: float, steps: int, memory_gb: float) -> Solution:
    features, (layers, n, d), k = _Features(x_lnd), x_lnd.shape, y_nk.shape[1]
    start_dp = 0.01 * torch.randn(d + 1, len(strengths) * k, generator=torch.Generator().manual_seed(seed)).to(x_lnd)
    c_p, column_p = torch.tensor(strengths).repeat_interleave(k).to(x_lnd), torch.arange(k).repeat(len(strengths))
    size = max(1, int(memory_gb * 1e9 / (12 * 4 * layers * max(n, d))))
    found = []
    for part in torch.arange(len(c_p)).split(size):
        y, mask = (t[:, column_p[part].to(t.device)] for t in (y_nk, mask_nk))
        found.append(_solve(features, y, mask, c_p[part], start_dp[:, part].expand(layers, -1, -1), tolerance, steps))
    w, gradient, converged = (torch.cat(parts, -1).unflatten(-1, (len(strengths), k))
                              for parts in zip(*found, strict=True))
    return Solution(w[:, :-1], w[:, -1], gradient, converged)


class _Features:
    """Features, their Gram matrix, and its factors as they are asked for; the last row of weights is the intercept."""

    def __init__(self, x_lnd: torch.Tensor):
        self.x_lnd, self.xt_ldn, n = x_lnd, x_lnd.transpose(1, 2), x_lnd.shape[1]
        self.mean_ld = x_lnd.mean(1)
        self.gram_ldd = self.xt_ldn @ x_lnd / n
        self.factors: dict[int, torch.Tensor] = {}

    def times(self, w_ldp: torch.Tensor) -> torch.Tensor:
        """(l, n, p) x w + b"""
        return _product(self.x_lnd, w_ldp[:, :-1]).add_(w_ldp[:, -1:])

    def transposed_times(self, r_lnp: torch.Tensor) -> torch.Tensor:
        """(l, d + 1, p) x' r, with the sum of r"""
        return torch.cat([_product(self.xt_ldn, r_lnp), r_lnp.sum(1, keepdim=True)], 1)

    def factor(self, power: int) -> torch.Tensor:
        """Cholesky factor (l, d + 1, d + 1) of the Gram matrix with RATIO**power of regularisation.

        More, where that is lost in float32's rounding: a preconditioner need not be exact.
        """
        if power not in self.factors:
            whole = torch.nn.functional.pad(self.gram_ldd, (0, 1, 0, 1))
            whole[:, -1, :-1] = whole[:, :-1, -1] = self.mean_ld
            ridge = torch.full_like(whole[0, 0], RATIO**power)
            ridge[-1] = 1.0  # that of the intercept's ones: x'x / n has 1 there
            found, failed = torch.linalg.cholesky_ex(whole + ridge.diag())
            self.factors[power] = self.factor(power + 1) if bool(failed.any()) else found
        return self.factors[power]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    p = b.shape[-1]
    if 1 < p < NARROW and not a.is_cuda:
        return (a @ torch.nn.functional.pad(b, (0, NARROW - p)))[..., :p]
    return a @ b


def _solve(features: _Features, y_np: torch.Tensor, mask_np: torch.Tensor, c_p: torch.Tensor, w_ldp: torch.Tensor,
           tolerance: float, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights with intercepts (l, d + 1, p), gradient norms (l, p), which converged (l, p); finished columns rest."""
    counts, positive = mask_np.sum(0), (mask_np * y_np).sum(0)
    constant = (positive == 0) | (positive == counts)
    found_ldp, gradient_lp = torch.zeros_like(w_ldp), torch.zeros_like(w_ldp[:, 0])
    found_ldp[:, -1, constant] = ((positive + 1) / (counts - positive + 1)).log()[constant]
    left = torch.nonzero(~constant).ravel()
    part = _Problems(features, y_np, mask_np / counts.clamp(min=1), 1 / (c_p * counts.clamp(min=1))).only(left)
    w = w_ldp[..., left]
    logits = features.times(w)
    for step in range(steps + 1):
        gradient, curvature = part.derivatives(w, logits)
        gradient_lp[:, left] = gradient.norm(dim=1)
        still = (gradient_lp[:, left] > tolerance).any(0)
        if step == steps or not bool(still.any()):
            found_ldp[..., left] = w
            break
        if not bool(still.all()):
            found_ldp[..., left[~still]] = w[..., ~still]
            left, part = left[still], part.only(still)
            w, logits, gradient, curvature = (t[..., still] for t in (w, logits, gradient, curvature))
        change, change_logits = part.newton_step(gradient, curvature, tolerance)
        length = part.line_search(w, logits, change, change_logits, gradient)
        w, logits = w + length * change, logits + length * change_logits
    return found_ldp, gradient_lp, (gradient_lp <= tolerance) | constant


@dataclass(frozen=True)
class _Problems:
    features: _Features
    y_np: torch.Tensor
    weight_np: torch.Tensor  # mask / n_p
    ridge_p: torch.Tensor

    def only(self, columns: torch.Tensor) -> _Problems:
        return _Problems(self.features, self.y_np[:, columns], self.weight_np[:, columns], self.ridge_p[columns])

    def _penalised(self, w_ldp: torch.Tensor) -> torch.Tensor:
        """Gradient of the penalty; the intercept has none."""
        out = self.ridge_p * w_ldp
        out[:, -1] = 0
        return out

    def loss(self, w_ldp: torch.Tensor, logits_lnp: torch.Tensor) -> torch.Tensor:
        """(l, p)"""
        each = torch.nn.functional.softplus(logits_lnp) - self.y_np * logits_lnp
        return (self.weight_np * each).sum(1) + 0.5 * (self._penalised(w_ldp) * w_ldp).sum(1)

    def derivatives(self, w_ldp: torch.Tensor, logits_lnp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient (l, d, p), and the curvature of each example's loss (l, n, p)."""
        p = logits_lnp.sigmoid()
        gradient = self.features.transposed_times(self.weight_np * (p - self.y_np)) + self._penalised(w_ldp)
        return gradient, self.weight_np * p * (1 - p)

    def preconditioner(self, curvature_lp: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Divides (l, d, p) by curvature x'x / n + ridge, nearly; curvature is the sum over examples."""
        curvature_lp = curvature_lp.clamp(min=1e-12)
        power_p = (self.ridge_p / curvature_lp.mean(0)).log().div(math.log(RATIO)).round().clamp(-20, 20).int()
        groups = [(self.features.factor(power), torch.nonzero(power_p == power).ravel())
                  for power in power_p.unique().tolist()]

        def divide(rest_ldp: torch.Tensor) -> torch.Tensor:
            if len(groups) == 1:
                return torch.cholesky_solve(rest_ldp, groups[0][0]) / curvature_lp[:, None]
            out = torch.empty_like(rest_ldp)
            for factor, columns in groups:
                out[..., columns] = torch.cholesky_solve(rest_ldp[..., columns], factor)
            return out / curvature_lp[:, None]

        return divide

    def newton_step(self, gradient_ldp: torch.Tensor, curvature_lnp: torch.Tensor, tolerance: float, rounds: int = 60
                    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve H step = -gradient by preconditioned conjugate gradients, all columns side by side; with its logits.

        A column rests once its residual is a tenth of the gradient (less, the smaller that is); when half of them
        rest, they leave the matrix products.
        """
        size = gradient_ldp.norm(dim=1)
        enough = (size * size.sqrt().clamp(max=0.1)).clamp(min=0.3 * tolerance)
        step, change = torch.zeros_like(gradient_ldp), torch.zeros_like(curvature_lnp)
        left, part, rest = torch.arange(step.shape[-1], device=step.device), self, -gradient_ldp
        divide = part.preconditioner(curvature_lnp.sum(1))
        direction = scaled = divide(rest)
        power = (rest * scaled).sum(1)
        for _ in range(rounds):
            along = self.features.times(direction)
            curved = self.features.transposed_times(curvature_lnp * along) + part._penalised(direction)
            running = rest.norm(dim=1) > enough
            length = torch.where(running, power / (direction * curved).sum(1).clamp(min=1e-30), 0)[:, None]
            if len(left) == step.shape[-1]:
                step += length * direction
                change += length * along
            else:
                step[..., left] += length * direction
                change[..., left] += length * along
            rest = rest - length * curved
            running = (rest.norm(dim=1) > enough).any(0)
            if not bool(running.any()):
                break
            if int(running.sum()) * 2 <= len(running) > NARROW:
                left, part = left[running], part.only(running)
                rest, direction, power, enough, curvature_lnp = (
                    t[..., running] for t in (rest, direction, power, enough, curvature_lnp))
                divide = part.preconditioner(curvature_lnp.sum(1))
            scaled = divide(rest)
            power, before = (rest * scaled).sum(1), power
            direction = scaled + (power / before.clamp(min=1e-30))[:, None] * direction
        return step, change

    def line_search(self, w_ldp: torch.Tensor, logits_lnp: torch.Tensor, step: torch.Tensor, change: torch.Tensor,
                    gradient_ldp: torch.Tensor) -> torch.Tensor:
        """(l, 1, p) share of the step, halved until the loss falls (Armijo, with room for float32's rounding)."""
        start, slope = self.loss(w_ldp, logits_lnp), (step * gradient_ldp).sum(1)
        length = torch.ones_like(start)
        for _ in range(20):
            loss = self.loss(w_ldp + length[:, None] * step, logits_lnp + length[:, None] * change)
            worse = ~(loss <= start + 1e-4 * length * slope + 1e-6 * start.abs())
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        return length[:, None]
