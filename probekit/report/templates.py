"""The Jinja templates of this folder, whose values are escaped for HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """Return a template filled with values.

    Parameters
    ----------
    template : str
        File name of a template in this folder.
    **values
        What the template's names stand for. Text is escaped.
    """
    return _ENVIRONMENT.get_template(template).render(**values)
