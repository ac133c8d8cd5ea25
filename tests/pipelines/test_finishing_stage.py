"""``sweep.finish_with`` from the sweep's stage to its scores, where a method cannot bear one image."""

from __future__ import annotations

import json
import shutil
import sys

import pandas as pd
import test_plan_stage
import yaml
from bench import BENCHMARKS
from forked import forked

from nuwa import UNPRUNED
from stages.entry import EXAMPLES, PREDICTIONS, SCORES, SWEEP, TRIALS, run_stage
from stages.evaluate import evaluate
from stages.sweep import sweep

project = test_plan_stage.project
FRAIL = '''
"""A method that notes what images it saw and breaks at those it is told to."""
from dataclasses import dataclass
import torch
from nuwa.selection import keep_unmerged
from nuwa.stage1 import register

seen, unbearable = [], []


@dataclass(frozen=True)
class Own:
    pass


@register("frail", Own)
def select(signals, keep, config, seed=0):
    for image in signals.features:
        seen.append(image.double().abs().sum().item())
        if seen[-1] in unbearable:
            raise RuntimeError("this image is too much")
    return keep_unmerged(signals, torch.arange(keep).expand(len(signals.features), -1))
'''


def set_up(project, finish_with: float | None) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    params |= {"plugins": ["frail"], "search": params["search"] | {"swarm": None}}
    params["sweep"]["grids"] = [{"name": "methods", "method": ["nuwa", "random", "frail"], "budget": 16}]
    params["sweep"]["finish_with"] = finish_with
    params["evaluate"] |= {"resamples": 100, "against": {"method": "random", "preset": None}}
    params["report"] |= {"headline_budget": 16}
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def sweep_and_score(project) -> None:
    """Once to see every image, once with one that breaks, and the same command again with ``finish_with``."""
    set_up(project, None)
    run_stage(sweep)
    import frail

    frail.unbearable.append(max(frail.seen))
    shutil.rmtree(project / "cache")
    for path in (PREDICTIONS, SWEEP):
        path.unlink()
    for finish_with in (None, 0.1):
        set_up(project, finish_with)
        try:
            run_stage(sweep)
        except SystemExit as refused:
            print(f"refused: {refused.code}", flush=True)
    run_stage(evaluate)


def test_a_run_that_lacks_little_is_scored_on_what_every_trial_has_answered(project, monkeypatch):
    (project / "frail.py").write_text(FRAIL)
    monkeypatch.syspath_prepend(str(project))
    done = forked(lambda: sweep_and_score(project))
    assert done.code == 0, done.err[-3000:]
    examples = pd.read_parquet(EXAMPLES)
    examples = examples[examples["benchmark"].isin(BENCHMARKS)]
    trials, facts = pd.read_parquet(TRIALS), json.loads(SWEEP.read_text())
    image = examples.set_index("example_id").loc[list(facts["left_out"]), "image"].unique().item()
    lost = examples[examples["image"] == image]
    assert set(facts["left_out"]) == set(lost["example_id"]) and "this image is too much" in str(facts["left_out"])
    assert len(trials) == 4 and "incomplete" not in facts

    # Without the setting the same run is refused in one line, which names what would end it.
    assert "refused: 1" in done.out
    assert "set sweep.quarantine: allow to go on without these trials, or sweep.finish_with: " in done.err
    told = (
        f"{len(lost)} of {4 * len(examples)} answers are missing (sweep.finish_with): 0 of 4 trials and {len(lost)} of "
        f"{len(examples)} questions are left out; all compared trials have answered the others"
    )
    assert facts["missing"] == told and told in done.out.splitlines()

    # What every trial has answered is compared, and scores say on how many questions.
    left = examples.drop(lost.index)
    answered = pd.read_parquet(PREDICTIONS).groupby("trial_id")["example_id"].agg(set)
    assert answered.to_dict() == {trial: set(left["example_id"]) for trial in trials["trial_id"]}
    scores = pd.read_parquet(SCORES)
    by_benchmark = scores[scores["benchmark"] != "mean"].groupby(["trial_id", "benchmark"])["n"].agg(set)
    counts = left["benchmark"].value_counts()
    assert all(counted == {counts[benchmark]} for (_, benchmark), counted in by_benchmark.items())
    assert set(scores["trial_id"]) == set(trials["trial_id"]) and UNPRUNED in set(trials["method"])
    assert "frail" not in sys.modules, "the plugin stays in the copy of this process"
