"""A synthetic run in the data contract's files: small, seeded, with holes, ablations, and texts that would break out of a page."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.report.inputs import ReportInputs
from pipelines.report.page import build_report
from pipelines.scores.comparisons import MEASURED, pairs_of, with_verdicts
from pipelines.scores.groups import COLUMNS as GROUPS
from pipelines.scores.seeds import spread_over_seeds, with_seeds
from pipelines.settings import AgainstSettings, PlannedSettings

TOKENS, SIDE = 144, 12
BUDGETS = (16, 32, 48)
BENCHMARKS = {"refcoco": 0.82, "refcocoplus": 0.78, "refcocog": 0.71, "pope": 0.93, "gqa": 0.88, "textvqa": 0.81}
GROUNDING = ("refcoco", "refcocoplus", "refcocog")
METRICS = dict.fromkeys(GROUNDING, "acc@0.5") | {"pope": "f1", "gqa": "accuracy", "textvqa": "accuracy"}
SCORERS = ("attention_last_token", "attention_all_text", "cosine_mean_text", "random")
HOSTILE = "the <script>alert(1)</script> | 5"

# (method, preset, position) → retention of grounding and VQA at the three budgets; None where there is no trial
CURVES: dict[tuple[str, str, str], tuple] = {
    ("nuwa", "released", "pesp"): ((0.47, 0.71, 0.86), (0.90, 0.95, 0.98)),
    ("nuwa", "paper", "pesp"): ((0.44, 0.69, 0.84), (0.92, 0.96, 0.99)),
    ("visionzip", "default", "perc"): ((0.02, 0.03, 0.05), (0.78, 0.90, 0.95)),
    ("visionzip", "default", "pesp"): ((0.30, 0.58, 0.77), (0.85, 0.94, 0.97)),
    ("visionzip", "default", "rpme"): ((0.08, 0.22, 0.36), (0.82, 0.92, 0.96)),
    ("divprune", "default", "pesp"): ((0.34, 0.60, 0.74), (0.86, 0.93, 0.96)),
    ("vispruner", "default", "pesp"): ((0.33, 0.63, 0.79), (0.87, 0.94, 0.97)),
    ("prumerge", "default", "pesp"): ((0.26, 0.49, 0.66), (0.83, 0.91, 0.95)),
    ("fastv", "default", "pesp"): (None, (0.41, 0.63), (0.80, 0.90)),
    ("pooling", "default", "perc"): ((0.10, 0.19, 0.33), (0.81, 0.94, 0.98)),
    ("uniform", "default", "pesp"): ((0.24, 0.47, 0.65), (0.84, 0.92, 0.96)),
    ("random", "default", "pesp"): ((0.21, 0.42, 0.61), (0.80, 0.90, 0.94)),
    ("random", "default", "perc"): ((0.01, 0.01, 0.02), (0.60, 0.75, 0.85)),
}

# Of those, what is enough where a page is drawn once more for one of its sections.
SMALL = [("nuwa", "released", "pesp"), ("visionzip", "default", "pesp"), ("random", "default", "pesp")]


class Synthetic:
    """Collects rows of the contract's tables; ``write`` makes the files."""

    def __init__(
        self, images: int = 10, pictures: Callable[[int], np.ndarray] | None = None, against: str = "nuwa"
    ) -> None:
        self.rng = np.random.default_rng(7)
        self.against = AgainstSettings(method=against, preset="released" if against == "nuwa" else "default")
        paper = {"trial": {"method": "visionzip", "preset": None}, "less": {"preset": "paper"}}
        self.planned = [PlannedSettings.model_validate(paper)]
        self.trials: list[dict] = []
        self.known: dict[tuple, dict] = {}
        self.scores: list[dict] = []
        self.predictions: list[dict] = []
        self.kept: list[dict] = []
        self.images: list[dict] = []
        self.examples: list[dict] = []
        self.groups: list[dict] = []
        for index in range(images):
            self._add_image((pictures or self._disc)(index))
        self.add("unpruned", "default", "pesp", None, (1.0, 1.0), grids=("main",))

    def _disc(self, index: int) -> np.ndarray:
        pixels = self.rng.integers(20, 80, size=(96, 96, 3))
        y, x = np.mgrid[:96, :96]
        pixels[(x - 30 - index) ** 2 + (y - 60) ** 2 < 15**2] = (235, 60, 40)
        return pixels.astype(np.uint8)

    def _add_image(self, pixels: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        name = hashlib.sha256(buffer.getvalue()).hexdigest()
        self.images.append({"image": name, "bytes": buffer.getvalue()})
        for benchmark in BENCHMARKS:
            is_box = benchmark in GROUNDING
            left, top = self.rng.uniform(0, 0.7, size=2).round(2)
            truth = {"box": [left, top, left + 0.3, top + 0.3]} if is_box else {"answer": "red"}
            if benchmark == "textvqa":
                truth = {"answers": ["5"] * 7 + ["6"] * 3}
            question = HOSTILE if is_box else f"what is on picture {len(self.images)}?"
            self.examples.append({
                "example_id": f"{benchmark}:{len(self.images):03d}", "benchmark": benchmark,
                "family": "grounding" if is_box else "vqa", "image": name, "question": question,
                "prompt": question, "truth": json.dumps(truth), "category": "", "width": 96, "height": 96,
                "max_new_tokens": 16,
            })  # fmt: skip

    def add(
        self, method: str, preset: str, position: str, budget: int | None, retention: tuple[float, float],
        grids: tuple[str, ...], params: dict | None = None, layer: int | None = None, scorer: str | None = None,
        seed: int = 0, keep: int | None = None,
    ) -> str:  # fmt: skip
        """One trial with its scores, answers and kept patches, or one more grid for a trial there is; returns its id."""
        params = params or {}
        identity = (method, preset, position, budget, json.dumps(params), layer, scorer, seed, keep)
        if identity in self.known:
            self.known[identity]["grids"] += grids
            return self.known[identity]["trial_id"]
        trial_id = f"t{len(self.trials):03d}"
        extra = "".join(f" {key}={value}" for key, value in params.items()) + (f" {scorer}@{layer}" if scorer else "")
        extra += f" seed {seed} keep {keep}"
        two_stages = layer is not None
        first = TOKENS if budget is None or method == "fastv" else budget * 7 // 4 if two_stages else budget
        self.trials.append({
            "trial_id": trial_id, "label": f"{method} {preset} {position} {budget}{extra}", "grids": list(grids),
            "method": method, "preset": preset, "position": position, "budget": budget,
            "budgets": [] if budget is None else [float(budget)],
            "average_tokens": budget or TOKENS, "image_tokens": TOKENS, "image_grid": "12x12",
            "stage1_keep": keep or first,
            "stage2_layer": layer, "stage2_keep": budget // 4 if two_stages else None, "stage2_scorer": scorer,
            "stage2_cuts": f"{layer}:{budget // 4}" if two_stages else None,
            "stage2_recycling": False, "flops": 4.2e9 * (budget or TOKENS), "flops_convention": "FLOP, by a rule of thumb",
            "kv_bytes": 1024.0 * (budget or TOKENS), "seed": seed, "params": json.dumps(params),
        })  # fmt: skip
        self.known[identity] = self.trials[-1]
        self._add_scores(trial_id, method, retention)
        self._add_answers(self.trials[-1], retention)
        return trial_id

    def _add_scores(self, trial_id: str, method: str, retention: tuple[float, float]) -> None:
        def row(benchmark, family, metric, score, headline, kept=None, n=120):
            low, high = max(0.0, score - 0.03), score + 0.03
            self.scores.append({
                "trial_id": trial_id, "benchmark": benchmark, "family": family, "metric": metric, "score": score,
                "low": low, "high": high, "n": n, "headline": headline, "retention": kept,
                "retention_low": None if kept is None else max(0.0, kept - 0.04),
                "retention_high": None if kept is None else kept + 0.04,
            })  # fmt: skip

        for benchmark, full in BENCHMARKS.items():
            family = "grounding" if benchmark in GROUNDING else "vqa"
            kept = retention[family == "vqa"]
            row(benchmark, family, METRICS[benchmark], full * kept, True, kept)
            if family == "grounding":
                row(benchmark, family, "iou", 0.9 * full * kept, False)
                row(benchmark, family, "parse_failure", 0.0 if method == "unpruned" else 0.02 * (1 - kept), False)
        for index, family in enumerate(("grounding", "vqa")):
            row("mean", family, "retention", retention[index], True, retention[index], n=360)

    def _add_answers(self, trial: dict, retention: tuple[float, float]) -> None:
        kept: dict[str, np.ndarray] = {}
        for image in self.images:
            indices = np.sort(self.rng.choice(TOKENS, size=trial["stage1_keep"], replace=False))
            pillar = self.rng.random(len(indices)) < 0.45 if trial["method"] == "nuwa" else np.ones(len(indices), bool)
            kept[image["image"]] = indices
            self.kept.append({
                "trial_id": trial["trial_id"], "image": image["image"], "indices": indices, "pillar": pillar,
            })  # fmt: skip
        for example in self.examples:
            indices = kept[example["image"]]
            truth = json.loads(example["truth"])
            share = retention[example["family"] == "vqa"]
            if "box" in truth:
                shift = 0.02 if self.rng.random() < share else 0.25
                text = "[" + ", ".join(f"{value - shift:.2f}" for value in truth["box"]) + "]"
            else:
                right = truth.get("answer") or truth["answers"][0]
                text = right if self.rng.random() < share else str(self.rng.choice(["<b>blue</b>", "no", "6"]))
            last = indices[: trial["stage2_keep"] or (len(indices) if trial["method"] != "fastv" else 12)]
            self.predictions.append({
                "trial_id": trial["trial_id"], "example_id": example["example_id"], "prediction": text,
                "kept_final": last,
            })  # fmt: skip

    def add_main(self, curves: dict | None = None) -> None:
        for (method, preset, position), (first, second, *third) in (curves or CURVES).items():
            grounding, vqa = (first, second) if first else (second, third[0])
            budgets = BUDGETS if first else BUDGETS[1:]
            layer, scorer = {"nuwa": (4, "attention_last_token"), "fastv": (2, "attention_last_token")}.get(
                method, (None, None)
            )
            for budget, *kept in zip(budgets, grounding, vqa, strict=True):
                self.add(method, preset, position, budget, tuple(kept), ("main",), layer=layer, scorer=scorer)

    def add_ablations(self) -> None:
        def nuwa(grid, kept, params=None, layer=4, scorer="attention_last_token"):
            self.add("nuwa", "released", "pesp", 16, kept, (grid,), params, layer, scorer)

        for layer in (2, 3, 4, 5, 6):
            for index, scorer in enumerate(SCORERS):
                nuwa("stage2", (0.30 + 0.04 * layer - 0.05 * index, 0.80 + 0.02 * layer), None, layer, scorer)
        for share in (0.02, 0.14, None, 0.52, 0.76, 1.0):
            value = 280 / 1058 if share is None else share
            nuwa("distance", (0.47 - 0.1 * (value - 0.3) ** 2, 0.90), None if share is None else {
                "distance_threshold": share
            })  # fmt: skip
        for separation in (False, True):
            for pillars in (False, True):
                for scorer in ("attention_last_token", "random"):
                    off = {"separation": separation, "pillars": pillars}
                    params = {key: value for key, value in off.items() if not value}
                    nuwa("components", (0.2 + 0.2 * separation + 0.05 * pillars, 0.85), params, 4, scorer)

    def add_groups(self, budget: float = 16.0) -> None:
        """Boxes in two sizes and questions by their first words, one of which would break out of a page."""
        main = [trial for trial in self.trials if "main" in trial["grids"] and trial["budget"] in (None, budget)]
        kinds = [("grounding", "size", "small"), ("grounding", "size", "large"), ("vqa", "question", "is <b>there")]
        for trial in main:
            for place, (family, kind, group) in enumerate(kinds):
                score = (0.3 + 0.01 * len(self.groups)) % 0.9
                self.groups.append({
                    "trial_id": trial["trial_id"], "budget": budget, "family": family, "benchmark": "", "kind": kind,
                    "group": group, "place": place, "score": score, "low": score - 0.05, "high": score + 0.05,
                    "n": 1234 + place, "images": 200,
                })  # fmt: skip

    def comparisons(self) -> pd.DataFrame:
        """Differences of the trials' retentions, each as sure as a standard error of 1.5 points makes it."""
        kept = {(row["trial_id"], row["family"]): row["score"] for row in self.scores if row["benchmark"] == "mean"}
        rows = []
        for pair in pairs_of(pd.DataFrame(self.trials), self.against, self.planned):
            for family in ("grounding", "vqa"):
                trial, reference = (kept.get((one, family), np.nan) for one in (pair.trial, pair.reference))
                difference = trial - reference
                rows.append({
                    "question": pair.question, "budget": pair.budget, "trial_id": pair.trial,
                    "reference": pair.reference, "family": family, "benchmark": "mean", "difference": difference,
                    "low": difference - 0.03, "high": difference + 0.03, "images": 120,
                    "p": 2 * NormalDist().cdf(-abs(difference) / 0.015), "p_margin": 1.0,
                })  # fmt: skip
        trials, scores = pd.DataFrame(self.trials), pd.DataFrame(self.scores)
        compared = with_verdicts(pd.DataFrame(rows, columns=MEASURED))
        return with_seeds(compared, trials, spread_over_seeds(trials, scores))

    def frames(self) -> dict[str, pa.Table]:
        whole = {"stage1_keep": "int32", "seed": "int32", "image_tokens": "int32"}
        nullable = {name: "Int32" for name in ("stage2_layer", "stage2_keep")}
        return {
            "trials": pa.Table.from_pandas(pd.DataFrame(self.trials).astype(whole | nullable), preserve_index=False),
            "scores": pa.Table.from_pylist(self.scores),
            "comparisons": pa.Table.from_pandas(self.comparisons(), preserve_index=False),
            "groups": pa.Table.from_pandas(pd.DataFrame(self.groups, columns=list(GROUPS)).astype(GROUPS)),
            "examples": pa.Table.from_pylist(self.examples),
            "predictions": _with_patches(self.predictions, "kept_final"),
            "kept": _with_patches(self.kept, "indices"),
            "images": pa.Table.from_pylist(self.images),
        }

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        for name, table in self.frames().items():
            pq.write_table(table, directory / f"{name}.parquet")
        return directory


def _with_patches(rows: list[dict], column: str) -> pa.Table:
    table = pa.Table.from_pylist([{**row, column: list(map(int, row[column]))} for row in rows])
    return table.set_column(table.schema.get_field_index(column), column, table[column].cast(pa.list_(pa.int16())))


@pytest.fixture(scope="session")
def full_run(tmp_path_factory) -> Path:
    run = Synthetic()
    run.add_main()
    run.add_ablations()
    run.add_groups()
    return run.write(tmp_path_factory.mktemp("full") / "data")


@pytest.fixture(scope="session")
def full_report(full_run, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("full") / "report"
    inputs = ReportInputs.load(full_run, {"model path": "models/testbed", "data": "md5 1f<2>"})
    build_report(inputs, output, headline_budget=16)
    return output


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """Three methods under one position strategy, no ablations: a page of it is drawn in a tenth of the time."""
    run = Synthetic(images=2)
    run.add_main({key: CURVES[key] for key in SMALL})
    return run.write(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="session")
def small_report(small_run, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("small") / "report"
    build_report(ReportInputs.load(small_run), output, headline_budget=16)
    return output


@pytest.fixture
def synthetic() -> type[Synthetic]:
    return Synthetic
