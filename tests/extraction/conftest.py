"""What the tests of extraction share."""

from __future__ import annotations

import pytest

from probekit.extraction import runner
from probekit.extraction.extracting import extract_tables
from probekit.extraction.settings import ExtractionSettings


@pytest.fixture
def extract(data):
    """Extract examples with a demo model into the test's own home.

    What answers are read with is left out unless a test asks for it: exactly the poolings that a
    test names are extracted.
    """

    def extract_examples(examples, model="tiny-qwen2-vl", *, tables=None, device="cpu", **settings):
        return extract_tables(
            ExtractionSettings(model, **{"answers": False, **settings}),
            {"none": examples} | (tables or {}),
            device=device,
        )

    return extract_examples


@pytest.fixture
def computed(monkeypatch) -> list[tuple[int, tuple]]:
    """What is computed from now on: the number of rows and the contents of each shard."""
    log = []
    original = runner.ShardStates.write

    def log_and_write(states, vlm):
        log.append((len(states.shard.rows), states.shard.shard_set.contents))
        original(states, vlm)

    monkeypatch.setattr(runner.ShardStates, "write", log_and_write)
    return log


@pytest.fixture
def no_loading(monkeypatch):
    """From when it is called on, loading a model fails the test."""

    def forbid():
        monkeypatch.setattr(runner, "load_vlm", lambda *args, **kwargs: pytest.fail("loaded"))

    return forbid


@pytest.fixture(scope="session")
def object_store():
    """The URL of an empty bucket in an S3 server of its own."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        server = server_module.ThreadedMotoServer(port=0)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="probekit")
        yield "s3://probekit"
        server.stop()
