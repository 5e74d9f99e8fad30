"""Which test examples are worth a look: by what they show and say, and by how answers go through the layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd


def surprise(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray, layer: int = -1) -> np.ndarray:
    """(n,) how sure the probe of a layer is of a wrong answer: the largest distance of a probability to its label."""
    return (np.abs(p_lnc[layer].astype(np.float32) - y_nc) * mask_nc).max(1)


def decided(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray) -> np.ndarray:
    """(n,) the first layer from which on all answers stay what they are at the last one."""
    differs_ln = (((p_lnc >= 0.5) != (p_lnc[-1:] >= 0.5)) & (mask_nc > 0)).any(2)
    return np.where(differs_ln.any(0), len(p_lnc) - differs_ln[::-1].argmax(0), 0)


def flips(p_lnc: np.ndarray, y_nc: np.ndarray, mask_nc: np.ndarray) -> np.ndarray:
    """(n,) how often answers change from one layer to the next."""
    return (np.diff(p_lnc >= 0.5, axis=0) & (mask_nc > 0)).sum((0, 2))


ORDERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None] = {
    "as drawn": None,
    "most surprising": lambda *of: -surprise(*of),
    "earliest decided": decided,
    "changes its mind": lambda *of: -flips(*of),
}


def find(rows: pd.DataFrame, p_lnc: np.ndarray, order: str = "as drawn", text: str = "", images: set | None = None
         ) -> np.ndarray:
    """Places of the examples that hold a text in their prompt and show one of the images, in an order.

    Parameters
    ----------
    rows : a task's test examples, n of them
    p_lnc : their probabilities
    order : name out of :data:`ORDERS`; those that come equally keep their order
    text : words that must all be in the prompt, whatever their case
    images : ids of images; None takes all
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}: take one of {', '.join(ORDERS)}")
    prompts = rows.prompt.str.lower()
    kept = np.ones(len(rows), bool) if images is None else rows.image_id.isin(images).to_numpy()
    for word in text.lower().split():
        kept &= prompts.str.contains(word, regex=False).to_numpy()
    places = np.flatnonzero(kept)
    if ORDERS[order] and len(places):
        y, mask = (np.array(rows[name].tolist()) for name in ("labels", "mask"))
        places = places[np.argsort(ORDERS[order](p_lnc, y, mask)[places], kind="stable")]
    return places
