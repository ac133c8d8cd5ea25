"""Ablations: every grid that varies more than method, preset, position and budget, as a chart and a table.

One numeric parameter makes a line, one of names a row of dots each, two a heatmap, more a row of dots a setting. The
two ablations that the Nüwa paper prints (tables 7 and 8) are drawn beside ours, as retention by the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from pipelines.report.charts import Panel, Point, forest, heatmap, line
from pipelines.report.outcomes import FAMILIES, STAGE2, Outcomes, TrialRow, varying
from pipelines.report.published import IMAGE_TOKENS, MODEL_NAME, published_ablations
from pipelines.report.style import FAMILIES as FAMILY_NAMES
from pipelines.report.style import (
    PARAMETERS,
    PUBLISHED,
    method_style,
    parameter_name,
    percent,
    plain_number,
    position_name,
    setting_text,
)
from pipelines.report.tables import Cell, retention_cell, token_columns

MOST_DOTS, LONGEST_LABEL = 36, 50  # settings, characters of one; beyond, the table alone is legible
LARGEST_SQUARED_DISTANCE = 1058  # patches² on the 24×24 grid of table 7


@dataclass(frozen=True)
class AblationRow:
    label: str
    settings: list[str]
    tokens: tuple[str, ...]
    retention: dict[str, Cell]


@dataclass(frozen=True)
class Ablation:
    """One grid. ``constant`` says what all its trials share; ``panels`` may be empty where only a table is legible."""

    grid: str
    parameters: list[str]
    constant: str
    panels: list[Panel]
    rows: list[AblationRow]
    published: str
    seeds: str  # a sentence where the seed alone differs, else nothing


def ablation(outcomes: Outcomes, grid: str, scores: pd.DataFrame) -> Ablation:
    """``scores``: the published scores, for the unpruned model of the published twin."""
    trials = outcomes.grid(grid)
    order = [*PARAMETERS, *STAGE2, "stage1_keep"]
    parameters = sorted(varying(trials), key=lambda name: order.index(name) if name in order else len(order))
    trials = sorted(trials, key=lambda trial: [_sortable(trial.setting(name)) for name in parameters])
    twin, source = _published_twin(parameters, scores)
    return Ablation(
        grid=grid,
        parameters=[parameter_name(name) for name in parameters],
        constant=_constant(trials, parameters),
        panels=[*_panels(outcomes, trials, parameters, "This run: " if twin else ""), *twin],
        rows=[_row(outcomes, trial, parameters) for trial in trials],
        published=source,
        seeds=_over_seeds(outcomes, trials) if parameters == ["seed"] else "",
    )


def _over_seeds(outcomes: Outcomes, trials: list[TrialRow]) -> str:
    """What another seed changes beside what other images would, where trials differ in nothing but the seed."""
    parts = []
    for family in FAMILIES:
        known = [kept for trial in trials if (kept := outcomes.retention(trial, family))]
        if len(known) > 1:
            values = [kept.value for kept in known]
            reach = np.mean([(kept.high - kept.low) / 2 for kept in known])
            parts.append(
                f"{FAMILY_NAMES[family]} {percent(float(np.mean(values)))} on average, {percent(min(values))} to "
                f"{percent(max(values))}, standard deviation {percent(float(np.std(values, ddof=1)))}, where an interval "
                f"over images reaches {percent(float(reach))} to either side"
            )
    return f"Over {len(trials)} seeds: {'; '.join(parts)}." if parts else ""


def _sortable(value: Any) -> tuple:
    """Numbers by size, then names; ``None`` first."""
    if value is None:
        return (0, 0.0, "")
    return (1, float(value), "") if isinstance(value, (bool, int, float)) else (2, 0.0, str(value))


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _panels(outcomes: Outcomes, trials: list[TrialRow], parameters: list[str], prefix: str) -> list[Panel]:
    families = [family for family in FAMILIES if any(outcomes.retention(trial, family) for trial in trials)]
    if len(parameters) == 2:
        return [_heatmap(outcomes, trials, parameters, family, prefix) for family in families]
    panels = []
    for family in families:
        points, color = _points(outcomes, trials, parameters, family), method_style(trials[0].method).color
        title = f"{prefix}{FAMILY_NAMES[family]}"
        if (
            len(parameters) == 1
            and parameters != ["seed"]
            and _is_numeric([trial.setting(parameters[0]) for trial in trials])
        ):
            name = parameters[0]
            panels.append(line(title, points, parameter_name(name), color, _preset_value(trials, name)))
        elif len(points) <= MOST_DOTS and max(len(point.label) for point in points) <= LONGEST_LABEL:
            panels.append(forest(title, points, color))
    return panels


def _points(outcomes: Outcomes, trials: list[TrialRow], parameters: list[str], family: str) -> list[Point]:
    points = []
    for trial in trials:
        estimate = outcomes.retention(trial, family)
        if estimate is not None:
            values = [trial.setting(name) for name in parameters]
            x = float(values[0]) if _is_numeric(values[:1]) else 0.0
            points.append(Point(x, _combination(parameters, values), estimate.value, estimate.low, estimate.high))
    return points


def _combination(parameters: list[str], values: list[Any]) -> str:
    """``regions on · pillars off · random``: switches need their name, other values speak for themselves."""
    parts = []
    for name, value in zip(parameters, values, strict=True):
        text = setting_text(name, value)
        named = isinstance(value, (bool, int, float)) and len(parameters) > 1
        parts.append(f"{parameter_name(name)} {text}" if named else text)
    return " · ".join(parts)


def _preset_value(trials: list[TrialRow], name: str) -> float | None:
    """The value that the grid's preset gives a hyper-parameter, where that is one number."""
    values = {replace(trial, params={}).setting(name) for trial in trials} if name not in STAGE2 else set()
    return float(values.pop()) if len(values) == 1 and _is_numeric(list(values)) else None


def _heatmap(outcomes: Outcomes, trials: list[TrialRow], parameters: list[str], family: str, prefix: str) -> Panel:
    axes = [sorted({trial.setting(name) for trial in trials}, key=_sortable) for name in parameters]
    values = np.full([len(axis) for axis in axes], np.nan)
    for trial in trials:
        estimate = outcomes.retention(trial, family)
        if estimate is not None:
            place = tuple(axis.index(trial.setting(name)) for axis, name in zip(axes, parameters, strict=True))
            values[place] = estimate.value
    title = f"{prefix}{FAMILY_NAMES[family]}"
    labels = [[setting_text(name, value) for value in axis] for axis, name in zip(axes, parameters, strict=True)]
    names = (parameter_name(parameters[0]), parameter_name(parameters[1]))
    if max(map(len, labels[0])) >= max(map(len, labels[1])):  # long labels are legible as rows only
        return heatmap(title, labels[0], labels[1], values, names)
    return heatmap(title, labels[1], labels[0], values.T, names[::-1])


def _row(outcomes: Outcomes, trial: TrialRow, parameters: list[str]) -> AblationRow:
    return AblationRow(
        label=trial.label,
        settings=[setting_text(name, trial.setting(name)) for name in parameters],
        tokens=token_columns(trial),
        retention={family: retention_cell(outcomes.retention(trial, family)) for family in FAMILIES},
    )


def _constant(trials: list[TrialRow], parameters: list[str]) -> str:
    """``Nüwa, preset released, original (PESP) ids, 16 average tokens, no stage 2``: what the grid holds fixed."""
    first, parts = trials[0], []
    if "method" not in parameters:
        parts.append(method_style(first.method).name)
    if "preset" not in parameters:
        parts.append(f"preset {first.preset}")
    if "position" not in parameters:
        parts.append(f"{position_name(first.position)} ids")
    if "budget" not in parameters and first.budget is not None:
        parts.append(f"{plain_number(first.budget)} average tokens{_realised(trials)}")
    if "stage2_layer" not in parameters and "method" not in parameters:
        parts.append("no stage 2" if first.stage2_layer is None else f"stage 2 at layer {first.stage2_layer}")
        if first.stage2_layer is not None and "stage2_scorer" not in parameters:
            parts[-1] += f" by {setting_text('stage2_scorer', first.stage2_scorer)}"
    return ", ".join(parts)


def _realised(trials: list[TrialRow]) -> str:
    averages = [trial.average_tokens for trial in trials]
    if min(averages) == max(averages):
        return ""
    return f" (realised {plain_number(min(averages))} to {plain_number(max(averages))})"


def _published_twin(parameters: list[str], scores: pd.DataFrame) -> tuple[list[Panel], str]:
    """Panels of the paper's own ablation of these parameters, and where they are from."""
    if parameters == ["distance_threshold"]:
        source = f"Nüwa, table 7: {MODEL_NAME}, 64 of {IMAGE_TOKENS} average tokens"
        rows = published_ablations("nuwa table 7", scores)
        panels = []

        for family in FAMILIES:
            points = [
                Point(int(row.setting) / LARGEST_SQUARED_DISTANCE, row.setting, getattr(row, family)) for row in rows
            ]
            label = f"squared threshold / {LARGEST_SQUARED_DISTANCE} (24×24 patches)"
            panels.append(line(f"Published: {FAMILY_NAMES[family]}", points, label, PUBLISHED))
    elif {"separation", "pillars"} <= set(parameters):
        source = f"Nüwa, table 8: {MODEL_NAME}, 128 of {IMAGE_TOKENS} average tokens"
        rows = published_ablations("nuwa table 8", scores)
        panels = [
            forest(
                f"Published: {FAMILY_NAMES[family]}",
                [Point(0.0, _component_label(row.setting), getattr(row, family)) for row in rows],
                PUBLISHED,
            )
            for family in FAMILIES
        ]
    else:
        return [], ""
    return [Panel(p.title, p.draw, p.width, p.height, published=True) for p in panels], source


def _component_label(setting: str) -> str:
    """``region=1 pillar=0 random_s2=1`` → ``regions on · pillars off · random``."""
    on = {name: value == "1" for name, value in (part.split("=") for part in setting.split())}
    scorer = "random" if on["random_s2"] else "text-guided"
    return f"regions {'on' if on['region'] else 'off'} · pillars {'on' if on['pillar'] else 'off'} · {scorer}"
