from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from probekit.tasks.base import Selection
from probekit.tasks.registry import TASKS
from probekit.tasks.spatial import (
    AXES,
    Comparison,
    compare_positions,
    compare_sizes,
    single_instances,
)
from tests.conftest import needs_real_coco

SPATIAL_TASKS = ("relation", "size", "count", "attribute")


def ask(name: str, selection: Selection) -> pd.DataFrame:
    """One row for each label that counts: `image, split, prompt, answer, label`."""
    task = TASKS[name]
    examples = task.build(selection, np.random.default_rng(0))
    classes = task.classes or ["match"]
    entries = []
    for image, row in examples.iterrows():
        for c in np.flatnonzero(row["mask"]):
            entries.append((image, row.split, row.prompt, classes[c], row.labels[c]))
    return pd.DataFrame(entries, columns=["image", "split", "prompt", "answer", "label"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SPATIAL_TASKS)
def test_a_text_alone_says_nothing(selection, name):
    rows = ask(name, selection)
    assert (rows.groupby(["split", "prompt", "answer"]).label.mean() == 0.5).all()
    assert (rows.groupby("image").size() == 2).all()
    fewest = 0.1 if name == "size" else 0.3
    assert rows.image.nunique() > fewest * len(selection.images)


def holds(how: str, a: pd.Series, b: pd.Series) -> bool:
    """Whether what a comparison says is true of two boxes."""
    return {
        "to the left of": a.x + a.w <= b.x,
        "to the right of": b.x + b.w <= a.x,
        "above": a.y + a.h <= b.y,
        "below": b.y + b.h <= a.y,
        "larger than": a.area >= 1.3 * b.area,
        "smaller than": b.area >= 1.3 * a.area,
    }[how]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axes"), [("relation", ("horizontal", "vertical")), ("size", ("size",))]
)
def test_comparisons_are_true_of_the_scene_and_asked_in_both_orders(selection, name, axes):
    hows = [how for axis in axes for how in AXES[axis]]
    instances = selection.instances.set_index(["image_id", "category"]).sort_index()
    how_counts = Counter()
    for image, both in ask(name, selection).groupby("image"):
        asked_pairs = []
        for row in both.itertuples():
            question = row.prompt.removeprefix("Is the ").removesuffix(" in this image?")
            how = next(how for how in hows if f" {how} the " in question)
            first, second = question.split(f" {how} the ")
            a = instances.loc[(image, first)].squeeze()
            b = instances.loc[(image, second)].squeeze()
            assert holds(how, a, b) == bool(row.label), row.prompt
            how_counts[how] += 1
            asked_pairs.append((how, first, second))
        (how, first, second), other = asked_pairs
        assert other == (how, second, first)
    assert set(how_counts) == set(hows)


def test_counts_and_colours_are_those_of_the_scene(selection):
    groups = selection.instances.groupby(["image_id", "category"])
    counts = groups.size()
    colours = groups.colour.agg(set)
    for row in ask("count", selection).itertuples():
        category = row.prompt.removesuffix(" in this image:").rpartition("type ")[2]
        assert (str(counts[row.image, category]) == row.answer) == bool(row.label)
    for row in ask("attribute", selection).itertuples():
        category = row.prompt.removeprefix("Colour of the ").removesuffix(" in this image:")
        assert (colours[row.image, category] == {row.answer}) == bool(row.label)


def box(x: float, y: float, area: float = 100) -> SimpleNamespace:
    return SimpleNamespace(x=x, y=y, w=10, h=10, area=area)


@pytest.mark.parametrize(
    ("a", "b", "comparison"),
    [
        (box(0, 0), box(20, 2), Comparison("horizontal", 0)),
        (box(20, 2), box(0, 0), Comparison("horizontal", 1)),
        (box(0, 0), box(2, 30), Comparison("vertical", 0)),
        (box(0, 30), box(2, 0), Comparison("vertical", 1)),
        (box(0, 0), box(10, 0), Comparison("horizontal", 0)),  # they touch
        (box(0, 0), box(20, 18), None),  # diagonally apart
        (box(0, 0), box(8, 0), None),  # they overlap
        (box(0, 0), box(0, 0), None),
    ],
)
def test_ambiguous_positions_do_not_compare(a, b, comparison):
    assert compare_positions(a, b) == comparison


def test_similar_sizes_do_not_compare():
    assert compare_sizes(box(0, 0, area=250), box(0, 0)) == Comparison("size", 0)
    assert compare_sizes(box(0, 0), box(0, 0, area=250)) == Comparison("size", 1)
    assert compare_sizes(box(0, 0), box(0, 0, area=120)) is None


def test_crowds_tiny_ones_and_twins_are_no_single_instances():
    instances = pd.DataFrame(
        [
            (1, "cup", 0, False),
            (1, "car", 1, False),
            (1, "kite", 0, True),
            (2, "cup", 0, False),
            (2, "cup", 0, True),
        ],
        columns=["image_id", "category", "iscrowd", "tiny"],
    )
    singles = single_instances(instances)
    assert list(zip(singles.image_id, singles.category, strict=True)) == [(1, "cup")]


@pytest.mark.slow
@needs_real_coco
def test_real_photographs_have_relations_sizes_and_counts_but_no_colours(real_selection):
    for name in ("relation", "size", "count"):
        rows = ask(name, real_selection)
        assert (rows.groupby(["split", "prompt", "answer"]).label.mean() == 0.5).all()
        assert rows.image.nunique() >= 16, name
    with pytest.raises(ValueError, match="leave the task attribute out, or take drawn scenes"):
        ask("attribute", real_selection)
