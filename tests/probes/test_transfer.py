import numpy as np

from probekit.probes import transfer
from probekit.probes.weights import ProbeWeights


def test_nearest_are_the_most_similar_others():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2300, 6)).astype(np.float32)  # more than two chunks
    x[1700] = 3 * x[4] + 0.01
    near = transfer.nearest(x)
    assert near.shape == (2300, 5) and near[4, 0] == 1700 and near[1700, 0] == 4
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    similar = unit @ unit[1234]
    similar[1234] = -2
    assert near[1234].tolist() == np.argsort(-similar)[:5].tolist()
    assert transfer.nearest(x[:3]).shape == (3, 2)


def test_a_probe_reads_other_layers_standardised_as_their_own():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    weight, intercept = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    mean, scale = np.array([[0.0, 0, 0], [5, 5, 5]]), np.array([[1.0, 1, np.inf], [10, 10, 10]])
    both = ProbeWeights(weight, intercept, mean, scale)
    found = both.everywhere(1, 10 * x + 5)
    np.testing.assert_allclose(found[1], x @ weight[1] + intercept[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[0], x @ weight[0] + intercept[0], rtol=1e-4, atol=1e-5)
    raw, at_zero = both.raw(0)  # a constant feature counts for nothing
    np.testing.assert_allclose(raw.numpy()[2], 0)
    np.testing.assert_allclose(x @ raw.numpy() + at_zero.numpy(), both.everywhere(0, x)[0], rtol=1e-4, atol=1e-5)
