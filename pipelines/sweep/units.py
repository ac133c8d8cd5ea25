"""Trials → the tree of work they share → work units, and what all of it costs.

The tree, from the root: an image's features; the stage-1 selection (method, hyper-parameters, K1); the *trunk*, one for
each position strategy: system tokens, kept visual tokens and all questions, up to the deepest first cut; and one
*branch* a trial: its cut, the layers above it and decoding. A unit takes a set of trials, neighbours in the tree, on a
set of examples, and runs them depth first, so that one trunk is held at a time.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from nuwa.layout import VisualLayout, layout_order
from pipelines.data.datasets import image_line
from pipelines.settings import Reuse
from pipelines.sweep.costs import Costs, trunk_depth
from pipelines.sweep.results import reuse_key, unit_name
from pipelines.sweep.tree import work_tree
from pipelines.sweep.trials import Trial, no_cycles

UNIT_SECONDS = 10.0
Member = tuple[str, str]  # kind and name of a trial, an example or an image


class UnitExample(NamedTuple):
    """One question as a worker needs it. ``digest`` names all that decides its answers beside the trial.

    ``block``: digest of the questions it must be answered together with; empty where the composition of a batch decides
    nothing.
    """

    digest: str
    example_id: str
    image: str
    prompt: str
    max_new_tokens: int
    block: str = ""


Row = tuple[str, str, str, int]  # example id, image, prompt, answer limit


def read_examples(
    table: pd.DataFrame,
    context: str,
    layouts: Mapping[str, VisualLayout] | None = None,
    blocks: Blocks | None = None,
) -> list[UnitExample]:
    """The rows of ``table``, those of an image together and images of one layout side by side.

    ``context``: digest of model and features. ``blocks``, where the composition of a batch decides answers: then those
    of a block stand together, and an example's digest holds its block.
    """
    columns = [table[name].tolist() for name in ("example_id", "image", "prompt", "max_new_tokens")]
    orders = {image: layout_order(layout) for image, layout in (layouts or {}).items()}
    rows = sorted(zip(*columns, strict=True), key=lambda row: (orders.get(row[1], ()), row[1], row[0]))
    if blocks is None:
        return [UnitExample(_digest([context, *row]), *row) for row in rows]

    benchmarks = dict(zip(columns[0], table["benchmark"], strict=True))
    return [
        UnitExample(_digest([context, *row, block]), *row, block)
        for block, together in blocks.of(rows, benchmarks, orders)
        for row in together
    ]


@dataclass(frozen=True)
class Blocks:
    """How half precision cuts questions: ``images`` of one benchmark and one layout, in the order of ``seed``.

    In float16 and bfloat16 the shape of a batch moves the last bits of a product, and with them now and then an answer.
    So what is answered together there follows from settings and data alone. Images are taken in the order in which
    ``sweep.images`` takes them: whole blocks stay what they are when it grows, and the last of a layout is another one.
    """

    images: int
    seed: int

    def of(
        self, rows: Sequence[Row], benchmarks: Mapping[str, str], orders: Mapping[str, Any]
    ) -> Iterator[tuple[str, list[Row]]]:
        """Each block's digest and its rows; ``rows`` stand image by image, ``orders``: of every image's layout."""
        by_benchmark: dict[str, dict[str, list[Row]]] = {}
        for row in rows:
            by_benchmark.setdefault(benchmarks[row[0]], {}).setdefault(row[1], []).append(row)

        for name in sorted(by_benchmark):
            lines: dict[Any, list[str]] = {}  # by layout
            for image in image_line(by_benchmark[name], self.seed):
                lines.setdefault(orders.get(image, ()), []).append(image)
            for order in sorted(lines):
                line = lines[order]
                for start in range(0, len(line), self.images):
                    run = sorted(line[start : start + self.images])
                    together = [row for image in run for row in by_benchmark[name][image]]
                    yield _digest([name, *together]), together


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class WorkUnit:
    """``trials`` on ``examples``, every one on every one; both in the tree's order."""

    trials: tuple[Trial, ...]
    examples: tuple[UnitExample, ...]
    flops: float = 0.0

    @cached_property
    def unit_id(self) -> str:
        return unit_name([trial.answer_id for trial in self.trials], [example.digest for example in self.examples])

    @cached_property
    def images(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(example.image for example in self.examples))

    @property
    def home(self) -> str:
        """Units of one home read the same features; a worker that has them is given more of them."""
        return self.images[0]

    def only(self, trials: Sequence[Trial] | None = None, examples: Sequence[UnitExample] | None = None) -> WorkUnit:
        trials, examples = tuple(trials or self.trials), tuple(examples or self.examples)
        share = len(trials) * len(examples) / (len(self.trials) * len(self.examples))
        return WorkUnit(trials, examples, self.flops * share)

    @property
    def block(self) -> str:
        """Where it is a block that must stay whole: its digest."""
        return self.examples[0].block

    @property
    def members(self) -> Iterator[Member]:
        """What it consists of, in the words of the run's policy."""
        yield from (("trial", trial.trial_id) for trial in self.trials)
        if self.block:
            yield "block", self.block
            return
        yield from (("example", example.example_id) for example in self.examples)
        yield from (("image", image) for image in self.images)

    @property
    def suspects(self) -> dict[Member, str]:
        """Of one answer, or one trial's block, that cannot be made: what it may be due to → what that was tried with."""
        if self.block and len(self.trials) == 1:
            (trial,) = self.trials
            return {("trial", trial.trial_id): self.block, ("block", self.block): trial.trial_id}
        if len(self.trials) > 1 or len(self.examples) > 1:
            return {}
        ((trial,), (example,)) = self.trials, self.examples
        return {
            ("trial", trial.trial_id): example.image,
            ("example", example.example_id): trial.trial_id,
            ("image", example.image): example.example_id,
        }

    def without(self, members: Container[Member]) -> tuple[WorkUnit | None, list[WorkUnit]]:
        """The unit less these trials, examples and images (null: nothing is left), and what was taken out of it."""
        if self.block:
            whole = [("block", self.block), *(("example", example.example_id) for example in self.examples)]
            if any(member in members for member in (*whole, *(("image", image) for image in self.images))):
                return None, [self]

        trials = [trial for trial in self.trials if ("trial", trial.trial_id) not in members]
        examples = [
            example
            for example in self.examples
            if ("example", example.example_id) not in members and ("image", example.image) not in members
        ]

        taken = []
        if len(trials) < len(self.trials):
            taken.append(self.only([trial for trial in self.trials if trial not in trials]))
        if trials and len(examples) < len(self.examples):
            taken.append(self.only(trials, [example for example in self.examples if example not in examples]))
        if not taken:
            return self, []
        return (self.only(trials, examples) if trials and examples else None), taken

    def split(self) -> dict[str, WorkUnit]:
        """Two halves: of the images, else of one image's questions, else of the trials; of a block, of the trials.

        Nothing can halve one answer, nor one trial's block: what fits in memory follows from ``sweep.unit_images``.
        """
        if len(self.images) > 1 and not self.block:
            first = set(self.images[: len(self.images) // 2])
            cut = sum(example.image in first for example in self.examples)
            halves = [self.only(examples=self.examples[:cut]), self.only(examples=self.examples[cut:])]
        elif len(self.examples) > 1 and not self.block:
            cut = len(self.examples) // 2
            halves = [self.only(examples=self.examples[:cut]), self.only(examples=self.examples[cut:])]
        elif len(self.trials) > 1:
            cut = len(self.trials) // 2
            halves = [self.only(self.trials[:cut]), self.only(self.trials[cut:])]
        else:
            return {}
        return {half.unit_id: half for half in halves}


@no_cycles()
def plan_units(
    trials: Sequence[Trial],
    examples: Sequence[UnitExample],
    done: Iterable[tuple[Sequence[str], Sequence[str]]],
    costs: Sequence[Costs],
    speed: float,
    unit_images: int,
    *,
    unit_seconds: float = UNIT_SECONDS,
    reuse: Reuse = "any",
) -> tuple[dict[str, WorkUnit], int]:
    """Units for every answer that is missing, and how many answers are there already.

    ``done``: answer ids and example digests of every stored unit, of which it holds the whole product. ``examples``
    stand image by image. A unit takes trials along the tree until ``speed`` (FLOP/s) forecasts ``unit_seconds``, on at
    most ``unit_images`` images, and on fewer where one trial alone takes longer; a block of examples is one unit's,
    whole, and is asked again where any of it is missing.
    """
    there = answers_there(trials, examples, done, reuse)
    trunks = [trunk for positions in work_tree(trials).values() for trunk in positions.values()]
    steps = _steps(trunks, costs, speed, there, (1 << len(examples)) - 1)
    dearest = max((step.seconds for step in steps), default=0.0)

    units: dict[str, WorkUnit] = {}
    start = 0
    for batch in _batches(examples, unit_images, unit_seconds, dearest):
        everything = (1 << len(batch)) - 1
        filling = _BatchUnits(batch, unit_seconds, speed)

        for step in steps:
            missing = everything & ~(step.present >> start)
            if not missing:
                continue
            if batch[0].block:  # asked whole: what is there of it will be made again
                name = step.trial.trial_id
                missing, there[name] = everything, there.get(name, 0) & ~(everything << start)
            filling.add(step, missing)

        units.update((unit.unit_id, unit) for unit in filling.closed())
        start += len(batch)

    return units, sum(present.bit_count() for present in there.values())


def answers_there(
    trials: Sequence[Trial],
    examples: Sequence[UnitExample],
    done: Iterable[tuple[Sequence[str], Sequence[str]]],
    reuse: Reuse,
) -> dict[str, int]:
    """Trial id → its answers that are stored, as the bits of a number, one an example: they compare and combine at
    once, for very many trials."""
    number = {example.digest: place for place, example in enumerate(examples)}
    known = {reuse_key(trial.answer_id, reuse): trial.trial_id for trial in trials}

    # Many units hold the same trials, and many the same examples.
    asked_of = functools.cache(lambda ids: [known[key] for one in ids if (key := reuse_key(one, reuse)) in known])
    answered = functools.cache(
        lambda digests: bits([number[digest] for digest in digests if digest in number], len(examples))
    )
    together: dict[tuple[str, ...], int] = {}
    for answer_ids, digests in done:
        ids = tuple(answer_ids)
        if asked_of(ids):
            together[ids] = together.get(ids, 0) | answered(tuple(digests))

    there: dict[str, int] = {}
    for ids, present in together.items():
        for trial_id in asked_of(ids):
            there[trial_id] = there.get(trial_id, 0) | present
    return there


@dataclass
class _OpenUnit:
    trials: list[Trial] = field(default_factory=list)
    trunk: int | None = None
    seconds: float = 0.0  # an example


class _BatchUnits:
    """Units on a batch of examples, filled with trials along the tree; trials that lack the same examples share one."""

    def __init__(self, batch: Sequence[UnitExample], unit_seconds: float, speed: float) -> None:
        self._unit_seconds, self._speed = unit_seconds, speed
        self._chosen = functools.cache(functools.partial(_chosen, batch))  # few patterns, many units
        self._open: dict[int, _OpenUnit] = {}  # by the pattern of missing examples
        self._closed: list[WorkUnit] = []

    def add(self, step: _Step, missing: int) -> None:
        begun = self._open.get(missing)
        if begun is None:
            begun = self._open[missing] = _OpenUnit()
        if begun.trunk != step.trunk:
            begun.trunk = step.trunk
            begun.seconds += step.trunk_seconds
        begun.trials.append(step.trial)
        begun.seconds += step.seconds
        if begun.seconds * missing.bit_count() >= self._unit_seconds:
            self._close(missing)

    def _close(self, missing: int) -> None:
        begun, examples = self._open.pop(missing), self._chosen(missing)
        flops = begun.seconds * len(examples) * self._speed
        self._closed.append(WorkUnit(tuple(begun.trials), examples, flops))

    def closed(self) -> list[WorkUnit]:
        for missing in list(self._open):
            self._close(missing)
        return self._closed


def _chosen(batch: Sequence[UnitExample], pattern: int) -> tuple[UnitExample, ...]:
    """The examples whose bits are set."""
    return tuple(example for place, example in enumerate(batch) if pattern >> place & 1)


def bits(places: Sequence[int], size: int) -> int:
    """The number whose bits at ``places`` are set, of ``size``: sets of examples that combine at once."""
    flags = np.zeros(size, dtype=bool)
    flags[list(places)] = True
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


class _Step(NamedTuple):
    """A trial that lacks answers, in the tree's order.

    ``present``: the examples it has answers of, as bits. ``trunk``: which one in the tree. ``seconds``: an example takes
    on its branch, on average, and ``trunk_seconds`` on its trunk.
    """

    trial: Trial
    present: int
    trunk: int
    seconds: float
    trunk_seconds: float


def _steps(
    trunks: Sequence[Sequence[Trial]], costs: Sequence[Costs], speed: float, there: Mapping[str, int], everything: int
) -> list[_Step]:
    """Every trial that lacks any of the examples ``everything`` stands for."""
    each = speed * max(sum(part.load.questions for part in costs), 1)
    steps = []
    for number, trunk in enumerate(trunks):
        lacking = [(trial, there.get(trial.trial_id, 0)) for trial in trunk]
        lacking = [(trial, present) for trial, present in lacking if present != everything]
        if not lacking:
            continue

        deepest = [(part, trunk[-1].on(part.layout)) for part in costs]  # a trunk's last trial reaches deepest
        flops = sum(
            part.trunk(trial.schedule.stage1_keep, trunk_depth([trial]), trial.spec.reads_question)
            for part, trial in deepest
        )
        for trial, present in lacking:
            seconds = sum(part.branch(trial.on(part.layout)) for part in costs) / each
            steps.append(_Step(trial, present, number, seconds, flops / each))
    return steps


def _batches(
    examples: Sequence[UnitExample], most_images: int, unit_seconds: float, dearest: float
) -> Iterable[Sequence[UnitExample]]:
    """Consecutive examples of at most ``most_images`` images, fewer where the dearest trial fills a unit with less;
    blocks as they are."""
    if examples and examples[0].block:
        yield from (list(block) for _, block in itertools.groupby(examples, key=lambda example: example.block))
        return
    images: list[list[UnitExample]] = []
    for example in examples:
        if not images or images[-1][0].image != example.image:
            images.append([])
        images[-1].append(example)
    each = dearest * len(examples) / max(len(images), 1)
    count = max(1, min(most_images, int(unit_seconds / each))) if each else most_images
    for start in range(0, len(images), count):
        yield [example for of_image in images[start : start + count] for example in of_image]
