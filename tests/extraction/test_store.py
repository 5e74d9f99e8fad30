import numpy as np
import pandas as pd
import pytest

from probekit.extraction import shards
from probekit.extraction.shards import Part, compact
from probekit.extraction.store import Activations


@pytest.fixture
def table(tmp_path):
    """Four images with three prompts each."""
    files = [tmp_path / f"{i}.jpg" for i in range(4)]
    for i, file in enumerate(files):
        file.write_bytes(bytes(i))
    return pd.DataFrame({"file": np.repeat([str(f) for f in files], 3), "prompt": ["a", "b", "c"] * 4})


def fill(folder, planned):
    """States that say which image and prompt they belong to."""
    for part, i in planned:
        rows = part.shard_rows(i)
        own = np.stack([rows["size"], rows.prompt.map(ord)], 1).astype(np.float32)
        image = own[rows.file.ne(rows.file.shift()).to_numpy(), :1]
        part.write(i, {("projector/mean" if want == "projector/mean" else want.replace("lm", "lm.00")):
                       image if want.startswith("projector") else own for want in part.wants})
    shards.write_meta(folder, {"layers": {"lm": ["lm.00"], "projector": ["projector"]}})


def test_what_is_precise_enough_is_half_as_large():
    rng = np.random.default_rng(0)
    usual = rng.normal(3, 1, (50, 8)).astype(np.float32)
    assert compact(usual).dtype == np.float16
    large, tiny, drowned = usual.copy(), usual * 1e-9, usual.copy()
    large[3, 3] = 1e6
    drowned[:, 2] = 4000 + rng.normal(0, 0.3, 50)  # float16 has steps of 2 there
    constant = usual.copy()
    constant[:, 5] = 0.1  # one dead channel does no harm
    assert [compact(x).dtype for x in (large, tiny, drowned, constant)] == [*[np.float32] * 3, np.float16]
    for values in (usual, large, tiny, drowned):
        read = compact(values).astype(np.float32)
        assert np.isfinite(read).all() and (np.abs(read - values) <= values.std(0) / 32).all()
    assert compact(usual[:1]).dtype == np.float32  # one row does not tell what varies


def test_shards_keep_images_together(tmp_path, table):
    part = Part.plan(tmp_path, shards.rows_of(table.sample(frac=1, random_state=0)), ["lm/mean"], 3)
    assert part.starts.tolist() == [0, 9, 12]
    assert [part.shard_rows(i).file.nunique() for i in (0, 1)] == [3, 1]


def test_runs_are_views_on_parts(tmp_path, table):
    fill(tmp_path, shards.plan(tmp_path, shards.rows_of(table.head(5)), ["lm/mean"], 1))
    turned = pd.concat([table[::-1], table.head(3)])
    planned = shards.plan(tmp_path, shards.rows_of(turned), ["lm/mean", "lm/last", "projector/mean"], 2)
    assert sum(part.is_done(i) for part, i in planned) == 2
    fill(tmp_path, [(part, i) for part, i in planned if not part.is_done(i)])
    seen = [want for part in Part.all_of(tmp_path) for want in part.wants]
    assert all(part.is_done(i) for part, i in planned) and seen.count("lm/mean") == 2
    expected = np.stack([shards.rows_of(turned)["size"], turned.prompt.map(ord)], 1)
    for pooling in ("mean", "last"):
        assert np.array_equal(Activations(tmp_path, turned, ("lm",), ("mean", "last"))["lm.00", pooling], expected)
    view = Activations(tmp_path, turned, ("lm", "projector"), ("mean",))
    assert view.layers == ["lm.00", "projector"] and np.array_equal(view["projector", "mean"], expected[:, :1])
    assert shards.plan(tmp_path, shards.rows_of(turned), ["lm/mean", "lm/last"], 1)  # nothing new is planned
    assert len(Part.all_of(tmp_path)) == len({part.folder for part, _ in planned})


def test_rows_count_once_and_only_the_shards_that_are_asked_for(tmp_path, table):
    rows = shards.rows_of(pd.concat([table, table]))
    planned = shards.plan(tmp_path, rows, ["lm/mean"], 1)
    assert sum(len(part.shard_rows(i)) for part, i in planned) == 12
    again = shards.plan(tmp_path, rows[rows.file == rows.file[0]], ["lm/mean"], 1)
    assert len(again) == 1 and len(planned) == 4


def test_a_foreign_shard_is_not_taken_for_ones_own(tmp_path, table):
    planned = shards.plan(tmp_path, shards.rows_of(table), ["lm/mean"], 2)
    fill(tmp_path, planned)
    part = planned[0][0]
    part.shard(0).write_bytes(part.shard(1).read_bytes())
    assert not part.is_done(0) and part.is_done(1)
    with pytest.raises(FileNotFoundError, match="6 of 12 examples have no lm/mean"):
        Activations(tmp_path, table, ("lm",), ("mean",))
    assert not list(part.folder.glob(".*part"))


def test_a_changed_image_is_another_key(tmp_path, table):
    def opened():
        planned = shards.plan(tmp_path, shards.rows_of(table), ["lm/mean"], 2)
        fill(tmp_path, [(part, i) for part, i in planned if not part.is_done(i)])
        return Activations(tmp_path, table, ("lm",), ("mean",)).key

    before = opened()
    assert opened() == before
    (tmp_path / "3.jpg").write_bytes(b"another picture")
    assert opened() != before
