"""Schedules of several cuts: the solver against brute force and published keeps, whole methods, every refusal."""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import schedule as oracle

from nuwa.grid import PatchGrid
from nuwa.methods import SPARSEVLM_KEEPS, specify
from nuwa.schedule import Decay, Published, TokenSchedule, UnreachableBudget, solve_schedule

CLIP = PatchGrid(24, 24)
SPARSEVLM = {64: (82, 32, 18), 128: (312, 117, 39), 192: (309, 204, 113)}  # selected and recycled after each cut


# --- published keeps


def test_pyramiddrop_at_a_half_on_llava_1_5():
    # (576 + 288 + 144 + 72) / 4 = 270: the published 1, 0.5, 0.25, 0.125 after layers 8, 16 and 24.
    schedule = specify("pyramiddrop", budget=270).schedule(CLIP, 32)
    assert (schedule.stage1_keep, schedule.cuts) == (576, ((8, 288), (16, 144), (24, 72)))
    assert schedule.average_tokens == 270


@pytest.mark.parametrize("published", SPARSEVLM)
def test_sparsevlms_published_averages_count_what_leaves_the_layers(published):
    schedule = TokenSchedule(576, 32, 576, tuple(zip((3, 7, 16), SPARSEVLM[published], strict=True)))
    assert schedule.average_leaving == pytest.approx(published, rel=0.015)
    assert schedule.average_tokens > published + 14
    assert specify("sparsevlm", budget=schedule.average_tokens).schedule(CLIP, 32) == schedule


def test_methods_of_several_cuts_see_everything_at_first():
    for method, scorer, recycling in [
        ("pyramiddrop", "attention_last_token_next_layer", False),
        ("sparsevlm", "attention_raters", True),
    ]:
        spec = specify(method, budget=192)
        schedule = spec.schedule(CLIP, 32)
        assert schedule.stage1_keep == 576 and len(schedule.cuts) == 3
        assert {cut.scorer.name for cut in spec.cuts(schedule)} == {scorer}
        assert {bool(cut.recycling) for cut in spec.cuts(schedule)} == {recycling}


@pytest.mark.parametrize("method", ["pyramiddrop", "sparsevlm"])
@pytest.mark.parametrize(("grid", "layers"), [(CLIP, 32), (PatchGrid(12, 12), 8)])
def test_the_full_budget_keeps_everything(method, grid, layers):
    schedule = specify(method, budget=grid.tokens).schedule(grid, layers)
    assert schedule.entering == [grid.tokens] * layers


def test_depths_scale_with_the_model():
    for layers, pyramid, sparse in [
        (32, (8, 16, 24), (3, 7, 16)),
        (8, (2, 4, 6), (1, 2, 4)),
        (40, (10, 20, 30), (4, 9, 20)),
    ]:
        assert specify("pyramiddrop", budget=64).stage2.layers_of(layers) == pyramid
        assert specify("sparsevlm", budget=64).stage2.layers_of(layers) == sparse


@pytest.mark.parametrize(
    ("method", "layers", "message"),
    [
        (
            "sparsevlm",
            4,
            "4 layers are too few for this method's 3 cuts: they would fall before layers 1, 1, 2; "
            "name 3 ascending layers of 1..3 in stage2_layer",
        ),
        (
            "pyramiddrop",
            3,
            "3 layers are too few for this method's 3 cuts: they would fall before layers 1, 2, 2; "
            "name 3 ascending layers of 1..2 in stage2_layer",
        ),
    ],
)
def test_shallow_models_are_refused(method, layers, message):
    with pytest.raises(ValueError) as caught:
        specify(method, budget=64).schedule(CLIP, layers)
    assert str(caught.value) == message


@pytest.mark.parametrize("layers", range(4, 49))
def test_depths_are_distinct_or_refused(layers):
    for method in ("pyramiddrop", "sparsevlm"):
        try:
            found = specify(method, budget=64).stage2.layers_of(layers)
        except ValueError:
            assert layers < 8
            continue
        assert list(found) == sorted(set(found)) and found[0] >= 1 and found[-1] < layers


# --- the solver


KEEPS = st.one_of(
    st.just(Decay(None)),
    st.floats(0.05, 1).map(Decay),
    st.just(SPARSEVLM_KEEPS),
)


@st.composite
def problems(draw):
    layers = draw(st.integers(4, 48))
    keep = draw(KEEPS)
    count = 3 if isinstance(keep, Published) else draw(st.integers(1, 3))
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1), min_size=count, max_size=count)))
    tokens = draw(st.integers(1, 3000))
    return draw(st.floats(0.1, tokens * 1.1)), tokens, layers, cuts, keep


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problem=problems())
def test_the_average_is_met_to_half_a_token_or_refused(problem):
    average, tokens, layers, cuts, keep = problem
    everything = not (isinstance(keep, Decay) and keep.ratio is not None)
    low = Fraction(cuts[0] * tokens + layers - cuts[0], layers) if everything else 1
    try:
        schedule = solve_schedule(*problem)
    except UnreachableBudget as error:
        assert not float(low) <= average <= tokens, "a reachable budget was refused"
        named = re.search(r"allowed ([\d.]+)\.\.(\d+) average tokens$", str(error)).groups()
        assert (Fraction(named[0]), int(named[1])) == (Fraction(math.ceil(low * 100), 100), tokens)
        return
    assert float(low) <= average <= tokens, "an unreachable budget was accepted"
    assert [layer for layer, _ in schedule.cuts] == cuts
    assert not everything or schedule.stage1_keep == tokens
    assert abs(schedule.average_tokens - average) <= 0.5 + 1e-9
    assert schedule.average_tokens == pytest.approx(
        float(oracle.average(layers, schedule.stage1_keep, list(schedule.cuts))), rel=1e-12
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_keeps_stay_within_a_token_of_the_asked_shares(problem):
    average, tokens, layers, cuts, keep = problem
    try:
        schedule = solve_schedule(*problem)
    except UnreachableBudget:
        return
    spans = [end - start for start, end in itertools.pairwise([0, *cuts, layers])]
    low, high = 0.0, keep.largest(len(cuts))
    for _ in range(200):  # the scale at which the shares, at least one token each, average to the budget
        middle = (low + high) / 2
        ideal = [min(max(share * tokens, 1), tokens) for share in keep.shares(middle, len(cuts))]
        mean = sum(span * kept for span, kept in zip(spans, ideal, strict=True)) / layers
        low, high = (middle, high) if mean < average else (low, middle)
    # The last keep takes what rounding leaves, so it may be farther off.
    found = [schedule.stage1_keep, *(kept for _, kept in schedule.cuts)]
    assert max(abs(one - other) for one, other in zip(ideal[:-1], found[:-1], strict=True)) <= 1 + 1e-6


def test_every_average_of_a_small_model_is_met_as_well_as_can_be():
    # All schedules 6 ≥ a ≥ b ≥ c ≥ 1 of a 5-layer model cut before 1, 2 and 4: none comes nearer than half a token.
    averages = {
        oracle.average(5, 6, [(1, a), (2, b), (4, c)])
        for a in range(1, 7)
        for b in range(1, a + 1)
        for c in range(1, b + 1)
    }
    for average in averages:
        schedule = solve_schedule(float(average), 6, 5, [1, 2, 4], Decay(None))
        assert abs(Fraction(schedule.average_tokens).limit_denominator(5) - average) <= Fraction(1, 2)


def test_a_ratio_gives_several_cuts_to_a_method_with_a_stage_1():
    spec = specify("visionzip", budget=64, stage2={"layer": [8, 16, 24], "ratio": 0.5})
    schedule = spec.schedule(CLIP, 32)
    assert schedule.average_tokens == pytest.approx(64, abs=0.5)
    first, (_, a), (_, b), (_, c) = schedule.stage1_keep, *schedule.cuts
    assert first < 576 and all(abs(2 * low - high) <= 2 for high, low in itertools.pairwise((first, a, b, c)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (64, 576, 32, [8, 16, 24], Decay(None)),
            "budget 64 is out of reach with stage-2 cuts before layers 8, 16, 24 of 32: allowed 144.75..576 average tokens",
        ),
        ((64, 576, 32, [8, 8], Decay(None)), "stage-2 layers 8, 8 must ascend"),
        ((64, 576, 32, [8, 4], Decay(None)), "stage-2 layers 8, 4 must ascend"),
        ((64, 576, 32, [8, 32], Decay(None)), "stage-2 layer 32 must lie in 1..31: the model has 32 layers"),
        (
            (64, 576, 32, [8], SPARSEVLM_KEEPS),
            "this method's published schedule has 3 cuts, not 1; name as many layers",
        ),
    ],
)
def test_impossible_cuts_are_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        solve_schedule(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_a_ratio_would_prune_before_methods_that_keep_everything(ratio):
    for method in ("fastv", "pyramiddrop", "sparsevlm"):
        with pytest.raises(ValueError) as caught:
            specify(method, budget=64, stage2={"ratio": ratio})
        assert str(caught.value) == (
            f"{method} keeps all tokens in stage 1; a stage-2 ratio of {ratio:g} would not: leave it out"
        )


def test_recycling_is_on_or_off_for_any_method():
    for method, usual in [("sparsevlm", True), ("nuwa", False), ("pyramiddrop", False)]:
        for asked in (None, True, False):
            spec = specify(method, budget=192, stage2={} if asked is None else {"recycling": asked})
            assert bool(spec.stage2.recycling) is (usual if asked is None else asked)
