"""The plan: the tree, what it costs against a count by hand, and units that are exactly what is missing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuwa.grid import PatchGrid
from pipelines.settings import SweepSettings
from pipelines.sweep.costs import Costs, Load, ModelCost, forecast
from pipelines.sweep.tree import work_tree
from pipelines.sweep.trials import Layouts, expand
from pipelines.sweep.units import UnitExample, WorkUnit, plan_units

GRID, LAYERS = Layouts.fixed(PatchGrid(12, 12)), 8
MODEL = ModelCost(layers=LAYERS, token=1000.0, pair=7.0, head=50.0, projector=30.0, system=2)
ENTRIES = [
    {"name": "a", "method": ["nuwa", "random"], "position": ["perc", "rpme"], "seed": [0, 1]},
    {"name": "b", "method": "nuwa", "stage2_layer": [2, 5, "off"], "stage2_scorer": ["cosine_mean_text", "random"]},
]


def trials_of(entries=ENTRIES, budgets=(16,)):
    plan = SweepSettings(
        benchmarks=["pope"], images=None, subset_seed=0, unit_images=4, budgets=list(budgets), grids=entries
    )
    return expand(plan, GRID, LAYERS)


TRIALS = trials_of()
TEXTS = [[((1, 2, 3), 2), ((1, 2, 4), 1), ((5,), 3)], [((1, 2, 3), 2)]]
COSTS = Costs(MODEL, Load.of(TEXTS))


def examples_of(images, each=3):
    return [
        UnitExample(f"d{image}-{n}", f"e{image}-{n}", f"i{image}", "", 8)
        for image in range(images)
        for n in range(each)
    ]


def test_the_tree_holds_every_trial_once_with_cuts_rising():
    tree = work_tree(TRIALS)
    leaves = [trial for positions in tree.values() for mine in positions.values() for trial in mine]
    assert sorted(t.trial_id for t in leaves) == sorted(t.trial_id for t in TRIALS)
    for identity, positions in tree.items():
        assert {t.selection_identity for mine in positions.values() for t in mine} == {identity}
        for position, mine in positions.items():
            assert {t.spec.position for t in mine} == {position}
            assert [t.first_cut for t in mine] == sorted(t.first_cut for t in mine)


def test_position_strategies_share_a_selection():
    (entry,) = [{"name": "a", "method": "visionzip", "budget": 16, "position": ["perc", "pesp", "rpme"]}]
    assert [len(positions) for positions in work_tree(trials_of([entry])).values()] == [1, 3]


def test_a_cut_that_drops_nothing_is_no_work_of_its_own():
    entry = {"name": "a", "method": "visionzip", "budget": 16, "stage2_ratio": 1.0}
    trials = trials_of([{**entry, "stage2_layer": [2, 4, "off"], "stage2_scorer": ["random", "cosine_mean_text"]}])
    assert len(trials) == 2, "the unpruned trial and one"


def one_by_one(trial):
    """FLOPs of a trial that shares nothing, token by token."""
    total = 0.0
    for text, made in itertools.chain(*TEXTS):
        total += trial.schedule.stage1_keep * MODEL.projector
        for kept in trial.schedule.entering:
            prompt = MODEL.system + kept + len(text)
            for place in range(prompt + made):
                total += MODEL.token + (place + 1) * MODEL.pair
        total += (made + 1) * MODEL.head
    return total


def below_the_cut(trial, layers):
    """FLOPs of a trunk: one prefix an image, every beginning once."""
    total = 0.0
    for questions in TEXTS:
        prefix = MODEL.system + trial.schedule.stage1_keep
        beginnings = {text[:size] for text, _ in questions for size in range(1, len(text))}
        lengths = [len(each) for each in beginnings] + [len(text) for text, _ in questions]
        seen = [place + 1 for place in range(prefix)] + [prefix + length for length in lengths]
        total += layers * sum(MODEL.token + keys * MODEL.pair for keys in seen)
        total += trial.schedule.stage1_keep * MODEL.projector
    return total


def test_costs_are_what_counting_by_hand_gives():
    for trial in TRIALS:
        assert COSTS.alone(trial) == pytest.approx(one_by_one(trial))
        kept = trial.schedule.stage1_keep
        assert COSTS.trunk(kept, 3) == pytest.approx(below_the_cut(trial, 3))
        # A branch is what the trial alone needs, less its prompt below the cut and the projector.
        alone = sum(
            MODEL.token + (place + 1) * MODEL.pair
            for text, _ in itertools.chain(*TEXTS)
            for place in range(MODEL.system + kept + len(text))
        )
        spared = trial.first_cut * alone + sum(map(len, TEXTS)) * kept * MODEL.projector
        assert COSTS.branch(trial) == pytest.approx(one_by_one(trial) - spared)


def test_a_forecast_adds_the_tree_up():
    expected = forecast(TRIALS, [COSTS])
    tree = work_tree(TRIALS)
    assert (expected.trials, expected.selections) == (len(TRIALS), len(tree))
    assert expected.trunks == len({trial.trunk for trial in TRIALS})
    assert expected.answers == len(TRIALS) * 4
    assert expected.alone_flops == pytest.approx(sum(map(one_by_one, TRIALS)))
    trunks = [mine for positions in tree.values() for mine in positions.values()]
    assert expected.trunk_flops == pytest.approx(sum(below_the_cut(mine[0], mine[-1].first_cut) for mine in trunks))
    assert expected.gain == expected.alone_flops / expected.shared_flops > 1


ids = st.sampled_from([trial.trial_id for trial in TRIALS] + ["foreign"])
stored_units = st.lists(
    st.tuples(st.lists(ids, max_size=6), st.lists(st.sampled_from(examples_of(5)), max_size=9)), max_size=4
)


@settings(deadline=None)
@given(stored_units, st.integers(1, 6), st.sampled_from([1e-3, 0.1, 10.0, 1e9]))
def test_units_are_exactly_what_is_missing(stored, unit_images, seconds):
    examples = examples_of(5)
    done = [(trials, [example.digest for example in mine]) for trials, mine in stored]
    units, cached = plan_units(TRIALS, examples, done, [COSTS], 1e4, unit_images, unit_seconds=seconds)
    known = {trial.trial_id for trial in TRIALS}
    have = {(trial, digest) for trials, digests in done for trial in trials if trial in known for digest in digests}
    planned = [
        (trial.trial_id, example.digest)
        for unit in units.values()
        for trial in unit.trials
        for example in unit.examples
    ]
    assert len(planned) == len(set(planned))
    assert set(planned) == {(trial, example.digest) for trial in known for example in examples} - have
    assert cached == len(have)
    assert all(len(unit.images) <= unit_images for unit in units.values())


def test_long_units_are_cut_and_short_ones_joined():
    examples = examples_of(8)
    long, _ = plan_units(TRIALS, examples, [], [COSTS], 1e12, 8)
    assert len(long) == 1, "all of it takes no time"
    short, _ = plan_units(TRIALS, examples, [], [COSTS], 1.0, 8)
    assert len(short) == len(TRIALS) * 8, "one trial on one image takes hours"


def test_units_start_with_whole_trunks_in_the_trees_order():
    units, _ = plan_units(TRIALS, examples_of(2), [], [COSTS], 3e5, 2)
    order = [trial.trunk for unit in units.values() for trial in unit.trials]
    assert len(units) > 3
    assert len([key for key, _ in itertools.groupby(order)]) == len(set(order))


def test_a_unit_splits_down_to_one_answer():
    unit, leaves = WorkUnit(tuple(TRIALS[:3]), tuple(examples_of(3, 2)), 36.0), []
    todo = [unit]
    while todo:
        parts = (part := todo.pop()).split()
        todo += parts.values()
        leaves += [] if parts else [part]
    answers = {(leaf.trials[0].trial_id, leaf.examples[0].digest) for leaf in leaves}
    assert len(leaves) == len(answers) == 18
    assert {(len(leaf.trials), len(leaf.examples)) for leaf in leaves} == {(1, 1)}
    assert sum(leaf.flops for leaf in leaves) == pytest.approx(36.0)
