"""The model of an extraction once more, for what its stored states do not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probekit import paths
from probekit.models.load import Vlm, load_vlm

# Settings of an extraction that its model is loaded with again.
LOADING_SETTINGS = ("revision", "dtype", "untrained", "seed", "trust_remote_code")


def reload_model(
    settings: Mapping[str, Any],
    *,
    home: paths.Home,
    device: str | None = None,
    with_head: bool = False,
    remedy: str = "",
) -> Vlm:
    """Load a model as it was extracted.

    Parameters
    ----------
    settings : mapping
        The `settings` of the extraction's ``meta.json``.
    home : Home
        Where relative folders start.
    device : str or None
        See :func:`probekit.models.load.load_vlm`, as for `with_head`.
    with_head : bool
    remedy : str
        What to do without the model, for the message that it is not there.

    Raises
    ------
    OSError, ValueError
        It cannot be loaded again.
    """
    try:
        return load_vlm(
            settings["model"],
            device=device,
            home=home,
            with_head=with_head,
            **{name: settings[name] for name in LOADING_SETTINGS},
        )
    except OSError as error:
        if not remedy:
            raise
        raise OSError(f"{error}; {remedy}") from error
