"""What the newer methods inside the language model ask of a budget, and how they are configured."""

from __future__ import annotations

import pytest
from test_inside_methods import decode, questions_for

from nuwa.cost import LlmShape, kv_cache_bytes
from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout
from nuwa.methods import RECIPES, preset_values, specify
from nuwa.schedule import GridUnion, UnreachableBudget

CLIP = PatchGrid(24, 24)
LLAMA = LlmShape(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128)


def schedule_of(method, budget, layers=32, **options):
    return specify(method, budget=budget, **options).schedule(CLIP, layers)


@pytest.mark.parametrize(
    ("method", "layers", "cuts"),
    [
        ("dart", 32, [2]),
        ("feather", 32, [8, 16]),
        ("fastv_without_rope", 32, [3]),
        ("ivc_prune", 32, [16]),
        ("sparsevlm_v2", 32, [3, 7, 16]),
        ("dart", 28, [2]),
        ("feather", 28, [7, 14]),
        ("sparsevlm_v2", 8, [1, 2, 4]),
    ],
)
def test_cuts_lie_at_their_share_of_the_layers(method, layers, cuts):
    assert [layer for layer, _ in schedule_of(method, 400, layers).cuts] == cuts


def test_layers_that_fall_together_are_refused_by_name():
    with pytest.raises(ValueError) as caught:
        schedule_of("sparsevlm_v2", 400, layers=6)
    assert str(caught.value) == (
        "6 layers are too few for this method's 3 cuts: they would fall before layers 1, 1, 3; "
        "name 3 ascending layers of 1..5 in stage2_layer"
    )


def test_feather_keeps_what_its_published_run_keeps():
    """r = 0.7 and a stride of 3: 217 and 19 of 576 tokens, on average 207.75; a grid of 64."""
    schedule = schedule_of("feather", 207.75)
    assert schedule.cuts == ((8, 217), (16, 19))
    union = GridUnion(64 / 576)
    assert union.shares(0.3, 2) == pytest.approx([1, 217.6 / 576, 217.6 * 0.09 / 576])


def test_feather_has_the_grid_of_the_images_own_layout():
    """With a denser grid the first cut keeps more at the same budget, and the second less."""
    sparse, dense = (schedule_of("feather", 220, parameters={"stride": stride}).cuts for stride in (4, 2))
    assert dense[0][1] > sparse[0][1] and dense[1][1] < sparse[1][1]
    layout = VisualLayout((View(PatchGrid(6, 6)), View(PatchGrid(7, 5), 2, newline=True)))
    assert specify("feather", budget=50).on(layout, 8).schedule.average_tokens == pytest.approx(50, abs=0.5)


@pytest.mark.parametrize(("row", "entering"), [((66, 34, 20), 81.78), ((300, 200, 118), 206.75)])
def test_sparsevlm_2_follows_its_published_lists(row, entering):
    schedule = schedule_of("sparsevlm_v2", entering)
    assert [keep for _, keep in schedule.cuts] == list(row)


def test_withdrawal_is_solved_to_the_layer_and_tells_the_average_that_comes_of_it():
    schedule = schedule_of("vtw", 64)
    assert schedule.cuts == ((4, 0),) and schedule.average_tokens == 72
    assert schedule_of("vtw", 270).cuts == ((15, 0),), "as published: before layer 15 of 32"
    assert schedule_of("vtw", 270, stage2={"layer": 15}).average_tokens == 270
    assert schedule_of("vtw", 576).cuts == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"budget": 4},
            "budget 4 is out of reach: allowed multiples of 18 below 576 average tokens, within half of one",
        ),
        ({"budget": 64, "stage2": {"layer": 15}}, "budget 64 is out of reach with the layer 15: allowed 270"),
        ({"budget": 64, "stage2": {"layer": 32}}, "stage-2 layer 32 must lie in 1..31: the model has 32 layers"),
        (
            {"budget": 64, "stage2": {"layer": [4, 8]}},
            "all visual tokens can be withdrawn once, not before layers 4, 8",
        ),
    ],
)
def test_a_withdrawal_that_no_layer_gives_is_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        specify("vtw", **arguments).schedule(CLIP, 32)
    assert str(caught.value) == message


def test_budgets_below_what_all_layers_before_a_cut_need_are_refused():
    with pytest.raises(UnreachableBudget, match=r"budget 192 is out of reach .* allowed 288\.5\.\.576 average tokens"):
        schedule_of("ivc_prune", 192)


def test_trimmed_caches_cost_what_answers_see():
    trimmed, kept = (schedule_of(method, 320, stage2={"layer": 16}) for method in ("ivc_prune", "fastv"))
    assert trimmed.entering == kept.entering
    ratio = kv_cache_bytes(trimmed, LLAMA, 2) / kv_cache_bytes(kept, LLAMA, 2)
    assert ratio == pytest.approx(64 * 32 / (576 * 16 + 64 * 16))


def test_dart_as_released_says_what_it_really_keeps():
    """30 tokens asked for at 64 on average: 4 pivots and 3 for each of 8."""
    assert schedule_of("dart", 64).cuts == ((2, 30),)
    assert schedule_of("dart", 64, preset="released").cuts == ((2, 28),)
    assert schedule_of("dart", 64, preset="released").average_tokens == 62.25


def test_presets_of_a_scorer_are_the_methods():
    assert RECIPES["dart"].presets == ("default", "released")
    assert preset_values("dart", "released")["pivot_order"] == "hash"
    assert preset_values("ivc_prune", "released_qwen")["coordinate_share"] == 0.1
    assert preset_values("nuwa", "released")["region_side"]
    usual = specify("dart", budget=64)
    assert specify("dart", budget=64, parameters={"pivot_norm": "l1"}) == usual, "a default said is no other trial"
    assert specify("dart", budget=64, parameters={"pivot_norm": "l2"}) != usual


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "dart", "preset": "paper"},
            "dart has no preset 'paper'; allowed: default, released",
        ),
        (
            {"method": "feather", "parameters": {"strides": 2}},
            "feather has no parameter 'strides'; allowed: stride",
        ),
        (
            {"method": "feather", "parameters": {"stride": True}},
            "feather.stride True is of the wrong type; allowed: int",
        ),
        ({"method": "fastv", "parameters": {"coordinates": 2}}, "coordinates 2 must lie in [0, 1]"),
        (
            {"method": "random", "parameters": {"coordinates": 0.1}},
            "random makes no cut inside the language model that could keep coordinates; leave them out",
        ),
    ],
)
def test_what_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        specify(budget=64, **arguments)
    assert str(caught.value) == message


def test_another_scorer_leaves_the_methods_own_behind():
    spec = specify("feather", budget=320, stage2={"scorer": "random"})
    assert spec.stage2.scorer_names == ("random",)
    assert specify("feather", budget=320).stage2.scorer_names == ("feather", "attention_last_token_without_rope")
    assert spec.schedule(CLIP, 32).average_tokens == pytest.approx(320, abs=0.5)


def test_coordinates_are_kept_by_any_method_that_cuts(tiny_vlm, scenes):
    """A tenth by cosine and a tenth by sine, of all tokens and at both cuts, in the answers of every question."""
    from PIL import Image

    images = [Image.fromarray(scene.image) for scene in scenes[:2]]
    asked = [questions_for(tiny_vlm)[:2], questions_for(tiny_vlm)[2:]]
    kept = []
    for parameters in ({}, {"coordinates": 0.1}):
        spec = specify("fastv", budget=60, parameters=parameters)
        _, schedule, _, answers, _ = decode(tiny_vlm, spec, images, asked)
        assert all(len(answer.kept) == schedule.cuts[-1][1] for answer in answers)
        kept.append([set(answer.kept) for answer in answers])
    coordinates = set.intersection(*kept[1])
    assert len(coordinates) >= 14
    assert not any(coordinates <= own for own in kept[0])
