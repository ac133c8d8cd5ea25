"""``report``: one self-contained page and its Markdown, also as artifacts of the sweep's MLflow run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nuwa.budget import budget_tokens
from pipelines.report.page import ReportInputs, build_report
from pipelines.report.places import places_of_model
from pipelines.settings import Settings
from pipelines.sweep.provenance import came_from
from stages.entry import DATA, REPORT, SWEEP, run_stage
from stages.track import track

TESTBED = (
    "Measured on the testbed: drawn scenes of digits, 96 by 96 pixels, and a small model trained on them. Its benchmarks have "
    "the form and scores of the published ones whose names they bear, not their images."
)


def report(settings: Settings) -> None:
    page(settings, json.loads(SWEEP.read_text()), DATA, REPORT)
    track(settings)


def page(settings: Settings, facts: Mapping[str, Any], data: Path, target: Path, interim: str = "") -> None:
    """Write the page of the tables in the folder ``data`` into ``target``.

    ``facts``: of the sweep, as in ``sweep.json``; ``interim``: of what the tables are, where that is not all of it.
    """
    provenance = facts["fingerprints"] | {"model path": settings.model.path}
    provenance |= {"sweep": facts["name"]}
    if origin := came_from(facts.get("provenance", [])):
        provenance["answers"] = origin
    if missing := facts.get("missing"):
        provenance["missing answers"] = missing
    if out := facts.get("left_out"):
        provenance["questions left out"] = f"{len(out):,}, first {next(iter(sorted(out)))}: {out[min(out)]}"
    about = TESTBED if settings.prepare.tables is None else ""
    places, margin = partial(places_of_model, settings.model.path, settings.model.images), settings.evaluate.margin
    inputs = ReportInputs.load(data, provenance, places, about, margin, interim)
    tokens = int(inputs.trials["image_tokens"].iloc[0])
    headline = budget_tokens(settings.report.headline_budget, settings.sweep.budget_unit, tokens)
    build_report(inputs, target, headline)


if __name__ == "__main__":
    run_stage(report)
