"""Figures from the tables of a run, in one style, and the page that shows them all."""

from probekit.report.comparisons import global_and_local, pooling_curves, stage_curves, task_curves
from probekit.report.curves import layer_curves, localisation_curves, loss_curves
from probekit.report.figures import Figure, run_figures
from probekit.report.heatmaps import (
           class_heatmap,
           confusion_counts,
           score_heatmap,
           transfer_heatmap,
)
from probekit.report.page import write_images, write_page
from probekit.report.page_explorer import explorer, page_explorers

__all__ = ["Figure", "run_figures", "class_heatmap", "confusion_counts", "explorer", "page_explorers", "global_and_local",
           "layer_curves", "localisation_curves", "loss_curves", "pooling_curves", "score_heatmap", "stage_curves",
           "task_curves", "transfer_heatmap", "write_images", "write_page"]
