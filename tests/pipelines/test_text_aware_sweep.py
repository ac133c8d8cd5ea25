"""Methods that read the question before the language model, in a sweep: shared work, answers as each trial gives alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench import BENCHMARKS, SLOW, Swept
from oracles.masked_model import eager_copy

from benchmarks.gpu.families import write_text_tower
from nuwa.decoder import Trunk
from nuwa.grid import PatchGrid
from nuwa.methods import select_views
from nuwa.vlm import LlavaAdapter, adapt
from nuwa.vlm.text_tower import TextTowerError
from pipelines.features.loading import Loading
from pipelines.features.store import FeatureStore
from pipelines.settings import SweepSettings
from pipelines.sweep.answers import branch, read_encoded, run_sweep
from pipelines.sweep.costs import forecast
from pipelines.sweep.engine import check_text_tower
from pipelines.sweep.identity import code_of
from pipelines.sweep.trials import Layouts, expand

TEXT_FREE = ["nuwa", "visionzip", "divprune", "vispruner", "prumerge", "random", "uniform", "pooling"]
FURTHER = ["fastervlm", "scope", "holov"]
READING = [{"relevance": ["negative", "positive"]}, {"theta": 0.5}]
GRIDS = [
    {"name": "text-free", "method": [*TEXT_FREE, *FURTHER]},
    {"name": "text-free", "method": "cdpruner", "parameters": {"relevance": "none"}},
    *({"name": "text-aware", "method": "cdpruner", "budget": [16, 24], "parameters": own} for own in READING),
]


@pytest.fixture(scope="module")
def tiny(bench):
    """The model that the bench holds, which another process may have made."""
    return LlavaAdapter.load(bench.model)


@pytest.fixture(scope="module")
def tower(tiny, tmp_path_factory):
    return write_text_tower(tiny, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def trials(tiny):
    plan = SweepSettings(benchmarks=BENCHMARKS, images=None, subset_seed=0, unit_images=4, budgets=[16], grids=GRIDS)
    return [trial for trial in expand(plan, Layouts.fixed(PatchGrid(12, 12)), tiny.layers) if trial.budgets]


def swept(bench, tower, trials, results, cluster, examples):
    loading = Loading(text_tower=str(tower))
    spec = replace(bench.spec(results), loading=loading)
    reports = []
    outcome = run_sweep(
        spec, trials, examples, cluster, costs=bench.costs, speed=SLOW, unit_images=4,
        on_done=lambda _, report: reports.append(report), in_process=True,
    )  # fmt: skip
    return outcome, reports


def test_a_grid_of_text_free_and_text_aware_methods_answers_as_each_trial_alone(
    bench, tower, trials, cluster, tmp_path
):
    assert [trial.spec.reads_question for trial in trials] == [False] * 12 + [True] * 6
    chosen = sorted({example.image for example in bench.examples})[:2]
    examples = [example for example in bench.examples if example.image in chosen]
    outcome, _ = swept(bench, tower, trials, tmp_path, cluster, examples)
    tables = Swept.of(outcome, tmp_path, trials, examples)
    assert not outcome.failures
    answers = tables.predictions.to_pandas().set_index(["trial_id", "example_id"])
    assert set(tables.kept["trial_id"].to_pylist()) == {trial.trial_id for trial in trials[:12]}
    vlm = LlavaAdapter.load(bench.model, text_tower=tower)
    store = FeatureStore(bench.root, bench.identity)
    different = set()

    for trial in trials:
        for example in examples:
            ((_, layout, views),) = read_encoded(store, [example.image], bench.encoder, heads=vlm.heads)
            views = [replace(view, project=vlm.project) for view in views]
            if trial.spec.reads_question:
                views = vlm.read_questions(views, [[example.prompt]])
            selection = select_views(trial.plan, layout, views)
            trunk = Trunk(vlm, selection, [[vlm.encode_prompt(example.prompt)]], trial.spec.position, (example.image,))
            (alone,) = branch(trunk, trial, [example.max_new_tokens])
            row = answers.loc[(trial.trial_id, example.example_id)]
            assert (vlm.decode_text(list(alone.tokens)), list(alone.kept)) == (row.prediction, list(row.kept_final))
            different.add((trial.trial_id, example.image, tuple(row.kept_final)))
    assert len(different) > 12 * len(chosen) + 6 * len(chosen), "another question keeps other tokens"


def test_what_a_question_decides_is_planned_question_by_question(bench, trials):
    """No layer is shared between questions, and a trunk alone costs what its trials cost alone, without their answers."""
    (costs,) = bench.costs
    reading = next(trial for trial in trials if trial.spec.reads_question)
    kept, layers = reading.schedule.stage1_keep, reading.schedule.layers
    planned = forecast([reading], bench.costs)
    assert planned.shared_flops == pytest.approx(planned.alone_flops)
    assert costs.trunk(kept, layers, by_question=True) > costs.trunk(kept, layers)


def test_the_text_tower_is_part_of_what_its_own_trials_are(bench, tower, trials, tiny, tmp_path):
    free, reading = trials[0], trials[-1]
    other = write_text_tower(tiny, tmp_path, longest=20)
    plain, one, two = (adapt(tiny.model, tiny.processor, text_tower=path) for path in (None, tower, other))
    assert code_of(free, plain) == code_of(free, one) == code_of(free, two)
    assert len({code_of(reading, vlm).digest for vlm in (plain, one, two)}) == 3
    check_text_tower([reading], Loading(text_tower=str(tower)).here(bench.model), bench.model)


def test_a_tower_of_another_encoder_is_refused_before_anything_runs(bench, trials, tiny, tmp_path):
    twin = eager_copy(tiny.model)
    twin.model.vision_tower.post_layernorm.bias.data += 1
    wrong = write_text_tower(adapt(twin, tiny.processor), tmp_path)
    vlm = Loading(text_tower=str(wrong)).here(bench.model)
    check_text_tower(trials[:12], vlm, bench.model)
    with pytest.raises(TextTowerError, match="its vision half is not the model's encoder"):
        check_text_tower(trials, vlm, bench.model)
