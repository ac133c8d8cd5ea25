"""The sweep: parallel equals serial, an interrupted one continues, sharing changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from nuwa.decoder import Trunk
from nuwa.stage1 import get_method
from nuwa.vlm import LlavaAdapter
from pipelines.datasets import choose_questions
from pipelines.executor import UnitsFailed, run_units
from pipelines.features import FeatureStore, encode_missing
from pipelines.grid import expand
from pipelines.lock import exclusive
from pipelines.results import ResultStore
from pipelines.settings import FeatureSettings, SweepSettings
from pipelines.sweep import SweepSpec, answer_context, plan_units, run_sweep

BENCHMARKS = ["refcoco", "pope", "gqa"]
GRIDS = [
    {"name": "methods", "method": ["nuwa", "visionzip", "random"], "position": ["perc", "pesp"]},
    {"name": "cuts", "method": "nuwa", "stage2_layer": [2, 6], "stage2_scorer": ["attention_last_token", "random"]},
    {"name": "several", "method": "sparsevlm", "budget": 48},
    {"name": "several", "method": "pyramiddrop", "budget": 48, "stage2_layer": [[1, 3, 6]]},
]


@dataclass
class Bench:
    """A prepared sweep on a random model: twelve images, thirteen trials."""

    model: str
    root: Path
    identity: str
    trials: list
    questions: object
    context: str

    def spec(self, results: Path) -> SweepSpec:
        return SweepSpec(self.model, str(self.root), self.identity, str(results), threads=1)

    def run(self, results, cluster, in_process=True, trials=None, done=lambda unit, result: None):
        return run_sweep(
            self.spec(results),
            trials or self.trials,
            self.questions,
            4,
            self.context,
            cluster,
            lambda units, cached: None,
            done,
            in_process=in_process,
        )


@pytest.fixture(scope="module")
def bench(model_folder, prepared, examples, tmp_path_factory) -> Bench:
    from pipelines.settings import ClusterSettings

    root = tmp_path_factory.mktemp("features")
    store, _ = encode_missing(
        str(model_folder),
        prepared / "images.parquet",
        root,
        FeatureSettings(dtype="float32", shard_images=5, batch_size=3),
        ClusterSettings(address=None, workers=1, cpus=1, gpus=0),
        in_process=True,
    )
    vlm = LlavaAdapter.load(str(model_folder))
    plan = SweepSettings(benchmarks=BENCHMARKS, images=None, subset_seed=0, unit_images=4, budgets=[16], grids=GRIDS)
    return Bench(
        str(model_folder),
        root,
        store.identity,
        expand(plan, vlm.grid, vlm.layers),
        choose_questions(examples, BENCHMARKS, None, 0),
        answer_context(vlm, store.identity),
    )


@pytest.fixture(scope="module")
def undisturbed(bench, tmp_path_factory):
    from pipelines.settings import ClusterSettings

    outcome = bench.run(tmp_path_factory.mktemp("results"), ClusterSettings(address=None, workers=1, cpus=1, gpus=0))
    assert not outcome.failures
    return outcome


def same(one, other):
    return one.predictions.equals(other.predictions) and one.kept.equals(other.kept)


def test_every_trial_answers_every_question_once(bench, undisturbed):
    assert len(bench.trials) == 13
    assert undisturbed.predictions.num_rows == len(bench.trials) * len(bench.questions.examples)
    assert undisturbed.kept.num_rows == len(bench.trials) * 12
    frame = undisturbed.predictions.to_pandas()
    assert not frame.duplicated(["trial_id", "example_id"]).any()
    assert frame.groupby("trial_id")["prediction"].agg(tuple).nunique() > 5, "trials must be able to differ"


def test_shared_trunks_answer_as_each_trial_alone(bench, undisturbed):
    """The slow way: a trunk of its own for every trial and image, one question at a time."""
    vlm = LlavaAdapter.load(bench.model)
    features = FeatureStore(bench.root, bench.identity)
    answers = undisturbed.predictions.to_pandas().set_index(["trial_id", "example_id"])["prediction"]
    for trial in bench.trials[::2]:
        method = get_method(trial.spec.stage1)
        for example in bench.questions.examples.iloc[::3].itertuples():
            signals = vlm.signals(features.read([example.image]), (example.image,))
            selection = method.select(signals, trial.schedule.stage1_keep, trial.spec.config, trial.spec.seed)
            trunk = Trunk(vlm, selection, [[vlm.encode_prompt(example.prompt)]], trial.spec.position, (example.image,))
            from pipelines.sweep import _advance_to_cut, _answer

            if trial.schedule.cuts:
                _advance_to_cut(trunk, trial)
            (alone,) = _answer(trunk, trial, [example.max_new_tokens])
            assert vlm.decode_text(list(alone.tokens)) == answers[trial.trial_id, example.example_id]


def test_ray_workers_equal_one_process_bit_for_bit(bench, undisturbed, cluster, tmp_path):
    outcome = bench.run(tmp_path, cluster, in_process=False)
    assert not outcome.failures
    assert same(outcome, undisturbed)


def test_a_grown_grid_computes_only_what_is_missing(bench, undisturbed, cluster, tmp_path):
    bench.run(tmp_path, cluster, trials=bench.trials[:6])
    done = []
    outcome = bench.run(tmp_path, cluster, done=lambda unit, result: done.append(result[0]))
    assert sum(done) == 3 * (len(bench.trials) - 6), "three shards of each new trial"
    assert same(outcome, undisturbed)
    again = []
    assert same(bench.run(tmp_path, cluster, done=lambda unit, result: again.append(unit)), undisturbed)
    assert not again


@pytest.mark.parametrize("part", ["predictions", "kept", "timings"])
def test_a_damaged_unit_is_done_again(bench, undisturbed, cluster, tmp_path, part):
    bench.run(tmp_path, cluster)
    victim = sorted(tmp_path.glob(f"*.{part}.parquet"))[0]
    victim.write_bytes(victim.read_bytes()[:100])
    redone = []
    outcome = bench.run(tmp_path, cluster, done=lambda unit, result: redone.append(unit))
    assert redone == [victim.name.partition(".")[0]]
    assert same(outcome, undisturbed)


DRIVER = """
import pickle, sys
from pathlib import Path
from pipelines.settings import ClusterSettings
bench = pickle.loads(Path(sys.argv[1]).read_bytes())
bench.run(Path(sys.argv[2]), ClusterSettings(address=None, workers=2, cpus=1, gpus=0), in_process=sys.argv[3] == "here")
"""


def test_a_driver_killed_half_way_is_continued(bench, undisturbed, cluster, tmp_path):
    """SIGKILL once some units are on disk; the rerun does the rest, and nothing differs."""
    import pickle

    results = tmp_path / "results"
    (tmp_path / "bench.pickle").write_bytes(pickle.dumps(bench))
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(Path(__file__).parent), str(root / "tests")])
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "bench.pickle"), str(results), "here"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path},
    )
    deadline = time.monotonic() + 300
    while len(list(results.glob("*.predictions.parquet"))) < 3:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    units, _ = plan_units(bench.trials, bench.questions, 4, bench.context, set(ResultStore(results).done()))
    assert units, "killed half-way means that something is left to do"
    redone = []
    outcome = bench.run(results, cluster, done=lambda unit, result: redone.append(unit))
    assert sorted(redone) == sorted(units)
    assert same(outcome, undisturbed)


# Workers cannot import this file, so what it defines travels whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class Fragile:
    """A worker that dies, or raises, on command; each unit dies only as often as its count says."""

    folder: str

    def build(self):
        return self

    def run(self, unit):
        name, deaths, error = unit
        tries = Path(self.folder) / name
        count = len(list(tries.parent.glob(f"{name}.*")))
        Path(f"{tries}.{count}").touch()
        if count < deaths:
            os._exit(1)
        if error:
            raise KeyError(error)
        return name


def test_dead_workers_are_replaced_and_their_units_retried(cluster, tmp_path):
    units = {f"u{i}": (f"u{i}", 0, "") for i in range(8)} | {"frail": ("frail", 2, ""), "deadly": ("deadly", 99, "")}
    finished = []
    failures = run_units(Fragile(str(tmp_path)), units, cluster, lambda unit, result: finished.append(unit))
    assert sorted(finished) == ["frail", *(f"u{i}" for i in range(8))]
    assert list(failures) == ["deadly"]
    assert failures["deadly"].attempts == 3
    assert failures["deadly"].reason.startswith("killed 3 workers:")


@pytest.mark.parametrize("in_process", [True, False])
def test_an_exception_is_recorded_and_the_rest_goes_on(cluster, tmp_path, in_process):
    units = {"good": ("good", 0, ""), "bad": ("bad", 0, "no such thing"), "fine": ("fine", 0, "")}
    finished = []
    failures = run_units(
        Fragile(str(tmp_path)), units, cluster, lambda unit, result: finished.append(unit), in_process=in_process
    )
    assert sorted(finished) == ["fine", "good"]
    assert failures["bad"].reason == "KeyError: 'no such thing'"


@pytest.mark.parametrize("in_process", [True, False])
def test_a_sweep_that_only_fails_stops_early(cluster, tmp_path, in_process):
    units = {f"u{i}": (f"u{i}", 0, "broken") for i in range(50)}
    with pytest.raises(UnitsFailed, match="the first 3 units all failed, so the run stops: KeyError: 'broken'"):
        run_units(Fragile(str(tmp_path)), units, cluster, lambda unit, result: None, in_process=in_process)
    assert len(list(tmp_path.iterdir())) < 15


def test_one_driver_at_a_time(tmp_path):
    with (
        exclusive(tmp_path),
        pytest.raises(RuntimeError, match="is in use by another sweep; wait for it or stop it"),
        exclusive(tmp_path),
    ):
        pass
    with exclusive(tmp_path):
        pass


def test_results_name_their_cells(bench, cluster, tmp_path):
    bench.run(tmp_path, cluster)
    cells = ResultStore(tmp_path).done()
    assert len(cells) == 3 * len(bench.trials)
    assert all((tmp_path / f"{unit}.predictions.parquet").exists() for unit in cells.values())
    footer = pq.ParquetFile(next(iter(tmp_path.glob("*.predictions.parquet")))).schema_arrow.metadata
    assert b"cells" in footer
