"""Latency and memory of methods, as the ``profile`` stage measured them, and what the papers print of theirs."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from pipelines.report.published import DIRECTORY
from pipelines.report.style import METHODS, method_rank, method_style, plain_number

UNPRUNED, STOCK = "unpruned", "stock generate"
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


def published_efficiency() -> list[dict[str, str]]:
    """The papers' own figures, as printed."""
    rows = pd.read_csv(DIRECTORY / "efficiency.csv", dtype=str).to_dict("records")
    return [row | {"method": method_style(row["method"]).name} for row in rows]
