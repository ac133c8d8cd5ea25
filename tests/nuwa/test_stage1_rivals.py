"""PruMerge+, DivPrune and VisPruner against slow oracles, on ordinary and adversarial signals, and worked by hand."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense
from oracles import divprune as divprune_oracle
from oracles import prumerge as prumerge_oracle
from oracles import vispruner as vispruner_oracle
from oracles.agreement import assert_same_outcome, keeps, pictures, pictures_and_keep, select, signals_of
from oracles.pictures import KINDS, SHAPES, Picture, draw_picture

from nuwa.grid import PatchGrid
from nuwa.signals import VisionSignals, directions
from nuwa.stage1 import divprune, get_method
from nuwa.stage1.prumerge import PruMerge, merge_weights, outliers, spaced
from nuwa.stage1.vispruner import VisPruner

torch.set_num_threads(1)
ORACLES = {"divprune": divprune_oracle, "prumerge": prumerge_oracle, "vispruner": vispruner_oracle}
quickly = settings(max_examples=120, deadline=None, derandomize=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ORACLES)
def test_rivals_match_their_oracles(name, shape, kind):
    picture = draw_picture(20, *shape, kind)
    for keep in keeps(picture.tokens):
        assert_same_outcome(select(name, picture, keep), ORACLES[name].select(picture, keep), picture)


def line(features: list[list[float]], attention: list[float] | None = None) -> Picture:
    """A picture one patch high."""
    count = len(features)
    values = np.float32(features)
    return Picture("hand", 1, count, values, np.float32(attention or [1 / count] * count), values, values)


# --- PruMerge+

merging = st.builds(
    PruMerge,
    outlier_range=st.sampled_from([0.0, 0.5, 1.5, 3.0]),
    neighbours=st.sampled_from([0, 1, 2, 5, 32, 100]),
    weights=st.sampled_from(["mean", "sum"]),
)


@quickly
@given(case=pictures_and_keep(), config=merging)
def test_prumerge_matches_its_description_whatever_its_hyper_parameters(case, config):
    picture, keep = case
    parameters = {name: value for name, value in asdict(config).items() if name != "layer"}
    expected = prumerge_oracle.select(picture, keep, **parameters)
    assert_same_outcome(select("prumerge", picture, keep, config), expected, picture)


@quickly
@given(picture=pictures(), outlier_range=st.sampled_from([0.0, 0.5, 1.5, 3.0]))
def test_outliers_lie_above_the_interquartile_bound(picture, outlier_range):
    found = outliers(torch.from_numpy(picture.attention).float()[None], outlier_range)[0]
    assert found.nonzero().flatten().tolist() == prumerge_oracle.outliers(picture, outlier_range)


def test_quartiles_by_hand():
    # 0 ... 8: Q1 = 2, Q3 = 6, so outliers lie above 6 + 1.5 · 4 = 12; a token at 12 is none.
    ramp = torch.arange(9.0)[None]
    assert not outliers(ramp, 1.5).any()
    ramp[0, 8] = 12
    assert not outliers(ramp, 1.5).any()
    ramp[0, 8] = 12.001
    assert outliers(ramp, 1.5).tolist() == [[False] * 8 + [True]]


@quickly
@given(data=st.data())
def test_the_supplement_stands_in_the_middles_of_equal_parts(data):
    eligible = data.draw(st.lists(st.booleans(), min_size=1, max_size=60))
    left = [place for place, free in enumerate(eligible) if free]
    count = data.draw(st.integers(0, len(left)))
    found = spaced(torch.tensor([eligible]), torch.tensor([[count]]))[0].nonzero().flatten().tolist()
    assert found == [left[(2 * place + 1) * len(left) // (2 * count)] for place in range(count)]


def test_without_outliers_all_tokens_are_evenly_spaced():
    # The released code divides by the number of outliers.
    selection = select("prumerge", draw_picture(1, 6, 6, "equal"), 9)
    assert selection.indices.tolist() == [[2, 6, 10, 14, 18, 22, 26, 30, 34]]


def test_of_more_outliers_than_fit_the_most_attended_are_kept():
    picture = draw_picture(3, 6, 6, "outliers")
    found = prumerge_oracle.outliers(picture, 1.5)
    best = sorted(found, key=lambda token: -picture.attention[token])[:3]
    assert len(found) > 3 and select("prumerge", picture, 3).indices.tolist() == [sorted(best)]


def test_prumerge_by_hand():
    # Token 0 is the outlier; of the others the middle one, token 2, stands for all. Nearest by key: 0 takes 1, 2 takes 3.
    picture = line([[4, 0], [8, 1], [0, 1], [1, 9]], [0.7, 0.1, 0.1, 0.1])
    config = PruMerge(neighbours=1)
    selection = select("prumerge", picture, 2, config)
    assert selection.indices.tolist() == [[0, 2]] and not selection.pillars.any()
    assert selection.features[0].flatten().tolist() == pytest.approx([4.5, 0.125, 0.5, 5])
    summed = select("prumerge", picture, 2, replace(config, weights="sum"))
    assert summed.features[0].flatten().tolist() == pytest.approx([4.8, 0.1, 0.1, 1.9])


@quickly
@given(case=pictures_and_keep())
def test_released_prumerge_reads_the_last_layer_alone(case):
    picture, keep = case
    signals = signals_of(picture)
    usual = get_method("prumerge").select(signals, keep, PruMerge(weights="sum"))
    moved = replace(
        signals, last_attention=signals.cls_attention, last_keys=signals.keys, cls_attention=None, keys=None
    )
    released = get_method("prumerge").configure("released")
    found = get_method("prumerge").select(moved, keep, released)
    assert get_method("prumerge").reads(released) == ("features", "last_attention", "last_keys")
    assert torch.equal(found.indices, usual.indices) and torch.equal(found.features, usual.features)


@quickly
@given(case=pictures_and_keep(), config=merging)
def test_rows_of_prumerges_weights_sum_as_said(case, config):
    picture, keep = case
    if keep == picture.tokens or config.neighbours == 0:
        return
    signals = signals_of(picture)
    indices = select("prumerge", picture, keep, config).indices
    weights = merge_weights(signals.cls_attention.float(), signals.keys, indices, config)[0]
    near = (weights > 0).scatter(1, indices[0][:, None], False)
    others = signals.cls_attention.float().expand_as(weights)
    total = (others * near).sum(dim=1) + 1 if config.weights == "sum" else torch.ones(keep)
    assert torch.allclose(weights.sum(dim=1), total, atol=1e-6) and (weights >= 0).all()
    assert (near.sum(dim=1) <= config.neighbours).all()
    kept = weights[:, indices[0]]
    assert torch.equal(kept, torch.diag(kept.diagonal())), "kept tokens take nothing of each other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outlier_range": -1}, "prumerge.outlier_range -1 must be at least 0"),
        ({"neighbours": -1}, "prumerge.neighbours -1 must be at least 0"),
        ({"weights": "max"}, "prumerge.weights 'max' is unknown; allowed: mean, sum"),
        ({"layer": "first"}, "prumerge.layer 'first' is unknown; allowed: features, last"),
    ],
)
def test_prumerge_refuses_impossible_hyper_parameters(arguments, message):
    with pytest.raises(ValueError) as caught:
        PruMerge(**arguments)
    assert str(caught.value) == message


# --- DivPrune


def test_divprune_by_hand():
    # Directions at 0°, 10°, 90°, 100° and 200°: the last is farthest from its nearest, then the one opposite, and so on.
    angles = np.radians([0, 10, 90, 100, 200])
    picture = line(np.stack([np.cos(angles), np.sin(angles)], axis=1).tolist())
    # From 200°: 10° is 170° away. From these two: 100° is 90° and 100° away, 90° only 80°. Then 0° and 90°, 10° each.
    assert [select("divprune", picture, keep).indices.tolist()[0] for keep in (1, 2, 3)] == [[4], [1, 4], [1, 3, 4]]
    assert select("divprune", picture, 5).indices.tolist() == [[0, 1, 2, 3, 4]]


def test_divprune_ignores_length_and_never_repeats_a_token():
    # Two directions only; the released code would choose tokens again once both are taken.
    picture = line([[1, 0], [3, 0], [0, 2], [0, 1], [0.5, 0]])
    assert [select("divprune", picture, keep).indices.tolist()[0] for keep in (1, 2, 3, 5)] == [
        [0],
        [0, 2],
        [0, 1, 2],
        [0, 1, 2, 3, 4],
    ]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(picture=pictures())
def test_divprune_adds_to_what_it_chose_for_less(picture):
    before: set[int] = set()
    for keep in range(1, picture.tokens + 1):
        now = set(select("divprune", picture, keep).indices[0].tolist())
        assert before < now
        before = now


# --- VisPruner

pruning = st.builds(
    VisPruner,
    important_share=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]),
    drop_per_round=st.sampled_from([1, 2, 3, 8, 50]),
)


@quickly
@given(case=pictures_and_keep(), config=pruning)
def test_vispruner_matches_its_description_whatever_its_hyper_parameters(case, config):
    picture, keep = case
    expected = vispruner_oracle.select(picture, keep, **asdict(config))
    assert_same_outcome(select("vispruner", picture, keep, config), expected, picture)


def test_vispruner_by_hand():
    # Attention falls from left to right. One is kept by attention; the others are dealt 1, 3, 5 and 2, 4.
    # Token 1 points where 2 does and goes first; token 5 is nearly 4 and goes with it in a round of two.
    picture = line([[1, 1], [1, 0], [2, 0], [1, -3], [0, 1], [0.1, 1]], [0.3, 0.25, 0.2, 0.15, 0.06, 0.04])
    one = VisPruner(important_share=0.25, drop_per_round=1)
    two = replace(one, drop_per_round=2)
    assert select("vispruner", picture, 5, one).indices.tolist() == [[0, 2, 3, 4, 5]]
    assert select("vispruner", picture, 4, two).indices.tolist() == [[0, 2, 3, 4]]


@pytest.mark.parametrize("tokens", [11, 12])
@pytest.mark.parametrize("keep", [4, 5])
def test_vispruner_takes_any_remainder(tokens, keep):
    # The released code raises where N - ⌊T r⌋ is odd.
    picture = draw_picture(30, 1, tokens)
    assert_same_outcome(select("vispruner", picture, keep), vispruner_oracle.select(picture, keep), picture)


def test_the_important_half_is_that_of_the_budget_rounded_down():
    picture = draw_picture(31, 6, 6)
    best = sorted(range(36), key=lambda token: -picture.attention[token])
    for keep in (1, 7, 8):
        kept = select("vispruner", picture, keep).indices[0].tolist()
        assert set(best[: keep // 2]) <= set(kept)
    # 0.29 · 100 is 28.999999999999996 in floating point and 29 in fact.
    picture = draw_picture(31, 10, 20)
    everyone = replace(
        picture, features=np.ones_like(picture.features), attention=np.arange(200, 0, -1) / np.float32(1)
    )
    kept = select("vispruner", everyone, 100, VisPruner(0.29, drop_per_round=1000)).indices[0].tolist()
    assert kept[:29] == list(range(29)) and len(kept) == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"important_share": 1.1}, "vispruner.important_share 1.1 must lie in [0, 1]"),
        ({"important_share": -0.1}, "vispruner.important_share -0.1 must lie in [0, 1]"),
        ({"drop_per_round": 0}, "vispruner.drop_per_round 0 must be at least 1"),
    ],
)
def test_vispruner_refuses_impossible_hyper_parameters(arguments, message):
    with pytest.raises(ValueError) as caught:
        VisPruner(**arguments)
    assert str(caught.value) == message


# --- every hyper-parameter matters, or sweeping it would compare a trial with itself

CHANGES = {
    PruMerge: ("prumerge", {"outlier_range": 20.0, "neighbours": 2, "weights": "sum", "layer": "last"}),
    VisPruner: ("vispruner", {"important_share": 0.2, "drop_per_round": 1}),
}


@pytest.mark.parametrize(("config", "name"), [(config, name) for config in CHANGES for name in CHANGES[config][1]])
def test_every_hyper_parameter_changes_the_outcome(config, name):
    method, values = CHANGES[config]
    assert list(values) == [field.name for field in fields(config)]
    picture = replace(draw_picture(2, 10, 12), attention=draw_picture(2, 10, 12).attention ** 2)
    usual = signals_of(picture)
    signals = replace(usual, last_attention=usual.cls_attention.flip(1), last_keys=usual.keys.flip(1))
    made = (config(), config(**{name: values[name]}))
    before, after = (get_method(method).select(signals, 40, one) for one in made)
    assert not torch.equal(before.indices, after.indices) or not torch.equal(before.features, after.features)


# --- the full-matrix forms that benchmarks/methods.py compares with


@pytest.mark.parametrize("name", ["nuwa", *dense.PER_IMAGE])
def test_dense_forms_give_the_same_on_ordinary_pictures(name):
    generator = torch.Generator().manual_seed(1)
    grid = PatchGrid(24, 24)
    parts = [torch.randn(1, 576, 64, generator=generator) for _ in range(3)]
    attention = (2 * torch.randn(1, 576, generator=generator)).softmax(dim=-1)
    early = (2 * torch.randn(1, 576, generator=generator)).softmax(dim=-1)
    relevance, projected = torch.rand(1, 576, generator=generator), torch.randn(1, 576, 80, generator=generator)
    received = {"received_middle": early.flip(1), "received_late": attention.roll(7, 1)}
    further = {"early_attention": early, "relevance": relevance, "projected": projected, **received}
    usual = {"features": parts[0], "cls_attention": attention, "keys": parts[1], "similarity": parts[2]}
    signals = VisionSignals(grid=grid, **usual, image_ids=("one",), **further)
    # A kernel's rank is the width of what is projected: no more tokens have a gain.
    for keep in (32, 64) if name == "cdpruner" else (64, 112):
        ours = select(name, signals, keep)
        indices, features = getattr(dense, name)(signals, keep)
        assert torch.equal(ours.indices, indices)
        assert torch.allclose(ours.features, features, atol=1e-5)


@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-7, 1e-6, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_divprune_by_rough_products_takes_the_tokens_that_exact_ones_take(kind, noise):
    """Also among tokens whose similarities differ by less than float32 tells apart."""
    picture = draw_picture(3, 6, 8, kind, dim=64)
    shift = np.random.default_rng(0).normal(size=picture.features.shape)
    unit = directions(torch.from_numpy(picture.features.astype(float) + noise * shift))
    for keep in (1, 17, 48):
        assert divprune.one_by_one(unit, keep) == divprune.together(unit[None], keep)[0].tolist()
