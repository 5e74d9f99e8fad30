"""Looking through shards. What each kind of damage leads to is in benchmarks/faults.py, which the tests run."""

import numpy as np
import pytest

from probekit import paths
from probekit.cli.main import main
from probekit.extraction import shards, verify
from probekit.extraction.extract import ExtractionSettings, extract


@pytest.fixture
def run(data, examples):
    """A run of four shards, and its store."""
    store = extract(ExtractionSettings("tiny-qwen2-vl", shard_images=15), examples, "cpu")
    paths.write_json(data / "activations" / "mine.json", {"stores": [store.record]})
    return store


def test_the_command_says_what_is_wrong_and_what_to_run_again(run, data, capsys):
    folder = str(data / "activations")
    assert main(["verify", folder]) == 0
    assert capsys.readouterr().out == "shards: 4 sound, 0 damaged, 0 missing\n"
    first, second, *_ = sorted(run.folder.glob("part-*/shard-*"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    assert main(["verify", folder]) == 1
    told = capsys.readouterr().out
    assert f"{first.name} cannot be opened" in told and f"{second.name} is missing" in told
    assert "2 sound, 1 damaged, 1 missing" in told and "run 02_extract of the runs mine again" in told
    assert main(["verify", folder, "--remove"]) == 1 and not first.exists()
    assert "1 damaged shards removed" in capsys.readouterr().out
    assert main(["verify", str(data / "nothing")]) == 2
    assert "holds no activations" in capsys.readouterr().err


def test_whatever_bit_flips_in_a_header_only_that_shard_is_lost(run):
    shard, *_ = sorted(run.folder.glob("part-*/shard-*.safetensors"))
    content, rng = shard.read_bytes(), np.random.default_rng(0)
    part, = shards.Part.all_of(run.folder)
    end = 8 + int.from_bytes(content[:8], "little")
    damaged = 0
    for at in range(end):
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        shard.write_bytes(changed)
        damaged += bool(part.lacks(0) or verify.wrong(part, 0, run.meta))
    assert damaged > 0.95 * end  # some bits say nothing: a blank, a key that nobody reads
    table = verify.verify(run.folder)
    assert (table.state != "sound").sum() <= 1


def test_shards_that_are_whole_but_wrong_are_found(run):
    part, = shards.Part.all_of(run.folder)
    rows = len(part.shard_rows(0))
    good = {f"{layer}/mean": np.random.default_rng(0).normal(size=(rows, 8)).astype(np.float32) for layer in run.layers}
    for change, reason in (({"lm.02/mean": good["lm.02/mean"][1:]}, "lm.02/mean has the shape"),
                           ({"lm.03/mean": np.full((rows, 8), np.nan, np.float32)}, "lm.03/mean is not finite"),
                           ({"lm.01/mean": None, "lm.04/mean": None}, "lacks lm.01/mean and 1 more")):
        part.write(0, {key: values for key, values in (good | change).items() if values is not None})
        table = verify.verify(run.folder)
        bad, = table[table.state == "damaged"].itertuples()
        assert bad.file.endswith("shard-00000.safetensors") and reason in bad.reason
