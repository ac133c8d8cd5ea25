"""Names and colours: one per method, the same in every table and chart.

The colours are Okabe and Ito's and Tol's colour-blind-safe sets; a marker tells methods apart where colour does not.
On the page a colour is a variable of CSS, one for marks and one for text, so that a dark screen and a light one each get
what can be seen and read there; ``theme`` defines them.
"""

from __future__ import annotations

import functools
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
HIGHEST = "#D55E00"
PAPER = "#ffffff"

# The page's own colours: variable → on a light screen, on a dark one.
PAGE = {
    "paper": (PAPER, "#131316"),
    "faint": (PUBLISHED_GROUND, "#202026"),
    "ink": (INK, "#ececf0"),
    "muted": (MUTED, "#a9a9b2"),
    "rule": (RULE, "#3b3b43"),
    "published": (PUBLISHED, "#b4b4bd"),
    "accent": ("#b34700", "#ff9a57"),
    "best": ("#fff3e6", "#3a2a1a"),
    "ahead": ("#1a6b3a", "#6fcf97"),
    "behind": ("#a3341f", "#ff8f7a"),
}
MARK_CONTRAST, TEXT_CONTRAST = 3.0, 4.5  # WCAG 2.1, 1.4.11 and 1.4.3


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


def contrast(one: str, other: str) -> float:
    """Of two colours ``#rrggbb``: 1 to 21, as WCAG 2.1 defines it."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@functools.cache
def readable(color: str, ground: str, ratio: float) -> str:
    """``color``, mixed with black or white, whichever ``ground`` is not, until it stands out from it by ``ratio``."""
    goal = 0 if _luminance(ground) > 0.4 else 255
    channels = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    for step in range(21):
        mixed = "#" + "".join(f"{round(c + (goal - c) * step / 20):02x}" for c in channels)
        if contrast(mixed, ground) >= ratio:
            return mixed
    raise AssertionError("black and white stand out from everything that is not grey")


def text_color(color: str) -> str:
    """A method's colour, as text on a light ground has it."""
    return readable(color.lower(), PAGE["faint"][0], TEXT_CONTRAST)


def method_colors() -> list[str]:
    """All colours that methods may have, each once."""
    return list(dict.fromkeys(c.lower() for c in (*(s.color for s in METHODS.values()), *OTHER, HIGHEST)))


def mark_variable(color: str) -> str:
    """``#D55E00`` → ``var(--m-d55e00)``; a colour of the page by its name: ``#1d1d1f`` → ``var(--ink)``; others as they
    are."""
    color = color.lower()
    named = _page_variables()
    return named.get(color) or (f"var(--m-{color[1:]})" if color in method_colors() else color)


def text_variable(color: str) -> str:
    """The same of text, whose colour on a light ground is :func:`text_color`; white text lies on a colour of its own."""
    color = color.lower()
    named, method = _page_variables(), _text_colors().get(color)
    return color if color == PAPER else named.get(color) or (f"var(--t-{method[1:]})" if method else color)


@functools.cache
def _page_variables() -> dict[str, str]:
    return {light: f"var(--{name})" for name, (light, _) in PAGE.items()}


@functools.cache
def _text_colors() -> dict[str, str]:
    """Text colour → the method's."""
    return {text_color(color): color for color in method_colors()}


def theme(dark: bool) -> str:
    """Declarations of CSS for all variables."""
    page = {name: colors[dark] for name, colors in PAGE.items()}
    lines = [f"--{name}: {color};" for name, color in page.items()]
    for color in method_colors():
        mark = readable(color, page["paper"], MARK_CONTRAST) if dark else color
        lines.append(f"--m-{color[1:]}: {mark}; --t-{color[1:]}: {readable(color, page['faint'], TEXT_CONTRAST)};")
    return "\n".join(lines)


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
