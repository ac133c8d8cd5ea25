"""Trials → the tree of work they share → work units, and what all of it costs.

The tree, from the root: an image's features; the stage-1 selection (method, hyper-parameters, K1); the *trunk*, one for
each position strategy: system tokens, kept visual tokens and all questions, up to the deepest first cut; and one
*branch* a trial: its cut, the layers above it and decoding. A unit takes a set of trials, neighbours in the tree, on a
set of examples, and runs them depth first, so that one trunk is held at a time.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from nuwa.cost import LlmShape
from nuwa.decoder import share_beginnings
from nuwa.layout import VisualLayout, layout_order
from nuwa.vlm import Adapter
from pipelines.features import layouts_of
from pipelines.grid import Trial, no_cycles
from pipelines.results import unit_name

UNIT_SECONDS = 10.0
TYPICAL_ANSWERS = {"grounding": "[0.12, 0.34, 0.56, 0.78]", "vqa": "yes"}  # their length forecasts decoding
SPEEDS = {"cpu": 3e10, "cuda": 5e13}  # FLOP/s of one thread, of one GPU; until a sweep has measured its own
SAMPLED = 500  # images whose questions are tokenised for a forecast
STRATA = 12  # layouts that are costed, where images have layouts of their own
RESULT_BYTES = 40  # of an answer, beside the patches it kept


def usual_speed(device: str, threads: int) -> float:
    """FLOP/s of a worker that has not been measured."""
    return SPEEDS[device] * (threads if device == "cpu" else 1)


Tree = dict[str, dict[str, list[Trial]]]


class Example(NamedTuple):
    """One question as a worker needs it. ``digest`` names all that decides its answers beside the trial."""

    digest: str
    example_id: str
    image: str
    prompt: str
    max_new_tokens: int


def image_layouts(vlm: Adapter, table: pd.DataFrame) -> dict[str, VisualLayout]:
    """The layout of every image of the questions in ``table``; ``vlm`` needs no weights."""
    rows = table.drop_duplicates("image")[["image", "width", "height"]].itertuples(index=False)
    return layouts_of(vlm, {image: (width, height) for image, width, height in rows})


def read_examples(
    table: pd.DataFrame, context: str, layouts: Mapping[str, VisualLayout] | None = None
) -> list[Example]:
    """The rows of ``table``, those of an image together and images of one layout side by side; ``context``: digest of
    model, features and code."""
    columns = [table[name].tolist() for name in ("example_id", "image", "prompt", "max_new_tokens")]
    orders = {image: layout_order(layout) for image, layout in (layouts or {}).items()}
    rows = sorted(zip(*columns, strict=True), key=lambda row: (orders.get(row[1], ()), row[1], row[0]))
    digests = (hashlib.sha256(json.dumps([context, *row]).encode()).hexdigest()[:24] for row in rows)
    return [Example(digest, *row) for digest, row in zip(digests, rows, strict=True)]


def work_tree(trials: Iterable[Trial]) -> Tree:
    """Selection → position strategy → trials by rising first cut, uncut ones last: the trunk only ever moves up."""
    tree: Tree = {}
    for trial in trials:
        tree.setdefault(trial.selection_identity, {}).setdefault(trial.spec.position, []).append(trial)
    for positions in tree.values():
        for mine in positions.values():
            mine.sort(key=lambda trial: trial.first_cut)
    return tree


@dataclass(frozen=True)
class WorkUnit:
    """``trials`` on ``examples``, every one on every one; both in the tree's order."""

    trials: tuple[Trial, ...]
    examples: tuple[Example, ...]
    flops: float = 0.0

    @cached_property
    def unit_id(self) -> str:
        return unit_name([trial.trial_id for trial in self.trials], [example.digest for example in self.examples])

    @cached_property
    def images(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(example.image for example in self.examples))

    @property
    def home(self) -> str:
        """Units of one home read the same features; a worker that has them is given more of them."""
        return self.images[0]

    def only(self, trials: Sequence[Trial] | None = None, examples: Sequence[Example] | None = None) -> WorkUnit:
        trials, examples = tuple(trials or self.trials), tuple(examples or self.examples)
        share = len(trials) * len(examples) / (len(self.trials) * len(self.examples))
        return WorkUnit(trials, examples, self.flops * share)

    def split(self) -> dict[str, WorkUnit]:
        """Two halves: of the images, else of one image's questions, else of the trials. Nothing can halve one answer."""
        if len(self.images) > 1:
            first = set(self.images[: len(self.images) // 2])
            cut = sum(example.image in first for example in self.examples)
            halves = [self.only(examples=self.examples[:cut]), self.only(examples=self.examples[cut:])]
        elif len(self.examples) > 1:
            cut = len(self.examples) // 2
            halves = [self.only(examples=self.examples[:cut]), self.only(examples=self.examples[cut:])]
        elif len(self.trials) > 1:
            cut = len(self.trials) // 2
            halves = [self.only(self.trials[:cut]), self.only(self.trials[cut:])]
        else:
            return {}
        return {half.unit_id: half for half in halves}


@dataclass(frozen=True)
class ModelCost:
    """Floating-point operations of a decoder-only language model; a multiplication and an addition are two.

    ``token``: linear maps of one token in one layer. ``pair``: one query on one key in one layer. ``head``: the next
    token's logits. ``projector``: one visual token. ``system``: tokens before the image.
    """

    layers: int
    token: float
    pair: float
    head: float
    projector: float
    system: int

    @classmethod
    def of(cls, config: Any, system: int) -> ModelCost:
        """From the configuration of a model of transformers. Qwen's merger projects inside the encoder."""
        shape, dim = LlmShape.from_config(config), config.text_config.hidden_size
        attention = 2 * dim * shape.head_dim * (shape.heads + shape.kv_heads)
        return cls(
            layers=shape.layers,
            token=2.0 * (attention + shape.ffn_matrices * dim * shape.intermediate),
            pair=4.0 * shape.heads * shape.head_dim,
            head=2.0 * dim * config.text_config.vocab_size,
            projector=2.0 * (config.vision_config.hidden_size + dim) * dim
            if getattr(config, "projector_hidden_act", None)
            else 0.0,
            system=system,
        )


@dataclass(frozen=True)
class Load:
    """Sums over examples that costs are linear in.

    ``text``, ``made``: tokens of the question behind the image, and of its answer, with squares and product.
    ``merged``: text tokens when common beginnings stand once an image, ``merged_depth``: how many of them each sees.
    """

    images: int = 0
    questions: int = 0
    text: int = 0
    text_squared: int = 0
    made: int = 0
    made_squared: int = 0
    text_made: int = 0
    merged: int = 0
    merged_depth: int = 0

    def scaled(self, factor: float) -> Load:
        return Load(*(round(value * factor) for value in astuple(self)))

    @classmethod
    def of(cls, images: Sequence[Sequence[tuple[tuple[int, ...], int]]]) -> Load:
        """From each image's questions as token ids behind the image, and length of answer."""
        asked = [(len(text), made) for questions in images for text, made in questions]
        depths = [
            place + 1 for questions in images for place in share_beginnings([text for text, _ in questions]).depth
        ]
        return cls(
            images=len(images),
            questions=len(asked),
            text=sum(text for text, _ in asked),
            text_squared=sum(text**2 for text, _ in asked),
            made=sum(made for _, made in asked),
            made_squared=sum(made**2 for _, made in asked),
            text_made=sum(text * made for text, made in asked),
            merged=len(depths),
            merged_depth=sum(depths),
        )


@dataclass(frozen=True)
class Costs:
    """What parts of the tree cost on a load, in FLOPs; trials are those on ``layout``, of which the images are."""

    model: ModelCost
    load: Load
    layout: VisualLayout | None = None
    known: dict[Any, float] = field(default_factory=dict, compare=False, repr=False)  # of trials alike in tokens

    def alone(self, trial: Trial) -> float:
        """A trial that shares nothing: every question its own sequence."""
        return self._once(self._alone, trial)

    def branch(self, trial: Trial) -> float:
        """What a trial adds to its trunk: layers above its first cut, and decoding."""
        return self._once(self._branch, trial)

    def _once(self, cost: Callable[[Trial], float], trial: Trial) -> float:
        key = (cost.__name__, trial.schedule.stage1_keep, trial.cuts)
        if key not in self.known:
            self.known[key] = cost(trial)
        return self.known[key]

    def _alone(self, trial: Trial) -> float:
        return (
            self.load.questions * trial.schedule.stage1_keep * self.model.projector
            + sum(layers * (self._rows(kept) + self._decoding(kept)) for layers, kept in _runs(trial))
            + self._head()
        )

    def trunk(self, kept: int, layers: int) -> float:
        """The layers that all trials of a trunk share."""
        model, load, prefix = self.model, self.load, self.model.system + kept
        once = load.images * (prefix * model.token + prefix * (prefix + 1) / 2 * model.pair)
        text = load.merged * model.token + (prefix * load.merged + load.merged_depth) * model.pair
        return layers * (once + text) + load.images * kept * model.projector

    def _branch(self, trial: Trial) -> float:
        runs = _runs(trial)
        above = sum(layers * self._rows(kept) for layers, kept in runs[1:])
        return above + sum(layers * self._decoding(kept) for layers, kept in runs) + self._head()

    def _rows(self, kept: int) -> float:
        """A layer over questions that stand alone."""
        load, prefix = self.load, self.model.system + kept
        tokens = load.questions * prefix + load.text
        pairs = load.questions * prefix**2 + 2 * prefix * load.text + load.text_squared + tokens
        return tokens * self.model.token + pairs / 2 * self.model.pair

    def _decoding(self, kept: int) -> float:
        load, prefix = self.load, self.model.system + kept
        pairs = prefix * load.made + load.text_made + (load.made_squared + load.made) / 2
        return load.made * self.model.token + pairs * self.model.pair

    def _head(self) -> float:
        return (self.load.made + self.load.questions) * self.model.head


def _runs(trial: Trial) -> list[tuple[int, int]]:
    """``(layers, visual tokens)`` of each stretch between cuts."""
    starts = [0, *(layer for layer, _ in trial.cuts), trial.schedule.layers]
    keeps = [trial.schedule.stage1_keep, *(keep for _, keep in trial.cuts)]
    return [(end - start, keep) for start, end, keep in zip(starts, starts[1:], keeps, strict=False)]


@dataclass(frozen=True)
class Forecast:
    """The tree's size and cost. ``seconds`` is one worker's; ``trunk_flops`` + ``branch_flops`` is with sharing."""

    trials: int
    selections: int
    trunks: int
    forks: int
    answers: int
    alone_flops: float
    trunk_flops: float
    branch_flops: float
    result_bytes: int

    @property
    def shared_flops(self) -> float:
        return self.trunk_flops + self.branch_flops

    @property
    def gain(self) -> float:
        return self.alone_flops / self.shared_flops

    def seconds(self, speed: float) -> float:
        return self.shared_flops / speed


def forecast(trials: Sequence[Trial], costs: Sequence[Costs]) -> Forecast:
    """Count and cost the tree of ``trials`` on the whole load, layout by layout; sizes are of the first layout's tree."""
    parts = [_forecast([trial.on(part.layout) for trial in trials], part) for part in costs]
    sums = ("answers", "alone_flops", "trunk_flops", "branch_flops", "result_bytes")
    return replace(parts[0], **{name: sum(getattr(part, name) for part in parts) for name in sums})


def _forecast(trials: Sequence[Trial], costs: Costs) -> Forecast:
    tree, load = work_tree(trials), costs.load
    trunks = [mine for positions in tree.values() for mine in positions.values()]
    kept = sum(trial.final_keep for trial in trials) * load.questions
    chosen = sum(trial.schedule.stage1_keep for trial in trials) * load.images
    return Forecast(
        trials=len(trials),
        selections=len(tree),
        trunks=len(trunks),
        forks=sum(bool(trial.cuts) for trial in trials),
        answers=len(trials) * load.questions,
        alone_flops=sum(map(costs.alone, trials)),
        trunk_flops=sum(costs.trunk(mine[0].schedule.stage1_keep, _depth(mine)) for mine in trunks),
        branch_flops=sum(map(costs.branch, trials)),
        result_bytes=RESULT_BYTES * len(trials) * load.questions + 2 * kept + 3 * chosen,
    )


def _depth(trials: Sequence[Trial]) -> int:
    """How many layers the trunk of ``trials``, in the tree's order, must pass."""
    return min(trials[-1].first_cut, trials[-1].schedule.layers)


def sweep_costs(vlm: Adapter, table: pd.DataFrame) -> list[Costs]:
    """Costs on the questions of ``table``; ``vlm`` needs no weights.

    Beyond ``SAMPLED`` images a sample stands for all, and beyond ``STRATA`` layouts images of like size for each other.
    """
    tokenizer = vlm.processor.tokenizer
    made = {
        family: len(tokenizer(answer, add_special_tokens=False).input_ids) for family, answer in TYPICAL_ANSWERS.items()
    }
    layouts = image_layouts(vlm, table)
    names = sorted(set(table["image"]))
    sampled = table[table["image"].isin(names[:: -(-len(names) // SAMPLED)])]
    groups = [mine for _, mine in sampled.groupby("image")]
    groups.sort(key=lambda mine: layout_order(layouts[mine["image"].iloc[0]]))
    factor = len(table) / sum(map(len, groups))
    model = ModelCost.of(vlm.model.config, len(vlm.encode_prompt("?").before))
    found = []
    for part in _strata([layouts[mine["image"].iloc[0]] for mine in groups]):
        sample = [
            [
                (vlm.encode_prompt(row.prompt).after, min(made[row.family], row.max_new_tokens))
                for row in mine.itertuples()
            ]
            for mine in groups[part]
        ]
        middle = groups[(part.start + part.stop - 1) // 2]
        found.append(Costs(model, Load.of(sample).scaled(factor), layouts[middle["image"].iloc[0]]))
    return found


def _strata(layouts: Sequence[VisualLayout]) -> list[slice]:
    """Stretches of sorted layouts: one a layout, or ``STRATA`` of like length where there are more."""
    starts = [place for place, layout in enumerate(layouts) if not place or layout != layouts[place - 1]]
    if len(starts) > STRATA:
        starts = sorted({place * len(layouts) // STRATA for place in range(STRATA)})
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(layouts)], strict=True)]


@no_cycles()
def plan_units(
    trials: Sequence[Trial],
    examples: Sequence[Example],
    done: Iterable[tuple[Sequence[str], Sequence[str]]],
    costs: Sequence[Costs],
    speed: float,
    unit_images: int,
    unit_seconds: float = UNIT_SECONDS,
) -> tuple[dict[str, WorkUnit], int]:
    """Units for every answer that is missing, and how many answers are there already.

    ``done``: trial ids and example digests of every stored unit, of which it holds the whole product. ``examples``
    stand image by image. A unit takes trials along the tree until ``speed`` (FLOP/s) forecasts ``unit_seconds``, on at
    most ``unit_images`` images, and on fewer where one trial alone takes longer.
    """
    # The answers a trial has are the bits of a number, one an example: patterns compare and combine at once.
    number = {example.digest: place for place, example in enumerate(examples)}
    known = {trial.trial_id for trial in trials}
    have: dict[str, int] = {}
    for stored, digests in done:
        mine = [trial_id for trial_id in stored if trial_id in known]
        held = _bits([number[digest] for digest in digests if digest in number], len(examples)) if mine else 0
        for trial_id in mine:
            have[trial_id] = have.get(trial_id, 0) | held
    ordered = [trial for positions in work_tree(trials).values() for mine in positions.values() for trial in mine]
    seconds, trunk_seconds = _seconds_an_example(ordered, costs, speed)
    units: dict[str, WorkUnit] = {}
    start = 0
    for batch in _batches(examples, unit_images, unit_seconds, max(seconds.values(), default=0.0)):
        everything, open_units = (1 << len(batch)) - 1, {}
        asked = functools.cache(functools.partial(_chosen, batch))  # few patterns, many units

        def close(
            missing: int,
            asked: Callable[[int], tuple[Example, ...]] = asked,
            open_units: dict[int, _OpenUnit] = open_units,
        ) -> None:
            begun, examples = open_units.pop(missing), asked(missing)
            unit = WorkUnit(tuple(begun.trials), examples, begun.seconds * len(examples) * speed)
            units[unit.unit_id] = unit

        for trial in ordered:
            missing = everything & ~(have.get(trial.trial_id, 0) >> start)
            if not missing:
                continue
            begun = open_units.setdefault(missing, _OpenUnit())
            if begun.trunk != trial.trunk:
                begun.trunk, begun.seconds = trial.trunk, begun.seconds + trunk_seconds[trial.trunk]
            begun.trials.append(trial)
            begun.seconds += seconds[trial.trial_id]
            if begun.seconds * missing.bit_count() >= unit_seconds:
                close(missing)
        for missing in list(open_units):
            close(missing)
        start += len(batch)
    return units, sum(held.bit_count() for held in have.values())


def _chosen(batch: Sequence[Example], pattern: int) -> tuple[Example, ...]:
    """The examples whose bits are set."""
    return tuple(example for place, example in enumerate(batch) if pattern >> place & 1)


def _bits(places: Sequence[int], size: int) -> int:
    """The number whose bits at ``places`` are set."""
    flags = np.zeros(size, dtype=bool)
    flags[list(places)] = True
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


@dataclass
class _OpenUnit:
    trials: list[Trial] = field(default_factory=list)
    trunk: tuple[str, str] | None = None
    seconds: float = 0.0  # an example


def _seconds_an_example(
    ordered: Sequence[Trial], costs: Sequence[Costs], speed: float
) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Seconds an example, on average: of each trial's branch, and of each trunk."""
    each = speed * max(sum(part.load.questions for part in costs), 1)
    trunks: dict[tuple[str, str], float] = {}
    branches: dict[str, float] = {}
    for trial in ordered:  # a trunk's last trial reaches deepest
        there = [(part, trial.on(part.layout)) for part in costs]
        trunks[trial.trunk] = sum(part.trunk(one.schedule.stage1_keep, _depth([one])) for part, one in there) / each
        branches[trial.trial_id] = sum(part.branch(one) for part, one in there) / each
    return branches, trunks


def _batches(
    examples: Sequence[Example], most_images: int, unit_seconds: float, dearest: float
) -> Iterable[Sequence[Example]]:
    """Consecutive examples of at most ``most_images`` images, fewer where the dearest trial fills a unit with less."""
    images: list[list[Example]] = []
    for example in examples:
        if not images or images[-1][0].image != example.image:
            images.append([])
        images[-1].append(example)
    each = dearest * len(examples) / max(len(images), 1)
    count = max(1, min(most_images, int(unit_seconds / each))) if each else most_images
    for start in range(0, len(images), count):
        yield [example for mine in images[start : start + count] for example in mine]
