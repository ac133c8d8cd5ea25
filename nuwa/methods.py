"""Whole methods: a stage-1 method and the stage 2 its authors put behind it.

A :class:`Recipe` says what a method's name stands for when nothing else is asked: which stage 1, and where, how often,
how hard and by which score stage 2 cuts. Every part is a sweep axis, so any stage 1 combines with any stage 2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout, place
from nuwa.positions import STRATEGIES, PositionStrategy
from nuwa.schedule import Decay, KeepShares, Published, TokenSchedule, shares, solve_schedule
from nuwa.selection import Selection
from nuwa.signals import VisionSignals
from nuwa.stage1 import METHODS, get_method
from nuwa.stage2 import Cut, Recycling, get_scorer


@dataclass(frozen=True)
class Stage2:
    """One cut inside the language model, or several.

    ``depths``: each cut's layer as a share of all layers (Nüwa: 16 of 32), used where ``layers`` is null.
    ``keep``: how stage 1 and the cuts share a budget. ``recycling``: what becomes of dropped tokens; null: nothing.
    """

    scorer: str
    depths: tuple[float, ...]
    keep: KeepShares
    layers: tuple[int, ...] | None = None
    recycling: Recycling | None = None

    def layers_of(self, layers: int) -> tuple[int, ...]:
        """The layers before which a model of ``layers`` layers is cut."""
        if self.layers is not None:
            return self.layers
        found = tuple(max(1, round(depth * layers)) for depth in self.depths)
        if list(found) != sorted(set(found)) or found[-1] >= layers:
            raise ValueError(
                f"{layers} layers are too few for this method's {len(found)} cuts: they would fall before layers "
                f"{', '.join(map(str, found))}; name {len(found)} ascending layers of 1..{layers - 1} in stage2_layer"
            )
        return found


@dataclass(frozen=True)
class Recipe:
    """``stage2`` per preset of the stage-1 method, ``""`` for all presets without one of their own."""

    stage1: str
    stage2: dict[str, Stage2] = field(default_factory=dict)

    def default_stage2(self, preset: str) -> Stage2 | None:
        return self.stage2.get(preset, self.stage2.get(""))


# SparseVLM on LLaVA-1.5's 576 tokens, published as 64, 128 and 192 tokens: selected and recycled after every cut. Those
# are averages of what leaves the layers when the cut layers are counted among the pruned ones.
SPARSEVLM_KEEPS = Published(
    tuple(
        tuple((selected + recycled) / 576 for selected, recycled in row)
        for row in (((66, 16), (30, 2), (17, 1)), ((303, 9), (110, 7), (36, 3)), ((300, 9), (200, 4), (110, 3)))
    )
)

RECIPES: dict[str, Recipe] = {
    **{name: Recipe(name) for name in METHODS},
    # FastV: all tokens up to layer 2 of 32, then the last prompt token's attention.
    "fastv": Recipe("unpruned", {"": Stage2("attention_last_token", (2 / 32,), Decay(None))}),
    # PyramidDrop: after 8, 16 and 24 of 32 layers the same share goes on (published: a half), ranked by the last prompt
    # token's attention with the next layer's projections.
    "pyramiddrop": Recipe(
        "unpruned", {"": Stage2("attention_last_token_next_layer", (8 / 32, 16 / 32, 24 / 32), Decay(None))}
    ),
    # SparseVLM: at the end of layers 2, 6 and 15 of 32, counted from 0, ranked by the raters' attention.
    "sparsevlm": Recipe(
        "unpruned",
        {"": Stage2("attention_raters", (3 / 32, 7 / 32, 16 / 32), SPARSEVLM_KEEPS, recycling=Recycling())},
    ),
    # LearnPruner: before layer 12 of 32, K1 : K2 = 3 : 1, by the attention of all text.
    "learnpruner": Recipe("learnpruner", {"": Stage2("attention_all_text", (12 / 32,), Decay(1 / 3))}),
    # Nüwa: before layer 16 of 32, K1 : K2 = 112 : 16; the paper scores by cosine, the released code by attention.
    "nuwa": Recipe(
        "nuwa",
        {
            "released": Stage2("attention_last_token", (1 / 2,), Decay(1 / 7)),
            "released_next": Stage2("attention_last_token", (1 / 2,), Decay(1 / 10)),  # 290, 582, 1162 of 2880 tokens
            # After layer 14 of 28, counted from 0; published for 25 % of the tokens (0.66 and 0.70 for 50 and 75 %).
            "released_qwen": Stage2("attention_last_three", (15 / 28,), Decay(0.42)),
            "paper": Stage2("cosine_mean_text", (1 / 2,), Decay(1 / 7)),
        },
    ),
}


_solve_once = functools.cache(solve_schedule)  # a grid asks for few different schedules, many times


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
        """Tokens per layer on an image of one ``grid``; raises as :meth:`on`."""
        return self.on(VisualLayout((View(grid),)), layers).schedule

    def on(self, layout: VisualLayout, layers: int) -> LayoutPlan:
        """What the method does with images of ``layout``.

        Raises ``UnreachableBudget`` or ``ValueError`` with the range that can be reached.
        """
        if self.budget is None:
            asked = TokenSchedule(layout.tokens, layers, layout.tokens)
        else:
            at, keep = (self.stage2.layers_of(layers), self.stage2.keep) if self.stage2 else ((), None)
            asked = _solve_once(self.budget, layout.tokens, layers, at, keep)
        keeps = tuple(shares(layout, asked.stage1_keep))
        kept = get_method(self.stage1).kept
        entering = sum(kept(view.grid, keep) for view, keep in zip(layout.views, keeps, strict=True))
        entering += layout.tokens - layout.patches
        cuts = tuple((layer, min(keep, entering)) for layer, keep in asked.cuts)
        return LayoutPlan(self, keeps, replace(asked, stage1_keep=entering, cuts=cuts))

    def cuts(self, schedule: TokenSchedule) -> list[Cut]:
        """The schedule's cuts, as the decoder makes them."""
        scorer = get_scorer(self.stage2.scorer) if self.stage2 else None
        return [Cut(layer, keep, scorer, self.stage2.recycling) for layer, keep in schedule.cuts]


@dataclass(frozen=True)
class LayoutPlan:
    """A method on images of one layout: how many tokens each view is asked to keep, and the schedule that comes of it.

    A pooled grid may keep fewer than it is asked for; the schedule has what is kept.
    """

    spec: MethodSpec
    keeps: tuple[int, ...]
    schedule: TokenSchedule


def select_views(planned: LayoutPlan, layout: VisualLayout, views: Sequence[VisionSignals]) -> Selection:
    """Stage 1 on the signals of every view (:func:`nuwa.vlm.view_signals`), over slots."""
    spec = planned.spec
    method = get_method(spec.stage1)
    chosen = [
        method.select(signals, keep, spec.config, spec.seed) for signals, keep in zip(views, planned.keeps, strict=True)
    ]
    return place(layout, chosen)


class Encoder(Protocol):
    """What a vision encoder offers, as :class:`nuwa.vlm.Adapter` says it of a model or of a family."""

    encoder: str
    offers_cls: bool
    resizes: bool


def check_encoder(spec: MethodSpec, vlm: Encoder | type[Encoder]) -> None:
    """Refuse a method whose stage 1 reads what an encoder does not offer."""
    method = get_method(spec.stage1)
    if method.reads_cls and not vlm.offers_cls:
        without = ", ".join(sorted(name for name, recipe in RECIPES.items() if not get_method(recipe.stage1).reads_cls))
        raise ValueError(
            f"method {spec.method!r} needs the attention of a CLS token, and {vlm.encoder} has none; "
            f"methods that do without: {without}"
        )
    if method.reads_images and not vlm.resizes:
        raise ValueError(
            f"method {spec.method!r} makes images smaller before the encoder, and {vlm.encoder} chooses sizes by itself; "
            "it can be asked of LLaVA-1.5"
        )


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
    """Resolve names, presets and overrides; ``stage2`` overrides parts of the recipe.

    Its keys: ``layer`` (one or several, ascending), ``scorer``, ``ratio`` (the share each cut keeps of what enters it)
    and ``recycling`` (true or false).
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
        cut = _override(cut or Stage2("attention_last_token", (1 / 2,), Decay(1 / 7)), **stage2)
        get_scorer(cut.scorer)
    if without_stage2 and recipe.stage1 == "unpruned" and budget is not None:
        raise ValueError(f"{method} prunes in stage 2 only; stage2_layer: off would leave nothing of it")
    if recipe.stage1 == "unpruned" and cut is not None and isinstance(cut.keep, Decay) and cut.keep.ratio is not None:
        raise ValueError(
            f"{method} keeps all tokens in stage 1; a stage-2 ratio of {cut.keep.ratio:g} would not: leave it out"
        )
    if method == "unpruned" and budget is not None:
        raise ValueError(f"unpruned takes no budget, not {budget:g}; leave it out")
    if method != "unpruned" and budget is None:
        raise ValueError(f"{method} needs a budget of average tokens")
    return MethodSpec(method, preset, config, position, budget, cut, seed)


def _override(
    cut: Stage2,
    layer: int | list[int] | None = None,
    scorer: str | None = None,
    ratio: float | None = None,
    recycling: bool | None = None,
) -> Stage2:
    if layer is not None:
        cut = replace(cut, layers=tuple(layer) if isinstance(layer, (list, tuple)) else (layer,))
    if scorer is not None:
        cut = replace(cut, scorer=scorer)
    if ratio is not None:
        cut = replace(cut, keep=Decay(ratio))
    if recycling is not None:
        cut = replace(cut, recycling=Recycling() if recycling else None)
    return cut
