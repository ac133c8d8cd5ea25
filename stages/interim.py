"""``make report INTERIM=1``: scores on the questions that all trials have answered so far, while the sweep runs.

It reads the result store, whoever writes there, and takes no part in the sweep. Tables and page lie in ``cache/interim``,
the page and every trial's figures in an MLflow run of their own, whose name says INTERIM; no table of ``data/`` and
nothing that DVC tracks is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pandas as pd

from nuwa.cost import LlmShape, cost_columns
from nuwa.errors import UserError
from pipelines.data.datasets import choose_questions
from pipelines.features.identity import ModelIdentity
from pipelines.features.layouts import image_layouts
from pipelines.features.loading import Loading
from pipelines.scores.submissions import check_scored
from pipelines.settings import Settings
from pipelines.sweep.askable import askable
from pipelines.sweep.collection import collect
from pipelines.sweep.engine import blocks_of, with_weights
from pipelines.sweep.finishing import answered_by_all
from pipelines.sweep.identity import answer_context, with_code
from pipelines.sweep.provenance import told
from pipelines.sweep.results import ResultStore, unit_name
from pipelines.sweep.trials import Layouts, expand
from pipelines.sweep.units import read_examples
from pipelines.tracking.revision import git_and_dvc_tags
from pipelines.tracking.tracker import Tracker
from stages.entry import EXAMPLES, IMAGES, INTERIM, PROFILE, places, run_stage
from stages.evaluate import scored, write_table
from stages.report import page
from stages.sweep import write_trials


class NothingYet(UserError, RuntimeError):
    """No question has an answer of every trial."""


def interim(settings: Settings) -> None:
    plan, model = settings.sweep, settings.model
    check_scored(plan.benchmarks)
    loading = Loading.of(model, settings.cluster)
    questions = choose_questions(pd.read_parquet(EXAMPLES), plan.benchmarks, plan.images, plan.subset_seed).examples
    vlm = loading.here(model.path)
    questions, _ = askable(vlm, questions, allowed=plan.quarantine == "allow")
    of_image = image_layouts(vlm, questions)
    layouts = Layouts.of(of_image.values(), vlm.dynamic)
    known = ModelIdentity.of(model.path, loading, vlm)
    trials = with_weights(expand(plan, layouts, vlm.layers), known.fingerprint, model.path)
    trials = with_code(trials, vlm, settings.cluster.device)

    # What is there, by the digests that the sweep gives it.
    context = answer_context(known, vlm, settings.features)
    examples = read_examples(questions, context.digest, of_image, blocks_of(settings))
    store = ResultStore(places(settings).results)
    stored = store.done()
    names, count = answered_by_all(trials, examples, questions, stored, plan.reuse)
    answers = f"{count:,} of {len(trials) * len(questions):,} answers are made"
    if not names:
        raise NothingYet(f"no question has an answer of all {len(trials)} trials yet: {answers}; ask again later")
    line = (
        f"INTERIM: {len(names):,} of {len(questions):,} questions, those that all {len(trials):,} trials have answered so "
        f"far; {answers}. The rest will change these figures."
    )
    print(line)

    data = INTERIM / "data"
    data.mkdir(parents=True, exist_ok=True)
    _link(data)
    targets = {part: data / f"{part}.parquet" for part in ("predictions", "kept")}
    some = [example for example in examples if example.example_id in names]
    ids = [trial.answer_id for trial in trials]
    origins = collect(store, ids, some, targets, INTERIM / "collecting", plan.reuse, stored)
    costs = partial(cost_columns, llm=LlmShape.from_config(vlm.model.config), bytes_per_number=vlm.model.dtype.itemsize)
    write_trials([trial.row(layouts, costs) for trial in trials], data / "trials.parquet")

    rows = pd.read_parquet(data / "trials.parquet")
    answered = questions[questions["example_id"].isin(names)].reset_index(drop=True)
    tables, _ = scored(settings, rows, answered, targets["predictions"], INTERIM / "scoring")
    for name, table in (("scores", tables.scores), ("comparisons", tables.comparisons), ("groups", tables.groups)):
        write_table(table, data / f"{name}.parquet")

    facts = {"name": line, "fingerprints": {}, "provenance": told(origins.provenance)}
    page(settings, facts, data, INTERIM / "report", line)
    name = unit_name(sorted(ids), [example.digest for example in examples])
    _show(settings, name, line, len(names), figures(rows, tables.scores))
    print(f"{INTERIM / 'report' / 'index.html'} is the page")


def _link(data: Path) -> None:
    """The tables that are no different in the end."""
    for path in (EXAMPLES, IMAGES, PROFILE):
        (data / path.name).unlink(missing_ok=True)
        if path.exists():
            (data / path.name).symlink_to(path.resolve())


def figures(trials: pd.DataFrame, scores: pd.DataFrame) -> dict[str, float]:
    """Headline scores of every trial, ``<benchmark>/<metric>/<label>``, and mean retentions, ``<family>_retention/<label>``."""
    labels = trials.set_index("trial_id")["label"]
    known = scores[scores["headline"] & scores["score"].notna()]
    of = known["benchmark"].where(known["benchmark"] != "mean", known["family"] + "_retention")
    of = of.where(known["benchmark"] == "mean", of + "/" + known["metric"])
    return dict(zip(of + "/" + known["trial_id"].map(labels), known["score"].astype(float), strict=True))


def _show(settings: Settings, name: str, line: str, count: int, metrics: Mapping[str, float]) -> None:
    """In MLflow, one run for all looks at the sweep ``name``: the number of questions is the step, so that curves show how
    far figures still move."""
    tracking = settings.tracking
    with Tracker.open(tracking.resolved_uri, tracking.experiment, sweep_id=f"interim-{name}") as tracker:
        tracker.parent(line.partition(",")[0], {}, git_and_dvc_tags(Path()) | {"interim": line})
        tracker.progress(count, metrics)
        tracker.artifacts(INTERIM / "report", "report")


if __name__ == "__main__":
    run_stage(interim)
