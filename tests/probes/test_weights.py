import numpy as np
import pytest

from probekit.probes.weights import ProbeWeights


@pytest.fixture
def weights():
    """Probes of two layers: layer 1 is shifted and larger, layer 0 has a constant feature."""
    rng = np.random.default_rng(0)
    return ProbeWeights(
        weight_ldc=rng.normal(size=(2, 3, 4)).astype(np.float32),
        intercept_lc=rng.normal(size=(2, 4)).astype(np.float32),
        mean_ld=np.array([[0.0, 0, 0], [5, 5, 5]]),
        scale_ld=np.array([[1.0, 1, np.inf], [10, 10, 10]]),
    )


@pytest.fixture
def x_nd():
    return np.random.default_rng(1).normal(size=(40, 3))


def test_a_probe_reads_other_layers_standardised_as_their_own(weights, x_nd):
    logits_lnc = weights.logits_on(1, 10 * x_nd + 5)
    for layer in range(2):
        expected = x_nd @ weights.weight_ldc[layer] + weights.intercept_lc[layer]
        np.testing.assert_allclose(logits_lnc[layer], expected, rtol=1e-4, atol=1e-5)


def test_raw_weights_give_the_same_logits_without_standardising(weights, x_nd):
    weight_dc, intercept_c = weights.raw_weights(0)
    np.testing.assert_allclose(weight_dc.numpy()[2], 0)  # a constant feature counts for nothing
    logits_nc = x_nd @ weight_dc.numpy() + intercept_c.numpy()
    np.testing.assert_allclose(logits_nc, weights.logits_on(0, x_nd)[0], rtol=1e-4, atol=1e-5)
