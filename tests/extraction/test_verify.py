"""Looking through shards; benchmarks/faults.py, which the tests run, has each kind of damage."""

from __future__ import annotations

import numpy as np
import pytest

from probekit.cli.main import main
from probekit.extraction.shards import ShardSet, TensorKey
from probekit.extraction.verify import find_content_fault, verify_activations
from probekit.workflow import record_activations


@pytest.fixture
def activations(extract, examples):
    """A recorded run of four shards."""
    view = extract(examples, shard_images=15)
    record_activations([view], run="mine")
    return view


@pytest.mark.slow
def test_the_command_says_what_is_wrong_and_what_to_run_again(activations, data, capsys):
    folder = str(data / "activations")
    assert main(["verify", folder]) == 0
    assert capsys.readouterr().out == "shards: 4 sound, 0 damaged, 0 missing\n"
    first, second, *_ = sorted(activations.folder.path.glob("shards-*/shard-*"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    assert main(["verify", folder]) == 1
    output = capsys.readouterr().out
    assert f"{first.name} cannot be opened" in output
    assert f"{second.name} is missing" in output
    assert "2 sound, 1 damaged, 1 missing" in output
    assert "run 02_extract of the runs mine again" in output
    assert main(["verify", folder, "--remove"]) == 1
    assert not first.exists()
    assert "1 damaged shards removed" in capsys.readouterr().out
    assert main(["verify", str(data / "nothing")]) == 2
    assert "holds no activations" in capsys.readouterr().err


@pytest.mark.slow
def test_whatever_bit_flips_in_a_header_only_that_shard_is_lost(activations):
    path = min(activations.folder.path.glob("shards-*/shard-*.safetensors"))
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    (shard_set,) = ShardSet.list_all(activations.folder)
    end = 8 + int.from_bytes(content[:8], "little")
    noticed = 0
    for place in range(end):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        fault = find_content_fault(shard_set, 0, activations.meta)
        noticed += bool(fault)
    assert noticed > 0.95 * end  # some bits say nothing: a blank, a key that nobody reads
    table = verify_activations(activations.folder.url)
    assert (table.state != "sound").sum() <= 1


@pytest.mark.slow
def test_shards_that_are_whole_but_wrong_are_noticed(activations):
    (shard_set,) = ShardSet.list_all(activations.folder)
    rows = len(shard_set.shard_rows(0))
    rng = np.random.default_rng(0)
    states = {
        TensorKey(layer, "mean"): rng.normal(size=(rows, 8)).astype(np.float32)
        for layer in activations.layers
    }
    short = states | {TensorKey("lm.02", "mean"): states[TensorKey("lm.02", "mean")][1:]}
    not_finite = states | {TensorKey("lm.03", "mean"): np.full((rows, 8), np.nan, np.float32)}
    lacking = {key: values for key, values in states.items() if key.layer not in ("lm.01", "lm.04")}
    for wrong_states, reason in (
        (short, "lm.02/mean has the shape"),
        (not_finite, "lm.03/mean is not finite"),
        (lacking, "lacks lm.01/mean and 1 more"),
    ):
        shard_set.write_shard(0, wrong_states)
        table = verify_activations(activations.folder.url)
        (damaged,) = table[table.state == "damaged"].itertuples()
        assert damaged.file.endswith("shard-00000.safetensors")
        assert reason in damaged.reason
