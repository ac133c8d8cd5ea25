"""Latency and memory of methods, as the ``profile`` stage measured them, beside what they keep, and what the papers print
of theirs."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from pipelines.report.charts import Paid, Panel, paid_curves
from pipelines.report.outcomes import FAMILIES, Outcomes, TrialRow
from pipelines.report.published import DIRECTORY
from pipelines.report.style import FAMILIES as FAMILY_NAMES
from pipelines.report.style import METHODS, method_rank, method_style, plain_number
from pipelines.report.tables import DASH, Cell, retention_cell

UNPRUNED, STOCK = "unpruned", "stock generate"
SAME_TOKENS = 1  # average tokens that a measurement and a trial may differ by
PARTS = ("preprocess_ms", "encode_ms", "selection_ms", "prefill_ms", "decode_ms", "total_ms")


@dataclass(frozen=True)
class EfficiencyRow:
    """``times``: milliseconds of preprocessing, encoder, selection, prefill, decoding and all together, for the whole batch."""

    name: str
    tokens: str
    times: tuple[str, ...]
    prefill: str  # times faster than the unpruned run of the same engine; a dash where that did not fit into memory
    total: str
    cache: str  # key-value cache, MB
    memory: str  # peak, MB


@dataclass(frozen=True)
class EfficiencyTable:
    """One model, batch and attention kernel on one machine."""

    title: str
    rows: list[EfficiencyRow]


def efficiency_tables(profile: pd.DataFrame | None) -> list[EfficiencyTable]:
    """One table for every setting that was measured, methods in the order of the page; none without a profile."""
    if profile is None:
        return []
    keys = ["model", "device", "dtype", "attention", "batch", "output_tokens"]
    return [_table(dict(zip(keys, values, strict=True)), rows) for values, rows in profile.groupby(keys, sort=False)]


def _table(setting: dict, rows: pd.DataFrame) -> EfficiencyTable:
    title = (
        f"{setting['model']}, {setting['device']}, {setting['dtype']}, {setting['attention']}, "
        f"batch {setting['batch']}, {setting['output_tokens']} tokens of answer"
    )
    reference = next(iter(rows[rows["method"] == UNPRUNED].to_dict("records")), None)
    ordered = sorted(
        rows.to_dict("records"),
        key=lambda row: (row["method"] != STOCK, method_rank(row["method"]), row["average_tokens"]),
    )
    return EfficiencyTable(title, [_row(row, reference) for row in ordered])


def _row(row: dict, reference: dict | None) -> EfficiencyRow:
    def faster(part: str) -> str:
        return f"{reference[part] / row[part]:.2f}×" if reference else "–"

    return EfficiencyRow(
        name=method_style(row["method"]).name if row["method"] in METHODS else row["method"].capitalize(),
        tokens=plain_number(row["average_tokens"]),
        times=tuple(f"{row[part]:.1f}" for part in PARTS),
        prefill=faster("prefill_ms"),
        total=faster("total_ms"),
        cache=f"{row['kv_bytes'] / 1e6:.1f}",
        memory=f"{row['peak_memory_bytes'] / 1e6:.1f}",
    )


@dataclass(frozen=True)
class PaidRow:
    """A trial beside its measurement. ``tokens``: average ones; times are of an image, in ms."""

    name: str
    color: str
    tokens: str
    gflop: str
    retention: dict[str, Cell]
    prefill: str
    total: str
    faster: str
    cache: str  # MB an image
    memory: str
    pruned: bool


@dataclass(frozen=True)
class PaidTable:
    """One setting that was measured. ``title``: device, dtype, kernel, images and questions at once."""

    title: str
    rows: list[PaidRow]


def paid_tables(
    outcomes: Outcomes, profile: pd.DataFrame | None, model: str, named: list[TrialRow]
) -> tuple[list[PaidTable], list[Panel]]:
    """What this run's trials keep beside what their methods took on the same model, a table a setting, the one of most
    images first, with its charts; nothing where this model was not measured.

    A trial is of a measurement where method and average tokens agree; shown are those with the position ids of their
    authors, and of ``named`` the series.
    """
    if profile is None or not (profile["model"] == model).any():
        return [], []

    tables: list[PaidTable] = []
    panels: list[Panel] = []
    settings = profile[profile["model"] == model].groupby(["batch", "device", "dtype", "attention", "output_tokens"])
    for values, rows in sorted(settings, key=lambda setting: (-setting[0][0], setting[0][1:])):
        ordered = sorted(rows.to_dict("records"), key=lambda row: (method_rank(row["method"]), row["average_tokens"]))
        found = [(trial, row) for row in ordered for trial in _measured(outcomes, row, named)]
        if len(found) < 2:
            continue

        batch, device, dtype, attention, output = values
        images = "1 image" if batch == 1 else f"{batch} images"
        title = f"{device}, {dtype}, {attention}: {images} at once, 1 question an image, {output} tokens of answer"
        reference = next((row for trial, row in found if not trial.pruned), None)
        tables.append(PaidTable(title, [_paid_row(outcomes, trial, row, reference) for trial, row in found]))
        panels = panels or _paid_panels(outcomes, found, batch)  # one set of charts: the first setting's

    return tables, panels


def _measured(outcomes: Outcomes, row: dict, named: list[TrialRow]) -> list[TrialRow]:
    """The trials that a measurement is of: time and memory do not depend on position ids."""
    if row["method"] == UNPRUNED:
        return [outcomes.unpruned]
    told = {(outcomes.name(trial), trial.position) for trial in named}
    measured = next(
        (trial.preset for trial in outcomes.main if trial.method == row["method"]), ""
    )  # the first is its own
    alike = [
        trial
        for trial in outcomes.main
        if (trial.method, trial.preset) == (row["method"], measured)
        and abs(trial.average_tokens - row["average_tokens"]) < SAME_TOKENS
        and (trial.own or (outcomes.name(trial), trial.position) in told)
    ]
    by_position: dict[str, TrialRow] = {}
    for trial in sorted(alike, key=lambda trial: len(trial.params)):  # the preset as it is was measured
        by_position.setdefault(trial.position, trial)
    return list(by_position.values())


def _paid_name(outcomes: Outcomes, trial: TrialRow) -> str:
    ids = "" if trial.own or not trial.pruned else f", {trial.position.upper()} ids"
    return f"{outcomes.name(trial)}{ids}"


def _paid_row(outcomes: Outcomes, trial: TrialRow, row: dict, reference: dict | None) -> PaidRow:
    retention = {family: outcomes.retention(trial, family) for family in FAMILIES}
    return PaidRow(
        name=_paid_name(outcomes, trial),
        color=method_style(trial.method).color,
        tokens=plain_number(round(row["average_tokens"], 1)),
        gflop=f"{trial.flops / 1e9:.3g}",
        retention={
            family: retention_cell(one) if trial.pruned or one is None else Cell("100")
            for family, one in retention.items()
        },
        prefill=f"{row['prefill_ms'] / row['batch']:.2f}",
        total=f"{row['total_ms'] / row['batch']:.1f}",
        faster=f"{reference['total_ms'] / row['total_ms']:.2f}×" if reference else DASH,
        cache=f"{row['kv_bytes'] / row['batch'] / 1e6:.2f}",
        memory=f"{row['peak_memory_bytes'] / row['batch'] / 1e6:.2f}",
        pruned=trial.pruned,
    )


def _paid_panels(outcomes: Outcomes, found: list[tuple[TrialRow, dict]], batch: int) -> list[Panel]:
    panels = []
    for family in FAMILIES:
        points = [
            Paid(_paid_name(outcomes, trial), trial.method, row["total_ms"] / batch, estimate)
            for trial, row in found
            if (estimate := outcomes.retention(trial, family)) is not None
        ]
        if points:
            panels.append(paid_curves(f"{FAMILY_NAMES[family]} over measured time", points))
    return panels


def published_efficiency() -> list[dict[str, str]]:
    """The papers' own figures, as printed."""
    rows = pd.read_csv(DIRECTORY / "efficiency.csv", dtype=str).to_dict("records")
    return [row | {"method": method_style(row["method"]).name} for row in rows]
