"""Names and colours: one per method, the same in every table and chart.

The colours are Okabe and Ito's and Tol's colour-blind-safe sets; a marker tells methods apart where colour does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nuwa.benchmarks import BENCHMARKS as KNOWN
from nuwa.benchmarks import TESTBED, get_benchmark
from pipelines.addresses import BenchmarkName
from pipelines.axes import heading

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
    "fastervlm": MethodStyle("FasterVLM", "#77AADD", "1"),
    "hiprune": MethodStyle("HiPrune", "#225588", "2"),
    "holov": MethodStyle("HoloV", "#BB4433", "3"),
    "scope": MethodStyle("SCOPE", "#228833", "4"),
    "vscan": MethodStyle("VScan", "#AA3377", "8"),
    "cdpruner": MethodStyle("CDPruner", "#66A61E", "H"),
    "divprune": MethodStyle("DivPrune", "#009E73", "D"),
    "prumerge": MethodStyle("PruMerge+", "#999933", "P"),
    "sparsevlm": MethodStyle("SparseVLM", "#332288", "X"),
    "pyramiddrop": MethodStyle("PyramidDrop", "#44AA99", "<"),
    "fastv": MethodStyle("FastV", "#CC79A7", ">"),
    "sparsevlm_v2": MethodStyle("SparseVLM v2", "#6655AA", "x"),
    "dart": MethodStyle("DART", "#B8860B", "|"),
    "feather": MethodStyle("FEATHER", "#1B7F8C", "+"),
    "fastv_without_rope": MethodStyle("FastV without RoPE", "#DD99BB", "$r$"),
    "ivc_prune": MethodStyle("IVC-Prune", "#4477AA", "$i$"),
    "vtw": MethodStyle("VTW", "#A05030", "$v$"),
    "pooling": MethodStyle("Pooling", "#E69F00", "h"),
    "downsample": MethodStyle("Downsample", "#8C6D31", "p"),
    "uniform": MethodStyle("Uniform grid", "#5F6B7A", "d"),
    "random": MethodStyle("Random", "#8C8C8C", "*"),
}
ALIASES = {"prumerge+": "prumerge", "prumerge_plus": "prumerge", "uniform_grid": "uniform"}
OTHER = ("#117733", "#AA4499", "#6699CC", "#661100")

POSITIONS = {"pesp": "original", "perc": "compressed", "rpme": "extended"}
LINE_STYLES = {"pesp": "-", "perc": (0, (1.2, 1.6)), "rpme": (0, (5, 2))}

BENCHMARKS = (  # the first columns; others follow in alphabetical order
    "refcoco", "refcocoplus", "refcocog", "pope", "gqa", "textvqa", "scienceqa", "vqav2", "mme", "mmbench",
    "mmbench_cn", "seedbench", "mmmu", "mmvet", "mmstar", "ai2d", "realworldqa", "hallusionbench", "vizwiz", "ocrbench",
    "chartqa", "docvqa", "infovqa",
)  # fmt: skip
PARAMETERS = {  # in the order in which a grid's parameters are read; others follow
    "separation": "regions",
    "pillars": "pillars",
    "distance_threshold": "distance threshold (share of the largest squared distance)",
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
    title = get_benchmark(parsed.name).title if parsed.name in KNOWN else parsed.name
    name = " ".join([title, parsed.split or ""]).strip()
    rules = [part.replace("_", " ") for part in (parsed.variant,) if part]
    rules += [parsed.protocol] if parsed.protocol != TESTBED else []
    return f"{name} ({', '.join(rules)})" if rules else name


def benchmark_rank(benchmark: str) -> tuple[int, str]:
    base = BenchmarkName.parse(benchmark).name
    return (BENCHMARKS.index(base) if base in BENCHMARKS else len(BENCHMARKS), benchmark)


def parameter_name(name: str) -> str:
    return PARAMETERS.get(name) or heading(name) or name.replace("_", " ")


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
