"""Grids of ``params.yaml`` → trials with stable ids.

A trial's id is the digest of what decides its answers: the configured method, the tokens per layer, the position
strategy and, where anything random is involved, the seed. Entries that come to the same trial give one trial.

Where images have layouts of their own (LLaVA-NeXT, Qwen2.5-VL), a trial means another schedule on each of them; there
the budget as it was asked for stands in the id instead of the tokens per layer, and :meth:`Trial.on` is the trial on
one layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nuwa import UNPRUNED
from nuwa.budget import BudgetUnit, budget_on
from nuwa.grid import PatchGrid
from nuwa.layout import InterleavedLayout, View, VisualLayout, images_of, layout_order
from nuwa.methods import LayoutPlan, MethodSpec, Request, specify
from nuwa.plugins import plugin_code
from nuwa.schedule import TokenSchedule, UnreachableBudget, joined
from nuwa.stage1 import Method, get_method
from nuwa.stage2 import SCORERS
from pipelines import axes
from pipelines.settings import GridEntry, SettingsError, SweepSettings


@dataclass(frozen=True)
class Layouts:
    """The layouts of a sweep's images and how many images have each; ``dynamic``: whether they may differ at all.

    ``together``: layouts of several images in one question; ``counts`` has each of the images.
    """

    counts: Mapping[VisualLayout, int]
    dynamic: bool
    together: frozenset[InterleavedLayout] = frozenset()

    @classmethod
    def fixed(cls, grid: PatchGrid) -> Layouts:
        """All images on one grid."""
        return cls({VisualLayout((View(grid),)): 1}, dynamic=False)

    @classmethod
    def of(cls, layouts: Iterable[VisualLayout], dynamic: bool) -> Layouts:
        """From the layout of every image, or of the images that a question shows together."""
        given = list(layouts)
        counts = Counter(image for layout in given for image in images_of(layout))
        together = frozenset(layout for layout in given if isinstance(layout, InterleavedLayout))
        return cls({layout: counts[layout] for layout in sorted(counts, key=layout_order)}, dynamic, together)

    @cached_property
    def typical(self) -> VisualLayout:
        """The layout of the image of median size."""
        layouts = list(self.counts)
        passed = itertools.accumulate(self.counts.values())
        half = sum(self.counts.values()) / 2
        return next(layout for layout, count in zip(layouts, passed, strict=True) if count >= half)

    def mean(self, value: Callable[[VisualLayout], float]) -> float:
        """Mean over images."""
        if len(self.counts) == 1:
            return value(self.typical)
        return sum(count * value(layout) for layout, count in self.counts.items()) / sum(self.counts.values())

    @property
    def grid(self) -> str | None:
        """``12x12`` where every image is one such grid of patches, else null."""
        view, *others = self.typical.views
        return None if self.dynamic or others else f"{view.grid.height}x{view.grid.width}"

    @property
    def tokens(self) -> int:
        """Visual tokens of an image, on average."""
        return round(self.mean(lambda layout: layout.tokens))


@dataclass(frozen=True)
class Trial:
    """One configuration, with what it means on this model: of dynamic layouts, on the typical image.

    ``grids``: names of the grids that asked for it. ``budgets``: every budget that comes to this trial, in
    ``unit``, the first one first.
    """

    spec: MethodSpec
    schedule: TokenSchedule
    parameters: dict[str, Any]  # stage-1 parameters set beside the preset
    grids: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()
    keeps: tuple[int, ...] = ()  # asked of each view; empty: what the schedule says, of the one there is
    unit: BudgetUnit = "tokens"
    dynamic: bool = False
    code: str = ""  # digests of the code it runs and of the versions it runs with
    images: tuple[Trial, ...] = ()  # of a trial on several images in one sequence: the trial on each

    @property
    def answer_id(self) -> str:
        """By what its answers are stored: the trial's id, behind it the digests of code and versions."""
        return f"{self.trial_id}.{self.code}" if self.code else self.trial_id

    def coded(self, code: str) -> Trial:
        """The same trial that runs ``code``; what was computed of it stays."""
        return self._with(code=code)

    def on(self, layout: VisualLayout | None) -> Trial:
        """The trial on images of ``layout``; itself where all images have one."""
        if isinstance(layout, InterleavedLayout):
            return self._together([self.on(image) for image in layout.images])
        if not self.dynamic or layout is None:
            return self
        spec = self.spec
        if spec.budget is not None:
            spec = dataclasses.replace(spec, budget=budget_on(layout, self.budgets[0], self.unit, dynamic=True))
        plan = spec.on(layout, self.schedule.layers)
        return dataclasses.replace(self, spec=plan.spec, schedule=plan.schedule, keeps=plan.keeps, dynamic=False)

    def _together(self, images: Sequence[Trial]) -> Trial:
        """On several images in one sequence: stage 1 keeps of each what the trial keeps there, the cuts act on all."""
        first, schedule = images[0], joined([one.schedule for one in images])
        together = dataclasses.replace(first, schedule=schedule, keeps=(), images=tuple(images))
        # What the images' sums have in common says nothing of the images.
        together.know(
            selection_identity=_digest([one.selection_identity for one in images]),
            trial_id=_digest([one.trial_id for one in images])[:16],
        )
        return together

    def named(self, grids: Iterable[str], budgets: Iterable[float]) -> Trial:
        """The same work under all names and budgets that came to it; what was computed of it stays."""
        return self._with(grids=tuple(grids), budgets=tuple(budgets))

    def know(self, **computed: Any) -> None:
        """Take over what was computed of a trial that is alike in it; there may be very many."""
        self.__dict__.update(computed)

    def _with(self, **changes: Any) -> Trial:
        """Changed in nothing that decides answers."""
        trial = object.__new__(Trial)  # there may be very many
        trial.__dict__.update(self.__dict__, **changes)
        return trial

    @property
    def plan(self) -> LayoutPlan:
        """Of a trial on one layout: what its stage 1 keeps of every view."""
        return LayoutPlan(self.spec, self.keeps or (self.schedule.stage1_keep,), self.schedule)

    @cached_property
    def _asked(self) -> list[Any]:
        """What decides the schedule on every layout."""
        stage2 = self.spec.stage2
        cuts = [stage2.layers_of(self.schedule.layers), repr(stage2.keep)] if stage2 else None
        return [self.budgets[0] if self.budgets else None, self.unit, cuts]

    @cached_property
    def seeded(self) -> bool:
        # Which cuts run on the typical image says nothing of the others: there any of them may.
        cuts = self.spec.cuts(self.schedule) if self.dynamic else self.spec.running_cuts(self.schedule)
        return get_method(self.spec.stage1).seeded or any(cut.scorer.seeded or cut.recycling for cut in cuts)

    @cached_property
    def cuts(self) -> tuple[tuple[int, int], ...]:
        """The schedule's cuts that run."""
        return self.schedule.running(self.spec.recycles)

    @property
    def final_keep(self) -> int:
        """Visual tokens in the last layer."""
        return self.cuts[-1][1] if self.cuts else self.schedule.stage1_keep

    @property
    def first_cut(self) -> int:
        """The layer up to which the trial only needs its trunk."""
        return self.cuts[0][0] if self.cuts else self.schedule.layers

    @cached_property
    def selection_identity(self) -> str:
        """Digest of the stage-1 selection: trials that agree in it share it, whatever their positions."""
        method = get_method(self.spec.stage1)
        seed = self.spec.seed if method.seeded else None
        keep = self._asked if self.dynamic else self.schedule.stage1_keep
        plugin = [code] if (code := plugin_code(method.select)) else []
        return _digest([method.name, method.identity(self.spec.config), keep, seed, *plugin])

    @property
    def trunk(self) -> tuple[str, str]:
        """Trials that agree in it share all layers below their cuts."""
        return self.selection_identity, self.spec.position

    @cached_property
    def trial_id(self) -> str:
        stage2 = self.spec.stage2
        recycling = vars(stage2.recycling) if stage2 and stage2.recycling else None
        if self.dynamic:  # what the typical image keeps says nothing of the others
            position = self.spec.position if self.budgets else None
            cuts = [self._asked, stage2.scorer, recycling, *stage2.identity] if stage2 else None
        else:
            position = self.spec.position if self.final_keep < self.schedule.tokens else None
            cuts = [[*cut, stage2.scorer, recycling, *stage2.identity] for cut in self.cuts] if stage2 else []
        scorers = [SCORERS[name].score for name in stage2.scorer_names] if cuts and stage2 else []
        plugin = [code] if (code := plugin_code(*scorers)) else []
        seed = self.spec.seed if self.seeded else None
        return _digest([self.selection_identity, cuts, position, seed, *plugin])[:16]

    @property
    def label(self) -> str:
        """Short and telling: ``nuwa · 16 · pesp``, then whatever differs from the method's own defaults."""
        spec, usual = self.spec, specify(self.spec.method, preset=self.spec.preset, budget=self.spec.budget)
        parts = [
            spec.method if spec.preset == get_method(spec.stage1).default_preset else f"{spec.method} ({spec.preset})"
        ]
        if spec.budget is not None:
            budgets = sorted(self.budgets or (spec.budget,))
            words = [f"{100 * one:g} %" if self.unit == "share" else f"{one:g}" for one in budgets]
            parts += [" = ".join(words), spec.position]

        if usual.stage2 and not spec.stage2:
            parts.append("no stage 2")
        elif spec.stage2 and usual.stage2 != dataclasses.replace(
            spec.stage2, options=usual.stage2.options if usual.stage2 else None, coordinates=None
        ):
            layers, keeps = zip(*self.schedule.cuts, strict=True)
            cut = f"stage 2 at {', '.join(map(str, layers))} by {spec.stage2.scorer}"
            cut += ", recycling" if spec.stage2.recycling else ""
            parts.append(f"{cut} ({' to '.join(map(str, (self.schedule.stage1_keep, *keeps)))})")

        parts += [f"{name}={_short(value)}" for name, value in sorted(self.parameters.items())]
        if self.seeded and spec.seed:
            parts.append(f"seed {spec.seed}")
        return " · ".join(parts)

    def row(self, layouts: Layouts, costs: Callable[[TokenSchedule], dict[str, Any]]) -> dict[str, Any]:
        """The trial as a row of ``trials.parquet``: :func:`pipelines.axes.row`."""
        return axes.row(self, layouts, costs)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_SORTED = json.JSONEncoder(sort_keys=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(_SORTED.encode(value).encode()).hexdigest()


def _points(entry: GridEntry, budgets: list[float]) -> Iterator[dict[str, Any]]:
    """The product of an entry's axes, as arguments of :meth:`nuwa.methods.Request.of`."""
    swept = entry.axes(budgets)
    for values in itertools.product(*swept.values()):
        point = dict(zip(swept, values, strict=True))
        if point["method"] == UNPRUNED:
            point["budget"] = None
        yield {"stage2": {}, **axes.arguments(point), "without_stage2": point["stage2_layer"] == "off"}


def _parameters(entry: GridEntry) -> list[dict[str, Any]]:
    """The product of an entry's own axes: hyper-parameters by name."""
    own = {name: value if isinstance(value, list) else [value] for name, value in entry.parameters.items()}
    return [dict(zip(own, values, strict=True)) for values in itertools.product(*own.values())]


@contextlib.contextmanager
def no_cycles() -> Iterator[None]:
    """For work that makes very many objects and no cycles, which Python would look for again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_cycles()
def expand(
    sweep: SweepSettings, layouts: Layouts, layers: int, tell: Callable[[str], None] = lambda line: None
) -> list[Trial]:
    """All trials of a sweep, the unpruned one first, each once; raises :class:`SettingsError` for impossible ones.

    ``tell`` gets one line a grid that ``where_reachable`` took trials from: which, and why.
    """
    expansion = _Expansion(layouts, layers, sweep.budget_unit)
    expansion.add(Request.of(UNPRUNED), {}, sweep.grids[0].name)
    left_out: dict[str, list[tuple[str, float, str]]] = {}  # grid → method, budget and why
    for number, entry in enumerate(sweep.grids):
        own = _parameters(entry)
        for arguments in _points(entry, sweep.budgets):
            request: Request | None = None
            for parameters in own:
                try:
                    request = request or Request.of(**arguments)
                    expansion.add(request, parameters, entry.name)
                except UnreachableBudget as error:
                    if not entry.where_reachable:
                        raise SettingsError(
                            f"sweep.grids.{number} ({entry.name}), method {arguments['method']}: {error}; "
                            "give the entry its own budget or set where_reachable: true"
                        ) from None
                    without = arguments["method"], arguments["budget"], str(error)
                    left_out.setdefault(entry.name, []).append(without)
                except (ValueError, TypeError) as error:
                    raise SettingsError(f"sweep.grids.{number} ({entry.name}): {error}") from None

    for name, trials in left_out.items():
        tell(_left_out(name, trials))
    return expansion.named()


@dataclass(frozen=True)
class _Expansion:
    """Trials by id, each once, with every grid and budget that came to it, in the order in which they came.

    There may be very many, so what a trial has in common with one before it is taken from there.
    """

    layouts: Layouts
    layers: int
    unit: BudgetUnit
    trials: dict[str, Trial] = field(default_factory=dict)
    grids: dict[str, dict[str, None]] = field(default_factory=dict)  # of trials that came more than once
    budgets: dict[str, dict[float, None]] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)  # of stage 1, by what was asked
    kin: dict[Any, tuple[LayoutPlan, Trial]] = field(default_factory=dict)  # the first of all with one schedule
    # A configuration, the same read at the budget, and the identity of what it selects.
    selections: dict[Any, tuple[Any, Any, str]] = field(default_factory=dict)

    def add(self, request: Request, parameters: dict[str, Any], grid: str) -> None:
        """The trial of ``request``, whose budget is in the sweep's unit, with hyper-parameters; raises ``ValueError``
        where no layout can have it."""
        trial = self._trial(request.configured(parameters, self.configs), parameters, grid)
        name = trial.trial_id
        known = self.trials.setdefault(name, trial)
        if known is not trial:
            self.grids.setdefault(name, dict.fromkeys(known.grids))[grid] = None
            self.budgets.setdefault(name, dict.fromkeys(known.budgets)).update(dict.fromkeys(trial.budgets))

    def _trial(self, spec: MethodSpec, parameters: dict[str, Any], grid: str) -> Trial:
        """Of one specification; its kin are trials that the same cuts and budget give the same schedule."""
        method, config, own = get_method(spec.stage1), spec.config, () if spec.budget is None else (spec.budget,)
        # Most methods keep what they are asked for; of others the configuration decides the schedule, too.
        deciding = None if method.kept is Method.kept else _SORTED.encode(method.identity(config))
        key = (spec.stage1, spec.budget, spec.stage2, deciding)
        plan, first = self.kin.get(key, (None, None))
        if plan is None:
            plan = self._plan(spec, spec.budget)

        if spec.budget != plan.spec.budget:
            spec = dataclasses.replace(spec, budget=plan.spec.budget)
        dynamic = self.layouts.dynamic
        # Configurations are told by identity: of equal ones 1 may be 1.0, which is another trial.
        selecting = (id(config), spec.stage1, spec.budget, key if dynamic else plan.schedule.stage1_keep, spec.seed)
        _, resolved, selection = self.selections.get(selecting, (None, None, None))
        if resolved is None and not dynamic:  # else every layout reads a table by budget at its own share
            resolved = spec.resolved(self.layouts.typical.tokens).config
        if resolved is not None and resolved is not config:
            spec = dataclasses.replace(spec, config=resolved)

        trial = Trial(spec, plan.schedule, parameters, (grid,), own, plan.keeps, self.unit, dynamic)
        if first is None:
            self.kin[key] = plan, trial
        else:
            trial.know(cuts=first.cuts, seeded=first.seeded)
        if selection is None:
            self.selections[selecting] = config, resolved, trial.selection_identity
        else:
            trial.know(selection_identity=selection)
        return trial

    def _plan(self, spec: MethodSpec, budget: float | None) -> LayoutPlan:
        """On the typical layout; raises :class:`UnreachableBudget` where the budget is out of reach on any."""
        dynamic, plans = self.layouts.dynamic, {}
        for layout in self.layouts.counts:
            there = spec
            if budget is not None:
                there = dataclasses.replace(spec, budget=budget_on(layout, budget, self.unit, dynamic))
            try:
                plans[layout] = there.on(layout, self.layers)
            except UnreachableBudget as error:
                where = f" (budget {budget:g}, an image of {layout.tokens} tokens)" if dynamic else ""
                raise UnreachableBudget(f"{error}{where}") from None
        for sequence in self.layouts.together if dynamic else ():
            try:
                joined([plans[image].schedule for image in sequence.images])
            except ValueError as error:
                raise UnreachableBudget(f"budget {budget:g}: {error}") from None
        return plans[self.layouts.typical]

    def named(self) -> list[Trial]:
        """The trials with all their grids and budgets."""
        return [
            trial.named(self.grids[name], self.budgets[name]) if name in self.grids else trial
            for name, trial in self.trials.items()
        ]


def _left_out(grid: str, without: list[tuple[str, float, str]]) -> str:
    """One line from the method, the budget and the reason of every trial that ``grid`` does without."""
    budgets: dict[str, dict[float, None]] = {}
    for method, budget, _ in without:
        budgets.setdefault(method, {})[budget] = None
    listed = "; ".join(
        f"{method} at {', '.join(f'{one:g}' for one in of_method)}" for method, of_method in budgets.items()
    )
    count = "1 trial" if len(without) == 1 else f"{len(without)} trials"
    return f"grid {grid!r} leaves out {count} that cannot be reached: {listed} (the first: {without[0][2]})"
