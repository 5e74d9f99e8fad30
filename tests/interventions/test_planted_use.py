"""What is used is found where it is used, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from probekit.interventions.settings import InterventionSettings
from tests.support.planted_use import MOVING_BLOCK, PlantedModel, study

SEEDS = 20
STUDIES = 200
ALPHA = 0.05
# Layers at which the concept is where it will be read, by tokens.
USED_AT = {
    "image": {f"lm.{layer:02d}" for layer in range(MOVING_BLOCK + 1)},
    "last": {f"lm.{layer:02d}" for layer in range(MOVING_BLOCK + 1, 4)},
}
SETTINGS = InterventionSettings(
    erase=("leace",), tokens=("image", "last"), doses=(), routes=(), resamples=500
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> PlantedModel:
    return PlantedModel.load(tmp_path_factory.mktemp("planted") / "llava")


def significant(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Say of each layer and site whether an erasure has an effect."""
    rows = table[(table.metric == metric) & (table.control == "none") & table.value.notna()]
    return rows.assign(is_found=rows.p_holm < ALPHA)


@pytest.mark.slow
def test_a_used_direction_is_found_where_it_is_used_and_nowhere_else(planted):
    found = []
    for seed in range(SEEDS):
        rows = significant(study(planted, SETTINGS, seed=seed), "effect")
        assert (rows.value[rows.is_found] < 0).all()
        found.append(rows)
    share = pd.concat(found).groupby(["site", "layer"]).is_found.mean()
    for (site, layer), found_share in share.items():
        if layer in USED_AT[site]:
            assert found_share >= 0.95, (site, layer)
        else:
            assert found_share <= 0.05, (site, layer)


@pytest.mark.slow
def test_a_direction_that_is_known_and_not_used_has_no_effect(planted):
    found = []
    for seed in range(SEEDS):
        rows = significant(study(planted, SETTINGS, seed=seed, is_used=False), "effect")
        found.append(rows.is_found.any())
    assert sum(found) <= ALPHA * SEEDS


@pytest.mark.slow
def test_random_subspaces_do_not_differ_from_random_subspaces(planted):
    settings = replace(SETTINGS, layers=(1, 2, 3), resamples=300)
    found = []
    for seed in range(STUDIES):
        table = study(
            planted, settings, seed=seed, erases=False, images=48, train_images=48, noise=1.5
        )
        found.append(significant(table, "over_random"))
    assert pd.concat(found).is_found.mean() <= ALPHA


def test_attention_is_found_in_the_block_that_moves_what_is_used(planted):
    settings = InterventionSettings(erase=(), doses=(), window=1, resamples=500)
    table = study(planted, settings, seed=0)
    rows = significant(table, "effect")
    moving = f"lm.{MOVING_BLOCK:02d}"
    for route in ("image>text", "image>last"):
        of_route = rows[rows.site == route].set_index("layer")
        assert of_route.is_found[moving] and of_route.value[moving] < 0
        assert not of_route.is_found.drop(moving).any()


@pytest.mark.parametrize("seed", range(5))
def test_the_object_s_tokens_are_found_and_as_many_others_are_not(planted, seed):
    settings = InterventionSettings(
        erase=(), doses=(), routes=("object>all",), window=1, resamples=500
    )
    table = study(planted, settings, seed=seed, object_tokens=3, noise=0.5)
    rows = table[(table.metric == "effect") & table.value.notna()]
    rows = rows.assign(is_found=rows.p_holm < ALPHA).set_index(["control", "layer"])
    moving = f"lm.{MOVING_BLOCK:02d}"
    assert rows.is_found["none", moving] and rows.value["none", moving] < -0.1
    assert not rows.is_found["none"].drop(moving).any()
    assert not rows.is_found["random"].any()
    over_random = table[(table.metric == "over_random") & (table.layer == moving)]
    assert over_random.p_holm.iloc[0] < ALPHA and over_random.value.iloc[0] < -0.1


def test_adding_the_direction_says_yes_and_taking_it_says_no(planted):
    settings = InterventionSettings(
        layers=(MOVING_BLOCK + 1,), tokens=("last",), erase=(), routes=(), doses=(-4.0, 4.0)
    )
    table = study(planted, settings, seed=0)
    says_yes = table[(table.metric == "says_yes") & (table.intervention == "steer")]
    assert says_yes.set_index("dose").value.to_dict() == {-4.0: 0.0, 4.0: 1.0}
