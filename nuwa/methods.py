"""Whole methods: a stage-1 method and the stage 2 its authors put behind it.

A :class:`Recipe` says what a method's name stands for when nothing else is asked: which stage 1, and where, how hard
and by which score stage 2 cuts. Every part is a sweep axis, so any stage 1 combines with any stage 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nuwa.grid import PatchGrid
from nuwa.positions import STRATEGIES, PositionStrategy
from nuwa.schedule import TokenSchedule, solve_schedule
from nuwa.stage1 import METHODS, get_method
from nuwa.stage2 import get_scorer


@dataclass(frozen=True)
class Stage2:
    """One cut inside the language model.

    ``depth``: the cut's layer as a share of all layers (Nüwa: 16 of 32), used where ``layer`` is null.
    ``ratio``: K2 / K1; null keeps all tokens in stage 1, and the budget alone decides K2 (FastV).
    """

    scorer: str
    depth: float
    ratio: float | None
    layer: int | None = None

    def layer_of(self, layers: int) -> int:
        return self.layer if self.layer is not None else max(1, round(self.depth * layers))


@dataclass(frozen=True)
class Recipe:
    """``stage2`` per preset of the stage-1 method, ``""`` for all presets without one of their own."""

    stage1: str
    stage2: dict[str, Stage2] = field(default_factory=dict)

    def default_stage2(self, preset: str) -> Stage2 | None:
        return self.stage2.get(preset, self.stage2.get(""))


RECIPES: dict[str, Recipe] = {
    **{name: Recipe(name) for name in METHODS},
    # FastV: all tokens up to layer 2 of 32, then the last prompt token's attention.
    "fastv": Recipe("unpruned", {"": Stage2("attention_last_token", depth=2 / 32, ratio=None)}),
    # Nüwa: before layer 16 of 32, K1 : K2 = 112 : 16; the paper scores by cosine, the released code by attention.
    "nuwa": Recipe(
        "nuwa",
        {
            "released": Stage2("attention_last_token", depth=1 / 2, ratio=1 / 7),
            "paper": Stage2("cosine_mean_text", depth=1 / 2, ratio=1 / 7),
        },
    ),
}


@dataclass(frozen=True)
class MethodSpec:
    """A method, fully configured but for the model it meets."""

    method: str
    preset: str
    config: Any  # the stage-1 method's hyper-parameters
    position: PositionStrategy
    budget: float | None  # average tokens asked for; null: everything
    stage2: Stage2 | None
    seed: int

    @property
    def stage1(self) -> str:
        return RECIPES[self.method].stage1

    def schedule(self, grid: PatchGrid, layers: int) -> TokenSchedule:
        """Tokens per layer on an image of ``grid``; raises ``UnreachableBudget`` or ``ValueError`` with the range."""
        if self.budget is None:
            return TokenSchedule(grid.tokens, layers, grid.tokens)
        layer = self.stage2.layer_of(layers) if self.stage2 else None
        schedule = solve_schedule(self.budget, grid.tokens, layers, layer, self.stage2.ratio if self.stage2 else None)
        kept = get_method(self.stage1).kept(grid, schedule.stage1_keep)
        cuts = tuple((at, min(keep, kept)) for at, keep in schedule.cuts)
        return replace(schedule, stage1_keep=kept, cuts=cuts)


def specify(
    method: str,
    *,
    preset: str | None = None,
    position: str = "pesp",
    budget: float | None = None,
    stage2: dict[str, Any] | None = None,
    without_stage2: bool = False,
    seed: int = 0,
    parameters: dict[str, Any] | None = None,
) -> MethodSpec:
    """Resolve names, presets and overrides; ``stage2`` overrides ``layer``, ``scorer`` or ``ratio`` of the recipe.

    Raises ``ValueError`` naming the key, the value and what is allowed.
    """
    if method not in RECIPES:
        raise ValueError(f"method {method!r} is unknown; allowed: {', '.join(sorted(RECIPES))}")
    if position not in STRATEGIES:
        raise ValueError(f"position {position!r} is unknown; allowed: {', '.join(STRATEGIES)}")
    recipe = RECIPES[method]
    stage1 = get_method(recipe.stage1)
    preset = preset or stage1.default_preset
    config = stage1.configure(preset, **(parameters or {}))
    cut = None if without_stage2 else recipe.default_stage2(preset)
    if stage2 and not without_stage2:
        cut = replace(cut or Stage2("attention_last_token", depth=1 / 2, ratio=1 / 7), **stage2)
        get_scorer(cut.scorer)
    if without_stage2 and recipe.stage1 == "unpruned" and budget is not None:
        raise ValueError(f"{method} prunes in stage 2 only; stage2_layer: off would leave nothing of it")
    if recipe.stage1 == "unpruned" and cut is not None and cut.ratio is not None:
        raise ValueError(
            f"{method} keeps all tokens in stage 1; a stage-2 ratio of {cut.ratio:g} would not: leave it out"
        )
    if method == "unpruned" and budget is not None:
        raise ValueError(f"unpruned takes no budget, not {budget:g}; leave it out")
    if method != "unpruned" and budget is None:
        raise ValueError(f"{method} needs a budget of average tokens")
    return MethodSpec(method, preset, config, position, budget, cut, seed)
