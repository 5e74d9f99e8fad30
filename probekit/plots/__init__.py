"""Figures from the tables of a run, in one style, and the page that shows them all."""

from probekit.plots.comparisons import global_and_local, pooling_curves, stage_curves, task_curves
from probekit.plots.curves import layer_curves, localisation_curves, loss_curves
from probekit.plots.explorer import explorer, explorers
from probekit.plots.figures import Drawn, all_figures
from probekit.plots.heatmaps import class_heatmap, confusion_counts, score_heatmap, transfer_heatmap
from probekit.plots.page import write_images, write_page

__all__ = ["Drawn", "all_figures", "class_heatmap", "confusion_counts", "explorer", "explorers", "global_and_local",
           "layer_curves", "localisation_curves", "loss_curves", "pooling_curves", "score_heatmap", "stage_curves",
           "task_curves", "transfer_heatmap", "write_images", "write_page"]
