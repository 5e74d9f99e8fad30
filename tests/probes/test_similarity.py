"""Layers are compared by debiased CKA, and counted by their effective rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from probekit.probes.similarity import (
    LayerGrams,
    compare_models,
    effective_rank,
    layer_similarity,
)
from tests.support.tables import planted_activations


def grams_of(*layers_nd: np.ndarray, model: str = "a") -> LayerGrams:
    grams = []
    for x_nd in layers_nd:
        centred_nd = torch.from_numpy(x_nd - x_nd.mean(0)).double()
        grams.append((centred_nd @ centred_nd.T).float())
    names = [f"lm.{k:02d}" for k in range(len(grams))]
    images = [f"{i}.jpg" for i in range(len(layers_nd[0]))]
    return LayerGrams(model, names, images, torch.stack(grams))


def hsic_by_definition(k_nn: np.ndarray, l_nn: np.ndarray) -> float:
    """Song et al. (2012), equation 5, before its common factor."""
    n = len(k_nn)
    k_nn = k_nn - np.diag(np.diag(k_nn))
    l_nn = l_nn - np.diag(np.diag(l_nn))
    ones = np.ones(n)
    total = np.trace(k_nn @ l_nn)
    total += ones @ k_nn @ ones * (ones @ l_nn @ ones) / ((n - 1) * (n - 2))
    total -= 2 * ones @ k_nn @ l_nn @ ones / (n - 2)
    return total / (n * (n - 3))


def cka_by_definition(x_nd: np.ndarray, y_ne: np.ndarray) -> float:
    k_nn = x_nd @ x_nd.T
    l_nn = y_ne @ y_ne.T
    cross = hsic_by_definition(k_nn, l_nn)
    return cross / np.sqrt(hsic_by_definition(k_nn, k_nn) * hsic_by_definition(l_nn, l_nn))


@pytest.fixture(scope="module")
def states():
    rng = np.random.default_rng(0)
    x_nd = rng.normal(size=(40, 6))
    y_nd = 0.7 * x_nd + 0.7 * rng.normal(size=(40, 6))
    return x_nd, y_nd


@pytest.mark.parametrize("n", [5, 12, 40])
def test_cka_is_that_of_its_formula(states, n):
    x_nd, y_nd = (one[:n] for one in states)
    (row,) = layer_similarity(grams_of(x_nd), grams_of(y_nd, model="b")).itertuples()
    assert row.cka == pytest.approx(cka_by_definition(x_nd, y_nd), abs=1e-4)
    assert (row.model, row.other_model, row.n) == ("a", "b", n)


def test_rotation_scale_and_shift_change_nothing(states):
    x_nd, y_nd = states
    rng = np.random.default_rng(1)
    turn_dd, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    changed_nd = 17 * x_nd @ turn_dd + rng.normal(size=6)
    plain = layer_similarity(grams_of(x_nd), grams_of(y_nd))
    changed = layer_similarity(grams_of(changed_nd), grams_of(y_nd))
    np.testing.assert_allclose(plain[["cka", "lo", "hi"]], changed[["cka", "lo", "hi"]], atol=1e-4)
    same = layer_similarity(grams_of(x_nd, y_nd), grams_of(x_nd, y_nd))
    diagonal = same[same.layer == same.other_layer]
    np.testing.assert_allclose(diagonal[["cka", "lo", "hi"]], 1.0, atol=1e-5)


def test_unrelated_states_in_many_dimensions_are_near_zero():
    """The biased estimate would be near 1: there are as many dimensions as images."""
    rng = np.random.default_rng(0)
    a = grams_of(rng.normal(size=(60, 400)))
    b = grams_of(rng.normal(size=(60, 400)))
    (row,) = layer_similarity(a, b).itertuples()
    assert abs(row.cka) < 0.1
    assert row.lo < 0 < row.hi


def test_a_bootstrap_sample_weighs_images(states):
    """An image that is drawn twice counts twice, and is not compared with itself."""
    from probekit.probes.similarity import _hsic, _without_diagonal

    x_nd, y_nd = states
    a = _without_diagonal(grams_of(x_nd).gram_lnn)[0]
    b = _without_diagonal(grams_of(y_nd).gram_lnn)
    weight_n = torch.ones(40)
    weight_n[3] = 0
    dropped = _hsic(a, b, weight_n[None])[0, 0]
    kept = np.delete(np.arange(40), 3)
    k_nn = (a[kept][:, kept]).double().numpy()
    l_nn = (b[0][kept][:, kept]).double().numpy()
    expected = hsic_by_definition(k_nn, l_nn) * 39 * 36
    assert float(dropped) == pytest.approx(expected, rel=1e-3)


def test_the_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    x_nd = rng.normal(size=(400, 8))
    one_direction = np.outer(rng.normal(size=400), rng.normal(size=8))
    few = x_nd * np.array([1, 1, 1, 0, 0, 0, 0, 0])
    ranks = effective_rank(grams_of(x_nd, one_direction, few))
    eigenvalues = np.linalg.eigvalsh(np.cov(x_nd.T))
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert ranks.effective_rank[0] == pytest.approx(expected, rel=1e-3)
    assert ranks.effective_rank[1] == pytest.approx(1, abs=1e-3)
    assert ranks.effective_rank[2] == pytest.approx(3, abs=0.1)
    assert (ranks.lo <= ranks.hi).all()


def test_models_are_compared_in_pairs():
    first = planted_activations(images=40)
    rng = np.random.default_rng(0)
    states = {key: rng.normal(size=x_nd.shape) for key, x_nd in first.states.items()}
    second = replace(first, states=states, model="b")
    similarity, ranks = compare_models([first, second], pooling="mean", resamples=20)
    assert len(similarity) == 3 * 16
    assert len(ranks) == 8
    assert set(similarity.pooling) == {"mean"}
    pairs = similarity.groupby(["model", "other_model"]).size()
    assert pairs.to_dict() == {("planted", "planted"): 16, ("planted", "b"): 16, ("b", "b"): 16}
    other = replace(planted_activations(images=24), model="other")
    similarity, _ = compare_models([first, other], pooling="mean", resamples=20)
    pairs = similarity.groupby(["model", "other_model"]).size()
    assert pairs.to_dict() == {("planted", "planted"): 16, ("other", "other"): 16}
    grams = [LayerGrams.of(one, pooling="mean") for one in (first, other)]
    with pytest.raises(ValueError, match="other images"):
        layer_similarity(*grams)
