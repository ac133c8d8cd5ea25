"""Token schedules: the average formula, the solver against brute force and published K1/K2, and every refusal."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from oracles import schedule as oracle

from nuwa.grid import PatchGrid
from nuwa.methods import RECIPES, specify
from nuwa.schedule import Decay, TokenSchedule, UnreachableBudget, solve_schedule
from nuwa.stage2.scorers import SCORERS

CLIP = PatchGrid(24, 24)
SEVENTH, THIRD = 1 / 7, 1 / 3


# --- the schedule itself


def test_entering_and_average_by_hand():
    schedule = TokenSchedule(144, 8, 40, ((3, 10), (6, 2)))
    assert schedule.entering == [40, 40, 40, 10, 10, 10, 2, 2]
    assert schedule.average_tokens == (3 * 40 + 3 * 10 + 2 * 2) / 8
    assert TokenSchedule(144, 8, 144).entering == [144] * 8


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_entering_and_average_are_counted_layer_by_layer(data):
    layers = data.draw(st.integers(2, 40))
    tokens = data.draw(st.integers(1, 600))
    first = data.draw(st.integers(1, tokens))
    at = sorted(data.draw(st.sets(st.integers(1, layers - 1), max_size=3)))
    keeps = sorted((data.draw(st.integers(1, first)) for _ in at), reverse=True)
    cuts = list(zip(at, keeps, strict=True))
    schedule = TokenSchedule(tokens, layers, first, tuple(cuts))
    assert schedule.entering == oracle.entering(layers, first, cuts)
    assert schedule.average_tokens == pytest.approx(float(oracle.average(layers, first, cuts)), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((144, 8, 0), "stage-1 keep 0 must lie in 1..144"),
        ((144, 8, 145), "stage-1 keep 145 must lie in 1..144"),
        ((144, 8, 20, ((0, 5),)), "cut layer 0 must lie in 1..7 and cuts must ascend"),
        ((144, 8, 20, ((8, 5),)), "cut layer 8 must lie in 1..7 and cuts must ascend"),
        ((144, 8, 20, ((4, 9), (4, 5))), "cut layer 4 must lie in 5..7 and cuts must ascend"),
        ((144, 8, 20, ((4, 21),)), "cut at layer 4 keeps 21; it must keep 1..20"),
        ((144, 8, 20, ((4, 9), (5, 10))), "cut at layer 5 keeps 10; it must keep 1..9"),
        ((144, 8, 20, ((4, 0),)), "cut at layer 4 keeps 0; it must keep 1..20"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        TokenSchedule(*arguments)
    assert str(caught.value) == message


# --- published keeps


@pytest.mark.parametrize(("average", "first", "second"), [(64, 112, 16), (128, 224, 32), (192, 336, 48)])
def test_nuwa_on_llava_1_5(average, first, second):
    schedule = solve_schedule(average, 576, 32, [16], Decay(SEVENTH))
    assert (schedule.stage1_keep, schedule.cuts) == (first, ((16, second),))
    assert schedule.average_tokens == average


def test_fastv_at_layer_2_keeps_30_for_an_average_of_64():
    schedule = solve_schedule(64, 576, 32, [2], Decay(None))
    assert pytest.approx(29.87, abs=0.005) == (64 * 32 - 576 * 2) / 30  # published as 29.9
    assert (schedule.stage1_keep, schedule.cuts) == (576, ((2, 30),))
    assert schedule.average_tokens == (2 * 576 + 30 * 30) / 32


@pytest.mark.parametrize(("average", "first", "second"), [(128, 219, 73), (64, 109, 37), (32, 55, 18)])
def test_learnpruner_on_llava_1_5(average, first, second):
    schedule = solve_schedule(average, 576, 32, [12], Decay(THIRD))
    assert abs(schedule.stage1_keep - first) <= 1
    assert abs(schedule.cuts[0][1] - second) <= 1
    assert abs(schedule.average_tokens - average) <= 0.5


def test_learnprunes_64_is_exact():
    schedule = solve_schedule(64, 576, 32, [12], Decay(THIRD))
    assert (schedule.stage1_keep, schedule.cuts, schedule.average_tokens) == (109, ((12, 37),), 64.0)


@pytest.mark.parametrize("layers", [8, 28, 32, 40])
@pytest.mark.parametrize("ratio", [7, 3])
def test_budgets_with_a_whole_solution_get_that_solution(layers, ratio):
    for second in range(1, 48):
        schedule = solve_schedule(second * (ratio + 1) / 2, 576, layers, [layers // 2], Decay(1 / ratio))
        assert (schedule.stage1_keep, schedule.cuts) == (ratio * second, ((layers // 2, second),))


# --- the solver


@st.composite
def problems(draw, smallest_ratio):
    layers = draw(st.integers(2, 48))
    cut = draw(st.integers(1, layers - 1))
    tokens = draw(st.integers(1, 3000))
    ratio = draw(st.one_of(st.none(), st.floats(smallest_ratio, 1)))
    average = draw(st.floats(0.1, tokens * 1.1))
    return average, tokens, layers, cut, ratio


def check_half_a_token(problem):
    average, tokens, layers, cut, ratio = problem
    low = Fraction(cut * tokens + layers - cut, layers) if ratio is None else 1
    try:
        schedule = solve_schedule(average, tokens, layers, [cut], Decay(ratio))
    except UnreachableBudget:
        assert not float(low) <= average <= tokens, "a reachable budget was refused"
        return
    assert float(low) <= average <= tokens, "an unreachable budget was accepted"
    ((at, _),) = schedule.cuts
    assert at == cut and (ratio is not None or schedule.stage1_keep == tokens)
    assert abs(schedule.average_tokens - average) <= 0.5 + 1e-9


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problem=problems(smallest_ratio=0.1))
def test_the_average_is_met_to_half_a_token_or_refused(problem):
    check_half_a_token(problem)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems(smallest_ratio=1e-4))
@example(problem=(10.0, 576, 32, 1, 0.001))  # 289 then 1 averages exactly 10
def test_so_it_is_when_stage_2_keeps_next_to_nothing(problem):
    check_half_a_token(problem)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems(smallest_ratio=0.1))
@example(problem=(1.0, 2, 3, 1, 0.25))  # K1 would be 2, but K2 cannot be a half
def test_the_asked_ratio_is_kept_where_rounding_and_the_image_allow(problem):
    average, tokens, layers, cut, ratio = problem
    assume(ratio is not None and 1 <= average <= tokens)
    schedule = solve_schedule(average, tokens, layers, [cut], Decay(ratio))
    first, ((_, second),) = schedule.stage1_keep, schedule.cuts
    ideal = average * layers / (cut + (layers - cut) * ratio)
    beside_one = (average * layers - (layers - cut)) / cut  # K1 where K2 is one token
    if beside_one <= tokens and beside_one * ratio < 1:
        assert abs(first - beside_one) <= 1, "K2 stays at one token and K1 takes the rest"
        assert abs(second - 1) <= cut / (layers - cut) + 1
    elif ideal >= tokens:
        assert first == tokens, "K1 stays at the image's tokens and K2 takes the rest"
    else:
        assert abs(first - ideal) <= 1
        # One token of K1 is worth cut / (layers - cut) tokens of K2, and K2 itself is rounded and at least 1.
        assert abs(second - ideal * ratio) <= cut / (layers - cut) + 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 3000), share=st.floats(0, 1.1), layers=st.integers(1, 48))
def test_without_a_cut_every_layer_sees_the_average(tokens, share, layers):
    average = share * tokens
    if not 1 <= average <= tokens:
        with pytest.raises(UnreachableBudget):
            solve_schedule(average, tokens, layers)
        return
    schedule = solve_schedule(average, tokens, layers)
    assert schedule.cuts == () and abs(schedule.average_tokens - average) <= 0.5


@pytest.mark.parametrize("all_in_stage1", [True, False])
@pytest.mark.parametrize("layers", [2, 3, 5, 8, 10])
def test_the_range_a_refusal_names_is_the_reachable_one(layers, all_in_stage1):
    for cut in range(1, layers):
        for tokens in (1, 2, 5, 9):
            averages = oracle.reachable(layers, tokens, cut, all_in_stage1)
            ratio = None if all_in_stage1 else 0.5
            for outside in (averages[0] - Fraction(1, 1000), averages[-1] + Fraction(1, 1000)):
                with pytest.raises(UnreachableBudget) as caught:
                    solve_schedule(float(outside), tokens, layers, [cut], Decay(ratio))
                low, high = re.search(r"allowed ([\d.]+)\.\.(\d+) average tokens$", str(caught.value)).groups()
                # Two decimals, and never below what can be had.
                assert Fraction(low) == Fraction(math.ceil(averages[0] * 100), 100), (tokens, cut)
                assert int(high) == averages[-1] == tokens
            for inside in averages:
                schedule = solve_schedule(float(inside), tokens, layers, [cut], Decay(ratio))
                assert abs(schedule.average_tokens - inside) <= 0.5
                assert not all_in_stage1 or schedule.average_tokens == pytest.approx(float(inside))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 144, 8), "budget 0.5 is out of reach: allowed 1..144 average tokens"),
        ((145, 144, 8), "budget 145 is out of reach: allowed 1..144 average tokens"),
        ((float("nan"), 144, 8), "budget nan is out of reach: allowed 1..144 average tokens"),
        (
            (16, 576, 32, [2], Decay(None)),
            "budget 16 is out of reach with a stage-2 cut before layer 2 of 32: allowed 36.94..576 average tokens",
        ),
        (
            (16, 144, 8, [1], Decay(None)),
            "budget 16 is out of reach with a stage-2 cut before layer 1 of 8: allowed 18.88..144 average tokens",
        ),
        (
            (577, 576, 32, [16], Decay(SEVENTH)),
            "budget 577 is out of reach with a stage-2 cut before layer 16 of 32: allowed 1..576 average tokens",
        ),
    ],
)
def test_budgets_out_of_reach_name_the_range(arguments, message):
    with pytest.raises(UnreachableBudget) as caught:
        solve_schedule(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("layer", [0, 32, -1])
def test_a_cut_outside_the_model_is_refused(layer):
    with pytest.raises(ValueError) as caught:
        solve_schedule(64, 576, 32, [layer], Decay(SEVENTH))
    assert str(caught.value) == f"stage-2 layer {layer} must lie in 1..31: the model has 32 layers"


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(ValueError) as caught:
        solve_schedule(64, 576, 32, [16], Decay(ratio))
    assert str(caught.value) == f"stage-2 ratio K2/K1 {ratio:g} must lie in (0, 1]"


# --- whole methods


def test_nuwas_recipe_gives_the_published_keeps_and_both_presets_their_scorer():
    for average, first, second in [(64, 112, 16), (128, 224, 32), (192, 336, 48)]:
        for preset, scorer in [("released", "attention_last_token"), ("paper", "cosine_mean_text")]:
            spec = specify("nuwa", preset=preset, budget=average)
            schedule = spec.schedule(CLIP, 32)
            assert (schedule.stage1_keep, schedule.cuts, spec.stage2.scorer) == (first, ((16, second),), scorer)


def test_fastvs_recipe_sees_everything_up_to_layer_2_of_32():
    spec = specify("fastv", budget=64)
    assert (spec.stage1, spec.stage2.scorer) == ("unpruned", "attention_last_token")
    assert spec.schedule(CLIP, 32).cuts == ((2, 30),)
    assert spec.schedule(CLIP, 32).stage1_keep == 576


@pytest.mark.parametrize("method", ["random", "uniform", "visionzip"])
def test_methods_without_a_stage_2_of_their_own_keep_the_average(method):
    schedule = specify(method, budget=64).schedule(CLIP, 32)
    assert (schedule.stage1_keep, schedule.cuts) == (64, ())


def test_a_pooled_grid_is_scheduled_with_what_it_really_keeps():
    # sqrt(32) = 5.66 → 6 columns and 6 rows are too many; the next smaller grid is 5 x 6.
    schedule = specify("pooling", budget=32).schedule(PatchGrid(12, 12), 8)
    assert (schedule.stage1_keep, schedule.average_tokens) == (30, 30.0)
    cut = specify("pooling", budget=16, stage2={"layer": 4, "ratio": 1.0}).schedule(PatchGrid(12, 12), 8)
    assert cut.stage1_keep == 16 and cut.cuts == ((4, 16),)


def test_any_stage_1_takes_a_stage_2():
    schedule = specify("visionzip", budget=64, stage2={"layer": 16, "scorer": "random", "ratio": SEVENTH})
    assert schedule.schedule(CLIP, 32).cuts == ((16, 16),)
    without = specify("nuwa", budget=64, without_stage2=True).schedule(CLIP, 32)
    assert (without.stage1_keep, without.cuts) == (64, ())


@pytest.mark.parametrize("arguments", [{"without_stage2": True}, {"stage2": {"ratio": SEVENTH}}])
def test_a_fastv_that_would_prune_before_the_model_is_refused_before_any_work(arguments):
    # Its stage 1 keeps everything, so a schedule with fewer tokens can only fail later.
    with pytest.raises(ValueError):
        specify("fastv", budget=64, **arguments).schedule(CLIP, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "fastvv", "budget": 64},
            f"method 'fastvv' is unknown; allowed: {', '.join(sorted(RECIPES))}",
        ),
        (
            {"method": "nuwa", "budget": 64, "position": "compact"},
            "position 'compact' is unknown; allowed: own, perc, pesp, rpme, gap",
        ),
        ({"method": "nuwa"}, "nuwa needs a budget of average tokens"),
        ({"method": "unpruned", "budget": 64}, "unpruned takes no budget, not 64; leave it out"),
        (
            {"method": "nuwa", "budget": 64, "stage2": {"scorer": "mean"}},
            "stage-2 scorer 'mean' is unknown; allowed: " + ", ".join(sorted(SCORERS)),
        ),
        (
            {"method": "nuwa", "budget": 64, "preset": "papers"},
            "nuwa has no preset 'papers'; allowed: released, released_next, released_qwen, paper, paper_next",
        ),
        (
            {"method": "random", "budget": 64, "parameters": {"seeds": 1}},
            "random has no parameter 'seeds'; allowed: none",
        ),
    ],
)
def test_methods_refuse_what_does_not_exist(arguments, message):
    with pytest.raises(ValueError) as caught:
        specify(**arguments)
    assert str(caught.value) == message


RENUMBERED = "visionzip prumerge divprune vispruner sparsevlm pyramiddrop random uniform pooling downsample"
OWN_POSITIONS = {  # as the authors' code gives them; of the last four, and of LearnPruner, as stated
    "pesp": ["fastv", "nuwa", "learnpruner", "unpruned"],
    "perc": RENUMBERED.split(),
}


@pytest.mark.parametrize(
    ("strategy", "method"), [(kind, name) for kind, names in OWN_POSITIONS.items() for name in names]
)
def test_own_positions_are_those_of_the_released_code(strategy, method):
    budget = None if method == "unpruned" else 64
    own = specify(method, position="own", budget=budget)
    assert own.position == strategy
    assert own == specify(method, position=strategy, budget=budget), "a name, never another configuration"
    assert specify(method, position="gap", budget=budget).position == "pesp"
