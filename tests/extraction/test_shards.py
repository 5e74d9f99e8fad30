"""Shards: how they are planned, written, found again and shared by runs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from probekit.extraction.folder import open_folder
from probekit.extraction.shards import (
    Content,
    ShardSet,
    TensorKey,
    compact,
    model_inputs,
    plan_shards,
)
from probekit.extraction.store import Activations
from probekit.paths import Home

MEAN = Content("lm", "mean")
LAST = Content("lm", "last")
PROJECTED = Content("projector", "mean")


@pytest.fixture
def home(tmp_path) -> Home:
    return Home.find(tmp_path)


@pytest.fixture
def folder(home):
    return open_folder("data/activations/model/settings", home)


@pytest.fixture
def table(tmp_path) -> pd.DataFrame:
    """Four images with three prompts each; image i has i bytes."""
    files = [tmp_path / f"{i}.jpg" for i in range(4)]
    for i, file in enumerate(files):
        file.write_bytes(bytes(i))
    return pd.DataFrame(
        {"file": np.repeat([str(file) for file in files], 3), "prompt": ["a", "b", "c"] * 4}
    )


def expected_states(rows: pd.DataFrame) -> np.ndarray:
    """States that say which image and prompt they belong to."""
    return np.stack([rows["size"], rows.prompt.map(ord)], 1).astype(np.float32)


def write_missing(folder, shards) -> int:
    """Write the shards that are not done; returns how many they were."""
    count = 0
    for shard in shards:
        if shard.is_done:
            continue
        rows = shard.rows
        states = expected_states(rows)
        image_states = states[rows.file.ne(rows.file.shift()).to_numpy(), :1]
        tensors = {}
        for content in shard.shard_set.contents:
            layer = "lm.00" if content.stage == "lm" else "projector"
            values = image_states if content.is_of_image else states
            tensors[TensorKey(layer, content.pooling)] = values
        shard.shard_set.write_shard(shard.number, tensors)
        count += 1
    folder.write_meta({"layers": {"lm": ["lm.00"], "projector": ["projector"]}})
    return count


def test_what_is_precise_enough_is_half_as_large():
    rng = np.random.default_rng(0)
    usual = rng.normal(3, 1, (50, 8)).astype(np.float32)
    large = usual.copy()
    large[3, 3] = 1e6
    tiny = usual * 1e-9
    drowned = usual.copy()
    drowned[:, 2] = 4000 + rng.normal(0, 0.3, 50)  # float16 has steps of 2 there
    dead_channel = usual.copy()
    dead_channel[:, 5] = 0.1
    assert compact(usual).dtype == np.float16
    assert compact(dead_channel).dtype == np.float16
    assert {compact(values).dtype.name for values in (large, tiny, drowned)} == {"float32"}
    assert compact(usual[:1]).dtype == np.float32  # one row does not tell what varies
    for values in (usual, large, tiny, drowned):
        read = compact(values).astype(np.float32)
        assert np.isfinite(read).all()
        assert (np.abs(read - values) <= values.std(0) / 32).all()


def test_shards_keep_images_together(folder, home, table):
    rows = model_inputs(table.sample(frac=1, random_state=0), home)
    shard_set = ShardSet.create(folder, rows, contents=[MEAN], shard_images=3)
    assert shard_set.starts.tolist() == [0, 9, 12]
    assert [shard_set.shard_rows(i).file.nunique() for i in (0, 1)] == [3, 1]


def test_runs_are_views_on_the_shards_of_others(folder, home, table):
    few = model_inputs(table.head(5), home)
    write_missing(folder, plan_shards(folder, few, contents=[MEAN], shard_images=1))
    other_order = pd.concat([table[::-1], table.head(3)])
    rows = model_inputs(other_order, home)
    planned = plan_shards(folder, rows, contents=[MEAN, LAST, PROJECTED], shard_images=2)
    assert sum(shard.is_done for shard in planned) == 2
    write_missing(folder, planned)
    assert all(shard.is_done for shard in planned)
    contents = [content for one in ShardSet.list_all(folder) for content in one.contents]
    assert contents.count(MEAN) == 2
    expected = expected_states(rows)
    view = Activations(folder, other_order, ("lm",), ("mean", "last"), home=home)
    for pooling in ("mean", "last"):
        np.testing.assert_array_equal(view["lm.00", pooling], expected)
    both = Activations(folder, other_order, ("lm", "projector"), ("mean",), home=home)
    assert both.layers == ["lm.00", "projector"]
    np.testing.assert_array_equal(both["projector", "mean"], expected[:, :1])
    sets_before = len(ShardSet.list_all(folder))
    again = plan_shards(folder, rows, contents=[MEAN, LAST], shard_images=1)
    assert all(shard.is_done for shard in again)
    assert len(ShardSet.list_all(folder)) == sets_before


def test_rows_count_once_and_only_the_shards_that_are_needed(folder, home, table):
    rows = model_inputs(pd.concat([table, table]), home)
    planned = plan_shards(folder, rows, contents=[MEAN], shard_images=1)
    assert sum(len(shard.rows) for shard in planned) == 12
    assert len(planned) == 4
    one_image = rows[rows.file == rows.file[0]]
    assert len(plan_shards(folder, one_image, contents=[MEAN], shard_images=1)) == 1


def test_a_shard_of_another_place_is_not_taken_for_this_one(folder, home, table):
    planned = plan_shards(folder, model_inputs(table, home), contents=[MEAN], shard_images=2)
    write_missing(folder, planned)
    first, second = planned
    (folder.path / first.name).write_bytes((folder.path / second.name).read_bytes())
    assert not first.is_done
    assert second.is_done
    with pytest.raises(FileNotFoundError, match="6 of 12 examples have no lm/mean"):
        Activations(folder, table, ("lm",), ("mean",), home=home)
    assert not list(folder.path.rglob("*.part"))


def test_leftovers_of_killed_writers_go_when_the_shard_is_written(folder, home, table):
    planned = plan_shards(folder, model_inputs(table, home), contents=[MEAN], shard_images=2)
    path = folder.path / planned[0].name
    path.with_name(f".{path.name}.0123456789ab.part").write_bytes(b"half")
    write_missing(folder, planned)
    assert not list(folder.path.rglob("*.part"))


def test_a_changed_image_changes_the_fingerprint(folder, home, table, tmp_path):
    def open_view() -> str:
        planned = plan_shards(folder, model_inputs(table, home), contents=[MEAN], shard_images=2)
        write_missing(folder, planned)
        return Activations(folder, table, ("lm",), ("mean",), home=home).fingerprint

    before = open_view()
    assert open_view() == before
    (tmp_path / "3.jpg").write_bytes(b"another picture")
    assert open_view() != before


def test_equal_shards_are_equal_files(home, table):
    contents = []
    for name in ("one", "two"):
        folder = open_folder(f"{name}/model/settings", home)
        planned = plan_shards(
            folder, model_inputs(table, home), contents=[MEAN, LAST], shard_images=4
        )
        write_missing(folder, planned)
        contents.append((folder.path / planned[0].name).read_bytes())
    assert contents[0] == contents[1]
