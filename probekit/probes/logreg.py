r"""L2-regularised logistic regression, many problems at once, solved to convergence.

A problem has the features x of a layer, a column of labels y (0 or 1) with a mask m, and an inverse
strength of regularisation C. It minimises over the weights w and the intercept b

.. math:: \frac{1}{n_p} \sum_i m_i \log(1 + e^{-\tilde y_i (x_i w + b)})
          + \frac{1}{2 C n_p} \lVert w \rVert^2,
          \qquad n_p = \sum_i m_i, \qquad \tilde y = 2 y - 1

This is the objective of scikit-learn's ``LogisticRegression(C=C)`` on the rows with m = 1, divided
by C n_p, so both have the same optimum.

Why a solver of our own: a sweep fits thousands of problems (layers x strengths x classes) to the
same few feature matrices. Those that count in the same rows share x, so that each step is two
matrix products with the problems side by side as columns. ``benchmarks/probe.py`` measured it 20
to 40 times faster than a loop over scikit-learn's ``LogisticRegression``, with the same optimum.

The method is Newton's; its linear systems are solved by preconditioned conjugate gradients (Nocedal
and Wright, chapter 7). Features are first rotated to the principal axes of the training examples
(:class:`Features`), which changes neither logits nor penalty, so that the Hessian is nearly
diagonal and its diagonal is a good preconditioner. Strengths are solved one after the other from
the strongest, each from the solution of the one before it (Friedman et al., section 2.5).

References
----------
J. Nocedal and S. J. Wright, *Numerical Optimization*, 2nd edition, Springer, 2006: algorithms 5.3
(preconditioned conjugate gradients) and 7.1 (line search Newton-CG), equation 3.4 (sufficient
decrease, Armijo).

J. Friedman, T. Hastie and R. Tibshirani, "Regularization Paths for Generalized Linear Models via
Coordinate Descent", Journal of Statistical Software 33, 2010: section 2.5 (paths with warm
starts).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

TOLERANCE = 1e-5
"""Largest gradient norm of a problem that counts as converged."""

FINE = 1e-6
"""A problem is solved once a Newton step promised to lower its loss by less than this share."""

ROUGH = 1e-4
"""The same where problems are solved roughly, to choose among strengths."""

NARROW = 16
"""Columns: on CPUs a product with 2 to 15 columns takes longer than one with 16."""

ROWS = 4096
"""Rows of features that are rotated at a time."""

CONJUGATE_ROUNDS = 60
"""Rounds of conjugate gradients in a Newton step, at most."""

RISES = 2
"""Rises of the validation loss above the lowest one that end the search for the best strength."""

LEAST_CHANGE = 1e-6
"""Share by which a validation loss must differ to be another one: less is float32's rounding."""

SIDE_BY_SIDE = 1_000_000
"""Entries of x of layers and classes that are solved together on CPUs; larger ones one by one."""


class Solution(NamedTuple):
    """Solved problems of l layers, s strengths (or sets of labels) and k columns of labels.

    Attributes
    ----------
    weight_ldsk : Tensor
        (l, d, s, k) weights.
    intercept_lsk : Tensor
        (l, s, k) intercepts.
    gradient_norm_lsk : Tensor
        (l, s, k) norms of the gradient of the objective at the end.
    converged_lsk : Tensor
        (l, s, k) whether that norm is within the tolerance, and the last step promised less than
        :data:`FINE`; without a tolerance, whether it promised less than :data:`ROUGH`.
    steps_lsk : Tensor
        (l, s, k) Newton steps that were taken last, from the solution of the strength before this
        one or from the rough solution of this one.
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

    def select_sets(self, sets: slice) -> Solution:
        """Return the problems of some of the strengths, or sets of labels."""
        return Solution(
            weight_ldsk=self.weight_ldsk[:, :, sets],
            intercept_lsk=self.intercept_lsk[:, sets],
            gradient_norm_lsk=self.gradient_norm_lsk[:, sets],
            converged_lsk=self.converged_lsk[:, sets],
            steps_lsk=self.steps_lsk[:, sets],
        )


class Choice(NamedTuple):
    """The best of several strengths, for each layer and set of labels.

    Attributes
    ----------
    solution : Solution
        (l, ..., s, k) problems of l layers, s sets of labels and k columns, each with the strength
        of its set.
    strength_ls : Tensor
        (l, s) numbers of the strengths with the lowest log loss on validation.
    tried_ls : Tensor
        (l, s) how many strengths were solved, from the strongest on.
    """

    solution: Solution
    strength_ls: torch.Tensor
    tried_ls: torch.Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[Choice]) -> Choice:
        """Put the layers of several choices one after the other."""
        solutions = zip(*(part.solution for part in parts), strict=True)
        return cls(
            solution=Solution(*(torch.cat(of_layers) for of_layers in solutions)),
            strength_ls=torch.cat([part.strength_ls for part in parts]),
            tried_ls=torch.cat([part.tried_ls for part in parts]),
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


class Features:
    """Features of l layers along the principal axes of some of the examples.

    Parameters
    ----------
    x_lnd : Tensor
        (l, n, d) float32 features.
    rows : Tensor, optional
        Numbers of the examples that are centred to mean 0, and that the axes are of; all of them if
        left out.

    Attributes
    ----------
    z_lne : Tensor
        (l, n, e) the same examples along the axes; e is d, or the number of `rows` if that is less.
    """

    def __init__(self, x_lnd: torch.Tensor, rows: torch.Tensor | None = None):
        x_rows = x_lnd if rows is None else x_lnd[:, rows]
        self._mean_l1d = x_rows.mean(1, keepdim=True)
        x_rows = x_rows - self._mean_l1d
        basis = None
        if x_rows.shape[1] < x_rows.shape[2]:
            basis, upper = torch.linalg.qr(x_rows.mT)
            x_rows = upper.mT
        covariance = x_rows.mT @ x_rows / x_rows.shape[1]
        # In float32 the axes would not be orthogonal enough for the penalty to stay the same.
        axes = torch.linalg.eigh(covariance.double()).eigenvectors.to(x_lnd)
        self._axes_lde = axes if basis is None else basis @ axes
        parts = [(part - self._mean_l1d) @ self._axes_lde for part in x_lnd.split(ROWS, dim=1)]
        self.z_lne = torch.cat(parts, 1)

    def turn_back(self, solution: Solution) -> Solution:
        """Return a solution along the axes as one of the features."""
        weight_lesk = solution.weight_ldsk
        weight = (self._axes_lde @ weight_lesk.flatten(2)).unflatten(2, weight_lesk.shape[2:])
        shift = (self._mean_l1d @ weight.flatten(2))[:, 0].unflatten(1, weight.shape[2:])
        intercept = solution.intercept_lsk - shift
        return solution._replace(weight_ldsk=weight, intercept_lsk=intercept)


def log_losses(logits: torch.Tensor, y_nsk: torch.Tensor, mask_nsk: torch.Tensor) -> torch.Tensor:
    """Return the log loss of every example, set and column, in nats; 0 where it does not count.

    Parameters
    ----------
    logits : Tensor
        (l, n, s, k) log-odds of label 1.
    y_nsk, mask_nsk : Tensor
        (n, s, k) labels, 0 or 1, and 1 where an entry counts, else 0.
    """
    return (functional.softplus(logits) - y_nsk * logits) * mask_nsk


def solve_logreg(
    x_lnd: torch.Tensor,
    y_nk: torch.Tensor,
    *,
    mask_nk: torch.Tensor,
    strengths: Sequence[float],
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
    tolerance : float
        Largest norm of the gradient of a problem that counts as converged. The objective is a mean
        over examples.
    max_steps : int
        Newton steps before a problem is given up; `Solution.converged_lsk` then says so.
    memory_gb : float
        Bound on what is held besides x.

    Returns
    -------
    Solution
        A column with a single kind of label has the log-odds log((yes + 1) / (no + 1)) everywhere,
        with the counts of its labels, and counts as converged.
    """
    parts = []
    for x_part in x_lnd.split(layers_together(x_lnd, memory_gb)):
        features = Features(x_part)
        path = _Path(features.z_lne, y_nk[:, None], mask_nk[:, None], memory_gb=memory_gb)
        solutions: list[Solution | None] = [None] * len(strengths)
        for number in sorted(range(len(strengths)), key=strengths.__getitem__):
            path.solve(strengths[number], tolerance=tolerance, max_steps=max_steps)
            solutions[number] = features.turn_back(path.solution())
        fields = zip(*solutions, strict=True)
        parts.append([torch.cat(of_strengths, -2) for of_strengths in fields])
    return Solution(*(torch.cat(of_layers) for of_layers in zip(*parts, strict=True)))


def choose_logreg(
    features: Features,
    y_nsk: torch.Tensor,
    *,
    train_nsk: torch.Tensor,
    validation_nsk: torch.Tensor,
    strengths: Sequence[float],
    tolerance: float | None = TOLERANCE,
    max_steps: int = 60,
    memory_gb: float = 2.0,
) -> Choice:
    """Fit logistic regressions with the strength that has the lowest log loss on validation.

    Each layer and set of labels takes one strength for all of its columns. Strengths are tried from
    the strongest on, until the loss has risen :data:`RISES` times: the weaker ones fit noise, and
    are the ones that take long. Of equal ones the strongest is taken.

    Parameters
    ----------
    features : Features
        Of the n examples in l layers, standardised before.
    y_nsk : Tensor
        (n, s, k) float32 labels, 0 or 1, of s sets of labels; on the device of x.
    train_nsk, validation_nsk : Tensor
        (n, s, k) float32, 1 where an entry counts in training, or in validation, else 0.
    strengths : sequence of float
        Inverse strengths C to choose from.
    tolerance : float or None
        Of the chosen problems, see :func:`solve_logreg`. None solves them as roughly as all
        problems are for the choice, see :data:`ROUGH`.
    max_steps : int
        Newton steps before a problem is given up.
    memory_gb : float
        Bound on what is held besides the features.

    Returns
    -------
    Choice
        Its solution is along the axes of the features.
    """
    parts = [
        _choose_in_layers(
            z_part,
            y_nsk,
            train_nsk=train_nsk,
            validation_nsk=validation_nsk,
            strengths=strengths,
            tolerance=tolerance,
            max_steps=max_steps,
            memory_gb=memory_gb,
        )
        for z_part in features.z_lne.split(layers_together(features.z_lne, memory_gb))
    ]
    return Choice.concatenate(parts)


def layers_together(x_lnd: torch.Tensor, memory_gb: float) -> int:
    """Return how many layers of features (l, n, d) are best solved side by side."""
    _, n, d = x_lnd.shape
    if x_lnd.is_cuda:
        # Four copies of the features, and axes and covariance in double precision.
        return max(1, int(memory_gb * 1e9 / (16 * d * (n + 4 * d))))
    return max(1, SIDE_BY_SIDE // (n * d))


def _choose_in_layers(
    x_lnd: torch.Tensor,
    y_nsk: torch.Tensor,
    *,
    train_nsk: torch.Tensor,
    validation_nsk: torch.Tensor,
    strengths: Sequence[float],
    tolerance: float | None,
    max_steps: int,
    memory_gb: float,
) -> Choice:
    """Choose among strengths in layers that are solved side by side."""
    path = _Path(x_lnd, y_nsk, train_nsk, memory_gb=memory_gb)
    rows = torch.nonzero(validation_nsk.flatten(1).any(1)).ravel()
    x_validation = x_lnd[:, rows]
    y_validation = y_nsk[rows]
    mask_validation = validation_nsk[rows]

    shape = (len(x_lnd), y_nsk.shape[1])
    strength_ls = torch.zeros(shape, dtype=torch.int64, device=x_lnd.device)
    tried_ls = torch.zeros_like(strength_ls)
    rises_ls = torch.zeros_like(strength_ls)
    lowest_ls = torch.full(shape, torch.inf, dtype=torch.float64, device=x_lnd.device)
    for number in sorted(range(len(strengths)), key=strengths.__getitem__):
        searching_ls = rises_ls < RISES
        if not bool(searching_ls.any()):
            break
        path.solve(strengths[number], sets=searching_ls.any(0), max_steps=max_steps)
        losses = log_losses(path.logits(x_validation), y_validation, mask_validation)
        loss_ls = losses.sum((1, 3), dtype=torch.float64)
        is_lower_ls = searching_ls & (loss_ls < lowest_ls * (1 - LEAST_CHANGE))
        is_higher_ls = loss_ls > lowest_ls * (1 + LEAST_CHANGE)
        path.keep(is_lower_ls)
        lowest_ls = torch.where(is_lower_ls, loss_ls, lowest_ls)
        strength_ls[is_lower_ls] = number
        tried_ls += searching_ls
        rises_ls = torch.where(is_lower_ls, 0, rises_ls + is_higher_ls)
    path.go_back()
    if tolerance is not None:
        for number in strength_ls.unique().tolist():
            chosen_ls = strength_ls == number
            path.solve(
                strengths[number],
                sets=chosen_ls.any(0),
                tolerance=tolerance,
                max_steps=max_steps,
            )
            path.keep(chosen_ls)
            path.go_back()
    return Choice(path.solution(), strength_ls=strength_ls, tried_ls=tried_ls)


class _Path:
    """The problems of some layers, sets of labels and columns, at one strength after the other.

    Weights have the intercept as their last entry.
    """

    def __init__(
        self,
        x_lnd: torch.Tensor,
        y_nsk: torch.Tensor,
        mask_nsk: torch.Tensor,
        *,
        memory_gb: float,
    ):
        n_layers, _, d = x_lnd.shape
        self._groups = list(_group_by_rows(x_lnd, y_nsk, mask_nsk, memory_gb=memory_gb))
        shape = (n_layers, *y_nsk.shape[1:])
        count_sk = mask_nsk.sum(0)
        positive_sk = (mask_nsk * y_nsk).sum(0)
        is_constant_sk = (positive_sk == 0) | (positive_sk == count_sk)
        constant_logit_sk = ((positive_sk + 1) / (count_sk - positive_sk + 1)).log()
        weight_lskd = x_lnd.new_zeros(*shape, d + 1)
        weight_lskd[..., -1] = torch.where(is_constant_sk, constant_logit_sk, 0)
        self._now = _State(
            weight_lskd=weight_lskd,
            norm_lsk=x_lnd.new_zeros(shape),
            converged_lsk=torch.ones(shape, dtype=torch.bool, device=x_lnd.device),
            steps_lsk=torch.zeros(shape, dtype=torch.int64, device=x_lnd.device),
        )
        self._kept = self._now.copy()

    def solve(
        self,
        strength: float,
        *,
        sets: torch.Tensor | None = None,
        tolerance: float | None = None,
        max_steps: int,
    ) -> None:
        """Go on to the solutions of one strength, from those of the last one.

        `sets` (s,) says of which sets of labels, if not of all. Without a tolerance, problems are
        solved roughly.
        """
        for group in self._groups:
            group.solve(
                self._now, strength=strength, sets=sets, tolerance=tolerance, max_steps=max_steps
            )

    def logits(self, x_lnd: torch.Tensor) -> torch.Tensor:
        """Return the log-odds (l, n, s, k) with the weights of now."""
        return self.solution().logits(x_lnd)

    def keep(self, chosen_ls: torch.Tensor) -> None:
        """Keep the weights of now, of some layers and sets, for :meth:`go_back`."""
        self._kept.copy_from(self._now, chosen_ls)

    def go_back(self) -> None:
        """Make the kept weights those of now."""
        self._now = self._kept.copy()

    def solution(self) -> Solution:
        """Return the problems as they are now."""
        now = self._now.copy()
        weight_ldsk = now.weight_lskd.movedim(-1, 1)
        return Solution(
            weight_ldsk=weight_ldsk[:, :-1],
            intercept_lsk=weight_ldsk[:, -1],
            gradient_norm_lsk=now.norm_lsk,
            converged_lsk=now.converged_lsk,
            steps_lsk=now.steps_lsk,
        )


@dataclass
class _State:
    """Where the problems of a path are: weights (l, s, k, d + 1), and how far they are solved."""

    weight_lskd: torch.Tensor
    norm_lsk: torch.Tensor
    converged_lsk: torch.Tensor
    steps_lsk: torch.Tensor

    def copy(self) -> _State:
        return _State(*(values.clone() for values in vars(self).values()))

    def copy_from(self, other: _State, chosen_ls: torch.Tensor) -> None:
        """Take over the problems of some layers and sets."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine[chosen_ls] = theirs[chosen_ls]


def _group_by_rows(
    x_lnd: torch.Tensor,
    y_nsk: torch.Tensor,
    mask_nsk: torch.Tensor,
    *,
    memory_gb: float,
) -> Iterator[_Group]:
    """Put columns together that count in the same rows, and side by side those with about as many.

    The sets of labels of a column share its rows: those that count in any of them.
    """
    n_layers, _, d = x_lnd.shape
    counts_nk = mask_nsk.any(1)
    columns_by_rows: dict[bytes, list[int]] = defaultdict(list)
    for column, counts_n in enumerate(counts_nk.T.contiguous().cpu().numpy()):
        columns_by_rows[counts_n.tobytes()].append(column)
    row_sets = []
    for columns in columns_by_rows.values():
        rows = torch.nonzero(counts_nk[:, columns[0]]).ravel()
        if len(rows):
            row_sets.append((rows, columns))
    row_sets.sort(key=lambda row_set: (len(row_set[1]), len(row_set[0])))

    bytes_per_row = 4 * d * n_layers
    needed_bytes = sum(len(rows) for rows, _ in row_sets) * bytes_per_row
    holds_matrices = needed_bytes < memory_gb * 1e9
    if x_lnd.is_cuda:
        most_rows = max(1, int(memory_gb * 1e9 / 8 / bytes_per_row))
    else:
        most_rows = SIDE_BY_SIDE // (n_layers * d)

    batch: list[tuple[torch.Tensor, list[int]]] = []
    for rows, columns in [*row_sets, (torch.empty(0), [])]:
        if batch:
            first_rows, first_columns = batch[0]
            fits = (
                len(columns) == len(first_columns)
                and len(rows) <= 1.3 * len(first_rows)
                and len(rows) * (len(batch) + 1) <= most_rows
            )
            if not fits:
                yield _Group(
                    x_lnd,
                    y_nsk,
                    mask_nsk,
                    rows=[rows_of_one for rows_of_one, _ in batch],
                    columns_gk=torch.tensor([columns_of_one for _, columns_of_one in batch]),
                    holds_matrices=holds_matrices,
                    memory_gb=memory_gb,
                )
                batch = []
        batch.append((rows, columns))


class _Group:
    """Columns of labels with about as many rows, in l layers: b = l x g feature matrices.

    g sets of rows have the columns `columns_gk` each; every one of them has s sets of labels, so
    there are p = s x k problems side by side in each matrix product.
    """

    def __init__(
        self,
        x_lnd: torch.Tensor,
        y_nsk: torch.Tensor,
        mask_nsk: torch.Tensor,
        *,
        rows: Sequence[torch.Tensor],
        columns_gk: torch.Tensor,
        holds_matrices: bool,
        memory_gb: float,
    ):
        n_sets = y_nsk.shape[1]
        device = x_lnd.device
        most = max(len(rows_of_one) for rows_of_one in rows)
        # Rows that fill up repeat the first one, and count nowhere.
        self._rows_gm = torch.stack(
            [
                functional.pad(rows_n, (0, most - len(rows_n)), value=int(rows_n[0]))
                for rows_n in rows
            ]
        )
        self._counts_gm = torch.stack(
            [torch.arange(most, device=device) < len(rows_of_one) for rows_of_one in rows]
        ).to(x_lnd)
        self._x_lnd = x_lnd
        columns_gk = columns_gk.to(device)
        k = columns_gk.shape[1]
        self._set_p = torch.arange(n_sets, device=device).repeat_interleave(k)
        self._column_gp = columns_gk.repeat(1, n_sets)
        place = (self._rows_gm[..., None], self._set_p, self._column_gp[:, None])
        self._y_gmp = y_nsk[place]
        mask_gmp = mask_nsk[place] * self._counts_gm[..., None]
        self._count_gp = mask_gmp.sum(1)
        positive_gp = (mask_gmp * self._y_gmp).sum(1)
        has_both_gp = (positive_gp > 0) & (positive_gp < self._count_gp)
        self._weight_gmp = mask_gmp * has_both_gp[:, None] / self._count_gp[:, None].clamp(min=1)
        self._matrices: _Matrices | None = None
        self._holds_matrices = holds_matrices
        self._most_columns = max(
            1, int(memory_gb * 1e9 / (12 * 4 * len(x_lnd) * self._rows_gm.numel()))
        )

    def _make_matrices(self) -> _Matrices:
        if self._matrices is not None:
            return self._matrices
        x_bmd = self._x_lnd[:, self._rows_gm].flatten(0, 1)
        matrices = _Matrices(x_bmd)
        if self._holds_matrices:
            self._matrices = matrices
        return matrices

    def solve(
        self,
        state: _State,
        *,
        strength: float,
        sets: torch.Tensor | None,
        tolerance: float | None,
        max_steps: int,
    ) -> None:
        """Solve the problems of some sets from where they are in the state, which is changed."""
        n_layers = len(self._x_lnd)
        matrices = self._make_matrices()
        columns = torch.arange(len(self._set_p), device=self._set_p.device)
        if sets is not None:
            columns = columns[sets[self._set_p]]
        for part in columns.split(self._most_columns):
            ridge_gp = 1 / (strength * self._count_gp[:, part].clamp(min=1))
            problems = _Problems(
                matrices=matrices,
                y_bmp=self._y_gmp[..., part].repeat(n_layers, 1, 1),
                weight_bmp=self._weight_gmp[..., part].repeat(n_layers, 1, 1),
                ridge_bp=ridge_gp.repeat(n_layers, 1),
            )
            place = (slice(None), self._set_p[part], self._column_gp[:, part])
            start_bdp = state.weight_lskd[place].flatten(0, 1).mT
            solved = _solve_problems(problems, start_bdp, tolerance=tolerance, max_steps=max_steps)
            state.weight_lskd[place] = solved.w_bdp.mT.unflatten(0, (n_layers, -1))
            state.norm_lsk[place] = solved.norm_bp.unflatten(0, (n_layers, -1))
            state.converged_lsk[place] = solved.converged_bp.unflatten(0, (n_layers, -1))
            state.steps_lsk[place] = solved.steps_bp.unflatten(0, (n_layers, -1))


class _Matrices:
    """b feature matrices of m rows. Weights (b, d + 1, p) have the intercept as their last row."""

    def __init__(self, x_bmd: torch.Tensor):
        self._x_bmd = x_bmd
        ones_b1 = x_bmd.new_ones(len(x_bmd), 1)
        self.variance_bd = torch.cat([x_bmd.square().mean(1), ones_b1], 1)

    def times(self, w_bdp: torch.Tensor) -> torch.Tensor:
        """Return x w + b, (b, m, p)."""
        return _product(self._x_bmd, w_bdp[:, :-1]).add_(w_bdp[:, -1:])

    def transposed_times(self, r_bmp: torch.Tensor) -> torch.Tensor:
        """Return x' r with the sum of r below it, (b, d + 1, p)."""
        return torch.cat([_product(self._x_bmd.mT, r_bmp), r_bmp.sum(1, keepdim=True)], 1)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply matrices (m, ., .), on CPUs in the way that is fastest for so many columns."""
    columns = b.shape[-1]
    if a.is_cuda or columns >= NARROW or (columns == 1 and len(a) == 1):
        return a @ b
    if columns == 1:
        return (a * b.mT).sum(-1, keepdim=True)
    return (a @ functional.pad(b, (0, NARROW - columns)))[..., :columns]


@dataclass(frozen=True)
class _SolvedProblems:
    w_bdp: torch.Tensor
    norm_bp: torch.Tensor
    converged_bp: torch.Tensor
    steps_bp: torch.Tensor


def _solve_problems(
    problems: _Problems, start_bdp: torch.Tensor, *, tolerance: float | None, max_steps: int
) -> _SolvedProblems:
    """Solve p problems with each of b feature matrices, side by side.

    A problem leaves the matrix products once it is solved in all of them. Where a penalty is weak,
    a small gradient alone does not say so: the last step must have promised little too. Without a
    tolerance, problems are solved roughly.
    """
    matrices = problems.matrices
    w_bdp = start_bdp
    solved_bdp = start_bdp.clone()
    norm_bp = torch.zeros_like(solved_bdp[:, 0])
    steps_bp = torch.zeros_like(norm_bp, dtype=torch.int64)
    promise_bp = torch.full_like(norm_bp, torch.inf)
    if tolerance is None:
        largest_norm = torch.inf
        largest_promise = ROUGH
    else:
        largest_norm = tolerance
        largest_promise = FINE

    active = torch.arange(norm_bp.shape[1], device=norm_bp.device)
    logits_bmp = matrices.times(w_bdp)
    for step in range(max_steps + 1):
        gradient_bdp, curvature_bmp = problems.derivatives(w_bdp, logits_bmp)
        norm_bp[:, active] = gradient_bdp.norm(dim=1)
        solved_bp = (norm_bp <= largest_norm) & (promise_bp <= largest_promise) | (norm_bp == 0)
        is_running = ~solved_bp[:, active].all(0)
        if step == max_steps or not bool(is_running.any()):
            solved_bdp[..., active] = w_bdp
            break
        if not bool(is_running.all()):
            solved_bdp[..., active[~is_running]] = w_bdp[..., ~is_running]
            active = active[is_running]
            problems = problems.select(is_running)
            w_bdp = w_bdp[..., is_running]
            logits_bmp = logits_bmp[..., is_running]
            gradient_bdp = gradient_bdp[..., is_running]
            curvature_bmp = curvature_bmp[..., is_running]
        change_bdp, change_logits_bmp = problems.newton_step(
            gradient_bdp, curvature_bmp, tolerance=min(largest_norm, TOLERANCE)
        )
        loss_bp = problems.loss(w_bdp, logits_bmp)
        slope_bp = (change_bdp * gradient_bdp).sum(1)
        length_b1p = problems.line_search(
            w_bdp,
            logits_bmp,
            change_bdp=change_bdp,
            change_logits_bmp=change_logits_bmp,
            loss_bp=loss_bp,
            slope_bp=slope_bp,
        )
        w_bdp = w_bdp + length_b1p * change_bdp
        logits_bmp = logits_bmp + length_b1p * change_logits_bmp
        steps_bp[:, active] += 1
        promise_bp[:, active] = -slope_bp / 2 / loss_bp
    return _SolvedProblems(
        w_bdp=solved_bdp,
        norm_bp=norm_bp,
        converged_bp=solved_bp,
        steps_bp=steps_bp,
    )


@dataclass(frozen=True)
class _Problems:
    """The p problems with each of b feature matrices that are being solved.

    Attributes
    ----------
    matrices : _Matrices
        The feature matrices, of m rows.
    y_bmp : Tensor
        (b, m, p) labels.
    weight_bmp : Tensor
        (b, m, p) weight of each example in the mean, mask / n_p; 0 for a problem with a single kind
        of label, which is solved as it starts.
    ridge_bp : Tensor
        (b, p) weight of the penalty, 1 / (C n_p).
    """

    matrices: _Matrices
    y_bmp: torch.Tensor
    weight_bmp: torch.Tensor
    ridge_bp: torch.Tensor

    def select(self, columns: torch.Tensor) -> _Problems:
        """Return some of the problems, by number or by a boolean mask."""
        return _Problems(
            matrices=self.matrices,
            y_bmp=self.y_bmp[..., columns],
            weight_bmp=self.weight_bmp[..., columns],
            ridge_bp=self.ridge_bp[..., columns],
        )

    def penalty_gradient(self, w_bdp: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the penalty; the intercept has none."""
        gradient_bdp = self.ridge_bp[:, None] * w_bdp
        gradient_bdp[:, -1] = 0
        return gradient_bdp

    def loss(self, w_bdp: torch.Tensor, logits_bmp: torch.Tensor) -> torch.Tensor:
        """Return the objectives, (b, p)."""
        loss_bmp = functional.softplus(logits_bmp) - self.y_bmp * logits_bmp
        penalty_bp = 0.5 * (self.penalty_gradient(w_bdp) * w_bdp).sum(1)
        return (self.weight_bmp * loss_bmp).sum(1) + penalty_bp

    def derivatives(
        self, w_bdp: torch.Tensor, logits_bmp: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient (b, d + 1, p) and the curvature of each example's loss (b, m, p)."""
        p_bmp = logits_bmp.sigmoid()
        loss_gradient_bdp = self.matrices.transposed_times(self.weight_bmp * (p_bmp - self.y_bmp))
        gradient_bdp = loss_gradient_bdp + self.penalty_gradient(w_bdp)
        curvature_bmp = self.weight_bmp * p_bmp * (1 - p_bmp)
        return gradient_bdp, curvature_bmp

    def near_hessian(self, curvature_bmp: torch.Tensor) -> torch.Tensor:
        """Return what is nearly the diagonal of the Hessian, (b, d + 1, p)."""
        curvature_bp = curvature_bmp.sum(1).clamp(min=1e-12)
        hessian_bdp = self.matrices.variance_bd[..., None] * curvature_bp[:, None]
        hessian_bdp[:, :-1] += self.ridge_bp[:, None]
        return hessian_bdp

    def newton_step(
        self, gradient_bdp: torch.Tensor, curvature_bmp: torch.Tensor, *, tolerance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve H step = -gradient by preconditioned conjugate gradients, all columns side by side.

        A column rests once its residual is a tenth of the gradient (less, the smaller the gradient
        is). When half of the columns rest, they leave the matrix products.

        Returns
        -------
        step_bdp : Tensor
            (b, d + 1, p) the step.
        change_bmp : Tensor
            (b, m, p) what it adds to the logits.
        """
        norm_bp = gradient_bdp.norm(dim=1)
        target_bp = (norm_bp * norm_bp.sqrt().clamp(max=0.1)).clamp(min=0.03 * tolerance)
        step_bdp = torch.zeros_like(gradient_bdp)
        change_bmp = torch.zeros_like(curvature_bmp)
        n_columns = step_bdp.shape[-1]
        active = torch.arange(n_columns, device=step_bdp.device)
        problems = self
        hessian_bdp = self.near_hessian(curvature_bmp)
        residual = -gradient_bdp
        scaled = residual / hessian_bdp
        direction = scaled
        energy = (residual * scaled).sum(1)
        for _ in range(CONJUGATE_ROUNDS):
            direction_logits = self.matrices.times(direction)
            curved = self.matrices.transposed_times(curvature_bmp * direction_logits)
            curved = curved + problems.penalty_gradient(direction)
            running = residual.norm(dim=1) > target_bp
            ratio = energy / (direction * curved).sum(1).clamp(min=1e-30)
            length = torch.where(running, ratio, 0)[:, None]
            if len(active) == n_columns:
                step_bdp += length * direction
                change_bmp += length * direction_logits
            else:
                step_bdp[..., active] += length * direction
                change_bmp[..., active] += length * direction_logits
            residual = residual - length * curved
            running = (residual.norm(dim=1) > target_bp).any(0)
            if not bool(running.any()):
                break
            if int(running.sum()) * 2 <= len(running) > NARROW:
                active = active[running]
                problems = problems.select(running)
                residual = residual[..., running]
                direction = direction[..., running]
                energy = energy[..., running]
                target_bp = target_bp[..., running]
                curvature_bmp = curvature_bmp[..., running]
                hessian_bdp = hessian_bdp[..., running]
            scaled = residual / hessian_bdp
            previous_energy = energy
            energy = (residual * scaled).sum(1)
            direction = scaled + (energy / previous_energy.clamp(min=1e-30))[:, None] * direction
        return step_bdp, change_bmp

    def line_search(
        self,
        w_bdp: torch.Tensor,
        logits_bmp: torch.Tensor,
        *,
        change_bdp: torch.Tensor,
        change_logits_bmp: torch.Tensor,
        loss_bp: torch.Tensor,
        slope_bp: torch.Tensor,
    ) -> torch.Tensor:
        """Return the share of the step to take, (b, 1, p): halved until the loss falls enough.

        That is Armijo's condition, with room for float32's rounding.
        """
        length_bp = torch.ones_like(loss_bp)
        for _ in range(20):
            new_loss_bp = self.loss(
                w_bdp + length_bp[:, None] * change_bdp,
                logits_bmp + length_bp[:, None] * change_logits_bmp,
            )
            limit_bp = loss_bp + 1e-4 * length_bp * slope_bp + 1e-6 * loss_bp.abs()
            too_long = ~(new_loss_bp <= limit_bp)
            if not bool(too_long.any()):
                break
            length_bp = torch.where(too_long, length_bp / 2, length_bp)
        return length_bp[:, None]
