"""What a sweep ends with where answers are missing: tables whose every trial answered every question, or one line why not."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_collection import store_unit
from test_evidence import world

from nuwa.grid import PatchGrid
from pipelines.data.left_out import without
from pipelines.scores.evidence import evaluate
from pipelines.settings import ClusterSettings, SweepSettings
from pipelines.sweep.answers import SweepOutcome, run_sweep
from pipelines.sweep.collection import collect
from pipelines.sweep.finishing import LimitReached, common_ground, finish
from pipelines.sweep.results import PARTS, ResultStore
from pipelines.sweep.trials import Layouts, expand
from pipelines.sweep.units import UnitExample, WorkUnit
from pipelines.workers import Failure, Fault, UnitsFailed

PLAN = SweepSettings(
    benchmarks=["textvqa", "refcoco"],
    images=None,
    subset_seed=0,
    unit_images=4,
    budgets=[16, 32, 48],
    grids=[{"name": "methods", "method": ["unpruned", "nuwa", "visionzip", "random"]}],
)
TRIALS = expand(PLAN, Layouts.fixed(PatchGrid(12, 12)), 8)
REFERENCE = next(trial.trial_id for trial in TRIALS if not trial.budgets)
QUESTIONS = world(images=12)[1]
EXAMPLES = [
    UnitExample(f"d{number}", row.example_id, row.image, "", 8) for number, row in enumerate(QUESTIONS.itertuples())
]
ONE = ClusterSettings(address=None, workers=1, cpus=1, gpus=0)


class NothingWorks(UnitsFailed):
    stops_the_run = True


@dataclass(frozen=True)
class Answering:
    """A worker that stores answers, cannot bear some trials (ids) and examples (ids), and at some ends the run."""

    results: str
    trials: frozenset = frozenset()
    examples: frozenset = frozenset()
    stops: frozenset = frozenset()
    reuse = "any"

    def build(self):
        return self

    def run(self, unit, _upcoming):
        if not self.trials.isdisjoint(trial.trial_id for trial in unit.trials):
            raise ValueError("shapes do not fit")
        if not self.examples.isdisjoint(example.example_id for example in unit.examples):
            raise ValueError("no such image")
        if not self.stops.isdisjoint(example.example_id for example in unit.examples):
            raise NothingWorks("the storage has gone\nTraceback: of a worker")
        store_unit(ResultStore(self.results), [trial.answer_id for trial in unit.trials], list(unit.examples))
        return unit.unit_id


def swept(folder: Path, trials=(), examples=(), stops=(), finish_with=None) -> SweepOutcome:
    """The sweep of all trials on all questions, an image at a time."""
    worker = Answering(str(folder), frozenset(trials), frozenset(examples), frozenset(stops))
    return run_sweep(
        worker, TRIALS, EXAMPLES, ONE, costs=[], speed=1.0, unit_images=1, in_process=True, finish_with=finish_with
    )


def ended(outcome: SweepOutcome, quarantine="refuse", finish_with=None):
    return finish(
        TRIALS, QUESTIONS, outcome, quarantine=quarantine, finish_with=finish_with, listed="cache/quarantine.json"
    )


def scores(folder: Path, finished) -> pd.DataFrame:
    """As the stages make them: the tables, then what they say."""
    asked = [example for example in EXAMPLES if example.example_id not in finished.left_out]
    targets = {part: folder / f"{part}.parquet" for part in PARTS}
    ids = [trial.answer_id for trial in finished.trials]
    collect(ResultStore(folder), ids, asked, targets, folder / "collecting")
    rows = [{"trial_id": trial.trial_id, "method": trial.spec.method} for trial in finished.trials]
    predictions = pq.read_table(targets["predictions"]).to_pandas()
    return evaluate(pd.DataFrame(rows), without(QUESTIONS, finished.left_out), predictions, 100, 0)


def questions_of(scored: pd.DataFrame) -> int:
    (counts,) = {tuple(mine["n"]) for _, mine in scored[scored["benchmark"] == "mean"].groupby("trial_id")}
    return sum(counts)


def test_where_nothing_is_missing_nothing_is_left_out(tmp_path):
    finished = ended(swept(tmp_path), finish_with=0.5)
    assert (finished.trials, finished.left_out, finished.incomplete, finished.told) == (TRIALS, {}, {}, "")
    assert questions_of(scores(tmp_path, finished)) == len(QUESTIONS)


@pytest.mark.parametrize("how", [{"quarantine": "allow"}, {"finish_with": 0.2}], ids=lambda how: next(iter(how)))
def test_one_trial_that_always_raises_costs_itself(tmp_path, how):
    bad = TRIALS[4].trial_id
    finished = ended(swept(tmp_path, trials=[bad]), **how)
    assert [trial.trial_id for trial in finished.trials] == [t.trial_id for t in TRIALS if t.trial_id != bad]
    assert list(finished.incomplete) == [bad] and "ValueError: shapes do not fit" in finished.incomplete[bad]
    assert not finished.left_out and questions_of(scores(tmp_path, finished)) == len(QUESTIONS)


def test_a_trial_and_questions_that_raise_under_all_cost_themselves(tmp_path):
    """Where a question has no answer of the unpruned model either, only leaving questions out helps."""
    bad, lost = TRIALS[4].trial_id, sorted(QUESTIONS["example_id"])[3:5]
    outcome = swept(tmp_path, [bad], lost)
    with pytest.raises(
        UnitsFailed, match=rf"^{len(TRIALS)} of {len(TRIALS)} trials lack answers, all others are kept; "
    ):
        ended(outcome, quarantine="allow")
    finished = ended(outcome, finish_with=0.2)
    assert list(finished.incomplete) == [bad] and sorted(finished.left_out) == lost
    missing = len(QUESTIONS) + 2 * (len(TRIALS) - 1)
    assert finished.told == (
        f"{missing} of {len(TRIALS) * len(QUESTIONS)} answers are missing (sweep.finish_with): 1 of {len(TRIALS)} trials "
        f"and 2 of {len(QUESTIONS)} questions are left out; all compared trials have answered the others"
    )
    assert finished.left_out[lost[0]] == (
        f"{len(TRIALS) - 1} of {len(TRIALS) - 1} compared trials have no answer to it: ValueError: no such image"
    )
    scored = scores(tmp_path, finished)
    assert questions_of(scored) == len(QUESTIONS) - 2
    assert set(scored["trial_id"]) == {trial.trial_id for trial in TRIALS} - {bad}


def test_more_than_is_allowed_is_one_line_that_says_how_much(tmp_path):
    bad = TRIALS[4].trial_id
    outcome = swept(tmp_path, trials=[bad])
    with pytest.raises(UnitsFailed) as raised:
        ended(outcome, finish_with=0.05)
    assert re.fullmatch(
        rf"1 of {len(TRIALS)} trials lack answers, all others are kept; first \S+ under {bad}: ValueError: shapes do not "
        r"fit; cache/quarantine\.json lists all\. Run the same command again to try just these, or set sweep\.quarantine: "
        r"allow to go on without these trials, or sweep\.finish_with: 0\.1 to end with what is there",
        str(raised.value),
    )
    assert ended(outcome, finish_with=0.1).incomplete


def test_the_share_that_is_told_is_enough():
    """189 of 21,000 are 0.009, but 0.009 times 21,000 is a little less than 189."""
    names = [f"q{number}" for number in range(3000)]
    questions = pd.DataFrame({"example_id": names, "image": "i", "benchmark": "refcoco", "truth": "{}"})
    few = [next(trial for trial in TRIALS if trial.trial_id == REFERENCE), *TRIALS[-6:]]
    lacking = {few[-1].trial_id: {f"q{number}": "broken" for number in range(189)}}
    outcome = SimpleNamespace(lacking=lacking, left=None)
    listed = {"quarantine": "fail", "listed": "there"}
    with pytest.raises(UnitsFailed, match=r"sweep\.finish_with: 0\.009 to end"):
        finish(few, questions, outcome, finish_with=0.008, **listed)
    assert len(finish(few, questions, outcome, finish_with=0.009, **listed).left_out) == 189


def test_a_limit_is_no_failure_and_says_how_far_the_run_came(tmp_path):
    left = WorkUnit((TRIALS[1],), tuple(EXAMPLES[:2]))
    failure = Failure("sweep.gpu_hours = 2 are used", "", 0, Fault.LEFT)
    outcome = SweepOutcome({left.unit_id: (left, failure)})
    everything = len(TRIALS) * len(QUESTIONS)
    with pytest.raises(LimitReached) as raised:
        ended(outcome, quarantine="allow")
    assert str(raised.value) == (
        f"sweep.gpu_hours = 2 are used: {everything - 2} of {everything} answers are made and kept; run the same command "
        "again to go on, or set sweep.finish_with: 0.005 to end with what is there"
    )
    assert len(ended(outcome, finish_with=0.005).left_out) == 2


def test_a_run_that_cannot_go_on_ends_with_what_is_there_if_that_is_enough(tmp_path, capsys):
    last = EXAMPLES[-1]
    lost = [example.example_id for example in EXAMPLES if example.image == last.image]
    share = len(lost) / len(EXAMPLES)
    for too_little in (None, share - 0.01):
        with pytest.raises(NothingWorks):
            swept(tmp_path, stops=[last.example_id], finish_with=too_little)
    outcome = swept(tmp_path, stops=[last.example_id], finish_with=share)
    there, everything = (len(EXAMPLES) - len(lost)) * len(TRIALS), len(EXAMPLES) * len(TRIALS)
    said = capsys.readouterr().err
    assert said == f"the storage has gone; {there} of {everything} answers are there (sweep.finish_with)\n"
    finished = ended(outcome, finish_with=share)
    assert sorted(finished.left_out) == sorted(lost) and finished.trials == TRIALS
    assert finished.left_out[lost[0]].endswith("compared trials have no answer to it: the storage has gone")
    assert questions_of(scores(tmp_path, finished)) == len(QUESTIONS) - len(lost)


def test_what_is_scored_together_is_left_out_together():
    marked = QUESTIONS.assign(truth=[json.dumps({"group": f"g{number // 2}"}) for number in range(len(QUESTIONS))])
    one = WorkUnit(tuple(TRIALS), (EXAMPLES[2],))
    outcome = SweepOutcome({one.unit_id: (one, Failure("KeyError: 'x'", ""))})
    marked["benchmark"] = "mme"
    finished = finish(TRIALS, marked, outcome, quarantine="refuse", finish_with=0.5, listed="")
    assert finished.left_out[EXAMPLES[3].example_id] == (
        f"it is scored together with {EXAMPLES[2].example_id}, which has no answer under some trial"
    )
    assert len(finished.left_out) == 2


cells = st.sets(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=25)


@settings(deadline=None, max_examples=200)
@given(cells)
def test_whatever_is_missing_the_rest_is_whole_and_the_reference_stays(missing):
    lacking: dict[str, set[str]] = {}
    for trial, question in missing:
        lacking.setdefault(f"t{trial}", set()).add(f"q{question}")
    trials, questions = common_ground(lacking, 6, 8, "t0")
    assert "t0" not in trials
    assert all(f"t{trial}" in trials or f"q{question}" in questions for trial, question in missing)
    kept = [asked for trial, asked in lacking.items() if trial not in trials]
    assert trials <= set(lacking) and all(any(question in asked for asked in kept) for question in questions)
    assert common_ground(dict(reversed(lacking.items())), 6, 8, "t0") == (trials, questions)
