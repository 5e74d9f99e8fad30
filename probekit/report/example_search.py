"""Which test examples are worth a look, by their words, their image and their answers by layer."""

from __future__ import annotations

from collections.abc import Callable, Container

import numpy as np
import pandas as pd

from probekit.report.marked_words import likeness


def surprise(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray) -> np.ndarray:
    """Measure how sure the last layer's probe is of a wrong answer.

    Parameters
    ----------
    p_lnc : ndarray, (l, n, c)
        Probabilities.
    y_nc, mask_nc : ndarray, (n, c)
        Labels 0 or 1, and 1 where a label counts.

    Returns
    -------
    ndarray, (n,)
        The largest distance of a probability to its label, from 0 to 1.
    """
    distance_nc = np.abs(p_lnc[-1].astype(np.float32) - y_nc)
    return (distance_nc * mask_nc).max(axis=1)


def decision_layer(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray) -> np.ndarray:
    """Find the first layer from which on all answers stay what they are at the last layer.

    Parameters
    ----------
    p_lnc, y_nc, mask_nc
        See :func:`surprise`; the labels play no role.

    Returns
    -------
    ndarray, (n,)
        Numbers of layers.
    """
    answer_lnc = p_lnc >= 0.5
    differs_lnc = (answer_lnc != answer_lnc[-1:]) & (mask_nc > 0)
    differs_ln = differs_lnc.any(axis=2)
    layers_after_last_change_n = differs_ln[::-1].argmax(axis=0)
    return np.where(differs_ln.any(axis=0), len(p_lnc) - layers_after_last_change_n, 0)


def count_flips(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray) -> np.ndarray:
    """Count how often answers change from one layer to the next.

    Parameters
    ----------
    p_lnc, y_nc, mask_nc
        See :func:`surprise`; the labels play no role.

    Returns
    -------
    ndarray, (n,)
        Changes of all answers of an example together.
    """
    flips_lnc = np.diff(p_lnc >= 0.5, axis=0) & (mask_nc > 0)
    return flips_lnc.sum(axis=(0, 2))


def known_not_said(
    p_lnc: np.ndarray, said_nc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray
) -> np.ndarray:
    """Measure how much more the last layer's probe is of the right answer than the model is.

    Parameters
    ----------
    p_lnc, y_nc, mask_nc
        See :func:`surprise`.
    said_nc : ndarray, (n, c)
        Probabilities of what the model says.

    Returns
    -------
    ndarray, (n,)
        From -1 to 1: the probability that the probe gives the true labels less the model's own.
    """
    more_nc = p_lnc[-1].astype(np.float32) - said_nc.astype(np.float32)
    return (np.where(y_nc > 0, more_nc, -more_nc) * mask_nc).sum(1) / mask_nc.sum(1).clip(1)


def clear_example(
    p_lnc: np.ndarray, in_boxes_nc: np.ndarray, *, y_nc: np.ndarray, mask_nc: np.ndarray
) -> tuple[int, int] | None:
    """Find the example that shows best what a probe reads, and the class that it shows it of.

    Of the examples whose counted answers are all right at the last layer, it is the one with the
    largest product of two numbers, each of one class that is truly there: the rise of its
    probability from the first layer to the last, and the share of its heat that lies in its boxes.
    Of equal ones it is the first.

    Parameters
    ----------
    p_lnc, y_nc, mask_nc
        See :func:`surprise`.
    in_boxes_nc : ndarray, (n, c)
        Share of the last layer's heat that lies in the class's boxes; 0 where there is none.

    Returns
    -------
    tuple of int, or None
        Row number of the example and number of the class; None where no class that is truly there
        has heat in its boxes and a probability that rises.
    """
    is_right_nc = ((p_lnc[-1] >= 0.5) == (y_nc > 0)) | (mask_nc == 0)
    rise_nc = p_lnc[-1].astype(np.float32) - p_lnc[0].astype(np.float32)
    clearness_nc = rise_nc * in_boxes_nc * (y_nc > 0) * (mask_nc > 0)
    clearness_nc[~is_right_nc.all(axis=1)] = 0
    if not clearness_nc.max(initial=0) > 0:
        return None
    place, c = np.unravel_index(clearness_nc.argmax(), clearness_nc.shape)
    return int(place), int(c)


def find_counterpart(rows: pd.DataFrame, place: int) -> pd.Series | None:
    """Find what else is asked about an image, with the other answer: the caption that is wrong.

    Parameters
    ----------
    rows : DataFrame
        A task's n test examples.
    place : int
        Row number of an example.

    Returns
    -------
    Series or None
        Of the examples of the same image whose right answer is the other one, that with the most
        alike prompt; None without one, and for tasks that are not binary.
    """
    row = rows.iloc[place]
    if row.kind != "binary":
        return None
    same_image = rows[rows.image_id == row.image_id]
    others = [other for _, other in same_image.iterrows() if other.labels[0] != row.labels[0]]
    if not others:
        return None
    return max(others, key=lambda other: likeness(row.prompt, other.prompt))


UNSORTED = "as drawn"
KNOWN_NOT_SAID = "known, but answered wrongly"

# By name of an order the function that gives each example its sort key, from low to high.
SORT_KEYS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "most surprising": lambda p_lnc, y_nc, mask_nc: -surprise(p_lnc, y_nc, mask_nc),
    "earliest decided": decision_layer,
    "changes its mind": lambda p_lnc, y_nc, mask_nc: -count_flips(p_lnc, y_nc, mask_nc),
}
ORDERS = (UNSORTED, *SORT_KEYS)


def find_examples(
    rows: pd.DataFrame,
    p_lnc: np.ndarray,
    *,
    said_nc: np.ndarray | None = None,
    order: str = UNSORTED,
    text: str = "",
    image_ids: Container | None = None,
) -> np.ndarray:
    """Find the examples with some words in their prompt and one of some images, in an order.

    Parameters
    ----------
    rows : DataFrame
        A task's n test examples.
    p_lnc : ndarray, (l, n, c)
        Their probabilities.
    said_nc : ndarray, (n, c), optional
        Probabilities of what the model says, for the order :data:`KNOWN_NOT_SAID`.
    order : str
        One of :data:`ORDERS`, or :data:`KNOWN_NOT_SAID`; examples of equal rank keep their order.
    text : str
        Words that must all be in the prompt, in upper or lower case.
    image_ids : set, optional
        Ids of images; all of them unless they are named.

    Returns
    -------
    ndarray of int
        Row numbers.

    Raises
    ------
    ValueError
        No such order.
    """
    orders = ORDERS if said_nc is None else (*ORDERS, KNOWN_NOT_SAID)
    if order not in orders:
        raise ValueError(f"unknown order {order!r}: take one of {', '.join(orders)}")
    matches = np.ones(len(rows), bool)
    if image_ids is not None:
        matches &= rows.image_id.isin(image_ids).to_numpy()
    prompts = rows.prompt.str.lower()
    for word in text.lower().split():
        matches &= prompts.str.contains(word, regex=False).to_numpy()
    places = np.flatnonzero(matches)
    if order == UNSORTED or len(places) == 0:
        return places
    y_nc = np.array(rows.labels.tolist())
    mask_nc = np.array(rows["mask"].tolist())
    if order == KNOWN_NOT_SAID and said_nc is not None:
        sort_key_n = -known_not_said(p_lnc, said_nc, y_nc, mask_nc)
    else:
        sort_key_n = SORT_KEYS[order](p_lnc, y_nc, mask_nc)
    return places[np.argsort(sort_key_n[places], kind="stable")]
