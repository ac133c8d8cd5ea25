"""Axes → trials: products, identities, deduplication."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout
from nuwa.methods import select_views
from nuwa.signals import VisionSignals
from pipelines.settings import SweepSettings
from pipelines.sweep.trials import Layouts, expand

GRID, LAYERS = Layouts.fixed(PatchGrid(12, 12)), 8


def no_costs(schedule):
    return {}


def trials_of(*entries, budgets=(16, 32), layouts=GRID):
    sweep = SweepSettings(
        benchmarks=["pope"],
        images=None,
        subset_seed=0,
        unit_images=4,
        budgets=list(budgets),
        budget_unit="share" if layouts.dynamic else "tokens",
        grids=list(entries),
    )
    return expand(sweep, layouts, LAYERS)


def test_a_block_is_the_product_of_its_lists():
    trials = trials_of({"name": "g", "method": ["nuwa", "random"], "position": ["perc", "pesp", "rpme"]})
    assert trials[0].spec.method == "unpruned"
    points = {(t.spec.method, t.spec.position, t.spec.budget) for t in trials[1:]}
    assert points == {(m, p, b) for m in ("nuwa", "random") for p in ("perc", "pesp", "rpme") for b in (16, 32)}
    assert len(trials) == 13


def test_equal_work_is_one_trial_with_both_grids_names():
    trials = trials_of(
        {"name": "a", "method": "nuwa", "budget": 16},
        {"name": "b", "method": "nuwa", "budget": 16, "parameters": {"pillar_quantile": 0.55}},
        {"name": "c", "method": "uniform", "budget": 16, "seed": [1, 2, 3]},
    )
    assert [(t.spec.method, t.grids) for t in trials] == [
        ("unpruned", ("a",)),
        ("nuwa", ("a", "b")),
        ("uniform", ("c",)),
    ]


def test_seeds_are_trials_only_where_something_is_random():
    assert len(trials_of({"name": "g", "method": "random", "budget": 16, "seed": [1, 2, 3]})) == 4
    cut = {"name": "g", "method": "nuwa", "budget": 16, "seed": [1, 2], "stage2_scorer": "random"}
    assert len(trials_of(cut)) == 3


def test_ids_depend_on_content_and_not_on_order_or_names():
    one = {t.trial_id for t in trials_of({"name": "x", "method": ["nuwa", "visionzip"], "position": ["perc", "pesp"]})}
    other = {
        t.trial_id for t in trials_of({"name": "y", "method": ["visionzip", "nuwa"], "position": ["pesp", "perc"]})
    }
    assert one == other


MIXED = [
    {"name": "presets", "method": "vscan", "preset": ["default", "released"], "budget": [31, 48]},
    {"name": "numbers", "method": "nuwa", "parameters": {"distance_threshold": [1, 1.0, 0.5]}, "seed": [0, 1]},
    {"name": "scorers", "method": "nuwa", "stage2_scorer": ["random", "cosine_mean_text"], "stage2_layer": [2, "off"]},
    {"name": "tables", "method": "nuwa", "preset": ["paper", "released_qwen"], "position": ["perc", "pesp"]},
    {"name": "coordinates", "method": ["nuwa", "fastv"], "budget": 48, "parameters": {"coordinates": [0.1, 0.2]}},
    {"name": "dropped", "method": "sparsevlm", "budget": 48, "stage2_recycling": [True, False], "seed": [0, 1]},
    {"name": "coarser", "method": ["pooling", "random"], "seed": [0, 1]},
]
SEVERAL = Layouts({VisualLayout((View(PatchGrid(12, 12)),)): 1, VisualLayout((View(PatchGrid(8, 10)),)): 2}, True)


@pytest.mark.parametrize("layouts", [GRID, SEVERAL], ids=["one layout", "several"])
@pytest.mark.parametrize("order", [1, -1], ids=["in order", "backwards"])
def test_a_trial_among_many_is_what_it_is_alone(layouts, order):
    """What trials have in common is computed once a grid: who comes first decides nothing, nor whether any does."""
    budgets = [16, 32] if layouts is GRID else [0.25, 0.4]
    entries = [{**entry, "budget": budgets} if layouts is SEVERAL else entry for entry in MIXED][::order]
    several = trials_of(*entries, budgets=budgets, layouts=layouts)
    alone = []
    for entry in entries:
        swept = {name: value for name, value in {"budget": budgets, **entry}.items() if isinstance(value, list)}
        own = entry.get("parameters", {})
        for values in itertools.product(*swept.values(), *own.values()):
            point, parameters = zip(swept, values, strict=False), zip(own, values[len(swept) :], strict=True)
            single = {**entry, **dict(point), "parameters": dict(parameters)}
            alone.append(trials_of(single, budgets=budgets, layouts=layouts)[-1])

    assert {trial.trial_id for trial in alone} == {trial.trial_id for trial in several[1:]}
    by_id = {trial.trial_id: trial for trial in several}
    for trial in alone:
        same = by_id[trial.trial_id]
        assert trial.schedule == same.schedule and trial.keeps == same.keeps
        assert repr(trial.spec.config) == repr(same.spec.config), "1 is not 1.0"
    for trial in several:
        anew = dataclasses.replace(trial)  # knows nothing of its kin
        for name in ("trial_id", "selection_identity", "cuts", "seeded"):
            assert getattr(trial, name) == getattr(anew, name), (trial.label, name)


def test_the_full_budget_is_one_trial_whatever_the_position():
    trials = trials_of({"name": "g", "method": "uniform", "budget": 144, "position": ["perc", "pesp", "rpme"]})
    assert len(trials) == 2


def test_the_budget_is_met_and_recorded():
    (_, trial) = trials_of({"name": "g", "method": "nuwa", "budget": 16})
    row = trial.row(GRID, no_costs)
    assert (row["stage1_keep"], row["stage2_layer"], row["stage2_keep"], row["average_tokens"]) == (28, 4, 4, 16.0)
    (_, pooled) = trials_of({"name": "g", "method": "pooling", "budget": 32})
    assert pooled.row(GRID, no_costs)["average_tokens"] == 30.0, "a 5x6 grid is the largest within 32"


def test_trials_that_differ_in_stage_2_only_share_a_trunk():
    trials = trials_of({"name": "g", "method": "nuwa", "budget": 16, "stage2_scorer": ["random", "cosine_mean_text"]})
    assert len({t.selection_identity for t in trials[1:]}) == 1
    assert len({t.trial_id for t in trials}) == 3


def test_several_cuts_are_a_list_in_the_list_of_the_axis():
    trials = trials_of({"name": "g", "method": "pyramiddrop", "budget": 48, "stage2_layer": [[2, 4, 6], 1, [1, 3]]})
    assert [t.schedule.cuts for t in trials[1:]] == [
        ((2, 36), (4, 9), (6, 3)),
        ((1, 34),),
        ((1, 60), (3, 24)),
    ]
    row = trials[1].row(GRID, no_costs)
    assert (row["stage2_layer"], row["stage2_keep"], row["stage2_cuts"]) == (2, 3, "2:36 4:9 6:3")
    assert trials[3].label == (
        "pyramiddrop · 48 · pesp · stage 2 at 1, 3 by attention_last_token_next_layer (144 to 60 to 24)"
    )


def test_recycling_is_an_axis_and_part_of_the_identity():
    trials = trials_of({"name": "g", "method": "sparsevlm", "budget": 32, "stage2_recycling": [True, False]})
    assert [t.row(GRID, no_costs)["stage2_recycling"] for t in trials[1:]] == [True, False]
    assert len({t.trial_id for t in trials}) == 3 and len({t.schedule for t in trials[1:]}) == 1
    assert [t.seeded for t in trials[1:]] == [True, False], "the cluster step draws noise"


def test_trials_with_one_cut_and_several_share_their_trunk():
    trials = trials_of({"name": "g", "method": ["unpruned", "fastv", "pyramiddrop", "sparsevlm"], "budget": 48})
    assert len({t.trunk for t in trials}) == 1 and len(trials) == 4


def test_budgets_of_one_schedule_are_one_trial_that_names_them_all():
    entry = {"name": "g", "method": "pooling"}
    (_, trial) = trials_of(entry, budgets=(32, 31))
    assert trial.row(GRID, no_costs)["budgets"] == [31, 32] and trial.row(GRID, no_costs)["budget"] == 32
    assert trial.label == "pooling · 31 = 32 · pesp"


@pytest.mark.parametrize("method", ["pooling", "downsample", "nuwa", "visionzip", "uniform"])
@pytest.mark.parametrize("budget", [7, 17, 30, 31, 32, 48, 60])
def test_what_a_trial_records_is_what_its_stage_1_keeps(method, budget):
    """A coarser grid may keep fewer tokens than it is asked for, and still fewer when asked for those."""
    (_, trial) = trials_of({"name": "g", "method": method, "budget": budget, "stage2_layer": "off"})
    grid = PatchGrid(12, 12)
    generator = torch.Generator().manual_seed(1)
    signals = VisionSignals(
        grid=grid,
        features=torch.randn(1, 144, 8, generator=generator),
        cls_attention=torch.rand(1, 144, generator=generator),
        keys=torch.randn(1, 144, 8, generator=generator),
        similarity=torch.randn(1, 144, 8, generator=generator),
        image_ids=("image",),
        resized=lambda smaller: torch.zeros(1, smaller.tokens, 8),
    )
    (layout,) = GRID.counts
    assert select_views(trial.plan, layout, [signals]).kept == trial.schedule.stage1_keep <= budget


def test_values_by_budget_are_read_before_identity_where_images_are_alike():
    """released_qwen's n is 3 up to 62.5 % of the tokens, then 4; a trial is the same whichever way it came to it."""
    below, above = 89, 92  # of 144: 61.8 and 63.9 %
    table = trials_of({"name": "preset", "method": "nuwa", "preset": "released_qwen"}, budgets=(below, above))[1:]
    numbers = trials_of(
        *(
            {
                "name": "numbers",
                "method": "nuwa",
                "preset": "released_qwen",
                "budget": budget,
                "parameters": {"candidates_per_region": n},
            }
            for budget, n in [(below, 3), (above, 4)]
        )
    )[1:]
    assert [trial.spec.config.candidates_per_region for trial in table] == [3, 4]
    assert [trial.trial_id for trial in table] == [trial.trial_id for trial in numbers]


def test_values_by_budget_are_read_layout_by_layout_where_images_differ():
    views = [VisualLayout((View(PatchGrid(side, side)),), axes=3) for side in (4, 12, 20)]
    layouts = Layouts.of([views[0], views[1], views[1], views[2]], dynamic=True)
    entries = [
        {"name": "preset", "method": "nuwa", "preset": "released_qwen"},
        {"name": "none", "method": "nuwa", "preset": "released_qwen", "parameters": {"candidates_per_region": 1}},
    ]
    sweep = SweepSettings(
        benchmarks=["gqa"],
        images=1,
        subset_seed=0,
        unit_images=1,
        budget_unit="share",
        budgets=[0.25, 0.75],
        grids=entries,
    )
    quarter, most, *others = expand(sweep, layouts, 28)[1:]
    assert [quarter.on(layout).spec.config.candidates_per_region for layout in views] == [3, 3, 3]
    assert [most.on(layout).spec.config.candidates_per_region for layout in views] == [4, 4, 4]
    assert len({trial.trial_id for trial in (quarter, most, *others)}) == 4


def test_own_is_a_name_and_never_a_second_trial():
    methods = ["nuwa", "visionzip", "sparsevlm"]
    block = {"name": "methods", "method": methods, "budget": 48}
    three = trials_of({**block, "position": ["perc", "pesp", "rpme"]})
    named = trials_of({**block, "position": ["own", "gap", "perc", "pesp", "rpme"]})
    assert {trial.trial_id for trial in named} == {trial.trial_id for trial in three}
    own = trials_of({**block, "position": "own"})[1:]
    assert [(trial.spec.method, trial.spec.position) for trial in own] == [
        ("nuwa", "pesp"),
        ("visionzip", "perc"),
        ("sparsevlm", "perc"),
    ]


NEWER = ["dart", "feather", "fastv_without_rope", "ivc_prune", "vtw", "sparsevlm_v2"]


def test_newer_methods_are_trials_with_ids_of_their_own():
    """Also those that differ in hyper-parameters of a scorer, or in what they keep beside it."""
    trials = trials_of(
        {"name": "a", "method": NEWER, "budget": 90},
        {"name": "b", "method": "dart", "budget": 90, "preset": "released"},
        {"name": "c", "method": "dart", "budget": 90, "parameters": {"pivot_norm": ["l1", "l2"]}},
        {"name": "d", "method": "fastv", "budget": 90, "parameters": {"coordinates": [0.05, 0.1]}},
        {"name": "e", "method": "feather", "budget": 90, "parameters": {"stride": [2, 3]}},
    )[1:]
    assert len({trial.trial_id for trial in trials}) == len(trials) == len(NEWER) + 1 + 1 + 2 + 1
    said = {trial.spec.method: trial for trial in trials if trial.grids == ("a",)}
    assert {trial.row(GRID, no_costs)["method"] for trial in trials} == {*NEWER, "fastv"}
    assert said["vtw"].row(GRID, no_costs)["stage2_keep"] == 0
    assert said["vtw"].row(GRID, no_costs)["average_tokens"] == 90
    labels = [trial.label for trial in trials]
    assert "dart · 90 · pesp · pivot_norm=l2" in labels and "fastv · 90 · pesp · coordinates=0.05" in labels
    assert "dart (released) · 90 · pesp" in labels


def test_budgets_that_only_some_methods_reach_are_left_out_by_name():
    told = []
    sweep = SweepSettings(
        benchmarks=["pope"],
        images=None,
        subset_seed=0,
        unit_images=4,
        budgets=[16, 32, 48],
        grids=[{"name": "newer", "method": NEWER, "where_reachable": True}],
    )
    found = expand(sweep, GRID, LAYERS, told.append)
    reached = {(trial.spec.method, budget) for trial in found for budget in trial.budgets}
    assert {method for method, _ in reached} == set(NEWER) - {"ivc_prune"}
    assert {budget for method, budget in reached if method == "feather"} == {48}
    assert "feather at 16, 32" in told[0] and "ivc_prune at 16, 32, 48" in told[0]
    realised = {
        trial.spec.method: trial.row(GRID, no_costs)["average_tokens"] for trial in found if trial.budgets == (16,)
    }
    assert realised["vtw"] == 18, "the nearest layer; the average that comes of it is what is reported"
