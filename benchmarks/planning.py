"""What planning costs: 100,000 trials from settings to units, and the identity of a trial.

Time is CPU time of one thread. ``identity`` is what a trial takes beside its id: which code it runs, looked up by what
trials run alike; the walks behind that, one a kind of trial, are told apart. The last line is one JSON object.

    python -m benchmarks.planning
"""

from __future__ import annotations

import json
import time

import numpy as np

from nuwa.grid import PatchGrid
from pipelines.settings import GridEntry, ModelSettings, SweepSettings
from pipelines.sweep.costs import Costs, Load, ModelCost, forecast, usual_speed
from pipelines.sweep.identity import trial_code, with_code
from pipelines.sweep.trials import Layouts, Trial, expand
from pipelines.sweep.units import UnitExample, plan_units
from stages.plan import weightless

POSITIONS = ("perc", "pesp", "rpme")
UNIT_IMAGES = 25
TRIALS = 100_000
BARS = {"plan_seconds": 10.0, "identity_ms": 0.01}


def many_trials(count: int) -> list[Trial]:
    """About ``count`` trials of one method, from a grid of five axes."""
    entry = {
        "name": "plan",
        "method": "nuwa",
        "position": list(POSITIONS),
        "stage2_layer": [2, 3, 4, 5],
        "stage2_scorer": ["attention_last_token", "attention_all_text", "cosine_mean_text", "random"],
        "parameters": {"distance_threshold": np.linspace(0.1, 0.9, max(1, count // 48)).tolist()},
    }
    settings = SweepSettings(
        benchmarks=["pope"],
        images=None,
        subset_seed=0,
        unit_images=UNIT_IMAGES,
        budgets=[16],
        grids=[GridEntry.model_validate(entry)],
    )
    return expand(settings, Layouts.fixed(PatchGrid(12, 12)), 8)


def planning(count: int) -> float:
    """CPU seconds to turn settings that mean ``count`` trials into a forecast and units, on 200 images; half is done."""
    examples = [UnitExample(f"{i}-{q}", f"{i}-{q}", str(i), "", 8) for i in range(200) for q in range(12)]
    text = [[((q, 1, 2, 3, 4, 5, 6, 7, 8), 5) for q in range(12)]] * 200
    model = ModelCost(layers=8, token=4e5, pair=5e2, head=4e4, projector=1e5, system=2)

    began = time.process_time()
    trials = many_trials(count)
    costs = [Costs(model, Load.of(text))]
    forecast(trials, costs)
    half = [([trial.trial_id for trial in trials[::2]], [example.digest for example in examples])]
    plan_units(trials, examples, half, costs, usual_speed("cpu", 1), UNIT_IMAGES)
    return time.process_time() - began


def identities(count: int) -> tuple[float, float]:
    """CPU milliseconds of a trial's identity, and seconds of the walks through the code that all of them share."""
    vlm = weightless(ModelSettings(path="models/testbed", prompt_style="testbed"))
    trials = many_trials(count)
    began = time.process_time()
    with_code(trials[:100], vlm, "cpu")
    walked = time.process_time()
    with_code(trials, vlm, "cpu")
    return (time.process_time() - walked) / len(trials) * 1000, walked - began


def main() -> None:
    seconds = planning(TRIALS)
    each, walks = identities(TRIALS)
    kinds = trial_code.cache_info().currsize
    print(f"planning {TRIALS:,} trials: {seconds:.1f} s")
    print(f"identity: {each:.4f} ms a trial, after {walks:.2f} s for the code of {kinds} kinds of trial")
    print(json.dumps({"plan_seconds": round(seconds, 2), "identity_ms": round(each, 5), "bars": BARS}))


if __name__ == "__main__":
    main()
