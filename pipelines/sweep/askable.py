"""Questions that a model cannot be asked, told apart before any work: each is one example, not a fault of the run."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from nuwa.errors import UserError
from nuwa.vlm import Adapter, PromptError
from pipelines.data.left_out import without


class Unaskable(UserError, ValueError):
    """Questions that the model cannot be asked, where leaving them out was not allowed."""


def unaskable(vlm: Adapter, examples: pd.DataFrame) -> dict[str, str]:
    """Example id → why the model cannot be asked it; ``vlm`` needs no weights.

    Only a text that holds the model's image placeholder can be refused, so only such texts are tried.
    """
    placeholder = vlm.processor.tokenizer.convert_ids_to_tokens(vlm.image_token)
    suspects = examples[examples["prompt"].str.contains(placeholder, regex=False)]
    reasons: dict[str, str] = {}
    for row in suspects.itertuples():
        try:
            vlm.encode_prompt(str(row.prompt))
        except PromptError as error:
            reasons[str(row.example_id)] = str(error)
            reasons |= scored_together(examples, row, "cannot be asked")
    return reasons


def scored_together(examples: pd.DataFrame, one: Any, why: str) -> dict[str, str]:
    """The other questions of a group (MME's pairs, MMBench's copies), which have no score without this one, that is left
    out: example id → the reason, with ``why``."""
    group = json.loads(one.truth).get("group")
    if group is None:
        return {}
    marked = json.dumps(group)
    fellows = examples[(examples["benchmark"] == one.benchmark) & examples["truth"].str.contains(marked, regex=False)]
    return {
        str(row.example_id): f"it is scored together with {one.example_id}, which {why}"
        for row in fellows.itertuples()
        if json.loads(row.truth).get("group") == group and row.example_id != one.example_id
    }


def askable(vlm: Adapter, examples: pd.DataFrame, *, allowed: bool) -> tuple[pd.DataFrame, dict[str, str]]:
    """``examples`` without those that cannot be asked, and these with their reasons.

    Raises :class:`Unaskable` where there are some and leaving them out is not ``allowed``.
    """
    reasons = unaskable(vlm, examples)
    if not reasons:
        return examples, reasons
    if not allowed:
        name, reason = next(iter(reasons.items()))
        raise Unaskable(
            f"{len(reasons)} of {len(examples)} questions cannot be asked, first {name}: {reason} in its table, or set "
            "sweep.quarantine: allow to leave such questions out of all trials"
        )
    return without(examples, reasons), reasons
