"""The registry of stage-1 methods."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

from nuwa.registry import Registry
from nuwa.selection import Selection
from nuwa.signals import VisionSignals


class Select(Protocol):
    def __call__(self, signals: VisionSignals, keep: int, config: Any, seed: int) -> Selection:
        """Keep ``keep`` of the image's tokens; ``seed`` matters to random methods only."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A stage-1 method: its function, the type of its hyper-parameters and its named presets.

    Fields marked ``identity: False`` decide no answer: they say what a configuration is, and what is refused.

    ``reads``: the signals that ``select`` looks at under a configuration; others may be absent.
    ``kept``: tokens it really keeps of a grid when asked for ``keep`` under a configuration (a pooled grid may be smaller).
    ``seeded``: whether the seed changes its result; trials of an unseeded method differing in seed only are one.
    ``reads_cls``: whether it needs a CLS token's attention and may not read the attention received in its stead.
    ``reads_images``: whether it encodes the images anew (``VisionSignals.resized``).
    ``cite``: keys of docs/references.bib.
    ``check``: of a trained method, raises ``ValueError`` where a configuration's weights do not fit the encoder of that
    fingerprint.
    """

    name: str
    select: Select
    config: type
    seeded: bool = False
    reads_cls: bool = False
    reads_images: bool = False
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, metadata={"identity": False})
    reads: Callable[[Any], tuple[str, ...]] = field(default=lambda config: ("features",), metadata={"identity": False})
    kept: Callable[..., int] = lambda grid, keep, config=None: keep
    check: Callable[[Any, str], None] | None = field(default=None, metadata={"identity": False})
    cite: tuple[str, ...] = field(default=(), metadata={"identity": False})

    @property
    def default_preset(self) -> str:
        return next(iter(self.presets), "default")

    def configure(self, preset: str | None = None, **parameters: Any) -> Any:
        """Hyper-parameters from a preset and overrides; raises ``ValueError`` naming what exists."""
        allowed = field_names(self.config)
        for name in parameters:
            if name not in allowed:
                raise ValueError(f"{self.name} has no parameter {name!r}; allowed: {', '.join(allowed) or 'none'}")
        preset = preset or self.default_preset
        if preset not in (self.presets or {"default": {}}):
            raise ValueError(f"{self.name} has no preset {preset!r}; allowed: {', '.join(self.presets or ['default'])}")
        for name, value in parameters.items():
            check_type(self.name, name, value, type_hints(self.config)[name])
        return self.config(**{**self.presets.get(preset, {}), **parameters})

    def identity(self, config: Any) -> dict[str, Any]:
        """The hyper-parameters that decide results: all but fields marked ``identity: False`` (where a file lies)."""
        kind: type = type(config)
        own = {name: getattr(config, name) for name in _deciding_names(kind)}
        return {
            name: asdict(value)
            if type(value) not in _PLAIN and is_dataclass(value) and not isinstance(value, type)
            else value
            for name, value in own.items()
        }


# What is the same of all configurations of a type is looked up once: a grid asks for very many.
@functools.cache
def field_names(config: type) -> tuple[str, ...]:
    """Hyper-parameters of a type of configurations."""
    return tuple(item.name for item in fields(config))


@functools.cache
def _deciding_names(config: type) -> tuple[str, ...]:
    return tuple(item.name for item in fields(config) if item.metadata.get("identity", True))


_PLAIN = frozenset((bool, int, float, str, NoneType))
type_hints = functools.cache(get_type_hints)  # slow, and asked for every trial of a grid


def spelled(method: str, preset: str | None, parameters: Mapping[str, Any]) -> str | None:
    """What a configuration is asked with, in words that tell 1, 1.0 and True apart; null where a value is not plain."""
    if all(type(value) in _PLAIN for value in parameters.values()):
        return f"{method} {preset} {parameters}"
    return None


def check_type(method: str, name: str, value: Any, hint: Any) -> None:
    """Refuse what Python would quietly take for something else, such as the word "false" for a truth value."""
    if type(value) is hint and hint in _PLAIN:
        return
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is Literal and isinstance(value, str):
            return  # which words are allowed is the method's own to say
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return
        if (kind in (bool, int, str, NoneType) or is_dataclass(kind)) and type(value) is kind:
            return
    plain = [kind for kind in kinds if not is_dataclass(kind)]  # what no file of settings can hold
    allowed = " or ".join(", ".join(get_args(kind)) if get_origin(kind) is Literal else kind.__name__ for kind in plain)
    raise ValueError(f"{method}.{name} {value!r} is of the wrong type; allowed: {allowed}")


METHODS: Registry[Method] = Registry("stage-1 method")


def register(name: str, config: type, **properties: Any) -> Callable[[Callable], Callable]:
    """Decorator that makes ``select`` known as ``name``; ``properties`` are fields of :class:`Method`.

    The first of its ``presets`` is the default. Whoever calls ``select``, by the registry or by its own name, has the budget
    checked.
    """

    def add(select: Callable) -> Callable:
        @functools.wraps(select)
        def within_budget(signals: VisionSignals, keep: int, *rest: Any, **named: Any) -> Selection:
            check_keep(name, keep, signals.grid.tokens)
            return select(signals, keep, *rest, **named)

        within_budget.only_refuses = True  # type: ignore[attr-defined]  # which identities of code read (nuwa.source)
        METHODS.add(name, Method(name=name, select=within_budget, config=config, **properties))
        return within_budget

    return add


def check_keep(method: str, keep: int, tokens: int) -> None:
    """Refuse a budget that an image of ``tokens`` cannot meet; raises ``ValueError``."""
    if not 1 <= keep <= tokens:
        raise ValueError(f"{method} cannot keep {keep} of {tokens} tokens; allowed: 1..{tokens}")


def get_method(name: str) -> Method:
    return METHODS.look_up(name)
