"""Stage-1 methods against slow oracles, on ordinary and adversarial signals, and the properties all of them share.

Kept indices must equal the oracle's exactly. Merged features are compared within float32 rounding (float16: within
one unit in the last place of the stored type).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import nuwa as nuwa_oracle
from oracles import pooling as pooling_oracle
from oracles import visionzip as visionzip_oracle
from oracles.agreement import (
    PRUNING,
    SIGNALS,
    assert_same_outcome,
    keeps,
    pictures,
    pictures_and_keep,
    select,
    signals_of,
)
from oracles.pictures import KINDS, SHAPES, Picture, draw_picture
from oracles.random import contract_breach
from oracles.uniform import unevenness

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout
from nuwa.methods import specify
from nuwa.schedule import ByBudget, Decay
from nuwa.signals import VisionSignals
from nuwa.stage1 import METHODS, get_method, register
from nuwa.stage1.nuwa import (
    PRESETS,
    Nuwa,
    aggregation_weights,
    best_in_squares,
    candidates_needed,
    rank_in_region,
    reach,
)
from nuwa.stage1.pooling import pooled_shape
from nuwa.stage1.uniform import even_indices
from nuwa.stage1.visionzip import VisionZip

torch.set_num_threads(1)
quickly = settings(max_examples=80, deadline=None, derandomize=True)


# --- Nüwa


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nuwa_presets_match_the_equations(preset, kind, shape):
    config = get_method("nuwa").configure(preset)
    picture = draw_picture(1, *shape, kind)
    for keep in keeps(picture.tokens):
        expected = nuwa_oracle.select(picture, keep, **_numbers(config, keep / picture.tokens))
        assert_same_outcome(select("nuwa", picture, keep, config), expected, picture)


# n per region as the authors' code has it, by the share of the tokens that stage 1 keeps: the bounds lie half-way between
# 290, 582 and 1162 of 2880 tokens, and between 35, 60 and 85 %.
CANDIDATES = {"released_next": [(436 / 2880, 2), (1, 3)], "released_qwen": [(0.725, 3), (1, 4)]}


def _numbers(config: Nuwa, share: float) -> dict:
    """A configuration with the table by budget read at ``share``."""
    numbers = {field.name: getattr(config, field.name) for field in fields(config)}
    for preset, rows in CANDIDATES.items():
        if config == get_method("nuwa").configure(preset):
            numbers["candidates_per_region"] = next(n for bound, n in rows if share <= bound)
    return numbers


configs = st.builds(
    Nuwa,
    separation=st.booleans(),
    region_side=st.integers(1, 4),
    candidates_per_region=st.one_of(st.none(), st.integers(1, 5)),
    salience=st.sampled_from(["cls_attention", "cls_attention_key_norm"]),
    pillars=st.booleans(),
    pillar_signal=st.sampled_from(["salience", "key_norm", "feature_norm"]),
    pillar_quantile=st.sampled_from([0.0, 0.1, 0.3, 1 / 3, 0.55, 0.7, 0.75, 0.9, 1.0]),
    aggregation=st.booleans(),
    distance_threshold=st.sampled_from([0.001, 0.017, 280 / 1058, 0.5, 0.8, 1.0]),
    distance_convention=st.sampled_from(["squared", "plain", "plain_even", "patches"]),
    reset_self_weight=st.booleans(),
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(case=pictures_and_keep(), config=configs)
def test_nuwa_matches_the_equations_whatever_its_hyper_parameters(case, config):
    picture, keep = case
    expected = nuwa_oracle.select(picture, keep, **asdict(config))
    assert_same_outcome(select("nuwa", picture, keep, config), expected, picture)


# (base, change): on an ordinary picture every field must matter, or sweeping it would compare a trial with itself.
EFFECTS = {
    "separation": ({}, False),
    "region_side": ({}, 3),
    "candidates_per_region": ({}, 3),
    "salience": ({}, "cls_attention_key_norm"),
    "pillars": ({}, False),
    "pillar_signal": ({}, "feature_norm"),
    "pillar_quantile": ({}, 0.9),
    "aggregation": ({}, False),
    "distance_threshold": ({}, 0.02),
    "distance_convention": ({}, "plain"),
    "reset_self_weight": ({}, False),
}


def test_every_hyper_parameter_of_nuwa_is_known_to_these_tests():
    assert list(EFFECTS) == [field.name for field in fields(Nuwa)]


@pytest.mark.parametrize("name", EFFECTS)
def test_every_hyper_parameter_of_nuwa_changes_the_outcome(name):
    base, value = EFFECTS[name]
    picture = draw_picture(2, 6, 6)
    before = select("nuwa", picture, 9, Nuwa(**base))
    after = select("nuwa", picture, 9, Nuwa(**{**base, name: value}))
    assert not torch.equal(before.indices, after.indices) or not torch.equal(before.features, after.features)


def test_the_two_presets_differ_in_exactly_what_paper_and_code_differ_in():
    released, paper = (get_method("nuwa").configure(preset) for preset in ("released", "paper"))
    assert (released.salience, released.pillar_signal, released.pillar_quantile) == ("cls_attention", "salience", 0.55)
    assert (paper.salience, paper.pillar_signal, paper.pillar_quantile) == (
        "cls_attention_key_norm",
        "key_norm",
        0.75,
    )
    for config in (released, paper):
        assert config.region_side == 2 and config.reset_self_weight and config.separation and config.pillars
        assert (config.distance_threshold * 1058, config.distance_convention) == (pytest.approx(280), "squared")
    assert get_method("nuwa").default_preset == "released"


def test_presets_hold_what_the_released_code_and_table_10_set():
    """Values read off the authors' code; the stage-2 ratios and layers stand in the recipes."""
    following, qwen, paper, paper_next = (
        get_method("nuwa").configure(preset) for preset in ("released_next", "released_qwen", "paper", "paper_next")
    )
    assert following == replace(
        Nuwa(),
        candidates_per_region=following.candidates_per_region,
        pillar_quantile=0.5,
        distance_threshold=280**0.5,
        distance_convention="patches",
    )
    assert qwen == replace(
        Nuwa(),
        candidates_per_region=qwen.candidates_per_region,
        pillar_quantile=0.1,
        distance_threshold=0.8,
        distance_convention="plain_even",
        reset_self_weight=False,
    )
    assert paper_next == paper


@pytest.mark.parametrize(
    ("preset", "tokens", "budgets", "candidates", "ratios"),
    [
        ("released_next", 2880, [160, 320, 640], [2, 3, 3], [0.1, 0.1, 0.1]),
        ("released_next", 700, [160, 320, 640], [2, 3, 3], [0.1, 0.1, 0.1]),  # by tokens, whatever the image has
        ("released_next", 2880, [1, 240, 240.5, 2880], [2, 2, 3, 3], [0.1] * 4),
        ("released_qwen", 400, [100, 200, 300], [3, 3, 4], [0.42, 0.66, 0.70]),
        ("released_qwen", 1000, [10, 375, 625, 626, 900], [3, 3, 3, 4, 4], [0.42, 0.54, 0.68, 0.68016, 0.70]),
        ("paper_next", 2880, [100, 144, 259.2, 518.4, 900], [None] * 5, [1 / 9, 1 / 9, 1 / 8, 1 / 8, 1 / 8]),
    ],
)
def test_what_presets_set_by_budget(preset, tokens, budgets, candidates, ratios):
    layers = 28 if preset == "released_qwen" else 32
    for budget, n, ratio in zip(budgets, candidates, ratios, strict=True):
        spec = specify("nuwa", preset=preset, budget=budget)
        assert spec.resolved(tokens).config.candidates_per_region == n
        assert spec.stage2.keep.at(budget, tokens).ratio == pytest.approx(ratio, abs=1e-12)
        schedule = spec.schedule(PatchGrid(1, tokens), layers)
        assert abs(schedule.average_tokens - budget) <= 0.5


def test_published_schedules_of_the_presets():
    """Tokens that stage 1 and stage 2 keep: of 2880 on LLaVA-NeXT, in the code and in table 10."""
    grid = PatchGrid(48, 60)

    def kept(preset: str, budget: float) -> tuple[int, int]:
        schedule = specify("nuwa", preset=preset, budget=budget).schedule(grid, 32)
        return schedule.stage1_keep, schedule.cuts[0][1]

    # The code keeps 290, 582 and 1162, and a tenth of them: averages of 159.5, 320 and 639.
    assert [kept("released_next", budget) for budget in (160, 320, 640)] == [(290, 30), (581, 59), (1163, 117)]
    shares = [tuple(round(100 * part / 2880) for part in kept("paper_next", budget)) for budget in (144, 259.2, 518.4)]
    assert shares == [(9, 1), (16, 2), (32, 4)]


def test_a_plan_holds_the_values_of_its_images_and_not_the_table():
    spec = specify("nuwa", preset="released_qwen", budget=75)
    plans = [spec.on(VisualLayout((View(grid),)), 28) for grid in (PatchGrid(10, 10), PatchGrid(15, 20))]
    assert [plan.spec.config.candidates_per_region for plan in plans] == [4, 3]  # 75 and 25 % of the tokens
    assert specify("nuwa", preset="released_qwen", budget=75, parameters={"candidates_per_region": 1}).resolved(
        100
    ).config == replace(spec.config, candidates_per_region=1)


@pytest.mark.parametrize(
    ("preset", "shape", "patches"),
    [
        ("released", (24, 24), 280**0.5),
        ("released", (12, 12), (280 / 1058 * 242) ** 0.5),
        ("released_next", (24, 24), 280**0.5),
        ("released_next", (36, 48), 280**0.5),
        ("released_next", (1, 1), 280**0.5),
        ("released_qwen", (3, 3), 0.8 * 18**0.5),
        ("released_qwen", (4, 7), 0.8 * 58**0.5),
        ("released_qwen", (1, 1), 0.8 * 2**0.5),
    ],
)
def test_reach_of_the_aggregation_in_patches(preset, shape, patches):
    assert reach(PatchGrid(*shape), get_method("nuwa").configure(preset)) == pytest.approx(patches, rel=1e-12)


def test_corner_to_corner_on_an_odd_grid_weighs_what_the_even_grid_leaves_it():
    picture = replace(draw_picture(1, 3, 3), similarity=np.ones((9, 4), np.float32))
    config = get_method("nuwa").configure("released_qwen")
    row = aggregation_weights(signals_of(picture), torch.tensor([[0]]), config)[0, 0]
    across = 1 - 8**0.5 / (0.8 * 18**0.5)
    rows = [[1 - (down**2 + along**2) ** 0.5 / (0.8 * 18**0.5) for along in range(3)] for down in range(3)]
    assert row[8] == pytest.approx(across / sum(map(sum, rows)), rel=1e-6)


def test_tables_by_budget_are_refused_where_they_are_none():
    for arguments, message in [
        (((1, 2), (3,)), "1 values by 2 budgets: give one value a budget"),
        (((2, 1), (3, 4)), "budgets 2, 1 must ascend"),
        (((1, 2), (3, 4), "tokens", "cubic"), "a table by 'tokens' and 'cubic' is unknown; see ByBudget"),
        (((1, 2), (3, 4), "tokens", "nearest", (0.5,)), "1 stage-1 shares by 2 budgets: give one each"),
    ]:
        with pytest.raises(ValueError) as caught:
            ByBudget(*arguments)
        assert str(caught.value) == message
    with pytest.raises(ValueError) as caught:
        ByBudget((1,), (2,)).at_stage1(0.5)
    assert str(caught.value) == "this table is by budget: name one, or set the parameter to a number"
    with pytest.raises(ValueError) as caught:
        Decay(ByBudget((1, 2), (0.5, 1.5)))
    assert str(caught.value) == "stage-2 ratio K2/K1 1.5 must lie in (0, 1]"
    with pytest.raises(ValueError) as caught:
        Nuwa(candidates_per_region=ByBudget((1, 2), (1, 0)))
    assert str(caught.value) == "nuwa.candidates_per_region 0 must be null or at least 1"
    with pytest.raises(ValueError) as caught:
        Nuwa(distance_convention="patches", distance_threshold=0)
    assert str(caught.value) == "nuwa.distance_threshold 0 must be above 0 patches"


def test_a_table_by_budget_is_part_of_a_configurations_identity():
    method = get_method("nuwa")
    identities = [
        json.dumps(method.identity(method.configure("released_next", **parameters)), sort_keys=True)
        for parameters in ({}, {"candidates_per_region": None}, {"candidates_per_region": 2})
    ]
    assert len(set(identities)) == 3
    with pytest.raises(ValueError) as caught:
        method.configure("released_next", candidates_per_region="2")
    assert str(caught.value) == "nuwa.candidates_per_region '2' is of the wrong type; allowed: int or NoneType"


def test_clips_grid_at_the_published_budgets():
    grid = PatchGrid(24, 24)
    assert [candidates_needed(grid, 2, keep) for keep in (112, 144, 145, 224, 336, 576)] == [1, 1, 2, 2, 3, 4]
    with pytest.raises(ValueError) as caught:
        candidates_needed(grid, 2, 577)
    assert str(caught.value) == "cannot keep 577 of 576 tokens"
    picture = draw_picture(3, 24, 24)
    # The quantile's rank is 111 · 0.55 = 61.05 or 111 · 0.75 = 83.25: 50 or 28 of 112 tokens lie above it.
    for preset, pillars in [("released", 50), ("paper", 28)]:
        config = get_method("nuwa").configure(preset)
        expected = nuwa_oracle.select(picture, 112, **asdict(config))
        selection = select("nuwa", picture, 112, config)
        assert_same_outcome(selection, expected, picture)
        assert selection.pillars.sum() == pillars


def test_one_region_by_hand():
    # A 2x2 image, two kept: tokens 0 and 3 by salience, token 3 (the larger) is the pillar.
    picture = Picture(
        "hand",
        2,
        2,
        features=np.float32([[1], [10], [100], [1000]]),
        attention=np.float32([0.3, 0.1, 0.1, 0.5]),
        keys=np.ones((4, 2), np.float32),
        similarity=np.float32([[1, 0], [1, 0], [0, 1], [-1, 0]]),
    )
    config = Nuwa(distance_threshold=1.0, pillar_quantile=0.55)
    # Token 0's row: itself 1; token 1 cos 1, distance 1 of sqrt(2); token 2 cos 0; token 3 cos -1 → 0.
    beside = 1 - 1 / 2**0.5
    selection = select("nuwa", picture, 2, config)
    assert selection.indices.tolist() == [[0, 3]] and selection.pillars.tolist() == [[False, True]]
    assert selection.features.flatten().tolist() == pytest.approx([1 + 10 * beside / (1 + beside), 1000])
    unreset = select("nuwa", picture, 2, replace(config, reset_self_weight=False))
    assert unreset.features.flatten().tolist() == pytest.approx([(1 + 10 * beside) / (1 + beside), 1000])


def test_the_distance_threshold_of_clips_grid_is_the_root_of_280_patches():
    # Everything alike, so that weights are proximities: the reach is where they vanish.
    picture = draw_picture(1, 24, 24, "equal")
    weights = aggregation_weights(signals_of(picture), torch.tensor([[0]]), Nuwa())[0, 0].view(24, 24)
    distance = PatchGrid(24, 24).distances(torch.tensor([[0]]))[0, 0].view(24, 24)
    assert torch.equal(weights > 0, distance < 280**0.5)
    plain = aggregation_weights(
        signals_of(picture), torch.tensor([[0]]), Nuwa(distance_threshold=0.8, distance_convention="plain")
    )[0, 0].view(24, 24)
    assert torch.equal(plain > 0, distance < 0.8 * 1058**0.5)


@quickly
@given(case=pictures_and_keep(), config=configs)
def test_no_region_exceeds_its_quota_and_the_best_candidates_are_kept(case, config):
    assume(config.separation)
    picture, keep = case
    config = replace(config, aggregation=False)
    scores = nuwa_oracle.saliences(picture, config.salience)
    offered, quota = nuwa_oracle.candidates(picture, scores, keep, config.region_side, config.candidates_per_region)
    kept = select("nuwa", picture, keep, config).indices[0].tolist()
    for block in nuwa_oracle.regions(picture.height, picture.width, config.region_side):
        assert len(set(kept) & set(block)) <= quota
    dropped = set(offered) - set(kept)
    worst = min(scores[token] for token in kept)
    assert set(kept) <= set(offered) and all(scores[token] <= worst for token in dropped)
    assert quota == max(
        config.candidates_per_region or 1,
        candidates_needed(PatchGrid(picture.height, picture.width), config.region_side, keep),
    )


@quickly
@given(picture=pictures(), side=st.integers(1, 4))
def test_ranks_within_a_region_are_permutations_in_order_of_salience(picture, side):
    grid, salience = PatchGrid(picture.height, picture.width), torch.from_numpy(picture.attention).float()[None]
    ranks = rank_in_region(salience, grid.regions(side))[0].tolist()
    if grid.height % side == grid.width % side == 0:
        for count in (1, side**2):
            scores, tokens = best_in_squares(salience, grid, side, count)
            assert sorted(tokens[0].tolist()) == [token for token, rank in enumerate(ranks) if rank < count]
            assert scores.equal(salience.gather(1, tokens))
    for block in nuwa_oracle.regions(picture.height, picture.width, side):
        order = sorted(block, key=lambda token: (-picture.attention[token], token))
        assert [ranks[token] for token in order] == list(range(len(block)))


@quickly
@given(case=pictures_and_keep(), config=configs)
def test_rows_of_the_weights_sum_to_one_before_the_own_weight_is_reset(case, config):
    picture, keep = case
    signals = signals_of(picture)
    indices = select("nuwa", picture, keep, config).indices
    plain = aggregation_weights(signals, indices, replace(config, reset_self_weight=False))[0]
    reset = aggregation_weights(signals, indices, replace(config, reset_self_weight=True))[0]
    lonely = signals.similarity[0, indices[0]].float().norm(dim=-1) == 0
    sums = plain.sum(dim=-1)
    assert (plain >= 0).all() and (sums <= 1 + 1e-6).all()
    assert torch.allclose(sums[~lonely], torch.ones_like(sums[~lonely]), atol=1e-6)
    assert (plain[lonely] == 0).all(), "a token like nothing, not even itself, gathers nothing"
    own = torch.arange(len(plain)), indices[0]
    assert (reset[own] == 1).all()
    assert torch.allclose(reset.sum(dim=-1), 1 + sums - plain[own], atol=1e-6)
    elsewhere = torch.ones_like(plain, dtype=torch.bool)
    elsewhere[own] = False
    assert torch.equal(plain[elsewhere], reset[elsewhere])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("keep", [16, 21, 32, 41, 48, 112, 144])
def test_a_token_exactly_at_the_quantile_is_a_pillar(preset, keep):
    # Of distinct values, all but the ⌈(keep - 1) · q⌉ smallest are at or above the q-quantile; keeping 21 or 41 makes
    # that rank a whole number, where rounding could lose the token that stands on it.
    config = get_method("nuwa").configure(preset)
    pillars = select("nuwa", draw_picture(4, 12, 12), keep, config).pillars.sum()
    assert pillars == keep - -(-(keep - 1) * round(config.pillar_quantile * 100) // 100)


@quickly
@given(percent=st.integers(0, 100), kept=st.integers(1, 300))
def test_whatever_the_quantile_a_token_exactly_on_it_is_a_pillar(percent, kept):
    # Among 1 ... n the q-quantile is 1 + q (n - 1); float32 arithmetic puts 0.07 · 100 above 7 and would lose a pillar.
    ramp = replace(draw_picture(4, 1, kept), attention=np.arange(1, kept + 1, dtype=np.float32))
    selection = select("nuwa", ramp, kept, Nuwa(pillar_quantile=percent / 100))
    assert selection.pillars[0].tolist() == [100 * at >= percent * (kept - 1) for at in range(kept)]


def test_every_equal_token_is_a_pillar():
    picture = draw_picture(5, 6, 6, "equal")
    for preset in PRESETS:
        assert select("nuwa", picture, 12, get_method("nuwa").configure(preset)).pillars.all()


def test_a_dark_region_keeps_its_first_token_only_when_it_must():
    # Four regions of a 4x4 grid, one without salience: it offers one candidate, which is the last to be taken.
    picture = draw_picture(6, 4, 4, "dark_region")
    assert 0 not in select("nuwa", picture, 3).indices
    assert select("nuwa", picture, 4).indices[0, 0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"salience": "keys"}, "nuwa.salience 'keys' is unknown; allowed: cls_attention_key_norm, cls_attention"),
        ({"pillar_signal": "k"}, "nuwa.pillar_signal 'k' is unknown; allowed: key_norm, salience, feature_norm"),
        (
            {"distance_convention": "l1"},
            "nuwa.distance_convention 'l1' is unknown; allowed: squared, plain, plain_even, patches",
        ),
        ({"pillar_quantile": 1.01}, "nuwa.pillar_quantile 1.01 must lie in [0, 1]"),
        ({"pillar_quantile": -0.1}, "nuwa.pillar_quantile -0.1 must lie in [0, 1]"),
        ({"distance_threshold": 0}, "nuwa.distance_threshold 0 must lie in (0, 1]"),
        ({"distance_threshold": 26}, "nuwa.distance_threshold 26 must lie in (0, 1]"),
        ({"region_side": 0}, "nuwa.region_side 0 must be at least 1"),
        ({"candidates_per_region": 0}, "nuwa.candidates_per_region 0 must be null or at least 1"),
    ],
)
def test_nuwa_refuses_impossible_hyper_parameters(arguments, message):
    with pytest.raises(ValueError) as caught:
        Nuwa(**arguments)
    assert str(caught.value) == message


# --- VisionZip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_visionzip_matches_its_description(kind, shape):
    picture = draw_picture(7, *shape, kind)
    for keep in keeps(picture.tokens):
        assert_same_outcome(select("visionzip", picture, keep), visionzip_oracle.select(picture, keep), picture)


@quickly
@given(case=pictures_and_keep(), share=st.sampled_from([0.0, 0.1, 10 / 64, 0.5, 0.9]))
def test_visionzip_matches_its_description_whatever_the_share(case, share):
    picture, keep = case
    expected = visionzip_oracle.select(picture, keep, share)
    assert_same_outcome(select("visionzip", picture, keep, VisionZip(share)), expected, picture)


def test_visionzip_splits_the_published_budgets():
    picture = draw_picture(8, 24, 24)
    for keep, contextual in [(64, 10), (128, 20), (192, 30)]:
        selection = select("visionzip", picture, keep)
        assert (~selection.pillars).sum() == contextual


def test_visionzip_by_hand():
    # Kept 4, one of them contextual. Dominant: 5, 2, 0. Rest: 1, 3, 4; its target: 1, which 3 and 4 join.
    picture = Picture(
        "hand",
        2,
        3,
        features=np.float32([[1], [2], [4], [8], [16], [32]]),
        attention=np.float32([0.2, 0.1, 0.3, 0.05, 0.05, 0.4]),
        keys=np.eye(6, dtype=np.float32),
        similarity=np.ones((6, 1), np.float32),
    )
    selection = select("visionzip", picture, 4, VisionZip(0.25))
    assert selection.indices.tolist() == [[0, 1, 2, 5]]
    assert selection.features.flatten().tolist() == [1, 2 + (8 + 16) / 2, 4, 32]
    assert selection.pillars.tolist() == [[True, False, True, True]]


def test_visionzips_means_do_not_overflow_in_half_precision():
    # 575 tokens of 200 sum to 115,000, beyond float16; their mean is 200.
    picture = draw_picture(9, 24, 24, "half")
    picture = replace(picture, features=np.full((576, 2), 200, np.float16), keys=np.ones((576, 2), np.float16))
    selection = select("visionzip", picture, 8)
    assert (~selection.pillars).sum() == 1
    assert selection.features[~selection.pillars].tolist() == [[400, 400]]


@pytest.mark.parametrize("share", [-0.1, 1, 1.5])
def test_visionzip_refuses_shares_that_are_none(share):
    with pytest.raises(ValueError) as caught:
        VisionZip(share)
    assert str(caught.value) == f"visionzip.contextual_share {share} must lie in [0, 1)"


# --- pooling

POOLED_GRIDS = [*SHAPES, (12, 12), (24, 24), (5, 2), (12, 5), (24, 2), (2, 24)]


@pytest.mark.parametrize("kind", ["normal", "half"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pooling_matches_algorithm_2(kind, shape):
    picture = draw_picture(10, *shape, kind)
    for keep in range(1, picture.tokens + 1):
        assert_same_outcome(select("pooling", picture, keep), pooling_oracle.select(picture, keep), picture)


@pytest.mark.parametrize("shape", POOLED_GRIDS)
def test_a_pooled_grid_fits_the_budget_and_has_at_least_one_cell(shape):
    grid = PatchGrid(*shape)
    for keep in range(1, grid.tokens + 1):
        height, width = pooled_shape(grid, keep)
        assert 1 <= height <= grid.height and 1 <= width <= grid.width, (keep, height, width)
        assert height * width <= keep
        assert (height, width) == pooling_oracle.shape(*shape, keep)
        assert get_method("pooling").kept(grid, keep) == height * width
    assert pooled_shape(grid, grid.tokens) == (grid.height, grid.width)


def test_pooled_shapes_by_hand():
    square, wide = PatchGrid(12, 12), PatchGrid(12, 24)
    assert [pooled_shape(square, keep) for keep in (16, 32, 48, 36)] == [(4, 4), (5, 6), (6, 7), (6, 6)]
    # a = 1/2: W = round(sqrt(2k)), H = round(W / 2).
    assert [pooled_shape(wide, keep) for keep in (8, 32, 72)] == [(2, 4), (4, 8), (6, 12)]


def test_pooling_by_hand():
    picture = replace(draw_picture(11, 2, 4), features=np.arange(8, dtype=np.float32)[:, None])
    selection = select("pooling", picture, 2)
    # Cells of 2x2: means of 0, 1, 4, 5 and of 2, 3, 6, 7; their centres' patches are row 1, columns 1 and 3.
    assert selection.features.flatten().tolist() == [2.5, 4.5]
    assert selection.indices.tolist() == [[5, 7]] and not selection.pillars.any()


# --- uniform, random, unpruned


@pytest.mark.parametrize("shape", [*SHAPES, (12, 12), (24, 24), (3, 24), (24, 3)])
def test_uniform_tokens_are_exactly_as_many_and_evenly_spaced(shape):
    grid = PatchGrid(*shape)
    for keep in range(1, grid.tokens + 1):
        indices = even_indices(grid, keep)
        assert len(indices) == keep and indices == sorted(set(indices)) and indices[-1] < grid.tokens
        assert unevenness(indices, *shape) is None, f"keep {keep}: {unevenness(indices, *shape)}"
    assert even_indices(grid, grid.tokens) == list(range(grid.tokens))


def test_uniform_tokens_by_hand():
    # Nine of 6x6: the centres of 2x2 cells, rounded down, lie on rows and columns 1, 3, 5.
    assert even_indices(PatchGrid(6, 6), 9) == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    # Three of one row of nine: the centres of three patches each.
    assert even_indices(PatchGrid(1, 9), 3) == [1, 4, 7]


@quickly
@given(case=pictures_and_keep())
def test_uniform_sees_no_content(case):
    picture, keep = case
    other = draw_picture(99, picture.height, picture.width)
    assert torch.equal(select("uniform", picture, keep).indices, select("uniform", other, keep).indices)


@pytest.mark.parametrize(("keep", "shape"), [(1, (3, 3)), (12, (6, 6)), (35, (6, 6)), (36, (6, 6)), (4, (1, 9))])
def test_random_draws_every_token_equally_often(keep, shape):
    picture = draw_picture(12, *shape)
    many = signals_of(*[replace(picture, name=f"image {number}") for number in range(600)])
    draws = select("random", many, keep).indices.tolist()
    assert contract_breach(draws, keep, picture.tokens) is None
    assert len({tuple(draw) for draw in draws}) > 1 or keep == picture.tokens


def test_random_depends_on_seed_and_image_and_on_nothing_else():
    one, other = draw_picture(13, 6, 6), draw_picture(14, 6, 6)
    drawn = select("random", one, 12, seed=3).indices
    assert torch.equal(drawn, select("random", replace(other, name=one.name), 12, seed=3).indices)
    assert not torch.equal(drawn, select("random", one, 12, seed=4).indices)
    assert not torch.equal(drawn, select("random", replace(one, name="another"), 12, seed=3).indices)
    assert torch.equal(drawn, select("random", signals_of(other, one), 12, seed=3).indices[1:])


def test_only_random_reads_the_seed():
    picture = draw_picture(15, 6, 6)
    for name in PRUNING:
        same = torch.equal(select(name, picture, 9, seed=1).indices, select(name, picture, 9, seed=2).indices)
        assert same != get_method(name).seeded
    assert [name for name in METHODS if METHODS[name].seeded] == ["random"]


def test_unpruned_keeps_everything_or_refuses():
    picture = draw_picture(16, 2, 3)
    selection = select("unpruned", picture, 6)
    assert selection.indices.tolist() == [[0, 1, 2, 3, 4, 5]] and selection.pillars.all()
    assert np.array_equal(selection.features[0].numpy(), picture.features)
    with pytest.raises(ValueError) as caught:
        select("unpruned", picture, 5)
    assert str(caught.value) == "unpruned keeps all 6 tokens, not 5"


# --- what all methods share


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=pictures_and_keep(), name=st.sampled_from(PRUNING))
def test_a_selection_is_what_it_says(case, name):
    picture, keep = case
    selection = select(name, picture, keep)
    indices = selection.indices[0].tolist()
    assert selection.kept == get_method(name).kept(PatchGrid(picture.height, picture.width), keep)
    assert selection.kept <= keep and (selection.kept == keep or name == "pooling")
    assert indices == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < picture.tokens
    assert selection.features.shape == (1, len(indices), picture.features.shape[1])
    assert torch.isfinite(selection.features).all()
    untouched = torch.from_numpy((picture.projected if selection.projected else picture.features)[indices])
    flags = selection.pillars[0]
    assert torch.equal(selection.features[0][flags], untouched[flags])


@pytest.mark.parametrize("name", PRUNING)
def test_inputs_are_left_alone(name):
    signals = signals_of(draw_picture(17, 6, 6))
    before = [getattr(signals, part).clone() for part in SIGNALS]
    selection = select(name, signals, 9)
    selection.features.mul_(2)
    after = [getattr(signals, part) for part in SIGNALS]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# --- the registry


@pytest.mark.parametrize(("name", "hint"), [("nuwaa", "; did you mean 'nuwa'?"), ("xyz", "")])
def test_an_unknown_method_is_named_with_what_exists(name, hint):
    with pytest.raises(ValueError) as caught:
        get_method(name)
    known = ", ".join(sorted(METHODS))
    assert str(caught.value) == f"stage-1 method {name!r} is unknown; allowed: {known}{hint}"


def test_unknown_parameters_and_presets_are_named_with_what_exists():
    with pytest.raises(ValueError) as caught:
        get_method("visionzip").configure(share=0.1)
    assert str(caught.value) == "visionzip has no parameter 'share'; allowed: contextual_share"
    with pytest.raises(ValueError) as caught:
        get_method("uniform").configure("paper")
    assert str(caught.value) == "uniform has no preset 'paper'; allowed: default"


def test_a_name_is_registered_once():
    with pytest.raises(ValueError) as caught:
        register("nuwa", Nuwa)(lambda *_: None)
    assert str(caught.value) == "stage-1 method 'nuwa' is registered twice; choose another name for the second"


# --- VisionZip's keys


@pytest.mark.parametrize("heads", [2, 3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_visionzip_compares_keys_averaged_over_heads(kind, heads):
    picture = draw_picture(8, 5, 7, kind)
    signals = replace(signals_of(picture), heads=heads)
    for keep in keeps(picture.tokens):
        assert_same_outcome(
            select("visionzip", signals, keep), visionzip_oracle.select(picture, keep, heads=heads), picture
        )


def test_visionzips_head_mean_joins_another_target_than_full_width_keys():
    picture = draw_picture(8, 6, 6)
    signals = signals_of(picture)
    full, mean = (select("visionzip", replace(signals, heads=heads), 20) for heads in (1, 3))
    assert torch.equal(full.indices, mean.indices) and not torch.equal(full.features, mean.features)
    assert replace(signals, heads=3)[:1].heads == 3
    with pytest.raises(ValueError) as caught:
        replace(signals, heads=4)
    assert str(caught.value) == "signals.heads 4 does not divide keys of width 6"


@pytest.mark.parametrize("keep", [0, -1, 17])
def test_a_budget_that_the_image_cannot_meet_is_refused_where_a_method_is_called_directly(keep):
    nothing = {"cls_attention": torch.zeros(1, 16), "keys": torch.zeros(1, 16, 2), "similarity": torch.zeros(1, 16, 2)}
    signals = VisionSignals(grid=PatchGrid(4, 4), features=torch.zeros(1, 16, 2), image_ids=("one",), **nothing)
    assert select("random", signals, 16).indices.tolist() == [list(range(16))]
    own = {name: method for name, method in METHODS.items() if method.select.__module__.startswith("nuwa.stage1.")}
    assert len(own) > 12
    for name, method in own.items():
        assert method.select in vars(sys.modules[method.select.__module__]).values(), "its module has the same"
        with pytest.raises(ValueError) as caught:
            method.select(signals, keep, method.configure(), 0)
        assert str(caught.value) == f"{name} cannot keep {keep} of 16 tokens; allowed: 1..16"
