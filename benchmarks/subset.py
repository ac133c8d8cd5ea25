"""Whether answers changed on the questions that earlier figures are of: before subsets were nested, others were drawn.

The default sweep used to take 200 of the 400 prepared images by another rule. This asks the same trials on these very
images, takes what the store holds, scores them as ``evaluate`` does, and compares with the metrics that were committed
then (``benchmarks/data/metrics_before_nested_subsets.json``). Half of the images are in the present subset too, so after
``make repro`` half of the answers are stored.

    python -m benchmarks.subset
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nuwa import UNPRUNED
from nuwa.budget import budget_tokens
from nuwa.cost import LlmShape, cost_columns
from pipelines.features.layouts import image_layouts
from pipelines.features.loading import Loading
from pipelines.scores.summary import FAMILIES, headline_table
from pipelines.settings import Settings, load_settings
from pipelines.sweep.engine import Engine
from pipelines.sweep.trials import Layouts, expand
from stages.entry import EXAMPLES, places
from stages.evaluate import score_tables

# Figures that are known to differ from those of then, as they are now, and why. Nothing else may differ, nor these further.
CHANGED = {
    "visionzip": "compares keys averaged over heads since, as its released code does",
    "vispruner": "the code of then gives today's signals, selections and answers beside today's code, so most likely other "
    "processors round otherwise: it deals tokens by the order of similarities that are nearly alike",
}
NOW = {
    "visionzip · 16 · perc / vqa": 0.7118,
    "visionzip · 16 · pesp / grounding": 0.7343,
    "visionzip · 16 · rpme / grounding": 0.0655,
    "visionzip · 16 · rpme / vqa": 0.7481,
    "vispruner · 16 · perc / grounding": 0.0252,
    "vispruner · 16 · perc / vqa": 0.7786,
    "vispruner · 16 · pesp / grounding": 0.7864,
    "vispruner · 16 · pesp / vqa": 0.8858,
    "vispruner · 16 · rpme / vqa": 0.8184,
}
PINNED = Path(__file__).parent / "data" / "metrics_before_nested_subsets.json"
IMAGES, SEED = 200, 0  # of the default sweep then


def subset_of_then(examples: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``examples`` that the default sweep asked when :data:`PINNED` was written."""
    names = sorted(set(examples["image"]))
    chosen = np.random.default_rng(SEED).choice(names, size=IMAGES, replace=False)
    return examples[examples["image"].isin(chosen.tolist())].reset_index(drop=True)


def metrics_of(settings: Settings, questions: pd.DataFrame) -> dict[str, Any]:
    """The metrics of the sweep's trials on ``questions``; what the store lacks is asked."""
    loading = Loading.of(settings.model, settings.cluster)
    vlm = loading.here(settings.model.path)
    of_image = image_layouts(vlm, questions)
    layouts = Layouts.of(of_image.values(), vlm.dynamic)
    trials = expand(settings.sweep, layouts, vlm.layers)
    engine = Engine.start(settings, vlm, of_image, places(settings))
    outcome, made = engine.run(trials, questions, lambda step, metrics: None)
    if outcome.failures:
        sys.exit(f"{len(outcome.failures)} units failed")
    print(f"{made:,} of {len(trials) * len(questions):,} answers were new")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine.collect(trials, questions, {"predictions": folder / "predictions.parquet"}, folder / "collecting")
        shape = LlmShape.from_config(vlm.model.config)
        rows = [
            trial.row(layouts, lambda schedule: cost_columns(schedule, shape, vlm.model.dtype.itemsize))
            for trial in trials
        ]
        pq.write_table(pa.Table.from_pandas(pd.DataFrame(rows)), folder / "trials.parquet")
        evaluate = settings.evaluate
        scores = score_tables(
            folder / "trials.parquet", questions, folder / "predictions.parquet", evaluate.resamples, evaluate.seed
        )
        table = pd.read_parquet(folder / "trials.parquet")
    tokens = int(table["image_tokens"].iloc[0])
    budget = budget_tokens(settings.report.headline_budget, settings.sweep.budget_unit, tokens)
    return as_pinned(table, scores, budget)


def as_pinned(trials: pd.DataFrame, scores: pd.DataFrame, budget: float) -> dict[str, dict[str, Any]]:
    """What was committed then: the unpruned score of every benchmark, and mean retention by label and family."""
    reference = trials.loc[trials["method"] == UNPRUNED, "trial_id"].item()
    own = scores[(scores["trial_id"] == reference) & scores["headline"] & (scores["benchmark"] != "mean")]
    by_label = headline_table(trials, scores, budget).set_index("label")
    families = [family for family in FAMILIES if family in by_label]
    return {
        "unpruned": {row.benchmark: round(float(row.score), 4) for row in own.itertuples()},
        f"retention at {budget:g} tokens": by_label[families].to_dict("index"),
    }


def differences(then: Any, now: Any, key: str = "") -> list[str]:
    """What stands in ``then`` and is not the same ``now``, by its key; what is only ``now`` was not measured then."""
    if not isinstance(then, dict):
        return [] if then == now else [f"{key}: {then} then, {now} now"]
    held = now if isinstance(now, dict) else {}
    return [line for name in then for line in differences(then[name], held.get(name), f"{key} / {name}".lstrip(" /"))]


def reason(line: str) -> str | None:
    """Why the figure that ``line`` of :func:`differences` names is another since; null where nobody knows."""
    for key, value in NOW.items():
        if f" / {key}: " in line and line.endswith(f" then, {value} now"):
            return CHANGED[key.partition(" ")[0]]
    return None


def main() -> None:
    settings = load_settings()
    examples = pd.read_parquet(EXAMPLES)
    questions = examples[examples["benchmark"].isin(settings.sweep.benchmarks)]
    lines = differences(json.loads(PINNED.read_text()), metrics_of(settings, subset_of_then(questions)))
    unexplained = [line for line in lines if reason(line) is None]
    for line in lines:
        print(f"{line} ({reason(line) or 'not explained'})")
    print(
        "the same metrics on the same questions" if not lines else f"{len(unexplained)} differences are not explained"
    )
    sys.exit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
