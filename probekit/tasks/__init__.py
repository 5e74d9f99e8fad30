"""From a dataset to examples: which prompt about which image, with which label."""
