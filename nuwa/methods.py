"""Whole methods: a stage-1 method and the stage 2 its authors put behind it.

A :class:`Recipe` says what a method's name stands for when nothing else is asked: which stage 1, and where, how often,
how hard and by which score stage 2 cuts. Every part is a sweep axis, so any stage 1 combines with any stage 2.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from types import NoneType
from typing import Any, ClassVar, Protocol, TypedDict, Unpack

from nuwa.allowed import check_share
from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout, grid_tokens, place
from nuwa.positions import PositionStrategy, resolve
from nuwa.registry import NameTaken, unknown
from nuwa.schedule import (
    ByBudget,
    Decay,
    GridUnion,
    KeepShares,
    Published,
    TokenSchedule,
    Withdrawal,
    shares,
    solve_schedule,
)
from nuwa.selection import Selection
from nuwa.signals import LAST_SIGNALS, OPTIONAL_SIGNALS, VisionSignals
from nuwa.stage1 import METHODS, Method, get_method
from nuwa.stage1.registry import check_type, field_names, spelled, type_hints
from nuwa.stage2 import Cut, Recycling, Scorer, get_scorer
from nuwa.stage2.coordinates import IvcPrune, with_coordinates
from nuwa.stage2.dart import Dart


@dataclass(frozen=True)
class Stage2:
    """One cut inside the language model, or several.

    ``depths``: each cut's layer as a share of all layers (Nüwa: 16 of 32), used where ``layers`` is null.
    ``keep``: how stage 1 and the cuts share a budget. ``recycling``: what becomes of dropped tokens; null: nothing.
    ``later_scorer``: of all cuts but the first; null: the same. ``options``: the scorer's hyper-parameters; null: its own.
    ``trims``: see :class:`nuwa.stage2.Cut`. ``coordinates``: the share of the tokens at a cut that are kept as implicit
    visual coordinates, for the cosine and again for the sine (:mod:`nuwa.stage2.coordinates`); null: none.
    """

    scorer: str
    depths: tuple[float, ...]
    keep: KeepShares
    layers: tuple[int, ...] | None = None
    recycling: Recycling | None = None
    later_scorer: str | None = None
    options: Any = None
    trims: bool = False
    coordinates: float | None = None

    def scorers(self, cuts: int) -> list[Scorer]:
        """Of each of ``cuts`` cuts, under this configuration."""
        scorer = get_scorer(self.scorer)
        if self.options is not None:
            scorer = replace(scorer, options=self.options)
        later = get_scorer(self.later_scorer) if self.later_scorer else scorer
        scorers = [scorer, *[later] * (cuts - 1)]
        if self.coordinates is not None:
            scorers = [with_coordinates(scorer, self.coordinates) for scorer in scorers]
        return scorers[:cuts]

    @property
    def scorer_names(self) -> tuple[str, ...]:
        """Names of the scorers that cuts ask."""
        return (self.scorer, self.later_scorer) if self.later_scorer else (self.scorer,)

    @property
    def identity(self) -> list[Any]:
        """What decides answers beside layers, numbers, scorer and recycling; empty where nothing more does."""
        parts = {
            "later_scorer": self.later_scorer,
            "options": None if self.options is None else asdict(self.options),
            "trims": self.trims or None,
            "coordinates": self.coordinates,
        }
        given = {name: value for name, value in parts.items() if value is not None}
        return [given] if given else []

    def layers_of(self, layers: int) -> tuple[int, ...]:
        """The layers before which a model of ``layers`` layers is cut."""
        if self.layers is not None:
            return self.layers

        cuts = tuple(max(1, round(depth * layers)) for depth in self.depths)
        if list(cuts) != sorted(set(cuts)) or cuts[-1] >= layers:
            raise ValueError(
                f"{layers} layers are too few for this method's {len(cuts)} cuts: they would fall before layers "
                f"{', '.join(map(str, cuts))}; name {len(cuts)} ascending layers of 1..{layers - 1} in stage2_layer"
            )
        return cuts


@dataclass(frozen=True)
class Recipe:
    """``stage2`` per preset of the stage-1 method, ``""`` for all presets without one of their own.

    ``position``: the ids that the authors' code gives to kept tokens, which ``position: own`` asks for. Code that prunes
    before the language model packs its embeddings anew, so that they are renumbered: VisionZip, PruMerge+, DivPrune,
    VisPruner. For random, uniform, pooling and downsample, which have no such code, the same is stated.

    ``about``: what a method is whose stage 1 keeps everything, for docs/methods.md.

    A trial is identified by the stage 2 and the strategy that came of it, not by the table (:mod:`nuwa.source`).
    """

    stage1: str
    stage2: dict[str, Stage2] = field(default_factory=dict, metadata={"identity": False})
    position: PositionStrategy = field(default="perc", metadata={"identity": False})
    about: str = field(default="", metadata={"identity": False})

    @functools.cached_property
    def only_stage2_presets(self) -> tuple[str, ...]:
        """Presets that stage 1 knows nothing of."""
        known = get_method(self.stage1).presets or {"default": {}}
        return tuple(preset for preset in self.stage2 if preset and preset not in known)

    @functools.cached_property
    def presets(self) -> tuple[str, ...]:
        """All, the default first."""
        return (*(get_method(self.stage1).presets or ("default",)), *self.only_stage2_presets)

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

# SparseVLM's version 2: what its cuts keep at 64, 96, 128 and 192 tokens, averages of what leaves the layers, too.
SPARSEVLM_2_KEEPS = Published(
    tuple(tuple(kept / 576 for kept in row) for row in ((66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118)))
)

RECIPES: dict[str, Recipe] = {
    **{name: Recipe(name) for name in METHODS},
    # VScan: before layer 16 of 32, 96 → 32 of 576 tokens, ranked with the projections of the layer behind the cut; on
    # Qwen2.5-VL before layer 14 of 28, without rotary embedding.
    "vscan": Recipe(
        "vscan",
        {
            **{
                preset: Stage2("attention_last_token_next_layer", (16 / 32,), Decay(1 / 3))
                for preset in ("default", "released")
            },
            "released_qwen": Stage2("attention_last_token_next_layer_without_rope", (14 / 28,), Decay(1 / 3)),
        },
    ),
    "unpruned": Recipe("unpruned", position="pesp"),
    # FastV: all tokens up to layer 2 of 32, then the last prompt token's attention.
    "fastv": Recipe(
        "unpruned",
        {"": Stage2("attention_last_token", (2 / 32,), Decay(None))},
        "pesp",
        about="FastV (ECCV 2024): up to layer 2 of 32 all tokens, then those that the last prompt token attends to most.",
    ),
    # PyramidDrop: after 8, 16 and 24 of 32 layers the same share goes on (published: a half), ranked by the last prompt
    # token's attention with the next layer's projections; renumbered after every cut.
    "pyramiddrop": Recipe(
        "unpruned",
        {"": Stage2("attention_last_token_next_layer", (8 / 32, 16 / 32, 24 / 32), Decay(None))},
        about="PyramidDrop (CVPR 2025): after 8, 16 and 24 of 32 layers the same share goes on, by the attention that the last prompt token would pay with the next layer's projections.",
    ),
    # SparseVLM, version 1, which renumbers (version 2 keeps the original ids): at the end of layers 2, 6 and 15 of 32, counted from 0, ranked by the raters' attention.
    "sparsevlm": Recipe(
        "unpruned",
        {"": Stage2("attention_raters", (3 / 32, 7 / 32, 16 / 32), SPARSEVLM_KEEPS, recycling=Recycling())},
        about="SparseVLM (ICML 2025), version 1: at the end of layers 2, 6 and 15 of 32, counted from 0, by the attention of raters, prompt tokens that have to do with the image. A part of the dropped tokens is clustered and recycled.",
    ),
    # SparseVLM, version 2, at the same layers, without recycling.
    "sparsevlm_v2": Recipe(
        "unpruned",
        {"": Stage2("attention_raters_by_distance", (3 / 32, 7 / 32, 16 / 32), SPARSEVLM_2_KEEPS)},
        "pesp",
        about="SparseVLM, version 2: the same layers, nothing recycled, original ids, attention corrected for distance.",
    ),
    # DART: before layer 2 of 32, 4 image pivots and 4 text pivots.
    "dart": Recipe(
        "unpruned",
        {
            "": Stage2("dart", (2 / 32,), Decay(None)),
            "released": Stage2("dart", (2 / 32,), Decay(None), options=Dart(pivot_order="hash", spread="released")),
        },
        "pesp",
        about="DART (EMNLP 2025): before layer 2 of 32 the tokens that are least like eight pivots.",
    ),
    # FEATHER: before layers 8 and 16 of 32; FastV as its authors ran it, before layer 3.
    "feather": Recipe(
        "unpruned",
        {"": Stage2("feather", (8 / 32, 16 / 32), GridUnion(), later_scorer="attention_last_token_without_rope")},
        "pesp",
        about="FEATHER (ICCV 2025): before layers 8 and 16 of 32, by attention without rotary embedding; at the first cut a regular grid is kept, too.",
    ),
    "fastv_without_rope": Recipe(
        "unpruned",
        {"": Stage2("attention_last_token_without_rope", (3 / 32,), Decay(None))},
        "pesp",
        about="FastV as FEATHER's authors correct it: before layer 3 of 32, by attention without rotary embedding.",
    ),
    # IVC-Prune: before layer 16 of 32 on LLaVA-1.5 and of 28 on Qwen2.5-VL-7B; caches below are cut, too.
    "ivc_prune": Recipe(
        "unpruned",
        {
            "": Stage2("ivc_prune", (16 / 32,), Decay(None), trims=True),
            "released_qwen": Stage2(
                "ivc_prune",
                (16 / 28,),
                Decay(None),
                options=IvcPrune(coordinate_share=0.1, affinity="visual"),
                trims=True,
            ),
        },
        "pesp",
        about="IVC-Prune (ICLR 2026): before layer 16 of 32 (of 28 on Qwen2.5-VL-7B) implicit visual coordinates, seeds and the foreground; caches below the cut are trimmed to the same tokens.",
    ),
    # VTW: all visual tokens are withdrawn; on LLaVA-1.5-7B before layer 15 of 32. A budget decides the layer.
    "vtw": Recipe(
        "unpruned",
        {"": Stage2("none", (), Withdrawal())},
        "pesp",
        about="VTW (AAAI 2025): before one layer all visual tokens are withdrawn; on LLaVA-1.5-7B before layer 15 of 32. A budget is solved to the nearest layer, and the average that comes of it is what is reported. The released search for that layer, by how far answers move, is not here.",
    ),
    # LearnPruner: before layer 12 of 32, K1 : K2 = 3 : 1, by the attention of all text. No code is released: original
    # ids are a stated choice.
    "learnpruner": Recipe("learnpruner", {"": Stage2("attention_all_text", (12 / 32,), Decay(1 / 3))}, "pesp"),
    # Nüwa: before layer 16 of 32, K1 : K2 = 112 : 16; the paper scores by cosine, the released code by attention.
    "nuwa": Recipe(
        "nuwa",
        {
            "released": Stage2("attention_last_token", (1 / 2,), Decay(1 / 7)),
            # The code keeps 290, 582 and 1162 of 2880 tokens; solved from 160, 320 and 640 they are 290, 581 and 1163.
            "released_next": Stage2("attention_last_token", (1 / 2,), Decay(1 / 10)),
            # After layer 14 of 28, counted from 0.
            "released_qwen": Stage2(
                "attention_last_three",
                (15 / 28,),
                Decay(ByBudget((0.25, 0.50, 0.75), (0.42, 0.66, 0.70), "share", "linear")),
            ),
            "paper": Stage2("cosine_mean_text", (1 / 2,), Decay(1 / 7)),
            # Table 10: 9 → 1, 16 → 2 and 32 → 4 % of the tokens. That is an average of 5, 9 and 18 %: 144, 259 and 518 of
            # 2880 tokens, not the 160, 320 and 640 that the paper's text names.
            "paper_next": Stage2(
                "cosine_mean_text",
                (1 / 2,),
                Decay(ByBudget((0.05, 0.09, 0.18), (1 / 9, 2 / 16, 4 / 32), "share", "linear")),
            ),
        },
        "pesp",
    ),
}


# A stage-1 method is a method by itself, whenever it is registered.
METHODS.follow(lambda name: RECIPES.setdefault(name, Recipe(name)))


def register_recipe(name: str, recipe: Recipe) -> Recipe:
    """Make a whole method known as ``name``: a stage 1 and what stands behind it.

    Raises :class:`nuwa.registry.NameTaken` where the name is another method's; a stage 1 of that name may be the
    recipe's own.
    """
    known = RECIPES.get(name)
    if known is not None and known not in (recipe, Recipe(recipe.stage1)):
        raise NameTaken(f"method {name!r} is registered twice; choose another name for the second")
    RECIPES[name] = recipe
    return recipe


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

    def resolved(self, tokens: int) -> MethodSpec:
        """The same on images of ``tokens``: hyper-parameters that are tables by budget become the budget's values."""
        if self.budget is None:
            return self
        kind: type = type(self.config)
        values = {name: getattr(self.config, name) for name in field_names(kind)}
        tables = {name: value for name, value in values.items() if isinstance(value, ByBudget)}
        if not tables:
            return self
        at_budget = {name: table.at(self.budget, tokens) for name, table in tables.items()}
        return replace(self, config=replace(self.config, **at_budget))

    @property
    def reads(self) -> tuple[str, ...]:
        """Signals that stage 1 looks at under this configuration."""
        return get_method(self.stage1).reads(self.config)

    @property
    def further_signals(self) -> tuple[str, ...]:
        """Those of them that an encoder gives only where they are asked for."""
        return tuple(name for name in self.reads if name in OPTIONAL_SIGNALS)

    @property
    def reads_question(self) -> bool:
        """Whether stage 1 keeps other tokens for another question."""
        return "relevance" in self.reads

    def schedule(self, grid: PatchGrid, layers: int) -> TokenSchedule:
        """Tokens per layer on an image of one ``grid``; raises as :meth:`on`."""
        return self.on(VisualLayout((View(grid),)), layers).schedule

    def on(self, layout: VisualLayout, layers: int) -> LayoutPlan:
        """What the method does with images of ``layout``.

        Raises ``UnreachableBudget`` or ``ValueError`` with the range that can be reached.
        """
        solved = self._solved(layout, layers)
        keeps = tuple(shares(layout, solved.stage1_keep))

        kept = get_method(self.stage1).kept
        entering = sum(kept(view.grid, keep, self.config) for view, keep in zip(layout.views, keeps, strict=True))
        entering += layout.tokens - layout.patches
        schedule = replace(solved, stage1_keep=entering, cuts=self._kept(solved, entering))
        return LayoutPlan(self.resolved(layout.tokens), keeps, schedule)

    def _solved(self, layout: VisualLayout, layers: int) -> TokenSchedule:
        """The schedule of the budget, before stage 1 and scorers say what they really keep."""
        if self.budget is None:
            return TokenSchedule(layout.tokens, layers, layout.tokens)
        if self.stage2 is None:
            return _solve_once(self.budget, layout.tokens, layers, (), None)

        stage2, keep = self.stage2, self.stage2.keep
        if isinstance(keep, Withdrawal):
            return keep.schedule(self.budget, layout.tokens, layers, stage2.layers or ())
        if isinstance(keep, GridUnion):
            stride = (stage2.options or get_scorer(stage2.scorer).options).stride
            keep = GridUnion(int(grid_tokens(layout, stride).sum()) / layout.tokens)
        solved = _solve_once(self.budget, layout.tokens, layers, stage2.layers_of(layers), keep)
        return replace(solved, trimmed=True) if stage2.trims else solved

    def _kept(self, solved: TokenSchedule, entering: int) -> tuple[tuple[int, int], ...]:
        """Cuts with what their scorers really keep of what enters them."""
        cuts = []
        scorers = self.stage2.scorers(len(solved.cuts)) if self.stage2 else []
        for (layer, keep), scorer in zip(solved.cuts, scorers, strict=True):
            entering = scorer.kept(entering, min(keep, entering), scorer.options)
            cuts.append((layer, entering))
        return tuple(cuts)

    def cuts(self, schedule: TokenSchedule) -> list[Cut]:
        """The schedule's cuts, as the decoder makes them."""
        if self.stage2 is None:
            return []
        scorers = self.stage2.scorers(len(schedule.cuts))
        return [
            Cut(layer, keep, scorer, self.stage2.recycling, self.stage2.trims)
            for (layer, keep), scorer in zip(schedule.cuts, scorers, strict=True)
        ]

    @property
    def recycles(self) -> bool:
        """Whether tokens that a cut drops are merged into some that go on."""
        return self.stage2 is not None and self.stage2.recycling is not None

    def running_cuts(self, schedule: TokenSchedule) -> list[Cut]:
        """Those of :meth:`cuts` that run: see :meth:`nuwa.schedule.TokenSchedule.running`."""
        running = schedule.running(self.recycles)
        return [cut for cut in self.cuts(schedule) if (cut.layer, cut.keep) in running]


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
        method.select(signals.with_derived(spec.reads), keep, spec.config, spec.seed)
        for signals, keep in zip(views, planned.keeps, strict=True)
    ]
    return place(layout, chosen)


class Encoder(Protocol):
    """What a vision encoder offers, as :class:`nuwa.vlm.Adapter` says it of a model or of a family."""

    encoder: ClassVar[str]
    offers_cls: ClassVar[bool]
    offers_last: ClassVar[bool]
    resizes: ClassVar[bool]
    pairs_text: ClassVar[bool]


def check_encoder(spec: MethodSpec, vlm: Encoder | type[Encoder], text_tower: str | None = None) -> None:
    """Refuse a method whose stage 1 reads what an encoder does not offer; ``text_tower``: the one that is named, where
    ``vlm`` is a family."""
    method = get_method(spec.stage1)
    if method.reads_cls and not vlm.offers_cls:
        without = ", ".join(sorted(name for name, recipe in RECIPES.items() if not get_method(recipe.stage1).reads_cls))
        raise ValueError(
            f"method {spec.method!r} needs the attention of a CLS token, and {vlm.encoder} has none; "
            f"methods that do without: {without}"
        )

    last = [name for name in spec.further_signals if name in LAST_SIGNALS]
    if last and not vlm.offers_last:
        raise ValueError(
            f"method {spec.method!r} reads {' and '.join(last)} under these settings, which a CLIP tower gives and "
            f"{vlm.encoder} does not: read the layer of the features instead (the method's default)"
        )

    if spec.reads_question and not vlm.pairs_text:
        raise ValueError(
            f"method {spec.method!r} reads the relevance of tokens to the question, which takes CLIP's text tower, and "
            f"{vlm.encoder} is no half of a CLIP model: set relevance: none"
        )
    if spec.reads_question and text_tower is None and getattr(vlm, "text_tower", None) is None:
        raise ValueError(
            f"method {spec.method!r} reads the relevance of tokens to the question, which takes CLIP's text tower, and "
            "none is named: name the folder of the encoder's CLIP model as text_tower (model.text_tower in params.yaml), "
            "or set relevance: none"
        )

    if method.reads_images and not vlm.resizes:
        raise ValueError(
            f"method {spec.method!r} makes images smaller before the encoder, and {vlm.encoder} chooses sizes by itself; "
            "it can be asked of LLaVA-1.5"
        )


class Asked(TypedDict, total=False):
    """How a method is asked for, but for its hyper-parameters; what is left out is the method's own.

    ``position``: a strategy of :mod:`nuwa.positions` (``pesp`` where it is left out), ``gap`` (another name of ``pesp``)
    or ``own``, the method's own; what comes of it holds the strategy, so that a name is never a second trial.

    ``stage2`` overrides parts of the recipe. Its keys: ``layer`` (one or several, ascending), ``scorer``, ``ratio`` (the
    share each cut keeps of what enters it) and ``recycling`` (true or false).
    """

    preset: str | None
    position: str
    budget: float | None  # average tokens; null: everything
    stage2: Mapping[str, Any] | None
    without_stage2: bool
    seed: int


def specify(method: str, *, parameters: Mapping[str, Any] | None = None, **asked: Unpack[Asked]) -> MethodSpec:
    """Resolve names, presets and overrides, as they are :class:`Asked`.

    ``parameters``: hyper-parameters of stage 1 and of the scorer, by name, and ``coordinates``, of any method with a
    stage 2: see :class:`Stage2`. Raises ``ValueError`` naming the key, the value and what is allowed, and ``TypeError``
    for a keyword that there is not.
    """
    check_stage2(asked.get("stage2") or {})
    return Request.of(method, **asked).configured(parameters or {})


@dataclass(frozen=True)
class Request:
    """A method as it is asked for, but for its hyper-parameters: all that a grid over these has in common.

    ``preset`` and ``position`` are resolved; ``cut``: the stage 2 before hyper-parameters, null without one.
    """

    method: str
    preset: str
    position: PositionStrategy
    budget: float | None
    cut: Stage2 | None
    without_stage2: bool
    seed: int

    @classmethod
    def of(cls, method: str, **asked: Unpack[Asked]) -> Request:
        """As :func:`specify` resolves it, which says what is raised."""
        for name in asked.keys() - Asked.__annotations__.keys():
            raise TypeError(unknown("keyword", name, Asked.__annotations__))
        if method not in RECIPES:
            raise ValueError(f"method {method!r} is unknown; allowed: {', '.join(sorted(RECIPES))}")

        recipe = RECIPES[method]
        strategy = resolve(asked.get("position", "pesp"), recipe.position)
        preset = asked.get("preset") or get_method(recipe.stage1).default_preset
        if preset not in recipe.presets:
            raise ValueError(f"{method} has no preset {preset!r}; allowed: {', '.join(recipe.presets)}")

        without_stage2, stage2 = asked.get("without_stage2", False), asked.get("stage2")
        cut = None if without_stage2 else recipe.default_stage2(preset)
        if stage2 and not without_stage2:
            hashable = {name: tuple(value) if isinstance(value, list) else value for name, value in stage2.items()}
            cut = _override(cut or Stage2("attention_last_token", (1 / 2,), Decay(1 / 7)), **hashable)
            get_scorer(cut.scorer)
        return cls(method, preset, strategy, asked.get("budget"), cut, without_stage2, asked.get("seed", 0))

    def configured(self, parameters: Mapping[str, Any], known: dict[str, Any] | None = None) -> MethodSpec:
        """The specification with these hyper-parameters; raises ``ValueError`` as :func:`specify`.

        ``known``: configurations of stage 1 that were made before, by what was asked; requests of one grid share it, and
        the configurations with it.
        """
        recipe, cut, parameters = RECIPES[self.method], self.cut, dict(parameters)
        stage1 = get_method(recipe.stage1)
        if (coordinates := parameters.pop("coordinates", None)) is not None:
            cut = _keeping_coordinates(self.method, cut, coordinates)
        own, of_scorer = _parameters(self.method, stage1, cut, parameters)
        if of_scorer and cut is not None:
            usual = get_scorer(cut.scorer).options
            options = replace(cut.options or usual, **of_scorer)
            cut = replace(cut, options=None if options == usual else options)  # the usual spelt out: no other trial

        preset = None if self.preset in recipe.only_stage2_presets else self.preset
        asked = spelled(stage1.name, preset, own) if known is not None else None
        config = known.get(asked) if known is not None and asked is not None else None
        if config is None:
            config = stage1.configure(preset, **own)
            if known is not None and asked is not None:
                known[asked] = config

        _check_prunes(self.method, recipe, self.budget, cut, self.without_stage2)
        return MethodSpec(self.method, self.preset, config, self.position, self.budget, cut, self.seed)


def check_stage2(overrides: Mapping[str, Any]) -> None:
    """Refuse overrides of a stage 2 that :func:`specify` does not know; raises ``ValueError`` naming key and value."""
    _, *known = inspect.signature(_override).parameters
    for key in overrides:
        if key not in known:
            raise ValueError(f"stage2: {unknown('key', key, known)}")

    layer, ratio = overrides.get("layer"), overrides.get("ratio")
    layers = list(layer) if isinstance(layer, (list, tuple)) else [layer]
    if layer not in (None, "off") and not (layers and all(type(one) is int for one in layers)):
        raise ValueError(f"stage2: layer {layer!r} must be a whole number, or several that ascend")
    if overrides.get("scorer") is not None:
        get_scorer(overrides["scorer"])
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, (int, float))):
        raise ValueError(f"stage2: ratio {ratio!r} must be a number")
    if not isinstance(overrides.get("recycling"), (bool, NoneType)):
        raise ValueError(f"stage2: recycling {overrides['recycling']!r} must be true or false")


def _check_prunes(method: str, recipe: Recipe, budget: float | None, cut: Stage2 | None, without_stage2: bool) -> None:
    """Refuse a budget that no stage could meet, and a method that prunes without one; raises ``ValueError``."""
    keeps_all = recipe.stage1 == "unpruned"
    if without_stage2 and keeps_all and budget is not None:
        raise ValueError(f"{method} prunes in stage 2 only; stage2_layer: off would leave nothing of it")
    ratio = getattr(cut.keep, "ratio", None) if cut is not None else None
    if keeps_all and ratio is not None:
        raise ValueError(f"{method} keeps all tokens in stage 1; a stage-2 ratio of {ratio:g} would not: leave it out")

    if method == "unpruned" and budget is not None:
        raise ValueError(f"unpruned takes no budget, not {budget:g}; leave it out")
    if method != "unpruned" and budget is None:
        raise ValueError(f"{method} needs a budget of average tokens")


def preset_values(method: str, preset: str) -> dict[str, Any]:
    """Hyper-parameters of a method's preset by name, stage 1's and those of its stage 2's scorer."""
    recipe = RECIPES[method]
    config = get_method(recipe.stage1).configure(None if preset in recipe.only_stage2_presets else preset)
    stage2 = recipe.default_stage2(preset)
    of_scorer = {} if stage2 is None else stage2.scorers(1)[0].parameters
    return {**of_scorer, **{item.name: getattr(config, item.name) for item in fields(config)}}


def _parameters(
    method: str, stage1: Method, cut: Stage2 | None, parameters: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hyper-parameters of stage 1, and those of the scorer; a name that both have is stage 1's."""
    known = field_names(stage1.config)
    scorer = get_scorer(cut.scorer) if cut is not None else None
    of_scorer = {} if scorer is None else scorer.parameters
    own = {name: value for name, value in parameters.items() if name in known}
    rest = {name: value for name, value in parameters.items() if name not in own}
    options: Any = type(scorer.options) if scorer is not None else None
    for name, value in rest.items():
        if scorer is None or name not in of_scorer:
            names = [*known, *(one for one in of_scorer if one not in known)]
            raise ValueError(f"{method} has no parameter {name!r}; allowed: {', '.join(names) or 'none'}")
        check_type(scorer.name, name, value, type_hints(options)[name])
    return own, rest


def _keeping_coordinates(method: str, cut: Stage2 | None, share: float) -> Stage2:
    """The stage 2 that keeps ``share`` of the tokens as coordinates, for the cosine and again for the sine."""
    if cut is None:
        raise ValueError(f"{method} makes no cut inside the language model that could keep coordinates; leave them out")
    check_share(f"coordinates {share:g}", share)
    return replace(cut, coordinates=share)


@functools.lru_cache(maxsize=4096, typed=True)  # a grid asks for few, many times; 1 and 1.0 are told apart
def _override(
    cut: Stage2,
    layer: int | tuple[int, ...] | None = None,
    scorer: str | None = None,
    ratio: float | None = None,
    recycling: bool | None = None,
) -> Stage2:
    if layer is not None:
        cut = replace(cut, layers=layer if isinstance(layer, tuple) else (layer,))
    if scorer is not None and scorer != cut.scorer:
        keep = Decay(None) if isinstance(cut.keep, (GridUnion, Withdrawal)) else cut.keep
        cut = replace(cut, scorer=scorer, later_scorer=None, options=None, keep=keep)
    if ratio is not None:
        cut = replace(cut, keep=Decay(ratio))
    if recycling is not None:
        cut = replace(cut, recycling=Recycling() if recycling else None)
    return cut


class _Callable(types.ModuleType):
    """``nuwa.methods()`` lists the methods, and ``nuwa.methods.specify`` stays what it is."""

    def __call__(self) -> list[Any]:
        """What methods there are, as :class:`nuwa.catalogue.Listing`."""
        from nuwa.catalogue import listings

        return listings()


sys.modules[__name__].__class__ = _Callable
