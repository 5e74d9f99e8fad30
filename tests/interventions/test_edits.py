"""What an erasure leaves of a concept, and what its control moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probekit import LayerwiseLogisticRegression
from probekit.interventions import edits
from probekit.interventions.edits import Concept, NoEdit
from probekit.probes import bootstrap


def draw(n, *, classes=1, width=48, scale=1.0, seed=0):
    """States of correlated channels, one of them larger, that a linear probe reads labels off."""
    rng = np.random.default_rng([seed, n])
    shared = np.random.default_rng(seed)
    mixing_dd = shared.normal(size=(width, width)) / width**0.5
    direction_cd = shared.normal(size=(classes, width)) * 0.6
    y_nc = (rng.random((n, classes)) < 0.4).astype(float)
    x_nd = rng.normal(size=(n, width)) @ mixing_dd + y_nc @ direction_cd
    x_nd[:, 3] *= scale
    return torch.from_numpy(x_nd), torch.from_numpy(y_nc)


def fit_probe(x_nd, y_nc):
    return LayerwiseLogisticRegression(C=10.0).fit(x_nd.numpy(), _targets(y_nc))


def _targets(y_nc):
    return (y_nc[:, 0] if y_nc.shape[1] == 1 else y_nc).numpy()


def edited(edit, x_nd):
    """Edit float64 states without rounding them."""
    return x_nd + (x_nd - edit.mean_d) @ edit.read_dr @ edit.write_rd


@pytest.mark.parametrize("erasure", ["leace", "mean_difference"])
@pytest.mark.parametrize(("classes", "scale"), [(1, 1.0), (1, 1000.0), (8, 1.0)])
def test_no_probe_reads_what_was_erased_from_training_states(erasure, classes, scale):
    x_nd, y_nc = draw(400, classes=classes, scale=scale)
    edit = edits.ERASURES[erasure](Concept.of(x_nd, y_nc, torch.ones_like(y_nc)))
    assert edit.rank == classes
    erased_nd = edited(edit, x_nd)
    before = fit_probe(x_nd, y_nc).predict_proba(x_nd.numpy())
    after = fit_probe(erased_nd, y_nc).predict_proba(erased_nd.numpy())
    assert np.std(before, axis=0).min() > 0.2
    # The best probe says the same of every example: how frequent the label is.
    assert np.std(after, axis=0).max() < 1e-5


def test_no_probe_reads_what_was_erased_from_test_states():
    holds = []
    for seed in range(20):
        x_nd, y_nc = draw(600, seed=seed)
        test_nd, test_y_nc = draw(400, seed=seed)
        edit = edits.leace(Concept.of(x_nd, y_nc, torch.ones_like(y_nc)))
        probe = fit_probe(edited(edit, x_nd), y_nc)
        right_n = probe.predict(edited(edit, test_nd).numpy()) == test_y_nc[:, 0].numpy()
        curve = bootstrap.mean_curve(right_n[:, None].astype(float), np.arange(400), resamples=500)
        lower, upper = bootstrap.bca_interval(curve)
        majority = max(test_y_nc.mean().item(), 1 - test_y_nc.mean().item())
        holds.append(lower[0] <= majority + 1e-9 and upper[0] >= 0.5)
    assert np.mean(holds) >= 0.95


def test_leace_moves_states_less_than_a_projection_does():
    x_nd, y_nc = draw(400, scale=1000.0)
    concept = Concept.of(x_nd, y_nc, torch.ones_like(y_nc))
    moved = {
        name: (edited(erase(concept), x_nd) - x_nd).norm(dim=1).mean()
        for name, erase in edits.ERASURES.items()
    }
    assert moved["leace"] < 0.5 * moved["mean_difference"]


@pytest.mark.parametrize("classes", [1, 4])
def test_the_logistic_direction_goes_and_others_that_can_be_read_stay(classes):
    x_nd, y_nc = draw(400, classes=classes)
    mask_nc = torch.ones_like(y_nc)
    mask_nc[:20] = 0
    edit = edits.erase_logreg(Concept.of(x_nd, y_nc, mask_nc))
    assert edit.rank == classes
    erased_nd = edited(edit, x_nd)
    first = fit_probe(x_nd, y_nc)
    along_before = (x_nd @ edit.write_rd.T).std(0)
    assert ((erased_nd @ edit.write_rd.T).std(0) < 1e-6 * along_before).all()
    after = fit_probe(erased_nd, y_nc).score(erased_nd.numpy(), _targets(y_nc))
    assert 0.6 * classes**-0.5 < after <= first.score(x_nd.numpy(), _targets(y_nc))


def test_what_is_erased_token_by_token_is_erased_from_their_mean():
    x_nd, y_nc = draw(300)
    edit = edits.leace(Concept.of(x_nd, y_nc, torch.ones_like(y_nc)))
    noise_ntd = torch.randn(300, 5, x_nd.shape[1], dtype=torch.float64)
    token_ntd = x_nd[:, None] + noise_ntd - noise_ntd.mean(1, keepdim=True)
    mean_nd = edited(edit, token_ntd).mean(1)
    torch.testing.assert_close(mean_nd, edited(edit, x_nd))


def test_labels_that_do_not_count_change_nothing():
    x_nd, y_nc = draw(300)
    mask_nc = torch.ones_like(y_nc)
    mask_nc[::3] = 0
    edit = edits.erase_mean_difference(Concept.of(x_nd, y_nc, mask_nc))
    turned_nc = torch.where(mask_nc > 0, y_nc, 1 - y_nc)
    same = edits.erase_mean_difference(Concept.of(x_nd, turned_nc, mask_nc))
    torch.testing.assert_close(edit.read_dr.abs(), same.read_dr.abs())


def test_a_random_subspace_moves_every_state_by_the_same_norm():
    x_nd, y_nc = draw(200, classes=3)
    edit = edits.leace(Concept.of(x_nd, y_nc, torch.ones_like(y_nc))).to("cpu")
    control = edits.random_edit(edit, seed=0).to("cpu")
    x_nd = x_nd.float()
    torch.testing.assert_close(
        (control(x_nd) - x_nd).norm(dim=1), (edit(x_nd) - x_nd).norm(dim=1), rtol=1e-4, atol=1e-4
    )
    assert control.basis_rd.shape == (3, x_nd.shape[1])
    other = edits.random_edit(edit, seed=1)
    assert (control.basis_rd @ other.basis_rd.T.float()).abs().max() < 0.9


def test_a_dose_is_in_standard_deviations_along_the_direction():
    x_nd, y_nc = draw(300)
    concept = Concept.of(x_nd, y_nc, torch.ones_like(y_nc))
    added_d = edits.steer(concept, dose=2.0).to("cpu").added(x_nd[:1].float())[0].double()
    along_d = added_d / added_d.norm()
    assert added_d.norm() == pytest.approx(2 * float((x_nd @ along_d).std(correction=0)), rel=1e-3)
    difference_d = x_nd[y_nc[:, 0] == 1].mean(0) - x_nd[y_nc[:, 0] == 0].mean(0)
    assert along_d @ difference_d == pytest.approx(float(difference_d.norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, torch.cat([torch.ones(1, 1), torch.zeros(len(y) - 1, 1)])), "1 training"),
        (lambda x, y: (x, torch.zeros_like(y)), "0 training examples of one of the answers"),
        (lambda x, y: (x.index_fill(0, torch.tensor([5]), torch.nan), y), "not finite"),
        (lambda x, y: (torch.zeros_like(x), y), "do not differ"),
        (lambda x, y: (x[:, :4], draw(len(x), classes=6)[1]), "6 classes cannot be erased"),
    ],
)
def test_what_cannot_be_erased_is_named(change, message):
    x_nd, y_nc = change(*draw(60))
    with pytest.raises(NoEdit, match=message):
        edits.leace(Concept.of(x_nd, y_nc, torch.ones_like(y_nc)))
