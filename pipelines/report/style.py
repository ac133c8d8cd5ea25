"""Names and colours: one per method, the same in every table and chart.

The colours are Okabe and Ito's and Tol's colour-blind-safe sets; a marker tells methods apart where colour does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipelines.tables import BenchmarkName

INK = "#1d1d1f"
MUTED = "#6b6b70"
RULE = "#d9d9de"
PUBLISHED_GROUND = "#f5f5f7"
PUBLISHED = "#54545c"  # other people's numbers are never in a method's colour


@dataclass(frozen=True)
class MethodStyle:
    name: str
    color: str
    marker: str


# The order is the order of rows: the two papers' methods, published ones, then the baselines anyone can state.
METHODS: dict[str, MethodStyle] = {
    "unpruned": MethodStyle("Unpruned", INK, "_"),
    "nuwa": MethodStyle("Nüwa", "#D55E00", "o"),
    "learnpruner": MethodStyle("LearnPruner", "#882255", "s"),
    "visionzip": MethodStyle("VisionZip", "#0072B2", "^"),
    "vispruner": MethodStyle("VisPruner", "#56B4E9", "v"),
    "divprune": MethodStyle("DivPrune", "#009E73", "D"),
    "prumerge": MethodStyle("PruMerge+", "#999933", "P"),
    "sparsevlm": MethodStyle("SparseVLM", "#332288", "X"),
    "pyramiddrop": MethodStyle("PyramidDrop", "#44AA99", "<"),
    "fastv": MethodStyle("FastV", "#CC79A7", ">"),
    "pooling": MethodStyle("Pooling", "#E69F00", "h"),
    "downsample": MethodStyle("Downsample", "#8C6D31", "p"),
    "uniform": MethodStyle("Uniform grid", "#5F6B7A", "d"),
    "random": MethodStyle("Random", "#8C8C8C", "*"),
}
ALIASES = {"prumerge+": "prumerge", "prumerge_plus": "prumerge", "uniform_grid": "uniform"}
OTHER = ("#117733", "#AA4499", "#6699CC", "#661100")

POSITIONS = {"pesp": "original", "perc": "compressed", "rpme": "extended"}
LINE_STYLES = {"pesp": "-", "perc": (0, (1.2, 1.6)), "rpme": (0, (5, 2))}

BENCHMARKS = {  # in the order of columns
    "refcoco": "RefCOCO", "refcocoplus": "RefCOCO+", "refcocog": "RefCOCOg", "pope": "POPE", "gqa": "GQA",
    "textvqa": "TextVQA", "scienceqa": "ScienceQA", "vqav2": "VQAv2", "mme": "MME", "mmbench": "MMBench",
    "seedbench": "SEED-Bench", "mmmu": "MMMU", "mmvet": "MM-Vet",
}  # fmt: skip
PARAMETERS = {  # in the order in which a grid's parameters are read; others follow
    "separation": "regions",
    "pillars": "pillars",
    "distance_threshold": "distance threshold (share of the largest squared distance)",
    "stage2_layer": "stage-2 layer",
    "stage2_scorer": "stage-2 scorer",
    "stage2_ratio": "stage-2 ratio",
    "stage2_recycling": "recycling",
    "stage1_keep": "K1",
}
FAMILIES = {"grounding": "Grounding", "vqa": "VQA"}


def method_style(method: str) -> MethodStyle:
    """The method's style; an unlisted method keeps its own name and one of four spare colours."""
    key = ALIASES.get(method, method)
    if key in METHODS:
        return METHODS[key]
    return MethodStyle(method, OTHER[sum(method.encode()) % len(OTHER)], "o")


def method_rank(method: str) -> tuple[int, str]:
    order = list(METHODS)
    key = ALIASES.get(method, method)
    return (order.index(key) if key in METHODS else order.index("pooling"), method)


def position_rank(position: str) -> tuple[int, str]:
    order = list(POSITIONS)
    return (order.index(position) if position in POSITIONS else len(order), position)


def position_name(position: str) -> str:
    """``perc`` → ``compressed (PERC)``."""
    return f"{POSITIONS[position]} ({position.upper()})" if position in POSITIONS else position


def benchmark_name(benchmark: str) -> str:
    """``refcocoplus`` → ``RefCOCO+``, ``refcoco/testA`` → ``RefCOCO testA``, ``pope:first_sentence`` → ``POPE (first sentence)``."""
    parsed = BenchmarkName.parse(benchmark)
    name = " ".join([BENCHMARKS.get(parsed.name, parsed.name), parsed.split or ""]).strip()
    return f"{name} ({parsed.variant.replace('_', ' ')})" if parsed.variant else name


def benchmark_rank(benchmark: str) -> tuple[int, str]:
    order, base = list(BENCHMARKS), BenchmarkName.parse(benchmark).name
    return (order.index(base) if base in BENCHMARKS else len(order), benchmark)


def parameter_name(name: str) -> str:
    return PARAMETERS.get(name, name.replace("_", " "))


def setting_text(name: str, value: Any) -> str:
    """A parameter's value as people read it; ``None`` is a stage 2 that was left out."""
    if value is None or value is False:
        return "off"
    if value is True:
        return "on"
    if name == "method":
        return method_style(value).name
    if name == "position":
        return position_name(value)
    return plain_number(value) if isinstance(value, (int, float)) else str(value).replace("_", " ")


def percent(value: float | None) -> str:
    """A share as per cent with one decimal, without the sign: ``0.4719`` → ``47.2``; nothing → an en dash."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def plain_number(value: float | None) -> str:
    """Up to three significant decimals and no trailing zeros: ``16.0`` → ``16``, ``0.26465`` → ``0.265``."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"
