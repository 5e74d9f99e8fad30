"""Checkpoints before their weights are read: the hub or its cache, adapters, broken files."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from probekit import paths
from probekit.models.adapters import find_adapter
from probekit.models.architectures import find_special_case
from probekit.models.presets import locate, pinned_revision, refuse_adapter

LFS_POINTER = b"version https://git-lfs"


class Checkpoint(NamedTuple):
    """A checkpoint whose config has been read.

    Attributes
    ----------
    source : str
        An absolute folder, or a hub id.
    commit : str or None
        That of a hub id at present; None for a folder.
    hub_options : dict
        What transformers is given to find the same files again.
    config : transformers.PreTrainedConfig
    """

    source: str
    commit: str | None
    hub_options: dict[str, Any]
    config: Any


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    home: str | Path | paths.Home | None = None,
) -> Checkpoint:
    """Find a checkpoint and read its config.

    Parameters
    ----------
    model : str
    revision : str, optional
    trust_remote_code : bool
    home : str, Path or Home, optional
        This and the others: see :func:`probekit.models.load.load_vlm`.

    Raises
    ------
    FileNotFoundError, OSError
        There is no such checkpoint in the folder, on the hub, or in the cache of a hub that does
        not answer.
    ValueError
        It is an adapter, or its architecture cannot be read, or transformers does not know it.
    """
    from huggingface_hub import hf_hub_download
    from transformers import AutoConfig  # takes seconds
    from transformers.utils.peft_utils import find_adapter_config_file

    source = locate(model, home)
    is_folder = Path(source).is_absolute()
    revision = pinned_revision(model, revision, home=home)
    hub_options: dict[str, Any] = {
        "revision": revision,
        "local_files_only": not is_folder and must_use_cache(source, revision),
    }
    adapter_config = find_adapter_config_file(source, **hub_options)
    if adapter_config is not None:
        refuse_adapter(source, Path(adapter_config))
    with broken_files_named(source):
        config = AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, **hub_options
        )
    find_special_case(config)  # refuses what cannot be read before anything else is fetched
    commit = None
    if not is_folder:
        commit = Path(hf_hub_download(source, "config.json", **hub_options)).parent.name
        hub_options["revision"] = commit  # all other files are those of the same commit
    hub_options["trust_remote_code"] = trust_remote_code
    return Checkpoint(source, commit, hub_options, config)


def resolve_commit(
    model: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    home: str | Path | paths.Home | None = None,
) -> str | None:
    """Return the commit that a hub id and a revision stand for at present.

    Parameters
    ----------
    model : str
        See :func:`probekit.models.presets.locate`.
    revision : str, optional
        See :func:`probekit.models.presets.pinned_revision`.
    trust_remote_code : bool
        Run code that comes with the checkpoint.
    home : str, Path or Home, optional
        See :func:`probekit.models.presets.locate`.

    Returns
    -------
    str or None
        None for a folder; of an adapter the hash of its code.

    Raises
    ------
    ValueError
        The code of an adapter has another hash than `revision`.
    """
    adapter = find_adapter(model, home)
    if adapter is not None:
        return adapter.check_revision(revision)
    if Path(locate(model, home)).is_absolute():
        return None
    checkpoint = open_checkpoint(
        model, revision=revision, trust_remote_code=trust_remote_code, home=home
    )
    return checkpoint.commit


@functools.cache
def must_use_cache(source: str, revision: str | None) -> bool:
    """Tell whether the hub does not answer and the cache has a checkpoint; say so in one line.

    Without this, each of the many files that transformers asks for is waited for.

    Parameters
    ----------
    source : str
        A hub id.
    revision : str or None

    Raises
    ------
    OSError
        The hub does not answer, and the cache does not have it.
    """
    from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.utils import httpx  # whichever version of it the hub's client uses

    if is_offline_mode():
        return False  # transformers asks nobody then
    limit = constants.HF_HUB_ETAG_TIMEOUT
    try:
        get_session().head(f"{constants.ENDPOINT}/api/models/{source}", timeout=limit)
    except httpx.HTTPError as error:
        silence = f"{constants.ENDPOINT} did not answer within {limit} s ({type(error).__name__})"
    else:
        return False
    if not isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
        raise OSError(
            f"{silence}, and {source} is not in the cache ({constants.HF_HUB_CACHE}): try again "
            "later, or copy its files into a folder and name that"
        )
    tqdm.write(
        f"{silence}: {source} is read from the cache, as with HF_HUB_OFFLINE=1, which does not "
        "wait for the hub"
    )
    return True


@contextmanager
def broken_files_named(source: str) -> Iterator[None]:
    """Where something cannot be read, name the file of a checkpoint folder that is broken.

    Parameters
    ----------
    source : str
        A folder; anything else raises what it raises.

    Raises
    ------
    OSError
        A file is a Git-LFS pointer, or is cut off.
    """
    try:
        yield
    except Exception as error:
        for file in _files_of(source):
            fault = _find_fault(file)
            if fault is not None:
                raise OSError(f"{file} {fault}") from error
        raise


def _files_of(source: str) -> list[Path]:
    """List the files of a folder, or of a hub id's snapshots in the cache."""
    if Path(source).is_absolute():
        return sorted(file for file in Path(source).iterdir() if file.is_file())
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=source, repo_type="model")
    snapshots = Path(constants.HF_HUB_CACHE, folder, "snapshots")
    return sorted(file for file in snapshots.glob("*/*") if file.is_file())


def _find_fault(file: Path) -> str | None:
    """Say what is wrong with a file and what to do, None where nothing is."""
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as handle:
        is_pointer = handle.read(len(LFS_POINTER)) == LFS_POINTER
    if is_pointer:
        return f"is a Git-LFS pointer, not the file itself: run git lfs pull in {file.parent}"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="numpy"):
                return None
        except SafetensorError as error:
            return (
                f"({file.stat().st_size:,} bytes) is cut off or damaged: copy or download it again "
                f"({error})"
            )
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"is not valid JSON, so it is cut off or damaged: copy it again ({error})"
    return None
