"""Other people's figures from ``published/``, as retention by the rule of our own: score over the unpruned score.

Only rows whose unpruned model stands in the same source can be anchored; nothing is carried over between sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

DIRECTORY = Path(__file__).parent / "published"


@dataclass(frozen=True)
class PublishedModel:
    """A model of the papers. ``named``: parts of a checkpoint's name; ``tables``: where its scores are printed.

    ``tokens``: visual tokens that budgets were counted of; null where they are shares of each image's own.
    """

    key: str
    name: str
    named: tuple[str, ...]
    tables: str
    budgets: str
    tokens: int | None


LLAVA = PublishedModel(
    "llava-1.5-7b", "LLaVA-1.5-7B", ("llava-1.5",), "tables 2, 3, 5", "64, 128 and 192 of 576 tokens", 576
)
MODELS = (
    LLAVA,
    PublishedModel(
        "llava-next-7b",
        "LLaVA-NeXT-7B",
        ("llava-v1.6", "llava-next"),
        "tables 11, 12",
        "160, 320 and 640 of 2880 tokens",
        2880,
    ),
    PublishedModel(
        "qwen2.5-vl-7b",
        "Qwen2.5-VL-7B",
        ("qwen2.5-vl",),
        "tables 13, 14",
        "25, 50 and 75 % of each image's tokens",
        None,
    ),
)
MODEL_NAME, IMAGE_TOKENS = LLAVA.name, LLAVA.tokens  # of the ablation tables


def published_model(path: str) -> tuple[PublishedModel, bool]:
    """The model whose figures belong beside a run of the checkpoint ``path``, and whether it is that very model;
    LLaVA-1.5 beside what no paper has."""
    name = path.lower()
    known = next((model for model in MODELS if any(part in name for part in model.named)), None)
    return known or LLAVA, known is not None


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


def published_retention(scores: pd.DataFrame, model: PublishedModel = LLAVA) -> tuple[list[PublishedRow], list[str]]:
    """Retention of every method on ``model``, and the methods whose source has no unpruned row."""
    scores = scores[(scores["model"] == model.key) & ~scores["task"].str.endswith("_retention_avg")]
    vanilla = scores[scores["method"] == "vanilla"][["source", "task", "score"]]
    pruned = scores[scores["method"] != "vanilla"]
    joined = pruned.merge(vanilla, on=["source", "task"], suffixes=("", "_vanilla"))
    joined["retention"] = joined["score"] / joined["score_vanilla"]
    joined["family"] = joined["task"].map(family_of)
    rows = []
    for (method, tokens, family), group in joined.groupby(["method", "avg_tokens", "family"]):
        name, mark, _ = method.partition("+rpme")
        position = "rpme" if mark else ""
        share = int(tokens) / model.tokens if model.tokens else int(tokens.removesuffix("%")) / 100
        rows.append(PublishedRow(name, position, family, share, group["retention"].mean(), len(group)))
    return rows, sorted(set(pruned["method"]) - set(joined["method"]))


def published_ablations(table: str, scores: pd.DataFrame) -> list[PublishedAblation]:
    """Table ``nuwa table 7`` or ``nuwa table 8``; the unpruned scores are those of the same paper and model."""
    ablations = pd.read_csv(DIRECTORY / "nuwa_ablations.csv")
    rows = ablations[ablations["source"].str.startswith(table)]
    unpruned = scores[
        (scores["model"] == LLAVA.key) & (scores["method"] == "vanilla") & scores["source"].str.startswith("nuwa ")
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
