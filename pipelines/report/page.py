"""The report of a sweep, as one HTML file and as Markdown with pictures.

Jinja2 lays out the text and tables of both, matplotlib draws the charts, Pillow the gallery: all three are dependencies
already. The page loads nothing: style, charts and pictures stand inside it. The same inputs give the same bytes.

    build_report(ReportInputs.load(Path("data")), Path("report"), headline_budget=16)
"""

from __future__ import annotations

import base64
import html
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.dataset as ds

from nuwa.benchmarks import PROTOCOLS
from pipelines.data.datasets import parse_name
from pipelines.files.atomic import atomic_folder
from pipelines.report.ablations import Ablation, ablation
from pipelines.report.browser import questions
from pipelines.report.charts import MOST_SERIES, Panel, draw_panel, in_brief, panels_png, small_multiples
from pipelines.report.efficiency import efficiency_tables, paid_tables, published_efficiency
from pipelines.report.finding import finding, named
from pipelines.report.gallery import gallery
from pipelines.report.groups import group_tables
from pipelines.report.inputs import ReportInputs, UnusableRecord
from pipelines.report.outcomes import FAMILIES, Outcomes
from pipelines.report.pairs import pair_table
from pipelines.report.published import published_model, published_retention, published_scores
from pipelines.report.search import search_section
from pipelines.report.style import FAMILIES as FAMILY_NAMES
from pipelines.report.style import (
    benchmark_name,
    mark_variable,
    method_style,
    plain_number,
    theme,
)
from pipelines.report.tables import budget_table, failure_table, position_table, side_by_side
from pipelines.scores.sampled import FEW_IMAGES

DIRECTORY = Path(__file__).parent
MULTIPLES = 6  # panels side by side in the picture of Markdown
ANSWER = 2  # sentences of the finding on the first screen
GLYPH_WIDTH, GLYPH_LARGEST = 66, 1.2  # pixels; retention at the right end


@dataclass(frozen=True)
class Chart:
    """One figure: its panels as SVG, the PNG's name, and its text."""

    name: str
    svgs: list[tuple[str, bool]]  # (svg, published)
    png: bytes
    alt: str


def build_report(inputs: ReportInputs, output: Path, headline_budget: float) -> None:
    """Write ``index.html``, ``report.md`` and ``figures/*.png`` into ``output``, whole or not at all.

    Args:
        inputs: the record of the run.
        output: a directory, made if it is missing.
        headline_budget: average tokens of the headline table, the finding and the gallery.

    Raises:
        UnusableRecord: the run has no main trial at ``headline_budget``.
    """
    outcomes = Outcomes(inputs)
    if outcomes.main and headline_budget not in outcomes.budgets():
        raise UnusableRecord(
            f"headline_budget {plain_number(headline_budget)} has no trial; set report.headline_budget in params.yaml "
            f"to one of this run's budgets: {', '.join(map(plain_number, outcomes.budgets()))}"
        )
    context = _context(inputs, outcomes, headline_budget)
    environment = _environment()

    with atomic_folder(Path(output)) as fresh:
        (fresh / "figures").mkdir()
        for name, png in _pictures(context):
            (fresh / "figures" / f"{name}.png").write_bytes(png)
        for template, name in (("page.html.j2", "index.html"), ("report.md.j2", "report.md")):
            text = environment.get_template(template).render(context)
            (fresh / name).write_text(text.strip() + "\n", encoding="utf-8", newline="\n")


def _context(inputs: ReportInputs, outcomes: Outcomes, headline_budget: float) -> dict[str, Any]:
    scores = published_scores()
    beside, same_model = published_model(inputs.provenance.get("model path", ""))
    rows, unanchored = published_retention(scores, beside)
    ablations = [ablation(outcomes, grid, scores) for grid in outcomes.ablations]
    search = search_section(inputs.search_of_this_model, outcomes)
    stale_search = inputs.search is not None and inputs.search_of_this_model is None
    answered = named(outcomes, headline_budget)
    paid, paid_panels = paid_tables(outcomes, inputs.profile, inputs.provenance.get("model path", ""), answered)
    cases, told = gallery(inputs, outcomes, headline_budget), finding(outcomes, headline_budget)

    return {
        "model": inputs.provenance.get("model path", "model not named"),
        "about": inputs.about,
        "interim": inputs.interim,
        "asked": _asked(inputs, outcomes),
        "answer": told[:ANSWER],
        "further": told[ANSWER:],
        "brief_has_learned": any(trial.method == "learnpruner" for trial in outcomes.at_budget(headline_budget)),
        "brief": _chart("brief", _brief(outcomes, headline_budget)),
        "facts": _facts(inputs, outcomes),
        "columns": outcomes.columns,
        "families": FAMILY_NAMES,
        "image_tokens": outcomes.unpruned.image_tokens,
        "dynamic": outcomes.dynamic,
        "flops_convention": outcomes.unpruned.flops_convention,
        "headline": budget_table(outcomes, headline_budget),
        "positions": position_table(outcomes, headline_budget),
        "others": [budget_table(outcomes, budget) for budget in outcomes.budgets() if budget != headline_budget],
        "pairs": pair_table(outcomes, headline_budget),
        "groups": group_tables(outcomes, inputs.groups, headline_budget),
        "margin": f"{100 * inputs.margin:g}",
        "few_images": inputs.comparisons["images"].min() < FEW_IMAGES,  # false where nothing was compared
        "curves": _curves(outcomes),
        "most_series": MOST_SERIES,
        "crowded": len({outcomes.name(trial) for trial in outcomes.main}) > MOST_SERIES,
        "no_curves": "no trial has a retention" if outcomes.main else "the first grid of this run has no pruned trial",
        "ablations": [(item, _ablation_chart(item)) for item in ablations],
        "search": search,
        "stale_search": stale_search,
        "plane": _chart("search", search.panels) if search else None,
        "cases": cases,
        "browsed": questions(inputs, outcomes, headline_budget),
        "several_views": any(case.views > 1 for case in cases),
        "beside": side_by_side(outcomes, rows, unanchored, beside.tokens if same_model else None),
        "published_model": beside,
        "paid": paid,
        "paid_chart": _chart("paid", paid_panels),
        "efficiency": efficiency_tables(inputs.profile),
        "published_efficiency": published_efficiency(),
        "failures": failure_table(outcomes, inputs.scores),
        "limits": failure_table(outcomes, inputs.scores, "limit_reached"),
        "provenance": dict(sorted(inputs.provenance.items())),
        "questions": {family: sum(c.n for c in outcomes.columns if c.family == family) for family in FAMILIES},
    }


def _asked(inputs: ReportInputs, outcomes: Outcomes) -> str:
    """The question of the run in a sentence."""
    methods = list(dict.fromkeys(method_style(trial.method).name for trial in outcomes.main))
    budgets = [plain_number(budget) for budget in outcomes.budgets()]
    if not methods:
        return "What do the parameters of a method change in grounding and in visual question answering?"
    what = methods[0] if len(methods) == 1 else f"{len(methods)} ways of choosing them"
    some = f"{', '.join(budgets[:-1])} or {budgets[-1]}" if len(budgets) > 1 else budgets[0]
    return (
        f"What is left of grounding, and what of visual question answering, where a language model goes on with {some} of "
        f"{outcomes.unpruned.image_tokens} visual tokens on average, by {what}? {len(inputs.trials):,} trials were asked the "
        f"same questions."
    )


def _brief(outcomes: Outcomes, budget: float) -> list[Panel]:
    """The first picture: a panel a family that has any retention."""
    told = named(outcomes, budget)
    families = [f for f in FAMILIES if any(outcomes.retention(trial, f) for trial in outcomes.main)]
    return [in_brief(outcomes, family, told, f"{FAMILY_NAMES[family]}: what is left") for family in families]


def _curves(outcomes: Outcomes) -> dict[str, Chart]:
    """Small multiples of each family that has any retention."""
    panels = {family: small_multiples(outcomes, family) for family in FAMILIES}
    charts = {family: _chart(f"retention-{family}", of, columns=MULTIPLES) for family, of in panels.items() if of}
    return {family: chart for family, chart in charts.items() if chart is not None}


def _facts(inputs: ReportInputs, outcomes: Outcomes) -> list[tuple[str, str]]:
    benchmarks = [f"{benchmark_name(column.benchmark)} {column.n:,}" for column in outcomes.columns]
    asked_ids = inputs.predictions.to_table(
        columns=["example_id"], filter=ds.field("trial_id") == outcomes.unpruned.trial_id
    )["example_id"].to_pylist()
    examples = inputs.examples[inputs.examples["example_id"].isin(asked_ids)]
    budgets = ", ".join(plain_number(budget) for budget in outcomes.budgets())
    return [
        ("Images", f"{examples['image'].nunique():,}"),
        ("Questions", f"{len(examples):,}"),
        ("Trials", f"{len(inputs.trials):,}"),
        ("Answers", f"{inputs.predictions.count_rows():,}"),
        ("Budgets", f"{budgets} of {outcomes.unpruned.image_tokens} tokens" if budgets else "none"),
        ("Benchmarks", ", ".join(benchmarks)),
        *_protocols(outcomes),
        *((f"{benchmark_name(name)}: {note}", f"{count:,}") for name, notes in inputs.notes.items()
          for note, count in notes.items()),
    ]  # fmt: skip


def _protocols(outcomes: Outcomes) -> list[tuple[str, str]]:
    """How the benchmarks were asked and scored: each protocol, whose it is and what it calls the headline metrics."""
    metrics: dict[str, list[str]] = {}
    for column in outcomes.columns:
        benchmark = parse_name(column.benchmark)
        called = [f"{benchmark_name(column.benchmark)} {benchmark.metric}"] if benchmark.metric else []
        metrics.setdefault(benchmark.protocol, []).extend(called)
    return [
        (f"Protocol {name}", "; ".join(part for part in (PROTOCOLS[name].source, PROTOCOLS[name].note,
                                                          ", ".join(called)) if part))
        for name, called in metrics.items()
    ]  # fmt: skip


def _chart(name: str, panels: list[Panel], columns: int = 2) -> Chart | None:
    """``columns``: of its picture; the page lays panels out by its width."""
    if not panels:
        return None
    drawn = [draw_panel(panel, f"{name}-{index}") for index, panel in enumerate(panels)]
    for panel, one in zip(panels, drawn, strict=True):
        for label, other in one.overlaps:
            warnings.warn(f"report: in {panel.title!r} the labels {label!r} and {other!r} overlap", stacklevel=2)
    svgs = [(one.svg, panel.published) for one, panel in zip(drawn, panels, strict=True)]
    return Chart(name, svgs, panels_png(drawn, columns), "; ".join(panel.spoken or panel.title for panel in panels))


def _ablation_chart(item: Ablation) -> Chart | None:
    return _chart(f"ablation-{_slug(item.grid)}", item.panels)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _pictures(context: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Every PNG that the Markdown shows: charts, then the gallery's pictures."""
    charts = [
        context["brief"],
        context["paid_chart"],
        *context["curves"].values(),
        context["plane"],
        *(chart for _, chart in context["ablations"]),
    ]
    pictures = [(chart.name, chart.png) for chart in charts if chart is not None]
    for number, case in enumerate(context["cases"], start=1):
        pictures += [(f"case-{number}-{index}", picture.png) for index, picture in enumerate(case.pictures)]
    return pictures


def _environment() -> jinja2.Environment:
    """Everything that comes from data is escaped: by default in HTML, through ``md`` in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DIRECTORY),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = markdown_text
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    environment.filters["benchmark"] = benchmark_name
    environment.filters["mark"] = mark_variable
    environment.globals["theme"] = theme
    environment.globals["glyph"] = glyph_place
    environment.globals["glyph_width"] = GLYPH_WIDTH
    return environment


def glyph_place(retention: float) -> float:
    """Pixels from the left of a cell's little interval drawing."""
    return round(GLYPH_WIDTH * min(max(retention, 0.0), GLYPH_LARGEST) / GLYPH_LARGEST, 1)


def markdown_text(text: str) -> str:
    """Text that Markdown and the HTML inside it leave alone, on one line."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escaped)
