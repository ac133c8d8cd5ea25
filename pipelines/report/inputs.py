"""What the report reads: eight Parquet files and a table of timings, checked before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from nuwa.errors import UserError
from pipelines.axes import COLUMNS as TRIAL_COLUMNS
from pipelines.data.datasets import read_notes
from pipelines.report.places import Size, TokenPlaces
from pipelines.scores.comparisons import COLUMNS as COMPARISON_COLUMNS
from pipelines.scores.groups import COLUMNS as GROUP_COLUMNS
from pipelines.scores.seeds import OF_PAIRS

REMEDY = "run `dvc repro evaluate` to make it"
COLUMNS: dict[str, tuple[str, ...]] = {
    "trials": tuple(TRIAL_COLUMNS),
    "scores": (
        "trial_id", "benchmark", "family", "metric", "score", "low", "high", "n", "headline",
        "retention", "retention_low", "retention_high",
    ),
    "comparisons": (*COMPARISON_COLUMNS, *OF_PAIRS),
    "groups": tuple(GROUP_COLUMNS),
    "examples": ("example_id", "benchmark", "family", "image", "question", "truth", "width", "height"),
    "predictions": ("trial_id", "example_id", "prediction", "kept_final"),
    "kept": ("trial_id", "image", "indices", "pillar"),
    "images": ("image", "bytes"),
}  # fmt: skip
MAY_BE_EMPTY = ("comparisons", "groups")  # a run of one trial has no pair; questions that only a judge scores no group
PROFILE_COLUMNS = (
    "model", "device", "dtype", "attention", "batch", "output_tokens", "method", "average_tokens",
    "preprocess_ms", "encode_ms", "selection_ms", "prefill_ms", "decode_ms", "total_ms", "kv_bytes",
    "peak_memory_bytes",
)  # fmt: skip

SEARCH_REMEDY = "run `make search` to make it"
RACE_COLUMNS = ("trial_id", "label", "method", "position", "cost", "rung", "images", "answers")
SWARM_COLUMNS = ("number", "state", "trial_id", "point", "objective", "rung", "images")
SUMMARY_KEYS = ("confidence", "cost", "rungs", "answers", "full_answers")


class UnusableRecord(UserError, ValueError):
    """A file of the run's record is damaged, or of another run; the line names the stage that makes it again."""


@dataclass(frozen=True)
class SearchRecord:
    """The files of ``data/search``; ``swarm`` is ``None`` where only a race was run."""

    trials: pd.DataFrame
    swarm: pd.DataFrame | None
    summary: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> SearchRecord | None:
        """Read the record, if there is one. Raises ``ValueError`` where a part of it is missing."""
        if not (folder / "search.json").is_file():
            return None
        summary = json.loads((folder / "search.json").read_text())
        missing = [key for key in SUMMARY_KEYS if key not in summary]
        if missing:
            raise UnusableRecord(f"{folder / 'search.json'} lacks {', '.join(missing)}; {SEARCH_REMEDY}")
        trials = _table(folder / "trials.csv", RACE_COLUMNS)
        swarm = _table(folder / "swarm.csv", SWARM_COLUMNS) if "swarm" in summary else None
        return cls(trials, swarm, summary)


def _table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UnusableRecord(f"{path} lacks {', '.join(missing)}; {SEARCH_REMEDY}")
    return table


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """The record of one run.

    ``trials``, ``scores``, ``comparisons``, ``groups`` and ``examples`` are small and held as tables. ``predictions``, ``kept`` and ``images`` grow
    with trials × examples; they stay Arrow datasets, of which the gallery reads the few rows it shows.
    ``profile``, ``search``: what the stages of these names left, where there is any.
    ``places``: where the tokens of an image of that width and height lie, for models whose images have layouts of their
    own; without it no kept tokens of such a model are drawn.
    ``provenance`` is printed as it is (fingerprints, versions); its key ``model path`` names the model in the text.
    """

    trials: pd.DataFrame
    scores: pd.DataFrame
    comparisons: pd.DataFrame
    groups: pd.DataFrame
    examples: pd.DataFrame
    predictions: ds.Dataset
    kept: ds.Dataset
    images: ds.Dataset
    provenance: Mapping[str, str] = field(default_factory=dict)
    profile: pd.DataFrame | None = None
    search: SearchRecord | None = None
    places: Callable[[Size], TokenPlaces] | None = None
    notes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # questions not shown whole, by benchmark
    about: str = ""  # a sentence on what was measured, where names alone would mislead
    margin: float = 0.01  # of retention, within which a trial was called equivalent to the unpruned one
    interim: str = ""  # what the tables are of, where a sweep still runs

    @property
    def search_of_this_model(self) -> SearchRecord | None:
        """The search in git may be of another model; then the page says just that."""
        if self.search is None:
            return None
        searched = self.search.summary.get("fingerprints", {}).get("model")
        return self.search if searched == self.provenance.get("model") else None

    @classmethod
    def load(
        cls,
        data_dir: Path,
        provenance: Mapping[str, str] | None = None,
        places: Callable[[Size], TokenPlaces] | None = None,
        about: str = "",
        margin: float = 0.01,
        interim: str = "",
    ) -> ReportInputs:
        """Open the files of ``data_dir``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is no Parquet file, has no rows, lacks a column, or no trial is unpruned.
        """
        datasets = {name: _open(Path(data_dir) / f"{name}.parquet", columns) for name, columns in COLUMNS.items()}
        tables = {
            name: datasets[name].to_table(columns=list(COLUMNS[name])).to_pandas()
            for name in ("trials", "scores", "comparisons", "groups", "examples")
        }

        if not (tables["trials"]["method"] == "unpruned").any():
            raise UnusableRecord(
                f"{Path(data_dir) / 'trials.parquet'} has no trial of method 'unpruned', which every retention is "
                "measured against; add it to a grid in params.yaml and run `dvc repro evaluate`"
            )
        return cls(
            trials=tables["trials"],
            scores=tables["scores"],
            comparisons=tables["comparisons"],
            groups=tables["groups"],
            examples=tables["examples"],
            predictions=datasets["predictions"],
            kept=datasets["kept"],
            images=datasets["images"],
            notes=read_notes(Path(data_dir) / "examples.parquet"),
            provenance=dict(provenance or {}),
            profile=_profile(Path(data_dir) / "profile.csv"),
            search=SearchRecord.load(Path(data_dir) / "search"),
            about=about,
            margin=margin,
            interim=interim,
            places=places,
        )


def _profile(path: Path) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    table = pd.read_csv(path)
    missing = [column for column in PROFILE_COLUMNS if column not in table.columns]
    if missing or not (table["method"] == "unpruned").any():
        raise UnusableRecord(f"{path} lacks {', '.join(missing) or 'its unpruned rows'}; run `make profile` to make it")
    return table


def _open(path: Path, columns: tuple[str, ...]) -> ds.Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {REMEDY}")
    try:
        dataset = ds.dataset(path, format="parquet")
        rows = dataset.count_rows()
    except (pa.ArrowInvalid, OSError) as error:
        raise UnusableRecord(f"{path} is not a Parquet file; {REMEDY}") from error
    missing = [column for column in columns if column not in dataset.schema.names]
    if missing:
        raise UnusableRecord(f"{path} lacks the columns {', '.join(missing)}; {REMEDY}")
    if rows == 0 and path.stem not in MAY_BE_EMPTY:
        raise UnusableRecord(f"{path} has no rows; {REMEDY}")
    return dataset
