r"""Edits of hidden states: a concept erased, as much of something else, or a direction added.

All of them are fitted on pooled states of training examples and applied to single tokens. They are
affine, so what they do to a mean of tokens is what they do to the tokens: states that are erased
token by token are erased in their mean, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from probekit.models.devices import copy_to

# Directions whose share of the largest is smaller are rounding.
RANK_TOLERANCE = 1e-6
# Examples of each answer that a class needs.
FEWEST_EXAMPLES = 2
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the logistic regressions


class NoEdit(ValueError):
    """Why there is no such edit, in one line."""


@dataclass(frozen=True)
class AffineEdit:
    r"""Adds :math:`((h - \mu) A + b) B` to a hidden state h.

    Attributes
    ----------
    mean_d : Tensor
        (d,) :math:`\mu`, of the training states.
    read_dr : Tensor
        (d, r) A, what is read off a state.
    write_rd : Tensor
        (r, d) B, what is written for it.
    shift_r : Tensor or None
        (r,) b; None for zeros.
    """

    mean_d: torch.Tensor
    read_dr: torch.Tensor
    write_rd: torch.Tensor
    shift_r: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of directions r."""
        return len(self.write_rd)

    def added(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (..., d) float32 what is added to hidden states (..., d)."""
        read = (hidden.float() - self.mean_d) @ self.read_dr
        if self.shift_r is not None:
            read = read + self.shift_r
        return read @ self.write_rd

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return edited hidden states (..., d), of the same type."""
        return (hidden.float() + self.added(hidden)).to(hidden.dtype)

    def to(self, device: str) -> AffineEdit:
        """Return the edit in float32 on a device."""
        return AffineEdit(
            copy_to(device, self.mean_d, torch.float32),
            copy_to(device, self.read_dr, torch.float32),
            copy_to(device, self.write_rd, torch.float32),
            None if self.shift_r is None else copy_to(device, self.shift_r, torch.float32),
        )


@dataclass(frozen=True)
class SameNormEdit:
    """Moves each state as far as another edit does, towards the mean within another subspace.

    Attributes
    ----------
    edit : AffineEdit
        The other edit.
    basis_rd : Tensor
        (r, d) an orthonormal basis of the subspace.
    """

    edit: AffineEdit
    basis_rd: torch.Tensor

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return edited hidden states (..., d), of the same type."""
        inside = (hidden.float() - self.edit.mean_d) @ self.basis_rd.T @ self.basis_rd
        distance = self.edit.added(hidden).norm(dim=-1, keepdim=True)
        unit = inside / inside.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        return (hidden.float() - distance * unit).to(hidden.dtype)

    def to(self, device: str) -> SameNormEdit:
        """Return the edit in float32 on a device."""
        return SameNormEdit(self.edit.to(device), copy_to(device, self.basis_rd, torch.float32))


@dataclass(frozen=True)
class Concept:
    """What is known of training examples, and their states at one layer, of one set of tokens.

    Attributes
    ----------
    x_nd : Tensor
        (n, d) float64 states.
    y_nc, mask_nc : Tensor
        (n, c) float64 labels, and 1 where a label counts. Classes with too few examples are left
        out.
    """

    x_nd: torch.Tensor
    y_nc: torch.Tensor
    mask_nc: torch.Tensor

    @classmethod
    def of(cls, x_nd: torch.Tensor, y_nc: torch.Tensor, mask_nc: torch.Tensor) -> Concept:
        """Put states and labels together.

        Parameters
        ----------
        x_nd : Tensor
            (n, d).
        y_nc, mask_nc : Tensor
            (n, c) 0 or 1: labels, and whether they count.

        Raises
        ------
        NoEdit
            No class has enough examples of both answers, there are more classes than directions, or
            states are not finite.
        """
        if not bool(torch.isfinite(x_nd).all()):
            raise NoEdit("states of training examples are not finite")
        mask_nc = mask_nc.double()
        y_nc = y_nc.double() * mask_nc
        yes_c = y_nc.sum(0)
        no_c = mask_nc.sum(0) - yes_c
        is_known_c = torch.minimum(yes_c, no_c) >= FEWEST_EXAMPLES
        if not bool(is_known_c.any()):
            fewest = int(torch.minimum(yes_c, no_c).max())
            raise NoEdit(
                f"{fewest} training example{'' if fewest == 1 else 's'} of one of the answers: it "
                f"takes {FEWEST_EXAMPLES} of each; take more fit_images"
            )
        width = x_nd.shape[1]
        if int(is_known_c.sum()) > width:
            raise NoEdit(
                f"{int(is_known_c.sum())} classes cannot be erased from states that are {width} "
                "wide: take fewer categories"
            )
        return cls(x_nd.double(), y_nc[:, is_known_c], mask_nc[:, is_known_c])

    def most_balanced(self, classes: int) -> Concept:
        """Return the concept with at most so many of its classes, whose labels vary the most."""
        order_c = self.z_nc.square().sum(0).argsort(descending=True)[:classes]
        return Concept(self.x_nd, self.y_nc[:, order_c], self.mask_nc[:, order_c])

    @property
    def z_nc(self) -> torch.Tensor:
        """(n, c) labels less each class's mean over those that count; 0 where one does not."""
        mean_c = self.y_nc.sum(0) / self.mask_nc.sum(0)
        return (self.y_nc - mean_c) * self.mask_nc

    @property
    def mean_d(self) -> torch.Tensor:
        """(d,) mean of the states."""
        return self.x_nd.mean(0)

    @property
    def cross_covariance_dc(self) -> torch.Tensor:
        """(d, c) of states and labels, each class scaled to the variance of its labels.

        Column c is the difference between the mean states of its two answers, where every label
        counts.
        """
        centred_nd = self.x_nd - self.mean_d
        return centred_nd.T @ self.z_nc / self.z_nc.square().sum(0).clamp(min=1e-30)


def leace(concept: Concept) -> AffineEdit:
    r"""Erase a concept so that no linear probe can read it, moving the states as little as can be.

    Parameters
    ----------
    concept : Concept

    Returns
    -------
    AffineEdit
        :math:`r(x) = x - W^+ P_{W \Sigma_{XZ}} W (x - E[X])` with :math:`W = (\Sigma_{XX}^{1/2})^+`
        and :math:`P_{W \Sigma_{XZ}}` the orthogonal projection onto the columns of
        :math:`W \Sigma_{XZ}`.

    Notes
    -----
    Belrose et al. (2023), "LEACE: Perfect linear concept erasure in closed form",
    arXiv:2306.03819, theorem 4.3, equation 1. It erases the concept from the training states
    exactly, whatever :math:`\Sigma_{XX}` is taken for; that of few examples is shrunk (Ledoit and
    Wolf 2004), channel by channel in units of their standard deviation, so that one that is a
    thousand times larger does not decide it. The authors' package cuts singular values below 0.01
    and mixes in another projection, and then leaves some of the concept.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage  # takes a second

    centred_nd = concept.x_nd - concept.mean_d
    scale_d = centred_nd.std(0, correction=0)
    scale_d = torch.where(scale_d > RANK_TOLERANCE * scale_d.max(), scale_d, torch.inf)
    standard_nd = centred_nd / scale_d
    shrinkage = ledoit_wolf_shrinkage(standard_nd.cpu().numpy(), assume_centered=True)
    covariance_dd = standard_nd.T @ standard_nd / len(standard_nd)
    identity_dd = torch.eye(len(scale_d), dtype=torch.float64, device=scale_d.device)
    mean_variance = covariance_dd.diagonal().mean()
    covariance_dd = (1 - shrinkage) * covariance_dd + shrinkage * mean_variance * identity_dd
    variance_d, axes_dd = torch.linalg.eigh(covariance_dd)
    is_used_d = variance_d > RANK_TOLERANCE * variance_d.max()
    root_d = variance_d.clamp(min=0).sqrt()
    whiten_dd = (axes_dd * torch.where(is_used_d, 1 / root_d, 0)) @ axes_dd.T
    colour_dd = (axes_dd * torch.where(is_used_d, root_d, 0)) @ axes_dd.T
    whitened_dc = whiten_dd @ (concept.cross_covariance_dc / scale_d[:, None])
    basis_dr = _orthonormal(whitened_dc)
    finite_scale_d = torch.where(torch.isfinite(scale_d), scale_d, 0)
    return AffineEdit(
        concept.mean_d,
        -(whiten_dd @ basis_dr) / scale_d[:, None],
        basis_dr.T @ colour_dd * finite_scale_d,
    )


def erase_mean_difference(concept: Concept) -> AffineEdit:
    """Project out the differences between the mean states of each class's two answers.

    Parameters
    ----------
    concept : Concept
    """
    return _project_out(concept, concept.cross_covariance_dc)


def erase_logreg(concept: Concept) -> AffineEdit:
    """Project out the directions of logistic regressions, one for each class.

    Their strength is chosen on a fifth of the training examples.

    Parameters
    ----------
    concept : Concept
    """
    from probekit.probes.estimators import LayerwiseLogisticRegression  # loads scikit-learn

    probe = LayerwiseLogisticRegression(C=STRENGTHS, device=concept.x_nd.device)
    is_single = concept.y_nc.shape[1] == 1
    probe.fit(
        concept.x_nd.cpu().numpy(),
        concept.y_nc[:, 0].cpu().numpy() if is_single else concept.y_nc.cpu().numpy(),
        mask=concept.mask_nc.cpu().numpy(),
    )
    return _project_out(concept, torch.from_numpy(probe.coef_.T).to(concept.x_nd))


def _project_out(concept: Concept, direction_dc: torch.Tensor) -> AffineEdit:
    basis_dr = _orthonormal(direction_dc)
    return AffineEdit(concept.mean_d, -basis_dr, basis_dr.T)


def random_edit(edit: AffineEdit, *, seed: int) -> SameNormEdit:
    """Return the control of an edit: a random subspace of its rank, moved by the same norm.

    Parameters
    ----------
    edit : AffineEdit
    seed : int
        Of the subspace.
    """
    generator = torch.Generator().manual_seed(seed)
    directions_dr = torch.randn(len(edit.mean_d), edit.rank, generator=generator)
    basis_dr, _ = torch.linalg.qr(directions_dr.double())
    return SameNormEdit(edit, basis_dr.T.to(edit.mean_d))


def steer(concept: Concept, *, dose: float) -> AffineEdit:
    """Add a multiple of the direction from the mean state of "no" to that of "yes".

    Parameters
    ----------
    concept : Concept
        Of one class.
    dose : float
        In standard deviations of the training states along the direction.
    """
    difference_d1 = concept.cross_covariance_dc[:, :1]
    length = difference_d1.norm()
    if not float(length) > 0:
        raise NoEdit("the mean states of its answers do not differ")
    unit_d1 = difference_d1 / length
    deviation = ((concept.x_nd - concept.mean_d) @ unit_d1).std(correction=0)
    return AffineEdit(
        concept.mean_d, torch.zeros_like(unit_d1), unit_d1.T, shift_r=dose * deviation[None]
    )


def _orthonormal(direction_dc: torch.Tensor) -> torch.Tensor:
    """(d, r) an orthonormal basis of the space that directions span.

    Raises
    ------
    NoEdit
        They are all zero.
    """
    scale_c = direction_dc.norm(dim=0)
    direction_dc = direction_dc[:, scale_c > 0] / scale_c[scale_c > 0]
    if not direction_dc.shape[1]:
        raise NoEdit("the mean states of its answers do not differ")
    basis_dr, size_r, _ = torch.linalg.svd(direction_dc, full_matrices=False)
    return basis_dr[:, size_r > RANK_TOLERANCE * size_r[0]]


ERASURES: dict[str, Callable[[Concept], AffineEdit]] = {
    "leace": leace,
    "mean_difference": erase_mean_difference,
    "logreg": erase_logreg,
}
