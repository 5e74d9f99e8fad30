"""Look-ups in figures that several tests share."""

from __future__ import annotations

import plotly.graph_objects as go


def curves_by_name(figure: go.Figure) -> dict[str, go.Scatter]:
    """The traces that answer to hovering, by name: curves, without bands, plateaus and legend."""
    return {trace.name: trace for trace in figure.data if trace.hovertemplate}
