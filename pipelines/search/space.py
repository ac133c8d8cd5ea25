"""Points of a swarm search's space → trials on a model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nuwa.budget import BudgetUnit, budget_on
from nuwa.schedule import Decay, UnreachableBudget
from pipelines.settings import GridEntry, SettingsError, SwarmSettings, SweepSettings
from pipelines.sweep.trials import Layouts, Trial, expand

GRID = "swarm search"  # the grid its trials belong to


def trial_at(
    swarm: SwarmSettings, point: Mapping[str, Any], sweep: SweepSettings, layouts: Layouts, layers: int
) -> Trial:
    """The trial at ``point``, keyed as :attr:`SpaceSettings.axes`; the empty point is the preset.

    It is the trial a block of the sweep's grids would mean. Raises :class:`SettingsError` where method or layers do not
    allow it.
    """
    parameters = {name.partition(".")[2]: value for name, value in point.items() if name.startswith("parameters.")}
    cut = {name: value for name, value in point.items() if name.startswith("stage2_")}
    usual = swarm.model_dump(include={"method", "preset", "position", "budget"})
    block = GridEntry(name=GRID, **usual, **cut, parameters=parameters)
    return expand(sweep.model_copy(update={"grids": [block]}), layouts, layers)[-1]


def swarm_trials(swarm: SwarmSettings, sweep: SweepSettings, layouts: Layouts, layers: int) -> list[Trial]:
    """The preset, and every end and choice of every axis by itself: what decides which signals are read."""
    axes = swarm.space.axes.items()
    points = [{}, *({name: value} for name, axis in axes if name.startswith("parameters.") for value in axis.extremes)]
    return [trial_at(swarm, point, sweep, layouts, layers) for point in points]


def preset_point(swarm: SwarmSettings, preset: Trial) -> dict[str, Any]:
    """Where the preset lies: its own value on every axis; null where it has none, as of a ratio no ratio decides."""
    cut, tokens = preset.spec.stage2, preset.schedule.tokens
    budget = preset.spec.budget
    decay = cut.keep.at(budget, tokens) if cut and isinstance(cut.keep, Decay) and budget is not None else None
    own = {
        "stage2_layer": preset.schedule.cuts[0][0] if cut else "off",
        "stage2_scorer": cut.scorer if cut else None,
        "stage2_ratio": decay.ratio if decay else None,
    }
    config = preset.spec.resolved(tokens).config
    return {name: own[name] if name in own else getattr(config, name.partition(".")[2]) for name in swarm.space.axes}


def check_space(swarm: SwarmSettings, unit: BudgetUnit, layouts: Layouts, layers: int) -> None:
    """Raises :class:`SettingsError` when a layer is not the model's, or a layer and ratio do not reach the budget.

    All layers are tried with both ends of the ratio's range; what lies between is reached where its ends are.
    """
    axes = swarm.space.axes
    cut = {name: axes[name].extremes for name in ("stage2_layer", "stage2_ratio") if name in axes}
    for values in itertools.product(*cut.values()):
        spec = swarm.specify(dict(zip(cut, values, strict=True)))
        for layout in layouts.counts:
            budget = budget_on(layout, swarm.budget, unit, layouts.dynamic)
            try:
                replace(spec, budget=budget).on(layout, layers)
            except UnreachableBudget as error:
                raise SettingsError(f"search.swarm.budget: {error}") from None
            except ValueError as error:
                raise SettingsError(f"search.swarm.space: {error}") from None
