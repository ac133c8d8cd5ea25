"""The axes of a sweep and the columns of its trials, each defined once.

From ``AXES`` follow the keys of a block of trials in ``params.yaml``, the product that a block means, the arguments of
:func:`nuwa.methods.specify`, labels and docs/params.md's table. From ``COLUMNS`` follow the columns of
``trials.parquet``, the parameters and metrics of a trial's MLflow run, and what the report reads and how it names it.
docs/adding_an_axis.md goes through an example.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import GenericAlias
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from nuwa.budget import budget_tokens
from nuwa.positions import PositionName
from nuwa.schedule import TokenSchedule

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
Budget = Annotated[float, Field(gt=0)]
PARAMETERS = "parameters"  # the key of a block under which a stage-1 method's own axes stand


@dataclass(frozen=True)
class Axis:
    """One key of a block of trials; a list of values is swept.

    ``kind``: the type of one value. ``usual``: what an absent key means. ``argument``: the argument of
    :func:`nuwa.methods.specify` that takes the value; of a dotted one, the part behind the dot is the key of a mapping,
    and null leaves it out. ``meaning``: the line of docs/params.md. ``heading``: what a report calls it.
    """

    name: str
    kind: Any
    usual: Any
    argument: str
    meaning: str
    heading: str

    @property
    def annotation(self) -> Any:
        """What a block may hold under this key."""
        one = self.kind | list[int] if self.name == "stage2_layer" else self.kind  # several layers: as many cuts
        swept = self.kind | GenericAlias(list, one)
        return swept | None if self.usual is None else swept


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis(
            "method", str, ..., "method", "a name of [methods.md](methods.md), or one that a plugin registers", "method"
        ),
        Axis(
            "preset",
            str,
            None,
            "preset",
            "a named set of the method's hyper-parameters; absent: its first. `nuwa`: `released` (default), "
            "`released_next` and `released_qwen` (the authors' code for LLaVA-NeXT and Qwen2.5-VL), `paper` or "
            "`paper_next` (table 10's shares, LLaVA-NeXT)",
            "preset",
        ),
        Axis(
            "position",
            PositionName,
            "pesp",
            "position",
            "`perc` (renumbered), `pesp` (original ids, default; also `gap`), `rpme` (spread over the original range), "
            "or `own`: what the method's authors do, one of these three",
            "position ids",
        ),
        Axis("budget", Budget, None, "budget", "in `sweep.budget_unit`; `sweep.budgets` where absent", "budget"),
        Axis(
            "stage2_layer",
            int | Literal["off"],
            None,
            "stage2.layer",
            "the layer before which stage 2 cuts; `[[2, 4, 6]]` (a list in the list) cuts three times; `off` leaves "
            "stage 2 out; absent: the method's own",
            "stage-2 layer",
        ),
        Axis("stage2_scorer", str, None, "stage2.scorer", "a scorer of [methods.md](methods.md)", "stage-2 scorer"),
        Axis(
            "stage2_ratio",
            float,
            None,
            "stage2.ratio",
            "the share every cut keeps of what enters it: K2 / K1",
            "stage-2 ratio",
        ),
        Axis(
            "stage2_recycling",
            bool,
            None,
            "stage2.recycling",
            "`true`: some of the tokens a cut keeps are aggregated from those it drops; default: on for `sparsevlm`",
            "recycling",
        ),
        Axis("seed", Seed, 0, "seed", "for what is random", "seed"),
    )
}


@functools.cache
def _argument(axis: str) -> tuple[str, str]:
    """The argument that an axis is, and where that is a mapping its key."""
    mapping, _, key = AXES[axis].argument.partition(".")
    return mapping, key


def arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Axis → value, as keyword arguments of :func:`nuwa.methods.specify`; a null below a mapping is left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        mapping, key = _argument(name)
        if not key:
            flat[mapping] = value
        elif value is not None:
            flat.setdefault(mapping, {})[key] = value
    return flat


class TrialLike(Protocol):
    """What a column reads of :class:`pipelines.sweep.trials.Trial`."""

    @property
    def spec(self) -> Any: ...

    @property
    def schedule(self) -> TokenSchedule: ...

    @property
    def budgets(self) -> tuple[float, ...]: ...

    @property
    def unit(self) -> Any: ...

    @property
    def grids(self) -> tuple[str, ...]: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...

    @property
    def trial_id(self) -> str: ...

    @property
    def label(self) -> str: ...

    def on(self, layout: Any) -> TrialLike: ...


@dataclass(frozen=True)
class TrialOnImages:
    """A trial on the images of a sweep, as its row describes it: numbers of tokens and costs are means over images.

    ``costs``: what a schedule costs, by name; numbers that are no floats (the convention in words) are the typical
    image's.
    """

    trial: TrialLike
    layouts: Any
    costs: Callable[[TokenSchedule], dict[str, Any]]

    @functools.cached_property
    def schedules(self) -> dict[Any, TokenSchedule]:
        return {layout: self.trial.on(layout).schedule for layout in self.layouts.counts}

    @functools.cached_property
    def typical_costs(self) -> dict[str, Any]:
        return self.costs(self.trial.schedule)

    @functools.cached_property
    def _costs_there(self) -> dict[Any, dict[str, Any]]:
        return {layout: self.costs(schedule) for layout, schedule in self.schedules.items()}

    def mean(self, value: Callable[[TokenSchedule], float]) -> float:
        return self.layouts.mean(lambda layout: value(self.schedules[layout]))

    def cost(self, name: str) -> Any:
        typical = self.typical_costs[name]
        if not isinstance(typical, float):
            return typical
        return self.layouts.mean(lambda layout: self._costs_there[layout][name])

    @property
    def budgets(self) -> list[float]:
        """In average tokens, whatever their unit."""
        return [budget_tokens(budget, self.trial.unit, self.layouts.tokens) for budget in self.trial.budgets]

    @property
    def cuts(self) -> tuple[tuple[int, int], ...]:
        """Of the typical image."""
        return self.trial.schedule.cuts


Role = Literal["parameter", "metric", "note"]


@dataclass(frozen=True)
class Column:
    """One column of ``trials.parquet``.

    ``value``: null for a cost, which has the name that :func:`nuwa.cost.schedule_costs` gives it. ``role``: whether MLflow
    shows it as a parameter or a metric of the trial's run, or not at all. ``dtype``: pandas', where it does not follow
    from the values. ``heading``: what a report calls it, where it may be a grid's parameter.
    """

    name: str
    value: Callable[[TrialOnImages], Any] | None
    role: Role = "note"
    dtype: str | None = None
    heading: str | None = None


def _spec(name: str) -> Callable[[TrialOnImages], Any]:
    return lambda seen: getattr(seen.trial.spec, name)


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("trial_id", lambda seen: seen.trial.trial_id),
        Column("label", lambda seen: seen.trial.label),
        Column("grids", lambda seen: list(seen.trial.grids)),
        Column("method", _spec("method"), "parameter"),
        Column("preset", _spec("preset"), "parameter"),
        Column("position", _spec("position"), "parameter"),
        Column("budget", lambda seen: seen.budgets[0] if seen.budgets else None, "parameter"),
        Column("budgets", lambda seen: sorted(seen.budgets)),
        Column("average_tokens", lambda seen: seen.mean(lambda schedule: schedule.average_tokens), "metric"),
        Column("image_tokens", lambda seen: seen.layouts.tokens, "parameter", "int32"),
        Column("image_grid", lambda seen: seen.layouts.grid),
        Column(
            "stage1_keep",
            lambda seen: round(seen.mean(lambda schedule: schedule.stage1_keep)),
            "parameter",
            "int32",
            heading="K1",
        ),
        Column("stage2_layer", lambda seen: seen.cuts[0][0] if seen.cuts else None, "parameter", "Int32"),
        Column(
            "stage2_keep",
            lambda seen: round(seen.mean(lambda schedule: schedule.entering[-1])) if seen.cuts else None,
            "parameter",
            "Int32",
        ),
        Column(
            "stage2_cuts",
            lambda seen: " ".join(f"{layer}:{keep}" for layer, keep in seen.cuts) or None,
            "parameter",
        ),
        Column("stage2_scorer", lambda seen: seen.trial.spec.stage2.scorer if seen.cuts else None, "parameter"),
        Column("stage2_recycling", lambda seen: bool(seen.cuts and seen.trial.spec.stage2.recycling), "parameter"),
        Column("seed", _spec("seed"), "parameter", "int32"),
        Column("params", lambda seen: json.dumps(dict(seen.trial.parameters), sort_keys=True)),
        Column("flops", None, "metric"),
        Column("flops_convention", None, "parameter"),
        Column("kv_bytes", None, "metric"),
    )
}


def row(trial: TrialLike, layouts: Any, costs: Callable[[TokenSchedule], dict[str, Any]]) -> dict[str, Any]:
    """The trial as a row of ``trials.parquet``.

    ``stage2_layer`` is the first cut's, ``stage2_keep`` what the last one leaves; ``stage2_cuts`` lists all as
    ``layer:keep``, on the typical image where images differ. Budgets are average tokens, whatever their unit.
    """
    seen = TrialOnImages(trial, layouts, costs)
    described = {name: column.value(seen) for name, column in COLUMNS.items() if column.value is not None}
    return described | {name: seen.cost(name) for name in seen.typical_costs}


def columns_of(role: Role) -> tuple[str, ...]:
    """The columns that MLflow shows in this role, in order."""
    return tuple(name for name, column in COLUMNS.items() if column.role == role)


def heading(name: str) -> str | None:
    """What a report calls an axis or a column; null where it is neither, or has no name of its own."""
    if name in AXES:
        return AXES[name].heading
    return COLUMNS[name].heading if name in COLUMNS else None
