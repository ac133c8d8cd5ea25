"""Other people's figures from ``published/``, as retention by the rule of our own: score over the unpruned score.

Only rows whose unpruned model stands in the same source can be anchored; nothing is carried over between sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

DIRECTORY = Path(__file__).parent / "published"
MODEL = "llava-1.5-7b"
MODEL_NAME = "LLaVA-1.5-7B"
IMAGE_TOKENS = 576


@dataclass(frozen=True)
class PublishedRow:
    """Mean retention over ``tasks`` benchmarks of a family; ``position`` only where the paper replaced the method's."""

    method: str
    position: str
    family: str
    share: float
    retention: float
    tasks: int


@dataclass(frozen=True)
class PublishedAblation:
    """One setting of an ablation table: mean retention of each family."""

    setting: str
    grounding: float
    vqa: float


def published_scores() -> pd.DataFrame:
    return pd.read_csv(DIRECTORY / "scores.csv", dtype={"avg_tokens": str})


def family_of(task: str) -> str:
    return "grounding" if task.startswith("refcoco") else "vqa"


def published_retention(scores: pd.DataFrame) -> tuple[list[PublishedRow], list[str]]:
    """Retention of every method on LLaVA-1.5-7B, and the methods whose source has no unpruned row."""
    scores = scores[(scores["model"] == MODEL) & ~scores["task"].str.endswith("_retention_avg")]
    vanilla = scores[scores["method"] == "vanilla"][["source", "task", "score"]]
    pruned = scores[scores["method"] != "vanilla"]
    joined = pruned.merge(vanilla, on=["source", "task"], suffixes=("", "_vanilla"))
    joined["retention"] = joined["score"] / joined["score_vanilla"]
    joined["family"] = joined["task"].map(family_of)
    rows = []
    for (method, tokens, family), group in joined.groupby(["method", "avg_tokens", "family"]):
        name, mark, _ = method.partition("+rpme")
        position = "rpme" if mark else ""
        share = int(tokens) / IMAGE_TOKENS
        rows.append(PublishedRow(name, position, family, share, group["retention"].mean(), len(group)))
    return rows, sorted(set(pruned["method"]) - set(joined["method"]))


def published_ablations(table: str, scores: pd.DataFrame) -> list[PublishedAblation]:
    """Table ``nuwa table 7`` or ``nuwa table 8``; the unpruned scores are those of the same paper and model."""
    ablations = pd.read_csv(DIRECTORY / "nuwa_ablations.csv")
    rows = ablations[ablations["source"].str.startswith(table)]
    unpruned = scores[
        (scores["model"] == MODEL) & (scores["method"] == "vanilla") & scores["source"].str.startswith("nuwa ")
    ].set_index("task")["score"]
    tasks = [column for column in rows.columns if column not in ("source", "knob", "value")]
    retention = rows[tasks] / unpruned[tasks]
    families = {
        family: retention[[task for task in tasks if family_of(task) == family]].mean(axis=1)
        for family in ("grounding", "vqa")
    }
    return [
        PublishedAblation(str(value), families["grounding"][index], families["vqa"][index])
        for index, value in rows["value"].items()
    ]
