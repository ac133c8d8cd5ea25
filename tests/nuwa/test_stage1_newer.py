"""The methods of 2025 and 2026 before the language model against slow oracles, on ordinary and adversarial signals, and worked by hand."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import cdpruner as cdpruner_oracle
from oracles import fastervlm as fastervlm_oracle
from oracles import hiprune as hiprune_oracle
from oracles import holov as holov_oracle
from oracles import scope as scope_oracle
from oracles import vscan as vscan_oracle
from oracles.agreement import assert_same_outcome, keeps, pictures_and_keep, select, signals_of
from oracles.pictures import KINDS, SHAPES, Picture, draw_picture

from nuwa import generate
from nuwa.grid import PatchGrid
from nuwa.selection import Selection
from nuwa.signals import directions, products_of_pairs, rounded
from nuwa.stage1 import cdpruner, get_method, scope, vscan
from nuwa.stage1.cdpruner import CDPruner
from nuwa.stage1.hiprune import HiPrune, anchor_count, neighbours
from nuwa.stage1.holov import HoloV, certain, deal, quotas, rough_means, runs, scores
from nuwa.stage1.scope import Scope, salience
from nuwa.stage1.vscan import VScan, kept, local_split

torch.set_num_threads(1)
ORACLES = {
    "cdpruner": cdpruner_oracle,
    "fastervlm": fastervlm_oracle,
    "hiprune": hiprune_oracle,
    "holov": holov_oracle,
    "scope": scope_oracle,
    "vscan": vscan_oracle,
}
PRESETS = [(name, preset) for name in ORACLES for preset in get_method(name).presets]
quickly = settings(max_examples=80, deadline=None, derandomize=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_presets_match_their_oracles(name, preset, shape, kind):
    config = get_method(name).configure(preset)
    if getattr(config, "window_side", None) and config.window_side > min(shape):
        config = replace(config, window_side=min(shape))  # the published windows fit no such grid
    picture = draw_picture(40, *shape, kind)
    for keep in keeps(picture.tokens, SHAPES.index(shape) + KINDS.index(kind)):
        expected = ORACLES[name].select(picture, keep, **asdict(config))
        assert_same_outcome(select(name, picture, keep, config), expected, picture)


# --- HiPrune


@quickly
@given(
    case=pictures_and_keep(),
    config=st.builds(
        HiPrune, alpha=st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]), edges=st.sampled_from(["drop", "clamp"])
    ),
)
def test_hiprune_matches_its_description_whatever_its_hyper_parameters(case, config):
    picture, keep = case
    expected = hiprune_oracle.select(picture, keep, **asdict(config))
    assert_same_outcome(select("hiprune", picture, keep, config), expected, picture)


def test_anchors_of_the_published_budgets():
    # 1.28, 2.56 and 3.84; 2.5 and 7.5 are halves, which go to the even number.
    assert [anchor_count(keep, 0.1) for keep in (64, 128, 192, 125, 375)] == [1, 3, 4, 2, 8]


@pytest.mark.parametrize(
    ("edges", "token", "expected"),
    [
        ("drop", 0, {0, 1, 4}),
        ("drop", 3, {2, 3, 7}),
        ("drop", 5, {1, 4, 6, 9}),
        ("clamp", 0, {0, 1, 4}),  # both steps backwards end at the first token
        ("clamp", 3, {0, 2, 4, 7}),  # the next token begins the next row
        ("clamp", 11, {7, 10, 11}),
    ],
)
def test_neighbours_by_hand(edges, token, expected):
    found = neighbours(torch.tensor([[token]]), PatchGrid(3, 4), edges)
    assert set(found[0].tolist()) == expected


def test_hiprune_by_hand():
    # 3x3, five kept, one anchor: the middle. Its four neighbours fill the budget, however little attention they draw late.
    picture = replace(
        draw_picture(1, 3, 3),
        middle=np.float32([0, 0, 0, 0, 1, 0, 0, 0, 0]),
        late=np.float32([9, 0, 9, 0, 0, 0, 9, 0, 9]),
    )
    config = HiPrune(alpha=1.0)
    assert select("hiprune", picture, 5, config).indices.tolist() == [[1, 3, 4, 5, 7]]
    # With seven, two corners come in as registers: the first ones.
    assert select("hiprune", picture, 7, config).indices.tolist() == [[0, 1, 2, 3, 4, 5, 7]]


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_vscan_by_rough_products_joins_the_tokens_that_exact_ones_join(kind, noise, monkeypatch):
    """Also where two kept tokens are as similar as float32 can tell."""
    picture = draw_picture(3, 6, 8, kind, dim=64)
    shift = np.random.default_rng(0).normal(size=picture.projected.shape)
    projected = torch.from_numpy((picture.projected + noise * shift).astype(np.float32))[None]
    indices = torch.arange(0, 48, 4)[None]
    rough = vscan.nearest_kept(projected, indices)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert torch.equal(rough, vscan.nearest_kept(projected, indices))


# --- HoloV


@quickly
@given(
    case=pictures_and_keep(),
    config=st.builds(
        HoloV,
        count=st.sampled_from([None, 1, 3, 16]),
        beta=st.sampled_from([0.0, 0.09, 3.0]),
        inside=st.sampled_from(["attention", "score"]),
        overflow=st.sampled_from(["redistribute", "zeros"]),
        scale_single=st.booleans(),
    ),
)
def test_holov_matches_its_description_whatever_its_hyper_parameters(case, config):
    picture, keep = case
    expected = holov_oracle.select(picture, keep, **asdict(config))
    assert_same_outcome(select("holov", picture, keep, config), expected, picture)


@pytest.mark.parametrize("overflow", ["redistribute", "zeros"])
@pytest.mark.parametrize("kind", KINDS)
def test_holov_by_rough_scores_keeps_what_exact_ones_keep(kind, overflow, monkeypatch):
    pictures = [draw_picture(seed, 12, 12, kind, dim=64) for seed in range(8)]
    config = HoloV(count=6, overflow=overflow)
    rough = [select("holov", signals_of(*pictures), keep, config) for keep in (5, 33, 48)]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    for selection, keep in zip(rough, (5, 33, 48), strict=True):
        exact = select("holov", signals_of(*pictures), keep, config)
        assert torch.equal(selection.indices, exact.indices) and torch.equal(selection.pillars, exact.pillars)


def test_rough_scores_of_holov_suffice_for_ordinary_pictures_and_not_for_alike_runs():
    sizes = torch.full((3,), 20)
    means = torch.tensor([[3.3, 2.4, 1.1], [2.0, 2.0, 1.1], [5.0, 3.0, 2.0], [30.0, 1.1, 1.3]]).double()
    assert certain(means, torch.full((4,), 1e-5).double(), sizes, 10).tolist() == [True, False, False, True]
    assert certain(means, torch.full((4,), 0.1).double(), sizes, 10).tolist() == [False] * 4
    assert certain(means[3:], torch.zeros(1).double(), sizes, 24).tolist() == [False]  # the first run overflows
    # Means that are off by 6.75 % may make a share larger by 14.5 %, and 0.88 of a token more than one.
    shares = torch.tensor([[0.88, 0.12]]).double()
    assert [certain(shares, torch.tensor([off]).double(), sizes[:2], 1).item() for off in (0.05, 0.0675, 1.5)] == [
        True,
        False,
        False,
    ]


def test_rough_scores_of_holov_doubt_lengths_whose_squares_float32_cannot_hold():
    """One long vector in a run: its products with the others are finite, and its square is not."""
    config, members = HoloV(count=2, beta=1.0), [[0, 1, 2], [3, 4, 5]]
    vectors = torch.tensor([[3e19, 0], [1, 0], [0, 1], [1, 0], [1, 0], [0, 1]])[None]
    attention, sizes = torch.tensor([[0.2] * 3 + [0.13] * 3]), torch.tensor([3, 3])

    means, error = rough_means(attention, vectors[0], members, config, 2)
    assert not certain(means, error, sizes, 2).any()
    exact = scores(attention, vectors, members, config).view(1, 2, 3).mean(dim=2)
    assert torch.equal(deal(attention, vectors, members, 2, config)[0], quotas(exact, sizes, 2, config))


def test_runs_of_the_published_grids():
    assert {len(run) for run in runs(PatchGrid(24, 24), 64, HoloV())} == {36}
    assert [len(run) for run in runs(PatchGrid(5, 7), 4, HoloV())] == [3] * 3 + [2] * 13
    # Qwen2.5-VL: 16 runs where a ninth is kept, as at 64 of 576.
    assert [len(runs(PatchGrid(24, 24), keep, HoloV(count=None))) for keep in (64, 128, 192, 576)] == [16, 8, 5, 1]


def test_crops_of_the_grid_by_hand():
    assert runs(PatchGrid(4, 4), 4, HoloV(count=4, crops="grid")) == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
    assert [len(run) for run in runs(PatchGrid(2, 8), 4, HoloV(count=4, crops="grid"))] == [4] * 4
    with pytest.raises(ValueError) as caught:
        runs(PatchGrid(3, 3), 4, HoloV(count=7, crops="grid"))
    assert str(caught.value) == "holov.count 7 cuts no 3x3 grid into crops; choose another or crops: runs"


def attended(*attention: float) -> Picture:
    """One row of tokens that are all alike."""
    values = np.ones((len(attention), 2), np.float32)
    return Picture("hand", 1, len(attention), values, np.float32(attention), values, values)


def test_holov_by_hand():
    # Two runs of four with 0.7 and 0.3 of the attention: of four tokens 2 and 1 by share, and the one left to the larger share.
    picture = attended(0.3, 0.05, 0.2, 0.15, 0.02, 0.15, 0.1, 0.03)
    assert select("holov", picture, 4, HoloV(count=2)).indices.tolist() == [[0, 2, 3, 5]]
    # All attention in the first run, which has four tokens: two of six go to the other, or are vectors of zeros.
    crowded = attended(0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0)
    assert select("holov", crowded, 6, HoloV(count=2)).indices.tolist() == [[0, 1, 2, 3, 4, 5]]
    zeros = select("holov", crowded, 6, HoloV(count=2, overflow="zeros"))
    assert zeros.indices.tolist() == [[0, 1, 2, 3, 6, 7]] and zeros.projected
    assert zeros.pillars.tolist() == [[True] * 4 + [False] * 2]
    assert zeros.features[0].tolist() == [[1, 1]] * 4 + [[0, 0]] * 2


def test_the_similarity_term_of_holov_is_inert():
    """Its mean over a run is the attention's, whatever the features are: quotas follow the attention."""
    for seed in range(20):
        picture = draw_picture(seed, 24, 24, dim=16)
        other = replace(picture, projected=draw_picture(seed + 100, 24, 24, dim=16).features)
        one, two = (select("holov", shown, 64, HoloV(overflow="zeros")) for shown in (picture, other))
        assert torch.equal(one.indices, two.indices)


# --- VScan


@quickly
@given(
    case=pictures_and_keep(),
    config=st.builds(
        VScan,
        window_side=st.sampled_from([None, 1]),
        local_scan=st.sampled_from(["quota", "walk"]),
        local_rounding=st.sampled_from(["given_to_global", "lost"]),
        cap=st.sampled_from(["exact", "released"]),
    ),
)
def test_vscan_matches_its_description_whatever_its_hyper_parameters(case, config):
    picture, keep = case
    expected = vscan_oracle.select(picture, keep, **asdict(config))
    assert_same_outcome(select("vscan", picture, keep, config), expected, picture)
    assert len(expected.kept) == get_method("vscan").kept(PatchGrid(picture.height, picture.width), keep, config)


def test_the_published_budgets_of_vscan():
    released = get_method("vscan").configure("released")
    grid = PatchGrid(24, 24)
    assert [kept(grid, keep, released) for keep in (96, 112, 128, 192, 288)] == [96, 104, 128, 192, 288]
    assert kept(grid, 112) == 112
    # 90 tokens over 15 windows: 6 each, or 7 in single precision.
    wide = PatchGrid(12, 20)
    assert local_split(wide, 180, VScan(window_side=4, local_scan="walk")) == (6, 90)
    assert local_split(wide, 180, get_method("vscan").configure("released_qwen")) == (7, 90)


def test_vscan_by_hand():
    # Four windows of one token; two kept. The walk takes the best early token, then the best late one of the others.
    picture = replace(
        attended(0.1, 0.6, 0.2, 0.1),
        early=np.float32([0.1, 0.2, 0.3, 0.4]),
        projected=np.float32([[2, 0], [4, 0], [0, 1], [0, 3]]),
    )
    selection = select("vscan", picture, 2, VScan(local_scan="walk"))
    assert selection.indices.tolist() == [[1, 3]] and selection.projected
    assert selection.features[0].tolist() == [[3, 0], [0, 2]] and not selection.pillars.any()


def test_a_window_that_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError) as caught:
        select("vscan", draw_picture(1, 5, 7), 4, VScan(window_side=6))
    assert str(caught.value) == (
        "vscan.window_side 6 does not fit a 5x7 grid; allowed: 1..5, or null for a quarter of the shorter side"
    )


# --- CDPruner


@quickly
@given(
    case=pictures_and_keep(),
    config=st.builds(
        CDPruner,
        relevance=st.sampled_from(["negative", "positive", "none"]),
        theta=st.sampled_from([None, 0.0, 0.5, 0.9]),
    ),
)
def test_cdpruner_matches_its_description_whatever_its_hyper_parameters(case, config):
    picture, keep = case
    expected = cdpruner_oracle.select(picture, keep, **asdict(config))
    assert_same_outcome(select("cdpruner", picture, keep, config), expected, picture)


def test_cdpruner_by_hand():
    # Two directions; cosines to the text make token 3 the most relevant of the first and token 1 of the second.
    picture = replace(
        attended(0.1, 0.1, 0.1, 0.1),
        projected=np.float32([[1, 0], [0, 2], [0, 1], [5, 0]]),
        relevance=np.float32([0.5, 0.2, 0.3, 0.1]),
    )
    assert [select("cdpruner", picture, keep).indices.tolist()[0] for keep in (1, 2, 3)] == [[3], [1, 3], [1, 2, 3]]
    positive = CDPruner(relevance="positive")
    assert [select("cdpruner", picture, keep, positive).indices.tolist()[0] for keep in (1, 2)] == [[0], [0, 2]]
    assert select("cdpruner", picture, 2, CDPruner(relevance="none")).indices.tolist() == [[0, 1]]


def test_the_greedy_set_is_the_best_of_a_kernels_determinants():
    """Each step adds the token with the largest determinant, by the kernel itself."""
    picture = replace(draw_picture(7, 3, 4, dim=16), relevance=draw_picture(7, 3, 4).attention)  # no two alike
    weight = np.array(cdpruner_oracle.relevances(picture, "negative", None))
    unit = picture.projected / np.linalg.norm(picture.projected, axis=1, keepdims=True)
    kernel = weight[:, None] * (unit @ unit.T) * weight
    chosen: list[int] = []
    for keep in range(1, 7):
        free = [token for token in range(12) if token not in chosen]
        chosen.append(max(free, key=lambda token: np.linalg.det(kernel[np.ix_([*chosen, token], [*chosen, token])])))
        assert select("cdpruner", picture, keep).indices.tolist() == [sorted(chosen)]


# --- SCOPE


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    case=pictures_and_keep(),
    config=st.builds(Scope, alpha=st.sampled_from([0.0, 1.0, 2.0]), combine=st.sampled_from(["multiply", "add"])),
)
def test_scope_matches_its_description_whatever_its_hyper_parameters(case, config):
    picture, keep = case
    expected = scope_oracle.select(picture, keep, **asdict(config))
    assert_same_outcome(select("scope", picture, keep, config), expected, picture)


@pytest.mark.parametrize("combine", ["multiply", "add"])
@pytest.mark.parametrize("kind", KINDS)
def test_scope_by_bounds_takes_the_tokens_that_all_gains_anew_take(kind, combine):
    """Of more tokens than are brought up to date at once; among equal ones too."""
    picture, config = draw_picture(5, 8, 9, kind), Scope(combine=combine)
    unit, weight = directions(torch.from_numpy(picture.features)), salience(torch.from_numpy(picture.attention), config)
    similarity = rounded(products_of_pairs(unit)).numpy()
    for keep in (1, 30, 72):
        expected = scope.together(unit[None], weight[None], keep, config)[0].tolist()
        assert scope.lazily(similarity, weight.numpy(), keep, config) == expected


def test_scope_by_hand():
    # Two directions, three tokens in the first and one in the second. The first step covers three of four.
    values = np.float32([[1, 0], [2, 0], [3, 0], [0, 1]])
    picture = Picture("hand", 1, 4, values, np.float32([0.1, 0.1, 0.1, 0.2]), values, values)
    assert select("scope", picture, 1).indices.tolist() == [[0]]  # gain 3 · 0.1 against 1 · 0.2
    assert select("scope", picture, 2).indices.tolist() == [[0, 3]]  # the others of its direction gain nothing any more
    louder = replace(picture, attention=np.float32([0.1, 0.1, 0.1, 0.4]))
    assert select("scope", louder, 1).indices.tolist() == [[3]]
    assert select("scope", louder, 1, Scope(alpha=0.0)).indices.tolist() == [[0]]


@pytest.mark.parametrize(("smallest", "worthwhile"), [(3, 0), (10, 0), (10, 4), (64, 12)])
@pytest.mark.parametrize("kind", KINDS)
def test_cdpruner_in_pools_takes_the_tokens_of_the_whole_kernel(kind, smallest, worthwhile, monkeypatch):
    """Whatever the size of a pool, also where gains are equal and where the rank is spent."""
    monkeypatch.setattr(cdpruner, "SMALLEST_POOL", smallest)
    monkeypatch.setattr(cdpruner, "WORTHWHILE", worthwhile)
    picture = draw_picture(6, 8, 9, kind, dim=20)
    projected, relevance = torch.from_numpy(picture.projected), torch.from_numpy(picture.relevance)
    weight = (relevance.double() - relevance.double().min()) + 0.01
    for keep in (1, 15, 40, 72):
        expected = cdpruner.together(projected[None], weight[None], keep)[0].tolist()
        assert cdpruner.in_pools(cdpruner.vectors(projected, weight), weight, keep) == expected


@pytest.mark.parametrize("name", ["cdpruner", "scope", "fastervlm"])
def test_more_budget_adds_to_what_was_chosen_for_less(name):
    picture = draw_picture(3, 4, 10, "outliers")
    before: set[int] = set()
    for keep in range(1, 41):
        now = set(select(name, picture, keep).indices[0].tolist())
        assert before < now
        before = now


# --- what all share

CHANGES = {
    "hiprune": {"alpha": 0.5, "edges": "clamp"},
    "scope": {"alpha": 3.0, "combine": "add", "attention_heads": 2000},
    "fastervlm": {},
    "holov": {
        "count": 4,
        "crops": "grid",
        "beta": 50.0,
        "inside": "score",
        "overflow": "zeros",
        "scale_single": False,
    },
    "vscan": {"window_side": 5, "local_scan": "walk", "local_rounding": "lost", "cap": "released"},
    "cdpruner": {"relevance": "positive", "theta": 0.9},
}
KEEPS = {"overflow": 110, "cap": 180}
BASES = {
    ("scope", "attention_heads"): {"combine": "add"},
    ("hiprune", "edges"): {"alpha": 1.0},
    ("holov", "beta"): {"inside": "score"},
    ("holov", "inside"): {"beta": 50.0},
    ("holov", "scale_single"): {"count": 100},
    ("vscan", "cap"): {"window_side": 4, "local_scan": "walk"},
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in CHANGES for field in CHANGES[name]])
def test_every_hyper_parameter_changes_the_outcome(name, field):
    method = get_method(name)
    assert list(CHANGES[name]) == [one.name for one in fields(method.config)]
    base = BASES.get((name, field), {})
    picture = draw_picture(2, *((12, 20) if field == "cap" else (10, 12)), dim=64)
    before, after = (
        select(name, picture, KEEPS.get(field, 40), method.config(**(base | more)))
        for more in ({}, {field: CHANGES[name][field]})
    )
    assert not torch.equal(before.indices, after.indices)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (HiPrune, {"alpha": 1.5}, "hiprune.alpha 1.5 must lie in [0, 1]"),
        (HiPrune, {"edges": "wrap"}, "hiprune.edges 'wrap' is unknown; allowed: drop, clamp"),
        (HoloV, {"crops": "tiles"}, "holov.crops 'tiles' is unknown; allowed: runs, grid"),
        (HoloV, {"inside": "s"}, "holov.inside 's' is unknown; allowed: attention, score"),
        (HoloV, {"overflow": "cut"}, "holov.overflow 'cut' is unknown; allowed: redistribute, zeros"),
        (HoloV, {"count": 0}, "holov.count 0 must be null or at least 1"),
        (HoloV, {"beta": -1}, "holov.beta -1 must be at least 0"),
        (VScan, {"local_scan": "top"}, "vscan.local_scan 'top' is unknown; allowed: quota, walk"),
        (VScan, {"local_rounding": "up"}, "vscan.local_rounding 'up' is unknown; allowed: given_to_global, lost"),
        (VScan, {"cap": "none"}, "vscan.cap 'none' is unknown; allowed: exact, released"),
        (VScan, {"window_side": 0}, "vscan.window_side 0 must be null or at least 1"),
        (CDPruner, {"relevance": "no"}, "cdpruner.relevance 'no' is unknown; allowed: negative, positive, none"),
        (CDPruner, {"theta": 1}, "cdpruner.theta 1 must be null or lie in [0, 1)"),
        (Scope, {"alpha": -1}, "scope.alpha -1 must be at least 0"),
        (Scope, {"combine": "multi"}, "scope.combine 'multi' is unknown; allowed: multiply, add"),
        (Scope, {"attention_heads": 0}, "scope.attention_heads 0 must be at least 1"),
    ],
)
def test_impossible_hyper_parameters_are_refused(config, arguments, message):
    with pytest.raises(ValueError) as caught:
        config(**arguments)
    assert str(caught.value) == message


# --- whole methods


@pytest.mark.parametrize("method", ["fastervlm", "hiprune", "holov", "scope", "vscan"])
def test_new_methods_answer_through_generate(method, tiny_next, photos):
    answers = generate(
        tiny_next.model,
        tiny_next.processor,
        photos[:2],
        ["what is red"] * 2,
        method=method,
        retention=0.6,
        max_new_tokens=2,
    )
    for answer in answers:
        assert len(answer.kept.slots) == answer.schedule.stage1_keep >= len(answer.kept_last) > 0


@pytest.mark.parametrize("preset", ["default", "released_qwen"])
def test_vscan_answers_on_qwen_with_attention_received(preset, tiny_qwen, photos):
    (answer,) = generate(
        tiny_qwen.model,
        tiny_qwen.processor,
        photos[6:7],
        ["what is red"],
        method="vscan",
        preset=preset,
        retention=0.5,
        parameters={"window_side": 2},
        max_new_tokens=2,
    )
    # Whatever the preset, a third goes on before the middle layer (published for Qwen2.5-VL: 14 of 28).
    ((layer, left),) = answer.schedule.cuts
    assert (layer, answer.schedule.layers) == (3, 6)
    assert left == len(answer.kept_last) == round(answer.schedule.stage1_keep / 3)


def test_a_selection_behind_the_projector_is_not_projected_again(tiny_vlm):
    layout = tiny_vlm.layout
    features = torch.randn(1, 144, tiny_vlm.signal_widths(tiny_vlm.model.config)["features"])
    indices = torch.arange(144)[None]
    before = Selection(indices, features, torch.ones_like(indices).bool())
    behind = replace(before, features=tiny_vlm.project(features), projected=True)
    assert torch.equal(tiny_vlm.embed_visual(before, layout), tiny_vlm.embed_visual(behind, layout))


def test_relevance_without_a_text_tower_is_refused_by_name(tiny_next, photos):
    with pytest.raises(ValueError) as caught:
        generate(tiny_next.model, tiny_next.processor, photos[:1], ["a"], method="cdpruner", retention=0.5)
    assert str(caught.value) == (
        "method 'cdpruner' reads the relevance of tokens to the question, which takes CLIP's text tower, and none is named: "
        "name the folder of the encoder's CLIP model as text_tower (model.text_tower in params.yaml), or set relevance: none"
    )
