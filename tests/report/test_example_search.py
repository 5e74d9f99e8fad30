import numpy as np
import pandas as pd
import pytest

from probekit.report import example_search

P = np.array([  # (l, n, c): four layers, three examples, two classes
    [[0.9, 0.5], [0.2, 0.1], [0.4, 0.9]],
    [[0.9, 0.5], [0.8, 0.1], [0.6, 0.9]],
    [[0.9, 0.5], [0.8, 0.1], [0.4, 0.9]],
    [[0.9, 0.5], [0.7, 0.1], [0.6, 0.1]],
])
Y = np.array([[1, 0], [0, 1], [1, 1]])
MASK = np.array([[1, 0], [1, 1], [1, 0]])
ROWS = pd.DataFrame({"image_id": [5, 6, 7], "labels": Y.tolist(), "mask": MASK.tolist(),
                     "prompt": ["A red Cup.", "A blue cup, (a car)", "nothing"]})


def test_surprise_is_the_surest_wrong_answer_that_counts():
    np.testing.assert_allclose(example_search.surprise(P, Y, MASK), [0.1, 0.9, 0.4], rtol=1e-6)
    np.testing.assert_allclose(example_search.surprise(P, Y, MASK, 0), [0.1, 0.9, 0.6], rtol=1e-6)


def test_an_example_is_decided_where_its_answers_stop_changing():
    assert example_search.decided(P, Y, MASK).tolist() == [0, 1, 3]  # the second class of the last one does not count
    assert example_search.flips(P, Y, MASK).tolist() == [0, 1, 3]


def test_find_filters_and_orders():
    assert example_search.find(ROWS, P).tolist() == [0, 1, 2]
    assert example_search.find(ROWS, P, "most surprising").tolist() == [1, 2, 0]
    assert example_search.find(ROWS, P, "earliest decided").tolist() == [0, 1, 2]
    assert example_search.find(ROWS, P, "changes its mind").tolist() == [2, 1, 0]
    assert example_search.find(ROWS, P, "changes its mind", "CUP a").tolist() == [1, 0]
    assert example_search.find(ROWS, P, text="(a").tolist() == [1]  # words, not patterns
    assert example_search.find(ROWS, P, images={7, 8}).tolist() == [2]
    assert example_search.find(ROWS, P, "most surprising", "elephant").tolist() == []
    with pytest.raises(ValueError, match="take one of as drawn"):
        example_search.find(ROWS, P, "loudest")
