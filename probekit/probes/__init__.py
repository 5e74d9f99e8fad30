"""Light classifiers on every layer: their scores, intervals, controls and comparisons."""
