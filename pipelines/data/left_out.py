"""Questions that a sweep left out of all trials: its model cannot be asked them, or some trial has no answer to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd


def left_out(sweep: Path) -> dict[str, str]:
    """Example id → why the sweep that wrote ``sweep`` (``sweep.json``) left it out."""
    return dict(json.loads(sweep.read_text()).get("left_out", {}))


def without(examples: pd.DataFrame, reasons: Mapping[str, str]) -> pd.DataFrame:
    """``examples`` but for those that ``reasons`` names."""
    return examples[~examples["example_id"].isin(list(reasons))].reset_index(drop=True) if reasons else examples
