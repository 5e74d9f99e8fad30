"""How the layers of a model relate: where the probe of one works on another, and which examples lie close together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from probekit.extraction.store import Activations
from probekit.probes import metrics
from probekit.probes.labels import HEADLINE, LabelledTask
from probekit.probes.weights import ProbeWeights

NEAREST = 5
CHUNK = 1000  # examples that are compared with all others at a time


def relate(store: Activations, pooling: str, tasks: Sequence[LabelledTask], linear: dict[str, ProbeWeights]
           ) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Read every decoder layer once more, with the probes of all layers.

    Parameters
    ----------
    linear : the probes of each task, by its name

    Returns
    -------
    DataFrame
        One row a task and pair of layers: `task`, `layer` (whose states), `probe_layer` (whose probe), `metric` and its
        `value` on the test examples.
    dict
        By task the :func:`nearest` test examples of each, (l, n, 5).
    """
    layers, rows, near = [name for name in store.layers_with(pooling) if name.startswith("lm.")], [], {}
    for b, layer in enumerate(layers):
        x_nd = store[layer, pooling]
        for task in tasks:
            metric, (y_nc, mask_nc, _) = HEADLINE[task.true.kind], task.true.of("test")
            x_test = x_nd[task.rows[task.true.split["test"].numpy()]]
            yes = linear[task.name].everywhere(b, x_test) >= 0
            y, m = y_nc > 0, mask_nc > 0
            counts = [(answer & m).sum(1) for answer in (yes & y, yes & ~y, ~yes & y, ~yes & ~y)]
            counts_lc5 = np.stack([*counts, np.zeros_like(counts[0])], -1)  # no log losses
            value = metrics.scores(counts_lc5, task.true.kind == "binary")[metric, None]
            rows.append(pd.DataFrame({"task": task.name, "layer": layer, "probe_layer": layers, "metric": metric,
                                      "value": value}))
            near.setdefault(task.name, []).append(nearest(linear[task.name].standardised(b, x_test)))
    return pd.concat(rows, ignore_index=True), {name: np.stack(found) for name, found in near.items()}


def nearest(x_nd: np.ndarray, k: int = NEAREST) -> np.ndarray:
    """(n, k) the other rows with the largest cosine similarity, the nearest first; fewer columns where n is small."""
    k = min(k, len(x_nd) - 1)
    x_nd = x_nd / np.linalg.norm(x_nd, axis=1, keepdims=True).clip(1e-12)
    found = []
    for at in range(0, len(x_nd), CHUNK):
        similar = x_nd[at : at + CHUNK] @ x_nd.T
        similar[np.arange(len(similar)), at + np.arange(len(similar))] = -np.inf
        top = np.argpartition(-similar, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(similar, top, 1), axis=1, kind="stable")
        found.append(np.take_along_axis(top, order, 1))
    return np.concatenate(found).astype(np.int32)
