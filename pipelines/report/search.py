"""What ``make search`` found: the race over the accuracy-cost plane, and the best hyper-parameters beside the preset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nuwa import UNPRUNED
from pipelines.report.charts import Panel, RacePoint, race_plane
from pipelines.report.inputs import SearchRecord
from pipelines.report.outcomes import FAMILIES, Estimate, Outcomes
from pipelines.report.style import FAMILIES as FAMILY_NAMES
from pipelines.report.style import method_style, parameter_name, percent, plain_number, position_name, setting_text
from pipelines.report.tables import DASH, Cell, retention_cell
from pipelines.scores.front import pareto_front

COSTS = {"average_tokens": "average tokens", "flops": "FLOP of a prefill"}
SHOWN = 5  # best points of the swarm search
SAME = 1e-9  # retentions of one answer set differ by less


@dataclass(frozen=True)
class RaceRow:
    """``beaten_by``: the labels of who stopped it, a family each."""

    label: str
    rung: str
    answers: str
    retention: dict[str, Cell]
    front: str
    beaten_by: str


@dataclass(frozen=True)
class PointRow:
    """A point of the space: its settings as text, retention on the search's images and on ``unseen`` ones."""

    name: str
    settings: list[str]
    retention: dict[str, Cell]
    unseen: dict[str, Cell]


@dataclass(frozen=True)
class SwarmTable:
    """``sentence``: what was searched; ``settings``: names of the columns; ``unseen``: images beside the search's."""

    sentence: str
    settings: list[str]
    rows: list[PointRow]
    unseen: int


@dataclass(frozen=True)
class SearchSection:
    sentence: str
    rungs: list[tuple[str, ...]]  # images, trials, stopped after it
    risk: str  # per cent
    cost: str
    panels: list[Panel]
    rows: list[RaceRow]
    swarm: SwarmTable | None


def search_section(record: SearchRecord | None, outcomes: Outcomes) -> SearchSection | None:
    """The section's finished text and panels; ``None`` without a record."""
    if record is None:
        return None
    trials, summary = record.trials, record.summary
    families = [family for family in FAMILIES if family in trials.columns]
    cost = COSTS[summary["cost"]]
    return SearchSection(
        sentence=_sentence(record, outcomes, families),
        rungs=[tuple(f"{rung[key]:,}" for key in ("images", "trials", "stopped")) for rung in summary["rungs"]],
        risk=f"{100 * (1 - summary['confidence']):.3g}",
        cost=cost,
        panels=[_plane(trials, family, len(summary["rungs"]), cost) for family in families],
        rows=_race_rows(trials, families),
        swarm=None if record.swarm is None else _swarm(record.swarm, summary["swarm"], families),
    )


def _sentence(record: SearchRecord, outcomes: Outcomes, families: list[str]) -> str:
    answers, whole = record.summary["answers"], record.summary["full_answers"]
    start = f"The search asked {answers:,} of {whole:,} answers ({100 * answers / whole:.1f} %)"
    missed = missed_front(record, outcomes, families)
    if missed is None:
        return f"{start}; it is of other trials or answers than this run, so the fronts are not compared."
    if not missed:
        return f"{start} and found the same front as the full grid."
    return f"{start} and missed {len(missed)} of the full grid's front: {', '.join(missed)}."


def missed_front(record: SearchRecord, outcomes: Outcomes, families: list[str]) -> list[str] | None:
    """Labels of trials on some family's front of this run that stopped early; ``None`` when the search was of another
    run: other trials, or finished trials with other retentions."""
    raced = record.trials
    known = {trial.trial_id: trial for trial in (outcomes.unpruned, *outcomes.trials)}
    if set(known) != set(raced["trial_id"]):
        return None
    finished = raced["rung"] == len(record.summary["rungs"])
    missed = pd.Series(False, index=raced.index)
    for family in families:
        estimates = [outcomes.retention(known[trial_id], family) for trial_id in raced["trial_id"]]
        values = np.array([np.nan if estimate is None else estimate.value for estimate in estimates])
        if not np.allclose(values[finished], raced.loc[finished, family], rtol=0, atol=SAME, equal_nan=True):
            return None
        missed |= pareto_front(values, raced["cost"].to_numpy()) & ~finished
    return raced.loc[missed, "label"].tolist()


def _plane(trials: pd.DataFrame, family: str, rungs: int, cost: str) -> Panel:
    points = [
        RacePoint(
            cost=row.cost,
            value=getattr(row, family),
            rung=row.rung,
            name=_name(row.method, row.position, row.cost),
            front=bool(getattr(row, f"{family}_front")),
        )
        for row in trials.itertuples()
    ]
    return race_plane(FAMILY_NAMES[family], points, rungs, cost)


def _name(method: str, position: str, cost: float) -> str:
    name = method_style(method).name
    return name if method == UNPRUNED else f"{name} {position.upper()} {plain_number(cost)}"


def _race_rows(trials: pd.DataFrame, families: list[str]) -> list[RaceRow]:
    """By rung, the furthest first, then in the order of the trials."""
    labels = dict(zip(trials["trial_id"], trials["label"], strict=True))
    rows = []
    for row in trials.sort_values("rung", ascending=False, kind="stable").to_dict("records"):
        rivals = dict.fromkeys(
            labels[row[key]] for family in families if not pd.isna(row[key := f"{family}_beaten_by"])
        )
        rows.append(
            RaceRow(
                label=row["label"],
                rung=str(row["rung"]),
                answers=f"{row['answers']:,}",
                retention={family: _cell(row, family) for family in families},
                front=", ".join(FAMILY_NAMES[family] for family in families if row[f"{family}_front"]),
                beaten_by="; ".join(rivals),
            )
        )
    return rows


def _cell(row: Mapping[str, Any], name: str) -> Cell:
    value = row.get(name)
    if value is None or pd.isna(value):
        return retention_cell(None)
    return retention_cell(Estimate(value, row[f"{name}_low"], row[f"{name}_high"], 0))


def _swarm(table: pd.DataFrame, summary: Mapping[str, Any], families: list[str]) -> SwarmTable:
    finished = table[table["state"] == "finished"].drop_duplicates("trial_id")
    best = finished.sort_values(["objective", "number"], ascending=[False, True]).head(SHOWN)
    shown = [*table[table["state"] == "preset"].to_dict("records"), *best.to_dict("records")]
    points = [json.loads(row["point"]) for row in shown]
    names = list(dict.fromkeys(name for point in points for name in point))
    rows = [
        PointRow(
            name="Preset" if row["state"] == "preset" else f"Point {int(row['number'])}",
            settings=[_setting(name, point[name]) if name in point else DASH for name in names],
            retention={family: _cell(row, family) for family in families},
            unseen={family: _cell(row, f"unseen_{family}") for family in families},
        )
        for row, point in zip(shown, points, strict=True)
    ]

    objective = summary["objective"]
    goal = "mean retention over all families" if objective == "mean" else f"{FAMILY_NAMES[objective]} retention"
    sentence = (
        f"{summary['points']} points of {method_style(summary['method']).name}’s space (preset {summary['preset']}, "
        f"{position_name(summary['position'])} ids, {plain_number(summary['budget'])} average tokens), for the highest {goal}: "
        f"{(table['state'] == 'stopped').sum()} stopped early, so {summary['answers']:,} of {summary['full_answers']:,} "
        f"answers ({percent(summary['answers'] / summary['full_answers'])} %) were asked."
    )
    return SwarmTable(
        sentence,
        [parameter_name(name.removeprefix("parameters.")).partition(" (")[0] for name in names],
        rows,
        summary["unseen_images"],
    )


def _setting(name: str, value: Any) -> str:
    return "own" if value is None else setting_text(name.removeprefix("parameters."), value)
