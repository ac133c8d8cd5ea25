"""Charts: panels drawn by matplotlib, each as inline SVG for the page and together as one PNG for Markdown.

The same input gives the same bytes: ids in the SVG come from a fixed salt, neither format carries a date or version.
SVG text stays text, so the page's font, search and selection apply to it, and its colours are the page's variables. A
panel is laid out once, for both formats.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from pipelines.report.outcomes import Estimate, Outcomes, TrialRow
from pipelines.report.style import (
    FAMILIES,
    HIGHEST,
    INK,
    LINE_STYLES,
    MUTED,
    PUBLISHED_GROUND,
    RULE,
    mark_variable,
    method_style,
    percent,
    text_color,
    text_variable,
)

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same text widths on every machine
    "font.size": 7.8,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8.6,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}
ON_PALE = "#101014"  # text on a heat map's pale cells, which stay pale on a dark page
SEQUENTIAL = LinearSegmentedColormap.from_list("paper to blue", ["#f4f7fb", "#a9c8e4", "#3f7fb5", "#123a63"])
PNG_DPI = 160
TOUCH = 0.5  # pixels that boxes of texts may share
LABEL_SIZE, LABEL_LINE = 7.0, 0.14  # points; inches from one line to the next
MULTIPLE_SIZE, MULTIPLE_LINE = 6.0, 0.115  # the same of small multiples
MULTIPLE_PAD = 5.0  # points below the title
MULTIPLE_MARGINS = {"left": 0.14, "right": 0.77, "bottom": 0.14, "top": 0.85}
MULTIPLE_ROOM = 0.08  # of the axis, on both sides
CURVE_TICKS = 0.15  # of the axis, between neighbouring ticks that have a label
RACE_TICKS = 0.12  # logarithm of the ratio of neighbouring ticks
RACE_DODGE = 0.03  # of the cost, between trials that stopped at neighbouring rungs
MOST_SERIES = 40  # of which each has a panel


@dataclass(frozen=True)
class Panel:
    """One pair of axes. ``published`` marks other people's figures, which the page frames apart."""

    title: str
    draw: Callable[[Axes], None]
    width: float = 4.7  # inches, small enough for a phone
    height: float = 3.2
    published: bool = False
    multiple: bool = False  # small, one of many on the same axes
    spoken: str = ""  # the title where there are no headings around


@dataclass(frozen=True)
class Drawn:
    """A panel as ``<svg>`` to stand inside HTML, and as pixels; ``overlaps``: labels that touch, of which there should be
    none."""

    svg: str
    pixels: Image.Image
    overlaps: list[tuple[str, str]]


def draw_panel(panel: Panel, name: str) -> Drawn:
    """``name`` salts the ids of the SVG: unique on the page, the same every time."""
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        figure = laid_out(panel)
        overlaps = touching(figure)
        text, canvas = io.StringIO(), cast(FigureCanvasAgg, figure.canvas)
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=empty, transparent=True)
        canvas.draw()
        pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if f"#{match[1]}" in svg else "", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{_attribute(panel.spoken or panel.title)}" ', 1).strip()
    return Drawn(_themed(svg), pixels, overlaps)


def laid_out(panel: Panel) -> Figure:
    """The panel's figure, everything in it where it will be printed."""
    figure = Figure(figsize=(panel.width, panel.height), dpi=PNG_DPI, layout=None if panel.multiple else "constrained")
    FigureCanvasAgg(figure)
    if panel.multiple:  # all alike, so that they can be held against each other
        figure.subplots_adjust(**MULTIPLE_MARGINS)
    _draw(panel, figure.add_subplot())
    if not panel.multiple:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # one layout serves both formats
    return figure


def panels_png(panels: Sequence[Drawn], columns: int = 2) -> bytes:
    """All panels in one picture, row by row."""
    columns = min(columns, len(panels))
    rows = [[panel.pixels for panel in panels[start : start + columns]] for start in range(0, len(panels), columns)]
    widths = [max(row[at].width for row in rows if at < len(row)) for at in range(columns)]
    sheet = Image.new("RGB", (sum(widths), sum(max(one.height for one in row) for row in rows)), "white")

    top = 0
    for row in rows:
        for at, pixels in enumerate(row):
            sheet.paste(pixels, (sum(widths[:at]), top))
        top += max(one.height for one in row)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _themed(svg: str) -> str:
    """Colours as the page's variables."""

    def of_tag(tag: re.Match) -> str:
        variable = text_variable if tag[0].startswith("<text") else mark_variable
        style = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda color: variable(color[0]), tag[2])
        return f"{tag[1]}{style}{tag[3]}"

    return re.sub(r'(<[a-z]+ [^>]*?style=")([^"]*)("[^>]*>)', of_tag, svg)


def touching(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of a figure that was laid out whose boxes overlap: what a reader could not tell apart."""
    renderer = cast(FigureCanvasAgg, figure.canvas).get_renderer()
    texts = [text for ax in figure.axes for text in _texts(ax) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    return [
        (one, other)
        for (one, box), (other, there) in itertools.combinations(boxes, 2)
        if min(box.x1, there.x1) - max(box.x0, there.x0) > TOUCH
        and min(box.y1, there.y1) - max(box.y0, there.y0) > TOUCH
    ]


def _texts(ax: Axes) -> Iterator[Text]:
    """All that is printed in and around a pair of axes; labels of ticks beyond its view are not."""
    yield from (child for child in ax.get_children() if isinstance(child, Text))
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        yield axis.label
        yield from (tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)


def _draw(panel: Panel, ax: Axes) -> None:
    panel.draw(ax)
    if panel.published:
        ax.set_facecolor(PUBLISHED_GROUND)
    if panel.multiple:
        ax.set_title(panel.title, fontsize=MULTIPLE_SIZE, pad=MULTIPLE_PAD)
    else:
        ax.set_title(panel.title)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def small_multiples(outcomes: Outcomes, family: str) -> list[Panel]:
    """Retention over the budget, a small panel a selection on the same axes: a line for each strategy of position ids, named
    at its end, before the best that any trial keeps at each budget.

    Where there are more selections than ``MOST_SERIES``, each method's first has the panel and its others are grey there.
    """
    series: dict[str, list[TrialRow]] = {}
    for trial in outcomes.main:
        if outcomes.retention(trial, family) is not None:
            series.setdefault(outcomes.name(trial), []).append(trial)
    firsts = {trials[0].method: name for name, trials in reversed(series.items())}
    shown = list(series) if len(series) <= MOST_SERIES else list(reversed(firsts.values()))
    best = _best_of_budgets(outcomes, family)

    panels = []
    for name in shown:
        method = series[name][0].method
        others = [one for one, trials in series.items() if trials[0].method == method and one not in shown]
        context = [trials for one in others for trials in _by_position(series[one]).values()]
        panels.append(_multiple(outcomes, family, name, _by_position(series[name]), context, best))
    return panels


def _by_position(trials: Sequence[TrialRow]) -> dict[str, list[TrialRow]]:
    lines: dict[str, list[TrialRow]] = {}
    for trial in sorted(trials, key=lambda trial: trial.average_tokens):
        lines.setdefault(trial.position, []).append(trial)
    return lines


def _best_of_budgets(outcomes: Outcomes, family: str) -> list[tuple[float, float]]:
    """Of each budget with more than one trial: its tokens, and the highest retention in per cent."""
    best = []
    for budget in outcomes.budgets():
        known = [kept.value for trial in outcomes.at_budget(budget) if (kept := outcomes.retention(trial, family))]
        if len(known) > 1:
            best.append((budget, 100 * max(known)))
    return best


def _multiple(
    outcomes: Outcomes,
    family: str,
    name: str,
    lines: dict[str, list[TrialRow]],
    context: Sequence[Sequence[TrialRow]],
    best: Sequence[tuple[float, float]],
) -> Panel:
    def curve(trials: Sequence[TrialRow]) -> tuple[np.ndarray, np.ndarray]:
        kept = [known for trial in trials if (known := outcomes.retention(trial, family))]
        return np.array([trial.average_tokens for trial in trials]), _percent_curve(kept)

    def draw(ax: Axes) -> None:
        budgets, ends = outcomes.budgets(), []
        ax.axhline(100, color=INK, linewidth=0.7, linestyle=(0, (1, 2)), zorder=2)
        ax.plot([x for x, _ in best], [y for _, y in best], color=RULE, linewidth=2.4, zorder=1.5)
        for trials in context:
            x, y = curve(trials)
            ax.plot(x, y[0], color=RULE, linewidth=0.5, zorder=1.8)
        for position, trials in lines.items():
            x, y = curve(trials)
            style = method_style(trials[0].method)
            own = len(lines) == 1 or trials[0].own
            ax.fill_between(x, y[0] - y[1], y[0] + y[2], color=style.color, alpha=0.18, linewidth=0, zorder=2.5)
            ax.plot(
                x, y[0], color=style.color, linestyle=LINE_STYLES.get(position, "-"), zorder=3,
                linewidth=1.7 if own else 0.9, marker="o", markersize=2.6 if own else 1.6,
            )  # fmt: skip
            ends.append((float(x[-1]), float(y[0, -1]), position.upper(), style.color))

        room = MULTIPLE_ROOM * max(budgets[-1] - budgets[0], 1.0)
        ax.set_xlim(budgets[0] - room, budgets[-1] + room)
        ax.set_ylim(0, max(105.0, *(100 * kept.high for trials in lines.values() for trial in trials
                                    if (kept := outcomes.retention(trial, family)))))  # fmt: skip
        marked = [budgets[0], budgets[-1]] if len(budgets) > 1 else budgets
        ax.set_xticks(marked, [f"{budget:g}" for budget in marked])
        ax.set_yticks([0, 50, 100])
        ax.tick_params(labelsize=MULTIPLE_SIZE, length=2, pad=2)
        ax.grid(axis="y")
        _label_ends(ax, ends, line=MULTIPLE_LINE)

    return Panel(name, draw, width=1.75, height=1.35, multiple=True, spoken=f"{FAMILIES[family]}, {name}")


def in_brief(outcomes: Outcomes, family: str, named: Sequence[TrialRow], title: str) -> Panel:
    """Retention over the budget of what an answer names, each labelled, before all other methods in grey, as their
    authors ship them."""
    told = {(outcomes.name(trial), trial.position): trial for trial in named}
    series: dict[tuple[str, str], list[TrialRow]] = {}
    for trial in outcomes.main:
        key = (outcomes.name(trial), trial.position)
        if (key in told or trial.own) and outcomes.retention(trial, family) is not None:
            series.setdefault(key, []).append(trial)

    def draw(ax: Axes) -> None:
        ends = []
        for key, trials in series.items():
            trials = sorted(trials, key=lambda trial: trial.average_tokens)
            x = [trial.average_tokens for trial in trials]
            y = _percent_curve([known for trial in trials if (known := outcomes.retention(trial, family))])
            if key not in told:
                ax.plot(x, y[0], color=RULE, linewidth=0.9, marker=".", markersize=3, zorder=2.5)
                continue
            color = method_style(trials[0].method).color
            ax.fill_between(x, y[0] - y[1], y[0] + y[2], color=color, alpha=0.14, linewidth=0, zorder=3)
            _curve(ax, np.array(x), y, trials[0].method, trials[0].position)
            ids = "" if trials[0].own else f", {trials[0].position.upper()} ids"
            ends.append((float(x[-1]), float(y[0, -1]), f"{key[0]}{ids}", color))
        _curve_axes(ax, outcomes)
        _label_ends(ax, ends)

    return Panel(title, draw, width=4.4, height=2.3)


def _percent_curve(estimates: Sequence[Estimate]) -> np.ndarray:
    """Rows: value, distance down to the interval's low end, distance up to its high end; in per cent."""
    table = 100 * np.array([(e.value, e.value - e.low, e.high - e.value) for e in estimates]).T
    return np.vstack([table[0], table[1:].clip(min=0)])


def _curve(ax: Axes, x: np.ndarray, y: np.ndarray, method: str, position: str) -> None:
    style, strong = method_style(method), (method, position) == ("nuwa", "pesp")
    ax.errorbar(
        x, y[0], yerr=y[1:], color=style.color, linestyle=LINE_STYLES.get(position, "-"), marker=style.marker,
        markersize=4.8 if strong else 3.6, linewidth=1.8 if strong else 1.0, elinewidth=0.7, capsize=0,
        markerfacecolor=style.color, markeredgewidth=0.8, zorder=4 if strong else 3,
    )  # fmt: skip


def _curve_axes(ax: Axes, outcomes: Outcomes) -> None:
    budgets = outcomes.budgets()
    total = outcomes.unpruned.image_tokens
    ax.axhline(100, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=2)
    ax.text(0.008, 100.3, "unpruned", color=MUTED, fontsize=6.5, transform=ax.get_yaxis_transform(), va="bottom")
    apart = CURVE_TICKS * (budgets[-1] - budgets[0])
    marked: list[float] = []

    # Where labels would touch, the budget of more trials has one.
    for budget in sorted(budgets, key=lambda budget: -len(outcomes.at_budget(budget))):
        if all(abs(budget - other) >= apart for other in marked):
            marked.append(budget)
    ax.set_xticks(marked, [f"{budget:g}\n{100 * budget / total:.0f} %" for budget in marked])
    ax.set_xticks(budgets, minor=True)
    ax.set_xlabel("average tokens, and their share of the image’s")
    ax.set_ylabel("retention, %")
    lowest, highest = ax.get_ylim()
    room = 0.05 * (highest - lowest)  # for the word at the line of 100 %
    ax.set_ylim(bottom=0 if lowest < 40 else 10 * (lowest // 10), top=max(highest, 100 + room))
    ax.grid(axis="y")


def _label_ends(ax: Axes, ends: list[tuple[float, float, str, str]], line: float = LABEL_LINE) -> None:
    """Name each line at its right end, names moved apart until none touches another; ``line``: inches a name takes."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[1])
    low, high = ax.get_ylim()
    left, right = ax.get_xlim()

    figure, place = cast(Figure, ax.figure), ax.get_subplotspec()
    height = figure.get_figheight() / (place.get_gridspec().nrows if place else 1)
    gap = (high - low) * line / max(height - 0.95, 0.6 * height)
    heights = spread([end[1] for end in ends], gap, low, high)
    start = right + 0.03 * (right - left)

    for (x, y, name, color), at in zip(ends, heights, strict=True):
        ax.plot([x, right, start], [y, at, at], color=color, linewidth=0.4, alpha=0.55, clip_on=False, zorder=2)
        ax.annotate(
            name, (start, at), xytext=(2, 0), textcoords="offset points", color=text_color(color), va="center",
            fontsize=LABEL_SIZE if line == LABEL_LINE else MULTIPLE_SIZE, annotation_clip=False,
        )  # fmt: skip
    # Names outside do not widen the axes.
    ax.set_xlim(left, right)
    ax.set_ylim(low, high)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending ``values`` as little as least squares allows, until neighbours are ``gap`` apart.

    Blocks of values that would touch are laid around their common mean (pool adjacent violators), then the whole is
    kept inside ``low``..``high`` as far as it fits.
    """
    blocks: list[list[float]] = []  # each: [sum of value - index * gap, count]
    for index, value in enumerate(values):
        blocks.append([value - index * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    bases = [total / count for total, count in blocks for _ in range(int(count))]
    placed = [base + index * gap for index, base in enumerate(bases)]
    ceiling = [high - (len(placed) - 1 - index) * gap for index in range(len(placed))]
    placed = [min(at, top) for at, top in zip(placed, ceiling, strict=True)]
    return [max(at, low + index * gap) for index, at in enumerate(placed)]


def heatmap(
    title: str, rows: Sequence[str], columns: Sequence[str], values: np.ndarray, axes: tuple[str, str]
) -> Panel:
    """``values`` ``(rows, columns)`` as shares, NaN where there is no trial; the highest cells are outlined."""

    def draw(ax: Axes) -> None:
        shown = np.ma.masked_invalid(100 * values)
        best = np.nanmax(values, initial=-np.inf)
        low, high = (float(shown.min()), float(shown.max())) if shown.count() else (0.0, 1.0)
        middle = low + 0.55 * (high - low)
        edges = [np.arange(size + 1) - 0.5 for size in values.shape[::-1]]
        colors: dict[str, Any] = {"cmap": SEQUENTIAL, "vmin": low, "vmax": max(high, low + 0.1)}
        ax.pcolormesh(*edges, shown, **colors, edgecolors="white", linewidth=1.5)

        for (row, column), value in np.ndenumerate(values):
            text = percent(float(value))
            # A hole has no ground of its own: its dash stands on the page's.
            color = MUTED if not np.isfinite(value) else "white" if 100 * value > middle else ON_PALE
            ax.text(column, row, text, ha="center", va="center", color=color)
            if value == best:
                corner = (column - 0.5, row - 0.5)
                ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=HIGHEST, linewidth=1.8, clip_on=False))
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_yticks(range(len(rows)), rows)
        ax.set_xticks(range(len(columns)), columns)
        ax.tick_params(length=0)
        ax.set_ylabel(axes[0])
        ax.set_xlabel(axes[1])
        ax.spines[:].set_visible(False)

    return Panel(title, draw, height=1.1 + 0.34 * len(rows))


@dataclass(frozen=True)
class Point:
    """A setting and its retention; ``low`` and ``high`` are ``None`` where no interval was published."""

    x: float
    label: str
    value: float
    low: float | None = None
    high: float | None = None


def line(title: str, points: Sequence[Point], x_label: str, color: str, marked: float | None = None) -> Panel:
    """Retention over one numeric parameter, with the band of its intervals; ``marked`` is the preset's own value."""

    def draw(ax: Axes) -> None:
        x = [point.x for point in points]
        if all(point.low is not None for point in points):
            low, high = ([100 * getattr(point, end) for point in points] for end in ("low", "high"))
            ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        ax.plot(x, [100 * point.value for point in points], color=color, marker="o", markersize=3.6, linewidth=1.3)
        if marked is not None:
            ax.axvline(marked, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
            ax.annotate(
                "preset", (marked, 1), xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points",
                color=MUTED, fontsize=6.5, va="top",
            )  # fmt: skip
        ax.set_xlabel(x_label)
        ax.set_ylabel("retention, %")
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.margins(y=0.2)
        ax.grid(axis="y")

    return Panel(title, draw, height=2.6)


def forest(title: str, points: Sequence[Point], color: str) -> Panel:
    """One row a setting: dot, interval, number. For settings without an order."""

    def draw(ax: Axes) -> None:
        for row, point in enumerate(points):
            if point.low is not None and point.high is not None:
                ax.plot([100 * point.low, 100 * point.high], [row, row], color=color, linewidth=1.5, alpha=0.45)
            ax.plot(100 * point.value, row, "o", color=color, markersize=4.5)
            ax.annotate(
                percent(point.value), (1, row), xycoords=("axes fraction", "data"), xytext=(6, 0),
                textcoords="offset points", va="center", annotation_clip=False,
            )  # fmt: skip
        ax.set_yticks(range(len(points)), [point.label for point in points])
        ax.tick_params(axis="y", labelcolor=INK)
        ax.set_ylim(len(points) - 0.5, -0.5)
        furthest = max(100 * (point.value if point.high is None else point.high) for point in points)
        ax.set_xlim(0, 1.05 * furthest or 1)
        ax.set_xlabel("retention, %")
        ax.grid(axis="x")
        ax.spines["left"].set_visible(False)

    return Panel(title, draw, height=1.0 + 0.22 * len(points))


@dataclass(frozen=True)
class Paid:
    """What a trial keeps and what an image takes with it, in ms."""

    name: str
    method: str
    milliseconds: float
    kept: Estimate


def paid_curves(title: str, points: Sequence[Paid]) -> Panel:
    """Retention over time: a line a method through its budgets, named at its slowest point, with intervals."""
    series: dict[str, list[Paid]] = {}
    for point in sorted(points, key=lambda point: point.milliseconds):
        series.setdefault(point.name, []).append(point)

    def draw(ax: Axes) -> None:
        ends = []
        for name, of_name in series.items():
            x = np.array([point.milliseconds for point in of_name])
            y = _percent_curve([point.kept for point in of_name])
            _curve(ax, x, y, of_name[0].method, "")
            ends.append((float(x[-1]), float(y[0, -1]), name, method_style(of_name[0].method).color))
        ax.set_xlabel("milliseconds an image, question and answer")
        ax.set_ylabel("retention, %")
        ax.set_ylim(bottom=0)
        ax.grid(axis="y")
        _label_ends(ax, ends)

    return Panel(title, draw, width=5.0, height=2.9)


@dataclass(frozen=True)
class RacePoint:
    """A trial of a race: what it costs, its retention where it stopped, the rung it reached (from 1)."""

    cost: float
    value: float
    rung: int
    name: str
    front: bool


def race_plane(title: str, points: Sequence[RacePoint], rungs: int, cost: str) -> Panel:
    """Retention against cost: the darker and further right in its group, the longer a trial raced; the front is ringed
    and named."""

    def draw(ax: Axes) -> None:
        lane = {rung: (1 + RACE_DODGE) ** (rung - (rungs + 1) / 2) for rung in range(1, rungs + 1)}
        for rung in range(1, rungs + 1):
            of_rung = [point for point in points if point.rung == rung]
            x, y = [point.cost * lane[rung] for point in of_rung], [100 * point.value for point in of_rung]
            color = SEQUENTIAL(0.25 + 0.75 * rung / rungs)
            ax.plot(
                x, y, "o", color=color, markersize=3.4, markeredgecolor="white", markeredgewidth=0.3, zorder=2 + rung
            )
        ahead = sorted((point for point in points if point.front), key=lambda point: (point.cost, point.value))
        x, y = [point.cost * lane[point.rung] for point in ahead], [100 * point.value for point in ahead]
        ax.step(x, y, where="post", color=HIGHEST, linewidth=1.0, zorder=2)
        ax.plot(x, y, "o", color=HIGHEST, markersize=6.5, markerfacecolor="none", markeredgewidth=1.2, zorder=20)
        ax.set_xscale("log")
        marked: list[float] = []

        for at, _ in Counter(point.cost for point in points).most_common():  # where labels would touch, the fuller one
            if all(abs(math.log(at / other)) > RACE_TICKS for other in marked):
                marked.append(at)
        ax.set_xticks(marked, [f"{at:.3g}" for at in marked])
        ax.minorticks_off()
        ax.set_xlabel(f"{cost} (logarithmic)")
        ax.set_ylabel("retention, %")
        ax.set_ylim(bottom=min(0, min(y, default=0)))
        ax.grid(axis="y")
        _label_ends(ax, [(at, value, point.name, INK) for at, value, point in zip(x, y, ahead, strict=True)])

    return Panel(title, draw, width=5.6, height=3.9)
