"""The one place where the benchmark touches the decoder: prepared images and prompts to answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nuwa.decoder import Answer, Trunk
from nuwa.layout import VisualLayout
from nuwa.methods import LayoutPlan
from nuwa.selection import Selection
from nuwa.vlm import Adapter, EncodedPrompt

Prompts = Sequence[Sequence[EncodedPrompt]]  # those of each image


@torch.inference_mode()
def open_trunk(
    vlm: Adapter,
    planned: LayoutPlan,
    selection: Selection,
    prompts: Prompts,
    names: Sequence[str],
    layout: VisualLayout,
) -> Trunk:
    """What all questions about images of one ``layout`` share under one selection and position strategy."""
    return Trunk(vlm, selection, prompts, planned.spec.position, names, layout)


@torch.inference_mode()
def answer_from(trunk: Trunk, planned: LayoutPlan, limits: Sequence[int]) -> list[Answer]:
    """Prefill of the layers that are left, stage 2 among them, and up to ``limits`` tokens of every answer.

    Plans that share a trunk must come by rising first cut, those without a cut last.
    """
    cuts = planned.spec.cuts(planned.schedule)
    if not cuts:
        return trunk.finish(limits)
    trunk.advance(cuts[0].layer, frozenset({cuts[0].layer - 1}))
    return trunk.fork(cuts, limits, planned.spec.seed)


def answer_tree(
    vlm: Adapter,
    plans: Mapping[str, LayoutPlan],
    choose: Callable[[LayoutPlan], Selection],
    prompts: Prompts,
    names: Sequence[str],
    layout: VisualLayout,
    limits: Sequence[int],
) -> dict[str, list[Answer]]:
    """Answers of several methods, each selection made and each trunk passed once for all that share it."""
    answers: dict[str, list[Answer]] = {}
    for members in _trunks(plans):
        first = plans[members[0]]
        trunk = open_trunk(vlm, first, choose(first), prompts, names, layout)
        for name in members:
            answers[name] = answer_from(trunk, plans[name], limits)
    return {name: answers[name] for name in plans}


def _trunks(plans: Mapping[str, LayoutPlan]) -> Iterator[list[str]]:
    """Names of the plans that share a trunk, by rising first cut, those without a cut last."""
    groups: dict[Any, list[str]] = {}
    for name, planned in plans.items():
        spec = planned.spec
        key = (spec.stage1, spec.config, planned.keeps, spec.seed, spec.position)
        groups.setdefault(key, []).append(name)
    for members in groups.values():
        yield sorted(members, key=lambda name: [*(cut[0] for cut in plans[name].schedule.cuts), float("inf")][0])


def held_tensors(value: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an object of this project holds, however deep, with the way to it; modules are left out."""
    seen: set[int] = set()
    waiting = [(where, value)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, Tensor):
            yield where, value
            continue
        if id(value) in seen or isinstance(value, torch.nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            waiting += [(f"{where}[{name}]", part) for name, part in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += [(f"{where}[{number}]", part) for number, part in enumerate(value)]
        elif type(value).__module__.startswith("nuwa"):
            names = [*getattr(value, "__dict__", {}), *getattr(value, "__slots__", ())]
            waiting += [(f"{where}.{name}", getattr(value, name, None)) for name in names]
