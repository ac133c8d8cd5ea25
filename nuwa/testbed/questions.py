"""Questions about a scene, in the task families of the public benchmarks.

Referring expressions: RefCOCO-like (appearance or place), RefCOCO+-like (appearance only), RefCOCOg-like (longer,
with a relation). Visual questions: POPE-like existence, GQA-like colour, count and relation, TextVQA-like reading.
Every generator returns ``None`` where the scene offers no unambiguous question of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from nuwa.testbed.scenes import COLOR_NAMES, SceneObject

Option = TypeVar("Option")

PLACE_MARGIN = 6.0  # pixels by which "on the left" must win
RELATION_MARGIN = 8.0  # pixels by which "left of" must hold, or fail

SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


@dataclass(frozen=True)
class Question:
    """``text`` is the expression of a grounding task and the question of any other."""

    task: str
    text: str
    answer: str | None = None  # None: the answer is ``target``'s box
    target: SceneObject | None = None
    category: str = ""
    evidence: tuple[SceneObject, ...] = ()  # the objects whose looks answer it; training may point at them


@dataclass(frozen=True)
class Description:
    digit: int | None = None
    color: str | None = None

    def __str__(self) -> str:
        noun = "digit" if self.digit is None else str(self.digit)
        return noun if self.color is None else f"{self.color} {noun}"

    def fits(self, item: SceneObject) -> bool:
        return self.digit in (None, item.digit) and self.color in (None, item.color)

    def matches(self, objects: Sequence[SceneObject]) -> list[SceneObject]:
        return [item for item in objects if self.fits(item)]


def _descriptions(item: SceneObject) -> list[Description]:
    return [Description(color=item.color), Description(digit=item.digit), Description(item.digit, item.color)]


def _unique(objects: Sequence[SceneObject], item: SceneObject) -> list[Description]:
    return [description for description in _descriptions(item) if len(description.matches(objects)) == 1]


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _lead(item: SceneObject, other: SceneObject, relation: tuple[int, int]) -> float:
    """Pixels by which ``item`` lies further than ``other`` in the direction of ``relation`` (axis, sign)."""
    axis, sign = relation
    return sign * (item.center[axis] - other.center[axis])


def _place_expression(rng: np.random.Generator, objects: Sequence[SceneObject]) -> tuple[str, SceneObject] | None:
    options = []
    for description in {Description(), *(d for item in objects for d in _descriptions(item)[:2])}:
        group = description.matches(objects)
        if len(group) < 2:
            continue
        for side, direction in SIDES.items():
            first, second = sorted(group, key=lambda item: _lead(item, group[0], direction))[-1:-3:-1]
            if _lead(first, second, direction) >= PLACE_MARGIN:
                options.append((f"{description} on the {side}", first))
    return _pick(rng, sorted(options, key=lambda option: option[0])) if options else None


def _related(objects: Sequence[SceneObject], target: SceneObject, needed: bool) -> list[str]:
    """Expressions ``X left of the Y`` that mean ``target``; ``needed`` keeps those that X alone would not settle."""
    expressions = []
    for description in [Description(), *_descriptions(target)]:
        if (len(description.matches(objects)) > 1) != needed:
            continue
        for anchor in objects:
            if anchor is target:
                continue
            rivals = [item for item in description.matches(objects) if item is not target and item is not anchor]
            for words, relation in RELATIONS.items():
                if _lead(target, anchor, relation) < RELATION_MARGIN:
                    continue
                if all(_lead(rival, anchor, relation) <= -RELATION_MARGIN for rival in rivals):
                    expressions += [f"{description} {words} the {name}" for name in _unique(objects, anchor)]
    return expressions


def _refer(task: str, expression: str, target: SceneObject, category: str) -> Question:
    return Question(task, f"the {expression}", target=target, category=category, evidence=(target,))


def refcoco(rng: np.random.Generator, objects: Sequence[SceneObject]) -> Question | None:
    """Half by appearance, half by place words."""
    if rng.random() < 0.5:
        placed = _place_expression(rng, objects)
        return placed and _refer("refcoco", placed[0], placed[1], "place")
    target = _pick(rng, objects)
    return _refer("refcoco", str(_pick(rng, _unique(objects, target))), target, "appearance")


def refcocoplus(rng: np.random.Generator, objects: Sequence[SceneObject]) -> Question | None:
    target = _pick(rng, objects)
    return _refer("refcocoplus", str(_pick(rng, _unique(objects, target))), target, "appearance")


def refcocog(rng: np.random.Generator, objects: Sequence[SceneObject]) -> Question | None:
    """A third each: long appearance, a relation beside a sufficient description, a relation that is needed."""
    target, kind = _pick(rng, objects), _pick(rng, ("appearance", "described", "relation"))
    if kind == "appearance":
        return _refer("refcocog", f"digit that is {target.color} and looks like a {target.digit}", target, kind)
    options = _related(objects, target, needed=kind == "relation")
    return _refer("refcocog", _pick(rng, options), target, kind) if options else None


def pope(
    rng: np.random.Generator,
    objects: Sequence[SceneObject],
    category: str | None = None,
    popular: Sequence[Description] | None = None,
    answer: str | None = None,
) -> Question | None:
    """Existence of a (colour, digit). Negatives: any absent pair; a frequent absent pair; an absent pair whose colour
    and digit are both present."""
    category = category or _pick(rng, ("random", "adversarial"))
    evidence: tuple[SceneObject, ...] = ()

    if (answer or _pick(rng, ("yes", "no"))) == "yes":
        evidence = (_pick(rng, objects),)
        subject, answer = Description(evidence[0].digit, evidence[0].color), "yes"
    else:
        if category == "adversarial":
            pool = [Description(one.digit, other.color) for one in objects for other in objects]
        elif category == "popular" and popular is not None:
            pool = list(popular)
        else:
            pool = [Description(digit, color) for digit in range(10) for color in COLOR_NAMES]
        pool = [description for description in pool if not description.matches(objects)]
        if not pool:
            return None
        subject, answer = _pick(rng, pool), "no"
    return Question("pope", f"is there a {subject} in this image?", answer, category=category, evidence=evidence)


def gqa(rng: np.random.Generator, objects: Sequence[SceneObject]) -> Question | None:
    """A third each: colour of a digit, count, relation between two objects."""
    kind = _pick(rng, ("color", "count", "relation"))
    if kind == "color":
        item = _pick(rng, objects)
        by_digit = Description(digit=item.digit)
        if len(by_digit.matches(objects)) != 1:
            return None
        return Question("gqa", f"what color is the {by_digit}?", item.color, category=kind, evidence=(item,))
    if kind == "count":
        description = _pick(rng, [Description(), Description(color=_pick(rng, objects).color)])
        counted = tuple(description.matches(objects))
        return Question("gqa", f"how many {description}s are there?", str(len(counted)), None, kind, counted)
    one, other = (objects[i] for i in rng.choice(len(objects), size=2, replace=False))
    words = _pick(rng, tuple(RELATIONS))
    lead = _lead(one, other, RELATIONS[words])

    if abs(lead) < RELATION_MARGIN:
        return None
    first, second = (_pick(rng, _unique(objects, item)) for item in (one, other))
    return Question(
        "gqa", f"is the {first} {words} the {second}?", "yes" if lead > 0 else "no", None, kind, (one, other)
    )


def textvqa(rng: np.random.Generator, objects: Sequence[SceneObject]) -> Question | None:
    """Three in four by colour, one by place."""
    if rng.random() < 0.25:
        placed = _place_expression(rng, objects)
        if placed is None or not placed[0].startswith("digit "):
            return None
        text = f"what {placed[0].replace('digit on', 'digit is on')}?"
        return Question("textvqa", text, str(placed[1].digit), None, "place", (placed[1],))
    item = _pick(rng, objects)
    if len(Description(color=item.color).matches(objects)) != 1:
        return None
    return Question("textvqa", f"what digit is {item.color}?", str(item.digit), None, "color", (item,))


GENERATORS: dict[str, Callable[..., Question | None]] = {
    "refcoco": refcoco,
    "refcocoplus": refcocoplus,
    "refcocog": refcocog,
    "pope": pope,
    "gqa": gqa,
    "textvqa": textvqa,
}


def draw_question(rng: np.random.Generator, objects: Sequence[SceneObject], task: str, **options: Any) -> Question:
    """A question of ``task``; draws again until the scene offers one."""
    for _ in range(200):
        question = GENERATORS[task](rng, objects, **options)
        if question is not None:
            return question
    raise ValueError(f"no unambiguous {task!r} question in 200 draws about {objects}")
