"""Grids of ``params.yaml`` → trials with stable ids.

A trial's id is the digest of what decides its answers: the configured method, the tokens per layer, the position
strategy and, where anything random is involved, the seed. Entries that come to the same trial give one trial.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nuwa import UNPRUNED
from nuwa.grid import PatchGrid
from nuwa.methods import MethodSpec, specify
from nuwa.schedule import TokenSchedule, UnreachableBudget
from nuwa.stage1 import get_method
from pipelines.settings import GridEntry, SettingsError, SweepSettings


@dataclass(frozen=True)
class Trial:
    """One configuration, with the schedule it means on this model.

    ``grids``: names of the grids that asked for it. ``budgets``: every budget that comes to this schedule.
    """

    spec: MethodSpec
    schedule: TokenSchedule
    parameters: dict[str, Any]  # stage-1 parameters set beside the preset
    grids: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()

    @cached_property
    def seeded(self) -> bool:
        cuts = self.spec.cuts(self.schedule) if self.cuts else []
        return get_method(self.spec.stage1).seeded or any(cut.scorer.seeded or cut.recycling for cut in cuts)

    @cached_property
    def cuts(self) -> tuple[tuple[int, int], ...]:
        """The schedule's cuts that change anything: those that drop tokens or, where dropped ones are recycled, all."""
        if self.spec.stage2 is not None and self.spec.stage2.recycling is not None:
            return self.schedule.cuts
        before = [self.schedule.stage1_keep, *(keep for _, keep in self.schedule.cuts)]
        return tuple(cut for cut, entering in zip(self.schedule.cuts, before, strict=False) if cut[1] < entering)

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
        return _digest([method.name, method.identity(self.spec.config), self.schedule.stage1_keep, seed])

    @property
    def trunk(self) -> tuple[str, str]:
        """Trials that agree in it share all layers below their cuts."""
        return self.selection_identity, self.spec.position

    @cached_property
    def trial_id(self) -> str:
        recycling = vars(self.spec.stage2.recycling) if self.cuts and self.spec.stage2.recycling else None
        cuts = [[*cut, self.spec.stage2.scorer, recycling] for cut in self.cuts]
        position = self.spec.position if self.final_keep < self.schedule.tokens else None
        return _digest([self.selection_identity, cuts, position, self.spec.seed if self.seeded else None])[:16]

    @property
    def label(self) -> str:
        """Short and telling: ``nuwa · 16 · pesp``, then whatever differs from the method's own defaults."""
        spec, usual = self.spec, specify(self.spec.method, preset=self.spec.preset, budget=self.spec.budget)
        parts = [
            spec.method if spec.preset == get_method(spec.stage1).default_preset else f"{spec.method} ({spec.preset})"
        ]
        if spec.budget is not None:
            parts += [" = ".join(f"{budget:g}" for budget in self.budgets or (spec.budget,)), spec.position]
        if usual.stage2 and not spec.stage2:
            parts.append("no stage 2")
        elif spec.stage2 and spec.stage2 != usual.stage2:
            layers, keeps = zip(*self.schedule.cuts, strict=True)
            cut = f"stage 2 at {', '.join(map(str, layers))} by {spec.stage2.scorer}"
            cut += ", recycling" if spec.stage2.recycling else ""
            parts.append(f"{cut} ({' to '.join(map(str, (self.schedule.stage1_keep, *keeps)))})")
        parts += [f"{name}={_short(value)}" for name, value in sorted(self.parameters.items())]
        if self.seeded and spec.seed:
            parts.append(f"seed {spec.seed}")
        return " · ".join(parts)

    def row(self) -> dict[str, Any]:
        """The trial as a row of ``trials.parquet``.

        ``stage2_layer`` is the first cut's, ``stage2_keep`` what the last one leaves; ``stage2_cuts`` lists all as
        ``layer:keep``.
        """
        spec, schedule = self.spec, self.schedule
        cuts = schedule.cuts
        return {
            "trial_id": self.trial_id,
            "label": self.label,
            "grids": list(self.grids),
            "method": spec.method,
            "preset": spec.preset,
            "position": spec.position,
            "budget": spec.budget,
            "budgets": list(self.budgets),
            "average_tokens": schedule.average_tokens,
            "image_tokens": schedule.tokens,
            "stage1_keep": schedule.stage1_keep,
            "stage2_layer": cuts[0][0] if cuts else None,
            "stage2_keep": cuts[-1][1] if cuts else None,
            "stage2_cuts": " ".join(f"{layer}:{keep}" for layer, keep in cuts) or None,
            "stage2_scorer": spec.stage2.scorer if cuts else None,
            "stage2_recycling": bool(cuts and spec.stage2.recycling),
            "seed": spec.seed,
            "params": json.dumps(self.parameters, sort_keys=True),
        }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _axis(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _specifications(entry: GridEntry, budgets: list[float]) -> Iterator[dict[str, Any]]:
    """The product of an entry's axes, as arguments of :func:`nuwa.methods.specify`."""
    axes = {
        "method": _axis(entry.method),
        "preset": _axis(entry.preset),
        "position": _axis(entry.position),
        "budget": _axis(entry.budget if entry.budget is not None else list(budgets)),
        "stage2_layer": _axis(entry.stage2_layer),
        "stage2_scorer": _axis(entry.stage2_scorer),
        "stage2_ratio": _axis(entry.stage2_ratio),
        "stage2_recycling": _axis(entry.stage2_recycling),
        "seed": _axis(entry.seed),
        **{f"parameters.{name}": _axis(value) for name, value in entry.parameters.items()},
    }
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        cut = {name: point.pop(f"stage2_{name}") for name in ("layer", "scorer", "ratio", "recycling")}
        parameters = {name: point.pop(f"parameters.{name}") for name in entry.parameters}
        yield {
            **point,
            "budget": None if point["method"] == UNPRUNED else point["budget"],
            "without_stage2": cut["layer"] == "off",
            "stage2": {name: value for name, value in cut.items() if value is not None},
            "parameters": parameters,
        }


def expand(sweep: SweepSettings, grid: PatchGrid, layers: int) -> list[Trial]:
    """All trials of a sweep, the unpruned one first, each once; raises :class:`SettingsError` for impossible ones."""
    everything = specify(UNPRUNED)
    trials = {}

    def add(trial: Trial, name: str) -> None:
        known = trials.setdefault(trial.trial_id, trial)
        budget = () if trial.spec.budget is None else (trial.spec.budget,)
        trials[trial.trial_id] = dataclasses.replace(
            known,
            grids=tuple(dict.fromkeys((*known.grids, name))),
            budgets=tuple(sorted({*known.budgets, *budget})),
        )

    add(Trial(everything, everything.schedule(grid, layers), {}), sweep.grids[0].name)
    for number, entry in enumerate(sweep.grids):
        for arguments in _specifications(entry, sweep.budgets):
            try:
                spec = specify(**arguments)
                add(Trial(spec, spec.schedule(grid, layers), arguments["parameters"]), entry.name)
            except UnreachableBudget as error:
                if not entry.where_reachable:
                    raise SettingsError(
                        f"sweep.grids.{number} ({entry.name}), method {arguments['method']}: {error}; "
                        "give the entry its own budget or set where_reachable: true"
                    ) from None
            except (ValueError, TypeError) as error:
                raise SettingsError(f"sweep.grids.{number} ({entry.name}): {error}") from None
    return list(trials.values())
