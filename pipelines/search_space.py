"""Points of a swarm search's space → trials on a model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from nuwa.grid import PatchGrid
from nuwa.schedule import UnreachableBudget
from pipelines.grid import Trial
from pipelines.settings import SettingsError, SwarmSettings

GRID = "swarm search"  # the grid its trials belong to


def trial_at(swarm: SwarmSettings, point: Mapping[str, Any], grid: PatchGrid, layers: int) -> Trial:
    """The trial at ``point``, keyed as :attr:`SpaceSettings.axes`; the empty point is the preset.

    Raises ``ValueError`` (``UnreachableBudget`` among them) where the method or the model's layers do not allow it.
    """
    spec = swarm.specify(point)
    parameters = {name.partition(".")[2]: value for name, value in point.items() if name.startswith("parameters.")}
    return Trial(spec, spec.schedule(grid, layers), parameters, (GRID,), (swarm.budget,))


def preset_point(swarm: SwarmSettings, preset: Trial) -> dict[str, Any]:
    """Where the preset lies: its own value on every axis; null where it has none, as of a ratio no ratio decides."""
    cut = preset.spec.stage2
    own = {
        "stage2_layer": preset.schedule.cuts[0][0] if cut else "off",
        "stage2_scorer": cut.scorer if cut else None,
        "stage2_ratio": getattr(cut.keep, "ratio", None) if cut else None,
    }
    return {
        name: own[name] if name in own else getattr(preset.spec.config, name.partition(".")[2])
        for name in swarm.space.axes
    }


def check_space(swarm: SwarmSettings, grid: PatchGrid, layers: int) -> None:
    """Raises :class:`SettingsError` when a layer is not the model's, or a layer and ratio do not reach the budget.

    All layers are tried with both ends of the ratio's range; what lies between is reached where its ends are.
    """
    cut = {name: axis.extremes for name, axis in swarm.space.axes.items() if not name.startswith("parameters.")}
    cut.pop("stage2_scorer", None)
    for values in itertools.product(*cut.values()):
        point = {name: value for name, value in zip(cut, values, strict=True) if value is not None}
        try:
            trial_at(swarm, point, grid, layers)
        except UnreachableBudget as error:
            raise SettingsError(f"search.swarm.budget: {error}") from None
        except ValueError as error:
            raise SettingsError(f"search.swarm.space: {error}") from None
