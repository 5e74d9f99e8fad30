"""A hub that does not answer is waited for once, and then the cache serves."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def silent_hub():
    """The URL of a server that takes every call and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def cached(tmp_path):
    """A folder of the hub's cache that has tiny/model."""
    folder = tmp_path / "hub" / "models--tiny--model"
    source = REPOSITORY / "data" / "models" / "tiny-qwen2-vl"
    shutil.copytree(source, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return tmp_path


def load_from_hub(name: str, hub: str, cache) -> subprocess.CompletedProcess:
    code = (
        "from probekit.models.checkpoints import resolve_commit\n"
        "from probekit.models.load import load_vlm\n"
        f"commit = resolve_commit({name!r})\n"
        f"print(load_vlm({name!r}, device='cpu').revision, commit, sep='\\n')"
    )
    environment = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(cache),
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(REPOSITORY),
    }
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_waited_for_once(silent_hub, cached):
    start = time.monotonic()
    result = load_from_hub("tiny/model", silent_hub, cached)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-2:] == [COMMIT, COMMIT]
    assert result.stdout.count("HF_HUB_OFFLINE=1") == 1
    assert "did not answer within 1 s" in result.stdout
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_what_a_silent_hub_has_alone_is_named(silent_hub, cached):
    result = load_from_hub("tiny/other", silent_hub, cached)
    assert "did not answer within 1 s" in result.stderr
    assert "tiny/other is not in the cache" in result.stderr
