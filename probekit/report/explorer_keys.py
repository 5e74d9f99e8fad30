"""The keys of the explorer: a widget that counts presses while the explorer has the focus."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

FOLDER = Path(__file__).parent


class ExplorerKeys(anywidget.AnyWidget):
    """A widget without a picture, to be put anywhere into a box of the class `probekit-explorer`.

    It brings the explorer's style sheet, lets the box take the focus, and keeps what is pressed
    there from the notebook. JupyterLab, Notebook and VS Code show it without an extension of their
    own.

    Attributes
    ----------
    presses : dict of str to int
        How often each key has been pressed, by the name that browsers give it: ``"ArrowLeft"``,
        ``"h"``. Presses that come faster than the kernel answers arrive together.
    """

    _esm = (FOLDER / "explorer_keys.js").read_text(encoding="utf-8")
    _css = (FOLDER / "explorer.css").read_text(encoding="utf-8")
    presses = traitlets.Dict().tag(sync=True)
