"""What methods there are: as values for programs, and as the page docs/methods.md.

``python -m nuwa.catalogue`` writes the page to standard output; a test compares it with the file.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from nuwa.methods import RECIPES, preset_values
from nuwa.stage1 import get_method
from nuwa.stage2 import SCORERS

REFERENCES = "references.bib"
STAGES = ("before the language model", "inside the language model", "before and inside the language model")
BLIND = ("none", "random")  # scorers that read nothing of the question


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One method.

    ``stage``: one of ``STAGES``. ``presets``: hyper-parameters of each, by name, the default preset first. ``reads``:
    signals of the vision encoder that stage 1 looks at. ``scorers``: what ranks tokens at the cuts inside the language
    model. ``text_aware``: whether what is kept depends on the question. ``trained``: whether it needs weights of its own.
    ``position``: what ``position: own`` means. ``cite``: keys of docs/references.bib. ``about``: what the code says of it.
    ``module``: where it is defined.
    """

    name: str
    stage: str
    presets: dict[str, dict[str, Any]]
    reads: tuple[str, ...]
    scorers: tuple[str, ...]
    text_aware: bool
    trained: bool
    position: str
    cite: tuple[str, ...]
    about: str
    module: str

    @property
    def parameters(self) -> dict[str, Any]:
        """Hyper-parameters and their values under the default preset."""
        return next(iter(self.presets.values()))


def listings() -> list[Listing]:
    """All registered methods, plugins' among them, in alphabetical order."""
    return [_listing(name) for name in sorted(RECIPES)]


def _listing(name: str) -> Listing:
    recipe = RECIPES[name]
    stage1 = get_method(recipe.stage1)
    default = recipe.presets[0]
    stage2 = recipe.default_stage2(default)
    scorers = () if stage2 is None else stage2.scorer_names
    inside_only = recipe.stage1 == "unpruned"
    reads = () if inside_only else stage1.reads(stage1.configure())
    cited = [*stage1.cite, *(key for scorer in scorers for key in SCORERS[scorer].cite)]

    defined: Callable[..., Any] = stage1.select
    if inside_only and stage2 is not None:
        defined = SCORERS[stage2.scorer].score
    return Listing(
        name=name,
        stage=STAGES[(1 if inside_only else 2) if stage2 is not None else 0],
        presets={preset: preset_values(name, preset) for preset in recipe.presets},
        reads=reads,
        scorers=scorers,
        text_aware="relevance" in reads or any(scorer not in BLIND for scorer in scorers),
        trained=stage1.check is not None,
        position=recipe.position,
        cite=tuple(dict.fromkeys(cited)),
        about=recipe.about or inspect.cleandoc(_module_text(defined)),
        module=defined.__module__,
    )


def _module_text(function: Callable[..., Any]) -> str:
    return sys.modules[function.__module__].__doc__ or function.__doc__ or ""


# The page


def page() -> str:
    """docs/methods.md: every method of this package, then every scorer."""
    own = [one for one in listings() if one.module.startswith("nuwa.")]
    lines = [
        "# Methods",
        "",
        "Made of the code by `python -m nuwa.catalogue`; do not edit. `nuwa.methods()` gives the same as values. Papers are in",
        f"[{REFERENCES}]({REFERENCES}).",
        "",
        "| method | where | needs the question | reads | own position ids | cite |",
        "|---|---|---|---|---|---|",
    ]
    for one in own:
        asks = "yes" if one.text_aware else "no"
        cells = [_link(one.name), one.stage, asks, _codes(one.reads), f"`{one.position}`", _codes(one.cite)]
        lines.append(f"| {' | '.join(cells)} |")
    for one in own:
        lines += ["", f"## {one.name}", "", *_section(one)]
    return "\n".join([*lines, "", *_scorers()]) + "\n"


def _section(one: Listing) -> list[str]:
    lines = [one.about, ""]
    if one.scorers:
        lines += [f"Cuts rank by {_codes(one.scorers)}; see [{one.scorers[0]}](#{one.scorers[0]}).", ""]
    if one.trained:
        lines += ["It needs weights that were trained on the encoder.", ""]
    if not any(one.presets.values()):
        return [*lines, f"No hyper-parameters. Defined in `{one.module}`."]
    lines += [f"| hyper-parameter | {' | '.join(f'`{preset}`' for preset in one.presets)} |"]
    lines += ["|---" * (1 + len(one.presets)) + "|"]
    for name in dict.fromkeys(name for values in one.presets.values() for name in values):
        cells = [_value(values[name]) if name in values else "–" for values in one.presets.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return [*lines, "", f"Defined in `{one.module}`."]


def _scorers() -> list[str]:
    """Stage-2 scorers: a line each, and once what their module says."""
    lines = ["# Stage-2 scorers", "", "Any of them ranks at any method's cuts (`stage2_scorer`)."]
    told: set[str] = set()
    for name, scorer in SCORERS.items():
        module = scorer.score.__module__
        if not module.startswith("nuwa."):
            continue
        lines += ["", f"## {name}", "", inspect.cleandoc(scorer.score.__doc__ or "")]
        if module != "nuwa.stage2.scorers":
            text = inspect.cleandoc(sys.modules[module].__doc__ or "")
            lines += ["", text if module not in told else f"More in `{module}`."]
            told.add(module)
        if scorer.options is not None:
            lines += ["", inspect.cleandoc(type(scorer.options).__doc__ or "")]
            lines += ["", ", ".join(f"`{key}` {_value(value)}" for key, value in scorer.parameters.items())]
    return lines


def _value(value: Any) -> str:
    """A hyper-parameter's value in a table."""
    if value is None:
        return "null"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = {item.name: getattr(value, item.name) for item in fields(value)}
        if {"budgets", "values", "unit"} <= inside.keys():
            pairs = zip(inside["values"], inside["budgets"], strict=True)
            unit = "" if inside["unit"] == "tokens" else " of the tokens"
            return ", ".join(f"{_value(number)} at {budget:g}{unit}" for number, budget in pairs)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _codes(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"


def _link(name: str) -> str:
    return f"[{name}](#{name})"


if __name__ == "__main__":
    sys.stdout.write(page())
