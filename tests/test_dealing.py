from collections import Counter

import numpy as np
import pytest

from probekit.dealing import dealt, paired


def test_nobody_gets_what_clashes():
    rng = np.random.default_rng(0)
    kind = rng.integers(3, size=300)
    order = dealt(300, lambda i, j: kind[i] == kind[j], rng)
    assert sorted(order) == list(range(300)) and (kind[order] != kind).all()


def test_what_cannot_be_dealt_out_is_said_soon():
    with pytest.raises(ValueError, match="3 of 3 images"):
        dealt(3, lambda i, j: True, np.random.default_rng(0))


def test_pairs_have_one_key_two_states_and_two_images():
    rng = np.random.default_rng(0)
    images, keys, states = (rng.integers(high, size=2000).tolist() for high in (700, 12, 3))
    once = list({(image, key): k for k, (image, key) in enumerate(zip(images, keys, strict=True))}.values())
    images, keys, states = ([column[k] for k in once] for column in (images, keys, states))
    pairs = paired(images, keys, states, rng)
    used = Counter(images[k] for pair in pairs for k in pair)
    assert len(pairs) > 300 and max(used.values()) == 1
    assert all(keys[a] == keys[b] and states[a] != states[b] for a, b in pairs)


def test_as_many_pairs_as_the_states_allow():
    states = ["one"] * 6 + ["two"] * 3 + ["three"] * 2
    assert len(paired(range(11), ["key"] * 11, states, np.random.default_rng(0))) == 5
    assert not paired(range(6), ["key"] * 6, ["one"] * 6, np.random.default_rng(0))
    assert not paired([], [], [], np.random.default_rng(0))
