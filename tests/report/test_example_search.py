import numpy as np
import pandas as pd
import pytest

from probekit.report.example_search import (
    clear_example,
    count_flips,
    decision_layer,
    find_counterpart,
    find_examples,
    known_not_said,
    surprise,
)

# Four layers, three examples, two classes.
P_LNC = np.array(
    [
        [[0.9, 0.5], [0.2, 0.1], [0.4, 0.9]],
        [[0.9, 0.5], [0.8, 0.1], [0.6, 0.9]],
        [[0.9, 0.5], [0.8, 0.1], [0.4, 0.9]],
        [[0.9, 0.5], [0.7, 0.1], [0.6, 0.1]],
    ]
)
Y_NC = np.array([[1, 0], [0, 1], [1, 1]])
MASK_NC = np.array([[1, 0], [1, 1], [1, 0]])
ROWS = pd.DataFrame(
    {
        "image_id": [5, 6, 7],
        "labels": Y_NC.tolist(),
        "mask": MASK_NC.tolist(),
        "prompt": ["A red Cup.", "A blue cup, (a car)", "nothing"],
    }
)


def test_surprise_is_the_surest_wrong_answer_that_counts():
    np.testing.assert_allclose(surprise(P_LNC, Y_NC, MASK_NC), [0.1, 0.9, 0.4], rtol=1e-6)
    first_layer = surprise(P_LNC[:1], Y_NC, MASK_NC)
    np.testing.assert_allclose(first_layer, [0.1, 0.9, 0.6], rtol=1e-6)


def test_an_example_is_decided_where_its_answers_stop_changing():
    # The second class of the last example does not count.
    assert decision_layer(P_LNC, Y_NC, MASK_NC).tolist() == [0, 1, 3]
    assert count_flips(P_LNC, Y_NC, MASK_NC).tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("order", "places"),
    [
        ("as drawn", [0, 1, 2]),
        ("most surprising", [1, 2, 0]),
        ("earliest decided", [0, 1, 2]),
        ("changes its mind", [2, 1, 0]),
    ],
)
def test_examples_are_sorted(order, places):
    assert find_examples(ROWS, P_LNC, order=order).tolist() == places


def test_examples_are_found_by_words_and_images():
    assert find_examples(ROWS, P_LNC, order="changes its mind", text="CUP a").tolist() == [1, 0]
    assert find_examples(ROWS, P_LNC, text="(a").tolist() == [1]  # words, not patterns
    assert find_examples(ROWS, P_LNC, image_ids={7, 8}).tolist() == [2]
    assert find_examples(ROWS, P_LNC, order="most surprising", text="elephant").tolist() == []


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="take one of as drawn"):
        find_examples(ROWS, P_LNC, order="loudest")


def test_what_is_known_but_answered_wrongly_comes_first():
    """The probe gives its last answers, the model's own are right, wrong and unsure."""
    right_nc = np.where(Y_NC > 0, 0.9, 0.1)
    said_nc = right_nc.copy()
    said_nc[1] = 1 - said_nc[1]
    p_lnc = np.broadcast_to(right_nc, P_LNC.shape)
    order = "known, but answered wrongly"
    assert find_examples(ROWS, p_lnc, said_nc=said_nc, order=order).tolist()[0] == 1
    known = known_not_said(p_lnc, said_nc, Y_NC, MASK_NC)
    np.testing.assert_allclose(known, [0, 0.8, 0], atol=1e-6)
    with pytest.raises(ValueError, match="unknown order 'known"):
        find_examples(ROWS, p_lnc, order=order)


def test_a_clear_example_is_right_rises_and_has_heat_in_its_boxes():
    p_lnc = np.array([[[0.1, 0.5], [0.2, 0.1], [0.4, 0.6]], [[0.9, 0.1], [0.9, 0.9], [0.7, 0.9]]])
    y_nc = np.array([[1, 0], [1, 1], [1, 1]])
    everywhere = np.full((3, 2), 0.5)
    counts = np.ones((3, 2))

    def clear(in_boxes_nc, labels=y_nc, mask_nc=counts):
        return clear_example(p_lnc, in_boxes_nc, y_nc=labels, mask_nc=mask_nc)

    assert clear(everywhere) == (0, 0)  # rises by 0.8, as one class of the second example
    assert clear(everywhere * [[0.1], [1], [1]]) == (1, 1)
    assert clear(everywhere, mask_nc=np.array([[0, 1], [1, 0], [1, 1]])) == (1, 0)
    wrong = np.array([[1, 1], [1, 0], [1, 1]])  # the last layer of the first two
    assert clear(everywhere, labels=wrong) == (2, 0)
    assert clear(np.zeros((3, 2))) is None
    falling = clear_example(p_lnc[::-1], everywhere, y_nc=y_nc, mask_nc=counts)
    assert falling is None


def test_a_counterpart_is_the_most_alike_prompt_with_the_other_answer():
    rows = pd.DataFrame(
        {
            "image_id": [5, 5, 5, 5, 6],
            "kind": ["binary"] * 5,
            "labels": [[1], [0], [0], [1], [0]],
            "prompt": ["A red cup?", "Two cars?", "A blue cup?", "A red car?", "A red cup!"],
        }
    )
    assert find_counterpart(rows, 0).prompt == "A blue cup?"
    assert find_counterpart(rows, 1).prompt in {"A red cup?", "A red car?"}
    assert find_counterpart(rows, 4) is None
    assert find_counterpart(rows.assign(kind="multilabel"), 0) is None
